"""Promise: attention with a mask by blocks is attention with the same dense mask, to the bit."""

import numattn as na
import numpy as np
import pytest
from numattn import BlockMask

SIZES = [1, 2, 3, 5, 7, 15, 16, 17, 31, 32, 33, 63, 64, 65, 100, 200, 300]
BLOCK_SIZES = [(1, 1), (3, 5), (8, 16), (64, 64), (16, 100), (128, 96)]


def random_mask(rng, shape, block_size):
    """Return a dense mask some of whose blocks are empty, some full, and some neither."""
    (lq, lk), (bq, bk) = shape[-2:], block_size
    kinds = rng.integers(0, 3, (*shape[:-2], -(-lq // bq), -(-lk // bk)))
    of_pairs = np.repeat(np.repeat(kinds, bq, -2), bk, -1)[..., :lq, :lk]
    return np.where(of_pairs == 2, rng.random(shape) < 0.5, of_pairs == 1)


def random_options(rng, hq, lq, lk, dtype):
    """Return a mixture of all options that go with a mask."""
    precision = np.float64 if dtype == np.float64 else np.float32
    ours = {
        "is_causal": True,
        "window": (int(rng.integers(0, 50)), int(rng.integers(0, 50))),
        "sinks": rng.standard_normal(hq),
        "bias": rng.standard_normal((1, lq, lk)).astype(precision),
        "softcap": 5.0,
        "scale": 0.3,
        "alibi_slopes": rng.random(hq),
    }
    chosen = {name: value for name, value in ours.items() if rng.random() < 0.25}
    if rng.random() < 0.25:
        chosen |= {
            "kv_lengths": int(rng.integers(0, lk + 1)),
            "q_offset": int(rng.integers(-3, 20)),
        }
    return chosen


def random_call(rng, dtype):
    lq, lk = (int(x) for x in rng.choice(SIZES, 2))
    batch, hkv, group, d = (int(rng.choice(x)) for x in ((1, 2), (1, 2), (1, 3), (8, 20)))
    block_size = BLOCK_SIZES[rng.integers(len(BLOCK_SIZES))]
    hq = hkv * group
    shapes = [(lq, lk), (1, hq, lq, lk), (batch, 1, lq, lk), (batch, hq, lq, lk), (1, lq, lk)]
    mask = random_mask(rng, shapes[rng.integers(len(shapes))], block_size)
    q, k, v = (
        rng.standard_normal((batch, heads, length, d)).astype(dtype)
        for heads, length in ((hq, lq), (hkv, lk), (hkv, lk))
    )
    return (q, k, v), mask, block_size, random_options(rng, hq, lq, lk, dtype)


def assert_same(found, wanted):
    for one, other in zip(found, wanted, strict=True):
        assert (one is None) == (other is None)
        if one is not None:
            np.testing.assert_array_equal(one, other)


@pytest.mark.filterwarnings("ignore:(mask|bias). shape")
@pytest.mark.parametrize("seed", range(40))
def test_attention_and_gradients(dtype, rng, seed):
    rng = np.random.default_rng(seed)
    arrays, mask, block_size, options = random_call(rng, dtype)
    blocks = BlockMask.from_dense(mask, block_size)
    wanted = na.attention(*arrays, mask=mask, return_lse=True, **options)
    assert_same(na.attention(*arrays, mask=blocks, return_lse=True, **options), wanted)
    dout = rng.standard_normal(wanted[0].shape).astype(dtype)
    given = (dout, *arrays, *wanted)
    assert_same(
        na.attention_backward(*given, mask=blocks, **options),
        na.attention_backward(*given, mask=mask, **options),
    )


@pytest.mark.filterwarnings("ignore:(mask|bias). shape")
@pytest.mark.parametrize("seed", range(20))
def test_stages(dtype, seed):
    rng = np.random.default_rng(100 + seed)
    (q, k, _), mask, block_size, options = random_call(rng, dtype)
    blocks = BlockMask.from_dense(mask, block_size)
    weights = na.attention_weights(q, k, mask=mask, **options)
    assert_same([na.attention_weights(q, k, mask=blocks, **options)], [weights])
    received = na.attention_received(q, k, mask=mask, **options)
    assert_same([na.attention_received(q, k, mask=blocks, **options)], [received])
    options.pop("sinks", None)
    scores = na.qk_scores(q, k, mask=mask, **options)
    assert_same([na.qk_scores(q, k, mask=blocks, **options)], [scores])
    rows = rng.integers(0, q.shape[-2], 3)
    some = na.attention_weights(q, k, rows=rows, mask=blocks, **options)
    wanted = na.attention_weights(q, k, rows=rows, mask=mask, **options)
    assert_same([some], [wanted])


@pytest.mark.parametrize("lengths", [(1, 5000), (3, 4000), (20, 3000), (300, 300)])
def test_long_ones(dtype, arrays, rng, lengths):
    """Several chunks of keys, most of which nobody attends to."""
    lq, lk = lengths
    q, k, v = arrays(hq=4, hkv=2, lq=lq, lk=lk, d=16, dtype=dtype)
    keep = rng.random((-(-lq // 64), -(-lk // 64))) < 0.1
    mask = BlockMask.from_blocks(keep, lq, lk, (64, 64))
    assert_same(
        na.attention(q, k, v, mask=mask, return_lse=True),
        na.attention(q, k, v, mask=mask.to_dense(), return_lse=True),
    )


def test_dropout(arrays):
    q, k, v = arrays(2, hq=4, lq=80, lk=150, d=16, dtype=np.float32)
    mask = BlockMask.window(80, 150, 40, 10)
    options = {"dropout": 0.3, "rng": 7}
    assert_same(
        [na.attention(q, k, v, mask=mask, **options)],
        [na.attention(q, k, v, mask=mask.to_dense(), **options)],
    )


def test_a_tail_mask_beside_it(arrays, rng):
    q, k, v = arrays(2, hq=4, lq=5, lk=150, d=16, dtype=np.float32)
    mask, tail = BlockMask.window(5, 150, 40, 0), rng.random((5, 5)) < 0.5
    assert_same(
        [na.attention(q, k, v, mask=mask, tail_mask=tail)],
        [na.attention(q, k, v, mask=mask.to_dense(), tail_mask=tail)],
    )


def test_one_head(arrays):
    q, k, v = (x[0] for x in arrays(hq=1, lq=70, lk=90, d=16, dtype=np.float32))
    mask = BlockMask.causal(70, 90)
    assert_same([na.attention(q, k, v, mask=mask)], [na.attention(q, k, v, mask=mask.to_dense())])


def test_layers_and_layouts(rng):
    layer = na.MultiHeadAttention(32, 4, rng=0)
    x = rng.standard_normal((2, 100, 32), dtype=np.float32)
    mask = BlockMask.documents([30, 50, 20]) & BlockMask.causal(100, 100)
    assert_same([layer(x, mask=mask)], [layer(x, mask=mask.to_dense())])
    q = rng.standard_normal((2, 100, 4, 16), dtype=np.float32)
    assert_same(
        [na.attention(q, q, q, mask=mask, layout="blhd")],
        [na.attention(q, q, q, mask=mask.to_dense(), layout="blhd")],
    )


def test_masked_values_are_not_read(rng):
    """NaN in keys and values of empty blocks and in masked pairs of mixed ones."""
    q, k, v = rng.standard_normal((3, 2, 200, 16), dtype=np.float32)
    mask = BlockMask.window(200, 200, 30, 0)
    wanted = na.attention(q, k, v, mask=mask)[:, 150:]
    k[:, :100], v[:, :100] = np.nan, np.nan
    found = na.attention(q, k, v, mask=mask)[:, 150:]
    np.testing.assert_allclose(found, wanted, atol=1e-6)


@pytest.mark.parametrize(
    ("shape", "problem"),
    [
        ((10, 21), "shape .10, 21."),
        ((11, 20), "shape .11, 20."),
        ((3, 10, 20), "shape .3, 10, 20."),
    ],
)
def test_shapes_that_do_not_fit(shape, problem):
    q, k = np.zeros((2, 4, 10, 8), np.float32), np.zeros((2, 4, 20, 8), np.float32)
    mask = BlockMask.from_dense(np.ones(shape, np.bool_))
    with pytest.raises(ValueError, match=f"mask: got a BlockMask of {problem}.*Hq, Lq, Lk"):
        na.attention(q, k, k, mask=mask)


def test_caches(rng):
    cache = na.KVCache(1, 2, 16)
    k, v = rng.standard_normal((2, 1, 2, 100, 16), dtype=np.float32)
    cache.append(k, v)
    q = rng.standard_normal((1, 2, 3, 16), dtype=np.float32)
    mask = BlockMask.window(3, 100, 20, 0)
    assert_same([cache.attend(q, mask=mask)], [cache.attend(q, mask=mask.to_dense())])


def test_the_mask_of_a_whole_text_is_no_mask_of_a_token():
    cache = na.KVCache(1, 2, 16)
    cache.append(*np.ones((2, 1, 2, 100, 16), np.float32))
    q = np.ones((1, 2, 1, 16), np.float32)
    whole = BlockMask.causal(2**19, 2**19, block_size=(512, 512))
    with pytest.raises(
        ValueError, match=r"expected one with \(1, 100\) queries.*`mask\[first:last, :tokens\]"
    ):
        cache.attend(q, mask=whole)
    part = whole[99:100, :100]
    assert_same([cache.attend(q, mask=part)], [cache.attend(q, mask=part.to_dense())])


def test_axes_that_may_mean_the_batch_are_warned_of(rng):
    x = rng.standard_normal((4, 4, 3, 8), dtype=np.float32)  # as many batch items as heads
    mask = BlockMask.from_dense(rng.random((4, 3, 3)) < 0.5, (2, 2))
    message = r"mask: shape \(4, 3, 3\) is taken as \(Hq, Lq, Lk\), .* `mask\[:, np.newaxis\]`"
    with pytest.warns(UserWarning, match=message):
        out = na.attention(x, x, x, mask=mask)
    np.testing.assert_array_equal(out, na.attention(x, x, x, mask=mask[np.newaxis]))
    of_batch = na.attention(x, x, x, mask=mask[:, np.newaxis])
    np.testing.assert_array_equal(of_batch, na.attention(x, x, x, mask=mask.to_dense()[:, None]))


def test_what_others_call_it_is_no_mask():
    other = type("BlockMask", (), {"__module__": "torch.nn.attention.flex_attention"})()
    q = np.zeros((2, 3, 8), np.float32)
    with pytest.raises(
        TypeError, match=r"mask: got torch.*flex_attention.BlockMask, .*from_mask_mod"
    ):
        na.attention(q, q, q, mask=other)
    with pytest.raises(TypeError, match=r"block_mask.*`mask=`, which takes a `BlockMask` too"):
        na.attention(q, q, q, block_mask=other)


def test_it_is_no_array():
    with pytest.raises(TypeError, match=r"bias: got BlockMask.*`to_dense"):
        na.attention(*np.zeros((3, 2, 100, 8), np.float32), bias=BlockMask.causal(100, 100))
