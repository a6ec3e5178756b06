"""Products of rows with the matrices of a model, forward and backward.

Rows are arrays (rows, elements), and a matrix is (elements in, elements out). 16-bit floats are
summed in float32, and a result is rounded once, or not at all if `out` is float32.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from . import _runtime

if TYPE_CHECKING:
    from collections.abc import Iterable

    from numpy.typing import NDArray

    from ._rotary import Rotation

    Array = NDArray[Any]


class Product(NamedTuple):
    """``out = x @ weight + bias``, followed by a rotation of the heads of each row.

    `cos` and `sin` of the rotation have two axes. Their rows repeat if the product has more rows.
    """

    x: Array
    weight: Array
    bias: Array | None
    out: Array
    rotation: Rotation | None = None
    head_dim: int = 0


def compute(products: Iterable[Product], num_threads: int | None = None) -> None:
    """Compute several products, of arrays with one dtype, in one call."""
    with_steps = []
    for product in products:
        if product.x.shape[1] == 0:
            product.out[...] = 0 if product.bias is None else product.bias
        elif product.out.size > 0:
            with_steps.append(product)
    if with_steps:
        _runtime.computations.multiply(with_steps, num_threads)


def project(
    rows: Array,
    weight: Array,
    bias: Array | None = None,
    out: Array | None = None,
    num_threads: int | None = None,
) -> Array:
    """Return ``rows @ weight + bias``."""
    if out is None:
        out = np.empty((len(rows), weight.shape[1]), rows.dtype)
    compute([Product(rows, weight, bias, out)], num_threads)
    return out


def project_back(
    d: Array, weight: Array, out: Array | None = None, num_threads: int | None = None
) -> Array:
    """Return the gradient with respect to the rows: ``d @ weight.T``."""
    return project(d, weight.T, None, out, num_threads)


def weight_gradient(rows: Array, d: Array, num_threads: int | None = None) -> Array:
    """Return the gradient with respect to the matrix: ``rows.T @ d``."""
    return project(rows.T, d, num_threads=num_threads)


def bias_gradient(d: Array, num_threads: int | None = None) -> Array:
    """Return the sum of the rows, added in the same order as in a product with a matrix."""
    rows = project(np.ones((1, len(d)), d.dtype), d, num_threads=num_threads)
    return rows.reshape(-1)
