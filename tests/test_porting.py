"""Promise: what docs/porting.rst says to pass gives the answer of the other library.

Libraries that are not installed are skipped. flash-attn needs a GPU, and is not here.
"""

import numattn as na
import numpy as np
import pytest
from onnx_graphs import one_node

LQ, LK = 5, 9
LENGTHS = np.array([9, 6])
MASK = np.random.default_rng(1).random((LQ, LK)) < 0.5
MASK[:, 0] = True
BIAS = np.random.default_rng(2).standard_normal((8, LQ, LK), dtype=np.float32)


@pytest.fixture
def qkv(arrays):
    return arrays(2, hq=8, hkv=2, lq=LQ, lk=LK, d=16)


def assert_same(ours, theirs):
    theirs = np.asarray(theirs)
    np.testing.assert_allclose(ours, theirs, atol=2e-6 * max(1.0, np.abs(theirs).max()))


# ---- PyTorch -----------------------------------------------------------------------------------

TORCH = {
    "mask": ({"attn_mask": MASK}, {"mask": MASK}),
    "bias": ({"attn_mask": BIAS}, {"bias": BIAS}),
    "causal": ({"is_causal": True}, {"is_causal": True, "q_offset": 0}),
    "scale": ({"scale": 0.3}, {"scale": 0.3}),
    "nothing to attend to": ({"attn_mask": MASK & False}, {"mask": MASK & False}),
    "lengths": (
        {"attn_mask": (np.arange(LK) < LENGTHS[:, None])[:, None, None, :]},
        {"kv_lengths": LENGTHS},
    ),
}


def torch_attention(qkv, **options):
    torch = pytest.importorskip("torch")
    tensors = {
        name: torch.from_numpy(x) if isinstance(x, np.ndarray) else x for name, x in options.items()
    }
    q, k, v = map(torch.from_numpy, qkv)
    function = torch.nn.functional.scaled_dot_product_attention
    return function(q, k, v, enable_gqa=True, **tensors).numpy()


@pytest.mark.parametrize("name", TORCH)
def test_torch(qkv, name):
    theirs, ours = TORCH[name]
    assert_same(na.attention(*qkv, **ours), torch_attention(qkv, **theirs))


def test_torch_causal_from_the_lower_right(qkv):
    bias = pytest.importorskip("torch.nn.attention.bias")
    q, k, v = qkv
    k, v = (np.repeat(x, 4, axis=1) for x in (k, v))
    theirs = torch_attention((q, k, v), attn_mask=bias.causal_lower_right(LQ, LK))
    assert_same(na.attention(*qkv, is_causal=True), theirs)


@pytest.mark.parametrize("name", TORCH)
def test_torch_gradients(qkv, rng, name):
    """Of attention as above, by autograd; also of the bias."""
    torch = pytest.importorskip("torch")
    theirs, ours = TORCH[name]
    dout = rng.standard_normal(qkv[0].shape, dtype=np.float32)
    inputs = [torch.tensor(x, requires_grad=True) for x in qkv]
    options = {
        name: torch.from_numpy(x) if isinstance(x, np.ndarray) else x for name, x in theirs.items()
    }
    wants_bias = "bias" in ours
    if wants_bias:
        options["attn_mask"].requires_grad_()
        inputs.append(options["attn_mask"])
    function = torch.nn.functional.scaled_dot_product_attention
    out = function(*inputs[:3], enable_gqa=True, **options)
    expected = torch.autograd.grad(out, inputs, torch.from_numpy(dout))
    _, vjp = na.attention_vjp(*qkv, bias_gradient=wants_bias, **ours)
    for actual, wanted in zip(vjp(dout)[: len(inputs)], expected, strict=True):
        assert_same(actual, wanted)


# ---- JAX ---------------------------------------------------------------------------------------

JAX = {
    "mask": ({"mask": MASK[None, None]}, {"mask": MASK}),
    "bias": ({"bias": BIAS[None]}, {"bias": BIAS}),
    "scale": ({"scale": 0.3}, {"scale": 0.3}),
    "causal": ({"is_causal": True}, {"is_causal": True, "q_offset": 0}),
    "lengths": (
        {"key_value_seq_lengths": LENGTHS.astype(np.int32), "is_causal": True},
        {"kv_lengths": LENGTHS, "is_causal": True, "q_offset": 0},
    ),
    "window": ({"local_window_size": (3, 2)}, {"window": (3, 2), "q_offset": 0}),
    "one window": ({"local_window_size": 2}, {"window": (2, 2), "q_offset": 0}),
}


@pytest.mark.parametrize("name", JAX)
def test_jax(qkv, name):
    jax = pytest.importorskip("jax")
    theirs, ours = JAX[name]
    q, k, v = (x.swapaxes(1, 2) for x in qkv)
    out, lse = jax.nn.dot_product_attention(q, k, v, return_residual=True, **theirs)
    our_out, our_lse = na.attention(q, k, v, layout="blhd", return_lse=True, **ours)
    assert_same(our_out, out)
    assert_same(our_lse, lse)


# ---- ONNX --------------------------------------------------------------------------------------

# name: inputs, attributes, ours
ONNX = {
    "mask": ({"attn_mask": MASK}, {}, {"mask": MASK}),
    "short mask": (
        {"attn_mask": MASK[:, :7], "nonpad_kv_seqlen": np.array([7, 7])}, {},
        {"mask": MASK & (np.arange(LK) < 7)},
    ),
    "bias": ({"attn_mask": BIAS}, {}, {"bias": BIAS}),
    "causal": ({}, {"is_causal": 1}, {"is_causal": True, "q_offset": 0}),
    "lengths": ({"nonpad_kv_seqlen": LENGTHS}, {}, {"kv_lengths": LENGTHS}),
    "causal lengths": (
        {"nonpad_kv_seqlen": LENGTHS}, {"is_causal": 1},
        {"kv_lengths": LENGTHS, "is_causal": True, "q_offset": LENGTHS - LQ},
    ),
    "window": ({}, {"left_window_size": 2}, {"window": (2, None), "q_offset": 0}),
    "window and lengths": (
        {"nonpad_kv_seqlen": LENGTHS}, {"left_window_size": 2, "right_window_size": 1},
        {"kv_lengths": LENGTHS, "window": (2, 1), "q_offset": LENGTHS - LQ},
    ),
    "scale": ({}, {"scale": 0.3}, {"scale": 0.3}),
    "softcap": ({"attn_mask": BIAS}, {"softcap": 1.5}, {"bias": BIAS, "softcap": 1.5}),
}  # fmt: skip
INPUTS = ("attn_mask", "past_key", "past_value", "nonpad_kv_seqlen")  # after Q, K and V


def onnx_attention(qkv, outputs=1, *, attributes=None, **inputs):
    pytest.importorskip("onnx", "1.23")
    from onnx.reference import ReferenceEvaluator

    arrays = [*qkv, *(inputs.get(name) for name in INPUTS)]
    model, feeds = one_node("Attention", arrays, outputs, attributes=attributes)
    return ReferenceEvaluator(model).run(None, feeds)


@pytest.mark.parametrize("name", ONNX)
def test_onnx(qkv, name):
    inputs, attributes, ours = ONNX[name]
    (theirs,) = onnx_attention(qkv, attributes=attributes, **inputs)
    assert_same(na.attention(*qkv, **ours), theirs)


def test_onnx_past_keys(qkv):
    q, k, v = qkv
    theirs = onnx_attention(
        (q, k[:, :, 3:], v[:, :, 3:]), 3,
        past_key=k[:, :, :3], past_value=v[:, :, :3], attributes={"is_causal": 1},
    )  # fmt: skip
    assert_same(na.attention(q, k, v, is_causal=True, q_offset=3), theirs[0])


def test_onnx_three_axes(qkv):
    flat = [x.swapaxes(1, 2).reshape(2, x.shape[2], -1) for x in qkv]
    heads = {"q_num_heads": 8, "kv_num_heads": 2}
    (theirs,) = onnx_attention(flat, attributes=heads)
    q, k, v = (x.reshape(2, x.shape[1], -1, 16) for x in flat)
    ours = na.attention(q, k, v, layout="blhd")
    assert_same(ours.reshape(2, LQ, -1), theirs)


@pytest.mark.parametrize("mode", [2, 3])
def test_onnx_scores_and_weights(qkv, mode):
    attributes = {"qk_matmul_output_mode": mode, "softcap": 1.5}
    outputs = (True, False, False, True)
    _, theirs = onnx_attention(qkv, outputs, attributes=attributes, attn_mask=BIAS)
    function = {2: na.qk_scores, 3: na.attention_weights}[mode]
    assert_same(function(*qkv[:2], bias=BIAS, softcap=1.5), theirs)
