"""Promise: attention has exact gradients, with every option, to the bound of its results."""

import itertools

import numattn as na
import numpy as np
import pytest
from checks import LOOSE, assert_gradients_close_to_reference, numbers
from conftest import DTYPES, named_dtype
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numattn import _reference as reference
from test_options import ALONE, HIDES_KEYS_70_ON, MASK_SHAPES, problems


def like_out(rng, q, v):
    """Return a gradient with respect to the result, heads before rows."""
    batch = np.broadcast_shapes(q.shape[:-3], v.shape[:-3])
    return numbers(rng, *batch, *q.shape[-3:-1], v.shape[-1], dtype=q.dtype)


def of_lse(rng, q, v):
    precision = np.float64 if q.dtype == np.float64 else np.float32
    return like_out(rng, q, v)[..., 0].astype(precision)


# ---- the derivative ----------------------------------------------------------------------------

SINKS = np.array([0.3, -1.0])
TINY_MASK = np.array([[1, 0, 1, 1], [0, 0, 0, 0], [1, 1, 0, 1]], bool)
TINY_BIAS = np.random.default_rng(5).standard_normal((1, 2, 3, 4))
HOLES = np.where(TINY_MASK, TINY_BIAS, -np.inf)
DIFFERENTIATED = {
    "nothing": {},
    "causal": {"is_causal": True},
    "negative offset": {"is_causal": True, "q_offset": [-1, 2]},
    "window": {"window": (1, 1)},
    "left window": {"window": (1, None), "q_offset": 2},
    "scale": {"scale": 0.7},
    "negative scale": {"scale": -0.4},
    "no scale": {"scale": 0.0},
    "softcap": {"softcap": 0.8},
    "sinks": {"sinks": SINKS},
    "a sink": {"sinks": np.array([-np.inf, 1.0])},
    "alibi": {"alibi_slopes": [0.5, -0.2]},
    "lengths": {"kv_lengths": [3, 0]},
    "padded": {"q_lengths": [2, 3], "kv_lengths": [1, 4], "is_causal": True},
    "padded, sinks": {"q_lengths": [0, 2], "sinks": SINKS},
    "mask": {"mask": TINY_MASK},
    "mask, sinks": {"mask": TINY_MASK, "sinks": SINKS},
    "mask, a sink": {"mask": TINY_MASK, "sinks": np.array([-np.inf, 1.0])},
    "tail": {"tail_mask": TINY_MASK[:, 1:]},
    "tail of lengths": {"tail_mask": TINY_MASK[:, 1:], "kv_lengths": [4, 2]},
    "bias": {"bias": TINY_BIAS},
    "bias of keys": {"bias": TINY_BIAS[0, 0, 0]},
    "bias of queries": {"bias": TINY_BIAS[0, 0, :, :1]},
    "bias of the batch": {"bias": np.concatenate([TINY_BIAS, HOLES])},
    "bias with holes": {"bias": HOLES},
    "softcap, bias": {"bias": TINY_BIAS, "softcap": 0.8},
    "dropout": {"dropout": 0.4, "rng": 11},
    "dropout, padded": {
        "dropout": 0.5, "rng": 2**64 - 2, "q_lengths": [2, 3], "kv_lengths": [3, 4],
    },
    "dropout, many": {
        "dropout": 0.3, "rng": 2**33, "bias": HOLES, "softcap": 2.0, "sinks": SINKS,
        "alibi_slopes": [0.5, 0.1], "window": (2, 1),
    },
    "many": {
        "bias": TINY_BIAS, "softcap": 2.0, "is_causal": True, "sinks": SINKS, "scale": 0.9,
        "alibi_slopes": [0.5, 0.1], "window": (2, 5),
    },
    "many lengths": {
        "bias": HOLES[0, :1], "mask": TINY_MASK, "tail_mask": TINY_MASK[:, :3], "softcap": 1.5,
        "q_lengths": [3, 1], "kv_lengths": [3, 4], "sinks": SINKS, "window": (3, 0),
    },
}  # fmt: skip


@pytest.mark.smoke
@pytest.mark.parametrize("name", DIFFERENTIATED)
def test_differences(backend, arrays, rng, name):
    """Of a sum over the results, in float64, for a small step of each element by itself."""
    q, k, v = arrays(2, hq=2, hkv=1, lq=3, lk=4, d=3, dv=2, dtype=np.float64)
    dout, dlse = like_out(rng, q, v), of_lse(rng, q, v)
    options = dict(DIFFERENTIATED[name])
    given = {"q": q, "k": k, "v": v}
    given |= {name: options.pop(name) for name in ("bias", "sinks") if name in options}

    def total(**changed):
        """Return the sum for each of the arrays along a first axis."""
        out, lse = na.attention(**given | changed, **options, return_lse=True)
        lse = np.where(np.isfinite(lse), lse, 0)
        return (out * dout).sum(axis=(-1, -2, -3, -4)) + (lse * dlse).sum(axis=(-1, -2, -3))

    _, vjp = na.attention_vjp(**given, **options, bias_gradient="bias" in given)
    for name, gradient in vjp(dout, dlse)._asdict().items():
        if name not in given:
            assert gradient is None
            continue
        x = given[name]
        step = 1e-5 * np.eye(x.size).reshape(x.size, *x.shape)
        if name == "sinks" or "dropout" in options:  # which counts batch items
            above, below = ([total(**{name: one}) for one in x + sign * step] for sign in (1, -1))
        else:
            missing = (1,) * (4 - x.ndim)
            moved = (x + sign * step.reshape(x.size, *missing, *x.shape) for sign in (1, -1))
            batch = {} if name == "q" else {"q": np.broadcast_to(q, (x.size, *q.shape))}
            above, below = (total(**batch, **{name: one}) for one in moved)
        expected = (np.asarray(above) - below).reshape(x.shape) / 2e-5
        assert gradient.shape == x.shape
        np.testing.assert_allclose(gradient, expected, rtol=0, atol=1e-8)


# ---- rounding ----------------------------------------------------------------------------------

LENGTHS = [1, 2, 3, 5, 7, 15, 16, 17, 31, 32, 33, 63, 64, 65, 97, 200]


@pytest.mark.parametrize("length", LENGTHS)
def test_lengths(dtype, arrays, rng, length):
    for lq, lk, d, dv, options in (
        (length, length, 16, 16, {}),
        (length, 40, 9, 17, {"is_causal": True}),
        (19, length, 17, 8, {"is_causal": True}),
    ):
        heads = 1 + 200 // min(lq, lk)  # some thousand numbers
        q, k, v = arrays(hq=heads, lq=lq, lk=lk, d=d, dv=dv, amplitude=0.7, dtype=dtype)
        dout, dlse = like_out(rng, q, v), of_lse(rng, q, v)
        # A short sum has the error of its largest logit, which luck decides.
        factor = 4 if length < 16 else None
        assert_gradients_close_to_reference(q, k, v, dout, dlse, factor=factor, **options)


@pytest.mark.parametrize("d", [1, 3, 8, 31, 64, 130])
def test_head_sizes(dtype, arrays, rng, d):
    for head_dim, dv in ((d, d), (d, 3), (3, d)):
        items = 1 + 40 // min(head_dim, dv)  # some thousand numbers in each gradient
        q, k, v = arrays(items, hq=2, lq=33, lk=50, d=head_dim, dv=dv, dtype=dtype)
        assert_gradients_close_to_reference(q, k, v, like_out(rng, q, v))


@pytest.mark.parametrize(("hq", "hkv"), [(4, 1), (6, 3), (34, 2)])
@pytest.mark.parametrize("layout", ["bhld", "blhd"])
def test_grouped_heads(dtype, arrays, rng, hq, hkv, layout):
    q, k, v = arrays(2, hq=hq, hkv=hkv, lq=19, lk=40, d=12, dv=9, dtype=dtype)
    dout, dlse = like_out(rng, q, v), of_lse(rng, q, v)
    if layout == "blhd":
        q, k, v, dout, dlse = (x.swapaxes(1, 2) for x in (q, k, v, dout, dlse))
    assert_gradients_close_to_reference(q, k, v, dout, dlse, is_causal=True, layout=layout)


@pytest.mark.parametrize("amplitude", [0.1, 4.0])
def test_amplitudes(dtype, arrays, rng, amplitude):
    q, k, v = arrays(hq=2, lq=80, lk=120, d=32, amplitude=amplitude, dtype=dtype)
    for options in ({}, {"softcap": 10.0}):
        assert_gradients_close_to_reference(q, k, v, like_out(rng, q, v), **options)


def test_long_sequences(dtype, arrays, rng):
    """More keys than any block or chunk has, and more queries."""
    for lq, lk in ((20, 3200), (1700, 50)):
        q, k, v = arrays(hq=1, lq=lq, lk=lk, d=8, dtype=dtype)
        dout, dlse = like_out(rng, q, v), of_lse(rng, q, v)
        assert_gradients_close_to_reference(q, k, v, dout, dlse, is_causal=True, q_offset=0)


def test_many_queries_of_a_key(any_backend, arrays, rng):
    """Sums of one sign, whose rounding errors grow with what was added before."""
    q, k, v = arrays(hq=128, hkv=1, lq=512, lk=64, d=8)
    assert_gradients_close_to_reference(q, k, v, like_out(rng, q, v) + np.float32(0.5))


@pytest.mark.parametrize("dtype_name", ["float16", "bfloat16"])
def test_16_bits_beside_float32(any_backend, arrays, rng, dtype_name):
    """`out` and `dout` may be rounded or not, each by itself."""
    q, k, v = arrays(hq=4, hkv=2, lq=50, lk=60, d=16, dtype=named_dtype(dtype_name))
    dout = numbers(rng, *q.shape)
    for of_out, of_result in itertools.product((np.float32, q.dtype), repeat=2):
        assert_gradients_close_to_reference(
            q, k, v, dout.astype(of_out), result_dtype=of_result, is_causal=True
        )


# ---- options -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ALONE)
def test_options_alone(backend, arrays, rng, name):
    q, k, v = arrays(2, hq=4, hkv=2, lq=90, lk=111, d=16, dv=20)
    options = dict(ALONE[name])
    dout, dlse = like_out(rng, q, v), of_lse(rng, q, v)
    assert_gradients_close_to_reference(q, k, v, dout, dlse, **options)


@pytest.mark.parametrize("shape", MASK_SHAPES, ids=str)
@pytest.mark.parametrize("share", [0.02, 0.98])
def test_masks(backend, arrays, rng, shape, share):
    q, k, v = arrays(2, hq=4, hkv=2, lq=90, lk=110, d=16)
    mask = np.asarray(rng.random(shape) < share)
    dout = like_out(rng, q, v)
    assert_gradients_close_to_reference(q, k, v, dout, mask=mask, is_causal=True)


@pytest.mark.parametrize("shape", MASK_SHAPES, ids=str)
def test_biases(backend, arrays, rng, shape):
    """Their gradient is summed over what they were broadcast along."""
    q, k, v = arrays(2, hq=4, hkv=2, lq=90, lk=110, d=16)
    bias = np.asarray(numbers(rng, *shape))
    dout, dlse = like_out(rng, q, v), of_lse(rng, q, v)
    for more in ({}, {"softcap": 3.0, "window": (30, 40), "q_lengths": [90, 33]}):
        assert_gradients_close_to_reference(q, k, v, dout, dlse, bias=bias, **more)
    bias = np.where(rng.random(shape) < 0.4, np.float32(-np.inf), bias)
    assert_gradients_close_to_reference(q, k, v, dout, bias=bias)


def test_masks_biases_and_sinks_of_every_dtype(dtype, arrays, rng):
    q, k, v = arrays(2, hq=4, hkv=2, lq=40, lk=53, d=16, dtype=dtype)
    dout = like_out(rng, q, v)
    bias = rng.standard_normal((4, 40, 53))
    bias[rng.random(bias.shape) < 0.2] = -np.inf
    mask = rng.random((2, 1, 40, 53)) < 0.5
    for of_bias in {dtype, np.dtype(np.float32)}:
        options = {"mask": mask, "bias": bias.astype(of_bias), "softcap": 9.0}
        sinks = rng.standard_normal(4).astype(of_bias)
        assert_gradients_close_to_reference(q, k, v, dout, **options, sinks=sinks, is_causal=True)
    for sinks in ([1, 2, 0, -1], [0.5, 1, 0, -np.inf]):
        _, vjp = na.attention_vjp(q, k, v, sinks=sinks)
        assert vjp(dout).sinks.dtype == np.float64


@settings(
    max_examples=15,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(problem=problems(), seed=st.integers(0, 2**32), num_threads=st.integers(1, 3))
def test_random_mixtures(any_backend, problem, seed, num_threads):
    q, k, v, options = problem
    rng = np.random.default_rng(seed)
    precision = np.float64 if q.dtype == np.float64 else np.float32
    trusted = np.longdouble if precision is np.float64 else np.float64
    (out, lse), vjp = na.attention_vjp(
        q, k, v, **options, bias_gradient="bias" in options, return_lse=True,
        num_threads=num_threads,
    )  # fmt: skip
    dout, dlse = numbers(rng, *out.shape, dtype=q.dtype), numbers(rng, *lse.shape, dtype=precision)
    kept = np.empty(out.shape, precision)  # which `out` is the rounded copy of
    na.attention(q, k, v, **options, out=kept)
    plain = reference.attention_backward(
        dout, q, k, v, kept, lse, dlse=dlse, **options, dtype=precision
    )
    expected = reference.attention_backward(dout, q, k, v, dlse=dlse, **options, dtype=trusted)
    for actual, wanted, one in zip(vjp(dout, dlse), expected, plain, strict=True):
        if wanted is None:
            assert actual is None
            continue
        lost = np.abs(one - wanted).max(initial=0)
        size = np.abs(wanted).max(initial=1)
        eps = 200 * max(np.finfo(x).eps for x in (precision, np.result_type(actual, np.float32)))
        if actual.dtype.itemsize == 2:
            eps = 2.0**-7
        np.testing.assert_allclose(
            actual.astype(precision), wanted, rtol=0, atol=float(eps * size + LOOSE * lost)
        )


# ---- arrays ------------------------------------------------------------------------------------

BATCHES = [
    ((3, 2), (3, 2), (3, 2)),
    ((1, 2), (3, 1), (3, 2)),
    ((3, 1), (2,), (1, 2)),
    ((), (3, 2), (3, 2)),
    ((3, 2), (), (3, 2)),
    ((3, 2), (3, 2), ()),
    ((2,), (3, 1), ()),
]


@pytest.mark.parametrize("batches", BATCHES, ids=str)
@pytest.mark.parametrize("layout", ["bhld", "blhd"])
def test_leading_axes_are_summed_over(any_backend, rng, batches, layout):
    of_q, of_k, of_v = batches
    for name in DTYPES if layout == "bhld" else ["float32"]:
        dtype = named_dtype(name)
        q = numbers(rng, *of_q, 4, 20, 8, dtype=dtype)
        k = numbers(rng, *of_k, 2, 31, 8, dtype=dtype)
        v = numbers(rng, *of_v, 2, 31, 6, dtype=dtype)
        dout = numbers(rng, 3, 2, 4, 20, 6, dtype=dtype)
        if layout == "blhd":
            q, k, v, dout = (x.swapaxes(-2, -3) for x in (q, k, v, dout))
        options = {"is_causal": True, "bias": numbers(rng, 2, 1, 1, 31), "sinks": SINKS.repeat(2)}
        assert_gradients_close_to_reference(q, k, v, dout, layout=layout, **options)


@pytest.mark.parametrize("layout", ["bhld", "blhd"])
def test_two_and_three_axes(backend, rng, layout):
    options = {"is_causal": True, "layout": layout, "bias": numbers(rng, 14)}
    q, k, v = numbers(rng, 10, 8), numbers(rng, 14, 8), numbers(rng, 14, 5)
    dout, dlse = numbers(rng, 10, 5), numbers(rng, 10)
    assert_gradients_close_to_reference(q, k, v, dout, dlse, sinks=np.array([0.5]), **options)
    heads, lse = numbers(rng, 4, 6, 10, 8), numbers(rng, 4, 6, 10)
    many = [heads, k, v, numbers(rng, 4, 6, 10, 5), lse]
    if layout == "blhd":
        many = [x.swapaxes(1, 2) if x.ndim > 2 else x for x in many]
    assert_gradients_close_to_reference(*many, **options)


def test_strides(dtype, arrays, rng):
    """Whatever the strides, also of `out`, `lse` and their gradients."""
    q, k, v = arrays(2, hq=4, hkv=2, lq=37, lk=45, d=9, dtype=dtype)
    dout, dlse = like_out(rng, q, v), of_lse(rng, q, v)
    kept, _ = na.attention_vjp(q, k, v)
    out = np.empty(kept.shape, dlse.dtype)
    _, lse = na.attention(q, k, v, return_lse=True, out=out)
    given = (dout, q, k, v, out, lse)
    expected = na.attention_backward(*given, dlse=dlse)

    def every_other(x):
        wide = np.full([2 * n for n in x.shape], np.nan, x.dtype)
        wide[(slice(None, None, 2),) * x.ndim] = x
        return wide[(slice(None, None, 2),) * x.ndim]

    for kind in (np.asfortranarray, lambda x: np.flip(np.flip(x).copy()), every_other):
        actual = na.attention_backward(*map(kind, given), dlse=kind(dlse))
        for x, wanted in zip(actual[:3], expected[:3], strict=True):
            eps = 1e-2 if dtype.itemsize == 2 else 40 * np.finfo(dtype).eps
            np.testing.assert_allclose(
                x.astype(np.float64), wanted.astype(np.float64), rtol=0, atol=eps
            )
    ones = np.broadcast_to(dout.dtype.type(1), dout.shape)
    same = na.attention_backward(ones, *given[1:]), na.attention_backward(ones.copy(), *given[1:])
    for x, wanted in zip(*same, strict=True):
        assert (x is None and wanted is None) or np.array_equal(x, wanted)


def test_empty(backend):
    def zeros(*shape):
        return np.zeros(shape, np.float32)

    for batch, lq, lk in (((), 0, 3), ((), 3, 0), ((0,), 3, 4), ((0,), 0, 0), ((2, 0), 3, 4)):
        q, k, v = zeros(*batch, 4, lq, 8), zeros(*batch, 2, lk, 8), zeros(*batch, 2, lk, 5)
        dlse = np.ones((*batch, 4, lq), np.float32)
        bias = zeros(4, lq, 1)
        out, vjp = na.attention_vjp(q, k, v, bias=bias, bias_gradient=True, sinks=[0.5, 0, 0, 0])
        gradients = vjp(out, dlse)
        for x, one in zip(gradients, (q, k, v, bias), strict=False):
            assert x.shape == one.shape
            assert not x.any()
        np.testing.assert_array_equal(gradients.sinks, [3 if (batch, lk) == ((), 0) else 0] * 4)
    nothing = zeros(0, 3, 8)
    out, vjp = na.attention_vjp(nothing, nothing, nothing, sinks=[])
    assert [x.shape for x in vjp(out) if x is not None] == [(0, 3, 8)] * 3 + [(0,)]


# ---- what is not a number ----------------------------------------------------------------------


def assert_same(actual, expected, dtype, at=slice(None)):
    """Compare what a NaN elsewhere may have changed by rounding, but not more.

    The kernels compute again around values that are not finite.
    """
    eps = {2: 2e-2 if dtype.name == "bfloat16" else 4e-3, 4: 1e-5, 8: 1e-13}[dtype.itemsize]
    x, wanted = (np.asarray(x[at], np.float64) for x in (actual, expected))
    np.testing.assert_allclose(x, wanted, rtol=0, atol=eps * np.abs(wanted).max(initial=1))


@pytest.mark.parametrize("name", HIDES_KEYS_70_ON)
@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("softcap", [None, 5.0])
def test_masked_keys_count_for_nothing(dtype, arrays, rng, name, bad, softcap):
    q, k, v = arrays(hq=2, lq=50, lk=100, d=9, dtype=dtype)
    dout, dlse = like_out(rng, q, v), of_lse(rng, q, v)
    options = HIDES_KEYS_70_ON[name] | {"softcap": softcap}
    if "bias" in options:
        options |= {"bias": options["bias"].astype(dtype), "bias_gradient": True}
    expected = na.attention_vjp(q, k, v, **options)[1](dout, dlse)
    k[:, 70:], v[:, 70:] = bad, bad
    actual = na.attention_vjp(q, k, v, **options)[1](dout, dlse)
    if "some" in name:  # from query 45 on all are attended to
        assert_same(actual.q, expected.q, dtype, np.s_[:, :45])
        assert np.isnan(actual.q[:, 45:]).all()
        return
    for x, wanted in zip(actual, expected, strict=True):
        if wanted is not None:
            assert_same(x, wanted, dtype)
    assert not actual.k[:, 70:].any()
    assert not actual.v[:, 70:].any()
    assert actual.bias is None or not actual.bias[70:].any()


ALL, NONE, ONE = slice(None), slice(0), slice(20, 21)
BEFORE, AFTER = slice(None, 21), slice(20, None)
# Rows of the gradients of q, k and v that are NaN where element 20 of an array is, if causal.
SHOWS = {
    "q": (ONE, BEFORE, BEFORE),
    "k": (AFTER, ALL, ALL),
    "v": (AFTER, ALL, NONE),
    "dout": (ONE, BEFORE, BEFORE),
    "out": (ONE, BEFORE, NONE),
    "lse": (ONE, BEFORE, BEFORE),
    "dlse": (ONE, BEFORE, NONE),
}


@pytest.mark.parametrize("name", SHOWS)
def test_a_nan_shows_where_it_is_attended_to(dtype, arrays, rng, name):
    """And nowhere else: a query and a key that do not see one another share nothing."""
    q, k, v = arrays(hq=2, lq=60, d=9, dtype=dtype)
    given = {"q": q, "k": k, "v": v, "dout": like_out(rng, q, v), "dlse": of_lse(rng, q, v)}

    def results():
        out = np.empty(q.shape, given["dlse"].dtype)
        _, lse = na.attention(q, k, v, is_causal=True, out=out, return_lse=True)
        return {"out": out, "lse": lse}

    given |= results()
    expected = na.attention_backward(**given, is_causal=True)
    given[name][(0, 20, 3) if given[name].ndim == 3 else (0, 20)] = np.nan
    if name in "qkv":
        given |= results()
    actual = na.attention_backward(**given, is_causal=True)
    for x, wanted, rows in zip(actual, expected, SHOWS[name], strict=False):
        is_nan = np.zeros(x.shape, bool)
        is_nan[0, rows] = True
        if name == "dout" and x is actual.v:
            is_nan[..., np.arange(9) != 3] = False
        np.testing.assert_array_equal(np.isnan(x), is_nan)
        assert_same(x, wanted, dtype, ~is_nan)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_queries_that_attend_to_nothing(dtype, arrays, rng, bad):
    q, k, v = arrays(hq=2, lq=50, lk=60, d=9, dtype=dtype)
    given = [like_out(rng, q, v), q, k, v]
    mask = rng.random((50, 60)) < 0.5
    mask[17:21] = False
    bias = np.where(mask, 0, -np.inf).astype(np.float32)
    for options in ({"mask": mask}, {"bias": bias, "bias_gradient": True}):
        out, lse = na.attention(q, k, v, mask=mask, return_lse=True)
        expected = na.attention_backward(*given, out, lse, **options)
        changed = [x.copy() for x in (*given, out)]
        for i in (0, 1, 4):  # dout, q, out
            changed[i][:, 17:21] = bad
        actual = na.attention_backward(*changed, lse, **options)
        assert not actual.q[:, 17:21].any()
        for x, wanted in zip(actual, expected, strict=True):
            if wanted is not None:
                assert_same(x, wanted, dtype)


def test_sinks_of_queries_that_attend_to_nothing(dtype, arrays, rng):
    q, k, v = arrays(hq=2, lq=50, lk=60, d=9, dtype=dtype)
    mask = np.arange(50)[:, np.newaxis] != 17
    dout = like_out(rng, q, v)
    _, vjp = na.attention_vjp(q, k, v, mask=mask, sinks=[0.5, 1.0])
    expected = vjp(dout).sinks
    dout[:, 17] = np.nan
    np.testing.assert_array_equal(vjp(dout).sinks, expected)


def test_results_may_be_written_to(dtype, arrays, rng):
    q, k, v = arrays(hq=2, lq=20, d=8, dtype=dtype)
    (out, lse), vjp = na.attention_vjp(q, k, v, return_lse=True)
    dout = like_out(rng, q, v)
    expected = vjp(dout)
    out -= 1
    lse[...] = 0
    for x, wanted in zip(vjp(dout)[:3], expected[:3], strict=True):
        np.testing.assert_array_equal(x, wanted)


def test_logits_of_minus_infinity_have_no_weight(dtype, arrays, rng):
    """Also where a query has no others, so that its lse is -inf: its result is 0 whatever v."""
    q, k, v = arrays(hq=2, lq=50, lk=60, d=9, dtype=dtype)
    q, k[0, 30:], k[1] = np.abs(q) + dtype.type(0.1), -np.inf, -np.inf
    dout = like_out(rng, q, v)
    out, vjp = na.attention_vjp(q, k, v)
    assert not out[1].any()
    gradients = vjp(dout)
    assert not gradients.v[1].any()
    expected = na.attention_vjp(q[0], k[0, :30], v[0, :30])[1](dout[0])
    assert_same(gradients.q[0], expected.q, dtype)
    assert_same(gradients.v[0, :30], expected.v, dtype)
    assert_same(gradients.k[0, :30], expected.k, dtype)


@pytest.mark.parametrize("options", [{}, {"is_causal": True}, {"window": (6, 2)}], ids=str)
def test_padding_is_not_looked_at(dtype, arrays, rng, options):
    """A padded batch has the gradients of its sentences, and 0 in the padding."""
    lengths = [20, 13, 1, 0, 40]
    q, k, v = arrays(5, hq=4, hkv=2, lq=40, d=16, dtype=dtype)
    options = options | {"sinks": [0.5, 1.0, 0.0, -np.inf]}
    padded = {"q_lengths": lengths, "kv_lengths": lengths}
    out, lse = na.attention(q, k, v, **padded, **options, return_lse=True)
    given = [like_out(rng, q, v), q, k, v, out, lse, of_lse(rng, q, v)]
    sentences = [
        na.attention_backward(*(x[i, :, :n] for x in given[:6]), dlse=given[6][i, :, :n], **options)
        for i, n in enumerate(lengths)
    ]
    for i, n in enumerate(lengths):
        for x in given:
            x[i, :, n:] = np.nan
    actual = na.attention_backward(*given[:6], dlse=given[6], **padded, **options)
    for i, n in enumerate(lengths):
        for x, wanted in zip(actual[:3], sentences[i][:3], strict=True):
            assert_same(x[i, :, :n], wanted, dtype)
            assert not x[i, :, n:].any()
    np.testing.assert_allclose(
        actual.sinks, sum(x.sinks for x in sentences), rtol=1e-12, atol=1e-12
    )


# ---- both functions, and ragged batches --------------------------------------------------------


def test_vjp_is_attention_and_its_backward(dtype, arrays, rng):
    q, k, v = arrays(2, hq=4, hkv=2, lq=30, lk=41, d=16, dtype=dtype)
    options = {"is_causal": True, "sinks": [0.5, 1, 2, -1], "window": (20, None)}
    expected, expected_lse = na.attention(q, k, v, **options, return_lse=True)
    (out, lse), vjp = na.attention_vjp(q, k, v, **options, return_lse=True)
    assert out.dtype == dtype
    np.testing.assert_array_equal(out, expected)
    np.testing.assert_array_equal(lse, expected_lse)
    np.testing.assert_array_equal(na.attention_vjp(q, k, v, **options)[0], expected)
    wide = np.empty(out.shape, lse.dtype)
    na.attention(q, k, v, **options, out=wide)
    for dout, dlse in ((like_out(rng, q, v), None), (like_out(rng, q, v), of_lse(rng, q, v))):
        backward = na.attention_backward(dout, q, k, v, wide, lse, dlse=dlse, **options)
        for _ in range(2):
            for x, wanted in zip(vjp(dout, dlse), backward, strict=True):
                assert (x is None and wanted is None) or np.array_equal(x, wanted)


RAGGED = [(3, 3), (0, 5), (70, 70), (1, 40), (9, 0), (33, 17), (0, 0)]
STARTS = [np.concatenate([[0], np.cumsum(part)]) for part in zip(*RAGGED, strict=True)]


@pytest.mark.parametrize("is_causal", [False, True])
def test_varlen(dtype, rng, is_causal):
    total_q, total_k = (starts[-1] for starts in STARTS)
    q, k, v = (
        numbers(rng, *shape, dtype=dtype)
        for shape in ((total_q, 4, 9), (total_k, 2, 9), (total_k, 2, 12))
    )
    tail = rng.random((4, total_q, 6)) < 0.7
    options = {"is_causal": is_causal, "softcap": 4.0, "window": (30, None)}
    options |= {"sinks": np.array([0.5, 1, 2, -1]), "alibi_slopes": [0.1, 0.2, 0, 0.3]}
    given = {"tail_mask": tail, **options}
    out = np.empty((total_q, 4, 12), np.float64 if dtype == np.float64 else np.float32)
    _, lse = na.attention_varlen(q, k, v, *STARTS, **given, return_lse=True, out=out)
    dout = numbers(rng, *out.shape, dtype=dtype)
    dlse = numbers(rng, *lse.shape, dtype=lse.dtype)
    actual = na.attention_varlen_backward(
        dout, q, k, v, out, lse, *STARTS, dlse=dlse, **given, num_threads=2
    )
    assert actual.bias is None
    assert [x.dtype for x in actual[:3]] == [dtype] * 3
    eps = {2: 2e-2 if dtype.name == "bfloat16" else 4e-3, 4: 1e-5, 8: 1e-13}[dtype.itemsize]
    of_sinks = 0
    for (query, end), (key, key_end) in zip(*map(itertools.pairwise, STARTS), strict=True):
        rows, keys = slice(query, end), slice(key, key_end)
        some = min(key_end - key, 6)
        own = {"tail_mask": tail[:, rows, 6 - some :], "layout": "blhd", **options}
        expected = reference.attention_backward(
            dout[rows], q[rows], k[keys], v[keys], dlse=dlse[rows], **own
        )
        parts = (actual.q[rows], actual.k[keys], actual.v[keys])
        for x, wanted in zip(parts, expected[:3], strict=True):
            tolerance = eps * np.abs(wanted).max(initial=1)
            np.testing.assert_allclose(x.astype(float), wanted, rtol=0, atol=tolerance)
        of_sinks += expected[4]
    np.testing.assert_allclose(actual.sinks, of_sinks, rtol=0, atol=max(eps, 1e-12) * 30)


def test_varlen_without_sequences(backend):
    nothing = np.zeros((0, 2, 4), np.float32)
    lse = np.zeros((0, 2), np.float32)
    for starts in ([0], [0, 0]):
        gradients = na.attention_varlen_backward(*[nothing] * 5, lse, starts, starts)
        assert [x.shape for x in gradients[:3]] == [(0, 2, 4)] * 3
