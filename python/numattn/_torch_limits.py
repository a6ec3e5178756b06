"""Which calls of PyTorch's function numattn computes, and how it treats their shapes."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from ._checks import ACCEPTED_DTYPES
from ._torch_tensors import DTYPES, after_autocast, has_tangent, unfit

DTYPE_NAMES = "one of " + ", ".join(ACCEPTED_DTYPES)

# Calls with a larger scale go to PyTorch's function, which may overflow.
_LARGEST_SCALE = 1e30


class Reason(NamedTuple):
    """Why numattn does not compute a call; the text is made only when it is read.

    In recorded programs shapes are symbolic, and must not be converted to text.
    """

    name: str
    seen: object  # the value, a text, or shapes
    taken: str

    def __str__(self) -> str:
        seen = self.seen
        if isinstance(seen, tuple):
            shapes = ", ".join(str(tuple(shape)) for shape in seen)
            seen = f"shapes {shapes}"
        elif not isinstance(seen, str):
            seen = repr(seen)
        return f"{self.name}: got {seen}, numattn takes {self.taken}"


def reason_against(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, attn_mask: torch.Tensor | None,
    dropout_p: float, is_causal: bool, scale: float | None, enable_gqa: bool,
) -> Reason | None:  # fmt: skip
    """Return why numattn does not compute a call of PyTorch's function, or None if it does."""
    tensors = {"query": query, "key": key, "value": value}
    with_mask = tensors if attn_mask is None else {**tensors, "attn_mask": attn_mask}
    for name, x in with_mask.items():
        seen = unfit(x)
        if seen is not None:
            return Reason(name, seen, "plain tensors on the CPU")
    if has_tangent(*with_mask.values()):
        seen = "forward-mode derivatives"
        return Reason("query, key, value", seen, "reverse-mode derivatives (backward)")
    if query.dtype not in DTYPES:
        return Reason("query", f"dtype {query.dtype}", DTYPE_NAMES)
    dtypes = {name: after_autocast(x.dtype) for name, x in tensors.items()}
    if not dtypes["query"] == dtypes["key"] == dtypes["value"]:
        seen = ", ".join(f"{name} {dtype}" for name, dtype in dtypes.items())
        return Reason("query, key, value", seen, "one dtype for all three")
    return (
        _why_not_shapes(query, key, value, enable_gqa)
        or _why_not_mask(query, key, value, attn_mask, enable_gqa)
        or _why_not_numbers(dropout_p, is_causal, scale)
    )


def _why_not_shapes(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, enable_gqa: bool
) -> Reason | None:
    tensors = (query, key, value)
    least = 3 if enable_gqa else 2
    wanted = None
    if any(x.ndim < least for x in tensors):
        wanted = "at least 3 axes with enable_gqa" if enable_gqa else "at least 2 axes"
    elif query.shape[-1] != key.shape[-1] or key.shape[-2] != value.shape[-2]:
        wanted = "(..., Lq, D), (..., Lk, D) and (..., Lk, Dv)"
    elif query.shape[-1] == 0 or value.shape[-1] == 0:
        wanted = "at least one element in the last axis"
    elif _leading(query, key, value, enable_gqa) is None:
        wanted = "leading axes that broadcast (heads too without enable_gqa)"
    elif enable_gqa:
        heads, key_heads, value_heads = _heads(*tensors)
        if key_heads == 0 or value_heads == 0 or heads % key_heads or heads % value_heads:
            wanted = "numbers of heads that divide the number of query heads"
        elif key_heads != value_heads and 1 not in (key_heads, value_heads):
            wanted = "the same number of heads in key and value, or 1"
    elif 0 in _heads(*tensors):
        wanted = "at least one head"
    if wanted is None:
        return None
    return Reason("query, key, value", tuple(x.shape for x in tensors), wanted)


def _heads(*tensors: torch.Tensor) -> list[int]:
    return [x.shape[-3] if x.ndim > 2 else 1 for x in tensors]


def _leading(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, enable_gqa: bool
) -> tuple[int, ...] | None:
    """Return the leading axes of the result, heads included; None if they do not broadcast."""
    if not enable_gqa:
        return _broadcast(*(x.shape[:-2] for x in (query, key, value)))
    batch = _broadcast(*(x.shape[:-3] for x in (query, key, value)))
    return None if batch is None else (*batch, query.shape[-3])


def _broadcast(*shapes: tuple[int, ...]) -> tuple[int, ...] | None:
    """Return the shape that shapes broadcast to, or None.

    This also works while a program is recorded, unlike catching the error of PyTorch's function.
    """
    axes = max(len(shape) for shape in shapes)
    lengths = []
    for axis in range(-axes, 0):
        length = 1
        for shape in shapes:
            n = shape[axis] if len(shape) >= -axis else 1
            if n != 1 and length == 1:
                length = n
            elif n not in (1, length):
                return None
        lengths.append(length)
    return tuple(lengths)


def _why_not_mask(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None,
    enable_gqa: bool,
) -> Reason | None:  # fmt: skip
    if mask is None:
        return None
    dtype, wanted = after_autocast(mask.dtype), after_autocast(query.dtype)
    if dtype not in (torch.bool, torch.float32, wanted):
        return Reason("attn_mask", f"dtype {dtype}", f"bool, float32 or the query's {wanted}")
    leading = _leading(query, key, value, enable_gqa)
    assert leading is not None
    pairs = (*leading, query.shape[-2], key.shape[-2])
    fits = 2 <= mask.ndim <= len(pairs) and all(
        n in (1, of_pairs)
        for n, of_pairs in zip(mask.shape, pairs[len(pairs) - mask.ndim :], strict=True)
    )
    if fits:
        return None
    tensors = (mask, query, key, value)
    return Reason(
        "attn_mask, query, key, value",
        tuple(x.shape for x in tensors),
        "a mask of at least two axes that broadcasts to (..., Lq, Lk)",
    )


def _why_not_numbers(dropout_p: object, is_causal: object, scale: Any) -> Reason | None:
    if not isinstance(dropout_p, (float, int)) or not 0 <= dropout_p < 1:
        return Reason("dropout_p", dropout_p, "numbers of at least 0 and less than 1")
    if not isinstance(is_causal, bool):
        return Reason("is_causal", is_causal, "True or False")
    is_number = scale is None or isinstance(scale, (float, int, torch.SymFloat, torch.SymInt))
    if not is_number or not (scale is None or abs(scale) < _LARGEST_SCALE):
        return Reason("scale", scale, f"None or a magnitude below {_LARGEST_SCALE:.0e}")
    return None


def as_numattn_broadcasts(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, enable_gqa: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return tensors that numattn broadcasts like PyTorch: equal leading axes, heads that fit."""
    if query.ndim == key.ndim == value.ndim == 2:
        return query, key, value
    leading = _leading(query, key, value, enable_gqa)
    assert leading is not None
    *batch, heads = leading
    key_heads = max(_heads(key, value))
    if not enable_gqa and key_heads != 1:
        key_heads = heads

    def expanded(x: torch.Tensor, heads: int) -> torch.Tensor:
        shape = (*batch, heads, *x.shape[-2:])
        return x if x.shape == shape else x.expand(shape)

    return expanded(query, heads), expanded(key, key_heads), expanded(value, key_heads)
