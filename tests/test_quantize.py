"""Promise: 8 bits cost what the documentation says, also where a channel of keys is large."""

import numattn as na
import numpy as np
import pytest


def cost(q, k, v, rounded):
    """Return the error of the result with such keys, as a share of the result."""
    expected = na.attention(*(x.astype(np.float64) for x in (q, k, v)))
    return np.linalg.norm(rounded - expected) / np.linalg.norm(expected)


@pytest.mark.parametrize("layout", ["bhld", "blhd"])
@pytest.mark.parametrize("factor", [30, 50])
def test_a_large_channel_of_keys(backend, rng, factor, layout):
    q = rng.standard_normal((32, 20, 128), dtype=np.float32)
    k, v = rng.standard_normal((2, 8, 300, 128), dtype=np.float32)
    k[..., 17] *= factor
    k8, k_scale = na.quantize_kv(k)
    assert cost(q, k, v, na.attention(q, k8, v, k_scale=k_scale)) > 0.08
    if layout == "bhld":
        k8, k_scale, channels = na.quantize_kv(k, channel_scale=True)
        out = na.attention(q * np.repeat(channels, 4, axis=-3), k8, v, k_scale=k_scale)
    else:
        ql, kl, vl = (x.swapaxes(0, 1) for x in (q, k, v))
        k8, k_scale, channels = na.quantize_kv(kl, channel_scale=True, layout=layout)
        scaled = ql * np.repeat(channels, 4, axis=-2)
        out = na.attention(scaled, k8, vl, k_scale=k_scale, layout=layout).swapaxes(0, 1)
    assert cost(q, k, v, out) < 0.01


@pytest.mark.parametrize("sharpness", [1, 3])
def test_what_8_bits_cost(backend, rng, sharpness):
    q = sharpness * rng.standard_normal((32, 20, 128), dtype=np.float32)
    k, v = rng.standard_normal((2, 8, 300, 128), dtype=np.float32)
    (k8, k_scale), (v8, v_scale) = na.quantize_kv(k), na.quantize_kv(v)
    out = na.attention(q, k8, v8, k_scale=k_scale, v_scale=v_scale)
    assert 0.005 < cost(q, k, v, out) < (0.01 if sharpness == 1 else 0.016)


@pytest.mark.parametrize("x", [(2, 3, 9, 5), (9, 5), (3, 0, 5), (3, 9, 0)])
@pytest.mark.parametrize("layout", ["bhld", "blhd"])
def test_factors_of_channels(dtype, rng, x, layout):
    x = rng.standard_normal(x).astype(dtype)
    x[..., 1:2] *= 100
    x[..., 3:4] = 0
    numbers, scale, channels = na.quantize_kv(x, channel_scale=True, layout=layout)
    tokens = -3 if layout == "blhd" and x.ndim > 2 else -2
    shape = list(x.shape)
    shape[tokens] = 1
    assert channels.shape == tuple(shape)
    assert channels.dtype == x.dtype
    assert numbers.shape == x.shape
    assert scale.shape == x.shape[:-1]
    if x.size == 0:
        return
    wide = channels.astype(np.float64)
    assert wide.min() >= 2.0**-24
    np.testing.assert_array_equal(wide.max(axis=-1), 1)
    back = numbers * scale[..., np.newaxis].astype(np.float64) * wide
    half_a_step = (0.5001 * scale[..., np.newaxis]) * wide
    assert np.all(abs(back - x.astype(np.float64)) <= half_a_step)
    sizes = abs(x.astype(np.float64)).max(axis=tokens, keepdims=True)
    close = (sizes / sizes.max(axis=-1, keepdims=True)) ** 0.85
    close = np.maximum(close, 2.0**-24)
    np.testing.assert_allclose(wide, close, rtol=2.0**-7, atol=2.0**-24)


@pytest.mark.parametrize("largest", [np.finfo(np.float32).max, 1e-45, 0.0])
def test_factors_of_extreme_numbers(largest):
    x = np.float32(largest) * np.array([[1, -1, 0], [0.5, 0, 0]], np.float32)
    numbers, scale, channels = na.quantize_kv(x, channel_scale=True)
    back = numbers * scale[..., np.newaxis] * channels
    assert np.isfinite(back).all()
    np.testing.assert_allclose(back, x, rtol=0.01, atol=1e-44)


def test_values_have_factors_too(backend, rng):
    """Theirs are multiplied into the result."""
    q, k, v = rng.standard_normal((3, 4, 50, 32), dtype=np.float32)
    v[..., 5] *= 200
    v8, v_scale, channels = na.quantize_kv(v, channel_scale=True)
    out = na.attention(q, k, v8, v_scale=v_scale) * channels
    expected = na.attention(q, k, v)
    error = np.linalg.norm(out - expected, axis=(0, 1)) / np.linalg.norm(expected, axis=(0, 1))
    assert error.max() < 0.02


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"channel_scale": 1}, TypeError, r"channel_scale: got 1 \(int\), expected True or False"),
        ({"channel_scale": None}, TypeError, "channel_scale: got None"),
        ({"layout": "lbhd"}, ValueError, "layout: got 'lbhd', expected one of 'bhld', 'blhd'"),
        ({"layout": 3}, TypeError, "layout: got int, expected a str"),
    ],
)
def test_bad_options(options, error, message):
    with pytest.raises(error, match=message):
        na.quantize_kv(np.zeros((2, 3)), **options)


def test_one_vector_has_no_tokens():
    assert na.quantize_kv(np.ones(3))[1].shape == ()
    with pytest.raises(
        ValueError, match=r"x: got shape \(3,\) with channel_scale, expected \(..., L, D\)"
    ):
        na.quantize_kv(np.ones(3), channel_scale=True)
    with pytest.raises(ValueError, match="x: got nan in the vector at"):
        na.quantize_kv(np.full((2, 3), np.nan), channel_scale=True)
