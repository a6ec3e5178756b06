"""Measure what block masks cost and save: `make bench-block-masks`.

Calls take turns in one process, and each figure is the median of the rounds' ratios.
"""

from __future__ import annotations

import argparse
import time
import tracemalloc

import numattn as na
import numpy as np
from sequences import normal, ratio

TOKENS, HEAD_DIM = 16384, 64


def show(name, found, most):
    print(f"{name:44} {found:.3f} (<= {most:.3f}: {'met' if found <= most else 'missed'})")


def densities(q, k, v):
    """Compare random whole blocks with attention to all keys."""
    full = lambda: na.attention(q, k, v)  # noqa: E731
    rng = np.random.default_rng(1)
    for density in (0.05, 0.2, 0.5):
        keep = rng.random((TOKENS // 64, TOKENS // 64)) < density
        mask = na.BlockMask.from_blocks(keep, TOKENS, TOKENS, (64, 64))
        share = 1 / ratio(full, lambda mask=mask: na.attention(q, k, v, mask=mask))
        show(f"blocks of density {density} against all keys", share, 1.15 * keep.mean() + 0.02)


def structures(q, k, v):
    """Compare masks with the options that mean the same."""
    window = na.BlockMask.window(TOKENS, TOKENS, 1023, 0)
    cost = 1 / ratio(
        lambda: na.attention(q, k, v, window=(1023, 0)), lambda: na.attention(q, k, v, mask=window)
    )
    show("a window of 1024 against window=", cost, 1.1)
    causal = na.BlockMask.causal(TOKENS, TOKENS)
    cost = 1 / ratio(
        lambda: na.attention(q, k, v, is_causal=True), lambda: na.attention(q, k, v, mask=causal)
    )
    show("causal against is_causal=", cost, 1.08)


def documents(q, k, v):
    """Compare packed sequences with ragged ones."""
    lengths = np.full(64, TOKENS // 64)
    starts = np.concatenate([[0], np.cumsum(lengths)])
    mask = na.BlockMask.documents(lengths)
    cost = 1 / ratio(
        lambda: na.attention_varlen(q, k, v, starts, starts),
        lambda: na.attention(q, k, v, mask=mask, layout="blhd"),
    )
    show("64 documents of 256 against attention_varlen", cost, 1.15)


def making(tokens=65536):
    """Measure making a causal mask of documents from a function."""
    of_token = np.repeat(np.arange(tokens // 1024), 1024)

    def causal_within_documents(batch, head, q, k):
        return (k <= q) & (of_token[q] == of_token[k])

    begin = time.perf_counter()
    na.BlockMask.from_mask_mod(causal_within_documents, tokens, tokens)
    show(f"from_mask_mod, {tokens} tokens, in seconds", time.perf_counter() - begin, 3)
    tracemalloc.start()
    na.BlockMask.from_mask_mod(causal_within_documents, tokens, tokens)
    show("  memory for it in MiB", tracemalloc.get_traced_memory()[1] / 2**20, 64)
    tracemalloc.stop()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--heads", type=int, default=4)
    arguments = parser.parse_args()
    na.set_num_threads(arguments.threads)
    info = na.runtime_info()
    print(f"{info['cpu']}, level {info['isa']['chosen']}, {arguments.threads} threads")
    arrays = [normal(arguments.heads, TOKENS, HEAD_DIM) for _ in range(3)]
    densities(*arrays)
    structures(*arrays)
    documents(*(np.ascontiguousarray(x.swapaxes(0, 1)) for x in arrays))
    making()


if __name__ == "__main__":
    main()
