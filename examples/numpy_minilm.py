"""The blocks of the sentence encoder MiniLM in plain NumPy, to compare with `numattn.demo`."""

from __future__ import annotations

import numpy as np

EPSILON = 1e-12  # of the norms


def numpy_block(block, x, lengths):
    """Compute what `block` does, with its parameters, in plain NumPy."""
    w = block.parameters()
    batch, tokens, dim = x.shape

    def split(y):  # (batch, tokens, dim) -> (batch, heads, tokens, 32), a view
        return y.reshape(batch, tokens, -1, 32).swapaxes(1, 2)

    q, k, v = (split(linear(x, w, f"attention.{part}_")) for part in "qkv")
    attended = numpy_attention(q, k, v, lengths).swapaxes(1, 2).reshape(batch, tokens, dim)
    x = norm(x + linear(attended, w, "attention.o_"), w, "norm1_")
    inner = gelu(linear(x, w, "up_"))
    return norm(x + linear(inner, w, "down_"), w, "norm2_")


def numpy_attention(q, k, v, lengths):
    """Attend over a padded batch, with all logits in memory at once."""
    s = q @ k.swapaxes(-1, -2)
    s *= np.float32(1 / np.sqrt(q.shape[-1]))
    padding = np.arange(k.shape[-2]) >= lengths[:, np.newaxis]  # (batch, tokens)
    np.copyto(s, -np.inf, where=padding[:, np.newaxis, np.newaxis, :])
    s -= s.max(axis=-1, keepdims=True)
    np.exp(s, out=s)
    s /= s.sum(axis=-1, keepdims=True)
    return s @ v


def linear(x, weights, name):
    return x @ weights[f"{name}weight"] + weights[f"{name}bias"]


def norm(x, weights, name):
    x = x - x.mean(axis=-1, keepdims=True)
    x /= np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + EPSILON)
    return x * weights[f"{name}weight"] + weights[f"{name}bias"]


def gelu(x: np.ndarray) -> np.ndarray:
    """X * P(X <= x) for a standard normal X.

    The probability is by Abramowitz and Stegun, 26.2.17; its error is below 7.5e-8.
    """
    t = 1 / (1 + np.float32(0.2316419) * np.abs(x))
    tail = np.zeros_like(x)
    for c in (1.330274429, -1.821255978, 1.781477937, -0.356563782, 0.319381530):
        tail = (tail + np.float32(c)) * t
    tail *= np.exp(np.float32(-0.5) * x * x) * np.float32(1 / np.sqrt(2 * np.pi))
    return x * np.where(x < 0, tail, 1 - tail)
