"""Storage of the keys and values of growing sequences: append, truncate and copy."""

from __future__ import annotations

from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any, Literal, Self, TypeVar

import numpy as np

from ._checks import accepted_dtype, at_index, check_layout, kind_of, refuse, refuse_kind, snapshot
from ._kv_arguments import SHARED, UNLIMITED, CacheArguments
from ._kv_tokens import SPARE_PLACES, Tokens
from ._quantize import quantize_named

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from numpy.typing import ArrayLike, DTypeLike, NDArray

    Array = NDArray[Any]

# The version of the pickled state.
_STATE_VERSION = 1

_Store = TypeVar("_Store", bound="KVStore")


class KVStore:
    """The storage of a `KVCache`, which adds attention."""

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
        max_rollback: int = 16,
    ) -> None:
        self._arguments = CacheArguments(
            batch, kv_heads, head_dim, head_dim if value_dim is None else value_dim,
            accepted_dtype(dtype), quantize, capacity, window, keep_first, max_rollback,
        )  # fmt: skip
        try:
            arrays = [np.zeros(*each) for each in self._arguments.arrays(self._arguments.capacity)]
        except ValueError as error:  # the product of the sizes exceeds 64 bits
            raise MemoryError(str(error)) from None
        self._tokens = self._make_tokens(arrays)

    @property
    def lengths(self) -> NDArray[np.int64]:
        """Number of tokens appended to each sequence so far, including forgotten ones."""
        return np.array(self._tokens.lengths, np.int64)

    @property
    def nbytes(self) -> int:
        """Bytes of memory that keys, values and scales take, including unused memory."""
        return sum(x.nbytes for x in self._tokens.arrays)

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
        return self._view(2) if self._arguments.quantize else None

    @property
    def v_scale(self) -> Array | None:
        """The scales of 8-bit values, (batch, kv_heads, tokens)."""
        return self._view(3) if self._arguments.quantize else None

    def append(
        self,
        k: ArrayLike,
        v: ArrayLike,
        lengths: int | ArrayLike | None = None,
        *,
        layout: Literal["bhld", "blhd"] = "bhld",
    ) -> None:
        """Append tokens to every sequence.

        Parameters
        ----------
        k, v : array_like, shape (batch, kv_heads, tokens, head_dim or value_dim)
            Keys and values in the cache's dtype. In the layout "blhd", (batch, tokens, kv_heads,
            head_dim or value_dim).
        lengths : int or array_like of int, shape (batch,), optional
            Number of tokens that each sequence gets; the others are padding, with arbitrary values.
            Default: all.
        layout : {"bhld", "blhd"}, default "bhld"
            Layout of `k` and `v`.

        Raises
        ------
        TypeError, ValueError
            If something does not fit, or if there are more tokens than the window: the cache would
            forget the first ones before a query could attend to them. The cache is then unchanged.

        See Also
        --------
        attend : attend to the tokens in the cache.
        append_and_attend : append and attend in one call, also for texts longer than the window.
        truncate : remove tokens from the end.

        Examples
        --------
        Five tokens for the first sequence, and three for the second:

        >>> import numpy as np
        >>> import numattn as na
        >>> k, v = np.random.default_rng(0).standard_normal((2, 2, 4, 5, 8), dtype=np.float32)
        >>> cache = na.KVCache(2, 4, 8)
        >>> cache.append(k, v, lengths=[5, 3])
        >>> cache
        KVCache(2, 4, 8, dtype=float32): lengths [5, 3]
        """
        most = self._tokens.window
        check_layout(layout)
        new, counts = self._arguments.check_tokens(k, v, lengths, layout, most)
        self._tokens = self._tokens.appended(self._stored(new, counts), counts)

    def truncate(self, n: int | ArrayLike) -> None:
        """Remove tokens from the end of every sequence, as if they had not been appended.

        Parameters
        ----------
        n : int or array_like of int, shape (batch,)
            Number of tokens to keep, for all or per sequence. Shorter sequences are unchanged.

        Raises
        ------
        TypeError, ValueError
            If `n` is not such a number, or if a cache with a window would have to remove more than
            `max_rollback` tokens, counted from the largest length that the sequence has had. A
            sequence can always start again, with 0 to `keep_first` tokens.

        See Also
        --------
        reset : remove all tokens.

        Examples
        --------
        Speculative decoding appends four drafts and keeps those that it accepts:

        >>> import numpy as np
        >>> import numattn as na
        >>> k, v = np.random.default_rng(0).standard_normal((2, 2, 4, 9, 8), dtype=np.float32)
        >>> cache = na.KVCache(2, 4, 8, window=6, max_rollback=4)
        >>> for i in range(5):
        ...     cache.append(k[:, :, i : i + 1], v[:, :, i : i + 1])
        >>> cache.append(k[:, :, 5:], v[:, :, 5:])
        >>> cache.truncate([6, 8])
        >>> cache.lengths
        array([6, 8])
        """
        self._tokens = self._tokens.truncated(self._arguments.check_numbers("n", n, 2**63 - 1))

    def reset(self) -> None:
        """Remove all tokens, but keep the memory.

        See Also
        --------
        truncate : remove tokens from the end of each sequence.

        Examples
        --------
        >>> import numpy as np
        >>> import numattn as na
        >>> cache = na.KVCache(1, 4, 8)
        >>> cache.append(*np.ones((2, 1, 4, 5, 8), np.float32))
        >>> cache.reset()
        >>> cache.lengths
        array([0])
        """
        self._tokens = self._make_tokens(self._tokens.arrays)

    def select(self, indices: ArrayLike) -> Self:
        """Return a new cache with copies of some sequences, as needed for beam search.

        Parameters
        ----------
        indices : array_like of int, shape (n,)
            Indices of the sequences, in any order. They may repeat.

        Returns
        -------
        cache : KVCache
            A cache of the same class. Attributes that a subclass adds are not copied: both caches
            refer to the same objects.

        Raises
        ------
        TypeError, ValueError
            If `indices` is not a list of ints, or if one of them is out of range.

        See Also
        --------
        concatenate : join the sequences of several caches.
        copy : copy all sequences.

        Examples
        --------
        Two beams go on from the second sequence, and one from the first:

        >>> import numpy as np
        >>> import numattn as na
        >>> cache = na.KVCache(2, 4, 8)
        >>> cache.append(*np.ones((2, 2, 4, 5, 8), np.float32), lengths=[5, 3])
        >>> cache.select([1, 1, 0]).lengths
        array([3, 3, 5])
        """
        chosen = snapshot("indices", indices)
        if chosen.ndim != 1 or (chosen.size and chosen.dtype.kind not in "iu"):
            seen = f"an array of dtype {chosen.dtype} and shape {chosen.shape}"
            refuse_kind("indices", seen, "a list of ints")
        batch = self._arguments.batch
        outside = (chosen < -batch) | (chosen >= batch)
        if outside.any():
            at = int(np.argmax(outside))
            expected = f"{-batch} to {batch - 1}, the indices of the sequences"
            refuse("indices", f"{chosen[at]}{at_index(at)}", expected)
        sequences = [int(i) % batch for i in chosen]
        return _with_tokens(self, self._tokens.selected(sequences, SPARE_PLACES))

    @staticmethod
    def concatenate(caches: Iterable[_Store]) -> _Store:
        """Return a new cache with copies of the sequences of several caches, in order.

        A server can use it for continuous batching: remove sequences that have ended with `select`,
        and add sequences whose prompts have been processed with `concatenate`.

        Parameters
        ----------
        caches : iterable of KVCache
            At least one cache. They must have been made with the same arguments, except for `batch`
            and `capacity`.

        Returns
        -------
        cache : KVCache
            A cache of the first one's class. Attributes that a subclass adds refer to the objects
            of the first cache.

        Raises
        ------
        TypeError
            If `caches` contains something else.
        ValueError
            If there are no caches, or if one differs from the first. The error says how.

        See Also
        --------
        select : copy some sequences of one cache.

        Notes
        -----
        Each sequence keeps its length, and `truncate` can remove as many of its tokens as before.
        After a padded `append`, the positions of the next queries are kept (see `attend`) if a
        single `append` could have brought all sequences their last tokens. Otherwise the last query
        is at the end of its sequence.

        Every token that is kept is copied once, so it is cheaper to add several sequences at once.

        Examples
        --------
        One of two sequences has ended, and a prompt of four tokens takes its place:

        >>> import numpy as np
        >>> import numattn as na
        >>> q, k, v = np.random.default_rng(0).standard_normal((3, 3, 4, 6, 8), dtype=np.float32)
        >>> running, new = na.KVCache(2, 4, 8), na.KVCache(1, 4, 8)
        >>> running.append(k[:2, :, :5], v[:2, :, :5], lengths=[5, 3])
        >>> new.append(k[2:, :, :4], v[2:, :, :4])
        >>> running = na.KVCache.concatenate([running.select([0]), new])
        >>> running.append(k[[0, 2], :, 5:], v[[0, 2], :, 5:])
        >>> running.lengths, running.attend(q[[0, 2], :, 5:]).shape
        (array([6, 5]), (2, 4, 1, 8))
        """
        parts = _checked_caches(caches)
        tokens = Tokens.joined([each._tokens for each in parts], SPARE_PLACES)
        return _with_tokens(parts[0], tokens)

    def copy(self) -> Self:
        """Return a new cache with copies of the same tokens.

        See Also
        --------
        select : copy some sequences.

        Examples
        --------
        Two continuations of one prompt:

        >>> import numpy as np
        >>> import numattn as na
        >>> cache = na.KVCache(1, 4, 8)
        >>> cache.append(*np.ones((2, 1, 4, 5, 8), np.float32))
        >>> other = cache.copy()
        >>> other.append(*np.ones((2, 1, 4, 1, 8), np.float32))
        >>> cache.lengths, other.lengths
        (array([5]), array([6]))
        """
        return self.select(np.arange(self._arguments.batch))

    def __copy__(self) -> Self:
        return self.copy()

    def __getstate__(self) -> dict[str, Any]:
        tokens = self._tokens.selected(list(range(self._arguments.batch)))
        others = _attributes(self)
        del others["_arguments"], others["_tokens"]
        return {
            "version": _STATE_VERSION,
            "arguments": asdict(replace(self._arguments, capacity=0)),
            "numbers": tokens.numbers(),
            "padded": tokens.padded,
            "arrays": tokens.arrays,
            "others": others,
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        version = state.get("version") if isinstance(state, dict) else None
        if version != _STATE_VERSION:
            refuse("state", f"version {version!r} of a KVCache", f"version {_STATE_VERSION}")
        try:
            KVStore.__init__(self, **state["arguments"])
            numbers = [
                self._arguments.check_numbers("state", each, UNLIMITED) for each in state["numbers"]
            ]
            # Arrays that were pickled out of band may be read-only.
            arrays = [np.require(x, requirements=["W"]) for x in state["arrays"]]
            tokens = self._make_tokens(arrays, numbers, state["padded"])
            others = dict(state["others"])
        except (KeyError, TypeError, ValueError) as error:
            expected = "the state of a pickled KVCache"
            refuse("state", f"something else ({error!r})", expected)
        seen, wanted = [(x.shape, x.dtype) for x in arrays], self._arguments.arrays(tokens.used)
        if seen != wanted:
            refuse("state", f"arrays of {seen}", f"arrays of {wanted}")
        if not all(np.isfinite(scales).all() for scales in arrays[2:]):
            refuse("state", "a scale that is not finite", "finite numbers")
        self._tokens = tokens
        _set_attributes(self, others)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self._arguments}): lengths {self._tokens.lengths}"

    # ---- inside -------------------------------------------------------------------------------

    @property
    def _window(self) -> int | None:
        return self._arguments.window

    def _make_tokens(
        self,
        arrays: Iterable[Array],
        numbers: Sequence[list[int]] | None = None,
        padded: int | None = None,
    ) -> Tokens:
        """Make tokens from arrays; without `numbers` there are no tokens yet."""
        kind = self._arguments
        lengths, before, shortest = numbers or [[0] * kind.batch] * 3
        limits = UNLIMITED, 0, UNLIMITED
        if kind.window is not None:
            limits = kind.window, kind.keep_first, kind.max_rollback
        return Tokens(tuple(arrays), *limits, lengths, before, shortest, padded)

    def _stored(self, new: list[Array], counts: list[int] | None) -> list[Array]:
        """Return keys and values as they are stored: unchanged, or in 8 bits with their scales."""
        if not self._arguments.quantize:
            return new
        if counts is not None:  # padding may be anything
            is_new = np.arange(new[0].shape[2]) < np.array(counts)[:, np.newaxis]
            new = [np.where(is_new[:, np.newaxis, :, np.newaxis], x, x.dtype.type(0)) for x in new]
        pairs = [quantize_named(name, x) for name, x in zip("kv", new, strict=True)]
        return [numbers for numbers, _ in pairs] + [scale for _, scale in pairs]

    def _view(self, number: int) -> Array:
        tokens = self._tokens
        view = tokens.arrays[number][:, :, : tokens.used]
        view.flags.writeable = False
        return view


def _checked_caches(caches: Iterable[_Store]) -> list[_Store]:
    """Return a list of caches, after checking that they can be concatenated."""
    try:
        found = list(caches)
    except TypeError:
        refuse_kind("caches", kind_of(caches), "a list of KVCache")
    if not found:
        refuse("caches", "an empty list", "at least one KVCache")
    for i, each in enumerate(found):
        if not isinstance(each, KVStore):
            refuse_kind("caches", f"{kind_of(each)}{at_index(i)}", "a KVCache")
        for name in SHARED:
            value, wanted = (getattr(x._arguments, name) for x in (each, found[0]))
            if value != wanted:
                refuse("caches", f"{name}={value}{at_index(i)}", f"{wanted}, as in the first")
    return found


def _with_tokens(cache: _Store, tokens: Tokens) -> _Store:
    """Return a cache like this one, including added attributes, with other tokens."""
    other = object.__new__(type(cache))
    _set_attributes(other, _attributes(cache))
    other._arguments = replace(cache._arguments, batch=len(tokens.lengths), capacity=0)
    other._tokens = tokens
    return other


def _attributes(cache: KVStore) -> dict[str, Any]:
    """Return all attributes, including those that a subclass has in slots."""
    state = object.__getstate__(cache)
    parts = state if isinstance(state, tuple) else (state,)
    return {name: value for part in parts if part for name, value in part.items()}


def _set_attributes(cache: KVStore, attributes: dict[str, Any]) -> None:
    for name, value in attributes.items():
        object.__setattr__(cache, name, value)
