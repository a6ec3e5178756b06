"""Promise: a cache attends as if all tokens were there, in memory that grows as it should."""

import copy

import numattn as na
import numpy as np
import pytest
from numattn import _reference as reference


def tokens(rng, dtype=np.float32, batch=2, hq=4, hkv=2, length=60, d=8, dv=12):
    shapes = (batch, hq, length, d), (batch, hkv, length, d), (batch, hkv, length, dv)
    return tuple(rng.standard_normal(shape).astype(dtype) for shape in shapes)


@pytest.mark.parametrize("steps", [[60], [1] * 60, [20, 1, 1, 30, 8]])
@pytest.mark.parametrize("quantize", [False, True])
def test_steps_are_the_whole(dtype, rng, steps, quantize):
    q, k, v = tokens(rng, dtype)
    cache = na.KVCache(2, 2, 8, 12, dtype=dtype, quantize=quantize)
    outs, at = [], 0
    for n in steps:
        part = slice(at, at + n)
        cache.append(k[:, :, part], v[:, :, part])
        outs.append(cache.attend(q[:, :, part], softcap=9.0))
        at += n
    expected, _ = reference.attention(q, k, v, is_causal=True, softcap=9.0)
    tolerance = {8: 1e-13, 4: 1e-5, 2: 3e-2}[dtype.itemsize] if not quantize else 5e-2
    out = np.concatenate(outs, axis=2).astype(np.float64)
    np.testing.assert_allclose(out, expected, rtol=0, atol=tolerance)
    assert cache.lengths.tolist() == [60, 60]
    assert cache.k.shape == (2, 2, 60, 8)
    assert cache.v.shape == (2, 2, 60, 12)
    if not quantize:
        np.testing.assert_array_equal(cache.k, k)


def test_ragged_batches_and_layouts(backend, rng):
    q, k, v = tokens(rng, length=10)
    cache = na.KVCache(2, 2, 8, 12)
    cache.append(k[:, :, :6], v[:, :, :6], lengths=[6, 2])
    cache.append(k[:, :, 6:9], v[:, :, 6:9], lengths=[0, 3])
    assert cache.lengths.tolist() == [6, 5]
    out, lse = cache.attend(q[:, :, :2], return_lse=True)
    blhd = cache.attend(q[:, :, :2].swapaxes(1, 2), layout="blhd")
    np.testing.assert_array_equal(blhd.swapaxes(1, 2), out)
    history = [
        (k[0, :, :6], v[0, :, :6]),
        tuple(np.concatenate([x[1, :, :2], x[1, :, 6:9]], axis=1) for x in (k, v)),
    ]
    for i, (keys, values) in enumerate(history):
        expected = reference.attention(q[i, :, :2], keys, values, is_causal=True)
        np.testing.assert_allclose(out[i], expected[0], rtol=0, atol=1e-5)
        np.testing.assert_allclose(lse[i], expected[1], rtol=0, atol=1e-5)


@pytest.mark.parametrize("keep_first", [0, 3])
@pytest.mark.parametrize("steps", [[1] * 60, [7, 1, 8, 8, 2, 8, 8, 8, 8, 2], [5] * 12])
@pytest.mark.parametrize("quantize", [False, True])
def test_windows(backend, rng, keep_first, steps, quantize):
    """Every query sees its window and the first tokens, with the positions of the whole text."""
    window = 8
    q, k, v = tokens(rng)
    cache = na.KVCache(2, 2, 8, 12, window=window, keep_first=keep_first, quantize=quantize)
    p, j = np.arange(60)[:, None], np.arange(60)
    mask = (j <= p) & ((j > p - window) | (j < keep_first))
    options = {"alibi_slopes": [0.1, 0.2, 0, 0.3], "sinks": [0.5, -1, 2, 0]}
    expected, expected_lse = reference.attention(q, k, v, mask=mask, **options)
    at, sizes = 0, []
    for n in steps:
        part = slice(at, at + n)
        cache.append(k[:, :, part], v[:, :, part])
        out, lse = cache.attend(q[:, :, part], **options, return_lse=True)
        atol = 5e-2 if quantize else 1e-5
        np.testing.assert_allclose(out, expected[:, :, part], rtol=0, atol=atol)
        np.testing.assert_allclose(lse, expected_lse[:, :, part], rtol=0, atol=atol)
        at += n
        sizes.append(cache.nbytes)
    assert sizes[-1] <= 2 * 2 * 20 * 4 * (keep_first + 2 * window) + 2 * 2 * 8 * 100
    assert len(set(sizes[len(sizes) // 2 :])) == 1


def test_ragged_window(backend, rng):
    q, k, v = tokens(rng, length=40)
    cache = na.KVCache(2, 2, 8, 12, window=6, keep_first=2)
    at = np.zeros(2, int)
    history = [[], []]
    for counts in ([3, 1], [6, 0], [0, 6], [1, 1], [6, 5], [1, 6], [2, 2]):
        n = max(counts)
        new = [x[:, :, at.max() : at.max() + n] for x in (k, v)]
        cache.append(*new, lengths=counts)
        for i, count in enumerate(counts):
            history[i] += [(new[0][i, :, t], new[1][i, :, t]) for t in range(count)]
        at += 1
        out = cache.attend(q[:, :, :1])
        for i in range(2):
            keys, values = (np.stack(x, axis=1) for x in zip(*history[i], strict=True))
            length = keys.shape[1]
            j = np.arange(length)
            mask = (j >= length - 6) | (j < 2)
            expected, _ = reference.attention(q[i, :, :1], keys, values, mask=mask)
            np.testing.assert_allclose(out[i], expected, rtol=0, atol=1e-5)


def test_truncate_reset_and_select(rng):
    q, k, v = tokens(rng, length=20)
    cache = na.KVCache(2, 2, 8, 12)
    cache.append(k, v)
    before = cache.attend(q[:, :, :3])
    beams = cache.select([1, 1, 0])
    assert beams.lengths.tolist() == [20, 20, 20]
    np.testing.assert_array_equal(beams.attend(q[[1, 1, 0], :, :3]), before[[1, 1, 0]])
    twin = cache.copy()
    twin.append(k[:, :, :1], v[:, :, :1])
    cache.truncate(12)
    assert cache.lengths.tolist() == [12, 12]
    expected, _ = reference.attention(q[:, :, :3], k[:, :, :12], v[:, :, :12], is_causal=True)
    np.testing.assert_allclose(cache.attend(q[:, :, :3]), expected, rtol=0, atol=1e-5)
    cache.reset()
    assert cache.lengths.tolist() == [0, 0]
    assert not cache.attend(q[:, :, :1]).any()
    assert twin.lengths.tolist() == [21, 21]


def test_appending_copies_little(rng, monkeypatch):
    """Bytes written while growing, against the final bytes: 100,000 appends of one token."""
    from numattn import _kv_cache

    written = 0

    class Counting(np.ndarray):
        def __setitem__(self, index, value):
            nonlocal written
            written += self.view(np.ndarray)[index].nbytes
            super().__setitem__(index, value)

    empty = np.empty
    monkeypatch.setattr(_kv_cache.np, "empty", lambda *a, **o: empty(*a, **o).view(Counting))
    cache = na.KVCache(1, 1, 4)
    k = np.ones((1, 1, 1, 4), np.float32)
    for _ in range(100_000):
        cache.append(k, k)
    assert written <= 4 * 2 * 100_000 * 16
    assert cache.nbytes <= 2 * 2 * 100_000 * 16


def contents(cache):
    return cache.lengths.tolist(), cache.k.tobytes(), cache.v.tobytes(), cache.nbytes


def test_a_failed_append_changes_nothing(rng):
    _, k, v = tokens(rng, length=4)
    for cache in (na.KVCache(2, 2, 8, 12), na.KVCache(2, 2, 8, 12, window=3, quantize=True)):
        cache.append(k[:, :, :3], v[:, :, :3])
        before = contents(cache)
        bad = k[:, :, :1].copy()
        bad[0, 0, 0, 0] = np.nan
        failing = [
            ((k[:, :, :2], v[:, :, :1]), {}, ValueError, "v: got 1 tokens, expected 2 as in k"),
            ((k[:1], v), {}, ValueError, "k: got shape (1, 2, 4, 8), expected (2, 2, tokens, 8)"),
            ((k.astype(float), v), {}, TypeError, "k: got dtype float64, expected float32 as"),
            ((k[:, :, :1], v[:, :, :1]), {"lengths": [1, 2]}, ValueError, "lengths: got 2 at 1"),
            ((k[:, :, :1], v[:, :, :1]), {"lengths": [1]}, ValueError, "lengths: got shape (1,)"),
        ]
        if cache._window:
            failing.append(((k, v), {}, ValueError, "k: got 4 tokens, expected at most the window"))
            failing.append(((bad, v[:, :, :1]), {}, ValueError, "k: got nan in the vector at"))
        for arguments, options, error, message in failing:
            with pytest.raises(error) as raised:
                cache.append(*arguments, **options)
            assert message in str(raised.value)
            assert contents(cache) == before


def test_bad_arguments(rng):
    q, k, v = tokens(rng, length=4)
    for arguments, options, error, message in (
        ((2, 0, 8), {}, ValueError, "kv_heads: got 0, expected at least 1"),
        ((2, 2, 8.0), {}, TypeError, "head_dim: got 8.0"),
        ((2, 2, 8), {"dtype": int}, TypeError, "dtype: got int64, expected one of"),
        ((2, 2, 8), {"dtype": "foo"}, TypeError, "dtype: got 'foo', expected one of"),
        ((2, 2, 8), {"dtype": ">f4"}, TypeError, "dtype: got >f4, expected one of"),
        ((2, 2, 8), {"keep_first": 2}, ValueError, "keep_first: got 2, expected 0 where"),
        ((2, 2, 8), {"window": 0}, ValueError, "window: got 0, expected at least 1"),
    ):
        with pytest.raises(error) as raised:
            na.KVCache(*arguments, **options)
        assert message in str(raised.value)
    cache = na.KVCache(2, 2, 8, 12, window=3)
    for part in (slice(0, 3), slice(3, 4), slice(0, 3), slice(0, 3)):
        cache.append(k[:, :, part], v[:, :, part])
    many = np.concatenate([q, q], axis=2)
    with pytest.raises(ValueError, match="q: got 8 queries from position 2 on, which see tokens"):
        cache.attend(many)
    with pytest.raises(ValueError, match=r"q: got shape \(1, 4, 4, 8\), expected \(2, heads"):
        cache.attend(q[:1])
    for offset in ("a", True, 0.5):
        with pytest.raises(TypeError, match="q_offset"):
            cache.attend(q[:, :, :1], q_offset=offset)
    with pytest.raises(ValueError, match="q: got 1 queries from position 3 on, which see tokens"):
        cache.attend(q[:, :, :1], q_offset=3)
    with pytest.raises(ValueError, match="window: got \\(1, 1\\), expected none"):
        cache.attend(q[:, :, :1], window=(1, 1))
    with pytest.raises(TypeError, match="mask: got an array, expected none"):
        cache.attend(q[:, :, :1], mask=np.ones((1, 1), bool))
    with pytest.raises(ValueError, match="n: got 1, whose last token's position is 0"):
        cache.truncate(1)
    with pytest.raises(ValueError, match="indices: got 2 at 1, expected numbers of 2"):
        cache.select([0, 2])


@pytest.mark.parametrize("seed", range(40))
def test_any_history(seed):
    """Appends of any lengths, truncation and queries anywhere: right, or refused."""
    rng = np.random.default_rng(seed)
    batch, window = int(rng.integers(1, 4)), rng.choice([None, 1, 4, 7])
    window = None if window is None else int(window)
    keep_first = 0 if window is None else int(rng.integers(0, 4))
    quantize = bool(rng.random() < 0.5)
    cache = na.KVCache(
        batch, 1, 4, window=window, keep_first=keep_first, quantize=quantize,
        capacity=int(rng.integers(0, 9)),
    )  # fmt: skip
    if quantize:  # as fresh memory may be
        cache._arrays[0].fill(77)
    history = [np.empty((0, 4), np.float32)] * batch
    refused = 0
    for _ in range(60):
        if rng.random() < 0.15:
            n = int(rng.integers(0, 1 + cache.lengths.max(initial=0)))
            try:
                cache.truncate(n)
            except ValueError:
                assert window is not None
            else:
                history = [x[:n] for x in history]
        else:
            n = int(rng.integers(1, 1 + (window or 6)))
            counts = rng.integers(0, n + 1, batch)
            new = rng.standard_normal((batch, 1, n, 4), dtype=np.float32)
            for i, count in enumerate(counts):
                new[i, :, count:] = np.nan
            cache.append(new, -new, lengths=counts)
            history = [np.concatenate([x, new[i, 0, : counts[i]]]) for i, x in enumerate(history)]
        assert cache.lengths.tolist() == [len(x) for x in history]
        rows = int(rng.integers(1, 4))
        q = rng.standard_normal((batch, 2, rows, 4), dtype=np.float32)
        try:
            out = cache.attend(q)
        except ValueError as error:
            if window is None or "which see tokens" not in str(error):
                raise
            refused += 1
            continue
        for i, x in enumerate(history):
            p, j = len(x) - rows + np.arange(rows)[:, None], np.arange(len(x))
            mask = (j <= p) & ((j > p - (window or 10**6)) | (j < keep_first))
            expected, _ = reference.attention(q[i], x[None], -x[None], mask=mask)
            np.testing.assert_allclose(out[i], expected, rtol=0, atol=0.1 if quantize else 1e-5)
    assert refused < 50


@pytest.mark.parametrize("window", [1, 16, 64, 1000])
@pytest.mark.parametrize("capacity", [0, 64, 1024])
def test_appending_to_a_window_copies_little(monkeypatch, window, capacity):
    moved = 0
    original = na.KVCache._moved

    def counting(self, x, room, begins):
        nonlocal moved
        if x is self._arrays[0]:
            moved += int(np.minimum(self._used(), room).sum())
        return original(self, x, room, begins)

    monkeypatch.setattr(na.KVCache, "_moved", counting)
    cache = na.KVCache(1, 1, 1, window=window, capacity=capacity)
    k = np.ones((1, 1, 1, 1), np.float32)
    for _ in range(5000):
        cache.append(k, k)
    assert moved <= 4 * 5000


def test_an_interrupted_append_changes_nothing(monkeypatch):
    cache = na.KVCache(1, 1, 1, window=4)
    k = np.arange(12, dtype=np.float32).reshape(1, 1, 12, 1)
    for i in range(8):
        cache.append(k[:, :, i : i + 1], k[:, :, i : i + 1])
    before = contents(cache)
    original, calls = na.KVCache._moved, []

    def interrupted(self, *arguments):
        calls.append(original(self, *arguments))
        if len(calls) == 2:
            raise KeyboardInterrupt
        return calls[-1]

    monkeypatch.setattr(na.KVCache, "_moved", interrupted)
    for i in range(8, 12):
        part = k[:, :, i : i + 1]
        try:
            cache.append(part, part)
        except KeyboardInterrupt:
            break
        before = contents(cache)
    else:
        pytest.fail("the append was not interrupted")
    assert contents(cache) == before


def test_views_and_copies(rng):
    _, k, v = tokens(rng, length=6)
    cache = na.KVCache(2, 2, 8, 12, quantize=True)
    assert cache.k_scale.shape == (2, 2, 0)
    cache.append(k, v)
    with pytest.raises(ValueError, match="read-only"):
        cache.k[0] = 0
    q = rng.standard_normal((2, 4, 1, 8), dtype=np.float32)
    scales = {"k_scale": cache.k_scale, "v_scale": cache.v_scale}
    np.testing.assert_array_equal(na.attention(q, cache.k, cache.v, **scales), cache.attend(q))
    other = copy.copy(cache)
    other.append(v[..., :8], v)
    assert cache.lengths.tolist() == [6, 6]
    np.testing.assert_array_equal(na.attention(q, cache.k, cache.v, **scales), cache.attend(q))
    window = na.KVCache(2, 2, 8, 12, window=2)
    assert window.k_scale is None
    for _ in range(9):
        window.append(k[:, :, :1], v[:, :, :1])
        window.append(window.k[:, :, :1], window.v[:, :, :1])
    np.testing.assert_array_equal(window.k[:, :, -1:], k[:, :, :1])


@pytest.mark.parametrize("keep_first", [0, 2])
def test_a_window_truncated_to_nothing_begins_anew(rng, keep_first):
    cache = na.KVCache(1, 1, 4, window=8, keep_first=keep_first)
    for _ in range(100):
        cache.append(*rng.standard_normal((2, 1, 1, 1, 4), dtype=np.float32))
    cache.truncate(keep_first // 2)
    x = rng.standard_normal((1, 1, 5, 4), dtype=np.float32)
    fresh = na.KVCache(1, 1, 4, window=8, keep_first=keep_first)
    if keep_first:
        fresh.append(cache.k, cache.v)
    for each in (cache, fresh):
        each.append(x, x)
    np.testing.assert_array_equal(cache.lengths, fresh.lengths)
    np.testing.assert_array_equal(cache.k, fresh.k)
    np.testing.assert_array_equal(cache.attend(x), fresh.attend(x))


def test_a_cache_says_what_it_is():
    cache = na.KVCache(2, 3, 4, window=8)
    assert repr(cache) == "KVCache(2, 3, 4, dtype=float32, window=8): lengths [0, 0]"
