"""The computations of `numattn.dask`'s tasks, on chunks that are NumPy arrays.

A *state* is attention to some of the keys: the result, in float32 for 16-bit chunks, and its
log-sum-exp. `merge_states` merges states of disjoint keys, some rows at a time.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from . import _gradient_arguments, _gradients, _runtime
from ._arguments import MAX_POSITION, lse_heads_first
from ._attention import attention
from ._block_mask_store import BlockMaskStore
from ._checks import precision_of, refuse
from ._merge_states import merge_states

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    Array = NDArray[Any]
    State = tuple[Array, Array]

# Elements of a result that are merged at a time: their temporary arrays stay in the cache.
_MERGED_AT_ONCE = 2**16

# A fold computes an eighth of its queries at a time, within these limits.
_FEWEST_QUERIES, _MOST_QUERIES = 512, 4096


@dataclass(frozen=True)
class Positions:
    """Positions and lengths of the sequences of a chunk's batch items, in the whole arrays."""

    q_offset: NDArray[np.int64]
    kv_lengths: NDArray[np.int64] | None
    q_lengths: NDArray[np.int64] | None

    def within(self, query: int, queries: int, key: int, keys: int) -> dict[str, Any]:
        """Return these options of `attention` for a number of queries and of keys, from `query`
        and `key` on."""
        offset = self.q_offset + (query - key)
        lengths = {
            "kv_lengths": None if self.kv_lengths is None else self.kv_lengths - key,
            "q_lengths": None if self.q_lengths is None else self.q_lengths - query,
        }
        most = {"kv_lengths": keys, "q_lengths": queries}
        return {
            "q_offset": np.clip(offset, -MAX_POSITION, MAX_POSITION),
            **{n: None if x is None else np.clip(x, 0, most[n]) for n, x in lengths.items()},
        }


@dataclass(frozen=True)
class Rows:
    """What all tasks for a chunk of queries need to know."""

    shape: tuple[int, ...]  # of their result, in the layout
    dtype: np.dtype[Any]
    first: int  # query of the chunk
    positions: Positions
    options: dict[str, Any]  # of `attention`, including the layout
    sinks: NDArray[np.float64] | None
    axes: int  # of masks: they have all axes, so that none is mistaken for another

    @property
    def row_axis(self) -> int:
        """The axis of the queries in the log-sum-exp, counted from the end."""
        return -2 if self.options["layout"] == "blhd" and len(self.shape) > 2 else -1

    @property
    def length(self) -> int:
        return self.shape[self.row_axis - 1]

    def indices(self, part: slice) -> tuple[Any, Any]:
        """Return the indices of some queries in the result and its log-sum-exp."""
        of_lse = (..., part, *(slice(None),) * (-1 - self.row_axis))
        return (*of_lse, slice(None)), of_lse


def fold(
    rows: Rows, q: Array, k: Sequence[Array], v: Sequence[Array], masks: Sequence[Array],
    biases: Sequence[Array], keys: Sequence[slice], with_sinks: bool, gives: str,
) -> Any:  # fmt: skip
    """Attend to some chunks of keys in turn, with some of the queries at a time.

    Memory then holds one result of the size of a chunk, and little else.
    """
    out, lse = _empty(rows, gives)
    at_once = min(max(rows.length // 8, _FEWEST_QUERIES), _MOST_QUERIES)
    for first in range(0, rows.length, at_once):
        part = slice(first, first + at_once)
        of_out, of_lse = rows.indices(part)
        some = replace(rows, shape=out[of_out].shape, first=rows.first + first)
        state = _without_keys(some) if with_sinks else None
        for n, keys_of_chunk in enumerate(keys):
            mask, bias = (_of_queries(rows, x[n], part) if x else None for x in (masks, biases))
            of_keys = attention(
                q[_of_axis(q, rows.options["layout"], part)],
                k[n],
                v[n],
                mask=mask,
                bias=bias,
                **_placed(some, k[n], keys_of_chunk),
                **rows.options,
                out=np.empty(some.shape, precision_of(rows.dtype)),
                return_lse=True,
            )
            if state is None:
                state = of_keys
            else:
                _merge_into(some, state, [state, of_keys])
        assert state is not None
        with np.errstate(all="ignore"):
            out[of_out], lse[of_lse] = state
    return _given(out, lse, gives)


def merge(rows: Rows, states: Sequence[State], gives: str) -> Any:
    """Merge states of disjoint keys."""
    out, lse = _empty(rows, gives)
    _merge_into(rows, (out, lse), states)
    return _given(out, lse, gives)


def without_keys(rows: Rows, gives: str) -> Any:
    """Return the result of queries that attend to no key of any chunk."""
    out, lse = _without_keys(rows)
    return _given(out.astype(rows.dtype, copy=False), lse, gives)


def _empty(rows: Rows, gives: str) -> State:
    precision = precision_of(rows.dtype)
    dtype = precision if gives == "state" else rows.dtype
    return np.empty(rows.shape, dtype), np.empty(rows.shape[:-1], precision)


def _given(out: Array, lse: Array, gives: str) -> Any:
    return out if gives == "out" else (out, lse)


def _without_keys(rows: Rows) -> State:
    precision = precision_of(rows.dtype)
    out, lse = np.zeros(rows.shape, precision), np.full(rows.shape[:-1], -np.inf, precision)
    if rows.sinks is not None:
        is_valid: Any = True
        if rows.positions.q_lengths is not None:
            here = rows.first + np.arange(rows.length)
            is_valid = here < rows.positions.q_lengths[..., np.newaxis, np.newaxis]
        one_head = lse.ndim == 1
        heads_first = lse_heads_first(lse, one_head, rows.options["layout"])
        heads_first[...] = np.where(is_valid, rows.sinks[:, np.newaxis], -np.inf)
    return out, lse


def _merge_into(rows: Rows, merged: State, states: Sequence[State]) -> None:
    """Merge states; `merged` may be one of them."""
    elements = max(1, math.prod(rows.shape))
    at_once = max(1, _MERGED_AT_ONCE * rows.length // elements)
    for first in range(0, rows.length, at_once):
        of_out, of_lse = rows.indices(slice(first, first + at_once))
        parts = [(out[of_out], lse[of_lse]) for out, lse in states]
        out, lse = merge_states(parts)
        with np.errstate(all="ignore"):
            merged[0][of_out], merged[1][of_lse] = out, lse


def _of_axis(x: Array, layout: str, part: slice) -> tuple[Any, ...]:
    """Return the index of some rows of an array like q."""
    behind = 2 if layout == "blhd" and x.ndim > 2 else 1
    return (..., part, *(slice(None),) * behind)


def _of_queries(rows: Rows, x: Array, part: slice) -> Array:
    """Return the part of a mask or bias for some queries, with all axes."""
    x = _all_axes(rows, x)
    return x if x.shape[-2] == 1 else x[..., part, :]


def _all_axes(rows: Rows, x: Array) -> Array:
    """Return a mask or bias with all axes, because axes of different kinds may have equal sizes."""
    if isinstance(x, BlockMaskStore):  # its axes are not ambiguous
        return x
    return x.reshape((1,) * (rows.axes - x.ndim) + x.shape)


def _placed(rows: Rows, k: Array, keys: slice) -> dict[str, Any]:
    in_rows = k.ndim > 2 and rows.options["layout"] == "blhd"
    count = k.shape[-3 if in_rows else -2]
    if count != keys.stop - keys.start:
        expected = f"{keys.stop - keys.start}, as the chunks of the dask array say"
        advice = "the function that made the chunk must not change its shape"
        refuse("k", f"a chunk of {count} keys", expected, advice)
    return rows.positions.within(rows.first, rows.length, keys.start, count)


# ---- gradients ---------------------------------------------------------------------------------


def pair_gradients(
    rows: Rows, groups: Sequence[Sequence[str]], q: Array, k: Array, v: Array, bias: Array | None,
    mask: Array | None, keys: slice, out: Array, lse: Array, dout: Array, dlse: Array | None,
) -> list[tuple[Array, ...]]:  # fmt: skip
    """Return the contribution of a chunk of queries and a chunk of keys to the gradients, without
    rounding."""
    bias_gradient = any("bias" in group for group in groups)
    problem = _gradient_arguments.check(
        q,
        k,
        v,
        bias_gradient,
        None if bias is None else _all_axes(rows, bias),
        None,
        mask=None if mask is None else _all_axes(rows, mask),
        tail_mask=None,
        **_placed(rows, k, keys),
        **rows.options,
    )
    _gradient_arguments.set_results(problem, out, lse)
    arguments = _gradient_arguments.with_gradients(problem, dout, dlse)
    _runtime.computations.attention_backward(arguments)
    dq, dk, dv, dbias = _gradient_arguments.as_inputs(problem, arguments, rounds=False)
    sums = {"q": dq, "k": dk, "v": dv}
    if bias is not None and dbias is not None:
        sums["bias"] = dbias.reshape(bias.shape)
    return [tuple(sums[name] for name in group) for group in groups]


def sink_gradients(
    rows: Rows, out: Array, lse: Array, dout: Array, dlse: Array | None
) -> tuple[Array]:
    """Return the contribution of a chunk of queries to the gradient of the sinks; it needs no
    keys."""
    q = np.broadcast_to(np.zeros((), rows.dtype), rows.shape)
    no_keys = q[_of_axis(q, rows.options["layout"], slice(0, 0))]
    problem = _gradient_arguments.check(
        q, no_keys, no_keys, False, None, rows.sinks, mask=None, tail_mask=None,
        **_placed(rows, no_keys, slice(0, 0)), **rows.options,
    )  # fmt: skip
    _gradient_arguments.set_results(problem, out, lse)
    arguments = _gradient_arguments.with_gradients(problem, dout, dlse)
    with np.errstate(all="ignore"):
        return (_gradients.gradient_of_sinks(arguments),)


def add(parts: Sequence[tuple[Array, ...]], dtypes: Sequence[np.dtype[Any]]) -> tuple[Array, ...]:
    """Add up gradients, one array of each part at a time, and round each sum once."""
    totals = []
    for arrays, dtype in zip(zip(*parts, strict=True), dtypes, strict=True):
        total = arrays[0]
        with np.errstate(all="ignore"):
            for n, other in enumerate(arrays[1:]):
                # NumPy returns a scalar for the sum of arrays without axes.
                total = np.asarray(total + other) if n == 0 else np.add(total, other, out=total)
            totals.append(total.astype(dtype, copy=False))
    return tuple(totals)


def zeros(shapes: Sequence[tuple[int, ...]], dtypes: Sequence[np.dtype[Any]]) -> tuple[Array, ...]:
    """Return the gradients of chunks without any pair."""
    return tuple(np.zeros(s, d) for s, d in zip(shapes, dtypes, strict=True))
