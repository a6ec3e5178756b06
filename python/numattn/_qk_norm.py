"""The root-mean-square norm, for queries and keys and for a block's norms, and its gradient."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Array = NDArray[Any]


def divide_by_root_mean_square(vectors: Array, epsilon: float | Array) -> tuple[Array, Array]:
    """Divide each vector of the last axis by its root mean square, in place.

    `epsilon` is added to the mean of the squares. Return the power of two that each is multiplied
    by, and what it is divided by after that.
    """
    scale = scale_down(vectors)
    return scale, divide_by_root(vectors, np.asarray(epsilon, vectors.dtype) * scale * scale)


def scale_down(vectors: Array) -> Array:
    """Multiply huge vectors by a power of two, in place, which makes their elements 1 at most.

    Squares of numbers beyond 1e19 overflow in float32; powers of two change no digit. Return what
    each vector is multiplied by, or one number for all.
    """
    limits = np.finfo(vectors.dtype)
    harmless = limits.maxexp // 2 - 16  # sums of 2^31 squares below 2^this do not overflow
    most = 2.0**harmless
    if -most < vectors.min(initial=0) and vectors.max(initial=0) < most:
        return np.ones((), vectors.dtype)
    largest = np.maximum(vectors.max(axis=-1, keepdims=True), -vectors.min(axis=-1, keepdims=True))
    _, exponents = np.frexp(largest)
    exponents[exponents <= harmless] = 0
    # The reciprocal of the largest power is a normal number.
    scale: Array = np.ldexp(vectors.dtype.type(1), -np.clip(exponents, 0, limits.maxexp - 2))
    vectors *= scale
    return scale


def divide_by_root(vectors: Array, epsilon: Array) -> Array:
    """Divide each vector by its root mean square, in place, and return this."""
    square = np.mean(np.square(vectors), axis=-1, keepdims=True)
    root: Array = np.sqrt(square + epsilon)
    vectors /= root
    return root


def take_norm_back(d: Array, vectors: Array, weight: Array, epsilon: float | Array) -> Array:
    """Turn gradients `d` with respect to a norm's results into its vectors' gradients, in place.

    Return products whose sum over all vectors is the gradient of the weight. `vectors` are
    overwritten.
    """
    scale, root = divide_by_root_mean_square(vectors, epsilon)
    of_weight = d * vectors
    d *= weight
    # Without what changes the length of a vector.
    vectors *= np.mean(d * vectors, axis=-1, keepdims=True)
    d -= vectors
    d /= root
    d *= scale
    return of_weight
