"""Norms of a block's rows, and of queries and keys, with their gradients."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from . import _runtime

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Array = NDArray[Any]


class Norm(NamedTuple):
    """A root-mean-square norm, or LayerNorm, which subtracts the mean first."""

    is_centred: bool
    epsilon: float
    weight: Array
    bias: Array | None = None
    num_threads: int | None = None

    def apply(self, rows: Array, out: Array, add: Array | None = None) -> Array:
        """Write the rows of the last axis, normalized, to `out`, which may be `rows`; return it.

        `add` is added to the rows in place first.
        """
        assert add is None or rows.flags.c_contiguous
        _runtime.computations.normalize(
            rows if add is not None else np.ascontiguousarray(rows),
            None if add is None else np.ascontiguousarray(add),
            self.weight, self.bias, self.epsilon, self.is_centred, out, self.num_threads,
        )  # fmt: skip
        return out

    def take_back(self, d: Array, rows: Array) -> tuple[Array, Array | None]:
        """Turn gradients `d` with respect to results into the rows' gradients, in place.

        Return the gradients of the weight and of the bias.
        """
        of_weight = np.empty_like(self.weight)
        of_bias = None if self.bias is None else np.empty_like(self.bias)
        _runtime.computations.normalize_back(
            d, np.ascontiguousarray(rows), self.weight, self.epsilon, self.is_centred,
            of_weight, of_bias, self.num_threads,
        )  # fmt: skip
        return of_weight, of_bias
