"""Calls of a user's function of queries and keys."""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np

from ._checks import dtype_name, kind_of, refuse, refuse_kind

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray

    Array = NDArray[Any]
    MaskMod = Callable[[Array, Array, Array, Array], Any]


class MaskFunction:
    """A ``mask_mod(batch, head, q, k)``, called for one part of the mask at a time."""

    def __init__(self, mask_mod: MaskMod) -> None:
        _check_parameters(mask_mod)
        self._mask_mod = mask_mod
        # Rows of tiles have the same keys: making the indices again would take a tenth of the time.
        self._indices = lru_cache(maxsize=64)(_indices)

    def bools(self, place: tuple[slice, ...]) -> Array:
        """Call it for some batch items, heads, queries and keys."""
        indices = [self._indices(part.start, part.stop, axis) for axis, part in enumerate(place)]
        try:
            said = self._mask_mod(*indices)
        except Exception as error:
            error.add_note(_NOTE)
            raise
        return _checked(said, tuple(part.stop - part.start for part in place))


def _check_parameters(mask_mod: MaskMod) -> None:
    import inspect  # here: importing numattn does not need it

    try:
        signature = inspect.signature(mask_mod)
    except (TypeError, ValueError):  # some callables have no signature
        return
    try:
        signature.bind(*range(4))
    except TypeError:
        refuse_kind("mask_mod", f"a function of {signature}", "one of (batch, head, q, k)")


def _checked(said: object, shape: tuple[int, ...]) -> Array:
    if not isinstance(said, (np.ndarray, np.bool_, bool)):
        refuse_kind("mask_mod", f"{kind_of(said)} as its result", "an array of bool")
    attends = np.asarray(said)
    if attends.dtype != np.bool_:
        seen = f"{dtype_name(attends)} as its result"
        refuse_kind("mask_mod", seen, "bool (True = attend)")
    # A result with fewer axes would fit only by chance, if there are as many queries as keys.
    fits = attends.ndim in (0, 4) and all(
        n in (1, wanted) for n, wanted in zip(attends.shape, shape, strict=False)
    )
    if not fits:
        expected = f"four axes that broadcast to {shape}, as `batch`, `head`, `q` and `k` do"
        advice = "it is called for a part of the mask at a time: write `pad[k]` instead of `pad`"
        refuse("mask_mod", f"shape {attends.shape} as its result", expected, advice)
    return np.broadcast_to(attends, shape)


_NOTE = (
    "mask_mod(batch, head, q, k) gets NumPy arrays: combine comparisons with `&`, `|`, `~` and "
    "`np.where` instead of `and`, `or`, `not` and `if`, and index NumPy arrays instead of tensors"
)


class _Indices(np.ndarray):
    """64-bit indices. Comparisons between them use 32 bits, which is three times as fast.

    All other operations use 64 bits and return plain arrays.
    """

    _narrow: Array | None

    def __array_finalize__(self, other: object) -> None:
        self._narrow = None

    def __array_ufunc__(self, ufunc: np.ufunc, method: str, *inputs: Any, **options: Any) -> Any:
        if ufunc in _COMPARISONS and method == "__call__" and not options:
            one, other = (getattr(x, "_narrow", None) for x in inputs)
            if one is not None and other is not None:
                return ufunc(one, other)
        if "out" in options:
            options["out"] = tuple(map(_plain, options["out"]))
        return getattr(ufunc, method)(*map(_plain, inputs), **options)


def _plain(x: Any) -> Any:
    return x.view(np.ndarray) if isinstance(x, _Indices) else x


_COMPARISONS = (np.less, np.less_equal, np.greater, np.greater_equal, np.equal, np.not_equal)


def _indices(begin: int, end: int, axis: int) -> _Indices:
    """Return indices along one of four axes."""
    wide = np.arange(begin, end).reshape((1,) * axis + (-1,) + (1,) * (3 - axis))
    indices = wide.view(_Indices)
    if end < 2**31:
        indices._narrow = wide.astype(np.int32)
    indices.setflags(write=False)  # both arrays must stay equal
    return indices
