"""Block masks of packed texts."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Self

import numpy as np

from ._block_mask_bits import EMPTY, FULL
from ._block_mask_evaluated import evaluated, extremes_of_blocks
from ._block_mask_operators import stacked
from ._block_mask_store import BlockMaskStore, check_block_size, ints
from ._checks import at_index, at_least, refuse

if TYPE_CHECKING:
    from numpy.typing import ArrayLike, NDArray

    Array = NDArray[Any]
    Size = tuple[int, int]


class BlockMaskDocuments(BlockMaskStore):
    __slots__ = ()

    @classmethod
    def documents(
        cls,
        lengths: ArrayLike,
        Lq: int | None = None,
        Lk: int | None = None,
        *,
        key_lengths: ArrayLike | None = None,
        block_size: tuple[int, int] = (64, 64),
    ) -> Self:
        """Make a mask of packed texts, each of which attends only to itself.

        Parameters
        ----------
        lengths : array_like of int, shape (n,)
            Number of queries of each text, in order.
        Lq, Lk : int, optional
            Number of queries and of keys. If given, the lengths must add up to them.
        key_lengths : array_like of int, shape (n,), optional
            Number of keys of each text. Default: `lengths`.
        block_size : tuple of int, default (64, 64)
            Queries and keys of a block.

        Returns
        -------
        BlockMask
            Of shape (Lq, Lk).

        Raises
        ------
        TypeError, ValueError
            If the lengths are not ints, are negative, have another shape, or do not add up to `Lq`
            and `Lk`; or if a size is not an int.

        See Also
        --------
        document_ids : the same, from the text of each token.
        attention_varlen : attention for packed texts without a mask.

        Examples
        --------
        Causal texts of 2 and 3 tokens:

        >>> import numattn as na
        >>> mask = na.BlockMask.documents([2, 3]) & na.BlockMask.causal(5, 5)
        >>> mask.to_dense().astype(int)
        array([[1, 0, 0, 0, 0],
               [1, 1, 0, 0, 0],
               [0, 0, 1, 0, 0],
               [0, 0, 1, 1, 0],
               [0, 0, 1, 1, 1]])
        """
        of_queries = _lengths("lengths", lengths, "Lq", Lq)
        if key_lengths is None:
            of_keys = _lengths("lengths", lengths, "Lk", Lk)
        else:
            of_keys = _lengths("key_lengths", key_lengths, "Lk", Lk)
        if len(of_keys) != len(of_queries):
            expected = f"{len(of_queries)}, as many as `lengths` has"
            refuse("key_lengths", f"{len(of_keys)} lengths", expected)
        texts = np.arange(len(of_queries))
        block_size = check_block_size(block_size)
        return cls._same(np.repeat(texts, of_queries), np.repeat(texts, of_keys), block_size)

    @classmethod
    def document_ids(
        cls,
        ids: ArrayLike,
        key_ids: ArrayLike | None = None,
        *,
        block_size: tuple[int, int] = (64, 64),
    ) -> Self:
        """Make a mask whose queries attend to the keys of the same text.

        Parameters
        ----------
        ids : array_like of int, shape (..., Lq)
            The text of each query, in any order. Negative ids are padding, which attends to nothing
            and is not attended to.
        key_ids : array_like of int, shape (..., Lk), optional
            The text of each key. Default: `ids`.
        block_size : tuple of int, default (64, 64)
            Queries and keys of a block.

        Returns
        -------
        BlockMask
            Of shape (Lq, Lk), or (..., 1, Lq, Lk) if the ids have batch axes.

        Raises
        ------
        TypeError, ValueError
            If the ids are not ints, have no axes or have different batch axes; or if the block size
            is not a pair of positive ints.

        See Also
        --------
        documents : the same, from the length of each text.

        Examples
        --------
        >>> import numattn as na
        >>> na.BlockMask.document_ids([7, 7, 3, -1]).to_dense().astype(int)
        array([[1, 1, 0, 0],
               [1, 1, 0, 0],
               [0, 0, 1, 0],
               [0, 0, 0, 0]])
        """
        of_queries = _ids("ids", ids)
        of_keys = of_queries if key_ids is None else _ids("key_ids", key_ids)
        block_size = check_block_size(block_size)
        batch = of_queries.shape[:-1]
        if of_keys.shape[:-1] != batch:
            expected = f"the same batch axes as ids, whose shape is {of_queries.shape}"
            refuse("key_ids", f"shape {of_keys.shape}", expected)
        if not batch:
            return cls._same(of_queries, of_keys, block_size)
        masks = [cls._same(of_queries[i], of_keys[i], block_size) for i in np.ndindex(batch)]
        return stacked(masks, (*batch, 1))

    @classmethod
    def _same(cls, ids: Array, key_ids: Array, block_size: Size) -> Self:
        """Return a mask (Lq, Lk) from ids; negative ids are padding."""
        lengths = len(ids), len(key_ids)
        # Different ids, so that padding queries do not attend to padding keys.
        ids, key_ids = np.maximum(ids, -1), np.where(key_ids < 0, -2, key_ids)
        low, high = extremes_of_blocks(ids, block_size[0])
        key_low, key_high = extremes_of_blocks(key_ids, block_size[1])
        low, high = low[:, np.newaxis], high[:, np.newaxis]
        blocks = np.zeros((len(low), len(key_low)), np.int32)
        blocks[(high < key_low) | (key_high < low)] = EMPTY
        blocks[(low == key_high) & (high == key_low)] = FULL
        arrays = evaluated(lengths, block_size, blocks, lambda q, k: ids[q] == key_ids[k])
        return cls._of(lengths, block_size, *arrays)


def _lengths(name: str, lengths: ArrayLike, total_name: str, total: int | None) -> Array:
    array = ints(name, lengths)
    if array.ndim != 1:
        refuse(name, f"shape {array.shape}", "(n,), one length per text")
    if (array < 0).any():
        place = int(np.argmax(array < 0))
        refuse(name, f"{array[place]}{at_index(place)}", "lengths of at least 0")
    if total is not None and array.sum() != at_least(total_name, total, 0):
        refuse(name, f"a sum of {array.sum()}", f"{total_name} = {total}")
    return array


def _ids(name: str, ids: ArrayLike) -> Array:
    array = ints(name, ids)
    if array.ndim == 0:
        refuse(name, "shape ()", "(..., L), the text of each token")
    if 0 in array.shape[:-1]:
        refuse(name, f"shape {array.shape}", "at least one batch item")
    return array
