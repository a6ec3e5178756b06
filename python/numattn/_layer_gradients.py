"""The gradients of a layer with respect to its inputs and parameters."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from ._checks import as_array, dtype_name, precision_of, refuse, refuse_kind
from ._norms import Norm
from ._projection import bias_gradient, project, project_back, weight_gradient

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from numpy.typing import ArrayLike, NDArray

    from ._gradients import Gradients
    from ._layer_arguments import Inputs

    Array = NDArray[Any]


class LayerGradients(NamedTuple):
    """Gradients with respect to the inputs and parameters of a `MultiHeadAttention`.

    Attributes
    ----------
    x : ndarray
        With respect to `x`, in its shape.
    context : ndarray, tuple of two ndarrays, or None
        With respect to the context, in its shape; a pair if the context was a pair, None without a
        context.
    parameters : dict of ndarray
        With respect to the parameters, by the names of `MultiHeadAttention.parameters` and in their
        shapes.
    bias : ndarray or None
        With respect to the `bias` of the call, in its shape and dtype; None unless
        ``bias_gradient=True``.
    sinks : ndarray, shape (heads,), or None
        As in `Gradients`; None without sinks.

    See Also
    --------
    MultiHeadAttention.vjp : returns a function that computes them.

    Examples
    --------
    >>> import numpy as np
    >>> import numattn as na
    >>> layer = na.MultiHeadAttention(8, 2, bias=False, rng=0)
    >>> out, vjp = layer.vjp(np.ones((2, 3, 8), np.float32))
    >>> gradients = vjp(np.ones_like(out))
    >>> gradients.x.shape, gradients.context is None, list(gradients.parameters)
    ((2, 3, 8), True, ['q_weight', 'k_weight', 'v_weight', 'o_weight'])
    """

    x: NDArray[Any]
    context: NDArray[Any] | tuple[NDArray[Any], NDArray[Any]] | None
    parameters: dict[str, NDArray[Any]]
    bias: NDArray[Any] | None
    sinks: NDArray[Any] | None


class Call(NamedTuple):
    """What a call of a layer keeps for its gradients."""

    parameters: Mapping[str, Array]  # the layer's own arrays
    norm_epsilon: float
    num_threads: int | None
    inputs: Inputs
    of_heads: Array  # (..., L, heads, value_dim), the result of attention
    take_attention_back: Callable[[Array], Gradients]


def differentiate(call: Call, dout: ArrayLike) -> LayerGradients:
    parameters, of = call.parameters, call.inputs.of
    dout = _like_out(call, dout)
    found: dict[str, Array] = {}
    with np.errstate(all="ignore"):
        d_rows, rows = _rows(dout, 1), _rows(call.of_heads, 2)
        d_heads = project_back(d_rows, parameters["o_weight"], num_threads=call.num_threads)
        # Queries that attend to nothing have a result of 0, so their `dout` does not count.
        some = _some(rows)
        found["o_weight"] = weight_gradient(rows[some], d_rows[some], call.num_threads)
        _find_bias(call, "o", d_rows, found)
    gradients = call.take_attention_back(d_heads.reshape(call.of_heads.shape))
    if call.inputs.rotation is not None:
        back = call.inputs.rotation.transposed()
        for d in (gradients.q, gradients.k):
            vectors = d.swapaxes(-3, -2)  # heads first
            back.apply(vectors, vectors, call.num_threads)
    # An array that is used several times has one sum. In 16 bits it is rounded once, at the end.
    dx = _zeros(of["q"])
    dkeys = dx if of["k"] is of["q"] else _zeros(of["k"])
    dvalues = dkeys if of["v"] is of["k"] else _zeros(of["v"])
    with np.errstate(all="ignore"):
        _take_product_back(call, "q", gradients.q, dx, found)
        _take_product_back(call, "k", gradients.k, dkeys, found)
        _take_product_back(call, "v", gradients.v, dvalues, found)
        dtype = dout.dtype
        of_x = dx.astype(dtype, copy=False)
        of_keys = of_x if dkeys is dx else dkeys.astype(dtype, copy=False)
        of_values = of_keys if dvalues is dkeys else dvalues.astype(dtype, copy=False)
    of_context = of_keys if dvalues is dkeys else (of_keys, of_values)
    return LayerGradients(
        of_x,
        None if dkeys is dx else of_context,
        {name: found[name] for name in parameters},
        gradients.bias,
        gradients.sinks,
    )


def _zeros(x: Array) -> Array:
    return np.zeros(x.shape, precision_of(x.dtype))


def _like_out(call: Call, dout: ArrayLike) -> Array:
    array = as_array("dout", dout)
    weight = call.parameters["o_weight"]
    if array.dtype != weight.dtype:
        refuse_kind("dout", dtype_name(array), f"{weight.dtype.name}, the dtype of the layer")
    shape = (*call.of_heads.shape[:-2], weight.shape[-1])
    if array.shape != shape:
        refuse("dout", f"shape {array.shape}", f"{shape}, the shape of out")
    return array


def _take_product_back(call: Call, name: str, d: Array, dx: Array, found: dict[str, Array]) -> None:
    """Add the gradients that come through q, k or v, (..., L, heads, dim), to `dx` and `found`."""
    weight, num_threads = call.parameters[f"{name}_weight"], call.num_threads
    rows, d_rows, dx_rows = _rows(call.inputs.of[name], 1), _rows(d, 2), _rows(dx, 1)
    # Padding and tokens that are not attended to have gradients of 0. Values in them that are not
    # finite would turn these into NaN.
    some = _some(d_rows)
    rows, d_rows = rows[some], d_rows[some]
    norm = call.parameters.get(f"{name}_norm")
    if norm is not None:
        # The vectors before the norm are computed again instead of being kept.
        bias = call.parameters.get(f"{name}_bias")
        vectors = project(rows, weight, bias, num_threads=num_threads)
        vectors = vectors.reshape(-1, *d.shape[-2:])
        d_vectors = d_rows.reshape(vectors.shape)
        as_applied = Norm(False, call.norm_epsilon, norm, num_threads=num_threads)
        found[f"{name}_norm"], _ = as_applied.take_back(d_vectors, vectors)
    found[f"{name}_weight"] = weight_gradient(rows, d_rows, num_threads)
    _find_bias(call, name, d_rows, found)
    of_rows = np.empty(rows.shape, dx.dtype)
    dx_rows[some] += project_back(d_rows, weight, of_rows, num_threads)


def _find_bias(call: Call, name: str, d_rows: Array, found: dict[str, Array]) -> None:
    if f"{name}_bias" in call.parameters:
        found[f"{name}_bias"] = bias_gradient(d_rows, call.num_threads)


def _rows(x: Array, axes: int) -> Array:
    """View an array as a matrix: its last axes become the columns, all others the rows."""
    size = int(np.prod(x.shape[-axes:]))
    return x.reshape(-1, size)


def _some(rows: Array) -> Array | slice:
    """Return which rows are not 0."""
    are: Array = np.any(rows, axis=-1)
    return slice(None) if are.all() else are
