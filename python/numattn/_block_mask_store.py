"""The storage of a block mask: its arrays, attributes, parts and dense form."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, Self, SupportsIndex

import numpy as np

from ._block_mask_bits import (
    EMPTY,
    FULL,
    Tiles,
    blocks_of,
    dense_part,
    normal_form,
    pack,
    pairs_of_blocks,
    places_of_tiles,
)
from ._checks import dtype_name, integer, refuse, refuse_kind, snapshot, value_and_kind

if TYPE_CHECKING:
    from numpy.typing import ArrayLike, NDArray

    Array = NDArray[Any]
    Size = tuple[int, int]


# The most pairs in a block. A mixed block takes one bit per pair, and more memory while it is made.
_MOST_PAIRS = 2**24


class BlockMaskStore:
    # The kernels read these two arrays, C-contiguous and read-only:
    #
    # `_blocks`, int32, (leading axes of `shape`..., blocks of queries, blocks of keys): -2 for an
    # empty block, -1 for a full one, in which all pairs within Lq and Lk attend, and otherwise the
    # index of its bits in `_bits`.
    #
    # `_bits`, uint8, (distinct mixed blocks, block_queries, ceil(block_keys / 8)): key j of a row
    # is bit j % 8 of byte j // 8. Bits beyond Lq and Lk are 0.
    #
    # They are in normal form: a block without attending pairs is -2, a block with all pairs is -1,
    # and mixed blocks are sorted, distinct and used. So equal masks have equal arrays.
    __slots__ = ("_bits", "_block_size", "_blocks", "_shape")

    # NumPy's operators leave `array & mask` to the mask, which refuses it.
    __array_ufunc__ = None

    _shape: tuple[int, ...]
    _block_size: Size
    _blocks: NDArray[np.int32]
    _bits: NDArray[np.uint8]

    def __init__(self) -> None:
        raise TypeError(
            "BlockMask() cannot be called: use BlockMask.from_mask_mod, from_dense, from_blocks or "
            "from_bsr, or a ready mask such as BlockMask.causal"
        )

    @classmethod
    def _of(cls, shape: tuple[int, ...], block_size: Size, blocks: Array, bits: Array) -> Self:
        """Return a mask that keeps these arrays, which are in normal form."""
        mask = cls.__new__(cls)
        mask._shape, mask._block_size = shape, block_size
        mask._blocks, mask._bits = np.ascontiguousarray(blocks), np.ascontiguousarray(bits)
        mask._blocks.setflags(write=False)
        mask._bits.setflags(write=False)
        return mask

    @classmethod
    def _normal(
        cls, leading: tuple[int, ...], lengths: Size, block_size: Size, blocks: Array, bits: Array
    ) -> Self:
        """Return a mask from arrays that `normal_form` accepts."""
        arrays = normal_form(blocks, bits, lengths, block_size)
        return cls._of((*leading, *lengths), block_size, *arrays)

    def __bool__(self) -> bool:
        raise TypeError("a BlockMask has no truth value: combine masks with `&`, `|` and `~`")

    # Otherwise Python would iterate with __getitem__.
    __iter__ = None

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self)._of, (self._shape, self._block_size, self._blocks, self._bits)

    def __array__(self, *_: Any, **__: Any) -> Array:
        raise TypeError("a BlockMask is not an array: call `to_dense()` to make one")

    # ---- attributes ----------------------------------------------------------------------------

    @property
    def shape(self) -> tuple[int, ...]:
        return self._shape

    @property
    def block_size(self) -> tuple[int, int]:
        return self._block_size

    @property
    def nbytes(self) -> int:
        return self._blocks.nbytes + self._bits.nbytes

    @property
    def density(self) -> float:
        attending, _ = pairs_of_blocks(self._blocks, self._bits, self._lengths, self._block_size)
        return int(attending.sum()) / (math.prod(self._shape) or 1)

    def shares_of_blocks(self) -> NDArray[np.float64]:
        """Return the share of attending pairs in each block.

        Returns
        -------
        ndarray of float64, shape (..., ceil(Lq / queries), ceil(Lk / keys))
            0 for an empty block and 1 for a full one, even if it is partial.

        See Also
        --------
        numattn.plot.plot_block_mask : draw the shares.

        Examples
        --------
        >>> import numattn as na
        >>> na.BlockMask.causal(4, 4, block_size=(2, 2)).shares_of_blocks()
        array([[0.75, 0.  ],
               [1.  , 0.75]])
        """
        arrays = pairs_of_blocks(self._blocks, self._bits, self._lengths, self._block_size)
        return np.asarray(np.divide(*arrays))

    @property
    def _lengths(self) -> Size:
        return self._shape[-2], self._shape[-1]

    def __repr__(self) -> str:
        full = np.count_nonzero(self._blocks == FULL)
        empty = np.count_nonzero(self._blocks == EMPTY)
        mixed = self._blocks.size - full - empty
        return (
            f"BlockMask(shape={self._shape}, block_size={self._block_size}, "
            f"density={self.density:.3g}, blocks: {full} full, {mixed} mixed, {empty} empty, "
            f"{self.nbytes} bytes)"
        )

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, BlockMaskStore):
            return NotImplemented
        return (
            self._shape == other._shape
            and self._block_size == other._block_size
            and np.array_equal(self._blocks, other._blocks)
            and np.array_equal(self._bits, other._bits)
        )

    def __hash__(self) -> int:
        content = self._blocks.tobytes(), self._bits.tobytes()
        return hash((self._shape, self._block_size, *content))

    # ---- as arrays of bools --------------------------------------------------------------------

    def to_dense(self) -> NDArray[np.bool_]:
        """Return the mask as an array of bool.

        Returns
        -------
        ndarray of bool, shape (..., Lq, Lk)
            True where a query attends to a key. It takes one byte per pair.

        See Also
        --------
        rows : return some queries, for masks that are too large.

        Examples
        --------
        >>> import numattn as na
        >>> na.BlockMask.causal(3, 3, block_size=(2, 2)).to_dense()
        array([[ True, False, False],
               [ True,  True, False],
               [ True,  True,  True]])
        """
        return self.rows(0, self._shape[-2])

    def rows(self, begin: int, end: int) -> NDArray[np.bool_]:
        """Return some queries of the mask as an array of bool.

        Parameters
        ----------
        begin, end : int
            The queries `begin` to ``end - 1``, with ``0 <= begin <= end <= Lq``.

        Returns
        -------
        ndarray of bool, shape (..., end - begin, Lk)
            True where a query attends to a key. In addition the call needs memory for the queries
            of two blocks.

        Raises
        ------
        TypeError, ValueError
            If the queries are not ints, or are outside the mask.

        See Also
        --------
        to_dense : return all queries.

        Examples
        --------
        >>> import numattn as na
        >>> na.BlockMask.causal(1000, 1000).rows(1, 3)[:, :5]
        array([[ True,  True, False, False, False],
               [ True,  True,  True, False, False]])
        """
        begin, end = _range("queries", begin, end, self._shape[-2])
        within = slice(begin, end), slice(0, self._shape[-1])
        return dense_part(self._blocks, self._bits, within, self._block_size)

    # ---- parts ---------------------------------------------------------------------------------

    def __getitem__(self, index: Any) -> Self:
        """Return the mask of some batch items, heads, queries and keys, as ``[..., q0:q1, k0:k1]``.

        Queries and keys take slices of step 1. Other axes also take ints, and ``np.newaxis`` adds
        an axis. Slicing is cheap if the slices begin at blocks. Otherwise the pairs are sorted into
        new blocks.

        Returns
        -------
        BlockMask
            With the same block size.

        Raises
        ------
        TypeError, ValueError
            If there are more indices than axes, or an index is of another kind.

        See Also
        --------
        rows : return some queries as an array of bool.

        Examples
        --------
        The part of a text's mask for one query, while tokens are generated:

        >>> import numattn as na
        >>> whole = na.BlockMask.window(1000, 1000, 255, 0)
        >>> whole[600:601, :601].shape
        (1, 601)
        """
        *leading, queries, keys = _expanded(index, self._shape)
        blocks = self._blocks[tuple(leading)]
        (q0, q1), (k0, k1) = (
            _part(index, part, length)
            for part, length in zip((queries, keys), self._lengths, strict=True)
        )
        block_queries, block_keys = self._block_size
        shape, lengths = blocks.shape[:-2], (q1 - q0, k1 - k0)
        if q0 % block_queries == 0 and k0 % block_keys == 0:
            rows = slice(q0 // block_queries, blocks_of(q1, block_queries))
            columns = slice(k0 // block_keys, blocks_of(k1, block_keys))
            blocks = blocks[..., rows, columns]
            return self._normal(shape, lengths, self._block_size, blocks, self._bits)
        tiles = Tiles(shape, lengths, self._block_size)
        for items, q, k in places_of_tiles(shape, lengths, self._block_size):
            within = slice(q0 + q.start, q0 + q.stop), slice(k0 + k.start, k0 + k.stop)
            tiles.put(items, q, k, dense_part(blocks[items], self._bits, within, self._block_size))
        return self._of((*shape, *lengths), self._block_size, *tiles.normal_form())

    def is_empty(self, q0: int, q1: int, k0: int, k1: int) -> bool:
        """Return whether none of some queries attends to any of some keys.

        Parameters
        ----------
        q0, q1 : int
            The queries `q0` to ``q1 - 1``, with ``0 <= q0 <= q1 <= Lq``.
        k0, k1 : int
            The keys `k0` to ``k1 - 1``, with ``0 <= k0 <= k1 <= Lk``.

        Returns
        -------
        bool
            True if no pair attends, in any batch item and head. The answer is exact even if the
            ranges cut blocks, whose bits are then read.

        Raises
        ------
        TypeError, ValueError
            If the queries or keys are not ints, or are outside the mask.

        See Also
        --------
        rows : return which keys a query attends to.

        Examples
        --------
        >>> import numattn as na
        >>> mask = na.BlockMask.causal(1000, 1000)
        >>> mask.is_empty(0, 100, 100, 1000), mask.is_empty(0, 101, 100, 1000)
        (True, False)
        """
        q0, q1 = _range("queries", q0, q1, self._shape[-2])
        k0, k1 = _range("keys", k0, k1, self._shape[-1])
        if q0 == q1 or k0 == k1:
            return True
        block_queries, block_keys = self._block_size
        first_row, first_column = q0 // block_queries, k0 // block_keys
        rows = slice(first_row, blocks_of(q1, block_queries))
        columns = slice(first_column, blocks_of(k1, block_keys))
        blocks = self._blocks[..., rows, columns]
        inner_rows = slice(
            blocks_of(q0, block_queries) - first_row, q1 // block_queries - first_row
        )
        inner_columns = slice(
            blocks_of(k0, block_keys) - first_column, k1 // block_keys - first_column
        )
        inner = blocks[..., inner_rows, inner_columns]
        if (blocks == FULL).any() or (inner != EMPTY).any():
            return False
        # The parts of mixed blocks that are within the ranges.
        *_, row, column = np.nonzero(blocks >= 0)
        queries = (row + first_row)[:, np.newaxis] * block_queries + np.arange(block_queries)
        keys = (column + first_column)[:, np.newaxis] * block_keys + np.arange(block_keys)
        bits = self._bits[blocks[blocks >= 0]]
        bits &= pack((keys >= k0) & (keys < k1))[:, np.newaxis, :]
        return not bits[(queries >= q0) & (queries < q1)].any()


def _expanded(index: Any, shape: tuple[int, ...]) -> tuple[Any, ...]:
    """Return an index for each axis, and for each new one."""
    parts = index if isinstance(index, tuple) else (index,)
    dots = [place for place, part in enumerate(parts) if part is Ellipsis]
    if not dots:
        parts, dots = (*parts, Ellipsis), [len(parts)]
    missing = len(shape) - (len(parts) - 1 - sum(part is None for part in parts))
    if len(dots) > 1 or missing < 0:
        refuse("index", repr(index), f"one index per axis of a mask of shape {shape}")
    parts = (*parts[: dots[0]], *[slice(None)] * missing, *parts[dots[0] + 1 :])
    for part in parts:
        if part is None:  # np.newaxis
            continue
        if isinstance(part, (bool, np.bool_)) or not isinstance(part, (slice, SupportsIndex)):
            seen = value_and_kind(part)
            refuse_kind("index", seen, "ints for batch items and heads, and slices")
    return parts


def _part(index: Any, part: Any, length: int) -> tuple[int, int]:
    """Return the begin and end of a slice of queries or keys."""
    if not isinstance(part, slice):
        refuse_kind("index", repr(index), "slices for queries and keys")
    begin, end, step = part.indices(length)
    if step != 1:
        refuse("index", repr(index), "slices of step 1 for queries and keys")
    return begin, max(begin, end)


def _range(name: str, begin: object, end: object, length: int) -> tuple[int, int]:
    first, last = integer(name, begin), integer(name, end)
    if not 0 <= first <= last <= length:
        refuse(name, f"{first} to {last}", f"a range within 0 to {length}")
    return first, last


def check_block_size(block_size: object) -> Size:
    """Return the block size as a pair of positive Python ints."""
    if not isinstance(block_size, (tuple, list)):
        seen = value_and_kind(block_size)
        refuse_kind("block_size", seen, "(queries, keys), the size of a block")
    if len(block_size) != 2:
        refuse("block_size", repr(block_size), "two sizes, (queries, keys)")
    queries, keys = (integer("block_size", size) for size in block_size)
    if min(queries, keys) < 1:
        refuse("block_size", repr(block_size), "sizes of at least 1")
    if queries * keys > _MOST_PAIRS:
        refuse("block_size", repr(block_size), f"blocks of at most {_MOST_PAIRS} pairs")
    return queries, keys


def check_bools(name: str, array: Array) -> None:
    if array.dtype == np.bool_:
        return
    advice = f"use `{name} != 0` if 0 means masked" if array.dtype.kind in "iuf" else ""
    refuse_kind(name, dtype_name(array), "bool (True = attend)", advice)


def ints(name: str, values: ArrayLike) -> NDArray[np.int64]:
    """Return a copy as int64; an empty list is accepted too."""
    array = snapshot(name, values)
    if array.dtype.kind not in "iu" and array.shape != (0,):
        refuse_kind(name, dtype_name(array), "ints")
    if array.dtype.kind == "u" and (array > 2**63 - 1).any():
        refuse(name, str(array.max()), "ints of at most 2**63 - 1")
    return array.astype(np.int64)


def grid_of(lengths: Size, block_size: Size) -> Size:
    """Return the number of blocks of the queries and of the keys."""
    return blocks_of(lengths[0], block_size[0]), blocks_of(lengths[1], block_size[1])
