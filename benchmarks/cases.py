"""The problems that are measured, and how many operations they need."""

from __future__ import annotations

import itertools
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Case:
    """One problem. `mask` names a mask of `dense_mask`; `options` makes the other options."""

    name: str
    batch: int
    query_heads: int
    kv_heads: int
    query_length: int
    key_length: int
    head_dim: int
    is_causal: bool = False
    left_window: int | None = None
    mask: str | None = None
    bias: bool = False
    dtype: str = "float32"
    softcap: float | None = None
    alibi: bool = False
    sinks: bool = False
    kv_lengths: list[int] | None = None
    layout: str = "bhld"
    transposed_keys: bool = False  # (D, L) in memory
    backward: bool = False  # the gradients instead

    def as_dict(self) -> dict:
        return asdict(self)

    @property
    def attended_pairs(self) -> int:
        """The number of pairs of query and key that attend, over all heads."""
        assert self.kv_lengths is None
        if self.mask:
            pairs = int(dense_mask(self).sum())
        else:
            p = np.arange(self.query_length) + self.key_length - self.query_length
            last = np.minimum(p, self.key_length - 1) if self.is_causal else self.key_length - 1
            first = 0 if self.left_window is None else np.maximum(p - self.left_window, 0)
            pairs = int(np.sum(np.zeros_like(p) + last - first + 1))
        return self.batch * self.query_heads * pairs

    @property
    def is_decode(self) -> bool:
        """With few queries, reading K and V is the limit, not multiplying."""
        return self.query_length <= 4 and self.key_length >= 1024

    @property
    def bytes_read(self) -> int:
        """The bytes of all keys and values, each read once."""
        size = numpy_dtype(self.dtype).itemsize
        return 2 * self.batch * self.kv_heads * self.key_length * self.head_dim * size

    @property
    def bound(self) -> tuple[str, float]:
        """The resource that limits the case, and how much of it the case needs."""
        return ("bandwidth", self.bytes_read) if self.is_decode else ("peak", self.flops)

    @property
    def flops(self) -> float:
        """Useful operations: for each attended pair, the multiply-adds of two products in the
        forward pass (q k and w v), or of five in the backward pass."""
        products = 5 if self.backward else 2
        return 2.0 * products * self.head_dim * self.attended_pairs


def dense_mask(case: Case) -> np.ndarray:
    """Make a bool mask (Lq, Lk), shared by all heads."""
    i = np.arange(case.query_length)[:, np.newaxis]
    j = np.arange(case.key_length)
    if case.mask == "causal":
        return j <= i
    if case.mask == "documents":
        return i * 8 // case.query_length == j * 8 // case.key_length
    assert case.mask == "random"
    return np.random.default_rng(0).random((case.query_length, case.key_length)) < 0.5


def arrays(case: Case) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Make normally distributed q, k and v, in the case's layout."""
    rng = np.random.default_rng(0)
    b, d = case.batch, case.head_dim
    q, k, v = (
        rng.standard_normal(shape, dtype=np.float32).astype(numpy_dtype(case.dtype))
        for shape in (
            (b, case.query_heads, case.query_length, d),
            (b, case.kv_heads, case.key_length, d),
            (b, case.kv_heads, case.key_length, d),
        )
    )
    if case.transposed_keys:
        k = np.ascontiguousarray(k.swapaxes(-1, -2)).swapaxes(-1, -2)
    if case.layout == "blhd":
        q, k, v = (np.ascontiguousarray(x.swapaxes(1, 2)) for x in (q, k, v))
    return q, k, v


def gradient_of_out(case: Case, shape: tuple[int, ...]) -> np.ndarray:
    """Make the gradient of a loss with respect to a result of this shape."""
    rng = np.random.default_rng(2)
    return rng.standard_normal(shape, dtype=np.float32).astype(numpy_dtype(case.dtype))


def options(case: Case) -> dict[str, Any]:
    """Make the options of `numattn.attention`."""
    rng = np.random.default_rng(1)
    shape = (case.query_length, case.key_length)
    made: dict[str, Any] = {"is_causal": case.is_causal}
    if case.left_window is not None:
        made["window"] = (case.left_window, 0)
    if case.mask:
        made["mask"] = dense_mask(case)
    if case.bias:
        made["bias"] = rng.standard_normal(shape, dtype=np.float32)
    if case.softcap is not None:
        made["softcap"] = case.softcap
    if case.alibi:
        made["alibi_slopes"] = np.geomspace(0.5, 1 / 256, case.query_heads)
    if case.sinks:
        made["sinks"] = rng.standard_normal(case.query_heads, dtype=np.float32)
    if case.kv_lengths is not None:
        made["kv_lengths"] = case.kv_lengths
    if case.layout != "bhld":
        made["layout"] = case.layout
    return made


def numpy_dtype(name: str) -> np.dtype:
    if name == "bfloat16":
        import ml_dtypes

        return np.dtype(ml_dtypes.bfloat16)
    return np.dtype(name)


_BERT512 = (1, 12, 12, 512, 512, 64)
_LLAMA2K = (1, 32, 8, 2048, 2048, 128)
_ENC4K = (1, 8, 8, 4096, 4096, 64)
_2K = (1, 8, 8, 2048, 2048, 64)

CASES = [
    Case("bert128", 1, 12, 12, 128, 128, 64),
    Case("bert512", *_BERT512),
    Case("gpt1k", 1, 12, 12, 1024, 1024, 64, is_causal=True),
    Case("llama2k", *_LLAMA2K, is_causal=True),
    Case("enc4k", *_ENC4K),
    Case("enc4k128", 1, 4, 4, 4096, 4096, 128),
    Case("odd", 2, 5, 5, 777, 1031, 80),
    Case("tiny", 1, 1, 1, 16, 16, 64),
    Case("bert512-bf16", *_BERT512, dtype="bfloat16"),
    Case("llama2k-bf16", *_LLAMA2K, is_causal=True, dtype="bfloat16"),
    Case("enc4k-bf16", *_ENC4K, dtype="bfloat16"),
    Case("enc4k-f16", *_ENC4K, dtype="float16"),
    Case("enc2k-f64", *_2K, dtype="float64"),
    Case("backward512", *_BERT512, backward=True),
    Case("backward1k", 1, 12, 12, 1024, 1024, 64, is_causal=True, backward=True),
    Case("backward4k", *_ENC4K, backward=True),
    Case("backward2k128", 1, 8, 8, 2048, 2048, 128, is_causal=True, backward=True),
    Case("backward4k-head", 1, 1, 1, 4096, 4096, 64, is_causal=True, backward=True),
    Case("backward2k-groups", *_LLAMA2K, is_causal=True, backward=True),
    Case("backward2k-bf16", *_2K, dtype="bfloat16", backward=True),
    Case("decode8k", 1, 32, 8, 1, 8192, 128),
    Case("decode32k", 1, 32, 8, 1, 32768, 128),
    Case("decode32k-bf16", 1, 32, 8, 1, 32768, 128, dtype="bfloat16"),
    Case("decode32k-f16", 1, 32, 8, 1, 32768, 128, dtype="float16"),
    Case("batch4k-bf16", 8, 32, 8, 1, 4096, 128, dtype="bfloat16"),
    Case("mha8k-bf16", 1, 32, 32, 1, 8192, 128, dtype="bfloat16"),
    Case("four16k-bf16", 1, 32, 8, 4, 16384, 128, is_causal=True, dtype="bfloat16"),
    Case("tiny-decode", 1, 1, 1, 1, 64, 64),
]

# Targets on a CPU with AVX-512 at that level, by number of threads: the share of the peak (with few
# queries, the share of the read bandwidth), and how many times as fast as another library.
BARS: dict[tuple[str, int], dict[str, float]] = {
    ("bert128", 1): {"peak": 0.78, "torch": 1.7, "onnxruntime": 1.0},
    ("bert512", 1): {"peak": 0.86, "torch": 2.3},
    ("gpt1k", 1): {"peak": 0.80, "torch": 2.8, "onnxruntime": 2.1},
    ("llama2k", 1): {"peak": 0.86, "torch": 2.5, "onnxruntime": 2.5},
    ("enc4k", 1): {"peak": 0.89, "torch": 2.3, "onnxruntime": 1.05},
    ("enc4k128", 1): {"peak": 0.92},
    ("odd", 1): {"peak": 0.80},
    ("tiny", 1): {"torch": 2.5, "numpy": 5.0},
    ("bert128", 2): {"peak": 0.68},
    ("bert512", 2): {"peak": 0.82},
    ("gpt1k", 2): {"peak": 0.75, "openvino": 2.0},
    ("llama2k", 2): {"peak": 0.82},
    ("enc4k", 2): {"peak": 0.86, "openvino": 1.7},
    ("enc4k128", 2): {"peak": 0.88},
    ("odd", 2): {"peak": 0.74},
    ("bert512-bf16", 1): {"peak": 0.76, "torch": 3.5},
    ("llama2k-bf16", 1): {"peak": 0.80, "torch": 4.0},
    ("enc4k-bf16", 1): {"peak": 0.86, "torch": 4.0},
    ("enc4k-f16", 1): {"peak": 0.84, "torch": 3.0},
    ("enc2k-f64", 1): {"peak": 0.74, "torch": 2.0},
    ("llama2k-bf16", 2): {"peak": 0.76},
    ("enc4k-bf16", 2): {"peak": 0.82, "openvino": 1.35},
    ("enc4k-f16", 2): {"peak": 0.80},
    ("enc2k-f64", 2): {"peak": 0.70},
    ("backward512", 1): {"peak": 0.82, "torch": 2.2},
    ("backward1k", 1): {"peak": 0.78, "torch": 3.0},
    ("backward4k", 1): {"peak": 0.86, "torch": 2.4},
    ("backward2k128", 1): {"peak": 0.82, "torch": 2.6},
    ("backward2k-groups", 1): {"peak": 0.82},
    ("backward2k-bf16", 1): {"peak": 0.70, "torch": 1.8},
    ("backward512", 2): {"peak": 0.78, "torch": 2.2},
    ("backward1k", 2): {"peak": 0.74},
    ("backward4k", 2): {"peak": 0.83},
    ("backward2k128", 2): {"peak": 0.79},
    ("backward4k-head", 2): {"peak": 0.75},
    ("backward2k-groups", 2): {"peak": 0.79},
    ("backward2k-bf16", 2): {"peak": 0.66},
    ("decode32k", 1): {"peak": 0.85},
    ("decode8k", 2): {"peak": 0.85, "torch": 4.0, "onnxruntime": 2.5},
    ("decode32k", 2): {"peak": 0.87},
    ("decode32k-bf16", 2): {"peak": 0.85, "torch": 20.0},
    ("decode32k-f16", 2): {"peak": 0.82, "torch": 20.0},
    ("batch4k-bf16", 2): {"peak": 0.85},
    ("mha8k-bf16", 2): {"peak": 0.85},
    ("four16k-bf16", 2): {"peak": 0.75},
    ("tiny-decode", 2): {"torch": 2.5},
}
# The share of the AVX2 peak at NUMATTN_ISA=avx2, one thread.
AVX2_BARS = {"bert512": 0.75, "enc4k": 0.78, "enc4k128": 0.84}

# What an option costs: a name, the target, two cases whose times are divided, and the level to
# measure, if it is not the best one.
OPTION_COSTS: list[tuple] = [
    (
        "mask that is causal / is_causal",
        "<= 1.2",
        Case("", *_2K, mask="causal"),
        Case("", *_2K, is_causal=True),
    ),
    ("no mask / 8 documents", ">= 5", Case("", *_2K), Case("", *_2K, mask="documents")),
    ("random mask / no mask", "<= 1.35", Case("", *_2K, mask="random"), Case("", *_2K)),
    ("dense bias / no bias", "<= 1.5", Case("", *_2K, bias=True), Case("", *_2K)),
    (
        "bfloat16 / float32 at avx512",
        "<= 1.17",
        Case("", *_2K, dtype="bfloat16"),
        Case("", *_2K),
        "avx512",
    ),
    (
        "bfloat16 / float32 at avx2",
        "<= 1.17",
        Case("", *_2K, dtype="bfloat16"),
        Case("", *_2K),
        "avx2",
    ),
    (
        "window of 256 at 16384 / at 4096",
        "<= 4.4",
        Case("", 1, 8, 8, 16384, 16384, 64, is_causal=True, left_window=255),
        Case("", 1, 8, 8, 4096, 4096, 64, is_causal=True, left_window=255),
    ),
]

# ---- is NumPy faster anywhere? -----------------------------------------------------------------

_SHAPES = {
    "one query": [
        *[(1, 8, 8, 1, 1 << n, d) for n in range(9, 17) for d in (64, 128)],
        (1, 32, 32, 1, 512, 128),
    ],
    "small heads": [
        *[(256, 16, 16, *lengths, 64) for lengths in itertools.product((8, 12, 16), repeat=2)],
        (5000, 12, 12, 1, 1, 64),
        (1, 32, 32, 16, 16, 256),
    ],
    "other lengths": [
        (1, 8, 8, *lengths, 64)
        for lengths in ((2, 4096), (4, 512), (8, 8192), (16, 1024), (64, 4096), (128, 512),
                        (512, 128), (1024, 16), (2048, 64))
    ],
    "grouped": [
        (1, 32, 8, 1, 512, 128),
        (1, 32, 8, 1, 8192, 128),
        (1, 8, 1, 128, 128, 64),
        (1, 32, 8, 512, 512, 128),
        (64, 32, 8, 1, 128, 128),
        (256, 16, 4, 8, 8, 64),
    ],
}  # fmt: skip
# Shapes with at least two batch items, on which each of `_options` is measured.
_OPTION_SHAPES = [
    (2, 8, 8, 1, 2048, 64),
    (2, 8, 8, 16, 256, 64),
    (2, 8, 8, 128, 128, 64),
    (2, 8, 8, 512, 512, 64),
    (2, 32, 8, 64, 1024, 128),
    (512, 16, 16, 8, 8, 64),
]


def _options(shape: tuple[int, ...]) -> dict[str, dict[str, Any]]:
    batch, keys = shape[0], shape[4]
    return {
        "causal": {"is_causal": True},
        "window": {"is_causal": True, "left_window": keys // 8},
        "mask": {"mask": "random"},
        "bias": {"bias": True},
        "softcap": {"softcap": 20.0},
        "alibi": {"is_causal": True, "alibi": True},
        "kv_lengths": {"kv_lengths": [keys, keys * 3 // 4] * (batch // 2)},
        "sinks": {"sinks": True},
        "transposed": {"transposed_keys": True},
        "blhd": {"layout": "blhd"},
    }


def grid() -> list[Case]:
    """Make the cases of `make bench-grid`."""
    lengths = [1 << n for n in range(12)]
    square = itertools.product(lengths, [8, 16, 32, 64, 128, 256], [1, 2, 4, 8, 32])
    return [
        *[Case(f"L={n} D={d} H={h}", 1, h, h, n, n, d) for n, d, h in square],
        *[Case(f"{kind} {s}", *s) for kind, shapes in _SHAPES.items() for s in shapes],
        *[Case(f"{x} {s}", *s, **more) for s in _OPTION_SHAPES for x, more in _options(s).items()],
    ]
