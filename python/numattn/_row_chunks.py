"""Parts of an array of rows that stay in the cache while several operations go over them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray

_BYTES = 64 * 1024  # an operation has up to seven arrays of this size


def chunk_length(rows: NDArray[Any]) -> int:
    """Return how many rows a chunk has, the last one excepted."""
    row_bytes: int = rows.shape[-1] * rows.itemsize
    return max(1, _BYTES // row_bytes)


def chunks(rows: NDArray[Any]) -> Iterator[slice]:
    length = chunk_length(rows)
    for begin in range(0, len(rows), length):
        yield slice(begin, min(begin + length, len(rows)))
