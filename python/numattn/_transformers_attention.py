"""Attention for transformers: chunks, dense masks and weights."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from . import torch as numattn_torch
from ._stages import attention_weights
from ._torch_tensors import array_of, tensor_of
from ._transformers_masks import StructuredMask, is_traced
from ._transformers_structures import Structure

if TYPE_CHECKING:
    from torch import Tensor

    from ._transformers_structures import Chunks


def structure_of(
    mask: Tensor | None, q_length: int, kv_length: int, takes_chunks: bool
) -> Structure | None:
    """Return the structure of a mask if it is known and fits the number of queries and keys.

    Unless `takes_chunks`, chunks are replaced by bools of all pairs.
    """
    if not isinstance(mask, StructuredMask) or mask.shape[2:] != (q_length, kv_length):
        return None
    structure = mask.structure()
    if structure is not None and structure.chunks is not None and not takes_chunks:
        return Structure(pairs=mask.pairs())
    return structure


def dense_mask_options(mask: Tensor, position_bias: Tensor | None) -> dict[str, Tensor | None]:
    """Return a dense mask and a bias as options of `numattn.attention`."""
    if isinstance(mask, StructuredMask):
        mask = mask.dense()
    if mask.dtype == torch.bool:
        return {"mask": mask, "bias": position_bias}
    if mask.shape[-2] == 1 and not is_traced(mask):
        # The mask of "eager" for one query has 0, or the least number for keys not attended to.
        attends = mask > torch.finfo(mask.dtype).min
        if bool((mask[attends] == 0).all()):
            return {"mask": attends, "bias": position_bias}
    return {"bias": mask if position_bias is None else position_bias + mask}


def attend_in_chunks(
    q: Tensor, k: Tensor, v: Tensor, structure: Structure, chunks: Chunks, options: dict[str, Any]
) -> Tensor:
    """Compute attention in which queries attend only to the keys of their own chunk.

    `q`, `k`, `v` and the result are (batch, length, heads, head_dim). If chunks begin at different
    positions, as in padded batches, each batch item is computed separately.
    """
    begins = set(chunks.begins.tolist())
    together = len(begins) == 1
    by_item = []
    for number in range(1 if together else len(q)):
        item = slice(None) if together else slice(number, number + 1)
        of_item = []
        pieces = chunks.pieces(number, structure.q_offset, q.shape[1], k.shape[1])
        for rows, keys, q_offset in pieces:
            padding = None if structure.padding is None else structure.padding[item, keys]
            piece = structure._replace(q_offset=q_offset, padding=padding)
            all_options = {"layout": "blhd", **options, **piece.options()}
            of_item.append(
                numattn_torch.attention(q[item, rows], k[item, keys], v[item, keys], **all_options)
            )
        by_item.append(torch.cat(of_item, dim=1))
    return torch.cat(by_item)


def only_seen_keys(k: Tensor, v: Tensor, options: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """Return the keys and values from the first to the last one that is attended to, and cut the
    options to them, so that a static cache is not read beyond its tokens."""
    mask, bias = options["mask"], options["bias"]
    if is_traced(mask):
        return k, v
    seen = mask.numpy().reshape(-1, mask.shape[-1]).any(axis=0).nonzero()[0]
    keys = slice(int(seen[0]), int(seen[-1]) + 1) if len(seen) else slice(0)
    options["mask"] = None if mask[..., keys].all() else mask[..., keys]
    if bias is not None and bias.shape[-1] != 1:
        options["bias"] = bias[..., keys]
    if "q_offset" in options:
        options["q_offset"] -= keys.start
    return k[:, keys], v[:, keys]


class Weights(torch.autograd.Function):  # type: ignore[misc]
    """The weights of attention, without gradients."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, options: dict[str, Any]) -> Tensor:
        arrays: dict[str, Any] = {
            name: array_of(x) if isinstance(x, torch.Tensor) else x
            for name, x in options.items()
            if name != "dropout"
        }
        weights = attention_weights(array_of(q), array_of(k), layout="blhd", **arrays)
        return tensor_of(weights).to(q.dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        raise RuntimeError(
            "numattn's attention weights have no gradient; use attn_implementation='eager' if the "
            "loss depends on `attentions`"
        )
