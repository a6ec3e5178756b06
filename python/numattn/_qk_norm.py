"""The root-mean-square norm of queries and keys (..., heads, dim), and its gradient."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from ._norms import Norm

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Array = NDArray[Any]


def normalize(
    vectors: Array, weight: Array, epsilon: float, num_threads: int | None = None
) -> None:
    """Divide vectors by their root mean squares, times `weight`, in place."""
    computed = np.ascontiguousarray(vectors)
    Norm(False, epsilon, weight, None, num_threads).apply(computed, computed)
    if computed is not vectors:
        vectors[...] = computed


def take_back(
    d: Array, vectors: Array, weight: Array, epsilon: float, num_threads: int | None = None
) -> Array:
    """Turn gradients `d` with respect to `normalize` into those of its vectors, in place.

    Return the gradient of the weight.
    """
    computed = np.ascontiguousarray(d)
    of_weight, _ = Norm(False, epsilon, weight, None, num_threads).take_back(computed, vectors)
    if computed is not d:
        d[...] = computed
    return of_weight
