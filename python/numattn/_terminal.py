"""Progress, shown on a terminal only: a pipe receives nothing but the results."""

from __future__ import annotations

import sys


def progress(text: str) -> None:
    """Replace the text shown last by this one; an empty text clears the line."""
    if sys.stderr.isatty():
        sys.stderr.write(f"\r\033[K{text}")
        sys.stderr.flush()
