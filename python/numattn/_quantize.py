"""Keys and values in 8 bits."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from ._checks import ACCEPTED_DTYPES, as_array, dtype_name, is_accepted, refuse, refuse_kind

if TYPE_CHECKING:
    from numpy.typing import ArrayLike, NDArray

# 127 times it is still a number of float32.
_LARGEST_SCALE = np.nextafter(np.finfo(np.float32).max / np.float32(127), np.float32(0))


def quantize_kv(x: ArrayLike) -> tuple[NDArray[np.int8], NDArray[np.float32]]:
    """Round keys or values to 8 bits, with a scale for each token and head.

    Parameters
    ----------
    x : array_like, shape (..., D)
        Keys or values of float16, bfloat16, float32 or float64; every vector along the last axis
        gets a scale of its own.

    Returns
    -------
    numbers : ndarray of int8, shape of `x`
        From -127 to 127.
    scale : ndarray of float32, shape ``x.shape[:-1]``
        ``numbers * scale[..., None]`` is near `x`: within half a scale, which is the largest size
        in a vector over 127. Vectors of nothing above 1e-36 lose more, being scaled by numbers that
        float32 has few digits for.

    Raises
    ------
    TypeError
        If `x` is of another dtype.
    ValueError
        If a number is NaN or infinite, or too large for a scale of float32.

    See Also
    --------
    attention, KVCache

    Examples
    --------
    >>> import numpy as np
    >>> import numattn as na
    >>> numbers, scale = na.quantize_kv(np.array([[1.0, -0.5], [0.0, 0.0]]))
    >>> numbers
    array([[127, -64],
           [  0,   0]], dtype=int8)
    >>> (numbers * scale[:, None]).round(2)
    array([[ 1. , -0.5],
           [ 0. ,  0. ]], dtype=float32)
    """
    return quantize_named("x", x)


def quantize_named(name: str, x: ArrayLike) -> tuple[NDArray[np.int8], NDArray[np.float32]]:
    """Do what `quantize_kv` does for an argument of another name."""
    array = as_array(name, x)
    if not is_accepted(array.dtype) or array.ndim < 1:
        seen = f"{dtype_name(array)}, shape {array.shape}"
        refuse_kind(name, seen, "vectors of " + ", ".join(ACCEPTED_DTYPES))
    with np.errstate(all="ignore"):
        wide = array.astype(np.float64 if array.dtype == np.float64 else np.float32, copy=False)
        largest = np.abs(wide).max(axis=-1, initial=0)
        if not np.all(largest <= np.finfo(np.float32).max):
            where = tuple(map(int, np.argwhere(~(largest <= np.finfo(np.float32).max))[0]))
            refuse(name, f"{largest[where]} in the vector at {where}", "finite numbers of float32")
        scale = np.minimum((largest / 127).astype(np.float32), _LARGEST_SCALE)
        divisor = np.where(scale == 0, np.float32(1), scale)[..., np.newaxis]
        numbers = np.clip(np.rint(wide / divisor), -127, 127).astype(np.int8)
        return numbers, scale
