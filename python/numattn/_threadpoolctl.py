"""Registration with threadpoolctl, so that it lists and limits numattn's threads."""

from __future__ import annotations

import importlib
import importlib.util
from pathlib import Path
from typing import Any

from . import _runtime
from ._checks import MAX_THREADS


def register() -> bool:
    """Register numattn with threadpoolctl; return False without it, or without compiled kernels."""
    native = _runtime.native
    if native is None or importlib.util.find_spec("threadpoolctl") is None:
        return False
    try:
        threadpoolctl: Any = importlib.import_module("threadpoolctl")  # it has no types
        base: Any = threadpoolctl.LibController
        register_controller = threadpoolctl.register
    except Exception:  # older than 3.2, or broken: numattn must not fail because of it
        return False
    file_name = Path(native.__file__ or "").name

    class Controller(base):  # type: ignore[misc]
        user_api = "numattn"
        internal_api = "numattn"
        # Other packages have a _core too, but not this symbol.
        filename_prefixes = (file_name,)
        check_symbols = ("numattn_thread_pool",)

        def get_num_threads(self) -> int:
            return _runtime.get_num_threads()

        def set_num_threads(self, num_threads: int) -> None:
            _runtime.set_num_threads(min(max(num_threads, 1), MAX_THREADS))

        def get_version(self) -> str:
            return _runtime.__version__

    register_controller(Controller)
    return True
