"""What a function says of pairs of queries and keys."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from ._checks import dtype_name, refuse, refuse_kind

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray

    Array = NDArray[Any]
    MaskMod = Callable[[Array, Array, Array, Array], Any]


def bools_of(mask_mod: MaskMod, place: tuple[slice, ...]) -> Array:
    """Return what a ``mask_mod(batch, head, q, k)`` says of batch items, heads, queries, keys."""
    indices = [
        np.arange(part.start, part.stop).reshape((1,) * axis + (-1,) + (1,) * (3 - axis))
        for axis, part in enumerate(place)
    ]
    said = mask_mod(*indices)
    if not isinstance(said, (np.ndarray, np.bool_, bool)):
        refuse_kind("mask_mod", f"{type(said).__name__} from it", "an array of bools")
    attends = np.asarray(said)
    if attends.dtype != np.bool_:
        refuse_kind("mask_mod", f"{dtype_name(attends)} from it", "bool, True = attend")
    shape = tuple(part.stop - part.start for part in place)
    if attends.shape == shape:
        return attends
    try:
        return np.broadcast_to(attends, shape)
    except ValueError:
        expected = f"one that broadcasts to {shape}, as the indices do"
        refuse("mask_mod", f"shape {attends.shape} from it", expected)
