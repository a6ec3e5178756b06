"""Layers, blocks and a model of each library, as functions without arguments.

Each library has a table of what it computes: {kind of case: case -> {variant: call}}. The fastest
variant counts.
"""

from __future__ import annotations

import logging
import sys
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from layer_cases import Case, embeddings, normal, parameters, rows_and_matrices
from peers import Call, Peer, Unsupported, onnxruntime_call

Table = dict[str, Callable[[Case], dict[str, Call]]]


def one(make: Callable[[Case], Call]) -> Callable[[Case], dict[str, Call]]:
    """Return a function that makes the only variant."""
    return lambda case: {make.__name__: make(case)}


def look_up(table: Table, case: Case) -> dict[str, Call]:
    if case.kind not in table:
        raise Unsupported(f"this library is not compared for cases of the kind {case.kind!r}")
    return table[case.kind](case)


# ---- numattn -----------------------------------------------------------------------------------


def numattn_project(case: Case) -> Call:
    import numattn as na
    from numattn._projection import project

    level = na.runtime_info()["isa"]["chosen"]
    if case.dtype == "bfloat16" and level != "avx512_bf16":
        raise Unsupported(f"products of bfloat16 need the level avx512_bf16; this CPU has {level}")
    rows, matrices = rows_and_matrices(case)
    # A bias of zeros is added like any other, and does not change the product.
    bias = np.zeros(case.outputs, rows.dtype)
    if case.kind == "project":
        return lambda: project(rows, matrices[0], bias)
    return lambda: [project(rows, matrix, bias) for matrix in matrices]


def numattn_layer(case: Case):
    import numattn as na

    return na.MultiHeadAttention.from_weights(
        **parameters(case), num_heads=case.heads, transposed=True
    )


def numattn_forward(case: Case) -> Call:
    layer, x = numattn_layer(case), embeddings(case)
    return lambda: layer(x, is_causal=case.is_causal)


def numattn_block(case: Case) -> Call:
    import numattn as na

    block = na.TransformerBlock.from_weights(
        **parameters(case), num_heads=case.heads, transposed=True, norm_first=False
    )
    x = embeddings(case)
    return lambda: block(x)


def numattn_step(case: Case) -> Call:
    layer, x = numattn_layer(case), embeddings(case)
    cache = layer.new_cache(capacity=case.cached_tokens + case.tokens)
    layer(normal(1, case.cached_tokens, case.embed_dim, seed=3), cache=cache)

    def steps():
        cache.truncate(case.cached_tokens)  # forgets the tokens of the previous call
        return [layer(x[:, i : i + 1], cache=cache) for i in range(case.tokens)]

    return steps


def numattn_gradients(found: Any) -> list[np.ndarray]:
    """Return the gradients in the form of the comparison: x, q, k, v, o, and biases like PyTorch's.

    The gradient of the keys' bias is 0 except for rounding, so it is compared together with the
    others.
    """
    own = found.parameters
    matrices = (own[f"{name}_weight"] for name in "qkvo")
    biases = np.concatenate([own[f"{name}_bias"] for name in "qkv"])
    return [found.x, *matrices, biases, own["o_bias"]]


def numattn_backward(case: Case) -> Call:
    out, vjp = numattn_layer(case).vjp(embeddings(case))
    dout = normal(*out.shape, seed=4)
    return lambda: numattn_gradients(vjp(dout))


def numattn_forward_and_backward(case: Case) -> Call:
    layer, x = numattn_layer(case), embeddings(case)
    dout = normal(*x.shape, seed=4)

    def both():
        out, vjp = layer.vjp(x)
        return [out, *numattn_gradients(vjp(dout))]

    return both


def numattn_weights(case: Case) -> Call:
    import numattn as na

    q, k = normal(2, case.heads, case.tokens, 64)
    return lambda: na.attention_weights(q, k)


def numattn_softmax(case: Case) -> Call:
    import numattn as na

    x = normal(case.heads, case.tokens, case.tokens)
    return lambda: na.masked_softmax(x)


def numattn_rotary(case: Case) -> Call:
    import numattn as na

    x = normal(1, case.heads, case.tokens, 128)
    out = np.empty_like(x)
    return lambda: na.rotary_embedding(x, out=out)


def minilm(case: Case) -> Callable[..., np.ndarray]:
    """Return a call that encodes the texts of the case; its argument computes the blocks."""
    sys.path.append(str(Path(__file__).parents[1] / "examples"))
    import sentences
    from numattn.demo import MiniLM

    model = MiniLM()
    texts = {"sentences": sentences.SENTENCES, "passages": sentences.PASSAGES}
    return partial(model.encode_tokens, *model.tokens(texts[case.kind]))


def numattn_model(case: Case) -> Call:
    return minilm(case)


NUMATTN: Table = {
    "project": one(numattn_project),
    "row": one(numattn_project),
    "layer": one(numattn_forward),
    "block": one(numattn_block),
    "step": one(numattn_step),
    "backward": one(numattn_backward),
    "forward_and_backward": one(numattn_forward_and_backward),
    "weights": one(numattn_weights),
    "softmax": one(numattn_softmax),
    "rotary": one(numattn_rotary),
    "sentences": one(numattn_model),
    "passages": one(numattn_model),
}


def numattn_peer(case: Case, threads: int) -> dict[str, Call]:
    import numattn as na

    na.set_num_threads(threads)
    return look_up(NUMATTN, case)


# ---- NumPy and SciPy ---------------------------------------------------------------------------


def numpy_project(case: Case) -> Call:
    if case.dtype == "bfloat16":
        raise Unsupported("NumPy has no fast matmul of 16-bit floats")
    rows, matrices = rows_and_matrices(case)
    if case.kind == "project":
        return lambda: rows @ matrices[0]
    return lambda: [rows @ matrix for matrix in matrices]


def numpy_weights(case: Case) -> Call:
    q, k = normal(2, case.heads, case.tokens, 64)

    def plain():
        s = q @ k.swapaxes(-1, -2)
        s *= np.float32(1 / 8)
        s -= s.max(axis=-1, keepdims=True)
        np.exp(s, out=s)
        s /= s.sum(axis=-1, keepdims=True)
        return s

    return plain


def numpy_model(case: Case) -> Call:
    encode = minilm(case)
    from numpy_minilm import numpy_block

    return lambda: encode(numpy_block)


NUMPY: Table = {
    "project": one(numpy_project),
    "row": one(numpy_project),
    "weights": one(numpy_weights),
    "sentences": one(numpy_model),
    "passages": one(numpy_model),
}


def numpy_peer(case: Case, threads: int) -> dict[str, Call]:
    del threads  # set in the environment
    return look_up(NUMPY, case)


def scipy_softmax(case: Case) -> Call:
    import scipy.special

    x = normal(case.heads, case.tokens, case.tokens)
    return lambda: scipy.special.softmax(x, axis=-1)


def scipy_peer(case: Case, threads: int) -> dict[str, Call]:
    del threads  # it has one
    return look_up({"softmax": one(scipy_softmax)}, case)


# ---- PyTorch -----------------------------------------------------------------------------------


def torch_project(case: Case) -> Call:
    import torch

    rows, matrices = rows_and_matrices(case)
    dtype = getattr(torch, case.dtype)

    def tensor(array):
        return torch.from_numpy(np.ascontiguousarray(array.astype(np.float32))).to(dtype)

    x, weights = tensor(rows), [tensor(matrix.T) for matrix in matrices]
    linear = torch.nn.functional.linear
    bias = torch.zeros(case.outputs, dtype=dtype)

    def products():
        with torch.inference_mode():
            return [_array(linear(x, weight, bias)) for weight in weights]

    return products if case.kind == "row" else lambda: products()[0]


def _array(tensor):
    """View a tensor as an array, even if its dtype is bfloat16."""
    import torch

    if tensor.dtype != torch.bfloat16:
        return tensor.numpy()
    import ml_dtypes

    return tensor.view(torch.uint16).numpy().view(ml_dtypes.bfloat16)


def torch_module(case: Case):
    """Make PyTorch's layer or block of a case."""
    import torch

    own = parameters(case)
    state = {
        "in_proj_weight": np.concatenate([own[f"{name}_weight"].T for name in "qkv"]),
        "in_proj_bias": np.concatenate([own[f"{name}_bias"] for name in "qkv"]),
        "out_proj.weight": own["o_weight"].T,
        "out_proj.bias": own["o_bias"],
    }
    if case.kind != "block":
        module = torch.nn.MultiheadAttention(case.embed_dim, case.heads, batch_first=True)
    else:
        module = torch.nn.TransformerEncoderLayer(
            case.embed_dim, case.heads, case.outputs, activation="gelu", batch_first=True
        )
        state = {f"self_attn.{name}": x for name, x in state.items()}
        for name, theirs in (("up", "linear1"), ("down", "linear2")):
            state[f"{theirs}.weight"] = own[f"{name}_weight"].T
            state[f"{theirs}.bias"] = own[f"{name}_bias"]
        for name in ("norm1", "norm2"):
            state |= {f"{name}.{kind}": own[f"{name}_{kind}"] for kind in ("weight", "bias")}
    state = {name: torch.from_numpy(np.ascontiguousarray(x)) for name, x in state.items()}
    module.load_state_dict(state)
    return module.eval()


def torch_forward(case: Case):
    """Return a module of a case that maps embeddings to results and that can be exported."""
    import torch

    module = torch_module(case)
    if case.kind == "block":
        return module

    class SelfAttention(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = module
            mask = torch.nn.Transformer.generate_square_subsequent_mask(case.tokens)
            self.register_buffer("mask", mask if case.is_causal else None)

        def forward(self, x):
            options = {"attn_mask": self.mask, "is_causal": case.is_causal}
            return self.attention(x, x, x, need_weights=False, **options)[0]

    return SelfAttention().eval()


def torch_fast_and_not(case: Case) -> dict[str, Call]:
    """Return the layer or block with and without its fast path, which is often slower."""
    import torch

    module, x = torch_forward(case), torch.from_numpy(embeddings(case))

    def call(is_fast: bool):
        torch.backends.mha.set_fastpath_enabled(is_fast)
        with torch.inference_mode():
            return module(x)

    return {"fast path": partial(call, True), "no fast path": partial(call, False)}


def torch_step(case: Case) -> Call:
    """Attend like a program with its own cache, because the module has none."""
    import torch

    linear = torch.nn.functional.linear
    attend = torch.nn.functional.scaled_dot_product_attention
    module, x = torch_module(case), torch.from_numpy(embeddings(case))
    weights = module.in_proj_weight, module.in_proj_bias
    n, shape = case.cached_tokens, (1, -1, 3, case.heads, case.embed_dim // case.heads)
    keys, values = torch.zeros(2, 1, case.heads, n + case.tokens, shape[-1])

    def projected(tokens):  # (1, heads, tokens, head_dim) each
        return linear(tokens, *weights).view(shape).permute(2, 0, 3, 1, 4).unbind()

    with torch.inference_mode():
        before = torch.from_numpy(normal(1, n, case.embed_dim, seed=3))
        _, keys[:, :, :n], values[:, :, :n] = projected(before)

    def step(token, i):
        q, keys[:, :, i : i + 1], values[:, :, i : i + 1] = projected(token)
        out = attend(q, keys[:, :, : i + 1], values[:, :, : i + 1])
        out = out.transpose(1, 2).reshape(1, 1, case.embed_dim)
        return linear(out, module.out_proj.weight, module.out_proj.bias)

    def steps():
        with torch.inference_mode():
            return [step(x[:, i : i + 1], n + i) for i in range(case.tokens)]

    return steps


def torch_training(case: Case) -> tuple[Call, Callable[[Any], list]]:
    """Return a layer's forward pass, which keeps what gradients need, and its backward pass."""
    import torch

    torch.set_grad_enabled(True)
    module, x = torch_module(case), torch.from_numpy(embeddings(case)).requires_grad_()
    dout = torch.from_numpy(normal(*x.shape, seed=4))
    inputs = [x, *module.parameters()]

    def gradients(out):
        dx, matrices, biases, o_weight, o_bias = torch.autograd.grad(
            out, inputs, dout, retain_graph=True
        )
        return [dx, *(x.T for x in matrices.chunk(3)), o_weight.T, biases, o_bias]

    return lambda: module(x, x, x, need_weights=False)[0], gradients


def torch_backward(case: Case) -> Call:
    forward, gradients = torch_training(case)
    out = forward()
    return lambda: gradients(out)


def torch_forward_and_backward(case: Case) -> Call:
    forward, gradients = torch_training(case)

    def both():
        out = forward()
        return [out.detach(), *gradients(out)]

    return both


TORCH: Table = {
    "project": one(torch_project),
    "row": one(torch_project),
    "layer": torch_fast_and_not,
    "block": torch_fast_and_not,
    "step": one(torch_step),
    "backward": one(torch_backward),
    "forward_and_backward": one(torch_forward_and_backward),
}


def torch_peer(case: Case, threads: int) -> dict[str, Call]:
    import torch

    torch.set_num_threads(threads)
    torch.set_grad_enabled(False)
    return look_up(TORCH, case)


# ---- ONNX Runtime ------------------------------------------------------------------------------


def onnxruntime_peer(case: Case, threads: int) -> dict[str, Call]:
    if case.kind not in ("layer", "block"):
        raise Unsupported(
            "ONNX Runtime is compared only for layers and blocks, which PyTorch exports"
        )
    import onnxscript  # noqa: F401  (the exporter needs it: fail here with a clear ImportError)
    import torch

    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    warnings.simplefilter("ignore")  # the exporter's own
    torch.backends.mha.set_fastpath_enabled(False)  # ONNX has no operator for it
    module, x = torch_forward(case), embeddings(case)
    calls = {}
    for opset in (18, 23):  # attention as products and a softmax, and as an operator
        program = torch.onnx.export(
            module, (torch.from_numpy(x),), dynamo=True, opset_version=opset, verbose=False
        )
        (name,) = (one.name for one in program.model_proto.graph.input)
        model = program.model_proto.SerializeToString()
        calls[f"opset {opset}"] = onnxruntime_call(model, {name: x}, threads)
    return calls


PEERS: dict[str, Peer] = {
    "numattn": numattn_peer,
    "numpy": numpy_peer,
    "torch": torch_peer,
    "onnxruntime": onnxruntime_peer,
    "scipy": scipy_peer,
}
