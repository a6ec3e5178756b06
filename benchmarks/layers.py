"""Compare layers, blocks and a whole model with other libraries: `make bench-layers`.

Each library runs in its own process, and they take turns in rounds: see rounds.py. First, the
results of all libraries are compared. The rows are in layer_cases.py, the libraries in
layer_peers.py.
"""

from __future__ import annotations

import json
import re

from layer_cases import BARS, BARS_THREADS, CASES, TOLERANCES
from layer_peers import PEERS
from numattn._blas import restart_at_full_speed
from rounds import describe_machine, measure, numpy_blas, parser_of, show

MODULE = "layer_peers"


def main() -> None:
    parser = parser_of(__doc__, list(PEERS)[1:], BARS_THREADS, rounds=11)
    arguments = parser.parse_args()
    restart_at_full_speed()
    cases = [case for case in CASES if re.search(arguments.cases, case.name)]
    if not cases:
        parser.error(f"--cases: no case matches {arguments.cases!r}")

    machine = describe_machine(arguments.peers)
    print(machine)
    print("Columns: case, threads, share of the peak (one row and rotary embedding: share of the")
    print(
        "bandwidth), then for each other library how many times as fast numattn is: median [middle"
    )
    print("half of the rounds] (target).")
    rows, missing = [], {}
    for threads in arguments.threads:
        print(f"NumPy: {(blas := numpy_blas(threads))}")
        for case in cases:
            row = measure(
                case, arguments.peers, threads, arguments.isa, arguments.rounds, MODULE,
                TOLERANCES[case.dtype],
            )  # fmt: skip
            rows.append(row | {"blas": blas})
            missing |= {p: why for p, why in row["missing"].items() if p != "numattn"}
            has_bars = threads == BARS_THREADS and not arguments.isa
            show(row, BARS.get(case.name, {}) if has_bars else {}, width=34)
    for peer, why in missing.items():
        print(f"left out: {peer} ({why})")
    arguments.output.mkdir(parents=True, exist_ok=True)
    path = arguments.output / "layers.json"
    path.write_text(json.dumps({"machine": machine, "cases": rows}, indent=1) + "\n")
    print(f"wrote {path}")


if __name__ == "__main__":
    main()
