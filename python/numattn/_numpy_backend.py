"""The computations of the compiled kernels in NumPy, for systems without them.

The meaning and the errors are the same, and memory is linear in the sequence lengths.

Queries are taken one block of rows at a time, so that the number of a block's logits stays below a
limit. A row is computed with all of its keys at once.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from ._numpy_activations import activate, activate_back
from ._numpy_blocks import (
    aggregate,
    blocks,
    kept_weights,
    masked_logits,
    plain_problems,
    query_heads_of,
    quiet,
)
from ._numpy_gradients import attention_backward
from ._numpy_norms import normalize, normalize_back
from ._numpy_row_chunks import widened

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from ._arguments import Arguments
    from ._projection import Product

    Array = NDArray[Any]

__all__ = [
    "activate", "activate_back", "attention", "attention_backward", "multiply", "normalize",
    "normalize_back", "rotate", "softmax", "stage",
]  # fmt: skip


def attention(arguments: Arguments) -> None:
    """Fill ``arguments.out`` and, if wanted, ``arguments.lse``."""
    with quiet():
        for problem in plain_problems(arguments):
            if problem.out is not None and problem.out.size > 0:
                if problem.q_lengths is not None:  # for rows that are not computed
                    problem.out[...] = 0
                    if problem.lse is not None:
                        problem.lse[...] = -np.inf
                for block in blocks(problem):
                    _attend(problem, *block)


def stage(arguments: Arguments, name: str, out: Array) -> None:
    """Fill `out` with "logits" or "weights" (batch..., Hq, Lq, Lk), or with the attention
    "received" by each key (batch..., Hq, Lk)."""
    with quiet():
        for problem in plain_problems(arguments):
            if name == "received" or problem.q_lengths is not None:
                out[...] = -np.inf if name == "logits" else 0
            for batch_item, kv_heads, rows in blocks(problem):
                _write_stage(problem, name, out[batch_item], batch_item, kv_heads, rows)


def softmax(scores: Array, mask: Array | None, out: Array) -> None:
    """Fill `out` with the softmax of the last axis."""
    precision = np.float64 if scores.dtype.itemsize == 8 else np.float32
    with quiet():
        x: Array = scores.astype(precision)
        if mask is not None:
            x[~mask] = -np.inf
        maximum = x.max(axis=-1, keepdims=True, initial=-np.inf)
        x = np.exp(x - np.where(maximum == -np.inf, precision(0), maximum))
        total = x.sum(axis=-1, keepdims=True)
        out[...] = x / np.where(total == 0, precision(1), total)


def rotate(
    x: Array, cos: Array, sin: Array, out: Array, interleaved: bool, num_threads: int | None = None
) -> None:
    """Rotate pairs of the last axis by angles; `cos` and `sin` have half as many columns."""
    del num_threads
    pairs = cos.shape[-1]
    halves = (slice(0, pairs), slice(pairs, 2 * pairs))
    first, second = (slice(0, 2 * pairs, 2), slice(1, 2 * pairs, 2)) if interleaved else halves
    with quiet():
        a, b = (x[..., part].astype(cos.dtype) for part in (first, second))
        out[..., first] = a * cos - b * sin
        out[..., second] = b * cos + a * sin
        out[..., 2 * pairs :] = x[..., 2 * pairs :]


def multiply(products: list[Product], num_threads: int | None = None) -> None:
    """Compute products with matrices; `num_threads` is left to NumPy's BLAS."""
    del num_threads
    with quiet():
        for product in products:
            x, weight = widened(product.x), widened(product.weight)
            in_place = product.out.dtype == x.dtype
            computed = np.matmul(x, weight, out=product.out if in_place else None)
            if product.bias is not None:
                computed += product.bias
            if product.rotation is not None:
                heads = computed.reshape(len(x), -1, product.head_dim)
                times = -(-len(x) // len(product.rotation.cos))
                cos, sin = (
                    np.tile(a, (times, 1))[: len(x), np.newaxis]
                    for a in (product.rotation.cos, product.rotation.sin)
                )
                rotate(heads, cos, sin, heads, product.rotation.interleaved)
            if not in_place:
                product.out[...] = computed


def _weigh(a: Arguments, kv_heads: slice, logits: Array) -> tuple[Array, Array, Array]:
    """Return weights before division, their sums, and the largest logits; sums and largest logits
    have a last axis of length 1."""
    precision = logits.dtype.type
    sink = np.full((*logits.shape[:2], 1, 1), -np.inf, precision)
    if a.sinks is not None:
        sink = a.sinks[query_heads_of(a, kv_heads)].astype(precision).reshape(sink.shape)
    maximum = np.maximum(logits.max(axis=-1, keepdims=True, initial=-np.inf), sink)
    base = np.where(maximum == -np.inf, precision(0), maximum)
    weights = np.exp(logits - base)
    return weights, weights.sum(axis=-1, keepdims=True) + np.exp(sink - base), maximum


def _attend(a: Arguments, batch_item: tuple[int, ...], kv_heads: slice, rows: slice) -> None:
    assert a.v is not None
    assert a.out is not None
    query_heads = query_heads_of(a, kv_heads)
    logits, attend, keys = masked_logits(a, batch_item, kv_heads, rows)[:3]
    weights, total, maximum = _weigh(a, kv_heads, logits)
    # Divide before the product, which may overflow although the mean does not.
    weights /= np.where(total == 0, total.dtype.type(1), total)
    if a.dropout > 0:
        kept = kept_weights(a, batch_item, kv_heads, rows, keys)
        weights = np.where(
            kept, weights * weights.dtype.type(1 / (1 - a.dropout)), weights.dtype.type(0)
        )
    v = a.v[batch_item][kv_heads, np.newaxis, keys].astype(logits.dtype, copy=False)
    out = aggregate(weights, v, attend, np.finfo(logits.dtype).max)
    a.out[batch_item][query_heads, rows] = out.reshape(-1, *out.shape[2:])
    if a.lse is not None:
        lse = (maximum + np.log(total))[..., 0]
        a.lse[batch_item][query_heads, rows] = lse.reshape(-1, *lse.shape[2:])


def _write_stage(
    a: Arguments, name: str, out: Array, batch_item: tuple[int, ...], kv_heads: slice, rows: slice
) -> None:
    """Write a block of `out`, which belongs to one batch item."""
    query_heads = query_heads_of(a, kv_heads)
    logits, _, keys = masked_logits(a, batch_item, kv_heads, rows)[:3]
    result = logits
    if name != "logits":
        weights, total, _ = _weigh(a, kv_heads, logits)
        result = weights / np.where(total == 0, total.dtype.type(1), total)
    result = result.reshape(result.shape[0] * result.shape[1], *result.shape[2:])
    if name == "received":
        out[query_heads, keys] += result.sum(axis=-2)
        return
    to = out[query_heads, rows]
    to[...] = -np.inf if name == "logits" else 0
    to[..., keys] = result
