"""Is numattn anywhere slower than plain NumPy? `make bench-grid` asks at some 460 shapes.

Both libraries run in processes of their own, with as many threads, and take turns.
NumPy is `plain_calls` of `numattn._bench`, the fastest of its variants in each turn. A shape that
comes near 1 is measured again, in more rounds. Which rounds count: see rounds.py.
Prints the worst cases; the last line is the verdict, and so is the exit code.
"""

from __future__ import annotations

import argparse
import re
import sys
import time
from statistics import median

from cases import Case, grid
from numattn._blas import restart_at_full_speed
from numattn._terminal import progress
from rounds import ATTEMPTS, SAMPLE, Worker, check_agreement

TURN_SECONDS = 0.01
REST_SECONDS = 0.05  # OpenBLAS's threads wait busily for some 30 ms after a product
NEAR = 1.03
MORE_ROUNDS = 15


class Pair:
    """Both libraries, with turns side by side."""

    def __init__(self, threads: int, isa: str | None) -> None:
        self.threads = threads
        self.ours, self.numpy = (Worker(peer, threads, isa) for peer in ("numattn", "numpy"))
        self.disturbed = 0  # rounds that did not count

    def prepare(self, case: Case) -> None:
        """Make both calls, and compare some of their numbers."""
        self.calls = {}
        for worker in (self.ours, self.numpy):
            seconds = worker.ask({"prepare": case.as_dict()})["seconds"]
            self.calls[worker] = max(1, int(TURN_SECONDS / seconds))
        workers = {"numattn": self.ours, "numpy": self.numpy}
        samples = {name: w.ask({"sample": SAMPLE})["samples"] for name, w in workers.items()}
        check_agreement(case.name, samples, 1e-4)

    def speedup(self, rounds: int) -> float | None:
        """Return the median of NumPy's time over numattn's; None if no round counts."""
        ratios: list[float] = []
        undisturbed = self.ours.has_all_threads()
        for n in range(ATTEMPTS * rounds):
            turns = {worker: self._turn(worker) for worker in self._order(n)}
            before, undisturbed = undisturbed, self.ours.has_all_threads()
            if before and undisturbed:
                ratios.append(turns[self.numpy] / turns[self.ours])
            else:
                self.disturbed += 1
            if len(ratios) == rounds:
                break
        return median(ratios) if ratios else None

    def blas(self) -> str:
        return self.numpy.ask({"blas": True})["blas"]

    def close(self) -> None:
        self.ours.close()
        self.numpy.close()

    def _order(self, n: int) -> tuple[Worker, Worker]:
        return (self.numpy, self.ours) if n % 2 else (self.ours, self.numpy)

    def _turn(self, worker: Worker) -> float:
        seconds = worker.ask({"time": self.calls[worker]})["seconds"]
        if self.threads > 1 and worker is self.numpy:
            time.sleep(REST_SECONDS)
        return seconds


def speedups(cases: list[Case], pair: Pair, rounds: int) -> dict[str, float]:
    """Return NumPy's time over numattn's for each case that could be measured."""
    result = {}
    for n, case in enumerate(cases):
        progress(f"{pair.threads} threads, shape {n + 1} of {len(cases)}: {case.name}")
        pair.prepare(case)
        speedup = pair.speedup(rounds)
        if speedup is not None and speedup < NEAR:
            speedup = pair.speedup(MORE_ROUNDS)
        if speedup is not None:
            result[case.name] = speedup
    progress("")
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--isa", help="pin numattn to this level")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--cases", default="", help="a regular expression of their names")
    parser.add_argument("--worst", type=int, default=10, help="how many to print")
    arguments = parser.parse_args()
    restart_at_full_speed()
    cases = [case for case in grid() if re.search(arguments.cases, case.name)]
    if not cases:
        parser.error(f"no case matches {arguments.cases!r}")
    worst, unmeasured = float("inf"), 0
    for threads in arguments.threads:
        pair = Pair(threads, arguments.isa)
        by_speedup = sorted(
            speedups(cases, pair, arguments.rounds).items(), key=lambda item: item[1]
        )
        print(f"{threads} threads, {len(by_speedup)} shapes, NumPy's time over numattn's:")
        print(f"  NumPy: {pair.blas()}")
        for name, speedup in by_speedup[: arguments.worst]:
            print(f"  worst  {speedup:6.2f}  {name}")
        if by_speedup:
            print(f"  median {median(s for _, s in by_speedup):6.2f}")
            worst = min(worst, by_speedup[0][1])
        if pair.disturbed:
            print(f"  {pair.disturbed} rounds did not count: too little of the CPU was free")
        unmeasured += len(cases) - len(by_speedup)
        pair.close()
    if unmeasured:
        print(f"{unmeasured} shapes were not measured: no round of theirs counted")
    print(f"worst case {worst:.2f}: {'never' if worst >= 1 else 'sometimes'} slower than NumPy")
    sys.exit(worst < 1 or unmeasured > 0)


if __name__ == "__main__":
    main()
