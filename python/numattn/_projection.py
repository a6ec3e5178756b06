"""Products of rows with the matrices of a model, forward and backward.

Rows are arrays (rows, elements); a matrix is (elements in, elements out).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Array = NDArray[Any]


def project(
    rows: Array, weight: Array, bias: Array | None = None, out: Array | None = None
) -> Array:
    """Return ``rows @ weight + bias``."""
    product: Array = np.matmul(rows, weight, out=out)
    if bias is not None:
        product += bias
    return product


def project_back(d: Array, weight: Array) -> Array:
    """Return the gradient with respect to the rows: ``d @ weight.T``."""
    product: Array = np.matmul(d, weight.T)
    return product


def weight_gradient(rows: Array, d: Array) -> Array:
    """Return the gradient with respect to the matrix: ``rows.T @ d``."""
    product: Array = np.matmul(rows.T, d)
    return product


def bias_gradient(d: Array) -> Array:
    """Return the sum of the rows, added up in the order of a product with a matrix."""
    total: Array = np.matmul(np.ones(len(d), d.dtype), d)
    return total
