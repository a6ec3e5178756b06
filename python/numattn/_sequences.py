"""Attention for batches whose sequences are not side by side in one array."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal, Unpack, overload

from . import _sequence_arguments
from ._attention import compute
from ._checks import ELSEWHERE, NO_DROPOUT, refuse_unknown

if TYPE_CHECKING:
    from numpy.typing import ArrayLike, NDArray

    from ._option_types import PagedOptions, VarlenOptions


# What `attention` has, and these functions have not.
SEQUENCES_ELSEWHERE = {
    **ELSEWHERE,
    "mask": "`tail_mask=` for the last keys (there is no mask of all keys here)",
    "block_mask": "`tail_mask=` for the last keys (there is no mask of all keys here)",
    "attn_mask": "`tail_mask=` for the last keys (there is no mask of all keys here)",
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
    """Attention of sequences of different lengths, one after another, without padding.

    Sequence ``i`` has the queries ``q[cu_seqlens_q[i]:cu_seqlens_q[i + 1]]``, which attend to the
    keys ``k[cu_seqlens_k[i]:cu_seqlens_k[i + 1]]`` and to no others.

    Parameters
    ----------
    q : array_like, shape (total_q, Hq, D)
        The queries of all sequences.
    k : array_like, shape (total_k, Hkv, D)
        Their keys.
    v : array_like, shape (total_k, Hkv, Dv)
        Their values.
    cu_seqlens_q, cu_seqlens_k : array_like of int, shape (B + 1,)
        Where each sequence begins, and at last the total length: cumulative lengths from 0 on.
    tail_mask : array_like of bool, optional
        As of `attention`, of the last T keys of each sequence; broadcasts to (Hq, total_q, T). T is
        at most the number of keys of the longest sequence.
    is_causal, window, scale, softcap, alibi_slopes, sinks, num_threads
        As in `attention`; every sequence counts its positions by itself.
    q_offset : int or array_like of int, shape (B,), optional
        Position of a sequence's first query among its keys. Default: its keys less its queries.
    dropout, rng
        As in `attention`; sequence ``b`` drops the weights that batch item ``b`` of a padded batch
        would drop.
    return_lse : bool, default False
        Also return the log-sum-exp of each query's logits.
    out : ndarray, shape (total_q, Hq, Dv), optional
        Where to write the result, of its dtype, or of float32 with 16-bit inputs.
    k_scale, v_scale : array_like of float32, shape (total_k, Hkv), optional
        With `k` or `v` of int8.

    Returns
    -------
    out : ndarray, shape (total_q, Hq, Dv)
        In the dtype of `q`.
    lse : ndarray, shape (total_q, Hq)
        Only with ``return_lse=True``. Natural logarithm, float32 (float64 for float64).

    Raises
    ------
    TypeError, ValueError
        As `attention`; also if cumulative lengths decrease or do not span the arrays.

    See Also
    --------
    attention

    Examples
    --------
    Two sentences of 3 and 5 tokens, with 2 heads of 4:

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
    """Attention to keys and values that lie in pages, which sequences may share.

    Key ``j`` of batch item ``i`` is row ``j % page_size`` of page
    ``block_table[i, j // page_size]``.

    Parameters
    ----------
    q : array_like, shape (B, Hq, Lq, D)
        Queries; in the layout "blhd", (B, Lq, Hq, D).
    k_pages : array_like, shape (num_pages, page_size, Hkv, D)
        The pages of keys, whatever the layout. Read where they lie.
    v_pages : array_like, shape (num_pages, page_size, Hkv, Dv)
        The pages of values.
    block_table : array_like of int, shape (B, max_pages)
        For each batch item its pages in order. Numbers behind the valid keys are not looked at.
    kv_lengths : int or array_like of int, shape (B,)
        How many keys of each batch item are valid.
    tail_mask : array_like of bool, optional
        As of `attention`; broadcasts to (B, Hq, Lq, T), whatever the layout.
    is_causal, q_offset, window, scale, softcap, alibi_slopes, sinks, q_lengths, return_lse, \
num_threads
        As in `attention`: where positions matter, several queries need `q_lengths` or `q_offset`.
    layout : {"bhld", "blhd"}, default "bhld"
        Of `q` and the result.
    out : ndarray, optional
        Where to write the result, of its shape and dtype, or of float32 with 16-bit inputs.
    k_scale, v_scale : array_like of float32, shape (num_pages, page_size, Hkv), optional
        With pages of int8.

    Returns
    -------
    out : ndarray, shape (B, Hq, Lq, Dv)
        In the layout and dtype of `q`.
    lse : ndarray, shape ``out.shape[:-1]``
        Only with ``return_lse=True``. Natural logarithm, float32 (float64 for float64).

    Raises
    ------
    TypeError, ValueError
        As `attention`; also for pages that are not there and lengths beyond the table.

    See Also
    --------
    attention
    PageBounds : attention to the pages that may matter, where reading all takes too long.

    Notes
    -----
    The method is that of Kwon et al., "Efficient Memory Management for Large Language Model Serving
    with PagedAttention", SOSP 2023.

    Examples
    --------
    Two sequences of 5 and 3 keys share page 2 of two keys:

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
