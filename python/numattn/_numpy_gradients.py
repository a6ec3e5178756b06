"""The gradients of attention in NumPy, one block of rows at a time, in linear memory."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from ._numpy_blocks import (
    aggregate,
    blocks,
    kept_weights,
    masked_logits,
    plain_problems,
    query_heads_of,
    quiet,
    slices,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray

    from ._gradient_arguments import GradientArguments

    Array = NDArray[Any]


def attention_backward(arguments: GradientArguments) -> None:
    """Add to the gradients, which are zeros."""
    with quiet():
        for problem in _plain_gradients(arguments):
            for block in blocks(problem.forward):
                _add_gradients(problem, *block)


def _plain_gradients(g: GradientArguments) -> Iterator[GradientArguments]:
    """Yield problems without sequences."""
    a = g.forward
    if a.query_starts is None or a.key_starts is None:
        yield g
        return
    for forward, q, k in zip(
        plain_problems(a), slices(a.query_starts), slices(a.key_starts), strict=True
    ):
        yield replace(
            g,
            forward=forward,
            dout=g.dout[:, q],
            dlse=None if g.dlse is None else g.dlse[:, q],
            dq=g.dq[:, q],
            dk=g.dk[:, k],
            dv=g.dv[:, k],
        )


def _add_gradients(
    g: GradientArguments, batch_item: tuple[int, ...], kv_heads: slice, rows: slice
) -> None:
    """Add the contribution of a block of rows to the gradients."""
    a = g.forward
    assert a.v is not None
    assert a.out is not None
    assert a.lse is not None
    query_heads = query_heads_of(a, kv_heads)
    logits, attend, keys, capped = masked_logits(a, batch_item, kv_heads, rows)
    precision = logits.dtype
    attend = np.broadcast_to(attend, logits.shape)

    def of_rows(x: Array) -> Array:
        """Return [KV head, query head of its group, row, column] of an array like q."""
        block: Array = x[batch_item][query_heads, rows].astype(precision, copy=False)
        return block.reshape(*logits.shape[:3], -1)

    def of_keys(x: Array) -> Array:
        block: Array = x[batch_item][kv_heads, np.newaxis, keys].astype(precision, copy=False)
        return block

    lse = of_rows(a.lse)
    dout = of_rows(g.dout)
    # A row that attends to nothing has no lse: its weights are 0.
    weights = np.exp(logits - np.where(lse == -np.inf, precision.type(0), lse))
    weights = np.where(attend, weights, precision.type(0))
    row_sums = (dout * of_rows(a.out)).sum(axis=-1, keepdims=True)
    if g.dlse is not None:
        row_sums -= of_rows(g.dlse)
    dlogits = np.matmul(dout, of_keys(a.v).swapaxes(-1, -2))
    of_values = weights  # the weights that multiply the values
    if a.dropout > 0:
        kept = kept_weights(a, batch_item, kv_heads, rows, keys)
        growth = precision.type(1 / (1 - a.dropout))
        of_values = np.where(kept, weights * growth, precision.type(0))
        dlogits = np.where(kept, dlogits * growth, precision.type(0))
    dlogits -= row_sums
    dlogits *= weights
    # Masked elements may be NaN.
    dlogits = np.where(attend, dlogits, precision.type(0))
    if g.dbias is not None:
        _add_repeated(g.dbias[batch_item][query_heads, rows, keys], _as_heads(dlogits))
    if capped is not None:
        dlogits *= 1 - capped * capped
        dlogits = np.where(attend, dlogits, precision.type(0))

    scale = precision.type(a.scale)
    # If a key is not finite, its logit is -inf, with a gradient of 0, or already NaN.
    k = of_keys(a.k)
    dq = np.matmul(dlogits, np.where(np.isfinite(k), k, precision.type(0))) * scale
    g.dq[batch_item][query_heads, rows] += _as_heads(dq)
    # The rows of all query heads that share a key are added up in one product.
    of_key = _by_key(attend)
    dk = aggregate(_by_key(dlogits), _by_group(of_rows(a.q)), of_key) * scale
    g.dk[batch_item][kv_heads, keys] += dk
    g.dv[batch_item][kv_heads, keys] += aggregate(_by_key(of_values), _by_group(dout), of_key)


def _as_heads(x: Array) -> Array:
    """Return (query heads, rows, columns)."""
    return x.reshape(x.shape[0] * x.shape[1], *x.shape[2:])


def _by_group(x: Array) -> Array:
    """Return (KV heads, all rows of the heads of its group, columns)."""
    return x.reshape(x.shape[0], x.shape[1] * x.shape[2], x.shape[3])


def _by_key(x: Array) -> Array:
    return _by_group(x).swapaxes(-1, -2)


def _add_repeated(to: Array, x: Array) -> None:
    """Add to an array whose elements along axes with a stride of 0 are the same."""
    axes = tuple(axis for axis, stride in enumerate(to.strides) if stride == 0)
    once = to[tuple(slice(0, 1 if axis in axes else None) for axis in range(to.ndim))]
    once += x.sum(axis=axes, keepdims=True)
