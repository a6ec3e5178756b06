"""Keys and values of the tokens so far, for generating text one token after the other."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal, Unpack, overload

from ._checks import check_out, check_overlap, refuse
from ._kv_arguments import UNLIMITED, check_apart, check_pairs, check_unknown
from ._kv_attend import Options, attend_to_tokens, place
from ._kv_pieces import append_in_pieces
from ._kv_store import KVStore

if TYPE_CHECKING:
    from numpy.typing import ArrayLike, NDArray

    from ._block_mask import BlockMask
    from ._option_types import AppendAndAttendOptions, AttendOptions


class KVCache(KVStore):
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
        Each token sees so many tokens, itself included. What no query can need any more is
        forgotten: memory stays constant.
    keep_first : int, default 0
        With `window`: the first tokens, which are never forgotten and always seen.
    max_rollback : int, default 16
        With `window`: how many tokens `truncate` can take back, counted from the largest length
        that a sequence has had. Room for `keep_first` and twice ``window + max_rollback`` tokens is
        all that the cache takes. Without a window all tokens can be taken back.

    Attributes
    ----------
    lengths : ndarray of int64, shape (batch,)
        Tokens appended to each sequence so far, forgotten ones included.
    nbytes : int
        Bytes of memory that keys, values and scales take, free places included.
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
    attention : what `attend` computes.
    attention_paged : keys and values in pages, which sequences may share.
    quantize_kv : how numbers become 8 bits.

    Notes
    -----
    Appending copies each token once, and on average about twice more when the memory grows or a
    window moves on. A failed or interrupted append leaves the cache as it was. Copies (`select`,
    `concatenate`, `copy`, the module `copy`, pickles) hold the tokens that are kept and zeros:
    nothing that was forgotten, and no free places to speak of.

    With `keep_first`, once a sequence is longer than those and the window, results are merged from
    two parts, and float16 and bfloat16 ones rounded once more. The first tokens beside a window are
    the attention sinks of Xiao et al., "Efficient Streaming Language Models with Attention Sinks",
    ICLR 2024; positions here are those of the whole text.

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

    @overload
    def attend(
        self,
        q: ArrayLike,
        *,
        return_lse: Literal[False] = False,
        **options: Unpack[AttendOptions],
    ) -> NDArray[Any]: ...
    @overload
    def attend(
        self,
        q: ArrayLike,
        *,
        return_lse: Literal[True],
        **options: Unpack[AttendOptions],
    ) -> tuple[NDArray[Any], NDArray[Any]]: ...
    @overload
    def attend(
        self,
        q: ArrayLike,
        *,
        return_lse: bool,
        **options: Unpack[AttendOptions],
    ) -> NDArray[Any] | tuple[NDArray[Any], NDArray[Any]]: ...
    def attend(
        self,
        q: ArrayLike,
        *,
        mask: ArrayLike | BlockMask | None = None,
        tail_mask: ArrayLike | None = None,
        bias: ArrayLike | None = None,
        is_causal: bool = True,
        q_offset: int | ArrayLike | None = None,
        window: tuple[int | None, int | None] | None = None,
        scale: float | None = None,
        softcap: float | None = None,
        alibi_slopes: ArrayLike | None = None,
        sinks: ArrayLike | None = None,
        q_lengths: int | ArrayLike | None = None,
        layout: Literal["bhld", "blhd"] = "bhld",
        return_lse: bool = False,
        out: NDArray[Any] | None = None,
        num_threads: int | None = None,
        **unknown: Any,
    ) -> NDArray[Any] | tuple[NDArray[Any], NDArray[Any]]:
        """Attend to what the cache holds.

        Where the queries are, if neither `q_offset` nor `q_lengths` says it: after an `append` with
        `lengths` that gave some sequence fewer tokens than others could get, as many queries as it
        had tokens, padding included, are those of these tokens. The first query's position is the
        length before, and queries of padding get zeros. In all other cases, also after `truncate`,
        the last query is at the end of its sequence.

        Parameters
        ----------
        q : array_like, shape (batch, Hq, Lq, head_dim)
            Queries, in the cache's dtype. Hq is a multiple of the cache's heads.
        mask : array_like of bool, optional
            True where a query attends to a token. Broadcasts to (batch, Hq, Lq, T), whatever the
            layout, where T is ``lengths.max()`` and column ``j`` is the token at position ``j`` of
            the text. Columns of tokens that a window has forgotten, or that are beyond a shorter
            sequence, count for nothing.
        tail_mask : array_like of bool, optional
            A mask of the last T tokens of each sequence alone, as of `attention`: a tree of drafts,
            appended last. Broadcasts to (batch, Hq, Lq, T); T is what its last axis says, at most
            ``lengths.max()``.
        bias : array_like of float, optional
            Added to the logits, as of `attention`. Broadcasts like `mask`.
        is_causal : bool, default True
            As of `attention`; holds together with masks.
        q_offset : int or array_like of int, shape (batch,), optional
            Position of the first query. All queries are valid then, unless `q_lengths` is given.
        window : tuple (left, right), optional
            As of `attention`. Not if the cache has a window.
        q_lengths : int or array_like of int, shape (batch,), optional
            Number of valid queries. The last valid one is at the end, unless `q_offset` is given.
        scale, softcap, alibi_slopes, sinks, layout, return_lse, out, num_threads
            As of `attention`.

        Returns
        -------
        out : ndarray, shape (batch, Hq, Lq, value_dim)
            And the lse with ``return_lse=True``, as `attention`.

        Raises
        ------
        TypeError, ValueError
            As `attention`, and if a query needs tokens that the window has forgotten. Those that
            were appended last can be asked, and the last ``max_rollback + 1``.

        See Also
        --------
        attention : what each option means.
        append_and_attend : both at once, for prompts of any length.

        Examples
        --------
        Prompts of 5 and 3 tokens, padded on the right to one batch, then a token for both:

        >>> import numpy as np
        >>> import numattn as na
        >>> q, k, v = np.random.default_rng(0).standard_normal((3, 2, 4, 6, 8), dtype=np.float32)
        >>> cache = na.KVCache(2, 4, 8)
        >>> cache.append(k[:, :, :5], v[:, :, :5], lengths=[5, 3])
        >>> prompts = cache.attend(q[:, :, :5])
        >>> bool(prompts[1, :, :3].any()), bool(prompts[1, :, 3:].any())
        (True, False)
        >>> cache.append(k[:, :, 5:], v[:, :, 5:])
        >>> cache.lengths, cache.attend(q[:, :, 5:]).shape
        (array([6, 4]), (2, 4, 1, 8))

        The same prompts padded on the left, where a mask says which tokens are padding:

        >>> left = na.KVCache(2, 4, 8)
        >>> for x in (k, v):
        ...     x[1, :, 2:5] = x[1, :, :3]
        >>> left.append(k, v)
        >>> is_token = np.arange(6) >= np.array([[0], [2]])  # (batch, T)
        >>> out = left.attend(q[:, :, 5:], mask=is_token[:, np.newaxis, np.newaxis])
        >>> bool(np.allclose(out, cache.attend(q[:, :, 5:]), atol=1e-6))
        True
        """
        if unknown:
            check_unknown("attend", unknown)
        if window is not None and self._window is not None:
            refuse("window", repr(window), "None", "the cache has its own window")
        tokens = self._tokens
        array = self._arguments.check_queries(q, layout)
        queries = place(tokens, array, layout, q_offset, q_lengths)
        if mask is not None or tail_mask is not None or bias is not None:
            mask, tail_mask, bias = check_pairs(
                mask, tail_mask, bias, array, layout, tokens.lengths
            )
        if out is not None:
            check_apart(out, tokens.arrays)
        options = Options(
            mask, tail_mask, bias, is_causal, window, scale, softcap, alibi_slopes, sinks, layout,
            return_lse, out, num_threads,
        )  # fmt: skip
        return attend_to_tokens(tokens, queries, options)  # type: ignore[no-any-return]

    @overload
    def append_and_attend(
        self,
        q: ArrayLike,
        k: ArrayLike,
        v: ArrayLike,
        lengths: int | ArrayLike | None = None,
        *,
        return_lse: Literal[False] = False,
        **options: Unpack[AppendAndAttendOptions],
    ) -> NDArray[Any]: ...
    @overload
    def append_and_attend(
        self,
        q: ArrayLike,
        k: ArrayLike,
        v: ArrayLike,
        lengths: int | ArrayLike | None = None,
        *,
        return_lse: Literal[True],
        **options: Unpack[AppendAndAttendOptions],
    ) -> tuple[NDArray[Any], NDArray[Any]]: ...
    @overload
    def append_and_attend(
        self,
        q: ArrayLike,
        k: ArrayLike,
        v: ArrayLike,
        lengths: int | ArrayLike | None = None,
        *,
        return_lse: bool,
        **options: Unpack[AppendAndAttendOptions],
    ) -> NDArray[Any] | tuple[NDArray[Any], NDArray[Any]]: ...
    def append_and_attend(
        self,
        q: ArrayLike,
        k: ArrayLike,
        v: ArrayLike,
        lengths: int | ArrayLike | None = None,
        *,
        mask: ArrayLike | BlockMask | None = None,
        tail_mask: ArrayLike | None = None,
        bias: ArrayLike | None = None,
        is_causal: bool = True,
        window: tuple[int | None, int | None] | None = None,
        scale: float | None = None,
        softcap: float | None = None,
        alibi_slopes: ArrayLike | None = None,
        sinks: ArrayLike | None = None,
        layout: Literal["bhld", "blhd"] = "bhld",
        return_lse: bool = False,
        out: NDArray[Any] | None = None,
        num_threads: int | None = None,
        **unknown: Any,
    ) -> NDArray[Any] | tuple[NDArray[Any], NDArray[Any]]:
        """Append tokens and attend with their queries, also more of them than the window.

        The same as `append` and then `attend`; more tokens than a cache's window are appended and
        attend in pieces of so many, one after the other, so that every query sees what it should.

        Parameters
        ----------
        q : array_like, shape (batch, Hq, tokens, head_dim)
            The queries of the tokens, in the cache's dtype.
        k, v : array_like, shape (batch, kv_heads, tokens, head_dim or value_dim)
            Their keys and values.
        lengths : int or array_like of int, shape (batch,), optional
            How many of the tokens each sequence gets; the others are padding, whose queries get
            zeros. Default: all.
        mask, bias : array_like, optional
            As of `attend`, with the T that ``lengths.max()`` is afterwards.
        tail_mask : array_like of bool, optional
            As of `attend`, of the last T tokens of each sequence afterwards.
        is_causal : bool, default True
            As of `attention`. False only for what fits into the window: of more, the first tokens
            are gone when the last ones come.
        layout : {"bhld", "blhd"}, default "bhld"
            Of `q`, `k`, `v` and the result: "blhd" is (batch, tokens, heads, dim).
        window, scale, softcap, alibi_slopes, sinks, return_lse, out, num_threads
            As of `attend`.

        Returns
        -------
        out : ndarray, shape (batch, Hq, tokens, value_dim)
            And the lse with ``return_lse=True``, as `attention`.

        Raises
        ------
        TypeError, ValueError
            As `append` and `attend`. The cache is then as it was, as after any other exception.

        See Also
        --------
        append, attend : one after the other.

        Notes
        -----
        What can be asked for and taken back afterwards is as if the pieces had been appended by
        themselves. Pieces of padding alone are left out.

        Examples
        --------
        A prompt of 20 tokens for a cache that keeps 6 of them, and the first one:

        >>> import numpy as np
        >>> import numattn as na
        >>> q, k, v = np.random.default_rng(0).standard_normal((3, 1, 4, 20, 8), dtype=np.float32)
        >>> cache = na.KVCache(1, 4, 8, window=6, keep_first=1, max_rollback=2)
        >>> out = cache.append_and_attend(q, k, v)
        >>> p, j = np.arange(20)[:, np.newaxis], np.arange(20)
        >>> mask = (j > p - 6) | (j < 1)
        >>> bool(np.allclose(out, na.attention(q, k, v, is_causal=True, mask=mask), atol=1e-6))
        True
        >>> cache.lengths, cache.k.shape[2] < 20
        (array([20]), True)
        """
        if unknown:
            check_unknown("append_and_attend", unknown)
        if window is not None and self._window is not None:
            refuse("window", repr(window), "None", "the cache has its own window")
        kind, tokens = self._arguments, self._tokens
        queries = kind.check_queries(q, layout)
        new, counts = kind.check_tokens(k, v, lengths, layout, UNLIMITED)
        given, rows = new[0].shape[2], queries.shape[2 if layout == "bhld" else 1]
        if rows != given:
            refuse("q", f"{rows} queries", f"{given}, one per token in k")
        if mask is not None or tail_mask is not None or bias is not None:
            added = [given] * len(tokens.lengths) if counts is None else counts
            after = [n + more for n, more in zip(tokens.lengths, added, strict=True)]
            mask, tail_mask, bias = check_pairs(mask, tail_mask, bias, queries, layout, after)
        if out is not None:
            check_out(out, (*queries.shape[:3], kind.value_dim), queries.dtype)
            check_apart(out, tokens.arrays)
            pairs = {"mask": mask, "tail_mask": tail_mask, "bias": bias}
            check_overlap(out, {"q": queries, "k": new[0], "v": new[1], **pairs})
        options = Options(
            mask, tail_mask, bias, is_causal, window, scale, softcap, alibi_slopes, sinks, layout,
            return_lse, out, num_threads,
        )  # fmt: skip
        new = self._stored(new, counts)
        self._tokens, result = append_in_pieces(tokens, queries, new, counts, options)
        return result  # type: ignore[no-any-return]
