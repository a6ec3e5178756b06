"""Promise: `numattn.onnx` computes what ONNX's operators mean.

ONNX's own backend cases, its reference where these have no case, and ONNX Runtime for its own
operators.
"""

import subprocess
import sys
import warnings

import numattn as na
import numpy as np
import pytest
from onnx_graphs import one_node

onnx = pytest.importorskip("onnx", "1.23")
from numattn import _onnx_inputs, _rotary  # noqa: E402
from numattn import onnx as adapter  # noqa: E402
from numattn.onnx import OPS  # noqa: E402
from onnx.reference import ReferenceEvaluator  # noqa: E402

CONTRIB = "com.microsoft"
OURS = {(op.op_domain, op.__name__) for op in OPS}


def evaluate(op_type, inputs, outputs=1, *, ops=OPS, **node):
    model, feeds = one_node(op_type, inputs, outputs, **node)
    return ReferenceEvaluator(model, new_ops=ops).run(None, feeds)


def normal(rng, *shape, dtype=np.float32):
    return rng.standard_normal(shape, dtype=np.float32).astype(dtype)


def assert_same(ours, theirs, tolerance=3e-6):
    assert len(ours) == len(theirs)
    for our, their in zip(ours, theirs, strict=True):
        assert our.shape == their.shape
        assert our.dtype == their.dtype
        np.testing.assert_allclose(
            our.astype(np.float64), their.astype(np.float64), rtol=tolerance, atol=tolerance
        )


# ---- ONNX's backend cases ----------------------------------------------------------------------


def backend_cases():
    """Return ONNX's cases with one of our operators; their expansions into others have none."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from onnx.backend.test.case import node
        from onnx.backend.test.case.node import attention, rotaryembedding  # noqa: F401
    return {
        case.name: case
        for case in node._NodeTestCases
        if any((n.domain, n.op_type) in OURS for n in case.model.graph.node)
    }


CASES = backend_cases()


@pytest.mark.parametrize("name", CASES)
def test_backend_case(any_backend, name):
    from onnx.backend.test.runner import Runner

    case = CASES[name]
    evaluator = ReferenceEvaluator(case.model, new_ops=OPS)
    assert [type(node) for node in evaluator.rt_nodes_ if isinstance(node, tuple(OPS))]
    names = [one.name for one in case.model.graph.input]
    for inputs, outputs in case.data_sets:
        actual = evaluator.run(None, dict(zip(names, inputs, strict=True)))
        Runner.assert_similar_outputs(outputs, actual, case.rtol, case.atol)


def test_there_are_backend_cases():
    assert len([name for name in CASES if name.startswith("test_attention")]) >= 93
    assert len([name for name in CASES if name.startswith("test_rotary_embedding")]) >= 8


# ---- Attention ---------------------------------------------------------------------------------

B, HQ, HKV, LQ, LK, D = 2, 4, 2, 3, 7, 8
LENGTHS = np.array([7, 2])
BOOL = np.random.default_rng(1).random((B, 1, LQ, LK)) < 0.6
FLOAT = np.random.default_rng(2).standard_normal((HQ, LQ, LK), dtype=np.float32)
SHORT = np.where(BOOL, FLOAT, -np.inf)[..., :5].astype(np.float32)
NOTHING = BOOL & (np.arange(LQ) != 1)[:, None]
INPUTS = ("attn_mask", "past_key", "past_value", "nonpad_kv_seqlen")  # after Q, K and V

MIXTURES = {
    "window and causal": ({}, {"is_causal": 1, "left_window_size": 1}),
    "a row without keys": ({"attn_mask": NOTHING}, {"softcap": 2.0}),
    "short mask": ({"attn_mask": SHORT}, {"softcap": 2.0, "scale": 0.4}),
    "short mask, lengths": (
        {"attn_mask": SHORT, "nonpad_kv_seqlen": np.array([5, 2])}, {"is_causal": 1},
    ),
    "a mask of the first key": ({"attn_mask": np.ones((LQ, 1), np.bool_)}, {}),
    "a mask of integers": ({"attn_mask": np.arange(LK) % 3}, {}),
    "lengths and window": (
        {"nonpad_kv_seqlen": LENGTHS, "attn_mask": FLOAT},
        {"left_window_size": 3, "right_window_size": 1},
    ),
    "more queries than keys": ({"nonpad_kv_seqlen": LENGTHS}, {"is_causal": 1}),
    "scale of 0": ({}, {"scale": 0.0}),
}  # fmt: skip


def attention(rng, outputs=1, *, ops=OPS, axes=4, dtype=np.float32, attributes=None, **inputs):
    shapes = ((B, HQ, LQ, D), (B, HKV, LK, D), (B, HKV, LK, D))
    arrays = [normal(rng, *shape, dtype=dtype) for shape in shapes]
    attributes = dict(attributes or {})
    if axes == 3:
        arrays = [x.swapaxes(1, 2).reshape(B, x.shape[2], -1) for x in arrays]
        attributes |= {"q_num_heads": HQ, "kv_num_heads": HKV}
    arrays += [inputs.get(name) for name in INPUTS]
    return evaluate("Attention", arrays, outputs, ops=ops, attributes=attributes)


@pytest.mark.parametrize("mode", [1, 2, 3])
@pytest.mark.parametrize("axes", [3, 4])
@pytest.mark.parametrize("name", MIXTURES)
def test_mixtures(name, axes, mode):
    """All outputs, against ONNX's reference."""
    inputs, attributes = MIXTURES[name]
    attributes = {**attributes, "qk_matmul_output_mode": mode}
    ours, theirs = (
        attention(np.random.default_rng(0), 4, ops=ops, axes=axes, attributes=attributes, **inputs)
        for ops in (OPS, [])
    )
    assert_same(ours, theirs)


@pytest.mark.parametrize("axes", [3, 4])
def test_past(axes, rng):
    past = [normal(rng, B, HKV, 5, D) for _ in range(2)]
    mask = normal(rng, HQ, LQ, 5 + LK)
    inputs = {"past_key": past[0], "past_value": past[1], "attn_mask": mask}
    attributes = {"is_causal": 1, "left_window_size": 6, "qk_matmul_output_mode": 2}
    ours, theirs = (
        attention(np.random.default_rng(0), 4, ops=ops, axes=axes, attributes=attributes, **inputs)
        for ops in (OPS, [])
    )
    assert_same(ours, theirs)


def test_products_before_softcap(rng):
    """Mode 0 is the plain product, as the standard says and its expansion does."""
    q, k = normal(rng, B, HQ, LQ, D), normal(rng, B, HQ, LK, D)
    attributes = {"softcap": 0.5, "scale": 0.3}
    _, products = evaluate(
        "Attention", [q, k, k], (True, False, False, True), attributes=attributes
    )
    np.testing.assert_allclose(products, 0.3 * q @ k.swapaxes(-1, -2), atol=2e-6)


@pytest.mark.parametrize("name", ["float64", "float16", "bfloat16"])
def test_dtypes(name):
    dtype = np.dtype(getattr(pytest.importorskip("ml_dtypes"), name, name))
    tolerance = {"float64": 1e-12, "float16": 4e-3, "bfloat16": 3e-2}[name]
    attributes = {"is_causal": 1, "qk_matmul_output_mode": 3}
    ours = attention(np.random.default_rng(0), 4, dtype=dtype, attributes=attributes)
    exact = attention(np.random.default_rng(0), 4, dtype=np.float64, attributes=attributes)
    assert {x.dtype for x in ours} == {dtype}
    assert_same([x.astype(np.float64) for x in ours], exact, tolerance)


@pytest.mark.parametrize("names", [("float16", "float32"), ("float32", "float64")])
def test_values_of_another_dtype(rng, names):
    q, k, v = (normal(rng, B, HQ, LQ, D, dtype=name) for name in (names[0], *names))
    bias = normal(rng, LQ, LQ, dtype=names[0])
    (y,) = evaluate("Attention", [q, k, v, bias])
    assert y.dtype == q.dtype
    exact = na.attention(*(x.astype(np.float64) for x in (q, k, v)), bias=bias.astype(np.float64))
    np.testing.assert_allclose(y, exact, atol=2 * np.finfo(q.dtype).eps)


def test_what_is_not_asked_for_is_not_computed(rng, monkeypatch):
    def no_scores(*arguments, **options):
        raise AssertionError("computed")

    monkeypatch.setattr(adapter, "qk_scores", no_scores)
    q = normal(rng, B, HQ, LQ, D)
    evaluate("Attention", [q, q, q], 3)
    with pytest.raises(AssertionError, match="computed"):
        evaluate("Attention", [q, q, q], 4)


@pytest.mark.parametrize("heads", [None, 2])
def test_nothing_is_copied(rng, monkeypatch, heads):
    """Attention gets views of the inputs, and the result is what it has written."""
    given = {}

    def attend(q, k, v, *, out, **options):
        given.update(q=q, k=k, v=v, out=out)
        return na.attention(q, k, v, out=out, **options)

    monkeypatch.setattr(_onnx_inputs, "attention", attend)
    shape = (2, 5, 2 * 8) if heads else (2, 2, 5, 8)
    inputs = [normal(rng, *shape) for _ in range(3)]
    attributes = {"q_num_heads": heads, "kv_num_heads": heads} if heads else None
    out, *_ = evaluate("Attention", inputs, 3, attributes=attributes)
    for name, x in zip("qkv", inputs, strict=True):
        assert np.shares_memory(given[name], x)
    assert np.shares_memory(given["out"], out)


@pytest.mark.parametrize("heads", [None, 2])
def test_rotation_copies_nothing(rng, monkeypatch, heads):
    given = []
    apply = _rotary.Rotation.apply
    monkeypatch.setattr(_rotary.Rotation, "apply", lambda *a: given.extend(a) or apply(*a))
    x = normal(rng, 1, 5, 16) if heads else normal(rng, 1, 2, 5, 8)
    inputs = [x, *tables(5, 4), np.arange(5)[None]]
    (y,) = evaluate("RotaryEmbedding", inputs, attributes={"num_heads": heads} if heads else None)
    assert np.shares_memory(given[1], x)
    assert np.shares_memory(given[2], y)


def test_masks_are_aligned_at_the_end(rng):
    """With no doubt about it: a batch of two, and two queries."""
    q = normal(rng, 2, 2, 2, 8)
    mask = np.array([[True, False], [True, True]])
    (y,) = evaluate("Attention", [q, q, q, mask])
    np.testing.assert_array_equal(y, na.attention(q, q, q, mask=mask[None, None]))


def test_one_mask_for_all_queries_of_a_causal_call():
    """Each query has a frontier of its own, whatever axes the mask has."""
    padding = KEPT.astype(np.bool_)[:, None, None]
    every_row = np.broadcast_to(padding, (B, 1, LQ, LK))
    ours, theirs = (
        attention(np.random.default_rng(0), 3, ops=ops, attributes={"is_causal": 1}, attn_mask=mask)
        for ops, mask in ((OPS, padding), ([], every_row))
    )
    assert_same(ours, theirs)


def test_in_a_function(rng):
    """The evaluator gives its operators to functions once they are inlined."""
    from onnx import helper, inliner

    opsets = [helper.make_opsetid("", 24), helper.make_opsetid("own", 1)]
    node = helper.make_node("Attention", ["x", "x", "x"], ["y"], is_causal=1)
    scale = onnx.AttributeProto(name="scale", type="FLOAT", ref_attr_name="factor")
    node.attribute.append(scale)
    function = helper.make_function("own", "Layer", ["x"], ["y"], [node], opsets, ["factor"])
    call = helper.make_node("Layer", ["x"], ["y"], domain="own", factor=0.7)
    infos = [helper.make_tensor_value_info(n, onnx.TensorProto.FLOAT, None) for n in "xy"]
    graph = helper.make_graph([call], "graph", infos[:1], infos[1:])
    model = helper.make_model(graph, opset_imports=opsets, functions=[function])
    x = normal(rng, 1, 2, 4, 8)
    inlined = inliner.inline_local_functions(model)
    (y,) = ReferenceEvaluator(inlined, new_ops=OPS).run(None, {"x": x})
    np.testing.assert_array_equal(y, na.attention(x, x, x, is_causal=True, scale=np.float32(0.7)))


X = np.ones((2, 4, 3, 8), np.float32)
BAD = {
    "heads": ([X[0]] * 3, {}, r"Q: got shape \(4, 3, 8\) without the number of heads"),
    "heads of four axes": ([X] * 3, {"q_num_heads": 2}, "Q: got shape .* expected 2 heads"),
    "heads that do not divide": (
        [X[0]] * 3, {"q_num_heads": 3, "kv_num_heads": 3}, "Q: got .* with 3 heads",
    ),
    "no axes": ([X] * 3 + [np.array(True)], {}, r"attn_mask: got shape \(\)"),
    "past of one axis": ([X] * 3 + [None, X[0, 0, 0], X], {}, "K: got float32 .* with a past"),
    "one past": ([X] * 3 + [None, X], {}, "past_key, past_value: got only one of them"),
    "another past": ([X] * 3 + [None, X[:1], X[:1]], {}, "K: got float32 .* with a past"),
    "past and lengths": (
        [X] * 3 + [None, X, X, np.array([1, 2])], {}, "nonpad_kv_seqlen: got lengths with past",
    ),
    "lengths": ([X] * 3 + [None] * 3 + [np.array([1, 4])], {}, "1 to 4, expected 0 to 3"),
    "number of lengths": ([X] * 3 + [None] * 3 + [np.array([1])], {}, r"got shape \(1,\)"),
    "long mask": ([X] * 3 + [np.ones((3, 4), np.bool_)], {}, r"attn_mask: got shape \(3, 4\)"),
    "window": ([X] * 3, {"left_window_size": -2}, "left_window_size: got -2"),
    "softcap": ([X] * 3, {"softcap": -1.0}, "softcap: got -1.0"),
    "precision": ([X] * 3, {"softmax_precision": 2}, "softmax_precision: got 2"),
    "mode": ([X] * 3, {"qk_matmul_output_mode": 4}, "qk_matmul_output_mode: got 4"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_attention(name):
    inputs, attributes, message = BAD[name]
    with pytest.raises(ValueError, match=message):
        evaluate("Attention", inputs, 4, attributes=attributes)


# ---- RotaryEmbedding ---------------------------------------------------------------------------


def tables(length, pairs, dtype=np.float32):
    angles = np.arange(length)[:, None] * 0.5 ** np.arange(pairs)
    return np.cos(angles).astype(dtype), np.sin(angles).astype(dtype)


@pytest.mark.parametrize("interleaved", [0, 1])
@pytest.mark.parametrize("name", ["float32", "float16", "bfloat16"])
def test_rotation_is_rounded_once(rng, name, interleaved):
    dtype = np.dtype(getattr(pytest.importorskip("ml_dtypes"), name, name))
    x = normal(rng, 2, 3, 5, 8, dtype=dtype)
    cos, sin = tables(9, 3, dtype)
    positions = np.array([[0, 1, 2, 3, 4], [8, 0, 7, 7, 1]])
    attributes = {"rotary_embedding_dim": 6, "interleaved": interleaved}
    (y,) = evaluate("RotaryEmbedding", [x, cos, sin, positions], attributes=attributes)
    wide = [a.astype(np.float64) for a in (x, cos, sin)]
    (exact,) = evaluate("RotaryEmbedding", [*wide, positions], ops=[], attributes=attributes)
    eps = {"float32": 2e-7, "float16": 2.0**-11, "bfloat16": 2.0**-8}[name]
    assert y.dtype == dtype
    np.testing.assert_allclose(y.astype(np.float64), exact, rtol=eps, atol=1e-6)


COS, SIN = tables(4, 4)
BAD_ROTATIONS = {
    "position": ([X, COS, SIN, np.array([[0, 1, 4]] * 2)], {}, "position_ids: got 0 to 4"),
    "negative": ([X, COS, SIN, np.array([[0, 1, -1]] * 2)], {}, "position_ids: got -1 to 1"),
    "positions": ([X, COS, SIN, np.arange(3)[None]], {}, r"position_ids: got shape \(1, 3\)"),
    "no positions": ([X, COS, SIN], {}, r"cos_cache: got shape \(4, 4\)"),
    "pairs": ([X, COS[:, :3], SIN[:, :3], np.ones((2, 3), int)], {}, "3 angles for 8 of 8"),
    "sines": ([X, COS, SIN[:3], np.ones((2, 3), int)], {}, "cos_cache, sin_cache: got shapes"),
    "heads": (
        [X[0], COS, SIN, np.ones((2, 3), int)],
        {},
        "X: got shape .* without the number of heads",
    ),
}


@pytest.mark.parametrize("name", BAD_ROTATIONS)
def test_bad_rotation(name):
    inputs, attributes, message = BAD_ROTATIONS[name]
    with pytest.raises(ValueError, match=message):
        evaluate("RotaryEmbedding", inputs, attributes=attributes)


# ---- ONNX Runtime's operators ------------------------------------------------------------------


def with_onnxruntime(op_type, inputs, outputs, attributes):
    ort = pytest.importorskip("onnxruntime")
    model, feeds = one_node(op_type, inputs, outputs, domain=CONTRIB, attributes=attributes)
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 4
    session = ort.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    return session.run(None, feeds)


def contrib(op_type, inputs, outputs=1, **attributes):
    return evaluate(op_type, inputs, outputs, domain=CONTRIB, attributes=attributes)


def both(op_type, inputs, outputs=1, **attributes):
    ours = contrib(op_type, inputs, outputs, **attributes)
    return ours, with_onnxruntime(op_type, inputs, outputs, attributes)


KEPT = np.array([[1, 1, 1, 1, 1, 0, 0], [0, 1, 1, 1, 0, 1, 1]], np.int32)
RANDOM = np.random.default_rng(3)
MULTI_HEAD = {
    "plain": ({}, {}),
    "scale": ({}, {"scale": 0.2}),
    "bias": ({"bias": normal(RANDOM, 3 * HQ * D)}, {}),
    "lengths": ({"key_padding_mask": np.array([7, 3], np.int32)}, {}),
    "padding": ({"key_padding_mask": KEPT}, {}),
    "mask": ({"key_padding_mask": BOOL[:, 0].astype(np.int32)}, {}),
    "attention bias": (
        {"attention_bias": normal(RANDOM, 1, HQ, LQ, LK), "key_padding_mask": KEPT}, {},
    ),
}  # fmt: skip
MULTI_HEAD_INPUTS = ("bias", "key_padding_mask", "attention_bias", "past_key", "past_value")


@pytest.mark.parametrize("name", MULTI_HEAD)
def test_multi_head_attention(rng, name):
    inputs, attributes = MULTI_HEAD[name]
    q, k, v = normal(rng, B, LQ, HQ * D), *normal(rng, 2, B, LK, HQ * D)
    arrays = [q, k, v, *(inputs.get(name) for name in MULTI_HEAD_INPUTS)]
    assert_same(*both("MultiHeadAttention", arrays, 3, num_heads=HQ, **attributes))


@pytest.mark.parametrize("mask", [None, np.pad(KEPT, ((0, 0), (5, 0)), constant_values=1)])
def test_multi_head_attention_with_past(rng, mask):
    q, k, v = normal(rng, 3, B, LK, HQ * D)
    past = normal(rng, 2, B, HQ, 5, D)
    bias = normal(rng, 3 * HQ * D)
    arrays = [q, k, v, bias, mask, None, *past]
    assert_same(*both("MultiHeadAttention", arrays, 3, num_heads=HQ, unidirectional=1))


@pytest.mark.parametrize("bias", [None, normal(RANDOM, 3 * HQ * D)])
def test_multi_head_attention_with_ready_keys(rng, bias):
    q, (k, v) = normal(rng, B, LQ, HQ * D), normal(rng, 2, B, HQ, LK, D)
    assert_same(*both("MultiHeadAttention", [q, k, v, bias], num_heads=HQ))


def test_multi_head_attention_gives_scores(rng):
    q, k, v = normal(rng, 3, B, LK, HQ * D)
    bias = normal(rng, B, 1, LK, LK)
    arrays = [q, k, v, None, None, bias]
    outputs = (True, True, True, True)
    assert_same(*both("MultiHeadAttention", arrays, outputs, num_heads=HQ))


def test_multi_head_attention_packed(rng):
    """ONNX Runtime has these on other devices than the CPU."""
    qkv = normal(rng, B, LK, HQ, 3, D)
    apart = [np.ascontiguousarray(qkv[:, :, :, i]).reshape(B, LK, -1) for i in range(3)]
    expected = contrib("MultiHeadAttention", apart, num_heads=HQ)
    assert_same(contrib("MultiHeadAttention", [qkv], num_heads=HQ), expected)
    packed = [apart[0], np.ascontiguousarray(qkv[:, :, :, 1:])]
    assert_same(contrib("MultiHeadAttention", packed, num_heads=HQ), expected)


def group_query(
    rng, length, total, *, past=None, batch=1, dim=16, packed=False, rotary=False, positions=None,
    seqlens=None, queries=None, bias=None, sink=None,
):  # fmt: skip
    """Return inputs of GroupQueryAttention for four query heads and two of keys and values."""
    parts = [normal(rng, batch, length, heads * dim) for heads in (4, 2, 2)]
    qkv = [np.concatenate(parts, axis=-1), None, None] if packed else parts
    caches = [None, None] if past is None else [*normal(rng, 2, batch, 2, past, dim)]
    kept = np.full(batch, total) if seqlens is None else np.array(seqlens)
    angles = tables(32, dim // 2) if rotary else (None, None)
    return [
        *qkv, *caches, (kept - 1).astype(np.int32), np.array(total, np.int32), *angles, positions,
        bias, sink, None, None, None, None, queries,
    ]  # fmt: skip


ROTARY = {"do_rotary": 1}
GROUP_QUERY = {
    "prompt": ({"length": 6, "total": 6}, {}),
    "packed": ({"length": 6, "total": 6, "packed": True}, {"scale": 0.2}),
    "window": ({"length": 6, "total": 6}, {"local_window_size": 2}),
    "bidirectional": ({"length": 6, "total": 6}, {"causal": 0}),
    "bidirectional, padded": (
        {"length": 6, "total": 6, "batch": 2, "seqlens": [6, 3]}, {"causal": 0},
    ),
    "rotary": ({"length": 6, "total": 6, "rotary": True}, ROTARY),
    "interleaved": (
        {"length": 6, "total": 6, "rotary": True, "packed": True},
        {**ROTARY, "rotary_interleaved": 1},
    ),
    "positions": (
        {"length": 6, "total": 6, "rotary": True, "positions": np.array([[3, 3, 3, 4, 5, 6]])},
        ROTARY,
    ),
    "step": (
        {"length": 1, "total": 8, "past": 7, "batch": 2, "rotary": True}, {**ROTARY, "softcap": 1.5}
    ),
    "steps": ({"length": 3, "total": 8, "past": 5, "rotary": True}, ROTARY),
    "steps with positions": (
        {"length": 3, "total": 8, "past": 5, "rotary": True, "positions": np.array([[9, 1, 4]])},
        ROTARY,
    ),
    "a cache with room": (
        {"length": 1, "total": 8, "past": 12, "batch": 2, "seqlens": [8, 4]},
        {"local_window_size": 3},
    ),
    "bias": (
        {"length": 3, "total": 8, "past": 5, "bias": normal(RANDOM, 1, 4, 3, 8)}, {"softcap": 1.0},
    ),
    "bias, a cache with room": (
        {"length": 1, "total": 8, "past": 12, "bias": normal(RANDOM, 1, 1, 1, 8)}, {},
    ),
    "smooth": ({"length": 6, "total": 6}, {"smooth_softmax": 1}),
    "sinks": ({"length": 6, "total": 6, "sink": normal(RANDOM, 4)}, {}),
    "chunks": (
        {"length": 4, "total": 9, "past": 9, "batch": 2, "seqlens": [4, 5], "rotary": True,
         "queries": np.array([4, 2], np.int32)}, ROTARY,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", GROUP_QUERY)
def test_group_query_attention(rng, name):
    inputs, attributes = GROUP_QUERY[name]
    arrays = group_query(rng, **inputs)
    heads = {"num_heads": 4, "kv_num_heads": 2}
    ours, theirs = both("GroupQueryAttention", arrays, 3, **heads, **attributes)
    assert_same(*zip(*compared(arrays, ours, theirs), strict=True))
    if arrays[3] is not None:
        for item, kept in enumerate(arrays[5] + 1):
            assert not ours[1][item, :, kept:].any()


def compared(arrays, ours, theirs):
    """Yield what is specified of the outputs: valid queries, and the tokens of the cache."""
    length, queries = arrays[0].shape[1], arrays[-1]
    for item, kept in enumerate(arrays[5] + 1):
        valid = min(length, kept) if queries is None else queries[item]
        yield ours[0][item, :valid], theirs[0][item, :valid]
        for our, their in zip(ours[1:], theirs[1:], strict=True):
            assert our.shape == their.shape
            yield our[item, :, :kept], their[item, :, :kept]


def test_group_query_attention_of_padded_prompts(rng):
    """Rows of padding are 0, and what is valid is what the sequence gives alone."""
    arrays = group_query(rng, 6, 6, batch=2, seqlens=[6, 3])
    ours, theirs = both("GroupQueryAttention", arrays, 3, num_heads=4, kv_num_heads=2)
    assert_same(*zip(*compared(arrays, ours, theirs), strict=True))
    assert not ours[0][1, 3:].any()


def test_group_query_attention_with_shared_keys(rng):
    """No keys of its own: the cache has the keys of an earlier layer."""
    arrays = group_query(rng, 2, 6, past=6, rotary=True)
    arrays[1:3] = [x[:, :0] for x in arrays[1:3]]
    heads = {"num_heads": 4, "kv_num_heads": 2}
    assert_same(*both("GroupQueryAttention", arrays, 3, **heads, do_rotary=1))


@pytest.mark.parametrize("qk_output", [1, 2])
def test_group_query_attention_gives_scores(rng, qk_output):
    arrays = group_query(rng, 6, 6, bias=normal(rng, 1, 1, 6, 6))
    attributes = {"qk_output": qk_output, "softcap": 1.5, "num_heads": 4, "kv_num_heads": 2}
    assert_same(*both("GroupQueryAttention", arrays, (True, True, True, True), **attributes))


def test_group_query_attention_step_by_step(rng):
    """A prompt's tokens one at a time give what they give together."""
    heads = {"num_heads": 4, "kv_num_heads": 2, "do_rotary": 1, "local_window_size": 4}
    whole = group_query(rng, 7, 7, batch=2, rotary=True)
    expected, *_ = contrib("GroupQueryAttention", whole, 3, **heads)
    caches = [np.zeros((2, 2, 0, 16), np.float32)] * 2
    for i in range(7):
        token = [x[:, i : i + 1] for x in whole[:3]]
        lengths = [np.full(2, i, np.int32), np.array(i + 1, np.int32)]
        arrays = [*token, *caches, *lengths, *whole[7:]]
        out, *caches = contrib("GroupQueryAttention", arrays, 3, **heads)
        np.testing.assert_allclose(out[:, 0], expected[:, i], atol=2e-6)


@pytest.mark.parametrize(
    ("positions", "attributes"),
    [
        (np.array([2]), {}),
        (np.array([[0, 1, 2, 5], [3, 3, 1, 0]]), {"interleaved": 1}),
        (np.array([2]), {"num_heads": 4, "rotary_embedding_dim": 6}),
    ],
)
@pytest.mark.parametrize("axes", [3, 4])
def test_rotary_embedding_of_onnxruntime(rng, axes, positions, attributes):
    pairs = attributes.get("rotary_embedding_dim", 8) // 2
    x = normal(rng, 2, 4, 32) if axes == 3 else normal(rng, 2, 4, 4, 8)
    assert_same(*both("RotaryEmbedding", [x, positions, *tables(9, pairs)], **attributes))


FLAT = np.ones((2, 3, 32), np.float32)
CACHE = np.ones((2, 4, 5, 8), np.float32)
SEQLENS, TOTAL = np.array([2, 2], np.int32), np.array(3, np.int32)
GROUP = {"num_heads": 4, "kv_num_heads": 4}
BAD_CONTRIB = {
    "packed": ("MultiHeadAttention", [FLAT], {"num_heads": 4}, "query: got shape .* without key"),
    "value": ("MultiHeadAttention", [FLAT] * 2, {"num_heads": 4}, "key: got .* without value"),
    "padding": (
        "MultiHeadAttention", [FLAT] * 3 + [None, np.ones(8, np.int32)], {"num_heads": 4},
        r"key_padding_mask: got shape \(8,\)",
    ),
    "causal": (
        "MultiHeadAttention", [FLAT] + [FLAT[:, :2]] * 2, {"num_heads": 4, "unidirectional": 1},
        "unidirectional: got 1 with 3 queries and 2 new keys",
    ),
    "weak padding": (
        "MultiHeadAttention", [FLAT] * 3 + [None, SEQLENS],
        {"num_heads": 4, "mask_filter_value": -10.0}, "mask_filter_value: got -10.0",
    ),
    "beams": (
        "MultiHeadAttention", [FLAT] * 3 + [None] * 5 + [SEQLENS], {"num_heads": 4},
        "past_sequence_length: got an input",
    ),
    "bias": (
        "MultiHeadAttention", [FLAT] * 3 + [FLAT[0, 0]], {"num_heads": 4}, "bias: got shape",
    ),
    "past of one axis": (
        "GroupQueryAttention", [FLAT] * 3 + [FLAT[0, 0], CACHE, SEQLENS, TOTAL], GROUP,
        "key: got float32 .* with a past",
    ),
    "8 bits": (
        "GroupQueryAttention", [FLAT] * 3 + [None, None, SEQLENS, TOTAL],
        {**GROUP, "k_quant_type": "PER_TENSOR"}, "k_quant_type: got 'PER_TENSOR'",
    ),
    "ring": (
        "GroupQueryAttention", [FLAT] * 3 + [None, None, SEQLENS, TOTAL],
        {**GROUP, "sliding_window_cache": 1}, "sliding_window_cache: got 1",
    ),
    "norm": (
        "GroupQueryAttention", [FLAT] * 3 + [None, None, SEQLENS, TOTAL] + [None] * 7 + [FLAT],
        GROUP, "q_norm_weight: got an input",
    ),
    "no past": (
        "GroupQueryAttention", [FLAT] * 3 + [None, None, SEQLENS + 3, TOTAL + 3], GROUP,
        ".* past tokens and a past_key of 0",
    ),
    "total": (
        "GroupQueryAttention", [FLAT] * 3 + [CACHE, CACHE, SEQLENS + 1, TOTAL], GROUP,
        "seqlens_k: got 3 to 3, expected -1 to 2",
    ),
    "angles": (
        "GroupQueryAttention", [FLAT] * 3 + [None, None, SEQLENS, TOTAL], {**GROUP, "do_rotary": 1},
        "cos_cache, sin_cache: got None",
    ),
    "output": (
        "GroupQueryAttention", [FLAT] * 3 + [None, None, SEQLENS, TOTAL], GROUP, "qk_output: got 0",
    ),
    "ragged": (
        "RotaryEmbedding", [FLAT, np.array([0]), *tables(9, 4)], {"is_packed_batching": 1},
        "is_packed_batching: got 1",
    ),
    "dim": (
        "RotaryEmbedding", [np.ones((2, 3, 40), np.float32), np.array([0]), *tables(9, 8)], {},
        "8 angles for 20 of 20",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD_CONTRIB)
def test_bad_contrib(name):
    op_type, inputs, attributes, message = BAD_CONTRIB[name]
    with pytest.raises(ValueError, match=message):
        contrib(op_type, inputs, 4 if op_type == "GroupQueryAttention" else 1, **attributes)


# ---- the module --------------------------------------------------------------------------------


def test_package_is_imported_by_this_module_alone():
    code = (
        "import sys, numattn\n"
        "assert 'onnx' not in sys.modules and 'numattn.onnx' not in sys.modules\n"
        "sys.modules['onnx'] = None\n"
        "import numattn.onnx\n"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "ImportError: numattn.onnx needs onnx: pip install 'numattn[onnx]'" in result.stderr
