"""The structure of masks in transformers: causal, windows, chunks and padding.

In transformers a mask is a function of positions. It is recognised by its code: it must be one
of transformers' own functions, or several of them joined by ``and_masks``.
"""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from transformers import masking_utils

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    MaskFunction = Callable[..., Any]


class Chunks(NamedTuple):
    """Groups of `size` positions whose queries attend only to keys of the same group."""

    size: int
    begins: torch.Tensor  # (batch,): a position where a chunk begins

    def pieces(
        self, item: int, q_offset: int, q_length: int, kv_length: int
    ) -> Iterator[tuple[slice, slice, int]]:
        """Yield the queries and the keys of each chunk of a batch item, and the position of the
        first query relative to the first key."""
        begin = int(self.begins[item])
        row = 0
        while row < q_length:
            first_key = begin + (row + q_offset - begin) // self.size * self.size
            end_row = min(first_key + self.size - q_offset, q_length)
            end_key = max(min(first_key + self.size, kv_length), 0)
            keys = slice(max(first_key, 0), end_key)
            yield slice(row, end_row), keys, row + q_offset - keys.start
            row = end_row


class Structure(NamedTuple):
    """Which keys a query attends to.

    Query i has the position ``p = i + q_offset``, and key j the position j. The query attends to
    the keys ``p - left <= j <= p + right`` that are not padding and, with `chunks`, are in its own
    chunk.
    """

    left: int | None = None
    right: int | None = None
    q_offset: int = 0
    padding: torch.Tensor | None = None  # bool (batch, keys), False for padding
    chunks: Chunks | None = None
    pairs: torch.Tensor | None = None  # bool (batch, 1, queries, keys), for any other mask

    def options(self) -> dict[str, Any]:
        """Return everything except the chunks as options of `numattn.attention`."""
        options: dict[str, Any] = {"q_offset": self.q_offset}
        if (self.left, self.right) != (None, None):
            options["window"] = (self.left, self.right)
        if self.padding is not None:
            options["mask"] = self.padding[:, None, None]  # (batch, 1, 1, keys)
        if self.pairs is not None:
            options["mask"] = self.pairs
        return options


def find_structure(
    mask_function: MaskFunction,
    attention_mask: torch.Tensor | None,
    q_offset: int,
    kv_offset: int,
    q_length: int,
    kv_length: int,
) -> Structure | None:
    """Return the structure of a mask, or None if it is not known.

    `q_offset` and `kv_offset` are the positions of the first query and key; the positions of a
    structure count from the first key.
    """
    left = right = chunks = None
    for part in _parts(mask_function):
        meaning = _known().get(part.__code__)
        if meaning is None:
            return None
        found = meaning(*_variables(part))
        left, right = _smaller(left, found.left), _smaller(right, found.right)
        if found.chunks is not None:
            if chunks is not None:
                return None
            chunks = Chunks(found.chunks.size, found.chunks.begins - kv_offset)
    structure = Structure(left, right, q_offset - kv_offset, None, chunks)
    if attention_mask is None:
        return structure
    if attention_mask.ndim != 2:
        return None
    padding = attention_mask[:, kv_offset : kv_offset + kv_length].to(torch.bool)
    if padding.shape[1] < kv_length:  # a static cache has room for more
        padding = torch.nn.functional.pad(padding, (0, kv_length - padding.shape[1]))
    # Keys beyond the last query's limit are not attended to, whether they are padding or not.
    end = kv_length if right is None else max(structure.q_offset + q_length + right, 0)
    return structure if bool(padding[:, :end].all()) else structure._replace(padding=padding)


def _smaller(a: int | None, b: int | None) -> int | None:
    """Return the smaller limit; None means no limit."""
    if a is None or b is None:
        return b if a is None else a
    return min(a, b)


def _variables(function: Any) -> list[Any]:
    """Return the variables that a function has captured, in alphabetical order."""
    return [cell.cell_contents for cell in function.__closure__ or ()]


def _parts(mask_function: MaskFunction) -> Iterator[Any]:
    """Yield the functions that a mask function joins with ``and_masks``."""
    if mask_function.__code__ is _code_of_and():
        (functions,) = _variables(mask_function)
        for function in functions:
            yield from _parts(function)
    else:
        yield mask_function


@cache
def _code_of_and() -> Any:
    return masking_utils.and_masks(masking_utils.causal_mask_function).__code__


@cache
def _known() -> dict[Any, Callable[..., Structure]]:
    """Return the structures of the functions in transformers, by their code.

    Each function is compared with its structure on a small grid of positions. If a release has
    changed a function, it is left out, and masks with it are dense.
    """
    begins = torch.ones(1, dtype=torch.long)
    candidates: list[tuple[Any, Callable[..., Structure]]] = [
        (masking_utils.causal_mask_function, lambda: Structure(right=0)),
        (masking_utils.bidirectional_mask_function, Structure),
        (masking_utils.sliding_window_overlay(3), lambda size: Structure(left=size - 1)),
        (
            masking_utils.sliding_window_bidirectional_overlay(3),
            lambda size: Structure(left=size, right=size),
        ),
        (
            masking_utils.chunked_overlay(3, begins),
            lambda size, begins: Structure(chunks=Chunks(size, begins)),
        ),
    ]
    queries, keys = torch.arange(10)[:, None], torch.arange(10)
    known = {}
    for function, meaning in candidates:
        try:
            structure = meaning(*_variables(function))
        except TypeError:  # the function depends on other variables too
            continue
        found = function(0, 0, queries, keys).expand(10, 10)
        if torch.equal(found, _elements(structure, queries, keys)):
            known[function.__code__] = meaning
    return known


def _elements(structure: Structure, queries: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
    """Return the mask (queries, keys) of a batch item without padding."""
    kept = torch.ones(len(queries), keys.shape[-1], dtype=torch.bool)
    if structure.left is not None:
        kept &= keys >= queries - structure.left
    if structure.right is not None:
        kept &= keys <= queries + structure.right
    if structure.chunks is not None:
        size, begin = structure.chunks.size, structure.chunks.begins[0]
        kept &= (keys - begin) // size == (queries - begin) // size
    return kept
