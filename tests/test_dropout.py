"""Promise: dropout drops the weights that its definition says, whatever computes them, and the same
ones forward and backward."""

import numattn as na
import numpy as np
import pytest
from checks import numbers
from conftest import use
from numattn import _dropout, _numpy_blocks
from numattn import _reference as reference

SEED = 2**63 + 12345
FLOAT32_EPS = float(np.finfo(np.float32).eps)


def kept(lq, lk, batch=(), heads=1, dropout=0.3, rng=SEED, layout="bhld", **options):
    """Return which weights of attention are kept: those that are not 0, where all logits are 0."""
    q, k = np.zeros((*batch, heads, lq, 1), np.float32), np.zeros((*batch, 1, lk, 1), np.float32)
    v = np.broadcast_to(np.eye(lk, dtype=np.float32), (*batch, 1, lk, lk))
    if layout == "blhd":
        q, k, v = (x.swapaxes(-2, -3) for x in (q, k, v))
    weights = na.attention(q, k, v, dropout=dropout, rng=rng, layout=layout, **options)
    weights = weights.swapaxes(-2, -3) if layout == "blhd" else weights
    growth = 1 / (lk * (1 - dropout))
    np.testing.assert_allclose(weights, np.where(weights > 0, growth, 0), rtol=4 * FLOAT32_EPS)
    return weights > 0


# ---- the definition ----------------------------------------------------------------------------

# Of the authors of Philox: counter, key, and four words.
KNOWN_ANSWERS = [
    ("00000000 " * 4, "00000000 " * 2, "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff " * 4, "ffffffff " * 2, "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    (
        "243f6a88 85a308d3 13198a2e 03707344",
        "a4093822 299f31d0",
        "d16cfe09 94fdcceb 5001e420 24126ea1",
    ),
]


@pytest.mark.parametrize(("counter", "key", "words"), KNOWN_ANSWERS)
def test_known_answers(counter, key, words):
    counter, key, words = ([int(x, 16) for x in text.split()] for text in (counter, key, words))
    counter = [np.array([x], np.uint64) for x in counter]
    assert [int(x[0]) for x in _dropout.philox(counter, tuple(key))] == words
    assert [int(x[0]) for x in reference.philox(counter, key[0] + 2**32 * key[1])] == words


@pytest.mark.smoke
@pytest.mark.parametrize(
    ("lq", "lk"), [(1, 1), (1, 30), (3, 5), (16, 4), (7, 98), (130, 193), (2, 1700)], ids=str
)
def test_the_weights_of_the_definition(any_backend, lq, lk):
    for batch, heads in (((), 3), ((2, 3), 2)):
        wanted = reference.kept_by_dropout(0.3, SEED, (*batch, heads, lq, lk))
        np.testing.assert_array_equal(kept(lq, lk, batch, heads), wanted)


def test_the_first_weights(any_backend):
    """Written down: word j of the answers above, under the threshold or not."""
    np.testing.assert_array_equal(kept(1, 4, dropout=0.39, rng=0)[0, 0], [True, True, True, True])
    np.testing.assert_array_equal(kept(1, 4, dropout=0.5, rng=0)[0, 0], [False, True, True, True])
    np.testing.assert_array_equal(kept(1, 4, dropout=0.7, rng=0)[0, 0], [False, True, True, False])
    np.testing.assert_array_equal(kept(1, 4, dropout=0.8, rng=0)[0, 0], [False, True, False, False])


@pytest.mark.parametrize("dropout", [2.0**-32, 0.1, 0.5, 0.99])
def test_frequencies(backend, dropout):
    """As many weights are dropped as should be, and whether one is says nothing of the others."""
    drops = ~kept(200, 203, heads=4, dropout=dropout)
    n = drops.size

    def assert_share(of, wanted, n):
        assert abs(of.mean() - wanted) < 5 * np.sqrt(wanted * (1 - wanted) / n)

    assert_share(drops, dropout, n)
    for axis in range(3):
        size = drops.shape[axis]
        for distance in (1, 4):
            first = drops.take(range(size - min(distance, size - 1)), axis)
            second = drops.take(range(min(distance, size - 1), size), axis)
            assert_share(first & second, dropout**2, n)
    other = ~kept(200, 203, heads=4, dropout=dropout, rng=SEED + 1)
    assert_share(drops & other, dropout**2, n)


def test_other_seeds_drop_other_weights(backend):
    seeds = [0, 1, 2**32, 2**32 - 1, 2**64 - 1, 2**63]
    found = {kept(9, 40, dropout=0.5, rng=seed).tobytes() for seed in seeds}
    assert len(found) == len(seeds)
    for seed in (np.int64(7), np.uint64(7), np.array(7)):
        np.testing.assert_array_equal(kept(9, 40, rng=seed), kept(9, 40, rng=7))


def test_what_changes_nothing(backend, rng):
    """Layouts, threads, limits and positions: a weight's place is its place in the arrays."""
    expected = kept(50, 300, (3,), heads=2)
    np.testing.assert_array_equal(kept(50, 300, (3,), heads=2, layout="blhd"), expected)
    np.testing.assert_array_equal(kept(50, 300, (3,), heads=2, num_threads=3), expected)
    np.testing.assert_array_equal(kept(50, 300, (3, 1), heads=2)[:, 0], expected)
    np.testing.assert_array_equal(kept(20, 90, (3,), heads=2), expected[..., :20, :90])
    x = np.zeros((3, 2, 50, 1), np.float32), np.zeros((3, 1, 300, 1), np.float32)
    v = np.broadcast_to(np.eye(300, dtype=np.float32), (3, 1, 300, 300))
    mask = rng.random((50, 300)) < 0.5
    i, j = np.arange(50)[:, np.newaxis], np.arange(300)
    near = (j >= i + 179) & (j <= i + 203)
    for options, attend in (
        ({"q_lengths": [50, 7, 0]}, i < np.array([50, 7, 0]).reshape(3, 1, 1, 1)),
        ({"kv_lengths": 201}, j < 201),
        ({"window": (21, 3), "q_offset": 200}, near),
        ({"mask": mask}, mask),
    ):
        weights = na.attention(*x, v, dropout=0.3, rng=SEED, **options)
        np.testing.assert_array_equal(weights > 0, expected & attend)


def test_blocks_of_the_numpy_backend():
    """Which begin at any query and head, where rows are long."""
    expected = reference.kept_by_dropout(0.3, SEED, (2, 3, 20, 30))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_numpy_blocks, "_BLOCK_LOGITS", 200)
        for _ in use("numpy"):
            np.testing.assert_array_equal(kept(20, 30, (2,), heads=3), expected)


def test_a_batch_item_counts(backend):
    """An item drops by its number in the batch: by itself it is item 0."""
    together = kept(20, 30, (3,))
    for item in range(3):
        assert np.array_equal(kept(20, 30, (1,))[0], together[item]) == (item == 0)


def test_no_dropout_needs_no_seed(backend, arrays):
    q, k, v = arrays(2, hq=4, hkv=2, lq=9, lk=20, d=16)
    expected = na.attention(q, k, v)
    for options in ({"dropout": 0}, {"dropout": 0.0, "rng": 5}, {"rng": 7}, {"dropout": -0.0}):
        np.testing.assert_array_equal(na.attention(q, k, v, **options), expected)


def test_lse_does_not_know_of_it(dtype, arrays):
    q, k, v = arrays(2, hq=4, hkv=2, lq=40, lk=60, d=16, dtype=dtype)
    out, lse = na.attention(q, k, v, dropout=0.4, rng=1, return_lse=True)
    plain, expected = na.attention(q, k, v, return_lse=True)
    np.testing.assert_allclose(lse, expected, rtol=0, atol=1e-12 if dtype == np.float64 else 2e-6)
    assert not np.allclose(out.astype(float), plain.astype(float), atol=0.1)


def test_a_nan_shows_where_its_weight_is_dropped(any_backend, arrays):
    q, k, v = arrays(hq=2, lq=40, lk=60, d=9)
    v[:, 7, 2] = np.nan
    out = na.attention(q, k, v, dropout=0.5, rng=1)
    assert np.isnan(out[..., 2]).all()
    assert np.isfinite(np.delete(out, 2, axis=-1)).all()


# ---- sequences ---------------------------------------------------------------------------------


def test_a_sequence_is_the_batch_item_of_its_number(dtype, arrays, rng):
    """Ragged sequences have the results and gradients of a padded batch."""
    lengths = [20, 0, 33, 7]
    q, k, v = arrays(4, hq=4, hkv=2, lq=33, d=16, dtype=dtype)
    options = {"dropout": 0.4, "rng": SEED, "is_causal": True, "sinks": [0.5, 1, 0, -1]}
    padded = {"q_lengths": lengths, "kv_lengths": lengths}
    dout = numbers(rng, *q.shape, dtype=dtype)
    wide = np.empty(q.shape, np.float64 if dtype == np.float64 else np.float32)
    _, lse = na.attention(q, k, v, out=wide, return_lse=True, **options, **padded)
    gradients = na.attention_backward(dout, q, k, v, wide, lse, **options, **padded)
    expected, _ = reference.attention(q, k, v, **options, **padded)
    eps = {2: 2e-2 if dtype.name == "bfloat16" else 4e-3, 4: 1e-5, 8: 1e-13}[dtype.itemsize]
    np.testing.assert_allclose(wide, expected, rtol=0, atol=eps * np.abs(expected).max())

    def side_by_side(x):
        return np.concatenate([one.swapaxes(0, 1)[:n] for one, n in zip(x, lengths, strict=True)])

    ragged = [side_by_side(x) for x in (dout, q, k, v)]
    starts = [np.concatenate([[0], np.cumsum(lengths)])] * 2
    out = np.empty(ragged[0].shape, wide.dtype)
    _, lse = na.attention_varlen(*ragged[1:], *starts, out=out, return_lse=True, **options)
    np.testing.assert_allclose(out, side_by_side(wide), rtol=0, atol=eps)
    actual = na.attention_varlen_backward(*ragged, out, lse, *starts, **options)
    for x, wanted in zip(actual[:3], gradients[:3], strict=True):
        wanted = side_by_side(wanted).astype(float)
        np.testing.assert_allclose(x.astype(float), wanted, rtol=0, atol=eps * np.abs(wanted).max())
    np.testing.assert_allclose(actual.sinks, gradients.sinks, rtol=0, atol=30 * eps)


# ---- both passes -------------------------------------------------------------------------------


def test_gradients_of_dropped_weights(any_backend, rng):
    """With logits of 0, each key's gradient of v is the sum over the queries that keep it."""
    q, k = np.zeros((2, 3, 40, 8), np.float32), np.zeros((2, 3, 70, 8), np.float32)
    v, dout = numbers(rng, 2, 3, 70, 5), np.ones((2, 3, 40, 5), np.float32)
    _, vjp = na.attention_vjp(q, k, v, dropout=0.3, rng=SEED)
    counts = reference.kept_by_dropout(0.3, SEED, (2, 3, 40, 70)).sum(axis=-2)[..., np.newaxis]
    expected = np.broadcast_to(counts / (70 * 0.7), v.shape)
    np.testing.assert_allclose(vjp(dout).v, expected, rtol=1e-5)


def test_a_generator_is_asked_for_one_seed(backend, arrays):
    q, k, v = arrays(2, hq=2, lq=9, lk=20, d=16)
    generator, twin = np.random.default_rng(5), np.random.default_rng(5)
    seed = int(twin.integers(2**64, dtype=np.uint64))
    out, vjp = na.attention_vjp(q, k, v, dropout=0.3, rng=generator)
    assert generator.bit_generator.state == twin.bit_generator.state
    same, same_vjp = na.attention_vjp(q, k, v, dropout=0.3, rng=seed)
    np.testing.assert_array_equal(out, same)
    np.testing.assert_array_equal(out, na.attention(q, k, v, dropout=0.3, rng=seed))
    for _ in range(2):
        for x, wanted in zip(vjp(out)[:3], same_vjp(out)[:3], strict=True):
            np.testing.assert_array_equal(x, wanted)
    na.attention_vjp(q, k, v, rng=generator)
    with pytest.raises(ValueError, match=r"^scale: "):
        na.attention_vjp(q, k, v, dropout=0.3, rng=generator, scale=np.nan)
    assert generator.bit_generator.state == twin.bit_generator.state
    other, _ = na.attention_vjp(q, k, v, dropout=0.3, rng=generator)
    assert not np.array_equal(out, other)
