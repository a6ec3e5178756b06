"""Arrays that live for one call; the next call reuses their memory.

New arrays of this size need new pages from the system. Making and clearing the pages of q, k, v and
attention's result takes a twentieth of a layer's time.
"""

from __future__ import annotations

import math
import threading
import weakref
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

_MOST_BYTES = 64 * 1024 * 1024  # the most that a thread keeps
_FEW_BYTES = 128 * 1024  # up to this size malloc needs no new pages
_SMALL_USES = 16
_ALIGNMENT = 64


class _Kept(threading.local):
    def __init__(self) -> None:
        self.memory: NDArray[Any] = np.empty(0, np.uint8)
        self.bytes = 0  # the size that the next owner needs
        self.small_uses = 0  # uses in a row that needed little of it
        self.owner: weakref.ref[Workspace] | None = None


_kept = _Kept()


class Workspace:
    """A maker of arrays in a ``with`` statement; the arrays must not be used after it.

    A thread keeps as much memory as one of its calls needed, up to a limit, until several uses in a
    row need a quarter of it or less. The memory is not released sooner, because a model's steps
    alternate: attention and feed-forward network, a prompt and single tokens.
    """

    def __enter__(self) -> Workspace:
        self._memory: NDArray[Any] | None = None
        self._wanted = 0
        return self

    def __exit__(self, *_: object) -> None:
        owner = _owner()
        if owner is not None and owner is not self:  # another workspace is still in use
            return
        _kept.owner = None
        _kept.bytes = max(_kept.bytes, min(self._wanted, _MOST_BYTES))
        is_small = self._wanted <= _kept.bytes // 4
        _kept.small_uses = _kept.small_uses + 1 if is_small else 0
        if _kept.small_uses == _SMALL_USES:
            _kept.memory, _kept.bytes, _kept.small_uses = np.empty(0, np.uint8), 0, 0

    def empty(self, shape: tuple[int, ...], dtype: np.dtype[Any]) -> NDArray[Any]:
        """Return an array whose elements are not set."""
        size = math.prod(shape) * dtype.itemsize
        if size <= _FEW_BYTES:
            return np.empty(shape, dtype)
        if self._memory is None:
            self._memory = self._take()
        begin = self._wanted + -(self._memory.ctypes.data + self._wanted) % _ALIGNMENT
        self._wanted += size + _ALIGNMENT
        if begin + size > self._memory.size:
            return np.empty(shape, dtype)
        return self._memory[begin : begin + size].view(dtype).reshape(shape)

    def _take(self) -> NDArray[Any]:
        # There is another owner if a signal handler calls numattn during a computation. An owner
        # that ended with an exception is gone.
        if _owner() is not None:
            return np.empty(0, np.uint8)
        _kept.owner = weakref.ref(self)
        if _kept.memory.size != _kept.bytes:
            try:
                _kept.memory = np.empty(_kept.bytes, np.uint8)
            except MemoryError:
                _kept.memory, _kept.bytes = np.empty(0, np.uint8), 0
        return _kept.memory


def _owner() -> Workspace | None:
    return None if _kept.owner is None else _kept.owner()
