"""Attention on PyTorch's tensors.

`scaled_dot_product_attention` has the signature and the meaning of PyTorch's own function,
`attention` has numattn's options. Tensors are read where they are. The packages ``torch`` and
``ml_dtypes`` are needed (``pip install 'numattn[torch]'``), which is why `numattn` does not import
this module.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal, overload

import numpy as np

try:
    import ml_dtypes  # noqa: F401
    import torch
except ImportError as error:
    message = f"numattn.torch needs torch and ml_dtypes ({error}): pip install 'numattn[torch]'"
    raise ImportError(message) from error

from . import _runtime, _torch_operator
from ._checks import ACCEPTED_DTYPES, check_layout, flag, refuse, refuse_kind, refuse_unknown
from ._torch_function import Attention
from ._torch_passes import GIVEN, attend_rows_first, swapped
from ._torch_tensors import (
    BFLOAT16,
    DTYPES,
    EAGER_TYPES,
    after_autocast,
    array_of,
    has_tangent,
    is_recorded,
    is_transformed,
    needs_gradient,
    runs_alone,
    tensor_of,
    unfit,
)

if TYPE_CHECKING:
    from numpy.typing import ArrayLike

    # What numbers and masks may be: tensors, arrays and lists.
    TensorLike = torch.Tensor | ArrayLike

__all__ = ["attention", "scaled_dot_product_attention", "why_not"]

# Before anybody puts ours in its place.
_of_pytorch = torch._C._nn.scaled_dot_product_attention

is_compiling = torch.compiler.is_compiling
_INT16 = np.dtype(np.int16)

DTYPE_NAMES = "one of " + ", ".join(ACCEPTED_DTYPES)

# What may be an array in `numattn.attention`.
_TENSOR_LIKE = (
    "mask", "tail_mask", "bias", "q_offset", "alibi_slopes", "sinks", "kv_lengths", "q_lengths",
)  # fmt: skip

# Beyond it PyTorch's function computes, and may overflow as it likes.
_LARGEST_SCALE = 1e30


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
    """`torch.nn.functional.scaled_dot_product_attention`, computed by numattn on the CPU.

    Parameters
    ----------
    query : torch.Tensor, shape (..., Hq, Lq, D)
        Queries: float16, bfloat16, float32 or float64, of any strides. Two axes are one head.
    key : torch.Tensor, shape (..., Hkv, Lk, D)
        Keys. Leading axes broadcast.
    value : torch.Tensor, shape (..., Hkv, Lk, Dv)
        Values.
    attn_mask : torch.Tensor, optional
        Of bool, True where a query attends to a key; or of float32 or the dtype of `query`, added to
        the logits. Broadcasts to (..., Hq, Lq, Lk).
    dropout_p : float, default 0.0
        The share of the weights that is dropped, whether a model trains or not. The seed is drawn
        from PyTorch's default generator.
    is_causal : bool, default False
        Query ``i`` attends to the keys ``j <= i``: both begin at the first one.
    scale : float, optional
        Factor of the dot products. Default: ``1 / sqrt(D)``.
    enable_gqa : bool, default False
        Whether several query heads may share a head of `key` and `value`. Without it the numbers of
        heads have to be the same, or 1.
    strict : bool, default False
        Whether to raise an error where PyTorch's function would compute instead.

    Returns
    -------
    torch.Tensor, shape (..., Hq, Lq, Dv)
        In the dtype of `query`. It lies in memory as (..., Lq, Hq, Dv), so that
        ``out.transpose(1, 2).reshape(B, L, H * D)`` copies nothing. A query that attends to nothing
        gets zeros.

    Raises
    ------
    NotImplementedError
        With ``strict=True``, if numattn does not compute the call; the error says why.
    RuntimeError, TypeError, ValueError
        PyTorch's own, for arguments that it refuses; or if gradients of gradients are asked for.

    See Also
    --------
    why_not : says what is left to PyTorch's function.
    attention : numattn's own options.

    Notes
    -----
    Gradients, `torch.compile`, `torch.export`, `torch.func` and autocast work as with PyTorch's
    function. `numattn.set_num_threads` sets the number of threads; PyTorch's does not count.

    What numattn does not compute, such as tensors on another device, goes to PyTorch's own function.

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
        not is_compiling()  # first: what follows cannot be recorded
        and type(query) is type(key) is type(value) is torch.Tensor
        and dropout_p == 0.0
        and runs_alone()
    ):
        mask = bias = None
        is_usual = not (enable_gqa and query.ndim < 3)
        if attn_mask is not None:
            is_usual = is_usual and isinstance(attn_mask, torch.Tensor) and attn_mask.ndim > 1
        if is_usual and attn_mask is not None:
            # All axes are there, so that none is taken for another.
            full = _with_axes(attn_mask, query.ndim)
            mask, bias = (full, None) if attn_mask.dtype is torch.bool else (None, full)
        if is_usual:
            out = _usual_call(
                query, key, value, mask, None, bias, is_causal, 0 if is_causal else None, None,
                scale, None, None, None, None, None, "bhld", False, None, enable_gqa,
            )  # fmt: skip
            if out is not None:
                return out  # type: ignore[no-any-return]
    reason = why_not(query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa)
    if reason is not None:
        if strict:
            raise NotImplementedError(
                f"numattn.torch.scaled_dot_product_attention: {reason}; without strict=True it "
                "goes to PyTorch's own function"
            )
        return _of_pytorch(
            query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
        )
    query, key, value = _broadcast(*map(_after_autocast, (query, key, value)), enable_gqa)
    mask = bias = None
    if attn_mask is not None:
        full = _with_axes(_after_autocast(attn_mask), max(query.ndim, key.ndim, value.ndim))
        mask, bias = (full, None) if full.dtype == torch.bool else (None, full)
    options = {
        "mask": mask, "bias": bias, "is_causal": is_causal, "scale": scale, "dropout": dropout_p,
        "q_offset": 0 if is_causal else None,
    }  # fmt: skip
    out, _ = _attend(query, key, value, _DEFAULTS | options)
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
    """Say why `scaled_dot_product_attention` leaves a call to PyTorch's own function.

    Parameters
    ----------
    query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa
        As `scaled_dot_product_attention` takes them.

    Returns
    -------
    str or None
        The argument, what came and what numattn takes; None if numattn computes the call.

    See Also
    --------
    scaled_dot_product_attention : raises an error with this text if it is called with
        ``strict=True``.

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
    tensors = {"query": query, "key": key, "value": value}
    with_mask = tensors if attn_mask is None else {**tensors, "attn_mask": attn_mask}
    for name, x in with_mask.items():
        seen = unfit(x)
        if seen is not None:
            return _reason(name, seen, "plain tensors on the CPU")
    if has_tangent(*with_mask.values()):
        return _reason("query, key, value", "derivatives in forward mode", "those in reverse mode")
    dtypes = {name: after_autocast(x.dtype) for name, x in tensors.items()}
    if query.dtype not in DTYPES:
        return _reason("query", f"dtype {query.dtype}", DTYPE_NAMES)
    if not dtypes["query"] == dtypes["key"] == dtypes["value"]:
        seen = ", ".join(f"{name} {dtype}" for name, dtype in dtypes.items())
        return _reason("query, key, value", seen, "one dtype for all three")
    return (
        _why_not_shapes(query, key, value, enable_gqa)
        or _why_not_mask(query, key, value, attn_mask, enable_gqa)
        or _why_not_numbers(dropout_p, is_causal, scale)
    )


def _reason(name: str, seen: str, taken: str) -> str:
    return f"{name}: got {seen}, numattn takes {taken}"


def _shapes(*tensors: torch.Tensor) -> str:
    return ", ".join(str(tuple(x.shape)) for x in tensors)


def _why_not_shapes(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, enable_gqa: bool
) -> str | None:
    tensors = (query, key, value)
    names, shapes = "query, key, value", f"shapes {_shapes(*tensors)}"
    least = 3 if enable_gqa else 2
    if any(x.ndim < least for x in tensors):
        return _reason(names, shapes, f"at least {least} axes{' with enable_gqa' * enable_gqa}")
    if query.shape[-1] != key.shape[-1] or key.shape[-2] != value.shape[-2]:
        return _reason(names, shapes, "(..., Lq, D), (..., Lk, D) and (..., Lk, Dv)")
    if query.shape[-1] == 0 or value.shape[-1] == 0:
        return _reason(names, shapes, "at least one element in the last axis")
    if not _broadcasts(*(x.shape[: -3 if enable_gqa else -2] for x in tensors)):
        return _reason(names, shapes, "leading axes that broadcast (heads too without enable_gqa)")
    if enable_gqa:
        heads, key_heads, value_heads = (x.shape[-3] for x in tensors)
        if key_heads == 0 or value_heads == 0 or heads % key_heads or heads % value_heads:
            return _reason(names, shapes, "numbers of heads that divide the query's")
        if key_heads != value_heads and 1 not in (key_heads, value_heads):
            return _reason(names, shapes, "as many heads of key as of value, or 1")
    elif max(x.ndim for x in tensors) > 2 and 0 in _heads(*tensors):
        return _reason(names, shapes, "at least one head")
    return None


def _heads(*tensors: torch.Tensor) -> list[int]:
    return [x.shape[-3] if x.ndim > 2 else 1 for x in tensors]


def _broadcasts(*shapes: tuple[int, ...]) -> bool:
    try:
        torch.broadcast_shapes(*shapes)
    except RuntimeError:
        return False
    return True


def _leading(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, enable_gqa: bool
) -> tuple[int, ...]:
    """Return the leading axes of the result, heads included."""
    if not enable_gqa:
        return tuple(torch.broadcast_shapes(*(x.shape[:-2] for x in (query, key, value))))
    batch = torch.broadcast_shapes(*(x.shape[:-3] for x in (query, key, value)))
    return (*batch, query.shape[-3])


def _why_not_mask(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None,
    enable_gqa: bool,
) -> str | None:  # fmt: skip
    if mask is None:
        return None
    dtype, wanted = after_autocast(mask.dtype), after_autocast(query.dtype)
    if dtype not in (torch.bool, torch.float32, wanted):
        return _reason("attn_mask", f"dtype {dtype}", f"bool, float32 or the query's {wanted}")
    pairs = (*_leading(query, key, value, enable_gqa), query.shape[-2], key.shape[-2])
    fits = 2 <= mask.ndim <= len(pairs) and all(
        n in (1, of_pairs)
        for n, of_pairs in zip(mask.shape, pairs[len(pairs) - mask.ndim :], strict=True)
    )
    if not fits:
        taken = f"what broadcasts to {tuple(pairs)}, of two axes at least"
        return _reason("attn_mask", f"shape {tuple(mask.shape)}", taken)
    return None


def _why_not_numbers(dropout_p: object, is_causal: object, scale: Any) -> str | None:
    if not isinstance(dropout_p, (float, int)) or not 0 <= dropout_p < 1:
        return _reason("dropout_p", repr(dropout_p), "0 to 1, without 1")
    if not isinstance(is_causal, bool):
        return _reason("is_causal", repr(is_causal), "True or False")
    is_number = scale is None or isinstance(scale, (float, int, torch.SymFloat, torch.SymInt))
    if not is_number or not (scale is None or abs(scale) < _LARGEST_SCALE):
        return _reason("scale", repr(scale), f"None or a number below {_LARGEST_SCALE:.0e} in size")
    return None


def _broadcast(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, enable_gqa: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return what numattn reads as PyTorch does: the same leading axes, heads that fit."""
    if query.ndim == key.ndim == value.ndim == 2:
        return query, key, value
    *batch, heads = _leading(query, key, value, enable_gqa)
    key_heads = max(_heads(key, value))
    if not enable_gqa and key_heads != 1:
        key_heads = heads

    def expanded(x: torch.Tensor, heads: int) -> torch.Tensor:
        shape = (*batch, heads, *x.shape[-2:])
        return x if x.shape == shape else x.expand(shape)

    return expanded(query, heads), expanded(key, key_heads), expanded(value, key_heads)


def _after_autocast(x: torch.Tensor) -> torch.Tensor:
    return x.to(after_autocast(x.dtype))


_Options = dict[str, Any]
_DEFAULTS: _Options = {
    "mask": None, "tail_mask": None, "bias": None, "is_causal": False, "q_offset": None,
    "window": None, "scale": None, "softcap": None, "alibi_slopes": None, "sinks": None,
    "kv_lengths": None, "q_lengths": None, "dropout": 0.0, "rng": None, "layout": "bhld",
    "num_threads": None,
}  # fmt: skip


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
    mask: TensorLike | None = None,
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
    """`numattn.attention` on tensors, with all its options and gradients.

    Parameters
    ----------
    q : torch.Tensor, shape (..., Hq, Lq, D)
        Queries: float16, bfloat16, float32 or float64, on the CPU, of any strides.
    k : torch.Tensor, shape (..., Hkv, Lk, D)
        Keys. Hq has to be a multiple of Hkv; leading axes broadcast.
    v : torch.Tensor, shape (..., Hkv, Lk, Dv)
        Values.
    mask, tail_mask, bias, is_causal, q_offset, window, scale, softcap, alibi_slopes, sinks, \
kv_lengths, q_lengths, layout, num_threads
        As in `numattn.attention`: causal queries end with the last key unless `q_offset` says
        otherwise. What is an array there may be a tensor, an array or a list.
    dropout : float in [0, 1), default 0
        The share of the weights that is dropped.
    rng : int, optional
        The seed of dropout, 0 to ``2**64 - 1``. Default: one from PyTorch's default generator, so
        that `torch.manual_seed` and checkpoints of activations repeat it.
    return_lse : bool, default False
        Also return the log-sum-exp of each query's logits.

    Returns
    -------
    out : torch.Tensor, shape (..., Hq, Lq, Dv)
        In the layout and dtype of `q`. It lies in memory as (..., Lq, Hq, Dv) in both layouts.
    lse : torch.Tensor, shape ``out.shape[:-1]``
        Only with ``return_lse=True``: float32 (float64 for float64).

    Raises
    ------
    TypeError, ValueError
        As `numattn.attention`; also for tensors that are not on the CPU. Nothing is left to
        PyTorch.
    RuntimeError
        If gradients of gradients are asked for.

    See Also
    --------
    scaled_dot_product_attention : PyTorch's signature and meaning.

    Notes
    -----
    There are gradients with respect to `q`, `k`, `v`, `bias` and `sinks`, and of `lse` too. Under
    autocast `q`, `k`, `v` and a `bias` are cast as PyTorch casts those of its own function.

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
        not is_compiling()
        and type(q) is type(k) is type(v) is torch.Tensor
        and rng is None
        and dropout == 0.0
        and runs_alone()
    ):
        result = _usual_call(
            q, k, v, mask, tail_mask, bias, is_causal, q_offset, window, scale, softcap,
            alibi_slopes, sinks, kv_lengths, q_lengths, layout, return_lse, num_threads, True,
        )  # fmt: skip
        if result is not None:
            return result  # type: ignore[no-any-return]
    for name, x in (("q", q), ("k", k), ("v", v)):
        _check_fits(name, x)
        if x.dtype not in DTYPES:
            refuse_kind(name, f"dtype {x.dtype}", DTYPE_NAMES)
    if has_tangent(q, k, v):
        refuse_kind("q, k, v", "derivatives in forward mode", "those in reverse mode (backward)")
    check_layout(layout)
    returns_lse = flag("return_lse", return_lse)
    if torch.is_autocast_enabled("cpu"):
        q, k, v = map(_after_autocast, (q, k, v))
        if isinstance(bias, torch.Tensor):
            bias = _after_autocast(bias)
    out, lse = _attend(
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


def _usual_call(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: Any, tail_mask: Any, bias: Any,
    is_causal: Any, q_offset: Any, window: Any, scale: Any, softcap: Any, alibi_slopes: Any,
    sinks: Any, kv_lengths: Any, q_lengths: Any, layout: str, return_lse: Any, num_threads: Any,
    shares_heads: bool,
) -> Any:  # fmt: skip
    """Compute a call that `attention_common` takes, at little cost; return None for others.

    `shares_heads`: whether several query heads may share one of several heads of k and v.
    """
    common = _runtime.attention_common
    if common is None:
        return None
    q_: Any
    is_bfloat16 = q.dtype is torch.bfloat16
    try:
        if is_bfloat16:
            # Views of ints forget gradients, where `numpy` itself would refuse.
            if q.requires_grad or k.requires_grad or v.requires_grad:
                return None
            int16 = torch.int16
            q_ = q.view(int16).numpy().view(BFLOAT16)
            k_ = k.view(int16).numpy().view(BFLOAT16)
            v_ = v.view(int16).numpy().view(BFLOAT16)
        else:
            q_, k_, v_ = q.numpy(), k.numpy(), v.numpy()
        if mask is not None:
            mask = _usual(mask)
        if tail_mask is not None:
            tail_mask = _usual(tail_mask)
        if bias is not None:
            bias = _usual(bias)
        if sinks is not None:
            sinks = _usual_numbers(sinks)
        if alibi_slopes is not None:
            alibi_slopes = _usual_numbers(alibi_slopes)
        if q_offset is not None:
            q_offset = _usual(q_offset)
        if kv_lengths is not None:
            kv_lengths = _usual(kv_lengths)
        if q_lengths is not None:
            q_lengths = _usual(q_lengths)
    except (RuntimeError, TypeError):  # which others explain
        return None
    rows_first = False
    q_shape, k_shape = q_.shape, k_.shape
    if layout == "bhld" and len(q_shape) > 2 and len(k_shape) > 2:
        heads = q_shape[-3]
        if not shares_heads and k_shape[-3] not in (heads, 1):
            return None
        rows_first = heads > 1 and q_shape[-2] > 1 and v_.ndim > 2
        if rows_first:
            layout = "blhd"
            q_, k_, v_ = q_.swapaxes(-3, -2), k_.swapaxes(-3, -2), v_.swapaxes(-3, -2)
    result = common(
        q_, k_, v_, mask, tail_mask, bias, is_causal, q_offset, window, scale, softcap,
        alibi_slopes, sinks, kv_lengths, q_lengths, layout, return_lse, None, num_threads, None,
        None, 0.0, None,
    )  # fmt: skip
    if result is None:
        return None
    out = result[0] if return_lse else result
    if rows_first:
        out = out.swapaxes(-3, -2)
    if is_bfloat16:
        out = torch.from_numpy(out.view(_INT16)).view(torch.bfloat16)
    else:
        out = torch.from_numpy(out)
    if not return_lse:
        return out
    return out, torch.from_numpy(result[1].swapaxes(-2, -1) if rows_first else result[1])


def _usual(x: Any) -> Any:
    """Return an array for a tensor without a gradient, all else as it is."""
    if not isinstance(x, torch.Tensor):
        return x
    if type(x) is not torch.Tensor or x.requires_grad:
        raise TypeError
    if x.dtype is torch.bfloat16:
        return x.view(torch.int16).numpy().view(BFLOAT16)
    return x.numpy()


def _usual_numbers(x: Any) -> Any:
    """Return what `attention_common` takes of numbers of heads: nothing of 16 bits."""
    is_wide = not isinstance(x, torch.Tensor) or x.element_size() > 2 or x.requires_grad
    return _usual(x if is_wide else x.float())


def _attend(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, options: _Options, returns_lse: bool = False
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Return the result, and the log-sum-exp if it is wanted."""
    is_eager = type(q) in EAGER_TYPES and not is_recorded()
    dropout = options["dropout"]
    if isinstance(dropout, (int, float)) and dropout > 0 and options["rng"] is None:
        seed = torch.randint(2**63 - 1, (), device="cpu")
        options = {**options, "rng": int(seed) if is_eager else seed}
    for name in _TENSOR_LIKE:
        if isinstance(options[name], torch.Tensor):
            _check_fits(name, options[name])
    if not is_eager or needs_gradient(q, k, v, options["bias"], options["sinks"]):
        run = Attention.apply if is_eager or is_transformed() else _torch_operator.attention
        out, _, lse = run(q, k, v, *_as_given(options), torch.is_grad_enabled())
        return out, lse
    arrays = {name: _as_array(x) for name, x in options.items()}
    result = attend_rows_first(
        array_of(q), array_of(k), array_of(v), **arrays, return_lse=returns_lse
    )
    if returns_lse:
        return tensor_of(result[0]), tensor_of(result[1])
    return tensor_of(result), None


def _check_fits(name: str, x: object) -> None:
    seen = unfit(x)
    if seen is not None:
        refuse_kind(name, seen, "a plain tensor of PyTorch on the CPU")


def _as_array(x: Any) -> Any:
    """Return an array for a tensor, all else as it is."""
    return array_of(x) if isinstance(x, torch.Tensor) else x


def _as_given(options: _Options) -> list[Any]:
    """Return the options in the order of `GIVEN`, in the kinds that operators take."""
    window = (None, None) if options["window"] is None else options["window"]
    if not isinstance(window, (tuple, list)) or len(window) != 2:
        refuse("window", repr(window), "two sides, (left, right)")
    given = {
        **options,
        **{name: _as_tensor(options[name]) for name in _TENSOR_LIKE},
        "seed": _seed(options["rng"]),
        "window_left": window[0],
        "window_right": window[1],
    }
    return [given[name] for name in GIVEN]


def _as_tensor(x: Any) -> torch.Tensor | None:
    if x is None or isinstance(x, torch.Tensor):
        return x
    if isinstance(x, (int, torch.SymInt)):
        return torch.scalar_tensor(x, dtype=torch.int64)
    if isinstance(x, (list, tuple)) and torch.compiler.is_compiling():
        # Numbers of Python are float64 in numattn.
        is_float = any(isinstance(number, float) for number in x)
        return torch.tensor(x, dtype=torch.float64 if is_float else None)
    array = np.asarray(x)
    return tensor_of(array if array.flags.writeable else array.copy())


def _seed(rng: Any) -> torch.Tensor | None:
    """Return a seed as a tensor, whose ints have a sign."""
    if rng is None or isinstance(rng, torch.Tensor):
        return rng
    return torch.scalar_tensor(rng - 2**64 if rng >= 2**63 else rng, dtype=torch.int64)
