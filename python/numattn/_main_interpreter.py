"""Importing this module fails in a subinterpreter, before NumPy is imported there.

NumPy works only in the main interpreter of a process. In a subinterpreter some of its versions
refuse to be imported, some fail in later calls, and some end the process.
"""

from __future__ import annotations

import importlib


def is_here() -> bool:
    """Return whether this is the process's main interpreter."""
    for name in ("_interpreters", "_xxsubinterpreters"):  # Python 3.13 and later; older
        try:
            interpreters = importlib.import_module(name)
        except ImportError:
            continue
        return bool(interpreters.get_current() == interpreters.get_main())
    return True  # unknown; most Pythons without such a module have one interpreter


if not is_here():
    raise ImportError(
        "numattn was imported in a subinterpreter, where NumPy does not work; expected the main "
        "interpreter. Use threads, which run in parallel while numattn computes, or processes "
        "(multiprocessing). With mod_wsgi, set WSGIApplicationGroup to %{GLOBAL}."
    )
