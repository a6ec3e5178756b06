"""Code shared by the benchmarks: each library has its own process, and they take turns in rounds.

Every figure is the median of the rounds' ratios, so a short disturbance of a shared machine affects
one round, not the result. With several threads, a round counts only if all of them were free: the
peak on n threads, before and after the round, must be at least 0.9 n times the peak on one.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import time
from importlib import metadata
from pathlib import Path
from statistics import median, quantiles

import numpy as np
from numattn._terminal import progress

TURN_SECONDS = 0.03  # at least one call
REST_SECONDS = 0.1  # before each turn, until the threads of the previous turn sleep
PEAK_SECONDS = 0.003
FULL_PEAK = 0.9  # a share of the number of threads times the peak of one
ATTEMPTS = 4  # rounds to try for each round that counts
SAMPLE = 999  # values of a result to compare


def parser_of(
    description: str, peers: list[str], threads: int, rounds: int
) -> argparse.ArgumentParser:
    """Return a parser for the options that benchmarks against other libraries share."""
    parser = argparse.ArgumentParser(description=description.splitlines()[0])
    parser.add_argument("--threads", type=int, nargs="+", default=[threads])
    parser.add_argument("--isa", help="the level that numattn must use")
    parser.add_argument(
        "--cases", "--only", default="", help="regular expression for the names of cases"
    )
    parser.add_argument("--peers", nargs="*", choices=peers, default=peers)
    parser.add_argument("--rounds", type=int, default=rounds)
    parser.add_argument("--output", type=Path, default=Path("bench-results"))
    return parser


def environment(threads: int, isa: str | None = None) -> dict[str, str]:
    """Return the environment of a process whose libraries use this number of threads."""
    libraries = ("OMP", "OPENBLAS", "MKL", "NUMATTN")
    level = {"NUMATTN_ISA": isa} if isa else {}
    return {**os.environ, **{f"{x}_NUM_THREADS": str(threads) for x in libraries}, **level}


class Worker:
    """The process of one library, from the module `peers`, `layer_peers` or `model_peers`."""

    def __init__(self, peer: str, threads: int, isa: str | None, module: str = "peers") -> None:
        self.threads = threads
        self.process = subprocess.Popen(
            [sys.executable, Path(__file__).with_name("worker.py"), module, peer, str(threads)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment(threads, isa), text=True,
        )  # fmt: skip

    def ask(self, request: dict) -> dict:
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        answer = self.process.stdout.readline()
        if not answer:
            raise RuntimeError(
                f"the process of a library ended with exit code {self.process.wait()}; see above"
            )
        return json.loads(answer)

    def has_all_threads(self) -> bool:
        """Whether all threads of the machine are free now; only numattn's process can tell."""
        if self.threads == 1:
            return True
        what = {"peak": PEAK_SECONDS, "dtype": "float32"}
        one, all_ = (self.ask({**what, "threads": n})["per_second"] for n in (1, self.threads))
        return all_ >= FULL_PEAK * self.threads * one

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait()


def numpy_blas(threads: int) -> str:
    """Return the BLAS that NumPy uses in a process with this number of threads."""
    worker = Worker("numpy", threads, None)
    answer = worker.ask({"blas": True})["blas"]
    worker.close()
    return answer


def describe_machine(packages: list[str]) -> str:
    """Return the date, the CPU, numattn's level, and the versions of packages."""
    import numattn as na

    info = na.runtime_info()
    versions = []
    for package in dict.fromkeys(["numpy", *packages]):
        try:
            versions.append(f"{package} {metadata.version(package)}")
        except metadata.PackageNotFoundError:
            versions.append(f"no {package}")
    return (
        f"{time.strftime('%Y-%m-%d')}, {info['cpu']}, level {info['isa']['chosen']}\n"
        f"numattn {na.__version__}, Python {platform.python_version()}, {', '.join(versions)}"
    )


def check_agreement(name: str, samples: dict[str, list], tolerance: float) -> None:
    """Raise an error if results differ by more than `tolerance` times an array's largest value.

    `samples` has the results of each library, one for each variant.
    """
    (expected,) = samples["numattn"]
    for peer, variants in samples.items():
        for arrays in variants:
            for ours, theirs in zip(expected, arrays, strict=True):
                difference = np.abs(np.subtract(ours, theirs)).max()
                if not difference <= tolerance * np.abs(ours).max():
                    raise RuntimeError(
                        f"{name}: {peer} and numattn differ by {difference:.1e}, expected at most "
                        f"{tolerance:.0e} times the largest value"
                    )


def measure(
    case, peers: list[str], threads: int, isa: str | None, rounds: int, module: str = "peers",
    tolerance: float | None = None,
) -> dict:  # fmt: skip
    """Return the case's medians: the share of the peak, and each library's time over numattn's.

    `case.bound` names the resource that limits the case, "peak" or "bandwidth", and how much of it
    one call needs. If it is None, no share is measured. With a `tolerance`, the results of all
    libraries are compared first.
    """
    workers = {peer: Worker(peer, threads, isa, module) for peer in ["numattn", *peers]}
    try:
        return _measure(case, workers, rounds, tolerance) | {
            "threads": threads,
            "isa": isa or "best",
        }
    finally:
        for worker in workers.values():
            worker.close()
        progress("")


def _measure(case, workers: dict[str, Worker], rounds: int, tolerance: float | None) -> dict:
    prepared = {}
    for peer, worker in list(workers.items()):
        progress(f"{case.name}, {worker.threads} threads: preparing {peer}")
        prepared[peer] = worker.ask({"prepare": case.as_dict()})
        if "seconds" not in prepared[peer]:
            workers.pop(peer).close()
            if peer == "numattn":
                break
    result = {
        "case": case.name,
        "share_of_peak": None,
        "speedup_over": {},
        "missing": {p: x["missing"] for p, x in prepared.items() if "missing" in x},
        "unsupported": {p: x["unsupported"] for p, x in prepared.items() if "unsupported" in x},
    }
    if "numattn" not in workers:
        return result
    calls = {p: max(1, int(TURN_SECONDS / prepared[p]["seconds"])) for p in workers}
    if tolerance is not None:
        samples = {peer: workers[peer].ask({"sample": SAMPLE})["samples"] for peer in calls}
        check_agreement(case.name, samples, tolerance)

    ours = workers["numattn"]
    every, undisturbed_rounds = [], []
    undisturbed = ours.has_all_threads()
    for n in range(ATTEMPTS * rounds):
        progress(f"{case.name}, {ours.threads} threads: round {n + 1}")
        turns = {}
        for peer in list(calls) if n % 2 == 0 else reversed(calls):
            time.sleep(REST_SECONDS)
            if peer == "numattn" and case.bound is not None:
                request = {case.bound[0]: TURN_SECONDS, "dtype": case.dtype}
                turns["bound"] = ours.ask(request)["per_second"]
            turns[peer] = workers[peer].ask({"time": calls[peer]})["seconds"]
        time.sleep(REST_SECONDS)
        before, undisturbed = undisturbed, ours.has_all_threads()
        every.append(turns)
        if before and undisturbed:
            undisturbed_rounds.append(turns)
        if len(undisturbed_rounds) == rounds:
            break
    counted = undisturbed_rounds or every
    ratios = {p: [turns[p] / turns["numattn"] for turns in counted] for p in calls}
    del ratios["numattn"]
    result["speedup_over"] = {peer: round(median(r), 2) for peer, r in ratios.items()}
    result["middle_half"] = {peer: _middle_half(r) for peer, r in ratios.items()}
    result["seconds"] = median(turns["numattn"] for turns in counted)
    result["variants"] = {peer: prepared[peer]["variant"] for peer in ratios}
    result["rounds"] = len(every)
    result["undisturbed_rounds"] = len(undisturbed_rounds)
    if case.bound is not None:
        amount = case.bound[1]
        shares = [amount / turns["numattn"] / turns["bound"] for turns in counted]
        result["share_of_peak"] = round(median(shares), 3)
    return result


def _middle_half(ratios: list[float]) -> list[float]:
    if len(ratios) == 1:
        return [round(ratios[0], 2)] * 2
    lower, _, upper = quantiles(ratios, n=4, method="inclusive")
    return [round(lower, 2), round(upper, 2)]


def show(row: dict, bars: dict[str, float], width: int = 14) -> None:
    """Print a case's medians, the middle half of the rounds, and whether targets were met."""
    for kind in ("missing", "unsupported"):
        if "numattn" in row[kind]:
            print(f"{row['case']:{width}} left out: {row[kind]['numattn']}", flush=True)
            return

    def with_bar(text: str, value: float, bar: float | None) -> str:
        return f"{text} (>= {bar}: {'met' if value >= bar else 'missed'})" if bar else text

    share = row["share_of_peak"]
    figures = [] if share is None else [with_bar(f"{share:.3f}", share, bars.get("peak"))]
    for peer, speedup in row["speedup_over"].items():
        low, high = row["middle_half"][peer]
        text = f"{peer} {speedup:.2f} [{low:.2f} {high:.2f}]"
        figures.append(with_bar(text, speedup, bars.get(peer)))
    if row["undisturbed_rounds"] == 0:
        figures.append(f"all {row['rounds']} rounds were disturbed; they count anyway")
    elif row["undisturbed_rounds"] < row["rounds"]:
        figures.append(f"{row['undisturbed_rounds']} of {row['rounds']} rounds count")
    print(f"{row['case']:{width}}{row['threads']:2} threads  {'  '.join(figures)}", flush=True)
