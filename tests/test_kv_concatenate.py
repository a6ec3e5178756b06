"""Promise: sequences of several caches go on in one as they would have gone on alone."""

from dataclasses import replace

import numattn as na
import numpy as np
import pytest
from checks import numbers
from numattn import _kv_arguments

HEADS, KV_HEADS, DIM = 4, 2, 8
# Little can be taken back, so that memory moves and sequences begin at different positions.
WINDOW = {"window": 6, "max_rollback": 2}
LIMITS = pytest.mark.parametrize(
    "limits", [{}, WINDOW, WINDOW | {"keep_first": 2}], ids=["all", "window", "first"]
)


def make(batch, **options):
    return na.KVCache(batch, KV_HEADS, DIM, DIM + 4, **options)


def append(rng, caches, counts):
    """Append the same to caches, whose sequences follow each other."""
    n = max(counts)
    dtype = caches[0].k.dtype if caches[0].k_scale is None else np.float32
    k, v = (numbers(rng, len(counts), KV_HEADS, n, dim, dtype=dtype) for dim in (DIM, DIM + 4))
    row = 0  # of the first sequence of the next cache, or of the first cache again
    for cache in caches:
        own = slice(row, row + len(cache.lengths))
        cache.append(k[own], v[own], lengths=counts[own])
        row = own.stop % len(counts)


@LIMITS
@pytest.mark.parametrize("quantize", [False, True])
@pytest.mark.parametrize("sizes", [[1, 2], [2, 0, 1, 3], [1], [0, 0]])
def test_sequences_go_on_as_alone(backend, rng, limits, quantize, sizes):
    caches = [make(size, quantize=quantize, **limits) for size in sizes]
    for i, cache in enumerate(caches):
        for _ in range(3 * i):
            counts = rng.integers(0, 7, len(cache.lengths)).tolist()
            if counts:
                append(rng, [cache], counts)
        if i % 2:
            cache.truncate(np.maximum(cache.lengths - 1, 0))
    whole = na.KVCache.concatenate(iter(caches))
    batch = sum(sizes)
    assert type(whole) is na.KVCache
    assert repr(whole).startswith(f"KVCache({batch}, 2, 8, 12, dtype=float32")

    def check():
        assert whole.lengths.tolist() == [n for cache in caches for n in cache.lengths]
        for rows in (1, 2):
            q = numbers(rng, batch, HEADS, rows, DIM)
            options = {"q_lengths": rows, "return_lse": True}
            out, lse = whole.attend(q, **options)
            parts = zip(caches, np.split(q, np.cumsum(sizes)[:-1]), strict=True)
            alone = [cache.attend(part, **options) for cache, part in parts]
            for x, own in ((out, 0), (lse, 1)):
                expected = np.concatenate([each[own] for each in alone])
                np.testing.assert_allclose(x, expected, rtol=0, atol=2e-6)

    check()
    for step in range(9 if batch else 0):
        append(rng, [whole, *caches], rng.integers(0, 7, batch).tolist())
        check()
        if step % 3 == 2:
            n = np.maximum(whole.lengths - rng.integers(0, 2, batch), 0)
            whole.truncate(n)
            for cache, own in zip(caches, np.split(n, np.cumsum(sizes)[:-1]), strict=True):
                cache.truncate(own)
            check()


@LIMITS
def test_what_can_be_taken_back_is_that_of_each(rng, limits):
    """The same lengths are refused, and the same queries, as alone."""
    caches = [make(1, **limits) for _ in range(3)]
    for cache, steps in zip(caches, ([5], [6, 6, 6, 1], [6, 6, 1, 1, 1, 1, 1]), strict=True):
        for n in steps:
            append(rng, [cache], [n])
    caches[2].truncate(int(caches[2].lengths[0]) - 1)
    q = numbers(rng, 3, HEADS, 1, DIM)

    def is_refused(call, *arguments, **options):
        try:
            call(*arguments, **options)
        except ValueError:
            return True
        return False

    for i, cache in enumerate(caches):
        for n in range(int(cache.lengths[0])):
            whole = na.KVCache.concatenate(caches)
            at = whole.lengths - 1
            at[i] = n
            asked = is_refused(cache.attend, q[i : i + 1], q_offset=n)
            assert is_refused(whole.attend, q, q_offset=at) == asked
            assert is_refused(whole.truncate, at + 1) == is_refused(cache.copy().truncate, n + 1)


@pytest.mark.parametrize("dtype_name", ["float64", "float16"])
def test_other_dtypes(rng, dtype_name):
    dtype = np.dtype(dtype_name)
    caches = [make(1, dtype=dtype), make(2, dtype=dtype, capacity=50)]
    append(rng, caches, [3, 5, 1])
    whole = na.KVCache.concatenate(caches)
    assert whole.k.dtype == dtype
    np.testing.assert_array_equal(whole.k[0, :, :3], caches[0].k[0])
    np.testing.assert_array_equal(whole.v[1:], caches[1].v)
    np.testing.assert_array_equal(whole.v[0, :, 3:], 0)


def test_queries_of_padded_prompts(rng):
    """Their places are kept where one append could have brought all of it, and else forgotten."""
    q = numbers(rng, 3, HEADS, 5, DIM)
    full, padded, other = (make(n) for n in (1, 2, 1))
    append(rng, [full], [3])
    append(rng, [full], [5])
    append(rng, [padded], [1, 1])
    append(rng, [padded], [5, 2])
    append(rng, [other], [1])
    alone = np.concatenate([full.attend(q[:1]), padded.attend(q[1:])])
    assert not alone[2, :, 2:].any()  # padding
    for caches, order in (
        ([full, padded], [0, 1, 2]),
        ([padded, full], [1, 2, 0]),
        ([padded, full.select([]), padded.select([])], [1, 2]),
    ):
        whole = na.KVCache.concatenate(caches)
        np.testing.assert_array_equal(whole.attend(q[order]), alone[order])
    for caches in ([padded, other], [other, padded]):
        whole = na.KVCache.concatenate(caches)
        at_the_end = whole.attend(q, q_offset=whole.lengths - 5)
        np.testing.assert_array_equal(whole.attend(q), at_the_end)
    more = padded.copy()
    more.append(numbers(rng, 2, KV_HEADS, 4, DIM), numbers(rng, 2, KV_HEADS, 4, DIM + 4), [4, 1])
    whole = na.KVCache.concatenate([padded, more.select([0])])
    for rows in (4, 5):
        at_the_end = whole.attend(q[:, :, :rows], q_offset=whole.lengths - rows)
        np.testing.assert_array_equal(whole.attend(q[:, :, :rows]), at_the_end)


class Named(na.KVCache):
    """A cache with an attribute of its own."""

    def __init__(self, name):
        super().__init__(1, KV_HEADS, DIM, DIM + 4)
        self.name = name


def test_the_first_one_says_what_it_becomes(rng):
    caches = [Named("first"), make(2), Named("last")]
    append(rng, caches, [2, 1, 0, 2])
    kept = [cache.k.tobytes() for cache in caches]
    whole = Named.concatenate(caches)
    assert (type(whole), whole.name) == (Named, "first")
    assert type(na.KVCache.concatenate(caches[1:])) is na.KVCache
    append(rng, [whole], [3, 3, 3, 3])
    assert [cache.k.tobytes() for cache in caches] == kept
    twice = na.KVCache.concatenate([whole, whole])
    assert twice.lengths.tolist() == [5, 4, 3, 5] * 2


def test_bad_arguments():
    plain = {"batch": 2, "kv_heads": 2, "head_dim": 8, "value_dim": 12, "window": 9}
    cache = na.KVCache(**plain)
    different = {
        "kv_heads": 3, "head_dim": 9, "value_dim": 8, "dtype": np.float16, "quantize": True,
        "window": None, "keep_first": 1, "max_rollback": 3,
    }  # fmt: skip
    assert set(different) == set(_kv_arguments.SHARED)
    fields = set(_kv_arguments.CacheArguments.__dataclass_fields__)
    assert fields == {*different, "batch", "capacity"}
    for name, value in different.items():
        other = na.KVCache(**(plain | {name: value}))
        seen = np.dtype(value) if name == "dtype" else value
        with pytest.raises(ValueError, match=rf"^caches: got {name}={seen} at index 2, expected"):
            na.KVCache.concatenate([cache, cache, other])
    assert replace(cache._arguments, capacity=9) == na.KVCache(**plain, capacity=9)._arguments
    na.KVCache.concatenate([cache, na.KVCache(**plain, capacity=9)])
    with pytest.raises(ValueError, match=r"^caches: got an empty list, expected at least one"):
        na.KVCache.concatenate([])
    for wrong, message in (
        (cache, "caches: got KVCache, expected a list of KVCache"),
        ([cache, None], "caches: got None at index 1, expected a KVCache"),
        ("ab", "caches: got str at index 0, expected a KVCache"),
        (3, "caches: got int, expected a list of KVCache"),
    ):
        with pytest.raises(TypeError) as raised:
            na.KVCache.concatenate(wrong)
        assert str(raised.value) == message
