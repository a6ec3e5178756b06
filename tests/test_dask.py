"""Promise: `numattn.dask` gives what `numattn` gives for whole arrays, without tasks in vain."""

import inspect
import itertools
import os
import subprocess
import sys
import time
import tracemalloc
import warnings
from pathlib import Path

import numattn as na
import numpy as np
import pytest
from conftest import DTYPES, named_dtype

dask = pytest.importorskip("dask", "2025.4")
distributed = pytest.importorskip("distributed")
import dask.array as da  # noqa: E402
import numattn.dask as nd  # noqa: E402
from numattn import _dask_problem, _dask_tasks, _runtime  # noqa: E402

B, HQ, HKV, LQ, LK, D = 2, 4, 2, 11, 17, 8
# How far merging in float32 may be off, in units of results of size 1; what 16 bits round to.
TOLERANCES = {"float64": 1e-14, "float32": 3e-6, "float16": 2e-3, "bfloat16": 1.6e-2}
CHUNKS = {
    "whole": ((B,), (HQ,), (LQ,), (LK,)),
    "even": ((1, 1), (2, 2), (4, 4, 3), (6, 6, 5)),
    "uneven": ((2,), (4,), (1, 7, 3), (2, 9, 1, 5)),
    "empty": ((2,), (2, 2), (0, 8, 0, 3), (0, 10, 0, 7)),
    "parts of groups": ((2,), (1, 1, 2), (11,), (5, 5, 5, 2)),
}
RNG = np.random.default_rng(5)
BIAS = RNG.standard_normal((HQ, LQ, LK), dtype=np.float32)
MASK = RNG.random((B, 1, LQ, LK)) < 0.4
MASK[:, :, 3] = False  # a row without keys
SINKS = RNG.standard_normal(HQ)
LENGTHS = {"kv_lengths": [17, 6], "q_lengths": [11, 3]}

OPTIONS = {
    "none": {},
    "mask": {"mask": MASK},
    "mask of keys": {"mask": RNG.random(LK) < 0.5},
    "mask by blocks": {"mask": na.BlockMask.from_dense(MASK, (4, 3))},
    "mask by blocks of all": {"mask": na.BlockMask.from_dense(MASK[0, 0], (2, 8))},
    "mask of nothing": {"mask": np.zeros((LQ, LK), np.bool_)},
    "bias": {"bias": BIAS},
    "bias that masks": {"bias": np.where(MASK[0], BIAS, -np.inf).astype(np.float32)},
    "causal": {"is_causal": True},
    "offset": {"is_causal": True, "q_offset": 2},
    "offsets": {"is_causal": True, "q_offset": [-4, 30]},
    "window": {"window": (3, 1)},
    "one side": {"window": (None, 0)},
    "scale and softcap": {"scale": 0.7, "softcap": 1.5},
    "alibi": {"alibi_slopes": na.alibi_slopes(HQ)},
    "sinks": {"sinks": SINKS},
    "no sink in a head": {"sinks": [0.3, -np.inf, 1.0, 2.0]},
    "lengths of keys": {"kv_lengths": [4, 17]},
    "lengths of queries": {"q_lengths": [0, 9]},
    "padded": {**LENGTHS, "is_causal": True},
    "padded, sinks": {**LENGTHS, "is_causal": True, "sinks": SINKS},
    "sinks, rows without keys": {"mask": MASK, "sinks": SINKS},
    "much": {
        "mask": MASK, "bias": BIAS, "window": (9, 4), "softcap": 3.0, "sinks": SINKS,
        "alibi_slopes": na.alibi_slopes(HQ), "q_offset": [1, 5], "kv_lengths": [15, 9],
    },
}  # fmt: skip


def numbers(rng, *shape, dtype=np.float32):
    return rng.standard_normal(shape).astype(dtype)


def in_layout(x, layout):
    return x if layout == "bhld" else x.swapaxes(1, 2)


def inputs(dtype=np.float32, layout="bhld"):
    rng = np.random.default_rng(3)
    shapes = ((B, HQ, LQ, D), (B, HKV, LK, D), (B, HKV, LK, 5))
    return tuple(in_layout(numbers(rng, *shape, dtype=dtype), layout) for shape in shapes)


def of_dask(q, k, v, chunks, layout="bhld"):
    """Return arrays of dask; k is chunked by heads and keys, v otherwise, head_dim in the way."""
    batch, heads, queries, keys = CHUNKS[chunks]
    all_chunks = (
        (batch, heads, queries, (5, 3)),
        (batch, (1, 1), keys, (8,)),
        (1, 1, 4, 5),
    )
    order = (0, 1, 2, 3) if layout == "bhld" else (0, 2, 1, 3)
    return tuple(
        da.from_array(x, chunks=tuple(own[axis] for axis in order))
        for x, own in zip((q, k, v), all_chunks, strict=True)
    )


def compute(*arrays):
    return dask.compute(*arrays, scheduler="synchronous")


def assert_close(actual, expected, dtype=None):
    name = (dtype or expected.dtype).name
    assert actual.dtype == expected.dtype
    assert actual.shape == expected.shape
    np.testing.assert_allclose(
        actual.astype(np.float64), expected.astype(np.float64), rtol=TOLERANCES[name],
        atol=TOLERANCES[name],
    )  # fmt: skip


def assert_same_attention(arrays, chunked, split_every=None, **options):
    """Check out and lse, and that arrays of dask say what they are."""
    expected, expected_lse = na.attention(*arrays, **options, return_lse=True)
    out, lse = nd.attention(*chunked, **options, return_lse=True, split_every=split_every)
    (alone,) = compute(nd.attention(*chunked, **options, split_every=split_every))
    for x, wanted in ((out, expected), (lse, expected_lse)):
        assert isinstance(x, da.Array)
        assert x.shape == wanted.shape
        assert x.dtype == x._meta.dtype == wanted.dtype
        assert x._meta.ndim == wanted.ndim
    computed, computed_lse = compute(out, lse)
    assert_close(computed, expected)
    assert_close(computed_lse, expected_lse)
    np.testing.assert_array_equal(alone, computed)
    for x in (out, lse):
        (last,) = compute(x.blocks[(-1,) * x.ndim])
        assert last.shape == tuple(sizes[-1] for sizes in x.chunks)
    return out, lse


@pytest.mark.parametrize(
    ("chunks", "layout"), [*((name, "bhld") for name in CHUNKS), ("even", "blhd")]
)
@pytest.mark.parametrize("name", OPTIONS)
def test_options(name, chunks, layout):
    arrays = inputs(layout=layout)
    chunked = of_dask(*arrays, chunks, layout)
    assert_same_attention(arrays, chunked, 2, **OPTIONS[name], layout=layout)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("split_every", [None, 2, 3, 100])
def test_dtypes(dtype, split_every):
    arrays = inputs(named_dtype(dtype))
    options = {"is_causal": True, "sinks": SINKS, "softcap": 3.0}
    chunked = [x.rechunk((2, -1, 2, -1)) for x in of_dask(*arrays, "whole")]
    assert_same_attention(arrays, chunked, split_every, **options)


def test_16_bits_are_rounded_once():
    """The result is the rounded one of float32."""
    arrays = inputs(np.float16)
    chunked = [x.rechunk((2, -1, 2, -1)) for x in of_dask(*arrays, "whole")]
    wide = [x.astype(np.float32) for x in chunked]
    out, expected = compute(
        nd.attention(*chunked, split_every=2), nd.attention(*wide, split_every=2)
    )
    steps = out.view(np.int16).astype(int) - expected.astype(np.float16).view(np.int16)
    assert np.abs(steps).max() <= 1  # of the kernels' own, in float32
    assert (steps != 0).mean() < 0.01


@pytest.mark.parametrize("seed", range(20))
def test_random_chunks_and_options(seed):
    rng = np.random.default_rng(seed)
    group, kv_heads = rng.integers(1, 4, 2)
    batch = tuple(rng.integers(1, 4, rng.integers(0, 3)))
    lq, lk = rng.integers(1, 30, 2)
    shapes = (
        (*batch, group * kv_heads, lq, 8),
        (*(n if rng.random() < 0.7 else 1 for n in batch), kv_heads, lk, 8),
        (*batch[rng.integers(0, len(batch) + 1) :], kv_heads, lk, 4),
    )
    arrays = [numbers(rng, *shape) for shape in shapes]
    chunked = [da.from_array(x, chunks=tuple(map(cut, x.shape))) for x in arrays]

    options = {}
    for wanted, some in (
        ("is_causal", lambda: True),
        ("window", lambda: tuple(int(n) for n in rng.integers(0, 20, 2))),
        ("softcap", lambda: 2.0),
        ("sinks", lambda: numbers(rng, group * kv_heads)),
        ("q_offset", lambda: rng.integers(-5, 40, batch)),
        ("kv_lengths", lambda: rng.integers(0, lk + 1, batch)),
        ("q_lengths", lambda: rng.integers(0, lq + 1, batch)),
        ("mask", lambda: rng.random((group * kv_heads, 1, lk)) < 0.7),
        ("bias", lambda: numbers(rng, lq, 1)),
    ):
        if rng.random() < 0.3:
            options[wanted] = some()
    if "kv_lengths" in options and lq > 1:
        options.setdefault("q_offset", 3)
    assert_same_attention(arrays, chunked, int(rng.integers(2, 5)), **options)
    assert_same_gradients(rng, arrays, chunked, **options)


def cut(length):
    """Return chunk sizes of an axis, of any kind."""
    rng = np.random.default_rng(length)
    marks = np.sort(rng.integers(0, length + 1, rng.integers(0, min(5, length))))
    return tuple(int(n) for n in np.diff([0, *marks, length]))


def test_one_head_and_mixed_axes(rng):
    q, k, v = numbers(rng, 9, 4), numbers(rng, 12, 4), numbers(rng, 12, 3)
    chunked = [da.from_array(x, chunks=(4, 2)) for x in (q, k, v)]
    mask = rng.random((9, 12)) < 0.8
    for layout in ("bhld", "blhd"):
        out, lse = assert_same_attention(
            (q, k, v), chunked, 2, mask=mask, sinks=[0.5], layout=layout
        )
        assert out.ndim == 2
        assert lse.ndim == 1
    many = numbers(rng, 2, 9, 3, 4)  # blhd, three heads that share one of two axes
    dask_many = da.from_array(many, chunks=(1, 4, 2, 4))
    assert_same_attention((many, k, v), [dask_many, *chunked[1:]], 2, layout="blhd")


def test_empty_arrays(rng):
    for lq, lk, heads in ((0, 5, 2), (5, 0, 2), (0, 0, 2), (5, 6, 0)):
        arrays = [numbers(rng, heads, n, 4) for n in (lq, lk, lk)]
        chunked = [da.from_array(x, chunks=(1, 3, 4)) for x in arrays]
        sinks = numbers(rng, heads)
        assert_same_attention(arrays, chunked, sinks=sinks)
        assert_same_gradients(rng, arrays, chunked, sinks=sinks)


@pytest.mark.parametrize("kind", ["NumPy", "dask", "dask, other chunks"])
def test_masks_and_biases_of_both_kinds(kind):
    arrays = inputs()
    options = {"mask": MASK, "bias": BIAS}
    given = dict(options)
    if kind != "NumPy":
        size = 3 if kind == "dask" else "auto"
        given = {n: da.from_array(x, chunks=size) for n, x in options.items()}
    out = nd.attention(*of_dask(*arrays, "even"), **given)
    assert_close(compute(out)[0], na.attention(*arrays, **options))


def test_chunks_of_numpy_arrays_are_those_of_the_others():
    q, k, v = (x[:, :, :11] for x in inputs())
    dask_q, dask_k, _ = (x[:, :, :11] for x in of_dask(*inputs(), "even"))
    expected = na.attention(q, k, v)
    for arrays, chunks in (
        ((dask_q, k, v), (4, 4, 3)),
        ((q, dask_k, v), (6, 5)),
        ((q[:, :, :5], dask_k, v), (5,)),
    ):
        out = nd.attention(*arrays)
        assert out.chunks[2] == chunks
        assert_close(compute(out)[0], expected[:, :, : sum(chunks)])


@pytest.mark.parametrize("scheduler", ["synchronous", "threads"])
def test_schedulers(scheduler):
    arrays = inputs()
    out = nd.attention(*of_dask(*arrays, "uneven"), is_causal=True)
    assert_close(out.compute(scheduler=scheduler), na.attention(*arrays, is_causal=True))


# ---- gradients ---------------------------------------------------------------------------------


def assert_same_gradients(rng, arrays, chunked, dlse=False, **options):
    out, lse = na.attention(*arrays, **options, return_lse=True)
    dout = numbers(rng, *out.shape, dtype=out.dtype)
    given = {"dlse": numbers(rng, *lse.shape, dtype=lse.dtype)} if dlse else {}
    wants_bias = options.get("bias") is not None
    expected = na.attention_backward(
        dout, *arrays, out, lse, **given, bias_gradient=wants_bias, **options
    )
    actual = nd.attention_backward(
        dout, *chunked, out, lse, **given, bias_gradient=wants_bias, **options, split_every=2
    )
    assert [x is None for x in actual] == [x is None for x in expected]
    for name, x, computed, wanted in zip(
        actual._fields, actual, compute(*actual), expected, strict=True
    ):
        if wanted is None:
            continue
        assert x.shape == wanted.shape, name
        assert x.dtype == computed.dtype == wanted.dtype, name
        size = max(1.0, float(np.abs(wanted.astype(np.float64)).max(initial=0)))
        tolerance = 4 * size * TOLERANCES[arrays[0].dtype.name]
        np.testing.assert_allclose(
            computed.astype(np.float64), wanted.astype(np.float64), atol=tolerance, err_msg=name
        )


@pytest.mark.parametrize("chunks", ["even", "empty", "parts of groups"])
@pytest.mark.parametrize("name", OPTIONS)
def test_gradients(name, chunks, rng):
    arrays = inputs()
    assert_same_gradients(rng, arrays, of_dask(*arrays, chunks), dlse=True, **OPTIONS[name])


@pytest.mark.parametrize("layout", ["bhld", "blhd"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_gradients_of_dtypes_and_layouts(dtype, layout, rng):
    arrays = inputs(named_dtype(dtype), layout)
    chunked = of_dask(*arrays, "even", layout)
    assert_same_gradients(rng, arrays, chunked, layout=layout, is_causal=True, **LENGTHS)


def test_gradients_of_what_is_broadcast(rng):
    q, k, v = numbers(rng, 3, 4, 9, 8), numbers(rng, 1, 2, 11, 8), numbers(rng, 2, 11, 8)
    chunked = [da.from_array(x, chunks=tuple(map(cut, x.shape))) for x in (q, k, v)]
    for bias in (numbers(rng, 4, 1, 11), numbers(rng, 3, 1, 9, 1), numbers(rng, 1, 11)):
        assert_same_gradients(rng, (q, k, v), chunked, bias=bias, sinks=numbers(rng, 4))


def test_the_gradient_of_one_bias_for_all(rng):
    arrays, bias = inputs(), np.float32(0.5)
    out, lse = na.attention(*arrays, bias=bias, return_lse=True)
    expected = na.attention_backward(out, *arrays, out, lse, bias=bias, bias_gradient=True).bias
    gradients = nd.attention_backward(
        out, *of_dask(*arrays, "even"), out, lse, bias=bias, bias_gradient=True
    )
    np.testing.assert_allclose(gradients.bias.compute(), expected, atol=1e-4)


def test_sums_of_gradients_of_16_bits_are_rounded_once():
    """1000 keys add the same to dq: a sum in float16 would stop growing."""
    q = np.zeros((1, 1, 1), np.float16)
    k = np.concatenate([np.ones((1, 2000, 1)), -np.ones((1, 2000, 1))], axis=1).astype(np.float16)
    dout = np.full((1, 1, 1), 8, np.float16)
    chunked = [da.from_array(x, chunks=(1, 20, 1)) for x in (q, k, k)]
    out, lse = na.attention(q, k, k, scale=1.0, return_lse=True)
    (dq,) = compute(nd.attention_backward(dout, *chunked, out, lse, scale=1.0).q)
    assert dq.item() == na.attention_backward(dout, q, k, k, out, lse, scale=1.0).q.item() == 8


# ---- the graph ---------------------------------------------------------------------------------


def tasks(x, what):
    """Return the tasks of a graph that call one of the functions of tasks."""
    graph = x.__dask_graph__()
    return [task for task in graph.values() if getattr(task, "func", None) is what]


def test_names_are_deterministic_and_tell_calls_apart():
    arrays = inputs()
    calls = [
        {},
        {"is_causal": True},
        {"q_offset": 1, "is_causal": True},
        {"softcap": 2.0},
        {"softcap": 3.0},
        {"scale": 0.3},
        {"window": (2, 2)},
        {"sinks": SINKS},
        {"sinks": SINKS + 1},
        {"kv_lengths": [3, 4]},
        {"kv_lengths": [4, 4]},
        {"q_lengths": [4, 4]},
        {"mask": MASK},
        {"mask": ~MASK},
        {"bias": BIAS},
        {"alibi_slopes": SINKS},
        {"split_every": 3},
        {"num_threads": None},
    ]
    names = [nd.attention(*of_dask(*arrays, "even"), **options).name for options in calls]
    again = [nd.attention(*of_dask(*arrays, "even"), **options).name for options in calls]
    assert names == again
    assert len(set(names)) == len(names)
    for other in (inputs(np.float64), [x + 1 for x in arrays]):
        assert nd.attention(*of_dask(*other, "even")).name not in names
    out, lse = nd.attention(*of_dask(*arrays, "even"), return_lse=True)
    assert len({*names, out.name, lse.name}) == len(names) + 2
    gradients = [nd.attention_backward(out, *of_dask(*arrays, "even"), out, lse) for _ in range(2)]
    assert gradients[0].k.name == gradients[1].k.name
    assert gradients[0].k.name != gradients[0].v.name


def test_keys_that_are_equal_are_equal_tasks():
    x, sinks = da.zeros((1, 32, 4), chunks=(1, 2, 4), dtype=np.float32), np.ones(1, np.float32)
    mask = np.zeros((32, 32), np.bool_)
    mask[:, 0] = mask[:, 16:] = True
    masks = [mask, da.from_array(mask, chunks=2), na.BlockMask.from_dense(mask, (2, 2))]
    graphs, dtypes = {}, {}
    for mask, given in itertools.product(masks, (sinks, sinks.astype("f8"))):
        options = {"mask": mask, "sinks": given}
        out, lse = nd.attention(x, x, x, **options, return_lse=True)
        for one in (out, lse, *nd.attention_backward(out, x, x, x, out, lse, **options)):
            if one is None:
                continue
            assert dtypes.setdefault(one.name, one.dtype) == one.dtype
            for key, task in dict(one.__dask_graph__()).items():
                read = getattr(task, "dependencies", None)
                assert graphs.setdefault(key, read) == read


def test_nothing_is_computed_when_the_graph_is_made():
    def fail(block):
        raise AssertionError("computed")

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        q, k, v = (
            x.map_blocks(fail, dtype=x.dtype, meta=x._meta) for x in of_dask(*inputs(), "even")
        )
        mask = da.from_array(MASK, chunks=4).map_blocks(fail, dtype=bool, meta=np.empty((0,) * 4))
        mask = mask.astype(bool)
        out, lse = nd.attention(q, k, v, mask=mask, return_lse=True)
        nd.attention_backward(out, q, k, v, out, lse, mask=mask)
    with pytest.raises(AssertionError, match="computed"):
        compute(out)


def test_layers():
    out = nd.attention(*of_dask(*inputs(), "even"), split_every=2)
    layers = out.__dask_graph__().layers
    assert out.name in layers
    assert len(layers[out.name]) == out.npartitions
    assert out.name.startswith("attention-")
    out.__dask_graph__().validate()
    q, k, v = of_dask(*inputs(), "even")
    lse = da.zeros((B, HQ, LQ), chunks=(1, 2, 4), dtype=np.float32)
    for x in nd.attention_backward(q[..., :5], q, k, v, q[..., :5], lse, sinks=SINKS):
        if x is not None:
            x.__dask_graph__().validate()


def pairs_of(*arrays, **options):
    """Return the pairs of chunks that have tasks, by folds and by gradients."""
    out, lse = nd.attention(*arrays, **options, return_lse=True)
    folded = sum(len(task.args[2].args) for task in tasks(out, _dask_tasks.fold))
    gradients = nd.attention_backward(out, *arrays, out, lse, **options)
    assert len(tasks(gradients.q, _dask_tasks.pair_gradients)) == folded
    return folded


def test_chunks_that_are_excluded_make_no_tasks():
    x = da.zeros((1, 80, 4), chunks=(1, 10, 4), dtype=np.float32)
    assert pairs_of(x, x, x) == 64
    assert pairs_of(x, x, x, is_causal=True) == 36
    assert pairs_of(x, x, x, is_causal=True, q_offset=-10) == 28
    assert pairs_of(x, x, x, is_causal=True, q_offset=-1) == 36
    assert pairs_of(x, x, x, is_causal=True, q_offset=1) == 36 + 7
    assert pairs_of(x, x, x, window=(0, 0)) == 8
    assert pairs_of(x, x, x, window=(1, 0)) == 15
    assert pairs_of(x, x, x, window=(10, 0)) == 15
    assert pairs_of(x, x, x, window=(11, 0)) == 15 + 6
    assert pairs_of(x, x, x, window=(1, 1)) == 22
    assert pairs_of(x, x, x, kv_lengths=20) == 16
    assert pairs_of(x, x, x, kv_lengths=21) == 24
    assert pairs_of(x, x, x, q_lengths=20, kv_lengths=20, is_causal=True) == 3
    mask = np.zeros((80, 80), np.bool_)
    mask[15, 33] = True
    assert pairs_of(x, x, x, mask=mask) == 1
    assert pairs_of(x, x, x, mask=mask, is_causal=True) == 0
    assert pairs_of(x, x, x, mask=mask.any(axis=0)) == 8
    assert pairs_of(x, x, x, mask=da.from_array(mask, chunks=10)) == 64  # nobody has looked
    assert pairs_of(x, x, x, mask=na.BlockMask.from_dense(mask)) == 1
    assert pairs_of(x, x, x, mask=na.BlockMask.documents([20, 60])) == 4 + 36
    both = da.zeros((2, 80, 4), chunks=(1, 10, 4), dtype=np.float32)
    of_heads = np.stack([mask, np.roll(mask, 40, axis=0)])
    for given in (of_heads, na.BlockMask.from_dense(of_heads, (16, 16))):
        assert pairs_of(both, both, both, mask=given) == 2
        assert pairs_of(both.rechunk((2, 10, 4)), x, x, mask=given) == 2


def test_batch_items_exclude_chunks_of_their_own():
    x = da.zeros((2, 1, 40, 4), chunks=(1, 1, 10, 4), dtype=np.float32)
    assert pairs_of(x, x, x, kv_lengths=[10, 0]) == 4
    together = x.rechunk((2, 1, 10, 4))
    assert pairs_of(together, x, x, kv_lengths=[10, 0]) == 4


def test_queries_without_tasks_read_nothing():
    x = da.zeros((1, 80, 4), chunks=(1, 10, 4), dtype=np.float32)
    out = nd.attention(x, x, x, kv_lengths=0)
    assert len(tasks(out, _dask_tasks.without_keys)) == 8
    assert not tasks(out, _dask_tasks.fold)


def test_heads_of_a_group_may_be_in_chunks_of_their_own():
    q = da.zeros((8, 20, 4), chunks=(2, 10, 4), dtype=np.float32)
    k = da.zeros((2, 20, 4), chunks=(2, 10, 4), dtype=np.float32)
    assert nd.attention(q, k, k).chunks[0] == (2, 2, 2, 2)
    assert nd.attention(q.rechunk((3, 10, 4)), k, k).chunks[0] == (8,)  # two groups in one chunk
    assert nd.attention(q.rechunk((3, 10, 4)), k.rechunk((1, 10, 4)), k).chunks[0] == (4, 4)
    assert nd.attention(q.rechunk((4, 10, 4)), k, k).chunks[0] == (4, 4)


def test_a_million_tokens():
    n, chunk = 2**20, 2**14
    x = da.empty((8, n, 64), chunks=(8, chunk, 64), dtype=np.float32)
    begin = time.perf_counter()
    out = nd.attention(x, x, x, is_causal=True)
    graph = dask.optimize(out)[0].__dask_graph__()
    seconds = time.perf_counter() - begin
    assert sum(len(task.args[2].args) for task in tasks(out, _dask_tasks.fold)) == 64 * 65 / 2
    assert len(graph) <= 1000  # the bar is 10,000
    assert seconds <= 3


def test_split_every_follows_dask():
    x = da.zeros((1, 80, 4), chunks=(1, 10, 4), dtype=np.float32)

    def folds():
        return len(tasks(nd.attention(x, x, x), _dask_tasks.fold))

    assert folds() == 16
    with dask.config.set(split_every=8):
        assert folds() == 8


def test_a_task_has_one_thread_unless_told_otherwise():
    x = da.zeros((1, 20, 4), chunks=(1, 10, 4), dtype=np.float32)
    for given, wanted in (({}, 1), ({"num_threads": 3}, 3), ({"num_threads": None}, None)):
        for task in tasks(nd.attention(x, x, x, **given), _dask_tasks.fold):
            assert task.args[0].options["num_threads"] == wanted


@pytest.mark.thread_unsafe
@pytest.mark.skipif(_runtime.native is None, reason="NumPy's scratch is linear in the lengths")
@pytest.mark.parametrize("gives", ["state", "out"])
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_memory_of_a_fold(dtype, gives, rng):
    """A task needs four chunks at most beyond those that it reads, its result among them."""
    q, k, v = (numbers(rng, 2, 8192, 64, dtype=dtype) for _ in range(3))
    chunked = [da.from_array(x, chunks=x.shape) for x in (q, k, v)]
    options = dict.fromkeys(("mask", "bias", "q_offset", "window", "scale", "softcap"))
    options |= dict.fromkeys(("alibi_slopes", "sinks", "kv_lengths", "q_lengths"))
    options |= {"is_causal": False, "layout": "bhld", "num_threads": 1}
    rows = _dask_problem.check(*chunked, options, None).meetings[0].rows
    some_k, some_v = k[:, :256], v[:, :256]
    keys = [slice(n, n + 256) for n in range(0, 1024, 256)]
    arguments = (rows, q, [some_k] * 4, [some_v] * 4, [], [], keys, False)
    _dask_tasks.fold(*arguments, gives)  # what is allocated once
    tracemalloc.start()
    state = _dask_tasks.fold(*arguments, gives)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.reset_peak()
    before, _ = tracemalloc.get_traced_memory()
    if gives == "state":
        _dask_tasks.merge(rows, [state] * 4, "out")
    _, peak_of_merge = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak <= 4 * q.nbytes
    assert peak_of_merge - before <= 4 * q.nbytes


# ---- machines ----------------------------------------------------------------------------------


@pytest.mark.thread_unsafe
def test_two_processes():
    """All dtypes cross the borders of processes."""
    with (
        dask.config.set({"distributed.worker.profile.enabled": False}),
        distributed.LocalCluster(
            n_workers=2, threads_per_worker=1, processes=True, dashboard_address=None
        ) as cluster,
        distributed.Client(cluster) as client,
    ):
        for dtype in DTYPES:
            arrays = inputs(named_dtype(dtype))
            chunked = [x.rechunk((1, -1, 4, -1)) for x in of_dask(*arrays, "whole")]
            options = {"is_causal": True, "sinks": SINKS, "mask": MASK}
            out, lse = nd.attention(*chunked, **options, split_every=2, return_lse=True)
            gradients = nd.attention_backward(out, *chunked, out, lse, **options)
            results = client.compute([out, lse, gradients.k], sync=True)
            expected = na.attention(*arrays, **options, return_lse=True)
            assert_close(results[0], expected[0])
            assert_close(results[1], expected[1])
            of_k = na.attention_backward(expected[0], *arrays, *expected, **options).k
            tolerance = 8 * TOLERANCES[dtype]
            np.testing.assert_allclose(
                results[2].astype(np.float64), of_k.astype(np.float64), atol=tolerance
            )


@pytest.mark.thread_unsafe
def test_the_example_runs():
    example = Path(__file__).parent.parent / "examples" / "long_context.py"
    run = subprocess.run(
        [sys.executable, example, "--tokens", "2048", "--chunk", "512"],
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    assert "differ by at most" in run.stdout


# ---- bad input ---------------------------------------------------------------------------------


def bad_calls():
    q, k, v = of_dask(*inputs(), "even")
    unknown = k[:, :, da.from_array(np.arange(LK) > 3, chunks=4)]
    return {
        "NumPy alone": (inputs(), {}, TypeError, "q, k, v: got NumPy arrays only"),
        "unknown chunks": ((q, unknown, v), {}, ValueError, "k: got chunks of unknown size"),
        "dtypes": ((q, k.astype("f8"), v), {}, TypeError, "q float32, k float64"),
        "head_dim": ((q, k[..., :3], v), {}, ValueError, r"k: got head_dim 3, expected 8"),
        "keys": ((q, k, v[:, :, :3]), {}, ValueError, r"v: got 3 keys, expected 17"),
        "heads": ((q[:, :3], k, v), {}, ValueError, "q: got 3 heads, expected a multiple"),
        "batch": ((q, k[[0, 1, 1]], v), {}, ValueError, "leading axes that broadcast"),
        "integers": ((q.astype("i4"), k, v), {}, TypeError, "q: got dtype int32"),
        "8 bits": ((q, k.astype("i1"), v), {}, TypeError, "k: got dtype int8, expected floats"),
        "no v": ((q, k, None), {}, TypeError, "v: got"),
        "float mask": ((q, k, v), {"mask": q}, TypeError, "mask: got dtype float32"),
        "mask": ((q, k, v), {"mask": MASK[..., 1:]}, ValueError, r"mask: got shape \(2, 1, 11, 16"),
        "mask by blocks": (
            (q, k, v), {"mask": na.BlockMask.causal(3, 3)}, ValueError, "mask: got a BlockMask of",
        ),
        "bias": ((q, k, v), {"bias": BIAS[1:]}, ValueError, r"bias: got shape \(3, 11, 17\)"),
        "dask sinks": ((q, k, v), {"sinks": q[0, :, 0, 0]}, TypeError, "sinks: got a dask array, "),
        "sinks": ((q, k, v), {"sinks": [1.0]}, ValueError, r"sinks: got shape \(1,\)"),
        "split_every": ((q, k, v), {"split_every": 1}, ValueError, "split_every: got 1"),
        "no number": ((q, k, v), {"split_every": "2"}, TypeError, "split_every: got '2'"),
        "threads": ((q, k, v), {"num_threads": 0}, ValueError, "num_threads: got 0"),
        "layout": ((q, k, v), {"layout": "x"}, ValueError, "layout: got 'x'"),
        "lengths": (
            (q, k, v), {"kv_lengths": [3, 4], "is_causal": True}, ValueError, "do not say at which",
        ),
        "too long": ((q, k, v), {"kv_lengths": 18}, ValueError, "kv_lengths: got 18"),
        "unknown": ((q, k, v), {"masks": 1}, TypeError, r"numattn.dask.attention.*'masks'"),
        "attn_mask": ((q, k, v), {"attn_mask": 1}, TypeError, "did you mean `mask=`"),
        "tail_mask": ((q, k, v), {"tail_mask": MASK}, TypeError, "tail_mask.*`mask=`"),
        "out": ((q, k, v), {"out": 1}, TypeError, "'out'.*dask.array.store"),
        "dropout": ((q, k, v), {"dropout": 0.1}, TypeError, "chunks have no dropout, "),
    }  # fmt: skip


@pytest.mark.parametrize("name", bad_calls())
def test_bad_input(name):
    arrays, options, error, message = bad_calls()[name]
    with pytest.raises(error, match=message):
        nd.attention(*arrays, **options)
    if name != "out":  # which is an argument there
        out, lse = nd.attention(*of_dask(*inputs(), "even"), return_lse=True)
        with pytest.raises(error, match=message):
            nd.attention_backward(out, *arrays, out, lse, **options)


@pytest.mark.parametrize("name", ["k", "v"])
def test_chunks_that_are_not_what_their_array_says(name):
    x = da.zeros((1, 32, 4), chunks=(1, 16, 4), dtype=np.float32)
    arrays = {"q": x, "k": x, "v": x}
    arrays |= dict.fromkeys(("k", "v"), x.map_blocks(lambda chunk: chunk[:, :3], dtype=x.dtype))
    with pytest.raises(ValueError, match="k: got a chunk of 3 keys, expected 16"):
        nd.attention(**arrays).compute()
    with pytest.raises(ValueError, match="got"):
        nd.attention(**arrays | {name: x}).compute()
    with pytest.raises(ValueError, match="k: got a chunk of 3 keys, expected 16"):
        nd.attention_backward(x, *arrays.values(), x, x[..., 0]).q.compute()


def test_bad_results():
    arrays = of_dask(*inputs(), "even")
    out, lse = nd.attention(*arrays, return_lse=True)
    for results, options, error, message in (
        (
            (out[:, 1:], out, lse),
            {},
            ValueError,
            r"dout: got shape \(2, 3, 11, 5\)",
        ),
        ((out, out.astype("f8"), lse), {}, TypeError, "out: got dtype float64"),
        ((out, out, lse[..., 1:]), {}, ValueError, r"lse: got shape \(2, 4, 10\)"),
        ((out, out, lse), {"dlse": lse.astype("f8")}, TypeError, "dlse: got dtype float64"),
        ((out, out, lse), {"bias_gradient": True}, ValueError, "bias_gradient: got True without"),
        ((out, out, lse), {"return_lse": True}, TypeError, "attention_backward.*'return_lse'"),
    ):
        dout, *rest = results
        with pytest.raises(error, match=message):
            nd.attention_backward(dout, *arrays, *rest, **options)


def test_the_package_does_not_import_it():
    code = (
        "import sys, numattn\n"
        "assert not {'dask', 'distributed', 'numattn.dask'} & set(sys.modules)\n"
        "sys.modules['dask'] = None\n"
        "import numattn.dask\n"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "pip install 'numattn[dask]'" in run.stderr


def test_another_form_of_graphs_is_refused_by_name():
    environment = {**os.environ, "DASK_ARRAY__QUERY_PLANNING": "True"}
    run = subprocess.run(
        [sys.executable, "-c", "import numattn.dask"],
        capture_output=True, text=True, env=environment,
    )  # fmt: skip
    assert "ImportError: numattn.dask: got dask's setting array.query-planning" in run.stderr


@pytest.mark.parametrize("function", [nd.attention, nd.attention_backward])
def test_options_are_those_of_arrays_in_memory(function):
    ours = set(inspect.signature(function).parameters)
    theirs = set(inspect.signature(getattr(na, function.__name__)).parameters)
    assert theirs - ours == set(nd._NOT_HERE) & theirs - ours
    assert set(nd._NOT_HERE) <= set(inspect.signature(na.attention).parameters)
    assert ours - theirs == {"split_every"}
