"""The arrays of a block mask: the kind of each block, and the bits of mixed blocks.

Here a *tile* is a dense bool array that covers whole blocks. Blocks at the end of the queries or
the keys may be partial.
"""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray

    Array = NDArray[Any]
    Size = tuple[int, int]

EMPTY, FULL = -2, -1


def blocks_of(length: int, block: int) -> int:
    """Return the number of blocks for a length."""
    return -(-length // block)


def bytes_of(block_keys: int) -> int:
    """Return the number of bytes in one row of a block's bits."""
    return blocks_of(block_keys, 8)


def no_bits(block_size: Size) -> Array:
    return np.zeros((0, block_size[0], bytes_of(block_size[1])), np.uint8)


def pack(attends: Array) -> Array:
    """Return bools as bits, with the first key in the lowest bit."""
    return np.packbits(attends, axis=-1, bitorder="little")


def unpack(bits: Array, block_keys: int) -> Array:
    return np.unpackbits(bits, axis=-1, count=block_keys, bitorder="little").view(np.bool_)


def bits_of_blocks(lengths: Size, block_size: Size) -> Array:
    """Return which pairs of a block are within (Lq, Lk), as bits, for the four kinds of blocks.

    The kind is 2 for blocks of the last, partial queries, plus 1 for blocks of the last, partial
    keys.
    """
    queries, keys = (
        [np.arange(block) < (block if whole else length % block) for whole in (True, False)]
        for length, block in zip(lengths, block_size, strict=True)
    )
    return np.stack([pack(q[:, np.newaxis] & k) for q in queries for k in keys])


def kinds_of_blocks(lengths: Size, block_size: Size) -> Array:
    """Return the kind of each block, (blocks of queries, blocks of keys)."""
    partial = [
        np.arange(blocks_of(length, block)) == length // block
        for length, block in zip(lengths, block_size, strict=True)
    ]
    return np.asarray(2 * partial[0][:, np.newaxis].astype(np.int64) + partial[1])


def normal_form(blocks: Array, bits: Array, lengths: Size, block_size: Size) -> tuple[Array, Array]:
    """Return the normal form of two arrays: masks with the same content have the same one.

    `blocks` holds EMPTY, FULL, or the index of a block in `bits`. The bits of a block may
    be all 0 or all 1, repeated or unused, and arbitrary for pairs beyond the lengths.
    """
    blocks = np.array(blocks, np.int32, order="C")
    is_mixed = blocks >= 0
    kinds = np.broadcast_to(kinds_of_blocks(lengths, block_size), blocks.shape)[is_mixed]
    wanted, place = np.unique(blocks[is_mixed] * np.int64(4) + kinds, return_inverse=True)
    within = bits_of_blocks(lengths, block_size)[wanted % 4]
    bits = bits[wanted // 4] & within
    number = np.zeros(len(bits), np.int32)
    number[(bits == within).all(axis=(1, 2))] = FULL
    number[~bits.any(axis=(1, 2))] = EMPTY
    bits, number[number == 0] = distinct(bits[number == 0])
    blocks[is_mixed] = number[place]
    return blocks, bits


def distinct(bits: Array) -> tuple[Array, Array]:
    """Return the distinct blocks among bits, sorted, and the index of each block among them."""
    count, *shape = bits.shape
    if count == 0:
        return bits, np.zeros(0, np.int32)
    size = shape[0] * shape[1]
    opaque = np.ascontiguousarray(bits).reshape(count, size).view(np.dtype((np.void, size)))[:, 0]
    _, first, place = np.unique(opaque, return_index=True, return_inverse=True)
    return bits[first], place.astype(np.int32)


def classify(tile: Array, block_size: Size) -> tuple[Array, Array]:
    """Return the blocks of a tile (..., queries, keys), and the bits of the mixed blocks.

    Equal mixed blocks share their bits. The queries are whole blocks, or one partial block.
    """
    *leading, query_count, key_count = tile.shape
    block_queries, block_keys = min(block_size[0], query_count), block_size[1]
    rows = tile.reshape(*leading, query_count // block_queries, block_queries, key_count)
    if not tile.any():
        grid = (*rows.shape[:-2], blocks_of(key_count, block_keys))
        return np.full(grid, EMPTY, np.int32), no_bits(block_size)
    first_keys = np.arange(0, key_count, block_keys)
    some = np.logical_or.reduceat(np.logical_or.reduce(rows, axis=-2), first_keys, axis=-1)
    each = np.logical_and.reduceat(np.logical_and.reduce(rows, axis=-2), first_keys, axis=-1)
    blocks = np.where(each, np.int32(FULL), np.int32(EMPTY))
    is_mixed = some & ~each
    count = np.count_nonzero(is_mixed)
    if count == 0:
        return blocks, no_bits(block_size)
    bits = np.zeros((count, block_size[0], bytes_of(block_keys)), np.uint8)
    # First the blocks whose keys are complete, then the blocks of the last, partial keys.
    whole = key_count // block_keys
    edge = whole * block_keys
    pieces = rows[..., :edge].reshape(*rows.shape[:-1], whole, block_keys).swapaxes(-3, -2)
    begin = 0
    for columns, bools in (
        (slice(whole), pieces),
        (slice(whole, None), rows[..., np.newaxis, :, edge:]),
    ):
        where = is_mixed[..., columns]
        if not where.any():
            continue
        packed = pack(bools[where])
        end = begin + len(packed)
        bits[begin:end, :block_queries, : packed.shape[-1]] = packed
        blocks[..., columns][where] = np.arange(begin, end)
        begin = end
    bits, place = distinct(bits)
    blocks[is_mixed] = place[blocks[is_mixed]]
    return blocks, bits


class Tiles:
    """The blocks of a mask, put together tile by tile."""

    def __init__(self, leading: tuple[int, ...], lengths: Size, block_size: Size) -> None:
        self._lengths, self._block_size = lengths, block_size
        grid = (blocks_of(n, block) for n, block in zip(lengths, block_size, strict=True))
        self._blocks = np.empty((*leading, *grid), np.int32)
        self._bits = [no_bits(block_size)]
        self._count = 0

    def put(self, leading: tuple[slice, ...], queries: slice, keys: slice, tile: Array) -> None:
        """Insert the tile of some queries and keys."""
        blocks, bits = classify(tile, self._block_size)
        blocks[blocks >= 0] += self._count
        places = (
            slice(part.start // block, blocks_of(part.stop, block))
            for part, block in zip((queries, keys), self._block_size, strict=True)
        )
        self._blocks[(*leading, *places)] = blocks
        self._bits.append(bits)
        self._count += len(bits)

    def normal_form(self) -> tuple[Array, Array]:
        bits = np.concatenate(self._bits)
        return normal_form(self._blocks, bits, self._lengths, self._block_size)


# How much NumPy evaluates at a time. Comparing rows of fewer than about 2700 keys is three times as
# slow, and the memory of arrays much larger than 256 KiB is returned to the system each time.
_KEYS_AT_A_TIME = 4096
_PAIRS_AT_A_TIME = 64 * 4096


def places_of_tiles(
    leading: tuple[int, ...], lengths: Size, block_size: Size
) -> Iterator[tuple[tuple[slice, ...], slice, slice]]:
    """Yield the place of each tile of a mask: leading axes, queries, keys."""
    block_queries, block_keys = block_size
    keys_at_a_time = max(1, _KEYS_AT_A_TIME // block_keys) * block_keys
    keys_at_a_time = min(keys_at_a_time, lengths[1]) or 1
    at_a_time = max(1, _PAIRS_AT_A_TIME // keys_at_a_time)
    queries_at_a_time = max(1, at_a_time // block_queries) * block_queries
    # A partial last block is a separate tile.
    whole = lengths[0] - lengths[0] % block_queries
    parts = [*_parts(0, whole, queries_at_a_time), *_parts(whole, lengths[0], block_queries)]
    items_at_a_time = max(1, at_a_time // min(queries_at_a_time, lengths[0] or 1))
    sizes = []
    for length in reversed(leading):
        sizes.append(min(length, items_at_a_time) or 1)
        items_at_a_time = max(1, items_at_a_time // sizes[-1])
    axes = [_parts(0, n, size) for n, size in zip(leading, reversed(sizes), strict=True)]
    for items in itertools.product(*map(list, axes)):
        for queries in parts:
            for keys in _parts(0, lengths[1], keys_at_a_time):
                yield items, queries, keys


def _parts(begin: int, end: int, size: int) -> Iterator[slice]:
    return (slice(first, min(first + size, end)) for first in range(begin, end, size))


def pairs_of_blocks(
    blocks: Array, bits: Array, lengths: Size, block_size: Size
) -> tuple[Array, Array]:
    """Return the number of attending pairs per block, and of all pairs, without leading axes."""
    of_mixed = np.bitwise_count(bits).sum(axis=(1, 2), dtype=np.int64)
    attending = np.append(of_mixed, [0, 0])[blocks]  # EMPTY and FULL are the last two
    all_pairs = np.outer(*map(sizes_of_blocks, lengths, block_size))
    return np.where(blocks == FULL, all_pairs, attending), all_pairs


def sizes_of_blocks(length: int, block: int) -> Array:
    return np.minimum(length - block * np.arange(blocks_of(length, block)), block)


def dense(blocks: Array, bits: Array, block_size: Size) -> Array:
    """Return the bools of blocks, (..., whole blocks of queries, whole blocks of keys)."""
    *leading, rows, columns = blocks.shape
    block_queries, block_keys = block_size
    attends = np.empty((*leading, rows, block_queries, columns, block_keys), np.bool_)
    attends[...] = (blocks == FULL)[..., :, np.newaxis, :, np.newaxis]
    is_mixed = blocks >= 0
    attends.swapaxes(-3, -2)[is_mixed] = unpack(bits[blocks[is_mixed]], block_keys)
    return attends.reshape(*leading, rows * block_queries, columns * block_keys)


def dense_part(blocks: Array, bits: Array, within: tuple[slice, slice], block_size: Size) -> Array:
    """Return the bools of some queries and keys."""
    around: list[slice] = []
    inside: list[slice] = []
    for part, block in zip(within, block_size, strict=True):
        first = part.start // block
        around.append(slice(first, blocks_of(part.stop, block)))
        inside.append(slice(part.start - first * block, part.stop - first * block))
    return dense(blocks[..., around[0], around[1]], bits, block_size)[..., inside[0], inside[1]]
