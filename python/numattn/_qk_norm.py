"""The root-mean-square norm, for queries and keys and for a block's norms, and its gradient.

`normalize` and `take_back` are the norm of queries and keys, in any dtype. The other functions are
parts of norms, in float32 or float64.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from ._projection import bias_gradient
from ._row_chunks import chunks, precision_of, put_back, widened

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Array = NDArray[Any]


def normalize(vectors: Array, weight: Array, epsilon: float) -> None:
    """Divide vectors (..., heads, dim) by their root mean squares, times `weight`, in place.

    All axes but the last two are one in memory, as the results of a product with a matrix are.
    """
    rows, weight = vectors.reshape(-1, *vectors.shape[-2:]), widened(weight)
    for part in chunks(rows):
        computed = widened(rows[part])
        divide_by_root_mean_square(computed, epsilon)
        computed *= weight
        put_back(computed, rows[part])


def take_back(d: Array, vectors: Array, weight: Array, epsilon: float) -> Array:
    """Turn gradients `d` with respect to `normalize` into those of its vectors, in place.

    Both are (rows, heads, dim); `vectors` may be overwritten. Return the gradient of the weight.
    """
    of_weight = np.zeros(weight.shape, precision_of(weight.dtype))
    wide_weight = widened(weight)
    for part in chunks(d):
        computed = widened(d[part])
        products = take_norm_back(computed, widened(vectors[part]), wide_weight, epsilon)
        of_weight += bias_gradient(products.reshape(-1, weight.size))
        put_back(computed, d[part])
    return of_weight.astype(weight.dtype, copy=False)


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
