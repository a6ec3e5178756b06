"""Masks by blocks of queries and keys."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Self

import numpy as np

from ._arguments import check_mask
from ._block_mask_bits import EMPTY, FULL, Tiles, places_of_tiles
from ._block_mask_patterns import BlockMaskPatterns
from ._block_mask_store import check_block_size, grid_of, no_bits
from ._checks import as_array, at_least, dtype_name, refuse, refuse_kind

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
        and, last, of the query heads; they broadcast as those of a dense mask do.
    block_size : tuple of int, (queries, keys)
        The last blocks may be partial.
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
    mask of 65,536 queries and keys has 4 MiB of blocks.

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
            ``mask_mod(batch, head, q, k)`` takes four arrays of ints that broadcast to (batch
            items, heads, queries, keys), and returns bools that do too: True = attend.
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
        `mask_mod` is called with some thousand keys at a time, so that the whole mask is never in
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
            seen = f"{mask_mod!r} ({type(mask_mod).__name__})"
            refuse_kind("mask_mod", seen, "a function mask_mod(batch, head, q, k)")
        lengths = at_least("Lq", Lq, 0), at_least("Lk", Lk, 0)
        items = (
            1 if batch is None else at_least("batch", batch, 0),
            1 if heads is None else at_least("heads", heads, 0),
        )
        block_size = check_block_size(block_size)
        tiles = Tiles(items, lengths, block_size)
        for leading, queries, keys in places_of_tiles(items, lengths, block_size):
            tile = _evaluate(mask_mod, (*leading, queries, keys))
            tiles.put(leading, queries, keys, tile)
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
        check_mask(array)
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
        check_mask(array, "a bool for each block", "keep")
        lengths = at_least("Lq", Lq, 0), at_least("Lk", Lk, 0)
        block_size = check_block_size(block_size)
        grid = grid_of(lengths, block_size)
        if array.shape[-2:] != grid:
            expected = f"(..., {grid[0]}, {grid[1]}), the blocks of {lengths[0]} queries and "
            expected += f"{lengths[1]} keys in blocks of {block_size}"
            refuse("keep", f"shape {array.shape}", expected)
        blocks = np.where(array, np.int32(FULL), np.int32(EMPTY))
        return cls._of((*array.shape[:-2], *lengths), block_size, blocks, no_bits(block_size))


def _evaluate(mask_mod: Callable[[Array, Array, Array, Array], Any], place: Any) -> Array:
    """Return what a function says of a tile, (batch items, heads, queries, keys)."""
    indices = np.ix_(*(np.arange(part.start, part.stop) for part in place))
    shape = tuple(part.stop - part.start for part in place)
    said = mask_mod(*indices)
    if not isinstance(said, (np.ndarray, np.bool_, bool)):
        refuse_kind("mask_mod", f"{type(said).__name__} from it", "an array of bools")
    attends = np.asarray(said)
    if attends.dtype != np.bool_:
        refuse_kind("mask_mod", f"{dtype_name(attends)} from it", "bool, True = attend")
    try:
        return np.broadcast_to(attends, shape)
    except ValueError:
        expected = f"one that broadcasts to {shape}, as the arrays of indices do"
        refuse("mask_mod", f"shape {attends.shape} from it", expected)
