"""Inputs that operators of ONNX graphs share, in the form that numattn takes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from ._attention import attention
from ._checks import precision_of, refuse, refuse_kind
from ._rotary import Rotation

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from onnx.reference.op_run import OpRun

    Array = NDArray[Any]


def wanted(operator: OpRun, output: int) -> bool:
    """Return whether the graph uses this output."""
    names = operator.onnx_node.output
    return len(names) > output and bool(names[output])


def heads_of(name: str, x: Array, heads: int | None) -> Array:
    """View an input of three axes, (B, L, H * D), or four axes as (B, H, L, D)."""
    if x.ndim == 4:
        if heads and heads != x.shape[1]:
            refuse(name, f"shape {x.shape}", f"{heads} heads, as in the attribute")
        return x
    if x.ndim != 3 or not heads or x.shape[-1] % heads:
        expected = "(B, H, L, D), or (B, L, H * D) with the number of heads H as an attribute"
        with_heads = f"with {heads} heads" if heads else "without the number of heads"
        refuse(name, f"shape {x.shape} {with_heads}", expected)
    return x.reshape(*x.shape[:2], heads, x.shape[-1] // heads).swapaxes(1, 2)


def flat(x: Array) -> Array:
    """Return an array (B, H, L, D) as (B, L, H * D)."""
    batch, heads, length, dim = x.shape
    return x.swapaxes(1, 2).reshape(batch, length, heads * dim)


def check_past(name: str, past: Array | None, new: Array, other: Array | None) -> None:
    """Refuse a cache that does not fit new tokens; `other` is the cache for values or keys."""
    if (past is None) != (other is None):
        refuse("past_key, past_value", "only one of them", "both or none")
    if past is None:
        return
    fits = past.ndim == 4 and past.shape[:2] == new.shape[:2] and past.shape[3] == new.shape[3]
    if not fits or past.dtype != new.dtype:
        seen = f"{new.dtype} {new.shape} with a past of {past.dtype} {past.shape}"
        refuse(name, seen, "the same dtype and (B, H, L, D) in both, except for L")


def after_past(name: str, past: Array | None, new: Array, other: Array | None) -> Array:
    """Return the tokens of a cache, then new ones; `other` is the cache for values or keys."""
    check_past(name, past, new, other)
    return new if past is None else np.concatenate((past, new), axis=2)


def per_item(name: str, values: Array, batch: int, low: int, high: int) -> NDArray[np.int64]:
    """Return one int per batch item."""
    numbers = values.reshape(-1)
    if numbers.dtype.kind not in "iu":
        refuse_kind(name, f"dtype {numbers.dtype}", "ints")
    if numbers.shape != (batch,):
        refuse(name, f"shape {values.shape}", f"one number per batch item, ({batch},)")
    if numbers.size and not low <= numbers.min() <= numbers.max() <= high:
        refuse(name, f"{numbers.min()} to {numbers.max()}", f"{low} to {high}")
    return numbers.astype(np.int64)


def mask_or_bias(name: str, mask: Array | None, q: Array, keys: int) -> dict[str, Array]:
    """Return a mask as an option: `mask` for bools, and `bias` for numbers, which are added."""
    if mask is None:
        return {}
    if not 1 <= mask.ndim <= 4 or mask.shape[-1] > keys:
        expected = f"one to four axes, the last one of at most {keys} keys"
        refuse(name, f"shape {mask.shape}", expected)
    aligned = mask[(np.newaxis,) * (4 - mask.ndim)]
    if mask.dtype == np.bool_:
        return {"mask": aligned}
    if mask.dtype != q.dtype:
        aligned = rounded(aligned, precision_of(q.dtype))
    return {"bias": aligned}


def attend(q: Array, k: Array, v: Array, is_flat: bool, options: dict[str, Any]) -> Array:
    """Compute attention on arrays (B, H, L, D), in the dtype of q.

    Return (B, H, L, D), or (B, L, H * D) if `is_flat`.
    """
    dtype = q.dtype
    if v.dtype != dtype:
        common = np.result_type(q, v)
        q, k, v = (x.astype(common, copy=False) for x in (q, k, v))
        if "bias" in options:
            options = {**options, "bias": options["bias"].astype(common, copy=False)}
    batch, heads, length, _ = q.shape
    if is_flat:
        out = np.empty((batch, length, heads, v.shape[3]), q.dtype).swapaxes(1, 2)
    else:
        out = np.empty((batch, heads, length, v.shape[3]), q.dtype)
    attention(q, k, v, out=out, **options)
    out = rounded(out, dtype)
    return flat(out) if is_flat else out


def rounded(x: Array, dtype: np.dtype[Any]) -> Array:
    """Return x in a dtype, without a copy if it has it; numbers that are too large become inf."""
    with np.errstate(all="ignore"):
        return x.astype(dtype, copy=False)


def check_angles(cos: Array, sin: Array, rotary_dim: int, dim: int) -> None:
    """Refuse tables that do not fit each other or the vectors."""
    if cos.shape != sin.shape or cos.ndim < 2:
        refuse("cos_cache, sin_cache", f"shapes {cos.shape} and {sin.shape}", "one shape for both")
    if cos.shape[-1] * 2 != rotary_dim or not 2 <= rotary_dim <= dim:
        seen = f"{cos.shape[-1]} angles for {rotary_dim} of {dim} elements"
        refuse("cos_cache", seen, "half as many angles as rotated elements")


def rotated(x: Array, cos: Array, sin: Array, positions: Array | None, interleaved: bool) -> Array:
    """Return vectors (B, H, L, D), rotated by angles (B, L, pairs), or by tables at (B, L)
    positions.

    The result has the strides of `x`.
    """
    if positions is not None:
        if cos.ndim != 2 or positions.shape != (len(x), x.shape[2]):
            seen = f"shape {positions.shape} with tables of shape {cos.shape}"
            refuse("position_ids", seen, f"({len(x)}, {x.shape[2]}) and tables of two axes")
        if positions.size and not 0 <= positions.min() <= positions.max() < len(cos):
            seen = f"{positions.min()} to {positions.max()}"
            refuse("position_ids", seen, f"0 to {len(cos) - 1}, the rows of the tables")
        cos, sin = cos[positions], sin[positions]
    precision = precision_of(x.dtype)
    rotation = Rotation(rounded(cos, precision), rounded(sin, precision), interleaved)
    out = np.empty_like(x)
    rotation.apply(x, out)
    return out
