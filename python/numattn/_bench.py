"""A small table of numattn against plain NumPy: `python -m numattn bench`."""

from __future__ import annotations

import json
import time
from functools import partial
from statistics import median
from typing import TYPE_CHECKING, Any

import numpy as np

from . import _blas, _runtime, _terminal
from ._attention import attention

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from numpy.typing import NDArray

    Array = NDArray[Any]
    Call = Callable[[], Array]

# name, heads of queries, heads of keys and values, queries, keys, head_dim, causal
_SHAPES = [
    ("one small head", 1, 1, 16, 16, 64, False),
    ("4096 heads of 8 tokens", 4096, 4096, 8, 8, 64, False),
    ("sentence encoder", 12, 12, 128, 128, 32, False),
    ("BERT, 512 tokens", 12, 12, 512, 512, 64, False),
    ("GPT, 1024 tokens", 12, 12, 1024, 1024, 64, True),
    ("protein, 1500 residues", 20, 20, 1500, 1500, 64, False),
    ("4096 tokens", 8, 8, 4096, 4096, 64, False),
    ("one query, 512 keys", 32, 32, 1, 512, 128, False),
    ("one query, 4096 keys", 12, 12, 1, 4096, 64, False),
    ("one query, 32768 keys", 8, 8, 1, 32768, 64, False),
    ("the same, grouped heads", 32, 8, 1, 32768, 64, False),
]
_ROUNDS = 5
_DISTURBED = 3  # a disturbed case's largest ratio is more than this times its smallest
_REST_SECONDS = 0.05  # OpenBLAS's threads spin for about 30 ms after a product


def bench(as_json: bool = False) -> None:
    """Print the table, or its content as JSON: medians of calls that take turns."""
    info = _runtime.runtime_info()
    level = info["isa"]["chosen"] or "NumPy backend"
    threads = _runtime.get_num_threads()
    if not as_json:
        print(f"numattn: {level}, threads: {threads}")
        print(f"NumPy:   {_blas.describe()}")
        print(f"{'':24}{'times as fast':>14}{'in rounds':>16}{'largest difference':>20}")
    cases = []
    for name, ratios, difference in _cases():
        low, high = min(ratios), max(ratios)
        if not as_json:
            spread = f"{low:.1f} to {high:.1f}"
            # Other programs took a core from numattn or NumPy for a while.
            note = "  disturbed: run it again" if high > _DISTURBED * low else ""
            print(
                f"{name:24}{median(ratios):13.1f}x{spread:>16}{difference:20.1e}{note}", flush=True
            )
        cases.append(
            {
                "case": name,
                "times_as_fast": median(ratios),
                "rounds": ratios,
                "largest_difference": difference,
            }
        )
    if as_json:
        machine = {"cpu": info["cpu"], "level": level, "threads": threads}
        versions = {"numattn": info["version"], "numpy": np.__version__, "blas": _blas.describe()}
        print(json.dumps({**machine, **versions, "cases": cases}, indent=1))


def _cases() -> Iterator[tuple[str, list[float], float]]:
    """Yield each shape's name, the rounds' ratios, and the largest difference."""
    rng = np.random.default_rng(0)
    for name, heads, kv_heads, queries, keys, d, is_causal in _SHAPES:
        q = rng.standard_normal((heads, queries, d), dtype=np.float32)
        k, v = rng.standard_normal((2, kv_heads, keys, d), dtype=np.float32)
        ratios, difference = _compare(name, q, k, v, is_causal)
        yield name, ratios, difference


def _compare(name: str, q: Array, k: Array, v: Array, is_causal: bool) -> tuple[list[float], float]:
    future = np.arange(k.shape[-2]) > np.arange(q.shape[-2])[:, np.newaxis] + (
        k.shape[-2] - q.shape[-2]
    )
    penalty = np.where(future, np.float32(-np.inf), np.float32(0)) if is_causal else None

    def fused() -> Array:
        return attention(q, k, v, is_causal=is_causal)

    plain = plain_calls(q, k, v, penalty=penalty).values()
    ratios = []
    for n in range(_ROUNDS):
        _terminal.progress(f"{name}: round {n + 1} of {_ROUNDS}")
        time.sleep(_REST_SECONDS)
        ours = _seconds(fused)
        ratios.append(min(map(_seconds, plain)) / ours)
    _terminal.progress("")
    return ratios, max(float(np.abs(fused() - call()).max()) for call in plain)


def _seconds(call: Call) -> float:
    call()
    begin = time.perf_counter()
    call()
    calls = max(1, int(0.05 / (time.perf_counter() - begin)))
    begin = time.perf_counter()
    for _ in range(calls):
        call()
    return (time.perf_counter() - begin) / calls


# ---- plain NumPy, as fast as a few lines can be --------------------------------------------------

_PRODUCTS: dict[str, tuple[Callable[[Array, Array], Array], Callable[[Array, Array], Array]]] = {
    "matmul": (lambda q, k: q @ k.swapaxes(-1, -2), lambda weights, v: weights @ v),
    # For one row per KV head. Which product is fastest then depends on the shape.
    "transposed": (
        lambda q, k: (k @ q.swapaxes(-1, -2)).swapaxes(-1, -2),
        lambda weights, v: (v.swapaxes(-1, -2) @ weights.swapaxes(-1, -2)).swapaxes(-1, -2),
    ),
    "einsum": (
        lambda q, k: np.einsum("...qd,...kd->...qk", q, k),
        lambda weights, v: np.einsum("...qk,...kd->...qd", weights, v),
    ),
}


def plain_calls(q: Array, k: Array, v: Array, **options: Any) -> dict[str, Call]:
    """Return plain attention by each kind of product that may be the fastest here."""
    one_row = q.shape[-3] * q.shape[-2] == k.shape[-3]
    names = _PRODUCTS if one_row else ["matmul"]
    return {name: partial(plain_attention, q, k, v, name, **options) for name in names}


def plain_attention(
    q: Array,
    k: Array,
    v: Array,
    product: str = "matmul",
    *,
    softcap: float | None = None,
    penalty: Array | None = None,
    sinks: Array | None = None,
) -> Array:
    """Compute attention of ``(..., heads, length, dim)`` in NumPy, with all logits in memory.

    `penalty` is added to the logits (..., Hq, Lq, Lk); sinks are (Hq, 1, 1).
    """
    qk, wv = _PRODUCTS[product]
    *batch, heads, rows, d = q.shape
    kv_heads, keys, dv = v.shape[-3:]
    scale = q.dtype.type(1 / (np.sqrt(d) * (softcap or 1)))
    # The query heads of a group are rows of one product.
    grouped = q.reshape(*batch, kv_heads, -1, d)
    # Scale queries or logits, and divide weights or results: in each case the smaller array.
    few_keys = keys <= d
    s: Array = qk(grouped if few_keys else grouped * scale, k)
    if few_keys:
        s *= scale
    s = s.reshape(*batch, heads, rows, keys)
    if softcap:
        np.tanh(s, out=s)
        s *= softcap
    if penalty is not None:
        s += penalty
    top = s.max(axis=-1, keepdims=True)
    s -= top
    np.exp(s, out=s)
    total = s.sum(axis=-1, keepdims=True)
    if sinks is not None:
        total += np.exp(sinks - top)
    if few_keys:
        s /= total
    out = wv(s.reshape(*batch, kv_heads, -1, keys), v).reshape(*batch, heads, rows, dv)
    if not few_keys:
        out /= total
    return out
