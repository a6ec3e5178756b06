"""Promise: the error is at most twice that of plain NumPy in the same precision, plus one ulp."""

import math

import numattn as na
import numpy as np
import pytest
from checks import assert_close_to_reference, assert_within
from numattn import _reference as reference
from numattn import _runtime


def rows_to_judge_by(length):
    """Return a batch size that makes some thousand queries."""
    return -(-3000 // length)


LENGTHS = [1, 2, 3, 5, 7, 15, 16, 17, 31, 32, 33, 63, 64, 65, 95, 96, 97, 128, 193]


@pytest.mark.parametrize("length", LENGTHS)
def test_lengths(dtype, arrays, length):
    assert_close_to_reference(*arrays(rows_to_judge_by(length), lq=length, d=16, dtype=dtype))


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("lq", LENGTHS[::2])
@pytest.mark.parametrize("lk", LENGTHS[1::2])
def test_query_and_key_lengths(backend, arrays, lq, lk, is_causal):
    q, k, v = arrays(rows_to_judge_by(lq), hq=1, lq=lq, lk=lk, d=5)
    # With one query NumPy's BLAS sums the dot products in double.
    factor = 3 if lq == 1 else None
    assert_close_to_reference(q, k, v, is_causal=is_causal, factor=factor)


@pytest.mark.parametrize("d", [1, 2, 3, 5, 7, 8, 15, 16, 17, 31, 33, 63, 64, 65, 80, 128, 576])
def test_head_sizes(dtype, arrays, d):
    for head_dim, dv in ((d, d), (d, 3), (3, d)):
        batch = max(2, 20 * 64 // max(d, 64)) + 80 // dv  # some thousand numbers
        q, k, v = arrays(batch, hq=2, lq=33, lk=70, d=head_dim, dv=dv, dtype=dtype)
        assert_close_to_reference(q, k, v)


@pytest.mark.parametrize("amplitude", [0.1, 1.0, 8.0])
@pytest.mark.parametrize("options", [{}, {"is_causal": True}, {"softcap": 20.0}], ids=str)
def test_amplitudes(dtype, arrays, amplitude, options):
    q, k, v = arrays(hq=2, lq=150, lk=260, d=64, amplitude=amplitude, dtype=dtype)
    assert_close_to_reference(q, k, v, **options)


@pytest.mark.parametrize("lq", [2, 20])
def test_many_keys_of_one_sign(dtype, arrays, lq):
    q, k, v = arrays(10 // lq + 1, lq=lq, lk=20_000, d=8, amplitude=0.1, dtype=dtype)
    assert_close_to_reference(q, k, np.abs(v) + dtype.type(1))


@pytest.mark.parametrize(("hq", "hkv"), [(4, 1), (4, 2), (6, 3), (12, 12)])
def test_grouped_heads(dtype, arrays, hq, hkv):
    q, k, v = arrays(40, hq=hq, hkv=hkv, lq=19, lk=40, d=12, dtype=dtype)
    assert_close_to_reference(q, k, v, is_causal=True)


@pytest.mark.parametrize(("hq", "hkv"), [(7, 1), (16, 1), (34, 2), (20, 20), (128, 1)])
@pytest.mark.parametrize("lq", [1, 2, 3, 5, 8, 15])
def test_few_queries_of_many_heads(dtype, arrays, hq, hkv, lq):
    """They fill the lanes of tiles together; chunks of keys are merged."""
    many = {"is_causal": True, "sinks": np.linspace(-1, 1, hq), "alibi_slopes": [0.05] * hq}
    for lk, options in ((33, {}), (1600, many)):
        q, k, v = arrays(hq=hq, hkv=hkv, lq=lq, lk=lk, d=9, dv=17, dtype=dtype)
        assert_close_to_reference(q, k, v, **options)


@pytest.mark.parametrize("heads", [1, 16, 128])
def test_values_that_are_part_of_the_keys(dtype, rng, heads):
    """As absorbed latent attention has them, against keys and values made for each head."""
    latent, rotary, size, tokens = 40, 8, 16, 1700
    k = rng.standard_normal((1, tokens, latent + rotary)).astype(dtype)
    q = rng.standard_normal((heads, 1, latent + rotary)).astype(dtype)
    assert_close_to_reference(q, k, k[..., :latent], scale=0.2)
    shared = na.attention(q, k, k[..., :latent])
    np.testing.assert_array_equal(na.attention(q, k, k[..., :latent].copy()), shared)

    to_key, to_value = rng.standard_normal((2, heads, size, latent)) / 6
    own = rng.standard_normal((heads, 1, size + rotary))
    stored = k[0].astype(np.float64)
    keys = np.einsum("hdc,tc->htd", to_key, stored[:, :latent])
    turned = np.broadcast_to(stored[:, latent:], (heads, tokens, rotary))
    plain, _ = reference.attention(
        own,
        np.concatenate([keys, turned], axis=-1),
        np.einsum("hdc,tc->htd", to_value, stored[:, :latent]),
    )
    q = np.concatenate([np.einsum("htd,hdc->htc", own[..., :size], to_key), own[..., size:]], -1)
    mixed = na.attention(q.astype(dtype), k, k[..., :latent], scale=own.shape[-1] ** -0.5)
    out = np.einsum("htc,hdc->htd", mixed.astype(np.float64), to_value)
    tolerance = {8: 1e-12, 4: 1e-5, 2: 3e-2 if dtype.name == "bfloat16" else 4e-3}[dtype.itemsize]
    np.testing.assert_allclose(out, plain, rtol=0, atol=tolerance)


def test_exp2_over_its_whole_range(isa):
    """All exponents, positive and negative, and the range of subnormal results densely."""
    bits = np.arange(0, 2**31, 997, dtype=np.int64).astype(np.int32)
    x = np.concatenate([bits.view(np.float32), -bits.view(np.float32)])
    dense = np.random.default_rng(3).uniform(-152, 129, 2_000_000).astype(np.float32)
    near_halves = (np.arange(-300, 260) / 2)[:, None] + np.linspace(-1e-4, 1e-4, 2001)
    x = np.concatenate([x, dense, near_halves.ravel().astype(np.float32)])
    x = x[np.isfinite(x)]
    y = np.empty_like(x)
    _runtime.native.exp2(x, y)
    with np.errstate(over="ignore", under="ignore"):
        exact = np.exp2(x.astype(np.float64))
        rounded = exact.astype(np.float32)
    overflow = ~np.isfinite(rounded)
    assert np.all(y[overflow] >= np.finfo(np.float32).max)
    ulp = np.spacing(rounded[~overflow]).astype(np.float64)
    assert np.max(np.abs(y[~overflow] - exact[~overflow]) / ulp) <= 2


def test_exp2_of_special_numbers(isa):
    x = np.array([0, -0.0, -np.inf, np.inf, np.nan, -1e38, -150.5, 1], np.float32)
    y = np.empty_like(x)
    _runtime.native.exp2(x, y)
    np.testing.assert_array_equal(y, np.array([1, 1, 0, np.inf, np.nan, 0, 0, 2], np.float32))


def test_softcap_where_it_bends(backend, rng):
    """One key and a sink of 0 make lse a function of the capped logit alone."""
    logits = np.concatenate([rng.uniform(-60, 60, 500), rng.uniform(-1, 1, 500)])
    logits = logits.astype(np.float32)
    q, one = logits[:, None], np.ones((1, 1), np.float32)
    for softcap in (0.7, 15.0, 50.0):
        options = {"softcap": softcap, "sinks": [0.0], "scale": 1.0}
        _, lse = na.attention(q, one, one, **options, return_lse=True)
        capped = softcap * np.tanh(logits.astype(np.float64) / softcap)
        np.testing.assert_allclose(lse, np.logaddexp(0, capped), rtol=4e-7, atol=1.5e-7)


def test_exp2_in_float64(isa):
    """Against long double, where that is longer."""
    rng = np.random.default_rng(3)
    x = np.concatenate([rng.uniform(-1, 1, 200_000), rng.uniform(-1080, 1024, 400_000)])
    y = np.empty_like(x)
    _runtime.native.exp2(x, y)
    exact = np.exp2(x.astype(np.longdouble))
    ulp = np.spacing(exact.astype(np.float64)).astype(np.longdouble)
    assert np.max(np.abs(y - exact) / ulp) <= 2
    special = np.array([0, -0.0, -np.inf, np.inf, np.nan, -1e300, -1074, 1, 1024])
    y = np.empty_like(special)
    _runtime.native.exp2(special, y)
    exact = [1, 1, 0, np.inf, np.nan, 0, np.finfo(np.float64).smallest_subnormal, 2, np.inf]
    np.testing.assert_array_equal(y, exact)


def test_float64_against_extended_precision(backend, arrays):
    if np.finfo(np.longdouble).eps >= np.finfo(np.float64).eps:
        pytest.skip("long double is no longer than float64 here")
    q, k, v = arrays(2, hq=4, hkv=2, lq=100, lk=300, d=64, dtype=np.float64)
    for options in ({}, {"is_causal": True}, {"softcap": 5.0}, {"alibi_slopes": [0.1, 0.2, 0, 1]}):
        expected, expected_lse = reference.attention(q, k, v, **options, dtype=np.longdouble)
        out, lse = na.attention(q, k, v, **options, return_lse=True)
        assert np.max(np.abs(out - expected)) <= 1e-12 * np.max(np.abs(expected))
        assert np.max(np.abs(lse - expected_lse)) <= 1e-12 * np.max(np.abs(expected_lse))


def test_16_bit_floats_are_rounded_like_a_cast(dtype):
    """One key: its value passes through float32 unchanged, subnormal numbers included."""
    if dtype.itemsize != 2:
        pytest.skip("16-bit floats alone")
    v = np.arange(2**16, dtype=np.uint16).view(dtype)
    with np.errstate(invalid="ignore"):
        v = v[np.isfinite(v.astype(np.float32))]
    for rows in (1, 9):
        q, k = np.ones((rows, 1), dtype), np.ones((1, 1), dtype)
        out = na.attention(q, k, v[np.newaxis])
        for row in out:
            normal = np.abs(v.astype(np.float64)) >= float(np.finfo(np.float32).tiny)
            np.testing.assert_array_equal(row[normal], v[normal])
            # The instruction of avx512_bf16 takes subnormal numbers for 0.
            difference = row[~normal].astype(np.float64) - v[~normal].astype(np.float64)
            assert np.abs(difference).max(initial=0) <= float(np.finfo(np.float32).tiny)


def test_overflow_of_float16_gives_infinity(backend):
    """The weighted sum of what fits does not overflow; a cast of the float32 result may."""
    largest = np.finfo(np.float16).max
    v = np.full((100, 5), largest)
    q, k = np.zeros((20, 4), np.float16), np.zeros((100, 4), np.float16)
    np.testing.assert_array_equal(na.attention(q, k, v), np.full((20, 5), largest))
    v[3, 2], v[4, 1] = np.inf, -np.inf
    out = na.attention(q, k, v)
    assert np.all(out[:, 2] == np.inf)
    assert np.all(out[:, 1] == -np.inf)
    assert np.isfinite(out[:, [0, 3, 4]]).all()


def test_backends_agree(isa, arrays, monkeypatch):
    q, k, v = arrays(2, hq=4, hkv=2, lq=70, lk=130, d=33)
    options = {"is_causal": True, "softcap": 9.0, "sinks": [0.0, 1, 2, 3], "window": (50, None)}
    native, native_lse = na.attention(q, k, v, **options, return_lse=True)
    monkeypatch.setattr(_runtime, "computations", _runtime._numpy_backend)
    plain, plain_lse = na.attention(q, k, v, **options, return_lse=True)
    np.testing.assert_allclose(native, plain, rtol=0, atol=3e-6)
    np.testing.assert_allclose(native_lse, plain_lse, rtol=0, atol=3e-6)


def test_the_bound_can_be_missed():
    expected = np.array([1.0, 2.0])
    plain = np.array([1.0, 2.0], np.float32)
    assert_within(plain, [plain], expected)
    with pytest.raises(AssertionError, match="error"):
        assert_within(plain + np.float32(1e-6), [plain], expected)
    with pytest.raises(AssertionError, match="finite"):
        assert_within(np.array([math.nan, 2.0], np.float32), [plain], expected)
