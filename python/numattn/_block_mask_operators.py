"""Operators of block masks: and, or, not, and stacking."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from ._block_mask_bits import EMPTY, FULL, no_bits
from ._block_mask_store import BlockMaskStore
from ._checks import kind_of, refuse, refuse_kind

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from numpy.typing import NDArray

    Array = NDArray[Any]

Mask = TypeVar("Mask", bound=BlockMaskStore)


def both(a: Mask, b: object) -> Mask:
    return _combined("&", a, b, np.bitwise_and, neutral=FULL, absorbing=EMPTY)


def either(a: Mask, b: object) -> Mask:
    return _combined("|", a, b, np.bitwise_or, neutral=EMPTY, absorbing=FULL)


def inverse(a: Mask) -> Mask:
    other = np.where(a._blocks == FULL, np.int32(EMPTY), np.int32(FULL))
    blocks = np.where(a._blocks >= 0, a._blocks, other)
    return a._normal(a._shape[:-2], a._lengths, a._block_size, blocks, ~a._bits)


def _combined(
    sign: str,
    a: Mask,
    b: object,
    function: Callable[[Array, Array], Array],
    *,
    neutral: int,
    absorbing: int,
) -> Mask:
    """Combine two masks; where one has a `neutral` block, the result has the other's block."""
    if not isinstance(b, BlockMaskStore):
        advice = "convert an array with `BlockMask.from_dense`"
        refuse_kind(f"BlockMask {sign}", kind_of(b), "a BlockMask", advice)
    if a._block_size != b._block_size:
        seen = f"block sizes {a._block_size} and {b._block_size}"
        advice = "make both masks with the same `block_size`"
        refuse(f"BlockMask {sign}", seen, "equal block sizes", advice)
    try:
        leading = np.broadcast_shapes(a._shape[:-2], b._shape[:-2])
    except ValueError:
        leading = None
    if leading is None or a._lengths != b._lengths:
        expected = "equal numbers of queries and keys, and other axes that broadcast"
        refuse(f"BlockMask {sign}", f"shapes {a._shape} and {b._shape}", expected)
    blocks_a, blocks_b = np.broadcast_arrays(a._blocks, b._blocks)
    count_a, count_b = len(a._bits), len(b._bits)
    blocks = np.full(blocks_a.shape, absorbing, np.int32)
    np.copyto(blocks, blocks_a, where=blocks_b == neutral)
    numbered = blocks_b + (blocks_b >= 0) * np.int32(count_a)
    np.copyto(blocks, numbered, where=blocks_a == neutral)
    # For blocks that are mixed in both masks, combine each distinct pair of bits once.
    are_mixed = (blocks_a >= 0) & (blocks_b >= 0)
    couples = blocks_a[are_mixed].astype(np.int64) * count_b + blocks_b[are_mixed]
    couples, place = np.unique(couples, return_inverse=True)
    of_couples = no_bits(a._block_size)
    if len(couples):
        of_couples = function(a._bits[couples // count_b], b._bits[couples % count_b])
    blocks[are_mixed] = place + (count_a + count_b)
    bits = np.concatenate([a._bits, b._bits, of_couples])
    return a._normal(leading, a._lengths, a._block_size, blocks, bits)


def stacked(masks: Sequence[Mask], leading: tuple[int, ...]) -> Mask:
    """Return one mask (*leading, Lq, Lk) from at least one mask (Lq, Lk)."""
    first = masks[0]
    begins = np.cumsum([0, *(len(mask._bits) for mask in masks)])
    blocks = np.stack(
        [
            mask._blocks + (mask._blocks >= 0) * np.int32(begin)
            for mask, begin in zip(masks, begins, strict=False)
        ]
    )
    bits = np.concatenate([mask._bits for mask in masks])
    blocks = blocks.reshape(*leading, *blocks.shape[1:])
    return first._normal(leading, first._lengths, first._block_size, blocks, bits)
