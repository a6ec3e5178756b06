"""Block masks in the form that backends take."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from ._block_mask_bits import dense, dense_part
from ._checks import refuse

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from ._block_mask_store import BlockMaskStore

    Array = NDArray[Any]


@dataclass(frozen=True, slots=True)
class MaskBlocks:
    """The blocks of a mask (batch..., Hq, Lq, Lk)."""

    numbers: Array  # (batch..., Hq, blocks of queries, blocks of keys), like BlockMask._blocks
    bits: Array  # like BlockMask._bits
    block_size: tuple[int, int]

    def part(self, queries: slice, keys: slice) -> Array:
        """Return the mask of some queries and keys as bools (batch..., Hq, queries, keys)."""
        return dense_part(self.numbers, self.bits, (queries, keys), self.block_size)

    def of_queries(self, queries: NDArray[np.int64], key_length: int) -> Array:
        """Return the mask of single queries, in any order, as bools (batch..., Hq, queries, Lk)."""
        block_queries, block_keys = self.block_size
        # As blocks of one query.
        numbers = self.numbers[..., queries // block_queries, :].astype(np.int64)
        row = (queries % block_queries)[:, np.newaxis]
        numbers = np.where(numbers >= 0, numbers * block_queries + row, numbers)
        bits = self.bits.reshape(-1, 1, self.bits.shape[-1])
        return dense(numbers, bits, (1, block_keys))[..., :key_length]

    def __getitem__(self, index: Any) -> MaskBlocks:
        """Return the blocks of some batch items and heads."""
        return replace(self, numbers=self.numbers[index])


def broadcast_blocks(mask: BlockMaskStore, pairs: tuple[int, ...], one_head: bool) -> MaskBlocks:
    """Broadcast a mask by blocks to `pairs`, (batch..., Hq, Lq, Lk)."""
    wanted = pairs[-2:] if one_head else pairs
    blocks = mask._blocks
    try:
        if mask.shape[-2:] != pairs[-2:]:
            raise ValueError
        numbers = np.broadcast_to(blocks, (*wanted[:-2], *blocks.shape[-2:]))
    except ValueError:
        axes = "(Lq, Lk)" if one_head else "(..., Hq, Lq, Lk)"
        seen = f"a BlockMask of shape {mask.shape}"
        expected = f"one with Lq, Lk = {pairs[-2:]} that broadcasts to {axes} = {wanted}"
        refuse("mask", seen, expected)
    return MaskBlocks(
        np.broadcast_to(numbers, (*pairs[:-2], *blocks.shape[-2:])), mask._bits, mask.block_size
    )
