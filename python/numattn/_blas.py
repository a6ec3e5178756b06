"""NumPy's BLAS at full speed, because benchmarks compare with it."""

from __future__ import annotations

import importlib
import importlib.util
import os
import subprocess
import sys
from typing import Any

# With these variables OpenBLAS uses kernels or block sizes of another CPU, at half the speed.
_SLOWING = ("OPENBLAS_CORETYPE", "OPENBLAS_L2_SIZE")


def restart_at_full_speed() -> None:
    """If a variable slows down NumPy's BLAS, run this program again without it and exit.

    OpenBLAS reads these variables once, when NumPy is imported. Call this before importing NumPy.
    The new process and its children inherit the cleaned environment.
    """
    if any(name in os.environ for name in _SLOWING):
        environment = {name: x for name, x in os.environ.items() if name not in _SLOWING}
        command = [sys.executable, *sys.orig_argv[1:]]
        raise SystemExit(subprocess.run(command, env=environment, check=False).returncode)


def describe() -> str:
    """Return NumPy's BLAS, its version, its kernels and its number of threads."""
    import numpy as np  # here, because programs without NumPy import this module too

    if importlib.util.find_spec("threadpoolctl") is None:
        blas: Any = np.show_config(mode="dicts")
        blas = blas["Build Dependencies"]["blas"]
        return f"{blas['name']} {blas['version']}, kernels unknown without threadpoolctl"
    threadpoolctl: Any = importlib.import_module("threadpoolctl")  # it has no types
    return "; ".join(
        f"{pool['internal_api']} {pool['version']}, {pool.get('architecture', 'unknown')} kernels, "
        f"threads: {pool['num_threads']}"
        for pool in threadpoolctl.threadpool_info()
        if pool["user_api"] == "blas"
    )
