"""The tokens in a cache: their memory, and which of them a window forgets."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from itertools import chain
from typing import TYPE_CHECKING, Any

import numpy as np

from ._checks import refuse

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    Array = NDArray[Any]

# Unused places in a growing or a selected cache. With them a step of beam search, which selects and
# appends, copies the tokens only once.
SPARE_PLACES = 16


@dataclass(slots=True)
class Tokens:
    """The tokens of a batch of sequences. Changes return new objects, and write only unused places.

    Tokens have positions in the text and places in the arrays: first the `keep_first` tokens, then
    the tokens from position ``begins[sequence]`` on. One number per sequence is kept in a list of
    ints, which is faster than a small array.
    """

    # Keys, values and, if there are any, scales of both: [batch][head][place][element]; scales have
    # no last axis. Unused places hold zeros or removed tokens.
    arrays: tuple[Array, ...]
    window: int
    keep_first: int
    max_rollback: int
    lengths: list[int]
    before: list[int]  # lengths before the last append
    shortest: list[int]  # the smallest lengths for `truncated`
    # The number of tokens in the last append, if some sequences got fewer.
    padded: int | None = None
    begins: list[int] = field(default_factory=list)  # default: `oldest`

    places: list[int] = field(init=False)  # the number of places that each sequence takes
    used: int = field(init=False)  # the largest of them

    def __post_init__(self) -> None:
        self.begins = self.begins or self.oldest()
        self.places = [
            min(length, self.keep_first) + max(length - begin, 0)
            for length, begin in zip(self.lengths, self.begins, strict=True)
        ]
        self.used = max(self.places, default=0)

    def numbers(self) -> tuple[list[int], list[int], list[int]]:
        """Return the numbers that, with the arrays, define the tokens."""
        return self.lengths, self.before, self.shortest

    def oldest(self) -> list[int]:
        """Return for each sequence the position from which on all tokens are kept.

        It depends only on lengths, not on when memory was moved. The tokens appended last have
        their whole windows, and so does the last token after any truncation.
        """
        return [
            max(self.keep_first, min(shortest, before + 1) - self.window)
            for shortest, before in zip(self.shortest, self.before, strict=True)
        ]

    def appended(self, new: Sequence[Array], counts: list[int] | None) -> Tokens:
        """Append the first `counts` of the new tokens to each sequence, by default all."""
        given = new[0].shape[2]
        added = [given] * len(self.lengths) if counts is None else counts
        lengths = [length + count for length, count in zip(self.lengths, added, strict=True)]
        shortest = [
            max(old, length - self.max_rollback)
            for old, length in zip(self.shortest, lengths, strict=True)
        ]
        after = Tokens(
            self.arrays, self.window, self.keep_first, self.max_rollback, lengths, self.lengths,
            shortest, None if counts is None else given, self.begins,
        )  # fmt: skip
        capacity = self.arrays[0].shape[2]
        if after.used > capacity:
            # Twice what must be kept, so that a token moves once on average.
            most = self.keep_first + 2 * (self.window + self.max_rollback)
            if after.used > most:
                after = replace(after, begins=[])
            room = max(after.used, min(max(2 * capacity, SPARE_PLACES), most))
            after.arrays = self._moved(range(len(lengths)), after.begins, room)
        ends = after.places
        is_even = counts is None and ends.count(after.used) == len(ends) > 0
        for stored, x in zip(after.arrays, new, strict=True):
            if is_even:
                stored[:, :, after.used - given : after.used] = x
                continue
            for i, (end, count) in enumerate(zip(ends, added, strict=True)):
                stored[i, :, end - count : end] = x[i, :, :count]
        return after

    def truncated(self, lengths: list[int]) -> Tokens:
        """Keep the first `lengths` tokens of each sequence."""
        for i, (wanted, length, shortest) in enumerate(
            zip(lengths, self.lengths, self.shortest, strict=True)
        ):
            if self.keep_first < wanted < min(length, shortest):
                refuse(
                    "n",
                    f"{wanted} for sequence {i} of {length} tokens",
                    f"at least {shortest} with max_rollback={self.max_rollback}, or at most "
                    f"{self.keep_first} to start again",
                )
        lengths = [min(pair) for pair in zip(lengths, self.lengths, strict=True)]

        def unless_anew(old: list[int], anew: int) -> list[int]:
            """Return `anew` for sequences that have only first tokens left."""
            return [
                x if length > self.keep_first else anew
                for x, length in zip(old, lengths, strict=True)
            ]

        return replace(
            self,
            lengths=lengths,
            before=unless_anew(self.before, 0),
            shortest=unless_anew(self.shortest, 0),
            begins=unless_anew(self.begins, self.keep_first),
            padded=None,
        )

    def selected(self, chosen: list[int], spare: int = 0) -> Tokens:
        """Copy the tokens of some sequences, with `spare` unused places."""
        lengths, before, shortest = ([numbers[i] for i in chosen] for numbers in self.numbers())
        copied = Tokens(
            (), self.window, self.keep_first, self.max_rollback, lengths, before, shortest,
            self.padded,
        )  # fmt: skip
        copied.arrays = self._moved(chosen, copied.begins, copied.used + spare)
        return copied

    @staticmethod
    def joined(parts: Sequence[Tokens], spare: int = 0) -> Tokens:
        """Copy the tokens of all sequences of all parts, with `spare` unused places."""
        first = parts[0]
        lengths, before, shortest = (
            list(chain(*numbers)) for numbers in zip(*(x.numbers() for x in parts), strict=True)
        )
        joined = Tokens(
            (), first.window, first.keep_first, first.max_rollback, lengths, before, shortest,
            _padding_of_all(parts),
        )  # fmt: skip
        rows = len(lengths)
        joined.arrays = tuple(_zeros(x, rows, joined.used + spare) for x in first.arrays)
        begin = 0
        for part in parts:
            own = slice(begin, begin + len(part.lengths))
            for to, x in zip(joined.arrays, part.arrays, strict=True):
                part._move(x, range(len(part.lengths)), joined.begins[own], to[own])
            begin = own.stop
        return joined

    def _moved(self, chosen: Sequence[int], begins: list[int], capacity: int) -> tuple[Array, ...]:
        """Return copies of the arrays for some sequences, from positions `begins` on."""
        return tuple(self._moved_array(x, chosen, begins, capacity) for x in self.arrays)

    def _moved_array(
        self, x: Array, chosen: Sequence[int], begins: list[int], capacity: int
    ) -> Array:
        to = _zeros(x, len(chosen), capacity)
        self._move(x, chosen, begins, to)
        return to

    def _move(self, x: Array, chosen: Sequence[int], begins: list[int], to: Array) -> None:
        for row, i, begin in zip(to, chosen, begins, strict=True):
            end = self.places[i]
            first = min(self.keep_first, end)
            row[:, :first] = x[i, :, :first]
            shift = begin - self.begins[i]
            if first + shift < end:
                row[:, first : end - shift] = x[i, :, first + shift : end]


def _zeros(x: Array, rows: int, capacity: int) -> Array:
    """Return zeros like x, for another number of sequences and places."""
    return np.zeros((rows, x.shape[1], capacity, *x.shape[3:]), x.dtype)


def _padding_of_all(parts: Sequence[Tokens]) -> int | None:
    """Return `padded` for joined sequences if one append could have brought their last tokens.

    Otherwise return None: the same number of queries would belong to the last tokens of one part,
    and to other tokens of another part.
    """
    numbers = {part.padded for part in parts} - {None}
    if len(numbers) != 1:
        return None
    padded = numbers.pop()
    could_be = all(
        part.padded == padded
        or all(n - old == padded for n, old in zip(part.lengths, part.before, strict=True))
        for part in parts
    )
    return padded if could_be else None
