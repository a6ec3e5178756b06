"""What a block mask holds, and what it tells of it."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, Self

import numpy as np

from ._block_mask_bits import EMPTY, FULL, blocks_of, bytes_of, dense, normal_form
from ._checks import integer, refuse, refuse_kind

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Array = NDArray[Any]
    Size = tuple[int, int]


class BlockMaskStore:
    # The kernels read these two arrays, C-contiguous and read-only:
    #
    # `_blocks`, int32, (leading axes of `shape`..., blocks of queries, blocks of keys): -2 for an
    # empty block, -1 for a full one, of which all pairs within Lq and Lk attend, and otherwise the
    # place of its bits in `_bits`.
    #
    # `_bits`, uint8, (different mixed blocks, block_queries, ceil(block_keys / 8)): key j of a row
    # is bit j % 8 of byte j // 8. What lies beyond Lq and Lk is 0.
    #
    # They are in normal form: a block without pairs is -2, one with all of them -1; mixed blocks
    # are sorted, no two are equal, and each belongs to a block. So equal masks have equal arrays.
    __slots__ = ("_bits", "_block_size", "_blocks", "_shape")

    # NumPy's operators leave `array & mask` to the mask, which refuses it.
    __array_ufunc__ = None

    _shape: tuple[int, ...]
    _block_size: Size
    _blocks: NDArray[np.int32]
    _bits: NDArray[np.uint8]

    def __init__(self) -> None:
        raise TypeError(
            "BlockMask() makes none: use BlockMask.from_mask_mod, from_dense, from_blocks, "
            "from_bsr, or a ready one such as BlockMask.causal"
        )

    @classmethod
    def _of(cls, shape: tuple[int, ...], block_size: Size, blocks: Array, bits: Array) -> Self:
        """Return a mask of arrays in normal form, which it keeps."""
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
        """Return a mask of arrays that `normal_form` accepts."""
        arrays = normal_form(blocks, bits, lengths, block_size)
        return cls._of((*leading, *lengths), block_size, *arrays)

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self)._of, (self._shape, self._block_size, self._blocks, self._bits)

    def __array__(self, *_: Any, **__: Any) -> Array:
        raise TypeError("a BlockMask is no array: `to_dense()` makes one")

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
        queries, keys = (
            np.minimum(length - block * np.arange(blocks_of(length, block)), block)
            for length, block in zip(self._shape[-2:], self._block_size, strict=True)
        )
        # Rows of blocks of full ones, then each mixed one as often as it is there.
        attending = int(((self._blocks == FULL) @ keys @ queries).sum())
        times = np.bincount(self._blocks[self._blocks >= 0], minlength=len(self._bits))
        pairs = np.bitwise_count(self._bits).sum(axis=(1, 2), dtype=np.int64)
        attending += int(times @ pairs)
        return attending / (math.prod(self._shape) or 1)

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
        """Return the mask as an array of bools.

        Returns
        -------
        ndarray of bool, shape (..., Lq, Lk)
            True where a query attends to a key. It takes a byte for each pair.

        See Also
        --------
        rows : some queries of it, for masks that are too large.

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
        """Return what some queries attend to, as an array of bools.

        Parameters
        ----------
        begin, end : int
            The queries `begin` to ``end - 1``, as ``0 <= begin <= end <= Lq``.

        Returns
        -------
        ndarray of bool, shape (..., end - begin, Lk)
            True where a query attends to a key. Beyond it the call needs memory for the queries of
            two blocks.

        Raises
        ------
        TypeError, ValueError
            If the queries are not ints, or not within the mask.

        See Also
        --------
        to_dense : all queries.

        Examples
        --------
        >>> import numattn as na
        >>> na.BlockMask.causal(1000, 1000).rows(1, 3)[:, :5]
        array([[ True,  True, False, False, False],
               [ True,  True,  True, False, False]])
        """
        begin, end = _range("queries", begin, end, self._shape[-2])
        block = self._block_size[0]
        first = begin // block
        blocks = self._blocks[..., first : blocks_of(end, block), :]
        attends = dense(blocks, self._bits, self._block_size)
        begin, end = begin - first * block, end - first * block
        return attends[..., begin:end, : self._shape[-1]]


def _range(name: str, begin: object, end: object, length: int) -> tuple[int, int]:
    first, last = integer(name, begin), integer(name, end)
    if not 0 <= first <= last <= length:
        refuse(name, f"{first} to {last}", f"a range within 0 to {length}")
    return first, last


def check_block_size(block_size: object) -> Size:
    """Return a pair of ints of Python that are positive."""
    if not isinstance(block_size, (tuple, list)):
        seen = f"{block_size!r} ({type(block_size).__name__})"
        refuse_kind("block_size", seen, "(queries, keys) of a block")
    if len(block_size) != 2:
        refuse("block_size", repr(block_size), "two sizes, (queries, keys) of a block")
    queries, keys = (integer("block_size", size) for size in block_size)
    if min(queries, keys) < 1:
        refuse("block_size", repr(block_size), "sizes of at least 1")
    return queries, keys


def grid_of(lengths: Size, block_size: Size) -> Size:
    """Return how many blocks the queries and the keys take."""
    return blocks_of(lengths[0], block_size[0]), blocks_of(lengths[1], block_size[1])


def no_bits(block_size: Size) -> Array:
    return np.zeros((0, block_size[0], bytes_of(block_size[1])), np.uint8)
