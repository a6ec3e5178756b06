"""The backend, ISA level and number of threads in use, and why."""

from __future__ import annotations

import os
import platform
import re
import sys
import zipimport
from importlib import metadata, resources
from typing import TYPE_CHECKING, Any

import numpy as np

from . import _checks, _cpus, _numpy_backend

if TYPE_CHECKING:
    from types import ModuleType

PACKAGE = __name__.rpartition(".")[0]  # "numattn", if it is not vendored


def _version() -> str:
    """Return the installed version.

    A copy of the package without its metadata, in a frozen program or in another package, has no
    version: the version of another installed numattn does not apply to it.
    """
    try:
        return metadata.version("numattn") if PACKAGE == "numattn" else _UNKNOWN
    except metadata.PackageNotFoundError:
        return _UNKNOWN


_UNKNOWN = "0+unknown"  # valid in PEP 440, and lower than any other version
__version__ = _version()

BACKENDS = ("native", "numpy")


def _isa_levels() -> dict[str, list[str]]:
    """Return the ISA levels in ascending order, and the dtypes for which each has its own kernels.

    Not all levels are built for every architecture. The result is empty in a frozen program that
    was made without the package's data files.
    """
    try:
        text = resources.files(PACKAGE).joinpath("isa_levels.txt").read_text("ascii")
    except OSError:
        return {}
    lines = [line.split() for line in text.splitlines() if line and not line.startswith("#")]
    return {name: dtypes for name, _, *dtypes in lines}


ISA_LEVELS = _isa_levels()

_ARCHIVE_ADVICE = (
    "keep numattn out of the archive, in a folder on sys.path ('pip install --target FOLDER "
    "numattn'), or make an archive that unpacks itself"
)


def _compiler_advice(platform: str) -> str:
    """Return advice for a platform, named as in `sys`, without kernels to import."""
    compiler = {
        "win32": "install Visual Studio's component 'C++ Clang tools for Windows', set "
        "SKBUILD_CMAKE_ARGS=-TClangCL",
        "darwin": "install Apple's Command Line Tools ('xcode-select --install'), set ARCHFLAGS to "
        "one architecture if it names two",
    }.get(platform, "install a C++20 compiler (GCC 11 or Clang 14, or later)")
    return (
        f"{compiler}, then run 'pip install --force-reinstall --no-cache-dir .' in numattn's source"
    )


def _why_missing(error: ImportError) -> tuple[str, str]:
    """Return why the compiled kernels could not be imported, and what to do."""
    loader = globals()["__spec__"].loader
    if type(loader) is zipimport.zipimporter:
        reason = f"Python cannot load compiled modules from a zip archive, here {loader.archive}"
        return reason, _ARCHIVE_ADVICE
    if error.name == PACKAGE:  # Python's own message guesses at a circular import
        return f"no module named {PACKAGE}._core", _compiler_advice(sys.platform)
    return str(error), _compiler_advice(sys.platform)


def _load_native() -> tuple[ModuleType | None, str]:
    """Return the compiled module, or None, and the reason for the choice."""
    wanted = os.environ.get("NUMATTN_BACKEND", "")
    if wanted not in ("", *BACKENDS):
        expected = " or ".join(BACKENDS)
        raise ValueError(f"NUMATTN_BACKEND: got {wanted!r}, expected {expected}")
    if wanted == "numpy":
        return None, "NUMATTN_BACKEND=numpy"
    try:
        from . import _core
    except ImportError as error:
        reason, advice = _why_missing(error)
        if wanted == "native":
            message = f"NUMATTN_BACKEND=native, but the compiled kernels are missing ({reason}): "
            raise ImportError(message + advice) from error
        message = f"numattn: the compiled kernels are missing ({reason}); numattn computes in "
        message += "NumPy, with the same answers, but many times slower. To get the kernels, "
        message += advice + ". Set NUMATTN_BACKEND=numpy to silence this warning."
        _checks.warn(message, RuntimeWarning)
        return None, f"the compiled kernels are missing ({reason})"
    return _core, (wanted and "NUMATTN_BACKEND=native") or "the compiled kernels are there"


def _choose_isa() -> str:
    """Choose the ISA level with NUMATTN_ISA; return the reason for the choice."""
    wanted = os.environ.get("NUMATTN_ISA", "")
    names = list(ISA_LEVELS or ({} if native is None else native.isa_names()))
    if wanted and names and wanted not in names:
        raise ValueError(f"NUMATTN_ISA: got {wanted!r}, expected one of {', '.join(names)}")
    if native is None:
        if wanted and os.environ.get("NUMATTN_BACKEND") != "numpy":
            raise RuntimeError(f"NUMATTN_ISA={wanted}, but {backend_reason}")
        return "NumPy decides"
    if not wanted:
        return "the fastest on this CPU"
    try:
        native.set_isa(wanted)
    except ValueError as error:
        raise RuntimeError(f"NUMATTN_ISA={wanted}: {error}") from None
    return f"NUMATTN_ISA={wanted}"


def _initial_num_threads() -> tuple[int, str]:
    wanted = os.environ.get("NUMATTN_NUM_THREADS", "")
    if wanted:
        number: object = int(wanted) if re.fullmatch("-?[0-9]{1,18}", wanted) else wanted
        try:
            return _checks.thread_count("NUMATTN_NUM_THREADS", number), "NUMATTN_NUM_THREADS"
        except TypeError as error:
            raise ValueError(str(error)) from None
    number, reason = _cpus.fair_share()
    return min(number, _checks.MAX_THREADS), reason


native, backend_reason = _load_native()
backend = "numpy" if native is None else "native"
attention_common = None if native is None else native.attention_common
# `attention`, `attention_backward`, `stage`, `multiply`, and operations on rows, with the same
# signatures
computations = _numpy_backend if native is None else native
isa_reason = _choose_isa()


def set_num_threads(num_threads: int) -> None:
    """Set the number of threads for calls without ``num_threads``.

    Parameters
    ----------
    num_threads : int
        1 to 1024, including the calling thread. Results have the same bits for any number. The
        NumPy backend leaves threads to NumPy's BLAS.

    Raises
    ------
    TypeError, ValueError
        If `num_threads` is not an int, or is out of range.

    See Also
    --------
    get_num_threads : return the number in use.
    runtime_info : return the number, and where it comes from.

    Notes
    -----
    The default comes from the first of these that applies, when numattn is imported:

    - the environment variable ``NUMATTN_NUM_THREADS``;
    - the number of CPUs that the process may use: those in its affinity, or the CPU quota of its
      cgroup or, on Windows, its job (a container's limit), rounded up, if that is less.
      ``LOKY_MAX_CPU_COUNT`` and ``OMP_NUM_THREADS`` lower it further. joblib sets the latter in its
      workers to each worker's share of the CPUs.

    Examples
    --------
    >>> import numattn as na
    >>> before = na.get_num_threads()
    >>> na.set_num_threads(1)
    >>> na.get_num_threads()
    1
    >>> na.set_num_threads(before)
    """
    _use_num_threads(_checks.thread_count("num_threads", num_threads), "set_num_threads")


def get_num_threads() -> int:
    """Return the number of threads for calls without ``num_threads``.

    Returns
    -------
    int
        The number of threads, including the calling thread.

    See Also
    --------
    set_num_threads : set the number; its Notes describe the default.

    Examples
    --------
    >>> import numattn as na
    >>> na.get_num_threads() >= 1
    True
    """
    return _num_threads if native is None else int(native.get_default_num_threads())


def _use_num_threads(number: int, reason: str) -> None:
    global _num_threads, _num_threads_reason
    _num_threads, _num_threads_reason = number, reason
    if native is not None:
        native.set_default_num_threads(number)


_num_threads: int
_num_threads_reason: str
_use_num_threads(*_initial_num_threads())


def runtime_info() -> dict[str, Any]:
    """Return what numattn runs on in this process.

    Returns
    -------
    dict
        A dict with these keys:

        - ``version``: the version of numattn ("0+unknown" for a copy of the package without its
          metadata);
        - ``python``, ``numpy``: the versions of Python and NumPy;
        - ``backend``, ``backend_reason``: "native" or "numpy", and why;
        - ``isa``: a dict of the levels ``built``, the levels ``available`` on this CPU, the level
          ``chosen`` (None for the NumPy backend) and the ``reason``;
        - ``dtypes``: the dtypes that `attention` takes;
        - ``cpu``: the name of the CPU;
        - ``cpus``: the number of CPUs that this process may use, by its affinity and its
          container's CPU quota;
        - ``num_threads``, ``num_threads_reason``: the default number of threads, and why.

    See Also
    --------
    show_runtime : print this information.

    Examples
    --------
    >>> import numattn as na
    >>> na.runtime_info()["backend"] in ("native", "numpy")
    True
    """
    levels = {} if native is None else native.isa_names()
    return {
        "version": __version__,
        "python": platform.python_version(),
        "numpy": np.__version__,
        "backend": backend,
        "backend_reason": backend_reason,
        "isa": {
            "built": list(levels),
            "available": [name for name, available in levels.items() if available],
            "chosen": None if native is None else native.isa(),
            "reason": isa_reason,
        },
        "dtypes": list(_checks.ACCEPTED_DTYPES),
        "cpu": (platform.processor() or platform.machine())
        if native is None
        else native.cpu_name(),
        "cpus": _cpus.usable()[0],
        "num_threads": get_num_threads(),
        "num_threads_reason": _num_threads_reason,
    }


def show_runtime() -> None:
    """Print what numattn runs on in this process.

    See Also
    --------
    runtime_info : return the same information as a dict.

    Examples
    --------
    >>> import numattn as na
    >>> na.show_runtime()  # doctest: +ELLIPSIS
    numattn ...
    """
    info = runtime_info()
    isa = info["isa"]
    lines = [
        f"numattn {info['version']}, Python {info['python']}, NumPy {info['numpy']}",
        f"backend   {info['backend']} ({info['backend_reason']})",
        f"ISA level {isa['chosen'] or '-'} ({isa['reason']})",
        f"          built: {', '.join(isa['built']) or '-'}",
        f"          available here: {', '.join(isa['available']) or '-'}",
        f"dtypes    {', '.join(info['dtypes'])}",
        f"CPU       {info['cpu']}, {info['cpus']} usable",
        f"threads   {info['num_threads']} ({info['num_threads_reason']})",
    ]
    sys.stdout.write("\n".join(lines) + "\n")
