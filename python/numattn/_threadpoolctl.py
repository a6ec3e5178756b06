"""What threadpoolctl has to know, so that it lists and limits numattn's threads."""

from __future__ import annotations

import importlib.util
from pathlib import Path

from . import _runtime


def register() -> bool:
    """Make numattn known to threadpoolctl; return False where there is none, or no threads."""
    if _runtime.native is None or importlib.util.find_spec("threadpoolctl") is None:
        return False
    import threadpoolctl

    class Controller(threadpoolctl.LibController):  # type: ignore[misc]
        user_api = "numattn"
        internal_api = "numattn"
        # Other packages have a _core too, but not this symbol.
        filename_prefixes = (Path(_runtime.native.__file__ or "").name,)
        check_symbols = ("numattn_thread_pool",)

        def get_num_threads(self) -> int:
            return _runtime.get_num_threads()

        def set_num_threads(self, num_threads: int) -> None:
            _runtime.set_num_threads(num_threads)

        def get_version(self) -> str:
            return _runtime.__version__

    threadpoolctl.register(Controller)
    return True
