"""Checks of the arguments of a cache and of its methods."""

from __future__ import annotations

from dataclasses import MISSING, dataclass, fields
from typing import TYPE_CHECKING, Any

import numpy as np

from ._arguments import (
    MAX_DIM,
    check_bias,
    check_mask,
    check_meaning_of_axes,
    check_tail_mask,
    ints_per_batch,
)
from ._block_mask_store import BlockMaskStore
from ._checks import (
    INFERENCE_ELSEWHERE,
    as_array,
    at_least,
    check_layout,
    check_overlap,
    dtype_name,
    flag,
    kind_of,
    refuse,
    refuse_kind,
    refuse_unknown,
    snapshot,
)

if TYPE_CHECKING:
    from numpy.typing import ArrayLike, NDArray

    Array = NDArray[Any]

# The window and the max_rollback of a cache that forgets nothing.
UNLIMITED = 2**62

# Attributes that caches must share to be concatenated.
SHARED = (
    "kv_heads", "head_dim", "value_dim", "dtype", "quantize", "window", "keep_first",
    "max_rollback",
)  # fmt: skip


@dataclass(slots=True)
class CacheArguments:
    """The arguments of `KVCache`."""

    batch: int
    kv_heads: int
    head_dim: int
    value_dim: int
    dtype: np.dtype[Any]
    quantize: bool = False
    capacity: int = 0
    window: int | None = None
    keep_first: int = 0
    max_rollback: int = 16

    def __post_init__(self) -> None:
        for name, least in (
            ("batch", 0), ("kv_heads", 1), ("head_dim", 1), ("value_dim", 1), ("capacity", 0),
        ):  # fmt: skip
            number = at_least(name, getattr(self, name), least)
            if number > MAX_DIM:
                refuse(name, str(number), f"at most {MAX_DIM}")
            setattr(self, name, number)
        self.quantize = flag("quantize", self.quantize)
        if self.window is not None:
            self.window = min(at_least("window", self.window, 1), UNLIMITED)
        self.keep_first = min(at_least("keep_first", self.keep_first, 0), UNLIMITED)
        if self.keep_first and self.window is None:
            refuse("keep_first", f"{self.keep_first} without `window=`", "both, or 0")
        self.max_rollback = min(at_least("max_rollback", self.max_rollback, 0), UNLIMITED)

    def __str__(self) -> str:
        """Return the text in parentheses of a repr: sizes, dtype, and non-default options."""
        shown = [str(self.batch), str(self.kv_heads), str(self.head_dim)]
        if self.value_dim != self.head_dim:
            shown.append(str(self.value_dim))
        shown.append(f"dtype={self.dtype}")
        for field in fields(self):
            value = getattr(self, field.name)
            if field.default not in (MISSING, value):
                shown.append(f"{field.name}={value}")
        return ", ".join(shown)

    def arrays(self, capacity: int) -> list[tuple[tuple[int, ...], np.dtype[Any]]]:
        """Return shapes and dtypes of keys, values and their scales, for `capacity` tokens."""
        rows = (self.batch, self.kv_heads, capacity)
        stored = np.dtype(np.int8) if self.quantize else self.dtype
        found: list[tuple[tuple[int, ...], np.dtype[Any]]]
        found = [((*rows, dim), stored) for dim in (self.head_dim, self.value_dim)]
        return found + [(rows, np.dtype(np.float32))] * (2 if self.quantize else 0)

    def check_tokens(
        self, k: ArrayLike, v: ArrayLike, lengths: int | ArrayLike | None, layout: str, most: int
    ) -> tuple[list[Array], list[int] | None]:
        """Return keys and values to append, heads first, and the number of tokens per sequence,
        None for all."""
        new = [
            self._check_new("k", k, self.head_dim, layout),
            self._check_new("v", v, self.value_dim, layout),
        ]
        given = new[0].shape[2]
        if new[1].shape[2] != given:
            refuse("v", f"{new[1].shape[2]} tokens", f"{given} as in k")
        if given > most:
            expected = f"at most {most}, the size of the window"
            refuse("k", f"{given} tokens", expected, "`append_and_attend` takes any number")
        counts = None if lengths is None else self.check_numbers("lengths", lengths, given)
        if counts is not None and counts.count(given) == len(counts):
            counts = None
        return new, counts

    def _check_new(self, name: str, x: ArrayLike, dim: int, layout: str) -> Array:
        array = as_array(name, x)
        if array.dtype != self.dtype:
            refuse_kind(name, dtype_name(array), f"{self.dtype.name}, the dtype of the cache")
        heads, tokens = (1, 2) if layout == "bhld" else (2, 1)
        shape = array.shape
        if len(shape) != 4 or (shape[0], shape[heads], shape[3]) != (
            self.batch, self.kv_heads, dim,
        ):  # fmt: skip
            axes = {0: self.batch, heads: self.kv_heads, tokens: "tokens", 3: dim}
            expected = ", ".join(str(axes[axis]) for axis in range(4))
            refuse(name, f"shape {shape}", f"({expected})")
        return array if layout == "bhld" else array.swapaxes(1, 2)

    def check_queries(self, q: ArrayLike, layout: str) -> Array:
        check_layout(layout)
        queries = q if type(q) is np.ndarray else as_array("q", q)
        if queries.dtype != self.dtype:
            refuse_kind("q", dtype_name(queries), f"{self.dtype.name}, the dtype of the cache")
        shape = queries.shape
        if len(shape) != 4 or shape[0] != self.batch or shape[3] != self.head_dim:
            axes = "heads, length" if layout == "bhld" else "length, heads"
            refuse("q", f"shape {shape}", f"({self.batch}, {axes}, {self.head_dim})")
        heads = shape[1 if layout == "bhld" else 2]
        if heads % self.kv_heads != 0:
            expected = f"a multiple of the cache's {self.kv_heads} KV heads"
            refuse("q", f"{heads} heads", expected)
        return queries

    def check_numbers(self, name: str, values: int | ArrayLike, most: int) -> list[int]:
        """Return an int from 0 to `most` for each sequence."""
        array = snapshot(name, values)
        if array.ndim > 0 and array.shape != (self.batch,):
            expected = f"an int, or shape ({self.batch},), one int per sequence"
            refuse(name, f"shape {array.shape}", expected)
        numbers = ints_per_batch(name, array, (self.batch,), 0, most)
        assert numbers is not None
        return list(map(int, numbers))


def check_pairs(
    mask: ArrayLike | BlockMaskStore | None,
    tail_mask: ArrayLike | None,
    bias: ArrayLike | None,
    q: Array,
    layout: str,
    lengths: list[int],
) -> tuple[Array | None, Array | None, Array | None]:
    """Return masks and bias with all axes (batch, Hq, Lq, T), each of full length or 1.

    T is the largest of `lengths`, except for a tail mask, which has its own T.
    """
    batch, *rest = q.shape[:3]
    heads, rows = rest if layout == "bhld" else rest[::-1]
    most = max(lengths, default=0)
    pairs = batch, heads, rows, most
    mask_ = tail_mask_ = bias_ = None
    if isinstance(mask, BlockMaskStore):
        if mask.shape[-2:] != (rows, most):
            expected = f"one with {(rows, most)} queries and tokens so far"
            advice = "pass the slice `mask[first:last, :tokens]` of the mask of the whole text"
            refuse("mask", f"a BlockMask of shape {mask.shape}", expected, advice)
        mask = mask.to_dense()
    if mask is not None:
        mask_ = as_array("mask", mask)
        check_mask(mask_)
        check_meaning_of_axes(mask_, (batch,), heads, rows, "T")
        mask_ = _with_all_axes("mask", mask_, pairs)
    if tail_mask is not None:
        tail_mask_ = as_array("tail_mask", tail_mask)
        check_tail_mask(tail_mask_, most, f"{most}, the number of tokens so far")
        check_meaning_of_axes(tail_mask_, (batch,), heads, rows, "T", "tail_mask")
        of_tail = batch, heads, rows, tail_mask_.shape[-1]
        tail_mask_ = _with_all_axes("tail_mask", tail_mask_, of_tail, "where T counts last tokens")
    if bias is not None:
        bias_ = as_array("bias", bias)
        check_bias(bias_, q.dtype)
        check_meaning_of_axes(bias_, (batch,), heads, rows, "T", "bias")
        bias_ = _with_all_axes("bias", bias_, pairs)
    return mask_, tail_mask_, bias_


def _with_all_axes(
    name: str, x: Array, pairs: tuple[int, ...], keys: str = "where T counts all tokens so far"
) -> Array:
    missing = len(pairs) - x.ndim
    fits = missing >= 0 and all(
        n in (1, wanted) for n, wanted in zip(x.shape, pairs[missing:], strict=True)
    )
    if not fits:
        expected = f"one that broadcasts to (batch, Hq, Lq, T) = {pairs}, {keys}"
        refuse(name, f"shape {x.shape}", expected)
    return x[(np.newaxis,) * missing]


def check_unknown(method: str, options: dict[str, Any]) -> None:
    """Refuse options that a method of `KVCache` does not take, unless they are None."""
    for name in ("kv_lengths", "k_scale", "v_scale"):
        if (value := options.pop(name, None)) is not None:
            refuse_kind(name, kind_of(value), "None", "the cache keeps its own lengths and scales")
    for name in ("q_offset", "q_lengths"):
        if (value := options.pop(name, None)) is not None:
            refuse_kind(name, kind_of(value), "None", "the queries belong to the tokens in k")
    if options:
        refuse_unknown(f"KVCache.{method}", options, INFERENCE_ELSEWHERE)


def check_apart(out: object, arrays: tuple[Array, ...]) -> None:
    """Refuse an `out` in the memory of a cache."""
    if isinstance(out, np.ndarray) and any(np.may_share_memory(out, x) for x in arrays):
        names = [f"the cache's {what}" for what in ("keys", "values", "k_scale", "v_scale")]
        check_overlap(out, dict(zip(names, arrays, strict=False)))
