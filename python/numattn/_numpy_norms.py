"""Norms of rows (the last axis) and their gradients, in NumPy."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from ._checks import precision_of
from ._numpy_blocks import quiet
from ._numpy_row_chunks import chunks, put_back, widened

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Array = NDArray[Any]


def normalize(
    x: Array, add: Array | None, weight: Array, bias: Array | None, epsilon: float,
    is_centred: bool, out: Array, num_threads: int | None = None,
) -> None:  # fmt: skip
    """Add `add` to `x` unless it is None, and fill `out`, which may be `x`, with normalized rows.

    Rows are divided by their root mean square. If `is_centred`, their mean is subtracted first.
    """
    del num_threads
    rows, to = (array.reshape(-1, x.shape[-1]) for array in (x, out))
    precision = precision_of(x.dtype)
    with quiet():
        if add is not None:
            x += add
        for part in chunks(rows):
            vectors = rows[part].astype(precision)
            _to_units(vectors, epsilon, is_centred)
            vectors *= widened(weight)
            if bias is not None:
                vectors += widened(bias)
            to[part] = vectors


def normalize_back(
    d: Array, x: Array, weight: Array, epsilon: float, is_centred: bool, of_weight: Array,
    of_bias: Array | None, num_threads: int | None = None,
) -> None:  # fmt: skip
    """Turn the gradient `d` with respect to the result of `normalize` into one for `x`, in place;
    also fill `of_weight` and, unless it is None, `of_bias`."""
    del num_threads
    rows, d_rows = (array.reshape(-1, x.shape[-1]) for array in (x, d))
    precision = precision_of(x.dtype)
    of_weights, of_biases = np.zeros((2, x.shape[-1]), precision)
    with quiet():
        for part in chunks(rows):
            vectors, d_part = rows[part].astype(precision), widened(d_rows[part])
            scale, root = _to_units(vectors, epsilon, is_centred)
            of_weights += (d_part * vectors).sum(axis=0)
            of_biases += d_part.sum(axis=0)
            d_part *= widened(weight)
            # Remove the component that changes the length of a vector.
            vectors *= np.mean(d_part * vectors, axis=-1, keepdims=True)
            d_part -= vectors
            d_part /= root
            d_part *= scale
            if is_centred:
                d_part -= np.mean(d_part, axis=-1, keepdims=True)
            put_back(d_part, d_rows[part])
        of_weight[...] = of_weights
        if of_bias is not None:
            of_bias[...] = of_biases


def _to_units(vectors: Array, epsilon: float, is_centred: bool) -> tuple[Array, Array]:
    """Divide each vector by its root mean square, in place; subtract its mean first if centred.

    `epsilon` is added to the mean of the squares. Return the power of two that each vector is
    multiplied by, and the number that it is divided by after that.
    """
    scale = _scale_down(vectors)
    if is_centred:
        vectors -= np.mean(vectors, axis=-1, keepdims=True)
    square = np.mean(np.square(vectors), axis=-1, keepdims=True)
    root: Array = np.sqrt(square + np.asarray(epsilon, vectors.dtype) * scale * scale)
    vectors /= root
    return scale, root


def _scale_down(vectors: Array) -> Array:
    """Multiply huge vectors by a power of two, in place, so that their elements are at most 1.

    Squares of numbers beyond 1e19 overflow in float32, and powers of two change no digits. Return
    the factor of each vector, or one factor for all.
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
