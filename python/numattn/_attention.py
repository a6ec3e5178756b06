"""The public function."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal, Unpack, overload

from . import _arguments, _runtime
from ._checks import refuse_kind, refuse_unknown

if TYPE_CHECKING:
    from numpy.typing import ArrayLike, NDArray

    from ._block_mask import BlockMask
    from ._option_types import AttentionOptions


@overload
def attention(
    q: ArrayLike,
    k: ArrayLike,
    v: ArrayLike,
    *,
    return_lse: Literal[False] = False,
    **options: Unpack[AttentionOptions],
) -> NDArray[Any]: ...
@overload
def attention(
    q: ArrayLike,
    k: ArrayLike,
    v: ArrayLike,
    *,
    return_lse: Literal[True],
    **options: Unpack[AttentionOptions],
) -> tuple[NDArray[Any], NDArray[Any]]: ...
@overload
def attention(
    q: ArrayLike,
    k: ArrayLike,
    v: ArrayLike,
    *,
    return_lse: bool,
    **options: Unpack[AttentionOptions],
) -> NDArray[Any] | tuple[NDArray[Any], NDArray[Any]]: ...
def attention(
    q: ArrayLike,
    k: ArrayLike,
    v: ArrayLike,
    *,
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
    return_lse: bool = False,
    out: NDArray[Any] | None = None,
    num_threads: int | None = None,
    k_scale: ArrayLike | None = None,
    v_scale: ArrayLike | None = None,
    **unknown: Any,
) -> NDArray[Any] | tuple[NDArray[Any], NDArray[Any]]:
    r"""Scaled dot-product attention, ``softmax(scale * q @ k.T) @ v`` with options.

    The options apply in this order: scale, softcap, bias and ALiBi, masks (``mask``,
    ``tail_mask``, ``is_causal``, ``window``, ``kv_lengths``), sinks, and after the softmax dropout.
    Query row ``i`` has the position ``p = i + q_offset`` among the keys, and key ``j`` the position
    ``j``. The logits are never held in memory as a whole.

    Parameters
    ----------
    q : array_like, shape (..., Hq, Lq, D)
        Queries. Two axes are one head, three are heads; leading axes of `q`, `k` and `v` broadcast
        by NumPy's rules. Any strides are read in place.
    k : array_like, shape (..., Hkv, Lk, D)
        Keys. Hq has to be a multiple of Hkv: query head ``h`` reads head ``h // (Hq // Hkv)``.
    v : array_like, shape (..., Hkv, Lk, Dv)
        Values.
    mask : array_like of bool or BlockMask, optional
        True where a query attends to a key; see `BlockMask` for masks of long contexts. Broadcasts
        to (..., Hq, Lq, Lk), whatever the layout.
        Axes are aligned at the end, as by NumPy: pass a batch's mask (B, Lk) as
        ``mask[:, None, None, :]``, and (B, Lq, Lk) as ``mask[:, None]``. A UserWarning says which
        reading was taken where sizes allow both: where an array that lacks axes has first axes
        like the whole batch, such as (B,), or (B1, B2) with two batch axes.
    tail_mask : array_like of bool, optional
        A mask of the last T valid keys of each batch item alone; all keys before them are seen. It
        broadcasts to (..., Hq, Lq, T) as `mask` does to (..., Hq, Lq, Lk), but its last axis has to
        be there: it says what T is, 0 to Lk. Fewer valid keys than T take the last columns. For
        trees of drafts, whose tokens are the last ones; holds together with `mask`.
    bias : array_like of float, optional
        Added to the logits, in natural logarithms; -inf masks. Broadcasts like `mask`, with
        the same warning. float32 or the dtype of `q`.
    is_causal : bool, default False
        Attend to the keys ``j <= p``.
    q_offset : int or array_like of int, optional
        Position of the first query among the keys, one for all or one per batch item (broadcast to
        the leading axes). Default: the number of valid keys less the number of valid queries, which
        aligns the last query with the last key, as decoding with a cache needs.
    window : tuple (left, right), optional
        Attend to the keys ``p - left <= j <= p + right``; both inclusive, None for no limit.
    scale : float, optional
        Factor of the dot products. Default: ``1 / sqrt(D)``.
    softcap : float, optional
        Cap the scaled logits ``s`` to ``softcap * tanh(s / softcap)``.
    alibi_slopes : array_like of float, shape (Hq,), optional
        Add ``-slope * abs(p - j)`` to the logits.
    sinks : array_like of float, shape (Hq,), optional
        For each query head a logit, in natural logarithms, of a key without a value: it takes part
        in the denominator and in `lse`, and in nothing else.
    kv_lengths : int or array_like of int, optional
        Number of valid keys, for all or per batch item; keys from there on are not attended to.
        Where positions matter (`is_causal`, `window`, `alibi_slopes`), `q_lengths` or `q_offset`
        has to say where several queries are.
    q_lengths : int or array_like of int, optional
        Number of valid queries, for all or per batch item. Nothing is computed for the others:
        they get zeros, and -inf as lse. A batch padded on the right is ``q_lengths=n,
        kv_lengths=n``.
    dropout : float in [0, 1), default 0
        The share of the weights that is dropped, for training: these add nothing to the result,
        and the others are multiplied by ``1 / (1 - dropout)``. `lse` does not know of it.
    rng : int, optional
        A seed, 0 to ``2**64 - 1``, that decides which weights are dropped; needed with `dropout`,
        and the same for `attention` and its backward (see Notes).
    layout : {"bhld", "blhd"}, default "bhld"
        "blhd" takes and gives (..., L, H, D).
    return_lse : bool, default False
        Also return the log-sum-exp of each query's logits.
    out : ndarray, optional
        Where to write the result, of its shape and dtype; may have any strides, but share no memory
        with an input. With 16-bit inputs it may be of float32: then the result is not rounded.
    num_threads : int, optional
        Threads for this call, the calling one included. Default: `get_num_threads`. The result does
        not depend on it, to the bit.
    k_scale, v_scale : array_like of float32, shape (..., Hkv, Lk), optional
        With `k` or `v` of int8, as `quantize_kv` gives them: each key's row is multiplied by its
        scale. In the layout "blhd", (..., Lk, Hkv).

    Returns
    -------
    out : ndarray, shape (..., Hq, Lq, Dv)
        In the layout and dtype of `q`. A query that attends to nothing gets zeros.
    lse : ndarray, shape ``out.shape[:-1]``
        Only with ``return_lse=True``. Natural logarithm, float32 (float64 for float64 input); -inf
        for a query that attends to nothing, its sink if it has one.

    Raises
    ------
    TypeError
        If an argument is of the wrong kind, such as an integer array or a float mask.
    ValueError
        If a shape or a value does not fit, or `kv_lengths` leave open where the queries are. Both
        errors name the argument, what came and what was expected.
    MemoryError
        If there is no memory for the result or the threads' scratch.

    See Also
    --------
    attention_varlen : sequences of different lengths without padding.
    attention_paged : keys and values in pages.
    KVCache : keys and values of the tokens so far.
    BlockMask : a mask by blocks, of which empty ones cost nothing.
    merge_states : attention over disjoint sets of keys, merged.
    quantize_kv : keys and values in 8 bits.
    set_num_threads : with how many threads.

    Notes
    -----
    `q`, `k` and `v` have one dtype: float16, bfloat16 (of ``ml_dtypes``), float32 or float64; `k`
    and `v` may be int8 with scales instead.
    16-bit floats are computed in float32 and rounded at the end. Finite values, be they the largest
    ones, give a finite result where the logits are finite. For that, the dot products (also before
    `scale`, and their partial sums) and what scale and bias make of them have to be within float32
    (float64 for float64); elements of `q` and `k` up to ``1.8e19 / sqrt(D)`` keep the products
    there. Beyond it a logit may be infinite or NaN: one of -inf has no weight, any other may make
    the query's result and lse infinite or NaN.

    On CPUs with AVX512_BF16 the weights of bfloat16 values are rounded to bfloat16 too (not their
    sum), and products and sums below 1.2e-38 count as 0, so that values below some 1e-36 lose
    digits.

    Dropout gives each weight a number of its own, and drops it where the number is below
    ``dropout * 2**32``, rounded down. For key ``j``, query ``i`` (counted from 0, whatever
    `q_offset`), query head ``h`` and batch item ``b`` (in row-major order of the leading axes) it
    is word ``j % 4`` of Philox4x32 with ten rounds [4]_, under the key ``(rng % 2**32,
    rng // 2**32)`` at the counter ``(j // 4, i, h, b)``. So `attention` and its backward drop the
    same weights, whatever the layout, the dtype, the threads and the backend. A result that grows
    beyond the largest number may be infinite.

    A masked key is never read into a result, be it NaN; a NaN that is attended to shows, also where
    its weight is dropped. For the same machine and ISA level the bits of a result of the compiled
    kernels depend on the inputs' values alone: not on the number of threads, the other batch items
    (but, with dropout, on how many are before), the arrays' strides or how the caller's thread
    rounds. Their scratch memory is proportional to the number of threads, plus a byte for each tile
    of a dense mask (96 keys by 8, 16 or 64 queries on generic, AVX2 or AVX-512, half as many in
    float64), and where few queries attend to many keys the size of their result for every 1536 keys
    that are read; NumPy's is linear in the lengths.

    The method is the online softmax of Milakov and Gimelshein [1]_ over blocks of keys, as in
    FlashAttention [2]_. The attention itself is that of Vaswani et al. [3]_.

    References
    ----------
    .. [1] M. Milakov, N. Gimelshein, "Online normalizer calculation for softmax", 2018.
    .. [2] T. Dao et al., "FlashAttention: Fast and Memory-Efficient Exact Attention with
       IO-Awareness", NeurIPS 2022.
    .. [3] A. Vaswani et al., "Attention Is All You Need", NeurIPS 2017.
    .. [4] J. K. Salmon et al., "Parallel Random Numbers: As Easy as 1, 2, 3", SC 2011.

    Examples
    --------
    >>> import numpy as np
    >>> import numattn as na
    >>> rng = np.random.default_rng(0)
    >>> q, k, v = rng.standard_normal((3, 8, 100, 64), dtype=np.float32)  # 8 heads, 100 tokens
    >>> na.attention(q, k, v, is_causal=True).shape
    (8, 100, 64)

    The first token sees only itself:

    >>> bool(np.allclose(na.attention(q, k, v, is_causal=True)[:, 0], v[:, 0]))
    True

    Two sentences of 100 and 60 tokens, padded on the right to one batch:

    >>> x = rng.standard_normal((2, 8, 100, 64), dtype=np.float32)
    >>> n = [100, 60]
    >>> out, lse = na.attention(
    ...     x, x, x, is_causal=True, q_lengths=n, kv_lengths=n, return_lse=True
    ... )
    >>> out.shape, lse.shape
    ((2, 8, 100, 64), (2, 8, 100))
    >>> alone = x[1, :, :60]
    >>> bool(np.array_equal(out[1, :, :60], na.attention(alone, alone, alone, is_causal=True)))
    True
    """
    if unknown:
        refuse_unknown("attention", unknown)
    return attend(  # type: ignore[no-any-return]
        q, k, v, mask, tail_mask, bias, is_causal, q_offset, window, scale, softcap, alibi_slopes,
        sinks, kv_lengths, q_lengths, layout, return_lse, out, num_threads, k_scale, v_scale,
        dropout, rng,
    )  # fmt: skip


def attend(*arguments: Any) -> Any:
    """Do what `attention` does with all of its arguments by their places, and one more: whether all
    scales are known to be finite."""
    if _runtime.attention_common is not None:
        result = _runtime.attention_common(*arguments)
        if result is not None:
            return result
    if arguments[2] is None:  # which `check` takes for a stage without values
        refuse_kind("v", "None", "an array")
    return compute(_arguments.check(*arguments))


def compute(arguments: _arguments.Arguments) -> Any:
    """Run the backend on checked arguments; return what the caller gets."""
    _runtime.computations.attention(arguments)
    if arguments.result_lse is None:
        return arguments.result
    return arguments.result, arguments.result_lse
