"""Operators of ONNX Runtime, domain ``com.microsoft``, for ONNX's reference evaluator."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from onnx.reference.op_run import OpRun

from ._checks import refuse
from ._onnx_inputs import (
    after_past,
    attend,
    check_angles,
    check_past,
    flat,
    heads_of,
    mask_or_bias,
    per_item,
    rotated,
    rounded,
    wanted,
)
from ._stages import attention_weights, qk_scores

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Array = NDArray[Any]

# ONNX Runtime adds a number to the logits of masked keys. Here they get a weight of 0, which is the
# same only if that number is low enough.
_MOST_FILTER_VALUE = -1000.0


class _ContribOp(OpRun):
    op_domain = "com.microsoft"


def _refuse_given(**inputs: object) -> None:
    for name, value in inputs.items():
        if value is not None:
            refuse(name, "an input", "none", "numattn does not support it")


def _refuse_other(attributes: dict[str, tuple[object, object]]) -> None:
    """Refuse attributes, by their names, that differ from what numattn does."""
    for name, (value, only) in attributes.items():
        if value != only:
            refuse(name, repr(value), f"{only!r}, the only value that numattn supports")


class MultiHeadAttention(_ContribOp):
    """The operator MultiHeadAttention of ONNX Runtime, with its inputs, outputs and attributes."""

    def _run(
        self,
        query: Array,
        key: Array | None = None,
        value: Array | None = None,
        bias: Array | None = None,
        key_padding_mask: Array | None = None,
        attention_bias: Array | None = None,
        past_key: Array | None = None,
        past_value: Array | None = None,
        past_sequence_length: Array | None = None,
        cache_indirection: Array | None = None,
        *,
        num_heads: int,
        mask_filter_value: float = -10000.0,
        scale: float = 0.0,
        unidirectional: int = 0,
    ) -> tuple[Array, ...]:
        _refuse_given(
            past_sequence_length=past_sequence_length, cache_indirection=cache_indirection
        )
        q, new_k, new_v = _unpacked(query, key, value, num_heads)
        if bias is not None:
            q, new_k, new_v = _with_bias(bias, q, new_k, new_v, key is None or key.ndim != 4)
        if unidirectional and new_k.shape[2] != q.shape[2]:
            # In ONNX Runtime the last query then attends to all keys.
            seen = f"1 with {q.shape[2]} queries and {new_k.shape[2]} new keys"
            refuse("unidirectional", seen, "0, or the same number of new keys and queries")
        k = after_past("key", past_key, new_k, past_value)
        v = after_past("value", past_value, new_v, past_key)
        options: dict[str, Any] = {
            "is_causal": bool(unidirectional),
            "q_offset": k.shape[2] - new_k.shape[2],
            "scale": float(scale) or None,
            **mask_or_bias("attention_bias", attention_bias, q, k.shape[2]),
        }
        if key_padding_mask is not None:
            if mask_filter_value > _MOST_FILTER_VALUE:
                expected = f"at most {_MOST_FILTER_VALUE}, so that masked keys have no weight"
                refuse("mask_filter_value", str(mask_filter_value), expected)
            options |= _padding(key_padding_mask, q, k.shape[2])
        out = attend(q, k, v, True, options)
        if not wanted(self, 3):
            return out, k, v
        return out, k, v, rounded(qk_scores(q, k, **options), q.dtype)


def _unpacked(
    query: Array, key: Array | None, value: Array | None, heads: int
) -> tuple[Array, Array, Array]:
    """View q, k and v as (B, H, L, D)."""
    if key is None:
        if query.ndim != 5 or query.shape[2:4] != (heads, 3) or value is not None:
            expected = f"(B, L, {heads}, 3, D), or `key` with it"
            refuse("query", f"shape {query.shape} without key", expected)
        q, k, v = (query[:, :, :, i].swapaxes(1, 2) for i in range(3))
        return q, k, v
    q = heads_of("query", query, heads)
    if value is not None:
        return q, heads_of("key", key, heads), heads_of("value", value, heads)
    if key.ndim != 5 or key.shape[2:4] != (heads, 2):
        refuse("key", f"shape {key.shape} without value", f"(B, L, {heads}, 2, D)")
    return q, key[:, :, :, 0].swapaxes(1, 2), key[:, :, :, 1].swapaxes(1, 2)


def _with_bias(
    bias: Array, q: Array, k: Array, v: Array, also_keys: bool
) -> tuple[Array, Array, Array]:
    """Add the biases of the projections; keys and values from a cache already have theirs."""
    heads = q.shape[1]
    sizes = [heads * x.shape[3] for x in (q, k, v)]
    if bias.shape != (sum(sizes),):
        refuse("bias", f"shape {bias.shape}", f"({sum(sizes)},), for queries, keys and values")
    of_q, of_k, of_v = (part.reshape(heads, 1, -1) for part in np.split(bias, np.cumsum(sizes)[:2]))
    with np.errstate(all="ignore"):
        return (q + of_q, k + of_k, v + of_v) if also_keys else (q + of_q, k, v)


def _padding(mask: Array, q: Array, keys: int) -> dict[str, Any]:
    """Return the option for a padding mask, which depends on its shape."""
    batch, _, length, _ = q.shape
    if mask.shape == (batch,):
        return {"kv_lengths": per_item("key_padding_mask", mask, batch, 0, keys)}
    if mask.shape not in ((batch, keys), (batch, length, keys)):
        expected = f"({batch},), ({batch}, {keys}) or ({batch}, {length}, {keys})"
        refuse("key_padding_mask", f"shape {mask.shape}", expected)
    kept = mask > 0
    return {"mask": kept[:, np.newaxis] if kept.ndim == 3 else kept[:, np.newaxis, np.newaxis]}


class GroupQueryAttention(_ContribOp):
    """The operator GroupQueryAttention of ONNX Runtime, with its inputs, outputs and attributes.

    Rows of `output` beyond a sequence's valid tokens are 0.
    """

    def _run(
        self,
        query: Array,
        key: Array | None = None,
        value: Array | None = None,
        past_key: Array | None = None,
        past_value: Array | None = None,
        seqlens_k: Array | None = None,
        total_sequence_length: Array | None = None,
        cos_cache: Array | None = None,
        sin_cache: Array | None = None,
        position_ids: Array | None = None,
        attention_bias: Array | None = None,
        head_sink: Array | None = None,
        k_scale: Array | None = None,
        v_scale: Array | None = None,
        q_norm_weight: Array | None = None,
        k_norm_weight: Array | None = None,
        query_seqlens: Array | None = None,
        *,
        num_heads: int,
        kv_num_heads: int,
        causal: int = 1,
        do_rotary: int = 0,
        k_norm_epsilon: float | None = None,
        k_quant_type: str = "NONE",
        kv_cache_bit_width: int = 0,
        local_window_size: int = -1,
        q_norm_epsilon: float | None = None,
        qk_norm_epsilon: float | None = None,
        qk_output: int = 0,
        rotary_interleaved: int = 0,
        scale: float = 0.0,
        sliding_window_cache: int = 0,
        smooth_softmax: int = 0,
        softcap: float = 0.0,
        v_quant_type: str = "NONE",
    ) -> tuple[Array, ...]:
        del k_norm_epsilon, q_norm_epsilon, qk_norm_epsilon  # of norms, which are refused
        _refuse_given(
            k_scale=k_scale, v_scale=v_scale,
            q_norm_weight=q_norm_weight, k_norm_weight=k_norm_weight,
        )  # fmt: skip
        _refuse_other({
            "k_quant_type": (k_quant_type, "NONE"), "v_quant_type": (v_quant_type, "NONE"),
            "kv_cache_bit_width": (kv_cache_bit_width, 0),
            "sliding_window_cache": (sliding_window_cache, 0),
        })  # fmt: skip
        if seqlens_k is None or total_sequence_length is None:
            refuse("seqlens_k, total_sequence_length", "None", "both")
        if key is None:
            q, new_k, new_v = _split_packed(query, num_heads, kv_num_heads)
        else:
            if value is None:
                refuse("value", "None with key", "both or none")
            q = heads_of("query", query, num_heads)
            new_k, new_v = (
                heads_of(name, x, kv_num_heads) for name, x in (("key", key), ("value", value))
            )
        check_past("key", past_key, new_k, past_value)
        check_past("value", past_value, new_v, past_key)
        total = int(total_sequence_length.reshape(()))
        tokens = _Tokens(q, new_k, past_key, seqlens_k, total, query_seqlens)
        if do_rotary:
            if cos_cache is None or sin_cache is None:
                refuse("cos_cache, sin_cache", "None with do_rotary=1", "both")
            check_angles(cos_cache, sin_cache, 2 * cos_cache.shape[-1], q.shape[-1])
            positions = tokens.positions(position_ids)
            angles = cos_cache, sin_cache, positions, bool(rotary_interleaved)
            q = rotated(q, *angles)
            new_k = rotated(new_k, *angles) if new_k.size else new_k
        k, v = tokens.after_past(past_key, new_k), tokens.after_past(past_value, new_v)
        sinks = np.zeros(num_heads) if head_sink is None and smooth_softmax else head_sink
        logits: dict[str, Any] = {
            "is_causal": bool(causal),
            "window": None if local_window_size < 1 else (local_window_size - 1, None),
            "scale": float(scale) or None,
            "softcap": float(softcap) or None,
            "kv_lengths": tokens.kept,
            "q_lengths": tokens.valid,
            "q_offset": tokens.past,
            **mask_or_bias("attention_bias", attention_bias, q, total),
        }
        seen = k[:, :, :total], v[:, :, :total]
        out = attend(q, *seen, True, {**logits, "sinks": sinks})
        if not wanted(self, 3):
            return out, k, v
        if qk_output == 1:
            scores = qk_scores(q, seen[0], **logits)
            scores[np.isneginf(scores)] = 0
        elif qk_output == 2:
            scores = attention_weights(q, seen[0], **logits, sinks=sinks)
        else:
            refuse("qk_output", str(qk_output), "1 or 2, because the graph has an output_qk")
        return out, k, v, rounded(scores, q.dtype)


def _split_packed(query: Array, heads: int, kv_heads: int) -> tuple[Array, Array, Array]:
    """View queries, keys and values, packed as (B, L, all heads * D), each as (B, H, L, D)."""
    packed = heads_of("query", query, heads + 2 * kv_heads)
    return packed[:, :heads], packed[:, heads:-kv_heads], packed[:, -kv_heads:]


class _Tokens:
    """The places of the tokens of each sequence in the cache."""

    kept: NDArray[np.int64]  # tokens in the cache after this step
    valid: NDArray[np.int64]  # tokens in the call, which may be padded on the right
    past: NDArray[np.int64]  # tokens in the cache before
    length: int  # of the call
    capacity: int  # of the cache
    appends: bool  # False if the cache already has the call's keys
    is_first: bool  # whether a text begins

    def __init__(
        self, q: Array, new: Array, past: Array | None, seqlens: Array, total: int,
        query_seqlens: Array | None,
    ) -> None:  # fmt: skip
        batch, _, self.length, _ = q.shape
        if new.shape[2] not in (0, self.length):
            expected = f"{self.length} tokens, as in query, or none"
            refuse("key", f"{new.shape[2]} tokens", expected)
        self.appends = new.shape[2] > 0
        self.is_first = query_seqlens is None and self.length == total
        self.kept = per_item("seqlens_k", seqlens, batch, -1, total - 1) + 1
        if query_seqlens is None:
            self.valid = np.minimum(self.kept, self.length)
        else:
            self.valid = per_item("query_seqlens", query_seqlens, batch, 0, self.length)
        self.past = self.kept - self.valid
        there = 0 if past is None else past.shape[2]
        needed = int((self.past if self.appends else self.kept).max(initial=0))
        if self.past.min(initial=0) < 0 or needed > there:
            seen = f"{self.past.tolist()} past tokens and a past_key of {there} tokens"
            refuse("seqlens_k", seen, "a past_key that holds all tokens before this step")
        self.capacity = max(there, total)

    def positions(self, given: Array | None) -> Array:
        """Return (B, L) positions; padding has the position of a valid token."""
        places = np.minimum(np.arange(self.length), self.valid[:, np.newaxis] - 1)
        if given is None:
            return np.maximum(self.past[:, np.newaxis] + places, 0)
        # At the beginning of a text, ONNX Runtime reads only the first of all positions.
        return np.maximum(given.reshape(-1)[0] + places, 0) if self.is_first else given

    def after_past(self, past: Array | None, new: Array) -> Array:
        """Return the cache with the new tokens in their places, and 0 beyond them."""
        if past is None and self.capacity == self.length:
            return new
        if past is not None and not self.appends:
            return past
        batch, heads, _, dim = new.shape
        cache = np.zeros((batch, heads, self.capacity, dim), new.dtype)
        before = self.past.max(initial=0)
        if past is not None:
            cache[:, :, :before] = past[:, :, :before]
        for item, (first, count) in enumerate(zip(self.past, self.valid, strict=True)):
            cache[item, :, first : first + count] = new[item, :, :count]
            cache[item, :, first + count :] = 0
        return cache


class RotaryEmbedding(_ContribOp):
    """The operator RotaryEmbedding of ONNX Runtime, whose positions come before the tables."""

    def _run(
        self,
        input: Array,
        position_ids: Array,
        cos_cache: Array,
        sin_cache: Array,
        *,
        interleaved: int = 0,
        is_packed_batching: int = 0,
        num_heads: int = 0,
        rotary_embedding_dim: int = 0,
        scale: float = 1.0,
    ) -> tuple[Array]:
        _refuse_other({"is_packed_batching": (is_packed_batching, 0), "scale": (scale, 1.0)})
        heads = num_heads or None
        if heads is None and input.ndim == 3 and not rotary_embedding_dim:
            heads = input.shape[-1] // (2 * cos_cache.shape[-1])
        x = heads_of("input", input, heads)
        check_angles(cos_cache, sin_cache, rotary_embedding_dim or x.shape[-1], x.shape[-1])
        positions = position_ids
        if positions.shape == (1,):
            positions = np.broadcast_to(positions + np.arange(x.shape[2]), (len(x), x.shape[2]))
        out = rotated(x, cos_cache, sin_cache, positions, bool(interleaved))
        return (out if input.ndim == 4 else flat(out),)


OPS: list[type[OpRun]] = [MultiHeadAttention, GroupQueryAttention, RotaryEmbedding]
