"""Parts of an array of rows that stay in the cache while several operations go over them.

Operations on 16-bit floats are in float32, and a part is rounded once, after the last of them.
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
    """Return how many rows a chunk has, the last one excepted."""
    row_bytes = math.prod(rows.shape[1:]) * precision_of(rows.dtype).itemsize
    return max(1, _BYTES // row_bytes)


def chunks(rows: Array) -> Iterator[slice]:
    length = chunk_length(rows)
    for begin in range(0, len(rows), length):
        yield slice(begin, min(begin + length, len(rows)))


def widened(x: Array) -> Array:
    """Return what to compute with: a copy of 16-bit floats in float32, else the array itself."""
    return x.astype(precision_of(x.dtype), copy=False)


def put_back(computed: Array, x: Array) -> None:
    """Round what was computed with `widened(x)` to `x`."""
    if computed.dtype != x.dtype:
        x[...] = computed
