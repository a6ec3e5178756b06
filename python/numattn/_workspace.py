"""Arrays that live for one call and share their memory with the next one's.

Fresh arrays of this size are fresh pages: making and clearing those of q, k, v and attention's
result takes a twentieth of a layer's time.
"""

from __future__ import annotations

import math
import threading
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

_MOST_BYTES = 64 * 1024 * 1024  # that a thread keeps
_FEW_BYTES = 128 * 1024  # which malloc has without fresh pages
_ALIGNMENT = 64


class _Kept(threading.local):
    def __init__(self) -> None:
        self.memory: NDArray[Any] = np.empty(0, np.uint8)
        self.bytes = 0  # that the next call should find there
        self.is_in_use = False


_kept = _Kept()


class Workspace:
    """Makes arrays, until the end of a ``with`` statement: nothing may keep them longer.

    A thread keeps as much memory as its last call needed, up to a limit. It gives memory back when
    a call needs a quarter of it or less.
    """

    def __enter__(self) -> Workspace:
        # A signal handler that computes during a computation gets fresh arrays.
        self._is_owner = not _kept.is_in_use
        if self._is_owner and _kept.memory.size != _kept.bytes:
            _kept.memory = np.empty(_kept.bytes, np.uint8)
        self._memory = _kept.memory if self._is_owner else np.empty(0, np.uint8)
        self._wanted = 0
        _kept.is_in_use = True
        return self

    def __exit__(self, *_: object) -> None:
        if not self._is_owner:
            return
        _kept.is_in_use = False
        wanted = min(self._wanted, _MOST_BYTES)
        if wanted > self._memory.size:
            _kept.bytes = wanted
        elif wanted <= self._memory.size // 4:
            _kept.memory, _kept.bytes = np.empty(0, np.uint8), 0

    def empty(self, shape: tuple[int, ...], dtype: np.dtype[Any]) -> NDArray[Any]:
        """Return an array whose elements are not set."""
        size = math.prod(shape) * dtype.itemsize
        if size <= _FEW_BYTES:
            return np.empty(shape, dtype)
        begin = self._wanted + -(self._memory.ctypes.data + self._wanted) % _ALIGNMENT
        self._wanted += size + _ALIGNMENT
        if begin + size > self._memory.size:
            return np.empty(shape, dtype)
        return self._memory[begin : begin + size].view(dtype).reshape(shape)
