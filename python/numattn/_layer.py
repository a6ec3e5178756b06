"""The attention block of a model: projections around `attention`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal, Unpack, overload

import numpy as np

from ._arguments import MAX_AXES, check_options, ints_per_batch, positional_options
from ._attention import attention
from ._checks import as_array, dtype_name, flag, refuse, refuse_kind, refuse_unknown
from ._context_cache import ContextCache
from ._gradients import attention_vjp
from ._kv_cache import KVCache
from ._layer_arguments import ELSEWHERE, NOT_DIFFERENTIATED, VJP_ELSEWHERE, Inputs, batch_shape
from ._layer_gradients import Call, LayerGradients, differentiate
from ._layer_parameters import LayerParameters
from ._norms import Norm
from ._projection import Product, compute, project
from ._rotary import make_rotation
from ._stages import attention_weights
from ._workspace import Workspace

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from numpy.typing import ArrayLike, NDArray

    from ._block_mask import BlockMask
    from ._option_types import LayerOptions
    from ._rotary import Rotation

    Array = NDArray[Any]


class MultiHeadAttention(LayerParameters):
    """Multi-head attention with its learned matrices, as a layer of NumPy arrays.

    ``layer(x)`` is self-attention, ``layer(x, context)`` cross-attention.

    Parameters
    ----------
    embed_dim : int
        Elements of an embedding, in and out.
    num_heads : int
        Query heads.
    kv_heads : int, optional
        Heads of keys and values, a divisor of `num_heads`. Default: `num_heads`.
    head_dim : int, optional
        Elements of a query and a key. Default: ``embed_dim / num_heads``.
    value_dim : int, optional
        Elements of a value. Default: `head_dim`.
    context_dim : int or (int, int), optional
        Elements of an embedding of the context; two numbers where keys and values come from
        different ones. Default: `embed_dim`.
    bias : bool, default True
        Add a learned vector after each matrix. (The `bias` of a call is no such vector: it is added
        to the logits.)
    rotary : bool or mapping, optional
        Rotate queries and keys by their positions; a mapping has options of `rotary_embedding`:
        base, rotary_dim, interleaved, scaling, frequencies. For self-attention only.
    qk_norm : bool, default False
        Divide each head's queries and keys by their root mean square, and multiply them by a
        learned vector.
    norm_epsilon : float, default 1e-6
        With `qk_norm`: what is added to the mean of the squares.
    dtype : dtype, default float32
        Of the parameters and of x: float16, bfloat16 (of ``ml_dtypes``), float32 or float64.
    rng : numpy.random.Generator or int, optional
        What random matrices are drawn with, from a normal distribution of variance 1 / (elements
        in); biases begin at 0.

    Attributes
    ----------
    embed_dim, num_heads, kv_heads, head_dim, value_dim : int
        The sizes, also where they were left out.
    context_dim : (int, int)
        Elements of an embedding that keys are made of, and of one for values.
    bias, qk_norm : bool
        Whether the layer has them.
    norm_epsilon : float
        What is added to the mean of the squares.
    rotary : dict or None
        All options of the rotary embedding, those that were left out included; a copy.
    dtype : dtype
        Of the parameters and of x.
    num_parameters : int
        Numbers in all parameters.

    Raises
    ------
    TypeError, ValueError
        If an argument is of the wrong kind, or dimensions do not divide.

    See Also
    --------
    attention : attention alone, with more options.
    KVCache : keys and values of the tokens so far; `new_cache` makes one that fits.
    ContextCache : keys and values of a context; `context_cache` makes it.
    rotary_embedding : what `rotary` does to queries and keys.
    parameter_count : how many numbers such layers hold.

    Notes
    -----
    The layer of Vaswani et al., "Attention Is All You Need", NeurIPS 2017. Kernels compute the
    products with the matrices, which are read where they are: what is written into a parameter
    counts from the next call on. With the compiled kernels a sequence has the same bits alone and
    in any batch, padded or not, and for any number of threads. `qk_norm` is the norm of Zhang and
    Sennrich, "Root Mean Square Layer Normalization", NeurIPS 2019. NaN and infinity go where
    arithmetic takes them, whatever ``np.seterr`` says.

    A thread keeps up to 64 MiB of memory for the next call's q, k and v and attention's result (in
    a `TransformerBlock` also for the feed-forward network's), until 16 uses in a row need a quarter
    of it or less.

    With 16-bit floats all sums are in float32. What a step gives is rounded once: the product with
    a matrix with its bias and rotation, `qk_norm` with its weight (and a rotation after it),
    attention. So are gradients: of an `x` that queries, keys and values are made of, their sum is.
    Parameters are the random numbers of a float32 layer, rounded.

    Examples
    --------
    >>> import numpy as np
    >>> import numattn as na
    >>> layer = na.MultiHeadAttention(64, 4, rng=0)
    >>> x = np.random.default_rng(0).standard_normal((2, 10, 64), dtype=np.float32)
    >>> layer(x, is_causal=True).shape
    (2, 10, 64)
    >>> out, weights = layer(x, lengths=[10, 7], return_weights=True)
    >>> weights.shape, layer.num_parameters
    ((2, 4, 10, 10), 16640)
    """

    @overload
    def __call__(
        self,
        x: ArrayLike,
        context: ArrayLike | tuple[ArrayLike, ArrayLike] | ContextCache | None = None,
        *,
        return_weights: Literal[False] = False,
        **options: Unpack[LayerOptions],
    ) -> Array: ...
    @overload
    def __call__(
        self,
        x: ArrayLike,
        context: ArrayLike | tuple[ArrayLike, ArrayLike] | ContextCache | None = None,
        *,
        return_weights: Literal[True],
        **options: Unpack[LayerOptions],
    ) -> tuple[Array, Array]: ...
    @overload
    def __call__(
        self,
        x: ArrayLike,
        context: ArrayLike | tuple[ArrayLike, ArrayLike] | ContextCache | None = None,
        *,
        return_weights: bool,
        **options: Unpack[LayerOptions],
    ) -> Array | tuple[Array, Array]: ...
    def __call__(
        self,
        x: ArrayLike,
        context: ArrayLike | tuple[ArrayLike, ArrayLike] | ContextCache | None = None,
        *,
        is_causal: bool | None = None,
        mask: ArrayLike | BlockMask | None = None,
        tail_mask: ArrayLike | None = None,
        bias: ArrayLike | None = None,
        lengths: int | ArrayLike | None = None,
        positions: ArrayLike | None = None,
        window: tuple[int | None, int | None] | None = None,
        scale: float | None = None,
        softcap: float | None = None,
        alibi_slopes: ArrayLike | None = None,
        sinks: ArrayLike | None = None,
        cache: KVCache | None = None,
        return_weights: bool = False,
        num_threads: int | None = None,
        **unknown: Any,
    ) -> Array | tuple[Array, Array]:
        """Attend.

        Parameters
        ----------
        x : array_like, shape (..., L, embed_dim)
            Embeddings, of the layer's dtype.
        context : array_like, shape (..., Lk, context_dim), two of them, or ContextCache, optional
            What keys and values are made of: cross-attention. Two are for keys and for values. A
            `ContextCache` has keys and values already. Default: `x`.
        is_causal : bool, optional
            Attend to no later token. Default: True with a cache, else False. False with a cache
            lets the tokens of `x` see each other in both directions, and all tokens before them.
        mask, tail_mask, bias, window, scale, softcap, alibi_slopes, sinks
            As of `attention`; mask and bias broadcast to (..., heads, L, Lk). With a cache, they
            are those of `KVCache.attend`: they broadcast to (batch, heads, L, T), where T counts
            the longest sequence's tokens after `x` has been appended. A tail mask is of the last T
            tokens, `x` included. `bias` is added to the logits, such as learned biases of relative
            positions; the layer's learned vectors are its constructor's `bias`.
        lengths : int or array_like of int, optional
            How many tokens are valid, for all or per batch item, the others being padding on the
            right: tokens of `x`, or of the context in cross-attention (a `ContextCache` has its
            own). Nobody attends to padding, and padding of `x` attends to nothing: its rows of
            `out` are the output bias. With a cache, only valid tokens are appended. Default: all.
        positions : array_like of int, shape (L,) or (..., L), optional
            Where the tokens of `x` are in the text, for a rotary layer: drafts of a tree, for
            example, of which several have the same place. Masks do not know of it. Default: one
            after the other, from 0 on or after the tokens of the cache.
        cache : KVCache, optional
            The keys and values of the tokens before; those of `x` are appended, also more of them
            than its window. x is (batch, L, embed_dim) then.
        return_weights : bool, default False
            Also return the weights (..., heads, L, Lk), which are then held in memory.
        num_threads : int, optional
            As of `attention`, for all of the call. (The NumPy backend leaves threads to NumPy.)

        Returns
        -------
        out : ndarray, shape (..., L, embed_dim)
        weights : ndarray, shape (..., heads, L, Lk)
            Only with ``return_weights=True``; float32 where the layer has 16 bits.

        Raises
        ------
        TypeError
            If an argument is of the wrong kind.
        ValueError
            If a shape or a value does not fit, or `lengths` of a context leave open where the
            tokens of `x` are, which `is_causal`, `window` and `alibi_slopes` need to know. A cache
            is then as it was.

        Examples
        --------
        Two sentences of 10 and 7 tokens, padded on the right to one batch:

        >>> import numpy as np
        >>> import numattn as na
        >>> layer = na.MultiHeadAttention(64, 4, rotary=True, rng=0)
        >>> x = np.random.default_rng(0).standard_normal((2, 10, 64), dtype=np.float32)
        >>> out = layer(x, is_causal=True, lengths=[10, 7])
        >>> bool(np.allclose(out[1, :7], layer(x[1, :7], is_causal=True), atol=1e-5))
        True

        The same, token after token:

        >>> cache = na.KVCache(2, 4, 16)
        >>> steps = [layer(x[:, i : i + 1], cache=cache) for i in range(10)]
        >>> bool(np.allclose(np.concatenate(steps, axis=1)[0], out[0], atol=1e-5))
        True
        """
        if unknown:
            refuse_unknown("MultiHeadAttention", unknown, ELSEWHERE)
        wants_weights = flag("return_weights", return_weights)
        options: dict[str, Any] = {
            "is_causal": is_causal, "mask": mask, "tail_mask": tail_mask, "bias": bias,
            "window": window, "scale": scale, "softcap": softcap, "alibi_slopes": alibi_slopes,
            "sinks": sinks, "num_threads": num_threads,
        }  # fmt: skip
        if cache is not None:
            if context is not None:
                refuse_kind("context", f"{type(context).__name__} with `cache=`", "one of them")
            if wants_weights:
                refuse("return_weights", "True with `cache=`", "one of them")
            return self._with_cache(x, lengths, positions, options, cache)
        with Workspace() as workspace:
            if isinstance(context, ContextCache):
                x, options = self._with_context_cache(x, lengths, positions, options, context)
                (q,) = self._projected({"q": x}, None, num_threads, workspace.empty)
                k, v = context._k, context._v
            else:
                inputs, options = self._checked_call(x, context, lengths, positions, options)
                q, k, v = self._projected(*inputs, num_threads, workspace.empty)
            batch = batch_shape(q.shape[:-3], k.shape[:-3], v.shape[:-3])
            of_heads = workspace.empty((*batch, *q.shape[-3:-1], self._value_dim), self._dtype)
            out = self._merged(attention(q, k, v, out=of_heads, **options), num_threads)
            if not wants_weights:
                return out
            # The batch may come from the values alone, which weights are not made of.
            q = np.broadcast_to(q, (*batch, *q.shape[-3:]))
            # With all axes: `attention` has warned if they may be meant otherwise.
            for name in ("mask", "tail_mask", "bias"):
                if options[name] is not None:
                    array = as_array(name, options[name])
                    options[name] = array[(np.newaxis,) * (q.ndim - array.ndim)]
            return out, attention_weights(q, k, **options)

    def new_cache(
        self,
        batch: int = 1,
        *,
        quantize: bool = False,
        capacity: int = 0,
        window: int | None = None,
        keep_first: int = 0,
        max_rollback: int = 16,
    ) -> KVCache:
        """Make a `KVCache` for calls of this layer: ``layer(x, cache=cache)``.

        Parameters
        ----------
        batch : int, default 1
            Number of sequences.
        quantize, capacity, window, keep_first, max_rollback
            As of `KVCache`, which gets the layer's sizes and dtype.

        Returns
        -------
        KVCache
            Without tokens.

        Raises
        ------
        TypeError, ValueError
            As `KVCache` does, and if the layer's `context_dim` is not its `embed_dim`.

        See Also
        --------
        context_cache : for cross-attention.

        Examples
        --------
        >>> import numpy as np
        >>> import numattn as na
        >>> layer = na.MultiHeadAttention(64, 4, kv_heads=2, rotary=True, rng=0)
        >>> cache = layer.new_cache(window=32)
        >>> layer(np.zeros((1, 10, 64), np.float32), cache=cache).shape, cache.lengths
        ((1, 10, 64), array([10]))
        """
        self._refuse_context_dim()
        return KVCache(
            batch, self._kv_heads, self._head_dim, self._value_dim, dtype=self._dtype,
            quantize=quantize, capacity=capacity, window=window, keep_first=keep_first,
            max_rollback=max_rollback,
        )  # fmt: skip

    def context_cache(
        self,
        context: ArrayLike | tuple[ArrayLike, ArrayLike],
        lengths: int | ArrayLike | None = None,
    ) -> ContextCache:
        """Make keys and values of a context once, for many calls: ``layer(x, cache)``.

        A decoder attends to the same encoded text in each step. Without a cache, each step
        multiplies all of that text with two matrices.

        Parameters
        ----------
        context : array_like, shape (..., Lk, context_dim), or two of them
            As of a call.
        lengths : int or array_like of int, optional
            How many of its tokens are valid, for all or per batch item. Default: all.

        Returns
        -------
        ContextCache
            What calls take in place of the context, with the same results. It is of the parameters
            that the layer has now. `vjp` takes none, because a context has gradients.

        Raises
        ------
        TypeError, ValueError
            As of a call.

        See Also
        --------
        new_cache : for self-attention.

        Examples
        --------
        >>> import numpy as np
        >>> import numattn as na
        >>> rng = np.random.default_rng(0)
        >>> layer = na.MultiHeadAttention(64, 4, context_dim=32, rng=rng)
        >>> encoded = rng.standard_normal((2, 100, 32), dtype=np.float32)
        >>> cache = layer.context_cache(encoded, lengths=[100, 60])
        >>> x = rng.standard_normal((2, 1, 64), dtype=np.float32)  # one token of each text
        >>> bool(np.array_equal(layer(x, cache), layer(x, encoded, lengths=[100, 60])))
        True
        """
        keys, values = self._contexts(context)
        batch = batch_shape((), keys.shape[:-2], values.shape[:-2])
        valid = ints_per_batch("lengths", lengths, batch, 0, keys.shape[-2])
        k, v = self._projected({"k": keys, "v": values}, None, None)
        return ContextCache(k, v, valid)

    def vjp(
        self,
        x: ArrayLike,
        context: ArrayLike | tuple[ArrayLike, ArrayLike] | None = None,
        *,
        is_causal: bool = False,
        mask: ArrayLike | BlockMask | None = None,
        tail_mask: ArrayLike | None = None,
        bias: ArrayLike | None = None,
        lengths: int | ArrayLike | None = None,
        positions: ArrayLike | None = None,
        window: tuple[int | None, int | None] | None = None,
        scale: float | None = None,
        softcap: float | None = None,
        alibi_slopes: ArrayLike | None = None,
        sinks: ArrayLike | None = None,
        dropout: float = 0.0,
        rng: int | np.random.Generator | None = None,
        bias_gradient: bool = False,
        num_threads: int | None = None,
        **unknown: Any,
    ) -> tuple[Array, Callable[[ArrayLike], LayerGradients]]:
        """Attend, and return the function that gives gradients.

        Parameters
        ----------
        x, context, is_causal, mask, tail_mask, bias, lengths, positions, window, scale, softcap, \
alibi_slopes, sinks, num_threads
            As of a call. Of these options `bias` and `sinks` have gradients.
        dropout, rng
            As of `attention_vjp`: the share of the weights that is dropped, and a seed or a
            generator. A call has none, because it is for inference.
        bias_gradient : bool, default False
            Whether `vjp` also returns the gradient with respect to `bias`.

        Returns
        -------
        out : ndarray, shape (..., L, embed_dim)
            The result of the call, to the bit where nothing is dropped. (In 16 bits, sequences of
            at most 16 tokens may be rounded otherwise.)
        vjp : callable
            ``vjp(dout)`` takes a scalar's gradient with respect to `out`, of its shape and of the
            layer's dtype, and returns `LayerGradients`: those with respect to `x`, the context, all
            parameters and the sinks of the call, and with `bias_gradient` its bias. It may be
            called any number of times, also by several threads.

        Raises
        ------
        TypeError, ValueError
            As of a call and, from `vjp`, if `dout` is of the wrong kind or shape.

        See Also
        --------
        attention_vjp : attention alone.

        Notes
        -----
        `vjp` keeps q, k, v and the result of attention, which it needs, and of `x`, the context,
        masks, `bias` and parameters the arrays themselves. Whoever writes to one of these before
        `vjp` is called gets other gradients: take all gradients before the step that changes the
        parameters. Memory is linear in the lengths.

        Padding gets the gradient 0, and what it holds does not show in the others. In rows of `out`
        that are padding, `dout` counts for ``o_bias`` alone, because nothing else is in them.

        Examples
        --------
        Gradient descent: the layer learns to give the token before each one.

        >>> import numpy as np
        >>> import numattn as na
        >>> layer = na.MultiHeadAttention(16, 2, rotary=True, rng=0)
        >>> x = np.random.default_rng(0).standard_normal((8, 12, 16), dtype=np.float32)
        >>> target = np.roll(x, 1, axis=1)
        >>> losses = []
        >>> for _ in range(50):
        ...     out, vjp = layer.vjp(x)
        ...     losses.append(float(np.square(out - target).mean()))
        ...     gradients = vjp(2 * (out - target) / out.size)
        ...     for name, parameter in layer.parameters().items():
        ...         parameter -= 2 * gradients.parameters[name]
        >>> losses[-1] < losses[0] / 2
        True
        """
        for name, refusal in NOT_DIFFERENTIATED.items():
            if name in unknown:
                seen, (expected, advice) = type(unknown[name]).__name__, refusal
                refuse_kind(name, seen, expected, advice)
        if unknown:
            refuse_unknown("MultiHeadAttention.vjp", unknown, VJP_ELSEWHERE)
        if isinstance(context, ContextCache):
            expected = "the context itself, which gets gradients"
            refuse_kind("context", "a ContextCache", expected)
        inputs, options = self._checked_call(
            x, context, lengths, positions,
            {
                "is_causal": is_causal, "mask": mask, "tail_mask": tail_mask, "bias": bias,
                "window": window, "scale": scale, "softcap": softcap, "alibi_slopes": alibi_slopes,
                "sinks": sinks, "num_threads": num_threads,
            },
        )  # fmt: skip
        of_heads, take_back = attention_vjp(
            *self._projected(*inputs, num_threads), **options, dropout=dropout, rng=rng,
            bias_gradient=bias_gradient,
        )  # fmt: skip
        call = Call(self._parameters, self._norm_epsilon, num_threads, inputs, of_heads, take_back)

        def vjp(dout: ArrayLike) -> LayerGradients:
            return differentiate(call, dout)

        return self._merged(of_heads, num_threads), vjp

    def _checked_call(
        self,
        x: ArrayLike,
        context: ArrayLike | tuple[ArrayLike, ArrayLike] | None,
        lengths: Any,
        positions: ArrayLike | None,
        options: Mapping[str, Any],
    ) -> tuple[Inputs, dict[str, Any]]:
        """Check a call without a cache; return what it projects, and options of `attention`."""
        x = self._checked("x", x, self._embed_dim)
        checked = self._checked_options(options, is_causal=False)
        if context is None:
            if self._context_dims != (self._embed_dim, self._embed_dim):
                expected = f"embeddings of {self._context_dims[0]} elements, the context_dim"
                refuse_kind("context", "None", expected)
            keys = values = x
        else:
            keys, values = self._contexts(context)
        batch = batch_shape(x.shape[:-2], keys.shape[:-2], values.shape[:-2])
        valid = ints_per_batch("lengths", lengths, batch, 0, keys.shape[-2])
        if context is None:
            # A token's position does not depend on how many are valid.
            checked |= {"q_lengths": valid, "q_offset": 0}
        elif valid is not None:
            _check_positions(x, checked)
        rotation = self._rotation(x, positions)
        inputs = Inputs({"q": x, "k": keys, "v": values}, rotation)
        return inputs, checked | {"kv_lengths": valid}

    def _with_context_cache(
        self,
        x: ArrayLike,
        lengths: Any,
        positions: Any,
        options: dict[str, Any],
        cache: ContextCache,
    ) -> tuple[Array, dict[str, Any]]:
        """Check a call with kept keys and values; return `x`, and options of `attention`."""
        x = self._checked("x", x, self._embed_dim)
        checked = self._checked_options(options, is_causal=False)
        self._refuse_rotary("a ContextCache")
        self._rotation(x, positions)  # which refuses positions
        if lengths is not None:
            advice = "pass them to `context_cache`"
            refuse_kind("lengths", "numbers with a ContextCache", "None", advice)
        k, v = cache._k, cache._v
        self._check_fits("context", k.dtype, (k.shape[-2], k.shape[-1], v.shape[-1]))
        batch_shape(x.shape[:-2], k.shape[:-3], v.shape[:-3])
        if cache._lengths is not None:
            _check_positions(x, checked)
        return x, checked | {"kv_lengths": cache._lengths}

    def _checked_options(self, options: Mapping[str, Any], is_causal: bool) -> dict[str, Any]:
        """Check options that calls with and without a cache share; `is_causal` is its default."""
        given = options["is_causal"]
        is_causal = is_causal if given is None else flag("is_causal", given)
        check_options(
            self._dtype, self._heads, self._head_dim, is_causal, options["window"],
            options["scale"], options["softcap"], options["alibi_slopes"], options["sinks"],
            options["num_threads"],
        )  # fmt: skip
        return {**options, "is_causal": is_causal, "layout": "blhd"}

    def _contexts(self, context: ArrayLike | tuple[ArrayLike, ArrayLike]) -> tuple[Array, Array]:
        """Return what keys and values are made of."""
        self._refuse_rotary("an array")
        pair = context if isinstance(context, tuple) else (context, context)
        if len(pair) != 2:
            expected = "one, or two for keys and values"
            refuse("context", f"{len(pair)} arrays", expected)
        dims = self._context_dims
        keys = self._checked("context", pair[0], dims[0])
        values = self._checked("context", pair[1], dims[1])
        if keys.shape[-2] != values.shape[-2]:
            shapes = f"keys {keys.shape} and values {values.shape}"
            refuse("context", shapes, "the same number of tokens in both")
        return keys, (values if isinstance(context, tuple) else keys)

    def _refuse_rotary(self, seen: str) -> None:
        if self._rotary is not None:
            advice = "rotary embedding needs positions within one text"
            refuse("context", f"{seen} for a rotary layer", "None", advice)

    def _refuse_context_dim(self) -> None:
        """Refuse a layer whose keys and values cannot be made of `x`."""
        if self._context_dims != (self._embed_dim, self._embed_dim):
            seen = f"{self._context_dims} with embed_dim {self._embed_dim}"
            advice = "`context_cache` keeps the keys and values of a context"
            refuse("context_dim", seen, "embed_dim for a layer with a KVCache", advice)

    def _check_fits(self, name: str, dtype: np.dtype[Any], sizes: tuple[int, int, int]) -> None:
        """Check that keys and values of a cache are such as the layer makes."""
        if dtype != self._dtype:
            expected = f"{self._dtype.name}, the dtype of the layer"
            refuse_kind(name, f"dtype {dtype.name}", expected)
        if sizes != (self._kv_heads, self._head_dim, self._value_dim):
            names = "kv_heads, head_dim and value_dim"
            expected = f"({self._kv_heads}, {self._head_dim}, {self._value_dim}), as in the layer"
            refuse(name, f"{names} {sizes}", expected)

    def _with_cache(
        self, x: ArrayLike, lengths: Any, positions: Any, options: dict[str, Any], cache: KVCache
    ) -> Array:
        x = self._checked("x", x, self._embed_dim)
        options = self._checked_options(options, is_causal=True)
        if not isinstance(cache, KVCache):
            refuse_kind("cache", type(cache).__name__, "a KVCache")
        self._refuse_context_dim()
        sizes = (cache.k.shape[1], cache.k.shape[3], cache.v.shape[3])
        self._check_fits("cache", cache._arguments.dtype, sizes)
        batch = len(cache.lengths)
        if x.ndim != 3 or x.shape[0] != batch:
            expected = f"({batch}, length, {self._embed_dim}) for a cache of {batch} sequences"
            refuse("x", f"shape {x.shape}", expected)
        valid = ints_per_batch("lengths", lengths, (batch,), 0, x.shape[1])
        if positions is None and self._rotary is not None:
            positions = cache.lengths[:, np.newaxis] + np.arange(x.shape[1])
        num_threads = options["num_threads"]
        of = dict.fromkeys("qkv", x)
        with Workspace() as workspace:
            rotation = self._rotation(x, positions)
            q, k, v = self._projected(of, rotation, num_threads, workspace.empty)
            attended = cache.append_and_attend(q, k, v, valid, **options)
        return self._merged(attended, num_threads)

    def _rotation(self, x: Array, positions: ArrayLike | None) -> Rotation | None:
        if self._rotary is None:
            if positions is not None:
                advice = "this layer has no rotary embedding"
                refuse_kind("positions", "an array", "None", advice)
            return None
        shape = (*x.shape[:-2], self._heads, x.shape[-2], self._head_dim)
        return make_rotation(shape, self._dtype, positions, **self._rotary)

    def _projected(
        self,
        of: Mapping[str, Array],
        rotation: Rotation | None,
        num_threads: int | None,
        empty: Callable[[tuple[int, ...], np.dtype[Any]], Array] = np.empty,
    ) -> list[Array]:
        """Return q, k or v, (..., length, heads, dim), of what each is made of.

        `empty` makes their arrays.
        """
        sizes = {
            "q": (self._heads, self._head_dim),
            "k": (self._kv_heads, self._head_dim),
            "v": (self._kv_heads, self._value_dim),
        }
        made = {name: empty((*x.shape[:-1], *sizes[name]), self._dtype) for name, x in of.items()}
        normed = [name for name in made if f"{name}_norm" in self._parameters]
        in_product = None
        if rotation is not None and not normed:
            in_product = rotation.of_rows(of["q"].shape[:-1])
        products = [
            self._product(name, x, made[name], None if name == "v" else in_product)
            for name, x in of.items()
        ]
        compute(products, num_threads)
        # NaN and infinity in the input are the user's business, as in `attention`.
        with np.errstate(all="ignore"):
            for name in normed:
                weight = self._parameters[f"{name}_norm"]
                norm = Norm(False, self._norm_epsilon, weight, num_threads=num_threads)
                norm.apply(made[name], made[name])
                if rotation is not None:
                    vectors = made[name].swapaxes(-3, -2)  # heads first
                    rotation.apply(vectors, vectors, num_threads)
        return list(made.values())

    def _merged(self, of_heads: Array, num_threads: int | None) -> Array:
        """Return (..., length, heads, dim) times the output matrix."""
        weight, bias = self._parameters["o_weight"], self._parameters.get("o_bias")
        rows = of_heads.reshape(-1, len(weight))
        out = project(rows, weight, bias, num_threads=num_threads)
        return out.reshape(*of_heads.shape[:-2], self._embed_dim)

    def _product(self, name: str, x: Array, out: Array, rotation: Rotation | None) -> Product:
        """Return the product of x (..., length, elements) that fills (..., length, heads, dim)."""
        weight = self._parameters[f"{name}_weight"]
        elements, columns = weight.shape
        return Product(
            x.reshape(-1, elements),
            weight,
            self._parameters.get(f"{name}_bias"),
            out.reshape(-1, columns),
            rotation,
            self._head_dim,
        )

    def _checked(self, name: str, x: ArrayLike, dim: int) -> Array:
        array = as_array(name, x)
        if array.dtype != self._dtype:
            refuse_kind(name, dtype_name(array), f"{self._dtype.name}, the dtype of the layer")
        if array.ndim < 2 or array.shape[-1] != dim:
            refuse(name, f"shape {array.shape}", f"(..., length, {dim})")
        if array.ndim >= MAX_AXES:
            refuse(name, f"{array.ndim} axes", f"at most {MAX_AXES - 1}")
        return array


def _check_positions(x: Array, options: Mapping[str, Any]) -> None:
    """Refuse options that need positions, which the lengths of a context leave open."""
    positional = positional_options(
        options["is_causal"], options["window"], options["alibi_slopes"]
    )
    if positional and x.shape[-2] > 1:
        given = " and ".join(positional)
        seen = (
            f"lengths of the context with {given} and {x.shape[-2]} tokens of x, which do not say "
            "at which positions the tokens are"
        )
        refuse("lengths", seen, f"`mask=` or `bias=` instead of {given}")
