"""Compare numattn with other libraries and with the machine's own peak: `make bench`.

Each library runs in its own process, and they take turns in rounds: see rounds.py.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from statistics import median

import numattn as na
from cases import AVX2_BARS, BARS, CASES, OPTION_COSTS
from numattn._blas import restart_at_full_speed
from numattn._terminal import progress
from peers import PEERS
from picture import can_draw, picture
from rounds import TURN_SECONDS, Worker, describe_machine, measure, numpy_blas, show


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


def main() -> None:
    names = [case.name for case in CASES]
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--isa", help="the level that numattn must use")
    parser.add_argument(
        "--cases", nargs="+", choices=[*names, "options"], default=[*names, "options"]
    )
    parser.add_argument("--peers", nargs="*", choices=list(PEERS)[1:], default=list(PEERS)[1:])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--output", type=Path, default=Path("bench-results"))
    arguments = parser.parse_args()
    restart_at_full_speed()

    rows, costs, missing = [], [], {}
    machine = describe_machine(arguments.peers)
    print(machine)
    print("Columns: case, threads, share of the peak (decode cases: share of the bandwidth), then")
    print("for each other library how many times as fast numattn is: median [middle half of the")
    print("rounds] (target).")
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
        print("With NUMATTN_ISA=avx2:")
        for case in CASES:
            if case.name in AVX2_BARS and case.name in arguments.cases:
                avx2_rows.append(measure(case, [], 1, "avx2", arguments.rounds))
                show(avx2_rows[-1], {"peak": AVX2_BARS[case.name]})
    for peer, why in missing.items():
        print(f"left out: {peer} ({why}); pip install 'numattn[bench]' installs it")

    arguments.output.mkdir(parents=True, exist_ok=True)
    results = {
        "machine": machine.splitlines(),
        "cases": rows,
        "avx2_cases": avx2_rows,
        "option_costs": costs,
    }
    (arguments.output / "bench.json").write_text(json.dumps(results, indent=1) + "\n")
    print(f"wrote {arguments.output / 'bench.json'}")
    if can_draw(rows, arguments.threads[-1]):
        drawn = picture(rows, arguments.threads[-1], results["machine"])
        (arguments.output / "speed.svg").write_text(drawn)
        print(f"wrote {arguments.output / 'speed.svg'}")


if __name__ == "__main__":
    main()
