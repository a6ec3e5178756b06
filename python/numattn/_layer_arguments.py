"""Checks of the options of a layer and its calls, and the names that other libraries use."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from ._checks import (
    as_array,
    at_least,
    flag,
    integer,
    kind_of,
    meant,
    precision_of,
    real,
    refuse,
    refuse_kind,
)
from ._rotary import ELSEWHERE as ROTARY_ELSEWHERE
from ._rotary import make_rotation

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from numpy.typing import NDArray

    from ._rotary import Rotation

    Array = NDArray[Any]

BIAS_ADVICE = "an array that is added to the logits is an argument of the call"

# The names of a call's arguments in PyTorch's layer, Hugging Face's layers and `attention`.
ELSEWHERE = {
    "attn_mask": "`mask=` if it is bool (True = attend; PyTorch's is True where it masks), `bias=` "
    "if it is float",
    "attention_mask": "`lengths=`, `mask=` if it is bool (True = attend), `bias=` if it is float",
    "key_padding_mask": "`lengths=`, or `mask=~key_padding_mask[:, None, None, :]`",
    "kv_lengths": "`lengths=`",
    "q_lengths": "`lengths=`",
    "causal": "`is_causal=`",
    "need_weights": "`return_weights=`",
    "average_attn_weights": "`return_weights=`, and the mean over axis -3",
    "output_attentions": "`return_weights=`",
    "past_key_values": "`cache=`",
    "past_key_value": "`cache=`",
    "sliding_window": "`window=(sliding_window - 1, 0)`",
    "key": "`context=`",
    "value": "`context=(keys, values)`",
    "key_value_states": "`context=`",
    "encoder_hidden_states": "`context=`",
    "use_cache": "`cache=`",
    "position_ids": "`positions=`",
    "tree_mask": "`tail_mask=`",
    "medusa_attn_mask": "`tail_mask=`",
    "window_size": "`window=(left, right)`, with None for flash-attn's -1",
    "local_window_size": "`window=(left, right)`",
    "logits_soft_cap": "`softcap=`",
    "return_attn_probs": "`return_weights=`",
    "return_lse": "only `attention` has it",
    "attn_bias": "`bias=`",
    "position_bias": "`bias=`",
    "softmax_scale": "`scale=`",
    "scaling": "`scale=`",
    "s_aux": "`sinks=`",
    "dropout": "`dropout=` of `MultiHeadAttention.vjp`, for training",
    "dropout_p": "`dropout=` of `MultiHeadAttention.vjp`, for training",
    "enable_gqa": "leave it out: the layer's `kv_heads` says which heads are grouped",
}

# The same for `vjp`.
VJP_ELSEWHERE = {
    **ELSEWHERE,
    "dropout_p": "`dropout=p, rng=seed`",
    "attn_bias": "`bias=`, with `bias_gradient=True` if it is learned",
    "position_bias": "`bias=`, with `bias_gradient=True` if it is learned",
}

# Options of calls that `vjp` does not have: what is expected, and advice.
NOT_DIFFERENTIATED = {
    "cache": ("no cache", "differentiate the whole text at once, with `is_causal=True`"),
    "return_weights": ("no such option", "`layer(x, return_weights=True)` returns the weights"),
}

# The names of a layer's options in PyTorch's layer and in models' configurations.
OPTIONS_ELSEWHERE = {
    "num_key_value_heads": "`kv_heads=`",
    "num_kv_heads": "`kv_heads=`",
    "kdim": "`context_dim=(kdim, vdim)`",
    "vdim": "`context_dim=(kdim, vdim)`",
    "attention_bias": "`bias=`",
    "qkv_bias": "`bias=`",
    "use_qk_norm": "`qk_norm=`",
    "rms_norm_eps": "`norm_epsilon=`",
    "rope_theta": "`rotary={'base': rope_theta}`",
    "rope_scaling": "`rotary={'scaling': rope_scaling}`",
    "rope_parameters": "`rotary={'scaling': rope_parameters}`",
    "dropout": "`dropout=` of `MultiHeadAttention.vjp`, for training",
    "attention_dropout": "`dropout=` of `MultiHeadAttention.vjp`, for training",
    "batch_first": "leave it out: the layer takes (batch, length, embed_dim)",
    "add_bias_kv": "leave it out: the layer has no keys of its own",
    "add_zero_attn": "leave it out: the layer has no keys of its own",
    "device": "leave it out: it computes on the CPU",
    "scale": "`scale=` of a call",
    "scaling": "`scale=` of a call",
    "softcap": "`softcap=` of a call",
    "sinks": "`sinks=` of a call",
    "alibi_slopes": "`alibi_slopes=` of a call",
    "is_causal": "`is_causal=` of a call",
    "causal": "`is_causal=` of a call",
    "window": "`window=` of a call",
    "sliding_window": "`window=(sliding_window - 1, 0)` of a call",
}


class Inputs(NamedTuple):
    """The inputs from which a call makes its queries, keys and values.

    In self-attention all three are the same array, `x`.
    """

    of: Mapping[str, Array]  # q, k and v
    rotation: Rotation | None


def random_generator(rng: np.random.Generator | int | None) -> np.random.Generator:
    try:
        return np.random.default_rng(rng)
    except TypeError as error:
        refuse_kind("rng", f"{rng!r} ({error})", "a numpy.random.Generator or a seed")
    except ValueError as error:
        refuse("rng", f"{rng!r} ({error})", "a seed of at least 0")


def initial_parameter(
    name: str, shape: tuple[int, ...], dtype: np.dtype[Any], rng: np.random.Generator
) -> Array:
    """Return the initial value of a parameter, which is random only for a matrix."""
    if name.endswith("_bias"):
        return np.zeros(shape, dtype)
    if len(shape) == 1:  # of a norm
        return np.ones(shape, dtype)
    with np.errstate(under="ignore"):
        drawn = rng.standard_normal(shape) / math.sqrt(shape[0])
        # A 16-bit layer has the values of a float32 layer, rounded.
        return drawn.astype(precision_of(dtype)).astype(dtype, copy=False)


def context_dims(value: object) -> tuple[int, int]:
    if isinstance(value, tuple) and len(value) == 2:
        return at_least("context_dim", value[0], 1), at_least("context_dim", value[1], 1)
    return (at_least("context_dim", value, 1),) * 2


def norm_epsilon(value: object, dtype: np.dtype[Any]) -> float:
    number, dtype = real("norm_epsilon", value), precision_of(dtype)
    # Smaller numbers have few digits or none, and a vector of zeros would be divided by 0.
    least, largest = float(np.finfo(dtype).tiny), float(np.finfo(dtype).max)
    if not least <= number <= largest:
        refuse("norm_epsilon", repr(value), f"{least:.2g} to {largest:.2g} for {dtype.name}")
    return number


def rotary_options(rotary: object, head_dim: int) -> dict[str, Any] | None:
    """Return all options of `make_rotation`, checked by a trial call; None for no rotation."""
    if isinstance(rotary, (bool, np.bool_)):
        rotary = {} if rotary else None
    if rotary is None:
        return None
    try:
        given = dict(rotary)  # type: ignore[call-overload]
    except (TypeError, ValueError):
        refuse_kind("rotary", kind_of(rotary), "True or a mapping of options")
    # Python numbers, which `save` can write.
    plain: dict[Any, Callable[[str, object], Any]] = {
        "base": real, "rotary_dim": integer, "interleaved": flag, "scaling": _plain_scaling,
        "frequencies": _plain_numbers,
    }  # fmt: skip
    options: dict[str, Any] = dict.fromkeys(plain) | {"interleaved": False}
    for name, value in given.items():
        if name not in plain:
            expected = "only " + ", ".join(plain)
            refuse("rotary", repr(name), expected + meant(name, ROTARY_ELSEWHERE))
        options[name] = None if value is None else plain[name](name, value)
    make_rotation((1, 0, head_dim), np.dtype(np.float32), None, **options)
    return options


def _plain_scaling(name: str, scaling: object) -> dict[str, Any]:
    try:
        given = dict(scaling)  # type: ignore[call-overload]
    except (TypeError, ValueError):
        expected = "a mapping, such as {'rope_type': 'linear', ...}"
        refuse_kind(name, kind_of(scaling), expected)
    return {key: _plain_value(f"{name}[{key!r}]", value) for key, value in given.items()}


def _plain_value(name: str, value: object) -> Any:
    if value is None or isinstance(value, (str, bool)):
        return value
    if isinstance(value, np.bool_):
        return bool(value)
    return _plain_numbers(name, value) if np.ndim(value) else real(name, value)  # type: ignore[arg-type]


def _plain_numbers(name: str, values: object) -> list[float]:
    return [real(name, x) for x in as_array(name, values).ravel()]  # type: ignore[arg-type]


def batch_shape(
    of_x: tuple[int, ...], of_keys: tuple[int, ...], of_values: tuple[int, ...]
) -> tuple[int, ...]:
    """Return the shape that leading axes broadcast to."""
    try:
        return np.broadcast_shapes(of_x, of_keys, of_values)
    except ValueError:
        shapes = f"leading axes {of_keys} of keys and {of_values} of values with {of_x} of x"
        refuse("context", shapes, "leading axes that broadcast")
