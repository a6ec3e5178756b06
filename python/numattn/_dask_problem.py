"""The problem that `numattn.dask` spreads over tasks: arrays, and which of their chunks meet."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import dask
import dask.array as da
import numpy as np
from dask.base import tokenize
from dask.task_spec import TaskRef

from . import _gradient_arguments
from ._block_mask_store import BlockMaskStore
from ._checks import at_least
from ._dask_inputs import (
    Chunks,
    check_inputs,
    check_small,
    choose_chunks,
    chunked,
    given,
    key_of,
    of_one_element,
    starts,
)
from ._dask_masks import ArrayMask, MaskOfBlocks
from ._dask_tasks import Positions, Rows

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray

    from ._arguments import Arguments

    Index = tuple[int, ...]

# Options that a task takes unchanged, because they do not differ by head or batch item.
_OF_ALL = ("is_causal", "window", "softcap", "num_threads")


@dataclass(frozen=True)
class Meeting:
    """A chunk of queries, and the chunks of keys that some of them attend to."""

    batch: Index
    head: int
    query: int
    keys: tuple[int, ...]
    rows: Rows


@dataclass
class Problem:
    """Checked attention over chunked arrays."""

    q: da.Array
    k: da.Array
    v: da.Array
    mask: ArrayMask | MaskOfBlocks | None
    bias: da.Array | None
    chunks: Chunks
    checked: _gradient_arguments.Problem  # of arrays without their elements
    options: dict[str, Any]
    split_every: int

    @property
    def arguments(self) -> Arguments:
        return self.checked.forward

    @property
    def inputs(self) -> list[da.Array]:
        """The arrays that tasks read."""
        arrays = [self.q, self.k, self.v, None if self.mask is None else self.mask.array, self.bias]
        return [x for x in arrays if x is not None]

    @property
    def dtype(self) -> np.dtype[Any]:
        return self.arguments.q.dtype

    @property
    def result_chunks(self) -> tuple[tuple[int, ...], ...]:
        return self.chunks.result(int(self.v.shape[-1]))

    def result_index(self, of: Meeting) -> Index:
        """Return the index of the result's chunk for a chunk of queries."""
        return self.chunks.of_result((*of.batch, of.head, of.query))

    @cached_property
    def token(self) -> str:
        a = self.arguments
        small = (a.q_offset, a.kv_lengths, a.q_lengths, a.alibi_slopes, a.sinks, a.scale)
        arrays = (self.q, self.k, self.v, self.mask, self.bias)
        # Tasks depend on which chunks meet: a mask in memory leads to other tasks than the same
        # mask as a dask array.
        meet = [of.keys for of in self.meetings]
        return str(tokenize(arrays, self.options, small, self.split_every, meet))

    @cached_property
    def meetings(self) -> list[Meeting]:
        """All chunks of queries, in the order of the result's chunks, heads first."""
        return list(self._meetings())

    def _meetings(self) -> Iterator[Meeting]:
        a, chunks = self.arguments, self.chunks
        batch_starts = [starts(sizes) for sizes in chunks.batch]
        head_starts, query_starts, key_starts = map(
            starts, (chunks.heads, chunks.queries, chunks.keys)
        )
        slopes = [_part(a.alibi_slopes, p) for p in itertools.pairwise(head_starts)]
        sinks = [_part(a.sinks, p) for p in itertools.pairwise(head_starts)]
        for batch in np.ndindex(*(len(sizes) for sizes in chunks.batch)):
            items = tuple(slice(s[n], s[n + 1]) for s, n in zip(batch_starts, batch, strict=True))
            positions = self._positions(items)
            near = self._near(positions)
            for head, (h0, h1) in enumerate(itertools.pairwise(head_starts)):
                options = {**self.options, "alibi_slopes": slopes[head], "scale": a.scale}
                for query, (q0, q1) in enumerate(itertools.pairwise(query_starts)):
                    place = (*items, slice(h0, h1), slice(q0, q1))
                    keys = tuple(
                        key
                        for key in np.flatnonzero(near[query]).tolist()
                        if self.mask is None
                        or not self.mask.is_empty((*place, slice(*key_starts[key : key + 2])))
                    )
                    index = chunks.of_result((*batch, head, query))
                    shape = tuple(
                        sizes[n] for sizes, n in zip(self.result_chunks, index, strict=True)
                    )
                    rows = Rows(
                        shape, self.dtype, q0, positions, options, sinks[head],
                        axes=a.q.ndim if not chunks.one_head else 2,
                    )  # fmt: skip
                    yield Meeting(batch, head, query, keys, rows)

    def _positions(self, items: tuple[slice, ...]) -> Positions:
        a = self.arguments
        kv_lengths = None if a.kv_lengths is None else a.kv_lengths[items]
        q_lengths = None if a.q_lengths is None else a.q_lengths[items]
        if a.q_offset is not None:
            return Positions(a.q_offset[items], kv_lengths, q_lengths)
        shape = tuple(part.stop - part.start for part in items)
        keys = a.k.shape[-2] if kv_lengths is None else kv_lengths
        queries = a.q.shape[-2] if q_lengths is None else q_lengths
        offset = np.full(shape, np.subtract(keys, queries), np.int64)
        return Positions(offset, kv_lengths, q_lengths)

    def _near(self, positions: Positions) -> NDArray[np.bool_]:
        """Return for each chunk of queries and of keys whether lengths, causal limits and windows
        allow a pair in any batch item."""
        a = self.arguments
        q_starts, k_starts = (np.array(starts(s)) for s in (self.chunks.queries, self.chunks.keys))
        near = np.zeros((len(q_starts) - 1, len(k_starts) - 1), np.bool_)
        lengths = (
            a.q.shape[-2] if positions.q_lengths is None else positions.q_lengths,
            a.k.shape[-2] if positions.kv_lengths is None else positions.kv_lengths,
        )
        items = np.broadcast_arrays(positions.q_offset, *lengths)
        for offset, queries, keys in set(zip(*(x.ravel().tolist() for x in items), strict=True)):
            q_stops, k_stops = np.minimum(q_starts[1:], queries), np.minimum(k_starts[1:], keys)
            first, last = q_starts[:-1] + offset, q_stops - 1 + offset
            near |= (
                (q_stops > q_starts[:-1])[:, np.newaxis]
                & (k_stops > k_starts[:-1])
                & (k_starts[:-1] <= (last + a.window_right)[:, np.newaxis])
                & (k_stops - 1 >= (first - a.window_left)[:, np.newaxis])
            )
        return near

    def query_part(self, x: da.Array, of: Meeting) -> TaskRef:
        """Return the chunk of q, or of an array like the result, for a chunk of queries."""
        return self._row_part(x, of.batch, of.head, of.query)

    def k_part(self, of: Meeting, key: int) -> TaskRef:
        return self._row_part(self.k, of.batch, self.chunks.kv_of[of.head], key)

    def v_part(self, of: Meeting, key: int) -> TaskRef:
        return self._row_part(self.v, of.batch, self.chunks.kv_of[of.head], key)

    def _row_part(self, x: da.Array, batch: Index, head: int, row: int) -> TaskRef:
        if x.ndim == 2:
            return TaskRef(key_of(x, (row, 0)))
        return TaskRef(key_of(x, (*batch, *self.chunks.in_layout(head, row), 0)))

    def lse_part(self, x: da.Array, of: Meeting) -> TaskRef:
        return TaskRef(key_of(x, self.result_index(of)[:-1]))

    def mask_part(self, of: Meeting, key: int) -> Any:
        return None if self.mask is None else self.mask.part((*of.batch, of.head, of.query, key))

    def bias_part(self, of: Meeting, key: int) -> TaskRef | None:
        if self.bias is None:
            return None
        return TaskRef(key_of(self.bias, (*of.batch, of.head, of.query, key)))


def check(
    q: Any,
    k: Any,
    v: Any,
    options: dict[str, Any],
    split_every: int | None,
    bias_gradient: bool = False,
) -> Problem:
    """Check the arguments of `numattn.dask.attention`, and choose the chunks."""
    q, k, v = (given(name, x) for name, x in (("q", q), ("k", k), ("v", v)))
    check_inputs({"q": q, "k": k, "v": v})
    check_small(options)
    mask, bias = options["mask"], options["bias"]
    has_blocks = isinstance(mask, BlockMaskStore)
    if mask is not None and not has_blocks:
        mask = given("mask", mask)
    bias = None if bias is None else given("bias", bias)
    checked = _gradient_arguments.check(
        of_one_element(q), of_one_element(k), of_one_element(v), bias_gradient, tail_mask=None,
        **{
            **options,
            "mask": mask if mask is None or has_blocks else of_one_element(mask),
            "bias": None if bias is None else of_one_element(bias),
        },
    )  # fmt: skip
    chunks = choose_chunks(q, k, v, checked.forward, options["layout"])
    default = dask.config.get("split_every", None) or 4
    return Problem(
        q=chunked(q, chunks.of_rows(q, chunks.heads, chunks.queries)),
        k=chunked(k, chunks.of_rows(k, chunks.kv_heads, chunks.keys)),
        v=chunked(v, chunks.of_rows(v, chunks.kv_heads, chunks.keys)),
        mask=None if mask is None else (MaskOfBlocks if has_blocks else ArrayMask)(mask, chunks),
        bias=None if bias is None else chunked(bias, chunks.of_pairs(bias)),
        chunks=chunks,
        checked=checked,
        options={name: options[name] for name in (*_OF_ALL, "layout")},
        split_every=at_least("split_every", default if split_every is None else split_every, 2),
    )


def _part(of_heads: NDArray[np.float64] | None, heads: Index) -> NDArray[np.float64] | None:
    return None if of_heads is None else of_heads[slice(*heads)]
