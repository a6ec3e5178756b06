"""Compare transformers models with numattn's and PyTorch's attention: `make bench-models`.

Each attention function runs in its own process, and they take turns in rounds: see rounds.py.
First, the logits of all are compared. The models are in model_peers.py.
"""

from __future__ import annotations

import json
import re

from model_peers import BARS, CASES, PEERS, TOLERANCES
from numattn._blas import restart_at_full_speed
from rounds import describe_machine, measure, parser_of, show

BARS_THREADS = 2


def main() -> None:
    parser = parser_of(__doc__, list(PEERS)[1:], BARS_THREADS, rounds=5)
    arguments = parser.parse_args()
    restart_at_full_speed()
    cases = [case for case in CASES if re.search(arguments.cases, case.name)]
    if not cases:
        parser.error(f"--cases: no case matches {arguments.cases!r}")

    machine = describe_machine(["torch", "transformers"])
    print(machine)
    print("Columns: model, threads, then for each other attention function how many times as fast")
    print("the model is with numattn: median [middle half of the rounds] (target).")
    rows = []
    for threads in arguments.threads:
        for case in cases:
            row = measure(
                case, arguments.peers, threads, arguments.isa, arguments.rounds, "model_peers",
                TOLERANCES[case.dtype],
            )  # fmt: skip
            rows.append(row)
            has_bars = threads == BARS_THREADS and not arguments.isa
            show(row, BARS.get(case.name, {}) if has_bars else {}, width=34)
    arguments.output.mkdir(parents=True, exist_ok=True)
    path = arguments.output / "models.json"
    path.write_text(json.dumps({"machine": machine, "cases": rows}, indent=1) + "\n")
    print(f"wrote {path}")


if __name__ == "__main__":
    main()
