"""A small table of numattn against plain NumPy."""

from __future__ import annotations

import sys
import time
from statistics import median

import numattn as na
import numpy as np

# name, heads, queries, keys, head_dim, causal
SHAPES = [
    ("one small head", 1, 16, 16, 64, False),
    ("sentence encoder", 12, 128, 128, 32, False),
    ("BERT, 512 tokens", 12, 512, 512, 64, False),
    ("GPT, 1024 tokens", 12, 1024, 1024, 64, True),
    ("protein, 1500 residues", 20, 1500, 1500, 64, False),
    ("one query, 4096 keys", 12, 1, 4096, 64, True),
    ("4096 tokens", 8, 4096, 4096, 64, False),
]


def plain(q, k, v, is_causal):
    s = q @ k.swapaxes(-1, -2)
    s *= np.float32(1 / np.sqrt(q.shape[-1]))
    if is_causal:
        last = np.arange(q.shape[-2])[:, np.newaxis] + k.shape[-2] - q.shape[-2]
        np.copyto(s, -np.inf, where=np.arange(k.shape[-2]) > last)
    s -= s.max(axis=-1, keepdims=True)
    np.exp(s, out=s)
    s /= s.sum(axis=-1, keepdims=True)
    return s @ v


def seconds(call):
    call()
    begin = time.perf_counter()
    call()
    calls = max(1, int(0.05 / (time.perf_counter() - begin)))
    begin = time.perf_counter()
    for _ in range(calls):
        call()
    return (time.perf_counter() - begin) / calls


def progress(text: str) -> None:
    if sys.stderr.isatty():
        sys.stderr.write(f"\r\033[K{text}")
        sys.stderr.flush()


def main() -> None:
    rng = np.random.default_rng(0)
    print(f"{'':24}{'times as fast':>14}{'largest difference':>20}")
    for name, heads, queries, keys, d, is_causal in SHAPES:
        q = rng.standard_normal((heads, queries, d), dtype=np.float32)
        k, v = rng.standard_normal((2, heads, keys, d), dtype=np.float32)
        difference = np.abs(
            na.attention(q, k, v, is_causal=is_causal) - plain(q, k, v, is_causal)
        ).max()
        ratios = []
        for n in range(5):
            progress(f"{name}: round {n + 1} of 5")
            ours = seconds(lambda: na.attention(q, k, v, is_causal=is_causal))  # noqa: B023
            ratios.append(seconds(lambda: plain(q, k, v, is_causal)) / ours)  # noqa: B023
        progress("")
        print(f"{name:24}{median(ratios):13.1f}x{difference:20.1e}", flush=True)


if __name__ == "__main__":
    main()
