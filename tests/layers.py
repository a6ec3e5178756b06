"""A layer computed by hand, in float64."""

import numattn as na
import numpy as np
from checks import numbers
from numattn import _reference as reference


def by_hand(p, x, context, values, heads, kv_heads, rotary=None, norm_epsilon=1e-6, **options):
    """Compute the layer of parameters `p`; options are those of `attention`."""
    q, k, v = projections(p, x, context, values, heads, kv_heads, rotary, norm_epsilon)
    out, _ = reference.attention(q, k, v, **options)
    merged = out.swapaxes(-2, -3).reshape(*out.shape[:-3], out.shape[-2], -1)
    return merged @ p["o_weight"].astype(np.float64) + p.get("o_bias", 0)


def weights_by_hand(p, x, context, values, heads, kv_heads, rotary=None, **options):
    """Compute the weights (..., heads, L, Lk)."""
    q, k, v = projections(p, x, context, values, heads, kv_heads, rotary, 1e-6)
    each_key = np.broadcast_to(np.eye(k.shape[-2]), (*v.shape[:-1], k.shape[-2]))
    return reference.attention(q, k, each_key, **options)[0]


def projections(p, x, context, values, heads, kv_heads, rotary, norm_epsilon):
    p = {name: a.astype(np.float64) for name, a in p.items()}

    def project(name, source, count):
        rows = source.astype(np.float64) @ p[f"{name}_weight"] + p.get(f"{name}_bias", 0)
        split = rows.reshape(*rows.shape[:-1], count, -1).swapaxes(-2, -3)
        if f"{name}_norm" in p:
            mean = (split**2).mean(-1, keepdims=True)
            split = split / np.sqrt(mean + norm_epsilon) * p[f"{name}_norm"]
        return split

    q, k, v = (
        project(*a) for a in (("q", x, heads), ("k", context, kv_heads), ("v", values, kv_heads))
    )
    if rotary is not None:
        q, k = (na.rotary_embedding(a, **rotary) for a in (q, k))
    return q, k, v


def fill(layer, rng):
    """Give biases and norms numbers that show."""
    for name, x in layer.parameters().items():
        if not name.endswith("weight"):
            x += numbers(rng, *x.shape, dtype=x.dtype) / 3
    return layer
