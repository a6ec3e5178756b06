"""The sizes and parameters of a layer: random, given, or read from a file."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any, Self

import numpy as np

from . import _layer_arguments, _layer_weights
from ._checks import accepted_dtype, at_least, flag, refuse, refuse_unknown
from ._layer_arguments import (
    OPTIONS_ELSEWHERE,
    context_dims,
    initial_parameter,
    random_generator,
    rotary_options,
)

if TYPE_CHECKING:
    import os
    from collections.abc import Callable, Mapping

    from numpy.typing import ArrayLike, DTypeLike, NDArray

    Array = NDArray[Any]


class LayerParameters:
    """The sizes and parameters of a `MultiHeadAttention`, which adds attention."""

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        *,
        kv_heads: int | None = None,
        head_dim: int | None = None,
        value_dim: int | None = None,
        context_dim: int | tuple[int, int] | None = None,
        bias: bool = True,
        rotary: bool | Mapping[str, Any] | None = None,
        qk_norm: bool = False,
        norm_epsilon: float = 1e-6,
        dtype: DTypeLike = np.float32,
        rng: np.random.Generator | int | None = None,
        **unknown: Any,
    ) -> None:
        if unknown:
            refuse_unknown("MultiHeadAttention", unknown, OPTIONS_ELSEWHERE)
        shapes = self._set_sizes(
            embed_dim, num_heads, kv_heads, head_dim, value_dim, context_dim, bias, qk_norm,
            norm_epsilon, dtype,
        )  # fmt: skip
        self._rotary = rotary_options(rotary, self._head_dim)
        generator = random_generator(rng)
        self._parameters = {
            name: initial_parameter(name, shape, self._dtype, generator)
            for name, shape in shapes.items()
        }

    @classmethod
    def _of_arrays(
        cls,
        given: Mapping[str, tuple[int, ...]],
        read: Callable[[str], Array],
        *,
        rotary: bool | Mapping[str, Any] | None,
        are_transposed: bool = False,
        **sizes: Any,
    ) -> Self:
        """Make a layer from copies of the arrays that `read` returns for the names of parameters.

        Arrays are read only after the shapes in `given` have been checked.
        """
        layer = cls.__new__(cls)
        shapes = layer._set_sizes(**sizes)
        _layer_weights.check_shapes(given, shapes, are_transposed)
        layer._rotary = rotary_options(rotary, layer._head_dim)
        layer._parameters = {
            name: _layer_weights.converted(name, read(name), layer._dtype) for name in shapes
        }
        return layer

    def _set_sizes(
        self, embed_dim: Any, num_heads: Any, kv_heads: Any, head_dim: Any, value_dim: Any,
        context_dim: Any, bias: Any, qk_norm: Any, norm_epsilon: Any, dtype: Any,
    ) -> dict[str, tuple[int, ...]]:  # fmt: skip
        """Check and keep sizes; return the parameters' shapes by name."""
        self._embed_dim = at_least("embed_dim", embed_dim, 1)
        self._heads = at_least("num_heads", num_heads, 1)
        self._kv_heads = self._heads if kv_heads is None else at_least("kv_heads", kv_heads, 1)
        if self._heads % self._kv_heads:
            refuse("kv_heads", str(kv_heads), f"a divisor of num_heads, which is {num_heads}")
        if head_dim is None and self._embed_dim % self._heads:
            expected = f"a multiple of num_heads, which is {num_heads}"
            refuse("embed_dim", str(embed_dim), expected, "pass `head_dim=` for other sizes")
        self._head_dim = at_least(
            "head_dim", self._embed_dim // self._heads if head_dim is None else head_dim, 1
        )
        self._value_dim = at_least(
            "value_dim", self._head_dim if value_dim is None else value_dim, 1
        )
        of_keys, of_values = self._context_dims = context_dims(
            self._embed_dim if context_dim is None else context_dim
        )
        self._dtype = accepted_dtype(dtype)
        self._norm_epsilon = _layer_arguments.norm_epsilon(norm_epsilon, self._dtype)
        weights = {
            "q": (self._embed_dim, self._heads * self._head_dim),
            "k": (of_keys, self._kv_heads * self._head_dim),
            "v": (of_values, self._kv_heads * self._value_dim),
            "o": (self._heads * self._value_dim, self._embed_dim),
        }
        shapes: dict[str, tuple[int, ...]] = {f"{n}_weight": s for n, s in weights.items()}
        if flag("bias", bias, _layer_arguments.BIAS_ADVICE):
            shapes |= {f"{name}_bias": shape[1:] for name, shape in weights.items()}
        if flag("qk_norm", qk_norm):
            shapes |= {"q_norm": (self._head_dim,), "k_norm": (self._head_dim,)}
        return shapes

    def __repr__(self) -> str:
        return (
            f"MultiHeadAttention({self._embed_dim}, {self._heads}, kv_heads={self._kv_heads}, "
            f"head_dim={self._head_dim}, value_dim={self._value_dim}, dtype={self._dtype.name})"
        )

    # ---- sizes ----------------------------------------------------------------------------------

    @property
    def embed_dim(self) -> int:
        """Number of elements of an embedding, in and out."""
        return self._embed_dim

    @property
    def num_heads(self) -> int:
        """Number of query heads."""
        return self._heads

    @property
    def kv_heads(self) -> int:
        """Number of heads of keys and values."""
        return self._kv_heads

    @property
    def head_dim(self) -> int:
        """Number of elements of a query and a key."""
        return self._head_dim

    @property
    def value_dim(self) -> int:
        """Number of elements of a value."""
        return self._value_dim

    @property
    def context_dim(self) -> tuple[int, int]:
        """Number of elements of the embeddings from which keys and values are made."""
        return self._context_dims

    @property
    def bias(self) -> bool:
        """Whether a learned vector is added after each matrix."""
        return "q_bias" in self._parameters

    @property
    def qk_norm(self) -> bool:
        """Whether queries and keys are divided by their root mean square."""
        return "q_norm" in self._parameters

    @property
    def norm_epsilon(self) -> float:
        """Number that `qk_norm` adds to the mean of the squares."""
        return self._norm_epsilon

    @property
    def rotary(self) -> dict[str, Any] | None:
        """A copy of all options of the rotary embedding, None without it."""
        return copy.deepcopy(self._rotary)

    @property
    def dtype(self) -> np.dtype[Any]:
        """The dtype of the parameters and of x."""
        return self._dtype

    # ---- parameters -----------------------------------------------------------------------------

    def parameters(self) -> dict[str, Array]:
        """Return the layer's own arrays by name: writing to them changes the layer.

        They are, as far as the layer has them:

        - ``q_weight``, (embed_dim, heads * head_dim);
        - ``k_weight`` and ``v_weight``, (context_dim, kv_heads * head_dim or value_dim);
        - ``o_weight``, (heads * value_dim, embed_dim);
        - ``q_bias``, ``k_bias``, ``v_bias`` and ``o_bias``, such that ``q = x @ q_weight +
          q_bias``;
        - ``q_norm`` and ``k_norm``, (head_dim,).

        Returns
        -------
        dict of ndarray
            The arrays, not copies.

        See Also
        --------
        save : write them to a file, with the sizes of the layer.

        Examples
        --------
        >>> import numattn as na
        >>> layer = na.MultiHeadAttention(64, 4, bias=False, rng=0)
        >>> layer.parameters()["o_weight"][...] = 0
        >>> [(name, x.shape) for name, x in layer.parameters().items()][:2]
        [('q_weight', (64, 64)), ('k_weight', (64, 64))]
        """
        return dict(self._parameters)

    @property
    def num_parameters(self) -> int:
        """Number of elements in all parameters."""
        return sum(x.size for x in self._parameters.values())

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write parameters and sizes to a safetensors file.

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

        Examples
        --------
        >>> import numattn as na
        >>> layer = na.MultiHeadAttention(64, 4, rng=0)
        >>> layer.save("layer.safetensors")
        >>> na.MultiHeadAttention.load("layer.safetensors").num_parameters == layer.num_parameters
        True
        """
        _layer_weights.save(path, self._describe(), self._parameters)

    def _describe(self) -> dict[str, Any]:
        """Return the options with which `_of_arrays` makes such a layer."""
        return {
            "embed_dim": self.embed_dim,
            "num_heads": self.num_heads,
            "kv_heads": self.kv_heads,
            "head_dim": self.head_dim,
            "value_dim": self.value_dim,
            "context_dim": self.context_dim,
            "bias": self.bias,
            "rotary": self._rotary,
            "qk_norm": self.qk_norm,
            "norm_epsilon": self.norm_epsilon,
            "dtype": self.dtype.name,
        }

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Self:
        """Read a layer that `save` wrote.

        Parameters
        ----------
        path : str or path-like
            File to read.

        Returns
        -------
        MultiHeadAttention
            A layer with these parameters and sizes.

        Raises
        ------
        ImportError
            If safetensors is missing: ``pip install 'numattn[weights]'``.
        OSError
            If the file cannot be read.
        ValueError
            If `save` did not write the file: sizes are missing, unknown or of the wrong type, or
            the arrays do not match them. No memory of these sizes is allocated then.
        TypeError
            If `path` is not a path.

        See Also
        --------
        save : write the file.

        Examples
        --------
        >>> import numpy as np
        >>> import numattn as na
        >>> na.MultiHeadAttention(64, 4, rng=0).save("layer.safetensors")
        >>> layer = na.MultiHeadAttention.load("layer.safetensors")
        >>> layer(np.ones((10, 64), np.float32)).shape
        (10, 64)
        """
        with _layer_weights.opened(path) as (shapes, read, description):
            return cls._of_arrays(shapes, read, **description)

    @classmethod
    def from_weights(
        cls,
        q_weight: ArrayLike,
        k_weight: ArrayLike,
        v_weight: ArrayLike,
        o_weight: ArrayLike,
        *,
        num_heads: int,
        kv_heads: int | None = None,
        transposed: bool | None = None,
        q_bias: ArrayLike | None = None,
        k_bias: ArrayLike | None = None,
        v_bias: ArrayLike | None = None,
        o_bias: ArrayLike | None = None,
        q_norm: ArrayLike | None = None,
        k_norm: ArrayLike | None = None,
        norm_epsilon: float = 1e-6,
        rotary: bool | Mapping[str, Any] | None = None,
        dtype: DTypeLike | None = None,
        **unknown: Any,
    ) -> Self:
        """Make a layer from separate matrices, as Hugging Face models hold them.

        Parameters
        ----------
        q_weight, k_weight, v_weight, o_weight : array_like, shape (elements out, elements in)
            As in ``torch.nn.Linear``: (heads * head_dim, embed_dim), (kv_heads * head_dim,
            context_dim), (kv_heads * value_dim, context_dim) and (embed_dim, heads * value_dim).
            With ``transposed=True``, their transposes. PyTorch tensors are accepted too.
        num_heads : int
            Number of query heads.
        kv_heads : int, optional
            Number of heads of keys and values. Default: follows from the rows of `k_weight` and the
            head_dim of `q_weight`.
        transposed : bool, optional
            Whether the matrices are (elements in, elements out), as in GPT-2's ``Conv1D`` and in
            `parameters`. Required if all four are square, because a wrong guess would silently
            change the results. Default: False.
        q_bias, k_bias, v_bias, o_bias : array_like, optional
            If any of them is given, the missing ones are 0.
        q_norm, k_norm : array_like, shape (head_dim,), optional
            Weights of the norms of queries and keys; both or none.
        norm_epsilon : float, default 1e-6
            Number that these norms add: `rms_norm_eps` in the model's configuration.
        rotary : bool or mapping, optional
            As in the class.
        dtype : dtype, optional
            Dtype of the layer. Default: the dtype of `q_weight`, or float32 for 16-bit floats.

        Returns
        -------
        MultiHeadAttention
            A layer with copies of these weights.

        Raises
        ------
        TypeError
            If an argument has the wrong type, such as a masked array or complex numbers, or if all
            matrices are square and `transposed` is missing.
        ValueError
            If shapes do not fit, or a number is too large for `dtype`.

        See Also
        --------
        from_torch : make a layer from a ``torch.nn.MultiheadAttention``.

        Examples
        --------
        Eight query heads and two heads of keys and values, with embeddings of 64 elements:

        >>> import numpy as np
        >>> import numattn as na
        >>> rng = np.random.default_rng(0)
        >>> q, o = rng.standard_normal((2, 64, 64), dtype=np.float32)
        >>> k, v = rng.standard_normal((2, 16, 64), dtype=np.float32)
        >>> na.MultiHeadAttention.from_weights(q, k, v, o, num_heads=8, rotary=True)
        MultiHeadAttention(64, 8, kv_heads=2, head_dim=8, value_dim=8, dtype=float32)

        The matrices of GPT-2, which are (in, out), with q, k and v joined in one:

        >>> c_attn, c_proj = rng.standard_normal((64, 192)), rng.standard_normal((64, 64))
        >>> q, k, v = np.split(c_attn, 3, axis=1)
        >>> na.MultiHeadAttention.from_weights(q, k, v, c_proj, num_heads=8, transposed=True)
        MultiHeadAttention(64, 8, kv_heads=8, head_dim=8, value_dim=8, dtype=float64)
        """
        if unknown:
            refuse_unknown("MultiHeadAttention.from_weights", unknown, OPTIONS_ELSEWHERE)
        matrices = _layer_weights.float_matrices(
            q_weight=q_weight, k_weight=k_weight, v_weight=v_weight, o_weight=o_weight
        )
        biases = {"q_bias": q_bias, "k_bias": k_bias, "v_bias": v_bias, "o_bias": o_bias}
        norms = {"q_norm": q_norm, "k_norm": k_norm}
        inputs_first = _layer_weights.with_inputs_first(matrices, transposed)
        embed_dim, heads, options = _layer_weights.sizes(
            matrices, num_heads, kv_heads, inputs_first
        )
        if (q_norm is None) != (k_norm is None):
            refuse("q_norm, k_norm", "only one of them", "both or none")
        if dtype is None:
            is_double = matrices["q_weight"].dtype == np.float64
            dtype = np.float64 if is_double else np.float32
        arrays = {name: x if inputs_first else x.T for name, x in matrices.items()}
        if any(x is not None for x in biases.values()):
            for name, x in biases.items():
                outputs = arrays[name.replace("bias", "weight")].shape[1]
                arrays[name] = np.zeros(outputs) if x is None else _layer_weights.numbers(name, x)
        for name, x in norms.items():
            if x is not None:
                arrays[name] = _layer_weights.numbers(name, x)
        return cls._of_arrays(
            {name: x.shape for name, x in arrays.items()},
            arrays.__getitem__,
            embed_dim=embed_dim,
            num_heads=heads,
            **options,
            bias="q_bias" in arrays,
            rotary=rotary,
            qk_norm="q_norm" in arrays,
            norm_epsilon=norm_epsilon,
            dtype=dtype,
            are_transposed=not inputs_first,
        )

    @classmethod
    def from_torch(
        cls, module: Any, num_heads: int | None = None, *, dtype: DTypeLike = np.float32
    ) -> Self:
        """Make a layer from the weights of a ``torch.nn.MultiheadAttention``.

        Parameters
        ----------
        module : torch.nn.MultiheadAttention or mapping
            The module, with ``batch_first=True``, or its ``state_dict()``, of tensors or arrays.
            Pass the layer rather than a whole model: ``encoder_layer.self_attn``, for example.
        num_heads : int, optional
            Number of heads. Required with a state_dict, which does not contain it. Default: the
            module's.
        dtype : dtype, default float32
            Dtype of the layer.

        Returns
        -------
        MultiHeadAttention
            A layer with copies of the weights.

        Raises
        ------
        TypeError, ValueError
            If weights are missing, have the wrong shape or are not supported (`bias_k`), or if the
            module has ``batch_first=False``, whose axes differ from the layer's.

        See Also
        --------
        from_weights : make a layer from separate matrices, as Hugging Face models hold them.

        Notes
        -----
        The layer differs from PyTorch's in these ways:

        - It takes (batch, length, embed_dim), as PyTorch does with ``batch_first=True``.
        - It has no dropout, except in `vjp`.
        - It returns weights per head.
        - Pass ``lengths`` instead of ``key_padding_mask``. Padding attends to nothing here, while
          it attends to the valid keys in PyTorch.
        - A mask is True where PyTorch's is False. Pass a float mask as the `bias` of a call.

        Examples
        --------
        >>> import numpy as np
        >>> import numattn as na
        >>> rng = np.random.default_rng(0)
        >>> state = {  # torch.nn.MultiheadAttention(64, 4, bias=False).state_dict()
        ...     "in_proj_weight": rng.standard_normal((192, 64), dtype=np.float32),
        ...     "out_proj.weight": rng.standard_normal((64, 64), dtype=np.float32),
        ... }
        >>> na.MultiHeadAttention.from_torch(state, 4)
        MultiHeadAttention(64, 4, kv_heads=4, head_dim=16, value_dim=16, dtype=float32)
        """
        return cls.from_weights(**_layer_weights.of_torch(module, num_heads), dtype=dtype)
