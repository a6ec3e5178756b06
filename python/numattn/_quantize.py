"""`quantize_kv`: keys and values in 8 bits."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal, overload

import numpy as np

from ._checks import (
    ACCEPTED_DTYPES,
    as_array,
    at_index,
    check_layout,
    dtype_name,
    flag,
    is_accepted,
    refuse,
    refuse_kind,
    refuse_unknown,
)

if TYPE_CHECKING:
    from numpy.typing import ArrayLike, NDArray

    Rounded = tuple[NDArray[np.int8], NDArray[np.float32]]
    RoundedByChannel = tuple[NDArray[np.int8], NDArray[np.float32], NDArray[Any]]

# The names of the arguments in other libraries.
_ELSEWHERE = {
    "axis": "leave it out: vectors are along the last axis, and `layout=` says where tokens are",
    "dim": "leave it out: vectors are along the last axis, and `layout=` says where tokens are",
    "per_channel": "`channel_scale=`",
    "num_bits": "leave it out: quantize_kv always uses 8 bits",
}
# The largest scale: 127 times this number is still finite in float32.
_LARGEST_SCALE = np.nextafter(np.finfo(np.float32).max / np.float32(127), np.float32(0))
# A channel's factor is its size to this power. With 1 the steps of a large channel are too coarse,
# and with 0.7 it makes the steps of the other channels coarser. Measured as in the docstring below.
_EXPONENT = 0.85
# The least factor of a channel: queries times this number stay normal in all dtypes.
_SMALLEST_FACTOR = 2.0**-24


@overload
def quantize_kv(
    x: ArrayLike, *, channel_scale: Literal[False] = ..., layout: Literal["bhld", "blhd"] = ...
) -> Rounded: ...


@overload
def quantize_kv(
    x: ArrayLike, *, channel_scale: Literal[True], layout: Literal["bhld", "blhd"] = ...
) -> RoundedByChannel: ...


@overload
def quantize_kv(
    x: ArrayLike, *, channel_scale: bool, layout: Literal["bhld", "blhd"] = ...
) -> Rounded | RoundedByChannel: ...


def quantize_kv(
    x: ArrayLike,
    *,
    channel_scale: bool = False,
    layout: Literal["bhld", "blhd"] = "bhld",
    **unknown: Any,
) -> Rounded | RoundedByChannel:
    """Round keys or values to 8 bits, with one scale per token and head.

    Parameters
    ----------
    x : array_like, shape (..., D)
        Keys or values: float16, bfloat16, float32 or float64. Every vector along the last axis gets
        its own scale. With `channel_scale`, the shape is (..., H, L, D), or (L, D) for one head.
    channel_scale : bool, default False
        Also give each of the D channels of a head a factor, which depends on its largest magnitude
        over all tokens. Keys need it if some of their channels are many times as large as the
        others, as in many models.
    layout : {"bhld", "blhd"}, default "bhld"
        "blhd" is (..., L, H, D). It has an effect only with `channel_scale`, which needs to know
        the axis of the tokens.

    Returns
    -------
    numbers : ndarray of int8, shape of `x`
        Integers from -127 to 127.
    scale : ndarray of float32, shape ``x.shape[:-1]``
        ``numbers * scale[..., None]`` approximates `x`. The error is at most half the scale, which
        is the largest magnitude in a vector divided by 127. It is larger for vectors without any
        element above 1e-36, because float32 has few digits for their scales.
    channels : ndarray of the dtype of `x`, shape of `x` with 1 for the tokens
        Only with ``channel_scale=True``: ``numbers * scale[..., None] * channels`` approximates
        `x`. Each factor, from 2**-24 to 1, is the magnitude of its channel divided by the magnitude
        of the largest channel, to the power of 0.85.

    Raises
    ------
    TypeError
        If `x` has another dtype, or `channel_scale` is not a bool.
    ValueError
        If a number is NaN or infinite, or too large for a float32 scale; or if `x` lacks the axis
        of tokens that `channel_scale` needs.

    See Also
    --------
    attention : takes the numbers, with the scales as ``k_scale`` and ``v_scale``.
    KVCache : rounds tokens as they are appended, with ``quantize=True``.

    Notes
    -----
    The table shows the error of attention with 8-bit keys and values, for normally distributed
    float32 arrays, 32 query heads, 8 heads of 300 keys and D = 128. "rms" is the root mean square
    of the error divided by the root mean square of the result. "largest" is the largest error
    divided by the largest result.

    ======================================  ======  =======
    arrays                                     rms  largest
    ======================================  ======  =======
    all of unit variance                     0.9 %    1.0 %
    queries 2 times as large                 1.2 %    1.4 %
    queries 3 times as large                 1.4 %    1.6 %
    one channel of keys 30 times as large     10 %     17 %
    the same with `channel_scale`            0.9 %    1.0 %
    one channel of keys 50 times as large     14 %     30 %
    the same with `channel_scale`            0.9 %    1.3 %
    ======================================  ======  =======

    Larger queries make the softmax more peaked. A large channel makes the scale of all other
    channels too coarse.

    The factors cost `attention` nothing: multiply factors of keys into the queries, as below, and
    factors of values into the result. A `KVCache` with ``quantize=True`` can use the factors of the
    first tokens: append ``k / channels`` and attend with ``q * channels``. Moving magnitudes from
    keys to queries is the idea of G. Xiao et al., "SmoothQuant: Accurate and Efficient
    Post-Training Quantization for Large Language Models", ICML 2023.

    Examples
    --------
    >>> import numpy as np
    >>> import numattn as na
    >>> numbers, scale = na.quantize_kv(np.array([[1.0, -0.5], [0.0, 0.0]]))
    >>> numbers
    array([[127, -64],
           [  0,   0]], dtype=int8)
    >>> (numbers * scale[:, None]).round(2)
    array([[ 1. , -0.5],
           [ 0. ,  0. ]], dtype=float32)

    Keys with a large channel, where four query heads share each head of keys:

    >>> rng = np.random.default_rng(0)
    >>> q = rng.standard_normal((32, 1, 128), dtype=np.float32)
    >>> k, v = rng.standard_normal((2, 8, 300, 128), dtype=np.float32)
    >>> k[..., 17] *= 30
    >>> k8, k_scale, channels = na.quantize_kv(k, channel_scale=True)
    >>> out = na.attention(q * np.repeat(channels, 4, axis=-3), k8, v, k_scale=k_scale)
    >>> error = out - na.attention(q, k, v)
    >>> bool(np.linalg.norm(error) < 0.01 * np.linalg.norm(out))
    True
    """
    if unknown:
        refuse_unknown("quantize_kv", unknown, _ELSEWHERE)
    array = as_array("x", x)
    wide = _finite_vectors("x", array)
    check_layout(layout)
    if not flag("channel_scale", channel_scale):
        return _rounded(wide)
    if wide.ndim < 2:
        refuse("x", f"shape {wide.shape} with channel_scale", "(..., L, D)")
    tokens = -3 if layout == "blhd" and wide.ndim > 2 else -2
    with np.errstate(all="ignore"):
        sizes = np.abs(wide).max(axis=tokens, keepdims=True, initial=0)
        largest = sizes.max(axis=-1, keepdims=True, initial=0)
        factors = (sizes / np.where(largest == 0, 1, largest)) ** _EXPONENT
        factors = np.maximum(factors, _SMALLEST_FACTOR)
        channels: NDArray[Any] = factors.astype(array.dtype)
        return *_rounded(wide / channels.astype(wide.dtype)), channels


def quantize_named(name: str, x: ArrayLike) -> Rounded:
    """Compute `quantize_kv` for an argument with another name."""
    return _rounded(_finite_vectors(name, x))


def _finite_vectors(name: str, x: ArrayLike) -> NDArray[Any]:
    """Return float32 or float64 vectors, after checking that float32 scales can hold them."""
    array = as_array(name, x)
    if not is_accepted(array.dtype) or array.ndim < 1:
        seen = f"{dtype_name(array)} and shape {array.shape}"
        refuse_kind(name, seen, "vectors of " + ", ".join(ACCEPTED_DTYPES))
    with np.errstate(all="ignore"):
        wide = array.astype(np.float64 if array.dtype == np.float64 else np.float32, copy=False)
        largest = np.abs(wide).max(axis=-1, initial=0)
        wrong = ~(largest <= np.finfo(np.float32).max)
    if wrong.any():
        where = tuple(map(int, np.argwhere(wrong)[0]))
        expected = "finite numbers within float32"
        refuse(name, f"{largest[where]} in the vector{at_index(where)}", expected)
    return wide


def _rounded(wide: NDArray[Any]) -> Rounded:
    with np.errstate(all="ignore"):
        largest = np.abs(wide).max(axis=-1, initial=0)
        scale = np.minimum((largest / 127).astype(np.float32), _LARGEST_SCALE)
        divisor = np.where(scale == 0, np.float32(1), scale)[..., np.newaxis]
        return np.clip(np.rint(wide / divisor), -127, 127).astype(np.int8), scale
