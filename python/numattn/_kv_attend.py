"""Attention to the tokens in a cache."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from ._arguments import MAX_POSITION, expanded_tail, ints_per_batch
from ._attention import attend
from ._checks import check_out, check_overlap, flag, refuse

if TYPE_CHECKING:
    from numpy.typing import ArrayLike, NDArray

    from ._kv_tokens import Tokens

    Array = NDArray[Any]

# The largest position of a query. `attention` accepts it even minus the position of a token.
_MOST = MAX_POSITION // 2


class Options(NamedTuple):
    """The options of `attention` that a cache does not set itself."""

    mask: Array | None  # (batch or 1, Hq or 1, Lq or 1, T or 1): columns are positions of the text
    tail_mask: Array | None  # columns are each sequence's last T tokens
    bias: Array | None
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
    """Queries and their positions."""

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
    """Find the positions of the queries, as described in `KVCache.attend`."""
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
    """Attend to all tokens within the window of a query, and to the first ones (`keep_first`)."""
    nearest = tokens.keep_first + tokens.window
    if max(tokens.lengths, default=0) <= nearest and (
        max(queries.first, default=0) + queries.rows <= nearest
    ):
        everything = slice(tokens.used)
        return _attend_to(
            tokens, everything, tokens.places, queries, queries.first, options.window, options
        )
    if queries.first != tokens.before:  # the cache has all that the newest tokens need
        _check_sight(tokens, queries)
    if tokens.keep_first == 0:
        return _attend_to_recent(tokens, queries, options)
    return _attend_in_two_parts(tokens, queries, options)


def _check_sight(tokens: Tokens, queries: Queries) -> None:
    """Refuse queries that need tokens which have been forgotten."""
    for i, (position, oldest) in enumerate(zip(queries.first, tokens.oldest(), strict=True)):
        needed = max(position - tokens.window + 1, tokens.keep_first)
        rows = queries.rows if queries.counts is None else queries.counts[i]
        if needed < oldest and rows > 0:
            seen = (
                f"{rows} queries from position {position} on, which attend to tokens from "
                f"{needed} on, while the cache keeps tokens from {oldest} on"
            )
            refuse("q", seen, f"queries from position {oldest + tokens.window - 1} on")


def _attend_to_recent(tokens: Tokens, queries: Queries, options: Options) -> Any:
    """Attend to all but the first tokens."""
    begins = tokens.begins
    lengths = [max(n - begin, 0) for n, begin in zip(tokens.lengths, begins, strict=True)]
    first = [position - begin for position, begin in zip(queries.first, begins, strict=True)]
    recent = slice(tokens.keep_first, max(tokens.used, tokens.keep_first))
    window = (tokens.window - 1, None)
    options = _of_tokens(options, begins, lengths)
    if options.tail_mask is not None:  # only its last columns belong to recent tokens
        more = max(options.tail_mask.shape[3] - max(lengths, default=0), 0)
        options = options._replace(tail_mask=options.tail_mask[..., more:])
    return _attend_to(tokens, recent, lengths, queries, first, window, options)


def _of_tokens(options: Options, begins: list[int], lengths: list[int]) -> Options:
    """Keep only the columns of mask and bias for `lengths` tokens of each sequence, from position
    ``begins[sequence]`` on."""
    if options.mask is None and options.bias is None:
        return options
    return options._replace(
        mask=_columns(options.mask, begins, lengths), bias=_columns(options.bias, begins, lengths)
    )


def with_one_mask(options: Options, lengths: list[int], first: int) -> Options:
    """Combine both masks into one, for the `first` tokens of sequences of these lengths."""
    mask, tail_mask = options.mask, options.tail_mask
    if tail_mask is None:
        return options
    if min(lengths, default=0) - tail_mask.shape[3] >= first:
        return options._replace(tail_mask=None)
    of_first = expanded_tail(tail_mask, np.array(lengths, np.int64), first)
    return options._replace(mask=of_first if mask is None else mask & of_first, tail_mask=None)


def _columns(x: Array | None, begins: list[int], lengths: list[int]) -> Array | None:
    if x is None or x.shape[3] == 1:
        return x
    most = max(lengths, default=0)
    if len(set(begins)) < 2:
        begin = max(begins, default=0)
        return x[..., begin : begin + most]
    found = np.zeros((len(begins), *x.shape[1:3], most), x.dtype)
    rows = np.broadcast_to(x, (len(begins), *x.shape[1:]))
    for to, row, begin, length in zip(found, rows, begins, lengths, strict=True):
        to[..., :length] = row[..., begin : begin + length]
    return found


def _attend_in_two_parts(tokens: Tokens, queries: Queries, options: Options) -> Any:
    """Attend to the first tokens and to the others, and merge; the others include the sinks."""
    return_lse, out = flag("return_lse", options.return_lse), options.out
    if out is not None:
        check_out(out, (*queries.q.shape[:3], tokens.arrays[1].shape[3]), queries.q.dtype)
        pairs = {"mask": options.mask, "tail_mask": options.tail_mask, "bias": options.bias}
        check_overlap(out, {"q": queries.q, **pairs})
    parts = options._replace(return_lse=True, out=None)
    first = slice(min(tokens.used, tokens.keep_first))
    lengths = [min(length, tokens.keep_first) for length in tokens.lengths]
    of_first = _of_tokens(parts._replace(sinks=None), [0] * len(lengths), lengths)
    of_first = with_one_mask(of_first, tokens.lengths, max(lengths, default=0))
    old = _attend_to(tokens, first, lengths, queries, queries.first, None, of_first)
    new = _attend_to_recent(tokens, queries, parts)
    with np.errstate(all="ignore"):
        merged, lse = _merged(*old, *new)
        if out is None:
            out = merged.astype(queries.q.dtype, copy=False)
        else:
            out[...] = merged
    return (out, lse) if return_lse else out


def _merged(a: Array, lse_a: Array, b: Array, lse_b: Array) -> tuple[Array, Array]:
    """Merge two states like `merge_states`, with fewer checks.

    This takes 20 microseconds instead of 90 for a query of 32 heads.
    """
    largest = np.maximum(lse_a, lse_b)
    base = np.maximum(largest, np.finfo(largest.dtype).min)  # if both attended to nothing
    share_a, share_b = np.exp(lse_a - base), np.exp(lse_b - base)
    total = share_a + share_b
    lse = largest + np.log(total)
    total = np.maximum(total, 1)
    merged = a * (share_a / total)[..., np.newaxis]
    merged += b * (share_b / total)[..., np.newaxis]
    # Only rounding can take a mean outside the range of both values. It may even overflow.
    merged = np.maximum(merged, np.minimum(a, b))
    return np.minimum(merged, np.maximum(a, b)), lse


def _attend_to(
    tokens: Tokens,
    places: slice,
    lengths: list[int],
    queries: Queries,
    first: list[int],
    window: tuple[int | None, int | None] | None,
    options: Options,
) -> Any:
    """Attend to some places, `lengths` of them in each sequence, with queries from place `first`
    on."""
    arrays = [x[:, :, places] for x in tokens.arrays]
    if options.layout == "blhd":
        arrays = [x.swapaxes(1, 2) for x in arrays]
    k, v, k_scale, v_scale = arrays if len(arrays) == 4 else (*arrays, None, None)
    (
        mask, tail_mask, bias, is_causal, _, scale, softcap, alibi_slopes, sinks, layout,
        return_lse, out, num_threads,
    ) = options  # fmt: skip
    return attend(
        queries.q, k, v, mask, tail_mask, bias, is_causal, first, window, scale, softcap,
        alibi_slopes, sinks, lengths, queries.counts, layout, return_lse, out, num_threads,
        k_scale, v_scale, 0.0, None, True,  # no dropout; the scales are finite
    )  # fmt: skip
