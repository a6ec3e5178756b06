"""Promise: `MultiHeadAttention` is the layer of the models, for their weights."""

import inspect
import json
import tracemalloc

import numattn as na
import numpy as np
import pytest
from checks import numbers
from layers import by_hand, fill, weights_by_hand


@pytest.mark.parametrize(
    "sizes",
    [
        {},
        {"kv_heads": 2, "head_dim": 10, "value_dim": 7},
        {"bias": False, "qk_norm": True, "kv_heads": 1},
        {"qk_norm": True, "norm_epsilon": 0.5},
        {"rotary": True},
        {"rotary": {"base": 500.0, "rotary_dim": 4, "interleaved": True}, "qk_norm": True},
    ],
    ids=str,
)
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_self_attention(any_backend, rng, sizes, dtype):
    layer = fill(na.MultiHeadAttention(24, 4, **sizes, dtype=dtype, rng=1), rng)
    x = numbers(rng, 2, 9, 24).astype(dtype)
    rotary = sizes.get("rotary")
    known = {"heads": 4, "kv_heads": sizes.get("kv_heads", 4)}
    known["rotary"] = {} if rotary is True else rotary
    known["norm_epsilon"] = sizes.get("norm_epsilon", 1e-6)
    for options, theirs in (
        ({}, {}),
        ({"is_causal": True}, {"is_causal": True}),
        ({"lengths": [9, 5]}, {"kv_lengths": [9, 5], "q_lengths": [9, 5]}),
        (
            {"lengths": 5, "is_causal": True},
            {"kv_lengths": 5, "q_lengths": 5, "is_causal": True, "q_offset": 0},
        ),
        ({"window": (2, 1), "softcap": 2.0}, {"window": (2, 1), "softcap": 2.0}),
        ({"mask": np.tri(9, dtype=bool)}, {"mask": np.tri(9, dtype=bool)}),
        (
            {"tail_mask": np.tri(9, 4, dtype=bool), "lengths": [9, 3]},
            {"tail_mask": np.tri(9, 4, dtype=bool), "kv_lengths": [9, 3], "q_lengths": [9, 3]},
        ),
    ):
        out = layer(x, **options)
        assert out.dtype == dtype
        expected = by_hand(layer.parameters(), x, x, x, **known, **theirs)
        np.testing.assert_allclose(
            out, expected, rtol=0, atol=2e-5 if dtype == "float32" else 1e-12
        )
    one = layer(x[0], is_causal=True)
    np.testing.assert_allclose(one, layer(x, is_causal=True)[0], rtol=0, atol=1e-5)


def test_cross_attention_and_weights(any_backend, rng):
    layer = fill(na.MultiHeadAttention(24, 4, context_dim=(10, 14), rng=1), rng)
    x, keys, values = (numbers(rng, 2, n, d) for n, d in ((9, 24), (6, 10), (6, 14)))
    known = {"heads": 4, "kv_heads": 4}
    out, weights = layer(x, (keys, values), lengths=[6, 3], return_weights=True)
    expected = by_hand(layer.parameters(), x, keys, values, **known, kv_lengths=[6, 3])
    np.testing.assert_allclose(out, expected, rtol=0, atol=2e-5)
    assert weights.shape == (2, 4, 9, 6)
    np.testing.assert_allclose(weights.sum(axis=-1), 1, rtol=1e-5)
    np.testing.assert_array_equal(weights[1, :, :, 3:], 0)
    layer = fill(na.MultiHeadAttention(24, 4, context_dim=10, rng=1), rng)
    expected = by_hand(layer.parameters(), x, keys, keys, **known)
    np.testing.assert_allclose(layer(x, keys), expected, rtol=0, atol=2e-5)


@pytest.mark.parametrize("has_batch", ["x", "keys", "values", "keys and values"])
def test_weights_have_the_batch_of_the_result(any_backend, rng, has_batch):
    layer = fill(na.MultiHeadAttention(24, 4, context_dim=(10, 14), rng=1), rng)
    x, keys, values = (
        numbers(rng, *((3,) if name in has_batch else ()), *shape)
        for name, shape in (("x", (4, 24)), ("keys", (6, 10)), ("values", (6, 14)))
    )
    mask = rng.random((3, 1, 4, 6)) < 0.7
    for ours, theirs in (
        ({}, {}),
        ({"lengths": [6, 3, 0]}, {"kv_lengths": [6, 3, 0]}),
        ({"mask": mask}, {"mask": mask}),
    ):
        out, weights = layer(x, (keys, values), **ours, return_weights=True)
        full = [np.broadcast_to(a, (3, *a.shape[-2:])) for a in (x, keys, values)]
        expected = by_hand(layer.parameters(), *full, 4, 4, **theirs)
        np.testing.assert_allclose(out, expected, rtol=0, atol=2e-5)
        expected = weights_by_hand(layer.parameters(), *full, 4, 4, **theirs)
        np.testing.assert_allclose(weights, expected, rtol=0, atol=2e-5)


def test_a_mask_that_may_mean_the_batch_is_warned_of_once(any_backend, rng):
    layer = na.MultiHeadAttention(24, 4, rng=1)
    x, mask = numbers(rng, 4, 3, 24), np.tri(3, dtype=bool) & np.ones((4, 1, 1), bool)
    with pytest.warns(UserWarning, match=r"mask: .* is taken as \(Hq, Lq, Lk\)") as caught:
        out, weights = layer(x, mask=mask, return_weights=True)
    assert len(caught) == 1
    assert caught[0].filename == __file__
    expected, pattern = layer(x, mask=mask[np.newaxis], return_weights=True)
    np.testing.assert_array_equal(out, expected)
    np.testing.assert_array_equal(weights, pattern)
    with pytest.warns(UserWarning, match=r"tail_mask: .* is taken as \(Hq, Lq, T\)") as caught:
        of_tail = layer(x, tail_mask=mask, return_weights=True)
    assert len(caught) == 1
    for actual, wanted in zip(of_tail, (expected, pattern), strict=True):
        np.testing.assert_allclose(actual, wanted, rtol=0, atol=1e-6)
    one = layer(x, mask=mask.tolist()[0], return_weights=True)[1]
    np.testing.assert_array_equal(one, layer(x, mask=mask[0], return_weights=True)[1])


@pytest.mark.parametrize(
    "options",
    [{}, {"is_causal": True}, {"window": (2, 1)}, {"mask": np.eye(9, dtype=bool)}],
    ids=str,
)
def test_padding_changes_nothing_and_attends_to_nothing(any_backend, rng, options):
    layer = fill(na.MultiHeadAttention(24, 4, kv_heads=2, rotary=True, qk_norm=True, rng=1), rng)
    x = numbers(rng, 3, 9, 24)
    lengths = [9, 5, 0]
    for i, n in enumerate(lengths):
        x[i, n:] = np.nan
    out, weights = layer(x, lengths=lengths, return_weights=True, **options)
    for i, n in enumerate(lengths):
        own = options | {name: mask[:n, :n] for name, mask in options.items() if name == "mask"}
        alone, pattern = layer(x[i, :n], return_weights=True, **own)
        np.testing.assert_allclose(out[i, :n], alone, rtol=0, atol=2e-6)
        np.testing.assert_allclose(weights[i, :, :n, :n], pattern, rtol=0, atol=2e-6)
        bias = np.broadcast_to(layer.parameters()["o_bias"], (9 - n, 24))
        np.testing.assert_array_equal(out[i, n:], bias)
        np.testing.assert_array_equal(weights[i, :, n:], 0)
        np.testing.assert_array_equal(weights[i, :, :, n:], 0)


@pytest.mark.parametrize(
    ("dtype", "size"),
    [("float32", size) for size in (1e-40, 1e-30, 1e-6, 1, 1e15, 1e19, 1e25, 3e38)]
    + [("float64", size) for size in (1e-150, 1e-30, 1, 1e19, 1e160, 1e308)],
)
def test_norms_of_any_finite_vector(rng, dtype, size):
    layer = na.MultiHeadAttention(4, 1, bias=False, qk_norm=True, dtype=dtype, rng=0)
    for name, array in layer.parameters().items():
        array[...] = np.eye(4) if name.endswith("weight") else [1, -2, 3, 0.5]
    x = (rng.uniform(-1, 1, (3, 4)) * size).astype(dtype)
    x[0, 0], x[1] = size, [size, 0, size, -size]
    q, k, _ = layer._projected(dict.fromkeys("qkv", x), None, None)
    _, weights = layer(x, return_weights=True)
    exact = x.astype(np.float64)
    largest = np.abs(exact).max(-1, keepdims=True)
    mean = ((exact / largest) ** 2).mean(-1, keepdims=True) + 1e-6 / largest / largest
    norms = exact / largest / np.sqrt(mean) * [1, -2, 3, 0.5]
    tolerance = 1e-6 if dtype == "float32" else 1e-15
    # Denormal numbers have few digits.
    tiny = np.finfo(dtype).tiny
    for vectors in (q, k):
        np.testing.assert_allclose(vectors[:, 0], norms, rtol=4 * tolerance, atol=tiny)
    logits = norms @ norms.T / 2
    expected = np.exp(logits - logits.max(-1, keepdims=True))
    expected /= expected.sum(-1, keepdims=True)
    np.testing.assert_allclose(weights[0], expected, rtol=20 * tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("size", [0, 1e-30, 1e-20, 1e-19, 1e-3, 1e10])
def test_any_epsilon_of_norms(rng, dtype, size):
    finfo = np.finfo(dtype)
    for epsilon in (float(finfo.tiny), 1e-12, 1.0, 1e30, float(finfo.max)):
        layer = na.MultiHeadAttention(
            4, 1, bias=False, qk_norm=True, norm_epsilon=epsilon, dtype=dtype, rng=0
        )
        layer.parameters()["q_weight"][...] = np.eye(4)
        x = (rng.uniform(-1, 1, (3, 4)) * size).astype(dtype)
        q, _, _ = layer._projected(dict.fromkeys("qkv", x), None, None)
        exact = x.astype(np.longdouble)
        expected = exact / np.sqrt((exact**2).mean(-1, keepdims=True) + np.longdouble(epsilon))
        np.testing.assert_allclose(
            q[:, 0], expected.astype(np.float64), rtol=8 * finfo.eps, atol=finfo.tiny
        )


def test_the_norm_of_transformers(rng):
    transformers = pytest.importorskip("transformers")
    torch = pytest.importorskip("torch")
    norm = transformers.models.qwen3.modeling_qwen3.Qwen3RMSNorm(6, eps=0.01)
    torch.nn.init.normal_(norm.weight)
    weights = np.split(numbers(rng, 96, 24), 4)
    layer = na.MultiHeadAttention.from_weights(
        *weights, num_heads=4, transposed=False, q_norm=norm.weight, k_norm=norm.weight,
        norm_epsilon=norm.variance_epsilon,
    )  # fmt: skip
    x = numbers(rng, 5, 24) / 10
    q, _, _ = layer._projected(dict.fromkeys("qkv", x), None, None)
    with torch.no_grad():
        expected = norm(torch.tensor((x @ weights[0].T).reshape(5, 4, 6)))
    np.testing.assert_allclose(q, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("size", [0, 1e-44, 1e-38, 1e-20, 1, 1e19, 3e38, np.inf])
@pytest.mark.parametrize(
    "sizes", [{}, {"rotary": True, "qk_norm": True}, {"rotary": {"base": 1e300}}], ids=str
)
def test_the_callers_way_with_floating_point_errors_changes_nothing(any_backend, rng, sizes, size):
    def results():
        own = np.random.default_rng(5)
        layer = na.MultiHeadAttention(24, 4, **sizes, rng=1)
        with np.errstate(all="ignore"):
            x = numbers(own, 2, 5, 24) * np.float32(size)
        yield layer(x)
        yield from layer(x, is_causal=True, lengths=[5, 2], return_weights=True)
        yield from layer(x, softcap=2.0, window=(2, 0), return_weights=True)
        if "rotary" not in sizes:
            yield layer(x, x[:, :3])
            yield layer(x, layer.context_cache(x[:, :3], [3, 2]))
        for window in (None, 4):
            cache = na.KVCache(2, 4, 6, window=window)
            yield layer(x[:, :4], cache=cache, lengths=[4, 3])
            yield layer(x[:, 4:], cache=cache)

    with np.errstate(all="ignore"):
        expected = list(results())
    with np.errstate(all="raise"):
        raising = list(results())
    for ours, theirs in zip(raising, expected, strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_lengths_of_a_context_are_those_of_its_keys_alone(backend, rng):
    layer = fill(na.MultiHeadAttention(24, 4, rng=1), rng)
    x, context = numbers(rng, 2, 4, 24), numbers(rng, 2, 6, 24)
    out = layer(x, context, lengths=[6, 3])
    np.testing.assert_allclose(out[1], layer(x[1], context[1, :3]), rtol=0, atol=2e-6)
    one = layer(x[:, :1], context, lengths=[6, 3], is_causal=True)  # the last token
    np.testing.assert_allclose(one[1], layer(x[1, :1], context[1, :3]), rtol=0, atol=2e-6)
    limits = {"is_causal": True, "window": (2, 0)}
    for names in (["is_causal"], ["window"], ["is_causal", "window"]):
        given = " and ".join(names)
        message = rf"^lengths: got lengths of the context with {given} and 4 .* instead of {given}$"
        with pytest.raises(ValueError, match=message):
            layer(x, context, lengths=[6, 3], **{name: limits[name] for name in names})
    layer(x, context, lengths=[6, 3], window=(None, None))


@pytest.mark.parametrize("window", [None, 4])
@pytest.mark.parametrize("rotary", [None, True])
def test_cache(backend, rng, window, rotary):
    layer = fill(na.MultiHeadAttention(24, 4, kv_heads=2, rotary=rotary, rng=1), rng)
    x = numbers(rng, 2, 12, 24)
    left = None if window is None else (window - 1, None)
    expected = layer(x, is_causal=True, window=left)
    cache = na.KVCache(2, 2, 6, window=window)
    steps = [layer(x[:, a:b], cache=cache) for a, b in ((0, 4), (4, 5), (5, 8), (8, 9), (9, 12))]
    np.testing.assert_allclose(np.concatenate(steps, axis=1), expected, rtol=0, atol=2e-5)
    ragged = na.KVCache(2, 2, 6)
    first = layer(x[:, :5], cache=ragged, lengths=[5, 2])
    second = layer(x[:, 5:6], cache=ragged)
    alone = layer(np.concatenate([x[1:, :2], x[1:, 5:6]], axis=1), is_causal=True)
    np.testing.assert_allclose(first[1, :2], alone[0, :2], rtol=0, atol=2e-5)
    np.testing.assert_allclose(second[1], alone[0, 2:], rtol=0, atol=2e-5)
    np.testing.assert_array_equal(
        first[1, 2:], np.broadcast_to(layer.parameters()["o_bias"], (3, 24))
    )


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_a_new_cache_fits(any_backend, rng, dtype):
    sizes = {"kv_heads": 2, "head_dim": 10, "value_dim": 7}
    layer = fill(na.MultiHeadAttention(24, 4, **sizes, rotary=True, dtype=dtype, rng=1), rng)
    x = numbers(rng, 3, 5, 24, dtype=dtype)
    cache = layer.new_cache(3)
    steps = [layer(x[:, i : i + 1], cache=cache) for i in range(5)]
    expected = by_hand(layer.parameters(), x, x, x, 4, 2, {}, is_causal=True)
    tolerance = 2e-5 if dtype == "float32" else 1e-12
    np.testing.assert_allclose(np.concatenate(steps, axis=1), expected, rtol=0, atol=tolerance)
    options = {"quantize": True, "capacity": 7, "window": 8, "keep_first": 1, "max_rollback": 2}
    expected = repr(na.KVCache(1, 2, 10, 7, dtype=dtype, **options))
    assert repr(layer.new_cache(**options)) == expected


def test_a_new_cache_has_all_options_of_a_cache():
    ours = inspect.signature(na.MultiHeadAttention.new_cache).parameters
    theirs = inspect.signature(na.KVCache).parameters
    of_layer = ("kv_heads", "head_dim", "value_dim", "dtype")
    assert [x for x in ours if x != "self"] == [x for x in theirs if x not in of_layer]
    for name, parameter in ours.items():
        if parameter.kind is parameter.KEYWORD_ONLY:
            assert parameter.default == theirs[name].default


@pytest.mark.parametrize("sizes", [{}, {"window": 8}, {"window": 4, "keep_first": 2}], ids=str)
def test_a_cache_takes_one_length_for_all(backend, rng, sizes):
    layer = fill(na.MultiHeadAttention(24, 4, rotary=True, rng=1), rng)
    x = numbers(rng, 2, 4, 24)
    caches = [na.KVCache(2, 4, 6, **sizes) for _ in range(2)]
    outs = [layer(x, cache=caches[0], lengths=3), layer(x, cache=caches[1], lengths=[3, 3])]
    np.testing.assert_array_equal(*outs)
    np.testing.assert_allclose(outs[0][:, :3], layer(x[:, :3], is_causal=True), rtol=0, atol=2e-5)
    np.testing.assert_array_equal(outs[0][:, 3], np.tile(layer.parameters()["o_bias"], (2, 1)))
    assert [c.lengths.tolist() for c in caches] == [[3, 3]] * 2


def test_a_cache_is_causal_unless_told_otherwise(any_backend, rng):
    layer = fill(na.MultiHeadAttention(24, 4, rotary=True, rng=1), rng)
    x = numbers(rng, 2, 7, 24)
    mask = np.tri(7, dtype=bool)
    mask[4:, 4:] = True
    for options, own in (
        ({}, {"is_causal": True}),
        ({"is_causal": True}, {"is_causal": True}),
        ({"is_causal": np.False_}, {"mask": mask}),
    ):
        cache = na.KVCache(2, 4, 6)
        layer(x[:, :4], cache=cache)
        out = layer(x[:, 4:], cache=cache, **options)
        expected = by_hand(layer.parameters(), x, x, x, 4, 4, rotary={}, **own)
        np.testing.assert_allclose(out, expected[:, 4:], rtol=0, atol=2e-5)


SIZES = (
    "embed_dim", "num_heads", "kv_heads", "head_dim", "value_dim", "context_dim", "bias", "rotary",
    "qk_norm", "norm_epsilon", "dtype",
)  # fmt: skip


def sizes_of(layer):
    return {name: getattr(layer, name) for name in SIZES}


def test_a_layer_tells_its_sizes():
    plain = na.MultiHeadAttention(24, 4)
    assert sizes_of(plain) == dict(
        zip(SIZES, (24, 4, 4, 6, 6, (24, 24), True, None, False, 1e-6, np.float32), strict=True)
    )
    rotary = {"base": np.float32(500), "scaling": {"type": "linear", "factor": 2.0}}
    layer = na.MultiHeadAttention(
        24, 4, kv_heads=2, head_dim=10, value_dim=7, context_dim=(24, 3), bias=False,
        rotary=rotary, qk_norm=True, norm_epsilon=np.float64(0.25), dtype="float64",
    )  # fmt: skip
    all_options = {
        "base": 500.0, "rotary_dim": None, "interleaved": False, "frequencies": None,
        "scaling": {"type": "linear", "factor": 2.0},
    }  # fmt: skip
    assert sizes_of(layer) == dict(
        zip(
            SIZES,
            (24, 4, 2, 10, 7, (24, 3), False, all_options, True, 0.25, np.float64),
            strict=True,
        )
    )
    # They make the same layer again, and are the layer's own.
    again = na.MultiHeadAttention(**sizes_of(layer))
    assert sizes_of(again) == sizes_of(layer)
    layer.rotary["scaling"]["factor"] = 7.0
    assert layer.rotary == all_options
    assert na.MultiHeadAttention(24, 4, rotary=True).rotary
    for name in SIZES:
        with pytest.raises(AttributeError):
            setattr(layer, name, 3)


def test_files_without_an_epsilon_are_older_than_it(tmp_path, rng):
    package = pytest.importorskip("safetensors.numpy")
    arrays = {f"{name}_weight": numbers(rng, 8, 8) for name in "qkvo"}
    arrays |= {f"{name}_norm": numbers(rng, 4) for name in "qk"}
    path = tmp_path / "layer.safetensors"
    for more, expected in (({}, 1e-6), ({"norm_epsilon": 0.5}, 0.5)):
        header = json.dumps(LAYER | {"qk_norm": True} | more)
        package.save_file(arrays, path, metadata={"numattn.MultiHeadAttention": header})
        assert na.MultiHeadAttention.load(path).norm_epsilon == expected


def test_parameters_save_and_load(rng, tmp_path):
    pytest.importorskip("safetensors")
    layer = na.MultiHeadAttention(
        24, 4, kv_heads=2, rotary={"scaling": {"type": "linear", "factor": 2}}, qk_norm=True,
        norm_epsilon=1e-3, rng=3,
    )  # fmt: skip
    fill(layer, rng)
    sizes = {name: x.shape for name, x in layer.parameters().items()}
    assert sizes["k_weight"] == (24, 12)
    assert layer.num_parameters == sum(int(np.prod(s)) for s in sizes.values())
    path = tmp_path / "layer.safetensors"
    layer.save(path)
    same = na.MultiHeadAttention.load(path)
    assert sizes_of(same) == sizes_of(layer)
    x = numbers(rng, 1, 5, 24)
    np.testing.assert_array_equal(same(x, is_causal=True), layer(x, is_causal=True))
    layer.parameters()["o_weight"][...] = 0
    layer.parameters()["o_bias"][...] = 1
    np.testing.assert_array_equal(layer(x), 1)
    again = na.MultiHeadAttention(24, 4, rng=3).parameters()["q_weight"]
    np.testing.assert_array_equal(
        again, na.MultiHeadAttention(24, 4, rng=3).parameters()["q_weight"]
    )

    (tmp_path / "text").write_text("no safetensors")
    with pytest.raises(ValueError, match=r"path: got .*text"):
        na.MultiHeadAttention.load(tmp_path / "text")
    with pytest.raises(OSError, match="nothing"):
        na.MultiHeadAttention.load(tmp_path / "nothing")
    with pytest.raises(IsADirectoryError, match="Is a directory"):
        na.MultiHeadAttention.load(tmp_path)
    with pytest.raises(OSError, match=r"path: .*layer cannot be written"):
        layer.save(tmp_path / "nothing" / "layer")
    for call in (layer.save, na.MultiHeadAttention.load):
        with pytest.raises(TypeError, match=r"path: got 3 \(int\), expected a str"):
            call(3)


def test_options_of_numpy_are_saved(tmp_path):
    pytest.importorskip("safetensors")
    scaling = {"type": "linear", "factor": np.float32(2)}
    rotary = {"base": np.float32(500), "rotary_dim": np.int64(4), "interleaved": np.True_}
    layer = na.MultiHeadAttention(
        np.int64(24), 4, rotary=rotary | {"scaling": scaling}, bias=np.False_, qk_norm=np.True_
    )
    x = np.ones((3, 24), np.float32) * np.arange(24, dtype=np.float32)
    before = layer(x)
    scaling["factor"] = 7  # of the caller
    layer.save(tmp_path / "layer")
    np.testing.assert_array_equal(na.MultiHeadAttention.load(tmp_path / "layer")(x), before)


LAYER = {
    "embed_dim": 8, "num_heads": 2, "kv_heads": 2, "head_dim": 4, "value_dim": 4,
    "context_dim": [8, 8], "bias": False, "rotary": None, "qk_norm": False, "dtype": "float32",
}  # fmt: skip


@pytest.mark.parametrize(
    ("header", "message"),
    [
        (None, "metadata: got no 'numattn.MultiHeadAttention'"),
        ("{", "numattn.MultiHeadAttention: got text that is not JSON"),
        ("[" * 100_000, "numattn.MultiHeadAttention: got text that is not JSON"),
        ("[1]", "numattn.MultiHeadAttention: got list, expected a mapping"),
        ({"head_dim": ...}, "head_dim: got nothing, expected a value among"),
        ({"dropout": 0.5}, "got 'dropout', expected only embed_dim, num_heads"),
        ({"embed_dim": "8"}, "embed_dim: got '8' (str), expected an int"),
        ({"kv_heads": None}, "kv_heads: got None, expected an int"),
        ({"kv_heads": 0}, "kv_heads: got 0, expected at least 1"),
        ({"bias": 0}, "bias: got 0 (int), expected True or False"),
        ({"bias": True}, "q_bias: got no such array, only"),
        ({"context_dim": 8}, "context_dim: got 8, expected two ints"),
        ({"context_dim": [8, "8"]}, "context_dim: got '8' (str), expected an int"),
        ({"rotary": {"base": "x"}}, "base: got 'x' (str), expected a real number"),
        ({"rotary": {"theta": 1}}, "rotary: got 'theta', expected only base"),
        ({"rotary": 3}, "rotary: got int, expected True or a mapping"),
        ({"dtype": "float64"}, "_weight: got dtype F32, expected float64"),
        ({"dtype": None}, "dtype: got None, expected one of float16, bfloat16, float32, float64"),
        ({"dtype": "int8"}, "dtype: got 'int8', expected one of float16, bfloat16, float32"),
        ({"dtype": "float16"}, "_weight: got dtype F32, expected float16"),
        ({"embed_dim": 10**6, "context_dim": [10**6] * 2}, "q_weight: got shape (8, 8), expected"),
        ({"head_dim": 10**12, "rotary": {}}, "q_weight: got shape (8, 8), expected (8, 2000000000"),
        ({"num_heads": 10**30}, "q_weight: got shape (8, 8), expected (8, 4000000000"),
        ({"qk_norm": True}, "q_norm: got no such array, only"),
        ({"norm_epsilon": "x"}, "norm_epsilon: got 'x' (str), expected a real number"),
        ({"norm_epsilon": -1}, "norm_epsilon: got -1, expected 1.2e-38 to 3.4e+38 for float32"),
    ],
)
def test_files_whose_header_is_wrong(tmp_path, monkeypatch, header, message):
    package = pytest.importorskip("safetensors.numpy")
    if isinstance(header, dict):
        header = {k: v for k, v in (LAYER | header).items() if v is not ...}
        header = json.dumps(header)
    arrays = {f"{name}_weight": np.ones((8, 8), np.float32) for name in "qkvo"}
    path = tmp_path / "layer.safetensors"
    metadata = {} if header is None else {"numattn.MultiHeadAttention": header}
    package.save_file(arrays, path, metadata=metadata)
    monkeypatch.setattr(np.random, "default_rng", None)  # nothing is drawn
    tracemalloc.start()
    try:
        with pytest.raises(ValueError, match=r"^path: got .*layer\.safetensors") as raised:
            na.MultiHeadAttention.load(path)
        assert tracemalloc.get_traced_memory()[1] < 2e7
    finally:
        tracemalloc.stop()
    assert message in str(raised.value)


def test_weights_that_are_given_are_not_drawn(tmp_path, monkeypatch, rng):
    package = pytest.importorskip("safetensors.numpy")
    arrays = {f"{name}_weight": numbers(rng, 8, 8) for name in "qkvo"}
    path = tmp_path / "layer.safetensors"
    package.save_file(arrays, path, metadata={"numattn.MultiHeadAttention": json.dumps(LAYER)})
    monkeypatch.setattr(np.random, "default_rng", None)
    layers = [
        na.MultiHeadAttention.load(path),
        na.MultiHeadAttention.from_weights(
            *(x.T for x in arrays.values()), num_heads=2, transposed=False
        ),
        na.MultiHeadAttention.from_weights(*arrays.values(), num_heads=2, transposed=True),
    ]
    for layer in layers:
        assert layer.parameters().keys() == arrays.keys()
        for name, x in layer.parameters().items():
            np.testing.assert_array_equal(x, arrays[name])
            assert x.flags.c_contiguous
            assert x.flags.writeable
            assert not np.shares_memory(x, arrays[name])
    package.save_file(
        arrays | {"x": np.ones(1, np.float32)},
        path,
        metadata={"numattn.MultiHeadAttention": json.dumps(LAYER)},
    )
    with pytest.raises(ValueError, match=r"path: got .*arrays: got 'x', expected only q_weight"):
        na.MultiHeadAttention.load(path)


class Refusing:
    """An array of another library, which is nowhere that NumPy could read it."""

    def __array__(self, dtype=None, copy=None):
        raise TypeError("on the device")


def test_from_weights(rng):
    shapes = {"q": (32, 24), "k": (16, 10), "v": (12, 10), "o": (24, 24)}
    weights = {f"{n}_weight": numbers(rng, *s) for n, s in shapes.items()}
    layer = na.MultiHeadAttention.from_weights(*weights.values(), num_heads=4, q_bias=np.ones(32))
    x, context = numbers(rng, 2, 7, 24), numbers(rng, 2, 5, 10)
    p = {name: w.T for name, w in weights.items()} | {"q_bias": np.ones(32)}
    expected = by_hand(p, x, context, context, 4, 2)
    np.testing.assert_allclose(layer(x, context), expected, rtol=1e-5, atol=1e-4)
    names = [
        ("q_weight", (31, 24), "q_weight: got shape (31, 24), expected a number of rows"),
        ("k_weight", (15, 10), "k_weight: got shape (15, 10), expected 8 rows for 1 heads"),
        ("v_weight", (13, 10), "v_weight: got shape (13, 10), expected a number of rows"),
        ("o_weight", (24, 25), "o_weight: got shape (24, 25), expected (24, 24)"),
        ("o_weight", (24,), "o_weight: got shape (24,), expected two axes"),
        ("q_weight", (0, 24), "q_weight: got shape (0, 24), expected two axes, neither"),
        ("k_weight", (3, 10), "k_weight: got shape (3, 10), expected 8 rows for 1 heads"),
        ("k_weight", (24, 10), "k_weight: got shape (24, 10), expected rows for a number of heads"),
    ]
    for name, shape, message in names:
        with pytest.raises(ValueError) as raised:  # noqa: PT011
            na.MultiHeadAttention.from_weights(
                **weights | {name: numbers(rng, *shape)}, num_heads=4
            )
        assert message in str(raised.value)
    for options, error, message in (
        ({"q_bias": np.ones(3)}, ValueError, "q_bias: got shape (3,), expected (32,)"),
        ({"o_bias": np.ones((2, 24))}, ValueError, "o_bias: got shape (2, 24), expected (24,)"),
        ({"q_norm": np.ones((8, 1)), "k_norm": np.ones(8)}, ValueError, "got shape (8, 1), expe"),
        ({"q_norm": np.ones(8)}, ValueError, "q_norm, k_norm: got only one of them, exp"),
        ({"k_bias": np.ma.ones(16)}, TypeError, "k_bias: got a masked array"),
        ({"k_weight": np.ma.ones((16, 10))}, TypeError, "k_weight: got a masked array"),
        ({"v_bias": Refusing()}, TypeError, "v_bias: got Refusing, which NumPy cannot convert"),
        ({"o_bias": np.full(24, 1e300)}, ValueError, "o_bias: got values too large for float32"),
        ({"kv_heads": 3}, ValueError, "k_weight: got shape (16, 10), expected 24 rows for 3 h"),
        (
            {"dtype": "half", "o_bias": np.full(24, 1e5)},
            ValueError,
            "o_bias: got values too large for float16, expected smaller values, or a wider",
        ),
        ({"dtype": "text"}, TypeError, "dtype: got 'text', expected one of float16, bfloat16, fl"),
    ):
        with pytest.raises(error) as raised:
            na.MultiHeadAttention.from_weights(**weights | {"num_heads": 4} | options)
        assert message in str(raised.value)
    for call in (layer, lambda refusing: layer(x, refusing)):
        with pytest.raises(TypeError, match=r"^(x|context): got Refusing, which NumPy"):
            call(Refusing())
    small = na.MultiHeadAttention.from_weights(
        *weights.values(), num_heads=4, o_bias=np.full(24, 1e-300)
    )
    assert np.all(small.parameters()["o_bias"] == 0)


@pytest.mark.parametrize(
    "shapes",
    [
        {"q": (24, 24), "k": (24, 24), "v": (24, 24), "o": (24, 24)},
        {"q": (24, 24), "k": (12, 24), "v": (12, 24), "o": (24, 24)},
        {"q": (32, 24), "k": (16, 10), "v": (12, 10), "o": (24, 24)},
    ],
    ids=["square", "grouped", "context"],
)
def test_matrices_of_either_way_round(rng, shapes):
    matrices = {f"{name}_weight": numbers(rng, *shape) for name, shape in shapes.items()}
    turned = {name: x.T for name, x in matrices.items()}
    biases = {f"{name}_bias": numbers(rng, shape[0]) for name, shape in shapes.items()}
    make = na.MultiHeadAttention.from_weights
    layer = make(**matrices, **biases, num_heads=4, transposed=False)
    same = make(**turned, **biases, num_heads=4, transposed=np.True_)
    assert sizes_of(same) == sizes_of(layer)
    for name, x in layer.parameters().items():
        np.testing.assert_array_equal(x, turned.get(name, biases.get(name)))
        np.testing.assert_array_equal(x, same.parameters()[name])
        assert same.parameters()[name].flags.c_contiguous
    if all(a == b for a, b in shapes.values()):
        message = (
            "transposed: got None for square matrices, .*, expected False for "
            r"\(out, in\), as in torch.nn.Linear, or True for \(in, out\), as in GPT-2's"
        )
        for either in (matrices, turned):
            with pytest.raises(TypeError, match=message):
                make(**either, **biases, num_heads=4)
        return
    as_before = make(**matrices, **biases, num_heads=4)
    assert sizes_of(as_before) == sizes_of(layer)
    # The wrong way round shows: by an error, or by sizes that no x of the right ones fits.
    x, context = numbers(rng, 3, 24), numbers(rng, 3, shapes["k"][1])
    args = (x,) if shapes["k"][1] == 24 else (x, context)
    layer(*args)
    for turned_wrongly in (
        lambda: make(**turned, num_heads=4),
        lambda: make(**matrices, num_heads=4, transposed=True),
    ):
        with pytest.raises((TypeError, ValueError)):
            turned_wrongly()(*args)


def test_errors_of_transposed_matrices_name_shapes_as_they_were_given(rng):
    shapes = {"q": (24, 32), "k": (10, 16), "v": (10, 12), "o": (24, 24)}
    matrices = {f"{name}_weight": numbers(rng, *shape) for name, shape in shapes.items()}
    for options, error, message in (
        ({"q_weight": np.ones((24, 31))}, ValueError, "shape (24, 31), expected a number of col"),
        ({"k_weight": np.ones((10, 15))}, ValueError, "shape (10, 15), expected 8 columns for 1"),
        ({"k_weight": np.ones((10, 24))}, ValueError, "shape (10, 24), expected columns for a nu"),
        ({"v_weight": np.ones((10, 13))}, ValueError, "shape (10, 13), expected a number of c"),
        ({"o_weight": np.ones((24, 23))}, ValueError, "shape (24, 23), expected (24, 24)"),
        ({"q_bias": np.ones(24)}, ValueError, "q_bias: got shape (24,), expected (32,)"),
        ({"transposed": 1}, TypeError, "transposed: got 1 (int), expected True or False"),
    ):
        with pytest.raises(error) as raised:
            na.MultiHeadAttention.from_weights(
                **matrices | {"num_heads": 4, "transposed": True} | options
            )
        assert message in str(raised.value)


def test_gpt2(rng):
    torch = pytest.importorskip("torch")
    gpt2 = pytest.importorskip("transformers.models.gpt2.modeling_gpt2")
    torch.manual_seed(0)
    module = gpt2.GPT2Attention(
        gpt2.GPT2Config(n_embd=24, n_head=4, attn_implementation="eager")
    ).eval()
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    layer = na.MultiHeadAttention.from_weights(
        *module.c_attn.weight.split(24, dim=1), module.c_proj.weight, num_heads=4, transposed=True,
        **dict(zip(("q_bias", "k_bias", "v_bias"), module.c_attn.bias.split(24), strict=True)),
        o_bias=module.c_proj.bias,
    )  # fmt: skip
    x = numbers(rng, 2, 7, 24)
    # As the model passes it.
    causal = np.where(np.tri(7, dtype=bool), 0, -np.inf).astype(np.float32)
    with torch.no_grad():
        expected = module(torch.tensor(x), attention_mask=torch.tensor(causal))[0]
    np.testing.assert_allclose(layer(x, is_causal=True), expected, rtol=0, atol=1e-5)
    np.testing.assert_allclose(layer(x, bias=causal), expected, rtol=0, atol=1e-5)


def state_dict(rng, embed_dim=24, kdim=None, vdim=None):
    shapes = {"in_proj_weight": (3 * embed_dim, embed_dim)}
    if kdim is not None:
        shapes = {
            "q_proj_weight": (embed_dim, embed_dim),
            "k_proj_weight": (embed_dim, kdim),
            "v_proj_weight": (embed_dim, vdim),
        }
    shapes |= {"in_proj_bias": (3 * embed_dim,), "out_proj.weight": (embed_dim, embed_dim)}
    shapes |= {"out_proj.bias": (embed_dim,)}
    return {name: numbers(rng, *shape) for name, shape in shapes.items()}


def test_from_a_state_dict(rng):
    state = state_dict(rng)
    layer = na.MultiHeadAttention.from_torch(state, 4)
    x = numbers(rng, 2, 7, 24)
    weights = np.split(state["in_proj_weight"], 3)
    biases = np.split(state["in_proj_bias"], 3)
    p = {f"{n}_weight": w.T for n, w in zip("qkv", weights, strict=True)}
    p |= {f"{n}_bias": b for n, b in zip("qkv", biases, strict=True)}
    p |= {"o_weight": state["out_proj.weight"].T, "o_bias": state["out_proj.bias"]}
    np.testing.assert_allclose(layer(x), by_hand(p, x, x, x, 4, 4), rtol=1e-5, atol=1e-4)
    cases = [
        ({}, None, TypeError, "num_heads: got None"),
        ({"in_proj_weight": numbers(rng, 70, 24)}, 4, ValueError, "in_proj_weight: got shape (70"),
        ({"in_proj_bias": numbers(rng, 70)}, 4, ValueError, "in_proj_bias: got shape (70,)"),
        ({"out_proj.weight": None}, 4, ValueError, "out_proj.weight: got no such array, only"),
        ({"bias_k": numbers(rng, 1, 1, 24)}, 4, ValueError, "bias_k"),
        ({"in_proj_bias": np.ones(72) * 1j}, 4, TypeError, "in_proj_bias: got dtype complex128"),
        ({"in_proj_bias": np.ma.ones(72)}, 4, TypeError, "in_proj_bias: got a masked array"),
        ({"in_proj_bias": Refusing()}, 4, TypeError, "in_proj_bias: got Refusing, which NumPy"),
        ({"out_proj.bias": np.ones((1, 24))}, 4, ValueError, "out_proj.bias: got shape (1, 24), e"),
        ({"out_proj.weight": np.ones((24, 23))}, 4, ValueError, "expected (24, 24)"),
        ({"k_proj_weight": np.ones((24, 9))}, 4, ValueError, "in_proj_weight and k_proj_weight"),
        ({}, 5, ValueError, "num_heads: got 5, expected a divisor of embed_dim, which is 24"),
    ]
    for change, heads, error, message in cases:
        changed = {k: v for k, v in (state | change).items() if v is not None}
        with pytest.raises(error) as raised:
            na.MultiHeadAttention.from_torch(changed, heads)
        assert message in str(raised.value)
    separate = state_dict(rng, kdim=10, vdim=14)
    layer = na.MultiHeadAttention.from_torch(separate, 4)
    assert layer(x, (numbers(rng, 2, 5, 10), numbers(rng, 2, 5, 14))).shape == x.shape
    del separate["v_proj_weight"]
    with pytest.raises(ValueError, match="v_proj_weight: got no such array, only q_proj_weight"):
        na.MultiHeadAttention.from_torch(separate, 4)


class Module:
    """What `from_torch` asks of a module of PyTorch."""

    def __init__(self, state, **attributes):
        self.state_dict = lambda: state
        self.__dict__.update(attributes)


def test_a_module_says_how_it_is_called(rng):
    state = state_dict(rng)
    layer = na.MultiHeadAttention.from_torch(Module(state, num_heads=4, batch_first=True))
    same = na.MultiHeadAttention.from_torch(state, 4)
    x = numbers(rng, 2, 7, 24)
    np.testing.assert_array_equal(layer(x), same(x))
    within = {f"self_attn.{name}": array for name, array in state.items()}
    two = within | {f"multihead_attn.{name}": array for name, array in state.items()}
    rest = {"linear1.weight": np.ones((3, 3)), "norm1.bias": np.ones(3)}
    for module, heads, error, message in (
        (Module(state, num_heads=4, batch_first=False), None, ValueError, "batch_first=False, exp"),
        (Module(state, num_heads=4, batch_first=True), 8, ValueError, "num_heads: got 8, expected"),
        (
            Module(within | rest),
            None,
            TypeError,
            "module: got Module, expected a torch.nn.Multihea",
        ),
        (Module(within | rest), 4, TypeError, "MultiheadAttention; pass `module.self_attn`"),
        (Module(two | rest), 4, TypeError, "`module.self_attn` or `module.multihead_attn`"),
        (Module({"layers.0.q_proj_weight": 1}), 4, TypeError, "pass `module.layers[0]`"),
        (within | rest, 4, ValueError, "module: got names that begin with 'self_attn', expected"),
        (Module({"weight": np.ones(3)}), None, ValueError, "module: got 'weight', expected only"),
        ({3: np.ones(3)}, 4, ValueError, "module: got 3, expected only"),
    ):
        with pytest.raises(error) as raised:
            na.MultiHeadAttention.from_torch(module, heads)
        assert message in str(raised.value)


def named(*names):
    return {f"{name}.weight": np.ones((24, 24)) for name in names}


@pytest.mark.parametrize(
    ("state", "seen", "expected"),
    [
        (
            named("q_proj", "k_proj", "v_proj", "o_proj"),
            "'q_proj.weight' in a Module",
            "pass separate matrices to `from_weights(module.q_proj.weight, module.k_proj.weight, "
            "module.v_proj.weight, module.o_proj.weight, num_heads=..., transposed=False)`",
        ),
        (
            named("k_proj", "v_proj", "q_proj", "out_proj") | {"q_proj.bias": np.ones(24)},
            "'q_proj.weight' in a Module",
            "pass separate matrices and their biases to `from_weights(module.q_proj.weight, ",
        ),
        (
            named("embed", *(f"layers.3.self_attn.{x}_proj" for x in "qkvo")),
            "'layers.3.self_attn.q_proj.weight' in a Module",
            "`from_weights(module.layers[3].self_attn.q_proj.weight, ",
        ),
        (
            named("self.query", "self.key", "self.value", "output.dense"),
            "'self.query.weight' in a Module",
            "module.self.value.weight, o_weight, num_heads=..., transposed=False)`",
        ),
        (
            {"h.0.attn.c_attn.weight": np.ones((24, 72)), **named("h.0.attn.c_proj")},
            "'h.0.attn.c_attn.weight' in a Module",
            "split `module.h[0].attn.c_attn.weight` into matrices (in, out) of q, k and v for "
            "`from_weights(..., transposed=True)`",
        ),
        (
            {"attention.query_key_value.weight": np.ones((72, 24)), **named("attention.dense")},
            "'attention.query_key_value.weight' in a Module",
            "split `module.attention.query_key_value.weight` into matrices (out, in) of q, k and v "
            "for `from_weights(..., transposed=False)`",
        ),
    ],
    ids=["Llama", "CLIP", "a model", "BERT", "GPT-2", "GPT-NeoX"],
)
def test_other_layers_are_sent_to_from_weights(state, seen, expected):
    with pytest.raises(ValueError, match=r"^module: got ") as raised:
        na.MultiHeadAttention.from_torch(Module(state), 4)
    assert f"got {seen}, expected in_proj_weight and out_proj.weight, as in" in str(raised.value)
    assert expected in str(raised.value)
    with pytest.raises(ValueError, match=r"in a dict, expected in_proj_weight .* `.*module\['"):
        na.MultiHeadAttention.from_torch(state, 4)


@pytest.mark.parametrize("sizes", [{}, {"kdim": 10, "vdim": 14}, {"bias": False}], ids=str)
def test_torch(rng, sizes):
    torch = pytest.importorskip("torch")
    torch.manual_seed(0)
    module = torch.nn.MultiheadAttention(48, 4, batch_first=True, **sizes).eval()
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    layers = [
        na.MultiHeadAttention.from_torch(module),
        na.MultiHeadAttention.from_torch(module.state_dict(), 4),
    ]
    x = numbers(rng, 3, 9, 48)
    sources = [(x, x)] if "kdim" not in sizes else []
    sources.append(
        (numbers(rng, 3, 6, sizes.get("kdim", 48)), numbers(rng, 3, 6, sizes.get("vdim", 48)))
    )
    for keys, values in sources:
        length = keys.shape[1]
        lengths = np.array([length, 4, 1])
        padding = np.arange(length) >= lengths[:, None]
        causal = np.tri(9, length, dtype=bool)
        for ours, theirs in (
            ({}, {}),
            ({"lengths": lengths}, {"key_padding_mask": torch.tensor(padding)}),
            ({"mask": causal}, {"attn_mask": torch.tensor(~causal)}),
        ):
            with torch.no_grad():
                expected, pattern = module(
                    *(torch.tensor(a) for a in (x, keys, values)),
                    average_attn_weights=False, **theirs,
                )  # fmt: skip
            for layer in layers:
                context = None if keys is x else (keys, values)
                out, weights = layer(x, context, return_weights=True, **ours)
                # PyTorch's padding attends to valid keys.
                own = lengths if context is None and "lengths" in ours else [9, 9, 9]
                for i, n in enumerate(own):
                    np.testing.assert_allclose(out[i, :n], expected[i, :n], rtol=0, atol=1e-5)
                    np.testing.assert_allclose(
                        weights[i, :, :n], pattern[i, :, :n], rtol=0, atol=1e-5
                    )


@pytest.mark.parametrize(
    ("arguments", "options", "error", "message"),
    [
        ((25, 4), {}, ValueError, "embed_dim: got 25, expected a multiple of num_heads, "),
        ((24, 4), {"kv_heads": 3}, ValueError, "kv_heads: got 3, expected a divisor"),
        ((24, 0), {}, ValueError, "num_heads: got 0, expected at least 1"),
        ((24.0, 4), {}, TypeError, "embed_dim: got 24.0"),
        (
            (24, 4),
            {"dtype": "int8"},
            TypeError,
            "dtype: got int8, expected one of float16, bfloat16",
        ),
        ((24, 4), {"dtype": None}, TypeError, "dtype: got None, expected one of float16"),
        ((24, 4), {"dtype": ">f4"}, TypeError, "dtype: got >f4, expected one of float16"),
        (
            (24, 4),
            {"dtype": "float16", "norm_epsilon": 0},
            ValueError,
            "norm_epsilon: got 0, expected 1.2e-38 to 3.4e+38 for float32",
        ),
        ((24, 4), {"rotary": {"dim": 3}}, ValueError, "rotary: got 'dim', expected only base"),
        ((24, 4), {"rotary": {"rotary_dim": 5}}, ValueError, "rotary_dim: got 5, expected an even"),
        ((15, 3), {"rotary": True}, ValueError, "head_dim: got 5, expected an even number: pairs"),
        ((24, 8), {"rotary": 3}, TypeError, "rotary: got int, expected True or a mapping"),
        ((24, 4), {"bias": 1}, TypeError, "bias: got 1 (int), expected True or False"),
        ((24, 4), {"qk_norm": "no"}, TypeError, "qk_norm: got 'no' (str), expected True or False"),
        ((24, 4), {"norm_epsilon": 0}, ValueError, "norm_epsilon: got 0, expected 1.2e-38 to 3.4e"),
        (
            (24, 4),
            {"norm_epsilon": 1e-300},
            ValueError,
            "norm_epsilon: got 1e-300, expected 1.2e-38",
        ),
        (
            (24, 4),
            {"norm_epsilon": np.nan},
            ValueError,
            "norm_epsilon: got nan, expected a finite",
        ),
        ((24, 4), {"norm_epsilon": None}, TypeError, "norm_epsilon: got None, expected"),
        ((24, 4), {"rms_norm_eps": 1e-5}, TypeError, "did you mean `norm_epsilon=`?"),
        ((24, 4), {"dtype": "text"}, TypeError, "dtype: got 'text', expected one of float16"),
        ((24, 4), {"rng": "seed"}, TypeError, "rng: got 'seed'"),
        ((24, 4), {"rng": -1}, ValueError, "rng: got -1"),
        ((24, 4), {"rotary": {"base": "x"}}, TypeError, "base: got 'x' (str), expected a real"),
        ((24, 4), {"rotary": {"interleaved": 1}}, TypeError, "interleaved: got 1 (int), expected"),
        ((24, 4), {"rotary": {"scaling": 3}}, TypeError, "scaling: got int, expected a mapping"),
        ((24, 4), {"context_dim": 0}, ValueError, "context_dim: got 0, expected at least 1"),
    ],
)
def test_bad_sizes(arguments, options, error, message):
    with pytest.raises(error) as raised:
        na.MultiHeadAttention(*arguments, **options)
    assert message in str(raised.value)


def test_bad_calls(rng):
    layer = na.MultiHeadAttention(24, 4, rng=0)
    turned = na.MultiHeadAttention(24, 4, rotary=True, rng=0)
    other = na.MultiHeadAttention(24, 4, context_dim=10, rng=0)
    x = numbers(rng, 2, 5, 24)
    cache = na.KVCache(3, 4, 6)
    for call, error, message in (
        (
            lambda: layer(x[..., :3]),
            ValueError,
            "x: got shape (2, 5, 3), expected (..., length, 24)",
        ),
        (lambda: layer(x.astype(float)), TypeError, "x: got dtype float64, expected float32"),
        (lambda: layer(x, x[..., :3]), ValueError, "context: got shape (2, 5, 3), expected"),
        (lambda: layer(x, (x, x, x)), ValueError, "context: got 3 arrays, expected one, or two"),
        (lambda: other(x), TypeError, "context: got None, expected embeddings of 10 elements"),
        (lambda: turned(x, x), ValueError, "context: got an array for a rotary layer"),
        (lambda: layer(x, cache=cache), ValueError, "x: got shape (2, 5, 24), expected (3, length"),
        (lambda: layer(x, cache=3), TypeError, "cache: got int, expected a KVCache"),
        (
            lambda: layer(x, x, cache=cache),
            TypeError,
            "context: got ndarray with `cache=`, expected one",
        ),
        (lambda: layer(x, return_weights=1), TypeError, "return_weights: got 1"),
        (lambda: layer(x, is_causal=1), TypeError, "is_causal: got 1"),
        (
            lambda: layer(x.astype(">f4")),
            TypeError,
            "x: got dtype float32 in non-native byte order",
        ),
        (
            lambda: layer(x[(np.newaxis,) * 29]),
            ValueError,
            "x: got 32 axes, expected at most 31",
        ),
        (
            lambda: layer(x, lengths=[6, 1]),
            ValueError,
            "lengths: got 6 at index 0, expected 0 to 5",
        ),
        (lambda: layer(x, lengths=[1, 2, 3]), ValueError, "lengths: got shape (3,), expected one"),
        (lambda: layer(x, lengths=2.5), TypeError, "lengths: got dtype float64, expected ints"),
        (lambda: layer(x, x[:, :3], lengths=4), ValueError, "lengths: got 4, expected 0 to 3"),
        (
            lambda: layer(x, cache=na.KVCache(2, 4, 6), lengths=6),
            ValueError,
            "lengths: got 6, expected 0 to 5",
        ),
        (
            lambda: layer(x, x[[0, 0, 0]]),
            ValueError,
            "context: got leading axes (3,) of keys and (3,) of values with (2,) of x, expected",
        ),
        (
            lambda: layer(x, (x, x[:, :3])),
            ValueError,
            "context: got keys (2, 5, 24) and values (2, 3, 24), expected the same number of",
        ),
        (
            lambda: layer(x, cache=na.KVCache(2, 2, 6)),
            ValueError,
            "cache: got kv_heads, head_dim and value_dim (2, 6, 6), expected (4, 6, 6), as in",
        ),
        (
            lambda: other(x, cache=na.KVCache(2, 4, 6)),
            ValueError,
            "context_dim: got (10, 10) with embed_dim 24, expected embed_dim for a layer with a KV",
        ),
        (other.new_cache, ValueError, "context_dim: got (10, 10) with embed_dim 24, expected"),
        (lambda: layer.new_cache(-1), ValueError, "batch: got -1, expected at least 0"),
        (lambda: layer.new_cache(keep_first=2), ValueError, "keep_first: got 2 without `window=`"),
        (
            lambda: layer(x, cache=na.KVCache(2, 4, 6, dtype="float64")),
            TypeError,
            "cache: got dtype float64, expected float32, the dtype of the layer",
        ),
        (
            lambda: layer(x, cache=na.KVCache(2, 4, 6, window=3), is_causal=False),
            ValueError,
            "is_causal: got False for 5 tokens, more than the window's 3, expected True",
        ),
        (lambda: layer(x, attn_mask=None), TypeError, "'attn_mask'; did you mean `mask=`"),
        (lambda: layer(x, key_padding_mask=None), TypeError, "did you mean `lengths=`"),
        (lambda: layer(x, anything=None), TypeError, "MultiHeadAttention() got an unexpected"),
    ):
        with pytest.raises(error) as raised:
            call()
        assert message in str(raised.value)
        assert "kv_lengths" not in str(raised.value)


def test_parameter_count():
    gpt3 = na.parameter_count(12288, 96, head_dim=128, blocks=96)
    assert gpt3[:4] == (1_572_864,) * 4
    assert gpt3[4:] == (6_291_456, 603_979_776, 57_982_058_496)
    for sizes in ({}, {"kv_heads": 2, "head_dim": 10, "value_dim": 7, "context_dim": 30}):
        layer = na.MultiHeadAttention(24, 4, bias=False, **sizes)
        assert na.parameter_count(24, 4, **sizes, blocks=3).block == layer.num_parameters
    assert na.parameter_count(24, 4, blocks=3).model == 3 * na.parameter_count(24, 4).block
    assert len(str(gpt3).splitlines()) == 7
    with pytest.raises(ValueError, match="embed_dim: got 25, expected a multiple"):
        na.parameter_count(25, 4)
    with pytest.raises(ValueError, match="blocks: got 0"):
        na.parameter_count(24, 4, blocks=0)


def test_a_refused_call_leaves_the_cache_as_it_was():
    layer = na.MultiHeadAttention(16, 4, rng=0)
    x = np.zeros((1, 3, 16), np.float32)
    for window, options in (
        (None, {"softcap": -1}),
        (None, {"window": 3}),
        (5, {"window": (2, None)}),
    ):
        cache = na.KVCache(1, 4, 4, window=window)
        with pytest.raises((TypeError, ValueError), match=r"softcap|window"):
            layer(x, cache=cache, **options)
        assert cache.lengths.tolist() == [0]


@pytest.mark.parametrize("shape", [(2, 0, 16), (0, 3, 16)])
def test_nothing_in_nothing_out(shape):
    layer = na.MultiHeadAttention(16, 4, rng=0)
    assert layer(np.zeros(shape, np.float32)).shape == shape


def test_weights_that_mean_something_else_are_refused():
    state = {
        "in_proj_weight": np.zeros((24, 8)),
        "out_proj.weight": np.zeros((8, 8)),
    }
    assert na.MultiHeadAttention.from_torch(state, 2).num_parameters == 256
    with pytest.raises(ValueError, match=r"module: got 'layers\.0\.in_proj_bias'"):
        na.MultiHeadAttention.from_torch(state | {"layers.0.in_proj_bias": np.zeros(24)}, 2)
    with pytest.raises(TypeError, match="module: got None"):
        na.MultiHeadAttention.from_torch(None)

    class WithZero:
        add_zero_attn = True

    with pytest.raises(ValueError, match="add_zero_attn=True"):
        na.MultiHeadAttention.from_torch(WithZero())
    square = np.zeros((8, 8))
    with pytest.raises(TypeError, match="v_weight: got dtype complex128, expected real numbers"):
        na.MultiHeadAttention.from_weights(
            square, square, square + 0j, square, num_heads=2, transposed=False
        )
    with pytest.raises(TypeError, match=r"k_bias: got dtype str"):
        na.MultiHeadAttention.from_weights(
            square, square, square, square, num_heads=2, transposed=False, k_bias=["0"] * 8
        )


def test_a_layer_says_what_it_is():
    expected = "MultiHeadAttention(16, 4, kv_heads=2, head_dim=4, value_dim=4, dtype=float32)"
    assert repr(na.MultiHeadAttention(16, 4, kv_heads=2)) == expected


@pytest.mark.parametrize("cls", [na.MultiHeadAttention, na.TransformerBlock])
def test_a_bias_of_the_logits_is_no_bias_of_the_projections(cls):
    sizes = (8, 2) if cls is na.MultiHeadAttention else (8, 2, 16)
    with pytest.raises(TypeError, match="True or False; an array that is added to the logits"):
        cls(*sizes, bias=np.zeros((4, 4), np.float32))
