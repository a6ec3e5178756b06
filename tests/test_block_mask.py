"""Promise: a block mask says of every pair what it was made of, in little memory."""

import copy
import pickle
import tracemalloc

import numpy as np
import pytest
from block_masks import check, each_size, positions
from numattn import BlockMask


def draw(rng, shape, share=0.3):
    """Return bools of which some blocks of most sizes are equal, empty or full."""
    dense = rng.random(shape) < share
    dense[..., : shape[-2] // 2, shape[-1] // 3 :] = False
    dense[..., shape[-2] // 2 :, : shape[-1] // 2] = True
    return dense


# ---- what a mask is made of --------------------------------------------------------------------


@each_size
def test_from_dense(rng, query_count, key_count, block_size):
    shape = query_count, key_count
    for dense in (draw(rng, shape), rng.random(shape) < 0.9, np.zeros(shape, bool)):
        check(BlockMask.from_dense(dense, block_size), dense, block_size)
        check(BlockMask.from_dense(~dense[::-1].T, block_size), ~dense[::-1].T, block_size)


@pytest.mark.parametrize("leading", [(3,), (2, 1), (2, 3), (0,), (2, 1, 2)])
def test_from_dense_of_more_axes(rng, leading):
    dense = draw(rng, (*leading, 70, 50))
    check(BlockMask.from_dense(dense, (16, 24)), dense, (16, 24))
    rows = np.broadcast_to(draw(rng, (*leading, 1, 50)), dense.shape)
    check(BlockMask.from_dense(rows, (16, 24)), rows, (16, 24))


@pytest.mark.parametrize("shape", [(0, 5), (5, 0), (0, 0), (2, 0, 3), (0, 4, 4)])
def test_no_pairs(shape):
    check(BlockMask.from_dense(np.ones(shape, bool)), np.ones(shape, bool), (64, 64))


def test_larger_than_what_is_evaluated_at_a_time(rng):
    dense = draw(rng, (2, 150, 9000))
    for block_size in ((64, 64), (100, 5000), (7, 11)):
        mask = BlockMask.from_dense(dense, block_size)
        np.testing.assert_array_equal(mask.to_dense(), dense)
        of_function = BlockMask.from_mask_mod(
            lambda batch, head, q, k: dense[head, q, k], 150, 9000, heads=2, block_size=block_size
        )
        assert of_function == mask


@each_size
def test_from_mask_mod(query_count, key_count, block_size):
    def mask_mod(batch, head, q, k):
        assert batch.shape == head.shape == (1, 1, 1, 1)
        assert batch == head == 0
        assert q.shape[0] == q.shape[1] == q.shape[3] == 1
        assert k.shape[:3] == (1, 1, 1)
        return (k <= q) & (k % 7 != q % 5)

    q, k = positions(query_count, key_count, 0)
    mask = BlockMask.from_mask_mod(mask_mod, query_count, key_count, block_size=block_size)
    check(mask, (k <= q) & (k % 7 != q % 5), block_size)


@pytest.mark.parametrize(("batch", "heads"), [(2, None), (None, 3), (2, 3), (0, 2), (1, 1)])
def test_from_mask_mod_of_items(batch, heads):
    def mask_mod(batch, head, q, k):
        return (k <= q + 5 * batch) & (q - k < 10 * (head + 1))

    sizes = [1 if n is None else n for n in (batch, heads)]
    leading = sizes if batch is not None else sizes[1:]
    expected = mask_mod(*np.indices((*sizes, 40, 30), sparse=True)).reshape(*leading, 40, 30)
    mask = BlockMask.from_mask_mod(mask_mod, 40, 30, batch=batch, heads=heads, block_size=(16, 16))
    check(mask, expected, (16, 16))


def test_mask_mod_may_say_the_same_of_all():
    for said in (True, np.True_, np.ones((1, 1, 1, 1), bool)):
        mask = BlockMask.from_mask_mod(lambda *indices, said=said: said, 100, 70)
        check(mask, np.ones((100, 70), bool), (64, 64))
    by_key = np.arange(70) % 3 == 0
    mask = BlockMask.from_mask_mod(lambda batch, head, q, k: by_key[k], 100, 70)
    check(mask, np.broadcast_to(by_key, (100, 70)), (64, 64))


def shifted(q):
    q = np.asarray(q)
    return q * 1_000_003


@pytest.mark.parametrize(
    "mask_mod",
    [
        lambda batch, head, q, k: (q - k) ** 2 < 10_000,
        lambda batch, head, q, k: shifted(q) < shifted(k),
        lambda batch, head, q, k: np.where(k > 5, k, q) * 1_000_003 > 2**32,
        lambda batch, head, q, k: np.multiply.outer(q.ravel(), k.ravel())[None, None] > 2**32,
        lambda batch, head, q, k: (k.copy() ** 2 > 2**32) | (q.reshape(-1, 1) ** 40 > k[0, 0]),
        lambda batch, head, q, k: (k[..., ::-1][..., ::-1] > q) & (k >= 2**40 * q) & (k != 7.5),
        lambda batch, head, q, k: q * k > 2**32,
        lambda batch, head, q, k: q + 2**40 > k + 2**40,
    ],
)
def test_mask_mods_of_large_numbers(mask_mod):
    """Products of indices do not overflow."""
    mask = BlockMask.from_mask_mod(mask_mod, 3, 70_000, block_size=(3, 1000))
    check(mask, mask_mod(*np.indices((1, 1, 3, 70_000), sparse=True))[0, 0], (3, 1000))


def test_indices_cannot_be_written():
    """What compares them in 32 bits would not know."""

    def mask_mod(batch, head, q, k):
        q += 1
        return q > k

    with pytest.raises(ValueError, match="read-only"):
        BlockMask.from_mask_mod(mask_mod, 4, 4)


@each_size
def test_from_blocks_and_bsr(rng, query_count, key_count, block_size):
    bq, bk = block_size
    keep = rng.random((-(-query_count // bq), -(-key_count // bk))) < 0.5
    expected = np.kron(keep, np.ones(block_size, bool))[:query_count, :key_count]
    mask = BlockMask.from_blocks(keep, query_count, key_count, block_size)
    check(mask, expected, block_size)
    indptr = np.append(0, keep.sum(axis=1).cumsum())
    indices = np.nonzero(keep)[1]
    assert BlockMask.from_bsr(indptr, indices, query_count, key_count, block_size) == mask
    data = rng.random((len(indices), *block_size)) < 0.5
    dense = np.zeros((*keep.shape, bq, bk), bool)
    dense[keep] = data
    dense = dense.swapaxes(1, 2).reshape(keep.shape[0] * bq, keep.shape[1] * bk)
    mask = BlockMask.from_bsr(indptr, indices, query_count, key_count, block_size, data)
    check(mask, dense[:query_count, :key_count], block_size)


def test_from_blocks_of_more_axes(rng):
    keep = rng.random((2, 3, 4, 5)) < 0.5
    expected = np.kron(keep, np.ones((1, 1, 8, 6), bool))[..., :30, :29]
    check(BlockMask.from_blocks(keep, 30, 29, (8, 6)), expected, (8, 6))


def test_from_a_matrix_of_scipy(rng):
    sparse = pytest.importorskip("scipy.sparse")
    dense = draw(rng, (96, 120))
    m = sparse.bsr_array(dense, blocksize=(16, 12))
    mask = BlockMask.from_bsr(m.indptr, m.indices, *m.shape, m.blocksize, m.data)
    check(mask, dense, (16, 12))


# ---- operators ---------------------------------------------------------------------------------


@each_size
def test_operators(rng, query_count, key_count, block_size):
    # Few different rows, so that blocks are equal, and bits of two make empty and full ones.
    rows = rng.random((4, query_count // 8 + 1, key_count)) < [[[0.5]], [[0.5]], [[0]], [[1]]]
    dense = rows.repeat(8, axis=1)[:, :query_count]
    dense[1, :, : key_count // 2] = ~dense[0, :, : key_count // 2]
    masks = [BlockMask.from_dense(x, block_size) for x in dense]
    for a, x in zip(masks, dense, strict=True):
        check(~a, ~x, block_size)
        for b, y in zip(masks, dense, strict=True):
            check(a & b, x & y, block_size)
            check(a | b, x | y, block_size)


@pytest.mark.parametrize(
    ("one", "other"), [((), (3,)), ((2, 1), (3,)), ((2, 1), (1, 3)), ((0, 1), (2,)), ((2,), (2,))]
)
def test_operators_broadcast(rng, one, other):
    x, y = draw(rng, (*one, 50, 40)), draw(rng, (*other, 50, 40), 0.6)
    a, b = BlockMask.from_dense(x, (8, 16)), BlockMask.from_dense(y, (8, 16))
    check(a & b, x & y, (8, 16))
    check(b | a, y | x, (8, 16))
    check(~b, ~y, (8, 16))


def test_not_of_partial_blocks_that_share_bits():
    """A partial block may have the bits of a whole one, whose other bits are within the mask."""
    dense = np.zeros((11, 13), bool)
    dense[::8, ::8] = True
    mask = BlockMask.from_dense(dense, (8, 8))
    assert len(mask._bits) == 1
    check(~mask, ~dense, (8, 8))
    check(~mask | mask, np.ones((11, 13), bool), (8, 8))
    check(~mask & mask, np.zeros((11, 13), bool), (8, 8))


# ---- parts -------------------------------------------------------------------------------------


@each_size
def test_rows_and_slices(rng, query_count, key_count, block_size):
    dense = draw(rng, (query_count, key_count))
    mask = BlockMask.from_dense(dense, block_size)
    bq, bk = block_size
    ranges = [
        [(0, n), (0, 0), (n, n), (n // 3, n), (n // 4, n // 2), (block, n), (0, block), (n - 1, n)]
        for n, block in ((query_count, bq), (key_count, bk))
    ]
    for (q0, q1), (k0, k1) in zip(*ranges, strict=True):
        q0, k0 = min(q0, query_count), min(k0, key_count)
        rows = mask.rows(q0, min(q1, query_count))
        np.testing.assert_array_equal(rows, dense[q0:q1])
        check(mask[q0:q1, k0:k1], dense[q0:q1, k0:k1], block_size)
        ends = max(q0, min(q1, query_count)), max(k0, min(k1, key_count))
        empty = mask.is_empty(q0, ends[0], k0, ends[1])
        assert empty is not dense[q0:q1, k0:k1].any()
        assert type(empty) is bool


def test_is_empty_is_exact(rng):
    dense = np.zeros((2, 40, 40), bool)
    dense[1, 13, 22] = dense[0, 30:, 30:] = True
    mask = BlockMask.from_dense(dense, (8, 16))
    for _ in range(500):
        q0, q1, k0, k1 = np.sort(rng.integers(0, 41, (2, 2)), axis=1).ravel()
        assert mask.is_empty(q0, q1, k0, k1) == (not dense[:, q0:q1, k0:k1].any())


@pytest.mark.parametrize(
    "index",
    [
        np.s_[...], np.s_[1], np.s_[1, 2], np.s_[-1, :, 8:], np.s_[..., 16:, 16:32],
        np.s_[..., 3:, 5:30], np.s_[::-1, 1:], np.s_[:, 1, 5:-3, -20:-2], np.s_[0:0],
        np.s_[1, ..., 8:24, :], np.s_[..., 100:, :], np.s_[..., 20:10, :],
        np.s_[np.int64(1), 0, :, 8:],
    ],
)  # fmt: skip
def test_indices(rng, index):
    dense = draw(rng, (2, 3, 40, 50))
    check(BlockMask.from_dense(dense, (8, 16))[index], dense[index], (8, 16))


def test_new_axes(rng):
    dense = draw(rng, (3, 40, 50))
    mask = BlockMask.from_dense(dense, (16, 16))
    for index in (np.s_[:, None], np.s_[None], np.s_[None, 1:, None, :20, 5:], np.s_[..., 3:, :]):
        check(mask[index], dense[index], (16, 16))


def test_parts_are_read_only_and_dense_arrays_are_not(rng):
    mask = BlockMask.from_dense(draw(rng, (40, 50)), (8, 16))
    before = mask.to_dense()
    mask.to_dense()[:] = True
    mask.rows(3, 20)[:] = True
    np.testing.assert_array_equal(mask.to_dense(), before)
    with pytest.raises(AttributeError):
        mask.shape = (1, 1)


# ---- as an object ------------------------------------------------------------------------------


def test_equal_and_hash(rng):
    dense = draw(rng, (2, 40, 50))
    mask = BlockMask.from_dense(dense, (8, 16))
    same = ~~BlockMask.from_dense(dense.copy(), (8, 16))
    assert mask == same
    assert hash(mask) == hash(same)
    dense[1, 13, 22] ^= True
    others = [
        BlockMask.from_dense(dense, (8, 16)), mask[1], mask[:1],
        BlockMask.from_dense(mask.to_dense(), (16, 16)),
    ]  # fmt: skip
    for other in others:
        assert mask != other
        assert hash(mask) != hash(other)
    assert mask != mask.to_dense()
    assert BlockMask.from_dense(np.zeros((7, 8), bool)) != BlockMask.from_dense(
        np.zeros((8, 8), bool)
    )


def test_copies_and_pickles(rng):
    dense = draw(rng, (2, 40, 50))
    mask = BlockMask.from_dense(dense, (8, 16))
    copies = [copy.copy(mask), copy.deepcopy(mask)]
    copies += [pickle.loads(pickle.dumps(mask, protocol)) for protocol in range(2, 6)]
    buffers = []
    data = pickle.dumps(mask, 5, buffer_callback=buffers.append)
    copies.append(pickle.loads(data, buffers=[bytearray(buffer) for buffer in buffers]))
    for other in copies:
        assert other == mask
        check(other, dense, (8, 16))


def test_repr():
    assert repr(BlockMask.causal(200, 200)) == (
        "BlockMask(shape=(200, 200), block_size=(64, 64), density=0.502, "
        "blocks: 6 full, 4 mixed, 6 empty, 1088 bytes)"
    )


# ---- memory ------------------------------------------------------------------------------------


def causal_documents(length):
    text = np.repeat(np.arange(length // 100), 100)
    text = np.append(text, np.full(length - len(text), -1))
    return lambda batch, head, q, k: (k <= q) & (text[q] == text[k])


def peak_of_mask(length):
    mask_mod = causal_documents(length)
    tracemalloc.start()
    try:
        mask = BlockMask.from_mask_mod(mask_mod, length, length)
        return tracemalloc.get_traced_memory()[1], mask
    finally:
        tracemalloc.stop()


@pytest.mark.thread_unsafe
def test_memory_of_from_mask_mod():
    """What is evaluated at a time does not grow, and blocks take 4 bytes in the mask."""
    peak, mask = peak_of_mask(8192)
    assert peak < 2**22 + 4 * mask.nbytes


@pytest.mark.slow
@pytest.mark.thread_unsafe
def test_memory_of_a_long_mask():
    peak, mask = peak_of_mask(65_536)
    assert peak <= 64 * 2**20
    causal = BlockMask.causal(65_536, 65_536)
    texts = [100] * 655 + [36]
    assert mask == causal & BlockMask.documents(texts)


# ---- errors ------------------------------------------------------------------------------------

EYE = np.eye(4, dtype=bool)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: BlockMask(), TypeError, r"BlockMask\(\) cannot be called: use BlockMask.from"),
        (lambda: BlockMask.from_dense(EYE, 64), TypeError,
         r"block_size: got 64 \(int\), expected \(queries, keys\), the size"),
        (lambda: BlockMask.from_dense(EYE, (64,)), ValueError,
         r"block_size: got \(64,\), expected two sizes"),
        (lambda: BlockMask.from_dense(EYE, (0, 64)), ValueError,
         r"block_size: got \(0, 64\), expected sizes of at least 1"),
        (lambda: BlockMask.causal(4, 4, block_size=(64, -1)), ValueError,
         r"block_size: got \(64, -1\), expected sizes of at least 1"),
        (lambda: BlockMask.from_dense(EYE, (64.0, 64)), TypeError,
         r"block_size: got 64.0 \(float\), expected an int"),
        (lambda: BlockMask.from_dense(EYE.astype(int)), TypeError,
         r"mask: got dtype int64, expected bool \(True = attend\); use `mask != 0` if 0 means"),
        (lambda: BlockMask.from_dense(EYE.astype(np.float32)), TypeError,
         r"mask: got dtype float32, expected bool \(True = attend\); use `mask != 0`"),
        (lambda: BlockMask.from_dense(EYE.astype("M8[s]")), TypeError,
         r"mask: got dtype datetime64.*, expected bool \(True = attend\)$"),
        (lambda: BlockMask.causal(4, 4, block_size=(2**12, 2**12 + 1)), ValueError,
         r"block_size: got \(4096, 4097\), expected blocks of at most 16777216 pairs"),
        (lambda: BlockMask.from_dense(EYE[0]), ValueError,
         r"mask: got shape \(4,\), expected \(..., Lq, Lk\)"),
        (lambda: BlockMask.from_blocks(EYE, 100, 200, (32, 32)), ValueError,
         r"keep: got shape \(4, 4\), expected \(..., 4, 7\), the blocks of 100 queries and 200"),
        (lambda: BlockMask.from_blocks(EYE.astype(float), 4, 4, (1, 1)), TypeError,
         "keep: got dtype float64, expected bool"),
        (lambda: BlockMask.from_blocks(EYE, -4, 4, (1, 1)), ValueError,
         "Lq: got -4, expected at least 0"),
        (lambda: BlockMask.from_mask_mod(EYE, 4, 4), TypeError,
         r"mask_mod: got ndarray, expected a function mask_mod\(batch, head, q, k\)"),
        (lambda: BlockMask.from_mask_mod(lambda q, k: q > k, 4, 4), TypeError,
         r"mask_mod: got a function of \(q, k\), expected one of \(batch, head, q, k\)"),
        (lambda: BlockMask.from_mask_mod(lambda b, h, q, k: q - k, 4, 4), TypeError,
         r"mask_mod: got dtype int64 as its result, expected bool \(True = attend\)"),
        (lambda: BlockMask.from_mask_mod(lambda b, h, q, k: None, 4, 4), TypeError,
         "mask_mod: got None as its result, expected an array of bool"),
        (lambda: BlockMask.from_mask_mod(lambda b, h, q, k: EYE[None, :3, None], 4, 4), ValueError,
         r"mask_mod: got shape \(1, 3, 1, 4\) as its result, expected four axes that broad"),
        (lambda: BlockMask.from_mask_mod(lambda b, h, q, k: EYE, 4, 4), ValueError,
         r"mask_mod: got shape \(4, 4\) as its result, expected four axes .*`pad\[k\]` instead"),
        (lambda: BlockMask.from_mask_mod(lambda b, h, q, k: (q < 3).squeeze(), 4, 4), ValueError,
         r"mask_mod: got shape \(4,\) as its result, expected four axes"),
        (lambda: bool(BlockMask.causal(4, 4)), TypeError, "no truth value: .* `&`, `|`"),
        (lambda: list(BlockMask.causal(4, 4)), TypeError, "'BlockMask' object is not iterable"),
        (lambda: BlockMask.from_mask_mod(lambda b, h, q, k: q > k, 4.0, 4), TypeError,
         r"Lq: got 4.0 \(float\), expected an int"),
        (lambda: BlockMask.from_mask_mod(lambda b, h, q, k: q > k, 4, -1), ValueError,
         "Lk: got -1, expected at least 0"),
        (lambda: BlockMask.from_mask_mod(lambda b, h, q, k: q > k, 4, 4, batch=-1), ValueError,
         "batch: got -1, expected at least 0"),
        (lambda: BlockMask.from_mask_mod(lambda b, h, q, k: q > k, 4, 4, heads=True), TypeError,
         "heads: got True, expected an int"),
    ],
)  # fmt: skip
def test_bad_constructions(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_errors_of_a_mask_mod_say_what_it_may_do():
    with pytest.raises(ValueError, match="truth value") as caught:
        BlockMask.from_mask_mod(lambda b, h, q, k: k <= q and k > 2, 4, 4)
    assert "with `&`, `|`, `~` and `np.where` instead of `and`" in caught.value.__notes__[0]


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (([0, 1], [0]), ValueError,
         r"indptr: got shape \(2,\), expected \(3,\), one more than the rows of blocks of 8 q"),
        (([1, 1, 2], [0, 1]), ValueError, "indptr: got numbers from 1 to 2, expected numbers"),
        (([0, 1, 1], [0, 1]), ValueError, "indptr: got numbers from 0 to 1, expected numbers"),
        (([0, 3, 2], [0, 1]), ValueError, "indptr: got 2 after 3 at index 2, expected numbers"),
        (([0.0, 1, 2], [0, 1]), TypeError, "indptr: got dtype float64, expected ints"),
        (([0, 1, 2], [0, 3]), ValueError,
         "indices: got 3 at index 1, expected 0 to 2, the blocks of 12"),
        (([0, 1, 2], [-1, 2]), ValueError, "indices: got -1 at index 0, expected 0 to 2"),
        (([0, 2, 3], [1, 0, 0]), ValueError,
         "indices: got 0 after 1 at index 1, expected numbers that increase within each row; "
         "call Sc"),
        (([0, 2, 3], [1, 1, 0]), ValueError, "indices: got 1 after 1 at index 1, expected numbers"),
        (([0, 1, 2], [[0, 1]]), ValueError, r"indices: got shape \(1, 2\), expected \(n,\)"),
        (([0, 1, 2], [True, False]), TypeError, "indices: got dtype bool, expected ints"),
        (([0, 1, 2], [0, 1], np.ones((2, 4, 4))), TypeError, "data: got dtype float64, expected"),
        (([0, 1, 2], [0, 1], np.ones((2, 4, 3), bool)), ValueError,
         r"data: got shape \(2, 4, 3\), expected \(2, 4, 4\)"),
    ],
)  # fmt: skip
def test_bad_bsr(arguments, error, message):
    indptr, indices, *data = arguments
    with pytest.raises(error, match=message):
        BlockMask.from_bsr(indptr, indices, 8, 12, (4, 4), *data)


@pytest.mark.parametrize("combine", [lambda a, b: a & b, lambda a, b: a | b])
@pytest.mark.parametrize(
    ("other", "error", "message"),
    [
        (EYE, TypeError, r"BlockMask [&|]: got ndarray, expected a BlockMask; convert an array"),
        (True, TypeError, "BlockMask [&|]: got bool, expected a BlockMask"),
        (BlockMask.from_dense(EYE, (2, 2)), ValueError,
         r"got block sizes \(\d+, \d+\) and \(\d+, \d+\), expected equal block sizes; make both"),
        (BlockMask.from_dense(EYE[:3]), ValueError,
         r"got shapes \(\d, 4\) and \(\d, 4\), expected equal numbers of queries and keys"),
        (BlockMask.from_dense(EYE[:, :1]), ValueError, "expected equal numbers of queries and"),
    ],
)  # fmt: skip
def test_bad_operands(combine, other, error, message):
    mask = BlockMask.from_dense(EYE)
    for operands in ((mask, other), (other, mask)):
        with pytest.raises(error, match=message):
            combine(*operands)


def test_operands_whose_axes_do_not_broadcast():
    a, b = (BlockMask.from_dense(np.ones((n, 4, 4), bool)) for n in (2, 3))
    with pytest.raises(ValueError, match=r"shapes \(2, 4, 4\) and \(3, 4, 4\), expected equal"):
        a & b


@pytest.mark.parametrize(
    ("index", "error", "message"),
    [
        (np.s_[0, 1], TypeError, r"index: got \(0, 1\), expected slices for queries and keys"),
        (np.s_[..., ::2, :], ValueError, "expected slices of step 1 for queries and keys"),
        (np.s_[..., None, :], TypeError, "expected slices for queries and keys"),
        (np.s_[0, "a"], TypeError, r"index: got 'a' \(str\), expected ints for batch"),
        (np.s_[0, [1, 2]], TypeError, r"index: got \[1, 2\] \(list\), expected ints for batch"),
        (np.s_[True], TypeError, r"index: got True \(bool\), expected ints for batch"),
        (np.s_[0, :, :, :], ValueError, r"expected one index per axis of a mask of shape \(2"),
        (np.s_[..., ..., 0], ValueError, "expected one index per axis of a mask of shape"),
        (np.s_[2], IndexError, "index 2 is out of bounds"),
    ],
)
def test_bad_indices(index, error, message):
    mask = BlockMask.from_dense(np.ones((2, 4, 4), bool))
    with pytest.raises(error, match=message):
        mask[index]


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda m: m.rows(0, 5), ValueError, "queries: got 0 to 5, expected a range within 0 to 4"),
        (lambda m: m.rows(-1, 2), ValueError, "queries: got -1 to 2, expected a range within"),
        (lambda m: m.rows(3, 2), ValueError, "queries: got 3 to 2, expected a range within"),
        (lambda m: m.rows(0.0, 2), TypeError, r"queries: got 0.0 \(float\), expected an int"),
        (lambda m: m.is_empty(0, 4, 0, 5), ValueError, "keys: got 0 to 5, expected a range within"),
        (lambda m: m.is_empty(0, 5, 0, 4), ValueError, "queries: got 0 to 5, expected a range"),
    ],
)
def test_bad_ranges(call, error, message):
    with pytest.raises(error, match=message):
        call(BlockMask.from_dense(EYE))
