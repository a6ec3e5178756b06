"""The feed-forward network of a block: each token by itself, through two or three matrices."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from ._activations import ACTIVATIONS
from ._projection import bias_gradient, project, project_back, weight_gradient
from ._row_chunks import chunk_length, chunks

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from numpy.typing import NDArray

    Array = NDArray[Any]


class Inner(NamedTuple):
    """What the first matrices give, (rows, hidden_dim)."""

    up: Array
    gate: Array | None

    @property
    def activated(self) -> Array:
        """What the activation is applied to."""
        return self.up if self.gate is None else self.gate


class FeedForward(NamedTuple):
    """``down(f(up(x)))``, or, gated, ``down(f(gate(x)) * up(x))``."""

    activation: str
    is_gated: bool
    parameters: Mapping[str, Array]

    def __call__(self, rows: Array) -> Array:
        inner = self.inner(rows)
        return self._project("down", self._hidden(inner, inner.activated))

    def inner(self, rows: Array) -> Inner:
        return Inner(
            self._project("up", rows), self._project("gate", rows) if self.is_gated else None
        )

    def of_inner(self, inner: Inner) -> Array:
        """Return the result, and leave `inner` as it is."""
        return self._project("down", self._hidden(inner, np.empty_like(inner.up)))

    def take_back(self, d: Array, rows: Array, inner: Inner, found: dict[str, Array]) -> Array:
        """Return the gradient with respect to the rows; add the parameters' to `found`."""
        d_up = project_back(d, self.parameters["down_weight"])
        d_gate = None if inner.gate is None else np.empty_like(d_up)
        hidden = np.empty_like(d_up)
        # The activation is computed again rather than kept.
        for part, slope, *work in self._parts(inner.up, 1):
            values = hidden[part]
            ACTIVATIONS[self.activation].function(inner.activated[part], values, slope, work)
            if d_gate is not None:
                np.multiply(d_up[part], inner.up[part], out=d_gate[part])
                d_gate[part] *= slope
                d_up[part] *= values
                values *= inner.up[part]
            else:
                d_up[part] *= slope
        self._find("down", hidden, d, found)
        self._find("up", rows, d_up, found)
        d_rows = project_back(d_up, self.parameters["up_weight"])
        if d_gate is not None:
            self._find("gate", rows, d_gate, found)
            d_rows += project_back(d_gate, self.parameters["gate_weight"])
        return d_rows

    def _hidden(self, inner: Inner, out: Array) -> Array:
        """Write what goes into the last matrix to `out`, which may be what is activated."""
        for part, *work in self._parts(out, 0):
            values = out[part]
            ACTIVATIONS[self.activation].function(inner.activated[part], values, None, work)
            if self.is_gated:
                values *= inner.up[part]
        return out

    def _project(self, name: str, rows: Array) -> Array:
        bias = self.parameters.get(f"{name}_bias")
        return project(rows, self.parameters[f"{name}_weight"], bias)

    def _find(self, name: str, rows: Array, d: Array, found: dict[str, Array]) -> None:
        found[f"{name}_weight"] = weight_gradient(rows, d)
        if f"{name}_bias" in self.parameters:
            found[f"{name}_bias"] = bias_gradient(d)

    def _parts(self, rows: Array, more: int) -> Iterator[tuple[Any, ...]]:
        """Give chunks of rows, each with arrays to work with: the activation's, and more."""
        arrays = ACTIVATIONS[self.activation].work_arrays + more
        work = np.empty((arrays, chunk_length(rows), rows.shape[-1]), rows.dtype)
        for part in chunks(rows):
            yield (part, *work[:, : part.stop - part.start])
