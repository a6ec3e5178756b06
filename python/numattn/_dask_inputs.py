"""The arrays of `numattn.dask`: checks of shapes and dtypes, and chunks that fit each other.

Nothing is computed here: `attention`'s own checks get arrays of the same shapes that have only one
element in memory.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import dask.array as da
import numpy as np

from ._checks import as_array, refuse, refuse_kind

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from numpy.typing import NDArray

    from ._arguments import Arguments

    Given = da.Array | NDArray[Any]
    Sizes = tuple[int, ...]

# Arguments that every task gets: numbers per batch item or head.
SMALL = ("q_offset", "kv_lengths", "q_lengths", "alibi_slopes", "sinks")


def given(name: str, x: object) -> Given:
    """Return a dask array with chunks of known size, or a NumPy array."""
    if not isinstance(x, da.Array):
        return as_array(name, x)  # type: ignore[arg-type]
    if any(math.isnan(n) for n in x.shape):
        refuse(
            name,
            f"chunks of unknown size (shape {x.shape})",
            "chunks of known size",
            f"call `{name}.compute_chunk_sizes()` first",
        )
    if type(x._meta) is not np.ndarray:
        refuse_kind(name, f"chunks of {type(x._meta).__name__}", "chunks of numpy.ndarray")
    return x


def check_inputs(arrays: dict[str, Given]) -> None:
    """Refuse q, k and v if none is a dask array, or one has 8 bits."""
    if not any(isinstance(x, da.Array) for x in arrays.values()):
        names = ", ".join(arrays)
        refuse_kind(
            names,
            "NumPy arrays only",
            "at least one dask array",
            "pass arrays in memory to `numattn.attention` and `numattn.attention_backward`, or "
            "convert one with `dask.array.from_array(q, chunks=...)`",
        )
    for name, x in arrays.items():
        if x.dtype == np.int8:
            refuse_kind(name, "dtype int8", "floats", f"multiply `{name}` by its scales first")


def check_small(options: dict[str, Any]) -> None:
    """Refuse dask arrays where numbers are needed when the graph is built."""
    for name in SMALL:
        if isinstance(options[name], da.Array):
            advice = f"pass `{name}.compute()`"
            refuse_kind(name, "a dask array", "numbers in memory", advice)


def of_one_element(x: Given) -> NDArray[Any]:
    """Return an array of this shape and dtype for checks, with one element in memory."""
    return np.broadcast_to(np.zeros((), x.dtype), x.shape)


@dataclass(frozen=True)
class Chunks:
    """The sizes of the chunks along each axis of the pairs of queries and keys."""

    batch: tuple[Sizes, ...]
    heads: Sizes  # of queries
    kv_heads: Sizes
    kv_of: Sizes  # which chunk of KV heads a chunk of query heads reads
    queries: Sizes
    keys: Sizes
    layout: str
    one_head: bool

    @property
    def pairs(self) -> tuple[Sizes, ...]:
        return (*self.batch, self.heads, self.queries, self.keys)

    def of_rows(self, x: Given, heads: Sizes, rows: Sizes) -> tuple[Sizes, ...]:
        """Return the chunks of an array like q, k or v."""
        if x.ndim == 2:
            return (rows, (x.shape[-1],))
        first = len(self.batch) - (x.ndim - 3)
        batch = tuple(
            sizes if n == sum(sizes) else (n,)
            for n, sizes in zip(x.shape[:-3], self.batch[first:], strict=True)
        )
        return (*batch, *self.in_layout(heads, rows), (x.shape[-1],))

    def of_pairs(self, x: Given) -> tuple[Sizes, ...]:
        """Return the chunks of a mask or bias, which broadcasts to all pairs."""
        sizes = self.pairs[len(self.pairs) - x.ndim :]
        return tuple(s if n == sum(s) else (n,) for n, s in zip(x.shape, sizes, strict=True))

    def in_layout(self, head: Any, row: Any) -> tuple[Any, ...]:
        """Return what belongs to the axes of heads and rows, in the order of the result's axes."""
        if self.one_head:
            return (row,)
        return (head, row) if self.layout == "bhld" else (row, head)

    def of_result(self, index: tuple[int, ...]) -> tuple[int, ...]:
        """Return the index of the result's chunk for an index of batch axes, heads and queries."""
        return (*index[:-2], *self.in_layout(*index[-2:]), 0)

    def result(self, head_dim: int) -> tuple[Sizes, ...]:
        return (*self.batch, *self.in_layout(self.heads, self.queries), (head_dim,))


def starts(sizes: Sizes) -> list[int]:
    """Return where each chunk begins, followed by the length of the axis."""
    return [0, *np.cumsum(sizes, dtype=np.int64).tolist()]


def choose_chunks(q: Given, k: Given, v: Given, arguments: Arguments, layout: str) -> Chunks:
    """Use the chunks of q for the result and of k for the keys; the other arrays follow.

    If one of them is a NumPy array, its chunks come from the other arrays.
    """
    batch_shape = arguments.q.shape[:-3]
    query_heads, kv_heads = arguments.q.shape[-3], arguments.k.shape[-3]
    query_length, key_length = arguments.q.shape[-2], arguments.k.shape[-2]
    of_q, of_k, of_v = (_chunks_heads_first(x, layout) for x in (q, k, v))
    queries, keys = (x and x[-2] for x in (of_q, of_k or of_v))
    if query_length == key_length:
        queries, keys = queries or keys, keys or queries
    heads, of_kv, kv_of = fitting_heads(
        (of_q and of_q[-3]) or (query_heads,),
        next((x[-3] for x in (of_k, of_v) if x), (kv_heads,)),
    )
    return Chunks(
        batch=tuple(
            next(_batch_chunks((of_q, of_k, of_v), n - len(batch_shape), length), (length,))
            for n, length in enumerate(batch_shape)
        ),
        heads=heads,
        kv_heads=of_kv,
        kv_of=kv_of,
        queries=queries or (query_length,),
        keys=keys or (key_length,),
        layout=layout,
        one_head=q.ndim == k.ndim == v.ndim == 2,
    )


def _chunks_heads_first(x: Given, layout: str) -> tuple[Sizes, ...] | None:
    if not isinstance(x, da.Array):
        return None
    if x.ndim == 2:
        return ((1,), *x.chunks)
    *batch, a, b, last = x.chunks
    return (*batch, a, b, last) if layout == "bhld" else (*batch, b, a, last)


def _batch_chunks(
    arrays: Iterable[tuple[Sizes, ...] | None], axis: int, length: int
) -> Iterator[Sizes]:
    for chunks in arrays:
        batch = chunks[:-3] if chunks else ()
        if len(batch) >= -axis and sum(batch[axis]) == length:
            yield batch[axis]


def fitting_heads(heads: Sizes, kv_heads: Sizes) -> tuple[Sizes, Sizes, Sizes]:
    """Return chunks of query heads and of KV heads, and the KV chunk that each query chunk reads.

    Chunks of query heads are kept if each has whole groups or a part of one group. Otherwise they
    follow the chunks of the KV heads.
    """
    group = max(1, sum(heads) // max(1, sum(kv_heads)))
    ranges = [(a // group, -(-b // group)) for a, b in pairwise(starts(heads))]
    fits = all(
        (a % group == 0 and b % group == 0) or high - low == 1
        for (a, b), (low, high) in zip(pairwise(starts(heads)), ranges, strict=True)
    )
    if not fits:
        return tuple(n * group for n in kv_heads), kv_heads, tuple(range(len(kv_heads)))
    distinct = list(dict.fromkeys(ranges))
    of_kv = tuple(high - low for low, high in distinct)
    return heads, of_kv, tuple(distinct.index(x) for x in ranges)


def chunked(x: Given, chunks: tuple[Sizes, ...]) -> da.Array:
    """Return a dask array with these chunks."""
    array: da.Array = (
        x.rechunk(chunks) if isinstance(x, da.Array) else da.from_array(x, chunks=chunks)
    )
    return array


def key_of(x: da.Array, index: tuple[int, ...]) -> tuple[Any, ...]:
    """Return the key of a chunk; `index` refers to the broadcast array, aligned at the end."""
    own = index[len(index) - x.ndim :]
    return (x.name, *(0 if n == 1 else i for i, n in zip(own, x.numblocks, strict=True)))
