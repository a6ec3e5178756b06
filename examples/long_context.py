"""A causal sequence that no process holds as a whole: `python examples/long_context.py`.

A local cluster of dask attends to 262,144 tokens (8 heads of 64) in chunks: the arrays are made
chunk by chunk, the result goes to a file for each chunk, and no worker may use more memory than
`--memory` says (what is too much waits on the disk). Then some rows are compared with attention on
one machine.

On more machines: start `dask scheduler` on one of them and `dask worker tcp://HOST:8786 --nworkers
-1 --nthreads 1` on all, and pass `--scheduler tcp://HOST:8786 --folder FOLDER`, a folder that all
of them see.
"""

from __future__ import annotations

import argparse
import contextlib
import tempfile
import time
from pathlib import Path

import dask.array as da
import numattn as na
import numattn.dask
import numpy as np
from distributed import Client, LocalCluster, progress

HEADS, HEAD_DIM = 8, 64


def random_array(seed: int, tokens: int, chunk: int) -> da.Array:
    """Return an array (heads, tokens, head_dim) whose chunks are made where they are needed."""
    generator = da.random.default_rng(seed)
    shape, chunks = (HEADS, tokens, HEAD_DIM), (HEADS, chunk, HEAD_DIM)
    return generator.standard_normal(shape, dtype=np.float32, chunks=chunks)


def write(block: np.ndarray, folder: str, block_id: tuple[int, ...]) -> np.ndarray:
    """Write a chunk of the result to its file; what is left to send is one bool."""
    np.save(Path(folder) / f"{block_id[1]}.npy", block)
    return np.ones((1, 1, 1), np.bool_)


def compare(folder: str, q: da.Array, k: da.Array, v: da.Array, rows: int) -> float:
    """Return by how much rows of one head differ from attention on one machine at most."""
    rng = np.random.default_rng(0)
    tokens, chunk = q.shape[1], q.chunks[1][0]
    head = int(rng.integers(HEADS))
    # One head of k and v is small enough for this process: 64 MiB each for 262,144 tokens.
    one_k, one_v = (
        np.concatenate([x.blocks[0, n][head].compute() for n in range(x.numblocks[1])])
        for x in (k, v)
    )
    differences = []
    for row in sorted({0, tokens - 1, *rng.integers(tokens, size=rows).tolist()}):
        query = q[head, row : row + 1].compute()
        result = np.load(Path(folder) / f"{row // chunk}.npy", mmap_mode="r")[head, row % chunk]
        expected = na.attention(query, one_k, one_v, is_causal=True, q_offset=row)
        differences.append(np.abs(result - expected).max())
    return float(max(differences))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=262_144)
    parser.add_argument("--chunk", type=int, default=8192, help="tokens of a chunk")
    parser.add_argument("--workers", type=int, default=na.get_num_threads())
    parser.add_argument("--memory", default="1GiB", help="what a worker may use")
    parser.add_argument("--scheduler", help="the address of a cluster that runs already")
    parser.add_argument("--folder", help="where results are kept, seen by all workers")
    parser.add_argument("--rows", type=int, default=8, help="how many are compared")
    arguments = parser.parse_args()
    if min(arguments.tokens, arguments.chunk, arguments.workers) < 1:
        parser.error("--tokens, --chunk and --workers: expected positive numbers")
    if arguments.folder and not Path(arguments.folder).is_dir():
        parser.error(f"--folder {arguments.folder}: expected a folder that exists")

    q, k, v = (random_array(n, arguments.tokens, arguments.chunk) for n in range(3))
    out = numattn.dask.attention(q, k, v, is_causal=True)
    print(f"{arguments.tokens:,} tokens in {out.npartitions} chunks: {len(out.dask):,} tasks")
    with contextlib.ExitStack() as stack:
        scratch = stack.enter_context(tempfile.TemporaryDirectory(prefix="long-context-"))
        folder = arguments.folder or scratch
        cluster = arguments.scheduler or stack.enter_context(
            LocalCluster(
                n_workers=arguments.workers, threads_per_worker=1, memory_limit=arguments.memory,
                local_directory=scratch, dashboard_address=None,
            )
        )  # fmt: skip
        stack.enter_context(Client(cluster))
        begin = time.perf_counter()
        meta = np.empty((0, 0, 0), np.bool_)
        files = out.map_blocks(write, folder=folder, chunks=(1, 1, 1), meta=meta).persist()
        progress(files)
        files.compute()  # which raises what a worker did
        seconds = time.perf_counter() - begin
        print(f"\n{seconds:.1f} s, {operations(arguments.tokens) / seconds / 1e9:.0f} GF/s")
        difference = compare(folder, q, k, v, arguments.rows)
    print(f"Rows of one machine differ by at most {difference:.1e}.")
    if difference > 1e-5:
        raise SystemExit("That is more than the rounding of float32.")


def operations(tokens: int) -> float:
    """Return the floating-point operations of causal attention: a product and a sum each."""
    return HEADS * 4 * HEAD_DIM * tokens * (tokens + 1) / 2


if __name__ == "__main__":
    main()
