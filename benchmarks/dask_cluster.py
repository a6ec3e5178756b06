"""Compare attention on a local dask cluster with one process: `make bench-dask`.

The cluster has as many processes, with one thread each, as the single process has threads. The two
take turns in rounds, and each figure is the median of the rounds' ratios. The arrays are in the
workers' memory before the call, and the result stays there. The program also prints how many tasks
a sequence of a million tokens has, and how long it takes to make them.
"""

from __future__ import annotations

import argparse
import time
from statistics import median

import dask
import dask.array as da
import numattn as na
import numattn.dask
import numpy as np
from distributed import Client, LocalCluster, wait
from numattn._terminal import progress
from rounds import ATTEMPTS, REST_SECONDS, Worker, describe_machine

HEADS, HEAD_DIM = 8, 64
SPEED_BAR, TASKS_BAR, BUILD_BAR = 0.85, 10_000, 3.0


def sequence(seed: int, tokens: int, chunk: int) -> da.Array:
    shape, chunks = (HEADS, tokens, HEAD_DIM), (HEADS, chunk, HEAD_DIM)
    return da.random.default_rng(seed).standard_normal(shape, dtype=np.float32, chunks=chunks)


def seconds(call) -> float:
    begin = time.perf_counter()
    call()
    return time.perf_counter() - begin


def measure_cluster(tokens: int, chunk: int, threads: int, rounds: int) -> None:
    peak = Worker("numattn", threads, None)
    with (
        LocalCluster(
            n_workers=threads, threads_per_worker=1, memory_limit=0, dashboard_address=None
        ) as cluster,
        Client(cluster) as client,
    ):
        spread = client.persist([sequence(n, tokens, chunk) for n in range(3)])
        wait(spread)
        whole = client.gather(client.compute(spread))

        def on_cluster() -> None:
            wait(client.persist(numattn.dask.attention(*spread, is_causal=True)))

        def in_process() -> None:
            na.attention(*whole, is_causal=True, num_threads=threads)

        in_process()
        on_cluster()
        every, undisturbed = [], []
        before = peak.has_all_threads()
        for n in range(ATTEMPTS * rounds):
            progress(f"{tokens} tokens: round {n + 1}")
            turns = {}
            for call in (in_process, on_cluster) if n % 2 == 0 else (on_cluster, in_process):
                time.sleep(REST_SECONDS)
                turns[call] = seconds(call)
            every.append(turns)
            after = peak.has_all_threads()
            if before and after:
                undisturbed.append(turns)
            before = after
            if len(undisturbed) == rounds:
                break
    peak.close()
    counted = undisturbed or every
    ratio = median(turns[in_process] / turns[on_cluster] for turns in counted)
    print(
        f"causal, {tokens} tokens, chunks of {chunk}: {threads} processes with one thread reach "
        f"{ratio:.2f} of the speed of one process with {threads} threads "
        f"(>= {SPEED_BAR}: {'met' if ratio >= SPEED_BAR else 'missed'}); the single process takes "
        f"{median(turns[in_process] for turns in counted):.2f} s; "
        f"{len(undisturbed)} of {len(every)} rounds were undisturbed"
    )


def measure_graph(tokens: int, chunk: int) -> None:
    x = da.zeros((HEADS, tokens, HEAD_DIM), chunks=(HEADS, chunk, HEAD_DIM), dtype=np.float32)
    took, tasks = [], 0
    for _ in range(5):
        begin = time.perf_counter()
        out = numattn.dask.attention(x, x, x, is_causal=True)
        tasks = len(dask.optimize(out)[0].dask)
        took.append(time.perf_counter() - begin)
    is_met = tasks <= TASKS_BAR and median(took) <= BUILD_BAR
    print(
        f"causal, {tokens} tokens, chunks of {chunk}: {tasks} tasks, made in {median(took):.2f} s "
        f"(<= {TASKS_BAR} in {BUILD_BAR} s: {'met' if is_met else 'missed'})"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=65_536)
    parser.add_argument("--chunk", type=int, default=4096)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=7)
    arguments = parser.parse_args()
    print(describe_machine(["dask", "distributed"]))
    measure_graph(2**20, 2**14)
    measure_cluster(arguments.tokens, arguments.chunk, arguments.threads, arguments.rounds)


if __name__ == "__main__":
    main()
