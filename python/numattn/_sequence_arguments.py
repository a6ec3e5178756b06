"""Checks of the arguments of `attention_varlen` and `attention_paged`, in `_arguments`' form."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from ._arguments import (
    MAX_POSITION,
    Arguments,
    broadcast_pairs,
    check_meaning_of_axes,
    check_options,
    check_positions,
    check_scales,
    check_shapes,
    check_tail_mask,
    common_dtype,
    ints_per_batch,
    key_scales,
    lse_heads_first,
    outputs,
    positional_options,
)
from ._checks import (
    as_array,
    at_index,
    check_layout,
    check_overlap,
    flag,
    heads_first,
    refuse,
    refuse_kind,
    snapshot,
)

if TYPE_CHECKING:
    from numpy.typing import ArrayLike, NDArray

    Array = NDArray[Any]


def check_varlen(
    q: ArrayLike,
    k: ArrayLike,
    v: ArrayLike,
    cu_seqlens_q: ArrayLike,
    cu_seqlens_k: ArrayLike,
    tail_mask: ArrayLike | None,
    k_scale: ArrayLike | None,
    v_scale: ArrayLike | None,
    q_offset: int | ArrayLike | None,
    return_lse: bool,
    out: Array | None,
    makes_results: bool = True,
    **options: Any,
) -> Arguments:
    """Check the arguments of `attention_varlen`; `makes_results` as in `_arguments.check`."""
    arrays = {name: as_array(name, x) for name, x in (("q", q), ("k", k), ("v", v))}
    dtype = common_dtype(arrays)
    scales = {
        f"{name}_scale": key_scales(name, arrays[name], x)
        for name, x in (("k", k_scale), ("v", v_scale))
    }
    for name, x in arrays.items():
        if x.ndim != 3:
            refuse(name, f"shape {x.shape}", "(total length, heads, dim)")
    q_, k_, v_ = (x.swapaxes(0, 1) for x in arrays.values())
    check_shapes(q_, k_, v_, arrays)
    query_starts = _starts("cu_seqlens_q", cu_seqlens_q, q_.shape[1], "q")
    key_starts = _starts("cu_seqlens_k", cu_seqlens_k, k_.shape[1], "k")
    if len(query_starts) != len(key_starts):
        seen = f"{len(key_starts)} numbers"
        refuse("cu_seqlens_k", seen, f"{len(query_starts)}, as in cu_seqlens_q")
    batch = (len(query_starts) - 1,)
    tail_mask_ = None if tail_mask is None else as_array("tail_mask", tail_mask)
    if tail_mask_ is not None:
        longest = int(np.diff(key_starts).max(initial=0))
        check_tail_mask(tail_mask_, longest, f"{longest}, the length of the longest sequence")
    checked = check_options(dtype, q_.shape[0], q_.shape[-1], **options)
    result = result_lse = None
    if makes_results:
        result, result_lse = outputs(
            out, flag("return_lse", return_lse), False, "blhd", dtype, (*q_.shape[:2], v_.shape[-1])
        )
    if out is not None:
        check_overlap(out, {**arrays, **scales, "tail_mask": tail_mask_})
    for name, scale in scales.items():
        check_scales(name, scale, lambda: np.ones((), np.bool_))
    return Arguments(
        q=q_,
        k=k_,
        v=v_,
        out=_swapped(result, 0, 1),
        lse=_swapped(result_lse, 0, 1),
        mask=None,
        mask_blocks=None,
        tail_mask=_tail("(Hq, total_q, T)", tail_mask_, q_.shape[:2]),
        bias=None,
        q_offset=ints_per_batch("q_offset", q_offset, batch, -MAX_POSITION, MAX_POSITION),
        kv_lengths=None,
        q_lengths=None,
        **checked,
        result=result if out is None else out,
        result_lse=result_lse,
        k_scale=_swapped(scales["k_scale"], 0, 1),
        v_scale=_swapped(scales["v_scale"], 0, 1),
        query_starts=query_starts,
        key_starts=key_starts,
    )


def _tail(axes: str, tail_mask: Array | None, queries: tuple[int, ...]) -> Array | None:
    if tail_mask is None:
        return None
    return broadcast_pairs("tail_mask", tail_mask, (*queries, tail_mask.shape[-1]), axes)


def _swapped(x: Array | None, a: int, b: int) -> Array | None:
    return None if x is None else x.swapaxes(a, b)


def _starts(name: str, starts: ArrayLike, total: int, what: str) -> NDArray[np.int64]:
    array = snapshot(name, starts)
    if array.dtype.kind not in "iu":
        refuse_kind(name, f"dtype {array.dtype}", "ints")
    if array.ndim != 1 or array.size < 1:
        refuse(name, f"shape {array.shape}", "(sequences + 1,)")
    outside = (array < 0) | (array > total)
    if outside.any():
        at = int(np.argmax(outside))
        refuse(name, f"{array[at]}{at_index(at)}", f"0 to {total}, the number of rows of {what}")
    numbers = array.astype(np.int64)
    decreasing = np.diff(numbers) < 0
    if decreasing.any():
        at = int(np.argmax(decreasing))
        seen = f"{numbers[at + 1]} after {numbers[at]}{at_index(at + 1)}"
        refuse(name, seen, "numbers that do not decrease")
    for at, wanted in ((0, 0), (-1, total)):
        if numbers[at] != wanted:
            where = "first" if at == 0 else "last"
            seen = f"{numbers[at]} as the {where} number"
            refuse(name, seen, f"{wanted} ({what} has {total} rows)")
    return numbers


def check_paged(
    q: ArrayLike,
    k_pages: ArrayLike,
    v_pages: ArrayLike,
    block_table: ArrayLike,
    kv_lengths: ArrayLike,
    tail_mask: ArrayLike | None,
    k_scale: ArrayLike | None,
    v_scale: ArrayLike | None,
    q_offset: int | ArrayLike | None,
    q_lengths: int | ArrayLike | None,
    layout: str,
    return_lse: bool,
    out: Array | None,
    **options: Any,
) -> Arguments:
    """Check the arguments of `attention_paged`."""
    check_layout(layout)
    given = {
        name: as_array(name, x)
        for name, x in (("q", q), ("k_pages", k_pages), ("v_pages", v_pages))
    }
    dtype = common_dtype(given)
    scales = {
        f"{name}_scale": key_scales(f"{name}_pages", given[f"{name}_pages"], x, f"{name}_scale")
        for name, x in (("k", k_scale), ("v", v_scale))
    }
    axes = "(B, heads, length, dim)" if layout == "bhld" else "(B, length, heads, dim)"
    for name, x in given.items():
        if x.ndim != 4:
            wanted = axes if name == "q" else "(pages, page_size, heads, dim)"
            refuse(name, f"shape {x.shape}", wanted)
    q_ = heads_first(given["q"], layout)
    k_, v_ = (given[name].swapaxes(1, 2) for name in ("k_pages", "v_pages"))
    pages, page_size = given["k_pages"].shape[:2]
    if page_size == 0:
        refuse("k_pages", f"shape {given['k_pages'].shape}", "pages of at least one key")
    if given["v_pages"].shape[:2] != (pages, page_size):
        seen = "{} pages of {} keys".format(*given["v_pages"].shape[:2])
        refuse("v_pages", seen, f"{pages} of {page_size}, as in k_pages")
    check_shapes(q_, k_, v_, given)
    batch = q_.shape[:1]

    numbers, lengths = check_table(block_table, kv_lengths, batch, pages, page_size)
    most = numbers.shape[1] * page_size
    tail_mask_ = None if tail_mask is None else as_array("tail_mask", tail_mask)
    if tail_mask_ is not None:
        check_tail_mask(tail_mask_, most, f"Lk = {most}, the room of the block table")
        check_meaning_of_axes(tail_mask_, batch, q_.shape[1], q_.shape[2], "T", "tail_mask")
    checked = check_options(dtype, q_.shape[1], q_.shape[-1], **options)
    positional = ("is_causal", "window", "alibi_slopes")
    given_ = positional_options(*(options[name] for name in positional))
    check_positions(q_.shape[2], kv_lengths, q_offset, q_lengths, given_)
    result, result_lse = outputs(
        out, flag("return_lse", return_lse), False, layout, dtype, (*q_.shape[:3], v_.shape[-1])
    )
    if out is not None:
        check_overlap(out, {**given, **scales, "tail_mask": tail_mask_})

    for name, scale in scales.items():
        check_scales(name, scale, lambda: keys_read(numbers, lengths, pages, page_size))
    return Arguments(
        q=q_,
        k=k_,
        v=v_,
        out=heads_first(result, layout),
        lse=None if result_lse is None else lse_heads_first(result_lse, False, layout),
        mask=None,
        mask_blocks=None,
        tail_mask=_tail("(B, Hq, Lq, T)", tail_mask_, q_.shape[:3]),
        bias=None,
        q_offset=ints_per_batch("q_offset", q_offset, batch, -MAX_POSITION, MAX_POSITION),
        kv_lengths=lengths,
        q_lengths=ints_per_batch("q_lengths", q_lengths, batch, 0, q_.shape[2]),
        **checked,
        result=result if out is None else out,
        result_lse=result_lse,
        k_scale=_swapped(scales["k_scale"], 1, 2),
        v_scale=_swapped(scales["v_scale"], 1, 2),
        block_table=numbers,
    )


def check_table(
    block_table: ArrayLike,
    kv_lengths: int | ArrayLike,
    batch: tuple[int, ...],
    pages: int,
    page_size: int,
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Check and return the pages of each batch item and its number of valid keys; `pages` is the
    number of pages."""
    table = snapshot("block_table", block_table)
    if table.dtype.kind not in "iu":
        refuse_kind("block_table", f"dtype {table.dtype}", "ints")
    if table.ndim != 2 or table.shape[0] != batch[0]:
        refuse("block_table", f"shape {table.shape}", f"({batch[0]}, pages of a sequence)")
    lengths = ints_per_batch("kv_lengths", kv_lengths, batch, 0, table.shape[1] * page_size)
    if lengths is None:
        refuse_kind("kv_lengths", "None", "the number of valid keys per batch item")
    numbers = np.array(table, np.int64, order="C")
    # Only pages with valid keys are read, and only they must exist.
    is_read = np.arange(table.shape[1]) * page_size < lengths[:, np.newaxis]
    outside = is_read & ((table < 0) | (table >= pages))
    if outside.any():
        where = tuple(map(int, np.argwhere(outside)[0]))
        refuse("block_table", f"{table[where]}{at_index(where)}", f"a page from 0 to {pages - 1}")
    return numbers, lengths


def keys_read(
    table: NDArray[np.int64], lengths: NDArray[np.int64], pages: int, page_size: int
) -> Array:
    """Return which keys of the pages are read, (pages, page_size, 1)."""
    read = np.zeros((pages, page_size, 1), np.bool_)
    for row, length in zip(table, lengths.tolist(), strict=True):
        whole, rest = divmod(length, page_size)
        read[row[:whole]] = True
        if rest:
            read[row[whole], :rest] = True
    return read
