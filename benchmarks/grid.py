"""Look for a shape at which numattn is slower than plain NumPy, among about 460: `make bench-grid`.

Each library has its own process. Both use the same number of threads, and take turns. NumPy is
`plain_calls` of `numattn._bench`; its fastest variant counts in each turn. If a ratio is near 1,
the shape is measured again in more rounds. rounds.py says which rounds count. The program prints
the worst cases. The last line is the verdict, and the exit code says the same.
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
REST_SECONDS = 0.05  # OpenBLAS's threads spin for about 30 ms after a product
NEAR = 1.03
MORE_ROUNDS = 15


class Pair:
    """Both libraries, which take turns."""

    def __init__(self, threads: int, isa: str | None) -> None:
        self.threads = threads
        self.ours, self.numpy = (Worker(peer, threads, isa) for peer in ("numattn", "numpy"))
        self.disturbed = 0  # rounds that do not count

    def prepare(self, case: Case) -> None:
        """Make both calls, and compare some values of their results."""
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
    """Return NumPy's time over numattn's, for each case with a round that counts."""
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
    parser.add_argument("--isa", help="the level that numattn must use")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--cases", default="", help="regular expression for the names of cases")
    parser.add_argument(
        "--worst", type=int, default=10, help="how many of the worst cases to print"
    )
    arguments = parser.parse_args()
    restart_at_full_speed()
    cases = [case for case in grid() if re.search(arguments.cases, case.name)]
    if not cases:
        parser.error(f"--cases: no case matches {arguments.cases!r}")
    worst, unmeasured = float("inf"), 0
    for threads in arguments.threads:
        pair = Pair(threads, arguments.isa)
        by_speedup = sorted(
            speedups(cases, pair, arguments.rounds).items(), key=lambda item: item[1]
        )
        print(f"{threads} threads, {len(by_speedup)} shapes: NumPy's time over numattn's")
        print(f"  NumPy: {pair.blas()}")
        for name, speedup in by_speedup[: arguments.worst]:
            print(f"  worst  {speedup:6.2f}  {name}")
        if by_speedup:
            print(f"  median {median(s for _, s in by_speedup):6.2f}")
            worst = min(worst, by_speedup[0][1])
        if pair.disturbed:
            print(f"  {pair.disturbed} rounds do not count: other programs used the CPU")
        unmeasured += len(cases) - len(by_speedup)
        pair.close()
    if unmeasured:
        print(f"{unmeasured} shapes were not measured: none of their rounds counts")
    print(f"worst case {worst:.2f}: {'never' if worst >= 1 else 'sometimes'} slower than NumPy")
    sys.exit(worst < 1 or unmeasured > 0)


if __name__ == "__main__":
    main()
