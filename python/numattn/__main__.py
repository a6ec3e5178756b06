"""The command line: what numattn runs on, whether it is right, and how fast it is.

python -m numattn          what this process runs on, and a comparison with float64 over all ISA
                           levels and dtypes of this machine (seconds); the exit code is 1 if
                           anything is wrong
python -m numattn bench    a small table against plain NumPy
"""

from __future__ import annotations

import argparse

from . import _bench, _blas, _runtime, _self_check


def main() -> int:
    """Run the command; return the exit code."""
    parser = argparse.ArgumentParser(
        "python -m numattn",
        description="Show what numattn runs on and check it against float64, or time it.",
    )
    parser.add_argument(
        "command",
        nargs="?",
        choices=["check", "bench"],
        default="check",
        help="check: the runtime and a comparison with float64 (default); "
        "bench: a small table against plain NumPy",
    )
    command = parser.parse_args().command
    if command == "bench":
        _blas.restart_at_full_speed()
        _bench.bench()
        return 0
    _runtime.show_runtime()
    return 0 if _self_check.self_check() else 1


if __name__ == "__main__":
    raise SystemExit(main())
