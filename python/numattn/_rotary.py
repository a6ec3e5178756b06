"""`rotary_embedding`: rotary position embedding."""

from __future__ import annotations

import math
import threading
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from . import _runtime
from ._checks import (
    as_array,
    check_layout,
    check_out,
    check_overlap,
    flag,
    float_array,
    heads_first,
    integer,
    is_real,
    refuse,
    refuse_kind,
    refuse_unknown,
    same_elements,
)
from ._rope_types import Waves, rope_type

if TYPE_CHECKING:
    from collections.abc import Mapping

    from numpy.typing import ArrayLike, NDArray

    Array = NDArray[Any]

# The names of the arguments in models' configurations, ONNX and flash-attn.
ELSEWHERE = {
    "position_ids": "`positions=`",
    "seqlen_offsets": "`positions=`",
    "rope_theta": "`base=`",
    "theta": "`base=`",
    "rope_scaling": "`scaling=`",
    "rope_parameters": "`scaling=`",
    "partial_rotary_factor": "`rotary_dim=`, or that key in `scaling`",
    "rotary_embedding_dim": "`rotary_dim=`",
    "dim": "`rotary_dim=`",
    "inv_freq": "`frequencies=`",
    "cos_cache": "`frequencies=` (the angles are computed here)",
    "sin_cache": "`frequencies=` (the angles are computed here)",
    "inplace": "`out=x`",
}


def rotary_embedding(
    x: ArrayLike,
    positions: ArrayLike | None = None,
    *,
    base: float | None = None,
    rotary_dim: int | None = None,
    interleaved: bool = False,
    scaling: Mapping[str, Any] | None = None,
    frequencies: ArrayLike | None = None,
    inverse: bool = False,
    layout: Literal["bhld", "blhd"] = "bhld",
    out: Array | None = None,
    **unknown: Any,
) -> Array:
    """Rotate queries or keys by angles that grow with their positions.

    Pair ``i`` of a vector at position ``p`` is rotated by ``p * base ** (-2 * i / rotary_dim)``.
    The dot product of a query and a key then depends only on the distance of their positions.

    Parameters
    ----------
    x : array_like, shape (..., H, L, D)
        Queries or keys. With two axes, the array is one head.
    positions : array_like of int or float, shape (L,) or (..., L), optional
        Position of each token; leading axes broadcast to the axes of `x`. Default: 0 to L - 1.
    base : float, default 10000
        Base of the wavelengths.
    rotary_dim : int, optional
        Number of elements of a vector to rotate, an even number; the others are copied.
        Default: D.
    interleaved : bool, default False
        Pairs are neighbours, ``(0, 1), (2, 3), ...``. Otherwise the elements of a pair are half of
        `rotary_dim` apart, as in Llama and in Hugging Face models.
    scaling : mapping, optional
        The ``rope_scaling`` or ``rope_parameters`` of a model's configuration. Its keys are:

        - "rope_type" (or "type"): how the frequencies differ from ``base ** (-2 * i /
          rotary_dim)``. One of "default" (they do not differ), "linear", "proportional", "dynamic",
          "yarn", "longrope" and "llama3".
        - The numbers of that type. Keys of other types have no effect, as in transformers.
        - "rope_theta": the same as `base`.
        - "partial_rotary_factor": the share of D that is `rotary_dim`.

        "dynamic" needs "max_position_embeddings", and "yarn" and "longrope" need
        "original_max_position_embeddings". If the configuration has them outside the mapping, add
        them to it.
    frequencies : array_like of float, shape (rotary_dim / 2,), optional
        Radians per position, instead of `base` and `scaling`.
    inverse : bool, default False
        Rotate by the negative angles. This is the transposed rotation, which takes gradients back.
        It is the inverse except for "yarn" and "longrope", which scale vectors in both directions.
    layout : {"bhld", "blhd"}, default "bhld"
        "blhd" takes and returns (..., L, H, D).
    out : ndarray, optional
        Array to write the result to, of the shape and dtype of `x`. It may be `x`.

    Returns
    -------
    ndarray
        In the shape and dtype of `x`. Angles are computed in float64. The rotation is computed in
        float32, or in float64 for float64 inputs. "yarn" and "longrope" also scale the vectors.

    Raises
    ------
    TypeError
        If an argument has the wrong type.
    ValueError
        If a shape or a value does not fit.

    See Also
    --------
    attention : takes the rotated queries and keys.
    MultiHeadAttention : rotates its queries and keys with ``rotary=``.

    Notes
    -----
    The frequencies of "dynamic" and "longrope" depend on the length of the text, which is the
    largest position of the call plus one. Keys in a cache keep the rotation that they were appended
    with, as in Hugging Face models. To avoid that, pass `frequencies`.

    Cosines and sines for positions 0, 1, ... are kept for later calls, up to 32 MiB.

    The method is by Su et al., "RoFormer: Enhanced Transformer with Rotary Position Embedding",
    2021. With the same cosines and sines it equals ONNX's RotaryEmbedding.

    Examples
    --------
    >>> import numpy as np
    >>> import numattn as na
    >>> q = np.ones((1, 2, 4), np.float32)  # one head, two tokens
    >>> na.rotary_embedding(q).round(3)
    array([[[ 1.   ,  1.   ,  1.   ,  1.   ],
            [-0.301,  0.99 ,  1.382,  1.01 ]]], dtype=float32)
    >>> bool(np.allclose(na.rotary_embedding(na.rotary_embedding(q), inverse=True), q))
    True
    """
    if unknown:
        refuse_unknown("rotary_embedding", unknown, ELSEWHERE)
    array = float_array("x", x)
    check_layout(layout)
    if array.ndim < 2:
        refuse("x", f"shape {array.shape}", "(..., heads, length, dim), or two axes for one head")
    vectors = heads_first(array, layout)
    rotation = make_rotation(
        vectors.shape, array.dtype, positions,
        base=base, rotary_dim=rotary_dim, interleaved=interleaved, scaling=scaling,
        frequencies=frequencies,
    )  # fmt: skip
    if flag("inverse", inverse):
        rotation = rotation.transposed()
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

    def apply(self, x: Array, out: Array, num_threads: int | None = None) -> None:
        """Rotate vectors (batch..., heads, L, D) into `out`, which may be `x`."""
        angles = [
            np.broadcast_to(a[..., np.newaxis, :, :], (*x.shape[:-1], a.shape[-1]))
            for a in (self.cos, self.sin)
        ]
        _runtime.computations.rotate(x, *angles, out, self.interleaved, num_threads)

    def of_rows(self, shape: tuple[int, ...]) -> Rotation:
        """Return the rotation for tokens (batch..., L) in C order.

        The angles have two axes. If all batch items have the same angles, their rows repeat.
        """

        def rows(angles: Array) -> Array:
            if math.prod(angles.shape[:-2]) > 1:
                angles = np.broadcast_to(angles, (*shape, angles.shape[-1]))
            return np.ascontiguousarray(angles).reshape(-1, angles.shape[-1])

        return Rotation(rows(self.cos), rows(self.sin), self.interleaved)

    def transposed(self) -> Rotation:
        """Return the rotation by the negative angles, with the same factor."""
        return Rotation(self.cos, -self.sin, self.interleaved)


def make_rotation(
    shape: tuple[int, ...],
    dtype: np.dtype[Any],
    positions: ArrayLike | None,
    *,
    base: float | None = None,
    rotary_dim: int | None = None,
    interleaved: bool = False,
    scaling: Mapping[str, Any] | None = None,
    frequencies: ArrayLike | None = None,
) -> Rotation:
    """Check the options of `rotary_embedding` for vectors of a shape (batch..., heads, L, D)."""
    length, dim = shape[-2:]
    interleaved = flag("interleaved", interleaved)
    precision = np.float64 if dtype == np.float64 else np.float32
    p = None if positions is None else _positions(positions, shape[:-3], length)
    with np.errstate(all="ignore"):
        if frequencies is None:
            kind, share = rope_type(scaling, base)
            rotated = _rotated(dim, rotary_dim, share)
            seen = length if p is None else int(min(p.max(initial=-1), 2**62)) + 1
            waves = kind.waves(rotated, seen)
        else:
            if base is not None or scaling is not None:
                refuse_kind("frequencies", "an array with base or scaling", "only one of them")
            waves = Waves(_own_frequencies(frequencies, dim, rotary_dim), 1.0)
        cos, sin = (
            _tables.of(waves, length, precision) if p is None else _angles(waves, p, precision)
        )
    return Rotation(cos, sin, interleaved)


def _rotated(dim: int, rotary_dim: int | None, share: float) -> int:
    """Return the number of rotated elements."""
    by_share = int(dim * share)
    rotated = by_share if rotary_dim is None else integer("rotary_dim", rotary_dim)
    if share < 1 and rotated != by_share:
        seen = f"{rotated} with a partial_rotary_factor of {share}"
        refuse("rotary_dim", seen, f"None, or {by_share}, which is that share of {dim}")
    if rotary_dim is None and share == 1 and dim % 2:
        advice = f"`rotary_dim={dim - 1}` leaves the last element as it is" if dim > 2 else ""
        refuse("head_dim", str(dim), "an even number: pairs of elements are rotated", advice)
    if not 2 <= rotated <= dim or rotated % 2:
        refuse("rotary_dim", str(rotated), f"an even number from 2 to {dim}, the head_dim")
    return rotated


def _own_frequencies(
    frequencies: ArrayLike, dim: int, rotary_dim: int | None
) -> NDArray[np.float64]:
    array = as_array("frequencies", frequencies)
    if not is_real(array.dtype):
        refuse_kind("frequencies", f"dtype {array.dtype.name}", "real numbers")
    pairs = dim // 2 if rotary_dim is None else integer("rotary_dim", rotary_dim) // 2
    if array.ndim != 1 or not 1 <= array.size <= dim // 2:
        expected = f"(n,) with n of at most {dim // 2}, one number per pair"
        refuse("frequencies", f"shape {array.shape}", expected)
    if rotary_dim is not None and array.size != pairs:
        refuse("frequencies", f"{array.size} numbers", f"{pairs}, which is half of rotary_dim")
    if not np.isfinite(array).all():
        refuse("frequencies", "a number that is not finite", "finite numbers")
    return array.astype(np.float64)


def _positions(positions: ArrayLike, batch: tuple[int, ...], length: int) -> NDArray[np.float64]:
    p = as_array("positions", positions)
    if p.size and not is_real(p.dtype):
        refuse_kind("positions", f"dtype {p.dtype.name}", "integers or floats")
    p = p.astype(np.float64)
    if not np.isfinite(p).all():
        refuse("positions", "a number that is not finite", "finite numbers")
    expected = (*batch, length)
    if p.ndim == 0 or p.shape[-1] != length or p.ndim > len(expected):
        wanted = f"one that broadcasts to {expected} and ends with {length}, the length"
        refuse("positions", f"shape {p.shape}", wanted)
    try:
        np.broadcast_to(p, expected)
    except ValueError:
        refuse("positions", f"shape {p.shape}", f"one that broadcasts to {expected}")
    return p


def _angles(waves: Waves, positions: NDArray[np.float64], precision: type) -> tuple[Array, Array]:
    """Return cosines and sines, (..., L, rotary_dim / 2)."""
    angles = positions[..., np.newaxis] * waves.frequencies
    factor = waves.attention_factor
    return (np.cos(angles) * factor).astype(precision), (np.sin(angles) * factor).astype(precision)


class _Tables:
    """A store of cosines and sines for positions 0, 1, ...: they cost more than the rotation."""

    def __init__(self, most_bytes: int) -> None:
        self._most_bytes = most_bytes
        self._lock = threading.Lock()
        self._tables: dict[object, tuple[Array, Array]] = {}  # the last used at the end

    @property
    def nbytes(self) -> int:
        return sum(cos.nbytes + sin.nbytes for cos, sin in self._tables.values())

    def of(self, waves: Waves, length: int, precision: type) -> tuple[Array, Array]:
        """Return tables for `length` positions: a part of a longer table, or an extended one.

        If a table is too large, its first positions are kept, and the next call computes only the
        others.
        """
        if length == 0:
            return _angles(waves, np.zeros(0), precision)
        key = (waves.frequencies.tobytes(), waves.attention_factor, precision)
        with self._lock:
            tables = self._tables.get(key)
        there = 0 if tables is None else len(tables[0])
        if there < length:
            new = _angles(waves, np.arange(there, length, dtype=np.float64), precision)
            if tables is not None:
                new = np.concatenate([tables[0], new[0]]), np.concatenate([tables[1], new[1]])
            tables = new
        assert tables is not None
        self._keep(key, tables)
        cos, sin = tables
        return cos[:length], sin[:length]

    def _keep(self, key: object, tables: tuple[Array, Array]) -> None:
        fitting = self._most_bytes // sum(table[:1].nbytes for table in tables)
        with self._lock:
            kept = self._tables.pop(key, None)  # another thread may have extended it
            if kept is None or len(kept[0]) < min(len(tables[0]), fitting):
                cos, sin = tables
                if len(cos) > fitting:
                    cos, sin = cos[:fitting].copy(), sin[:fitting].copy()
                kept = cos, sin
            self._tables[key] = kept
            while self.nbytes > self._most_bytes:
                del self._tables[next(iter(self._tables))]
        for table in (*tables, *kept):
            table.flags.writeable = False


_tables = _Tables(32 << 20)
