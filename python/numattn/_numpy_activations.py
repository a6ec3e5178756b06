"""The functions between the two matrices of a feed-forward network, and their slopes, in NumPy.

Each function in `ACTIVATIONS` writes its values at `a` to `out`, which may be `a`, and its slopes
to `slope` unless that is None. `work` are arrays of the same shape that may be overwritten.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from ._checks import precision_of
from ._numpy_blocks import quiet
from ._numpy_row_chunks import chunk_length, chunks, widened

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from numpy.typing import NDArray

    Array = NDArray[Any]


class Activation(NamedTuple):
    """A function, and the number of work arrays that it needs."""

    function: Callable[[Array, Array, Array | None, Sequence[Array]], None]
    work_arrays: int


# Q(x) is the probability that a standard normal variable exceeds x. For x >= 0,
# Q(x) exp(x^2 / 2) (x + 4) is a polynomial in u = (x - 4) / (x + 4), -1 <= u < 1, with a relative
# error of 4e-8 (10 coefficients) or 1e-16 (23). The coefficients come from its Chebyshev series,
# highest power first.
_SMOOTH_TAIL = {
    "float32": (
        -0.00015732057, 0.000129325681, 0.0015637869, -0.00347616789, -0.00751223138, 0.0603952959,
        -0.186526711, 0.387137563, -0.607896404, 0.755285127,
    ),
    "float64": (
        -1.6886576966786735e-09, -1.277235143295772e-09, 1.60673869573294e-08,
        1.9569608939974048e-08, -7.878360342693638e-08, -1.622316320853567e-07,
        2.647337281979868e-07, 1.026984070143193e-06, -6.249551077565178e-07,
        -5.922893777541928e-06, 7.146021531267462e-07, 3.514560235904452e-05,
        -1.907676030719098e-06, -0.00023109513778728935, 0.00013334420916014778,
        0.0016308184854735856, -0.0034796923566515025, -0.007540188968891619, 0.06039657489036092,
        -0.1865218579595787, 0.3871374007422266, -0.607896641971893, 0.7552851304157514,
    ),
}  # fmt: skip
_FARTHEST = 40.0  # where Q is 0 in float64


def gelu(a: Array, out: Array, slope: Array | None, work: Sequence[Array]) -> None:
    """Compute a P(X <= a) for a standard normal X.

    The form of the tail is from Shepherd and Laframboise, "Chebyshev approximation of (1 + 2x)
    exp(x^2) erfc x in 0 <= x < infinity", Mathematics of Computation 36, 1981.
    """
    x, gauss, inverse, u, tail = work
    np.abs(a, out=x)
    np.minimum(x, _FARTHEST, out=x)
    np.multiply(x, x, out=gauss)
    gauss *= -0.5
    np.exp(gauss, out=gauss)
    np.add(x, 4, out=inverse)
    np.reciprocal(inverse, out=inverse)
    np.multiply(inverse, -8, out=u)
    u += 1
    highest, *others = _SMOOTH_TAIL[a.dtype.name]
    tail[...] = highest
    for coefficient in others:
        tail *= u
        tail += coefficient
    tail *= inverse  # Q(x) exp(x^2 / 2)
    if slope is not None:
        # The slope is P + a P'. At -x it is Q(x) - x P'(x), and at x it is 1 minus that.
        np.multiply(x, 1 / math.sqrt(2 * math.pi), out=slope)
        np.subtract(tail, slope, out=slope)
        slope *= gauss
        np.subtract(0.5, slope, out=slope)
        np.copysign(1, a, out=u)
        slope *= u
        slope += 0.5
    tail *= gauss
    tail *= x
    np.maximum(a, 0, out=out)
    out -= tail


def gelu_tanh(a: Array, out: Array, slope: Array | None, work: Sequence[Array]) -> None:
    """Compute a (1 + tanh z) / 2, z = sqrt(2 / pi) (a + 0.044715 a^3).

    This is a / (1 + exp(-2 z)), which keeps the digits of small values.
    """
    sigmoid, near = work
    of_a = 2 * math.sqrt(2 / math.pi)
    of_cube = 0.044715 * of_a
    np.minimum(a, 30, out=near)  # the sigmoid is 0 or 1 beyond it
    np.maximum(near, -30, out=near)
    np.multiply(near, near, out=sigmoid)
    sigmoid *= of_cube
    sigmoid += of_a
    sigmoid *= near
    _to_sigmoid(sigmoid)
    if slope is not None:
        # With s = sigmoid(y): s + a s (1 - s) dy/da.
        np.multiply(near, near, out=slope)
        slope *= 3 * of_cube
        slope += of_a
        slope *= near
        slope *= sigmoid
        np.subtract(1, sigmoid, out=near)
        slope *= near
        slope += sigmoid
    np.multiply(a, sigmoid, out=out)


def silu(a: Array, out: Array, slope: Array | None, work: Sequence[Array]) -> None:
    """Compute a s for s = 1 / (1 + exp(-a))."""
    (sigmoid,) = work
    sigmoid[...] = a
    _to_sigmoid(sigmoid)
    if slope is not None:
        # s + a s (1 - s)
        np.subtract(1, sigmoid, out=slope)
        slope *= a
        slope += 1
        slope *= sigmoid
    np.multiply(a, sigmoid, out=out)


def _to_sigmoid(x: Array) -> None:
    np.negative(x, out=x)
    np.exp(x, out=x)
    x += 1
    np.reciprocal(x, out=x)


def relu(a: Array, out: Array, slope: Array | None, work: Sequence[Array]) -> None:
    """Compute max(a, 0)."""
    del work
    if slope is not None:
        np.greater(a, 0, out=slope)
    np.maximum(a, 0, out=out)


def relu_squared(a: Array, out: Array, slope: Array | None, work: Sequence[Array]) -> None:
    """Compute max(a, 0)^2."""
    del work
    np.maximum(a, 0, out=out)
    if slope is not None:
        np.multiply(out, 2, out=slope)
    out *= out


ACTIVATIONS = {
    "gelu": Activation(gelu, 5),
    "gelu_tanh": Activation(gelu_tanh, 2),
    "silu": Activation(silu, 1),
    "relu": Activation(relu, 0),
    "relu_squared": Activation(relu_squared, 0),
}


def activate(
    name: str, a: Array, times: Array | None, out: Array, num_threads: int | None = None
) -> None:
    """Fill `out`, which may be `a`, with f(a), multiplied by `times` unless that is None."""
    del num_threads
    flat_a, flat_out = a.reshape(-1), out.reshape(-1)
    with quiet():
        for part, values, *work in _parts(name, flat_a, 1):
            ACTIVATIONS[name].function(widened(flat_a[part]), values, None, work)
            if times is not None:
                values *= widened(times.reshape(-1)[part])
            flat_out[part] = values


def activate_back(
    name: str, d: Array, a: Array, times: Array | None, out: Array, d_a: Array,
    d_times: Array | None, num_threads: int | None = None,
) -> None:  # fmt: skip
    """Fill `out` like `activate`, and `d_a` and `d_times` with the gradients of `a` and `times`.

    `d` is the gradient with respect to `out`; `d_a` or `d_times` may be `d`. `d_times` is None if
    `times` is None.
    """
    del num_threads
    flat_a, flat_out, flat_d, flat_d_a = (x.reshape(-1) for x in (a, out, d, d_a))
    with quiet():
        for part, values, slope, *work in _parts(name, flat_a, 2):
            ACTIVATIONS[name].function(widened(flat_a[part]), values, slope, work)
            d_part = widened(flat_d[part])
            if times is None or d_times is None:
                slope *= d_part
                flat_out[part] = values
            else:
                times_part = widened(times.reshape(-1)[part])
                slope *= d_part * times_part
                flat_out[part] = values * times_part
                values *= d_part
                d_times.reshape(-1)[part] = values
            flat_d_a[part] = slope


def _parts(name: str, elements: Array, more: int) -> Iterator[tuple[Any, ...]]:
    """Yield parts of the elements, each with `more` work arrays and the activation's own."""
    arrays = more + ACTIVATIONS[name].work_arrays
    work = np.empty((arrays, chunk_length(elements)), precision_of(elements.dtype))
    for part in chunks(elements):
        yield (part, *work[:, : part.stop - part.start])
