"""Promise: tokens and their queries, of whatever number, give what the whole text gives."""

import copy

import numattn as na
import numpy as np
import pytest
from checks import of_all_tokens, seen
from numattn import _kv_tokens
from numattn import _reference as reference

BATCH, HEADS, KV_HEADS, DIM, VALUE_DIM = 2, 4, 2, 8, 12
OPTIONS = {"alibi_slopes": [0.1, 0.2, 0, 0.3], "sinks": [0.5, -1, 2, 0], "softcap": 9.0}
LIMITS = pytest.mark.parametrize(
    "limits",
    [
        {},
        {"window": 6},
        {"window": 6, "max_rollback": 0},
        {"window": 5, "keep_first": 2, "max_rollback": 1},
        {"window": 1, "keep_first": 3},
    ],
    ids=str,
)


def tokens(rng, length, batch=BATCH, dtype=np.float32):
    shapes = ((HEADS, DIM), (KV_HEADS, DIM), (KV_HEADS, VALUE_DIM))
    return tuple(
        rng.standard_normal((batch, heads, length, dim)).astype(dtype) for heads, dim in shapes
    )


def make(limits, batch=BATCH, **options):
    return na.KVCache(batch, KV_HEADS, DIM, VALUE_DIM, **limits, **options)


def seen_by_all(length, limits):
    return seen(np.arange(length), length, limits)


def moved(layout, *arrays):
    return [x.swapaxes(1, 2) if layout == "blhd" else x for x in arrays]


def state(cache):
    """Return all that says what a cache holds; what lies beyond a shorter sequence is undefined."""
    kept = cache._tokens
    numbers = (kept.numbers(), kept.begins, kept.places, kept.padded, cache.nbytes)
    rows = [x[i, :, :n].tobytes() for x in kept.arrays for i, n in enumerate(kept.places)]
    return repr(numbers), rows


@LIMITS
@pytest.mark.parametrize("layout", ["bhld", "blhd"])
@pytest.mark.parametrize("quantize", [False, True])
def test_a_text_of_any_length(backend, rng, limits, layout, quantize):
    q, k, v = tokens(rng, 45)
    expected = reference.attention(q, k, v, mask=seen_by_all(45, limits), **OPTIONS)
    cache = make(limits, quantize=quantize)
    outs, lses = [], []
    for part in (slice(0, 20), slice(20, 21), slice(21, 25), slice(25, 45), slice(45, 45)):
        out, lse = cache.append_and_attend(
            *moved(layout, *(x[:, :, part] for x in (q, k, v))),
            layout=layout, return_lse=True, **OPTIONS,
        )  # fmt: skip
        assert cache.lengths.tolist() == [part.stop] * 2
        outs += moved(layout, out)
        lses += moved(layout, lse)
    atol = 5e-2 if quantize else 1e-5
    np.testing.assert_allclose(np.concatenate(outs, axis=2), expected[0], rtol=0, atol=atol)
    np.testing.assert_allclose(np.concatenate(lses, axis=2), expected[1], rtol=0, atol=atol)


@LIMITS
def test_every_dtype(dtype, rng, limits):
    q, k, v = tokens(rng, 23, dtype=dtype)
    cache = make(limits, dtype=dtype)
    out, lse = cache.append_and_attend(q, k, v, return_lse=True)
    expected = reference.attention(q, k, v, mask=seen_by_all(23, limits))
    assert out.dtype == dtype
    assert lse.dtype == (np.float64 if dtype == np.float64 else np.float32)
    tolerance = {8: 1e-13, 4: 1e-5, 2: 3e-2}[dtype.itemsize]
    np.testing.assert_allclose(out.astype(float), expected[0], rtol=0, atol=tolerance)
    np.testing.assert_allclose(lse, expected[1], rtol=0, atol=min(tolerance, 1e-5))


@LIMITS
@pytest.mark.parametrize("lengths", [None, 20, [20, 20], [20, 9], [3, 0], [12, 11], 0, [6, 1]])
def test_it_is_what_the_pieces_give(backend, rng, limits, lengths):
    """To the bit, and so is what the cache is afterwards."""
    whole, pieces = make(limits), make(limits)
    window = limits.get("window", 100)
    first = [x[:, :, :4] for x in tokens(rng, 4)]
    for part in (slice(0, 1), slice(1, 2), slice(2, 4))[: 3 if window > 1 else 2]:
        for cache in (whole, pieces):
            cache.append(first[1][:, :, part], first[2][:, :, part], lengths=[1, 0])
    q, k, v = tokens(rng, 20)
    counts = np.broadcast_to(20 if lengths is None else lengths, BATCH)
    for x in (q, k, v):
        for i, count in enumerate(counts):
            x[i, :, count:] = np.nan  # padding
    out, lse = whole.append_and_attend(q, k, v, lengths, return_lse=True, **OPTIONS)
    for start in range(0, max(counts.max(), 1), window):
        part = slice(start, min(start + window, 20))
        own = np.clip(counts - start, 0, part.stop - start)
        pieces.append(k[:, :, part], v[:, :, part], lengths=own)
        expected = pieces.attend(q[:, :, part], return_lse=True, **OPTIONS)
        np.testing.assert_array_equal(out[:, :, part], expected[0])
        np.testing.assert_array_equal(lse[:, :, part], expected[1])
    for i, count in enumerate(counts):
        assert not out[i, :, count:].any()
        assert np.isneginf(lse[i, :, count:]).all()
    assert state(whole) == state(pieces)


@LIMITS
@pytest.mark.parametrize("layout", ["bhld", "blhd"])
def test_masks_and_biases(backend, rng, limits, layout):
    """Of prompts of different lengths, after others of different lengths."""
    q, k, v = tokens(rng, 30)
    starts, lengths = np.array([3, 1]), np.array([22, 15])
    for axes in ((), (0,), (1, 2), (3,), (0, 1), (0, 1, 2, 3)):
        pairs = (BATCH, HEADS, 22, 25)
        shape = tuple(1 if axis in axes else n for axis, n in enumerate(pairs))
        mask = rng.random(shape) < 0.7
        bias = rng.standard_normal(shape, dtype=np.float32)
        cache = make(limits)
        for i in range(3):
            cache.append(k[:, :, i : i + 1], v[:, :, i : i + 1], lengths=(i < starts).astype(int))
        new = [np.stack([x[i, :, n : n + 22] for i, n in enumerate(starts)]) for x in (q, k, v)]
        out = cache.append_and_attend(
            *moved(layout, *new), lengths, mask=mask, bias=bias, layout=layout
        )
        (out,) = moved(layout, out)
        mask, bias = np.broadcast_to(mask, pairs), np.broadcast_to(bias, pairs)
        for i, (start, n) in enumerate(zip(starts, lengths, strict=True)):
            own = (i, slice(None), slice(n), slice(start + n))
            expected, _ = reference.attention(
                q[i, :, start : start + n], k[i, :, : start + n], v[i, :, : start + n],
                mask=mask[own] & seen_by_all(start + n, limits)[start:], bias=bias[own],
            )  # fmt: skip
            np.testing.assert_allclose(out[i, :, :n], expected, rtol=0, atol=1e-5)
            assert not out[i, :, n:].any()


@LIMITS
@pytest.mark.parametrize("lengths", [None, [22, 15], [3, 0]], ids=str)
def test_tail_masks(backend, rng, limits, lengths):
    """Of the last tokens of all pieces together."""
    q, k, v = tokens(rng, 22)
    before = make(limits)
    for count in ([1, 1], [1, 0], [1, 0]):
        before.append(*(x[:, :, :1] for x in tokens(rng, 1)[1:]), lengths=count)
    after = np.array([3, 1]) + (22 if lengths is None else lengths)
    for last in {0, 1, 5, 22, after.max()} - set(range(after.max() + 1, 23)):
        tail = rng.random((BATCH, 1, 22, last)) < 0.5
        full = of_all_tokens(tail, 22, after)
        other = rng.random((BATCH, HEADS, 1, after.max())) < 0.7
        for more, mask in (({}, full), ({"mask": other}, full & other)):
            caches = before.copy(), before.copy()
            out = caches[0].append_and_attend(q, k, v, lengths, tail_mask=tail, **more)
            expected = caches[1].append_and_attend(q, k, v, lengths, mask=mask)
            np.testing.assert_allclose(out, expected, rtol=0, atol=2e-6)


@pytest.mark.parametrize("layout", ["bhld", "blhd"])
@pytest.mark.parametrize("length", [4, 20])
def test_out(backend, rng, layout, length):
    q, k, v = moved(layout, *tokens(rng, length))
    caches = [make({"window": 6}) for _ in range(3)]
    expected = caches[0].append_and_attend(q, k, v, layout=layout)
    out = np.full_like(expected, np.nan)
    assert caches[1].append_and_attend(q, k, v, layout=layout, out=out) is out
    np.testing.assert_array_equal(out, expected)
    strided = np.full((*expected.shape[:3], 2 * VALUE_DIM), np.nan, np.float32)[..., ::2]
    caches[2].append_and_attend(q, k, v, [length, 2], layout=layout, out=strided)
    np.testing.assert_array_equal(strided[0], expected[0])
    (rows,) = moved(layout, strided)
    assert not rows[1, :, 2:].any()


def test_directions(rng):
    """What fits into a window, or a cache without one, may be seen in both directions."""
    q, k, v = tokens(rng, 9)
    for limits, lengths in (({}, None), ({"window": 9}, None), ({"window": 6}, [6, 2])):
        cache = make(limits)
        out = cache.append_and_attend(q, k, v, lengths, is_causal=False)
        counts = [9, 9] if lengths is None else lengths
        expected, _ = reference.attention(q, k, v, kv_lengths=counts, q_lengths=counts)
        np.testing.assert_allclose(out, expected, rtol=0, atol=1e-5)
    cache = make({})
    out = cache.append_and_attend(q, k, v, is_causal=False, window=(1, 2))
    expected, _ = reference.attention(q, k, v, window=(1, 2))
    np.testing.assert_allclose(out, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("keep_first", [0, 3])
def test_memory_stays_that_of_the_window(rng, keep_first):
    q, k, v = tokens(rng, 500, batch=1)
    cache = make({"window": 8, "keep_first": keep_first, "max_rollback": 2}, batch=1)
    cache.append_and_attend(q, k, v)
    assert cache.nbytes == KV_HEADS * (DIM + VALUE_DIM) * 4 * (keep_first + 2 * (8 + 2))
    np.testing.assert_array_equal(cache.k[:, :, -8:], k[:, :, -8:])
    cache.truncate(498)
    out = cache.append_and_attend(*(x[:, :, 498:] for x in (q, k, v)))
    expected, _ = reference.attention(
        q, k, v, mask=seen_by_all(500, {"window": 8, "keep_first": keep_first})
    )
    np.testing.assert_allclose(out, expected[:, :, 498:], rtol=0, atol=1e-5)


def test_no_sequences(rng):
    for limits in ({}, {"window": 3}):
        q, k, v = tokens(rng, 7, batch=0)
        out, lse = make(limits, batch=0).append_and_attend(q, k, v, return_lse=True)
        assert (out.shape, lse.shape) == ((0, HEADS, 7, VALUE_DIM), (0, HEADS, 7))


@pytest.mark.parametrize("quantize", [False, True])
def test_a_refused_call_changes_nothing(rng, quantize):
    q, k, v = tokens(rng, 20)
    cache = make({"window": 6, "keep_first": 1}, quantize=quantize)
    cache.append_and_attend(*(x[:, :, :9] for x in (q, k, v)), [9, 4])
    infinite = k.copy()
    infinite[1, 1, 17, 3] = np.inf
    memory = np.zeros(q.size * 2, np.float32)
    out = memory[: 2 * HEADS * 20 * VALUE_DIM].reshape(2, HEADS, 20, VALUE_DIM)
    same = memory[-k.size :].reshape(k.shape)
    wrong = [
        ({"q": q[:, :, :7]}, ValueError, "q: got 7 queries, expected 20, one per token in k"),
        ({"q": q[..., :7]}, ValueError, "q: got shape (2, 4, 20, 7), expected (2, heads, length"),
        ({"q": q.astype(float)}, TypeError, "q: got dtype float64, expected float32, the dtype"),
        ({"k": k[:, :1]}, ValueError, "k: got shape (2, 1, 20, 8), expected (2, 2, tokens, 8)"),
        ({"v": v[:, :, 1:]}, ValueError, "v: got 19 tokens, expected 20 as in k"),
        ({"layout": "x"}, ValueError, "layout: got 'x', expected one of"),
        ({"layout": "blhd"}, ValueError, "k: got shape (2, 2, 20, 8), expected (2, tokens, 2, 8)"),
        ({"lengths": [21, 1]}, ValueError, "lengths: got 21 at index 0, expected 0 to 20"),
        ({"lengths": [1.0, 2]}, TypeError, "lengths: got dtype float64, expected ints"),
        (
            {"is_causal": False},
            ValueError,
            "is_causal: got False for 20 tokens, more than the window's 6, expected True",
        ),
        ({"is_causal": 1}, TypeError, "is_causal: got 1 (int), expected True or False"),
        ({"window": (3, None)}, ValueError, "window: got (3, None), expected None; the cache has"),
        ({"scale": "a"}, TypeError, "scale: got 'a'"),
        ({"softcap": -1.0}, ValueError, "softcap: got -1.0, expected a positive number"),
        ({"sinks": [1.0]}, ValueError, "sinks: got shape (1,), expected one number per query head"),
        ({"alibi_slopes": [1.0]}, ValueError, "alibi_slopes: got shape (1,), expected one number"),
        ({"num_threads": 0}, ValueError, "num_threads: got 0, expected a number of threads"),
        ({"return_lse": None}, TypeError, "return_lse: got None"),
        (
            {"mask": np.ones((20, 20), bool)},
            ValueError,
            "mask: got shape (20, 20), expected one that broadcasts to (batch, Hq, Lq, T) = "
            "(2, 4, 20, 29), where T counts",
        ),
        ({"mask": np.ones((20, 29))}, TypeError, "mask: got dtype float64, expected bool"),
        (
            {"tail_mask": np.ones((19, 5), bool)},
            ValueError,
            "tail_mask: got shape (19, 5), expected one that broadcasts to (batch, Hq, Lq, T) = "
            "(2, 4, 20, 5), where T counts last",
        ),
        (
            {"tail_mask": np.ones((20, 30), bool)},
            ValueError,
            "tail_mask: got T = 30 (shape (20, 30)), expected T of at most 29, the number of tok",
        ),
        ({"tail_mask": np.ones((20, 1))}, TypeError, "tail_mask: got dtype float64, expected bool"),
        ({"tail_mask": True}, ValueError, "tail_mask: got shape (), expected (..., Hq, Lq, T)"),
        ({"bias": np.ones((20, 29))}, TypeError, "bias: got dtype float64, expected float32"),
        ({"bias": np.ones((19, 29), "f4")}, ValueError, "bias: got shape (19, 29), expected one"),
        ({"out": out[:, :, 1:]}, ValueError, "out: got shape (2, 4, 19, 12), expected (2, 4, 20"),
        ({"out": out.astype(float)}, TypeError, "out: got dtype float64, expected float32"),
        ({"out": 3}, TypeError, "out: got int, expected a numpy.ndarray"),
        (
            {"out": out, "k": out[:, :2, :, :8]},
            ValueError,
            "out: got an array that shares memory with k",
        ),
        ({"out": out, "v": out[:, :2]}, ValueError, "out: got an array that shares memory with v"),
        (
            {"out": out, "q": out[..., :8]},
            ValueError,
            "out: got an array that shares memory with q",
        ),
        (
            {"out": out, "bias": memory[:29]},
            ValueError,
            "out: got an array that shares memory with bias",
        ),
        (
            {"out": out, "tail_mask": memory.view(bool)[:29]},
            ValueError,
            "out: got an array that shares memory with tail_mask",
        ),
        ({"q_offset": 3}, TypeError, "q_offset: got int, expected None; the queries"),
        ({"q_lengths": 3}, TypeError, "q_lengths: got int, expected None; the queries"),
        ({"kv_lengths": 3}, TypeError, "kv_lengths: got int, expected None; the cache keeps"),
        (
            {"softmax_scale": 1.0},
            TypeError,
            "KVCache.append_and_attend() got an unexpected keyword argument 'softmax_scale'; did",
        ),
    ]
    if quantize:
        wrong.append(({"k": infinite}, ValueError, "k: got inf in the vector at index (1, 1, 17)"))
    before, fresh = state(cache), copy.deepcopy(cache)
    for options, error, message in wrong:
        out[...] = 7
        with pytest.raises(error) as raised:
            cache.append_and_attend(**({"q": q, "k": k, "v": v} | options))
        assert message in str(raised.value)
        assert state(cache) == before
        assert (out == 7).all()
    results = [
        each.append_and_attend(q, same, v, [20, 7], q_offset=None, q_lengths=None, **options)
        for each, options in ((cache, {"out": out}), (fresh, {}))
    ]
    assert results[0] is out
    np.testing.assert_array_equal(*results)


@pytest.mark.parametrize("limits", [{}, {"window": 6}], ids=str)
def test_an_interrupted_call_changes_nothing(rng, monkeypatch, limits):
    q, k, v = tokens(rng, 40)
    cache = make(limits)
    cache.append_and_attend(*(x[:, :, :8] for x in (q, k, v)))
    before = state(cache)
    appended, calls = _kv_tokens.Tokens.appended, []

    def interrupted(self, *arguments):
        calls.append(appended(self, *arguments))
        if len(calls) == (4 if limits else 1):
            raise KeyboardInterrupt
        return calls[-1]

    monkeypatch.setattr(_kv_tokens.Tokens, "appended", interrupted)
    with pytest.raises(KeyboardInterrupt):
        cache.append_and_attend(q, k, v)
    assert state(cache) == before
    monkeypatch.undo()
    out = cache.append_and_attend(*(x[:, :, 8:] for x in (q, k, v)))
    expected, _ = reference.attention(q, k, v, mask=seen_by_all(40, limits))
    np.testing.assert_allclose(out, expected[:, :, 8:], rtol=0, atol=1e-5)


def test_append_says_what_takes_more(rng):
    _, k, v = tokens(rng, 7)
    with pytest.raises(ValueError, match=r"^k: got 7 tokens, expected at most 6, the size of .*"
                       r"; `append_and_attend` takes any number$"):  # fmt: skip
        make({"window": 6}).append(k, v)


@pytest.mark.parametrize(
    "sizes", [{"window": 4}, {"window": 3, "keep_first": 2, "max_rollback": 0}], ids=str
)
@pytest.mark.parametrize("rotary", [None, True])
def test_a_layer_takes_a_prompt_of_any_length(backend, rng, sizes, rotary):
    layer = na.MultiHeadAttention(24, 4, kv_heads=2, rotary=rotary, rng=1)
    layer.parameters()["o_bias"][...] = rng.standard_normal(24)
    x = rng.standard_normal((2, 19, 24), dtype=np.float32)
    whole = layer(x, mask=seen_by_all(19, sizes))
    cache = na.KVCache(2, 2, 6, **sizes)
    outs = [layer(x[:, :17], cache=cache), layer(x[:, 17:], cache=cache)]
    np.testing.assert_allclose(np.concatenate(outs, axis=1), whole, rtol=0, atol=2e-5)
    mask = rng.random((2, 4, 17, 17)) < 0.7
    ragged = na.KVCache(2, 2, 6, **sizes)
    first = layer(x[:, :17], cache=ragged, lengths=[17, 8], mask=mask)
    assert ragged.lengths.tolist() == [17, 8]
    masked = layer(x[:, :17], mask=mask & seen_by_all(17, sizes))
    np.testing.assert_allclose(first[0], masked[0], rtol=0, atol=2e-5)
    np.testing.assert_allclose(first[1, :8], masked[1, :8], rtol=0, atol=2e-5)
    np.testing.assert_array_equal(first[1, 8:], np.tile(layer.parameters()["o_bias"], (9, 1)))
    second = layer(x[:, 8:9], cache=ragged)
    np.testing.assert_allclose(second[1], whole[1, 8:9], rtol=0, atol=2e-5)
    with pytest.raises(ValueError, match="is_causal: got False for 19 tokens, more than the"):
        layer(x, cache=ragged, is_causal=False)
    assert ragged.lengths.tolist() == [18, 9]
