"""Promise: layers and blocks of 16-bit floats add up in float32 and round each step once."""

import pickle
import subprocess
import sys

import numattn as na
import numpy as np
import pytest
from checks import assert_within, numbers
from conftest import named_dtype
from layers import FUNCTIONS, block_by_hand, by_hand, fill, norm_by_hand
from numattn import _feed_forward, _norms, _projection, _rotary

LLAMA = {
    "norm": "rms", "activation": "silu", "gated": True, "rotary": True, "kv_heads": 2,
}  # fmt: skip
BLOCKS = {
    "llama": LLAMA,
    "gpt2": {"activation": "gelu_tanh"},
    "bert": {"norm_first": False},
    "squares": {"activation": "relu_squared", "gated": True, "norm": "rms", "norm_first": False},
}


@pytest.fixture(params=["float16", "bfloat16"])
def narrow(request):
    return named_dtype(request.param)


def rounded_to(dtype):
    """Return what a step does that is computed in float32 and kept in 16 bits."""
    return lambda x: x.astype(dtype).astype(np.float32)


def random(rng, *shape, dtype):
    return numbers(rng, *shape).astype(dtype)


def make_layer(rng, dtype, *sizes, **options):
    return fill(na.MultiHeadAttention(*sizes, **options, dtype=dtype, rng=1), rng)


def make_block(rng, dtype, *sizes, **options):
    block = na.TransformerBlock(*sizes, **options, dtype=dtype, rng=1)
    fill(block.attention, rng)
    for name, x in block.parameters().items():
        if x.ndim == 1 and not name.startswith("attention"):
            x += random(rng, *x.shape, dtype=x.dtype) / 3
    return block


def doubled(module):
    """Return a layer or block of float64 with the same parameters."""
    wide = pickle.loads(pickle.dumps(module))
    for part in (wide, getattr(wide, "attention", wide)):
        part._parameters = {name: x.astype(np.float64) for name, x in part._parameters.items()}
    getattr(wide, "attention", wide)._dtype = np.dtype(np.float64)
    return wide


# ---- results -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "sizes",
    [
        {},
        {"bias": False, "kv_heads": 2, "qk_norm": True},
        {"rotary": True, "head_dim": 10, "value_dim": 7, "qk_norm": True, "norm_epsilon": 0.5},
    ],
    ids=str,
)
def test_a_layer_is_as_exact_as_rounded_steps(any_backend, rng, narrow, sizes):
    layer = make_layer(rng, narrow, 24, 4, **sizes)
    x = random(rng, 3, 40, 24, dtype=narrow)
    known = {
        "heads": 4, "kv_heads": sizes.get("kv_heads", 4),
        "rotary": {} if "rotary" in sizes else None,
        "norm_epsilon": sizes.get("norm_epsilon", 1e-6),
    }  # fmt: skip
    for ours, theirs in (
        ({}, {}),
        ({"is_causal": True, "softcap": 3.0}, {"is_causal": True, "softcap": 3.0}),
        ({"lengths": [40, 9, 0]}, {"kv_lengths": [40, 9, 0], "q_lengths": [40, 9, 0]}),
    ):
        out = layer(x, **ours)
        assert out.dtype == narrow
        arguments = (layer.parameters(), x, x, x)
        exact = by_hand(*arguments, **known, **theirs)
        plain = by_hand(*arguments, **known, **theirs, keep=rounded_to(narrow), dtype=np.float32)
        assert_within(out, [plain.astype(narrow)], exact)


def test_cross_attention(any_backend, rng, narrow):
    layer = make_layer(rng, narrow, 24, 4, context_dim=(10, 14))
    x, keys, values = (
        random(rng, 2, n, d, dtype=narrow) for n, d in ((40, 24), (30, 10), (30, 14))
    )
    out, weights = layer(x, (keys, values), lengths=[30, 8], return_weights=True)
    known = {"heads": 4, "kv_heads": 4, "kv_lengths": [30, 8]}
    arguments = (layer.parameters(), x, keys, values)
    exact = by_hand(*arguments, **known)
    plain = by_hand(*arguments, **known, keep=rounded_to(narrow), dtype=np.float32)
    assert_within(out, [plain.astype(narrow)], exact)
    assert weights.dtype == np.float32
    np.testing.assert_allclose(weights.astype(float).sum(-1), 1, atol=0.03)
    cache = layer.context_cache((keys, values), lengths=[30, 8])
    assert cache.k.dtype == cache.v.dtype == narrow
    assert narrow.name in repr(cache)
    assert layer(x, cache).tobytes() == out.tobytes()


@pytest.mark.parametrize("model", BLOCKS)
def test_a_block_is_as_exact_as_rounded_steps(rng, narrow, model):
    options = BLOCKS[model]
    block = make_block(rng, narrow, 24, 4, 50, **options)
    # Of several chunks of rows, the last one shorter.
    x = random(rng, 4, 175, 24, dtype=narrow)
    x[0, 3] *= 50
    out = block(x, is_causal=True)
    assert out.dtype == narrow
    known = {"heads": 4, "is_causal": True, **options}
    exact = block_by_hand(block, x, **known)
    plain = block_by_hand(block, x, **known, keep=rounded_to(narrow), dtype=np.float32)
    assert_within(out, [plain.astype(narrow)], exact)


# ---- one rounding ------------------------------------------------------------------------------


def assert_rounded_once(actual, exact, size=1.0):
    """Check each element; `size` is how large float32's terms are."""
    assert actual.dtype.itemsize == 2
    half = np.spacing(np.abs(exact).astype(actual.dtype)).astype(np.float64) / 2
    error = np.abs(actual.astype(np.float64) - exact)
    assert np.all(error <= 1.01 * half + 2e-6 * size)


def test_products(rng, narrow):
    rows, d, weight, bias = (
        random(rng, *shape, dtype=narrow) for shape in ((700, 30), (700, 20), (30, 20), (20,))
    )
    wide_rows, wide_d, wide_weight, wide_bias = (
        x.astype(np.float64) for x in (rows, d, weight, bias)
    )
    for actual, exact in (
        (_projection.project(rows, weight), wide_rows @ wide_weight),
        (_projection.project(rows, weight, bias), wide_rows @ wide_weight + wide_bias),
        (_projection.project_back(d, weight), wide_d @ wide_weight.T),
        (_projection.weight_gradient(rows, d), wide_rows.T @ wide_d),
        (_projection.bias_gradient(d), wide_d.sum(0)),
    ):
        assert_rounded_once(actual, exact, size=30)
    wide = np.empty((700, 30), np.float32)
    assert _projection.project_back(d, weight, wide) is wide
    np.testing.assert_allclose(wide, wide_d @ wide_weight.T, rtol=1e-5, atol=1e-5)


def test_norms_of_queries_and_keys(rng, narrow):
    vectors, d = random(rng, 2, 9, 70, 4, 24, dtype=narrow)
    weight = random(rng, 24, dtype=narrow)
    wide, wide_d, wide_weight = (x.astype(np.float64) for x in (vectors, d, weight))
    exact, back = norm_by_hand(wide, wide_weight, 0, 1e-5, is_centred=False)
    of_vectors, of_weight, _ = back(wide_d)
    found = vectors.copy()
    norm = _norms.Norm(False, 1e-5, weight)
    norm.apply(found, found)
    assert_rounded_once(found, exact, size=4)
    rows, d = vectors.reshape(-1, 4, 24), d.reshape(-1, 4, 24)
    assert_rounded_once(norm.take_back(d, rows)[0], of_weight, size=100)
    assert_rounded_once(d, of_vectors.reshape(d.shape), size=4)


@pytest.mark.parametrize("activation", FUNCTIONS)
@pytest.mark.parametrize("gated", [True, False])
def test_activations(rng, narrow, activation, gated):
    up, gate = random(rng, 2, 700, 50, dtype=narrow)
    inner = _feed_forward.Inner(up, gate if gated else None)
    network = _feed_forward.FeedForward(activation, gated, {})
    into = (gate if gated else up).astype(np.float64)
    exact = FUNCTIONS[activation](into) * (up.astype(np.float64) if gated else 1)
    for out in (np.empty_like(up), inner.activated):
        assert_rounded_once(network._hidden(inner, out), exact, size=4)


def test_a_gradient_of_two_matrices_is_rounded_once(rng, narrow):
    """Of a gated network: with "relu" each element before the last products is one number."""
    shapes = {"up_weight": (24, 50), "gate_weight": (24, 50), "down_weight": (50, 24)}
    p = {name: random(rng, *shape, dtype=narrow) for name, shape in shapes.items()}
    network = _feed_forward.FeedForward("relu", True, p)
    rows, d = random(rng, 2, 700, 24, dtype=narrow)
    inner, found = network.inner(rows), {}
    d_rows = network.take_back(d.copy(), rows, inner, found)
    keep, wide = rounded_to(narrow), lambda x: x.astype(np.float32)
    d_hidden = wide(_projection.project_back(d, p["down_weight"]))
    slope = inner.gate > 0
    d_up = keep(d_hidden * np.maximum(wide(inner.gate), 0)).astype(np.float64)
    d_gate = keep(d_hidden * wide(inner.up) * slope).astype(np.float64)
    exact = d_up @ p["up_weight"].astype(np.float64).T
    exact += d_gate @ p["gate_weight"].astype(np.float64).T
    assert_rounded_once(d_rows, exact, size=300)
    of_up = rows.astype(np.float64).T @ d_up
    assert_rounded_once(found["up_weight"], of_up, size=2000)


def test_a_gradient_of_three_matrices_is_rounded_once(rng, narrow):
    layer = make_layer(rng, narrow, 24, 4, kv_heads=2, rotary=True, bias=False)
    x, dout = random(rng, 2, 2, 40, 24, dtype=narrow)
    gradients = layer.vjp(x)[1](dout)
    p, rows = layer.parameters(), x.reshape(-1, 24)
    rotation = _rotary.make_rotation((2, 4, 40, 6), narrow, None)

    def heads(name, count, rotation=None):
        out = np.empty((80, 6 * count), narrow)
        weight = p[f"{name}_weight"]
        _projection.compute([_projection.Product(rows, weight, None, out, rotation, 6)])
        return out.reshape(2, 40, count, 6).swapaxes(1, 2)

    of_rows = rotation.of_rows((2, 40))
    q, k, v = heads("q", 4, of_rows), heads("k", 2, of_rows), heads("v", 2)
    _, back = na.attention_vjp(q, k, v)
    d_heads = _projection.project_back(dout.reshape(-1, 24), p["o_weight"])
    found = back(d_heads.reshape(2, 40, 4, 6).swapaxes(1, 2))
    exact = 0
    for name, d in zip("qkv", (found.q, found.k, found.v), strict=True):
        d = np.array(d)
        if name != "v":
            rotation.transposed().apply(d, d)
        d_rows = d.swapaxes(1, 2).reshape(80, -1).astype(np.float64)
        exact = exact + d_rows @ p[f"{name}_weight"].astype(np.float64).T
        of_weight = rows.astype(np.float64).T @ d_rows
        assert_rounded_once(gradients.parameters[f"{name}_weight"], of_weight, size=30)
    assert_rounded_once(gradients.x.reshape(-1, 24), exact, size=4)


# ---- gradients ---------------------------------------------------------------------------------


def assert_gradients_close(found, expected, dtype):
    """Check that errors are a few roundings of numbers of the largest size.

    Sums of hundreds of numbers that are rounded one by one have many times this error.
    """
    for name, wanted in expected.items():
        assert found[name].dtype == dtype, name
        assert found[name].shape == wanted.shape
        error = np.abs(found[name].astype(np.float64) - wanted).max(initial=0)
        unit = np.spacing(dtype.type(1)).astype(np.float64)
        assert error <= 3 * unit * np.abs(wanted).max(initial=0), (name, error)


@pytest.mark.parametrize(
    ("sizes", "context", "options"),
    [
        ({}, False, {"lengths": [40, 23, 0]}),
        ({"qk_norm": True, "rotary": True, "kv_heads": 2}, False, {"is_causal": True}),
        ({"head_dim": 10, "value_dim": 7, "bias": False}, True, {"sinks": np.zeros(4)}),
    ],
    ids=["lengths", "norms", "context"],
)
def test_gradients_of_a_layer(any_backend, rng, narrow, sizes, context, options):
    layer = make_layer(rng, narrow, 24, 4, **sizes)
    # It moves all logits of a query, which changes nothing: its gradient is 0 but for roundings.
    for name in ("k_bias",) if sizes == {} else ():
        layer.parameters()[name][...] = 0
    x, dout, other = random(rng, 3, 3, 40, 24, dtype=narrow)
    contexts = (other[:, :30],) if context else ()
    out, vjp = layer.vjp(x, *contexts, **options)
    assert out.dtype == narrow
    assert out.tobytes() == layer(x, *contexts, **options).tobytes()
    wide_contexts = [c.astype(np.float64) for c in contexts]
    wide = doubled(layer).vjp(x.astype(np.float64), *wide_contexts, **options)[1]
    found, expected = vjp(dout), wide(dout.astype(np.float64))
    expected.parameters.pop("k_bias", None)
    assert_gradients_close(found.parameters, expected.parameters, narrow)
    pairs = {"x": (found.x, expected.x), "context": (found.context, expected.context)}
    pairs = {name: pair for name, pair in pairs.items() if pair[0] is not None}
    assert len(pairs) == 1 + context
    ours, theirs = ({name: pair[i] for name, pair in pairs.items()} for i in (0, 1))
    assert_gradients_close(ours, theirs, narrow)


@pytest.mark.parametrize("model", BLOCKS)
def test_gradients_of_a_block(rng, narrow, model):
    block = make_block(rng, narrow, 24, 4, 50, **BLOCKS[model])
    x, dout = random(rng, 2, 2, 400, 24, dtype=narrow)
    options = {"lengths": [400, 133], "is_causal": True}
    x[1, 133:] = np.nan
    out, vjp = block.vjp(x, **options)
    assert out.tobytes() == block(x, **options).tobytes()
    found = vjp(dout)
    expected = doubled(block).vjp(x.astype(np.float64), **options)[1](dout.astype(np.float64))
    expected.parameters.pop("attention.k_bias")
    assert_gradients_close(found.parameters, expected.parameters, narrow)
    assert_gradients_close({"x": found.x}, {"x": expected.x}, narrow)
    np.testing.assert_array_equal(found.x[1, 133:], 0)


# ---- calls -------------------------------------------------------------------------------------


@pytest.mark.parametrize("window", [None, 8])
def test_a_cache_gives_the_whole(rng, narrow, window):
    block = make_block(rng, narrow, 24, 4, 50, **LLAMA, qk_norm=True)
    x = random(rng, 2, 30, 24, dtype=narrow)
    left = None if window is None else (window - 1, None)
    whole = block(x, is_causal=True, window=left).astype(np.float64)
    cache = block.attention.new_cache(2, window=window)
    assert cache.k.dtype == narrow
    steps = [block(x[:, a:b], cache=cache) for a, b in ((0, 20), (20, 21), (21, 27), (27, 30))]
    found = np.concatenate(steps, axis=1).astype(np.float64)
    unit = np.spacing(narrow.type(1)).astype(np.float64)
    np.testing.assert_allclose(found, whole, rtol=0, atol=2 * unit * np.abs(whole).max())


def test_a_quantized_cache(rng, narrow):
    layer = make_layer(rng, narrow, 64, 4, rotary=True)
    x = random(rng, 2, 30, 64, dtype=narrow)
    whole = layer(x, is_causal=True).astype(np.float64)
    cache = layer.new_cache(2, quantize=True)
    found = np.concatenate([layer(x[:, :20], cache=cache), layer(x[:, 20:], cache=cache)], axis=1)
    assert found.dtype == narrow
    np.testing.assert_allclose(found.astype(np.float64), whole, rtol=0, atol=0.05)


@pytest.mark.parametrize("bad", [np.nan, np.inf, 6e4])
def test_padding_changes_no_bit(rng, narrow, bad):
    for model, options in BLOCKS.items():
        block = make_block(rng, narrow, 24, 4, 50, **options)
        x, dout = random(rng, 2, 3, 20, 24, dtype=narrow)
        lengths, found = [20, 7, 0], []
        for what in (0, bad):
            for i, n in enumerate(lengths):
                x[i, n:] = dout[i, n:] = what
            out, vjp = block.vjp(x, lengths=lengths)
            gradients = vjp(dout)
            of_all = [out, block(x, lengths=lengths), gradients.x, *gradients.parameters.values()]
            found.append([a.tobytes() for a in of_all])
        assert found[0] == found[1], model
        assert not out[2].any()
        layer, inside = block.attention, []
        for what in (0, bad):
            for i, n in enumerate(lengths):
                x[i, n:] = what
            inside.append(layer(x, lengths=lengths).tobytes())
        assert inside[0] == inside[1]


def test_large_numbers(rng, narrow):
    """Squares of what 16 bits hold are no infinity in the norms."""
    largest = float(np.finfo(np.float16).max) if narrow == np.float16 else 3e38
    block = na.TransformerBlock(16, 2, norm_first=False, norm_epsilon=2e-38, dtype=narrow)
    for name, parameter in block.parameters().items():
        if not name.startswith("norm"):
            parameter[...] = 0
    x = random(rng, 3, 16, dtype=narrow)
    expected = block(x).astype(np.float64)
    for size in (largest / 4, 1e-6):
        out = block((x.astype(np.float64) * size).astype(narrow)).astype(np.float64)
        np.testing.assert_allclose(out, expected, rtol=0, atol=0.15)


def test_numpys_error_state_changes_nothing(rng, narrow):
    sizes = np.array([6e4, 1e-7, 1, 100, 0])[:, np.newaxis]
    x = (rng.standard_normal((2, 20, 24)) * np.tile(sizes, (4, 1))).clip(-6e4, 6e4).astype(narrow)
    for options in BLOCKS.values():
        block = make_block(rng, narrow, 24, 4, **options)
        found = []
        for state in ("ignore", "raise"):
            with np.errstate(all=state):
                out, vjp = block.vjp(x)
                gradients = vjp(x)
                found.append([a.tobytes() for a in (out, block(x), gradients.x)])
                layer_out, vjp = block.attention.vjp(x)
                found[-1] += [a.tobytes() for a in (layer_out, vjp(x).x)]
        assert found[0] == found[1]


# ---- parameters --------------------------------------------------------------------------------


def test_random_numbers_are_those_of_float32_rounded(narrow):
    for make in (na.MultiHeadAttention, na.TransformerBlock):
        sixteen, single = (make(48, 4, dtype=dtype, rng=3) for dtype in (narrow, np.float32))
        for name, x in sixteen.parameters().items():
            assert x.dtype == narrow
            assert x.tobytes() == single.parameters()[name].astype(narrow).tobytes()


@pytest.mark.parametrize("make", [make_layer, make_block])
def test_what_is_saved_is_loaded_to_the_bit(tmp_path, rng, narrow, make):
    safetensors = pytest.importorskip("safetensors")
    module = make(rng, narrow, 24, 4, rotary=True, qk_norm=True)
    module.save(tmp_path / "file")
    with safetensors.safe_open(tmp_path / "file", framework="numpy") as file:
        dtypes = {file.get_slice(name).get_dtype() for name in file.keys()}  # noqa: SIM118
    assert dtypes == {"F16" if narrow == np.float16 else "BF16"}
    for loaded in (type(module).load(tmp_path / "file"), pickle.loads(pickle.dumps(module))):
        assert repr(loaded) == repr(module)
        assert narrow.name in repr(loaded)
        for name, x in module.parameters().items():
            assert loaded.parameters()[name].dtype == narrow
            assert loaded.parameters()[name].tobytes() == x.tobytes()


def test_the_name_bfloat16_brings_its_package(tmp_path, monkeypatch):
    pytest.importorskip("safetensors")
    pytest.importorskip("ml_dtypes")
    na.MultiHeadAttention(8, 2, dtype="bfloat16").save(tmp_path / "file")
    code = """
import sys, numattn as na
assert "ml_dtypes" not in sys.modules
make = {
    "load": lambda: na.MultiHeadAttention.load(sys.argv[2]),
    "layer": lambda: na.MultiHeadAttention(8, 2, dtype="bfloat16"),
    "cache": lambda: na.KVCache(1, 2, 4, dtype="bfloat16").k,
}[sys.argv[1]]
assert make().dtype.name == "bfloat16"
"""
    for what in ("load", "layer", "cache"):
        command = [sys.executable, "-c", code, what, tmp_path / "file"]
        subprocess.run(command, check=True)
    monkeypatch.setitem(sys.modules, "ml_dtypes", None)  # as if it were not installed
    for call in (
        lambda: na.MultiHeadAttention.load(tmp_path / "file"),
        lambda: na.TransformerBlock(8, 2, dtype="bfloat16"),
    ):
        with pytest.raises(ImportError, match=r"dtype bfloat16 needs ml_dtypes: pip install"):
            call()


def test_given_weights(rng, narrow):
    weights = dict(zip(("q", "k", "v", "o"), random(rng, 4, 24, 24, dtype=narrow), strict=True))
    given = {f"{name}_weight": x for name, x in weights.items()} | {"transposed": True}
    layer = na.MultiHeadAttention.from_weights(**given, num_heads=4)
    assert layer.dtype == np.float32
    for dtype in (narrow, narrow.name):
        layer = na.MultiHeadAttention.from_weights(**given, num_heads=4, dtype=dtype)
        assert layer.dtype == narrow
        for name, x in weights.items():
            assert layer.parameters()[f"{name}_weight"].tobytes() == x.tobytes()
    other = named_dtype("bfloat16" if narrow == np.float16 else "float16")
    large = {**given, "q_weight": np.full((24, 24), 1e5).astype(named_dtype("bfloat16"))}
    if narrow == np.float16:
        with pytest.raises(ValueError, match="q_weight: got values too large for float16"):
            na.MultiHeadAttention.from_weights(**large, num_heads=4, dtype=narrow)
    else:
        na.MultiHeadAttention.from_weights(**large, num_heads=4, dtype=narrow)
    layer = na.MultiHeadAttention(24, 4, dtype=narrow)
    for dtype in (np.float32, other):
        with pytest.raises(TypeError, match=rf"x: got dtype \w+, expected {narrow.name}, the"):
            layer(np.zeros((5, 24), dtype))
    with pytest.raises(TypeError, match=rf"cache: got dtype float32, expected {narrow.name}, the"):
        layer(np.zeros((1, 5, 24), narrow), cache=na.KVCache(1, 4, 6))
    with pytest.raises(TypeError, match=rf"dout: got dtype float32, expected {narrow.name}, the"):
        layer.vjp(np.zeros((5, 24), narrow))[1](np.zeros((5, 24), np.float32))


# ---- PyTorch -----------------------------------------------------------------------------------

SHAPES = {"MiniLM": (384, 12, 1536, False), "GPT-2": (768, 12, 3072, True)}


@pytest.mark.parametrize("model", SHAPES)
def test_as_exact_as_torch(rng, model):
    """In bfloat16, as it computes it; both are compared with float64."""
    torch = pytest.importorskip("torch")
    torch.manual_seed(0)
    dim, heads, hidden, norm_first = SHAPES[model]

    def gelu_tanh(x):
        return torch.nn.functional.gelu(x, approximate="tanh")

    module = torch.nn.TransformerEncoderLayer(
        dim, heads, hidden, dropout=0.0, activation=gelu_tanh if norm_first else "gelu",
        batch_first=True, norm_first=norm_first, dtype=torch.bfloat16,
    )  # fmt: skip
    state = module.state_dict()
    names = {"o": "self_attn.out_proj", "up": "linear1", "down": "linear2", "norm1": "norm1",
             "norm2": "norm2"}  # fmt: skip
    weights = {
        f"{ours}_{kind}": state[f"{theirs}.{kind}"]
        for ours, theirs in names.items()
        for kind in ("weight", "bias")
    }
    for kind in ("weight", "bias"):
        joined = torch.chunk(state[f"self_attn.in_proj_{kind}"], 3)
        weights |= {f"{part}_{kind}": x for part, x in zip("qkv", joined, strict=True)}
    block, wide = (
        na.TransformerBlock.from_weights(
            **weights, num_heads=heads, norm_first=norm_first, dtype=dtype,
            activation="gelu_tanh" if norm_first else "gelu",
        )
        for dtype in ("bfloat16", "float64")
    )  # fmt: skip
    x, dout = (numbers(rng, 24, dim).astype("bfloat16") for _ in range(2))
    of_x = torch.tensor(x.astype(np.float32)).bfloat16().requires_grad_()
    mask = torch.nn.Transformer.generate_square_subsequent_mask(24, dtype=torch.bfloat16)
    out = module(of_x, src_mask=mask if norm_first else None)
    out.backward(torch.tensor(dout.astype(np.float32)).bfloat16())
    theirs = {
        "out": out.detach(), "x": of_x.grad, "up_weight": module.linear1.weight.grad.T,
        "norm1_weight": module.norm1.weight.grad, "o_bias": module.self_attn.out_proj.bias.grad,
    }  # fmt: skip

    def results(block, dtype):
        out, vjp = block.vjp(x.astype(dtype), is_causal=norm_first)
        gradients = vjp(dout.astype(dtype))
        of_attention = {
            name.removeprefix("attention."): a for name, a in gradients.parameters.items()
        }
        return {"out": out, "x": gradients.x, **of_attention}

    ours, exact = results(block, block.attention.dtype), results(wide, np.float64)
    for name, tensor in theirs.items():
        errors = [
            np.linalg.norm(a.astype(np.float64) - exact[name])
            for a in (ours[name], tensor.float().numpy())
        ]
        assert errors[0] <= 1.2 * errors[1], (name, errors)
        assert errors[0] < 0.02 * np.linalg.norm(exact[name]), name
