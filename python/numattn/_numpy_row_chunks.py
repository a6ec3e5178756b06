"""Parts of an array of rows that stay in the cache during several operations.

Operations on 16-bit floats are in float32, and a part is rounded once, after the last operation.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from ._checks import precision_of

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray

    Array = NDArray[Any]

_BYTES = 64 * 1024  # an operation has up to seven arrays of this size


def chunk_length(rows: Array) -> int:
    """Return how many rows a chunk has, except the last one."""
    row_bytes = math.prod(rows.shape[1:]) * precision_of(rows.dtype).itemsize
    return max(1, _BYTES // row_bytes)


def chunks(rows: Array) -> Iterator[slice]:
    length = chunk_length(rows)
    for begin in range(0, len(rows), length):
        yield slice(begin, min(begin + length, len(rows)))


def widened(x: Array) -> Array:
    """Return the array to compute with: a float32 copy for 16-bit floats, else x itself."""
    return x.astype(precision_of(x.dtype), copy=False)


def put_back(computed: Array, x: Array) -> None:
    """Round the result of a computation with `widened(x)`, and write it to `x`."""
    if computed.dtype != x.dtype:
        x[...] = computed
