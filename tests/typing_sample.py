"""What a user's program looks like to a type checker: `mypy --strict`, in `make lint`."""

from typing import Any

import numattn as na
import numpy as np
from numpy.typing import NDArray


def attend(x: NDArray[np.float32], lengths: list[int]) -> NDArray[Any]:
    out = na.attention(x, x, x, is_causal=True, kv_lengths=lengths, window=(100, None))
    both = na.attention(x, x, x, return_lse=True)
    merged = na.merge_states(both[0], both[1], both[0], both[1])
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
    out: NDArray[Any] = module(np.zeros((2, 5, 64), np.float32), is_causal=True)
    return na.rotary_embedding(out.reshape(2, 4, 5, 16))


def step(module: na.MultiHeadAttention, x: NDArray[np.float32]) -> NDArray[Any]:
    out, vjp = module.vjp(x, is_causal=True)
    gradients: na.LayerGradients = vjp(out)
    for name, parameter in module.parameters().items():
        parameter -= gradients.parameters[name]
    return gradients.x


threads: int = na.get_num_threads()
na.set_num_threads(threads)
info: dict[str, Any] = na.runtime_info()
