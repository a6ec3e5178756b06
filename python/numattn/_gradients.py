"""The gradients of attention with respect to its inputs."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Unpack, overload

import numpy as np

from . import _gradient_arguments, _runtime
from ._checks import flag, refuse_unknown
from ._sequences import SEQUENCES_ELSEWHERE

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import ArrayLike, NDArray

    from ._block_mask import BlockMask
    from ._gradient_arguments import GradientArguments, Problem
    from ._option_types import VjpOptions


class Gradients(NamedTuple):
    """Gradients with respect to the inputs of `attention`, by their names.

    Attributes
    ----------
    q, k, v : ndarray
        With respect to q, k and v, in their shapes, dtype and layout.
    bias : ndarray or None
        With respect to `bias`, in its shape and dtype; None unless ``bias_gradient=True``.
    sinks : ndarray, shape (Hq,), or None
        With respect to `sinks`, in their dtype if it is a float dtype, else float64; None without
        sinks.

    See Also
    --------
    attention_backward : compute gradients from the results of `attention`.
    attention_varlen_backward : the same for sequences of different lengths without padding.
    attention_vjp : compute attention, and return a function for its gradients.

    Examples
    --------
    >>> import numpy as np
    >>> import numattn as na
    >>> x = np.random.default_rng(0).standard_normal((4, 10, 8), dtype=np.float32)
    >>> out, vjp = na.attention_vjp(x, x, x)
    >>> gradients = vjp(np.ones_like(out))
    >>> gradients.k.shape, gradients.bias is None
    ((4, 10, 8), True)
    """

    q: NDArray[Any]
    k: NDArray[Any]
    v: NDArray[Any]
    bias: NDArray[Any] | None
    sinks: NDArray[Any] | None


def attention_backward(
    dout: ArrayLike,
    q: ArrayLike,
    k: ArrayLike,
    v: ArrayLike,
    out: ArrayLike,
    lse: ArrayLike,
    *,
    dlse: ArrayLike | None = None,
    bias_gradient: bool = False,
    mask: ArrayLike | BlockMask | None = None,
    tail_mask: ArrayLike | None = None,
    bias: ArrayLike | None = None,
    is_causal: bool = False,
    q_offset: int | ArrayLike | None = None,
    window: tuple[int | None, int | None] | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    alibi_slopes: ArrayLike | None = None,
    sinks: ArrayLike | None = None,
    kv_lengths: int | ArrayLike | None = None,
    q_lengths: int | ArrayLike | None = None,
    dropout: float = 0.0,
    rng: int | None = None,
    layout: Literal["bhld", "blhd"] = "bhld",
    num_threads: int | None = None,
    **unknown: Any,
) -> Gradients:
    """Compute the gradients of a scalar with respect to the inputs of `attention`.

    The scalar is any function of the results, such as a loss. Pass its gradients with respect to
    the results. The weights are computed again from `lse`, one block at a time; the full matrix is
    never held in memory.

    Parameters
    ----------
    dout : array_like, shape (..., Hq, Lq, Dv)
        Gradient with respect to `out`, in the dtype of `q`, or float32 for 16-bit inputs.
    q : array_like, shape (..., Hq, Lq, D)
        Queries, as passed to `attention`.
    k : array_like, shape (..., Hkv, Lk, D)
        Keys.
    v : array_like, shape (..., Hkv, Lk, Dv)
        Values. None of the three may be int8.
    out : array_like, shape (..., Hq, Lq, Dv)
        The result of `attention`. For 16-bit inputs pass it in float32 (see Notes): call
        ``attention(..., out=x)`` with an `x` of float32. The dtype of `q` is accepted too.
    lse : array_like, shape ``out.shape[:-1]``
        The log-sum-exp that `attention` returns with ``return_lse=True``: float32 (float64 for
        float64 inputs).
    dlse : array_like, shape ``out.shape[:-1]``, optional
        Gradient with respect to `lse`, in its dtype. Default: 0, for a scalar that does not depend
        on `lse`.
    bias_gradient : bool, default False
        Also return the gradient with respect to `bias`.
    mask, tail_mask, bias, is_causal, q_offset, window, scale, softcap, alibi_slopes, sinks, \
kv_lengths, q_lengths, dropout, rng, layout
        As passed to `attention`; the same seed `rng` drops the same weights. There are no gradients
        with respect to `scale`, `softcap` and `alibi_slopes`.
    num_threads : int, optional
        As in `attention`. The gradients have the same bits for any number.

    Returns
    -------
    Gradients
        A named tuple of ``q, k, v, bias, sinks``, in the shapes of the inputs. Gradients are summed
        over the axes along which an input was broadcast, and over the query heads that share a head
        of `k` and `v`. `bias` is None without `bias_gradient`, and `sinks` is None without sinks.

    Raises
    ------
    TypeError
        If an argument has the wrong type, as in `attention`, or if the dtype of `dout`, `out`,
        `lse` or `dlse` does not fit.
    ValueError
        If a shape or a value does not fit, or if `bias_gradient` is True without a bias. Both
        errors name the argument, what came and what was expected.
    MemoryError
        If there is no memory for the gradients or the threads' scratch.

    See Also
    --------
    attention_vjp : compute attention, and keep what its gradients need.
    attention_varlen_backward : the same for sequences of different lengths without padding.
    attention : the function that is differentiated.

    Notes
    -----
    Gradients are summed in float32 (float64 for float64 inputs) and rounded once to the dtype of
    the inputs. Scratch memory is linear in the lengths. For 16-bit inputs, and along axes that are
    broadcast, it holds the full gradients in float32.

    The sum over each row of ``dout * out`` replaces a sum over all keys. If `out` has been rounded,
    this sum is wrong in the same direction for all keys of a query, and training may drift.
    Therefore pass `out` in float32 for 16-bit inputs.

    Masked keys get the gradient 0. A NaN in a row of `k` or `v` does not affect queries that do not
    attend to the row, and a NaN in a row of `q`, `dout` or `out` does not affect keys that the row
    does not attend to. Rows beyond `q_lengths` are not read. A NaN that is attended to shows.

    The method is the backward pass of FlashAttention [1]_, including the row sums.

    References
    ----------
    .. [1] T. Dao et al., "FlashAttention: Fast and Memory-Efficient Exact Attention with
       IO-Awareness", NeurIPS 2022.

    Examples
    --------
    >>> import numpy as np
    >>> import numattn as na
    >>> rng = np.random.default_rng(0)
    >>> q, k, v, dout = rng.standard_normal((4, 8, 100, 64), dtype=np.float32)
    >>> out, lse = na.attention(q, k, v, is_causal=True, return_lse=True)
    >>> gradients = na.attention_backward(dout, q, k, v, out, lse, is_causal=True)
    >>> gradients.q.shape, gradients.v.shape
    ((8, 100, 64), (8, 100, 64))

    The first query attends only to the first key, whose weight is 1 whatever the query:

    >>> bool(np.allclose(gradients.q[:, 0], 0, atol=1e-6))
    True
    """
    if unknown:
        refuse_unknown("attention_backward", unknown)
    problem = _gradient_arguments.check(
        q, k, v, bias_gradient, bias, sinks, layout, mask=mask, tail_mask=tail_mask,
        is_causal=is_causal, q_offset=q_offset, window=window, scale=scale, softcap=softcap,
        alibi_slopes=alibi_slopes, kv_lengths=kv_lengths, q_lengths=q_lengths,
        num_threads=num_threads, dropout=dropout, rng=rng,
    )  # fmt: skip
    _gradient_arguments.set_results(problem, out, lse)
    return _differentiate(problem, dout, dlse)


def attention_varlen_backward(
    dout: ArrayLike,
    q: ArrayLike,
    k: ArrayLike,
    v: ArrayLike,
    out: ArrayLike,
    lse: ArrayLike,
    cu_seqlens_q: ArrayLike,
    cu_seqlens_k: ArrayLike,
    *,
    dlse: ArrayLike | None = None,
    tail_mask: ArrayLike | None = None,
    is_causal: bool = False,
    q_offset: int | ArrayLike | None = None,
    window: tuple[int | None, int | None] | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    alibi_slopes: ArrayLike | None = None,
    sinks: ArrayLike | None = None,
    dropout: float = 0.0,
    rng: int | None = None,
    num_threads: int | None = None,
    **unknown: Any,
) -> Gradients:
    """Compute the gradients of a scalar with respect to the inputs of `attention_varlen`.

    Parameters
    ----------
    dout : array_like, shape (total_q, Hq, Dv)
        Gradient with respect to `out`, in the dtype of `q`, or float32 for 16-bit inputs.
    q : array_like, shape (total_q, Hq, D)
        The queries of all sequences, as passed to `attention_varlen`.
    k : array_like, shape (total_k, Hkv, D)
        Their keys.
    v : array_like, shape (total_k, Hkv, Dv)
        Their values.
    out : array_like, shape (total_q, Hq, Dv)
        The result of `attention_varlen`; for 16-bit inputs pass it in float32, as in
        `attention_backward`.
    lse : array_like, shape (total_q, Hq)
        Its log-sum-exp: float32 (float64 for float64 inputs).
    cu_seqlens_q, cu_seqlens_k : array_like of int, shape (B + 1,)
        Where each sequence begins, followed by the total length.
    dlse : array_like, shape (total_q, Hq), optional
        Gradient with respect to `lse`, in its dtype. Default: 0, for a scalar that does not depend
        on `lse`.
    tail_mask, is_causal, q_offset, window, scale, softcap, alibi_slopes, sinks, dropout, rng, \
num_threads
        As passed to `attention_varlen`.

    Returns
    -------
    Gradients
        A named tuple of ``q, k, v, bias, sinks``, in the shapes of the inputs. `bias` is None, and
        `sinks` is None without sinks.

    Raises
    ------
    TypeError, ValueError
        As in `attention_backward`, and if cumulative lengths decrease or do not span the arrays.

    See Also
    --------
    attention_backward : the same for padded batches; its Notes apply here too.
    attention_varlen : the function that is differentiated.

    Examples
    --------
    Two sentences of 3 and 5 tokens, with 2 heads of 4 elements:

    >>> import numpy as np
    >>> import numattn as na
    >>> x, dout = np.random.default_rng(0).standard_normal((2, 8, 2, 4), dtype=np.float32)
    >>> starts = [0, 3, 8]
    >>> out, lse = na.attention_varlen(x, x, x, starts, starts, return_lse=True)
    >>> gradients = na.attention_varlen_backward(dout, x, x, x, out, lse, starts, starts)
    >>> second = na.attention_backward(
    ...     dout[3:], x[3:], x[3:], x[3:], out[3:], lse[3:], layout="blhd"
    ... )
    >>> bool(np.allclose(gradients.k[3:], second.k, atol=1e-6))
    True
    """
    if unknown:
        refuse_unknown("attention_varlen_backward", unknown, SEQUENCES_ELSEWHERE)
    problem = _gradient_arguments.check_varlen(
        q, k, v, cu_seqlens_q, cu_seqlens_k, sinks, tail_mask=tail_mask, is_causal=is_causal,
        q_offset=q_offset, window=window, scale=scale, softcap=softcap, alibi_slopes=alibi_slopes,
        num_threads=num_threads, dropout=dropout, rng=rng,
    )  # fmt: skip
    _gradient_arguments.set_results(problem, out, lse)
    return _differentiate(problem, dout, dlse)


@overload
def attention_vjp(
    q: ArrayLike,
    k: ArrayLike,
    v: ArrayLike,
    *,
    return_lse: Literal[False] = False,
    **options: Unpack[VjpOptions],
) -> tuple[NDArray[Any], Callable[..., Gradients]]: ...
@overload
def attention_vjp(
    q: ArrayLike,
    k: ArrayLike,
    v: ArrayLike,
    *,
    return_lse: Literal[True],
    **options: Unpack[VjpOptions],
) -> tuple[tuple[NDArray[Any], NDArray[Any]], Callable[..., Gradients]]: ...
@overload
def attention_vjp(
    q: ArrayLike,
    k: ArrayLike,
    v: ArrayLike,
    *,
    return_lse: bool,
    **options: Unpack[VjpOptions],
) -> (
    tuple[NDArray[Any], Callable[..., Gradients]]
    | tuple[tuple[NDArray[Any], NDArray[Any]], Callable[..., Gradients]]
): ...
def attention_vjp(
    q: ArrayLike,
    k: ArrayLike,
    v: ArrayLike,
    *,
    bias_gradient: bool = False,
    mask: ArrayLike | BlockMask | None = None,
    tail_mask: ArrayLike | None = None,
    bias: ArrayLike | None = None,
    is_causal: bool = False,
    q_offset: int | ArrayLike | None = None,
    window: tuple[int | None, int | None] | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    alibi_slopes: ArrayLike | None = None,
    sinks: ArrayLike | None = None,
    kv_lengths: int | ArrayLike | None = None,
    q_lengths: int | ArrayLike | None = None,
    dropout: float = 0.0,
    rng: int | np.random.Generator | None = None,
    layout: Literal["bhld", "blhd"] = "bhld",
    return_lse: bool = False,
    num_threads: int | None = None,
    **unknown: Any,
) -> tuple[NDArray[Any] | tuple[NDArray[Any], NDArray[Any]], Callable[..., Gradients]]:
    """Compute attention, and return its result and a function that computes gradients.

    Parameters
    ----------
    q : array_like, shape (..., Hq, Lq, D)
        Queries.
    k : array_like, shape (..., Hkv, Lk, D)
        Keys.
    v : array_like, shape (..., Hkv, Lk, Dv)
        Values. None of the three may be int8.
    bias_gradient : bool, default False
        Whether `vjp` also returns the gradient with respect to `bias`.
    mask, tail_mask, bias, is_causal, q_offset, window, scale, softcap, alibi_slopes, sinks, \
kv_lengths, q_lengths, dropout, layout, num_threads
        As in `attention`.
    rng : int or numpy.random.Generator, optional
        A seed, as in `attention`, or a generator from which a seed is drawn if there is dropout.
        Both passes use the same seed.
    return_lse : bool, default False
        Also return the log-sum-exp of each query's logits.

    Returns
    -------
    out : ndarray, shape (..., Hq, Lq, Dv)
        The result of `attention`; ``(out, lse)`` with ``return_lse=True``.
    vjp : callable
        ``vjp(dout, dlse=None)`` takes the gradients with respect to `out` and `lse`, and returns
        `Gradients` like `attention_backward`. It may be called any number of times, also by several
        threads.

    Raises
    ------
    TypeError, ValueError
        As in `attention`. `vjp` raises them as in `attention_backward`.

    See Also
    --------
    attention_backward : compute gradients from saved results; its Notes apply here too.

    Notes
    -----
    `vjp` does not copy `q`, `k`, `v`, `mask`, `tail_mask` and `bias`: writing to one of these
    arrays before `vjp` is called changes the gradients. It copies the results, in float32 for
    16-bit inputs, so you may write to `out` and `lse`.

    Examples
    --------
    >>> import numpy as np
    >>> import numattn as na
    >>> rng = np.random.default_rng(0)
    >>> q, k, v, target = rng.standard_normal((4, 8, 100, 64), dtype=np.float32)
    >>> out, vjp = na.attention_vjp(q, k, v, is_causal=True)
    >>> loss = np.square(out - target).mean()
    >>> gradients = vjp(2 * (out - target) / out.size)
    >>> out, _ = na.attention_vjp(q, k, v - 1000 * gradients.v, is_causal=True)
    >>> bool(np.square(out - target).mean() < loss)  # a step downwards
    True
    """
    if unknown:
        refuse_unknown("attention_vjp", unknown)
    returns_lse = flag("return_lse", return_lse)
    generator = rng if isinstance(rng, np.random.Generator) else None
    problem = _gradient_arguments.check(
        q, k, v, bias_gradient, bias, sinks, layout, mask=mask, tail_mask=tail_mask,
        is_causal=is_causal, q_offset=q_offset, window=window, scale=scale, softcap=softcap,
        alibi_slopes=alibi_slopes, kv_lengths=kv_lengths, q_lengths=q_lengths,
        num_threads=num_threads, dropout=dropout, rng=rng if generator is None else 0,
    )  # fmt: skip
    if generator is not None and problem.forward.dropout > 0:
        problem.forward.dropout_seed = int(generator.integers(2**64, dtype=np.uint64))
    kept = np.empty(problem.out_shape, problem.precision)
    lse = np.empty(problem.out_shape[:-1], problem.precision)
    _gradient_arguments.set_results(problem, kept, lse)
    _runtime.computations.attention(problem.forward)
    with np.errstate(all="ignore"):
        out = kept.astype(problem.q.dtype)

    def vjp(dout: ArrayLike, dlse: ArrayLike | None = None) -> Gradients:
        """Return the gradients of a loss, given its gradients with respect to the results."""
        return _differentiate(problem, dout, dlse)

    return ((out, lse.copy()) if returns_lse else out), vjp


def _differentiate(problem: Problem, dout: ArrayLike, dlse: ArrayLike | None) -> Gradients:
    arguments = _gradient_arguments.with_gradients(problem, dout, dlse)
    _runtime.computations.attention_backward(arguments)
    sinks = None
    if problem.sinks is not None:
        with np.errstate(all="ignore"):
            sinks = gradient_of_sinks(arguments).astype(problem.sinks, copy=False)
    return Gradients(*_gradient_arguments.as_inputs(problem, arguments), sinks)


def gradient_of_sinks(g: GradientArguments) -> NDArray[np.float64]:
    """Return the gradient of each query head's sink, summed over its rows."""
    a = g.forward
    assert a.sinks is not None
    assert a.out is not None
    assert a.lse is not None
    # In float64: einsum converts a few elements at a time.
    row_sums = np.einsum("...d,...d->...", g.dout, a.out, dtype=np.float64)
    # dout may be NaN for a query that attends to nothing.
    row_sums = np.where(a.out.any(axis=-1), row_sums, 0.0)
    if g.dlse is not None:
        row_sums -= g.dlse
    sinks = a.sinks[:, np.newaxis]
    is_there = sinks != -np.inf
    if a.q_lengths is not None:
        rows = np.arange(a.q.shape[-2])
        is_there = is_there & (rows < a.q_lengths[..., np.newaxis, np.newaxis])
    terms = np.where(is_there, -np.exp(sinks - a.lse) * row_sums, 0)
    total: NDArray[np.float64] = terms.sum(axis=(*range(terms.ndim - 2), -1))
    return total
