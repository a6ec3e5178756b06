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
        In the shapes, dtype and layout of the inputs.
    bias : ndarray or None
        In the shape and dtype of `bias`; None where it was not asked for.
    sinks : ndarray, shape (Hq,), or None
        In the dtype of `sinks` if that is a float, else float64; None without sinks.

    See Also
    --------
    attention_backward, attention_varlen_backward, attention_vjp

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
    """Gradients of a scalar with respect to the inputs of `attention`.

    The scalar is whatever was computed from the results: what is passed are its gradients with
    respect to these. The weights are computed again from `lse`, a block at a time, and never held
    in memory as a whole.

    Parameters
    ----------
    dout : array_like, shape (..., Hq, Lq, Dv)
        Gradient with respect to `out`, in its shape. In the dtype of `q`, or float32 with 16-bit
        inputs.
    q : array_like, shape (..., Hq, Lq, D)
        Queries, as they were given to `attention`.
    k : array_like, shape (..., Hkv, Lk, D)
        Keys.
    v : array_like, shape (..., Hkv, Lk, Dv)
        Values. None of the three may be int8.
    out : array_like, shape (..., Hq, Lq, Dv)
        The result of `attention`. With 16-bit inputs it had better be float32, as ``attention(...,
        out=x)`` gives it for an `x` of float32 (see Notes).
    lse : array_like, shape ``out.shape[:-1]``
        The log-sum-exp of `attention` with ``return_lse=True``: float32 (float64 for float64).
    dlse : array_like, shape ``out.shape[:-1]``, optional
        Gradient with respect to `lse`, in its dtype. Default: none.
    bias_gradient : bool, default False
        Also return the gradient with respect to `bias`.
    mask, tail_mask, bias, is_causal, q_offset, window, scale, softcap, alibi_slopes, sinks, \
kv_lengths, q_lengths, dropout, rng, layout
        What `attention` was given; with the same seed `rng` the same weights are dropped. There are
        no gradients with respect to `scale`, `softcap` and `alibi_slopes`.
    num_threads : int, optional
        As in `attention`. The gradients do not depend on it, to the bit.

    Returns
    -------
    Gradients
        A named tuple of ``q, k, v, bias, sinks``, in the shapes of the inputs: summed over the axes
        along which an input was broadcast, and over the query heads that share a head of `k` and
        `v`. `bias` is None without `bias_gradient`, `sinks` without sinks.

    Raises
    ------
    TypeError
        If an argument is of the wrong kind: as in `attention`, and if the dtype of `dout`, `out`,
        `lse` or `dlse` does not fit.
    ValueError
        If a shape or a value does not fit, or with `bias_gradient` without a bias. Both errors name
        the argument, what came and what was expected.
    MemoryError
        If there is no memory for the gradients or the threads' scratch.

    See Also
    --------
    attention_vjp : computes attention and keeps what its gradients need.
    attention_varlen_backward : sequences of different lengths without padding.
    attention : what it is the derivative of.

    Notes
    -----
    Gradients are summed in float32 (float64 for float64) and rounded once, to the dtype of the
    inputs. Scratch memory is linear in the lengths; with 16-bit inputs, and along axes that are
    broadcast, it has the gradients in float32 and in full.

    The row sums of `dout` times `out` are what sums over all keys would be. A rounded `out` makes
    them wrong in the same direction for all keys of a query, and training may drift: so 16-bit
    inputs have an `out` of float32 beside them.

    Masked keys get the gradient 0, and a NaN there never shows: not in a row of `k` or `v` for the
    queries that do not attend to it, and not in a row of `q`, `dout` or `out` for the keys that it
    does not attend to. Rows beyond `q_lengths` are not looked at. A NaN that is attended to shows.

    The method is the backward pass of FlashAttention [1]_, the row sums included.

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

    The first query sees the first key alone, whose weight is 1 whatever the query:

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
    """Gradients of a scalar with respect to the inputs of `attention_varlen`.

    Parameters
    ----------
    dout : array_like, shape (total_q, Hq, Dv)
        Gradient with respect to `out`. In the dtype of `q`, or float32 with 16-bit inputs.
    q : array_like, shape (total_q, Hq, D)
        The queries of all sequences, as they were given to `attention_varlen`.
    k : array_like, shape (total_k, Hkv, D)
        Their keys.
    v : array_like, shape (total_k, Hkv, Dv)
        Their values.
    out : array_like, shape (total_q, Hq, Dv)
        The result of `attention_varlen`; with 16-bit inputs it had better be float32.
    lse : array_like, shape (total_q, Hq)
        Its log-sum-exp: float32 (float64 for float64).
    cu_seqlens_q, cu_seqlens_k : array_like of int, shape (B + 1,)
        Where each sequence begins, and at last the total length.
    dlse : array_like, shape (total_q, Hq), optional
        Gradient with respect to `lse`, in its dtype. Default: none.
    tail_mask, is_causal, q_offset, window, scale, softcap, alibi_slopes, sinks, dropout, rng, \
num_threads
        What `attention_varlen` was given.

    Returns
    -------
    Gradients
        A named tuple of ``q, k, v, bias, sinks``, in the shapes of the inputs; `bias` is None, and
        so is `sinks` without sinks.

    Raises
    ------
    TypeError, ValueError
        As `attention_backward`; also if cumulative lengths decrease or do not span the arrays.

    See Also
    --------
    attention_backward : what holds of both.
    attention_varlen : what it is the derivative of.

    Examples
    --------
    Two sentences of 3 and 5 tokens, with 2 heads of 4:

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
    """Attention, and the function that gives its gradients.

    Parameters
    ----------
    q : array_like, shape (..., Hq, Lq, D)
        Queries, as in `attention`.
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
        A seed, as in `attention`, or a generator from which one is drawn if there is dropout. Both
        passes use that seed.
    return_lse : bool, default False
        Also return the log-sum-exp of each query's logits.

    Returns
    -------
    out : ndarray, shape (..., Hq, Lq, Dv)
        The result of `attention`; ``(out, lse)`` with ``return_lse=True``.
    vjp : callable
        ``vjp(dout, dlse=None)`` returns `Gradients`, as `attention_backward` does for gradients
        with respect to `out` and `lse`. It may be called any number of times, also by several
        threads.

    Raises
    ------
    TypeError, ValueError
        As `attention` and, from `vjp`, as `attention_backward`.

    See Also
    --------
    attention_backward : the gradients by themselves; what holds of them.

    Notes
    -----
    `vjp` keeps `q`, `k`, `v`, `mask`, `tail_mask` and `bias` themselves, and no copies of them:
    whoever writes to one of these arrays before `vjp` is called gets other gradients. Of the
    results it keeps copies, in float32 with 16-bit inputs: they may be written to.

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
        """Return the gradients of a loss, from those with respect to the results."""
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
    """Return for each query head the sum over its rows of what the sink takes from the others."""
    a = g.forward
    assert a.sinks is not None
    assert a.out is not None
    assert a.lse is not None
    # In float64, which einsum converts to a few elements at a time.
    row_sums = np.einsum("...d,...d->...", g.dout, a.out, dtype=np.float64)
    # Of a query that attends to nothing dout may be NaN.
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
