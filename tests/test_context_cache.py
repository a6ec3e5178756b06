"""Promise: a layer's `ContextCache` gives what the context gives, which it was made of."""

import copy
import pickle

import numattn as na
import numpy as np
import pytest
from checks import numbers
from layers import by_hand, fill

BIAS = np.random.default_rng(5).standard_normal((2, 4, 4, 6)).astype(np.float32)
MASK = BIAS > -0.5


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize(
    "sizes",
    [
        {},
        {"kv_heads": 2, "head_dim": 10, "value_dim": 7, "context_dim": 10},
        {"qk_norm": True, "kv_heads": 1, "bias": False, "context_dim": (10, 14)},
    ],
    ids=str,
)
def test_against_float64(any_backend, rng, sizes, dtype):
    layer = fill(na.MultiHeadAttention(24, 4, **sizes, dtype=dtype, rng=1), rng)
    x = numbers(rng, 2, 4, 24, dtype=dtype)
    keys, values = (numbers(rng, 2, 6, dim, dtype=dtype) for dim in layer.context_dim)
    context = (keys, values) if "bias" in sizes else keys
    values = values if "bias" in sizes else keys
    cache = layer.context_cache(context)
    expected = by_hand(layer.parameters(), x, keys, values, 4, layer.kv_heads)
    np.testing.assert_allclose(
        layer(x, cache), expected, rtol=0, atol=2e-5 if dtype == "float32" else 1e-12
    )
    for options in (
        {},
        {"is_causal": True},
        {"window": (2, 1), "softcap": 2.0, "scale": 0.7},
        {"mask": MASK, "bias": BIAS, "sinks": [1.0, 0.0, -1.0, 2.0]},
        {"alibi_slopes": [0.1, 0.2, 0.3, 0.4], "num_threads": 1},
        {"tail_mask": MASK[..., :3]},
    ):
        of_cache = layer(x, cache, **options, return_weights=True)
        for ours, theirs in zip(
            of_cache, layer(x, context, **options, return_weights=True), strict=True
        ):
            np.testing.assert_array_equal(ours, theirs)
        np.testing.assert_array_equal(layer(x, cache, **options), of_cache[0])


@pytest.mark.parametrize("lengths", [[6, 3], [0, 6], 4])
def test_lengths(any_backend, rng, lengths):
    layer = fill(na.MultiHeadAttention(24, 4, qk_norm=True, rng=1), rng)
    x, context = numbers(rng, 2, 4, 24), numbers(rng, 2, 6, 24)
    for i, n in enumerate(np.broadcast_to(lengths, 2)):
        context[i, n:] = np.nan
    cache = layer.context_cache(context, lengths)
    assert cache.lengths.tolist() == np.broadcast_to(lengths, 2).tolist()
    for options in ({}, {"mask": MASK}, {"bias": BIAS}):
        out = layer(x, cache, **options)
        np.testing.assert_array_equal(out, layer(x, context, lengths=lengths, **options))
        assert np.isfinite(out).all()
    one = layer(x[:, :1], cache, is_causal=True, window=(2, 0))  # the last token
    np.testing.assert_array_equal(
        one, layer(x[:, :1], context, lengths=lengths, is_causal=True, window=(2, 0))
    )


@pytest.mark.parametrize(
    ("of_x", "of_context"),
    [((), ()), ((3,), ()), ((), (3,)), ((2, 1), (3,)), ((3,), (1,)), ((0,), (1,))],
)
def test_leading_axes_broadcast(any_backend, rng, of_x, of_context):
    layer = fill(na.MultiHeadAttention(24, 4, context_dim=10, rng=1), rng)
    x, context = numbers(rng, *of_x, 4, 24), numbers(rng, *of_context, 6, 10)
    lengths = np.arange(1, 1 + int(np.prod(of_context))).reshape(of_context)
    for own in (None, lengths):
        cache = layer.context_cache(context, own)
        expected = layer(x, context, lengths=own)
        np.testing.assert_array_equal(layer(x, cache), expected)


def test_many_steps_multiply_the_context_once(rng, monkeypatch):
    layer = na.MultiHeadAttention(24, 4, context_dim=10, rng=1)
    context = numbers(rng, 2, 600, 10)
    products = []
    original = na.MultiHeadAttention._product

    def product(self, name, x, *rest):
        products.append((name, x.size))
        return original(self, name, x, *rest)

    monkeypatch.setattr(na.MultiHeadAttention, "_product", product)
    cache = layer.context_cache(context)
    for _ in range(3):
        layer(numbers(rng, 2, 1, 24), cache)
    assert sum(size for name, size in products if name in ("k", "v")) == 2 * context.size
    assert sum(size for name, size in products if name == "q") == 3 * 2 * 24


def test_it_is_a_copy(rng):
    layer = na.MultiHeadAttention(24, 4, rng=1)
    x, context = numbers(rng, 2, 4, 24), numbers(rng, 2, 6, 24)
    lengths = np.array([6, 3])
    cache = layer.context_cache(context, lengths)
    expected = layer(x, cache)
    context[...] = lengths[...] = 0
    layer.parameters()["k_weight"][...] = 0
    np.testing.assert_array_equal(layer(x, cache), expected)
    for other in (copy.copy(cache), copy.deepcopy(cache), pickle.loads(pickle.dumps(cache))):
        np.testing.assert_array_equal(layer(x, other), expected)


def test_what_it_tells(rng):
    layer = fill(na.MultiHeadAttention(24, 4, kv_heads=2, value_dim=5, context_dim=10, rng=1), rng)
    context = numbers(rng, 3, 6, 10)
    cache = layer.context_cache(context, [6, 5, 0])
    p = layer.parameters()
    for x, name, dim in ((cache.k, "k", 6), (cache.v, "v", 5)):
        rows = context @ p[f"{name}_weight"] + p[f"{name}_bias"]
        expected = rows.reshape(3, 6, 2, dim).swapaxes(1, 2)
        np.testing.assert_allclose(x, expected, rtol=0, atol=1e-6)
    assert cache.nbytes == cache.k.nbytes + cache.v.nbytes
    for x in (cache.k, cache.v, cache.lengths):
        with pytest.raises(ValueError, match="read-only"):
            x[...] = 0
    sizes = "ContextCache(kv_heads=2, head_dim=6, value_dim=5, dtype=float32): 6 tokens"
    assert repr(cache) == f"{sizes}, lengths [6, 5, 0]"
    assert repr(layer.context_cache(context)) == sizes
    assert layer.context_cache(context).lengths is None
    layer(numbers(rng, 3, 4, 24), cache)  # after its views became read-only


def test_what_does_not_fit(rng):
    layer = na.MultiHeadAttention(24, 4, rng=0)
    rotary = na.MultiHeadAttention(24, 4, rotary=True, rng=0)
    x = numbers(rng, 2, 5, 24)
    cache, of_three = layer.context_cache(x), layer.context_cache(x[[0, 0, 0]])
    padded = layer.context_cache(x, [5, 2])
    grouped = na.MultiHeadAttention(24, 4, kv_heads=2).context_cache(x)
    double = na.MultiHeadAttention(24, 4, dtype="float64").context_cache(x.astype(float))
    for call, error, message in (
        (lambda: layer.context_cache(None), TypeError, "context: got None, expected an array"),
        (lambda: layer.context_cache(cache), TypeError, "context: got ContextCache, expected an"),
        (lambda: layer.context_cache(x[0, 0]), ValueError, "context: got shape (24,), expected"),
        (lambda: layer.context_cache((x, x, x)), ValueError, "context: got 3 arrays, expected one"),
        (lambda: layer.context_cache(x, 6), ValueError, "lengths: got 6, expected 0 to 5"),
        (lambda: layer.context_cache(x, [1, 2, 3]), ValueError, "lengths: got shape (3,), expecte"),
        (
            lambda: layer.context_cache((x, x[[0, 0, 0]])),
            ValueError,
            "context: got leading axes (2,) of keys and (3,) of values",
        ),
        (lambda: rotary.context_cache(x), ValueError, "context: got an array for a rotary layer"),
        (
            lambda: rotary(x, cache),
            ValueError,
            "context: got a ContextCache for a rotary layer, expected None",
        ),
        (lambda: layer(x, of_three), ValueError, "context: got leading axes (3,) of keys and (3,)"),
        (
            lambda: layer(x, grouped),
            ValueError,
            "context: got kv_heads, head_dim and value_dim (2, 6, 6), expected (4, 6, 6), as in",
        ),
        (lambda: layer(x, double), TypeError, "context: got dtype float64, expected float32, the "),
        (
            lambda: layer(x, cache, lengths=3),
            TypeError,
            "lengths: got numbers with a ContextCache",
        ),
        (lambda: layer(x, cache, positions=[0]), TypeError, "positions: got an array, expected No"),
        (lambda: layer(x, cache, scale="1"), TypeError, "scale: got '1' (str), expected a real"),
        (lambda: layer(x, padded, is_causal=True), ValueError, "lengths: got lengths of the conte"),
        (lambda: layer(x[..., :3], cache), ValueError, "x: got shape (2, 5, 3), expected"),
        (
            lambda: layer(x, cache, cache=layer.new_cache(2)),
            TypeError,
            "context: got ContextCache with",
        ),
        (lambda: layer(x, (cache, cache)), TypeError, "context: got ContextCache, expected an arr"),
    ):
        with pytest.raises(error) as raised:
            call()
        assert message in str(raised.value)
