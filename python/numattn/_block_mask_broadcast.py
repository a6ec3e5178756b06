"""A mask by blocks in the form that backends take."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from ._block_mask_bits import FULL
from ._checks import refuse

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from ._block_mask_store import BlockMaskStore

    Array = NDArray[Any]


@dataclass(frozen=True, slots=True)
class MaskBlocks:
    """The blocks of a mask (batch..., Hq, Lq, Lk)."""

    numbers: Array  # (batch..., Hq, blocks of queries, blocks of keys), as BlockMask._blocks
    bits: Array  # as BlockMask._bits
    block_size: tuple[int, int]

    def rows(self, rows: Any, keys: slice) -> Array:
        """Return the mask of some queries as bools (batch..., Hq, rows, keys).

        `rows` is a slice or an array of their indices.
        """
        queries, columns = self.block_size
        begin, end, _ = keys.indices(self.numbers.shape[-1] * columns)
        if end <= begin:
            begin = end = 0
        first, last = begin // columns, -(-end // columns)
        if isinstance(rows, slice):
            rows = np.arange(rows.start or 0, rows.stop)
        numbers = self.numbers[..., rows // queries, first:last]  # (..., rows, blocks of keys)
        mask = np.repeat(numbers[..., np.newaxis] == FULL, columns, axis=-1)
        mixed = np.nonzero(numbers >= 0)
        bits = self.bits[numbers[mixed], (rows % queries)[mixed[-2]]]
        mask[mixed] = np.unpackbits(bits, axis=-1, count=columns, bitorder="little")
        mask = mask.reshape(*numbers.shape[:-1], -1)
        return mask[..., begin - first * columns : end - first * columns]

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
        refuse("mask", seen, f"one of {pairs[-2:]} that broadcasts to {axes} = {wanted}")
    return MaskBlocks(
        np.broadcast_to(numbers, (*pairs[:-2], *blocks.shape[-2:])), mask._bits, mask.block_size
    )
