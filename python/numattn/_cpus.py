"""The number of CPUs that this process may use, and what limits it."""

from __future__ import annotations

import ctypes
import os
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from . import _cpus_windows

if TYPE_CHECKING:
    from collections.abc import Iterator

_WHOSE_QUOTA = "job" if sys.platform == "win32" else "cgroup"
# Variables that limit the threads of one of several processes. joblib (loky) obeys the first, and
# sets the second in its workers, like other schedulers. NumPy's BLAS and PyTorch obey the second.
_SHARES = ("LOKY_MAX_CPU_COUNT", "OMP_NUM_THREADS")


def usable() -> tuple[int, str]:
    """Return how many CPUs affinity and quota let this process use, and which of them decides."""
    cpus, reason = _affinity(), "the CPUs that this process may use"
    limit = quota()
    if limit is not None and limit < cpus:
        return limit, f"the CPU quota of its {_WHOSE_QUOTA}"
    return cpus, reason


def fair_share() -> tuple[int, str]:
    """Return how many of the usable CPUs this process should use next to others, and why."""
    number, reason = usable()
    for variable in _SHARES:
        # OMP_NUM_THREADS may be a list with one number per level of nesting. Values that are not
        # numbers are ignored here: other libraries refuse them.
        match = re.fullmatch(r"\s*0*([1-9][0-9]{0,8})\s*(,.*)?", os.environ.get(variable, ""))
        if match and int(match[1]) < number:
            number, reason = int(match[1]), variable
    return number, reason


def _affinity() -> int:
    cpus = os.cpu_count() or 1
    if sys.platform == "win32":
        return _cpus_windows.affinity(ctypes.WinDLL("kernel32"), cpus)
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return cpus


def quota() -> int | None:
    """Return the number of CPUs that the quota of this process allows, rounded up, or None."""
    if sys.platform == "win32":
        return _cpus_windows.quota(ctypes.WinDLL("kernel32"), os.cpu_count() or 1)
    return cgroup_quota()


def cgroup_quota(proc: Path = Path("/proc/self")) -> int | None:
    """Return the number of CPUs that this process's cgroups allow, rounded up, or None.

    Reads both versions of cgroups, and all ancestors that this process sees: the kernel enforces
    the smallest quota. `proc` is the folder in which the kernel describes the process.
    """
    try:
        quotas = [x for folder in _cgroups(proc) for x in _quotas(folder)]
    except (OSError, ValueError):  # not Linux, or files that are not as documented
        return None
    return min((max(1, -(-limit // period)) for limit, period in quotas), default=None)


def _cgroups(proc: Path) -> Iterator[Path]:
    """Yield the folders of the process's cgroups, and of their ancestors, that may hold a quota."""
    # Lines are hierarchy:controllers:path. Version 2 names no controllers.
    paths = {}
    for line in (proc / "cgroup").read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        if not controllers or "cpu" in controllers.split(","):
            paths["cgroup" if controllers else "cgroup2"] = path
    for line in (proc / "mountinfo").read_text().splitlines():
        before, after = line.split(" - ")
        root, mounted = map(_unescaped, before.split()[3:5])
        kind, _, options = after.split(" ", 2)
        if kind not in paths or (kind == "cgroup" and "cpu" not in options.split(",")):
            continue
        below = os.path.relpath(paths[kind], root)
        if below.startswith(".."):  # in a container that does not see its own cgroup's folder
            below = "."
        top = Path(mounted)
        folder = top / below
        yield from (x for x in (folder, *folder.parents) if x == top or top in x.parents)


def _unescaped(path: str) -> str:
    return re.sub(r"\\([0-7]{3})", lambda match: chr(int(match[1], 8)), path)


def _quotas(folder: Path) -> Iterator[tuple[int, int]]:
    """Yield the quota of a cgroup and its period, in microseconds, if it has one."""
    for names in (["cpu.max"], ["cpu.cfs_quota_us", "cpu.cfs_period_us"]):
        try:
            limit, period = " ".join((folder / name).read_text() for name in names).split()
            if limit not in ("max", "-1") and int(period) > 0:
                yield int(limit), int(period)
        except (OSError, ValueError):
            continue
