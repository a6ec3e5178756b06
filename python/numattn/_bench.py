"""A small table of numattn against plain NumPy: `python -m numattn bench`."""

from __future__ import annotations

import time
from statistics import median
from typing import TYPE_CHECKING, Any

import numpy as np

from . import _terminal
from ._attention import attention

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray

    Array = NDArray[Any]

# name, heads, queries, keys, head_dim, causal
_SHAPES = [
    ("one small head", 1, 16, 16, 64, False),
    ("sentence encoder", 12, 128, 128, 32, False),
    ("BERT, 512 tokens", 12, 512, 512, 64, False),
    ("GPT, 1024 tokens", 12, 1024, 1024, 64, True),
    ("protein, 1500 residues", 20, 1500, 1500, 64, False),
    ("one query, 4096 keys", 12, 1, 4096, 64, True),
    ("4096 tokens", 8, 4096, 4096, 64, False),
]
_ROUNDS = 5


def bench() -> None:
    """Print the table: medians of calls that take turns."""
    rng = np.random.default_rng(0)
    print(f"{'':24}{'times as fast':>14}{'largest difference':>20}")
    for name, heads, queries, keys, d, is_causal in _SHAPES:
        q = rng.standard_normal((heads, queries, d), dtype=np.float32)
        k, v = rng.standard_normal((2, heads, keys, d), dtype=np.float32)
        ratios, difference = _compare(name, q, k, v, is_causal)
        print(f"{name:24}{median(ratios):13.1f}x{difference:20.1e}", flush=True)


def _compare(name: str, q: Array, k: Array, v: Array, is_causal: bool) -> tuple[list[float], float]:
    def fused() -> Array:
        return attention(q, k, v, is_causal=is_causal)

    def plain() -> Array:
        return _plain_attention(q, k, v, is_causal)

    ratios = []
    for n in range(_ROUNDS):
        _terminal.progress(f"{name}: round {n + 1} of {_ROUNDS}")
        ours = _seconds(fused)
        ratios.append(_seconds(plain) / ours)
    _terminal.progress("")
    return ratios, float(np.abs(fused() - plain()).max())


def _plain_attention(q: Array, k: Array, v: Array, is_causal: bool) -> Array:
    s: Array = q @ k.swapaxes(-1, -2)
    s *= np.float32(1 / np.sqrt(q.shape[-1]))
    if is_causal:
        last = np.arange(q.shape[-2])[:, np.newaxis] + k.shape[-2] - q.shape[-2]
        np.copyto(s, -np.inf, where=np.arange(k.shape[-2]) > last)
    s -= s.max(axis=-1, keepdims=True)
    np.exp(s, out=s)
    s /= s.sum(axis=-1, keepdims=True)
    out: Array = s @ v
    return out


def _seconds(call: Callable[[], Array]) -> float:
    call()
    begin = time.perf_counter()
    call()
    calls = max(1, int(0.05 / (time.perf_counter() - begin)))
    begin = time.perf_counter()
    for _ in range(calls):
        call()
    return (time.perf_counter() - begin) / calls
