"""Promise: every option means exactly one thing, alone and in any mixture."""

import numattn as na
import numpy as np
import pytest
from checks import LOOSE, assert_close_to_reference
from conftest import DTYPES, named_dtype
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numattn import _numpy_backend, _runtime
from numattn import _reference as reference

TAIL = np.random.default_rng(3).random((90, 17)) < 0.6

ALONE = {
    "causal": {"is_causal": True},
    "offset": {"is_causal": True, "q_offset": 3},
    "negative offset": {"is_causal": True, "q_offset": -20},
    "offset per batch item": {"is_causal": True, "q_offset": [0, 40]},
    "far offset": {"window": (50, None), "q_offset": 10**12},
    "window": {"window": (20, 7)},
    "left window": {"window": (5, None)},
    "right window": {"window": (None, 3)},
    "window of one": {"window": (0, 0)},
    "causal window": {"is_causal": True, "window": (30, 10)},
    "scale": {"scale": 0.31},
    "negative scale": {"scale": -0.2},
    "no scale": {"scale": 0.0},
    "softcap": {"softcap": 1.5},
    "sinks": {"sinks": [0.5, -1.0, 3.0, -np.inf]},
    "alibi": {"alibi_slopes": [0.5, 0.25, 0.0, -0.1]},
    "alibi with offset": {"alibi_slopes": [0.5, 0.25, 0.1, 1.0], "q_offset": 33},
    "lengths": {"kv_lengths": [100, 13]},
    "no keys valid": {"kv_lengths": [0, 1]},
    "lengths and causal": {"kv_lengths": [100, 50], "is_causal": True, "q_offset": [10, -40]},
    "lengths and window": {"kv_lengths": [99, 0], "window": (4, 4), "q_offset": [9, -90]},
    "padded": {"q_lengths": [90, 40], "kv_lengths": [90, 40], "is_causal": True},
    "padded, window": {"q_lengths": [80, 0], "kv_lengths": [100, 50], "window": (5, 3)},
    "padded, alibi": {
        "q_lengths": [3, 64],
        "kv_lengths": 60,
        "alibi_slopes": [0.5, 0.25, 0.0, -0.1],
    },
    "padded, sinks": {"q_lengths": [89, 17], "sinks": [0.5, -1.0, 3.0, -np.inf]},
    "padded, offset": {"q_lengths": 30, "q_offset": [5, 60], "is_causal": True},
    "one length": {"kv_lengths": 70},
    "tail": {"tail_mask": TAIL},
    "tail of a head": {"tail_mask": np.stack([TAIL, ~TAIL, TAIL[::-1], TAIL | True])},
    "tail, causal": {"tail_mask": TAIL, "is_causal": True, "window": (40, None)},
    "tail, lengths": {"tail_mask": np.stack([TAIL, ~TAIL])[:, None], "kv_lengths": [100, 13]},
    "tail, padded": {"tail_mask": TAIL, "q_lengths": [90, 40], "kv_lengths": [90, 4]},
    "dropout": {"dropout": 0.3, "rng": 7},
    "much dropout": {"dropout": 0.9, "rng": 2**64 - 1, "softcap": 2.0},
    "dropout, causal": {"dropout": 0.1, "rng": 2**40 + 3, "is_causal": True, "window": (30, None)},
    "dropout, sinks": {"dropout": 0.5, "rng": 0, "sinks": [0.5, -1.0, 3.0, -np.inf]},
    "dropout, padded": {"dropout": 0.2, "rng": 5, "q_lengths": [90, 40], "kv_lengths": [90, 4]},
}


@pytest.mark.smoke
@pytest.mark.parametrize("name", ALONE)
def test_alone(dtype, arrays, name):
    q, k, v = arrays(2, hq=4, hkv=2, lq=90, lk=111, d=16, dv=20, dtype=dtype)
    assert_close_to_reference(q, k, v, **ALONE[name])


@pytest.mark.parametrize("name", ALONE)
def test_alone_in_the_other_layout(backend, arrays, name):
    q, k, v = (x.swapaxes(1, 2) for x in arrays(2, hq=4, hkv=2, lq=90, lk=110, d=16, dv=20))
    assert_close_to_reference(q, k, v, layout="blhd", **ALONE[name])


@pytest.mark.parametrize("name", ["causal", "lengths and window", "sinks", "alibi", "dropout"])
@pytest.mark.parametrize("lq", [1, 3])
def test_alone_with_few_queries(dtype, arrays, name, lq):
    q, k, v = arrays(150, hq=4, hkv=2, lq=lq, lk=111, d=17, dv=20, dtype=dtype)
    options = dict(ALONE[name])
    if "kv_lengths" in options:
        options["kv_lengths"] = np.arange(150) % 112
        options["q_offset"] = options["kv_lengths"] - lq
    factor = 3 if lq == 1 else None  # with one query NumPy's BLAS sums in double
    assert_close_to_reference(q, k, v, **options, factor=factor)


MASK_SHAPES = [(2, 4, 90, 110), (1, 4, 1, 110), (2, 1, 90, 110), (90, 110), (4, 90, 1), (110,), ()]


@pytest.mark.parametrize("shape", MASK_SHAPES, ids=str)
@pytest.mark.parametrize("share", [0.02, 0.5, 0.98])
def test_mask(backend, arrays, rng, shape, share):
    q, k, v = arrays(2, hq=4, hkv=2, lq=90, lk=110, d=16)
    mask = np.asarray(rng.random(shape) < share)
    assert_close_to_reference(q, k, v, mask=mask, factor=LOOSE)
    assert_close_to_reference(q, k, v, mask=mask, is_causal=True, factor=LOOSE)
    assert_close_to_reference(
        *(x.swapaxes(1, 2) for x in (q, k, v)), mask=mask, layout="blhd", factor=LOOSE
    )


@pytest.mark.parametrize(
    "shape",
    [(2, 4, 90, 9), (1, 4, 1, 70), (2, 1, 90, 110), (90, 110), (4, 90, 1), (9,), (2, 1, 1, 0)],
    ids=str,
)
@pytest.mark.parametrize("lengths", [None, [110, 70], [8, 0]], ids=str)
def test_tail_mask(backend, arrays, rng, shape, lengths):
    """It is the mask that has True for all keys before, alone and beside another mask."""
    q, k, v = arrays(2, hq=4, hkv=2, lq=90, lk=110, d=16)
    tail = rng.random(shape) < 0.5
    full = np.ones((2, 4, 90, 110), bool)
    for item, n in enumerate([110, 110] if lengths is None else lengths):
        some = min(n, shape[-1])
        own = np.broadcast_to(tail, (2, 4, 90, shape[-1]))[item]
        full[item, ..., n - some : n] = own[..., shape[-1] - some :]
    options = {"kv_lengths": lengths, "return_lse": True}
    other = rng.random((90, 110)) < 0.7
    for more, mask in (({}, full), ({"mask": other}, full & other)):
        actual = na.attention(q, k, v, tail_mask=tail, **more, **options)
        for x, expected in zip(actual, na.attention(q, k, v, mask=mask, **options), strict=True):
            np.testing.assert_allclose(x, expected, rtol=0, atol=2e-6)
    moved = [x.swapaxes(1, 2) for x in (q, k, v)]
    blhd = na.attention(*moved, tail_mask=tail, kv_lengths=lengths, layout="blhd").swapaxes(1, 2)
    np.testing.assert_allclose(
        blhd, na.attention(q, k, v, mask=full, kv_lengths=lengths), rtol=0, atol=2e-6
    )


def test_tail_mask_of_every_dtype_and_few_queries(dtype, arrays, rng):
    for lq, last in ((1, 1), (5, 5), (64, 64), (3, 200)):
        q, k, v = arrays(2, hq=4, hkv=2, lq=lq, lk=1700, d=16, dtype=dtype)
        tail = rng.random((2, 1, lq, last)) < 0.5
        lengths = np.array([1700, 1540])
        for more in ({}, {"kv_lengths": lengths}, {"is_causal": True}):
            assert_close_to_reference(q, k, v, tail_mask=tail, **more, factor=LOOSE)


def test_mask_of_blocks(backend, arrays):
    """Tiles that are empty, full and mixed."""
    q, k, v = arrays(hq=2, lq=500, lk=700, d=8)
    document = np.arange(500)[:, None] * 5 // 500 == np.arange(700) * 5 // 700
    assert_close_to_reference(q, k, v, mask=document)
    assert_close_to_reference(q, k, v, mask=np.ones((500, 700), bool))
    assert_close_to_reference(q, k, v, mask=np.zeros((500, 700), bool))


def test_mask_with_bytes_other_than_0_and_1(backend, arrays, rng):
    q, k, v = arrays(lq=40, lk=100)
    numbers = rng.integers(0, 2, (40, 100)).astype(np.uint8)
    mask = numbers.astype(bool)
    out = na.attention(q, k, v, mask=(numbers * 6).view(bool))
    np.testing.assert_array_equal(out, na.attention(q, k, v, mask=mask))


@pytest.mark.parametrize("shape", MASK_SHAPES, ids=str)
def test_bias(backend, arrays, rng, shape):
    q, k, v = arrays(2, hq=4, hkv=2, lq=90, lk=110, d=16)
    bias = np.asarray(rng.standard_normal(shape, dtype=np.float32))
    assert_close_to_reference(q, k, v, bias=bias)
    holes = np.where(rng.random(shape) < 0.4, np.float32(-np.inf), bias)
    assert_close_to_reference(q, k, v, bias=holes, factor=LOOSE)


def test_masks_and_biases_of_every_dtype(dtype, arrays, rng):
    q, k, v = arrays(2, hq=4, hkv=2, lq=90, lk=111, d=16, dtype=dtype)
    bias = rng.standard_normal((90, 111))
    bias[rng.random(bias.shape) < 0.2] = -np.inf
    mask = rng.random((90, 111)) < 0.5
    for bias_dtype in {dtype, np.dtype(np.float32)}:
        assert_close_to_reference(q, k, v, bias=bias.astype(bias_dtype), factor=LOOSE)
    assert_close_to_reference(q, k, v, mask=mask, factor=LOOSE)


@pytest.mark.parametrize("layout", ["bhld", "blhd"])
def test_two_and_three_axes(backend, arrays, layout):
    q, k, v = arrays(hq=1, lq=10, lk=14)
    assert_close_to_reference(q[0], k[0], v[0], layout=layout, is_causal=True, factor=LOOSE)
    q, k, v = arrays(hq=6, hkv=3, lq=10, lk=14)
    if layout == "blhd":
        q, k, v = (x.swapaxes(0, 1) for x in (q, k, v))
    assert_close_to_reference(q, k, v, layout=layout, factor=LOOSE)


def test_leading_axes_broadcast(backend, rng):
    q = rng.standard_normal((3, 1, 2, 4, 10, 8), dtype=np.float32)
    k = rng.standard_normal((5, 1, 2, 12, 8), dtype=np.float32)
    v = rng.standard_normal((2, 12, 6), dtype=np.float32)
    mask = rng.random((5, 2, 1, 10, 12)) < 0.7
    lengths = rng.integers(0, 13, (5, 1))
    out = na.attention(q, k, v, mask=mask, kv_lengths=lengths)
    assert out.shape == (3, 5, 2, 4, 10, 6)
    assert_close_to_reference(q, k, v, mask=mask, kv_lengths=lengths, factor=LOOSE)


def test_empty(backend):
    def zeros(*shape):
        return np.zeros(shape, np.float32)

    assert na.attention(zeros(2, 0, 4), zeros(2, 3, 4), zeros(2, 3, 5)).shape == (2, 0, 5)
    assert na.attention(zeros(0, 2, 3, 4), zeros(0, 2, 3, 4), zeros(0, 2, 3, 4)).shape == (
        0,
        2,
        3,
        4,
    )
    assert na.attention(zeros(0, 3, 4), zeros(0, 3, 4), zeros(0, 3, 4)).shape == (0, 3, 4)
    none = zeros(0, 2, 3, 4)
    for shape in ((3, 3), (0, 2, 3, 3)):
        mask, bias = np.ones(shape, bool), zeros(*shape)
        assert na.attention(none, none, none, mask=mask, bias=bias).shape == none.shape
    ones = np.ones((2, 3, 4), np.float32)
    out, lse = na.attention(ones, zeros(2, 0, 4), zeros(2, 0, 5), return_lse=True)
    assert not out.any()
    assert np.all(lse == -np.inf)
    mask = np.ones((3, 0), bool)
    out, lse = na.attention(
        ones, zeros(2, 0, 4), zeros(2, 0, 5), mask=mask, sinks=[1, 2], return_lse=True
    )
    assert not out.any()
    np.testing.assert_array_equal(lse, [[1] * 3, [2] * 3])


@pytest.mark.parametrize("dtype_name", ["float16", "bfloat16"])
def test_out_of_float32_is_not_rounded(any_backend, arrays, dtype_name):
    """Rounded, it is the result in the dtype of the inputs, to the bit."""
    q, k, v = arrays(2, hq=4, hkv=2, lq=40, lk=60, d=16, dv=20, dtype=named_dtype(dtype_name))
    by_rows = [np.concatenate(x.swapaxes(1, 2)) for x in (q, k, v)]
    starts = [[0, 40, 80], [0, 60, 120]]
    pages = [x.reshape(12, 10, *x.shape[1:]) for x in by_rows[1:]]
    table = np.arange(12).reshape(2, 6)

    calls = [
        lambda **out: na.attention(q, k, v, is_causal=True, **out),
        lambda **out: na.attention(q[:, :, -1:], k, v, sinks=[0.5, 1, 2, 3], **out),
        lambda **out: na.attention_varlen(*by_rows, *starts, is_causal=True, **out),
        lambda **out: na.attention_paged(q, *pages, table, [60, 60], **out),
    ]
    for call in calls:
        rounded = call()
        wide = np.full(rounded.shape[::-1], np.nan, np.float32).T
        assert call(out=wide) is wide
        np.testing.assert_array_equal(wide.astype(rounded.dtype), rounded)
        assert not np.array_equal(wide, rounded.astype(np.float32))


def test_nothing_to_attend(dtype, arrays):
    q, k, v = arrays(hq=2, lq=50, lk=60, dtype=dtype)
    out, lse = na.attention(q, k, v, mask=np.zeros((50, 60), bool), return_lse=True)
    assert not out.any()
    assert np.all(lse == -np.inf)
    out, lse = na.attention(q, k, v, is_causal=True, q_offset=-10, sinks=[0.5, 2], return_lse=True)
    assert not out[:, :10].any()
    np.testing.assert_array_equal(lse[:, :10], [[0.5] * 10, [2] * 10])


HIDES_KEYS_70_ON = {
    "lengths": {"kv_lengths": 70},
    "causal": {"is_causal": True, "q_offset": 20},
    "mask": {"mask": np.arange(100) < 70},
    "mask by query": {"mask": np.broadcast_to(np.arange(100) < 70, (50, 100)).copy()},
    "bias": {"bias": np.where(np.arange(100) < 70, 0, -np.inf).astype(np.float32)},
    "window": {"window": (None, 0), "q_offset": 20},
    "mask, dropout": {"mask": np.arange(100) < 70, "dropout": 0.4, "rng": 5},
    "mask, some see all": {"mask": (np.arange(100) < 70) | (np.arange(50) > 44)[:, None]},
}


@pytest.mark.parametrize("name", HIDES_KEYS_70_ON)
@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("in_memory", [np.ascontiguousarray, np.asfortranarray])
def test_masked_keys_are_not_read(dtype, arrays, name, bad, in_memory):
    q, k, v = map(in_memory, arrays(hq=2, lq=50, lk=100, d=9, dtype=dtype))
    seen = slice(None, 45) if "some" in name else slice(None)
    options = dict(HIDES_KEYS_70_ON[name])
    if "bias" in options:
        options["bias"] = options["bias"].astype(dtype)
    expected = na.attention(q, k, v, **options)[:, seen]
    k[:, 70:], v[:, 70:] = bad, bad
    out, lse = na.attention(q, k, v, **options, return_lse=True)
    # The same bits, unless the block of keys had to be computed around the bad values.
    ulp = 1e-2 if dtype.itemsize == 2 else 2e-7
    np.testing.assert_allclose(
        out[:, seen].astype(np.float64), expected.astype(np.float64), rtol=0, atol=ulp
    )
    assert np.isfinite(lse[:, seen]).all()
    if "some" in name:
        assert np.isnan(out[:, 45:]).all()


def test_a_value_shows_wherever_its_key_is_attended_to(backend, arrays):
    """Also where the key's logit is -inf, in full tiles and in mixed ones."""
    q, k, v = arrays(hq=1, lq=200, lk=200)
    q, k[0, 5], v[0, 5] = np.abs(q) + 1, -np.inf, np.nan
    out = na.attention(q, k, v, is_causal=True)
    assert np.isfinite(out[0, :5]).all()
    assert np.isnan(out[0, 5:]).all()


def test_attended_nan_shows(dtype, arrays):
    q, k, v = arrays(hq=1, lq=50, lk=50, dtype=dtype)
    v[0, 20, 3] = np.nan
    out = na.attention(q, k, v, is_causal=True)
    assert np.isnan(out[0, 20:, 3]).all()
    assert np.isfinite(out[0, :20]).all()
    assert np.isfinite(np.delete(out[0], 3, axis=1)).all()
    q, k, v = arrays(hq=1, lq=50, lk=50, dtype=dtype)
    k[0, 30, 0] = np.nan
    out, lse = na.attention(q, k, v, window=(0, 0), return_lse=True)
    assert np.isnan(out[0, 30]).all()
    assert np.isnan(lse[0, 30])
    assert np.isfinite(np.delete(out[0], 30, axis=0)).all()


@pytest.mark.parametrize("options", [{}, {"window": (6, 2)}, {"alibi_slopes": [0.3] * 4}], ids=str)
@pytest.mark.parametrize("lengths", [[20, 13, 1, 0], [64, 3, 17, 40]], ids=str)
def test_a_padded_batch_is_its_sentences(dtype, arrays, options, lengths):
    """Also where padding is NaN; the rows of padding are 0 and -inf."""
    longest = max(lengths)
    q, k, v = arrays(4, hq=4, hkv=2, lq=longest, d=16, dtype=dtype)
    options = options | {"is_causal": "window" not in options, "sinks": [0.5, 1.0, 0.0, -np.inf]}
    sentences = [
        na.attention(q[i, :, :n], k[i, :, :n], v[i, :, :n], **options, return_lse=True)
        for i, n in enumerate(lengths)
    ]
    for i, n in enumerate(lengths):
        q[i, :, n:], k[i, :, n:], v[i, :, n:] = np.nan, np.nan, np.nan
    padded = {"q_lengths": lengths, "kv_lengths": lengths}
    for layout in ("bhld", "blhd"):
        arguments = [x if layout == "bhld" else x.swapaxes(1, 2) for x in (q, k, v)]
        out, lse = na.attention(*arguments, **options, **padded, layout=layout, return_lse=True)
        if layout == "blhd":
            out, lse = out.swapaxes(1, 2), lse.swapaxes(1, 2)
        for i, n in enumerate(lengths):
            rounding = 0 if _runtime.computations is not _numpy_backend else 1e-2
            for actual, expected in zip((out, lse), sentences[i], strict=True):
                np.testing.assert_allclose(
                    actual[i, :, :n].astype(float), expected.astype(float), rtol=0, atol=rounding
                )
            assert not out[i, :, n:].any()
            assert np.all(lse[i, :, n:] == -np.inf)


@st.composite
def problems(draw):
    """Draw arrays of one dtype and a mixture of all options."""
    dtype = named_dtype(draw(st.sampled_from(DTYPES)))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    hkv = draw(st.integers(1, 3))
    hq = hkv * draw(st.integers(1, 3))
    lq, lk = draw(st.integers(1, 150)), draw(st.integers(0, 230))
    d, dv = draw(st.integers(1, 40)), draw(st.integers(1, 40))
    batch = draw(st.sampled_from([(), (1,), (2,), (2, 3)]))
    amplitude = draw(st.sampled_from([0.1, 1]))

    def array(*shape):
        return (amplitude * rng.standard_normal(shape)).astype(dtype)

    step = draw(st.sampled_from([1, 1, 2, -1]))
    q = array(*batch, hq, lq * abs(step), d)[..., ::step, :]
    k = array(*batch, hkv, lk * abs(step), d)[..., ::step, :]
    v = array(*batch, hkv, lk, dv)
    if draw(st.booleans()) and len(batch):
        v = v[:1]
    if draw(st.booleans()):
        k = np.asfortranarray(k)

    options = {"is_causal": draw(st.booleans())}
    pairs = (*batch, hq, lq, lk)
    keep = [draw(st.booleans()) for _ in pairs]
    broadcast = tuple(n if wanted else 1 for n, wanted in zip(pairs, keep, strict=True))
    if draw(st.booleans()):
        options["mask"] = rng.random(broadcast) < draw(st.sampled_from([0.01, 0.5, 0.99]))
    if draw(st.booleans()):
        options["tail_mask"] = rng.random((*broadcast[:-1], draw(st.integers(0, lk)))) < 0.6
    if draw(st.booleans()):
        bias_dtype = dtype if draw(st.booleans()) else np.float32
        options["bias"] = rng.standard_normal(broadcast).astype(bias_dtype)
        options["bias"][rng.random(broadcast) < 0.1] = -np.inf
    if draw(st.booleans()):
        options["q_offset"] = draw(st.integers(-200, 300))
    if draw(st.booleans()):
        side = st.none() | st.integers(0, 200)
        options["window"] = (draw(side), draw(side))
    if draw(st.booleans()):
        options["scale"] = draw(st.sampled_from([0.5, 0.01, -0.3]))
    if draw(st.booleans()):
        options["softcap"] = draw(st.sampled_from([0.5, 30.0]))
    if draw(st.booleans()):
        options["alibi_slopes"] = rng.random(hq)
    if draw(st.booleans()):
        options["sinks"] = rng.standard_normal(hq) * 3
    if draw(st.booleans()):
        options["kv_lengths"] = rng.integers(0, lk + 1, batch)
    if draw(st.booleans()) or "kv_lengths" in options:
        options["q_lengths"] = rng.integers(0, lq + 1, batch)
    if draw(st.booleans()):
        options["dropout"] = draw(st.sampled_from([0.05, 0.5, 0.9]))
        options["rng"] = draw(st.integers(0, 2**64 - 1))
    if draw(st.booleans()):
        options["layout"] = "blhd"
        q, k, v = (x.swapaxes(-2, -3) for x in (q, k, v))
    return q, k, v, options


@settings(
    max_examples=150,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(problem=problems(), num_threads=st.integers(1, 3))
def test_random_mixtures(any_backend, problem, num_threads):
    q, k, v, options = problem
    precision = np.float64 if q.dtype == np.float64 else np.float32
    trusted = np.longdouble if precision is np.float64 else np.float64
    expected, expected_lse = reference.attention(q, k, v, **options, dtype=trusted)
    out, lse = na.attention(q, k, v, **options, return_lse=True, num_threads=num_threads)
    # Large logits (ALiBi far away) cost the plain computation its digits too.
    plain, plain_lse = reference.attention(q, k, v, **options, dtype=precision)
    plain = plain.astype(q.dtype).astype(precision)
    with np.errstate(invalid="ignore"):
        lost = np.nanmax(np.abs(plain - expected), initial=0)
        lost_lse = np.nanmax(np.abs(plain_lse - expected_lse), initial=0)
    little = 100 * np.finfo(precision).eps
    rounding = little if q.dtype.itemsize > 2 else 2.0**-7 * np.abs(expected).max(initial=0)
    np.testing.assert_allclose(
        out.astype(precision), expected, rtol=0, atol=rounding + LOOSE * lost
    )
    np.testing.assert_allclose(lse, expected_lse, rtol=0, atol=little + LOOSE * lost_lse)
    into = np.full(out.shape, np.nan, q.dtype)[..., ::-1]
    assert na.attention(q, k, v, **options, out=into) is into
    np.testing.assert_array_equal(into, out)
