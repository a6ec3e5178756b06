"""The feed-forward network of a block: each token passes through two or three matrices."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from . import _runtime
from ._checks import precision_of
from ._projection import (
    Product,
    bias_gradient,
    compute,
    project,
    project_back,
    weight_gradient,
)
from ._workspace import Workspace

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from numpy.typing import NDArray

    Array = NDArray[Any]


class Inner(NamedTuple):
    """The products with the first matrices, (rows, hidden_dim)."""

    up: Array
    gate: Array | None

    @property
    def activated(self) -> Array:
        """The array that the activation is applied to."""
        return self.up if self.gate is None else self.gate

    @property
    def times(self) -> Array | None:
        """The array that the activation's values are multiplied by, None without a gate."""
        return None if self.gate is None else self.up


class FeedForward(NamedTuple):
    """``down(f(up(x)))`` or, if gated, ``down(f(gate(x)) * up(x))``."""

    activation: str
    is_gated: bool
    parameters: Mapping[str, Array]
    num_threads: int | None = None

    def __call__(self, rows: Array) -> Array:
        with Workspace() as workspace:
            inner = self.inner(rows, workspace.empty)
            return self._down(self._hidden(inner, inner.activated))

    def inner(
        self, rows: Array, empty: Callable[[tuple[int, ...], np.dtype[Any]], Array] = np.empty
    ) -> Inner:
        """Return the products with the first matrices, in arrays that `empty` makes."""
        shape = (len(rows), self.parameters["up_weight"].shape[1])
        names = ("up", "gate") if self.is_gated else ("up",)
        made = {name: empty(shape, rows.dtype) for name in names}
        products = [Product(rows, *self._matrix(name), out) for name, out in made.items()]
        compute(products, self.num_threads)
        return Inner(made["up"], made.get("gate"))

    def of_inner(self, inner: Inner) -> Array:
        """Return the result, and leave `inner` unchanged."""
        return self._down(self._hidden(inner, np.empty_like(inner.up)))

    def take_back(self, d: Array, rows: Array, inner: Inner, found: dict[str, Array]) -> Array:
        """Return the gradient with respect to the rows; put parameter gradients into `found`."""
        d_up = self._back("down", d)
        d_gate = None if inner.gate is None else np.empty_like(d_up)
        hidden = np.empty_like(d_up)
        # The activation is computed again instead of being kept.
        _runtime.computations.activate_back(
            self.activation, d_up, inner.activated, inner.times, hidden,
            d_up if d_gate is None else d_gate, None if d_gate is None else d_up,
            self.num_threads,
        )  # fmt: skip
        self._find("down", hidden, d, found)
        self._find("up", rows, d_up, found)
        if d_gate is None:
            return self._back("up", d_up)
        self._find("gate", rows, d_gate, found)
        # Sum both branches before rounding once.
        of_up, of_gate = np.empty((2, *rows.shape), precision_of(rows.dtype))
        self._back("up", d_up, of_up)
        of_up += self._back("gate", d_gate, of_gate)
        d_rows: Array = of_up.astype(rows.dtype, copy=False)
        return d_rows

    def _hidden(self, inner: Inner, out: Array) -> Array:
        """Write the input of the last matrix to `out`, which may be the activation's input."""
        _runtime.computations.activate(
            self.activation, inner.activated, inner.times, out, self.num_threads
        )
        return out

    def _down(self, hidden: Array) -> Array:
        return project(hidden, *self._matrix("down"), num_threads=self.num_threads)

    def _matrix(self, name: str) -> tuple[Array, Array | None]:
        """Return a matrix and its bias."""
        return self.parameters[f"{name}_weight"], self.parameters.get(f"{name}_bias")

    def _back(self, name: str, d: Array, out: Array | None = None) -> Array:
        return project_back(d, self.parameters[f"{name}_weight"], out, self.num_threads)

    def _find(self, name: str, rows: Array, d: Array, found: dict[str, Array]) -> None:
        found[f"{name}_weight"] = weight_gradient(rows, d, self.num_threads)
        if f"{name}_bias" in self.parameters:
            found[f"{name}_bias"] = bias_gradient(d, self.num_threads)
