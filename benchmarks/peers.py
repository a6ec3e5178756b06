"""Attention of each library that is compared, as functions without arguments."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from cases import Case, arrays, gradient_of_out, options

Call = Callable[[], object]
# For each peer: (case, threads) -> {variant: call}; the fastest variant counts.
Peer = Callable[[Case, int], dict[str, Call]]


class Unsupported(Exception):
    """The library cannot compute this case on a CPU."""


def numattn_peer(case: Case, threads: int) -> dict[str, Call]:
    import numattn as na

    na.set_num_threads(threads)
    q, k, v = arrays(case)
    made = options(case)
    if case.backward:
        out, lse = na.attention(q, k, v, **made, return_lse=True)
        dout = gradient_of_out(case, out.shape)
        backward = na.attention_backward
        return {"attention_backward": lambda: backward(dout, q, k, v, out, lse, **made)}
    return {"attention": lambda: na.attention(q, k, v, **made)}


def numpy_peer(case: Case, threads: int) -> dict[str, Call]:
    from numattn._bench import plain_attention, plain_calls

    del threads  # set in the environment
    q, k, v = arrays(case)
    if case.backward:
        raise Unsupported("NumPy has no gradients: only forward passes are compared")
    if q.dtype.itemsize == 2:
        raise Unsupported("NumPy has no fast matmul of 16-bit floats")
    if case.layout == "blhd":
        q, k, v = (x.swapaxes(1, 2) for x in (q, k, v))
    made = options(case)
    rest: dict = {"penalty": _penalty(case, made), "softcap": case.softcap}
    if case.sinks:
        rest["sinks"] = made["sinks"][:, np.newaxis, np.newaxis]
    calls: dict[str, Call] = dict(plain_calls(q, k, v, **rest))
    if case.kv_lengths is not None:

        def one_by_one():
            pairs = enumerate(case.kv_lengths)
            return np.stack([plain_attention(q[i], k[i, :, :n], v[i, :, :n]) for i, n in pairs])

        calls["one by one"] = one_by_one
    if case.layout == "blhd":
        return {name: lambda call=call: call().swapaxes(1, 2) for name, call in calls.items()}
    return calls


def _penalty(case: Case, made: dict) -> np.ndarray | None:
    """Return what to add to the logits: bias, ALiBi, and -inf where a query must not attend."""
    lengths = np.reshape(case.kv_lengths or [case.key_length], (-1, 1, 1, 1))
    p = np.arange(case.query_length)[:, np.newaxis] + lengths - case.query_length
    j = np.arange(case.key_length)
    attend = j < lengths
    if case.is_causal:
        attend = attend & (j <= p)
    if case.left_window is not None:
        attend = attend & (j <= p) & (j >= p - case.left_window)
    penalty = np.where(attend & made.get("mask", True), 0.0, -np.inf) + made.get("bias", 0.0)
    if case.alibi:
        penalty = penalty - made["alibi_slopes"][:, np.newaxis, np.newaxis] * np.abs(p - j)
    return penalty.astype(case.dtype) if penalty.any() else None


def torch_peer(case: Case, threads: int) -> dict[str, Call]:
    import torch

    if case.is_causal and case.query_length != case.key_length:
        raise Unsupported("PyTorch's causal limit aligns the first query with the first key")
    torch.set_num_threads(threads)
    torch.set_grad_enabled(case.backward)
    dtype = getattr(torch, case.dtype)
    q, k, v = (torch.from_numpy(x.astype(np.float64)).to(dtype) for x in arrays(case))
    sdpa = torch.nn.functional.scaled_dot_product_attention
    options = {"is_causal": case.is_causal, "enable_gqa": case.kv_heads != case.query_heads}
    if not case.backward:
        return {"scaled_dot_product_attention": lambda: sdpa(q, k, v, **options)}
    inputs = tuple(x.requires_grad_() for x in (q, k, v))
    out = sdpa(*inputs, **options)
    dout = torch.from_numpy(gradient_of_out(case, tuple(out.shape)).astype(np.float64)).to(dtype)
    return {"backward": lambda: torch.autograd.grad(out, inputs, dout, retain_graph=True)}


def onnxruntime_peer(case: Case, threads: int) -> dict[str, Call]:
    from onnx import TensorProto, helper

    if case.backward:
        raise Unsupported("ONNX Runtime has no gradients")
    if case.dtype != "float32":
        raise Unsupported("ONNX Runtime is compared only in float32")

    def session(node, inputs):
        declared = [
            helper.make_tensor_value_info(name, TensorProto.FLOAT, x.shape)
            for name, x in inputs.items()
        ]
        out = helper.make_tensor_value_info("out", TensorProto.FLOAT, None)
        graph = helper.make_graph([node], "attention", declared, [out])
        opsets = [helper.make_opsetid("", 23), helper.make_opsetid("com.microsoft", 1)]
        model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
        return onnxruntime_call(model.SerializeToString(), inputs, threads)

    q, k, v = arrays(case)
    names = ["q", "k", "v"]
    calls = {}
    node = helper.make_node("Attention", names, ["out"], is_causal=int(case.is_causal))
    calls["Attention"] = session(node, {"q": q, "k": k, "v": v})
    if case.kv_heads == case.query_heads:
        flat = {
            name: np.ascontiguousarray(x.swapaxes(1, 2)).reshape(case.batch, x.shape[2], -1)
            for name, x in (("q", q), ("k", k), ("v", v))
        }
        node = helper.make_node(
            "MultiHeadAttention", names, ["out"], domain="com.microsoft",
            num_heads=case.query_heads, unidirectional=int(case.is_causal),
        )  # fmt: skip
        calls["MultiHeadAttention"] = session(node, flat)
    return calls


def onnxruntime_call(model: bytes, inputs: dict[str, np.ndarray], threads: int) -> Call:
    """Return a call that runs an ONNX model, with all optimisations, which is the default."""
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    run = ort.InferenceSession(model, options, providers=["CPUExecutionProvider"]).run
    return lambda: run(None, inputs)


def openvino_peer(case: Case, threads: int) -> dict[str, Call]:
    import openvino as ov
    from openvino import opset13 as ops

    q, k, v = arrays(case)
    if case.backward:
        raise Unsupported("OpenVINO has no gradients")
    if case.dtype not in ("float32", "bfloat16"):
        raise Unsupported(f"OpenVINO's attention on CPUs does not support {case.dtype}")
    precision = "f32" if case.dtype == "float32" else "bf16"
    group = case.query_heads // case.kv_heads
    if group > 1 and case.is_decode:
        raise Unsupported("OpenVINO has no grouped heads: it would read each KV head many times")
    k, v = (np.repeat(x, group, axis=1) for x in (k, v))  # OpenVINO has no grouped heads; not timed
    inputs = [ops.parameter(x.shape, getattr(ov.Type, precision)) for x in (q, k, v)]
    node = ops.scaled_dot_product_attention(*inputs, causal=case.is_causal)
    config = {"INFERENCE_PRECISION_HINT": precision, "INFERENCE_NUM_THREADS": threads}
    config["PERFORMANCE_HINT"] = "LATENCY"
    request = (
        ov.Core().compile_model(ov.Model([node], inputs), "CPU", config).create_infer_request()
    )
    raw = [x if precision == "f32" else x.view(np.uint16) for x in (q, k, v)]
    for i, x in enumerate(raw):
        tensor = ov.Tensor(x, x.shape, getattr(ov.Type, precision))
        request.set_input_tensor(i, tensor)

    def infer(keep_alive=raw):
        request.start_async()
        request.wait()

    return {"scaled_dot_product_attention": infer}


PEERS: dict[str, Peer] = {
    "numattn": numattn_peer,
    "numpy": numpy_peer,
    "torch": torch_peer,
    "onnxruntime": onnxruntime_peer,
    "openvino": openvino_peer,
}
