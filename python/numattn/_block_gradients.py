"""The gradients of a block with respect to its input and parameters."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from ._checks import as_array, dtype_name, refuse, refuse_kind

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import ArrayLike, NDArray

    from ._feed_forward import FeedForward, Inner
    from ._layer_gradients import LayerGradients
    from ._norms import Norm

    Array = NDArray[Any]


class BlockGradients(NamedTuple):
    """Gradients with respect to the inputs and the parameters of a `TransformerBlock`.

    Attributes
    ----------
    x : ndarray
        With respect to `x`, in its shape.
    parameters : dict of ndarray
        With respect to the parameters, by the names of `TransformerBlock.parameters` and in their
        shapes.
    bias : ndarray or None
        With respect to the call's `bias`, in its shape; None unless ``bias_gradient=True``.
    sinks : ndarray or None
        With respect to the call's `sinks`, in their shape; None without sinks.

    See Also
    --------
    TransformerBlock.vjp : returns a function that computes them.

    Examples
    --------
    >>> import numpy as np
    >>> import numattn as na
    >>> block = na.TransformerBlock(8, 2, norm="rms", bias=False, rng=0)
    >>> out, vjp = block.vjp(np.ones((2, 3, 8), np.float32))
    >>> gradients = vjp(np.ones_like(out))
    >>> gradients.x.shape, list(gradients.parameters)[:3]
    ((2, 3, 8), ['norm1_weight', 'attention.q_weight', 'attention.k_weight'])
    """

    x: NDArray[Any]
    parameters: dict[str, NDArray[Any]]
    bias: NDArray[Any] | None
    sinks: NDArray[Any] | None


class Valid(NamedTuple):
    """Which tokens of (..., L, elements) are valid, not padding."""

    shape: tuple[int, ...]
    rows: Array | slice  # a bool array, or a slice of all rows

    def of(self, x: Array) -> Array:
        """Return the valid rows: a view if all are valid, else a copy."""
        rows: Array = x.reshape(-1, self.shape[-1])[self.rows]
        return rows

    def spread(self, rows: Array) -> Array:
        """Return an array of the full shape, with 0 for padding."""
        if isinstance(self.rows, slice):
            return rows.reshape(self.shape)
        out = np.zeros(self.shape, rows.dtype)
        out.reshape(-1, self.shape[-1])[self.rows] = rows
        return out


class Call(NamedTuple):
    """What a call of a block keeps for its gradients. Arrays have only the valid rows."""

    names: tuple[str, ...]
    norm_first: bool
    norms: tuple[Norm, Norm]
    feed_forward: FeedForward
    valid: Valid
    into_norms: tuple[Array, Array]
    into_feed_forward: Array
    inner: Inner
    take_attention_back: Callable[[ArrayLike], LayerGradients]


def differentiate(call: Call, dout: ArrayLike) -> BlockGradients:
    found: dict[str, Array] = {}
    d = _checked(call, dout)
    with np.errstate(all="ignore"):
        if call.norm_first:
            of_branch = _take_feed_forward_back(call, d, found)
            _take_norm_back(call, 1, of_branch, found)
            d += of_branch
        else:
            _take_norm_back(call, 1, d, found)
            d += _take_feed_forward_back(call, d, found)
            _take_norm_back(call, 0, d, found)
        of_attention = call.take_attention_back(call.valid.spread(d))
        of_branch = call.valid.of(of_attention.x)
        if call.norm_first:
            _take_norm_back(call, 0, of_branch, found)
        d += of_branch
    found |= {f"attention.{name}": x for name, x in of_attention.parameters.items()}
    return BlockGradients(
        call.valid.spread(d),
        {name: found[name] for name in call.names},
        of_attention.bias,
        of_attention.sinks,
    )


def _checked(call: Call, dout: ArrayLike) -> Array:
    """Return a copy of the valid rows of `dout`."""
    array = as_array("dout", dout)
    dtype = call.into_feed_forward.dtype
    if array.dtype != dtype:
        refuse_kind("dout", dtype_name(array), f"{dtype.name}, the dtype of the block")
    if array.shape != call.valid.shape:
        refuse("dout", f"shape {array.shape}", f"{call.valid.shape}, the shape of out")
    return np.array(call.valid.of(array), order="C")


def _take_feed_forward_back(call: Call, d: Array, found: dict[str, Array]) -> Array:
    return call.feed_forward.take_back(d, call.into_feed_forward, call.inner, found)


def _take_norm_back(call: Call, which: int, d: Array, found: dict[str, Array]) -> None:
    """Turn gradients of a norm's results into the gradients of its input, in place."""
    of_weight, of_bias = call.norms[which].take_back(d, call.into_norms[which])
    found[f"norm{which + 1}_weight"] = of_weight
    if of_bias is not None:
        found[f"norm{which + 1}_bias"] = of_bias
