"""Promise: `MultiHeadAttention.vjp` gives the layer's result and its gradients."""

import inspect
import tracemalloc
from concurrent.futures import ThreadPoolExecutor

import numattn as na
import numpy as np
import pytest
from checks import numbers
from layers import fill


def make(rng, *sizes, dtype="float64", **options):
    """Return a layer whose biases and norms have numbers that show."""
    return fill(na.MultiHeadAttention(*sizes, **options, dtype=dtype, rng=1), rng)


def in_dtype(layer, dtype, sizes, **options):
    """Return a layer with the same parameters in another dtype."""
    other = na.MultiHeadAttention(*sizes, **options, dtype=dtype)
    for name, x in other.parameters().items():
        x[...] = layer.parameters()[name]
    return other


def flat(gradients):
    """Return all gradients by name."""
    context = gradients.context
    pair = context if isinstance(context, tuple) else (context,)
    named = {f"context {i}": x for i, x in enumerate(pair) if x is not None}
    of_options = {"bias": gradients.bias, "sinks": gradients.sinks}
    named |= {name: x for name, x in of_options.items() if x is not None}
    return {"x": gradients.x, **named, **gradients.parameters}


# ---- the derivative ----------------------------------------------------------------------------

MASK = np.array([[1, 0, 1, 1], [0, 0, 0, 0], [1, 1, 0, 1], [1, 1, 1, 1]], bool)
YARN = {
    "type": "yarn", "factor": 8.0, "original_max_position_embeddings": 3, "beta_fast": 1,
    "beta_slow": 0.1,
}  # fmt: skip
ROPE = {
    "linear": {"type": "linear", "factor": 3.0},
    "proportional": {"type": "proportional", "partial_rotary_factor": 0.5, "factor": 2.0},
    "dynamic": {"type": "dynamic", "factor": 4.0, "max_position_embeddings": 2},
    "yarn": YARN,
    "longrope": {
        "type": "longrope", "short_factor": [1.0, 2.0], "long_factor": [2.0, 3.0], "factor": 4.0,
        "original_max_position_embeddings": 2,
    },
    "llama3": {"type": "llama3"},
}  # fmt: skip
PLAIN = [(2, 4, 4)]  # x alone
OWN = np.random.default_rng(11)
BIAS = OWN.standard_normal((2, 2, 4, 4))
SINKS = np.array([0.5, -0.7])
CASES = {
    # What the layer has, what x and the context are, and the options of the call.
    "plain": ({}, PLAIN, {}),
    "no bias": ({"bias": False}, PLAIN, {}),
    "no batch": ({}, [(4, 4)], {"is_causal": True}),
    "two leading axes": ({"qk_norm": True}, [(2, 1, 3, 4)], {}),
    "causal": ({}, PLAIN, {"is_causal": True}),
    "window": ({}, PLAIN, {"window": (1, 1)}),
    "softcap": ({}, PLAIN, {"softcap": 0.8, "window": (None, 1)}),
    "mask": ({}, PLAIN, {"mask": MASK}),
    "mask of the batch": (
        {"qk_norm": True, "rotary": True}, PLAIN, {"mask": np.stack([MASK, MASK.T])[:, np.newaxis]}
    ),
    "tail mask": ({}, PLAIN, {"tail_mask": MASK[:, 1:], "lengths": [4, 3]}),
    "lengths": ({}, PLAIN, {"lengths": [4, 2]}),
    "lengths, causal": (
        {"rotary": True, "qk_norm": True}, PLAIN, {"lengths": [0, 3], "is_causal": True}
    ),
    "one length": ({"qk_norm": True}, PLAIN, {"lengths": 3, "window": (2, 0)}),
    "grouped heads": ({"kv_heads": 1}, PLAIN, {}),
    "sizes": ({"kv_heads": 1, "head_dim": 5, "value_dim": 3}, PLAIN, {"is_causal": True}),
    "norm": ({"qk_norm": True}, PLAIN, {}),
    "norm, no bias": ({"qk_norm": True, "bias": False, "kv_heads": 1}, PLAIN, {"softcap": 2.0}),
    "norm, epsilon": ({"qk_norm": True, "norm_epsilon": 0.3}, PLAIN, {}),
    "rotary": ({"rotary": True}, PLAIN, {}),
    "rotary, partial": ({"rotary": {"base": 500.0, "rotary_dim": 2}}, PLAIN, {}),
    "rotary, interleaved": ({"rotary": {"interleaved": True}}, PLAIN, {"is_causal": True}),
    "rotary, frequencies": ({"rotary": {"frequencies": [1.0, 0.3]}}, PLAIN, {}),
    **{f"rotary, {name}": ({"rotary": {"scaling": x}}, PLAIN, {}) for name, x in ROPE.items()},
    "positions": ({"rotary": True}, PLAIN, {"positions": [0, 1, 1, 7]}),
    "positions of the batch": (
        {"rotary": {"scaling": YARN}, "kv_heads": 1}, PLAIN,
        {"positions": [[0, 1, 1, 2], [5, 3, 4, 6]], "lengths": [4, 3]},
    ),
    "everything": (
        {"rotary": {"scaling": YARN, "interleaved": True}, "qk_norm": True, "kv_heads": 1,
         "head_dim": 6, "value_dim": 3},
        PLAIN,
        {"is_causal": True, "window": (2, None), "softcap": 1.5, "lengths": [3, 4], "mask": MASK,
         "tail_mask": np.tri(4, 2, dtype=bool)},
    ),
    "scale": ({}, PLAIN, {"scale": -0.8}),
    "bias": ({}, PLAIN, {"bias": BIAS}),
    "bias of all": ({"rotary": True}, PLAIN, {"bias": BIAS[0, 0, 0], "is_causal": True}),
    "bias of heads": ({"kv_heads": 1}, PLAIN, {"bias": BIAS[:1], "lengths": [4, 2]}),
    "sinks": ({}, PLAIN, {"sinks": SINKS}),
    "ALiBi": ({}, PLAIN, {"alibi_slopes": [0.5, 0.1], "lengths": [4, 3]}),
    "bias, sinks and others": (
        {"qk_norm": True, "kv_heads": 1}, PLAIN,
        {"bias": BIAS[:, :, :1], "sinks": SINKS, "alibi_slopes": [0.5, 0.1], "scale": 0.3,
         "softcap": 2.0, "lengths": [3, 4], "window": (2, 0)},
    ),
    "context, bias": (
        {"context_dim": 5}, [(2, 3, 4), (2, 4, 5)], {"bias": BIAS[:, :, :3], "sinks": SINKS}
    ),
    "context": ({"context_dim": 5}, [(2, 3, 4), (2, 4, 5)], {}),
    "context of the same size": ({"qk_norm": True}, [(2, 3, 4), (2, 4, 4)], {"is_causal": True}),
    "two contexts": (
        {"context_dim": (5, 3), "kv_heads": 1}, [(2, 3, 4), (2, 4, 5), (2, 4, 3)], {}
    ),
    "two contexts of one size": ({}, [(2, 3, 4), (2, 4, 4), (2, 4, 4)], {"lengths": [4, 2]}),
    "context, lengths": (
        {"context_dim": 5, "qk_norm": True}, [(2, 3, 4), (2, 4, 5)], {"lengths": [0, 3]}
    ),
    "context, mask": ({"context_dim": 5}, [(2, 3, 4), (2, 4, 5)], {"mask": MASK[:3]}),
    "context for all": (
        {"context_dim": 5, "qk_norm": True}, [(2, 3, 4), (4, 5)], {"lengths": [4, 2]}
    ),
    "x for all": ({"context_dim": 5, "qk_norm": True}, [(3, 4), (2, 4, 5)], {}),
    "axes that broadcast": (
        {"context_dim": (5, 3)}, [(2, 1, 3, 4), (3, 4, 5), (2, 1, 4, 3)], {"window": (1, 2)}
    ),
}  # fmt: skip


def problem(rng, name):
    """Return the layer of a case, x, the context, all arrays by name, and options."""
    sizes, shapes, options = CASES[name]
    layer = make(rng, 4, 2, **{"head_dim": 4} | sizes)
    x, *contexts = (numbers(rng, *shape, dtype=np.float64) for shape in shapes)
    context = None if not contexts else contexts[0] if len(contexts) == 1 else tuple(contexts)
    arrays = {"x": x, **{f"context {i}": c for i, c in enumerate(contexts)}, **layer.parameters()}
    arrays |= {name: options[name] for name in ("bias", "sinks") if name in options}
    return layer, x, context, arrays, options


def differences(x, total, step=1e-5):
    """Return how the total changes with each element of `x`, by itself."""
    found = np.empty_like(x)
    for i in np.ndindex(x.shape):
        before, sums = x[i], []
        for sign in (1, -1):
            x[i] = before + sign * step
            sums.append(total())
        x[i] = before
        found[i] = (sums[0] - sums[1]) / (2 * step)
    return found


@pytest.mark.parametrize("name", CASES)
def test_differences(rng, name):
    layer, x, context, arrays, options = problem(rng, name)
    out, vjp = layer.vjp(x, context, **options, bias_gradient="bias" in options)
    dout = numbers(rng, *out.shape, dtype=np.float64)
    gradients = vjp(dout)
    if isinstance(context, tuple):
        assert isinstance(gradients.context, tuple)
    assert (gradients.context is None) == (context is None)
    assert list(gradients.parameters) == list(layer.parameters())
    found = flat(gradients)
    assert found.keys() == arrays.keys()
    for which, array in arrays.items():
        expected = differences(array, lambda: (layer(x, context, **options) * dout).sum())
        assert found[which].shape == array.shape
        np.testing.assert_allclose(found[which], expected, rtol=0, atol=2e-8, err_msg=which)


@pytest.mark.parametrize(
    ("name", "dropout"),
    [("grouped heads", 0.3), ("everything", 0.5), ("context", 0.2), ("context, lengths", 0.9)],
)
def test_differences_with_dropout(rng, name, dropout):
    layer, x, context, arrays, options = problem(rng, name)
    options = options | {"dropout": dropout, "rng": 77}
    out, vjp = layer.vjp(x, context, **options)
    assert not np.allclose(out, layer(x, context, **CASES[name][2]), atol=0.01)
    dout = numbers(rng, *out.shape, dtype=np.float64)
    found = flat(vjp(dout))
    for which, array in arrays.items():
        expected = differences(array, lambda: (layer.vjp(x, context, **options)[0] * dout).sum())
        np.testing.assert_allclose(found[which], expected, rtol=0, atol=2e-8, err_msg=which)


def test_a_generator_drops_other_weights_each_time(any_backend, rng):
    layer = make(rng, 24, 4, rotary=True, dtype="float32")
    x = numbers(rng, 2, 9, 24)
    first, second = np.random.default_rng(3), np.random.default_rng(3)
    outs = [layer.vjp(x, dropout=0.3, rng=g)[0] for g in (first, first, second)]
    assert not np.array_equal(outs[0], outs[1])
    np.testing.assert_array_equal(outs[0], outs[2])
    seed = int(np.random.default_rng(3).integers(2**64, dtype=np.uint64))
    np.testing.assert_array_equal(layer.vjp(x, dropout=0.3, rng=seed)[0], outs[0])
    np.testing.assert_array_equal(layer.vjp(x, dropout=0)[0], layer(x))


def test_arrays_that_are_used_several_times(rng):
    layer = make(rng, 8, 2, qk_norm=True)
    x, dout = numbers(rng, 2, 2, 5, 8, dtype=np.float64)
    alone = layer.vjp(x)[1](dout)
    one = layer.vjp(x, x)[1](dout)
    of_keys, of_values = layer.vjp(x, (x, x))[1](dout).context
    np.testing.assert_allclose(one.context, of_keys + of_values, rtol=0, atol=1e-12)
    np.testing.assert_allclose(alone.x, one.x + one.context, rtol=0, atol=1e-12)
    for name, gradient in alone.parameters.items():
        np.testing.assert_array_equal(one.parameters[name], gradient)


@pytest.mark.parametrize("name", ["lengths, causal", "everything", "axes that broadcast"])
def test_every_backend_and_float32(any_backend, rng, name):
    layer, x, context, _, options = problem(rng, name)
    out, vjp = layer.vjp(x, context, **options)
    dout = numbers(rng, *out.shape, dtype=np.float64)
    expected = flat(vjp(dout))
    small = in_dtype(layer, "float32", (4, 2), **{"head_dim": 4} | CASES[name][0])
    pair = None if context is None else tuple(c.astype(np.float32) for c in context)
    out, vjp = small.vjp(x.astype(np.float32), pair, **options)
    assert out.dtype == np.float32
    for which, gradient in flat(vjp(dout.astype(np.float32))).items():
        assert expected[which].dtype == np.float64
        assert gradient.dtype == np.float32
        scale = np.abs(expected[which]).max()
        np.testing.assert_allclose(
            gradient, expected[which], rtol=0, atol=1e-5 * max(scale, 1), err_msg=which
        )


# ---- the result --------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize(
    ("sizes", "options"),
    [
        ({}, {}),
        ({"kv_heads": 2, "rotary": True, "qk_norm": True}, {"is_causal": True}),
        (
            {"rotary": True},
            {"lengths": [70, 33], "window": (20, 0), "positions": np.arange(70) * 3},
        ),
        ({"head_dim": 7, "value_dim": 5}, {"mask": np.tri(70, dtype=bool), "softcap": 2.0}),
        ({"kv_heads": 1}, {"tail_mask": np.tri(70, 9, dtype=bool), "lengths": 68}),
        (
            {"kv_heads": 2},
            {
                "bias": np.full((1, 1), 0.5, np.float32),
                "sinks": np.ones(4),
                "scale": 0.4,
                "alibi_slopes": [0.1] * 4,
                "num_threads": 1,
            },
        ),
    ],
    ids=str,
)
def test_the_result_has_the_bits_of_a_call(any_backend, rng, dtype, sizes, options):
    layer = make(rng, 24, 4, **sizes, dtype=dtype)
    x = numbers(rng, 2, 70, 24, dtype=dtype)
    out, vjp = layer.vjp(x, **options)
    np.testing.assert_array_equal(out, layer(x, **options))
    kept = out.copy()
    dout = numbers(rng, *out.shape, dtype=dtype)
    out[...] = 0  # is the caller's
    first, second = (flat(vjp(dout)) for _ in range(2))
    for which, gradient in first.items():
        np.testing.assert_array_equal(second[which], gradient)
        assert np.isfinite(gradient).all()
        assert not np.shares_memory(gradient, second[which])
    np.testing.assert_array_equal(layer(x, **options), kept)
    context = None if "rotary" in sizes else x[:, :5].copy()
    if context is not None and "mask" not in options and "tail_mask" not in options:
        out, _ = layer.vjp(x, context, **options)
        np.testing.assert_array_equal(out, layer(x, context, **options))


def test_several_threads(rng):
    layer = make(rng, 24, 4, rotary=True, qk_norm=True, dtype="float32")
    x, *douts = numbers(rng, 9, 2, 40, 24)
    _, vjp = layer.vjp(x, is_causal=True)
    expected = [flat(vjp(dout)) for dout in douts]
    with ThreadPoolExecutor(4) as pool:
        for one, wanted in zip(pool.map(vjp, douts), expected, strict=True):
            for which, gradient in flat(one).items():
                np.testing.assert_array_equal(gradient, wanted[which])


def test_arrays_of_any_strides(rng):
    layer = make(rng, 8, 2, context_dim=6)
    x, dout = numbers(rng, 2, 2, 5, 8, dtype=np.float64)
    context = numbers(rng, 2, 7, 6, dtype=np.float64)
    expected = flat(layer.vjp(x, context)[1](dout))
    strange = [np.asfortranarray(a) for a in (x, context)]
    strange += [np.repeat(a, 2, axis=-1)[..., ::2] for a in (x, context)]
    strange += [a.tolist() for a in (x, context)]
    for i in range(0, len(strange), 2):
        _, vjp = layer.vjp(*strange[i : i + 2])
        for of_out in (
            dout,
            np.asfortranarray(dout),
            dout[::-1, :, ::-1][::-1, :, ::-1],
            dout.tolist(),
        ):
            for which, gradient in flat(vjp(of_out)).items():
                np.testing.assert_allclose(gradient, expected[which], rtol=1e-12, atol=1e-12)
    x.flags.writeable = dout.flags.writeable = False
    layer.vjp(x, context)[1](dout)


def test_gradients_of_options_are_there_where_they_are_asked_for(rng):
    layer = make(rng, 24, 4, dtype="float32")
    x = numbers(rng, 2, 5, 24)
    bias, sinks = numbers(rng, 4, 1, 5), [0.0, 1.0, -1.0, -np.inf]
    for options, are_there in (
        ({}, (False, False)),
        ({"bias": bias}, (False, False)),
        ({"bias": bias, "bias_gradient": True}, (True, False)),
        ({"sinks": sinks}, (False, True)),
    ):
        out, vjp = layer.vjp(x, **options)
        gradients = vjp(out)
        assert (gradients.bias is not None, gradients.sinks is not None) == are_there
        if gradients.bias is not None:
            assert gradients.bias.shape == bias.shape
            assert gradients.bias.dtype == np.float32
        if gradients.sinks is not None:
            assert gradients.sinks.dtype == np.float64
            assert gradients.sinks[3] == 0


# ---- padding and what nobody attends to --------------------------------------------------------


@pytest.mark.parametrize("sizes", [{}, {"rotary": True, "qk_norm": True, "kv_heads": 2}], ids=str)
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_padding_does_not_show(any_backend, rng, sizes, bad):
    layer = make(rng, 24, 4, **sizes, dtype="float32")
    x, dout = numbers(rng, 2, 3, 9, 24)
    lengths = [9, 5, 0]
    expected = flat(layer.vjp(x, lengths=lengths)[1](dout))
    total = dout.sum(axis=(0, 1))
    np.testing.assert_allclose(expected["o_bias"], total, rtol=0, atol=1e-5)
    for i, n in enumerate(lengths):
        np.testing.assert_array_equal(expected["x"][i, n:], 0)
        x[i, n:] = bad
    for which, gradient in flat(layer.vjp(x, lengths=lengths)[1](dout)).items():
        np.testing.assert_array_equal(gradient, expected[which])
    # What is there in `dout` is the bias's alone.
    for i, n in enumerate(lengths):
        dout[i, n:] = bad
    for which, gradient in flat(layer.vjp(x, lengths=lengths)[1](dout)).items():
        if which == "o_bias":
            assert not np.isfinite(gradient).any()
        else:
            np.testing.assert_array_equal(gradient, expected[which])


@pytest.mark.parametrize("qk_norm", [False, True])
def test_tokens_of_a_context_that_are_masked_do_not_show(any_backend, rng, qk_norm):
    layer = make(rng, 24, 4, context_dim=10, qk_norm=qk_norm, dtype="float32")
    x, dout = numbers(rng, 2, 2, 5, 24)
    context = numbers(rng, 2, 7, 10)
    mask = np.ones((2, 1, 5, 7), bool)
    mask[0, :, :, 2] = mask[1, :, :, 5:] = mask[1, :, 3] = False
    expected = flat(layer.vjp(x, context, mask=mask)[1](dout))
    context[0, 2] = context[1, 5:] = np.nan
    for which, gradient in flat(layer.vjp(x, context, mask=mask)[1](dout)).items():
        np.testing.assert_array_equal(gradient, expected[which])
    for nothing in (expected["context 0"][0, 2], expected["context 0"][1, 5:], expected["x"][1, 3]):
        np.testing.assert_array_equal(nothing, 0)
    context[0, 0] = np.nan
    found = flat(layer.vjp(x, context, mask=mask)[1](dout))
    assert np.isnan(found["v_weight"]).any()


# ---- numbers of any size -----------------------------------------------------------------------


@pytest.mark.parametrize("size", [1e-20, 1e-3, 1, 1e15, 1e20, 1e30])
def test_norms_of_any_size(rng, size):
    # Without biases, which would make all keys alike where these are small.
    sizes = {"qk_norm": True, "bias": False, "kv_heads": 2, "context_dim": (24, 10)}
    layer = make(rng, 24, 4, **sizes)
    small = in_dtype(layer, "float32", (24, 4), **sizes)
    # Values of size 1, so that it is the norms alone that have to cope.
    x, keys, dout = numbers(rng, 3, 2, 6, 24)
    x, keys = x * np.float32(size), keys * np.float32(size)
    values = numbers(rng, 2, 6, 10)
    found = flat(small.vjp(x, (keys, values))[1](dout))
    wide = [a.astype(np.float64) for a in (x, keys, values, dout)]
    expected = flat(layer.vjp(wide[0], (wide[1], wide[2]))[1](wide[3]))
    for which, gradient in found.items():
        largest = np.abs(expected[which]).max()
        # Gradients smaller than the smallest numbers are 0.
        atol = 1e-5 * largest + 1e-37
        np.testing.assert_allclose(gradient, expected[which], rtol=0, atol=atol, err_msg=which)


@pytest.mark.parametrize("size", [0, 1e-38, 1, 1e19, 3e38, np.inf])
@pytest.mark.parametrize("sizes", [{}, {"rotary": True, "qk_norm": True}], ids=str)
def test_the_callers_way_with_floating_point_errors_changes_nothing(any_backend, rng, sizes, size):
    layer = make(rng, 24, 4, **sizes, dtype="float32")
    with np.errstate(all="ignore"):
        x = numbers(rng, 2, 5, 24) * np.float32(size)
        dout = numbers(rng, 2, 5, 24) * np.float32(size)

    def results():
        for options in ({}, {"is_causal": True, "lengths": [5, 2], "softcap": 2.0}):
            out, vjp = layer.vjp(x, **options)
            yield from [out, *flat(vjp(dout)).values()]
        if not sizes:
            yield from flat(layer.vjp(x, x[:, :3])[1](dout)).values()

    with np.errstate(all="ignore"):
        expected = list(results())
    with np.errstate(all="raise"):
        raising = list(results())
    for ours, theirs in zip(raising, expected, strict=True):
        np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize("shape", [(2, 0, 16), (0, 3, 16)])
@pytest.mark.parametrize("sizes", [{}, {"rotary": True, "qk_norm": True}], ids=str)
def test_nothing_in_nothing_out(any_backend, rng, shape, sizes):
    layer = make(rng, 16, 4, **sizes)
    out, vjp = layer.vjp(np.zeros(shape), is_causal=True)
    assert out.shape == shape
    for which, gradient in flat(vjp(out)).items():
        assert gradient.shape == (shape if which == "x" else layer.parameters()[which].shape)
        np.testing.assert_array_equal(gradient, 0)


def test_no_context(any_backend, rng):
    layer = make(rng, 16, 4, qk_norm=True, context_dim=3)
    x, dout = numbers(rng, 2, 2, 5, 16, dtype=np.float64)
    out, vjp = layer.vjp(x, np.zeros((2, 0, 3)))
    np.testing.assert_array_equal(out, np.broadcast_to(layer.parameters()["o_bias"], x.shape))
    gradients = flat(vjp(dout))
    assert gradients["context 0"].shape == (2, 0, 3)
    np.testing.assert_allclose(gradients.pop("o_bias"), dout.sum(axis=(0, 1)), rtol=1e-12)
    for gradient in gradients.values():
        np.testing.assert_array_equal(gradient, 0)


def test_memory_is_linear(rng):
    layer = make(rng, 8, 2, qk_norm=True, rotary=True, dtype="float32")
    x = numbers(rng, 4000, 8)
    tracemalloc.start()
    try:
        out, vjp = layer.vjp(x, is_causal=True)
        vjp(out)
        assert tracemalloc.get_traced_memory()[1] < 40e6  # two heads' weights are 128e6
    finally:
        tracemalloc.stop()


# ---- arguments ---------------------------------------------------------------------------------


def test_gradients_that_do_not_fit(rng):
    layer = make(rng, 24, 4, dtype="float32")
    x = numbers(rng, 2, 5, 24)
    out, vjp = layer.vjp(x, x[:, :3])
    for dout, error, message in (
        (out[0], ValueError, "dout: got shape (5, 24), expected (2, 5, 24), the shape of out"),
        (out[..., :3], ValueError, "dout: got shape (2, 5, 3), expected (2, 5, 24)"),
        (1.0, TypeError, "dout: got dtype float64, expected float32, the dtype"),
        (out.astype(float), TypeError, "dout: got dtype float64, expected float32, the dtype"),
        (
            out.astype(">f4"),
            TypeError,
            "dout: got dtype float32 in non-native byte order, expected",
        ),
        (np.ma.masked_array(out), TypeError, "dout: got a masked array, expected"),
        (None, TypeError, "dout: got"),
    ):
        with pytest.raises(error) as raised:
            vjp(dout)
        assert message in str(raised.value)
    vjp(out)


def test_bad_calls(rng):
    layer = make(rng, 24, 4, dtype="float32")
    turned = make(rng, 24, 4, rotary=True, dtype="float32")
    x = numbers(rng, 2, 5, 24)
    cache = na.KVCache(2, 4, 6)
    for call, error, message in (
        (
            lambda: layer.vjp(x[..., :3]),
            ValueError,
            "x: got shape (2, 5, 3), expected (..., length",
        ),
        (
            lambda: layer.vjp(x, (x, x, x)),
            ValueError,
            "context: got 3 arrays, expected one, or two",
        ),
        (
            lambda: layer.vjp(x, layer.context_cache(x)),
            TypeError,
            "context: got a ContextCache, expected the context itself, which gets gradients",
        ),
        (lambda: turned.vjp(x, x), ValueError, "context: got an array for a rotary layer"),
        (lambda: layer.vjp(x, is_causal=1), TypeError, "is_causal: got 1"),
        (lambda: layer.vjp(x, softcap=-1), ValueError, "softcap: got -1"),
        (lambda: layer.vjp(x, lengths=[6, 1]), ValueError, "lengths: got 6 at index 0, expected 0"),
        (lambda: layer.vjp(x, positions=np.arange(5)), TypeError, "positions: got an array, expec"),
        (
            lambda: turned.vjp(x, positions=[1, 2]),
            ValueError,
            "positions: got shape (2,), expected",
        ),
        (
            lambda: layer.vjp(x, x[:, :3], lengths=[2, 3], is_causal=True),
            ValueError,
            "lengths: got lengths of the context with is_causal and 5 tokens of x",
        ),
        (
            lambda: layer.vjp(x, cache=cache),
            TypeError,
            "cache: got KVCache, expected no cache; differentiate the whole text",
        ),
        (
            lambda: layer.vjp(x, return_weights=True),
            TypeError,
            "return_weights: got bool, expected no such option; `layer(x, return_wei",
        ),
        (lambda: layer.vjp(x, attn_mask=None), TypeError, "'attn_mask'; did you mean `mask=`"),
        (lambda: layer.vjp(x, dropout=1.0, rng=0), ValueError, "dropout: got 1.0, expected the fr"),
        (lambda: layer.vjp(x, dropout=0.1), ValueError, "rng: got None with dropout=0.1"),
        (lambda: layer.vjp(x, rng="0"), TypeError, "rng: got '0' (str), expected an int"),
        (
            lambda: layer.vjp(x, dropout_p=0.1),
            TypeError,
            "'dropout_p'; did you mean `dropout=p, rng=seed`?",
        ),
        (
            lambda: layer(x, dropout=0.1, rng=0),
            TypeError,
            "'dropout'; did you mean `dropout=` of `MultiHeadAttention.vjp`, for training?",
        ),
        (
            lambda: na.MultiHeadAttention(24, 4, attention_dropout=0.1),
            TypeError,
            "'attention_dropout'; did you mean `dropout=` of `MultiHeadAttention.vjp`, for train",
        ),
        (
            lambda: layer.vjp(x, bias_gradient=True),
            ValueError,
            "bias_gradient: got True without `bias=`, expected",
        ),
        (lambda: layer.vjp(x, bias_gradient=1), TypeError, "bias_gradient: got 1 (int), expected"),
        (
            lambda: layer.vjp(x, position_bias=None),
            TypeError,
            "did you mean `bias=`, with `bias_gradient=True` if it is learned?",
        ),
        (lambda: layer.vjp(x, a=None), TypeError, "MultiHeadAttention.vjp() got an unexpected"),
    ):
        with pytest.raises(error) as raised:
            call()
        assert message in str(raised.value)
    assert cache.lengths.tolist() == [0, 0]


def test_a_mask_that_may_mean_the_batch_is_warned_of_once(any_backend, rng):
    layer = make(rng, 24, 4, dtype="float32")
    x, mask = numbers(rng, 4, 3, 24), np.tri(3, dtype=bool) & np.ones((4, 1, 1), bool)
    with pytest.warns(UserWarning, match=r"mask: .* is taken as \(Hq, Lq, Lk\)") as caught:
        out, vjp = layer.vjp(x, mask=mask)
    vjp(out)
    assert len(caught) == 1
    assert caught[0].filename == __file__


def test_vjp_takes_what_a_call_takes():
    call, vjp = (
        inspect.signature(f).parameters
        for f in (na.MultiHeadAttention.__call__, na.MultiHeadAttention.vjp)
    )
    of_both = [name for name in call if name not in ("cache", "return_weights")]
    assert of_both == [name for name in vjp if name not in ("dropout", "rng", "bias_gradient")]


# ---- PyTorch -----------------------------------------------------------------------------------


@pytest.mark.parametrize("sizes", [{}, {"kdim": 10, "vdim": 14}, {"bias": False}], ids=str)
def test_torch(rng, sizes):
    torch = pytest.importorskip("torch")
    torch.manual_seed(0)
    module = torch.nn.MultiheadAttention(48, 4, batch_first=True, **sizes)
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    layer = na.MultiHeadAttention.from_torch(module)
    x, dout = numbers(rng, 2, 3, 9, 48)
    keys = numbers(rng, 3, 6, sizes.get("kdim", 48))
    values = numbers(rng, 3, 6, sizes.get("vdim", 48))
    lengths = np.array([6, 4, 1])
    causal, bias = np.tri(9, 6, dtype=bool), numbers(rng, 9, 6)
    cases = [
        ((keys, values), {}, {}),
        (
            (keys, values),
            {"lengths": lengths},
            {"key_padding_mask": torch.tensor(np.arange(6) >= lengths[:, None])},
        ),
        ((keys, values), {"mask": causal}, {"attn_mask": torch.tensor(~causal)}),
        (
            (keys, values),
            {"bias": bias, "bias_gradient": True},
            {"attn_mask": torch.tensor(bias, requires_grad=True)},
        ),
    ]
    if "kdim" not in sizes:
        square = np.tri(9, dtype=bool)
        cases += [
            (None, {}, {}),
            (None, {"is_causal": True}, {"attn_mask": torch.tensor(~square)}),
            (keys, {}, {}),
        ]
    for context, ours, theirs in cases:
        of_x = torch.tensor(x, requires_grad=True)
        pair = context if isinstance(context, tuple) else (context,)
        tensors = [of_x if c is None else torch.tensor(c, requires_grad=True) for c in pair]
        module.zero_grad()
        result, _ = module(of_x, tensors[0], tensors[-1], **theirs)
        result.backward(torch.tensor(dout))
        gradients = flat(layer.vjp(x, context, **ours)[1](dout))
        expected = {"x": of_x.grad}
        if context is not None:
            expected |= {f"context {i}": tensor.grad for i, tensor in enumerate(tensors)}
        weights = (
            [getattr(module, f"{n}_proj_weight").grad for n in "qkv"]
            if "kdim" in sizes
            else module.in_proj_weight.grad.chunk(3)
        )
        expected |= {f"{n}_weight": w.T for n, w in zip("qkv", weights, strict=True)}
        expected["o_weight"] = module.out_proj.weight.grad.T
        if sizes.get("bias", True):
            biases = module.in_proj_bias.grad.chunk(3)
            expected |= {f"{n}_bias": b for n, b in zip("qkv", biases, strict=True)}
            expected["o_bias"] = module.out_proj.bias.grad
        if "bias" in ours:
            expected["bias"] = theirs["attn_mask"].grad
        assert gradients.keys() == expected.keys()
        for which, wanted in expected.items():
            scale = float(wanted.abs().max())
            np.testing.assert_allclose(
                gradients[which], wanted.numpy(), rtol=0, atol=2e-5 * max(scale, 1), err_msg=which
            )
