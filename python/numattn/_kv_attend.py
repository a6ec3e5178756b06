"""Attention to the tokens that a cache keeps."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from ._arguments import MAX_POSITION, ints_per_batch
from ._attention import attend
from ._checks import check_out, check_overlap, flag, refuse
from ._merge_states import merge_states

if TYPE_CHECKING:
    from numpy.typing import ArrayLike, NDArray

    from ._kv_tokens import Tokens

    Array = NDArray[Any]

# Of a query. Less the position of a token, it is one that `attention` takes.
_MOST = MAX_POSITION // 2
# Pairs of queries and tokens for which a mask is made: few queries, or few tokens.
_MASKED_PAIRS = 1 << 16


class Options(NamedTuple):
    """The options of `attention` that a cache does not set by itself."""

    is_causal: bool
    window: tuple[int | None, int | None] | None
    scale: float | None
    softcap: float | None
    alibi_slopes: ArrayLike | None
    sinks: ArrayLike | None
    layout: str
    return_lse: bool
    out: Array | None
    num_threads: int | None


class Queries(NamedTuple):
    """Queries, and where they are."""

    q: Array
    rows: int
    first: list[int]  # the position of each sequence's first query
    counts: list[int] | None  # of valid queries; None: all


def place(
    tokens: Tokens,
    q: Array,
    layout: str,
    q_offset: int | ArrayLike | None,
    q_lengths: int | ArrayLike | None,
) -> Queries:
    """Find out where the queries are: `KVCache.attend` says it."""
    rows = q.shape[2 if layout == "bhld" else 1]
    if q_offset is None and q_lengths is None:
        if tokens.padded != rows:
            return Queries(q, rows, [length - rows for length in tokens.lengths], None)
        pairs = zip(tokens.lengths, tokens.before, strict=True)
        return Queries(q, rows, tokens.before, [length - before for length, before in pairs])
    batch = (len(tokens.lengths),)
    lengths = ints_per_batch("q_lengths", q_lengths, batch, 0, rows)
    offsets = ints_per_batch("q_offset", q_offset, batch, -_MOST, _MOST)
    if offsets is None:
        offsets = np.array(tokens.lengths, np.int64) - (rows if lengths is None else lengths)
    return Queries(q, rows, offsets.tolist(), None if lengths is None else lengths.tolist())


def attend_to_tokens(tokens: Tokens, queries: Queries, options: Options) -> Any:
    """Attend to all tokens that the window of a query and `keep_first` let it see."""
    nearest = tokens.keep_first + tokens.window
    if max(tokens.lengths, default=0) <= nearest and (
        max(queries.first, default=0) + queries.rows <= nearest
    ):
        return _attend_to_all(tokens, queries, options)
    _check_sight(tokens, queries)
    if tokens.keep_first == 0:
        return _attend_to_recent(tokens, queries, options)
    pairs = len(tokens.lengths) * queries.rows * tokens.used
    if options.alibi_slopes is None and pairs <= _MASKED_PAIRS:
        mask = _mask(tokens, queries, flag("is_causal", options.is_causal))
        return _attend_to_all(tokens, queries, options._replace(is_causal=False), mask)
    return _attend_in_two_parts(tokens, queries, options)


def _check_sight(tokens: Tokens, queries: Queries) -> None:
    """Refuse queries that need tokens which have been forgotten."""
    for i, (position, oldest) in enumerate(zip(queries.first, tokens.oldest(), strict=True)):
        needed = max(position - tokens.window + 1, tokens.keep_first)
        rows = queries.rows if queries.counts is None else queries.counts[i]
        if needed < oldest and rows > 0:
            seen = (
                f"{rows} queries from position {position} on, which see tokens from {needed} on, "
                f"but the cache has those from {oldest} on"
            )
            refuse("q", seen, f"positions from {oldest + tokens.window - 1} on")


def _attend_to_all(
    tokens: Tokens, queries: Queries, options: Options, mask: NDArray[np.bool_] | None = None
) -> Any:
    everything = slice(tokens.used)
    return _attend_to(
        tokens, everything, tokens.places, queries, queries.first, options.window, options, mask
    )


def _attend_to_recent(tokens: Tokens, queries: Queries, options: Options) -> Any:
    """Attend to all but the first tokens."""
    begins = tokens.begins
    lengths = [max(n - begin, 0) for n, begin in zip(tokens.lengths, begins, strict=True)]
    first = [position - begin for position, begin in zip(queries.first, begins, strict=True)]
    recent = slice(tokens.keep_first, max(tokens.used, tokens.keep_first))
    window = (tokens.window - 1, None)
    return _attend_to(tokens, recent, lengths, queries, first, window, options)


def _mask(tokens: Tokens, queries: Queries, is_causal: bool) -> NDArray[np.bool_]:
    """Return which places a query sees, (batch, 1, queries, places)."""
    places = np.arange(tokens.used)
    positions = places + (np.array(tokens.begins)[:, np.newaxis] - tokens.keep_first)
    positions[:, : tokens.keep_first] = places[: tokens.keep_first]
    own = np.array(queries.first)[:, np.newaxis] + np.arange(queries.rows)
    distance = own[:, np.newaxis, :, np.newaxis] - positions[:, np.newaxis, np.newaxis]
    mask: NDArray[np.bool_] = distance < tokens.window
    mask[..., : tokens.keep_first] = True
    if is_causal:
        mask &= distance >= 0
    return mask


def _attend_in_two_parts(tokens: Tokens, queries: Queries, options: Options) -> Any:
    """Attend to the first tokens and to the others, and merge; the sinks belong to the others."""
    out = options.out
    if out is not None:
        check_out(out, (*queries.q.shape[:3], tokens.arrays[1].shape[3]), queries.q.dtype)
        check_overlap(out, {"q": queries.q})
    parts = options._replace(return_lse=True, out=None)
    first = slice(min(tokens.used, tokens.keep_first))
    lengths = [min(length, tokens.keep_first) for length in tokens.lengths]
    old = _attend_to(
        tokens, first, lengths, queries, queries.first, None, parts._replace(sinks=None)
    )
    new = _attend_to_recent(tokens, queries, parts)
    merged, lse = merge_states(*old, *new, out=out)
    return (merged, lse) if flag("return_lse", options.return_lse) else merged


def _attend_to(
    tokens: Tokens,
    places: slice,
    lengths: list[int],
    queries: Queries,
    first: list[int],
    window: tuple[int | None, int | None] | None,
    options: Options,
    mask: NDArray[np.bool_] | None = None,
) -> Any:
    """Attend to some places, of which each sequence has `lengths`, with queries from the place
    `first` on."""
    arrays = [x[:, :, places] for x in tokens.arrays]
    if options.layout == "blhd":
        arrays = [x.swapaxes(1, 2) for x in arrays]
    k, v, k_scale, v_scale = arrays if len(arrays) == 4 else (*arrays, None, None)
    (
        is_causal, _, scale, softcap, alibi_slopes, sinks, layout, return_lse, out, num_threads,
    ) = options  # fmt: skip
    return attend(
        queries.q, k, v, mask, None, is_causal, first, window, scale, softcap, alibi_slopes, sinks,
        lengths, queries.counts, layout, return_lse, out, num_threads, k_scale, v_scale,
        True,  # the scales are finite
    )  # fmt: skip
