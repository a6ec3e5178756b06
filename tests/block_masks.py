"""What tests of block masks share: sizes, and what the arrays of a mask have to be."""

import numpy as np
import pytest
from numattn import BlockMask

_LENGTHS = [1, 2, 63, 64, 65, 100, 200]
_BLOCK_SIZES = [(1, 1), (3, 5), (8, 16), (64, 64), (64, 32), (128, 96)]

# Of small blocks there are many, which `check` looks at one by one.
each_size = pytest.mark.parametrize(
    ("query_count", "key_count", "block_size"),
    [
        (query_count, key_count, block_size)
        for block_size in _BLOCK_SIZES
        for place, query_count in enumerate(_LENGTHS)
        for key_count in {query_count, _LENGTHS[(place + 3) % 7]}
        if query_count * key_count <= 1000 * block_size[0] * block_size[1]
    ],
)


def positions(query_count, key_count, q_offset=None):
    """Return the positions of queries, as a column, and of keys."""
    q_offset = key_count - query_count if q_offset is None else q_offset
    return np.arange(query_count)[:, np.newaxis] + q_offset, np.arange(key_count)


def check(mask, expected, block_size):
    """Compare a mask with a dense one, and its arrays with what the kernels read."""
    assert mask.shape == expected.shape
    assert mask.block_size == block_size
    dense = mask.to_dense()
    np.testing.assert_array_equal(dense, expected)
    assert dense.dtype == bool
    assert mask.density == pytest.approx(expected.mean() if expected.size else 0, rel=1e-12)
    assert mask.nbytes == mask._blocks.nbytes + mask._bits.nbytes
    _check_arrays(mask, expected)
    assert mask == BlockMask.from_dense(expected, block_size)


def _check_arrays(mask, expected):
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
    shares = mask.shares_of_blocks()
    assert shares.shape == blocks.shape
    for index in np.ndindex(blocks.shape):
        *items, i, j = index
        block = expected[(*items, slice(i * bq, (i + 1) * bq), slice(j * bk, (j + 1) * bk))]
        assert shares[index] == block.mean()
        if blocks[index] < 0:
            assert block.all() == block.any()
            assert blocks[index] == (-1 if block.any() else -2)
        else:
            assert block.any()
            assert not block.all()
            padded = np.zeros((bq, bk), bool)
            padded[: block.shape[0], : block.shape[1]] = block
            packed = np.packbits(padded, axis=-1, bitorder="little")
            np.testing.assert_array_equal(bits[blocks[index]], packed)
    np.testing.assert_array_equal(np.unique(blocks[blocks >= 0]), np.arange(len(bits)))
    contents = [block.tobytes() for block in bits]
    assert contents == sorted(set(contents))
