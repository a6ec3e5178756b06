"""Promise: NumPy's error state changes nothing. No call raises, and the bits are the same."""

import numattn as na
import numpy as np
import pytest
from numattn import plot

KINDS = {
    "huge": [3e38, -3e38, 1e38, 1.0],
    "overflowing": [1e30, -1e30, 1e20, -1e25],
    "tiny": [1e-38, -1e-30, 2e-38, 1e-25],
    "subnormal": [1e-45, -1e-40, 1e-42, 1e-39],
    "zero": [0.0, -0.0, 0.0, 1.0],
    "mixed": [3e38, 1e-45, 0.0, -1.0],
    "infinite": [np.inf, -np.inf, 1.0, -1.0],
    "nan": [np.nan, 0.0, 1.0, -1.0],
}


def numbers(rng, shape, kind, dtype):
    """Return random picks of a kind; scaled into the range of float16 and of float64."""
    with np.errstate(all="ignore"):
        x = rng.choice(KINDS[kind], shape) * rng.choice([1, 0.5, 0.3], shape)
        if dtype == np.float16:
            x = np.sign(x) * np.abs(x) ** 0.125
        if dtype == np.float64:
            x = np.sign(x) * np.abs(x) ** 8
        return x.astype(dtype)


def finite(x):
    """Replace what 8 bits with a scale of float32 cannot hold."""
    with np.errstate(all="ignore"):
        wide = x.astype(np.float64)
        return np.where(np.abs(wide) < 3.3e38, wide, 1.0).astype(x.dtype)


def sequences(q, k, v):
    return [np.ascontiguousarray(x[0].swapaxes(0, 1)) for x in (q, k, v)]


def values_of_8_bits(q, k, v):
    numbers, scale = na.quantize_kv(finite(v))
    return na.aggregate_values(np.repeat(k[..., :1], 8, axis=-1), numbers, v_scale=scale)


def paged(q, k, v):
    pages = [x[0].swapaxes(0, 1).reshape(2, 4, 2, 6) for x in (k, v)]
    return na.attention_paged(q[:1], *pages, [[1, 0]], [7])


def chosen_pages(q, k, v):
    k_pages, v_pages = (x.reshape(8, 2, 2, 6) for x in (k, v))
    bounds = na.PageBounds(8, 2, 2, 6, q.dtype)
    table = np.arange(8)[np.newaxis]
    bounds.update(k_pages, table, [15])
    out = bounds.attend(q[:1, :, :1], k_pages, v_pages, table, [15], 4, scale=-0.5)
    return out, bounds.largest, bounds.least


def quantized(q, k, v):
    (k, k_scale), (v, v_scale) = (na.quantize_kv(finite(x)) for x in (k, v))
    return na.attention(q, k, v, k_scale=k_scale, v_scale=v_scale), k, k_scale, v, v_scale


def cached(q, k, v, **options):
    cache = na.KVCache(2, 2, 6, dtype=q.dtype, **options)
    cache.append(k, v)
    return cache.attend(q)


def gradients(q, k, v, **more):
    bias = k[:, :, :5, :1] * np.ones(8, k.dtype)
    (out, lse), vjp = na.attention_vjp(
        q, k, v, bias=bias, bias_gradient=True, return_lse=True, **OPTIONS, **more
    )
    return out, *vjp(out, lse)


def merged(q, k, v):
    out, lse = na.attention(q, k, v, return_lse=True)
    return na.merge_states([(out, lse), (out[::-1], lse[::-1])])


OPTIONS = {
    "is_causal": True,
    "softcap": 5.0,
    "alibi_slopes": [0.5, 0.1],
    "sinks": [0.0, -np.inf],
    "window": (3, 1),
}
CALLS = {
    "attention": lambda q, k, v: na.attention(q, k, v, return_lse=True),
    "attention with options": lambda q, k, v: na.attention(q, k, v, **OPTIONS, return_lse=True),
    "attention with a scale": lambda q, k, v: na.attention(q, k, v, scale=1e30),
    "bias": lambda q, k, v: na.attention(q, k, v, bias=k[:, :, :5, :1] * np.ones(8, k.dtype)),
    "quantized": quantized,
    "varlen": lambda q, k, v: na.attention_varlen(*sequences(q, k, v), [0, 2, 5], [0, 4, 8]),
    "paged": paged,
    "chosen pages": chosen_pages,
    "qk_scores": lambda q, k, v: na.qk_scores(q, k, softcap=5.0),
    "attention_weights": lambda q, k, v: na.attention_weights(q, k),
    "attention_received": lambda q, k, v: na.attention_received(q, k),
    "aggregate_values": lambda q, k, v: na.aggregate_values(np.repeat(k[..., :1], 8, axis=-1), v),
    "aggregate_values of 8 bits": values_of_8_bits,
    "masked_softmax": lambda q, k, v: na.masked_softmax(k, np.arange(6) != 2),
    "merge_states": merged,
    "gradients": gradients,
    "gradients with dropout": lambda *qkv: gradients(*qkv, dropout=0.4, rng=2**64 - 1),
    "cache": cached,
    "quantized cache": lambda q, k, v: cached(q, finite(k), finite(v), quantize=True),
    "rotary": lambda q, k, v: na.rotary_embedding(q),
    "html_page": lambda q, k, v: plot.html_page(np.abs(finite(k))[0, :, :6], list("abcdef")),
}


@pytest.mark.parametrize("name", CALLS)
def test_error_state(dtype, rng, name):
    for kind in KINDS:
        q, k, v = (numbers(rng, (2, 2, n, 6), kind, dtype) for n in (5, 8, 8))
        with np.errstate(all="ignore"):
            expected = CALLS[name](q, k, v)
        with np.errstate(all="raise"):
            actual = CALLS[name](q, k, v)
        for a, b in zip(
            *(x if isinstance(x, tuple) else (x,) for x in (actual, expected)), strict=True
        ):
            same = a == b if isinstance(a, str) else a.tobytes() == b.tobytes()
            assert same, f"{kind} numbers"
