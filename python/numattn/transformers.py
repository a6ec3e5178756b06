"""Attention for Hugging Face models: ``attn_implementation="numattn"``.

`register` makes the name known to transformers. Models that use transformers' attention interface
(nearly all) then compute attention with numattn, forward and backward. This module needs the
package ``transformers`` (``pip install 'numattn[transformers]'``), so `numattn` does not import it.
"""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any

try:
    import transformers
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask  # needs torch
except ImportError as error:
    message = (
        f"numattn.transformers needs torch and transformers 5 ({error}): "
        "pip install 'numattn[transformers]'"
    )
    raise ImportError(message) from error

from . import torch as numattn_torch
from ._checks import refuse_kind, value_and_kind
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

# Up to this size one thread is faster: PyTorch's threads still spin after their last operator and
# leave no core for a second thread. One thread makes a model's token 5 to 7 % faster.
BYTES_OF_ONE_THREAD = 4 << 20

# Arguments of some models that change which keys a query attends to.
NOT_COMPUTED = {
    "indices": "the keys that each query attends to",
    "block_indices": "the blocks of keys that each query attends to",
    "sinks": "a sink for each query",
}


def register(name: str = "numattn") -> None:
    """Register numattn with transformers as an attention function.

    Afterwards use ``from_pretrained(..., attn_implementation="numattn")`` or
    ``model.set_attn_implementation("numattn")``. Causal masks, windows, chunks and padding keep
    their structure, and no mask of all queries by all keys is made. Other masks are dense, as for
    "sdpa".

    Parameters
    ----------
    name : str, default "numattn"
        Name to register.

    Raises
    ------
    ImportError
        If numattn does not support the masks of the installed transformers.
    ValueError
        If transformers has another attention function with this name.

    See Also
    --------
    attention_forward : the function that is registered.
    numattn.torch.attention : the function that computes attention.

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
    if not isinstance(name, str):
        refuse_kind("name", value_and_kind(name), "a str")
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
    """Compute the attention of a module in transformers.

    Parameters
    ----------
    module : torch.nn.Module
        The module. Its ``is_causal`` is used if no mask is given and `is_causal` is None.
    query, key, value : Tensor, shapes (batch, heads, length, head_dim)
        Tensors on the CPU. If there are fewer heads of keys and values, query heads share them.
    attention_mask : Tensor, optional
        A `StructuredMask` or a dense mask: bool, or floats to add to the logits.
    dropout, scaling, softcap
        ``dropout``, ``scale`` and ``softcap`` of `numattn.attention`.
    is_causal : bool, optional
        Used only without a mask. The first query is then aligned with the first key.
    position_bias : Tensor, optional
        Added to the logits, in addition to the mask.
    s_aux : Tensor, shape (heads,), optional
        The sinks.
    output_attentions : bool, default False
        Also compute the weights, without dropout and without gradients.
    **others
        Ignored, for example ``sliding_window``, which is part of the mask. Exceptions are
        ``indices``, ``block_indices`` and ``sinks``, which change attention and must be None.

    Returns
    -------
    out : Tensor, shape (batch, length, heads, head_dim)
        A contiguous tensor in the dtype of `query`.
    weights : Tensor or None
        (batch, heads, queries, keys), in the dtype of `query`; None without `output_attentions`.

    Raises
    ------
    NotImplementedError
        If a model chooses keys by indices, or has a sink per query.
    ValueError
        If a tensor is not on the CPU, or shapes do not fit.

    See Also
    --------
    register : make models call this function.
    numattn.torch.attention : compute attention of tensors, with the options of `numattn.attention`.

    Examples
    --------
    Models call it. In a module of your own:

    >>> import torch
    >>> import numattn.transformers
    >>> q, k, v = torch.ones(3, 1, 4, 10, 16)
    >>> out, weights = numattn.transformers.attention_forward(
    ...     torch.nn.Module(), q, k, v, None, is_causal=True, output_attentions=True
    ... )
    >>> out.shape, weights.shape
    (torch.Size([1, 10, 4, 16]), torch.Size([1, 4, 10, 10]))
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
