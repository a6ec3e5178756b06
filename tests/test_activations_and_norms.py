"""Promise: activations and norms are exact, on every level, in every dtype, and in NumPy."""

import itertools
import math

import numpy as np
import pytest
from checks import numbers
from layers import FUNCTIONS, norm_by_hand, normal_cdf
from numattn import _norms, _numpy_backend, _runtime

# Around the lanes of every level, and more than a work item.
SIZES = [0, 1, 2, 3, 5, 7, 15, 16, 17, 31, 32, 33, 63, 64, 65, 1000, 70_001]
EPS = {"float32": 2.0**-23, "float64": 2.0**-52, "float16": 2.0**-10, "bfloat16": 2.0**-7}


def values_of(name, a):
    """Compute the values in float64."""
    if name != "gelu_tanh":
        return FUNCTIONS[name](a) if a.size else a
    # The other formula cancels where tanh is near -1.
    return a / (1 + np.exp(-2 * math.sqrt(2 / math.pi) * (a + 0.044715 * a**3)))


def slopes_of(name, a):
    """Compute the slopes in float64."""
    if a.size == 0:
        return a
    if name == "relu":
        return (a > 0) * 1.0
    if name == "relu_squared":
        return 2 * np.maximum(a, 0)
    if name == "gelu":
        return normal_cdf(a) + a * np.exp(-a * a / 2) / math.sqrt(2 * math.pi)
    y, inner = a, 1.0
    if name == "gelu_tanh":
        y = 2 * math.sqrt(2 / math.pi) * (a + 0.044715 * a**3)
        inner = 2 * math.sqrt(2 / math.pi) * (1 + 3 * 0.044715 * a**2)
    sigmoid = 1 / (1 + np.exp(-y))
    return sigmoid + a * sigmoid / (1 + np.exp(y)) * inner


def values_and_slopes(name, a):
    """Return what a gradient of 1 shows."""
    values, slopes = np.empty((2, *a.shape), a.dtype)
    _runtime.computations.activate_back(name, np.ones_like(a), a, None, values, slopes, None)
    return values, slopes


def assert_near(actual, exact, size, dtype):
    """Check each element, which may be wrong by the epsilon of what is computed with, times `size`,
    and by one rounding to 16 bits."""
    allowed = EPS["float64" if dtype.itemsize == 8 else "float32"] * size + 1e-37  # not normal
    if dtype.itemsize == 2:
        allowed += EPS[dtype.name] / 2 * 1.01 * np.abs(exact) + 2.0**-25  # float16 has no less
    assert np.all(np.abs(actual.astype(np.float64) - exact) <= allowed)


# ---- activations -------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("gated", [False, True])
def test_activations(rng, dtype, name, gated):
    compute = _runtime.computations
    for size in SIZES:
        a, up, d = (3 * numbers(rng, 3, size, dtype=np.float64)).astype(dtype)
        times = up if gated else None
        out, hidden, d_a, d_times = np.empty((4, size), dtype)
        compute.activate(name, a, times, out)
        compute.activate_back(name, d, a, times, hidden, d_a, d_times if gated else None)
        wide_a, wide_up, wide_d = (x.astype(np.float64) for x in (a, up, d))
        if not gated:
            wide_up = np.ones(size)
        f, slope = values_of(name, wide_a), slopes_of(name, wide_a)
        exact = f * wide_up
        # What an exponential rounds grows with its exponent.
        digits = 6 + wide_a**2 + np.abs(wide_a) ** 3 / 5
        assert_near(out, exact, digits * np.abs(exact), dtype)
        assert_near(hidden, exact, digits * np.abs(exact), dtype)
        assert_near(d_a, wide_d * wide_up * slope, (30 + digits) * np.abs(wide_d * wide_up), dtype)
        if gated:
            assert_near(d_times, wide_d * f, digits * np.abs(wide_d * f), dtype)

        in_place = a.copy()
        compute.activate(name, in_place, times, in_place, 1)
        assert in_place.tobytes() == out.tobytes()
        in_place = d.copy()
        if gated:
            compute.activate_back(name, in_place, a, times, hidden, d_a, in_place, 1)
            assert in_place.tobytes() == d_times.tobytes()
        else:
            compute.activate_back(name, in_place, a, None, hidden, in_place, None, 1)
            assert in_place.tobytes() == d_a.tobytes()


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("name", ["gelu", "gelu_tanh", "silu"])
def test_activations_keep_digits(any_backend, dtype, name):
    """Also of small results; what an exponential rounds grows with its exponent."""
    far = {"gelu": 12, "gelu_tanh": 5, "silu": 80}[name]
    a = np.concatenate([np.linspace(-far, far, 4001), np.geomspace(1e-20, 1, 500)])
    a = np.concatenate([a, -a]).astype(dtype)
    values, slopes = values_and_slopes(name, a)
    wide = a.astype(np.float64)
    expected = values_of(name, wide)
    eps = np.finfo(dtype).eps
    allowed = (4 + wide**2) * eps * np.abs(expected)
    if name == "silu" and any_backend != "numpy":
        allowed = 5 * eps * np.abs(expected)
    normal = np.abs(expected) > np.finfo(dtype).tiny
    assert np.all(np.abs(values - expected)[normal] <= allowed[normal])
    slope = slopes_of(name, wide)
    np.testing.assert_allclose(slopes, slope, rtol=0, atol=(4 if name == "gelu" else 32) * eps)
    np.testing.assert_array_equal(values[a == 0], 0)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_activations_far_out(any_backend, name):
    a = np.array([-1e30, -100, 100, np.nan], np.float32)
    values, slopes = values_and_slopes(name, a)
    np.testing.assert_array_equal(values, [0, 0, 10000 if name == "relu_squared" else 100, np.nan])
    np.testing.assert_array_equal(slopes[:3], [0, 0, 200 if name == "relu_squared" else 1])


@pytest.mark.parametrize("name", FUNCTIONS)
def test_special_numbers_are_numpys(isa, name):
    for dtype in (np.float32, np.float64):
        big = np.finfo(dtype).max
        a = np.array([np.nan, np.inf, -np.inf, big, -big, 1e19, -1e19, 0.0, -0.0, 1e-40], dtype)
        values, slopes = values_and_slopes(name, a)
        expected, expected_slopes = np.empty((2, *a.shape), dtype)
        ones = np.ones_like(a)
        _numpy_backend.activate_back(name, ones, a, None, expected, expected_slopes, None)
        np.testing.assert_allclose(values, expected, rtol=1e-6, atol=1e-45)
        np.testing.assert_allclose(slopes, expected_slopes, rtol=1e-6, atol=1e-45)


# ---- norms -------------------------------------------------------------------------------------


@pytest.mark.parametrize("is_centred", [True, False])
def test_norms(rng, dtype, is_centred):
    for columns, with_bias in itertools.product(SIZES[1:-1], [True, False]):
        rows = 3 if columns != 33 else 2200  # three work items
        x, add, d = numbers(rng, 3, rows, columns, dtype=np.float64).astype(dtype)
        weight, bias = (1 + numbers(rng, 2, columns, dtype=np.float64) / 3).astype(dtype)
        norm = _norms.Norm(is_centred, 0.1, weight, bias if with_bias else None)
        total = x.astype(np.float64) + add.astype(np.float64)
        total = total.astype(np.float32).astype(dtype) if dtype.itemsize == 2 else x + add
        wide, wide_d, wide_weight = (y.astype(np.float64) for y in (total, d, weight))
        wide_bias = bias.astype(np.float64) * with_bias
        exact, back = norm_by_hand(wide, wide_weight, wide_bias, 0.1, is_centred)
        size = 8 * (1 + np.abs(exact) + np.abs(wide_bias))
        out = norm.apply(total, np.empty_like(x))
        assert_near(out, exact, size, dtype)
        # In place, and of a sum.
        in_place = total.copy()
        assert norm.apply(in_place, in_place) is in_place
        assert in_place.tobytes() == out.tobytes()
        kept = x.copy()
        of_sum = norm.apply(kept, np.empty_like(x), add=add)
        assert (kept.tobytes(), of_sum.tobytes()) == (total.tobytes(), out.tobytes())
        assert norm.apply(x, x, add=add).tobytes() == out.tobytes()

        found, one_thread = d.copy(), d.copy()
        sums = norm.take_back(found, total)
        expected, of_weight, of_bias = back(wide_d)
        assert_near(found, expected, 8 * (4 + np.abs(wide_d * wide_weight)), dtype)
        assert_near(sums[0], of_weight, rows * 4, dtype)
        assert (sums[1] is not None) == with_bias
        if with_bias:
            assert_near(sums[1], of_bias, rows * 4, dtype)
        again = norm._replace(num_threads=1).take_back(one_thread, total)
        assert one_thread.tobytes() == found.tobytes()
        for one, other in zip(again, sums, strict=True):
            assert one is other is None or one.tobytes() == other.tobytes()


@pytest.mark.parametrize("is_centred", [True, False])
def test_long_rows(rng, any_backend, is_centred):
    """The error of a sum does not grow with its terms."""
    x = rng.uniform(0.9, 1.1, (2, 200_000)).astype(np.float32)
    weight = np.ones(200_000, np.float32)
    exact, _ = norm_by_hand(x.astype(np.float64), 1.0, 0.0, 1e-5, is_centred)
    out = _norms.Norm(is_centred, 1e-5, weight).apply(x, np.empty_like(x))
    # Where the mean is large, its last digit is what is wrong.
    np.testing.assert_allclose(out, exact, rtol=4e-7, atol=2e-6 if is_centred else 0)


@pytest.mark.parametrize("is_centred", [True, False])
def test_a_norm_does_not_depend_on_its_neighbours(rng, any_backend, is_centred):
    """One of them is so large that its squares overflow."""
    norm = _norms.Norm(is_centred, 1e-5, np.ones(16, np.float32))
    rows, d = numbers(rng, 2, 40, 16)
    rows *= np.float32(1000)
    rows[:, 3] = 1e-38
    found = []
    for last in (1.0, 1e30):
        rows[-1] = np.arange(16) * np.float32(last)
        of_rows = d.copy()
        norm.take_back(of_rows, rows)
        found.append((norm.apply(rows, np.empty_like(rows))[:-1], of_rows[:-1]))
    for one, other in zip(*found, strict=True):
        assert np.isfinite(one).all()
        assert one.tobytes() == other.tobytes()


@pytest.mark.parametrize("is_centred", [True, False])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_rows_of_any_size(rng, any_backend, dtype, is_centred):
    exponents = [-60, 0, 47, 48, 49, 64, 127] if dtype == np.float32 else [-500, 490, 500, 1023]
    x = numbers(rng, 1, 37, dtype=dtype)
    x /= np.abs(x).max() * 1.01
    norm = _norms.Norm(is_centred, 0.0, np.ones(37, dtype))
    exact, back = norm_by_hand(x.astype(np.float64), 1.0, 0.0, 0.0, is_centred)
    d = numbers(rng, 1, 37, dtype=dtype)
    of_x, *_ = back(d.astype(np.float64))
    eps = np.finfo(dtype).eps
    for exponent in exponents:
        scaled, found = np.ldexp(x, exponent), d.copy()
        np.testing.assert_allclose(
            norm.apply(scaled, np.empty_like(x)), exact, rtol=4 * eps, atol=8 * eps
        )
        norm.take_back(found, scaled)
        tiny = np.ldexp(np.finfo(dtype).tiny, exponent) if exponent > 0 else 0
        np.testing.assert_allclose(np.ldexp(found, exponent), of_x, atol=64 * eps + tiny)


@pytest.mark.parametrize("is_centred", [True, False])
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_norms_of_what_is_not_finite(rng, isa, is_centred, bad):
    """As NumPy's: and other rows do not change."""
    x = numbers(rng, 3, 37)
    x[1, 5] = bad
    weight = np.ones(37, np.float32)
    out, expected = np.empty((2, *x.shape), x.dtype)
    _runtime.computations.normalize(x, None, weight, None, 1e-5, is_centred, out)
    _numpy_backend.normalize(x, None, weight, None, 1e-5, is_centred, expected)
    np.testing.assert_allclose(out, expected, rtol=1e-6, atol=1e-6)
    assert np.isnan(out[1, 5])
    assert np.isfinite(out[[0, 2]]).all()
