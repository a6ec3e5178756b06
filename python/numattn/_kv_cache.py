"""Keys and values of the tokens so far, for generating text one token after the other."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from ._arguments import ACCEPTED_DTYPES, _array, _integer, _refuse, _refuse_kind
from ._attention import attention
from ._states import merge_states, quantize_kv

if TYPE_CHECKING:
    from numpy.typing import ArrayLike, DTypeLike, NDArray

    Array = NDArray[Any]


class KVCache:
    """The keys and values that a batch of growing sequences has had so far.

    Parameters
    ----------
    batch : int
        Number of sequences, which may have different lengths.
    kv_heads, head_dim : int
        Heads of keys and values, and elements of a key.
    value_dim : int, optional
        Elements of a value. Default: `head_dim`.
    dtype : dtype, default float32
        Of what is appended and of the queries: float16, bfloat16, float32 or float64.
    quantize : bool, default False
        Keep 8 bits for each number, with a scale for each token and head (`quantize_kv`).
    capacity : int, default 0
        Tokens that there is room for at first. The cache grows by itself.
    window : int, optional
        Keep what the last tokens can see of a window of so many tokens, themselves included, and
        forget what lies further back: memory stays constant.
    keep_first : int, default 0
        With `window`: the first tokens, which are never forgotten and always seen.

    Attributes
    ----------
    lengths : ndarray of int64, shape (batch,)
        Tokens appended to each sequence so far, forgotten ones included.
    nbytes : int
        Bytes of memory that keys, values and scales take.
    k, v : ndarray, shape (batch, kv_heads, tokens, head_dim or value_dim)
        Views of what is kept; with `keep_first` those come first. What lies beyond a shorter
        sequence is not defined.

    Raises
    ------
    TypeError, ValueError
        If an argument is of the wrong kind or size.

    See Also
    --------
    attention, merge_states, quantize_kv

    Notes
    -----
    Appending copies each token once, and at most once more for each doubling of the memory. The
    first tokens beside a window are the attention sinks of Xiao et al., "Efficient Streaming
    Language Models with Attention Sinks", ICLR 2024; positions here are those of the whole text.

    Examples
    --------
    >>> import numpy as np
    >>> import numattn as na
    >>> rng = np.random.default_rng(0)
    >>> q, k, v = rng.standard_normal((3, 1, 2, 10, 8), dtype=np.float32)  # 10 tokens, 2 heads
    >>> cache = na.KVCache(1, 2, 8)
    >>> cache.append(k[:, :, :6], v[:, :, :6])  # the prompt
    >>> steps = [cache.attend(q[:, :, :6])]
    >>> for i in range(6, 10):  # then one token after the other
    ...     cache.append(k[:, :, i : i + 1], v[:, :, i : i + 1])
    ...     steps.append(cache.attend(q[:, :, i : i + 1]))
    >>> whole = na.attention(q, k, v, is_causal=True)
    >>> bool(np.allclose(np.concatenate(steps, axis=2), whole, atol=1e-6))
    True
    """

    def __init__(
        self,
        batch: int,
        kv_heads: int,
        head_dim: int,
        value_dim: int | None = None,
        *,
        dtype: DTypeLike = np.float32,
        quantize: bool = False,
        capacity: int = 0,
        window: int | None = None,
        keep_first: int = 0,
    ) -> None:
        self._batch = _at_least("batch", batch, 0)
        self._heads = _at_least("kv_heads", kv_heads, 1)
        dims = (
            _at_least("head_dim", head_dim, 1),
            _at_least("value_dim", head_dim if value_dim is None else value_dim, 1),
        )
        self._dtype = np.dtype(dtype)
        if self._dtype.name not in ACCEPTED_DTYPES:
            _refuse_kind("dtype", self._dtype.name, "one of " + ", ".join(ACCEPTED_DTYPES))
        if not isinstance(quantize, bool):
            _refuse_kind("quantize", repr(quantize), "True or False")
        self._quantize = quantize
        self._window = None if window is None else _at_least("window", window, 1)
        self._keep_first = _at_least("keep_first", keep_first, 0)
        if self._keep_first and self._window is None:
            _refuse("keep_first", str(keep_first), "0 where there is no window")
        self._lengths = np.zeros(self._batch, np.int64)
        # Position of the token in the first place behind those that are always kept.
        self._begins = np.full(self._batch, self._keep_first, np.int64)
        stored = np.dtype(np.int8) if quantize else self._dtype
        rows = _at_least("capacity", capacity, 0)
        # [batch][head][place][element], and the scales without the last axis
        self._arrays = [np.empty((self._batch, self._heads, rows, d), stored) for d in dims]
        if quantize:
            self._arrays += [
                np.empty((self._batch, self._heads, rows), np.float32) for _ in range(2)
            ]

    @property
    def lengths(self) -> NDArray[np.int64]:
        """Tokens appended to each sequence so far, forgotten ones included."""
        return self._lengths.copy()

    @property
    def nbytes(self) -> int:
        """Bytes of memory that keys, values and scales take."""
        return sum(x.nbytes for x in self._arrays)

    @property
    def k(self) -> Array:
        """View of the keys that are kept, (batch, kv_heads, tokens, head_dim)."""
        return self._arrays[0][:, :, : self._used().max(initial=0)]

    @property
    def v(self) -> Array:
        """View of the values that are kept, (batch, kv_heads, tokens, value_dim)."""
        return self._arrays[1][:, :, : self._used().max(initial=0)]

    def append(self, k: ArrayLike, v: ArrayLike, lengths: ArrayLike | None = None) -> None:
        """Append tokens to every sequence.

        Parameters
        ----------
        k, v : array_like, shape (batch, kv_heads, tokens, head_dim or value_dim)
            Keys and values in the cache's dtype.
        lengths : array_like of int, shape (batch,), optional
            How many of the tokens each sequence gets. Default: all.

        Raises
        ------
        TypeError, ValueError
            If something does not fit; the cache is then as it was. With a window, no more tokens
            than it at once: what lies further back would be gone before a query could see it.
        """
        new = [self._checked("k", k), self._checked("v", v)]
        tokens = new[0].shape[2]
        if new[1].shape[2] != tokens:
            _refuse("v", f"{new[1].shape[2]} tokens", f"{tokens} as in k")
        if self._window is not None and tokens > self._window:
            _refuse("k", f"{tokens} tokens", f"at most the window's {self._window} at once")
        counts = self._counts(lengths, tokens)
        if self._quantize:
            pairs = [quantize_kv(x) for x in new]
            new = [numbers for numbers, _ in pairs] + [scale for _, scale in pairs]

        begins = self._begins
        if self._window is not None:
            # The first of the new tokens still sees window - 1 tokens before it.
            oldest = np.maximum(self._lengths - (self._window - 1), self._keep_first)
            needed = self._places(self._lengths + counts, begins).max(initial=0)
            if needed > self._arrays[0].shape[2]:
                begins = np.maximum(begins, oldest)
        needed = int(self._places(self._lengths + counts, begins).max(initial=0))
        self._make_room(needed, begins)
        self._begins = begins.copy()
        first = self._places(self._lengths, begins)
        is_uniform = self._batch > 0 and np.all(counts == tokens) and np.all(first == first[0])
        for stored, x in zip(self._arrays, new, strict=True):
            if is_uniform and self._window is None:
                stored[:, :, first[0] : first[0] + tokens] = x
                continue
            for i, count in enumerate(counts):
                stored[i, :, first[i] : first[i] + count] = x[i, :, :count]
        self._lengths = self._lengths + counts

    def attend(self, q: ArrayLike, **options: Any) -> Any:
        """Attend to what the cache holds.

        Parameters
        ----------
        q : array_like, shape (batch, Hq, Lq, head_dim)
            The queries of the last tokens: the last one stands at the end of its sequence.
        **options
            As of `attention`, but for `mask`, `bias`, `kv_lengths`, `k_scale` and `v_scale`;
            `is_causal` is True by default, and `window` belongs to a cache without one.

        Returns
        -------
        out : ndarray, shape (batch, Hq, Lq, value_dim)
            And the lse with ``return_lse=True``, as `attention`.

        Raises
        ------
        TypeError, ValueError
            As `attention`.
        """
        for name in ("mask", "bias", "kv_lengths", "k_scale", "v_scale"):
            if options.get(name) is not None:
                _refuse_kind(name, "an array", "none: the cache knows its keys")
        options = {"is_causal": True} | options
        if self._window is None:
            return self._attend_to(q, slice(None, self._used().max(initial=0)), 0, options)
        if options.get("window") is not None:
            _refuse("window", repr(options["window"]), "none: the cache has one")
        rows = _array("q", q).shape[1 if options.get("layout") == "blhd" else 2 : 3][:1]
        if rows and rows[0] > self._window:
            _refuse("q", f"{rows[0]} queries", f"at most the window's {self._window}")
        recent = slice(self._keep_first, int(self._used().max(initial=0)))
        windowed = options | {"window": (self._window - 1, None)}
        if self._keep_first == 0:
            return self._attend_to(q, recent, self._begins, windowed)
        # Two sets of keys with positions of their own; the sinks belong to one of them.
        with_lse = {"return_lse": True, "out": None}
        old = self._attend_to(
            q, slice(0, self._keep_first), 0, options | with_lse | {"sinks": None}
        )
        new = self._attend_to(q, recent, self._begins, windowed | with_lse)
        merged, lse = merge_states(*old, *new, out=options.get("out"))
        return (merged, lse) if options.get("return_lse") else merged

    def truncate(self, n: int) -> None:
        """Forget all but the first `n` tokens of every sequence, as if they had not come yet.

        Raises
        ------
        TypeError, ValueError
            If `n` is no int, negative, or so small that a window's tokens would be missing.
        """
        n = _at_least("n", n, 0)
        lengths = np.minimum(self._lengths, n)
        if self._window is not None:
            oldest = np.maximum(lengths - (self._window - 1), self._keep_first)
            if np.any((self._begins > oldest) & (lengths < self._lengths)):
                _refuse("n", str(n), "a length whose window is still there")
        self._lengths = lengths

    def reset(self) -> None:
        """Forget all tokens, but keep the memory."""
        self._lengths = np.zeros(self._batch, np.int64)
        self._begins = np.full(self._batch, self._keep_first, np.int64)

    def select(self, indices: ArrayLike) -> KVCache:
        """Return a cache of copies of some sequences, as beam search needs them.

        Parameters
        ----------
        indices : array_like of int, shape (n,)
            The sequences, in any order and as often as wanted.

        Raises
        ------
        TypeError, ValueError
            If `indices` is no list of ints, or one of them is no sequence.
        """
        chosen = _array("indices", indices)
        if chosen.ndim != 1 or (chosen.size and chosen.dtype.kind not in "iu"):
            seen = f"dtype {chosen.dtype}, shape {chosen.shape}"
            _refuse_kind("indices", seen, "a list of ints")
        outside = (chosen < -self._batch) | (chosen >= self._batch)
        if outside.any():
            at = int(np.argmax(outside))
            _refuse("indices", f"{chosen[at]} at {at}", f"numbers of {self._batch} sequences")
        chosen = chosen.astype(np.int64)
        other = object.__new__(KVCache)
        other.__dict__.update(self.__dict__)
        other._batch = len(chosen)
        other._arrays = [x[chosen] for x in self._arrays]
        other._lengths = self._lengths[chosen]
        other._begins = self._begins[chosen]
        return other

    def copy(self) -> KVCache:
        """Return a cache with the same tokens in memory of its own."""
        return self.select(np.arange(self._batch))

    # ---- inside -------------------------------------------------------------------------------

    def _places(self, lengths: NDArray[np.int64], begins: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return how many places the tokens take: the first ones, then those from `begins` on."""
        kept = np.minimum(lengths, self._keep_first)
        places: NDArray[np.int64] = kept + np.maximum(lengths - begins, 0)
        return places

    def _used(self) -> NDArray[np.int64]:
        return self._places(self._lengths, self._begins)

    def _make_room(self, rows: int, begins: NDArray[np.int64]) -> None:
        """Move what is kept to where `begins` wants it, into larger arrays if need be."""
        moved = begins - self._begins
        grows = rows > self._arrays[0].shape[2]
        if not grows and not moved.any():
            return
        capacity = self._arrays[0].shape[2]
        if grows:
            capacity = max(rows, 2 * capacity, 16)
            if self._window is not None:
                # Room for twice the window: then each token is moved once at the most.
                capacity = max(rows, min(capacity, self._keep_first + 2 * self._window))
        used = self._used()
        keep = self._keep_first
        arrays = []
        for x in self._arrays:
            to = np.empty((*x.shape[:2], capacity, *x.shape[3:]), x.dtype) if grows else x
            if not moved.any():
                last = int(used.max(initial=0))
                to[:, :, :last] = x[:, :, :last]
            else:
                for i, (shift, last) in enumerate(zip(moved, used, strict=True)):
                    if grows:
                        to[i, :, :keep] = x[i, :, :keep]
                    if keep + shift < last:
                        to[i, :, keep : last - shift] = x[i, :, keep + shift : last]
            arrays.append(to)
        self._arrays = arrays

    def _checked(self, name: str, x: ArrayLike) -> Array:
        array = _array(name, x)
        stored = self._arrays[0 if name == "k" else 1]
        wanted = (
            self._batch,
            self._heads,
            array.shape[2] if array.ndim == 4 else 0,
            stored.shape[3],
        )
        if array.dtype != self._dtype:
            _refuse_kind(name, f"dtype {array.dtype.name}", f"{self._dtype.name} as the cache")
        if array.shape != wanted:
            axes = f"({self._batch}, {self._heads}, tokens, {stored.shape[3]})"
            _refuse(name, f"shape {array.shape}", axes)
        return array

    def _counts(self, lengths: ArrayLike | None, tokens: int) -> NDArray[np.int64]:
        if lengths is None:
            return np.full(self._batch, tokens, np.int64)
        counts = _array("lengths", lengths)
        if counts.dtype.kind not in "iu" and counts.size:
            _refuse_kind("lengths", f"dtype {counts.dtype}", "ints")
        if counts.shape != (self._batch,):
            _refuse("lengths", f"shape {counts.shape}", f"({self._batch},)")
        outside = (counts < 0) | (counts > tokens)
        if outside.any():
            at = int(np.argmax(outside))
            _refuse("lengths", f"{counts[at]} at {at}", f"0 to {tokens}, the tokens given")
        return counts.astype(np.int64)

    def _attend_to(self, q: ArrayLike, places: slice, begins: Any, options: dict[str, Any]) -> Any:
        """Attend to the tokens in `places`, the first of which stands at position `begins`."""
        layout = options.get("layout", "bhld")
        k, v = (x[:, :, places] for x in self._arrays[:2])
        scales = dict(zip(("k_scale", "v_scale"), self._arrays[2:], strict=False))
        scales = {name: x[:, :, places] for name, x in scales.items()}
        queries = _array("q", q)
        if queries.ndim != 4:
            _refuse("q", f"shape {queries.shape}", "(batch, heads, length, dim) or the layout's")
        rows = queries.shape[1 if layout == "blhd" else 2]
        lengths = np.clip(self._lengths - begins, 0, k.shape[2])
        offset = options.get("q_offset")
        offset = (self._lengths - rows if offset is None else np.asarray(offset)) - begins
        if layout == "blhd":
            k, v = k.swapaxes(1, 2), v.swapaxes(1, 2)
            scales = {name: x.swapaxes(1, 2) for name, x in scales.items()}
        given: dict[str, Any] = options | scales | {"kv_lengths": lengths, "q_offset": offset}
        return attention(q, k, v, **given)


def _at_least(name: str, value: object, least: int) -> int:
    number = _integer(name, value)
    if number < least:
        _refuse(name, str(number), f"at least {least}")
    return number
