"""Masks of chunks of queries and chunks of keys."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import dask.array as da
from dask.base import tokenize
from dask.task_spec import TaskRef

from ._dask_inputs import chunked, key_of, starts

if TYPE_CHECKING:
    from ._block_mask_store import BlockMaskStore
    from ._dask_inputs import Chunks, Given


class ArrayMask:
    """A mask of bools that broadcasts to all pairs.

    If a mask in memory excludes all pairs of two chunks, there is no task for them. A dask array is
    not computed to find out.
    """

    def __init__(self, mask: Given, chunks: Chunks) -> None:
        self.array = chunked(mask, chunks.of_pairs(mask))
        self._in_memory = None if isinstance(mask, da.Array) else mask
        self._known: dict[tuple[tuple[int, int], ...], bool] = {}

    def __dask_tokenize__(self) -> str:
        return str(self.array.name)

    def is_empty(self, place: tuple[slice, ...]) -> bool:
        """Return whether it is known that no pair in `place`, which has all axes, attends."""
        mask = self._in_memory
        if mask is None:
            return False
        own = tuple(
            slice(0, 1) if n == 1 else part
            for n, part in zip(mask.shape, place[len(place) - mask.ndim :], strict=True)
        )
        name = tuple((part.start, part.stop) for part in own)
        if name not in self._known:  # the same for all batch items and heads that share it
            self._known[name] = not mask[own].any()
        return self._known[name]

    def part(self, index: tuple[int, ...]) -> Any:
        """Return the mask of these chunks, as a task takes it."""
        return TaskRef(key_of(self.array, index))


class MaskOfBlocks:
    """A `BlockMask`, whose parts go into the tasks.

    If it excludes all pairs of two chunks, in all their batch items and heads, there is no task for
    them.
    """

    array = None  # there is no dask array to compute

    def __init__(self, mask: BlockMaskStore, chunks: Chunks) -> None:
        self._mask = mask
        sizes = chunks.pairs[len(chunks.pairs) - len(mask.shape) :]
        self._starts = [
            starts(own if n == sum(own) else (n,)) for n, own in zip(mask.shape, sizes, strict=True)
        ]
        self._known: dict[Any, bool] = {}
        self._of_items: dict[Any, BlockMaskStore] = {}

    def __dask_tokenize__(self) -> str:
        mask = self._mask
        return str(tokenize(mask.shape, mask.block_size, mask._blocks, mask._bits))

    def is_empty(self, place: tuple[slice, ...]) -> bool:
        """Return whether no pair in `place`, which has all axes, attends."""
        *items, queries, keys = place[len(place) - len(self._mask.shape) :]
        own = tuple(
            (0, 1) if n == 1 else (part.start, part.stop)
            for n, part in zip(self._mask.shape, items, strict=False)
        )
        limits = queries.start, queries.stop, keys.start, keys.stop
        if (own, limits) not in self._known:  # the same for all items and heads that share it
            if own not in self._of_items:
                index = (*(slice(*part) for part in own), slice(None), slice(None))
                self._of_items[own] = self._mask[index]
            self._known[own, limits] = self._of_items[own].is_empty(*limits)
        return self._known[own, limits]

    def part(self, index: tuple[int, ...]) -> Any:
        """Return the mask of these chunks, as a task takes it."""
        own = index[len(index) - len(self._starts) :]
        return self._mask[
            tuple(
                slice(s[0], s[1]) if len(s) == 2 else slice(s[n], s[n + 1])
                for n, s in zip(own, self._starts, strict=True)
            )
        ]
