"""What a user's program looks like to a type checker: `mypy --strict`, in `make lint`."""

from collections.abc import Callable
from typing import Any, assert_type

import numattn as na
import numpy as np
from numpy.typing import NDArray


def attend(x: NDArray[np.float32], lengths: list[int]) -> NDArray[Any]:
    out = na.attention(x, x, x, is_causal=True, kv_lengths=lengths, window=(100, None))
    both = na.attention(x, x, x, return_lse=True)
    merged = na.merge_states([both, both])
    weights = na.attention_weights(x, x, rows=[0, -1])
    total: NDArray[Any] = np.asarray(out) + merged[0]
    return total + na.aggregate_values(weights, x)


def train(x: NDArray[np.float32]) -> NDArray[Any]:
    rng = np.random.default_rng(0)
    out, vjp = na.attention_vjp(x, x, x, is_causal=True, dropout=0.1, rng=rng)
    gradients: na.Gradients = vjp(out)
    na.attention(x, x, x, dropout=0.1, rng=int(rng.integers(2**63)))
    _, lse = na.attention(x, x, x, return_lse=True)
    same = na.attention_backward(out, x, x, x, out, lse, is_causal=True)
    total: NDArray[Any] = gradients.q + same.k
    return total


def generate(steps: int) -> int:
    cache = na.KVCache(1, 2, 16, dtype=np.float32, window=64, keep_first=4)
    for _ in range(steps):
        k = np.zeros((1, 2, 1, 16), np.float32)
        cache.append(k, k)
        cache = na.KVCache.concatenate([cache])
        cache.append_and_attend(k, k, k)
        cache.attend(k, mask=np.ones(int(cache.lengths.max()), bool))
        cache.attend(k, tail_mask=np.ones((1, 1), bool))
    return int(cache.lengths[0]) + cache.nbytes


def layer() -> NDArray[Any]:
    module = na.MultiHeadAttention(64, 4, rotary=True, rng=0)
    out = module(np.zeros((2, 5, 64), np.float32), is_causal=True)
    assert_type(module.context_dim, tuple[int, int])
    return na.rotary_embedding(out.reshape(2, 4, 5, module.head_dim))


def decode(module: na.MultiHeadAttention, encoded: NDArray[np.float32], wanted: bool) -> None:
    x = np.zeros((2, 1, 64), np.float32)
    context: na.ContextCache = module.context_cache(encoded, lengths=[5, 3])
    assert_type(module(x, context), One)
    assert_type(module(x, encoded, scale=1, bias=np.zeros(5), return_weights=False), One)
    assert_type(module(x, (encoded, encoded), return_weights=True, sinks=[0.0] * 4), Both)
    assert_type(module(x, context, return_weights=wanted), One | Both)
    assert_type(module(x, cache=module.new_cache(2, window=8), num_threads=1), One)
    module(x, softmax_scale=1)  # type: ignore[call-overload]


# One result, and one with what was asked for beside it.
One = NDArray[Any]
Both = tuple[NDArray[Any], NDArray[Any]]


def results(x: NDArray[np.float32], pages: NDArray[np.float32], wanted: bool) -> None:
    """Get what is known where the program says what it asks for."""
    assert_type(na.attention(x, x, x, softcap=2), One)
    assert_type(na.attention(x, x, x, return_lse=False), One)
    assert_type(na.attention(x, x, x, return_lse=True, layout="blhd"), Both)
    assert_type(na.attention(x, x, x, return_lse=wanted), One | Both)
    na.attention(x, x, x, attn_mask=None)  # type: ignore[call-overload]
    na.attention(x, x, x, scale="1")  # type: ignore[call-overload]
    starts = [0, 3, 8]
    assert_type(na.attention_varlen(x, x, x, starts, starts, is_causal=True), One)
    assert_type(na.attention_varlen(x, x, x, starts, starts, return_lse=True), Both)
    assert_type(na.attention_varlen(x, x, x, starts, starts, return_lse=wanted), One | Both)
    assert_type(na.attention_paged(x, pages, pages, [[0]], [2], q_lengths=1), One)
    assert_type(na.attention_paged(x, pages, pages, [[0]], [2], return_lse=True), Both)
    assert_type(na.attention_paged(x, pages, pages, [[0]], 2, return_lse=wanted), One | Both)
    bounds = na.PageBounds(1, 2, 1, 16)
    bounds.update(pages, [[0]], [2], new_tokens=1)
    assert_type(bounds.select(x, [[0]], [2], 2), NDArray[np.int64])
    assert_type(bounds.attend(x, pages, pages, [[0]], [2], 2, softcap=2), One)
    assert_type(bounds.attend(x, pages, pages, [[0]], [2], 2, return_lse=True), Both)
    assert_type(bounds.attend(x, pages, pages, [[0]], 2, 2, return_lse=wanted), One | Both)
    bounds.attend(x, pages, pages, [[0]], [2], 2, window=(3, 0))  # type: ignore[call-overload]
    cache = na.KVCache(1, 2, 16)
    assert_type(cache.attend(x, q_offset=3), One)
    assert_type(cache.attend(x, return_lse=True), Both)
    assert_type(cache.attend(x, return_lse=wanted), One | Both)
    assert_type(cache.append_and_attend(x, x, x, [1], window=(3, None)), One)
    assert_type(cache.append_and_attend(x, x, x, return_lse=True), Both)
    assert_type(cache.append_and_attend(x, x, x, return_lse=wanted), One | Both)
    cache.append_and_attend(x, x, x, q_offset=3)  # type: ignore[call-overload]
    Vjp = Callable[..., na.Gradients]
    assert_type(na.attention_vjp(x, x, x, bias_gradient=False), tuple[One, Vjp])
    assert_type(na.attention_vjp(x, x, x, return_lse=True), tuple[Both, Vjp])
    rounded = na.quantize_kv(x, channel_scale=wanted)
    assert_type(rounded[0], NDArray[np.int8])


def step(module: na.MultiHeadAttention, x: NDArray[np.float32]) -> NDArray[Any]:
    out, vjp = module.vjp(x, is_causal=True)
    gradients: na.LayerGradients = vjp(out)
    for name, parameter in module.parameters().items():
        parameter -= gradients.parameters[name]
    return gradients.x


def block(module: na.TransformerBlock, x: NDArray[np.float32]) -> NDArray[Any]:
    cache = na.KVCache(2, 4, 16)
    out: NDArray[Any] = module(x, lengths=[5, 4], cache=cache, window=(8, 0))
    _, weights = module(out, is_causal=True, return_weights=True)
    out, vjp = module.vjp(x, is_causal=True, dropout=0.1, rng=0)
    gradients: na.BlockGradients = vjp(out)
    total: NDArray[Any] = weights + gradients.parameters["up_weight"].sum()
    return total


threads: int = na.get_num_threads()
na.set_num_threads(threads)
info: dict[str, Any] = na.runtime_info()
