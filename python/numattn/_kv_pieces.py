"""Append tokens and attend to them, in pieces if they exceed the window."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from ._checks import flag, refuse
from ._kv_attend import Options, Queries, attend_to_tokens, with_one_mask

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from ._kv_tokens import Tokens

    Array = NDArray[Any]


def append_in_pieces(
    tokens: Tokens, q: Array, new: list[Array], counts: list[int] | None, options: Options
) -> tuple[Tokens, Any]:
    """Append the first `counts` of the new tokens, by default all, and attend with their queries.

    Return the tokens after that, and the result. There is one query for each new token.
    """
    given, size = new[0].shape[2], tokens.window
    if given <= size:
        return _append_piece(tokens, q, new, counts, options)
    if counts is None:
        counts = [given] * len(tokens.lengths)
    # Skip pieces that are only padding, so that the last tokens can be attended from again.
    most = max(counts, default=0)
    starts = range(0, max(most, 1), size)
    if not flag("is_causal", options.is_causal) and len(starts) > 1:
        seen = f"False for {most} tokens, more than the window's {size}"
        advice = "the cache forgets the first tokens before the last ones are appended"
        refuse("is_causal", seen, "True", advice)
    after = [length + count for length, count in zip(tokens.lengths, counts, strict=True)]
    options = with_one_mask(options, after, max(after, default=0))
    return_lse = flag("return_lse", options.return_lse)
    shape = (*q.shape[:3], new[1].shape[3])
    out = np.empty(shape, q.dtype) if options.out is None else options.out
    lse = np.empty(shape[:3], np.float64 if q.dtype.itemsize == 8 else np.float32)
    before_rows = (slice(None),) * (2 if options.layout == "bhld" else 1)
    for start in starts:
        piece = slice(start, min(start + size, given))
        rows = (*before_rows, piece)
        own = [min(max(count - start, 0), piece.stop - start) for count in counts]
        length = max(map(sum, zip(tokens.lengths, own, strict=True)), default=0)
        of_piece = options._replace(
            mask=_part(options.mask, piece, length),
            bias=_part(options.bias, piece, length),
            return_lse=True,
            out=out[rows],
        )
        is_full = own.count(piece.stop - start) == len(own)
        tokens, (_, lse[rows]) = _append_piece(
            tokens, q[rows], [x[:, :, piece] for x in new], None if is_full else own, of_piece
        )
    padding = (*before_rows, slice(piece.stop, None))
    out[padding] = 0
    lse[padding] = -np.inf
    return tokens, (out, lse) if return_lse else out


def _append_piece(
    tokens: Tokens, q: Array, new: list[Array], counts: list[int] | None, options: Options
) -> tuple[Tokens, Any]:
    after = tokens.appended(new, counts)
    queries = Queries(q, new[0].shape[2], tokens.lengths, counts)
    return after, attend_to_tokens(after, queries, options)


def _part(x: Array | None, rows: slice, length: int) -> Array | None:
    """Return the rows of a mask or bias for the first `length` tokens."""
    if x is None:
        return None
    x = x if x.shape[2] == 1 else x[:, :, rows]
    return x if x.shape[3] == 1 else x[..., :length]
