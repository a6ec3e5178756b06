"""The norm of a layer's queries and keys."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Array = NDArray[Any]

_EPSILON = 1e-6


def divide_by_root_mean_square(vectors: Array) -> None:
    """Divide each vector of the last axis by its root mean square, in place."""
    # Squares of numbers beyond 1e19 overflow in float32. Powers of two change no digit.
    largest = np.maximum(vectors.max(axis=-1, keepdims=True), -vectors.min(axis=-1, keepdims=True))
    _, exponents = np.frexp(largest)
    most = np.finfo(vectors.dtype).maxexp - 2  # whose reciprocal is a normal number
    scale = np.ldexp(vectors.dtype.type(1), -np.clip(exponents, 0, most))
    vectors *= scale
    square = np.mean(np.square(vectors), axis=-1, keepdims=True)
    vectors /= np.sqrt(square + vectors.dtype.type(_EPSILON) * scale * scale)
