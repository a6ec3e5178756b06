"""The tokens that a cache keeps: their memory, and what a window forgets."""

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

# Free places of a growing cache and of a selected one: a step of beam search, which selects and
# appends, copies the tokens once.
SPARE_PLACES = 16


@dataclass(slots=True)
class Tokens:
    """The tokens of a batch of sequences. Changes return new ones, and write free places alone.

    Tokens have positions in the text and places in the arrays: the first `keep_first`, then those
    from position ``begins[sequence]`` on. Numbers of sequences are lists of ints, which are faster
    than arrays of a few.
    """

    # Keys, values, and scales of both, if there are any: [batch][head][place][element], scales
    # without the last axis. Free places hold zeros or what was taken back.
    arrays: tuple[Array, ...]
    window: int
    keep_first: int
    max_rollback: int
    lengths: list[int]
    before: list[int]  # lengths before the last append
    shortest: list[int]  # to which `truncated` may go
    # How many tokens the last append brought, if some sequences got fewer.
    padded: int | None = None
    begins: list[int] = field(default_factory=list)  # by default `oldest`

    places: list[int] = field(init=False)  # that each sequence takes
    used: int = field(init=False)  # the most of them

    def __post_init__(self) -> None:
        self.begins = self.begins or self.oldest()
        self.places = [
            min(length, self.keep_first) + max(length - begin, 0)
            for length, begin in zip(self.lengths, self.begins, strict=True)
        ]
        self.used = max(self.places, default=0)

    def numbers(self) -> tuple[list[int], list[int], list[int]]:
        """Return what, with the arrays, makes the tokens what they are."""
        return self.lengths, self.before, self.shortest

    def oldest(self) -> list[int]:
        """Return the positions from which on all tokens of a sequence are kept.

        They follow from lengths alone, whenever memory moved. The tokens appended last see their
        windows, and so does the last one after any truncation.
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
            # Twice what has to be kept: a token moves once on average.
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
            """Where none but first tokens are left, the others begin anew."""
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
        """Copy what is kept of some sequences, with so many free places."""
        lengths, before, shortest = ([numbers[i] for i in chosen] for numbers in self.numbers())
        copied = Tokens(
            (), self.window, self.keep_first, self.max_rollback, lengths, before, shortest,
            self.padded,
        )  # fmt: skip
        copied.arrays = self._moved(chosen, copied.begins, copied.used + spare)
        return copied

    @staticmethod
    def joined(parts: Sequence[Tokens], spare: int = 0) -> Tokens:
        """Copy what is kept of the sequences of all parts, with so many free places."""
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
        """Return copies of the arrays of some sequences, where they begin at `begins`."""
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
    """Return zeros as x for other numbers of sequences and places."""
    return np.zeros((rows, x.shape[1], capacity, *x.shape[3:]), x.dtype)


def _padding_of_all(parts: Sequence[Tokens]) -> int | None:
    """Return `padded` of sequences that one append could have brought what their own ones did.

    There is none where appends differed: as many queries would belong to one part's last tokens and
    to others of another part.
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
