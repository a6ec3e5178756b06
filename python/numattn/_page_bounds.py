"""`PageBounds`: attention of few queries to the pages of a cache that matter most."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal, NoReturn, Unpack, overload

import numpy as np

from ._arguments import MAX_POSITION, check_scales, ints_per_batch, key_scales
from ._checks import (
    accepted_dtype,
    as_array,
    at_index,
    at_least,
    dtype_name,
    integer,
    precision_of,
    real,
    refuse,
    refuse_kind,
    refuse_unknown,
)
from ._numpy_blocks import quiet
from ._page_selection import attend_to_pages, choose_pages, least_count
from ._sequence_arguments import check_paged, check_table, keys_read
from ._sequences import PAGED_ELSEWHERE

if TYPE_CHECKING:
    from numpy.typing import ArrayLike, DTypeLike, NDArray

    from ._option_types import SelectedPagesOptions

    Array = NDArray[Any]

# Elements of keys that are converted to float32 at a time.
_BLOCK_NUMBERS = 1 << 18

# Options that attention to chosen pages does not have, under all names that `_checks` knows.
_MASKS = (
    "mask", "attn_mask", "attention_mask", "bias", "attn_bias", "tail_mask", "tree_mask",
    "medusa_attn_mask", "custom_mask", "tree_attn_bias", "qq_bias",
)  # fmt: skip
_WINDOWS = ("window", "window_size", "local_window_size", "sliding_window")
_NO_GAPS = "{} count all keys, and the pages that are left out leave gaps between them"
_LEFT_OUT = {
    **dict.fromkeys(_MASKS, "the bounds of a page do not take masks into account"),
    **dict.fromkeys(_WINDOWS, _NO_GAPS.format("windows")),
    "alibi_slopes": _NO_GAPS.format("distances"),
    **dict.fromkeys(("q_offset", "q_lengths"), "the queries are the last tokens of each item"),
    "layout": 'q is (B, Hq, Lq, D); pass `q.swapaxes(1, 2)` for "blhd"',
    "out": "the result is a new array",
}


class PageBounds:
    """Bounds of the keys in each page of a cache, to find the pages that matter most to a query.

    PageBounds keeps the least and the largest value of each key element, for every page and KV
    head. They give an upper bound of the logits of a page. `attend` reads only the keys of the
    pages with the largest bounds.

    Parameters
    ----------
    num_pages, page_size, kv_heads, head_dim : int
        The shape of the pages of keys, as in `attention_paged`: ``*k_pages.shape``.
    dtype : dtype_like, default float32
        Dtype of queries and keys: float16, bfloat16, float32 or float64. Keys may also be int8.

    Attributes
    ----------
    largest, least : ndarray, shape (num_pages, kv_heads, head_dim)
        Read-only views of the bounds: float32 (float64 for float64 keys). They are -inf and inf for
        pages that were not part of any `update`.
    valid_keys : ndarray of int64, shape (num_pages,)
        A read-only view of the number of keys per page that the bounds cover.
    nbytes : int
        Bytes of memory that the bounds take: for pages of 16 float32 keys, an eighth of the memory
        of the keys.

    Raises
    ------
    TypeError, ValueError
        If a size or the dtype is not valid.

    See Also
    --------
    attention_paged : attention to all pages.
    KVCache : keys and values in one array, with a window if less should be read.

    Notes
    -----
    The method is Quest, by Tang et al. [1]_: the product of a query and any key of a page is at
    most the sum over elements of ``max(q * largest, q * least)``. Leaving out pages is an
    approximation; attention to the chosen pages is exact. A page whose bounds are NaN is chosen as
    if it mattered most.

    Pages are read in place, in one call for all KV heads. It takes one call per KV head, which may
    be slower, with `sinks`, or if the strides of pages and heads have different ratios in keys and
    values.

    Each KV head chooses its own pages. Reading is fastest if each page holds its rows head by head:
    ``np.empty((num_pages, kv_heads, page_size, head_dim)).swapaxes(1, 2)``.

    `select` and `attend` change nothing and may be called by several threads. Do not call `update`
    at the same time.

    References
    ----------
    .. [1] J. Tang et al., "Quest: Query-Aware Sparsity for Efficient Long-Context LLM Inference",
       ICML 2024.

    Examples
    --------
    A sequence of 1000 keys in pages of 16, and queries that match one large key:

    >>> import numpy as np
    >>> import numattn as na
    >>> rng = np.random.default_rng(0)
    >>> k_pages, v_pages = rng.standard_normal((2, 63, 16, 2, 64), dtype=np.float32)
    >>> k_pages[31, 5] *= 4  # of both KV heads
    >>> table, length = np.arange(63)[np.newaxis], [1000]
    >>> bounds = na.PageBounds(*k_pages.shape)
    >>> bounds.update(k_pages, table, length)
    >>> q = np.repeat(k_pages[31, 5], 4, axis=0)[np.newaxis, :, np.newaxis]  # 8 query heads
    >>> bounds.select(q, table, length, 4)[0]  # for each KV head
    array([[ 0, 24, 31, 62],
           [ 0,  6, 31, 62]])
    >>> out = bounds.attend(q, k_pages, v_pages, table, length, 4)
    >>> bool(np.allclose(out, na.attention_paged(q, k_pages, v_pages, table, length), atol=1e-5))
    True

    After one token has been written, only the bounds of the last page change:

    >>> k_pages[62, 8] = v_pages[62, 8] = 1.0
    >>> bounds.update(k_pages, table, [1001], new_tokens=1)
    """

    def __init__(
        self,
        num_pages: int,
        page_size: int,
        kv_heads: int,
        head_dim: int,
        dtype: DTypeLike = np.float32,
    ) -> None:
        self._shape = (
            at_least("num_pages", num_pages, 0),
            at_least("page_size", page_size, 1),
            at_least("kv_heads", kv_heads, 1),
            at_least("head_dim", head_dim, 1),
        )
        self._dtype = accepted_dtype(dtype)
        # The largest and the least elements are adjacent: `_page_selection` multiplies queries
        # by both.
        bounds_shape = (self._shape[0], *self._shape[2:3], 2, self._shape[3])
        self._bounds = np.empty(bounds_shape, precision_of(self._dtype))
        self._bounds[:, :, 0], self._bounds[:, :, 1] = -np.inf, np.inf
        self._valid_keys = np.zeros(self._shape[0], np.int64)

    @property
    def largest(self) -> Array:
        """The largest values of the elements of each page's keys."""
        return _read_only(self._bounds[:, :, 0])

    @property
    def least(self) -> Array:
        """The least values of the elements of each page's keys."""
        return _read_only(self._bounds[:, :, 1])

    @property
    def valid_keys(self) -> NDArray[np.int64]:
        """Number of keys per page that the bounds cover."""
        return _read_only(self._valid_keys.view())

    @property
    def nbytes(self) -> int:
        """Bytes of memory that the bounds take."""
        return self._bounds.nbytes

    def __repr__(self) -> str:
        names = ("num_pages", "page_size", "kv_heads", "head_dim")
        sizes = ", ".join(f"{name}={n}" for name, n in zip(names, self._shape, strict=True))
        known = np.count_nonzero(self._valid_keys)
        return f"PageBounds({sizes}, dtype={self._dtype}): bounds of {known} pages"

    def update(
        self,
        k_pages: ArrayLike,
        block_table: ArrayLike,
        kv_lengths: int | ArrayLike,
        *,
        new_tokens: int | ArrayLike | None = None,
        k_scale: ArrayLike | None = None,
    ) -> None:
        """Compute the bounds of pages again, after keys have been written to them.

        Parameters
        ----------
        k_pages : array_like, shape (num_pages, page_size, kv_heads, head_dim)
            The pages of keys. Only pages that are updated are read.
        block_table, kv_lengths
            As in `attention_paged`: the pages of each batch item, and its number of valid keys.
            Only valid keys count. If sequences share a page, the page counts with the keys of the
            longest of them in this call, so pass all sequences that share a page.
        new_tokens : int or array_like of int, shape (B,), optional
            Update only the pages with the last `new_tokens` tokens of each batch item. Default:
            update all of its pages.
        k_scale : array_like of float32, shape (num_pages, page_size, kv_heads), optional
            Scales for `k_pages` of dtype int8.

        Raises
        ------
        TypeError, ValueError
            If the pages have another shape or dtype than these bounds, if a page does not exist, or
            if a length exceeds the block table.

        See Also
        --------
        select : choose pages by their bounds.
        attend : attend to the chosen pages.

        Examples
        --------
        Two pages of two keys with one element, of which three keys are valid:

        >>> import numpy as np
        >>> import numattn as na
        >>> k_pages = np.array([3, 1, 2, 9], np.float32).reshape(2, 2, 1, 1)
        >>> bounds = na.PageBounds(*k_pages.shape)
        >>> bounds.update(k_pages, [[0, 1]], [3])
        >>> bounds.least.ravel(), bounds.largest.ravel()
        (array([1., 2.], dtype=float32), array([3., 2.], dtype=float32))
        """
        k = as_array("k_pages", k_pages)
        self._check_pages(k)
        scales = key_scales("k_pages", k, k_scale, "k_scale")
        table_ = as_array("block_table", block_table)
        batch = table_.shape[:1] or (0,)
        num_pages, page_size = self._shape[:2]
        table, lengths = check_table(table_, kv_lengths, batch, num_pages, page_size)
        new = ints_per_batch("new_tokens", new_tokens, batch, 0, MAX_POSITION)
        check_scales("k_scale", scales, lambda: keys_read(table, lengths, num_pages, page_size))

        valid = self._valid_in(table, lengths)
        of_page = np.zeros(num_pages, np.int64)
        np.maximum.at(of_page, table[valid > 0], valid[valid > 0])
        is_named = valid > 0
        if new is not None:
            ends = np.arange(table.shape[1]) * page_size + valid
            is_named &= ends > (lengths - new)[:, np.newaxis]
        named = np.unique(table[is_named])
        for count in np.unique(of_page[named]).tolist():
            self._find_bounds(k, scales, named[of_page[named] == count], count)

    def _find_bounds(self, k: Array, scales: Array | None, pages: Array, count: int) -> None:
        """Compute the bounds of pages with `count` valid keys each."""
        at_once = max(1, _BLOCK_NUMBERS // (count * self._shape[2] * self._shape[3]))
        for begin in range(0, len(pages), at_once):
            some = pages[begin : begin + at_once]
            with quiet():
                keys = k[some, :count].astype(self._bounds.dtype, copy=False)
                if scales is not None:
                    keys *= scales[some, :count, :, np.newaxis]
                self._bounds[some, :, 0] = keys.max(axis=1)
                self._bounds[some, :, 1] = keys.min(axis=1)
            self._valid_keys[some] = count

    def select(
        self, q: ArrayLike, block_table: ArrayLike, kv_lengths: int | ArrayLike, count: int
    ) -> NDArray[np.int64]:
        """Choose the pages with the largest bounds, for each batch item and KV head.

        The first page and the pages with the last Lq tokens are always chosen. The bound of a page
        is the largest one for any query in the KV head's group.

        Parameters
        ----------
        q : array_like, shape (B, Hq, Lq, D)
            The queries. If the scale of the logits is negative, pass ``-q``.
        block_table, kv_lengths
            As in `attention_paged`.
        count : int
            Number of pages to choose. It must allow for the first page and the pages that Lq tokens
            may touch (2 pages for one query), unless the block table has fewer pages.

        Returns
        -------
        ndarray of int64, shape (B, kv_heads, min(count, max_pages))
            Columns of the block table, in ascending order; -1 if a batch item has fewer pages. Of
            pages with the same bound, the first ones are chosen.

        Raises
        ------
        TypeError, ValueError
            If the arguments do not fit these bounds, or if a page has more keys than its bounds
            cover, because `update` was not called after writing them. Overwritten keys are not
            detected.

        See Also
        --------
        update : compute the bounds.
        attend : attend to the chosen pages.

        Examples
        --------
        >>> import numpy as np
        >>> import numattn as na
        >>> k_pages = np.arange(10, dtype=np.float32).reshape(10, 1, 1, 1)  # one key of one element
        >>> table, length = np.arange(10)[np.newaxis], [10]
        >>> bounds = na.PageBounds(*k_pages.shape)
        >>> bounds.update(k_pages, table, length)
        >>> bounds.select(np.ones((1, 1, 1, 1), np.float32), table, length, 4)
        array([[[0, 7, 8, 9]]])
        """
        q_ = as_array("q", q)
        self._check_queries(q_)
        num_pages, page_size = self._shape[:2]
        table, lengths = check_table(block_table, kv_lengths, q_.shape[:1], num_pages, page_size)
        return self._select(q_, table, lengths, count)

    @overload
    def attend(
        self,
        q: ArrayLike,
        k_pages: ArrayLike,
        v_pages: ArrayLike,
        block_table: ArrayLike,
        kv_lengths: int | ArrayLike,
        count: int,
        *,
        return_lse: Literal[False] = False,
        **options: Unpack[SelectedPagesOptions],
    ) -> NDArray[Any]: ...
    @overload
    def attend(
        self,
        q: ArrayLike,
        k_pages: ArrayLike,
        v_pages: ArrayLike,
        block_table: ArrayLike,
        kv_lengths: int | ArrayLike,
        count: int,
        *,
        return_lse: Literal[True],
        **options: Unpack[SelectedPagesOptions],
    ) -> tuple[NDArray[Any], NDArray[Any]]: ...
    @overload
    def attend(
        self,
        q: ArrayLike,
        k_pages: ArrayLike,
        v_pages: ArrayLike,
        block_table: ArrayLike,
        kv_lengths: int | ArrayLike,
        count: int,
        *,
        return_lse: bool,
        **options: Unpack[SelectedPagesOptions],
    ) -> NDArray[Any] | tuple[NDArray[Any], NDArray[Any]]: ...
    def attend(
        self,
        q: ArrayLike,
        k_pages: ArrayLike,
        v_pages: ArrayLike,
        block_table: ArrayLike,
        kv_lengths: int | ArrayLike,
        count: int,
        *,
        is_causal: bool = False,
        scale: float | None = None,
        softcap: float | None = None,
        sinks: ArrayLike | None = None,
        return_lse: bool = False,
        num_threads: int | None = None,
        k_scale: ArrayLike | None = None,
        v_scale: ArrayLike | None = None,
        **unknown: Any,
    ) -> NDArray[Any] | tuple[NDArray[Any], NDArray[Any]]:
        """Attend to the pages that `select` chooses, and to no other keys.

        Parameters
        ----------
        q : array_like, shape (B, Hq, Lq, D)
            The queries of each batch item's last tokens.
        k_pages, v_pages, block_table, kv_lengths
            As in `attention_paged`.
        count : int
            Number of pages to attend to, as in `select`. With all pages the result equals the
            result of `attention_paged`, with the same bits if the kernels are compiled.
        is_causal, scale, softcap, sinks, return_lse, num_threads
            As in `attention`. NumPy and its threads choose the pages.
        k_scale, v_scale : array_like of float32, shape (num_pages, page_size, kv_heads), optional
            Scales for pages of dtype int8.

        Returns
        -------
        out : ndarray, shape (B, Hq, Lq, Dv)
            In the dtype of `q`.
        lse : ndarray, shape (B, Hq, Lq)
            Only with ``return_lse=True``. Natural logarithm, of only the chosen keys.

        Raises
        ------
        TypeError, ValueError
            As in `attention_paged` and `select`, and for options that do not work with gaps between
            pages: windows, masks and ALiBi.

        See Also
        --------
        select : choose the pages without attending to them.
        attention_paged : attention to all pages.

        Examples
        --------
        With as many pages as there are, it is attention to all keys:

        >>> import numpy as np
        >>> import numattn as na
        >>> rng = np.random.default_rng(0)
        >>> pages = rng.standard_normal((8, 4, 2, 16), dtype=np.float32)
        >>> q = rng.standard_normal((1, 2, 1, 16), dtype=np.float32)
        >>> table, length = np.arange(8)[np.newaxis], [30]
        >>> bounds = na.PageBounds(*pages.shape)
        >>> bounds.update(pages, table, length)
        >>> out = bounds.attend(q, pages, pages, table, length, 8)
        >>> bool(np.allclose(out, na.attention_paged(q, pages, pages, table, length), atol=1e-6))
        True
        >>> bounds.attend(q, pages, pages, table, length, 3).shape  # only 3 pages are read
        (1, 2, 1, 16)
        """
        if unknown:
            _refuse_options(unknown)
        q_ = as_array("q", q)
        a = check_paged(
            q_, k_pages, v_pages, block_table, kv_lengths, None, k_scale, v_scale, None,
            q_.shape[2] if q_.ndim == 4 else None, "bhld", return_lse, None, is_causal=is_causal,
            window=None, scale=scale, softcap=softcap, alibi_slopes=None, sinks=sinks,
            num_threads=num_threads,
        )  # fmt: skip
        self._check_pages(a.k.swapaxes(1, 2))
        self._check_queries(a.q)
        assert a.block_table is not None
        assert a.kv_lengths is not None
        towards = a.q if scale is None or real("scale", scale) >= 0 else -a.q
        attend_to_pages(a, self._select(towards, a.block_table, a.kv_lengths, count))
        assert a.result is not None
        return a.result if a.result_lse is None else (a.result, a.result_lse)

    def _select(
        self, q: Array, table: NDArray[np.int64], lengths: NDArray[np.int64], count: int
    ) -> NDArray[np.int64]:
        _, page_size, kv_heads, _ = self._shape
        most = table.shape[1]
        least = min(least_count(q.shape[2], page_size), most)
        wanted = integer("count", count)
        if wanted < least:
            always = f"the first page and the pages of the last {q.shape[2]} tokens are always read"
            refuse("count", str(wanted), f"at least {least}: {always}")
        valid = self._valid_in(table, lengths)
        unknown = valid > 0
        unknown[unknown] = valid[unknown] > self._valid_keys[table[unknown]]
        if unknown.any():
            where = tuple(map(int, np.argwhere(unknown)[0]))
            page = int(table[where])
            covered = self._valid_keys[page]
            seen = f"page {page}{at_index(where)}, whose bounds cover {covered} valid keys"
            expected = f"bounds of {valid[where]} valid keys"
            refuse("block_table", seen, expected, "call `update` after writing keys")
        grouped = q.reshape(len(q), kv_heads, q.shape[1] // kv_heads, *q.shape[2:])
        return choose_pages(grouped, self._bounds, table, lengths, page_size, min(wanted, most))

    def _valid_in(self, table: NDArray[np.int64], lengths: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return the number of valid keys in each page of a table."""
        page_size = self._shape[1]
        before = np.arange(table.shape[1]) * page_size
        valid: NDArray[np.int64] = np.clip(lengths[:, np.newaxis] - before, 0, page_size)
        return valid

    def _check_pages(self, k: Array) -> None:
        if k.dtype not in (self._dtype, np.int8):
            wanted = f"{self._dtype.name}, the dtype of these bounds, or int8"
            refuse_kind("k_pages", dtype_name(k), wanted)
        if k.shape != self._shape:
            refuse("k_pages", f"shape {k.shape}", f"{self._shape}, as in these bounds")

    def _check_queries(self, q: Array) -> None:
        if q.dtype != self._dtype:
            refuse_kind("q", dtype_name(q), f"{self._dtype.name}, the dtype of these bounds")
        if q.ndim != 4:
            refuse("q", f"shape {q.shape}", "(B, Hq, Lq, D)")
        _, _, kv_heads, head_dim = self._shape
        if q.shape[3] != head_dim:
            refuse("q", f"shape {q.shape}", f"head_dim {head_dim}, as in these bounds")
        if q.shape[1] % kv_heads:
            refuse("q", f"{q.shape[1]} heads", f"a multiple of the {kv_heads} KV heads")


def _refuse_options(names: dict[str, Any]) -> NoReturn:
    for name in names:
        if name in _LEFT_OUT:
            raise TypeError(f"attend() has no {name!r}: {_LEFT_OUT[name]}")
    refuse_unknown("attend", names, PAGED_ELSEWHERE)


def _read_only(x: Array) -> Array:
    x.flags.writeable = False
    return x
