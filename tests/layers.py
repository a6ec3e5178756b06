"""A layer and a block computed by hand: in float64, or in steps that are rounded each.

`keep` rounds what a step gives, `dtype` is what a step is computed in.
"""

import math

import numattn as na
import numpy as np
from checks import numbers
from numattn import _reference as reference


def exactly(x):
    """Keep a result as it is."""
    return x


def by_hand(
    p, x, context, values, heads, kv_heads, rotary=None, norm_epsilon=1e-6, keep=exactly,
    dtype=np.float64, **options,
):  # fmt: skip
    """Compute the layer of parameters `p`; it takes the options of `attention`."""
    p = {name: a.astype(dtype) for name, a in p.items()}
    q, k, v = projections(p, x, context, values, heads, kv_heads, rotary, norm_epsilon, keep, dtype)
    out = keep(reference.attention(q, k, v, **options, dtype=dtype)[0])
    merged = out.swapaxes(-2, -3).reshape(*out.shape[:-3], out.shape[-2], -1)
    return keep(merged @ p["o_weight"] + p.get("o_bias", dtype(0)))


def weights_by_hand(p, x, context, values, heads, kv_heads, rotary=None, **options):
    """Compute the weights (..., heads, L, Lk)."""
    q, k, v = projections(p, x, context, values, heads, kv_heads, rotary, 1e-6)
    each_key = np.broadcast_to(np.eye(k.shape[-2]), (*v.shape[:-1], k.shape[-2]))
    return reference.attention(q, k, each_key, **options)[0]


def projections(
    p, x, context, values, heads, kv_heads, rotary, norm_epsilon, keep=exactly, dtype=np.float64
):
    p = {name: a.astype(dtype) for name, a in p.items()}

    def project(name, source, count):
        rows = keep(source.astype(dtype) @ p[f"{name}_weight"] + p.get(f"{name}_bias", dtype(0)))
        split = rows.reshape(*rows.shape[:-1], count, -1).swapaxes(-2, -3)
        if f"{name}_norm" in p:
            mean = (split**2).mean(-1, keepdims=True)
            split = keep(split / np.sqrt(mean + dtype(norm_epsilon)) * p[f"{name}_norm"])
        return split

    q, k, v = (
        project(*a) for a in (("q", x, heads), ("k", context, kv_heads), ("v", values, kv_heads))
    )
    if rotary is not None:
        q, k = (keep(na.rotary_embedding(a, **rotary)) for a in (q, k))
    return q, k, v


def normal_cdf(x):
    z = -x / math.sqrt(2)
    # What the division rounds shows far out.
    rest = (-x / np.sqrt(np.longdouble(2)) - z).astype(np.float64)
    slope = -2 / math.sqrt(math.pi) * np.exp(-z * z)
    return 0.5 * (np.vectorize(math.erfc)(z) + slope * rest)


def norm_by_hand(x, weight, bias, epsilon, is_centred):
    """Return the result in float64, and what gives the gradients of x, weight and bias."""
    if is_centred:
        x = x - x.mean(-1, keepdims=True)
    root = np.sqrt(np.square(x).mean(-1, keepdims=True) + epsilon)
    unit = x / root

    def back(d):
        of_unit = d * weight
        of_x = (of_unit - unit * (of_unit * unit).mean(-1, keepdims=True)) / root
        if is_centred:
            of_x -= of_x.mean(-1, keepdims=True)
        return of_x, *(y.reshape(-1, y.shape[-1]).sum(0) for y in (d * unit, d))

    return unit * weight + bias, back


FUNCTIONS = {
    "gelu": lambda a: a * normal_cdf(a),
    "gelu_tanh": lambda a: (
        a / 2 * (1 + np.tanh(math.sqrt(2 / math.pi) * (a + 0.044715 * a * a * a)))
    ),
    "silu": lambda a: a / (1 + np.exp(-a)),
    "relu": lambda a: np.maximum(a, 0),
    "relu_squared": lambda a: np.maximum(a, 0) ** 2,
}


def block_by_hand(
    block, x, heads=2, kv_heads=None, norm="layer", norm_first=True, activation="gelu",
    gated=False, norm_epsilon=1e-5, rotary=None, keep=exactly, dtype=np.float64, **options,
):  # fmt: skip
    """Compute a block; it takes the options of `attention`."""
    p = {name: a.astype(dtype) for name, a in block.parameters().items()}
    of_attention = {
        name.removeprefix("attention."): a for name, a in p.items() if name.startswith("attention.")
    }

    def normed(x, name):
        if norm == "layer":
            x = x - x.mean(-1, keepdims=True)
        x = x / np.sqrt((x * x).mean(-1, keepdims=True) + dtype(norm_epsilon))
        return keep(x * p[f"{name}_weight"] + p.get(f"{name}_bias", dtype(0)))

    def project(x, name):
        return keep(x @ p[f"{name}_weight"] + p.get(f"{name}_bias", dtype(0)))

    def attention(x):
        return by_hand(
            of_attention, x, x, x, heads, kv_heads or heads, {} if rotary else None, keep=keep,
            dtype=dtype, **options,
        )  # fmt: skip

    def feed_forward(x):
        f, up = FUNCTIONS[activation], project(x, "up")
        return project(keep(f(project(x, "gate")) * up if gated else f(up)), "down")

    x = x.astype(dtype)
    if norm_first:
        h = keep(x + attention(normed(x, "norm1")))
        return keep(h + feed_forward(normed(h, "norm2")))
    h = normed(keep(x + attention(x)), "norm1")
    return normed(keep(h + feed_forward(h)), "norm2")


def fill(layer, rng):
    """Give biases and norms numbers that show."""
    for name, x in layer.parameters().items():
        if not name.endswith("weight"):
            x += numbers(rng, *x.shape, dtype=x.dtype) / 3
    return layer
