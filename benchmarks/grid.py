"""Is numattn anywhere slower than plain NumPy? `make bench-grid` asks at 360 shapes.

Both libraries run in processes of their own, with turns side by side, like in run.py. Prints the
worst cases; the last line is the verdict, and so is the exit code.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from statistics import median

from cases import Case
from run import Worker, progress

LENGTHS = [1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048]
HEAD_DIMS = [8, 16, 32, 64, 128, 256]
HEADS = [1, 2, 4, 8, 32]
TURN_SECONDS = 0.01


def speedups(threads: int, isa: str | None, rounds: int) -> dict[str, float]:
    """Return NumPy's time over numattn's for each shape."""
    shapes = list(itertools.product(LENGTHS, HEAD_DIMS, HEADS))
    ours, numpy = (Worker(peer, threads, isa) for peer in ("numattn", "numpy"))
    result = {}
    for n, (length, d, heads) in enumerate(shapes):
        name = f"L={length} D={d} H={heads}"
        progress(f"{threads} threads, shape {n + 1} of {len(shapes)}: {name}")
        case = Case(name, 1, heads, heads, length, length, d)
        calls = {}
        for worker in (ours, numpy):
            seconds = worker.ask({"prepare": case.as_dict()})["seconds"]
            calls[worker] = max(1, int(TURN_SECONDS / seconds))
        ratios = []
        for _ in range(rounds):
            theirs = numpy.ask({"time": calls[numpy]})["seconds"]
            ratios.append(theirs / ours.ask({"time": calls[ours]})["seconds"])
        result[name] = median(ratios)
    for worker in (ours, numpy):
        worker.close()
    progress("")
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--isa", help="pin numattn to this level")
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    worst = float("inf")
    for threads in arguments.threads:
        by_speedup = sorted(
            speedups(threads, arguments.isa, arguments.rounds).items(), key=lambda item: item[1]
        )
        print(f"{threads} threads, {len(by_speedup)} shapes, NumPy's time over numattn's:")
        for name, speedup in by_speedup[:5]:
            print(f"  worst  {speedup:6.2f}  {name}")
        print(f"  median {median(s for _, s in by_speedup):6.2f}")
        worst = min(worst, by_speedup[0][1])
    print(f"worst case {worst:.2f}: {'never' if worst >= 1 else 'sometimes'} slower than NumPy")
    sys.exit(worst < 1)


if __name__ == "__main__":
    main()
