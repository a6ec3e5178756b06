"""Attention on PyTorch tensors.

`scaled_dot_product_attention` has the signature and the meaning of PyTorch's own function, and
`attention` has numattn's options. Tensors are read in place. This module needs the packages
``torch`` and ``ml_dtypes`` (``pip install 'numattn[torch]'``), so `numattn` does not import it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal, overload

try:
    import ml_dtypes  # noqa: F401
    import torch
except ImportError as error:
    message = f"numattn.torch needs torch and ml_dtypes ({error}): pip install 'numattn[torch]'"
    raise ImportError(message) from error

from ._checks import check_layout, flag, refuse_kind, refuse_unknown
from ._torch_calls import DEFAULTS, call, check_fits, usual_call
from ._torch_limits import DTYPE_NAMES, as_numattn_broadcasts, reason_against
from ._torch_tensors import DTYPES, after_autocast, has_tangent, runs_alone, unfit

if TYPE_CHECKING:
    from typing import TypeAlias

    from numpy.typing import ArrayLike

    from ._block_mask import BlockMask

    # Numbers and masks may be tensors, arrays or lists.
    TensorLike: TypeAlias = torch.Tensor | ArrayLike

__all__ = ["attention", "scaled_dot_product_attention", "why_not"]

# Saved before a program replaces it by numattn's function.
_of_pytorch = torch._C._nn.scaled_dot_product_attention

_is_compiling = torch.compiler.is_compiling


def scaled_dot_product_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    *,
    strict: bool = False,
) -> torch.Tensor:
    """Compute `torch.nn.functional.scaled_dot_product_attention` with numattn on the CPU.

    Parameters
    ----------
    query : torch.Tensor, shape (..., Hq, Lq, D)
        Queries: float16, bfloat16, float32 or float64, with any strides. With two axes, the tensor
        is one head.
    key : torch.Tensor, shape (..., Hkv, Lk, D)
        Keys. Leading axes broadcast.
    value : torch.Tensor, shape (..., Hkv, Lk, Dv)
        Values.
    attn_mask : torch.Tensor, optional
        A bool mask, True where a query attends to a key, or floats to add to the logits, in float32
        or the dtype of `query`. Broadcasts to (..., Hq, Lq, Lk).
    dropout_p : float, default 0.0
        Share of the weights that is dropped, whether the model trains or not. The seed is drawn
        from PyTorch's default generator.
    is_causal : bool, default False
        Query ``i`` attends to the keys ``j <= i``: the first query is aligned with the first key.
    scale : float, optional
        Factor of the dot products. Default: ``1 / sqrt(D)``.
    enable_gqa : bool, default False
        Whether several query heads may share a head of `key` and `value`. Without it, the numbers
        of heads must be equal, or 1.
    strict : bool, default False
        Whether to raise an error if numattn does not compute the call. By default PyTorch's
        function computes it.

    Returns
    -------
    torch.Tensor, shape (..., Hq, Lq, Dv)
        In the dtype of `query`. Its memory layout is (..., Lq, Hq, Dv), so that
        ``out.transpose(1, 2).reshape(B, L, H * D)`` copies nothing. It is 0 for a query that
        attends to nothing.

    Raises
    ------
    NotImplementedError
        With ``strict=True``, if numattn does not compute the call; the error says why.
    RuntimeError, TypeError, ValueError
        PyTorch's own errors, for arguments that it refuses. RuntimeError also for second
        derivatives.

    See Also
    --------
    why_not : say why a call goes to PyTorch's function.
    attention : attention on tensors with numattn's options.

    Notes
    -----
    Gradients, `torch.compile`, `torch.export`, `torch.func` and autocast work as with PyTorch's
    function. `numattn.set_num_threads` sets the number of threads; PyTorch's number of threads has
    no effect.

    PyTorch's function computes calls that numattn does not support, such as those with tensors on
    another device.

    Examples
    --------
    >>> import torch
    >>> from numattn.torch import scaled_dot_product_attention
    >>> q, k, v = torch.randn(3, 1, 8, 100, 64)
    >>> out = scaled_dot_product_attention(q, k, v, is_causal=True)
    >>> own = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
    >>> torch.allclose(out, own, atol=1e-5)
    True
    """
    if (
        not _is_compiling()  # first: what follows cannot be recorded
        and type(query) is type(key) is type(value) is torch.Tensor
        and dropout_p == 0.0
        and runs_alone()
    ):
        mask = bias = None
        is_usual = not (enable_gqa and query.ndim < 3)
        if attn_mask is not None:
            is_usual = is_usual and unfit(attn_mask) is None and attn_mask.ndim > 1
        if is_usual and attn_mask is not None:
            # Add all missing axes, so that none is mistaken for another.
            full = _with_axes(attn_mask, query.ndim)
            mask, bias = (full, None) if attn_mask.dtype is torch.bool else (None, full)
        if is_usual:
            out = usual_call(
                query, key, value, mask, None, bias, is_causal, 0 if is_causal else None, None,
                scale, None, None, None, None, None, "bhld", False, None, enable_gqa,
            )  # fmt: skip
            if out is not None:
                return out
    reason = reason_against(query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa)
    if reason is not None:
        if strict:
            raise NotImplementedError(
                f"numattn.torch.scaled_dot_product_attention: {reason}; without strict=True, "
                "PyTorch's function computes the call"
            )
        return _of_pytorch(
            query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
        )
    query, key, value = map(_after_autocast, (query, key, value))
    query, key, value = as_numattn_broadcasts(query, key, value, enable_gqa)
    mask = bias = None
    if attn_mask is not None:
        full = _with_axes(_after_autocast(attn_mask), max(query.ndim, key.ndim, value.ndim))
        mask, bias = (full, None) if full.dtype == torch.bool else (None, full)
    options = {
        "mask": mask, "bias": bias, "is_causal": is_causal, "scale": scale, "dropout": dropout_p,
        "q_offset": 0 if is_causal else None,
    }  # fmt: skip
    out, _ = call(query, key, value, DEFAULTS | options)
    return out


def why_not(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> str | None:
    """Say why `scaled_dot_product_attention` passes a call to PyTorch's function.

    Parameters
    ----------
    query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa
        As in `scaled_dot_product_attention`.

    Returns
    -------
    str or None
        The name of an argument, what came and what numattn takes; None if numattn computes the
        call.

    See Also
    --------
    scaled_dot_product_attention : raises an error with this text with ``strict=True``.

    Examples
    --------
    >>> import torch
    >>> from numattn.torch import why_not
    >>> q = torch.ones(1, 8, 100, 64)
    >>> why_not(q, q, q) is None
    True
    >>> why_not(q.to("meta"), q, q)
    'query: got a tensor on meta, numattn takes plain tensors on the CPU'
    """
    reason = reason_against(query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa)
    return None if reason is None else str(reason)


@overload
def attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    return_lse: Literal[False] = False,
    **options: Any,
) -> torch.Tensor: ...
@overload
def attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, return_lse: Literal[True], **options: Any
) -> tuple[torch.Tensor, torch.Tensor]: ...
@overload
def attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, return_lse: bool, **options: Any
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]: ...
def attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    mask: TensorLike | BlockMask | None = None,
    tail_mask: TensorLike | None = None,
    bias: TensorLike | None = None,
    is_causal: bool = False,
    q_offset: int | TensorLike | None = None,
    window: tuple[int | None, int | None] | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    alibi_slopes: TensorLike | None = None,
    sinks: TensorLike | None = None,
    kv_lengths: int | TensorLike | None = None,
    q_lengths: int | TensorLike | None = None,
    dropout: float = 0.0,
    rng: int | None = None,
    layout: Literal["bhld", "blhd"] = "bhld",
    return_lse: bool = False,
    num_threads: int | None = None,
    **unknown: Any,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Compute `numattn.attention` on tensors, with all its options and gradients.

    Parameters
    ----------
    q : torch.Tensor, shape (..., Hq, Lq, D)
        Queries: float16, bfloat16, float32 or float64, on the CPU, with any strides.
    k : torch.Tensor, shape (..., Hkv, Lk, D)
        Keys. Hq must be a multiple of Hkv; leading axes broadcast.
    v : torch.Tensor, shape (..., Hkv, Lk, Dv)
        Values.
    mask, tail_mask, bias, is_causal, q_offset, window, scale, softcap, alibi_slopes, sinks, \
kv_lengths, q_lengths, layout, num_threads
        As in `numattn.attention`: by default the last query is aligned with the last key. Instead
        of arrays you may pass tensors or lists. `mask` may be a `numattn.BlockMask`, except in
        compiled, exported and transformed programs.
    dropout : float in [0, 1), default 0
        Share of the weights that is dropped.
    rng : int, optional
        The seed of dropout, from 0 to ``2**64 - 1``. Default: drawn from PyTorch's default
        generator, so that `torch.manual_seed` and activation checkpointing repeat it.
    return_lse : bool, default False
        Also return the log-sum-exp of each query's logits.

    Returns
    -------
    out : torch.Tensor, shape (..., Hq, Lq, Dv)
        In the layout and dtype of `q`. Its memory layout is (..., Lq, Hq, Dv) for both layouts.
    lse : torch.Tensor, shape ``out.shape[:-1]``
        Only with ``return_lse=True``: float32 (float64 for float64 inputs).

    Raises
    ------
    TypeError, ValueError
        As in `numattn.attention`, and for tensors that are not on the CPU. This function never
        calls PyTorch's.
    RuntimeError
        If second derivatives are requested.

    See Also
    --------
    scaled_dot_product_attention : the same computation with PyTorch's signature.

    Notes
    -----
    There are gradients with respect to `q`, `k`, `v`, `bias` and `sinks`, and gradients also flow
    through `lse`. Other options must not require a gradient. Under autocast, `q`, `k`, `v` and
    `bias` are cast as PyTorch casts the inputs of its function.

    Examples
    --------
    >>> import torch
    >>> from numattn.torch import attention
    >>> q, k, v = torch.randn(3, 2, 8, 100, 64, requires_grad=True)
    >>> sinks = torch.zeros(8, requires_grad=True)
    >>> out = attention(q, k, v, is_causal=True, window=(15, 0), sinks=sinks)
    >>> out.sum().backward()
    >>> sinks.grad.shape
    torch.Size([8])
    """
    if unknown:
        refuse_unknown("numattn.torch.attention", unknown)
    if (
        not _is_compiling()
        and type(q) is type(k) is type(v) is torch.Tensor
        and rng is None
        and dropout == 0.0
        and runs_alone()
    ):
        result = usual_call(
            q, k, v, mask, tail_mask, bias, is_causal, q_offset, window, scale, softcap,
            alibi_slopes, sinks, kv_lengths, q_lengths, layout, return_lse, num_threads, True,
        )  # fmt: skip
        if result is not None:
            return result
    for name, x in (("q", q), ("k", k), ("v", v)):
        check_fits(name, x)
        if x.dtype not in DTYPES:
            refuse_kind(name, f"dtype {x.dtype}", DTYPE_NAMES)
    if has_tangent(q, k, v, bias, sinks):
        names = "q, k, v, bias, sinks"
        refuse_kind(names, "forward-mode derivatives", "reverse-mode derivatives (backward)")
    check_layout(layout)
    returns_lse = flag("return_lse", return_lse)
    if torch.is_autocast_enabled("cpu"):
        q, k, v = map(_after_autocast, (q, k, v))
        if isinstance(bias, torch.Tensor):
            bias = _after_autocast(bias)
    out, lse = call(
        q,
        k,
        v,
        {
            "mask": mask, "tail_mask": tail_mask, "bias": bias, "is_causal": is_causal,
            "q_offset": q_offset, "window": window, "scale": scale, "softcap": softcap,
            "alibi_slopes": alibi_slopes, "sinks": sinks, "kv_lengths": kv_lengths,
            "q_lengths": q_lengths, "dropout": dropout, "rng": rng, "layout": layout,
            "num_threads": num_threads,
        },
        returns_lse,
    )  # fmt: skip
    return (out, lse) if returns_lse else out


def _with_axes(mask: torch.Tensor, ndim: int) -> torch.Tensor:
    return mask if mask.ndim >= ndim else mask[(None,) * (ndim - mask.ndim)]


def _after_autocast(x: torch.Tensor) -> torch.Tensor:
    return x.to(after_autocast(x.dtype))
