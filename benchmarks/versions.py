"""Compare the speed of two builds, case by case: `python versions.py BEFORE AFTER`.

BEFORE and AFTER are the Python interpreters of two environments with different builds of numattn.
Each build has its own process, and each takes a turn in every round. A figure above 1 means that
AFTER is faster. The cases are the ones of `make bench` and `make bench-sequences`, and small calls,
which are all overhead.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import runpy
import subprocess
import sys
import time
from pathlib import Path
from statistics import median

TURN_SECONDS = 0.03  # at least one call
# Not imported: this interpreter does not need numattn, and the compared builds may be older.
BLAS = runpy.run_path(str(Path(__file__).parents[1] / "python/numattn/_blas.py"))
REST_SECONDS = 0.05  # until the threads of the other process sleep


def small_calls():
    import numattn as na
    import numpy as np

    q, k, v = np.random.default_rng(0).standard_normal((3, 1, 1, 64, 64), dtype=np.float32)
    q = q[..., :1, :]
    cache = na.KVCache(1, 1, 64)
    cache.append(k, v)
    return {
        "small: plain": lambda: na.attention(q, k, v),
        "small: window": lambda: na.attention(q, k, v, window=(8, 0)),
        "small: all options": lambda: na.attention(
            q, k, v, window=(8, 0), softcap=5.0, alibi_slopes=[0.1], sinks=[0.0], kv_lengths=60
        ),
        "small: KVCache.attend": lambda: cache.attend(q),
        "small: attention_weights": lambda: na.attention_weights(q, k),
    }


def sequence_calls():
    import sequences

    calls = {f"cache: {name}": call for name, (call, _) in sequences.caches().items()}
    return calls | {"ragged": sequences.ragged()[0], "uneven": sequences.uneven()}


def all_calls(threads):
    """Yield the name of each case, and a function that makes its call."""
    from cases import CASES
    from peers import numattn_peer

    for case in CASES:
        yield case.name, lambda case=case: next(iter(numattn_peer(case, threads).values()))
    for group in (sequence_calls, small_calls):
        made = group()
        for name, call in made.items():
            yield name, lambda call=call: call


def seconds(call, calls):
    begin = time.perf_counter()
    for _ in range(calls):
        call()
    return (time.perf_counter() - begin) / calls


def work(threads, wanted):
    """Answer each line of standard input: take one more turn, or go on to the next case."""
    print(json.dumps(BLAS["describe"]()), flush=True)
    for name, make in all_calls(threads):
        if not re.search(wanted, name):
            continue
        call = make()
        call()
        calls = max(1, int(TURN_SECONDS / seconds(call, 1)))
        print(json.dumps(name), flush=True)
        while input() == "turn":
            print(json.dumps(seconds(call, calls)), flush=True)
    print(json.dumps(None), flush=True)


class Build:
    """A process of one build."""

    def __init__(self, python, threads, wanted):
        environment = os.environ | {"NUMATTN_NUM_THREADS": str(threads)}
        self.process = subprocess.Popen(
            [python, __file__, "--work", str(threads), "--cases", wanted], text=True,
            env=environment, cwd=Path(__file__).parent, stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )  # fmt: skip

    def tell(self, line):
        self.process.stdin.write(line + "\n")
        self.process.stdin.flush()

    def answer(self):
        return json.loads(self.process.stdout.readline())

    def turn(self):
        time.sleep(REST_SECONDS)
        self.tell("turn")
        return self.answer()


def compare(before, after, threads, rounds, wanted):
    builds = [Build(python, threads, wanted) for python in (before, after)]
    for name, build in zip(("BEFORE", "AFTER"), builds, strict=True):
        print(f"{name}: NumPy's BLAS is {build.answer()}")
    while True:
        names = [build.answer() for build in builds]
        assert names[0] == names[1], names
        if names[0] is None:
            return
        ratios = []
        for n in range(rounds):
            turns = {i: builds[i].turn() for i in ((0, 1) if n % 2 else (1, 0))}
            ratios.append(turns[0] / turns[1])
        print(f"{names[0]:24}{threads:2} threads {median(ratios):7.3f}", flush=True)
        for build in builds:
            build.tell("next")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("before", nargs="?", help="interpreter with the older build")
    parser.add_argument("after", nargs="?", help="interpreter with the newer build")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--rounds", type=int, default=21)
    parser.add_argument("--cases", default="", help="regular expression for the names of cases")
    parser.add_argument("--work", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.work:
        work(arguments.work, arguments.cases)
        return
    if arguments.after is None:
        parser.error("expected two interpreters, BEFORE and AFTER")
    BLAS["restart_at_full_speed"]()
    for threads in arguments.threads:
        compare(arguments.before, arguments.after, threads, arguments.rounds, arguments.cases)


if __name__ == "__main__":
    sys.exit(main())
