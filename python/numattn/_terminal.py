"""Progress for who watches a terminal; a pipe gets results alone."""

from __future__ import annotations

import sys


def progress(text: str) -> None:
    """Show a text in place of the last one; an empty one ends it."""
    if sys.stderr.isatty():
        sys.stderr.write(f"\r\033[K{text}")
        sys.stderr.flush()
