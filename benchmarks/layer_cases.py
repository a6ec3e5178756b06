"""The rows of `make bench-layers`: what is computed, with how many operations, and the targets."""

from __future__ import annotations

from dataclasses import asdict, dataclass

import numpy as np
from cases import Case as Attention
from cases import numpy_dtype

MATRICES = 4  # a single row is multiplied by these: together they exceed the caches


@dataclass(frozen=True)
class Case:
    """One row: what is computed from embeddings (batch, tokens, embed_dim).

    The kinds:

    - project: a product with a matrix (embed_dim, outputs)
    - row: the products of a single row with MATRICES of them
    - layer: attention with its four matrices
    - backward: the gradients of a layer
    - forward_and_backward: both
    - step: a layer for one token at a time, after the tokens of a cache
    - block: a layer and a feed-forward network of `outputs` elements, with norms
    - weights: the weights of attention, for `heads` heads of 64 elements
    - softmax: the softmax of `heads` squares of logits
    - rotary: rotary embedding for `heads` heads of 128 elements
    - sentences, passages: a whole model (`examples/sentences.py`)
    """

    name: str
    kind: str
    batch: int = 1
    tokens: int = 1
    embed_dim: int = 768
    heads: int = 12
    outputs: int = 0
    is_causal: bool = False
    cached_tokens: int = 0
    dtype: str = "float32"

    def as_dict(self) -> dict:
        return asdict(self)

    @property
    def bound(self) -> tuple[str, float] | None:
        """The resource that limits it, and how many operations or bytes of memory it needs."""
        if self.kind == "row":
            return "bandwidth", 4.0 * MATRICES * self.embed_dim * self.outputs
        if self.kind == "rotary":  # read and written
            return "bandwidth", 2 * 4.0 * self.heads * self.tokens * 128
        flops = self._flops()
        return ("peak", flops) if flops else None

    def _flops(self) -> float:
        """Operations of the products; causal attention counts only pairs that attend."""
        rows, dim = self.batch * self.tokens, self.embed_dim
        layer = 2.0 * rows * 4 * dim * dim
        of_kinds = {
            "project": 2.0 * rows * dim * self.outputs,
            "layer": layer + self._attention(backward=False),
            "block": layer + self._attention(backward=False) + 2.0 * rows * 2 * dim * self.outputs,
            "backward": 2 * layer + self._attention(backward=True),
        }
        of_kinds["forward_and_backward"] = of_kinds["layer"] + of_kinds["backward"]
        return of_kinds.get(self.kind, 0.0)

    def _attention(self, backward: bool) -> float:
        lengths = self.tokens, self.tokens
        sizes = self.batch, self.heads, self.heads, *lengths, self.embed_dim // self.heads
        return Attention("", *sizes, is_causal=self.is_causal, backward=backward).flops


def normal(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape, dtype=np.float32)


def embeddings(case: Case) -> np.ndarray:
    return normal(case.batch, case.tokens, case.embed_dim)


def rows_and_matrices(case: Case) -> tuple[np.ndarray, list[np.ndarray]]:
    """Make the arrays of a projection, or a row with its matrices."""
    shape = case.embed_dim, case.outputs
    scale = np.float32(1 / np.sqrt(case.embed_dim))
    count = MATRICES if case.kind == "row" else 1
    dtype = numpy_dtype(case.dtype)
    matrices = [(normal(*shape, seed=1 + i) * scale).astype(dtype) for i in range(count)]
    return normal(case.tokens, case.embed_dim).astype(dtype), matrices


def parameters(case: Case) -> dict[str, np.ndarray]:
    """Make the parameters of a layer or block under numattn's names, with matrices (in, out)."""
    dim = case.embed_dim
    matrices = {f"{name}_weight": (dim, dim) for name in "qkvo"}
    if case.kind == "block":
        matrices |= {"up_weight": (dim, case.outputs), "down_weight": (case.outputs, dim)}
    rng = np.random.default_rng(2)

    def draw(*shape: int) -> np.ndarray:
        return rng.standard_normal(shape, dtype=np.float32)

    made = {}
    for name, shape in matrices.items():
        made[name] = draw(*shape) / np.float32(np.sqrt(shape[0]))
        made[name.replace("weight", "bias")] = draw(shape[1]) / 10
    if case.kind == "block":
        for name in ("norm1", "norm2"):
            made[f"{name}_weight"], made[f"{name}_bias"] = 1 + draw(dim) / 10, draw(dim) / 10
    return made


_512 = {"batch": 8, "tokens": 512}

CASES = [
    Case("projection 4096 x 768 x 768", "project", tokens=4096, outputs=768),
    Case("projection 4096 x 768 x 3072", "project", tokens=4096, outputs=3072),
    Case("projection bf16 4096 x 768 x 768", "project", tokens=4096, outputs=768,
         dtype="bfloat16"),
    Case("one row 4096 x 4096", "row", embed_dim=4096, outputs=4096),
    Case("layer 8 x 512", "layer", **_512),
    Case("layer 2048 causal", "layer", tokens=2048, embed_dim=1024, heads=16, is_causal=True),
    Case("layer, one token after 512", "step", tokens=16, cached_tokens=512),
    Case("layer vjp 8 x 512", "backward", **_512),
    Case("layer 8 x 512, forward and vjp", "forward_and_backward", **_512),
    Case("block 8 x 512", "block", **_512, outputs=3072),
    Case("MiniLM sentences", "sentences"),
    Case("MiniLM passages", "passages"),
    Case("attention_weights 12 x 1024^2", "weights", tokens=1024),
    Case("masked_softmax 12 x 1024^2", "softmax", tokens=1024),
    Case("rotary_embedding 32 x 4096 x 128", "rotary", tokens=4096, heads=32),
]  # fmt: skip

# Targets with two threads: the share of the dtype's peak of multiply-adds (for a row and rotary
# embedding, the share of the read bandwidth), and how many times as fast as another library.
BARS: dict[str, dict[str, float]] = {
    "projection 4096 x 768 x 768": {"peak": 0.88, "numpy": 0.97},
    "projection 4096 x 768 x 3072": {"peak": 0.86, "numpy": 0.97},
    "projection bf16 4096 x 768 x 768": {"peak": 0.78},
    "one row 4096 x 4096": {"peak": 0.85},
    "layer 8 x 512": {"peak": 0.80, "torch": 2.6},
    "layer 2048 causal": {"peak": 0.78, "torch": 3.0},
    "layer, one token after 512": {"torch": 2.0},
    "layer vjp 8 x 512": {"torch": 2.0},
    "MiniLM sentences": {"numpy": 1.3},
    "MiniLM passages": {"numpy": 1.8},
    "attention_weights 12 x 1024^2": {"numpy": 2.6},
    "masked_softmax 12 x 1024^2": {"scipy": 3.0},
    "rotary_embedding 32 x 4096 x 128": {"peak": 0.5},
}
BARS_THREADS = 2
# How much libraries may differ, as a share of an array's largest value. The tolerance of float32 is
# small enough to tell GELU from its approximation by tanh.
TOLERANCES = {"float32": 2e-5, "bfloat16": 2e-2}
