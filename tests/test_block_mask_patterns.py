"""Promise: ready block masks say what they are described to say, and take little time to make."""

import tracemalloc

import numpy as np
import pytest
from block_masks import check, each_size, positions
from numattn import BlockMask

OFFSETS = [None, 0, -3, 70, -500, 500]


def band(q, k, left, right):
    return ((k >= q - min(left or 0, 10**6)) | (left is None)) & (
        (k <= q + (right or 0)) | (right is None)
    )


# ---- by position -------------------------------------------------------------------------------


@each_size
def test_causal_and_window(query_count, key_count, block_size):
    for q_offset in OFFSETS:
        q, k = positions(query_count, key_count, q_offset)
        mask = BlockMask.causal(query_count, key_count, q_offset, block_size=block_size)
        check(mask, k <= q, block_size)
        for left, right in ((0, 0), (70, 5), (None, 66), (3, None), (None, None), (2**70, 2)):
            mask = BlockMask.window(
                query_count, key_count, left, right, q_offset, block_size=block_size
            )
            check(mask, band(q, k, left, right), block_size)


@each_size
def test_dilated(query_count, key_count, block_size):
    for q_offset, left, right, dilation in (
        (None, 0, 0, 1), (None, 70, 5, 1), (0, 20, 3, 2), (-3, None, 30, 3), (70, 2, None, 7),
        (None, None, None, 5), (None, 2, 1, 100), (500, None, 0, 64), (None, 2**61, 2**61, 2**61),
    ):  # fmt: skip
        q, k = positions(query_count, key_count, q_offset)
        steps, rest = np.divmod(k - q, dilation)
        expected = band(0, steps, left, right) & (rest == 0)
        mask = BlockMask.dilated(
            query_count, key_count, left, right, dilation, q_offset, block_size=block_size
        )
        check(mask, expected, block_size)


@each_size
def test_prefix(query_count, key_count, block_size):
    for q_offset in OFFSETS:
        q, k = positions(query_count, key_count, q_offset)
        for prefix in {0, 1, key_count // 2, key_count}:
            mask = BlockMask.prefix(query_count, key_count, prefix, q_offset, block_size=block_size)
            check(mask, (k <= q) | (k < prefix), block_size)


@pytest.mark.parametrize("shape", [(3,), (3, 1), (1,)])
def test_prefixes_of_a_batch(rng, shape):
    prefixes = rng.integers(0, 50, shape)
    q, k = positions(40, 50)
    expected = (k <= q) | (k < prefixes[..., None, None, None])
    check(BlockMask.prefix(40, 50, prefixes, block_size=(16, 8)), expected, (16, 8))


@each_size
def test_global_and_window(rng, query_count, key_count, block_size):
    for q_offset, left, right, tokens in (
        (None, 3, 3, 0), (None, 3, 0, min(70, key_count)), (0, 70, 2, [key_count - 1, 0]),
        (-3, None, 1, rng.integers(0, key_count, 5)), (70, 2, 2, []), (-500, 2, 2, 1),
        (500, 0, 0, key_count), (None, 0, 0, np.arange(key_count)),
    ):  # fmt: skip
        q, k = positions(query_count, key_count, q_offset)
        chosen = np.arange(tokens) if isinstance(tokens, int) else tokens
        expected = band(q, k, left, right) | np.isin(q, chosen) | np.isin(k, chosen)
        mask = BlockMask.global_and_window(
            query_count, key_count, left, right, tokens, q_offset, block_size=block_size
        )
        check(mask, expected, block_size)


# ---- packed texts ------------------------------------------------------------------------------


@each_size
def test_documents(rng, query_count, key_count, block_size):
    for count in (1, 3, 30):
        cuts, key_cuts = (
            np.sort(rng.integers(0, n + 1, count - 1)) for n in (query_count, key_count)
        )
        lengths = np.diff([0, *cuts, query_count])
        key_lengths = np.diff([0, *key_cuts, key_count])
        ids, key_ids = (
            np.repeat(np.arange(count), lengths),
            np.repeat(np.arange(count), key_lengths),
        )
        mask = BlockMask.documents(
            lengths, query_count, key_count, key_lengths=key_lengths, block_size=block_size
        )
        check(mask, ids[:, None] == key_ids, block_size)
        assert BlockMask.document_ids(ids, key_ids, block_size=block_size) == mask
        mask = BlockMask.documents(lengths, query_count, block_size=block_size)
        check(mask, ids[:, None] == ids, block_size)


@each_size
def test_document_ids(rng, query_count, key_count, block_size):
    """In any order, and with padding."""
    for most in (1, 3, 1000):
        ids, key_ids = rng.integers(-1, most, query_count), rng.integers(-1, most, key_count)
        ids[: query_count // 2].sort()
        expected = (ids[:, None] == key_ids) & (key_ids >= 0)
        mask = BlockMask.document_ids(ids, key_ids, block_size=block_size)
        check(mask, expected, block_size)
    assert BlockMask.document_ids(np.full(70, -(2**62))).density == 0


def test_document_ids_of_a_batch(rng):
    ids = np.sort(rng.integers(-2, 6, (2, 3, 40)))
    expected = (ids[..., None, :, None] == ids[..., None, None, :]) & (ids >= 0)[..., None, None, :]
    check(BlockMask.document_ids(ids, block_size=(8, 16)), expected, (8, 16))


def test_no_documents():
    check(BlockMask.documents([]), np.zeros((0, 0), bool), (64, 64))
    check(BlockMask.documents([0, 0], key_lengths=[3, 0]), np.zeros((0, 3), bool), (64, 64))
    check(BlockMask.document_ids([]), np.zeros((0, 0), bool), (64, 64))


# ---- at random ---------------------------------------------------------------------------------


@each_size
def test_random_blocks(query_count, key_count, block_size):
    bq, bk = block_size
    columns = -(-key_count // bk)
    for count in {0, 1, columns // 2, columns}:
        mask = BlockMask.random_blocks(query_count, key_count, count, 7, block_size=block_size)
        blocks = mask.to_dense()[::bq, ::bk]
        expected = np.kron(blocks, np.ones(block_size, bool))[:query_count, :key_count]
        check(mask, expected, block_size)
        np.testing.assert_array_equal(blocks.sum(axis=1), count)


def test_random_numbers():
    def draw(rng, **options):
        return BlockMask.random_blocks(640, 640, 3, rng, **options)

    assert draw(3) == draw(3) == draw(np.random.default_rng(3))
    assert draw(3) != draw(4)
    generator = np.random.default_rng(3)
    assert draw(generator) != draw(generator)
    heads = draw(3, heads=4)
    assert heads.shape == (4, 640, 640)
    assert heads[0] != heads[1]
    # Each block of keys is drawn about as often as others.
    many = BlockMask.random_blocks(6400, 640, 3, 0).to_dense()[::64, ::64].sum(axis=0)
    assert many.sum() == 300
    assert many.min() > 15


# ---- with nobody, and with many ----------------------------------------------------------------


@pytest.mark.parametrize("lengths", [(0, 5), (5, 0), (0, 0)])
def test_no_pairs(lengths):
    expected = np.zeros(lengths, bool)
    for mask in (
        BlockMask.causal(*lengths), BlockMask.window(*lengths, 2, 3),
        BlockMask.dilated(*lengths, 2, 3, 2), BlockMask.prefix(*lengths, 0),
        BlockMask.global_and_window(*lengths, 1, 1, 0), BlockMask.random_blocks(*lengths, 0, 0),
        BlockMask.from_blocks(np.zeros([-(-n // 64) for n in lengths], bool), *lengths),
        BlockMask.from_mask_mod(lambda b, h, q, k: q > k, *lengths),
    ):  # fmt: skip
        check(mask, expected, (64, 64))
    check(BlockMask.prefix(*lengths, [0, 0]), np.zeros((2, 1, *lengths), bool), (64, 64))


@pytest.mark.thread_unsafe
@pytest.mark.parametrize(
    "make",
    [
        BlockMask.causal,
        lambda *n: BlockMask.window(*n, 1000, 1000),
        lambda *n: BlockMask.dilated(*n, None, 0, 3),
        lambda *n: BlockMask.prefix(*n, 5000),
        lambda *n: BlockMask.global_and_window(*n, 512, 512, 16),
        lambda *n: BlockMask.documents([100] * 655 + [36], *n),
    ],
    ids=["causal", "window", "dilated", "prefix", "global and window", "documents"],
)
def test_memory_of_long_ones(make):
    """65,536 tokens have 4 MiB of blocks; their pairs would take 4 GiB."""
    tracemalloc.start()
    try:
        mask = make(65_536, 65_536)
        assert tracemalloc.get_traced_memory()[1] < 64 * 2**20
    finally:
        tracemalloc.stop()
    assert mask.nbytes < 6 * 2**20


# ---- errors ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: BlockMask.causal(-1, 4), ValueError, "Lq: got -1, expected at least 0"),
        (lambda: BlockMask.causal(4, 4.5), TypeError, r"Lk: got 4.5 \(float\), expected an int"),
        (lambda: BlockMask.causal(4, 4, 0.5), TypeError, r"q_offset: got 0.5 \(float\), expected"),
        (lambda: BlockMask.causal(4, 4, 2**61), ValueError, "q_offset: got 2305843009213693952"),
        (lambda: BlockMask.causal(4, 4, [0, 1]), TypeError, r"q_offset: got \[0, 1\] \(list\)"),
        (lambda: BlockMask.window(4, 4, -1, 0), ValueError, "left: got -1, expected at least 0"),
        (lambda: BlockMask.window(4, 4, 0, 1.5), TypeError, r"right: got 1.5 \(float\), expected"),
        (lambda: BlockMask.dilated(4, 4, 1, 0, 0), ValueError, "dilation: got 0, expected at leas"),
        (lambda: BlockMask.dilated(4, 4, 1, -2, 1), ValueError, "right: got -2, expected at least"),
        (lambda: BlockMask.prefix(4, 5, 6), ValueError,
         "prefix_length: got 6, expected 0 to 5, the number"),
        (lambda: BlockMask.prefix(4, 5, [3, -1]), ValueError, "prefix_length: got -1, expected 0"),
        (lambda: BlockMask.prefix(4, 5, 1.0), TypeError,
         "prefix_length: got dtype float64, expected ints"),
        (lambda: BlockMask.prefix(4, 5, []), ValueError,
         r"prefix_length: got shape \(0,\), expected at least one number"),
        (lambda: BlockMask.global_and_window(4, 5, 1, 1, 6), ValueError,
         "global_tokens: got 6, expected 0 to 5 for 5 keys"),
        (lambda: BlockMask.global_and_window(4, 5, 1, 1, [0, 5]), ValueError,
         "global_tokens: got 5, expected 0 to 4 for 5 keys"),
        (lambda: BlockMask.global_and_window(4, 5, 1, 1, [-1]), ValueError,
         "global_tokens: got -1, expected 0 to 4"),
        (lambda: BlockMask.global_and_window(4, 5, 1, 1, np.ones(5, bool)), TypeError,
         "global_tokens: got dtype bool, expected ints"),
        (lambda: BlockMask.global_and_window(4, 5, 1, 1, [[1]]), ValueError,
         r"global_tokens: got shape \(1, 1\), expected an int, or positions"),
        (lambda: BlockMask.documents([3, 4], 8), ValueError,
         "lengths: got a sum of 7, expected Lq = 8"),
        (lambda: BlockMask.documents([3, 4], 7, 6), ValueError,
         "lengths: got a sum of 7, expected Lk = 6"),
        (lambda: BlockMask.documents([3, 4], key_lengths=[1, 2], Lk=4), ValueError,
         "key_lengths: got a sum of 3, expected Lk = 4"),
        (lambda: BlockMask.documents([3, 4], key_lengths=[1]), ValueError,
         "key_lengths: got 1 lengths, expected 2, as many as `lengths` has"),
        (lambda: BlockMask.documents([3, -4]), ValueError,
         "lengths: got -4 at index 1, expected lengths of at least 0"),
        (lambda: BlockMask.documents([3.0, 4.0]), TypeError, "lengths: got dtype float64, exp"),
        (lambda: BlockMask.documents(7), ValueError, r"lengths: got shape \(\), expected \(n,\)"),
        (lambda: BlockMask.document_ids(7), ValueError, r"ids: got shape \(\), expected \(\.\.\."),
        (lambda: BlockMask.document_ids(["a", "b"]), TypeError, "ids: got dtype str.*, expec"),
        (lambda: BlockMask.document_ids([1, 2], [[1, 2]]), ValueError,
         r"key_ids: got shape \(1, 2\), expected the same batch axes as ids, whose shape is \(2"),
        (lambda: BlockMask.document_ids(np.zeros((0, 3), int)), ValueError,
         r"ids: got shape \(0, 3\), expected at least one batch item"),
        (lambda: BlockMask.document_ids(np.array([2**63], np.uint64)), ValueError,
         r"ids: got 9223372036854775808, expected ints of at most 2\*\*63 - 1"),
        (lambda: BlockMask.random_blocks(100, 100, 3, 0), ValueError,
         "count: got 3, expected at most 2, the blocks of 100 keys"),
        (lambda: BlockMask.random_blocks(100, 100, -1, 0), ValueError, "count: got -1, expect"),
        (lambda: BlockMask.random_blocks(100, 100, 1, None), TypeError,
         r"rng: got None, expected an int"),
        (lambda: BlockMask.random_blocks(100, 100, 1, -1), ValueError, "rng: got -1, expected at"),
        (lambda: BlockMask.random_blocks(100, 100, 1, 0, heads=-1), ValueError, "heads: got -1"),
    ],
)  # fmt: skip
def test_bad_arguments(call, error, message):
    with pytest.raises(error, match=message):
        call()
