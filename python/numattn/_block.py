"""A transformer block: attention and a feed-forward network, with norms and residuals."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal, Self, overload

import numpy as np

from . import _layer_weights
from ._arguments import ints_per_batch
from ._block_arguments import (
    KIND,
    OPTIONS_ELSEWHERE,
    BlockOptions,
    check_call,
    checked_description,
    checked_options,
)
from ._block_gradients import BlockGradients, Call, Valid, differentiate
from ._checks import flag, refuse_unknown, thread_count
from ._feed_forward import FeedForward
from ._layer import MultiHeadAttention
from ._layer_arguments import initial_parameter, random_generator
from ._norms import Norm

if TYPE_CHECKING:
    import os
    from collections.abc import Callable, Mapping
    from typing import Unpack

    from numpy.typing import ArrayLike, DTypeLike, NDArray

    from ._option_types import BlockCallOptions, BlockVjpOptions

    Array = NDArray[Any]

_PREFIX = "attention."


class TransformerBlock:
    """A transformer block: attention and a feed-forward network, each with a residual connection.

    With ``norm_first=True`` (GPT-2, Llama), ``h = x + attention(norm1(x))`` and ``out = h +
    feed_forward(norm2(h))``. Otherwise (BERT), ``h = norm1(x + attention(x))`` and ``out = norm2(h
    + feed_forward(h))``. A model is a list of blocks.

    Parameters
    ----------
    embed_dim : int
        Number of elements of an embedding, in and out.
    num_heads : int
        Number of query heads.
    hidden_dim : int, optional
        Number of elements between the matrices of the feed-forward network. Default:
        ``4 * embed_dim``.
    norm : {"layer", "rms"}, default "layer"
        LayerNorm, or the root-mean-square norm, which has no bias.
    norm_first : bool, default True
        Apply the norms before attention and the feed-forward network instead of after them.
    activation : {"gelu", "gelu_tanh", "silu", "relu", "relu_squared"}, default "gelu"
        The function ``f`` between the matrices. "gelu" is ``a * P(X <= a)`` for a standard normal
        X, "gelu_tanh" is its approximation in GPT-2 and Gemma, "silu" is ``a / (1 + exp(-a))``, and
        "relu_squared" is ``max(a, 0)**2``.
    gated : bool, default False
        Compute ``down(f(gate(x)) * up(x))`` (SwiGLU in Llama) instead of ``down(f(up(x)))``.
    norm_epsilon : float, default 1e-5
        Number that the two norms add to the variance or the mean square.
    kv_heads, head_dim, value_dim, rotary, qk_norm
        As in `MultiHeadAttention`.
    bias : bool, default True
        Add a learned vector after each matrix and in each LayerNorm.
    dtype : dtype, default float32
        Dtype of the parameters and of x: float16, bfloat16 (from ``ml_dtypes``), float32 or
        float64.
    rng : numpy.random.Generator or int, optional
        Generator or seed for the random matrices. Their elements are drawn from a normal
        distribution with variance 1 / (number of inputs). Biases start at 0, and weights of norms
        at 1.

    Attributes
    ----------
    attention : MultiHeadAttention
        The block's attention.
    num_parameters : int
        Number of elements in all parameters.

    Raises
    ------
    TypeError, ValueError
        If an argument has the wrong type, or one dimension does not divide another.

    See Also
    --------
    MultiHeadAttention : a layer of attention, also for cross-attention.
    KVCache : keys and values of the tokens so far, one cache per block.
    parameter_count : count the parameters of attention.

    Notes
    -----
    The block of Vaswani et al., "Attention Is All You Need", NeurIPS 2017, with the norms of Ba et
    al., "Layer Normalization", 2016, or Zhang and Sennrich, "Root Mean Square Layer Normalization",
    NeurIPS 2019; norms before attention as in Xiong et al., "On Layer Normalization in the
    Transformer Architecture", ICML 2020; gates as in Shazeer, "GLU Variants Improve Transformer",
    2020; "relu_squared" from So et al., "Primer", NeurIPS 2021.

    "gelu" keeps the digits of small results: the error is a few units in the last place, and
    ``4 + a**2`` units for the small results of the tail. Norms take vectors of any finite
    magnitude. NaN and infinity propagate as in arithmetic, whatever ``np.seterr`` says. There is no
    dropout, except for attention's weights in `vjp`.

    Kernels compute the whole block. What `MultiHeadAttention` says about bits, and about the memory
    that a thread keeps, holds here too.

    With 16-bit floats all sums are in float32. The result of each step is rounded once: a norm with
    its weight and bias, the product with a matrix and its bias, the activation with its gate, and a
    residual sum. In `vjp` their gradients are rounded once too.

    Examples
    --------
    >>> import numpy as np
    >>> import numattn as na
    >>> x = np.random.default_rng(0).standard_normal((2, 10, 64), dtype=np.float32)
    >>> gpt2 = na.TransformerBlock(64, 4, activation="gelu_tanh", rng=0)
    >>> gpt2(x, is_causal=True).shape
    (2, 10, 64)

    Llama's block, and a model of two of them:

    >>> llama = {"norm": "rms", "activation": "silu", "gated": True, "bias": False, "rotary": True}
    >>> model = [na.TransformerBlock(64, 8, 172, kv_heads=2, **llama, rng=i) for i in range(2)]
    >>> for block in model:
    ...     x = block(x, is_causal=True)
    >>> x.shape, sum(block.num_parameters for block in model)
    ((2, 10, 64), 86784)
    """

    attention: MultiHeadAttention

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        hidden_dim: int | None = None,
        *,
        norm: Literal["layer", "rms"] = "layer",
        norm_first: bool = True,
        activation: Literal["gelu", "gelu_tanh", "silu", "relu", "relu_squared"] = "gelu",
        gated: bool = False,
        norm_epsilon: float = 1e-5,
        kv_heads: int | None = None,
        head_dim: int | None = None,
        value_dim: int | None = None,
        bias: bool = True,
        rotary: bool | Mapping[str, Any] | None = None,
        qk_norm: bool = False,
        dtype: DTypeLike = np.float32,
        rng: np.random.Generator | int | None = None,
        **unknown: Any,
    ) -> None:
        if unknown:
            refuse_unknown("TransformerBlock", unknown, OPTIONS_ELSEWHERE)
        generator = random_generator(rng)
        self.attention = MultiHeadAttention(
            embed_dim, num_heads, kv_heads=kv_heads, head_dim=head_dim, value_dim=value_dim,
            bias=bias, rotary=rotary, qk_norm=qk_norm, dtype=dtype, rng=generator,
        )  # fmt: skip
        self._options = checked_options(
            4 * self.attention.embed_dim if hidden_dim is None else hidden_dim,
            norm, norm_first, activation, gated, norm_epsilon, bias, bias, self.attention.dtype,
        )  # fmt: skip
        shapes = self._options.shapes(self.attention.embed_dim)
        self._parameters = {
            name: initial_parameter(name, shape, self.attention.dtype, generator)
            for name, shape in shapes.items()
        }

    @classmethod
    def _of_arrays(
        cls,
        attention: MultiHeadAttention,
        options: BlockOptions,
        given: Mapping[str, tuple[int, ...]],
        read: Callable[[str], Array],
        are_transposed: bool = False,
    ) -> Self:
        """Make a block from copies of arrays, as `MultiHeadAttention._of_arrays` does."""
        block = cls.__new__(cls)
        shapes = options.shapes(attention.embed_dim)
        _layer_weights.check_shapes(given, shapes, are_transposed)
        block.attention, block._options = attention, options
        block._parameters = {
            name: _layer_weights.converted(name, read(name), attention.dtype) for name in shapes
        }
        return block

    def __repr__(self) -> str:
        own, attention = self._options, self.attention
        return (
            f"TransformerBlock({attention.embed_dim}, {attention._heads}, {own.hidden_dim}, "
            f"norm={own.norm!r}, norm_first={own.norm_first}, activation={own.activation!r}, "
            f"gated={own.gated}, kv_heads={attention._kv_heads}, dtype={attention.dtype.name})"
        )

    # ---- parameters -----------------------------------------------------------------------------

    def parameters(self) -> dict[str, Array]:
        """Return the block's own arrays by name: writing to them changes the block.

        They are, as far as the block has them:

        - ``norm1_weight`` and ``norm1_bias``, (embed_dim,);
        - all of `MultiHeadAttention.parameters`, with ``attention.`` before their names;
        - ``norm2_weight`` and ``norm2_bias``, (embed_dim,);
        - ``up_weight`` and ``gate_weight``, (embed_dim, hidden_dim), ``down_weight``, (hidden_dim,
          embed_dim), and their biases.

        Returns
        -------
        dict of ndarray
            The arrays, not copies.

        See Also
        --------
        save : write them to a file, with the options of the block.

        Examples
        --------
        Write a whole model to a file, and read it again:

        >>> import numattn as na
        >>> blocks = [na.TransformerBlock(64, 4, rng=i) for i in range(2)]
        >>> named = {
        ...     f"blocks.{i}.{name}": x
        ...     for i, block in enumerate(blocks)
        ...     for name, x in block.parameters().items()
        ... }
        >>> list(named)[:3]
        ['blocks.0.norm1_weight', 'blocks.0.norm1_bias', 'blocks.0.attention.q_weight']
        >>> # safetensors.numpy.save_file(named, path); named = safetensors.numpy.load_file(path)
        >>> for i, block in enumerate(blocks):
        ...     for name, x in block.parameters().items():
        ...         x[...] = named[f"blocks.{i}.{name}"]
        """
        before = {name: x for name, x in self._parameters.items() if name.startswith("norm1")}
        attention = {f"{_PREFIX}{name}": x for name, x in self.attention.parameters().items()}
        return before | attention | self._parameters

    @property
    def num_parameters(self) -> int:
        """Number of elements in all parameters."""
        return sum(x.size for x in self.parameters().values())

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write parameters and options to a safetensors file.

        Parameters
        ----------
        path : str or path-like
            File to write. An existing file is replaced.

        Raises
        ------
        ImportError
            If safetensors is missing: ``pip install 'numattn[weights]'``.
        OSError
            If the file cannot be written.
        TypeError
            If `path` is not a path.

        See Also
        --------
        load : read the file.
        parameters : return the arrays, for files of a whole model.

        Examples
        --------
        >>> import numattn as na
        >>> block = na.TransformerBlock(64, 4, rng=0)
        >>> block.save("block.safetensors")
        >>> na.TransformerBlock.load("block.safetensors").num_parameters == block.num_parameters
        True
        """
        description = {"attention": self.attention._describe(), **self._options._asdict()}
        _layer_weights.save(path, description, self.parameters(), KIND)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Self:
        """Read a block that `save` wrote.

        Parameters
        ----------
        path : str or path-like
            File to read.

        Returns
        -------
        TransformerBlock
            A block with these parameters and options.

        Raises
        ------
        ImportError
            If safetensors is missing: ``pip install 'numattn[weights]'``.
        OSError
            If the file cannot be read.
        ValueError
            If `save` did not write the file: options are missing, unknown or of the wrong type, or
            the arrays do not match them.
        TypeError
            If `path` is not a path.

        See Also
        --------
        save : write the file.

        Examples
        --------
        >>> import numpy as np
        >>> import numattn as na
        >>> na.TransformerBlock(64, 4, rng=0).save("block.safetensors")
        >>> block = na.TransformerBlock.load("block.safetensors")
        >>> block(np.ones((10, 64), np.float32)).shape
        (10, 64)
        """
        with _layer_weights.opened(path, KIND, checked_description) as (shapes, read, description):
            names = [name for name in shapes if name.startswith(_PREFIX)]
            attention = MultiHeadAttention._of_arrays(
                {name.removeprefix(_PREFIX): shapes.pop(name) for name in names},
                lambda name: read(f"{_PREFIX}{name}"),
                **description["attention"],
            )
            return cls._of_arrays(attention, description["options"], shapes, read)

    @classmethod
    def from_weights(
        cls,
        *,
        num_heads: int,
        q_weight: ArrayLike,
        k_weight: ArrayLike,
        v_weight: ArrayLike,
        o_weight: ArrayLike,
        up_weight: ArrayLike,
        down_weight: ArrayLike,
        norm1_weight: ArrayLike,
        norm2_weight: ArrayLike,
        gate_weight: ArrayLike | None = None,
        q_bias: ArrayLike | None = None,
        k_bias: ArrayLike | None = None,
        v_bias: ArrayLike | None = None,
        o_bias: ArrayLike | None = None,
        up_bias: ArrayLike | None = None,
        gate_bias: ArrayLike | None = None,
        down_bias: ArrayLike | None = None,
        norm1_bias: ArrayLike | None = None,
        norm2_bias: ArrayLike | None = None,
        q_norm: ArrayLike | None = None,
        k_norm: ArrayLike | None = None,
        transposed: bool = False,
        kv_heads: int | None = None,
        norm: Literal["layer", "rms"] = "layer",
        norm_first: bool = True,
        activation: Literal["gelu", "gelu_tanh", "silu", "relu", "relu_squared"] = "gelu",
        norm_epsilon: float = 1e-5,
        rotary: bool | Mapping[str, Any] | None = None,
        dtype: DTypeLike | None = None,
        **unknown: Any,
    ) -> Self:
        """Make a block from separate matrices, as Hugging Face models hold them.

        Parameters
        ----------
        num_heads : int
            Number of query heads.
        q_weight, k_weight, v_weight, o_weight : array_like, shape (elements out, elements in)
            As in `MultiHeadAttention.from_weights`; PyTorch tensors are accepted too.
        up_weight : array_like, shape (hidden_dim, embed_dim)
            First matrix of the feed-forward network.
        down_weight : array_like, shape (embed_dim, hidden_dim)
            Last matrix of the feed-forward network.
        norm1_weight, norm2_weight : array_like, shape (embed_dim,)
            Weights of the norms of attention and of the feed-forward network.
        gate_weight : array_like, shape (hidden_dim, embed_dim), optional
            Matrix whose product goes through the activation in a gated block. Default: the block is
            not gated.
        q_bias, k_bias, v_bias, o_bias : array_like, optional
            If any of them is given, the missing ones are 0.
        up_bias, gate_bias, down_bias : array_like, optional
            If any of them is given, the missing ones are 0.
        norm1_bias, norm2_bias : array_like, shape (embed_dim,), optional
            For ``norm="layer"``. If one of them is given, the missing one is 0.
        q_norm, k_norm : array_like, shape (head_dim,), optional
            Weights of the norms of queries and keys; both or none.
        transposed : bool, default False
            All matrices are (elements in, elements out), as in GPT-2's ``Conv1D``.
        kv_heads, rotary
            As in `MultiHeadAttention.from_weights`.
        norm, norm_first, activation, norm_epsilon
            As in the class.
        dtype : dtype, optional
            Dtype of the block. Default: the dtype of `q_weight`, or float32 for 16-bit floats.

        Returns
        -------
        TransformerBlock
            A block with copies of these weights.

        Raises
        ------
        TypeError
            If an argument has the wrong type, such as a masked array or complex numbers.
        ValueError
            If shapes do not fit, or a number is too large for `dtype`.

        See Also
        --------
        MultiHeadAttention.from_weights : the same for a layer of attention.

        Examples
        --------
        A block of GPT-2, which holds the matrices of q, k and v as one:

        >>> import numpy as np
        >>> import numattn as na
        >>> rng = np.random.default_rng(0)
        >>> def numbers(*shape):
        ...     return rng.standard_normal(shape, dtype=np.float32) / 8
        >>> state = {  # module.state_dict() of a transformers GPT2Block
        ...     "ln_1.weight": numbers(64), "ln_1.bias": numbers(64),
        ...     "attn.c_attn.weight": numbers(64, 192), "attn.c_attn.bias": numbers(192),
        ...     "attn.c_proj.weight": numbers(64, 64), "attn.c_proj.bias": numbers(64),
        ...     "ln_2.weight": numbers(64), "ln_2.bias": numbers(64),
        ...     "mlp.c_fc.weight": numbers(64, 256), "mlp.c_fc.bias": numbers(256),
        ...     "mlp.c_proj.weight": numbers(256, 64), "mlp.c_proj.bias": numbers(64),
        ... }
        >>> weights = {}
        >>> for kind in ("weight", "bias"):
        ...     joined = np.split(state[f"attn.c_attn.{kind}"], 3, axis=-1)
        ...     weights |= {f"{part}_{kind}": x for part, x in zip("qkv", joined)}
        ...     weights[f"o_{kind}"] = state[f"attn.c_proj.{kind}"]
        ...     weights[f"up_{kind}"] = state[f"mlp.c_fc.{kind}"]
        ...     weights[f"down_{kind}"] = state[f"mlp.c_proj.{kind}"]
        ...     weights[f"norm1_{kind}"] = state[f"ln_1.{kind}"]
        ...     weights[f"norm2_{kind}"] = state[f"ln_2.{kind}"]
        >>> block = na.TransformerBlock.from_weights(
        ...     **weights, num_heads=4, activation="gelu_tanh", transposed=True
        ... )
        >>> block(numbers(1, 10, 64), is_causal=True).shape
        (1, 10, 64)
        """
        if unknown:
            refuse_unknown("TransformerBlock.from_weights", unknown, OPTIONS_ELSEWHERE)
        is_transposed = flag("transposed", transposed)
        own = _layer_weights.float_matrices(up_weight=up_weight, down_weight=down_weight)
        hidden_dim = own["up_weight"].shape[1 if is_transposed else 0]
        if gate_weight is not None:
            own |= _layer_weights.float_matrices(gate_weight=gate_weight)
        if not is_transposed:
            own = {name: x.T for name, x in own.items()}
        attention = MultiHeadAttention.from_weights(
            q_weight, k_weight, v_weight, o_weight, num_heads=num_heads, kv_heads=kv_heads,
            transposed=is_transposed, q_bias=q_bias, k_bias=k_bias, v_bias=v_bias, o_bias=o_bias,
            q_norm=q_norm, k_norm=k_norm, rotary=rotary, dtype=dtype,
        )  # fmt: skip
        biases = {"up_bias": up_bias, "down_bias": down_bias}
        if gate_weight is not None or gate_bias is not None:
            biases["gate_bias"] = gate_bias
        norm_biases = {"norm1_bias": norm1_bias, "norm2_bias": norm2_bias}
        options = checked_options(
            hidden_dim, norm, norm_first, activation, gate_weight is not None, norm_epsilon,
            any(x is not None for x in norm_biases.values()),
            any(x is not None for x in biases.values()), attention.dtype,
        )  # fmt: skip
        shapes = options.shapes(attention.embed_dim)
        for name, x in (biases | norm_biases).items():
            if x is not None:
                own[name] = _layer_weights.numbers(name, x)
            elif name in shapes:
                own[name] = np.zeros(shapes[name])
        own["norm1_weight"] = _layer_weights.numbers("norm1_weight", norm1_weight)
        own["norm2_weight"] = _layer_weights.numbers("norm2_weight", norm2_weight)
        given = {name: x.shape for name, x in own.items()}
        return cls._of_arrays(attention, options, given, own.__getitem__, not is_transposed)

    # ---- the block ------------------------------------------------------------------------------

    @overload
    def __call__(
        self,
        x: ArrayLike,
        *,
        lengths: int | ArrayLike | None = None,
        return_weights: Literal[False] = False,
        **options: Unpack[BlockCallOptions],
    ) -> Array: ...

    @overload
    def __call__(
        self,
        x: ArrayLike,
        *,
        lengths: int | ArrayLike | None = None,
        return_weights: Literal[True],
        **options: Unpack[BlockCallOptions],
    ) -> tuple[Array, Array]: ...

    @overload
    def __call__(
        self,
        x: ArrayLike,
        *,
        lengths: int | ArrayLike | None = None,
        return_weights: bool,
        **options: Unpack[BlockCallOptions],
    ) -> Array | tuple[Array, Array]: ...

    def __call__(
        self,
        x: ArrayLike,
        *,
        lengths: int | ArrayLike | None = None,
        return_weights: bool = False,
        **options: Any,
    ) -> Array | tuple[Array, Array]:
        """Apply the block to embeddings.

        Parameters
        ----------
        x : array_like, shape (..., L, embed_dim)
            Embeddings, in the block's dtype.
        lengths : int or array_like of int, optional
            Number of valid tokens, for all or per batch item; the others are padding on the right.
            Padding is not attended to and skips the feed-forward network, and its rows of `out` are
            0, whatever `x` holds there. Default: all.
        return_weights : bool, default False
            Also return attention's weights (..., heads, L, L).
        **options
            Options of `MultiHeadAttention`, with the same meaning: is_causal, mask, tail_mask,
            bias, positions, window, scale, softcap, alibi_slopes, sinks, num_threads and cache.
            num_threads applies to the whole block. cache is a `KVCache` for this block only; make
            it with ``block.attention.new_cache(batch)``.

        Returns
        -------
        out : ndarray, shape (..., L, embed_dim)
            In the dtype of the block.
        weights : ndarray, shape (..., heads, L, L)
            Only with ``return_weights=True``. In the dtype of the block, or float32 for 16-bit
            blocks.

        Raises
        ------
        TypeError
            If an argument has the wrong type, or if a context is given: for cross-attention use
            `MultiHeadAttention`.
        ValueError
            If a shape or a value does not fit. A cache is then unchanged.

        See Also
        --------
        vjp : the result and a function for the gradients, for training.

        Examples
        --------
        One token at a time, with a cache for each block:

        >>> import numpy as np
        >>> import numattn as na
        >>> block = na.TransformerBlock(64, 4, rotary=True, rng=0)
        >>> x = np.random.default_rng(0).standard_normal((2, 10, 64), dtype=np.float32)
        >>> out = block(x, is_causal=True)
        >>> cache = block.attention.new_cache(2)
        >>> steps = [block(x[:, i : i + 1], cache=cache) for i in range(10)]
        >>> bool(np.allclose(np.concatenate(steps, axis=1), out, atol=1e-5))
        True
        """
        check_call("TransformerBlock", options, MultiHeadAttention.__call__)
        x, lengths, valid = self._checked(x, lengths)
        num_threads = _threads_of(options)
        (norm1, norm2), feed_forward = self._norms(num_threads), self._feed_forward(num_threads)
        options |= {"lengths": lengths, "return_weights": return_weights}
        with np.errstate(all="ignore"):
            into = self._normed(norm1, x) if self._options.norm_first else x
            attended = self.attention(into, **options)
            attended, *weights = attended if return_weights else (attended,)
            h = valid.of(attended)
            if self._options.norm_first:
                out = feed_forward(norm2.apply(h, np.empty_like(h), add=valid.of(x)))
                out += h
            else:
                out = feed_forward(norm1.apply(h, h, add=valid.of(x)))
                norm2.apply(out, out, add=h)
        return (valid.spread(out), *weights) if weights else valid.spread(out)

    def vjp(
        self,
        x: ArrayLike,
        *,
        lengths: int | ArrayLike | None = None,
        **options: Unpack[BlockVjpOptions],
    ) -> tuple[Array, Callable[[ArrayLike], BlockGradients]]:
        """Apply the block, and return its result and a function that computes gradients.

        Parameters
        ----------
        x, lengths
            As in a call of the block.
        **options
            Options of `MultiHeadAttention.vjp`: all options of a call except cache, and also
            bias_gradient, dropout and rng. Dropout applies only to attention's weights.

        Returns
        -------
        out : ndarray, shape (..., L, embed_dim)
            The result of the call. Without dropout it has the same bits, except for 16-bit floats
            as described in `MultiHeadAttention.vjp`.
        vjp : callable
            ``vjp(dout)`` takes the gradient of a scalar with respect to `out`, in its shape and in
            the block's dtype. It returns `BlockGradients`: the gradients with respect to `x`, all
            parameters and the sinks and, with `bias_gradient`, the bias. It may be called any
            number of times, also by several threads.

        Raises
        ------
        TypeError, ValueError
            As in a call of the block. `vjp` raises them if `dout` has the wrong type, dtype or
            shape.

        See Also
        --------
        MultiHeadAttention.vjp : the same for a layer of attention.

        Notes
        -----
        `vjp` keeps everything that `MultiHeadAttention.vjp` keeps, the inputs of the norms, and the
        products with the first matrices of the feed-forward network. It computes the values of the
        activation again. It does not copy `x`, masks and parameters, and writing to them changes
        the gradients: take all gradients before the step that changes the parameters.

        The gradient of padding is 0. Neither the values of padding nor `dout` there affect the
        other gradients.

        Examples
        --------
        Gradient descent: two blocks learn to return the token before each token.

        >>> import numpy as np
        >>> import numattn as na
        >>> blocks = [na.TransformerBlock(16, 2, rotary=True, rng=i) for i in range(2)]
        >>> x = np.random.default_rng(0).standard_normal((8, 12, 16), dtype=np.float32)
        >>> target = np.roll(x, 1, axis=1)
        >>> losses = []
        >>> for _ in range(40):
        ...     out, vjps = x, []
        ...     for block in blocks:
        ...         out, vjp = block.vjp(out)
        ...         vjps.append(vjp)
        ...     losses.append(float(np.square(out - target).mean()))
        ...     d = 2 * (out - target) / out.size
        ...     for block, vjp in zip(reversed(blocks), reversed(vjps)):
        ...         gradients = vjp(d)
        ...         d = gradients.x
        ...         for name, parameter in block.parameters().items():
        ...             parameter -= 0.5 * gradients.parameters[name]
        >>> losses[-1] < losses[0] / 2
        True
        """
        check_call("TransformerBlock.vjp", options, MultiHeadAttention.vjp)
        x, lengths, valid = self._checked(x, lengths)
        norm_first = self._options.norm_first
        num_threads = _threads_of(options)
        (norm1, norm2), feed_forward = self._norms(num_threads), self._feed_forward(num_threads)
        with np.errstate(all="ignore"):
            into = self._normed(norm1, x) if norm_first else x
            attended, take_attention_back = self.attention.vjp(into, lengths=lengths, **options)
            h = valid.of(attended)
            if norm_first:
                into_norm1, into_norm2 = valid.of(x), h
                into_feed_forward = norm2.apply(h, np.empty_like(h), add=into_norm1)
            else:
                into_norm1 = h
                h = into_feed_forward = norm1.apply(h, np.empty_like(h), add=valid.of(x))
            inner = feed_forward.inner(into_feed_forward)
            out = feed_forward.of_inner(inner)
            if norm_first:
                out += h
            else:
                into_norm2 = out
                out = norm2.apply(out, np.empty_like(out), add=h)
        call = Call(
            tuple(self.parameters()), norm_first, (norm1, norm2), feed_forward, valid,
            (into_norm1, into_norm2), into_feed_forward, inner, take_attention_back,
        )  # fmt: skip

        def vjp(dout: ArrayLike) -> BlockGradients:
            return differentiate(call, dout)

        return valid.spread(out), vjp

    def _checked(self, x: ArrayLike, lengths: Any) -> tuple[Array, Array | None, Valid]:
        x = self.attention._checked("x", x, self.attention.embed_dim)
        lengths = ints_per_batch("lengths", lengths, x.shape[:-2], 0, x.shape[-2])
        rows: Array | slice = slice(None)
        if lengths is not None and np.any(lengths < x.shape[-2]):
            rows = (np.arange(x.shape[-2]) < lengths[..., np.newaxis]).reshape(-1)
        return x, lengths, Valid(x.shape, rows)

    def _normed(self, norm: Norm, x: Array) -> Array:
        rows = x.reshape(-1, x.shape[-1])
        return norm.apply(rows, np.empty(rows.shape, rows.dtype)).reshape(x.shape)

    def _norms(self, num_threads: int | None) -> tuple[Norm, Norm]:
        own, options = self._parameters, self._options

        def norm(name: str) -> Norm:
            weight, bias = own[f"{name}_weight"], own.get(f"{name}_bias")
            return Norm(options.norm == "layer", options.norm_epsilon, weight, bias, num_threads)

        return norm("norm1"), norm("norm2")

    def _feed_forward(self, num_threads: int | None) -> FeedForward:
        options = self._options
        return FeedForward(options.activation, options.gated, self._parameters, num_threads)


def _threads_of(options: Mapping[str, Any]) -> int | None:
    num_threads = options.get("num_threads")
    return None if num_threads is None else thread_count("num_threads", num_threads)
