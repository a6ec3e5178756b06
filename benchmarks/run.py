"""Compare numattn with its peers and with the machine's own peak: `make bench`.

Each library runs in a process of its own. A case is measured in rounds, in each of which every
library has its turn, and every figure is the median of the rounds' ratios: what disturbs a shared
machine for a moment disturbs a round, not the result.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from statistics import median

import numattn as na
from cases import AVX2_BARS, BARS, CASES, OPTION_COSTS, Case
from numattn._blas import restart_at_full_speed
from numattn._terminal import progress
from peers import PEERS

TURN_SECONDS = 0.03  # at least one call
REST_SECONDS = 0.1  # before each turn, until the threads of the one before have gone to sleep


def environment(threads: int, isa: str | None = None) -> dict[str, str]:
    """Return the environment of a process whose libraries use so many threads."""
    libraries = ("OMP", "OPENBLAS", "MKL", "NUMATTN")
    level = {"NUMATTN_ISA": isa} if isa else {}
    return {**os.environ, **{f"{x}_NUM_THREADS": str(threads) for x in libraries}, **level}


class Worker:
    """One library's process."""

    def __init__(self, peer: str, threads: int, isa: str | None) -> None:
        self.process = subprocess.Popen(
            [sys.executable, Path(__file__).with_name("worker.py"), peer, str(threads)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment(threads, isa), text=True,
        )  # fmt: skip

    def ask(self, request: dict) -> dict:
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        answer = self.process.stdout.readline()
        if not answer:
            raise RuntimeError(f"a benchmark process ended with {self.process.wait()}")
        return json.loads(answer)

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait()


def numpy_blas(threads: int) -> str:
    """Return what NumPy computes with in a process of so many threads."""
    worker = Worker("numpy", threads, None)
    answer = worker.ask({"blas": True})["blas"]
    worker.close()
    return answer


def measure(case: Case, peers: list[str], threads: int, isa: str | None, rounds: int) -> dict:
    """Return the case's medians: share of peak, and each peer's time over numattn's."""
    workers = {peer: Worker(peer, threads, isa) for peer in ["numattn", *peers]}
    prepared = {}
    for peer, worker in list(workers.items()):
        progress(f"{case.name}, {threads} threads: preparing {peer}")
        prepared[peer] = worker.ask({"prepare": case.as_dict()})
        if "seconds" not in prepared[peer]:
            workers.pop(peer).close()
    if "numattn" not in workers:
        raise RuntimeError(f"{case.name} needs {prepared['numattn']['missing']}")
    calls = {p: max(1, int(TURN_SECONDS / prepared[p]["seconds"])) for p in workers}
    shares, ratios = [], {peer: [] for peer in workers if peer != "numattn"}
    for n in range(rounds):
        progress(f"{case.name}, {threads} threads: round {n + 1} of {rounds}")
        time.sleep(REST_SECONDS)
        what = {"bandwidth": TURN_SECONDS} if case.is_decode else {"peak": TURN_SECONDS}
        peak = workers["numattn"].ask(what | {"dtype": case.dtype})["per_second"]
        ours = workers["numattn"].ask({"time": calls["numattn"]})["seconds"]
        shares.append((case.bytes_read if case.is_decode else case.flops) / ours / peak)
        for peer in ratios:
            time.sleep(REST_SECONDS)
            ratios[peer].append(workers[peer].ask({"time": calls[peer]})["seconds"] / ours)
    for worker in workers.values():
        worker.close()
    progress("")
    return {
        "case": case.name,
        "threads": threads,
        "isa": isa or "best",
        "share_of_peak": round(median(shares), 3),
        "speedup_over": {peer: round(median(r), 2) for peer, r in ratios.items()},
        "variants": {p: prepared[p]["variant"] for p in ratios},
        "missing": {p: x["missing"] for p, x in prepared.items() if "missing" in x},
    }


def measure_option_costs(threads: int, isa: str | None, rounds: int) -> list[dict]:
    rows = []
    available = na.runtime_info()["isa"]["available"]
    for name, bar, first, second, *level in OPTION_COSTS:
        if level and (isa or level[0] not in available):
            continue
        workers = [Worker("numattn", threads, *(level or [isa])) for _ in range(2)]
        pairs = zip(workers, (first, second), strict=True)
        prepared = [w.ask({"prepare": c.as_dict()}) for w, c in pairs]
        calls = [max(1, int(TURN_SECONDS / p["seconds"])) for p in prepared]
        ratios = []
        for n in range(rounds):
            progress(f"{name}: round {n + 1} of {rounds}")
            a, b = (w.ask({"time": c})["seconds"] for w, c in zip(workers, calls, strict=True))
            ratios.append(a / b)
        for worker in workers:
            worker.close()
        progress("")
        ratio = round(median(ratios), 2)
        rows.append({"cost": name, "threads": threads, "ratio": ratio, "bar": bar})
        print(f"{name:36}{threads:2} threads {ratio:6.2f}   ({bar})", flush=True)
    return rows


def show(row: dict, bars: dict[str, float]) -> None:
    """Print a case's medians, and in brackets what is aimed at where there is an aim."""

    def with_bar(value: float, bar: float | None, digits: int) -> str:
        return f"{value:.{digits}f}" + (f" (>= {bar})" if bar else "")

    share = with_bar(row["share_of_peak"], bars.get("peak"), 3)
    peers = (f"{p} {with_bar(r, bars.get(p), 2)}" for p, r in row["speedup_over"].items())
    print(f"{row['case']:14}{row['threads']:2} threads  {share:18}{'  '.join(peers)}", flush=True)


def text_plot(rows: list[dict]) -> str:
    """Draw the speedups in characters, as in the README."""
    lines = []
    for row in rows:
        for n, (peer, speedup) in enumerate(row["speedup_over"].items()):
            label = f"{row['case']:13} x{row['threads']}" if n == 0 else ""
            bar = "#" * round(min(speedup, 6) * 8)  # eight marks for each time as fast
            lines.append(f"{label:17}{peer:12} {bar} {speedup:.1f}")
    return "\n".join(lines)


def plot(rows: list[dict], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    threads = sorted({row["threads"] for row in rows})
    peers = [p for p in PEERS if any(p in row["speedup_over"] for row in rows)]
    figure, axes = plt.subplots(
        len(threads), 1, figsize=(9, 3.2 * len(threads)), squeeze=False, layout="constrained"
    )
    for ax, count in zip(axes[:, 0], threads, strict=True):
        chosen = [row for row in rows if row["threads"] == count]
        width = 0.8 / max(len(peers), 1)
        for i, peer in enumerate(peers):
            x = [n + (i - (len(peers) - 1) / 2) * width for n in range(len(chosen))]
            y = [row["speedup_over"].get(peer, float("nan")) for row in chosen]
            bars = ax.bar(x, y, width, label=peer)
            ax.bar_label(bars, fmt=lambda r: f"{r:.1f}" if r == r else "", fontsize=7, padding=1)
        ax.axhline(1, color="black", linewidth=0.8)
        ax.set_yscale("log")
        ax.yaxis.set_major_formatter("{x:g}")
        ax.set_ylim(top=ax.get_ylim()[1] * 1.3)
        ax.set_xticks(range(len(chosen)), [row["case"] for row in chosen])
        ax.set_ylabel("their time / numattn's time")
        ax.set_title(f"{count} thread{'s' if count > 1 else ''}", fontsize=10)
    axes[0, 0].legend(ncols=len(peers), fontsize=8, loc="upper left")
    figure.savefig(path, dpi=110)


def main() -> None:
    names = [case.name for case in CASES]
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--isa", help="pin numattn to this level")
    parser.add_argument(
        "--cases", nargs="+", choices=[*names, "options"], default=[*names, "options"]
    )
    parser.add_argument("--peers", nargs="*", choices=list(PEERS)[1:], default=list(PEERS)[1:])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--output", type=Path, default=Path("bench-results"))
    arguments = parser.parse_args()
    restart_at_full_speed()

    rows, costs, missing = [], [], {}
    print("case, threads, share of the peak (decode: of bandwidth), times as fast as a peer (bars)")
    for threads in arguments.threads:
        if "numpy" in arguments.peers:
            print(f"NumPy: {numpy_blas(threads)}")
        for case in CASES:
            if case.name not in arguments.cases:
                continue
            row = measure(case, arguments.peers, threads, arguments.isa, arguments.rounds)
            rows.append(row)
            missing |= row["missing"]
            show(row, {} if arguments.isa else BARS.get((case.name, threads), {}))
        if "options" in arguments.cases:
            costs += measure_option_costs(threads, arguments.isa, arguments.rounds)
    avx2_rows = []
    if arguments.isa is None and "avx2" in na.runtime_info()["isa"]["available"]:
        print("at NUMATTN_ISA=avx2:")
        for case in CASES:
            if case.name in AVX2_BARS and case.name in arguments.cases:
                avx2_rows.append(measure(case, [], 1, "avx2", arguments.rounds))
                show(avx2_rows[-1], {"peak": AVX2_BARS[case.name]})
    for peer, why in missing.items():
        print(f"left out: {peer} ({why}); pip install 'numattn[bench]' installs the peers")

    arguments.output.mkdir(parents=True, exist_ok=True)
    results = {"cases": rows, "avx2_cases": avx2_rows, "option_costs": costs}
    (arguments.output / "bench.json").write_text(json.dumps(results, indent=1) + "\n")
    print(f"wrote {arguments.output / 'bench.json'}")
    if rows and arguments.peers:
        (arguments.output / "bench.txt").write_text(text_plot(rows) + "\n")
        try:
            plot(rows, arguments.output / "bench.png")
        except ImportError as error:
            print(f"no plot: {error}")
        else:
            print(f"wrote {arguments.output / 'bench.png'}")


if __name__ == "__main__":
    main()
