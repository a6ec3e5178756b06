"""Promise: finite values give finite results; NaN and infinity show where they are attended to."""

import sys

import numattn as na
import numpy as np
import pytest
from numattn import _reference as reference


def limits(dtype):
    """Return the largest number of a dtype, its eps, and the eps of what it is computed in."""
    finfo = np.finfo
    if dtype.name == "bfloat16":
        import ml_dtypes

        finfo = ml_dtypes.finfo
    precision = np.float64 if dtype == np.float64 else np.float32
    return finfo(dtype).max, float(finfo(dtype).eps), float(np.finfo(precision).eps)


@pytest.mark.parametrize("keys", [1, 2, 3, 50, 1000, 5000])
@pytest.mark.parametrize("share", [1.0, 0.25])
def test_equal_keys_of_the_largest_value(dtype, keys, share):
    largest, eps, inner_eps = limits(dtype)
    value = dtype.type(float(largest) * share)
    q, k = np.zeros((1, 7, 4), dtype), np.zeros((1, keys, 4), dtype)
    v = np.full((1, keys, 3), value, dtype)
    v[..., 1] *= -1
    v[:, keys // 2 :, 2] *= -1
    out = na.attention(q, k, v).astype(np.longdouble)
    mean = v.astype(np.longdouble).mean(axis=1, keepdims=True)
    assert np.isfinite(out).all()
    allowed = (eps + 4 * keys * inner_eps) * np.longdouble(value)
    np.testing.assert_array_less(abs(out - mean), allowed)


@pytest.mark.parametrize("dim", [1, 16, 40])
@pytest.mark.parametrize("queries", [1, 20])
def test_dot_products_up_to_the_largest_number(dtype, queries, dim):
    """Finite logits give finite results; beyond, -inf has no weight, and inf gives NaN."""
    precision = np.float64 if dtype == np.float64 else np.float32
    largest = limits(dtype)[0]
    size = 0.99 * np.sqrt(float(np.finfo(precision).max) / dim)
    q = np.full((1, queries, dim), min(size, float(largest))).astype(dtype)
    k = np.concatenate([q[:, :1], -q[:, :1], q[:, :1], 0 * q[:, :1]], axis=1)
    v = np.array([[1, 2, 3, 4]]).reshape(1, 4, 1).astype(dtype)
    out, lse = na.attention(q, k, v, return_lse=True)
    np.testing.assert_allclose(out.astype(float), 2)
    assert np.isfinite(lse).all()
    if dtype == np.float16:
        return  # none is beyond
    beyond = k[:, 1:2] * dtype.type(4)
    far = np.concatenate([beyond, k[:, 3:]], axis=1)
    np.testing.assert_array_equal(na.attention(q, far, v[:, 2:]).astype(float), 4)
    assert not na.attention(q, beyond, v[:, :1]).any()
    far[:, 0] *= -1
    assert np.isnan(na.attention(q, far, v[:, 2:]).astype(float)).all()


@pytest.mark.parametrize("options", [{}, {"is_causal": True}, {"sinks": [0.5, -1, 2, 3]}], ids=str)
@pytest.mark.parametrize("lq", [1, 6, 30])
def test_mean_of_large_values(dtype, arrays, rng, lq, options):
    largest, eps, inner_eps = limits(dtype)
    q, k, v = arrays(2, hq=4, hkv=1, lq=lq, lk=60, d=16, amplitude=2, dtype=dtype)
    v = (rng.choice([-1, 1], v.shape) * np.longdouble(largest)).astype(dtype)
    expected, _ = reference.attention(q, k, v, **options, dtype=np.longdouble)
    out = na.attention(q, k, v, **options)
    assert np.isfinite(out).all()
    error = abs(out.astype(np.longdouble) - expected).max() / np.longdouble(largest)
    assert error <= eps + 40 * inner_eps


@pytest.mark.parametrize("states", [2, 3, 7, 1000])
def test_merged_states_of_the_largest_value(dtype, states):
    largest, eps, inner_eps = limits(dtype)
    out = np.full((states, 5, 2), largest, dtype)
    out[..., 1] *= -1
    lse = np.full((states, 5), 3.0)
    merged, _ = na.merge_states(zip(out, lse, strict=True))
    expected = out[0].astype(np.longdouble)
    allowed = (eps + states * inner_eps) * np.longdouble(largest)
    np.testing.assert_array_less(abs(merged.astype(np.longdouble) - expected), allowed)
    out[1, 2, 0], out[0, 3, 1] = np.inf, np.nan
    merged, _ = na.merge_states(zip(out, lse, strict=True))
    assert merged[2, 0] == np.inf
    assert np.isnan(merged[3, 1])
    assert np.isfinite(merged).sum() == merged.size - 2


def test_merged_states_may_write_into_one_of_them():
    out = np.full((2, 4), np.finfo(np.float32).max)
    na.merge_states([(out, np.zeros(2)), (out.copy(), np.zeros(2))], out=out)
    np.testing.assert_array_equal(out, np.finfo(np.float32).max)


def test_rounding_of_the_largest_numbers_to_8_bits():
    largest = np.finfo(np.float32).max
    numbers, scale = na.quantize_kv(np.array([[largest, -largest, 0], [1, 2, 3]], np.float32))
    back = numbers * scale[:, np.newaxis]
    assert np.isfinite(back).all()
    np.testing.assert_allclose(back[0], [largest, -largest, 0], rtol=1e-6)


def weighted_sum(weights, v, attend):
    """Add up what is attended to, one key after another."""
    with np.errstate(invalid="ignore"):
        terms = np.where(attend[..., np.newaxis], weights[..., np.newaxis] * v[..., None, :, :], 0)
        return terms.sum(axis=-2)


SPECIAL = [np.nan, np.inf, -np.inf]


@pytest.mark.parametrize("special", [SPECIAL, [np.inf], [-np.inf], [np.nan]], ids=str)
def test_attended_values_show_with_their_sign(dtype, arrays, rng, special):
    q, k, v = arrays(2, hq=4, hkv=2, lq=20, lk=60, d=8, dtype=dtype)
    v[rng.random(v.shape) < 0.1] = 0
    where = rng.random(v.shape) < 0.04
    v[where] = rng.choice(special, where.sum()).astype(dtype)
    mask = rng.random((20, 60)) < 0.3
    expected, _ = reference.attention(q, k, v, mask=mask, dtype=np.float64)
    out = na.attention(q, k, v, mask=mask).astype(np.float64)
    for kind in (np.isnan, np.isposinf, np.isneginf):
        np.testing.assert_array_equal(kind(out), kind(expected))
    finite = np.isfinite(expected)
    assert 0 < finite.sum() < finite.size
    np.testing.assert_allclose(out[finite], expected[finite], rtol=0, atol=10 * limits(dtype)[1])


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_weights_of_any_sign(rng, dtype):
    weights = rng.standard_normal((2, 4, 20, 30)).astype(dtype)
    weights[rng.random(weights.shape) < 0.8] = 0
    weights[0, 0, :, 0] = np.nan
    v = rng.standard_normal((2, 2, 30, 8)).astype(dtype)
    where = rng.random(v.shape) < 0.1
    v[where] = rng.choice(SPECIAL, where.sum())
    out = na.aggregate_values(weights, v)
    wide = np.repeat(v, 2, axis=1).astype(np.float64)
    expected = weighted_sum(weights.astype(np.float64), wide, weights != 0)
    assert np.isposinf(expected).any()
    assert np.isneginf(expected).any()
    np.testing.assert_allclose(out, expected, rtol=0, atol=40 * np.finfo(dtype).eps)


def test_weights_whose_sum_overflows():
    """They are the caller's: nothing says that the result is a mean."""
    v = np.full((2, 1), np.finfo(np.float32).max)
    assert na.aggregate_values(np.ones((1, 2), np.float32), v) == np.inf
    assert na.aggregate_values(-np.ones((1, 2), np.float32), v) == -np.inf


def test_infinite_weights_of_infinite_values(dtype):
    """What a sum of products gives, but that a weight of 0 takes nothing."""
    numbers = np.array([-np.inf, -2, 0, 3, np.inf, np.nan])
    weights, v = (x.ravel() for x in np.meshgrid(numbers, numbers))
    with np.errstate(all="ignore"):
        expected = np.where(weights == 0, 0, weights * v)
    w3 = weights.reshape(-1, 1, 1).astype(dtype)
    out = na.aggregate_values(w3, v.reshape(-1, 1, 1).astype(dtype))
    np.testing.assert_array_equal(out.ravel().astype(float), expected)
    # Beside others, of which the sum of all is known; the second column is finite.
    for weights, values, sums in (
        ([np.inf, 1, 0], [np.inf, 1, np.nan], [np.inf, np.inf]),
        ([np.inf, 2, 1], [-np.inf, 1, 1], [-np.inf, np.inf]),
        ([np.inf, 1, 1], [np.inf, -np.inf, 1], [np.nan, np.inf]),
        ([1, np.inf, 1], [np.inf, -3, 1], [np.nan, np.inf]),
        ([1, np.inf, 1], [np.inf, 3, 1], [np.inf, np.inf]),
    ):
        v = np.stack([values, np.ones(3)], axis=-1).astype(dtype)
        out = na.aggregate_values(np.array([weights], dtype), v)
        np.testing.assert_array_equal(out.astype(float), [sums])


def calls_of(function):
    """Return how many functions are called meanwhile, those of NumPy included."""
    count = 0

    def see(frame, event, argument):
        nonlocal count
        count += event in ("call", "c_call")

    sys.setprofile(see)
    try:
        function()
    finally:
        sys.setprofile(None)
    return count


@pytest.mark.thread_unsafe
@pytest.mark.parametrize("bad", SPECIAL)
def test_padding_that_is_no_number_is_not_taken_key_by_key(rng, bad):
    """The same steps for 4 such keys as for 4000."""
    weights = rng.random((2, 6, 4096), dtype=np.float32)
    counts = []
    for keys in (4, 4000):
        v = rng.standard_normal((2, 4096, 4), dtype=np.float32)
        v[:, 4096 - keys :] = bad
        for masked in (True, False):
            w = weights.copy()
            if masked:
                w[..., 4096 - keys :] = 0
            counts.append(calls_of(lambda v=v, w=w: na.aggregate_values(w, v)))
    assert max(counts) < 3 * min(counts)
    assert counts[:2] == counts[2:]
