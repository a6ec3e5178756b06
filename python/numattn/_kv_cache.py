"""`KVCache`: keys and values of the tokens so far, for generating text token by token."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal, Unpack, overload

from ._checks import check_out, check_overlap, refuse
from ._kv_arguments import UNLIMITED, check_apart, check_pairs, check_unknown
from ._kv_attend import Options, attend_to_tokens, place
from ._kv_pieces import append_in_pieces
from ._kv_store import KVStore
from ._public_methods import name_methods

if TYPE_CHECKING:
    from numpy.typing import ArrayLike, NDArray

    from ._block_mask import BlockMask
    from ._option_types import AppendAndAttendOptions, AttendOptions


@name_methods
class KVCache(KVStore):
    """The keys and values so far of a batch of growing sequences.

    Parameters
    ----------
    batch : int
        Number of sequences, which may have different lengths.
    kv_heads, head_dim : int
        Number of heads of keys and values, and of elements of a key.
    value_dim : int, optional
        Number of elements of a value. Default: `head_dim`.
    dtype : dtype, default float32
        Dtype of keys, values and queries: float16, bfloat16, float32 or float64.
    quantize : bool, default False
        Keep keys and values in 8 bits, with one scale per token and head (see `quantize_kv`).
    capacity : int, default 0
        Number of tokens to allocate memory for at first. The cache grows automatically.
    window : int, optional
        Number of tokens that each token attends to, including itself. The cache forgets tokens that
        no later query attends to, so memory stays constant.
    keep_first : int, default 0
        With `window`: number of first tokens that are never forgotten and always attended to.
    max_rollback : int, default 16
        With `window`: number of tokens that `truncate` can remove, counted from the largest length
        that a sequence has had. The cache takes memory for at most
        ``keep_first + 2 * (window + max_rollback)`` tokens. Without a window, `truncate` can remove
        all tokens.

    Attributes
    ----------
    lengths : ndarray of int64, shape (batch,)
        Number of tokens appended to each sequence so far, including forgotten ones.
    nbytes : int
        Bytes of memory that keys, values and scales take, including unused memory.
    k, v : ndarray, shape (batch, kv_heads, tokens, head_dim or value_dim)
        Read-only views of the tokens that are kept, starting with the `keep_first` ones. Elements
        beyond a shorter sequence are undefined.
    k_scale, v_scale : ndarray of float32, shape (batch, kv_heads, tokens), or None
        Scales of keys and values, if the cache keeps 8 bits.

    Raises
    ------
    TypeError, ValueError
        If an argument has the wrong type or size.

    See Also
    --------
    attention : the function that `attend` computes.
    attention_paged : attention to keys and values in pages, which sequences may share.
    quantize_kv : round keys and values to 8 bits.

    Notes
    -----
    Appending copies each token once, and on average about twice more when the memory grows or a
    window moves on. If an append fails or is interrupted, the cache is unchanged. Copies (`select`,
    `concatenate`, `copy`, the module `copy`, pickles) contain only the tokens that are kept, and
    almost no unused memory, which is zero.

    With `keep_first`, once a sequence is longer than these tokens and the window, the result is
    merged from two parts, and a float16 or bfloat16 result is rounded once more. First tokens that
    are kept next to a window are the attention sinks of Xiao et al., "Efficient Streaming Language
    Models with Attention Sinks", ICLR 2024. Here positions are those in the whole text.

    Examples
    --------
    >>> import numpy as np
    >>> import numattn as na
    >>> rng = np.random.default_rng(0)
    >>> q, k, v = rng.standard_normal((3, 1, 2, 10, 8), dtype=np.float32)  # 10 tokens, 2 heads
    >>> cache = na.KVCache(1, 2, 8)
    >>> cache.append(k[:, :, :6], v[:, :, :6])  # the prompt
    >>> steps = [cache.attend(q[:, :, :6])]
    >>> for i in range(6, 10):  # then one token at a time
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
        """Attend to the tokens in the cache.

        By default the last query is at the end of its sequence. The exception is a padded `append`,
        whose `lengths` gave some sequences fewer tokens than it had. If `attend` follows with as
        many queries as that append had tokens, including padding, they are the queries of these
        tokens: the position of the first one is the length before the append, and the result for
        padding is 0. This ends with `truncate`. `q_offset` and `q_lengths` override it.

        Parameters
        ----------
        q : array_like, shape (batch, Hq, Lq, head_dim)
            Queries, in the cache's dtype. Hq must be a multiple of the cache's `kv_heads`.
        mask : array_like of bool or BlockMask, optional
            True where a query attends to a token. Broadcasts to (batch, Hq, Lq, T), whatever the
            layout, where T is ``lengths.max()`` and column ``j`` is the token at position ``j`` of
            the text. Columns of tokens that a window has forgotten, or that are beyond a shorter
            sequence, are ignored.
        tail_mask : array_like of bool, optional
            A mask of only the last T tokens of each sequence, as in `attention`, for a tree of
            drafts that was appended last. Broadcasts to (batch, Hq, Lq, T), where T is the length
            of its last axis, at most ``lengths.max()``.
        bias : array_like of float, optional
            Added to the logits, as in `attention`. Broadcasts like `mask`.
        is_causal : bool, default True
            As in `attention`. It can be combined with masks.
        q_offset : int or array_like of int, shape (batch,), optional
            Position of the first query. All queries are then valid, unless `q_lengths` is given.
        window : tuple (left, right), optional
            As in `attention`. Not allowed if the cache has a window.
        q_lengths : int or array_like of int, shape (batch,), optional
            Number of valid queries. The last valid query is at the end of its sequence, unless
            `q_offset` is given.
        scale, softcap, alibi_slopes, sinks, layout, return_lse, out, num_threads
            As in `attention`.

        Returns
        -------
        out : ndarray, shape (batch, Hq, Lq, value_dim)
            In the layout and dtype of `q`.
        lse : ndarray, shape ``out.shape[:-1]``
            Only with ``return_lse=True``, as in `attention`.

        Raises
        ------
        TypeError, ValueError
            As in `attention`, and if a query needs tokens that the window has forgotten. Queries of
            the tokens appended last, and of the last ``max_rollback + 1`` tokens, never need them.

        See Also
        --------
        attention : describes each option.
        append_and_attend : append and attend in one call, for prompts of any length.

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

        The same prompts padded on the left, with a mask that excludes the padding:

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
        """Append tokens and attend with their queries, even if they exceed the window.

        This is the same as `append` followed by `attend`. If there are more tokens than the cache's
        window, they are appended and attend in pieces as large as the window, so that the cache
        still has the tokens that each query needs.

        Parameters
        ----------
        q : array_like, shape (batch, Hq, tokens, head_dim)
            The queries of the tokens, in the cache's dtype.
        k, v : array_like, shape (batch, kv_heads, tokens, head_dim or value_dim)
            Their keys and values.
        lengths : int or array_like of int, shape (batch,), optional
            Number of tokens that each sequence gets; the others are padding, whose result is 0.
            Default: all.
        mask, bias : array_like, optional
            As in `attend`, where T is ``lengths.max()`` after the call.
        tail_mask : array_like of bool, optional
            As in `attend`, for the last T tokens of each sequence after the call.
        is_causal : bool, default True
            As in `attention`. False is allowed only if the tokens fit into the window, because the
            cache forgets the first tokens before it appends the last ones.
        layout : {"bhld", "blhd"}, default "bhld"
            Layout of `q`, `k`, `v` and the result: "blhd" is (batch, tokens, heads, dim).
        window, scale, softcap, alibi_slopes, sinks, return_lse, out, num_threads
            As in `attend`.

        Returns
        -------
        out : ndarray, shape (batch, Hq, tokens, value_dim)
            In the layout and dtype of `q`.
        lse : ndarray, shape ``out.shape[:-1]``
            Only with ``return_lse=True``, as in `attention`.

        Raises
        ------
        TypeError, ValueError
            As in `append` and `attend`. The cache is then unchanged, as after any other exception.

        See Also
        --------
        append : only append tokens.
        attend : only attend.

        Notes
        -----
        Afterwards, queries and `truncate` work as if the pieces had been appended separately.
        Pieces that contain only padding are left out.

        Examples
        --------
        A prompt of 20 tokens for a cache that keeps a window of 6 tokens and the first one:

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
