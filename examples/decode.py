"""Time the attention of a model that generates text: `python examples/decode.py`.

The model has the shape of a small Llama: 32 query heads, 8 KV heads and a head_dim of 128. Its
queries, keys and values are random. The program times only the attention, with numattn and in plain
NumPy.
"""

from __future__ import annotations

import argparse
import sys
import time

import numattn as na
import numpy as np

QUERY_HEADS, KV_HEADS, HEAD_DIM = 32, 8, 128


def plain_attention(q: np.ndarray, k: np.ndarray, v: np.ndarray) -> np.ndarray:
    """Attend with one query per head in NumPy: heads that share keys are rows of one matrix."""
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
    parser.add_argument("--layers", type=int, default=4, help="layers of the model")
    parser.add_argument("--prompt", type=int, default=4096, help="tokens in the cache at the start")
    parser.add_argument("--tokens", type=int, default=32, help="tokens to generate")
    parser.add_argument("--quantize", action="store_true", help="keep keys and values in 8 bits")
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
    print(
        f"Attention of {arguments.layers} layers for {arguments.tokens} new tokens, after a prompt "
        f"of {arguments.prompt} tokens; the caches take {size >> 20} MiB."
    )
    print(f"numattn  {arguments.tokens / ours:8.1f} tokens/s, appending included")
    if not arguments.quantize:
        print(f"NumPy    {arguments.tokens / theirs:8.1f} tokens/s")
        print(f"Their results differ by at most {largest_difference:.1e}.")


if __name__ == "__main__":
    main()
