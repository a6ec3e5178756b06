"""Layers and stages against their peers: `make bench-layers`.

Each library runs in a process of its own and they take turns; medians of the rounds' ratios.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from statistics import median

import numpy as np

ROUNDS = 11
TURN_SECONDS = 0.1  # at least one call
# name, batch, tokens, embed_dim, heads, causal, what is aimed at
LAYERS = [
    ("layer of 8 x 512 tokens", 8, 512, 768, 12, False, 2.0),
    ("layer of 2048 tokens, causal", 1, 2048, 1024, 16, True, 3.0),
]


def normal(*shape):
    return np.random.default_rng(0).standard_normal(shape, dtype=np.float32)


def layer(peer, batch, tokens, embed_dim, heads, is_causal):
    x = normal(batch, tokens, embed_dim)
    if peer == "numattn":
        import numattn as na

        module = na.MultiHeadAttention(embed_dim, heads, rng=0)
        return lambda: module(x, is_causal=is_causal)
    import torch

    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    module = torch.nn.MultiheadAttention(embed_dim, heads, batch_first=True).eval()
    y = torch.from_numpy(x)
    mask = torch.nn.Transformer.generate_square_subsequent_mask(tokens) if is_causal else None

    def call():
        with torch.inference_mode():
            module(y, y, y, need_weights=False, attn_mask=mask, is_causal=is_causal)

    return call


def softmax(peer):
    x = normal(12, 1024, 1024)
    if peer == "numattn":
        import numattn as na

        return lambda: na.masked_softmax(x)
    import scipy.special

    return lambda: scipy.special.softmax(x, axis=-1)


def weights(peer):
    q, k = normal(2, 12, 1024, 64)
    if peer == "numattn":
        import numattn as na

        return lambda: na.attention_weights(q, k)

    def plain():
        s = q @ k.swapaxes(-1, -2)
        s *= np.float32(1 / 8)
        s -= s.max(axis=-1, keepdims=True)
        np.exp(s, out=s)
        s /= s.sum(axis=-1, keepdims=True)

    return plain


CASES = {
    **{name: (layer, arguments, "torch", bar) for name, *arguments, bar in LAYERS},
    "masked_softmax, 12 x 1024 x 1024": (softmax, [], "scipy", 3.0),
    "attention_weights, 12 heads of 1024": (weights, [], "numpy", 3.0),
}


def work(name, peer):
    """Time calls on request: one line with their number comes, one with the seconds goes."""
    make, arguments, _, _ = CASES[name]
    call = make(peer, *arguments)
    call()
    answers, sys.stdout = sys.stdout, sys.stderr
    for line in sys.stdin:
        begin = time.perf_counter()
        for _ in range(int(line)):
            call()
        answers.write(f"{(time.perf_counter() - begin) / int(line)}\n")
        answers.flush()


def start(name, peer, threads):
    from rounds import environment  # here: a peer's process does not import numattn

    return subprocess.Popen(
        [sys.executable, Path(__file__), "--work", json.dumps([name, peer])],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment(threads),
    )  # fmt: skip


def ask(worker, calls):
    worker.stdin.write(f"{calls}\n")
    worker.stdin.flush()
    return float(worker.stdout.readline())


def rotary(threads):
    """Return bytes read and written a second over the bandwidth of reading."""
    import numattn as na
    from worker import measure_bandwidth

    na.set_num_threads(threads)
    x = normal(1, 32, 4096, 128)
    out = np.empty_like(x)
    na.rotary_embedding(x, out=out)
    shares = []
    for _ in range(ROUNDS):
        bandwidth = measure_bandwidth(threads, 0.05)
        begin = time.perf_counter()
        for _ in range(5):
            na.rotary_embedding(x, out=out)
        shares.append(2 * x.nbytes * 5 / (time.perf_counter() - begin) / bandwidth)
    return median(shares)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--work", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.work:
        work(*json.loads(arguments.work))
        return
    from numattn._blas import restart_at_full_speed
    from rounds import numpy_blas

    restart_at_full_speed()
    print(f"NumPy: {numpy_blas(arguments.threads)}")
    for name, (_, _, peer, bar) in CASES.items():
        workers = [start(name, p, arguments.threads) for p in (peer, "numattn")]
        calls = [max(1, int(TURN_SECONDS / ask(w, 1))) for w in workers]
        ratios = []
        for _ in range(ROUNDS):
            theirs, ours = (ask(w, n) for w, n in zip(workers, calls, strict=True))
            ratios.append(theirs / ours)
        for worker in workers:
            worker.stdin.close()
            worker.wait()
        print(f"{name:40}{median(ratios):6.2f}x {peer}   (>= {bar})", flush=True)
    share = rotary(arguments.threads)
    print(f"{'rotary_embedding, 32 x 4096 x 128':40}{share:6.2f} of the bandwidth   (>= 0.5)")


if __name__ == "__main__":
    main()
