"""Masks by blocks of queries and keys."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Self

import numpy as np

from ._block_mask_bits import EMPTY, FULL, Tiles, no_bits, pack, places_of_tiles
from ._block_mask_function import MaskFunction
from ._block_mask_operators import both, either, inverse
from ._block_mask_patterns import BlockMaskPatterns
from ._block_mask_store import check_block_size, check_bools, grid_of, ints
from ._checks import as_array, at_least, refuse, refuse_kind

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import ArrayLike, NDArray

    Array = NDArray[Any]


class BlockMask(BlockMaskPatterns):
    """Which keys a query may attend to, block by block.

    Blocks in which nobody attends cost no time, and blocks in which all do cost what they cost
    without a mask. Only the others, the mixed ones, keep a bit for each pair; equal mixed blocks
    share them. Masks are made by the class methods and cannot be changed.

    Attributes
    ----------
    shape : tuple of int, (..., Lq, Lk)
        What a dense mask of the same content has. The axes before the last two are of the batch
        and, last, of the query heads; they broadcast as a dense mask does.
    block_size : tuple of int, (queries, keys)
        At most 16,777,216 pairs. The last blocks may be partial.
    density : float
        Share of all pairs of a query and a key that attend; 0 for a mask without pairs.
    nbytes : int
        Bytes of memory that the mask takes: 4 for each block, and the bits of different mixed
        blocks.

    See Also
    --------
    attention : takes a dense mask too, as an array of bools.

    Notes
    -----
    Small blocks describe a mask closely, large ones cost less memory: with blocks of 64 by 64, a
    mask of 65,536 queries and keys has 4 MiB of blocks, and one of a million has 1 GiB.

    A mask says of row q of a call's queries and row k of its keys, whatever the call's `q_offset`,
    `kv_lengths` or `q_lengths` are. `is_causal` and `window` follow these.

    Masks can be compared with ``==``, hashed, copied and pickled. Equal are masks with the same
    pairs, shape and block size.

    The function that `from_mask_mod` takes is PyTorch's of FlexAttention (Dong et al., "Flex
    Attention: A Programming Model for Generating Optimized Attention Kernels", 2024), with arrays
    of NumPy in place of scalars.

    Examples
    --------
    Sixteen packed texts of 64 tokens, each of which attends to itself and to what is before:

    >>> import numpy as np
    >>> import numattn as na
    >>> text = np.repeat(np.arange(16), 64)
    >>> mask = na.BlockMask.from_mask_mod(
    ...     lambda batch, head, q, k: (k <= q) & (text[q] == text[k]), 1024, 1024
    ... )
    >>> mask.shape, mask.block_size, mask.nbytes
    ((1024, 1024), (64, 64), 1536)
    """

    __slots__ = ()

    @classmethod
    def from_mask_mod(
        cls,
        mask_mod: Callable[[Array, Array, Array, Array], Any],
        Lq: int,
        Lk: int,
        *,
        batch: int | None = None,
        heads: int | None = None,
        block_size: tuple[int, int] = (64, 64),
    ) -> Self:
        """Make a mask of a function that says which query attends to which key.

        Parameters
        ----------
        mask_mod : callable
            ``mask_mod(batch, head, q, k)`` takes four read-only arrays of ints that broadcast to
            (batch items, heads, queries, keys), and returns bools of four axes that do too:
            True = attend. ``q`` and ``k`` are rows of the arrays: where there are fewer queries
            than keys, ``k <= q + Lk - Lq`` is what `causal` makes.
        Lq, Lk : int
            Number of queries and of keys.
        batch : int, optional
            Number of batch items. By default the mask does not depend on them, and `mask_mod` gets
            0 for `batch`.
        heads : int, optional
            Number of query heads, as `batch`.
        block_size : tuple of int, default (64, 64)
            Queries and keys of a block.

        Returns
        -------
        BlockMask
            Of shape (Lq, Lk), (heads, Lq, Lk), (batch, 1, Lq, Lk) or (batch, heads, Lq, Lk).

        Raises
        ------
        TypeError, ValueError
            If `mask_mod` is no function, or returns anything else; or if a size is not an int, or
            negative.

        See Also
        --------
        from_dense : an array of bools.
        causal, window, documents : made without asking for each pair.

        Notes
        -----
        `mask_mod` is called for some thousand keys at a time, so that the whole mask is never in
        memory.

        Examples
        --------
        >>> import numattn as na
        >>> mask = na.BlockMask.from_mask_mod(
        ...     lambda batch, head, q, k: (k <= q) & (q - k <= 2 * head), 4, 4, heads=2
        ... )
        >>> mask.to_dense().astype(int)
        array([[[1, 0, 0, 0],
                [0, 1, 0, 0],
                [0, 0, 1, 0],
                [0, 0, 0, 1]],
        <BLANKLINE>
               [[1, 0, 0, 0],
                [1, 1, 0, 0],
                [1, 1, 1, 0],
                [0, 1, 1, 1]]])
        """
        if not callable(mask_mod):
            expected = "a function mask_mod(batch, head, q, k)"
            refuse_kind("mask_mod", type(mask_mod).__name__, expected)
        lengths = at_least("Lq", Lq, 0), at_least("Lk", Lk, 0)
        items = (
            1 if batch is None else at_least("batch", batch, 0),
            1 if heads is None else at_least("heads", heads, 0),
        )
        block_size = check_block_size(block_size)
        function = MaskFunction(mask_mod)
        tiles = Tiles(items, lengths, block_size)
        for leading, queries, keys in places_of_tiles(items, lengths, block_size):
            tiles.put(leading, queries, keys, function.bools((*leading, queries, keys)))
        blocks, bits = tiles.normal_form()
        kept = 2 if batch is not None else 1 if heads is not None else 0
        leading_shape = items[2 - kept :]
        blocks = blocks.reshape(*leading_shape, *blocks.shape[-2:])
        return cls._of((*leading_shape, *lengths), block_size, blocks, bits)

    @classmethod
    def from_dense(cls, mask: ArrayLike, block_size: tuple[int, int] = (64, 64)) -> Self:
        """Make a mask of an array of bools.

        Parameters
        ----------
        mask : array_like of bool, shape (..., Lq, Lk)
            True = attend, as the `mask` of `attention`. The last two axes do not broadcast.
        block_size : tuple of int, default (64, 64)
            Queries and keys of a block.

        Returns
        -------
        BlockMask
            Of the shape of `mask`.

        Raises
        ------
        TypeError, ValueError
            If the mask is not bool or has fewer than two axes, or the block size is not a pair of
            positive ints.

        See Also
        --------
        to_dense : the way back.
        from_mask_mod : for masks that are too large for an array.

        Examples
        --------
        >>> import numpy as np
        >>> import numattn as na
        >>> mask = na.BlockMask.from_dense(np.tri(100, dtype=bool))
        >>> bool((mask.to_dense() == np.tri(100, dtype=bool)).all())
        True
        """
        array = as_array("mask", mask)
        check_bools("mask", array)
        block_size = check_block_size(block_size)
        if array.ndim < 2:
            refuse("mask", f"shape {array.shape}", "(..., Lq, Lk)")
        *leading, query_count, key_count = array.shape
        lengths = query_count, key_count
        tiles = Tiles(tuple(leading), lengths, block_size)
        for items, queries, keys in places_of_tiles(tuple(leading), lengths, block_size):
            tiles.put(items, queries, keys, array[(*items, queries, keys)])
        return cls._of(array.shape, block_size, *tiles.normal_form())

    @classmethod
    def from_blocks(
        cls, keep: ArrayLike, Lq: int, Lk: int, block_size: tuple[int, int] = (64, 64)
    ) -> Self:
        """Make a mask of whole blocks.

        Parameters
        ----------
        keep : array_like of bool, shape (..., ceil(Lq / queries), ceil(Lk / keys))
            True where all queries of a block attend to all its keys; elsewhere none does.
        Lq, Lk : int
            Number of queries and of keys.
        block_size : tuple of int, default (64, 64)
            Queries and keys of a block.

        Returns
        -------
        BlockMask
            Of shape (..., Lq, Lk).

        Raises
        ------
        TypeError, ValueError
            If `keep` is not bool, or not of this shape; or if a size is not an int, or negative.

        See Also
        --------
        from_bsr : the blocks of each row by their indices.
        random_blocks : drawn at random.

        Examples
        --------
        >>> import numattn as na
        >>> mask = na.BlockMask.from_blocks([[True, False], [True, True]], 3, 4, block_size=(2, 2))
        >>> mask.to_dense().astype(int)
        array([[1, 1, 0, 0],
               [1, 1, 0, 0],
               [1, 1, 1, 1]])
        """
        array = as_array("keep", keep)
        check_bools("keep", array)
        lengths = at_least("Lq", Lq, 0), at_least("Lk", Lk, 0)
        block_size = check_block_size(block_size)
        grid = grid_of(lengths, block_size)
        if array.shape[-2:] != grid:
            expected = f"(..., {grid[0]}, {grid[1]}), the blocks of {lengths[0]} queries and "
            expected += f"{lengths[1]} keys with block_size {block_size}"
            refuse("keep", f"shape {array.shape}", expected)
        blocks = np.where(array, np.int32(FULL), np.int32(EMPTY))
        return cls._of((*array.shape[:-2], *lengths), block_size, blocks, no_bits(block_size))

    @classmethod
    def from_bsr(
        cls,
        indptr: ArrayLike,
        indices: ArrayLike,
        Lq: int,
        Lk: int,
        block_size: tuple[int, int] = (64, 64),
        data: ArrayLike | None = None,
    ) -> Self:
        """Make a mask of the blocks that each row of blocks has, in the format BSR.

        Parameters
        ----------
        indptr : array_like of int, shape (ceil(Lq / queries) + 1,)
            Where the blocks of each row begin among `indices`, and last where they end.
        indices : array_like of int, shape (n,)
            For each block which block of keys it has, ascending in each row.
        Lq, Lk : int
            Number of queries and of keys.
        block_size : tuple of int, default (64, 64)
            Queries and keys of a block.
        data : array_like of bool, shape (n, queries, keys), optional
            Which pairs of each block attend; what is beyond Lq and Lk does not count. By default
            all do.

        Returns
        -------
        BlockMask
            Of shape (Lq, Lk).

        Raises
        ------
        TypeError, ValueError
            If `indptr` or `indices` are not ints, of another shape, not ascending or out of range;
            if `data` is not bool or of another shape; or if a size is not an int, or negative.

        See Also
        --------
        from_blocks : a bool for each block.

        Notes
        -----
        This is the format of ``scipy.sparse.bsr_array``: a matrix ``m`` of bools becomes
        ``from_bsr(m.indptr, m.indices, *m.shape, m.blocksize, m.data)``, after
        ``m.sum_duplicates()`` where its indices are not sorted. FlashInfer has `indptr`, `indices`
        and, for `data`, ``mask``.

        Examples
        --------
        >>> import numattn as na
        >>> mask = na.BlockMask.from_bsr([0, 1, 3], [0, 0, 1], 3, 4, block_size=(2, 2))
        >>> mask.to_dense().astype(int)
        array([[1, 1, 0, 0],
               [1, 1, 0, 0],
               [1, 1, 1, 1]])
        """
        lengths = at_least("Lq", Lq, 0), at_least("Lk", Lk, 0)
        block_size = check_block_size(block_size)
        rows, columns = grid_of(lengths, block_size)
        begins, places = ints("indptr", indptr), ints("indices", indices)
        if begins.shape != (rows + 1,):
            expected = f"({rows + 1},), one more than the rows of blocks of {lengths[0]} queries"
            refuse("indptr", f"shape {begins.shape}", f"{expected} with block_size {block_size}")
        if places.ndim != 1:
            refuse("indices", f"shape {places.shape}", "(n,), one index per block")
        if begins[0] != 0 or begins[-1] != len(places):
            seen = f"numbers from {begins[0]} to {begins[-1]}"
            expected = f"numbers from 0 to {len(places)}, the number of indices"
            refuse("indptr", seen, expected)
        counts = np.diff(begins)
        if (counts < 0).any():
            row = int(np.argmax(counts < 0))
            seen = f"{begins[row + 1]} after {begins[row]} at {row + 1}"
            refuse("indptr", seen, "numbers that do not decrease")
        outside = (places < 0) | (places >= columns)
        if outside.any():
            place = int(np.argmax(outside))
            expected = f"0 to {columns - 1}, the blocks of {lengths[1]} keys"
            refuse("indices", f"{places[place]} at {place}", expected)
        row_of = np.repeat(np.arange(rows), counts)
        wrong = (np.diff(places) <= 0) & (np.diff(row_of) == 0)
        if wrong.any():
            place = int(np.argmax(wrong))
            seen = f"{places[place + 1]} after {places[place]} at {place + 1}"
            advice = "call SciPy's `sum_duplicates()` first"
            refuse("indices", seen, "numbers that increase within each row", advice)
        blocks = np.full((rows, columns), EMPTY, np.int32)
        if data is None:
            blocks[row_of, places] = FULL
            return cls._of(lengths, block_size, blocks, no_bits(block_size))
        attends = as_array("data", data)
        check_bools("data", attends)
        if attends.shape != (len(places), *block_size):
            expected = f"{(len(places), *block_size)}, one block per index"
            refuse("data", f"shape {attends.shape}", expected)
        blocks[row_of, places] = np.arange(len(places))
        return cls._normal((), lengths, block_size, blocks, pack(attends))

    def __and__(self, other: Self) -> Self:
        """Return the mask of the pairs that attend in both masks; other axes broadcast."""
        return both(self, other)

    def __or__(self, other: Self) -> Self:
        """Return the mask of the pairs that attend in one of the masks; other axes broadcast."""
        return either(self, other)

    def __invert__(self) -> Self:
        """Return the mask of the pairs that do not attend."""
        return inverse(self)

    # Arrays of bools, which come here from NumPy's operators, are refused with a hint.
    __rand__, __ror__ = __and__, __or__
