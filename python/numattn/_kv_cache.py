"""Keys and values of the tokens so far, for generating text one token after the other."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from ._arguments import MAX_POSITION, ints_per_batch
from ._attention import attention
from ._checks import (
    ACCEPTED_DTYPES,
    as_array,
    at_least,
    check_layout,
    check_out,
    check_overlap,
    flag,
    is_accepted,
    refuse,
    refuse_kind,
    snapshot,
)
from ._merge_states import merge_states
from ._quantize import quantize_named

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
        Each token sees so many tokens, itself included. The last tokens are kept, at least one more
        window than was appended last, and what lies further back is forgotten: memory stays
        constant.
    keep_first : int, default 0
        With `window`: the first tokens, which are never forgotten and always seen.

    Attributes
    ----------
    lengths : ndarray of int64, shape (batch,)
        Tokens appended to each sequence so far, forgotten ones included.
    nbytes : int
        Bytes of memory that keys, values and scales take.
    k, v : ndarray, shape (batch, kv_heads, tokens, head_dim or value_dim)
        Read-only views of what is kept; with `keep_first` those come first. What lies beyond a
        shorter sequence is not defined.
    k_scale, v_scale : ndarray of float32, shape (batch, kv_heads, tokens), or None
        Their scales, where the cache keeps 8 bits.

    Raises
    ------
    TypeError, ValueError
        If an argument is of the wrong kind or size.

    See Also
    --------
    attention, merge_states, quantize_kv

    Notes
    -----
    Appending copies each token once, and on average about twice more when the memory grows or a
    window moves on. A failed or interrupted append leaves the cache as it was. With `keep_first`,
    float16 and bfloat16 results are rounded once more, because two parts are merged. The first
    tokens beside a window are the attention sinks of Xiao et al., "Efficient Streaming
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
        self._batch = at_least("batch", batch, 0)
        self._heads = at_least("kv_heads", kv_heads, 1)
        dims = (
            at_least("head_dim", head_dim, 1),
            at_least("value_dim", head_dim if value_dim is None else value_dim, 1),
        )
        try:
            self._dtype = np.dtype(dtype)
        except TypeError:
            refuse_kind("dtype", repr(dtype), "one of " + ", ".join(ACCEPTED_DTYPES))
        if not is_accepted(self._dtype):
            refuse_kind("dtype", str(self._dtype), "one of " + ", ".join(ACCEPTED_DTYPES))
        if not isinstance(quantize, bool):
            refuse_kind("quantize", repr(quantize), "True or False")
        self._quantize = quantize
        self._window = None if window is None else at_least("window", window, 1)
        self._keep_first = at_least("keep_first", keep_first, 0)
        if self._keep_first and self._window is None:
            refuse("keep_first", str(keep_first), "0 where there is no window")
        self._lengths = np.zeros(self._batch, np.int64)
        # Tokens have positions in the text and places in the arrays: the first keep_first, then
        # those from position begins[sequence] on.
        self._begins = np.full(self._batch, self._keep_first, np.int64)
        stored = np.dtype(np.int8) if quantize else self._dtype
        rows = at_least("capacity", capacity, 0)
        # [batch][head][place][element], and the scales without the last axis. Scales are 0 where
        # nothing is: they are looked at in one piece.
        self._arrays = [np.empty((self._batch, self._heads, rows, d), stored) for d in dims]
        if quantize:
            self._arrays += [
                np.zeros((self._batch, self._heads, rows), np.float32) for _ in range(2)
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
        """The keys that are kept, (batch, kv_heads, tokens, head_dim)."""
        return self._view(0)

    @property
    def v(self) -> Array:
        """The values that are kept, (batch, kv_heads, tokens, value_dim)."""
        return self._view(1)

    @property
    def k_scale(self) -> Array | None:
        """The scales of 8-bit keys, (batch, kv_heads, tokens)."""
        return self._view(2) if self._quantize else None

    @property
    def v_scale(self) -> Array | None:
        """The scales of 8-bit values, (batch, kv_heads, tokens)."""
        return self._view(3) if self._quantize else None

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
            than it at once: what lies further back would be gone before a query could see it. Cut a
            longer text into pieces, and attend after each.
        """
        new = [self._checked("k", k), self._checked("v", v)]
        tokens = new[0].shape[2]
        if new[1].shape[2] != tokens:
            refuse("v", f"{new[1].shape[2]} tokens", f"{tokens} as in k")
        if self._window is not None and tokens > self._window:
            refuse("k", f"{tokens} tokens", f"at most the window's {self._window} at once")
        counts = self._counts(lengths, tokens)
        if self._quantize:
            if lengths is not None:  # what is not appended may be anything
                is_new = np.arange(tokens) < counts[:, np.newaxis]
                new = [
                    np.where(is_new[:, np.newaxis, :, np.newaxis], x, x.dtype.type(0)) for x in new
                ]
            pairs = [quantize_named(name, x) for name, x in zip("kv", new, strict=True)]
            new = [numbers for numbers, _ in pairs] + [scale for _, scale in pairs]

        arrays, begins = self._with_room_for(counts)
        first = self._places(self._lengths, begins)
        is_uniform = self._batch > 0 and np.all(counts == tokens) and np.all(first == first[0])
        for stored, x in zip(arrays, new, strict=True):
            if is_uniform:
                stored[:, :, first[0] : first[0] + tokens] = x
                continue
            for i, count in enumerate(counts):
                stored[i, :, first[i] : first[i] + count] = x[i, :, :count]
        # One step, which an interrupt cannot divide.
        self.__dict__.update(_arrays=arrays, _begins=begins, _lengths=self._lengths + counts)

    def attend(self, q: ArrayLike, **options: Any) -> Any:
        """Attend to what the cache holds.

        Parameters
        ----------
        q : array_like, shape (batch, Hq, Lq, head_dim)
            The queries of the last tokens: the last one stands at the end of its sequence, unless
            `q_offset` says otherwise. After an `append` with `lengths`, whose padding is on the
            right, that is ``q_offset=`` the lengths before it.
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
            As `attention`, and if a window's tokens that a query needs have been forgotten.
        """
        for name in ("mask", "bias", "kv_lengths", "k_scale", "v_scale"):
            if options.get(name) is not None:
                refuse_kind(name, "an array", "none: the cache knows its keys")
        options = {"is_causal": True} | options
        queries = as_array("q", q)
        layout = options.get("layout", "bhld")
        check_layout(layout)
        if queries.ndim != 4 or queries.shape[0] != self._batch:
            axes = "heads, length" if layout == "bhld" else "length, heads"
            refuse("q", f"shape {queries.shape}", f"({self._batch}, {axes}, {self.k.shape[3]})")
        rows = queries.shape[2 if layout == "bhld" else 1]
        offset = ints_per_batch(
            "q_offset", options.get("q_offset"), (self._batch,), -MAX_POSITION, MAX_POSITION
        )
        first = self._lengths - rows if offset is None else offset
        if self._window is None:
            everything = slice(None, int(self._used().max(initial=0)))
            return self._attend_to(queries, everything, np.int64(0), first, options)
        if options.get("window") is not None:
            refuse("window", repr(options["window"]), "none: the cache has one")
        if rows > 0:
            self._check_window("q", f"{rows} queries from position {{}} on", first)
        recent = slice(self._keep_first, int(self._used().max(initial=0)))
        windowed = options | {"window": (self._window - 1, None)}
        if self._keep_first == 0:
            return self._attend_to(queries, recent, self._begins, first, windowed)
        # Two sets of keys with positions of their own; the sinks belong to one of them.
        return_lse = flag("return_lse", options.get("return_lse", False))
        with_lse = {"return_lse": True, "out": None}
        out = options.get("out")
        if out is not None:
            value_dim = self._arrays[1].shape[3]
            check_out(out, (*queries.shape[:3], value_dim), queries.dtype)
            stored = dict(zip(("k", "v"), self._arrays, strict=False))
            check_overlap(out, {"q": queries} | stored)
        old = self._attend_to(
            queries, slice(0, self._keep_first), np.int64(0), first,
            options | with_lse | {"sinks": None},
        )  # fmt: skip
        new = self._attend_to(queries, recent, self._begins, first, windowed | with_lse)
        merged, lse = merge_states(*old, *new, out=out)
        return (merged, lse) if return_lse else merged

    def truncate(self, n: int) -> None:
        """Forget all but the first `n` tokens of every sequence, as if they had not come yet.

        Raises
        ------
        TypeError, ValueError
            If `n` is no int, negative, or so small that a window's tokens would be missing.
        """
        n = at_least("n", n, 0)
        lengths = np.minimum(self._lengths, n)
        if self._window is not None:
            shorter = lengths < self._lengths
            # The last of them has to see its window still.
            kept = lengths > self._keep_first  # the first tokens see each other alone
            last = np.where(shorter & kept, lengths - 1, self._lengths)
            self._check_window("n", f"{n}, whose last token's position is {{}}", last)
        # Where none but first tokens are left, the others begin anew.
        begins = np.where(lengths <= self._keep_first, self._keep_first, self._begins)
        self.__dict__.update(_begins=begins, _lengths=lengths)

    def __repr__(self) -> str:
        keys = self._arrays[0]
        batch, kv_heads, _, head_dim = keys.shape
        window = "" if self._window is None else f", window={self._window}"
        sizes = f"{batch}, {kv_heads}, {head_dim}, dtype={keys.dtype.name}{window}"
        return f"KVCache({sizes}): lengths {self._lengths.tolist()}"

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
        chosen = snapshot("indices", indices)
        if chosen.ndim != 1 or (chosen.size and chosen.dtype.kind not in "iu"):
            seen = f"dtype {chosen.dtype}, shape {chosen.shape}"
            refuse_kind("indices", seen, "a list of ints")
        outside = (chosen < -self._batch) | (chosen >= self._batch)
        if outside.any():
            at = int(np.argmax(outside))
            refuse("indices", f"{chosen[at]} at {at}", f"numbers of {self._batch} sequences")
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

    __copy__ = copy

    # ---- inside -------------------------------------------------------------------------------

    def _view(self, number: int) -> Array:
        view = self._arrays[number][:, :, : self._used().max(initial=0)]
        view.flags.writeable = False
        return view

    def _check_window(self, name: str, seen: str, positions: NDArray[np.int64]) -> None:
        """Refuse queries from `positions` on that need tokens which have been forgotten."""
        assert self._window is not None
        oldest = np.maximum(positions - (self._window - 1), self._keep_first)
        forgotten = oldest < self._begins
        if forgotten.any():
            at = int(np.argmax(forgotten))
            needed = (
                f"tokens from {oldest[at]} on, but the cache has those from {self._begins[at]} on"
            )
            refuse(name, seen.format(positions[at]) + f", which see {needed}", "later positions")

    def _places(self, lengths: NDArray[np.int64], begins: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return how many places the tokens take: the first ones, then those from `begins` on."""
        kept = np.minimum(lengths, self._keep_first)
        places: NDArray[np.int64] = kept + np.maximum(lengths - begins, 0)
        return places

    def _used(self) -> NDArray[np.int64]:
        return self._places(self._lengths, self._begins)

    def _with_room_for(self, counts: NDArray[np.int64]) -> tuple[list[Array], NDArray[np.int64]]:
        """Return arrays with free places for so many tokens more, and what begins are then."""

        def needed(begins: NDArray[np.int64]) -> int:
            return int(self._places(self._lengths + counts, begins).max(initial=0))

        begins, capacity = self._begins, self._arrays[0].shape[2]
        if needed(begins) <= capacity:
            return self._arrays, begins
        grown = max(needed(begins), 2 * capacity, 16)
        if self._window is not None:
            # Twice the window, of which half is free after forgetting: a token moves once or twice.
            most = self._keep_first + 2 * self._window
            if needed(begins) > most:
                begins = np.maximum(begins, self._lengths - self._window)
            grown = max(needed(begins), min(grown, most))
        return [self._moved(x, grown, begins) for x in self._arrays], begins

    def _moved(self, x: Array, capacity: int, begins: NDArray[np.int64]) -> Array:
        """Return a larger copy of an array, in which what is kept begins at `begins`."""
        make = np.zeros if x.ndim == 3 else np.empty
        to = make((*x.shape[:2], capacity, *x.shape[3:]), x.dtype)
        keep, used = self._keep_first, self._used()
        for i, (shift, last) in enumerate(zip(begins - self._begins, used, strict=True)):
            to[i, :, : min(keep, last)] = x[i, :, : min(keep, last)]
            if keep + shift < last:
                to[i, :, keep : last - shift] = x[i, :, keep + shift : last]
        return to

    def _checked(self, name: str, x: ArrayLike) -> Array:
        array = as_array(name, x)
        stored = self._arrays[0 if name == "k" else 1]
        wanted = (
            self._batch,
            self._heads,
            array.shape[2] if array.ndim == 4 else 0,
            stored.shape[3],
        )
        if array.dtype != self._dtype:
            refuse_kind(name, f"dtype {array.dtype.name}", f"{self._dtype.name} as the cache")
        if array.shape != wanted:
            axes = f"({self._batch}, {self._heads}, tokens, {stored.shape[3]})"
            refuse(name, f"shape {array.shape}", axes)
        return array

    def _counts(self, lengths: ArrayLike | None, tokens: int) -> NDArray[np.int64]:
        if lengths is None:
            return np.full(self._batch, tokens, np.int64)
        counts = snapshot("lengths", lengths)
        if counts.dtype.kind not in "iu" and counts.size:
            refuse_kind("lengths", f"dtype {counts.dtype}", "ints")
        if counts.shape != (self._batch,):
            refuse("lengths", f"shape {counts.shape}", f"({self._batch},)")
        outside = (counts < 0) | (counts > tokens)
        if outside.any():
            at = int(np.argmax(outside))
            refuse("lengths", f"{counts[at]} at {at}", f"0 to {tokens}, the tokens given")
        return counts.astype(np.int64)

    def _attend_to(
        self,
        q: Array,
        places: slice,
        begins: NDArray[np.int64] | np.int64,
        first: NDArray[np.int64],
        options: dict[str, Any],
    ) -> Any:
        """Attend to the tokens in `places`, of which the first stands at position `begins`, with
        queries from position `first` on."""
        k, v = (x[:, :, places] for x in self._arrays[:2])
        scales = dict(zip(("k_scale", "v_scale"), self._arrays[2:], strict=False))
        scales = {name: x[:, :, places] for name, x in scales.items()}
        lengths = np.clip(self._lengths - begins, 0, k.shape[2])
        if options.get("layout") == "blhd":
            k, v = k.swapaxes(1, 2), v.swapaxes(1, 2)
            scales = {name: x.swapaxes(1, 2) for name, x in scales.items()}
        positions = {"kv_lengths": lengths, "q_offset": first - begins}
        return attention(q, k, v, **(options | scales | positions))
