"""Attention of Hugging Face's models: ``attn_implementation="numattn"``.

`register` makes the name known to transformers. Models that ask transformers for their attention
function (nearly all) then compute it with numattn, forward and backward. The package
``transformers`` is needed (``pip install 'numattn[transformers]'``), which is why `numattn` does
not import this module.
"""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any

try:
    import transformers
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask  # which needs torch
except ImportError as error:
    message = (
        f"numattn.transformers needs torch and transformers 5 ({error}): "
        "pip install 'numattn[transformers]'"
    )
    raise ImportError(message) from error

from . import torch as numattn_torch
from ._transformers_attention import (
    Weights,
    attend_in_chunks,
    dense_mask_options,
    only_seen_keys,
    structure_of,
)
from ._transformers_masks import make_mask

if TYPE_CHECKING:
    from torch import Tensor
    from torch.nn import Module

__all__ = ["attention_forward", "register"]

# What one thread reads before PyTorch's threads, which still spin after the operator before, have
# left a core to a second one: a token of a model is 5 to 7 % faster so.
BYTES_OF_ONE_THREAD = 4 << 20

# Arguments of some models that change who attends to whom.
NOT_COMPUTED = {
    "indices": "the keys that each query attends to",
    "block_indices": "the blocks of keys that each query attends to",
    "sinks": "a sink for each query",
}


def register(name: str = "numattn") -> None:
    """Make numattn known to transformers as an attention function.

    From then on ``from_pretrained(..., attn_implementation="numattn")`` takes it, and so does
    ``model.set_attn_implementation("numattn")``. Masks that are causal, windows, chunks or padding
    stay so, and no mask of all queries times all keys is made; others are dense, as for "sdpa".

    Parameters
    ----------
    name : str, default "numattn"
        Under which name.

    Raises
    ------
    ImportError
        If the installed transformers hands over masks in another way.
    ValueError
        If transformers has another attention function of this name.

    See Also
    --------
    attention_forward : what is registered.
    numattn.torch.attention : what it computes with.

    Examples
    --------
    >>> import numattn.transformers
    >>> from transformers import AutoModelForCausalLM, LlamaConfig
    >>> numattn.transformers.register()
    >>> config = LlamaConfig(
    ...     hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
    ...     num_key_value_heads=2, vocab_size=100,
    ... )
    >>> model = AutoModelForCausalLM.from_config(config, attn_implementation="numattn")
    >>> model.config._attn_implementation
    'numattn'
    """  # fmt: skip
    if "q_offset" not in inspect.signature(sdpa_mask).parameters:
        message = (
            f"numattn.transformers: got transformers {transformers.__version__}, whose masks it "
            "does not know, expected 5.24 or later"
        )
        raise ImportError(message)
    known = AttentionInterface()
    if name == "eager" or (name in known and known[name] is not attention_forward):
        message = f"name: got {name!r}, which transformers already uses, expected another name"
        raise ValueError(message)
    AttentionInterface.register(name, attention_forward)
    AttentionMaskInterface.register(name, make_mask)


def attention_forward(
    module: Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    position_bias: Tensor | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    output_attentions: bool = False,
    **others: Any,
) -> tuple[Tensor, Tensor | None]:
    """Compute the attention of a module of transformers.

    Parameters
    ----------
    module : torch.nn.Module
        Its ``is_causal`` counts where nobody else says it.
    query, key, value : Tensor, shapes (batch, heads, length, head_dim)
        On the CPU. Fewer heads of keys and values are shared.
    attention_mask : Tensor, optional
        A `StructuredMask`, or a dense mask: bool, or of floats that are added to the logits.
    dropout, scaling, softcap
        ``dropout``, ``scale`` and ``softcap`` of `numattn.attention`.
    is_causal : bool, optional
        Counts where there is no mask, and then begins at the top left.
    position_bias : Tensor, optional
        Added to the logits, beside the mask.
    s_aux : Tensor, shape (heads,), optional
        The sinks.
    output_attentions : bool, default False
        Also compute the weights, which are made without dropout and have no gradient.
    **others
        Ignored, as ``sliding_window``, which is in the mask, but for three that say who attends to
        whom: ``indices``, ``block_indices`` and ``sinks``.

    Returns
    -------
    out : Tensor, shape (batch, length, heads, head_dim)
        Contiguous.
    weights : Tensor or None
        (batch, heads, queries, keys), in the dtype of `query`.

    Raises
    ------
    NotImplementedError
        If a model chooses keys by indices, or has sinks for each query.
    ValueError
        If a tensor is not on the CPU or shapes do not fit.

    See Also
    --------
    register : so that models call it.
    """
    for name, meaning in NOT_COMPUTED.items():
        if others.get(name) is not None:
            raise NotImplementedError(
                f"{name}: got {meaning}, which numattn does not support, expected None; use "
                "attn_implementation='eager' with this model"
            )
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        if tensor.device.type != "cpu":
            message = (
                f"{name}: got a tensor on {tensor.device}, expected one on the CPU; use "
                "attn_implementation='sdpa' on other devices"
            )
            raise ValueError(message)
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))  # (batch, length, heads, head_dim)
    options: dict[str, Any] = {"scale": scaling, "softcap": softcap, "sinks": s_aux}
    if dropout:
        options["dropout"] = dropout
    takes_chunks = position_bias is None and not output_attentions
    structure = structure_of(attention_mask, query.shape[2], key.shape[2], takes_chunks)
    if structure is not None and structure.chunks is not None:
        return attend_in_chunks(q, k, v, structure, structure.chunks, options), None
    if structure is not None:
        options |= structure.options() | {"bias": position_bias}
    elif attention_mask is not None:
        options |= dense_mask_options(attention_mask, position_bias)
    else:
        options["bias"] = position_bias
        if is_causal is None:
            is_causal = getattr(module, "is_causal", True)
        if is_causal and query.shape[2] > 1:
            options |= {"is_causal": True, "q_offset": 0}
    weights = None
    if output_attentions:
        weights = Weights.apply(q, k, options)
    elif query.shape[2] == 1 and options.get("mask") is not None:
        k, v = only_seen_keys(k, v, options)
    if query.shape[2] == 1 and k.nbytes + v.nbytes <= BYTES_OF_ONE_THREAD:
        options["num_threads"] = 1
    return numattn_torch.attention(q, k, v, layout="blhd", **options), weights
