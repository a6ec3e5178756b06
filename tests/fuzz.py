"""Compare random calls of every entry point with float64, for as long as you like: `make fuzz`.

python tests/fuzz.py --seconds 60 [--seed N]    random calls, also with arguments of wrong kinds
python tests/fuzz.py --call "Call(...)"         one call again, as a failure prints it

Hypothesis makes a failing call smaller, and the program prints it. The file that --last names holds
the current call, so you can also reproduce a crash.
"""

from __future__ import annotations

import argparse
import copy
import faulthandler
import functools
import inspect
import os
import pickle
import sys
import tempfile
import time
from dataclasses import dataclass, field, replace
from pathlib import Path

import ml_dtypes  # noqa: F401  names bfloat16
import numattn as na
import numpy as np
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st
from numattn import _numpy_backend, _runtime
from numattn import _reference as reference

LEVELS = ["numpy"]
if _runtime.native is not None:
    LEVELS += [name for name, available in _runtime.native.isa_names().items() if available]
DTYPES = ["float32", "float64", "float16", "bfloat16"]
LENGTHS = [1, 2, 3, 5, 7, 15, 16, 17, 31, 32, 33, 63, 64, 65, 97, 130]
# Small arrays have too few values to judge rounding: this looks for wrong results.
FACTOR = 16


@dataclass
class Call:
    """One call. Arrays are made from the seed, so the text of a call is complete."""

    entry: str
    level: str
    dtype: str
    batch: int
    heads: tuple[int, int]  # query heads, KV heads
    lengths: tuple[int, int]  # queries, keys
    dims: tuple[int, int]
    seed: int
    threads: int = 1
    layout: str = "bhld"
    step: int = 1  # of the rows in memory
    int8: bool = False
    page_size: int = 4
    options: tuple[str, ...] = ()
    wrong: tuple[int, int] | None = None  # which argument, and which of WRONG replaces it

    rng: np.random.Generator = field(init=False, repr=False)

    def __post_init__(self):
        self.rng = np.random.default_rng(self.seed)


# ---- drawing -----------------------------------------------------------------------------------

OPTIONS = [
    "causal", "window", "left window", "offset", "scale", "softcap", "alibi", "sinks", "lengths",
    "query lengths", "mask", "tail mask", "bias", "dropout",
]  # fmt: skip
ENTRIES = [
    "attention", "attention", "attention", "attention_varlen", "attention_paged", "KVCache",
    "attention_weights", "attention_received", "qk_scores", "merge_states", "masked_softmax",
    "aggregate_values", "rotary_embedding", "attention_backward",
]  # fmt: skip
HAVE_DROPOUT = ("attention", "attention_varlen", "attention_backward")
NO_PAIRS = ("attention_varlen", "attention_paged", "merge_states", "aggregate_values")
WRONG = [
    None, "text", -1, 2**70, 1.5, float("nan"), [], [1, 2, 3], np.zeros(0), np.zeros((2, 3)),
    np.float32(1), np.array(["a"]), np.array([None]), np.zeros((1, 1, 1, 1, 1, 1), bool), True,
    (1, 2), (None, None), object(), np.ma.array([1.0]), np.zeros((3, 4), np.complex64),
    np.full((2, 2), np.inf), b"bytes", {}, np.zeros((2, 2, 3), ">f4"),
]  # fmt: skip


@st.composite
def calls(draw):
    kv_heads = draw(st.integers(1, 3))
    entry = draw(st.sampled_from(ENTRIES))
    query_length = draw(st.integers(1, 4) | st.sampled_from(LENGTHS))
    key_length = draw(st.sampled_from([0, 192, 193, 400, 1537, 3100, *LENGTHS, *LENGTHS]))
    options = draw(st.lists(st.sampled_from(OPTIONS), unique=True, max_size=5))
    if entry in NO_PAIRS:
        options = [x for x in options if x not in ("mask", "bias")]
    if entry not in HAVE_DROPOUT:
        options = [x for x in options if x != "dropout"]
    wrong = None
    if draw(st.integers(0, 4)) == 0:
        wrong = (draw(st.integers(0, 30)), draw(st.integers(0, len(WRONG) - 1)))
    heads = kv_heads * draw(st.sampled_from([1, 1, 2, 4, 9]))
    if heads * query_length * key_length > 20_000:  # the reference is slow
        query_length = min(query_length, 5)
        heads = kv_heads * min(heads // kv_heads, 2)
    return Call(
        entry,
        draw(st.sampled_from(LEVELS)),
        draw(st.sampled_from(DTYPES)),
        draw(st.integers(1, 3)),
        (heads, kv_heads),
        (query_length, key_length),
        (draw(st.sampled_from([1, 3, 8, 16, 17, 33, 64, 80])), draw(st.integers(1, 70))),
        draw(st.integers(0, 2**32 - 1)),
        draw(st.integers(1, 4)),
        draw(st.sampled_from(["bhld", "blhd"])),
        draw(st.sampled_from([1, 1, 2, -1])),
        draw(st.integers(0, 5)) == 0,
        draw(st.sampled_from([1, 3, 16, 50])),
        tuple(sorted(options)),
        wrong,
    )


# ---- one call ----------------------------------------------------------------------------------


def run(call, function, /, *positional, **arguments):
    """Call a function. If the call has a wrong argument, try that first.

    Every second dense mask with all queries and keys is passed as a `BlockMask`.
    """
    if takes_blocks(function) and call.seed % 2 and arguments.get("mask") is not None:
        mask = arguments["mask"]
        if mask.shape[-2:] == call.lengths:
            size = call.rng.choice([1, 5, 16, 64, 96], 2).tolist()
            arguments["mask"] = na.BlockMask.from_dense(mask, tuple(size))
    try_wrong(call, function, *positional, **arguments)
    return function(*positional, **arguments)


def takes_blocks(function):
    return function in (
        na.attention, na.attention_backward, na.attention_weights, na.attention_received,
        na.qk_scores,
    )  # fmt: skip


def try_wrong(call, function, /, *positional, **arguments):
    if call.wrong is not None:
        names = list(inspect.signature(function).parameters)
        bound = dict(zip(names, positional, strict=False)) | arguments
        bound[names[call.wrong[0] % len(names)]] = WRONG[call.wrong[1]]
        try:
            function(**bound)
        except (TypeError, ValueError) as error:
            # A deliberate error says what it got and what it expected; any other is a bug.
            if type(error) not in (TypeError, ValueError) or "got " not in str(error):
                raise


def array(call, batch, heads, length, dim):
    """Return (batch, heads, length, dim) with the strides and the dtype of the call."""
    rows = call.rng.standard_normal((batch, heads, length * abs(call.step), dim))
    return rows.astype(call.dtype)[..., :: call.step, :]


def options_of(call, key_length=None):
    rng = call.rng
    heads, query_length = call.heads[0], call.lengths[0]
    key_length = call.lengths[1] if key_length is None else key_length
    pairs = (call.batch, heads, query_length, key_length)
    shape = tuple(n if rng.random() < 0.6 else 1 for n in pairs)
    last = int(rng.integers(0, min(key_length, int(rng.choice([4, 70, 2000]))) + 1))
    bias = rng.standard_normal(shape).astype(rng.choice([call.dtype, "float32"]))
    bias[rng.random(shape) < 0.1] = -np.inf
    made = {
        "causal": {"is_causal": True},
        "window": {"window": tuple(rng.integers(0, 100, 2).tolist())},
        "left window": {"window": (int(rng.integers(0, 60)), None)},
        "offset": {"q_offset": rng.integers(-50, 200, call.batch)},
        "scale": {"scale": float(rng.choice([0.5, -0.3, 0.01]))},
        "softcap": {"softcap": float(rng.choice([0.7, 20]))},
        "alibi": {"alibi_slopes": rng.random(heads)},
        "sinks": {"sinks": 2 * rng.standard_normal(heads)},
        "lengths": {"kv_lengths": rng.integers(0, key_length + 1, call.batch)},
        "query lengths": {"q_lengths": rng.integers(0, query_length + 1, call.batch)},
        "mask": {"mask": rng.random(shape) < rng.choice([0.05, 0.5, 0.95])},
        "tail mask": {"tail_mask": rng.random((*shape[:3], last)) < rng.choice([0.2, 0.8])},
        "bias": {"bias": bias},
        "dropout": {
            "dropout": float(rng.choice([0.1, 0.7])),
            "rng": int(rng.integers(2**64, dtype=np.uint64)),
        },
    }
    options = {name: value for x in call.options for name, value in made[x].items()}
    if "kv_lengths" in options and not {"q_offset", "q_lengths"} & set(options):
        options["q_offset"] = options["kv_lengths"] - query_length  # else it may be refused
    return options


def masks_of(options):
    """Return the options that exclude keys, whatever the logits."""
    masks = {
        "is_causal",
        "window",
        "q_offset",
        "kv_lengths",
        "q_lengths",
        "mask",
        "tail_mask",
        "bias",
    }
    return {name: value for name, value in options.items() if name in masks}


def rounded(x, scale, dtype):
    """Return the values that 8-bit elements and their scales represent."""
    return x if scale is None else x.astype(dtype) * scale[..., np.newaxis].astype(dtype)


def compare(actual, expected, plain, call):
    """Check an array: `expected` is trusted; `plain` has the kernels' precision."""
    assert actual.shape == expected.shape, f"shape {actual.shape}, expected {expected.shape}"
    with np.errstate(all="ignore"):
        lost = np.nanmax(np.abs(plain.astype(np.float64) - expected), initial=0)
        if not np.isfinite(lost):
            lost = 0
        size = np.abs(expected, where=np.isfinite(expected), out=np.zeros(expected.shape)).max(
            initial=1
        )
    relative = {"float64": 1e-13, "float32": 1e-5}.get(call.dtype)
    if call.dtype == "float64" and actual.dtype == np.float32:
        relative = 1e-6  # the gradient of a bias
    if relative is None:
        relative = 1e-5 if actual.dtype == np.float32 else 2.0**-10
        if call.dtype == "bfloat16":
            relative = 2.0**-6
    np.testing.assert_allclose(
        actual.astype(np.float64), expected, rtol=0, atol=relative * size + FACTOR * lost
    )


def expectations(q, k, v, options, dtype):
    """Return (out, lse) twice: trusted, and in the kernels' precision."""
    precision = np.float64 if dtype == "float64" else np.float32
    trusted = np.longdouble if precision is np.float64 else np.float64
    return [
        [x.astype(np.float64) for x in reference.attention(q, k, v, **options, dtype=t)]
        for t in (trusted, precision)
    ]


def check(call):
    with_level(call, CHECKS.get(call.entry, check_attention))


def with_level(call, run):
    """Run on the call's backend and level."""
    kept = _runtime.attention_common, _runtime.computations
    before = None
    if call.level == "numpy":
        _runtime.attention_common, _runtime.computations = None, _numpy_backend
    else:
        before = _runtime.native.isa()
        _runtime.native.set_isa(call.level)
    try:
        run(call)
    finally:
        _runtime.attention_common, _runtime.computations = kept
        if before is not None:
            _runtime.native.set_isa(before)


def inputs(call):
    """Return q, k, v, scales, and k and v as the reference takes them; heads before rows."""
    (heads, kv_heads), (query_length, key_length), (dim, value_dim) = (
        call.heads, call.lengths, call.dims,
    )  # fmt: skip
    q = array(call, call.batch, heads, query_length, dim)
    k = array(call, call.batch, kv_heads, key_length, dim)
    v = array(call, call.batch, kv_heads, key_length, value_dim)
    if not call.int8:
        return q, k, v, {}, k, v
    (k8, k_scale), (v8, v_scale) = na.quantize_kv(k), na.quantize_kv(v)
    scales = {"k_scale": k_scale, "v_scale": v_scale}
    return q, k8, v8, scales, rounded(k8, k_scale, np.float64), rounded(v8, v_scale, np.float64)


def moved(call, *arrays):
    return [x.swapaxes(1, 2) if call.layout == "blhd" else x for x in arrays]


def check_attention(call):
    q, k, v, scales, k_plain, v_plain = inputs(call)
    options = options_of(call)
    layout = {"layout": call.layout, "num_threads": call.threads}
    if scales and call.layout == "blhd":
        scales = {name: x.swapaxes(1, 2) for name, x in scales.items()}
    arguments = dict(zip("qkv", moved(call, q, k, v), strict=True))
    arguments |= options | layout | scales | {"return_lse": True}
    if call.seed % 3 == 0:
        arguments["out"] = np.full((*arguments["q"].shape[:-1], call.dims[1]), np.nan, q.dtype)
    out, lse = run(call, na.attention, **arguments)
    assert arguments.get("out") is None or out is arguments["out"]
    (expected, expected_lse), (plain, plain_lse) = expectations(
        q, k_plain, v_plain, options, call.dtype
    )
    out, lse = (x.swapaxes(1, 2) if call.layout == "blhd" else x for x in (out, lse))
    assert out.dtype == q.dtype
    compare(out, expected, plain, call)
    compare(lse, expected_lse, plain_lse, call)


def check_stages(call):
    q, k, _, scales, k_plain, _ = inputs(call)
    options = options_of(call)
    if call.entry == "qk_scores":
        options.pop("sinks", None)
    scale = {"k_scale": scales["k_scale"]} if scales else {}
    actual = run(call, getattr(na, call.entry), q, k, **options, **scale, num_threads=call.threads)
    units = np.broadcast_to(np.eye(call.lengths[1]), (*k.shape[:-1], call.lengths[1]))
    (expected, lse), (plain, plain_lse) = expectations(q, k_plain, units, options, call.dtype)
    if call.entry == "attention_received":
        expected, plain = expected.sum(axis=-2), plain.sum(axis=-2)
    elif call.entry == "qk_scores":
        attend = reference.attention(q, k_plain, units, **masks_of(options))[0] > 0
        np.testing.assert_array_equal(np.isneginf(actual[~attend]), True)
        # Weights say nothing about logits that are too small.
        with np.errstate(all="ignore"):
            expected = np.where(expected > 1e-6, np.log(expected) + lse[..., None], np.nan)
            plain = np.where(plain > 1e-6, np.log(plain) + plain_lse[..., None], np.nan)
        actual = np.where(np.isnan(expected), np.nan, actual)
    compare(actual, expected, plain, call)


def check_varlen(call):
    rng = call.rng
    lengths = [(int(rng.integers(0, call.lengths[0] + 1)), int(rng.integers(0, n + 1)))
               for n in rng.integers(0, call.lengths[1] + 1, call.batch)]  # fmt: skip
    options = options_of(call)
    for name in ("kv_lengths", "q_lengths", "q_offset"):
        options.pop(name, None)
    if "tail_mask" in options:
        total, longest = sum(n for n, _ in lengths), max(n for _, n in lengths)
        shape = [n if rng.random() < 0.6 else 1 for n in (call.heads[0], total)]
        options["tail_mask"] = rng.random((*shape, int(rng.integers(0, longest + 1)))) < 0.5
    items = []
    for query_length, key_length in lengths:
        (heads, kv_heads), (dim, value_dim) = call.heads, call.dims
        items.append(
            [
                array(call, 1, heads, query_length, dim)[0],
                array(call, 1, kv_heads, key_length, dim)[0],
                array(call, 1, kv_heads, key_length, value_dim)[0],
            ]
        )
    q, k, v = (
        np.concatenate([x.swapaxes(0, 1) for x in part]) for part in zip(*items, strict=True)
    )
    starts = [np.concatenate([[0], np.cumsum(part)]) for part in zip(*lengths, strict=True)]
    out = run(call, na.attention_varlen, q, k, v, *starts, **options, num_threads=call.threads)
    tail = options.pop("tail_mask", None)
    for i, (one_q, one_k, one_v) in enumerate(items):
        rows = slice(*starts[0][i : i + 2])
        own = {}
        if tail is not None:
            every = np.broadcast_to(tail, (*tail.shape[:-2], len(q), tail.shape[-1]))
            own["tail_mask"] = every[..., rows, :]
        # Dropout depends on the index of a sequence: make this one the last of a batch.
        batch = [np.broadcast_to(x, (i + 1, *x.shape)) for x in (one_q, one_k, one_v)]
        (expected, _), (plain, _) = expectations(*batch, options | own, call.dtype)
        compare(out[rows].swapaxes(0, 1), expected[-1], plain[-1], call)


def check_backward(call):
    call = replace(call, int8=False)
    q, k, v, *_ = inputs(call)
    options = options_of(call)
    precision = np.float64 if call.dtype == "float64" else np.float32
    shape = (*q.shape[:-1], call.dims[1])
    dtypes = [x if call.seed % n else precision for x, n in ((call.dtype, 2), (call.dtype, 3))]
    dout = call.rng.standard_normal(shape).astype(dtypes[0])
    out = np.empty(shape, dtypes[1])
    _, lse = na.attention(q, k, v, **options, out=out, return_lse=True)
    dlse = None if call.seed % 5 else call.rng.standard_normal(lse.shape).astype(precision)
    arrays = [dout, q, k, v, out]
    layout = {"layout": call.layout, "num_threads": call.threads}
    more = {"bias_gradient": "bias" in options} | options | layout
    more["dlse"] = None if dlse is None else moved(call, dlse)[0]
    actual = run(call, na.attention_backward, *moved(call, *arrays, lse), **more)
    trusted = np.longdouble if precision is np.float64 else np.float64
    # The reference takes results that were rounded to 16 bits, but no others.
    results = (out, lse) if out.dtype.itemsize == 2 else ()
    expected = reference.attention_backward(
        *arrays[:4], *results, dlse=dlse, **options, dtype=trusted
    )
    plain = reference.attention_backward(*arrays, lse, dlse=dlse, **options, dtype=precision)
    for i, (x, wanted, one) in enumerate(zip(actual, expected, plain, strict=True)):
        assert (x is None) == (wanted is None)
        if x is not None:
            x = moved(call, x)[0] if i < 3 else x
            compare(x, wanted.astype(np.float64), one, call)


def check_paged(call):
    q, k, v, scales, k_plain, v_plain = inputs(call)
    options = options_of(call)
    lengths = np.asarray(options.pop("kv_lengths", [call.lengths[1]] * call.batch))
    if not {"q_offset", "q_lengths"} & set(options):
        options["q_offset"] = lengths - call.lengths[0]
    size = call.page_size
    per_item = max(1, -(-call.lengths[1] // size))
    table = call.rng.permutation(call.batch * per_item).reshape(call.batch, per_item)

    def in_pages(x):
        pages = np.zeros((table.size, size, *x.shape[1:2], *x.shape[3:]), x.dtype)
        for item in range(call.batch):
            for key in range(x.shape[2]):
                pages[table[item, key // size], key % size] = x[item, :, key]
        return pages

    paged = {name: in_pages(x) for name, x in scales.items()}
    out = run(
        call, na.attention_paged, q, in_pages(k), in_pages(v), table, lengths,
        **options, **paged, num_threads=call.threads,
    )  # fmt: skip
    (expected, _), (plain, _) = expectations(
        q, k_plain, v_plain, options | {"kv_lengths": lengths}, call.dtype
    )
    compare(out, expected, plain, call)


class CachedSequence:
    """The keys and values of one sequence that a cache was given, in float64."""

    def __init__(self, k, v):
        self.k, self.v = k, v
        self.before = self.largest = 0

    def length(self):
        return self.k.shape[1]

    def append(self, k, v):
        self.before = self.length()
        self.k, self.v = (
            np.concatenate([old, new.astype(np.float64)], axis=1)
            for old, new in ((self.k, k), (self.v, v))
        )
        self.largest = max(self.largest, self.length())

    def truncate(self, n, keep_first):
        self.k, self.v = self.k[:, :n], self.v[:, :n]
        if self.length() <= keep_first:
            self.largest = self.length()


def cache_with_history(call, window, keep_first):
    """Return a cache after appends, truncations and copies, its sequences as `CachedSequence`, and
    how many tokens were appended last, if some sequences got fewer."""
    rng = call.rng
    (_, kv_heads), (query_length, _), (dim, value_dim) = call.heads, call.lengths, call.dims
    max_rollback = int(rng.integers(0, 20))
    arguments = {
        "batch": call.batch, "kv_heads": kv_heads, "head_dim": dim, "value_dim": value_dim,
        "dtype": np.dtype(call.dtype), "quantize": call.int8, "window": window,
        "keep_first": keep_first, "max_rollback": max_rollback,
    }  # fmt: skip
    try_wrong(call, na.KVCache, **arguments)
    cache = na.KVCache(**arguments)

    def change(name, *arguments):
        try_wrong(call, getattr(cache.copy(), name), *arguments)  # it may change this copy
        return getattr(cache, name)(*arguments)

    kept = [
        CachedSequence(*(np.zeros((kv_heads, 0, n)) for n in call.dims)) for _ in range(call.batch)
    ]
    padded = None
    for _ in range(int(rng.integers(1, 6))):
        what = rng.random()
        if what < 0.7:
            n = query_length if rng.random() < 0.3 else int(rng.integers(1, 40))
            n = min(n, window or n)
            k = array(call, call.batch, kv_heads, n, dim)
            v = array(call, call.batch, kv_heads, n, value_dim)
            lengths = rng.integers(0, n + 1, call.batch)
            change("append", k, v, lengths)
            padded = n if (lengths < n).any() else None
            if call.int8:
                k, v = (rounded(*na.quantize_kv(x), np.float64) for x in (k, v))
            for i, m in enumerate(lengths):
                kept[i].append(k[i, :, :m], v[i, :, :m])
        elif what < 0.85:
            n = rng.integers(0, 50, call.batch)
            may_be = [
                window is None or m >= min(x.length(), x.largest - max_rollback) or m <= keep_first
                for m, x in zip(n, kept, strict=True)
            ]
            try:
                change("truncate", n)
            except ValueError as error:
                if all(may_be) or "max_rollback" not in str(error):
                    raise
                continue
            assert all(may_be), f"{n} took back more than {max_rollback}"
            padded = None
            for m, x in zip(n, kept, strict=True):
                x.truncate(m, keep_first)
        elif what < 0.95:
            rows = rng.integers(0, call.batch, call.batch)
            parts = np.split(rows, [int(rng.integers(0, call.batch + 1))])
            if rng.random() < 0.5:
                cache = change("select", rows)
            else:
                cache = change("concatenate", [cache.select(part) for part in parts])
            kept = [copy.copy(kept[i]) for i in rows]
        else:
            cache = pickle.loads(pickle.dumps(cache))
    return cache, kept, padded


def check_cache(call):
    """Check attention to the tokens in a cache, or to new tokens, after a random history."""
    rng = call.rng
    (heads, kv_heads), (query_length, _), (dim, _) = call.heads, call.lengths, call.dims
    window = int(rng.integers(1, 40)) if rng.random() < 0.4 else None
    keep_first = int(rng.integers(0, 5)) if window else 0
    cache, kept, padded = cache_with_history(call, window, keep_first)
    assert cache.lengths.tolist() == [x.length() for x in kept]
    q = array(call, call.batch, heads, query_length, dim)
    new = lengths = None
    if rng.random() < 0.4:  # the queries of new tokens, which may exceed the window
        new = [array(call, call.batch, kv_heads, query_length, n) for n in call.dims]
        lengths = rng.integers(0, query_length + 1, call.batch)
        rounded_new = new
        if call.int8:
            rounded_new = [rounded(*na.quantize_kv(x), np.float64) for x in new]
        for i, m in enumerate(lengths):
            kept[i].append(*(x[i, :, :m] for x in rounded_new))
    length = max(x.length() for x in kept)
    options = options_of(call, length)
    counts = options.pop("q_lengths", None)
    for name in ("kv_lengths", "q_offset", "is_causal", *(["window"] if window else [])):
        options.pop(name, None)
    layout = {"layout": call.layout, "num_threads": call.threads}
    if new is not None:

        @functools.wraps(cache.append_and_attend)
        def of_a_copy(*positional, **arguments):
            return cache.copy().append_and_attend(*positional, **arguments)

        out = run(call, of_a_copy, *moved(call, q, *new), lengths, **options, **layout)
        counts = lengths
    else:
        where = {} if counts is None else {"q_lengths": counts}
        if counts is None and padded == query_length:
            counts = [x.length() - x.before for x in kept]
        counts = [query_length] * call.batch if counts is None else counts
        try:
            out = run(call, cache.attend, *moved(call, q), **options, **where, **layout)
        except ValueError as error:
            if window is None or "tokens from" not in str(error):
                raise
            return
    pairs = {
        name: np.broadcast_to(options.pop(name), (call.batch, heads, query_length, length))
        for name in ("mask", "bias") if name in options
    }  # fmt: skip
    tail = options.pop("tail_mask", None)
    if tail is not None:
        tail = np.broadcast_to(tail, (call.batch, heads, query_length, tail.shape[-1]))
    for i, (one, rows, x, count) in enumerate(zip(*moved(call, out), q, kept, counts, strict=True)):
        seen = {name: pair[i, :, :count, : x.length()] for name, pair in pairs.items()}
        if tail is not None:
            seen["tail_mask"] = tail[i, :, :count]
        if window is not None:
            keys = np.arange(x.length())
            positions = x.length() - count + np.arange(count)[:, np.newaxis]
            is_near = (keys < keep_first) | (keys > positions - window)
            seen["mask"] = seen.get("mask", True) & is_near
        (expected, _), (plain, _) = expectations(
            rows[:, :count], x.k, x.v, options | seen | {"is_causal": True}, call.dtype
        )
        compare(one[:, :count], expected, plain, call)
        assert not one[:, count:].any()


def check_merging(call):
    q, k, v, _, _, _ = inputs(Call(**{**fields(call), "int8": False}))
    options = {
        name: value for name, value in options_of(call).items() if name in ("scale", "softcap")
    }
    cut = int(call.rng.integers(0, call.lengths[1] + 1))
    parts = [
        na.attention(q, k[..., part, :], v[..., part, :], **options, return_lse=True)
        for part in (slice(0, cut), slice(cut, None))
    ]
    out, lse = run(call, na.merge_states, parts)
    (expected, expected_lse), (plain, plain_lse) = expectations(q, k, v, options, call.dtype)
    compare(out, expected, plain, call)
    compare(lse, expected_lse, plain_lse, call)


def check_softmax(call):
    shape = (call.batch, *call.lengths)
    scores = (5 * call.rng.standard_normal(shape)).astype(call.dtype)
    mask = call.rng.random(shape) < 0.8 if "mask" in call.options else None
    axis = call.seed % 6 - 3
    actual = run(call, na.masked_softmax, scores, mask, axis=axis)
    with np.errstate(all="ignore"):
        x = scores.astype(np.float64)
        x = x if mask is None else np.where(mask, x, -np.inf)
        top = x.max(axis=axis, keepdims=True, initial=-np.inf)
        x = np.exp(x - np.where(np.isinf(top), 0, top))
        total = x.sum(axis=axis, keepdims=True)
        expected = x / np.where(total == 0, 1, total)
    compare(actual, expected, expected, call)


def check_values(call):
    q, k, v, scales, _, v_plain = inputs(call)
    weights = na.attention_weights(q, k, k_scale=scales.get("k_scale"))
    (v_moved,) = moved(call, v)
    v_scale = scales.get("v_scale")
    if v_scale is not None:
        (v_scale,) = moved(call, v_scale)
    out = run(call, na.aggregate_values, weights, v_moved, layout=call.layout, v_scale=v_scale)
    group = call.heads[0] // call.heads[1]
    wide = [x.astype(np.float64) for x in (weights, np.repeat(v_plain, group, axis=1))]
    expected = wide[0] @ wide[1]
    plain = (wide[0].astype(out.dtype) @ wide[1].astype(out.dtype)).astype(np.float64)
    compare(*moved(call, out), expected, plain, call)


def check_rotary(call):
    (heads, _), (length, _) = call.heads, call.lengths
    dim = 2 * call.dims[0]
    x = array(call, call.batch, heads, length, dim)
    rotary_dim = 2 * int(call.rng.integers(1, dim // 2 + 1))
    positions = call.rng.integers(-50, 5000, (call.batch, 1, length))
    interleaved = bool(call.seed % 2)
    out = run(
        call, na.rotary_embedding, *moved(call, x), positions[:, 0],
        rotary_dim=rotary_dim, interleaved=interleaved, layout=call.layout,
    )  # fmt: skip
    angles = positions[..., np.newaxis] * 10000.0 ** (-np.arange(0, rotary_dim, 2) / rotary_dim)
    wide, expected = x.astype(np.float64), x.astype(np.float64)
    first, second = (
        (slice(0, rotary_dim, 2), slice(1, rotary_dim, 2))
        if interleaved
        else (slice(0, rotary_dim // 2), slice(rotary_dim // 2, rotary_dim))
    )
    a, b = wide[..., first], wide[..., second]
    expected[..., first] = a * np.cos(angles) - b * np.sin(angles)
    expected[..., second] = b * np.cos(angles) + a * np.sin(angles)
    compare(*moved(call, out), expected, expected, call)


def fields(call):
    return {name: getattr(call, name) for name in call.__dataclass_fields__ if name != "rng"}


CHECKS = {
    "attention_varlen": check_varlen,
    "attention_paged": check_paged,
    "attention_backward": check_backward,
    "KVCache": check_cache,
    "attention_weights": check_stages,
    "attention_received": check_stages,
    "qk_scores": check_stages,
    "merge_states": check_merging,
    "masked_softmax": check_softmax,
    "aggregate_values": check_values,
    "rotary_embedding": check_rotary,
}


# ---- the program -------------------------------------------------------------------------------


def fuzz(seconds, first_seed, last):
    """Return how many calls were tried; raise the error of the smallest failing call."""
    end = time.monotonic() + seconds
    tried = 0
    number = first_seed
    while time.monotonic() < end:

        @seed(number)
        @settings(
            max_examples=200,
            deadline=None,
            database=None,
            phases=[Phase.generate, Phase.shrink],
            suppress_health_check=list(HealthCheck),
            print_blob=False,
        )
        @given(calls())
        def run(call):
            nonlocal tried
            tried += 1
            last.write_text(repr(call))
            check(call)

        run()
        number += 1
        if sys.stderr.isatty():
            sys.stderr.write(f"\r\033[K{tried} calls, {max(0, end - time.monotonic()):.0f} s left")
    return tried


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--seed", type=int, default=int(time.time()))
    parser.add_argument("--call", help="one call again")
    parser.add_argument(
        "--last", type=Path, default=Path(tempfile.gettempdir(), f"numattn-call-{os.getpid()}")
    )
    arguments = parser.parse_args()
    faulthandler.enable()
    if arguments.call:
        check(eval(arguments.call))
        print("this call is right")
        return
    print(f"levels {', '.join(LEVELS)}; seed {arguments.seed}; the last call: {arguments.last}")
    tried = fuzz(arguments.seconds, arguments.seed, arguments.last)
    print(f"\n{tried} calls, all of them right")


if __name__ == "__main__":
    main()
