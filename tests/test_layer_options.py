"""Promise: a layer's calls have the options of `attention`, which mean the same there."""

import inspect

import numattn as na
import numpy as np
import pytest
from checks import numbers
from layers import by_hand, fill, weights_by_hand
from numattn import _runtime

# What the layer knows by itself, gives in another way, or has for training alone.
NOT_OF_LAYERS = {
    "q_offset", "kv_lengths", "q_lengths", "layout", "return_lse", "out", "dropout", "rng",
    "k_scale", "v_scale",
}  # fmt: skip
LENGTH = 9
RANDOM = np.random.default_rng(5)
BIAS = RANDOM.standard_normal((4, LENGTH, LENGTH)).astype(np.float32)
SINKS = [0.5, -1.0, 3.0, -np.inf]
SLOPES = na.alibi_slopes(4)
PADDED = {"lengths": [LENGTH, 5]}
CASES = {
    "scale": {"scale": 0.7},
    "negative scale": {"scale": -0.2, "is_causal": True},
    "sinks": {"sinks": SINKS},
    "sinks, padded": {"sinks": SINKS, **PADDED},
    "ALiBi": {"alibi_slopes": SLOPES},
    "ALiBi, padded": {"alibi_slopes": SLOPES, "is_causal": True, **PADDED},
    "bias": {"bias": BIAS},
    "bias of all": {"bias": BIAS[0, 0]},
    "bias of the batch": {"bias": np.stack([BIAS, -BIAS])},
    "bias that masks": {"bias": np.where(BIAS > 0, 0, -np.inf).astype(np.float32)},
    "threads": {"num_threads": 2},
    "mixture": {
        "bias": BIAS[:, :1], "sinks": SINKS, "alibi_slopes": SLOPES, "scale": 0.4, "softcap": 3.0,
        "window": (4, 1), "mask": BIAS[0] > -1, "num_threads": 1, **PADDED,
    },
    "causal mixture": {
        "bias": BIAS[:1], "sinks": SINKS, "scale": 0.3, "is_causal": True,
        "tail_mask": np.tri(LENGTH, 3, dtype=bool),
    },
}  # fmt: skip


def of_reference(options):
    """Return what the options are called there; positions begin at 0, whatever the lengths."""
    own = {name: x for name, x in options.items() if name not in ("lengths", "num_threads")}
    if "lengths" in options:
        own |= {"kv_lengths": options["lengths"], "q_lengths": options["lengths"], "q_offset": 0}
    return own


def test_a_layer_has_all_options():
    options = {
        name
        for name, parameter in inspect.signature(na.attention).parameters.items()
        if parameter.kind is parameter.KEYWORD_ONLY
    }
    of_call = inspect.signature(na.MultiHeadAttention.__call__).parameters
    assert {name for name in options if name not in of_call} == NOT_OF_LAYERS


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("name", CASES)
def test_against_float64(any_backend, rng, name, dtype):
    layer = na.MultiHeadAttention(24, 4, kv_heads=2, rotary=True, dtype=dtype, rng=1)
    x = numbers(rng, 2, LENGTH, 24, dtype=dtype)
    parameters, own = fill(layer, rng).parameters(), of_reference(CASES[name])
    tolerance = 2e-5 if dtype == "float32" else 1e-12
    expected = by_hand(parameters, x, x, x, 4, 2, {}, **own)
    out, weights = layer(x, **CASES[name], return_weights=True)
    assert out.dtype == weights.dtype == dtype
    np.testing.assert_allclose(out, expected, rtol=0, atol=tolerance)
    np.testing.assert_array_equal(layer(x, **CASES[name]), out)
    expected = weights_by_hand(parameters, x, x, x, 4, 2, {}, **own)
    np.testing.assert_allclose(weights, expected, rtol=0, atol=tolerance)


def test_options_of_cross_attention(any_backend, rng):
    layer = fill(na.MultiHeadAttention(24, 4, context_dim=10, rng=1), rng)
    x, context = numbers(rng, 2, 4, 24), numbers(rng, 2, 6, 10)
    for options in (
        {"bias": BIAS[:, :4, :6], "sinks": SINKS, "scale": 0.5},
        {"alibi_slopes": SLOPES},
        {"bias": BIAS[:, :4, :6], "kv_lengths": [6, 3]},
    ):
        expected = by_hand(layer.parameters(), x, context, context, 4, 4, **options)
        own = {name.removeprefix("kv_"): option for name, option in options.items()}
        np.testing.assert_allclose(layer(x, context, **own), expected, rtol=0, atol=2e-5)
    message = (
        "^lengths: got lengths of the context with alibi_slopes and 4 tokens of x, which do not "
        "say at which positions the tokens are, expected `mask=` or `bias=` instead of "
        "alibi_slopes$"
    )
    with pytest.raises(ValueError, match=message):
        layer(x, context, lengths=[6, 3], alibi_slopes=SLOPES)


@pytest.mark.parametrize("sizes", [{}, {"window": 4}, {"window": 4, "keep_first": 1}], ids=str)
@pytest.mark.parametrize(
    "options",
    [
        {"scale": 0.7},
        {"sinks": SINKS},
        {"alibi_slopes": SLOPES},
        {"bias": BIAS},
        {"bias": BIAS, "sinks": SINKS, "alibi_slopes": SLOPES, "scale": 0.4, "num_threads": 1},
    ],
    ids=lambda options: " ".join(options),
)
def test_options_with_a_cache(backend, rng, sizes, options):
    layer = fill(na.MultiHeadAttention(24, 4, kv_heads=2, rotary=True, rng=1), rng)
    x = numbers(rng, 2, LENGTH, 24)
    cache = na.KVCache(2, 2, 6, **sizes)
    steps = []
    for begin, end in ((0, 5), (5, 6), (6, LENGTH)):
        own = dict(options)
        if "bias" in own:
            own["bias"] = BIAS[:, begin:end, :end]
        steps.append(layer(x[:, begin:end], cache=cache, **own))
    p, j = np.arange(LENGTH)[:, np.newaxis], np.arange(LENGTH)
    mask = (j > p - sizes.get("window", LENGTH)) | (j < sizes.get("keep_first", 0))
    own = of_reference(options) | {"is_causal": True, "mask": mask}
    expected = by_hand(layer.parameters(), x, x, x, 4, 2, {}, **own)
    np.testing.assert_allclose(np.concatenate(steps, axis=1), expected, rtol=0, atol=2e-5)


def test_a_bias_that_may_mean_the_batch_is_warned_of_once(any_backend, rng):
    layer = na.MultiHeadAttention(24, 4, rng=1)
    x, bias = numbers(rng, 4, 3, 24), numbers(rng, 4, 3, 3)
    with pytest.warns(UserWarning, match=r"bias: .* is taken as \(Hq, Lq, Lk\)") as caught:
        out, weights = layer(x, bias=bias, return_weights=True)
    assert len(caught) == 1
    assert caught[0].filename == __file__
    expected, pattern = layer(x, bias=bias[np.newaxis], return_weights=True)
    np.testing.assert_array_equal(out, expected)
    np.testing.assert_array_equal(weights, pattern)


BAD = [
    ({"scale": "1"}, TypeError, "scale: got '1' (str), expected a real number"),
    ({"scale": np.nan}, ValueError, "scale: got nan, expected a finite number"),
    ({"sinks": [1.0, 2.0]}, ValueError, "sinks: got shape (2,), expected one number per query"),
    ({"alibi_slopes": 0.5}, ValueError, "alibi_slopes: got shape (), expected one number per"),
    ({"num_threads": 0}, ValueError, "num_threads: got 0, expected a number of threads"),
    ({"bias": np.ones(5, bool)}, TypeError, "bias: got dtype bool, expected"),
    ({"bias": np.ones(5)}, TypeError, "bias: got dtype float64, expected"),
    ({"bias": np.ones((3, 5), np.float32)}, ValueError, "bias: got shape (3, 5), expected"),
    ({"position_bias": None}, TypeError, "'position_bias'; did you mean `bias="),
    ({"scaling": 1.0}, TypeError, "'scaling'; did you mean `scale=`"),
    ({"s_aux": None}, TypeError, "'s_aux'; did you mean `sinks=`"),
]


@pytest.mark.parametrize(("options", "error", "message"), BAD, ids=[str(x) for x, _, _ in BAD])
def test_bad_options(rng, options, error, message):
    layer = na.MultiHeadAttention(24, 4, rng=0)
    x = numbers(rng, 2, 5, 24)
    cache = na.KVCache(2, 4, 6)
    for call in (
        lambda: layer(x, **options),
        lambda: layer.vjp(x, **options),
        lambda: layer(x, cache=cache, **options),
    ):
        with pytest.raises(error) as raised:
            call()
        assert message in str(raised.value)
    assert cache.lengths.tolist() == [0, 0]


@pytest.mark.parametrize("name", ["scale", "softcap", "sinks", "alibi_slopes"])
def test_options_of_calls_are_none_of_the_layer(name):
    message = rf"unexpected keyword argument '{name}'; did you mean `{name}=` of a call\?"
    with pytest.raises(TypeError, match=message):
        na.MultiHeadAttention(24, 4, **{name: 1.0})


def test_biases_of_positions_as_t5_learns_them(rng):
    torch = pytest.importorskip("torch")
    t5 = pytest.importorskip("transformers.models.t5.modeling_t5")
    torch.manual_seed(0)
    configuration = t5.T5Config(d_model=24, d_kv=6, num_heads=4)
    module = t5.T5Attention(configuration, has_relative_attention_bias=True).eval()
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    x, dout = numbers(rng, 2, 2, LENGTH, 24)
    expected, position_bias = module(torch.tensor(x))[:2]
    expected.backward(torch.tensor(dout))
    layer = na.MultiHeadAttention.from_weights(
        module.q.weight,
        module.k.weight,
        module.v.weight,
        module.o.weight,
        num_heads=4,
        transposed=False,
    )
    out, vjp = layer.vjp(x, bias=position_bias.detach(), scale=1, bias_gradient=True)
    np.testing.assert_allclose(out, expected.detach(), rtol=0, atol=1e-5)
    # Each element of the bias is one of a small table, whose gradients are sums.
    learned = module.relative_attention_bias.weight
    (of_table,) = torch.autograd.grad(
        module.compute_bias(LENGTH, LENGTH), learned, torch.tensor(vjp(dout).bias)
    )
    np.testing.assert_allclose(of_table, learned.grad, rtol=0, atol=1e-4)


class _Spy:
    """What computes, with a list of what was called and for how many threads."""

    def __init__(self, computations):
        self._computations, self.calls = computations, []

    def __getattr__(self, name):
        function = getattr(self._computations, name)

        def call(*arguments):
            if "attention" not in name:  # whose arguments are checked elsewhere
                self.calls.append((name, arguments[-1]))
            return function(*arguments)

        return call


@pytest.mark.parametrize("options", [{}, {"qk_norm": True}, {"gated": True}], ids=str)
def test_num_threads_counts_for_every_step(rng, monkeypatch, options):
    block = na.TransformerBlock(16, 2, rotary=True, rng=0, **options)
    x = numbers(rng, 2, 40, 16)
    spy = _Spy(_runtime.computations)
    monkeypatch.setattr(_runtime, "computations", spy)
    block(x, num_threads=5)
    out, vjp = block.vjp(x, num_threads=5)
    vjp(out)
    called = {name for name, _ in spy.calls}
    assert {"multiply", "normalize", "normalize_back", "activate", "activate_back"} <= called
    assert "rotate" in called  # of gradients
    wrong = [call for call in spy.calls if call[1] != 5]
    assert not wrong
