"""`MultiHeadAttention`: a layer of projections around `attention`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal, Unpack, overload

import numpy as np

from ._arguments import MAX_AXES, check_options, ints_per_batch, positional_options
from ._attention import attention
from ._checks import (
    as_array,
    dtype_name,
    flag,
    is_accepted,
    kind_of,
    refuse,
    refuse_kind,
    refuse_unknown,
)
from ._context_cache import ContextCache
from ._gradients import attention_vjp
from ._kv_cache import KVCache
from ._layer_arguments import ELSEWHERE, NOT_DIFFERENTIATED, VJP_ELSEWHERE, Inputs, batch_shape
from ._layer_gradients import Call, LayerGradients, differentiate
from ._layer_parameters import LayerParameters
from ._norms import Norm
from ._projection import Product, compute, project
from ._public_methods import name_methods
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


@name_methods
class MultiHeadAttention(LayerParameters):
    """Multi-head attention with its learned matrices, as a layer for NumPy arrays.

    ``layer(x)`` is self-attention, and ``layer(x, context)`` is cross-attention.

    Parameters
    ----------
    embed_dim : int
        Number of elements of an embedding, in and out.
    num_heads : int
        Number of query heads.
    kv_heads : int, optional
        Number of heads of keys and values, a divisor of `num_heads`. Default: `num_heads`.
    head_dim : int, optional
        Number of elements of a query and a key. Default: ``embed_dim / num_heads``.
    value_dim : int, optional
        Number of elements of a value. Default: `head_dim`.
    context_dim : int or (int, int), optional
        Number of elements of an embedding of the context; a pair if keys and values are made from
        different embeddings. Default: `embed_dim`.
    bias : bool, default True
        Add a learned vector after each matrix. (The `bias` of a call is something else: it is added
        to the logits.)
    rotary : bool or mapping, optional
        Rotate queries and keys by their positions. A mapping holds options of `rotary_embedding`:
        base, rotary_dim, interleaved, scaling, frequencies. For self-attention only.
    qk_norm : bool, default False
        Divide each head's queries and keys by their root mean square, and multiply them by a
        learned vector.
    norm_epsilon : float, default 1e-6
        With `qk_norm`: number added to the mean of the squares.
    dtype : dtype, default float32
        Dtype of the parameters and of x: float16, bfloat16 (from ``ml_dtypes``), float32 or
        float64.
    rng : numpy.random.Generator or int, optional
        Generator or seed for the random matrices. Their elements are drawn from a normal
        distribution with variance 1 / (number of inputs). Biases start at 0.

    Attributes
    ----------
    embed_dim, num_heads, kv_heads, head_dim, value_dim : int
        The sizes, including default ones.
    context_dim : (int, int)
        Number of elements of the embeddings from which keys and values are made.
    bias, qk_norm : bool
        Whether the layer has them.
    norm_epsilon : float
        Number added to the mean of the squares.
    rotary : dict or None
        A copy of all options of the rotary embedding, including default ones.
    dtype : dtype
        Dtype of the parameters and of x.
    num_parameters : int
        Number of elements in all parameters.

    Raises
    ------
    TypeError, ValueError
        If an argument has the wrong type, or one dimension does not divide another.

    See Also
    --------
    attention : attention for arrays of queries, keys and values, with more options.
    KVCache : keys and values of the tokens so far; `new_cache` makes one for the layer.
    ContextCache : keys and values of a context; `context_cache` makes one for the layer.
    rotary_embedding : rotate queries or keys, as `rotary` does.
    parameter_count : count the parameters of such layers.

    Notes
    -----
    This is the layer of Vaswani et al., "Attention Is All You Need", NeurIPS 2017. `qk_norm` is the
    norm of Zhang and Sennrich, "Root Mean Square Layer Normalization", NeurIPS 2019.

    Kernels compute the products with the matrices and read the matrices in place: if you write to a
    parameter, the next call uses the new values. With the compiled kernels a sequence has the same
    bits in a batch of one and in any other batch, padded or not, and for any number of threads. NaN
    and infinity propagate as in arithmetic, whatever ``np.seterr`` says.

    A thread keeps up to 64 MiB of memory for q, k, v and the result of attention in the next call
    (in a `TransformerBlock` also for the arrays of the feed-forward network). It releases the
    memory once 16 uses in a row need a quarter of it or less.

    With 16-bit floats all sums are in float32. The result of each step is rounded once: the product
    with a matrix, including its bias and rotation; `qk_norm` with its weight, and a rotation after
    it; and attention. Gradients are rounded once too. If queries, keys and values are made from the
    same `x`, its gradient is one sum, rounded once. Parameters are the random numbers of a float32
    layer, rounded.

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
        """Apply the layer to embeddings.

        Parameters
        ----------
        x : array_like, shape (..., L, embed_dim)
            Embeddings, in the layer's dtype.
        context : array_like, shape (..., Lk, context_dim), two of them, or ContextCache, optional
            Embeddings from which keys and values are made, for cross-attention. A pair is for keys
            and values. A `ContextCache` already holds keys and values. Default: `x`.
        is_causal : bool, optional
            Do not attend to later tokens. Default: True with a cache, else False. With a cache,
            False lets the tokens of `x` attend to each other in both directions, and to all tokens
            before them.
        mask, tail_mask, bias, window, scale, softcap, alibi_slopes, sinks
            As in `attention`; mask and bias broadcast to (..., heads, L, Lk). With a cache, as in
            `KVCache.attend`: mask and bias broadcast to (batch, heads, L, T), where T is the length
            of the longest sequence after `x` has been appended. A tail mask is for the last T
            tokens, including `x`. `bias` is added to the logits, for example learned biases of
            relative positions; it is not the `bias` of the constructor.
        lengths : int or array_like of int, optional
            Number of valid tokens, for all or per batch item; the others are padding on the right.
            It counts tokens of `x` or, in cross-attention, of the context (a `ContextCache` has its
            own lengths). Padding is not attended to. Padding in `x` attends to nothing, so its rows
            of `out` are the output bias. With a cache, only valid tokens are appended. Default:
            all.
        positions : array_like of int, shape (L,) or (..., L), optional
            Positions of the tokens of `x` in the text, for a rotary layer. For example, several
            drafts in a tree have the same position. Masks do not depend on it. Default:
            consecutive positions, from 0 on or after the tokens in the cache.
        cache : KVCache, optional
            Keys and values of the tokens before. The call appends the tokens of `x`, even if they
            exceed its window. The shape of `x` must be (batch, L, embed_dim).
        return_weights : bool, default False
            Also return the weights (..., heads, L, Lk), which are then held in memory.
        num_threads : int, optional
            As in `attention`, for the whole call. (The NumPy backend leaves threads to NumPy.)

        Returns
        -------
        out : ndarray, shape (..., L, embed_dim)
            In the dtype of the layer.
        weights : ndarray, shape (..., heads, L, Lk)
            Only with ``return_weights=True``. In the dtype of the layer, or float32 for 16-bit
            layers.

        Raises
        ------
        TypeError
            If an argument has the wrong type.
        ValueError
            If a shape or a value does not fit, or if `lengths` of a context are combined with
            `is_causal`, `window` or `alibi_slopes`, which depend on the positions of the tokens of
            `x` in the context. A cache is then unchanged.

        See Also
        --------
        vjp : the result and a function for the gradients, for training.
        new_cache : make a cache for generating text.
        context_cache : make keys and values of a context once, for many calls.

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

        The same, one token at a time:

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
                refuse_kind("context", f"{kind_of(context)} with `cache=`", "one of them")
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
            # The batch may come only from the values, which weights do not depend on.
            q = np.broadcast_to(q, (*batch, *q.shape[-3:]))
            # Add the missing axes: `attention` has warned if they may mean something else.
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
            As in `KVCache`. The cache gets the layer's sizes and dtype.

        Returns
        -------
        KVCache
            An empty cache.

        Raises
        ------
        TypeError, ValueError
            As in `KVCache`, and if the layer's `context_dim` is not its `embed_dim`.

        See Also
        --------
        context_cache : make a cache for cross-attention.

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
        """Compute keys and values of a context once, for many calls: ``layer(x, cache)``.

        A decoder attends to the same encoded text in each step. Without a cache, each step
        multiplies the whole text by two matrices.

        Parameters
        ----------
        context : array_like, shape (..., Lk, context_dim), or two of them
            As in a call of the layer.
        lengths : int or array_like of int, optional
            Number of valid tokens of the context, for all or per batch item. Default: all.

        Returns
        -------
        ContextCache
            Pass it to calls instead of the context, with the same results. It is computed with the
            current parameters of the layer. `vjp` does not take it, because a context has
            gradients.

        Raises
        ------
        TypeError, ValueError
            As in a call of the layer.

        See Also
        --------
        new_cache : make a cache for self-attention.

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
        """Apply the layer, and return its result and a function that computes gradients.

        Parameters
        ----------
        x, context, is_causal, mask, tail_mask, bias, lengths, positions, window, scale, softcap, \
alibi_slopes, sinks, num_threads
            As in a call of the layer. Of these options `bias` and `sinks` have gradients.
        dropout, rng
            As in `attention_vjp`: the fraction of the weights to drop, and a seed or a
            generator. Calls have no dropout, because they are for inference.
        bias_gradient : bool, default False
            Whether `vjp` also returns the gradient with respect to `bias`.

        Returns
        -------
        out : ndarray, shape (..., L, embed_dim)
            The result of the call. Without dropout it has the same bits, except that in 16 bits
            sequences of at most 16 tokens may be rounded differently.
        vjp : callable
            ``vjp(dout)`` takes the gradient of a scalar with respect to `out`, in its shape and in
            the layer's dtype. It returns `LayerGradients`: the gradients with respect to `x`, the
            context, all parameters, the sinks of the call and, with `bias_gradient`, its bias. It
            may be called any number of times, also by several threads.

        Raises
        ------
        TypeError, ValueError
            As in a call of the layer. `vjp` raises them if `dout` has the wrong type, dtype or
            shape.

        See Also
        --------
        attention_vjp : the same for attention without projections.

        Notes
        -----
        `vjp` keeps q, k, v and the result of attention. It does not copy `x`, the context, masks,
        `bias` and parameters, and writing to them changes the gradients: take all gradients before
        the step that changes the parameters. Memory is linear in the lengths.

        The gradient of padding is 0, and the values of padding do not affect the other gradients.
        In rows of `out` that are padding, `dout` affects only ``o_bias``, because these rows
        contain nothing else.

        Examples
        --------
        Gradient descent: the layer learns to return the token before each token.

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
        """Check a call without a cache; return the inputs of its projections, and options of
        `attention`."""
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
        """Check a call with a `ContextCache`; return `x`, and options of `attention`."""
        x = self._checked("x", x, self._embed_dim)
        checked = self._checked_options(options, is_causal=False)
        self._refuse_rotary("a ContextCache")
        self._rotation(x, positions)  # refuses positions
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
        """Check options that calls with and without a cache share; `is_causal` is the default."""
        given = options["is_causal"]
        is_causal = is_causal if given is None else flag("is_causal", given)
        check_options(
            self._dtype, self._heads, self._head_dim, is_causal, options["window"],
            options["scale"], options["softcap"], options["alibi_slopes"], options["sinks"],
            options["num_threads"],
        )  # fmt: skip
        return {**options, "is_causal": is_causal, "layout": "blhd"}

    def _contexts(self, context: ArrayLike | tuple[ArrayLike, ArrayLike]) -> tuple[Array, Array]:
        """Return the embeddings from which keys and values are made."""
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
        """Refuse a layer whose keys and values cannot be made from `x`."""
        if self._context_dims != (self._embed_dim, self._embed_dim):
            seen = f"{self._context_dims} with embed_dim {self._embed_dim}"
            advice = "`context_cache` keeps the keys and values of a context"
            refuse("context_dim", seen, "embed_dim for a layer with a KVCache", advice)

    def _check_fits(self, name: str, dtype: np.dtype[Any], sizes: tuple[int, int, int]) -> None:
        """Check that keys and values of a cache have the dtype and sizes of the layer."""
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
            refuse_kind("cache", kind_of(cache), "a KVCache")
        self._refuse_context_dim()
        sizes = (cache.k.shape[1], cache.k.shape[3], cache.v.shape[3])
        self._check_fits("cache", cache._arguments.dtype, sizes)
        batch = len(cache.lengths)
        if x.ndim != 3 or x.shape[0] != batch:
            expected = f"({batch}, length, {self._embed_dim}) for the sequences of this cache"
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
        """Return q, k or v, (..., length, heads, dim), projected from the arrays in `of`.

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
            advice = "convert it with `.astype`"
            if is_accepted(array.dtype):
                advice += f", or make the layer with `dtype={array.dtype.name!r}`"
            expected = f"{self._dtype.name}, the dtype of the layer"
            refuse_kind(name, dtype_name(array), expected, advice)
        if array.ndim < 2 or array.shape[-1] != dim:
            refuse(name, f"shape {array.shape}", f"(..., length, {dim})")
        if array.ndim >= MAX_AXES:
            refuse(name, f"{array.ndim} axes", f"at most {MAX_AXES - 1}")
        return array


def _check_positions(x: Array, options: Mapping[str, Any]) -> None:
    """Refuse options that need positions, which are not known with lengths of a context."""
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
