"""Promise: a cache attends as if all tokens were there, in memory that grows as it should."""

import copy
import pickle

import numattn as na
import numpy as np
import pytest
from conftest import named_dtype
from numattn import _arguments, _kv_tokens, _runtime
from numattn import _reference as reference


def finfo(dtype):
    if dtype.name == "bfloat16":
        return pytest.importorskip("ml_dtypes").finfo(dtype)
    return np.finfo(dtype)


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
    more = (x[:, :, 6:9].swapaxes(1, 2) for x in (k, v))
    cache.append(*more, lengths=[0, 3], layout="blhd")
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
    cache = na.KVCache(
        2, 2, 8, 12, window=window, keep_first=keep_first, quantize=quantize, max_rollback=3
    )
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
    room = keep_first + 2 * (window + 3)
    assert sizes[-1] == 2 * 2 * room * (20 + 2 * 4 if quantize else 20 * 4)
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
    written = 0

    class Counting(np.ndarray):
        def __setitem__(self, index, value):
            nonlocal written
            written += self.view(np.ndarray)[index].nbytes
            super().__setitem__(index, value)

    zeros = np.zeros
    monkeypatch.setattr(_kv_tokens.np, "zeros", lambda *a, **o: zeros(*a, **o).view(Counting))
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
            ((k.astype(float), v), {}, TypeError, "k: got dtype float64, expected float32, "),
            (
                (k[:, :, :1], v[:, :, :1]),
                {"lengths": [1, 2]},
                ValueError,
                "lengths: got 2 at index 1",
            ),
            ((k[:, :, :1], v[:, :, :1]), {"lengths": [1]}, ValueError, "lengths: got shape (1,)"),
        ]
        if cache.k_scale is not None:
            failing.append(((k, v), {}, ValueError, "k: got 4 tokens, expected at most 3, the si"))
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
        ((2, 2, 8), {"dtype": "f4,("}, TypeError, "dtype: got 'f4,(', expected one of"),
        ((2, 2, 8), {"dtype": "foo"}, TypeError, "dtype: got 'foo', expected one of"),
        ((2, 2, 8), {"dtype": ">f4"}, TypeError, "dtype: got >f4, expected one of"),
        ((2, 2, 8), {"keep_first": 2}, ValueError, "keep_first: got 2 without `window=`"),
        ((2, 2, 8), {"window": 0}, ValueError, "window: got 0, expected at least 1"),
        ((2, 2, 8), {"max_rollback": -1}, ValueError, "max_rollback: got -1, expected at least 0"),
        ((2, 2, 8), {"quantize": 1}, TypeError, "quantize: got 1 (int), expected True or False"),
        ((2, 2, 8), {"dtype": None}, TypeError, "dtype: got None, expected one of float16"),
        ((2, 2, 2**70), {}, ValueError, "head_dim: got 1180591620717411303424, expected at most"),
    ):
        with pytest.raises(error) as raised:
            na.KVCache(*arguments, **options)
        assert message in str(raised.value)
    with pytest.raises(MemoryError):
        na.KVCache(2**40, 2**40, 8)
    cache = na.KVCache(2, 2, 8, 12, window=3, max_rollback=2)
    for part in (slice(0, 3), slice(3, 4), slice(0, 3), slice(0, 3)):
        cache.append(k[:, :, part], v[:, :, part])
    many = np.concatenate([q, q], axis=2)
    one = q[:, :, :1]
    calls = (
        (
            lambda: cache.attend(many),
            ValueError,
            "q: got 8 queries from position 2 on, which att",
        ),
        (lambda: cache.attend(one, q_offset=6), ValueError, "q: got 1 queries from position 6 on"),
        (lambda: cache.attend(q[:1]), ValueError, "q: got shape (1, 4, 4, 8), expected (2, heads"),
        (lambda: cache.attend(q[..., :7]), ValueError, "q: got shape (2, 4, 4, 7), expected (2, "),
        (lambda: cache.attend(q[:, :3]), ValueError, "q: got 3 heads, expected a multiple of the"),
        (
            lambda: cache.attend(q.astype(float)),
            TypeError,
            "q: got dtype float64, expected float32",
        ),
        (lambda: cache.attend(one, q_offset="a"), TypeError, "q_offset: got dtype"),
        (lambda: cache.attend(one, q_offset=True), TypeError, "q_offset: got dtype bool"),
        (lambda: cache.attend(one, q_offset=0.5), TypeError, "q_offset: got dtype float64"),
        (lambda: cache.attend(one, q_lengths=2), ValueError, "q_lengths: got 2, expected 0 to 1"),
        (lambda: cache.attend(one, window=(1, 1)), ValueError, "window: got (1, 1), expected None"),
        (lambda: cache.attend(one, mask=one), TypeError, "mask: got dtype float32, expected bool"),
        (
            lambda: cache.attend(one, mask=one > 0),
            ValueError,
            "mask: got shape (2, 4, 1, 8), expected one that broadcasts to (batch, Hq, Lq, T) = "
            "(2, 4, 1, 10), where T counts",
        ),
        (lambda: cache.attend(one, bias=one > 0), TypeError, "bias: got dtype bool, expected flo"),
        (lambda: cache.attend(one, bias=one[..., :2]), ValueError, "bias: got shape (2, 4, 1, 2),"),
        (lambda: cache.attend(one, bias=one[np.newaxis]), ValueError, "bias: got shape (1, 2, 4,"),
        (lambda: cache.attend(one, kv_lengths=3), TypeError, "kv_lengths: got int, expected None"),
        (lambda: cache.attend(one, layout="no"), ValueError, "layout: got 'no', expected one of"),
        (
            lambda: cache.append(one, one, layout="no"),
            ValueError,
            "layout: got 'no', expected one of",
        ),
        (lambda: cache.attend(one, scale="a"), TypeError, "scale: got 'a'"),
        (
            lambda: cache.attend(one, softmax_scale=2.0),
            TypeError,
            "KVCache.attend() got an unexpected keyword argument 'softmax_scale'; did you mean `sc",
        ),
        (lambda: cache.truncate(1), ValueError, "n: got 1 for sequence 0 of 10 tokens, exp"),
        (lambda: cache.truncate([10, 7]), ValueError, "n: got 7 for sequence 1 of"),
        (lambda: cache.truncate(-1), ValueError, "n: got -1, expected at least 0"),
        (lambda: cache.truncate([1, 2, 3]), ValueError, "n: got shape (3,), expected an int, or"),
        (lambda: cache.truncate(2.0), TypeError, "n: got dtype float64, expected ints"),
        (lambda: cache.select([0, 2]), ValueError, "indices: got 2 at index 1, expected -2 to 1"),
        (lambda: cache.append(k[:, :, :1], v[:, :, :1], 2), ValueError, "lengths: got 2, expected"),
        (lambda: cache.append(k[:, :, :1], v[:, :, :1], True), TypeError, "lengths: got dtype bo"),
    )
    assert not cache.attend(one, q_offset=6, q_lengths=0).any()  # nobody needs what is gone
    before = contents(cache)
    for call, error, message in calls:
        with pytest.raises(error) as raised:
            call()
        assert message in str(raised.value)
        assert contents(cache) == before


@pytest.mark.parametrize("window", [None, 3])
def test_out_is_no_memory_of_the_cache(rng, window):
    q, k, v = tokens(rng, length=3, dv=8)
    cache = na.KVCache(2, 2, 8, window=window)
    cache.append(k, v)
    for what, name in ((cache.k, "keys"), (cache.v, "values")):
        with pytest.raises(
            ValueError, match=f"out: got an array that shares memory with the cache's {name}"
        ):
            cache.attend(q[:, :2, :1], out=what.base[:, :, 1:2])
    out = np.empty((2, 4, 3, 8), np.float32)
    assert cache.attend(q, out=out) is out
    np.testing.assert_array_equal(out, cache.attend(q))


class History:
    """What a sequence has had, and what its cache promises to know."""

    def __init__(self, window, keep_first, max_rollback):
        self.window, self.keep_first, self.max_rollback = window, keep_first, max_rollback
        self.k = np.empty((0, 4), np.float32)
        self.before = self.largest = 0

    def append(self, new):
        self.before = len(self.k)
        self.k = np.concatenate([self.k, new])
        self.largest = max(self.largest, len(self.k))

    def may_truncate(self, n):
        return (
            self.window is None or n >= len(self.k) or n <= self.keep_first
            or n >= self.largest - self.max_rollback
        )  # fmt: skip

    def truncate(self, n):
        self.k = self.k[:n]
        if len(self.k) <= self.keep_first:  # it begins anew
            self.before, self.largest = 0, len(self.k)

    def may_ask(self, position):
        """Whether the tokens that a query sees are known for sure."""
        if self.window is None:
            return True
        asked = min(self.before, self.largest - self.max_rollback - 1)
        return position >= asked or asked - self.window + 1 <= self.keep_first

    def expected(self, q, first, **options):
        p, j = first + np.arange(q.shape[1])[:, None], np.arange(len(self.k))
        mask = (j <= p) & ((j > p - (self.window or 10**6)) | (j < self.keep_first))
        k = self.k[np.newaxis]
        return reference.attention(q, k, -k, mask=mask, q_offset=first, **options)[0]


@pytest.mark.parametrize("seed", range(80))
def test_any_history(seed):
    """Appends of any lengths, truncation, copies and queries anywhere: right, or refused."""
    rng = np.random.default_rng(seed)
    batch, window = int(rng.integers(1, 4)), rng.choice([None, 1, 4, 7])
    window = None if window is None else int(window)
    keep_first = 0 if window is None else int(rng.integers(0, 4))
    max_rollback = int(rng.choice([0, 2, 9]))
    quantize = bool(rng.random() < 0.5)
    cache = na.KVCache(
        batch, 1, 4, window=window, keep_first=keep_first, quantize=quantize,
        capacity=int(rng.integers(0, 9)), max_rollback=max_rollback,
    )  # fmt: skip
    options = {} if rng.random() < 0.5 else {"alibi_slopes": [0.1, 0.3]}
    histories = [History(window, keep_first, max_rollback) for _ in range(batch)]
    for _ in range(60):
        padded = None
        what = rng.random()
        if what < 0.2:
            most = 1 + max(len(x.k) for x in histories)
            n = rng.integers(0, most, batch if rng.random() < 0.5 else None)
            wanted = np.broadcast_to(n, batch).tolist()
            if all(x.may_truncate(m) for x, m in zip(histories, wanted, strict=True)):
                cache.truncate(n)
                for x, m in zip(histories, wanted, strict=True):
                    x.truncate(m)
            else:
                with pytest.raises(ValueError, match="n: got"):
                    cache.truncate(n)
        elif what < 0.3:
            chosen = rng.integers(0, batch, batch)
            cache = cache.select(chosen)
            histories = [copy.copy(histories[i]) for i in chosen]
        elif what < 0.35:
            cache = pickle.loads(pickle.dumps(cache))
        else:
            n = int(rng.integers(1, 1 + (window or 6)))
            counts = rng.integers(0, n + 1, batch)
            if rng.random() < 0.3:
                counts[:] = n
            new = rng.standard_normal((batch, 1, n, 4), dtype=np.float32)
            for i, count in enumerate(counts):
                new[i, :, count:] = np.nan
            cache.append(new, -new, lengths=counts)
            for x, one, count in zip(histories, new, counts, strict=True):
                x.append(one[0, :count])
            padded = n if (counts < n).any() else None
        assert cache.lengths.tolist() == [len(x.k) for x in histories]
        rows = int(rng.integers(1, 4)) if padded is None or rng.random() < 0.5 else padded
        q = rng.standard_normal((batch, 2, rows, 4), dtype=np.float32)
        first, counts = [len(x.k) - rows for x in histories], [rows] * batch
        where = {}
        if rows == padded:
            first, counts = zip(*((x.before, len(x.k) - x.before) for x in histories), strict=True)
        elif padded is None and what < 0.3:  # `before` is not the cache's to tell any more
            where = {"q_offset": first}
        else:
            where = {"q_lengths": rows}
        asked = zip(histories, first, counts, strict=True)
        if not all(x.may_ask(position) or count == 0 for x, position, count in asked):
            with pytest.raises(ValueError, match="which attend to tokens from"):
                cache.attend(q, **where, **options)
            continue
        out = cache.attend(q, **where, **options)
        for x, one, rows, position, count in zip(histories, out, q, first, counts, strict=True):
            expected = x.expected(rows[:, :count], position, **options)
            atol = 0.1 if quantize else 1e-5
            np.testing.assert_allclose(one[:, :count], expected, rtol=0, atol=atol)
            np.testing.assert_array_equal(one[:, count:], 0)


@pytest.mark.parametrize("window", [1, 16, 64, 1000])
@pytest.mark.parametrize("capacity", [0, 64, 1024])
@pytest.mark.parametrize("max_rollback", [0, 16, 300])
def test_appending_to_a_window_copies_little(monkeypatch, window, capacity, max_rollback):
    moved = 0
    original = _kv_tokens.Tokens._moved

    def counting(self, chosen, begins, room):
        nonlocal moved
        moved += sum(self.places)
        return original(self, chosen, begins, room)

    monkeypatch.setattr(_kv_tokens.Tokens, "_moved", counting)
    cache = na.KVCache(1, 1, 1, window=window, capacity=capacity, max_rollback=max_rollback)
    k = np.ones((1, 1, 1, 1), np.float32)
    for _ in range(5000):
        cache.append(k, k)
    assert moved <= 4 * 5000
    assert cache.nbytes <= 2 * 4 * max(capacity, 2 * (window + max_rollback))


def test_an_interrupted_append_changes_nothing(monkeypatch):
    cache = na.KVCache(1, 1, 1, window=4, max_rollback=0)
    k = np.arange(12, dtype=np.float32).reshape(1, 1, 12, 1)
    for i in range(8):
        cache.append(k[:, :, i : i + 1], k[:, :, i : i + 1])
    before = contents(cache)
    original, calls = _kv_tokens.Tokens._moved_array, []

    def interrupted(self, *arguments):
        calls.append(original(self, *arguments))
        if len(calls) == 2:
            raise KeyboardInterrupt
        return calls[-1]

    monkeypatch.setattr(_kv_tokens.Tokens, "_moved_array", interrupted)
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
    np.testing.assert_array_equal(cache.k[0, 0, -4:, 0], k[0, 0, i - 4 : i, 0])


@pytest.mark.parametrize("keep_first", [0, 2])
@pytest.mark.parametrize("max_rollback", [0, 1, 5])
def test_what_can_be_taken_back_does_not_depend_on_memory(rng, keep_first, max_rollback):
    """After each of 300 single appends: any number of tokens less, and all of them again."""
    window = 4
    q, k, v = tokens(rng, batch=1, length=300, dv=8)
    cache = na.KVCache(1, 2, 8, window=window, keep_first=keep_first, max_rollback=max_rollback)
    options = {"alibi_slopes": [0.1, 0.2, 0, 0.3]}
    p, j = np.arange(300)[:, None], np.arange(300)
    mask = (j <= p) & ((j > p - window) | (j < keep_first))
    whole, _ = reference.attention(q, k, v, mask=mask, **options)
    for length in range(1, 301):
        cache.append(k[:, :, length - 1 : length], v[:, :, length - 1 : length])
        for back in range(min(length, max_rollback + 3)):
            n = length - back
            if back > max_rollback and n > keep_first:
                expected = f"expected at least {length - max_rollback} with max_rollback="
                with pytest.raises(ValueError, match=expected):
                    cache.truncate(n)
                assert cache.lengths.tolist() == [length]
                continue
            if n <= keep_first:  # it would begin anew
                continue
            cache.truncate(n)
            out = cache.attend(q[:, :, n - 1 : n], **options)
            np.testing.assert_allclose(out, whole[:, :, n - 1 : n], rtol=0, atol=1e-5)
            while n < length:
                part = slice(n, min(n + window, length))
                cache.append(k[:, :, part], v[:, :, part])
                out = cache.attend(q[:, :, part], **options)
                np.testing.assert_allclose(out, whole[:, :, part], rtol=0, atol=1e-5)
                n = part.stop


@pytest.mark.parametrize("layout", ["bhld", "blhd"])
@pytest.mark.parametrize("amplitude", [1, 30])
def test_first_tokens_and_window_merged(dtype, rng, layout, amplitude):
    """One row attends to nothing, some to first tokens alone, others to both parts."""
    q, k, v = tokens(rng, batch=1, length=9)
    q, k, v = (amplitude * q).astype(dtype), k.astype(dtype), v.astype(dtype)
    cache = na.KVCache(1, 2, 8, 12, dtype=dtype, window=3, keep_first=2)
    for part in (slice(0, 3), slice(3, 6), slice(6, 8)):
        cache.append(k[:, :, part], v[:, :, part])
    queries = q if layout == "bhld" else q.swapaxes(1, 2)
    options = {"q_offset": -1, "layout": layout, "return_lse": True}
    out, lse = cache.attend(queries, **options)
    with np.errstate(all="raise"):
        given = np.empty_like(out)
        assert cache.attend(queries, out=given, **options)[0] is given
    np.testing.assert_array_equal(given.astype(float), out.astype(float))
    if layout == "blhd":
        out, lse = out.swapaxes(1, 2), lse.swapaxes(1, 2)
    p, j = np.arange(-1, 8)[:, None], np.arange(8)
    mask = (j <= p) & ((j > p - 3) | (j < 2))
    expected = reference.attention(q, k[:, :, :8], v[:, :, :8], mask=mask)
    assert out.dtype == dtype
    assert lse.dtype == (np.float64 if dtype == np.float64 else np.float32)
    assert not out[:, :, 0].any()
    tolerance = {8: 1e-13, 4: 5e-6, 2: 3e-2}[dtype.itemsize]
    np.testing.assert_allclose(out.astype(float), expected[0], rtol=0, atol=tolerance)
    lse_tolerance = 1e-14 if dtype == np.float64 else 1e-6
    np.testing.assert_allclose(lse, expected[1], rtol=lse_tolerance, atol=lse_tolerance)


def test_first_tokens_and_window_of_the_largest_values(dtype, rng):
    q, k, v = (x.astype(dtype) for x in tokens(rng, batch=1, length=40, dv=8))
    largest = float(finfo(dtype).max)
    v[...] = largest
    cache = na.KVCache(1, 2, 8, dtype=dtype, window=10, keep_first=7)
    for part in (slice(i, i + 10) for i in range(0, 40, 10)):
        cache.append(k[:, :, part], v[:, :, part])
        out = cache.attend(q[:, :, part]).astype(float)
        np.testing.assert_allclose(out, largest, rtol=1e-2 if dtype.itemsize == 2 else 1e-6)
        assert np.isfinite(out).all()


@pytest.mark.parametrize("quantize", [False, True])
@pytest.mark.parametrize(
    "limits", [{}, {"window": 6}, {"window": 6, "keep_first": 2}], ids=["all", "window", "first"]
)
@pytest.mark.parametrize("layout", ["bhld", "blhd"])
def test_padded_appends_know_where_their_queries_are(backend, rng, quantize, limits, layout):
    """Each sequence by itself, without padding, gives the same; padding gives zeros."""
    options = {"alibi_slopes": [0.1, 0.2, 0, 0.3], "sinks": [0.5, -1, 2, 0], "layout": layout}
    if limits.get("keep_first"):
        options.pop("alibi_slopes" if layout == "bhld" else "sinks")
    cache = na.KVCache(3, 2, 8, 12, quantize=quantize, **limits)
    alone = [na.KVCache(1, 2, 8, 12, quantize=quantize, **limits) for _ in range(3)]

    def attend(cache, q):
        out, lse = cache.attend(
            q if layout == "bhld" else q.swapaxes(1, 2), return_lse=True, **options
        )
        return (out, lse) if layout == "bhld" else (out.swapaxes(1, 2), lse.swapaxes(1, 2))

    for counts in ([5, 3, 6], [1, 1, 1], [2, 0, 3], [1, 0, 1], [4, 6, 1], [1, 1, 1], [0, 2, 6]):
        n = max(counts)
        q, k, v = tokens(rng, batch=3, length=n)
        for i, count in enumerate(counts):
            for x in (q, k, v):
                x[i, :, count:] = np.nan
        cache.append(k, v, lengths=counts)
        outs = [attend(cache, q), attend(cache.select([2, 0, 1]), q[[2, 0, 1]])]
        outs[1] = tuple(x[[1, 2, 0]] for x in outs[1])
        for i, count in enumerate(counts):
            part = (slice(i, i + 1), slice(None), slice(count))
            alone[i].append(k[part], v[part])
            expected = attend(alone[i], q[part])
            for out, lse in outs:
                np.testing.assert_allclose(out[part], expected[0], rtol=0, atol=1e-6)
                np.testing.assert_allclose(lse[part], expected[1], rtol=0, atol=1e-6)
                np.testing.assert_array_equal(out[i, :, count:], 0)


def test_where_queries_are_else(rng):
    q, k, v = tokens(rng, length=5)
    cache = na.KVCache(2, 2, 8, 12)
    cache.append(k, v, lengths=[5, 2])
    padded = cache.attend(q)
    np.testing.assert_array_equal(cache.attend(q, q_lengths=[5, 2]), padded)
    np.testing.assert_array_equal(cache.attend(q, q_offset=0, q_lengths=[5, 2]), padded)
    free = cache.attend(q, q_offset=0)  # the last three see both tokens
    np.testing.assert_allclose(free[1, :, :2], padded[1, :, :2], rtol=0, atol=1e-6)
    assert free[1, :, 2:].any(axis=-1).all()

    def at_the_end(rows):
        return cache.attend(q[:, :, :rows], q_offset=cache.lengths - rows)

    np.testing.assert_array_equal(cache.attend(q[:, :, :3]), at_the_end(3))
    twin = pickle.loads(pickle.dumps(cache))
    np.testing.assert_array_equal(twin.attend(q), padded)
    for change in (lambda: cache.truncate(4), lambda: cache.append(k, v), cache.reset):
        change()
        np.testing.assert_array_equal(cache.attend(q), at_the_end(5))
        if cache.lengths.any():
            cache.append(k, v, lengths=[5, 2])
    cache.append(k, v, lengths=4)
    cache.append(k, v, lengths=np.array([5, 5], np.int8))
    np.testing.assert_array_equal(cache.attend(q), at_the_end(5))
    assert cache.lengths.tolist() == [9, 9]


def test_truncation_of_each_sequence(rng):
    q, k, v = tokens(rng, length=9)
    cache = na.KVCache(2, 2, 8, 12)
    cache.append(k, v)
    cache.truncate([4, 100])
    assert cache.lengths.tolist() == [4, 9]
    cache.append(k[:, :, 4:6], v[:, :, 4:6])
    assert cache.lengths.tolist() == [6, 11]
    expected, _ = reference.attention(q[:1, :, 4:6], k[:1, :, :6], v[:1, :, :6], is_causal=True)
    np.testing.assert_allclose(cache.attend(q[:, :, 4:6])[:1], expected, rtol=0, atol=1e-5)
    cache.truncate(np.uint8(7))
    assert cache.lengths.tolist() == [6, 7]
    empty = na.KVCache(0, 2, 8)
    empty.truncate([])
    empty.append(k[:0], k[:0], lengths=[])
    assert empty.attend(q[:0]).shape == (0, 4, 9, 8)


@pytest.mark.skipif(_runtime.native is None, reason="needs the compiled kernels")
@pytest.mark.parametrize("quantize", [False, True])
@pytest.mark.parametrize(
    "limits", [{}, {"window": 6}, {"window": 6, "keep_first": 2}], ids=["all", "window", "first"]
)
def test_usual_calls_are_accepted_in_c(rng, monkeypatch, quantize, limits):
    """Not by `_arguments`, and without a look at all scales."""
    cache = na.KVCache(2, 2, 8, 12, quantize=quantize, **limits)
    q, k, v = tokens(rng, length=6)
    for counts in (6, 6, [1, 4], [2, 3]):
        cache.append(k, v, lengths=counts)
    for scales in cache._tokens.arrays[2:]:
        scales[0, :, cache._tokens.places[0] :] = np.nan  # beyond the shorter sequence
    calls = [{}, {"layout": "blhd"}, {"return_lse": True}, {"q_lengths": [2, 1]}, {"q_offset": 13}]
    expected = {}
    for checked in (True, False):
        if not checked:
            monkeypatch.setattr(_arguments, "check", None)
        for i, options in enumerate(calls):
            queries = q.swapaxes(1, 2) if "layout" in options else q
            result = cache.attend(queries, **options)
            result = result[0] if isinstance(result, tuple) else result
            np.testing.assert_array_equal(result, expected.setdefault(i, result))
            assert np.isfinite(result).all()


@pytest.mark.parametrize("dtype_name", ["float32", "float64", "float16", "bfloat16"])
def test_the_caller_s_floating_point_errors_change_nothing(rng, dtype_name):
    dtype = named_dtype(dtype_name)
    limits = finfo(dtype)
    numbers = [limits.max, limits.tiny, limits.smallest_subnormal, 0, 1, -limits.max]
    numbers = np.array([float(x) for x in numbers])
    numbers = np.where(np.abs(numbers) > 1e38, np.sign(numbers) * 1e38, numbers).astype(dtype)
    new = rng.choice(numbers, (1, 1, 8, 4))
    new[0, 0, :6] = numbers[:, np.newaxis]
    q = rng.standard_normal((1, 2, 8, 4)).astype(dtype)
    results = []
    for errors in ("ignore", "raise"):
        with np.errstate(all=errors):
            for window, keep_first in ((None, 0), (8, 0), (8, 2)):
                cache = na.KVCache(
                    1, 1, 4, dtype=dtype, quantize=True, window=window, keep_first=keep_first
                )
                cache.append(new, new)
                cache.append(new, new)
                results += [cache.attend(q), cache.copy().attend(q, alibi_slopes=[0.0, 1e-3])]
    half = len(results) // 2
    for a, b in zip(results[:half], results[half:], strict=True):
        np.testing.assert_array_equal(a.astype(float), b.astype(float))


class Named(na.KVCache):
    """A cache with attributes of its own."""

    __slots__ = ("layer",)

    def __init__(self, name, layer):
        super().__init__(2, 2, 8, 12, window=5, max_rollback=2)
        self.name, self.layer = name, layer


COPIES = {
    "select": lambda cache: cache.select([0, 1]),
    "concatenate": lambda cache: na.KVCache.concatenate([cache.select([0]), cache.select([1])]),
    "copy": lambda cache: cache.copy(),
    "copy.copy": copy.copy,
    "deepcopy": copy.deepcopy,
    "pickle": lambda cache: pickle.loads(pickle.dumps(cache)),
    "old pickle": lambda cache: pickle.loads(pickle.dumps(cache, 2)),
}


@pytest.mark.parametrize("way", COPIES)
def test_copies_are_of_the_same_class(rng, way):
    q, k, v = tokens(rng, length=5)
    cache = Named(["x"], 3)
    cache.append(k, v, lengths=[5, 3])
    expected = cache.attend(q)
    other = COPIES[way](cache)
    assert type(other) is Named
    assert (other.name, other.layer) == (["x"], 3)
    assert (other.name is cache.name) == (way in ("select", "concatenate", "copy", "copy.copy"))
    np.testing.assert_array_equal(other.attend(q), expected)
    for _ in range(3):
        other.append(k, v)
    assert other.lengths.tolist() == [20, 18]
    np.testing.assert_array_equal(cache.attend(q), expected)


@pytest.mark.parametrize("way", COPIES)
@pytest.mark.parametrize("quantize", [False, True])
@pytest.mark.parametrize("window", [None, 10])
def test_copies_hold_what_is_kept_and_nothing_else(way, quantize, window):
    """A token is a number of its own; 1.. for what is kept, 51.. for what must not be found."""
    pattern = [np.full(2**n, 99, np.int8) for n in range(4, 24)]
    del pattern  # which memory is made of now
    cache = na.KVCache(2, 1, 8, quantize=quantize, capacity=100_000, window=window, max_rollback=0)

    def append(number, lengths):
        x = np.zeros((2, 1, 5, 8), np.float32)
        x[..., 0] = 127  # a scale of 1
        x[..., 1:] = number
        cache.append(x, x, lengths)

    if window is None:
        append(51, 5)
        cache.truncate(0)
    else:
        for _ in range(4):
            append(52, 5)
    append(53, 5)
    cache.reset()
    append(1, 5)
    append(2, [5, 2])
    if window is None:
        append(54, [2, 5])
        cache.truncate([10, 7])
    other = COPIES[way](cache)
    assert other.nbytes < 10_000
    assert other.lengths.tolist() == [10, 7]
    for x, kept in zip((other.k, other.v), (cache.k, cache.v), strict=True):
        np.testing.assert_array_equal(x[0], kept[0])
        np.testing.assert_array_equal(x[1, :, :7], kept[1, :, :7])
        np.testing.assert_array_equal(x[1, :, 7:], 0)
    pickled = pickle.dumps(cache)
    assert len(pickled) < 2 * 2 * 10 * (8 + 4 if quantize else 8 * 4) + 2000
    assert np.full(7, 2, cache.k.dtype).tobytes() in pickled
    for number in (51, 52, 53, 54, 99):
        assert np.full(7, number, cache.k.dtype).tobytes() not in pickled
    assert np.full(7, 99, np.int8).tobytes() not in pickled


def test_a_pickle_that_is_none(rng):
    cache = na.KVCache(1, 2, 3, quantize=True)
    cache.append(*rng.standard_normal((2, 1, 2, 4, 3), dtype=np.float32))
    state = cache.__getstate__()
    nans = [*state["arrays"][:2], np.full((1, 2, 4), np.nan, np.float32), state["arrays"][3]]
    for change in (
        {"version": 2}, {"arguments": {}}, {"numbers": [[5], [0], [0]]}, {"numbers": [[4, 4]]},
        {"arrays": state["arrays"][:3]}, {"arrays": nans}, {"others": 3},
    ):  # fmt: skip
        other = na.KVCache(1, 1, 1)
        with pytest.raises(ValueError, match="state: got"):
            other.__setstate__(state | change)
    with pytest.raises(
        ValueError, match="state: got version None of a KVCache, expected version 1"
    ):
        other.__setstate__(None)
    buffers = []
    pickled = pickle.dumps(cache, protocol=5, buffer_callback=buffers.append)
    other = pickle.loads(pickled, buffers=[bytes(x.raw()) for x in buffers])
    other.truncate(2)
    other.append(*np.ones((2, 1, 2, 1, 3), np.float32))
    np.testing.assert_array_equal(other.k[:, :, :2], cache.k[:, :, :2])


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
    cache = na.KVCache(
        1, 3, 4, 5, dtype="float64", quantize=np.True_, capacity=7, window=8, keep_first=1,
        max_rollback=2,
    )  # fmt: skip
    assert repr(cache) == (
        "KVCache(1, 3, 4, 5, dtype=float64, quantize=True, capacity=7, window=8, keep_first=1, "
        "max_rollback=2): lengths [0]"
    )
    assert repr(Named("x", 0)).startswith("Named(2, 2, 8, 12, dtype=float32, window=5, max_roll")
