"""The mask of a chunk of queries and a chunk of keys."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import dask.array as da
from dask.task_spec import TaskRef

from ._dask_inputs import chunked, key_of

if TYPE_CHECKING:
    from ._dask_inputs import Chunks, Given


class ArrayMask:
    """A mask of bools that broadcasts to all pairs. What is in memory is looked at: where it leaves
    nothing there is no task. An array of dask is not computed for that."""

    def __init__(self, mask: Given, chunks: Chunks) -> None:
        self.array = chunked(mask, chunks.of_pairs(mask))
        self._in_memory = None if isinstance(mask, da.Array) else mask
        self._known: dict[tuple[tuple[int, int], ...], bool] = {}

    def __dask_tokenize__(self) -> str:
        return str(self.array.name)

    def is_empty(self, place: tuple[slice, ...]) -> bool:
        """Whether it is known that nobody attends to anybody there; `place` has all axes."""
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
        """Return what a task takes as the mask of these chunks."""
        return TaskRef(key_of(self.array, index))
