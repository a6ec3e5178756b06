"""Promise: `TransformerBlock` computes what models' blocks do, and its gradients."""

import itertools
from concurrent.futures import ThreadPoolExecutor

import numattn as na
import numpy as np
import pytest
from checks import numbers
from layers import block_by_hand
from numattn import _numpy_activations
from pages import run_page

ACTIVATIONS = list(_numpy_activations.ACTIVATIONS)
KINDS = list(itertools.product(["layer", "rms"], [True, False], ACTIVATIONS, [False, True]))
LLAMA = {
    "norm": "rms", "activation": "silu", "gated": True, "bias": False, "rotary": True,
    "kv_heads": 2, "qk_norm": True,
}  # fmt: skip
GPT2 = {"activation": "gelu_tanh"}
BERT = {"norm_first": False}
MODELS = {"llama": LLAMA, "gpt2": GPT2, "bert": BERT}


def make(rng, *sizes, dtype="float64", **options):
    """Return a block in which nothing is 0 or 1."""
    block = na.TransformerBlock(*sizes, **options, dtype=dtype, rng=1)
    for name, x in block.parameters().items():
        if x.ndim == 1:
            x += numbers(rng, *x.shape, dtype=x.dtype) / 3
        assert np.count_nonzero(x), name
    return block


# ---- a formula in float64 ----------------------------------------------------------------------


@pytest.mark.parametrize(("norm", "norm_first", "activation", "gated"), KINDS)
def test_formula(rng, norm, norm_first, activation, gated):
    kind = {"norm": norm, "norm_first": norm_first, "activation": activation, "gated": gated}
    # Long enough for several chunks of rows, of which the last one is shorter.
    for tokens, epsilon in ((5, 1e-5), (701, 0.3)):
        block = make(rng, 8, 2, 50, **kind, norm_epsilon=epsilon)
        x = numbers(rng, 2, tokens, 8, dtype=np.float64)
        expected = block_by_hand(block, x, **kind, norm_epsilon=epsilon)
        np.testing.assert_allclose(block(x), expected, rtol=0, atol=1e-12)
        small = na.TransformerBlock(8, 2, 50, **kind, norm_epsilon=epsilon)
        for name, parameter in small.parameters().items():
            parameter[...] = block.parameters()[name]
        out = small(x.astype(np.float32))
        assert out.dtype == np.float32
        np.testing.assert_allclose(out, expected, rtol=0, atol=3e-5)


@pytest.mark.parametrize(("norm", "norm_first", "activation", "gated"), KINDS)
def test_differences(rng, norm, norm_first, activation, gated):
    block = make(rng, 4, 2, 6, norm=norm, norm_first=norm_first, activation=activation, gated=gated)
    x, dout = numbers(rng, 2, 2, 3, 4, dtype=np.float64)
    check_differences(rng, block, x, dout, is_causal=True)


def change(rng, x, total, step=1e-5):
    """Return a direction, and how the total changes along it."""
    direction, before = rng.standard_normal(x.shape), x.copy()
    sums = []
    for sign in (1, -1):
        x[...] = before + sign * step * direction
        sums.append(total())
    x[...] = before
    return direction, (sums[0] - sums[1]) / (2 * step)


def check_differences(rng, block, x, dout, **options):
    out, vjp = block.vjp(x, **options)
    np.testing.assert_array_equal(out, block(x, **options))
    gradients = vjp(dout)
    assert list(gradients.parameters) == list(block.parameters())
    found = {"x": gradients.x, **gradients.parameters}
    for which, array in {"x": x, **block.parameters()}.items():
        assert found[which].shape == array.shape
        for _ in range(2):
            direction, expected = change(rng, array, lambda: (block(x, **options) * dout).sum())
            along = np.vdot(found[which], direction)
            assert along == pytest.approx(expected, rel=1e-6, abs=1e-7), which


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize(
    "options",
    [
        {"lengths": [3, 1], "is_causal": True},
        {"window": (1, 1), "softcap": 0.9},
        {"mask": np.tri(3, dtype=bool), "tail_mask": np.eye(3, 1, dtype=bool), "lengths": 2},
    ],
    ids=["lengths", "window", "masks"],
)
def test_differences_with_options_of_attention(rng, model, options):
    # Short queries would have a norm that is too curved for differences.
    block = make(rng, 8, 4, 6, head_dim=6, **MODELS[model])
    x, dout = numbers(rng, 2, 2, 3, 8, dtype=np.float64)
    check_differences(rng, block, x, dout, **options)


def test_gradients_of_a_call_s_bias_and_sinks(rng):
    block = make(rng, 8, 2, 12)
    x, dout = numbers(rng, 2, 3, 5, 8, dtype=np.float64)
    given = {"bias": numbers(rng, 2, 5, 5, dtype=np.float64), "sinks": np.array([0.5, -1.0])}
    _, vjp = block.vjp(x, bias_gradient=True, scale=0.7, alibi_slopes=[0.1, 0.2], **given)
    gradients = vjp(dout)

    def total():
        return (block(x, scale=0.7, alibi_slopes=[0.1, 0.2], **given) * dout).sum()

    for name, array in given.items():
        direction, expected = change(rng, array, total)
        along = np.vdot(getattr(gradients, name), direction)
        assert along == pytest.approx(expected, rel=1e-6), name
    assert block.vjp(x)[1](dout)[2:] == (None, None)


def test_gradients_of_many_rows_are_sums_of_those_of_few(rng):
    """Chunks of rows, the last one shorter, add up."""
    for model, options in MODELS.items():
        block = make(rng, 8, 4, 40, **options)
        x, dout = numbers(rng, 2, 30, 100, 3, 8, dtype=np.float64)
        whole = block.vjp(x)[1](dout)
        parts = [block.vjp(x[i])[1](dout[i]) for i in range(30)]
        for i, part in enumerate(parts):
            np.testing.assert_allclose(part.x, whole.x[i], rtol=0, atol=1e-11)
        for name, d in whole.parameters.items():
            total = sum(part.parameters[name] for part in parts)
            np.testing.assert_allclose(total, d, rtol=1e-9, atol=1e-9, err_msg=(model, name))


def test_dropout_is_of_attention(rng):
    block = make(rng, 8, 2)
    x = numbers(rng, 2, 6, 8, dtype=np.float64)
    out, vjp = block.vjp(x, dropout=0.5, rng=3)
    assert not np.allclose(out, block(x), atol=0.01)
    dout = numbers(rng, *out.shape, dtype=np.float64)
    direction, expected = change(rng, x, lambda: (block.vjp(x, dropout=0.5, rng=3)[0] * dout).sum())
    assert np.vdot(vjp(dout).x, direction) == pytest.approx(expected, rel=1e-6)


# ---- norms -------------------------------------------------------------------------------------


@pytest.mark.parametrize("norm", ["layer", "rms"])
def test_norms_take_numbers_of_any_size(rng, norm):
    """A block whose attention and network add nothing shows its norms."""
    block = na.TransformerBlock(16, 2, norm=norm, norm_first=False, norm_epsilon=2e-38)
    for name, parameter in block.parameters().items():
        if not name.startswith("norm"):
            parameter[...] = 0
    x = numbers(rng, 1, 5, 16)
    expected, vjp = block.vjp(x)
    gradients = vjp(x)
    for power in (126, -40):
        scaled, scaled_vjp = block.vjp(np.ldexp(x / 4, power))
        np.testing.assert_allclose(scaled, expected, rtol=1e-6, atol=1e-6)
        d = scaled_vjp(x)
        np.testing.assert_allclose(np.ldexp(d.x, power - 2), gradients.x, rtol=0, atol=1e-5)
        for name, one in d.parameters.items():
            if name.startswith("norm"):
                np.testing.assert_allclose(one, gradients.parameters[name], rtol=1e-5, atol=1e-6)
    means = expected.mean(-1)
    assert (np.abs(means).max() < 1e-6) == (norm == "layer")
    np.testing.assert_allclose(np.square(expected).mean(-1), 1, rtol=1e-5)


# ---- calls -------------------------------------------------------------------------------------


@pytest.mark.parametrize("model", MODELS)
def test_threads_change_no_bits(rng, model):
    """Neither of results nor of gradients, whose sums go over all rows."""
    block = make(rng, 24, 4, **MODELS[model], dtype="float32")
    x = numbers(rng, 30, 50, 24)  # several work items
    found = []
    for num_threads in (1, 3):
        out, vjp = block.vjp(x, num_threads=num_threads)
        assert block(x, num_threads=num_threads).tobytes() == out.tobytes()
        gradients = vjp(x)
        found.append([out, gradients.x, *gradients.parameters.values()])
    for one, other in zip(*found, strict=True):
        assert one.tobytes() == other.tobytes()
    for call in (block, block.vjp):
        with pytest.raises(ValueError, match="num_threads: got 0, expected"):
            call(x, num_threads=0)
        with pytest.raises(TypeError, match="num_threads: got"):
            call(x, num_threads="2")


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_padding_does_not_show(any_backend, rng, model, bad):
    block = make(rng, 24, 4, **MODELS[model], dtype="float32")
    x, dout = numbers(rng, 2, 4, 9, 24)
    lengths = [9, 5, 0, 1]
    out, vjp = block.vjp(x, lengths=lengths)
    expected = vjp(dout)
    for i, n in enumerate(lengths):
        np.testing.assert_array_equal(out[i, n:], 0)
        np.testing.assert_array_equal(expected.x[i, n:], 0)
        np.testing.assert_allclose(out[i, :n], block(x[i, :n]), rtol=0, atol=1e-5)
        x[i, n:] = dout[i, n:] = bad
    with np.errstate(all="raise"):
        again, vjp = block.vjp(x, lengths=lengths)
        gradients = vjp(dout)
    np.testing.assert_array_equal(again, out)
    np.testing.assert_array_equal(block(x, lengths=lengths), out)
    np.testing.assert_array_equal(gradients.x, expected.x)
    for name, d in gradients.parameters.items():
        np.testing.assert_array_equal(d, expected.parameters[name], err_msg=name)


@pytest.mark.parametrize("model", MODELS)
def test_tokens_one_after_the_other(any_backend, rng, model):
    blocks = [make(rng, 24, 4, **MODELS[model], dtype="float32") for _ in range(2)]
    x = numbers(rng, 2, 9, 24)
    whole = x
    for block in blocks:
        whole = block(whole, is_causal=True)
    caches = [na.KVCache(2, block.attention._kv_heads, 6) for block in blocks]
    steps = []
    for part in (x[:, :4], *(x[:, i : i + 1] for i in range(4, 9))):
        for block, cache in zip(blocks, caches, strict=True):
            part = block(part, cache=cache)
        steps.append(part)
    np.testing.assert_allclose(np.concatenate(steps, axis=1), whole, rtol=0, atol=1e-5)


def test_a_padded_prompt_and_a_cache(rng):
    block = make(rng, 24, 4, **LLAMA)
    x = numbers(rng, 2, 9, 24, dtype=np.float64)
    cache = na.KVCache(2, 2, 6, dtype="float64")
    first = block(x[:, :5], cache=cache, lengths=[5, 2])
    then = block(x[:, 5:], cache=cache)
    np.testing.assert_array_equal(first[1, 2:], 0)
    alone = np.concatenate([x[1, :2], x[1, 5:]])
    expected = block(alone, is_causal=True)
    np.testing.assert_allclose(first[1, :2], expected[:2], rtol=0, atol=1e-12)
    np.testing.assert_allclose(then[1], expected[2:], rtol=0, atol=1e-12)


def test_weights_are_the_attentions(rng):
    block = make(rng, 24, 4, dtype="float32")
    x = numbers(rng, 2, 9, 24)
    out, weights = block(x, lengths=[9, 4], return_weights=True)
    np.testing.assert_array_equal(out, block(x, lengths=[9, 4]))
    np.testing.assert_allclose(weights[0].sum(-1), 1, rtol=1e-5)
    assert weights.shape == (2, 4, 9, 9)
    np.testing.assert_array_equal(weights[1, :, :, 4:], 0)


@pytest.mark.parametrize("model", MODELS)
def test_arrays_stay_as_they_are(rng, model):
    """Inputs of any strides are read; results are the caller's; gradients may be taken again."""
    block = make(rng, 24, 4, **MODELS[model])
    x, dout = numbers(rng, 2, 2, 9, 24, dtype=np.float64)
    out, vjp = block.vjp(x)
    expected, kept = vjp(dout), out.copy()
    out[...] = np.nan
    for strange in (np.asfortranarray, lambda a: np.repeat(a, 2, -1)[..., ::2], np.ndarray.tolist):
        np.testing.assert_allclose(block(strange(x)), kept, rtol=0, atol=1e-12)
        np.testing.assert_allclose(block(strange(x[0])), kept[0], rtol=0, atol=1e-12)
        found = block.vjp(strange(x))[1](strange(dout))
        np.testing.assert_allclose(found.x, expected.x, rtol=0, atol=1e-12)
    x.flags.writeable = dout.flags.writeable = False
    _, vjp = block.vjp(x)
    with ThreadPoolExecutor(3) as pool:
        for found in pool.map(vjp, [dout] * 6):
            np.testing.assert_array_equal(found.x, expected.x)
            for name, d in found.parameters.items():
                np.testing.assert_array_equal(d, expected.parameters[name])


@pytest.mark.parametrize("shape", [(2, 0, 8), (0, 3, 8), (3, 8), (2, 1, 3, 8)])
def test_any_leading_axes(rng, shape):
    block = make(rng, 8, 2)
    x = numbers(rng, *shape, dtype=np.float64)
    out, vjp = block.vjp(x)
    assert block(x).shape == out.shape == vjp(x).x.shape == shape


def test_parameters_are_the_blocks_own(rng):
    block = make(rng, 8, 2, 6, gated=True)
    assert list(block.parameters()) == [
        "norm1_weight", "norm1_bias", "attention.q_weight", "attention.k_weight",
        "attention.v_weight", "attention.o_weight", "attention.q_bias", "attention.k_bias",
        "attention.v_bias", "attention.o_bias", "norm2_weight", "norm2_bias", "up_weight",
        "up_bias", "gate_weight", "gate_bias", "down_weight", "down_bias",
    ]  # fmt: skip
    assert block.num_parameters == 4 * 8 + 4 * 72 + 2 * (48 + 6) + 48 + 8
    for name in ("down_weight", "down_bias", "attention.o_weight", "attention.o_bias"):
        block.parameters()[name][...] = 0
    x = numbers(rng, 3, 8, dtype=np.float64)
    np.testing.assert_array_equal(block(x), x)


def test_random_numbers_are_drawn_once():
    one, same, other = (na.TransformerBlock(16, 2, rng=seed) for seed in (3, 3, 4))
    for name, x in one.parameters().items():
        np.testing.assert_array_equal(x, same.parameters()[name])
        if x.ndim == 2:
            assert not np.array_equal(x, other.parameters()[name])
            assert np.std(x) == pytest.approx(1 / np.sqrt(len(x)), rel=0.2)
    assert not np.array_equal(
        one.parameters()["up_weight"][:, :16], one.parameters()["attention.q_weight"]
    )


# ---- files and other libraries' weights --------------------------------------------------------


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_what_is_saved_is_loaded_to_the_bit(tmp_path, rng, model, dtype):
    pytest.importorskip("safetensors")
    block = make(rng, 24, 4, 10, **MODELS[model], dtype=dtype, norm_epsilon=0.01)
    block.save(tmp_path / "block")
    loaded = na.TransformerBlock.load(tmp_path / "block")
    assert repr(loaded) == repr(block)
    assert list(loaded.parameters()) == list(block.parameters())
    x = numbers(rng, 2, 5, 24, dtype=dtype)
    assert loaded(x).tobytes() == block(x).tobytes()


def test_files_that_are_no_blocks(tmp_path):
    numpy = pytest.importorskip("safetensors.numpy")
    path = tmp_path / "file"
    na.MultiHeadAttention(8, 2).save(path)
    with pytest.raises(ValueError, match=r"path: .*no 'numattn\.TransformerBlock'"):
        na.TransformerBlock.load(path)
    block = na.TransformerBlock(8, 2)
    block.save(path)
    with pytest.raises(ValueError, match=r"path: .*no 'numattn\.MultiHeadAttention'"):
        na.MultiHeadAttention.load(path)
    import json

    import safetensors

    with safetensors.safe_open(path, framework="numpy") as file:
        description = json.loads(file.metadata()["numattn.TransformerBlock"])
    arrays = block.parameters()
    without = {name: x for name, x in arrays.items() if name != "up_bias"}
    for bad, change, message in (
        (arrays, {"activation": "tan"}, "activation: got 'tan', expected one of 'gelu'"),
        (arrays, {"hidden_dim": 0}, "hidden_dim: got 0"),
        (arrays, {"hidden_dim": 2**40}, r"up_weight: got shape \(8, 32\), expected \(8, 1099"),
        (arrays, {"attention": []}, "attention: got list, expected a mapping"),
        (arrays, {"attention": {}}, "embed_dim: got nothing"),
        (arrays, {"more": 1}, "got 'more', expected only attention, hidden_dim"),
        (arrays, {"norm_epsilon": "x"}, "norm_epsilon: got 'x'"),
        (without, {}, "up_bias: got no such array, only"),
        (arrays | {"extra": np.zeros(1, np.float32)}, {}, "arrays: got 'extra'"),
        (arrays | {"attention.extra": np.zeros(1, np.float32)}, {}, "arrays: got 'extra'"),
        (arrays | {"up_bias": np.zeros(32)}, {}, "up_bias: got dtype F64, expected float32"),
    ):
        text = json.dumps(description | change)
        numpy.save_file(bad, path, metadata={"numattn.TransformerBlock": text})
        with pytest.raises(ValueError, match=message):
            na.TransformerBlock.load(path)


def as_given(block, transposed):
    """Return the arguments of `from_weights` for the same block."""
    return {
        name.removeprefix("attention."): x.T if x.ndim == 2 and not transposed else x
        for name, x in block.parameters().items()
    }


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("model", MODELS)
def test_weights_of_matrices_both_ways(rng, model, transposed):
    block = make(rng, 24, 4, 10, **MODELS[model], dtype="float32")
    options = {
        name: x for name, x in MODELS[model].items() if name not in ("gated", "bias", "qk_norm")
    }
    weights = as_given(block, transposed)
    copy = na.TransformerBlock.from_weights(
        **weights, num_heads=4, **options, transposed=transposed
    )
    assert repr(copy) == repr(block)
    x = numbers(rng, 2, 5, 24)
    assert copy(x).tobytes() == block(x).tobytes()
    assert not any(np.shares_memory(a, weights[n]) for n, a in copy._parameters.items())
    with pytest.raises(ValueError, match="_weight: got shape"):
        na.TransformerBlock.from_weights(
            **weights, num_heads=4, **options, transposed=not transposed
        )


def test_missing_biases_are_zero(rng):
    block = make(rng, 24, 4, 10, gated=True)
    given = as_given(block, transposed=True)
    for present, absent in (
        (["q_bias"], ["k_bias", "v_bias", "o_bias"]),
        (["gate_bias"], ["up_bias", "down_bias"]),
        (["norm1_bias"], ["norm2_bias"]),
    ):
        some = {n: x for n, x in given.items() if not n.endswith("bias") or n in present}
        made = na.TransformerBlock.from_weights(**some, num_heads=4, transposed=True).parameters()
        names = {name.removeprefix("attention."): x for name, x in made.items()}
        for name in absent:
            np.testing.assert_array_equal(names[name], 0)
        for name in present:
            np.testing.assert_array_equal(names[name], given[name])
        assert sum(name.endswith("bias") for name in names) == len(present) + len(absent)


# ---- the blocks of transformers and PyTorch ----------------------------------------------------


def named(state, names, prefix):
    """Return weights and biases by our names, of a state_dict."""
    return {
        f"{ours}_{kind}": state[f"{prefix}{theirs}.{kind}"]
        for ours, theirs in names.items()
        for kind in ("weight", "bias")
        if f"{prefix}{theirs}.{kind}" in state
    }


@pytest.fixture
def double():
    """Make modules of float64."""
    torch = pytest.importorskip("torch")
    pytest.importorskip("transformers")
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    torch.manual_seed(0)
    yield torch
    torch.set_default_dtype(before)


def shake(torch, module):
    """Give norms and biases numbers that show."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter += 0.3 * torch.randn_like(parameter)
    return module.eval()


def states(torch, model, x, **options):
    with torch.no_grad():
        theirs = model(
            inputs_embeds=torch.from_numpy(x), output_hidden_states=True, **options
        ).hidden_states
    return [state.numpy() for state in theirs]


def compare_each(blocks, all_states, atol=1e-10):
    """Compare blocks, each by itself; not the last one, whose result a model gives normed."""
    for block, before, after in zip(blocks[:-1], all_states, all_states[1:-1], strict=False):
        np.testing.assert_allclose(block(before, is_causal=True), after, rtol=0, atol=atol)


def test_gpt2(double, rng):
    from transformers import GPT2Config, GPT2Model

    config = GPT2Config(n_embd=24, n_head=4, n_layer=3, n_positions=16, vocab_size=5)
    model = shake(double, GPT2Model(config))
    state = model.state_dict()
    names = {"o": "attn.c_proj", "up": "mlp.c_fc", "down": "mlp.c_proj", "norm1": "ln_1",
             "norm2": "ln_2"}  # fmt: skip
    blocks = []
    for i in range(3):
        weights = named(state, names, f"h.{i}.")
        for kind in ("weight", "bias"):
            joined = double.chunk(state[f"h.{i}.attn.c_attn.{kind}"], 3, dim=-1)
            weights |= {f"{part}_{kind}": x for part, x in zip("qkv", joined, strict=True)}
        blocks.append(
            na.TransformerBlock.from_weights(
                **weights, num_heads=4, activation="gelu_tanh", transposed=True
            )
        )
    x = numbers(rng, 2, 9, 24, dtype=np.float64)
    compare_each(blocks, states(double, model, x))
    out = x + model.wpe.weight.detach().numpy()[:9]
    for block in blocks:
        out = block(out, is_causal=True)
    with double.no_grad():
        normed = model.ln_f(double.from_numpy(out)).numpy()
        expected = model(inputs_embeds=double.from_numpy(x)).last_hidden_state.numpy()
    np.testing.assert_allclose(normed, expected, rtol=0, atol=1e-10)


def test_llama(double, rng):
    from transformers import LlamaConfig, LlamaModel

    config = LlamaConfig(
        hidden_size=24, num_attention_heads=4, num_key_value_heads=2, num_hidden_layers=3,
        intermediate_size=40, vocab_size=5, rms_norm_eps=1e-5,
    )  # fmt: skip
    model = shake(double, LlamaModel(config))
    names = {
        **{part: f"self_attn.{part}_proj" for part in "qkvo"},
        **{part: f"mlp.{part}_proj" for part in ("up", "gate", "down")},
        "norm1": "input_layernorm", "norm2": "post_attention_layernorm",
    }  # fmt: skip
    blocks = [
        na.TransformerBlock.from_weights(
            **named(model.state_dict(), names, f"layers.{i}."), num_heads=4, norm="rms",
            activation="silu", norm_epsilon=1e-5, rotary=True,
        )
        for i in range(3)
    ]  # fmt: skip
    x = numbers(rng, 2, 9, 24, dtype=np.float64)
    compare_each(blocks, states(double, model, x), atol=2e-5)  # its norms are in float32


def test_bert(double, rng):
    from transformers import BertConfig, BertModel

    config = BertConfig(
        hidden_size=24, num_attention_heads=4, num_hidden_layers=3, intermediate_size=40,
        vocab_size=5, max_position_embeddings=16,
    )  # fmt: skip
    model = shake(double, BertModel(config, add_pooling_layer=False))
    names = {
        "q": "attention.self.query", "k": "attention.self.key", "v": "attention.self.value",
        "o": "attention.output.dense", "norm1": "attention.output.LayerNorm",
        "up": "intermediate.dense", "down": "output.dense", "norm2": "output.LayerNorm",
    }  # fmt: skip
    blocks = [
        na.TransformerBlock.from_weights(
            **named(model.state_dict(), names, f"encoder.layer.{i}."), num_heads=4,
            norm_first=False, norm_epsilon=1e-12,
        )
        for i in range(3)
    ]  # fmt: skip
    x = numbers(rng, 2, 9, 24, dtype=np.float64)
    lengths = np.array([9, 5])
    mask = double.from_numpy((np.arange(9) < lengths[:, np.newaxis]).astype(int))
    before, *after = states(double, model, x, attention_mask=mask)
    out = before
    for block, expected in zip(blocks, after, strict=True):
        out = block(out, lengths=lengths)
        for i, n in enumerate(lengths):
            np.testing.assert_allclose(out[i, :n], expected[i, :n], rtol=0, atol=1e-10)


@pytest.mark.thread_unsafe
def test_swin_of_transformers_is_the_how_to_pages(double, rng):
    """Two blocks, the second one with shifted windows, by the functions of the page."""
    matplotlib = pytest.importorskip("matplotlib")
    matplotlib.use("Agg")
    from transformers import SwinConfig, SwinModel

    page, failed = run_page("howto/vision_block.rst")
    matplotlib.pyplot.close("all")
    assert failed == 0
    config = SwinConfig(
        image_size=112, embed_dim=96, depths=[2], num_heads=[3], window_size=7, drop_path_rate=0.0
    )
    layer = shake(double, SwinModel(config, add_pooling_layer=False)).encoder.layers[0]
    names = {
        **{part: f"attention.{part}_proj" for part in "qkvo"}, "norm1": "layernorm_before",
        "up": "mlp.fc1", "down": "mlp.fc2", "norm2": "layernorm_after",
    }  # fmt: skip
    x = numbers(rng, 28, 28, 96, dtype=np.float64)
    shift = page["shift"]
    out, mask = x, None
    for number, theirs in enumerate(layer.blocks):
        state = {name: weight.numpy() for name, weight in theirs.state_dict().items()}
        block = na.TransformerBlock.from_weights(**named(state, names, ""), num_heads=3)
        table = next(each for name, each in state.items() if name.endswith("bias_table"))
        if number == 1:
            out, mask = np.roll(out, (-shift, -shift), axis=(0, 1)), page["mask"][:, np.newaxis]
        bias = table[page["index"]].transpose(2, 0, 1)
        out = page["to_grid"](block(page["to_windows"](out), bias=bias, mask=mask))
    out = np.roll(out, (shift, shift), axis=(0, 1))

    expected = double.from_numpy(x).reshape(1, 28 * 28, 96)
    with double.no_grad():
        for theirs in layer.blocks:
            expected = theirs(expected, (28, 28))
            expected = expected[0] if isinstance(expected, tuple) else expected
    np.testing.assert_allclose(out, expected.numpy().reshape(out.shape), rtol=0, atol=1e-10)


@pytest.mark.parametrize("norm_first", [True, False])
@pytest.mark.parametrize("activation", ["relu", "gelu"])
def test_torch_encoder_layer(rng, norm_first, activation):
    """Its result and all gradients."""
    torch = pytest.importorskip("torch")
    module = torch.nn.TransformerEncoderLayer(
        24, 4, 40, dropout=0.0, activation=activation, batch_first=True, norm_first=norm_first,
        dtype=torch.float64,
    )  # fmt: skip
    shake(torch, module).train()
    names = {"o": "self_attn.out_proj", "up": "linear1", "down": "linear2", "norm1": "norm1",
             "norm2": "norm2"}  # fmt: skip

    def ours(state):
        weights = named(state, names, "")
        for kind in ("weight", "bias"):
            joined = torch.chunk(state[f"self_attn.in_proj_{kind}"], 3)
            weights |= {f"{part}_{kind}": x for part, x in zip("qkv", joined, strict=True)}
        return weights

    block = na.TransformerBlock.from_weights(
        **ours(module.state_dict()), num_heads=4, norm_first=norm_first, activation=activation
    )
    x, dout = numbers(rng, 2, 2, 9, 24, dtype=np.float64)
    tensor = torch.tensor(x, requires_grad=True)
    theirs = module(tensor)
    theirs.backward(torch.from_numpy(dout))
    out, vjp = block.vjp(x)
    np.testing.assert_allclose(out, theirs.detach().numpy(), rtol=0, atol=1e-11)
    gradients = vjp(dout)
    np.testing.assert_allclose(gradients.x, tensor.grad.numpy(), rtol=0, atol=1e-10)
    expected = ours({name: p.grad for name, p in module.named_parameters()})
    for name, d in gradients.parameters.items():
        wanted = expected[name.removeprefix("attention.")].numpy()
        wanted = wanted.T if wanted.ndim == 2 else wanted
        np.testing.assert_allclose(d, wanted, rtol=0, atol=1e-9, err_msg=name)


# ---- what is refused ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"embed_dim": 25}, ValueError, "embed_dim: got 25, expected a multiple of num_heads"),
        ({"hidden_dim": 0}, ValueError, "hidden_dim: got 0, expected at least 1"),
        ({"hidden_dim": 2.5}, TypeError, "hidden_dim: got 2.5 (float), expected an int"),
        ({"norm": "batch"}, ValueError, "norm: got 'batch', expected one of 'layer', 'rms'"),
        ({"norm": "rms_norm"}, ValueError, "did you mean `'rms'`"),
        ({"norm": None}, TypeError, "norm: got None, expected a str"),
        ({"norm_first": 1}, TypeError, "norm_first: got 1 (int), expected True or False"),
        ({"gated": "yes"}, TypeError, "gated: got 'yes' (str), expected True or False"),
        ({"activation": "tanh"}, ValueError, "activation: got 'tanh', expected one of 'gelu',"),
        ({"activation": "gelu_new"}, ValueError, "did you mean `'gelu_tanh'`?"),
        ({"activation": "swiglu"}, ValueError, "did you mean `activation='silu', gated=True`?"),
        ({"activation": np.tanh}, TypeError, "activation: got <ufunc 'tanh'>"),
        ({"norm_epsilon": 0}, ValueError, "norm_epsilon: got 0, expected 1.2e-38 to 3.4e+38"),
        ({"norm_epsilon": "x"}, TypeError, "norm_epsilon: got 'x'"),
        ({"norm_epsilon": np.nan}, ValueError, "norm_epsilon: got nan"),
        ({"bias": 1}, TypeError, "bias: got 1 (int)"),
        ({"kv_heads": 3}, ValueError, "kv_heads: got 3, expected a divisor of num_heads"),
        ({"dtype": "int8"}, TypeError, "dtype: got int8, expected one of float16, bfloat16,"),
        ({"rng": "seed"}, TypeError, "rng: got 'seed'"),
        ({"dim_feedforward": 3}, TypeError, "'dim_feedforward'; did you mean `hidden_dim=`"),
        ({"layer_norm_eps": 3}, TypeError, "did you mean `norm_epsilon=`"),
        ({"context_dim": 3}, TypeError, "'context_dim'; a block attends to its own tokens"),
        ({"anything": 3}, TypeError, "TransformerBlock() got an unexpected keyword"),
    ],
)  # fmt: skip
def test_bad_options(options, error, message):
    with pytest.raises(error) as raised:
        na.TransformerBlock(**{"embed_dim": 24, "num_heads": 4} | options)
    assert message in str(raised.value)


def test_bad_calls(rng):
    block = na.TransformerBlock(24, 4, rng=0)
    x = numbers(rng, 2, 5, 24)
    out, vjp = block.vjp(x)
    cache = na.KVCache(2, 4, 6)
    for call, error, message in (
        (lambda: block(x[..., 1:]), ValueError, "x: got shape (2, 5, 23), expected (..., length"),
        (lambda: block(x.astype(float)), TypeError, "x: got dtype float64, expected float32"),
        (lambda: block(x, context=x), TypeError, "context: got ndarray, expected no context"),
        (lambda: block.vjp(x, context=x), TypeError, "context: got ndarray, expected no con"),
        (lambda: block(x, encoder_hidden_states=x), TypeError, "`MultiHeadAttention` takes a"),
        (
            lambda: block(x, lengths=[6, 1]),
            ValueError,
            "lengths: got 6 at index 0, expected 0 to 5",
        ),
        (lambda: block(x, lengths=2.5), TypeError, "lengths: got dtype float64, expected ints"),
        (lambda: block(x, attn_mask=None), TypeError, "did you mean `mask=`"),
        (lambda: block(x, return_weights=1), TypeError, "return_weights: got 1"),
        (lambda: block(x, cache=3), TypeError, "cache: got int, expected a KVCache"),
        (lambda: block(x[:1], cache=cache), ValueError, "x: got shape (1, 5, 24), expected (2,"),
        (lambda: block(x, cache=cache, softcap=-1), ValueError, "softcap: got -1"),
        (lambda: block(x, cache=cache, return_weights=True), ValueError, "return_weights"),
        (lambda: block.vjp(x, cache=cache), TypeError, "cache: got KVCache, expected no cache"),
        (lambda: vjp(out[:1]), ValueError, "dout: got shape (1, 5, 24), expected (2, 5, 24)"),
        (lambda: vjp(out.astype(float)), TypeError, "dout: got dtype float64, expected float32"),
        (lambda: vjp(np.ma.masked_array(out)), TypeError, "dout: got a masked array"),
    ):
        with pytest.raises(error) as raised:
            call()
        assert message in str(raised.value)
    assert cache.lengths.tolist() == [0, 0]


def test_bad_weights(rng):
    given = as_given(make(rng, 24, 4, 10), transposed=False)
    for change, error, message in (
        ({"up_weight": np.zeros((10, 23))}, ValueError,
         "up_weight: got shape (10, 23), expected (10, 24)"),
        ({"down_weight": np.zeros((24, 11))}, ValueError,
         "down_weight: got shape (24, 11), expected (24, 10)"),
        ({"up_weight": np.zeros(10)}, ValueError, "up_weight: got shape (10,), expected two axes"),
        ({"up_bias": np.zeros(11)}, ValueError, "up_bias: got shape (11,), expected (10,)"),
        ({"gate_bias": np.zeros(10)}, ValueError, "arrays: got 'gate_bias', expected only"),
        ({"gate_weight": np.zeros((9, 24))}, ValueError,
         "gate_weight: got shape (9, 24), expected (10, 24)"),
        ({"norm1_weight": None}, TypeError, "norm1_weight: got None, expected an array"),
        ({"up_weight": None}, TypeError, "up_weight: got None, expected an array"),
        ({"norm2_weight": np.zeros(25)}, ValueError, "norm2_weight: got shape (25,)"),
        ({"norm": "rms"}, ValueError, "arrays: got 'norm1_bias', expected only"),
        ({"norm1_weight": np.zeros(24) + 0j}, TypeError, "expected real numbers"),
        ({"down_bias": np.full(24, 1e300), "dtype": "float32"}, ValueError,
         "down_bias: got values too large for float32"),
        ({"q_norm": np.zeros(6)}, ValueError, "q_norm, k_norm: got only one"),
        ({"transposed": 1}, TypeError, "transposed: got 1"),
        ({"intermediate_size": 1}, TypeError, "from_weights() got an unexpected keyword"),
    ):  # fmt: skip
        with pytest.raises(error) as raised:
            na.TransformerBlock.from_weights(**given | change, num_heads=4)
        assert message in str(raised.value)


def test_numpys_error_state_changes_nothing(rng):
    x = numbers(rng, 2, 5, 24) * np.float32([1e30, 1e-30, 1, 1e38, 0])[:, np.newaxis]
    for options in MODELS.values():
        block = make(rng, 24, 4, **options, dtype="float32")
        with np.errstate(all="ignore"):
            out, vjp = block.vjp(x)
            gradients = vjp(x)
        with np.errstate(all="raise"):
            again, vjp = block.vjp(x)
            assert again.tobytes() == out.tobytes() == block(x).tobytes()
            assert vjp(x).x.tobytes() == gradients.x.tobytes()


def test_a_block_says_what_it_is():
    block = na.TransformerBlock(16, 4, norm="rms", kv_heads=2, gated=True)
    assert repr(block) == (
        "TransformerBlock(16, 4, 64, norm='rms', norm_first=True, activation='gelu', gated=True, "
        "kv_heads=2, dtype=float32)"
    )
