"""Attention in float64, short enough to trust; what everything else is compared with."""

import numpy as np


def attention(
    q, k, v, *, mask=None, bias=None, is_causal=False, q_offset=None, window=None, scale=None,
    softcap=None, alibi_slopes=None, sinks=None, kv_lengths=None, layout="bhld", dtype=np.float64,
    matmul=np.matmul,
):  # fmt: skip
    """Return (out, lse). With another `dtype` it is the plain NumPy computation in that dtype."""
    one_head = q.ndim == k.ndim == v.ndim == 2
    q, k, v = (x[np.newaxis] if x.ndim == 2 else x for x in (q, k, v))
    if layout == "blhd" and not one_head:
        q, k, v = (x.swapaxes(-2, -3) if x.ndim > 2 else x for x in (q, k, v))
    batch = np.broadcast_shapes(q.shape[:-3], k.shape[:-3], v.shape[:-3])
    (heads, rows, dim), (kv_heads, keys) = q.shape[-3:], k.shape[-3:-1]
    q, k, v = (np.broadcast_to(x, batch + x.shape[-3:]).astype(dtype) for x in (q, k, v))
    pairs = (*batch, heads, rows, keys)

    k = np.repeat(k, heads // kv_heads if kv_heads else 1, axis=-3)
    v = np.repeat(v, heads // kv_heads if kv_heads else 1, axis=-3)
    valid = np.broadcast_to(keys if kv_lengths is None else np.asarray(kv_lengths), batch)
    offset = np.broadcast_to(valid - rows if q_offset is None else np.asarray(q_offset), batch)
    p = np.arange(rows)[:, None] + offset[..., None, None, None]  # (batch..., 1, Lq, 1)
    j = np.arange(keys)

    with np.errstate(all="ignore"):
        s = matmul(q, k.swapaxes(-1, -2)) * dtype(1 / np.sqrt(dim) if scale is None else scale)
        if softcap is not None:
            s = dtype(softcap) * np.tanh(s / dtype(softcap))
        attend = np.broadcast_to(j < valid[..., None, None, None], pairs)
        if bias is not None:
            bias = np.asarray(bias).astype(dtype)
            s = s + bias
            attend = attend & (bias != -np.inf)
        if alibi_slopes is not None:
            s = s - np.asarray(alibi_slopes, dtype)[:, None, None] * abs(p - j).astype(dtype)
        if mask is not None:
            attend = attend & mask
        if is_causal:
            attend = attend & (j <= p)
        left, right = (None, None) if window is None else window
        if left is not None:
            attend = attend & (j >= p - left)
        if right is not None:
            attend = attend & (j <= p + right)
        s = np.where(attend, s, -np.inf)
        sink = np.full(heads, -np.inf) if sinks is None else np.asarray(sinks)
        sink = np.broadcast_to(sink.astype(dtype)[:, None, None], (*batch, heads, rows, 1))
        # The sink is a key without a value.
        m = np.concatenate([s, sink], axis=-1).max(axis=-1, keepdims=True)
        m = np.where(m == -np.inf, 0, m).astype(dtype)
        w = np.exp(s - m)
        total = w.sum(axis=-1, keepdims=True) + np.exp(sink - m)
        lse = (m + np.log(total))[..., 0]
        weights = np.where(attend, w / np.where(total == 0, 1, total), 0)
        out = weighted_sum(weights, v, attend, matmul)
    if one_head:
        return out[0], lse[0]
    if layout == "blhd":
        return out.swapaxes(-2, -3), lse.swapaxes(-1, -2)
    return out, lse


def weighted_sum(weights, v, attend, matmul):
    """Weights @ v, in which a value that is not attended to is no number at all."""
    if np.isfinite(v).all():
        return matmul(weights, v)
    terms = np.where(attend[..., None], weights[..., None] * v[..., None, :, :], 0)
    return terms.sum(axis=-2)


def matmul_by_einsum(a, b):
    """Multiply without BLAS."""
    return np.einsum("...ij,...jk->...ik", a, b)
