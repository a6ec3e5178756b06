"""Promise: the stages by themselves are those of `attention`, with every option."""

import functools

import numattn as na
import numpy as np
import pytest
from checks import assert_within, error_factor
from conftest import named_dtype
from numattn import _reference as reference
from test_memory import added_peak, needs_linux
from test_options import ALONE as OF_ATTENTION

ALONE = {name: options for name, options in OF_ATTENTION.items() if "dropout" not in options}
FOREIGN = np.dtype(np.float32).newbyteorder()
SHAPES = [(1, 1), (2, 3), (5, 7), (15, 17), (16, 16), (33, 31), (65, 63), (90, 111), (200, 400)]


def expected_weights(q, k, dtype, matmul=np.matmul, **options):
    """Weights are what attention makes of values that are unit vectors."""
    units = np.broadcast_to(np.eye(k.shape[-2]), (*k.shape[:-1], k.shape[-2]))
    return reference.attention(q, k, units, dtype=dtype, matmul=matmul, **options)


def trusted_weights(q, k, **options):
    """Return weights and lse to compare with: float64, or long double for float64."""
    trusted = np.longdouble if q.dtype == np.float64 else np.float64
    return expected_weights(q, k, trusted, **options)


def assert_weights(weights, q, k, factor=None, expected=None, **options):
    precision = np.float64 if q.dtype == np.float64 else np.float32
    if expected is None:
        expected, _ = trusted_weights(q, k, **options)
    plain = [
        expected_weights(q, k, precision, matmul, **options)[0]
        for matmul in (np.matmul, reference.matmul_by_einsum)
    ]
    assert weights.dtype == precision
    assert weights.shape == expected.shape
    assert_within(weights, plain, expected, factor or 2 * error_factor())
    assert (weights[expected == 0] == 0).all()


def few_heads(dtype):
    """Return q, k and v of two batch items, the same for every level."""
    rng = np.random.default_rng(20240607)
    shapes = ((2, 4, 90, 16), (2, 2, 111, 16), (2, 2, 111, 20))
    return tuple(rng.standard_normal(shape).astype(dtype) for shape in shapes)


@functools.cache
def trusted_weights_with(name, dtype_name):
    """Long double is slow, and all levels have the same answer."""
    q, k, _ = few_heads(named_dtype(dtype_name))
    return trusted_weights(q, k, **ALONE[name])


@pytest.mark.parametrize("name", ALONE)
def test_weights_with_every_option(dtype, name):
    q, k, v = few_heads(dtype)
    options = ALONE[name]
    weights = na.attention_weights(q, k, **options)
    expected, _ = trusted_weights_with(name, dtype.name)
    assert_weights(weights, q, k, expected=expected, **options)
    by_stages = na.aggregate_values(weights, v)
    out = na.attention(q, k, v, **options)
    assert by_stages.dtype == out.dtype
    tolerance = {8: 1e-13, 4: 1e-5, 2: 2e-2}[dtype.itemsize]
    np.testing.assert_allclose(
        by_stages.astype(float), out.astype(float), rtol=tolerance, atol=tolerance
    )


@pytest.mark.parametrize(
    "name", [name for name, options in ALONE.items() if "sinks" not in options]
)
def test_scores_with_every_option(dtype, name):
    q, k, _ = few_heads(dtype)
    precision = np.float64 if dtype == np.float64 else np.float32
    scores = na.qk_scores(q, k, **ALONE[name])
    assert scores.dtype == precision

    weights, lse = trusted_weights_with(name, dtype.name)
    with np.errstate(all="ignore"):
        expected = np.where(weights > 0, np.log(weights) + lse[..., None], -np.inf)
    np.testing.assert_array_equal(np.isneginf(scores), np.isneginf(expected))
    seen = np.isfinite(expected)
    tolerance = 1e-13 if precision is np.float64 else 1e-5
    np.testing.assert_allclose(scores[seen], expected[seen].astype(float), tolerance, tolerance)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("d", [1, 33, 64])
def test_shapes(backend, arrays, shape, d):
    lq, lk = shape
    q, k, _ = arrays(hq=6, hkv=2, lq=lq, lk=lk, d=d)
    assert_weights(na.attention_weights(q, k, is_causal=True), q, k, is_causal=True, factor=8)
    expected, _ = expected_weights(q, k, np.float64, is_causal=True)
    received = na.attention_received(q, k, is_causal=True)
    np.testing.assert_allclose(received, expected.sum(axis=-2), rtol=2e-5, atol=1e-6)


@pytest.mark.parametrize("name", ALONE)
def test_received_with_every_option(dtype, arrays, name):
    q, k, _ = arrays(2, hq=4, hkv=2, lq=90, lk=111, d=16, dtype=dtype)
    expected, _ = expected_weights(q, k, np.float64, **ALONE[name])
    received = na.attention_received(q, k, **ALONE[name])
    assert received.shape == (2, 4, 111)
    np.testing.assert_allclose(received, expected.sum(axis=-2), rtol=5e-5, atol=1e-5)


def test_masks_and_biases(backend, arrays, rng):
    q, k, v = arrays(2, hq=4, hkv=2, lq=90, lk=110, d=16)
    mask = rng.random((2, 1, 90, 110)) < 0.3
    bias = rng.standard_normal((4, 90, 110)).astype(np.float32)
    bias[rng.random(bias.shape) < 0.2] = -np.inf
    options = {"mask": mask, "bias": bias, "softcap": 3.0, "is_causal": True}
    assert_weights(na.attention_weights(q, k, **options), q, k, **options, factor=8)
    scores = na.qk_scores(q, k, **options)
    weights = na.masked_softmax(scores)
    np.testing.assert_allclose(weights, na.attention_weights(q, k, **options), atol=2e-7)
    out = na.aggregate_values(weights, v)
    np.testing.assert_allclose(out, na.attention(q, k, v, **options), atol=1e-6)


def test_other_layout_one_head_and_8_bits(backend, arrays):
    q, k, v = arrays(2, hq=4, hkv=2, lq=9, lk=11, d=16)
    moved = [x.swapaxes(1, 2) for x in (q, k, v)]
    weights = na.attention_weights(q, k)
    np.testing.assert_array_equal(na.attention_weights(moved[0], moved[1], layout="blhd"), weights)
    np.testing.assert_allclose(
        na.aggregate_values(weights, moved[2], layout="blhd"),
        na.attention(*moved, layout="blhd"),
        atol=1e-6,
    )
    one = na.attention_weights(q[0, 0], k[0, 0])
    np.testing.assert_array_equal(one, weights[0, 0])
    assert na.attention_received(q[0, 0], k[0, 0]).shape == (11,)
    assert na.qk_scores(q[0, 0], k[0, 0]).shape == (9, 11)
    (k8, k_scale), (v8, v_scale) = na.quantize_kv(k), na.quantize_kv(v)
    by_stages = na.aggregate_values(
        na.attention_weights(q, k8, k_scale=k_scale), v8, v_scale=v_scale
    )
    out = na.attention(q, k8, v8, k_scale=k_scale, v_scale=v_scale)
    np.testing.assert_allclose(by_stages, out, atol=1e-6)


@pytest.mark.parametrize("rows", [0, -1, [5], [1, 2, 3], [88, 3, 4, 5, 3], []], ids=str)
def test_some_rows(backend, arrays, rng, rows):
    q, k, _ = arrays(2, hq=4, hkv=2, lq=90, lk=110, d=16)
    options = {
        "is_causal": True,
        "kv_lengths": [110, 60],
        "q_lengths": [90, 87],
        "alibi_slopes": [0.1, 0.2, 0.3, 0.4],
        "mask": rng.random((90, 110)) < 0.9,
        "bias": rng.standard_normal((2, 1, 90, 110)).astype(np.float32),
    }
    every = na.attention_weights(q, k, **options)
    some = na.attention_weights(q, k, rows=rows, **options)
    wanted = every[..., np.asarray(rows, int), :]
    assert some.shape == wanted.shape
    np.testing.assert_allclose(some, wanted, atol=1e-7)


@pytest.mark.parametrize("axes", [0, 1])
def test_some_rows_without_a_batch(backend, arrays, axes):
    q, k, _ = arrays(hq=4, lq=90, lk=110, d=16)
    q, k = (x if axes else x[0] for x in (q, k))
    every = na.attention_weights(q, k, is_causal=True)
    for rows in ([-1, 5], 5, np.int8(-1), np.array(-2)):
        some = na.attention_weights(q, k, rows=rows, is_causal=True)
        assert some.shape == every[..., rows, :].shape
        np.testing.assert_allclose(some, every[..., rows, :], atol=1e-7)


def test_bits_do_not_depend_on_threads(isa, arrays):
    q, k, _ = arrays(2, hq=3, lq=300, lk=4000, d=32)
    for function in (na.qk_scores, na.attention_weights, na.attention_received):
        alone = function(q, k, is_causal=True, num_threads=1)
        for threads in (2, 3):
            together = function(q, k, is_causal=True, num_threads=threads)
            np.testing.assert_array_equal(alone, together)


def test_nothing_to_compute(backend, arrays):
    q, k, v = arrays(hq=2, lq=3, lk=4)
    assert na.attention_weights(q[:, :0], k).shape == (2, 0, 4)
    assert na.attention_weights(q, k[:, :0]).shape == (2, 3, 0)
    np.testing.assert_array_equal(na.attention_received(q[:, :0], k), np.zeros((2, 4)))
    assert na.masked_softmax(np.zeros((3, 0), np.float32)).shape == (3, 0)
    assert na.aggregate_values(np.zeros((2, 3, 0), np.float32), v[:, :0]).shape == (2, 3, 8)


@needs_linux
@pytest.mark.parametrize("backend_name", ["native", "numpy"])
def test_scratch_of_received(backend_name):
    rows, limit = (32768, 32) if backend_name == "native" else (256, 64)
    use = "na.attention_received(q[:, -{rows}:32768], k[:, :32768], is_causal=True)"
    peak = added_peak(32768, rows, use=use, NUMATTN_BACKEND=backend_name)
    assert peak < limit * 2**20


@pytest.mark.parametrize("columns", [1, 2, 3, 5, 7, 15, 16, 17, 31, 33, 65, 1000])
def test_softmax(dtype, rng, columns):
    scores = (3 * rng.standard_normal((5, 40, columns))).astype(dtype)
    mask = rng.random((40, columns)) < 0.7
    wide = np.where(mask, scores.astype(np.longdouble), -np.inf)
    maximum = wide.max(axis=-1, keepdims=True)
    weights = np.exp(wide - np.where(np.isinf(maximum), 0, maximum))
    total = weights.sum(axis=-1, keepdims=True)
    expected = weights / np.where(total == 0, 1, total)
    out = na.masked_softmax(scores, mask)
    assert out.dtype == dtype
    epsilon = {8: 2e-15, 4: 1e-6, 2: 5e-3 if dtype == np.float16 else 1e-2}[dtype.itemsize]
    np.testing.assert_allclose(out.astype(float), expected.astype(float), epsilon, epsilon / 50)
    in_place = scores.copy()
    assert na.masked_softmax(in_place, mask, out=in_place) is in_place
    np.testing.assert_array_equal(in_place, out)
    by_columns = na.masked_softmax(scores.swapaxes(0, 2), mask.T[..., np.newaxis], axis=0)
    np.testing.assert_array_equal(by_columns.swapaxes(0, 2), out)


def test_softmax_of_what_is_not_finite(any_backend):
    scores = np.array([[0, np.nan, 1], [-np.inf, -np.inf, -np.inf], [np.inf, 0, 0]], np.float32)
    out = na.masked_softmax(scores)
    assert np.isnan(out[0]).all()
    np.testing.assert_array_equal(out[1], 0)
    assert np.isnan(out[2, 0])
    kept = na.masked_softmax(scores, [True, False, True])
    np.testing.assert_allclose(kept[0], np.exp([0, -np.inf, 1]) / np.exp([0, 1]).sum(), 1e-6)


def test_values_that_are_not_numbers_where_no_weight_is(backend, arrays):
    q, k, v = arrays(hq=2, lq=5, lk=5)
    v[:, 3:] = np.nan
    out = na.aggregate_values(na.attention_weights(q, k, is_causal=True), v)
    np.testing.assert_array_equal(np.isnan(out).any(axis=-1), [[False] * 3 + [True] * 2] * 2)


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda q, k: na.attention_weights(q, k, rows=5), ValueError, ["rows", "5", "5 queries"]),
        (lambda q, k: na.attention_weights(q, k, rows=[-6]), ValueError, ["rows", "-6"]),
        (lambda q, k: na.attention_weights(q, k, rows=[0.5]), TypeError, ["rows", "float64"]),
        (lambda q, k: na.attention_weights(q, k, rows=[[1]]), ValueError, ["rows", "(1, 1)"]),
        (lambda q, k: na.attention_weights(q, k, rows=True), TypeError, ["rows", "bool"]),
        (lambda q, k: na.masked_softmax(q, -1), TypeError, ["mask"]),
        (lambda q, k: na.qk_scores(q[..., :3], k), ValueError, ["q", "(2, 5, 3)"]),
        (lambda q, k: na.qk_scores(q, k.astype(int)), TypeError, ["k", "int64"]),
        (lambda q, k: na.masked_softmax(q.astype(int)), TypeError, ["scores", "int64"]),
        (
            lambda q, k: na.masked_softmax(q, q),
            TypeError,
            ["mask", "float32", "bool", "add logits"],
        ),
        (
            lambda q, k: na.masked_softmax(q, (q > 0).astype(int)),
            TypeError,
            ["mask: got dtype int64, expected bool (True = attend); use"],
        ),
        (lambda q, k: na.masked_softmax(q, [True, False]), ValueError, ["mask", "(2,)"]),
        (lambda q, k: na.masked_softmax(q, axis=3), ValueError, ["axis", "3", "(2, 5, 8)"]),
        (lambda q, k: na.masked_softmax(q, out=q[0]), ValueError, ["out", "(5, 8)"]),
        (lambda q, k: na.masked_softmax(q, out=q[::-1]), ValueError, ["out", "scores"]),
        (lambda q, k: na.aggregate_values(q, k), ValueError, ["weights: got 8 keys, expected 6"]),
        (lambda q, k: na.aggregate_values(q[..., :6].astype(int), k), TypeError, ["weights"]),
        (lambda q, k: na.aggregate_values(np.ones((3, 5, 6)), k), ValueError, ["weights: got 3 h"]),
        (
            lambda q, k: na.aggregate_values(q @ k.swapaxes(1, 2), k.astype(FOREIGN)),
            TypeError,
            ["v: got dtype float32 in non-native byte order"],
        ),
        (
            lambda q, k: na.aggregate_values((q @ k.swapaxes(1, 2)).astype(FOREIGN), k),
            TypeError,
            ["weights: got dtype float32 in non-native byte order"],
        ),
        (lambda q, k: na.aggregate_values(q, k.astype(int)), TypeError, ["v: got dtype int64"]),
        (
            lambda q, k: na.aggregate_values(np.ones([1] * 64), k),
            ValueError,
            ["weights: got 64 axes, expected at most 32"],
        ),
        (
            lambda q, k: na.aggregate_values(q, np.ones([1] * 64)),
            ValueError,
            ["v: got 64 axes, expected at most 32"],
        ),
        (
            lambda q, k: na.merge_states([(q, q[..., 0].astype(FOREIGN))]),
            TypeError,
            ["states[0][1]: got dtype float32 in non-native byte order"],
        ),
        (lambda q, k: na.aggregate_values(q[0, 0], k), ValueError, ["weights", "(8,)"]),
    ],
)
def test_bad_input(backend, arrays, call, error, words):
    q, k, _ = arrays(hq=2, lq=5, lk=6)
    with pytest.raises(error) as caught:
        call(q, k)
    for word in words:
        assert word in str(caught.value)


def test_softmax_of_scipy():
    special = pytest.importorskip("scipy.special")
    x = np.random.default_rng(0).standard_normal((4, 5, 6)).astype(named_dtype("float32"))
    for axis in (0, 1, 2, -1):
        np.testing.assert_allclose(na.masked_softmax(x, axis=axis), special.softmax(x, axis), 1e-6)


def test_scattered_rows_are_those_of_all(backend, arrays, rng):
    q, k, _ = arrays(2, hq=4, hkv=2, lq=90, lk=110, d=16)
    rows = [3, 88, -1, 40, 3]
    mask = rng.random((2, 1, 90, 110)) < 0.5
    bias = rng.standard_normal((4, 90, 1)).astype(np.float32)
    for options in (
        {},
        {"mask": mask, "bias": bias, "softcap": 5.0, "kv_lengths": [110, 30]},
        {"tail_mask": mask[..., :20], "kv_lengths": [110, 30]},
        {"tail_mask": mask[0, 0, :, :1], "mask": mask[::-1], "is_causal": True},
        {"is_causal": True},
        {"window": (4, None)},
        {"alibi_slopes": [0.1, 0.2, 0.3, 0.4]},
    ):
        every = na.attention_weights(q, k, **options)
        some = na.attention_weights(q, k, rows=rows, **options)
        np.testing.assert_allclose(some, every[..., rows, :], rtol=0, atol=1e-6)
    with pytest.raises(ValueError, match="rows: got 18446744073709551615"):
        na.attention_weights(q, k, rows=np.uint64(2**64 - 1))
    with pytest.raises(ValueError, match="rows: got list, which NumPy cannot convert to an array"):
        na.attention_weights(q, k, rows=[[1], [1, 2]])


def test_long_rows_add_up_to_one(backend, rng):
    """Rows are added up in parts: one running sum would be off by a thousandth."""
    q = 0.1 * rng.standard_normal((4, 1), dtype=np.float32)
    k = rng.standard_normal((1_000_000, 1), dtype=np.float32)
    weights = na.attention_weights(q, k)
    np.testing.assert_allclose(weights.sum(axis=-1, dtype=np.float64), 1, rtol=0, atol=2e-6)
    softmax = na.masked_softmax(q @ k.T)
    np.testing.assert_allclose(softmax.sum(axis=-1, dtype=np.float64), 1, rtol=0, atol=2e-6)
