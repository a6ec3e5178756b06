"""Products of rows with the matrices of a model, forward and backward.

Rows are arrays (rows, elements); a matrix is (elements in, elements out). 16-bit floats are added
up in float32, and a result is rounded once, or not at all where `out` is float32.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from ._row_chunks import widened

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Array = NDArray[Any]


def project(
    rows: Array, weight: Array, bias: Array | None = None, out: Array | None = None
) -> Array:
    """Return ``rows @ weight + bias``."""
    return _product(rows, weight, bias, out)


def project_back(d: Array, weight: Array, out: Array | None = None) -> Array:
    """Return the gradient with respect to the rows: ``d @ weight.T``."""
    return _product(d, weight.T, None, out)


def weight_gradient(rows: Array, d: Array) -> Array:
    """Return the gradient with respect to the matrix: ``rows.T @ d``."""
    return _product(rows.T, d)


def bias_gradient(d: Array) -> Array:
    """Return the sum of the rows, added up in the order of a product with a matrix."""
    return _product(np.ones(len(d), d.dtype), d)


def _product(a: Array, b: Array, bias: Array | None = None, out: Array | None = None) -> Array:
    wide_a, wide_b = widened(a), widened(b)
    in_place = out is not None and out.dtype == wide_a.dtype
    product: Array = np.matmul(wide_a, wide_b, out=out if in_place else None)
    if bias is not None:
        product += bias
    if out is None:
        return product.astype(a.dtype, copy=False)
    if not in_place:
        out[...] = product
    return out
