"""numattn's ONNX operators against the reference evaluator's own: `make bench-onnx`.

Both compute the same graph of one node on one thread, and take turns. A figure is the median of
the rounds' ratios. It counts the whole call of the evaluator.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING

os.environ["OPENBLAS_NUM_THREADS"] = "1"  # read when NumPy is imported

import ml_dtypes
import numattn as na
import numattn.onnx
import numpy as np
from numattn._blas import restart_at_full_speed
from numattn._terminal import progress
from onnx.reference import ReferenceEvaluator
from rounds import describe_machine

sys.path.append(str(Path(__file__).parents[1] / "tests"))
from onnx_graphs import one_node

if TYPE_CHECKING:
    from collections.abc import Iterator


def graphs() -> Iterator[tuple[str, tuple]]:
    """Yield the description of a graph, its model and its inputs."""
    rng = np.random.default_rng(0)

    def normal(*shape: int) -> np.ndarray:
        return rng.standard_normal(shape, dtype=np.float32)

    def attention(*inputs: np.ndarray | None, **attributes: int) -> tuple:
        outputs = 3 if len(inputs) == 6 and inputs[4] is not None else 1
        return one_node("Attention", inputs, outputs, attributes=attributes)

    def heads_of(heads: int, tokens: int, dim: int) -> list[np.ndarray]:
        return [normal(1, heads, tokens, dim) for _ in range(3)]

    yield "Attention, 12 heads of 128 tokens by 64", attention(*heads_of(12, 128, 64))
    x = heads_of(12, 512, 64)
    yield "12 heads of 512 tokens by 64", attention(*x)
    flat = [normal(1, 512, 12 * 64) for _ in range(3)]
    mask = rng.random((512, 512)) < 0.5
    yield (
        "the same, 3-D, with a bool mask",
        attention(*flat, mask, q_num_heads=12, kv_num_heads=12),
    )
    yield "12 heads of 1024 tokens by 64, causal", attention(*heads_of(12, 1024, 64), is_causal=1)
    grouped = normal(1, 32, 512, 128), normal(1, 8, 512, 128), normal(1, 8, 512, 128)
    yield "32 heads, 8 KV heads of 512 tokens by 128, causal", attention(*grouped, is_causal=1)
    token = normal(1, 32, 1, 128), normal(1, 8, 1, 128), normal(1, 8, 1, 128)
    past = normal(1, 8, 2047, 128), normal(1, 8, 2047, 128)
    yield "one token after 2047 others, past_key", attention(*token, None, *past)
    cache = normal(1, 8, 2048, 128), normal(1, 8, 2048, 128)
    valid = np.array([2048])
    yield (
        "the same with nonpad_kv_seqlen",
        attention(token[0], *cache, None, None, None, valid),
    )
    for dtype in (ml_dtypes.bfloat16, np.float16):
        narrow = [one.astype(dtype) for one in x]
        yield f"12 heads of 512 tokens by 64, {narrow[0].dtype}", attention(*narrow)
    rotated = normal(1, 32, 512, 128), normal(512, 64), normal(512, 64)
    positions = np.arange(512)[np.newaxis]
    yield (
        "RotaryEmbedding, 32 heads of 512 tokens by 128",
        one_node("RotaryEmbedding", [*rotated, positions]),
    )


def seconds(evaluator: ReferenceEvaluator, feeds: dict) -> float:
    begin = time.perf_counter()
    evaluator.run(None, feeds)
    return time.perf_counter() - begin


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=7)
    arguments = parser.parse_args()
    restart_at_full_speed()
    na.set_num_threads(1)
    print(describe_machine(["onnx"]))
    print("graph of one node, how many times as fast as the evaluator's own operator, one thread")
    for name, (model, feeds) in graphs():
        ours = ReferenceEvaluator(model, new_ops=numattn.onnx.OPS)
        theirs = ReferenceEvaluator(model)
        for evaluator in (ours, theirs):
            evaluator.run(None, feeds)
        ratios = []
        for n in range(arguments.rounds):
            progress(f"{name}: round {n + 1} of {arguments.rounds}")
            ratios.append(seconds(theirs, feeds) / seconds(ours, feeds))
        progress("")
        print(f"{name:52}{median(ratios):8.1f}", flush=True)


if __name__ == "__main__":
    main()
