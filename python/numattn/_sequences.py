"""`attention_varlen` and `attention_paged`: attention for ragged batches and pages."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal, Unpack, overload

from . import _sequence_arguments
from ._attention import compute
from ._checks import ELSEWHERE, NO_DROPOUT, refuse_unknown

if TYPE_CHECKING:
    from numpy.typing import ArrayLike, NDArray

    from ._option_types import PagedOptions, VarlenOptions


# Options of `attention` that these functions do not have.
SEQUENCES_ELSEWHERE = {
    **ELSEWHERE,
    "mask": "`tail_mask=` for the last keys (these functions take no mask of all keys)",
    "block_mask": "`tail_mask=` for the last keys (these functions take no mask of all keys)",
    "attn_mask": "`tail_mask=` for the last keys (these functions take no mask of all keys)",
    "attention_mask": "pass the sequences' lengths, or `tail_mask=` for the last keys",
}
PAGED_ELSEWHERE = {**SEQUENCES_ELSEWHERE, **NO_DROPOUT}


@overload
def attention_varlen(
    q: ArrayLike,
    k: ArrayLike,
    v: ArrayLike,
    cu_seqlens_q: ArrayLike,
    cu_seqlens_k: ArrayLike,
    *,
    return_lse: Literal[False] = False,
    **options: Unpack[VarlenOptions],
) -> NDArray[Any]: ...
@overload
def attention_varlen(
    q: ArrayLike,
    k: ArrayLike,
    v: ArrayLike,
    cu_seqlens_q: ArrayLike,
    cu_seqlens_k: ArrayLike,
    *,
    return_lse: Literal[True],
    **options: Unpack[VarlenOptions],
) -> tuple[NDArray[Any], NDArray[Any]]: ...
@overload
def attention_varlen(
    q: ArrayLike,
    k: ArrayLike,
    v: ArrayLike,
    cu_seqlens_q: ArrayLike,
    cu_seqlens_k: ArrayLike,
    *,
    return_lse: bool,
    **options: Unpack[VarlenOptions],
) -> NDArray[Any] | tuple[NDArray[Any], NDArray[Any]]: ...
def attention_varlen(
    q: ArrayLike,
    k: ArrayLike,
    v: ArrayLike,
    cu_seqlens_q: ArrayLike,
    cu_seqlens_k: ArrayLike,
    *,
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
    return_lse: bool = False,
    out: NDArray[Any] | None = None,
    num_threads: int | None = None,
    k_scale: ArrayLike | None = None,
    v_scale: ArrayLike | None = None,
    **unknown: Any,
) -> NDArray[Any] | tuple[NDArray[Any], NDArray[Any]]:
    """Attention for sequences of different lengths, one after another, without padding.

    Sequence ``i`` has the queries ``q[cu_seqlens_q[i]:cu_seqlens_q[i + 1]]``, which attend only to
    the keys ``k[cu_seqlens_k[i]:cu_seqlens_k[i + 1]]``.

    Parameters
    ----------
    q : array_like, shape (total_q, Hq, D)
        The queries of all sequences.
    k : array_like, shape (total_k, Hkv, D)
        Their keys.
    v : array_like, shape (total_k, Hkv, Dv)
        Their values.
    cu_seqlens_q, cu_seqlens_k : array_like of int, shape (B + 1,)
        Where each sequence begins, followed by the total length: cumulative lengths from 0 on.
    tail_mask : array_like of bool, optional
        As in `attention`, for the last T keys of each sequence. Broadcasts to (Hq, total_q, T),
        where T is at most the number of keys of the longest sequence.
    is_causal, window, scale, softcap, alibi_slopes, sinks, num_threads
        As in `attention`; positions are counted within each sequence.
    q_offset : int or array_like of int, shape (B,), optional
        Position of a sequence's first query among its keys. Default: its number of keys minus its
        number of queries.
    dropout, rng
        As in `attention`; sequence ``b`` drops the same weights as batch item ``b`` of a padded
        batch.
    return_lse : bool, default False
        Also return the log-sum-exp of each query's logits.
    out : ndarray, shape (total_q, Hq, Dv), optional
        Array to write the result to, of its dtype. With 16-bit inputs it may be float32.
    k_scale, v_scale : array_like of float32, shape (total_k, Hkv), optional
        Scales for `k` or `v` of dtype int8.

    Returns
    -------
    out : ndarray, shape (total_q, Hq, Dv)
        In the dtype of `q`.
    lse : ndarray, shape (total_q, Hq)
        Only with ``return_lse=True``. Natural logarithm, float32 (float64 for float64 inputs).

    Raises
    ------
    TypeError, ValueError
        As in `attention`, and if cumulative lengths decrease or do not span the arrays.

    See Also
    --------
    attention : attention for arrays and padded batches; describes the options.
    attention_paged : attention to keys and values in pages.
    attention_varlen_backward : the gradients.

    Examples
    --------
    Two sentences of 3 and 5 tokens, with 2 heads of 4 elements:

    >>> import numpy as np
    >>> import numattn as na
    >>> x = np.random.default_rng(0).standard_normal((8, 2, 4), dtype=np.float32)
    >>> out = na.attention_varlen(x, x, x, [0, 3, 8], [0, 3, 8], is_causal=True)
    >>> second = na.attention(x[3:], x[3:], x[3:], is_causal=True, layout="blhd")
    >>> bool(np.array_equal(out[3:], second))
    True
    """
    if unknown:
        refuse_unknown("attention_varlen", unknown, SEQUENCES_ELSEWHERE)
    return compute(  # type: ignore[no-any-return]
        _sequence_arguments.check_varlen(
            q, k, v, cu_seqlens_q, cu_seqlens_k, tail_mask, k_scale, v_scale, q_offset, return_lse,
            out,
            is_causal=is_causal, window=window, scale=scale, softcap=softcap,
            alibi_slopes=alibi_slopes, sinks=sinks, num_threads=num_threads, dropout=dropout,
            rng=rng,
        )
    )  # fmt: skip


@overload
def attention_paged(
    q: ArrayLike,
    k_pages: ArrayLike,
    v_pages: ArrayLike,
    block_table: ArrayLike,
    kv_lengths: int | ArrayLike,
    *,
    return_lse: Literal[False] = False,
    **options: Unpack[PagedOptions],
) -> NDArray[Any]: ...
@overload
def attention_paged(
    q: ArrayLike,
    k_pages: ArrayLike,
    v_pages: ArrayLike,
    block_table: ArrayLike,
    kv_lengths: int | ArrayLike,
    *,
    return_lse: Literal[True],
    **options: Unpack[PagedOptions],
) -> tuple[NDArray[Any], NDArray[Any]]: ...
@overload
def attention_paged(
    q: ArrayLike,
    k_pages: ArrayLike,
    v_pages: ArrayLike,
    block_table: ArrayLike,
    kv_lengths: int | ArrayLike,
    *,
    return_lse: bool,
    **options: Unpack[PagedOptions],
) -> NDArray[Any] | tuple[NDArray[Any], NDArray[Any]]: ...
def attention_paged(
    q: ArrayLike,
    k_pages: ArrayLike,
    v_pages: ArrayLike,
    block_table: ArrayLike,
    kv_lengths: int | ArrayLike,
    *,
    tail_mask: ArrayLike | None = None,
    is_causal: bool = False,
    q_offset: int | ArrayLike | None = None,
    window: tuple[int | None, int | None] | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    alibi_slopes: ArrayLike | None = None,
    sinks: ArrayLike | None = None,
    q_lengths: int | ArrayLike | None = None,
    layout: Literal["bhld", "blhd"] = "bhld",
    return_lse: bool = False,
    out: NDArray[Any] | None = None,
    num_threads: int | None = None,
    k_scale: ArrayLike | None = None,
    v_scale: ArrayLike | None = None,
    **unknown: Any,
) -> NDArray[Any] | tuple[NDArray[Any], NDArray[Any]]:
    """Attention to keys and values in pages, which sequences may share.

    Key ``j`` of batch item ``i`` is row ``j % page_size`` of page
    ``block_table[i, j // page_size]``.

    Parameters
    ----------
    q : array_like, shape (B, Hq, Lq, D)
        Queries; in the layout "blhd", (B, Lq, Hq, D).
    k_pages : array_like, shape (num_pages, page_size, Hkv, D)
        The pages of keys, whatever the layout. They are read in place.
    v_pages : array_like, shape (num_pages, page_size, Hkv, Dv)
        The pages of values.
    block_table : array_like of int, shape (B, max_pages)
        The pages of each batch item, in order. Entries after the last valid key are ignored.
    kv_lengths : int or array_like of int, shape (B,)
        Number of valid keys of each batch item.
    tail_mask : array_like of bool, optional
        As in `attention`. Broadcasts to (B, Hq, Lq, T), whatever the layout.
    is_causal, q_offset, window, scale, softcap, alibi_slopes, sinks, q_lengths, return_lse, \
num_threads
        As in `attention`. If positions matter and there are several queries, also pass `q_lengths`
        or `q_offset`.
    layout : {"bhld", "blhd"}, default "bhld"
        Layout of `q` and the result.
    out : ndarray, optional
        Array to write the result to, of its shape and dtype. With 16-bit inputs it may be float32.
    k_scale, v_scale : array_like of float32, shape (num_pages, page_size, Hkv), optional
        Scales for pages of dtype int8.

    Returns
    -------
    out : ndarray, shape (B, Hq, Lq, Dv)
        In the layout and dtype of `q`.
    lse : ndarray, shape ``out.shape[:-1]``
        Only with ``return_lse=True``. Natural logarithm, float32 (float64 for float64 inputs).

    Raises
    ------
    TypeError, ValueError
        As in `attention`, and if a page does not exist or a length exceeds the block table.

    See Also
    --------
    attention : attention for arrays; describes the options.
    KVCache : keys and values of growing sequences, in one array.
    PageBounds : attention to only the pages that matter most.

    Notes
    -----
    The method is by Kwon et al., "Efficient Memory Management for Large Language Model Serving with
    PagedAttention", SOSP 2023.

    Examples
    --------
    Two sequences of 5 and 3 keys share page 2, which holds two keys:

    >>> import numpy as np
    >>> import numattn as na
    >>> rng = np.random.default_rng(0)
    >>> pages = rng.standard_normal((4, 2, 1, 8), dtype=np.float32)
    >>> q = rng.standard_normal((2, 1, 1, 8), dtype=np.float32)
    >>> table = [[2, 0, 3], [2, 1, 0]]
    >>> out = na.attention_paged(q, pages, pages, table, [5, 3])
    >>> k = pages[[2, 0, 3]].reshape(6, 8)[:5]
    >>> bool(np.allclose(out[0, 0], na.attention(q[0, 0], k, k), atol=1e-6))
    True
    """
    if unknown:
        refuse_unknown("attention_paged", unknown, PAGED_ELSEWHERE)
    return compute(  # type: ignore[no-any-return]
        _sequence_arguments.check_paged(
            q, k_pages, v_pages, block_table, kv_lengths, tail_mask, k_scale, v_scale, q_offset,
            q_lengths, layout, return_lse, out, is_causal=is_causal, window=window, scale=scale,
            softcap=softcap, alibi_slopes=alibi_slopes, sinks=sinks, num_threads=num_threads,
        )
    )  # fmt: skip
