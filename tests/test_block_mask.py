"""Promise: a block mask says of every pair what the mask says that it was made of."""

import numpy as np
import pytest
from numattn import BlockMask

LENGTHS = [1, 2, 63, 64, 65, 100, 200]
BLOCK_SIZES = [(1, 1), (3, 5), (8, 16), (64, 64), (64, 32), (128, 96)]


def pairs(query_count, key_count, q_offset=None):
    """Return the positions of queries, as a column, and of keys."""
    q_offset = key_count - query_count if q_offset is None else q_offset
    return np.arange(query_count)[:, np.newaxis] + q_offset, np.arange(key_count)


def check(mask, expected, block_size):
    """Compare a mask with a dense one, and see that its arrays are what the kernels expect."""
    assert mask.shape == expected.shape
    assert mask.block_size == block_size
    np.testing.assert_array_equal(mask.to_dense(), expected)
    assert mask.to_dense().dtype == bool
    check_arrays(mask, expected)
    assert mask.density == pytest.approx(expected.mean() if expected.size else 0, rel=1e-12)
    assert mask == BlockMask.from_dense(expected, block_size)


def check_arrays(mask, expected):
    *leading, query_count, key_count = expected.shape
    bq, bk = mask.block_size
    blocks, bits = mask._blocks, mask._bits
    assert blocks.shape == (*leading, -(-query_count // bq), -(-key_count // bk))
    assert blocks.dtype == np.int32
    assert bits.shape[1:] == (bq, -(-bk // 8))
    assert bits.dtype == np.uint8
    for array in (blocks, bits):
        assert array.flags.c_contiguous
        assert not array.flags.writeable
    for index in np.ndindex(blocks.shape):
        *items, i, j = index
        block = expected[(*items, slice(i * bq, (i + 1) * bq), slice(j * bk, (j + 1) * bk))]
        if blocks[index] < 0:
            assert blocks[index] == (-1 if block.any() else -2)
            assert block.all() == block.any()
        else:
            assert block.any()
            assert not block.all()
            padded = np.zeros((bq, bk), bool)
            padded[: block.shape[0], : block.shape[1]] = block
            packed = np.packbits(padded, axis=-1, bitorder="little")
            np.testing.assert_array_equal(bits[blocks[index]], packed)
    np.testing.assert_array_equal(np.unique(blocks[blocks >= 0]), np.arange(len(bits)))
    assert len({block.tobytes() for block in bits}) == len(bits)


# Of small blocks there are many, which the check looks at one by one.
SIZES = [
    (query_count, key_count, block_size)
    for block_size in BLOCK_SIZES
    for query_count in LENGTHS
    for key_count in LENGTHS
    if query_count * key_count <= 2000 * block_size[0] * block_size[1]
]
sizes = pytest.mark.parametrize(("query_count", "key_count", "block_size"), SIZES)


@sizes
def test_from_dense(rng, query_count, key_count, block_size):
    for share in (0, 0.1, 0.9, 1):
        dense = rng.random((query_count, key_count)) < share
        dense[: query_count // 2, key_count // 3 :] = share > 0.5
        check(BlockMask.from_dense(dense, block_size), dense, block_size)


@sizes
def test_from_mask_mod(query_count, key_count, block_size):
    def mask_mod(batch, head, q, k):
        assert batch.shape == head.shape == (1, 1, 1, 1)
        assert batch == head == 0
        return (k <= q) & (k % 7 != q % 5)

    q, k = pairs(query_count, key_count, 0)
    mask = BlockMask.from_mask_mod(mask_mod, query_count, key_count, block_size=block_size)
    check(mask, mask_mod(*np.zeros((2, 1, 1, 1, 1)), q, k), block_size)


@sizes
def test_causal_and_window(query_count, key_count, block_size):
    for q_offset in (None, 0, -3, 70, -500, 500):
        q, k = pairs(query_count, key_count, q_offset)
        mask = BlockMask.causal(query_count, key_count, q_offset, block_size=block_size)
        check(mask, k <= q, block_size)
        for left, right in ((0, 0), (70, 5), (None, 66), (3, None), (None, None), (2**70, 2)):
            expected = np.ones((query_count, key_count), bool)
            if left is not None:
                expected &= k >= q - min(left, 10**6)
            if right is not None:
                expected &= k <= q + right
            mask = BlockMask.window(
                query_count, key_count, left, right, q_offset, block_size=block_size
            )
            check(mask, expected, block_size)
