"""Measure caches in 8 bits and in pages, ragged and uneven batches: `make bench-sequences`.

Calls take turns in one process, and each figure is the median of the rounds' ratios. A "share of
reading" compares a call with only reading the same arrays, on as many threads, in the same round.
"""

from __future__ import annotations

import argparse
import time
from concurrent.futures import ThreadPoolExecutor
from statistics import median

import ml_dtypes
import numattn as na
import numpy as np
from numattn import _core
from worker import measure_peak

ROUNDS = 11
TURN_SECONDS = 0.03  # at least one call

rng = np.random.default_rng(0)


def normal(*shape, dtype=np.float32):
    return rng.standard_normal(shape, dtype=np.float32).astype(dtype)


def seconds(call):
    begin = time.perf_counter()
    call()
    calls = max(1, int(TURN_SECONDS / (time.perf_counter() - begin)))
    begin = time.perf_counter()
    for _ in range(calls):
        call()
    return (time.perf_counter() - begin) / calls


def ratio(slow, fast):
    """Return how many times as fast the second call is."""
    slow()
    fast()
    return median(seconds(slow) / seconds(fast) for _ in range(ROUNDS))


def bytes_of(array):
    """Return an array's memory as float32, except for its last few bytes."""
    raw = array.reshape(-1).view(np.uint8)
    return raw[: raw.size // 256 * 256].view(np.float32)


def reading(arrays, threads):
    """Return a call that reads all arrays once, with a part of each array for each thread."""
    parts = [np.array_split(bytes_of(x).reshape(-1, 64), threads) for x in arrays]
    pool = ThreadPoolExecutor(threads)

    def read(i):
        for part in parts:
            _core.read_floats(part[i].reshape(-1))

    return lambda: list(pool.map(read, range(threads)))


# Targets, on two threads of a CPU with AVX-512.
SHARES_OF_READING = {
    "float32": 0.85,
    "float16": 0.82,
    "bfloat16": 0.85,
    "bfloat16, batch of 8, 4096 keys": 0.82,
    "bfloat16, 32 KV heads, 8192 keys": 0.82,
    "bfloat16, four queries, 16384 keys": 0.75,
}


def caches():
    """Return calls of few queries over several kinds of cache, and the arrays that they read."""

    def of(batch, kv_heads, queries, keys):
        shapes = (batch, 32, queries, 128), *[(batch, kv_heads, keys, 128)] * 2
        arrays = [normal(*shape).astype(ml_dtypes.bfloat16) for shape in shapes]
        return lambda: na.attention(*arrays, is_causal=True), arrays[1:]

    shapes = (1, 32, 1, 128), (1, 8, 32768, 128), (1, 8, 32768, 128)
    q32, k32, v32 = (normal(*shape) for shape in shapes)
    q, k, v = (x.astype(ml_dtypes.bfloat16) for x in (q32, k32, v32))
    q16, k16, v16 = (x.astype(np.float16) for x in (q32, k32, v32))
    (k8, k_scale), (v8, v_scale) = na.quantize_kv(k), na.quantize_kv(v)
    k_pages, v_pages = (
        np.ascontiguousarray(x[0].swapaxes(0, 1)).reshape(2048, 16, 8, 128) for x in (k, v)
    )
    table, lengths = np.arange(2048)[np.newaxis], [32768]
    return {
        "float32": (lambda: na.attention(q32, k32, v32), [k32, v32]),
        "float16": (lambda: na.attention(q16, k16, v16), [k16, v16]),
        "bfloat16": (lambda: na.attention(q, k, v), [k, v]),
        "int8": (
            lambda: na.attention(q, k8, v8, k_scale=k_scale, v_scale=v_scale),
            [k8, v8, k_scale, v_scale],
        ),
        "pages of 16": (
            lambda: na.attention_paged(q, k_pages, v_pages, table, lengths),
            [k_pages, v_pages],
        ),
        "bfloat16, batch of 8, 4096 keys": of(8, 8, 1, 4096),
        "bfloat16, 32 KV heads, 8192 keys": of(1, 32, 1, 8192),
        "bfloat16, four queries, 16384 keys": of(1, 8, 4, 16384),
    }


def chosen_pages():
    """Yield calls of one query over all pages of a cache and over an eighth, chosen by bounds."""
    table, lengths = rng.permutation(2048)[np.newaxis], [32768]
    q = normal(1, 32, 1, 128).astype(ml_dtypes.bfloat16)
    by_head, v_by_head = (normal(2048, 8, 16, 128).astype(ml_dtypes.bfloat16) for _ in range(2))
    memory = (by_head.swapaxes(1, 2), v_by_head.swapaxes(1, 2))
    for name, pages in (
        ("head by head", memory),
        ("token by token", tuple(map(np.ascontiguousarray, memory))),
    ):
        bounds = na.PageBounds(*pages[0].shape, q.dtype)
        bounds.update(pages[0], table, lengths)
        yield (
            name,
            lambda pages=pages: na.attention_paged(q, *pages, table, lengths),
            lambda pages=pages, bounds=bounds: bounds.attend(q, *pages, table, lengths, 256),
        )


def latent():
    """Return a call of latent attention, 128 heads over 4096 tokens, and its operations."""
    q, k = normal(128, 1, 576), normal(1, 4096, 576)
    return lambda: na.attention(q, k, k[..., :512]), 2 * 128 * 4096 * (576 + 512)


def ragged():
    """Return a call over 64 causal sequences of random lengths, and its operations."""
    lengths = rng.integers(16, 2049, 64)
    starts = np.concatenate([[0], np.cumsum(lengths)])
    q, k, v = (normal(starts[-1], 12, 64) for _ in range(3))
    flops = 4 * 64 * 12 * sum(n * (n + 1) // 2 for n in lengths.tolist())
    return lambda: na.attention_varlen(q, k, v, starts, starts, is_causal=True), flops


def uneven():
    """Return a call over one long and 63 short sequences, for any number of threads."""
    lengths = np.array([32768] + [16] * 63)
    key_starts = np.concatenate([[0], np.cumsum(lengths)])
    q, k, v = normal(64, 32, 128), *(normal(key_starts[-1], 8, 128) for _ in range(2))
    return lambda num_threads=None: na.attention_varlen(
        q, k, v, np.arange(65), key_starts, is_causal=True, num_threads=num_threads
    )


def figures(threads):
    """Yield the name of each figure, its target and its value."""
    calls = {}
    for name, (call, arrays) in caches().items():
        calls[name] = call
        keys = "" if name.endswith("keys") else ", 32768 keys"
        aim = SHARES_OF_READING.get(name)
        yield f"{name}{keys}, share of reading", aim, ratio(reading(arrays, threads), call)
    yield "int8 / bfloat16, 32768 keys", 1.7, ratio(calls["bfloat16"], calls["int8"])
    yield "pages of 16 / plain, 32768 keys", 0.92, ratio(calls["bfloat16"], calls["pages of 16"])
    for name, every, chosen in chosen_pages():
        yield f"1/8 of the pages / all, {name}, 32768 keys", None, ratio(every, chosen)

    def share(call, flops):
        peak = measure_peak(threads, 0.1, "float32")
        return flops / seconds(call) / peak

    for name, aim, (call, flops) in (
        ("64 ragged sequences", 0.74, ragged()),
        ("128 heads of latent attention", 0.6, latent()),
    ):
        share(call, flops)
        yield f"{name}, share of peak", aim, median(share(call, flops) for _ in range(ROUNDS))

    attend = uneven()
    yield (
        f"one long sequence of 64, {threads} threads / one", 1.8,
        ratio(lambda: attend(1), lambda: attend(threads)),
    )  # fmt: skip
    large = [np.ones(1 << 26, np.float32)]
    yield (
        f"  only reading, {threads} threads / one", None,
        ratio(reading(large, 1), reading(large, threads)),
    )  # fmt: skip


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=2)
    threads = parser.parse_args().threads
    from numattn._blas import describe, restart_at_full_speed  # here: older builds do not have them

    restart_at_full_speed()
    na.set_num_threads(threads)
    print(f"NumPy: {describe()}")
    for name, bar, value in figures(threads):
        aim = "" if bar is None else f"   (>= {bar})"
        print(f"{name:52}{value:6.2f}{aim}", flush=True)


if __name__ == "__main__":
    main()
