"""Checks of the options of a block, and the names that other libraries use for them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

from ._checks import (
    accepted_dtype,
    at_least,
    flag,
    kind_of,
    meant,
    parameters_of,
    refuse,
    refuse_kind,
    refuse_unknown,
    value_and_kind,
)
from ._layer_arguments import BIAS_ADVICE, NOT_DIFFERENTIATED
from ._layer_arguments import ELSEWHERE as LAYER_ELSEWHERE
from ._layer_arguments import OPTIONS_ELSEWHERE as LAYER_OPTIONS_ELSEWHERE
from ._layer_arguments import norm_epsilon as checked_epsilon
from ._layer_weights import check_names, checked_sizes
from ._numpy_activations import ACTIVATIONS

if TYPE_CHECKING:
    from collections.abc import Mapping

    import numpy as np


KIND = "numattn.TransformerBlock"
_NORMS = ("layer", "rms")

# The names of a block's options in PyTorch's TransformerEncoderLayer and in models' configurations.
OPTIONS_ELSEWHERE = {
    **LAYER_OPTIONS_ELSEWHERE,
    "d_model": "`embed_dim=`",
    "hidden_size": "`embed_dim=`",
    "nhead": "`num_heads=`",
    "num_attention_heads": "`num_heads=`",
    "dim_feedforward": "`hidden_dim=`",
    "intermediate_size": "`hidden_dim=`",
    "hidden_act": "`activation=`",
    "activation_function": "`activation=`",
    "layer_norm_eps": "`norm_epsilon=`",
    "layer_norm_epsilon": "`norm_epsilon=`",
    "rms_norm_eps": "`norm_epsilon=`",
    "mlp_bias": "`bias=`, or `from_weights`, which takes the biases that the model has",
    "dropout": "`dropout=` of `TransformerBlock.vjp`, for training",
    "attention_dropout": "`dropout=` of `TransformerBlock.vjp`, for training",
    "context_dim": "a block attends to its own tokens; `MultiHeadAttention` has `context_dim=`",
}

# The same for the arguments of a block's call.
CALL_ELSEWHERE = {
    **LAYER_ELSEWHERE,
    "src_mask": "`mask=~src_mask` if it is bool (PyTorch's is True where it masks), `bias=` if it "
    "is float",
    "src_key_padding_mask": "`lengths=`, or `mask=~src_key_padding_mask[:, None, None, :]`",
}

ACTIVATIONS_ELSEWHERE = {
    "gelu_new": "`'gelu_tanh'`",
    "gelu_pytorch_tanh": "`'gelu_tanh'`",
    "gelu_python": "`'gelu'`",
    "swish": "`'silu'`",
    "swiglu": "`activation='silu', gated=True`",
    "geglu": "`activation='gelu', gated=True`",
    "relu2": "`'relu_squared'`",
}

NORMS_ELSEWHERE = {"layer_norm": "`'layer'`", "rms_norm": "`'rms'`"}

_CONTEXT_ADVICE = "a block attends to its own tokens; `MultiHeadAttention` takes a context"
_CONTEXT_NAMES = ("context", "encoder_hidden_states", "key_value_states", "memory")


class BlockOptions(NamedTuple):
    """The options of a block, without the options of its attention."""

    hidden_dim: int
    norm: str
    norm_first: bool
    activation: str
    gated: bool
    norm_epsilon: float
    norm_bias: bool
    hidden_bias: bool

    def shapes(self, embed_dim: int) -> dict[str, tuple[int, ...]]:
        """Return the shapes of the parameters by name."""
        into, out_of = (embed_dim, self.hidden_dim), (self.hidden_dim, embed_dim)
        shapes: dict[str, tuple[int, ...]] = {
            "norm1": (embed_dim,), "norm2": (embed_dim,),
            "up": into, **({"gate": into} if self.gated else {}), "down": out_of,
        }  # fmt: skip
        named = {}
        for name, shape in shapes.items():
            named[f"{name}_weight"] = shape
            if self.norm_bias if name.startswith("norm") else self.hidden_bias:
                named[f"{name}_bias"] = shape[-1:]
        return named


def checked_options(
    hidden_dim: Any, norm: Any, norm_first: Any, activation: Any, gated: Any, norm_epsilon: Any,
    norm_bias: Any, hidden_bias: Any, dtype: np.dtype[Any],
) -> BlockOptions:  # fmt: skip
    norm = _one_of("norm", norm, _NORMS, NORMS_ELSEWHERE)
    activation = _one_of("activation", activation, tuple(ACTIVATIONS), ACTIVATIONS_ELSEWHERE)
    return BlockOptions(
        at_least("hidden_dim", hidden_dim, 1), norm, flag("norm_first", norm_first), activation,
        flag("gated", gated), checked_epsilon(norm_epsilon, dtype),
        flag("bias", norm_bias, BIAS_ADVICE) and norm == "layer",
        flag("bias", hidden_bias, BIAS_ADVICE),
    )  # fmt: skip


def _one_of(name: str, value: Any, known: tuple[str, ...], elsewhere: Mapping[str, str]) -> str:
    if not isinstance(value, str):
        refuse_kind(name, value_and_kind(value), "a str")
    if value not in known:
        expected = "one of " + ", ".join(map(repr, known))
        refuse(name, repr(value), expected + meant(value, elsewhere))
    return value


def checked_description(description: dict[str, Any]) -> dict[str, Any]:
    """Check the description of a block from a file; return its options and its attention's."""
    check_names(KIND, description, ("attention", *BlockOptions._fields))
    of_attention = description["attention"]
    if not isinstance(of_attention, dict):
        refuse_kind("attention", kind_of(of_attention), "a mapping")
    of_attention = checked_sizes(of_attention)
    dtype = of_attention["dtype"]
    own = {name: description[name] for name in BlockOptions._fields}
    options = checked_options(**own, dtype=accepted_dtype(dtype))
    return {"attention": of_attention, "options": options, "dtype": dtype}


def check_call(function: str, options: Mapping[str, Any], of_attention: Any) -> None:
    """Refuse a context, and options that the function `of_attention` does not take."""
    for name in _CONTEXT_NAMES:
        if name in options:
            seen = kind_of(options[name])
            refuse_kind(f"{function}: {name}", seen, "no context", _CONTEXT_ADVICE)
    known = parameters_of(of_attention.__code__)
    unknown = [name for name in options if name not in (*known, *NOT_DIFFERENTIATED)]
    if unknown:
        refuse_unknown(function, unknown, CALL_ELSEWHERE, known)
