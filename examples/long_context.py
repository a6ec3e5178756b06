"""Attend over a causal sequence that no process holds in full: `python examples/long_context.py`.

A local dask cluster attends to 262,144 tokens (8 heads, head_dim 64) in chunks. The arrays are made
chunk by chunk, and the result of each chunk goes to its own file. No worker uses more memory than
`--memory`; dask moves the rest to the disk. Then the program compares a few rows with attention in
one process.

To use several machines:

1. Start `dask scheduler` on one of them.
2. Start `dask worker tcp://HOST:8786 --nworkers -1 --nthreads 1` on all of them.
3. Pass `--scheduler tcp://HOST:8786 --folder FOLDER`. All of them must see the folder.
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
    """Return an array (heads, tokens, head_dim) whose chunks the tasks that use them make."""
    generator = da.random.default_rng(seed)
    shape, chunks = (HEADS, tokens, HEAD_DIM), (HEADS, chunk, HEAD_DIM)
    return generator.standard_normal(shape, dtype=np.float32, chunks=chunks)


def write(block: np.ndarray, folder: str, block_id: tuple[int, ...]) -> np.ndarray:
    """Write a chunk of the result to its file, and send only one bool to the program."""
    np.save(Path(folder) / f"{block_id[1]}.npy", block)
    return np.ones((1, 1, 1), np.bool_)


def compare(folder: str, q: da.Array, k: da.Array, v: da.Array, rows: int) -> float:
    """Return the largest difference of a few rows of one head from attention in this process."""
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
    parser.add_argument("--tokens", type=int, default=262_144, help="length of the sequence")
    parser.add_argument("--chunk", type=int, default=8192, help="tokens per chunk")
    parser.add_argument(
        "--workers", type=int, default=na.get_num_threads(), help="processes of the local cluster"
    )
    parser.add_argument("--memory", default="1GiB", help="memory limit of each worker")
    parser.add_argument("--scheduler", help="address of a running cluster")
    parser.add_argument("--folder", help="keep the results here; all workers must see it")
    parser.add_argument("--rows", type=int, default=8, help="how many rows to compare")
    arguments = parser.parse_args()
    if min(arguments.tokens, arguments.chunk, arguments.workers) < 1:
        parser.error("--tokens, --chunk, --workers: expected positive values")
    if arguments.folder and not Path(arguments.folder).is_dir():
        parser.error(f"--folder: got {arguments.folder}, expected an existing folder")

    q, k, v = (random_array(n, arguments.tokens, arguments.chunk) for n in range(3))
    out = numattn.dask.attention(q, k, v, is_causal=True)
    print(
        f"Causal attention over {arguments.tokens:,} tokens in {out.npartitions} chunks: "
        f"{len(out.dask):,} tasks for dask."
    )
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
        files.compute()  # raises the error of a worker, if there is one
        seconds = time.perf_counter() - begin
        speed = operations(arguments.tokens) / seconds / 1e9
        print(f"\nIt took {seconds:.1f} s: {speed:.0f} GFLOP/s.")
        difference = compare(folder, q, k, v, arguments.rows)
    print(f"Rows computed in one process differ by at most {difference:.1e}.")
    if difference > 1e-5:
        raise SystemExit("That is more than rounding in float32 explains: please report a bug.")


def operations(tokens: int) -> float:
    """Return the floating-point operations of causal attention; a multiply-add counts as two."""
    return HEADS * 4 * HEAD_DIM * tokens * (tokens + 1) / 2


if __name__ == "__main__":
    main()
