"""Promise: the error is at most twice that of plain NumPy in the same precision, plus one ulp."""

import math

import numattn as na
import numpy as np
import pytest
from checks import assert_close_to_reference, assert_within
from numattn import _runtime


def rows_to_judge_by(length):
    """Return a batch size that makes some thousand queries."""
    return -(-3000 // length)


LENGTHS = [1, 2, 3, 5, 7, 15, 16, 17, 31, 32, 33, 63, 64, 65, 95, 96, 97, 128, 193]


@pytest.mark.parametrize("length", LENGTHS)
def test_lengths(backend, arrays, length):
    assert_close_to_reference(*arrays(rows_to_judge_by(length), hq=1, lq=length, d=16))


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("lq", LENGTHS[::2])
@pytest.mark.parametrize("lk", LENGTHS[1::2])
def test_query_and_key_lengths(backend, arrays, lq, lk, is_causal):
    q, k, v = arrays(rows_to_judge_by(lq), hq=1, lq=lq, lk=lk, d=5)
    # With one query NumPy's BLAS sums the dot products in double.
    factor = 3 if lq == 1 else None
    assert_close_to_reference(q, k, v, is_causal=is_causal, factor=factor)


@pytest.mark.parametrize("d", [1, 2, 3, 5, 7, 8, 15, 16, 17, 31, 33, 63, 64, 65, 80, 128, 576])
def test_head_sizes(backend, arrays, d):
    for shape in ({"d": d}, {"d": d, "dv": 3}, {"d": 3, "dv": d}):
        assert_close_to_reference(*arrays(20, hq=2, lq=33, lk=70, **shape))


@pytest.mark.parametrize("amplitude", [0.1, 1.0, 8.0])
@pytest.mark.parametrize("options", [{}, {"is_causal": True}, {"softcap": 20.0}], ids=str)
def test_amplitudes(backend, arrays, amplitude, options):
    assert_close_to_reference(*arrays(hq=2, lq=150, lk=260, d=64, amplitude=amplitude), **options)


def test_many_keys_of_one_sign(backend, arrays):
    q, k, v = arrays(hq=1, lq=20, lk=20_000, d=8, amplitude=0.1)
    assert_close_to_reference(q, k, np.abs(v) + 1)


@pytest.mark.parametrize(("hq", "hkv"), [(4, 1), (4, 2), (6, 3), (12, 12)])
def test_grouped_heads(backend, arrays, hq, hkv):
    assert_close_to_reference(*arrays(40, hq=hq, hkv=hkv, lq=19, lk=40, d=12), is_causal=True)


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


@pytest.mark.parametrize("dtype", ["float64", "float16", "bfloat16"])
@pytest.mark.parametrize("is_causal", [False, True])
def test_other_dtypes(arrays, dtype, is_causal):
    if dtype == "bfloat16":
        dtype = pytest.importorskip("ml_dtypes").bfloat16
    q, k, v = (x.astype(dtype) for x in arrays(30, hq=4, hkv=2, lq=17, lk=40, d=24))
    assert_close_to_reference(q, k, v, is_causal=is_causal, window=(20, None))


def test_backends_agree(isa, arrays, monkeypatch):
    q, k, v = arrays(2, hq=4, hkv=2, lq=70, lk=130, d=33)
    options = {"is_causal": True, "softcap": 9.0, "sinks": [0.0, 1, 2, 3], "window": (50, None)}
    native, native_lse = na.attention(q, k, v, **options, return_lse=True)
    monkeypatch.setattr(_runtime, "attention_backend", _runtime._numpy_backend.attention)
    plain, plain_lse = na.attention(q, k, v, **options, return_lse=True)
    np.testing.assert_allclose(native, plain, rtol=0, atol=3e-6)
    np.testing.assert_allclose(native_lse, plain_lse, rtol=0, atol=3e-6)


def test_the_bound_can_be_missed():
    expected = np.array([1.0, 2.0])
    plain = np.array([1.0, 2.0], np.float32)
    assert_within(plain, plain, expected)
    with pytest.raises(AssertionError, match="error"):
        assert_within(plain + np.float32(1e-6), plain, expected)
    with pytest.raises(AssertionError, match="finite"):
        assert_within(np.array([math.nan, 2.0], np.float32), plain, expected)
