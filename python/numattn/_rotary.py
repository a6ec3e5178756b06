"""Rotary position embedding."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from . import _runtime
from ._checks import (
    as_array,
    check_layout,
    check_out,
    check_overlap,
    float_array,
    heads_first,
    integer,
    real,
    refuse,
    refuse_kind,
    same_elements,
)

if TYPE_CHECKING:
    from collections.abc import Mapping

    from numpy.typing import ArrayLike, NDArray

    Array = NDArray[Any]

# Llama 3's defaults, as its models' configurations have them.
_LLAMA3: dict[str, float | None] = {
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


def rotary_embedding(
    x: ArrayLike,
    positions: ArrayLike | None = None,
    *,
    base: float = 10000.0,
    rotary_dim: int | None = None,
    interleaved: bool = False,
    scaling: Mapping[str, Any] | None = None,
    layout: Literal["bhld", "blhd"] = "bhld",
    out: Array | None = None,
) -> Array:
    """Rotate queries or keys by angles that grow with their positions.

    Pair ``i`` of a vector at position ``p`` is turned by ``p * base ** (-2 * i / rotary_dim)``, so
    that the dot product of a query and a key depends on the distance of their positions alone.

    Parameters
    ----------
    x : array_like, shape (..., H, L, D)
        Queries or keys; two axes are one head.
    positions : array_like of int or float, shape (L,) or (..., L), optional
        Position of each token; leading axes broadcast to those of `x`. Default: 0 to L - 1.
    base : float, default 10000
        Base of the wavelengths.
    rotary_dim : int, optional
        How many elements of a vector are rotated, an even number; the others are copied.
        Default: D.
    interleaved : bool, default False
        Pairs are neighbours, ``(0, 1), (2, 3), ...``; else half of `rotary_dim` apart, as in
        Llama's and Hugging Face's models.
    scaling : mapping, optional
        ``{"type": "linear", "factor": f}`` divides positions by f. ``{"type": "llama3", "factor":
        8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings":
        8192}`` (these are the defaults) slows down the long waves only, as Llama 3.1 does. The key
        may be "rope_type" instead of "type".
    layout : {"bhld", "blhd"}, default "bhld"
        "blhd" takes and gives (..., L, H, D).
    out : ndarray, optional
        Where to write the result, of the shape and dtype of `x`; may be `x`.

    Returns
    -------
    ndarray
        Of the shape and dtype of `x`. Angles are computed in float64; the rotation in float32,
        or in float64 for float64.

    Raises
    ------
    TypeError
        If an argument is of the wrong kind.
    ValueError
        If a shape or a value does not fit.

    See Also
    --------
    attention, MultiHeadAttention

    Notes
    -----
    The method is that of Su et al., "RoFormer: Enhanced Transformer with Rotary Position
    Embedding", 2021. With the same cosines and sines it is ONNX's RotaryEmbedding.

    Examples
    --------
    >>> import numpy as np
    >>> import numattn as na
    >>> q = np.ones((1, 2, 4), np.float32)  # one head, two tokens
    >>> na.rotary_embedding(q).round(3)
    array([[[ 1.   ,  1.   ,  1.   ,  1.   ],
            [-0.301,  0.99 ,  1.382,  1.01 ]]], dtype=float32)
    """
    array = float_array("x", x)
    check_layout(layout)
    if array.ndim < 2:
        refuse("x", f"shape {array.shape}", "(..., heads, length, dim), or two axes for one head")
    vectors = heads_first(array, layout)
    rotation = make_rotation(
        vectors.shape, array.dtype, positions,
        base=base, rotary_dim=rotary_dim, interleaved=interleaved, scaling=scaling,
    )  # fmt: skip
    if out is None:
        out = np.empty(array.shape, array.dtype)
    else:
        check_out(out, array.shape, array.dtype)
        if not same_elements(out, array):
            check_overlap(out, {"x": array})
    rotation.apply(vectors, heads_first(out, layout))
    return out


@dataclass(frozen=True, slots=True)
class Rotation:
    """Cosines and sines for the tokens of a batch, the same for all heads."""

    cos: Array  # (..., L, rotary_dim / 2), whose leading axes broadcast to the batch
    sin: Array
    interleaved: bool

    def apply(self, x: Array, out: Array) -> None:
        """Rotate vectors (batch..., heads, L, D) into `out`, which may be `x`."""
        angles = [
            np.broadcast_to(a[..., np.newaxis, :, :], (*x.shape[:-1], a.shape[-1]))
            for a in (self.cos, self.sin)
        ]
        _runtime.computations.rotate(x, *angles, out, self.interleaved)


def make_rotation(
    shape: tuple[int, ...],
    dtype: np.dtype[Any],
    positions: ArrayLike | None,
    *,
    base: float = 10000.0,
    rotary_dim: int | None = None,
    interleaved: bool = False,
    scaling: Mapping[str, Any] | None = None,
) -> Rotation:
    """Check the options of `rotary_embedding` for vectors of a shape (batch..., heads, L, D)."""
    length, dim = shape[-2:]
    rotated = dim if rotary_dim is None else integer("rotary_dim", rotary_dim)
    if not 2 <= rotated <= dim or rotated % 2:
        refuse("rotary_dim", str(rotated), f"an even number from 2 to {dim}, the size of a vector")
    base = real("base", base)
    if base <= 0:
        refuse("base", str(base), "a positive number")
    if not isinstance(interleaved, bool):
        refuse_kind("interleaved", repr(interleaved), "True or False")
    kind, parameters = _scaling(scaling)
    precision = np.float64 if dtype == np.float64 else np.float32
    if positions is None:
        cos, sin = _cached_angles(length, rotated, base, kind, parameters, precision)
    else:
        p = _positions(positions, shape[:-3], length)
        cos, sin = _angles(p, rotated, base, kind, parameters, precision)
    return Rotation(cos, sin, interleaved)


def _positions(positions: ArrayLike, batch: tuple[int, ...], length: int) -> NDArray[np.float64]:
    p = as_array("positions", positions)
    if p.size and p.dtype.kind not in "iuf":
        refuse_kind("positions", f"dtype {p.dtype.name}", "integers or floats")
    p = p.astype(np.float64)
    if not np.isfinite(p).all():
        refuse("positions", "a number that is not finite", "finite numbers")
    expected = (*batch, length)
    if p.ndim == 0 or p.shape[-1] != length or p.ndim > len(expected):
        refuse("positions", f"shape {p.shape}", f"what broadcasts to {expected}, length {length}")
    try:
        np.broadcast_to(p, expected)
    except ValueError:
        refuse("positions", f"shape {p.shape}", f"what broadcasts to {expected}")
    return p


def _scaling(scaling: Mapping[str, Any] | None) -> tuple[str, tuple[float, ...]]:
    if scaling is None:
        return "none", ()
    try:
        given = dict(scaling)
    except (TypeError, ValueError):
        refuse_kind("scaling", type(scaling).__name__, "a mapping such as {'type': 'linear', ...}")
    kind = given.pop("type", None) or given.pop("rope_type", None)
    given.pop("rope_type", None)
    known: dict[Any, dict[str, float | None]] = {"linear": {"factor": None}, "llama3": _LLAMA3}
    if kind not in known:
        refuse("scaling", f"type {kind!r}", "'linear' or 'llama3'")
    for name in given:
        if name not in known[kind]:
            refuse("scaling", f"{name!r}", "only " + ", ".join(known[kind]))
    values = []
    for name, default in known[kind].items():
        value = given.get(name, default)
        if value is None:
            refuse("scaling", f"no {name!r}", f"it, for type {kind!r}")
        value = real(f"scaling[{name!r}]", value)
        if not value > 0:
            refuse(f"scaling[{name!r}]", str(value), "a positive number")
        values.append(value)
    if kind == "llama3" and not values[1] < values[2]:
        seen = f"low_freq_factor {values[1]} and high_freq_factor {values[2]}"
        refuse("scaling", seen, "the former to be less")
    return kind, tuple(values)


def _frequencies(
    rotary_dim: int, base: float, kind: str, parameters: tuple[float, ...]
) -> NDArray[np.float64]:
    frequencies = base ** (-np.arange(0, rotary_dim, 2) / rotary_dim)
    if kind == "linear":
        return frequencies / parameters[0]
    if kind == "llama3":
        factor, low, high, original = parameters
        waves = original * frequencies / (2 * math.pi)  # in the length of the first training
        share = np.clip((waves - low) / (high - low), 0, 1)
        return frequencies * (share + (1 - share) / factor)
    return frequencies


def _angles(
    positions: NDArray[np.float64], rotary_dim: int, base: float, kind: str,
    parameters: tuple[float, ...], precision: type,
) -> tuple[Array, Array]:  # fmt: skip
    """Return cosines and sines, (..., L, rotary_dim / 2)."""
    angles = positions[..., np.newaxis] * _frequencies(rotary_dim, base, kind, parameters)
    return np.cos(angles).astype(precision), np.sin(angles).astype(precision)


# Some models' angles: they cost more than the rotation.
@lru_cache(maxsize=8)
def _cached_angles(
    length: int, rotary_dim: int, base: float, kind: str, parameters: tuple[float, ...],
    precision: type,
) -> tuple[Array, Array]:  # fmt: skip
    return _angles(
        np.arange(length, dtype=np.float64), rotary_dim, base, kind, parameters, precision
    )
