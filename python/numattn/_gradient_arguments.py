"""Checks of the arguments of the gradients, in the form that backends take, and the gradients in
the shapes and dtypes of the inputs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.lib.stride_tricks import as_strided

from . import _arguments, _sequence_arguments
from ._arguments import Arguments, lse_heads_first, shape_in_layout
from ._checks import as_array, dtype_name, flag, heads_first, refuse, refuse_kind

if TYPE_CHECKING:
    from numpy.typing import ArrayLike, NDArray

    Array = NDArray[Any]


@dataclass(slots=True)
class GradientArguments:
    """The arguments of one call, in the form that backends take."""

    forward: Arguments  # out and lse are inputs here
    dout: Array  # like forward.out, in the dtype of q or float32
    dlse: Array | None  # like forward.lse
    # Zeros that a backend adds to: float32 (float64 for float64), writable, without overlaps, with
    # unit stride along the last axis. (batch..., Hq, Lq, D), (batch..., Hkv, Lk, D) and
    # (batch..., Hkv, Lk, Dv); ragged like q, k and v of `forward`.
    dq: Array
    dk: Array
    dv: Array
    # (batch..., Hq, Lq, Lk), which a backend adds to; None if it is not wanted. It is a view with
    # strides of 0 where the bias is broadcast along batch, heads or queries, or only along keys.
    dbias: Array | None


@dataclass(slots=True)
class Problem:
    """A call of attention whose gradients are wanted."""

    forward: Arguments  # out and lse are None until `set_results`
    # The arrays of the caller, which determine the shapes and dtypes of the gradients.
    q: Array
    k: Array
    v: Array
    bias: Array | None  # None if its gradient is not wanted
    sinks: np.dtype[Any] | None
    layout: str
    one_head: bool

    @property
    def precision(self) -> type[np.floating[Any]]:
        """The dtype of sums of gradients, and of lse."""
        return np.float64 if self.q.dtype.itemsize == 8 else np.float32

    @property
    def out_shape(self) -> tuple[int, ...]:
        assert self.forward.v is not None
        shape = (*self.forward.q.shape[:-1], self.forward.v.shape[-1])
        return shape_in_layout(shape, self.one_head, self.layout)


def check(
    q: ArrayLike, k: ArrayLike, v: ArrayLike, bias_gradient: bool, bias: ArrayLike | None,
    sinks: ArrayLike | None, layout: str, **options: Any,
) -> Problem:  # fmt: skip
    """Check the arguments of `attention`."""
    q_, k_, v_ = _floats(q, k, v)
    forward = _arguments.check(
        q_, k_, v_, bias=bias, sinks=sinks, layout=layout, **options, return_lse=True, out=None,
        makes_results=False,
    )  # fmt: skip
    wants_bias = flag("bias_gradient", bias_gradient)
    if wants_bias and bias is None:
        refuse("bias_gradient", "True without `bias=`", "both, or False")
    return Problem(
        forward,
        q_,
        k_,
        v_,
        bias=as_array("bias", bias) if wants_bias and bias is not None else None,
        sinks=dtype_of_sinks(sinks),
        layout=layout,
        one_head=q_.ndim == k_.ndim == v_.ndim == 2,
    )


def check_varlen(
    q: ArrayLike, k: ArrayLike, v: ArrayLike, cu_seqlens_q: ArrayLike, cu_seqlens_k: ArrayLike,
    sinks: ArrayLike | None, **options: Any,
) -> Problem:  # fmt: skip
    """Check the arguments of `attention_varlen`."""
    q_, k_, v_ = _floats(q, k, v)
    forward = _sequence_arguments.check_varlen(
        q_, k_, v_, cu_seqlens_q, cu_seqlens_k, sinks=sinks, **options, k_scale=None, v_scale=None,
        return_lse=True, out=None, makes_results=False,
    )  # fmt: skip
    return Problem(forward, q_, k_, v_, None, dtype_of_sinks(sinks), "blhd", one_head=False)


def _floats(q: ArrayLike, k: ArrayLike, v: ArrayLike) -> tuple[Array, Array, Array]:
    """Return q, k and v as arrays; refuse 8-bit ones."""

    def floats(name: str, x: ArrayLike) -> Array:
        array = as_array(name, x)
        if array.dtype == np.int8:
            refuse_kind(name, "dtype int8", "floats", "8-bit keys and values have no gradients")
        return array

    if v is None:  # `_arguments.check` would take None for a stage without values
        refuse_kind("v", "None", "an array")
    return floats("q", q), floats("k", k), floats("v", v)


def dtype_of_sinks(sinks: ArrayLike | None) -> np.dtype[Any] | None:
    """Return the dtype of the gradient of checked sinks."""
    if sinks is None:
        return None
    dtype = as_array("sinks", sinks).dtype
    return np.dtype(np.float64) if dtype.kind in "iu" else dtype


def set_results(problem: Problem, out: ArrayLike, lse: ArrayLike) -> None:
    """Check the results of `attention`."""
    problem.forward.out = like_out(problem, "out", out)
    problem.forward.lse = like_lse(problem, "lse", lse)


def with_gradients(
    problem: Problem, dout: ArrayLike, dlse: ArrayLike | None = None
) -> GradientArguments:
    """Check the gradients with respect to the results, and allocate the input gradients."""
    dout_ = like_out(problem, "dout", dout)
    dlse_ = None if dlse is None else like_lse(problem, "dlse", dlse)
    a = problem.forward
    assert a.v is not None

    def zeros(x: Array) -> Array:
        shape = shape_in_layout(x.shape, False, problem.layout)
        return heads_first(np.zeros(shape, problem.precision), problem.layout)

    return GradientArguments(
        forward=a,
        dout=dout_,
        dlse=dlse_,
        dq=zeros(a.q),
        dk=zeros(a.k),
        dv=zeros(a.v),
        dbias=None if problem.bias is None else _zeros_of_pairs(problem, problem.bias.shape),
    )


def _zeros_of_pairs(problem: Problem, bias_shape: tuple[int, ...]) -> Array:
    """Return zeros with one element per element of the bias.

    If all keys share an element, there is one per query instead, because threads compute different
    keys of a query head at once.
    """
    a = problem.forward
    pairs = (*a.q.shape[:-1], a.k.shape[-2])
    bias_shape = (1,) * (len(pairs) - len(bias_shape)) + bias_shape
    shape = (*pairs[:-1], 1) if bias_shape[-1] == 1 else bias_shape
    zeros = np.zeros(shape, problem.precision)
    strides = [
        stride if n == wanted else 0
        for stride, n, wanted in zip(zeros.strides, zeros.shape, pairs, strict=True)
    ]
    return as_strided(zeros, pairs, strides)


def like_out(problem: Problem, name: str, x: ArrayLike) -> Array:
    array = as_array(name, x)
    accepted = dict.fromkeys((problem.q.dtype.name, np.dtype(problem.precision).name))
    if array.dtype.name not in accepted or not array.dtype.isnative:
        own, *wider = accepted
        wanted = ", or ".join([f"{own}, the dtype of q", *wider])
        refuse_kind(name, dtype_name(array), wanted)
    _check_shape(name, array, problem.out_shape, "out")
    return heads_first(array, problem.layout)


def like_lse(problem: Problem, name: str, x: ArrayLike) -> Array:
    array = as_array(name, x)
    if array.dtype != problem.precision:
        wanted = f"{np.dtype(problem.precision).name} with q of dtype {problem.q.dtype.name}"
        refuse_kind(name, dtype_name(array), wanted)
    _check_shape(name, array, problem.out_shape[:-1], "lse")
    return lse_heads_first(array, problem.one_head, problem.layout)


def _check_shape(name: str, x: Array, wanted: tuple[int, ...], of: str) -> None:
    if x.shape != wanted:
        refuse(name, f"shape {x.shape}", f"{wanted}, the shape of {of} for these q, k and v")


def as_inputs(
    problem: Problem, g: GradientArguments, rounds: bool = True
) -> tuple[Array, Array, Array, Array | None]:
    """Return the gradients of q, k, v and the bias in the shapes of the inputs.

    They have the inputs' dtypes, unless `rounds` is False because more is added to them.
    """
    gradients = [
        _as_input(problem, g.dq, problem.q),
        _as_input(problem, g.dk, problem.k),
        _as_input(problem, g.dv, problem.v),
        None if g.dbias is None or problem.bias is None else _as_bias(g.dbias, problem.bias),
    ]
    if rounds:
        inputs = (problem.q, problem.k, problem.v, problem.bias)
        with np.errstate(all="ignore"):
            gradients = [
                None if x is None or of is None else x.astype(of.dtype, copy=False)
                for x, of in zip(gradients, inputs, strict=True)
            ]
    dq, dk, dv, dbias = gradients
    assert dq is not None
    assert dk is not None
    assert dv is not None
    return dq, dk, dv, dbias


def _as_bias(dbias: Array, bias: Array) -> Array:
    shape = (1,) * (dbias.ndim - bias.ndim) + bias.shape
    shared = (n == 1 and stride == 0 for n, stride in zip(shape, dbias.strides, strict=True))
    once = dbias[tuple(slice(0, 1 if is_shared else None) for is_shared in shared)]
    return _summed(once, bias.shape)


def _as_input(problem: Problem, sums: Array, given: Array) -> Array:
    x = _summed(sums, heads_first(given, problem.layout).shape)
    return x[0] if given.ndim == 2 else heads_first(x, problem.layout)


def _summed(sums: Array, shape: tuple[int, ...]) -> Array:
    """Sum over the axes along which an array of this shape was broadcast."""
    aligned = (1,) * (sums.ndim - len(shape)) + shape
    axes = tuple(axis for axis, n in enumerate(aligned) if n != sums.shape[axis])
    if axes:
        with np.errstate(all="ignore"):
            sums = sums.sum(axis=axes, dtype=np.float64).astype(sums.dtype)
    return sums.reshape(shape)
