"""Time the attention of a model that generates text: `python examples/decode.py`.

The model is shaped like a small Llama (32 query heads, 8 heads of keys and values, 128 elements)
with random numbers for weights; only its attention is timed, against plain NumPy.
"""

from __future__ import annotations

import argparse
import sys
import time

import numattn as na
import numpy as np

QUERY_HEADS, KV_HEADS, HEAD_DIM = 32, 8, 128


def plain_attention(q: np.ndarray, k: np.ndarray, v: np.ndarray) -> np.ndarray:
    """One query of each head in NumPy: heads that share keys are rows of one matrix."""
    rows = q.reshape(KV_HEADS, QUERY_HEADS // KV_HEADS, HEAD_DIM)
    s = rows @ k[0].swapaxes(-1, -2) / np.float32(np.sqrt(HEAD_DIM))
    s = np.exp(s - s.max(axis=-1, keepdims=True))
    return (s / s.sum(axis=-1, keepdims=True) @ v[0]).reshape(q.shape)


def progress(done: int, all_: int, text: str) -> None:
    if sys.stderr.isatty():
        bar = "#" * (30 * done // all_)
        sys.stderr.write(f"\r\033[K[{bar:30}] {text}" + ("\n" if done == all_ else ""))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--prompt", type=int, default=4096, help="tokens before the first new one")
    parser.add_argument("--tokens", type=int, default=32, help="tokens to generate")
    parser.add_argument("--quantize", action="store_true", help="caches of 8 bits")
    arguments = parser.parse_args()

    rng = np.random.default_rng(0)
    caches = []
    for _ in range(arguments.layers):
        room = arguments.prompt + arguments.tokens
        cache = na.KVCache(1, KV_HEADS, HEAD_DIM, quantize=arguments.quantize, capacity=room)
        prompt = rng.standard_normal((2, 1, KV_HEADS, arguments.prompt, HEAD_DIM), np.float32)
        cache.append(*prompt)
        caches.append(cache)

    ours = theirs = 0.0
    largest_difference = 0.0
    for token in range(arguments.tokens):
        for cache in caches:
            q = rng.standard_normal((1, QUERY_HEADS, 1, HEAD_DIM), np.float32)
            k, v = rng.standard_normal((2, 1, KV_HEADS, 1, HEAD_DIM), np.float32)
            begin = time.perf_counter()
            cache.append(k, v)
            out = cache.attend(q)
            ours += time.perf_counter() - begin
            if arguments.quantize:
                continue
            begin = time.perf_counter()
            expected = plain_attention(q, cache.k, cache.v)
            theirs += time.perf_counter() - begin
            largest_difference = max(largest_difference, float(np.abs(out - expected).max()))
        progress(token + 1, arguments.tokens, f"{(token + 1) / ours:.1f} tokens/s of attention")

    size = sum(cache.nbytes for cache in caches)
    print(f"{arguments.layers} layers, {arguments.prompt} tokens before, cache of {size >> 20} MiB")
    print(f"numattn  {arguments.tokens / ours:8.1f} tokens/s of attention, appending included")
    if not arguments.quantize:
        print(f"NumPy    {arguments.tokens / theirs:8.1f} tokens/s")
        print(f"largest difference {largest_difference:.1e}")


if __name__ == "__main__":
    main()
