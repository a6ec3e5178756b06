"""How PyInstaller finds what numattn needs: it reads the entry point `pyinstaller40`."""

from __future__ import annotations

from pathlib import Path


def hook_directories() -> list[str]:
    """Return the folders that PyInstaller looks for hooks in."""
    return [str(Path(__file__).parent)]
