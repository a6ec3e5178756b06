"""Attention operators of ONNX graphs, for ONNX's reference evaluator.

``ReferenceEvaluator(model, new_ops=numattn.onnx.OPS)`` computes these operators with numattn:

- Attention (opsets 23 to 25) and RotaryEmbedding of the ONNX standard;
- MultiHeadAttention, GroupQueryAttention and RotaryEmbedding of ONNX Runtime (domain
  ``com.microsoft``).

The evaluator computes all other operators itself. This module needs the package ``onnx`` (``pip
install 'numattn[onnx]'``), so `numattn` does not import it.

Examples
--------
>>> import numpy as np
>>> import numattn.onnx
>>> from onnx import parser
>>> from onnx.reference import ReferenceEvaluator
>>> model = parser.parse_model('''
... <ir_version: 10, opset_import: ["": 24]>
... layer (float[B, L, 64] x) => (float[B, L, 64] y) {
...     y = Attention <q_num_heads = 4, kv_num_heads = 4, is_causal = 1> (x, x, x)
... }
... ''')
>>> evaluator = ReferenceEvaluator(model, new_ops=numattn.onnx.OPS)
>>> x = np.random.default_rng(0).standard_normal((2, 10, 64), dtype=np.float32)
>>> (y,) = evaluator.run(None, {"x": x})
>>> y.shape
(2, 10, 64)
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

try:
    from onnx.reference.op_run import OpRun
except ImportError as error:
    raise ImportError("numattn.onnx needs onnx: pip install 'numattn[onnx]'") from error

from . import _onnx_contrib
from ._checks import refuse
from ._onnx_inputs import (
    after_past,
    attend,
    check_angles,
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

__all__ = ["OPS", "Attention", "RotaryEmbedding"]

# ONNX's numbers of float32, float16, float64 and bfloat16.
_PRECISIONS = (1, 10, 11, 16)


class Attention(OpRun):
    """The operator Attention of the ONNX standard, opsets 23 to 25.

    The evaluator makes it and passes the inputs and attributes of a node, which are ONNX's. The
    fourth output, ``qk_matmul_output`` (batch, heads, queries, keys), is computed only if the graph
    uses it.

    Raises
    ------
    ValueError
        If an input or an attribute is one that the standard excludes.

    See Also
    --------
    OPS : all operators of this module.
    numattn.attention : compute attention without a graph.

    Examples
    --------
    >>> import numpy as np
    >>> import numattn.onnx
    >>> from onnx import parser
    >>> from onnx.reference import ReferenceEvaluator
    >>> model = parser.parse_model('''
    ... <ir_version: 10, opset_import: ["": 24]>
    ... layer (float[1, 4, 10, 16] q, float[1, 2, 10, 16] k) => (float[1, 4, 10, 16] y) {
    ...     y = Attention <is_causal = 1> (q, k, k)
    ... }
    ... ''')
    >>> evaluator = ReferenceEvaluator(model, new_ops=[numattn.onnx.Attention])
    >>> q = np.ones((1, 4, 10, 16), np.float32)
    >>> (y,) = evaluator.run(None, {"q": q, "k": q[:, :2]})  # 4 query heads, 2 KV heads
    >>> y.shape
    (1, 4, 10, 16)
    """

    def _run(
        self,
        Q: Array,
        K: Array,
        V: Array,
        attn_mask: Array | None = None,
        past_key: Array | None = None,
        past_value: Array | None = None,
        nonpad_kv_seqlen: Array | None = None,
        *,
        is_causal: int = 0,
        kv_num_heads: int | None = None,
        left_window_size: int = -1,
        q_num_heads: int | None = None,
        qk_matmul_output_mode: int = 0,
        right_window_size: int = -1,
        scale: float | None = None,
        softcap: float = 0.0,
        softmax_precision: int | None = None,
    ) -> tuple[Array, ...]:
        if softmax_precision is not None and softmax_precision not in _PRECISIONS:
            refuse("softmax_precision", str(softmax_precision), f"one of {_PRECISIONS}")
        if past_key is not None and nonpad_kv_seqlen is not None:
            refuse("nonpad_kv_seqlen", "lengths with past_key", "only one of them")
        q = heads_of("Q", Q, q_num_heads)
        new_k, new_v = heads_of("K", K, kv_num_heads), heads_of("V", V, kv_num_heads)
        k = after_past("K", past_key, new_k, past_value)
        v = after_past("V", past_value, new_v, past_key)
        total = k.shape[2]
        mask = mask_or_bias("attn_mask", attn_mask, q, total)
        # Keys beyond a short mask are masked, and are not read.
        seen = total if attn_mask is None else attn_mask.shape[-1]
        logits: dict[str, Any] = {
            "scale": None if scale is None else float(scale),
            "softcap": float(softcap) or None,
        }
        options = {
            **logits,
            **mask,
            "is_causal": bool(is_causal),
            "window": (
                _side("left_window_size", left_window_size),
                _side("right_window_size", right_window_size),
            ),
            "q_offset": total - new_k.shape[2],
        }
        if nonpad_kv_seqlen is not None:
            lengths = per_item("nonpad_kv_seqlen", nonpad_kv_seqlen, len(q), 0, total)
            options["q_offset"] = lengths - q.shape[2]
            options["kv_lengths"] = np.minimum(lengths, seen)
        y = attend(q, k[:, :, :seen], v[:, :, :seen], Q.ndim == 3, options)
        if not wanted(self, 3):
            return y, k, v
        return y, k, v, _scores(qk_matmul_output_mode, q, k, seen, logits, options)


def _scores(
    mode: int, q: Array, k: Array, seen: int, logits: dict[str, Any], options: dict[str, Any]
) -> Array:
    """Return ``qk_matmul_output``, (B, H, Lq, all keys) in the dtype of q."""
    if mode == 0:
        parts, beyond = qk_scores(q, k, scale=logits["scale"]), None
    elif mode == 1:
        parts, beyond = qk_scores(q, k, **logits), None
    elif mode == 2:
        parts, beyond = qk_scores(q, k[:, :, :seen], **options), -np.inf
    elif mode == 3:
        parts, beyond = attention_weights(q, k[:, :, :seen], **options), 0.0
    else:
        refuse("qk_matmul_output_mode", str(mode), "0, 1, 2 or 3")
    if beyond is None or seen == k.shape[2]:
        return rounded(parts, q.dtype)
    out = np.full((*q.shape[:3], k.shape[2]), beyond, q.dtype)
    out[..., :seen] = rounded(parts, q.dtype)
    return out


class RotaryEmbedding(OpRun):
    """The operator RotaryEmbedding of the ONNX standard, opset 23 and later.

    The evaluator makes it and passes the inputs and attributes of a node, which are ONNX's.

    Raises
    ------
    ValueError
        If the tables of cosines and sines do not match the heads, or a position is outside them.

    See Also
    --------
    OPS : all operators of this module.
    numattn.rotary_embedding : rotate an array without a graph.

    Examples
    --------
    >>> import numpy as np
    >>> import numattn as na
    >>> import numattn.onnx
    >>> from onnx import parser
    >>> from onnx.reference import ReferenceEvaluator
    >>> model = parser.parse_model('''
    ... <ir_version: 10, opset_import: ["": 23]>
    ... rotated (float[1, 4, 10, 16] x, float[50, 8] cos, float[50, 8] sin, int64[1, 10] positions)
    ...     => (float[1, 4, 10, 16] y) {
    ...     y = RotaryEmbedding (x, cos, sin, positions)
    ... }
    ... ''')
    >>> evaluator = ReferenceEvaluator(model, new_ops=[numattn.onnx.RotaryEmbedding])
    >>> angles = np.arange(50)[:, np.newaxis] * 10000.0 ** (-np.arange(8) / 8)
    >>> cos, sin = np.cos(angles).astype("float32"), np.sin(angles).astype("float32")
    >>> x = np.random.default_rng(0).standard_normal((1, 4, 10, 16), dtype=np.float32)
    >>> inputs = {"x": x, "cos": cos, "sin": sin, "positions": np.arange(10)[np.newaxis]}
    >>> (y,) = evaluator.run(None, inputs)
    >>> bool(np.allclose(y, na.rotary_embedding(x), atol=1e-6))
    True
    """

    def _run(
        self,
        X: Array,
        cos_cache: Array,
        sin_cache: Array,
        position_ids: Array | None = None,
        *,
        interleaved: int = 0,
        num_heads: int | None = None,
        rotary_embedding_dim: int = 0,
    ) -> tuple[Array]:
        x = heads_of("X", X, num_heads)
        check_angles(cos_cache, sin_cache, rotary_embedding_dim or x.shape[-1], x.shape[-1])
        if position_ids is None and cos_cache.shape[:-1] != (len(x), x.shape[2]):
            expected = f"({len(x)}, {x.shape[2]}, ...) without position_ids"
            refuse("cos_cache", f"shape {cos_cache.shape}", expected)
        out = rotated(x, cos_cache, sin_cache, position_ids, bool(interleaved))
        return (out if X.ndim == 4 else flat(out),)


def _side(name: str, size: int) -> int | None:
    if size < -1:
        refuse(name, str(size), "a number of keys, or -1 for no limit")
    return None if size == -1 else size


#: All operators of this module, of the ONNX standard and of ONNX Runtime: pass it as ``new_ops`` of
#: ``onnx.reference.ReferenceEvaluator``.
OPS: list[type[OpRun]] = [Attention, RotaryEmbedding, *_onnx_contrib.OPS]
