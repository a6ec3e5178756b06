"""A small GPT in NumPy, with its gradients: characters in, the logits of the next character out.

numattn computes the blocks and their gradients. The few lines below add what comes before and after
the blocks, and pass the gradients through all of it. `language_model.py` trains the model.
"""

from __future__ import annotations

import json
from collections import Counter

import numattn as na
import numpy as np

RARE = "\N{REPLACEMENT CHARACTER}"  # one character for all rare ones


class Vocabulary:
    """The characters that are frequent enough in a text; all others share one token."""

    def __init__(self, characters: str) -> None:
        self.characters = characters
        self._numbers = {character: number for number, character in enumerate(characters)}

    @classmethod
    def of_text(cls, text: str, at_least: int = 20) -> Vocabulary:
        counts = Counter(text)
        return cls(RARE + "".join(sorted(x for x in counts if counts[x] >= at_least)))

    def encode(self, text: str) -> np.ndarray:
        return np.array([self._numbers.get(character, 0) for character in text])

    def decode(self, tokens: np.ndarray) -> str:
        return "".join(self.characters[token] for token in tokens)


# ---- layers and their gradients ----------------------------------------------------------------
# Like `na.TransformerBlock.vjp`, each returns its result y and a function. This function takes dy,
# the gradient of the loss with respect to y, and returns the gradients with respect to the inputs.


def norm_vjp(x, gain):
    """Divide vectors by their root mean square r, and multiply them by a learned vector."""
    r = np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + np.float32(1e-6))
    unit = x / r

    def vjp(dy):
        # y = gain x / r, and dr/dx = x / (n r) for vectors of n elements:
        # dx = (gain dy - unit mean(gain dy unit)) / r
        d_gain = (dy * unit).reshape(-1, gain.size).sum(axis=0)
        d_unit = dy * gain
        return (d_unit - unit * np.mean(d_unit * unit, axis=-1, keepdims=True)) / r, d_gain

    return unit * gain, vjp


def rows(x):
    return x.reshape(-1, x.shape[-1])


def cross_entropy_vjp(logits, targets):
    """Return the mean of -log(probability of the target), and a function for its gradient."""
    log_p = log_softmax(rows(logits))
    places = np.arange(targets.size), targets.ravel()

    def vjp():
        # d(-log p_t)/d(logit_i) = p_i, minus 1 for the target i = t.
        d = np.exp(log_p)
        d[places] -= 1
        d /= targets.size
        return d.reshape(logits.shape)

    return -float(log_p[places].mean()), vjp


def log_softmax(logits):
    shifted = logits - logits.max(axis=-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))


# ---- the model ---------------------------------------------------------------------------------


def new_block(dim, heads, kv_heads, rng, dtype) -> na.TransformerBlock:
    """Make a block: attention, then a layer that sees each token separately; both add to x.

    It computes y = x + attention(norm(x)), and returns y + max(norm(y) up, 0)^2 down.
    """
    # Its gradients: a sum passes its gradient to both terms, so for y = x + f(x), dx is dy plus the
    # gradient through f. For a product y = s m: ds = dy m^T and dm = s^T dy, over all tokens. For
    # s = max(a, 0)^2: da = 2 max(a, 0) ds. For the norms see above.
    block = na.TransformerBlock(
        dim, heads, norm="rms", norm_epsilon=1e-6, activation="relu_squared", kv_heads=kv_heads,
        rotary=True, qk_norm=True, bias=False, dtype=dtype, rng=rng,
    )  # fmt: skip
    # Before training, a block adds nothing.
    for name in ("attention.o_weight", "down_weight"):
        block.parameters()[name][...] = 0
    return block


def random_matrix(rng, rows_, columns, dtype):
    return (rng.standard_normal((rows_, columns)) / np.sqrt(rows_)).astype(dtype)


class GPT:
    """Characters in, the logits of the next character out."""

    def __init__(
        self, vocabulary, dim=96, layers=3, heads=6, kv_heads=3, seed=0, dtype=np.float32
    ) -> None:
        self.sizes = {"dim": dim, "layers": layers, "heads": heads, "kv_heads": kv_heads}
        self.vocabulary = vocabulary
        characters = len(vocabulary.characters)
        rng = np.random.default_rng(seed)
        self.own = {
            "embedding": random_matrix(rng, characters, dim, dtype),
            "norm": np.ones(dim, dtype),
            "output": np.zeros((dim, characters), dtype),
        }
        self.blocks = [new_block(dim, heads, kv_heads, rng, dtype) for _ in range(layers)]

    def parameters(self) -> dict[str, np.ndarray]:
        """Return the model's arrays by name, not copies: writing into them changes the model."""
        named = dict(self.own)
        for number, block in enumerate(self.blocks):
            named |= {f"blocks.{number}.{name}": x for name, x in block.parameters().items()}
        return named

    def loss_and_gradients(self, tokens, targets):
        x = self.own["embedding"][tokens]
        block_vjps = []
        for block in self.blocks:
            x, vjp = block.vjp(x, is_causal=True)
            block_vjps.append(vjp)
        normed, final_norm_vjp = norm_vjp(x, self.own["norm"])
        loss, loss_vjp = cross_entropy_vjp(normed @ self.own["output"], targets)

        # Then back, in the opposite order.
        d_logits = loss_vjp()
        d = {"output": rows(normed).T @ rows(d_logits)}
        dx, d["norm"] = final_norm_vjp(d_logits @ self.own["output"].T)
        for number, vjp in reversed(list(enumerate(block_vjps))):
            of_block = vjp(dx)
            dx = of_block.x
            d |= {f"blocks.{number}.{name}": x for name, x in of_block.parameters.items()}
        # The gradient of a character's embedding is the sum over all places of the character.
        d["embedding"] = np.zeros_like(self.own["embedding"])
        np.add.at(d["embedding"], tokens.ravel(), rows(dx))
        return loss, d

    def logits(self, tokens, caches=None, weights=None, last_only=False):
        """Return the logits of the next character after each one, or after only the last one."""
        x = self.own["embedding"][tokens]
        for block, cache in zip(self.blocks, caches or [None] * len(self.blocks), strict=True):
            if weights is None:
                x = block(x, is_causal=True, cache=cache)
            else:
                x, of_heads = block(x, is_causal=True, return_weights=True)
                weights.append(of_heads)
        if last_only:
            x = x[:, -1:]
        return norm_vjp(x, self.own["norm"])[0] @ self.own["output"]

    def new_caches(self, window: int) -> list[na.KVCache]:
        """Return a cache for each block. It forgets tokens that are further back than `window`."""
        kv_heads, dtype = self.sizes["kv_heads"], self.own["embedding"].dtype
        head_dim = self.sizes["dim"] // self.sizes["heads"]
        return [na.KVCache(1, kv_heads, head_dim, window=window, dtype=dtype) for _ in self.blocks]

    def save(self, path: str) -> None:
        from safetensors.numpy import save_file

        sizes = json.dumps(self.sizes | {"characters": self.vocabulary.characters})
        save_file(self.parameters(), path, metadata={"language_model": sizes})

    @classmethod
    def load(cls, path: str) -> GPT:
        from safetensors import safe_open

        with safe_open(path, framework="numpy") as file:
            text = (file.metadata() or {}).get("language_model")
            if text is None:
                raise SystemExit(f"{path} was not written by --save of language_model.py")
            sizes = json.loads(text)
            model = cls(Vocabulary(sizes.pop("characters")), **sizes)
            for name, parameter in model.parameters().items():
                parameter[...] = file.get_tensor(name)
        return model
