"""The weights that dropout keeps, in NumPy: the same as in the compiled kernels.

Each weight has its own random number, which depends on a seed and on the place of the weight. So
forward and backward drop the same weights without a mask in memory, whatever the blocks and
threads.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Array = NDArray[Any]

_KEYS_PER_DRAW = 4
_32_BITS = 2**32 - 1


def kept(
    dropout: float, seed: int, batch_item: int, heads: slice, queries: slice, keys: slice
) -> Array:
    """Return which weights are kept, (heads, queries, keys).

    Key ``j`` has word ``j % 4`` of Philox4x32-10 (Salmon et al., "Parallel Random Numbers: As Easy
    as 1, 2, 3", 2011) at the counter ``(j // 4, query, query head, batch item)``.
    """
    first = keys.start // _KEYS_PER_DRAW
    draws = slice(first, -(-keys.stop // _KEYS_PER_DRAW))
    words = philox(
        (
            _counters(draws),
            _counters(queries)[:, np.newaxis],
            _counters(heads)[:, np.newaxis, np.newaxis],
            _counters(slice(batch_item, batch_item + 1)),
        ),
        (seed & _32_BITS, seed >> 32),
    )
    is_kept = np.stack([word >= int(dropout * 2**32) for word in words], axis=-1)
    begin = keys.start - first * _KEYS_PER_DRAW
    of_keys: Array = is_kept.reshape(*is_kept.shape[:2], -1)
    return of_keys[..., begin : begin + keys.stop - keys.start]


def _counters(places: slice) -> Array:
    return np.arange(places.start, places.stop).astype(np.uint64) & _32_BITS


def philox(counter: tuple[Array, ...], key: tuple[int, int]) -> tuple[Array, ...]:
    """Return the four 32-bit words of Philox for counters, arrays of uint64 that broadcast."""
    a, b, c, d = counter
    for _ in range(10):
        first, second = a * 0xD2511F53, c * 0xCD9E8D57
        a, b = (second >> 32) ^ b ^ key[0], second & _32_BITS
        c, d = (first >> 32) ^ d ^ key[1], first & _32_BITS
        key = (key[0] + 0x9E3779B9 & _32_BITS, key[1] + 0xBB67AE85 & _32_BITS)
    return a, b, c, d
