"""The public function `attention`."""

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
    r"""Scaled dot-product attention, ``softmax(scale * q @ k.T) @ v``, with options.

    The options apply in this order: scale, softcap, bias and ALiBi, masks (``mask``,
    ``tail_mask``, ``is_causal``, ``window``, ``kv_lengths``), sinks and, after the softmax,
    dropout. Query ``i`` has the position ``p = i + q_offset`` among the keys, and key ``j`` has the
    position ``j``. The full matrix of logits is never held in memory.

    Parameters
    ----------
    q : array_like, shape (..., Hq, Lq, D)
        Queries. With two axes, the array is one head; with three, it has no batch axes. Leading
        axes of `q`, `k` and `v` broadcast by NumPy's rules. Arrays with any strides are read in
        place.
    k : array_like, shape (..., Hkv, Lk, D)
        Keys. Hq must be a multiple of Hkv: query head ``h`` reads head ``h // (Hq // Hkv)``.
    v : array_like, shape (..., Hkv, Lk, Dv)
        Values.
    mask : array_like of bool or BlockMask, optional
        True where a query attends to a key. Broadcasts to (..., Hq, Lq, Lk), whatever the layout.
        Use a `BlockMask` for long contexts. Axes are aligned at the end, as in NumPy: pass a
        batch's mask (B, Lk) as ``mask[:, None, None, :]``, and (B, Lq, Lk) as ``mask[:, None]``. If
        the first axes of an array with fewer axes also match the whole batch shape, such as (B,),
        or (B1, B2) with two batch axes, a UserWarning says which reading was taken.
    tail_mask : array_like of bool, optional
        A mask of only the last T valid keys of each batch item; all earlier keys are attended to.
        Broadcasts to (..., Hq, Lq, T) as `mask` does to (..., Hq, Lq, Lk), except that its last
        axis must have its full length T, from 0 to Lk. If an item has fewer than T valid keys, they
        take the last columns. Use it for trees of drafts, whose tokens come last. It can be
        combined with `mask`.
    bias : array_like of float, optional
        Added to the logits, in natural logarithms; -inf masks. Broadcasts like `mask`, with
        the same warning. float32 or the dtype of `q`.
    is_causal : bool, default False
        Attend to the keys ``j <= p``.
    q_offset : int or array_like of int, optional
        Position of the first query among the keys, one for all or one per batch item (broadcast to
        the leading axes). Default: the number of valid keys minus the number of valid queries,
        which aligns the last query with the last key, as decoding with a cache needs.
    window : tuple (left, right), optional
        Attend to the keys ``p - left <= j <= p + right``, both ends included. None means no limit.
    scale : float, optional
        Factor of the dot products. Default: ``1 / sqrt(D)``.
    softcap : float, optional
        Cap the scaled logits ``s`` to ``softcap * tanh(s / softcap)``.
    alibi_slopes : array_like of float, shape (Hq,), optional
        Add ``-slope * abs(p - j)`` to the logits.
    sinks : array_like of float, shape (Hq,), optional
        One logit per query head, in natural logarithms, of a key without a value. It counts only in
        the denominator of the softmax and in `lse`.
    kv_lengths : int or array_like of int, optional
        Number of valid keys, for all or per batch item; later keys are not attended to. If
        positions matter (`is_causal`, `window`, `alibi_slopes`) and there are several queries, also
        pass `q_lengths` or `q_offset`, which say where the queries are.
    q_lengths : int or array_like of int, optional
        Number of valid queries, for all or per batch item. The other queries are not computed:
        their result is 0, and their lse -inf. For a batch padded on the right, pass
        ``q_lengths=n, kv_lengths=n``.
    dropout : float in [0, 1), default 0
        Share of the weights that is dropped, for training. Dropped weights add nothing to the
        result, and the others are multiplied by ``1 / (1 - dropout)``. `lse` is not affected.
    rng : int, optional
        A seed from 0 to ``2**64 - 1`` that decides which weights are dropped. Required with
        `dropout`; pass the same seed to `attention` and its backward pass (see Notes).
    layout : {"bhld", "blhd"}, default "bhld"
        "blhd" takes and returns (..., L, H, D).
    return_lse : bool, default False
        Also return the log-sum-exp of each query's logits.
    out : ndarray, optional
        Array to write the result to, of its shape and dtype. It may have any strides, but must not
        share memory with an input. With 16-bit inputs it may be float32: then the result is not
        rounded.
    num_threads : int, optional
        Threads for this call, including the calling thread. Default: `get_num_threads`. The result
        has the same bits for any number.
    k_scale, v_scale : array_like of float32, shape (..., Hkv, Lk), optional
        For `k` or `v` of dtype int8, the scales that `quantize_kv` returns: each key's row is
        multiplied by its scale. In the layout "blhd", (..., Lk, Hkv).

    Returns
    -------
    out : ndarray, shape (..., Hq, Lq, Dv)
        In the layout and dtype of `q`. It is 0 for a query that attends to nothing.
    lse : ndarray, shape ``out.shape[:-1]``
        Only with ``return_lse=True``. Natural logarithm, float32 (float64 for float64 inputs). For
        a query that attends to nothing it is the sink of its head, or -inf without sinks.

    Raises
    ------
    TypeError
        If an argument has the wrong type or dtype, such as an integer array or a float mask.
    ValueError
        If a shape or a value does not fit, or `kv_lengths` do not say where the queries are. Both
        errors name the argument, what came and what was expected.
    MemoryError
        If there is no memory for the result or the threads' scratch.

    See Also
    --------
    attention_varlen : attention for sequences of different lengths without padding.
    attention_paged : attention to keys and values in pages.
    KVCache : keys and values of the tokens so far.
    BlockMask : a mask stored by blocks, whose empty blocks cost nothing.
    merge_states : merge attention over disjoint sets of keys.
    quantize_kv : round keys and values to 8 bits.
    set_num_threads : set the default number of threads.

    Notes
    -----
    **Dtypes.** `q`, `k` and `v` have one dtype: float16, bfloat16 (from ``ml_dtypes``), float32 or
    float64. `k` and `v` may instead be int8 with scales. 16-bit floats are computed in float32 and
    rounded at the end. On CPUs with AVX512_BF16 the weights of bfloat16 values are rounded to
    bfloat16 too (not their sum). Products and sums below 1.2e-38 count as 0 there, so values below
    about 1e-36 lose digits.

    **Finite results.** If the logits are finite, finite values, even the largest ones, produce a
    finite result. For finite logits, these must stay within float32 (float64 for float64 inputs):
    the dot products, also before `scale`, their partial sums, and the logits after scale and bias.
    Elements of `q` and `k` up to ``1.8e19 / sqrt(D)`` keep the products in range. Beyond it a logit
    may be infinite or NaN: a logit of -inf has no weight, and any other may make the query's result
    and lse infinite or NaN.

    **Masked keys.** A masked key is never read into a result, even if it is NaN. A NaN that is
    attended to shows in the result, also if its weight is dropped.

    **Dropout.** Each weight has its own random number, and is dropped if that number is below
    ``dropout * 2**32``, rounded down. For key ``j``, query ``i`` (counted from 0, whatever
    `q_offset`), query head ``h`` and batch item ``b`` (in row-major order of the leading axes) the
    number is word ``j % 4`` of Philox4x32 with ten rounds [4]_, with the key ``(rng % 2**32,
    rng // 2**32)`` and the counter ``(j // 4, i, h, b)``. `attention` and its backward pass
    therefore drop the same weights, whatever the layout, dtype, number of threads and backend. With
    dropout, a result that exceeds the largest number may be infinite.

    **Determinism.** On the same machine and ISA level, the bits that the compiled kernels compute
    depend only on the values of the inputs. They do not depend on the number of threads, the other
    batch items, the strides of the arrays or the rounding mode of the calling thread. With dropout
    they also depend on the number of batch items before.

    **Memory.** The scratch memory of the kernels is proportional to the number of threads, plus:

    - one byte for each tile of a dense mask: 96 keys by 8, 16 or 64 queries on generic, AVX2 or
      AVX-512, half as many in float64;
    - with both a mask and a tail mask, one byte for each query and key, as in the mask that they
      are combined into;
    - if few queries attend to many keys, the size of their result for every 1536 keys read.

    The scratch memory of the NumPy backend is linear in the lengths.

    The method is the online softmax of Milakov and Gimelshein [1]_ over blocks of keys, as in
    FlashAttention [2]_. Attention was introduced by Vaswani et al. [3]_.

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
    """Compute `attention` from positional arguments: all of its own, then one more, whether all
    scales are known to be finite."""
    if _runtime.attention_common is not None:
        result = _runtime.attention_common(*arguments)
        if result is not None:
            return result
    if arguments[2] is None:  # `check` would take None for a stage without values
        refuse_kind("v", "None", "an array")
    return compute(_arguments.check(*arguments))


def compute(arguments: _arguments.Arguments) -> Any:
    """Run the backend on checked arguments and return the result for the caller."""
    _runtime.computations.attention(arguments)
    if arguments.result_lse is None:
        return arguments.result
    return arguments.result, arguments.result_lse
