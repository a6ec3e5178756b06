"""Promise: an array means its elements, whatever kind of array it is and however it lies in memory.

Masked arrays, object arrays, foreign byte order and arrays of too few axes are refused: see
test_errors.py.
"""

import numattn as na
import numpy as np
import pytest
from numpy.lib.stride_tricks import as_strided


class Mine(np.ndarray):
    """A subclass with nothing of its own."""


def read_only(x):
    x = x.copy()
    x.flags.writeable = False
    return x


def unaligned(x):
    moved = np.zeros(x.nbytes + 1, np.uint8)[1:].view(x.dtype).reshape(x.shape)
    moved[...] = x
    assert x.itemsize == 1 or not moved.flags.aligned
    return moved


def every_other(x):
    for axis in range(x.ndim):
        x = np.repeat(x, 2, axis=axis)
    return x[(slice(None, None, 2),) * x.ndim]


def memory_mapped(x, path):
    mapped = np.memmap(path, x.dtype, "w+", shape=x.shape)
    mapped[...] = x
    mapped.flush()
    return np.memmap(path, x.dtype, "r", shape=x.shape)


KINDS = {
    "subclass": lambda x: x.view(Mine),
    "read-only": read_only,
    "reversed": lambda x: np.flip(np.flip(x).copy()),
    "every other": every_other,
    "unaligned": unaligned,
}
CALLS = {
    "varlen": lambda q, k, v, same: na.attention_varlen(
        *(same(x[0].swapaxes(0, 1)) for x in (q, k, v)), [0, 10, 40], [0, 30, 70]
    ),
    "paged": lambda q, k, v, same: na.attention_paged(
        same(q), *(same(x.swapaxes(1, 2).reshape(-1, 7, 2, 12)) for x in (k, v)),
        same(np.arange(20).reshape(2, 10)), same(np.array([70, 60])),
    ),
    "cache": lambda q, k, v, same: filled_cache(same(k), same(v)).attend(same(q)),
    "weights": lambda q, k, v, same: na.attention_weights(same(q), same(k)),
    "received": lambda q, k, v, same: na.attention_received(same(q), same(k)),
    "gradients": lambda q, k, v, same: na.attention_vjp(same(q), same(k), same(v))[1](same(q))[:3],
    "scores": lambda q, k, v, same: na.qk_scores(same(q), same(k)),
    "values": lambda q, k, v, same: na.aggregate_values(
        same(na.attention_weights(q, k)), same(v)
    ),
    "softmax": lambda q, k, v, same: na.masked_softmax(same(q), same(q > 0)),
    "rotary": lambda q, k, v, same: na.rotary_embedding(same(q)),
    "merge": lambda q, k, v, same: na.merge_states(
        [(same(q), same(q[..., 0])), (same(q + 1), same(q[..., 1]))]
    ),
    "quantize": lambda q, k, v, same: na.quantize_kv(same(k)),
    "layer": lambda q, k, v, same: na.MultiHeadAttention(12, 2, rng=0)(same(k[0])),
}  # fmt: skip


def filled_cache(k, v):
    cache = na.KVCache(2, 2, 12)
    cache.append(k, v)
    return cache


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("call", CALLS)
def test_every_entry_point_takes_them(backend, arrays, call, kind):
    given = [x.copy() for x in arrays(2, hq=4, hkv=2, lq=40, lk=70, d=12)]
    expected = CALLS[call](*given, np.ascontiguousarray)
    actual = CALLS[call](*given, KINDS[kind])
    if not isinstance(expected, tuple):
        expected, actual = (expected,), (actual,)
    for one, other in zip(actual, expected, strict=True):
        assert type(one) is np.ndarray
        # NumPy's BLAS takes other ways for other strides.
        np.testing.assert_allclose(one, other, atol=1e-6)


@pytest.mark.parametrize(
    "kind",
    ["list", "subclass", "memory-mapped", "read-only", "reversed", "every other", "unaligned"],
)
@pytest.mark.parametrize("lq", [1, 40])
def test_kinds_of_arrays(backend, arrays, tmp_path, kind, lq):
    q, k, v = arrays(2, hq=4, hkv=2, lq=lq, lk=70, d=12)
    expected = na.attention(q, k, v, is_causal=True)
    number = iter(range(3))
    same = {
        "list": lambda x: x.astype(np.float64).tolist(),
        "memory-mapped": lambda x: memory_mapped(x, tmp_path / str(next(number))),
        "reversed": lambda x: np.ascontiguousarray(x[:, :, ::-1, ::-1])[:, :, ::-1, ::-1],
        "every other": lambda x: np.repeat(np.repeat(x, 2, axis=2), 3, axis=3)[:, :, ::2, ::3],
    }.get(kind) or KINDS[kind]
    out = na.attention(*map(same, (q, k, v)), is_causal=True)
    assert type(out) is np.ndarray
    if kind == "list":  # of Python floats, which are float64
        assert out.dtype == np.float64
        np.testing.assert_allclose(out, expected, atol=1e-5)
    elif backend == "numpy":  # whose BLAS takes other ways for other strides
        np.testing.assert_allclose(out, expected, atol=1e-6)
    else:
        np.testing.assert_array_equal(out, expected)


def test_zero_strides(backend, arrays):
    q, k, v = arrays(hq=1, lq=9, lk=1, d=8)
    one_key = [np.broadcast_to(x, (6, 50, 8)) for x in (k, v)]
    out = na.attention(np.broadcast_to(q, (6, 9, 8)), *one_key)
    np.testing.assert_allclose(out, np.broadcast_to(v, (6, 9, 8)), rtol=1e-6)
    mask = np.broadcast_to(np.arange(50) < 20, (6, 9, 50))
    np.testing.assert_allclose(
        na.attention(np.broadcast_to(q, (6, 9, 8)), *one_key, mask=mask), out, rtol=1e-6
    )


@pytest.mark.parametrize("lq", [1, 70])
def test_more_than_2_to_the_31_elements(isa, arrays, lq):
    """Counted in 64 bits: the last keys are those that count, far behind the first ones."""
    if isa == "generic":
        pytest.skip("takes too long")
    q, _, v = arrays(hq=1, lq=lq, lk=1, d=64)
    keys = 2**25 + 3  # of 64 elements each, all in one place
    k = as_strided(q, (1, keys, 64), (0, 0, 4))
    values = as_strided(v, (1, keys, 64), (0, 0, 4))
    assert k.size > 2**31
    out = na.attention(q, k, values, window=(5, 0))
    np.testing.assert_allclose(out, np.broadcast_to(v, out.shape), rtol=1e-6)
    out, lse = na.attention(q[:, :1], k, values, return_lse=True)
    # 22,000 chunks of equal results are added up in float32, and round alike.
    np.testing.assert_allclose(out[0, 0], v[0, 0], rtol=1e-3)
    logit = float(q[0, 0].astype(float) @ q[0, 0].astype(float)) / 8
    np.testing.assert_allclose(lse, logit + np.log(keys), atol=1e-3)


@pytest.mark.slow
def test_bytes_beyond_2_to_the_32(native_dtype, tmp_path):
    """A file with holes, whose last rows lie beyond what 32 bits can count."""
    keys, d = 2**32 // (64 * native_dtype.itemsize) + 100, 64
    k = np.memmap(tmp_path / "k", native_dtype, "w+", shape=(1, keys, d))
    assert k.nbytes > 2**32
    rng = np.random.default_rng(0)
    last = rng.standard_normal((2, 1, 100, d)).astype(native_dtype)
    k[:, -100:] = last[0]
    q = rng.standard_normal((1, 70, d)).astype(native_dtype)
    options = {"is_causal": True, "window": (20, 0)}
    expected = na.attention(q, last[0], last[0], **options)
    np.testing.assert_array_equal(na.attention(q, k, k, **options), expected)
    one = na.attention(q[:, -1:], k, k, **options)
    np.testing.assert_array_equal(one, na.attention(q[:, -1:], last[0], last[0], **options))
