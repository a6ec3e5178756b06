"""The norms of a block, of whole embeddings, and their gradients."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from ._projection import bias_gradient
from ._qk_norm import divide_by_root, divide_by_root_mean_square, scale_down, take_norm_back
from ._row_chunks import chunks, put_back, widened

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Array = NDArray[Any]


class Norm(NamedTuple):
    """A root-mean-square norm, or LayerNorm, which takes the mean away first."""

    is_centred: bool
    epsilon: float
    weight: Array
    bias: Array | None

    def apply(self, rows: Array, out: Array) -> Array:
        """Write the rows, normalized, to `out`, which may be `rows`; return it."""
        weight = widened(self.weight)
        bias = None if self.bias is None else widened(self.bias)
        for part in chunks(rows):
            vectors = widened(out[part])
            if out is not rows:
                vectors[...] = rows[part]
            if self.is_centred:
                divide_by_root(vectors, self._epsilon_times(_centre(vectors) ** 2))
            else:
                divide_by_root_mean_square(vectors, self.epsilon)
            vectors *= weight
            if bias is not None:
                vectors += bias
            put_back(vectors, out[part])
        return out

    def take_back(self, d: Array, rows: Array) -> tuple[Array, Array | None]:
        """Turn gradients `d` with respect to results into the rows' gradients, in place.

        Return the gradients of the weight and of the bias.
        """
        weight = widened(self.weight)
        of_weight = np.zeros(weight.shape, weight.dtype)
        of_bias = None if self.bias is None else bias_gradient(d)
        for part in chunks(rows):
            vectors, d_part = rows[part].astype(weight.dtype), widened(d[part])
            if self.is_centred:
                scale = _centre(vectors)
                epsilon = self._epsilon_times(scale**2)
                products = take_norm_back(d_part, vectors, weight, epsilon)
                d_part *= scale
                d_part -= np.mean(d_part, axis=-1, keepdims=True)
            else:
                products = take_norm_back(d_part, vectors, weight, self.epsilon)
            of_weight += bias_gradient(products)
            put_back(d_part, d[part])
        return of_weight.astype(self.weight.dtype, copy=False), of_bias

    def _epsilon_times(self, factors: Array) -> Array:
        scaled: Array = factors.dtype.type(self.epsilon) * factors
        return scaled


def _centre(vectors: Array) -> Array:
    """Take the mean of each vector away, in place; return the power of two it was multiplied by."""
    scale = scale_down(vectors)
    vectors -= np.mean(vectors, axis=-1, keepdims=True)
    return scale
