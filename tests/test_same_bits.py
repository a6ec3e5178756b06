"""Promise: the bits of a result depend on the inputs' values alone."""

import ml_dtypes
import numattn as na
import numpy as np
import pytest
from numattn import _arguments

OPTIONS = {
    "plain": {},
    "causal": {"is_causal": True},
    "many": {
        "window": (100, 5),
        "softcap": 5.0,
        "sinks": [0.1, 0.2, 0.3, 0.4],
        "alibi_slopes": [0.1, 0.2, 0.3, 0.4],
    },
}


@pytest.fixture(params=OPTIONS)
def options(request):
    return OPTIONS[request.param]


@pytest.fixture(params=[36, 35], ids="d={}".format)
def qkv(native_dtype, arrays, request):
    return arrays(3, hq=4, hkv=2, lq=333, lk=403, d=request.param, dtype=native_dtype)


def test_threads(qkv, options):
    expected = na.attention(*qkv, **options, return_lse=True, num_threads=1)
    for num_threads in (2, 3, 7):
        actual = na.attention(*qkv, **options, return_lse=True, num_threads=num_threads)
        np.testing.assert_array_equal(actual[0], expected[0])
        np.testing.assert_array_equal(actual[1], expected[1])


def test_threads_with_long_sequences(native_dtype, arrays):
    """Of so many keys that they are added up in parts, which tiles begin at different keys."""
    q, k, v = arrays(hq=1, lq=700, lk=5000, d=4, dtype=native_dtype)
    for more in ({}, {"window": (3000, 0)}, {"window": (2001, None), "sinks": [0.3]}):
        expected = na.attention(q, k, v, **more, num_threads=1)
        for num_threads in (2, 5):
            actual = na.attention(q, k, v, **more, num_threads=num_threads)
            np.testing.assert_array_equal(actual, expected)


def test_threads_with_many_heads(native_dtype, arrays):
    """So many heads of few queries that threads share the heads of one KV head."""
    for heads, lq in ((7, 5), (34, 3), (128, 1)):
        q, k, v = arrays(hq=heads, hkv=1, lq=lq, lk=1700, d=20, dtype=native_dtype)
        v[0, 1000:1010] = ml_dtypes.finfo(native_dtype).max  # whose sums overflow
        tail_mask = np.tri(lq, 9, 4, dtype=bool)
        many = {"sinks": np.linspace(-1, 1, heads), "softcap": 3.0, "tail_mask": tail_mask}
        for more in ({"is_causal": True}, many):
            expected = na.attention(q, k, v, **more, return_lse=True, num_threads=1)
            for num_threads in (2, 3, 16):
                actual = na.attention(q, k, v, **more, return_lse=True, num_threads=num_threads)
                np.testing.assert_array_equal(actual[0], expected[0])
                np.testing.assert_array_equal(actual[1], expected[1])


def test_batch_neighbours(qkv, options):
    together = na.attention(*qkv, **options)
    for item in range(3):
        alone = na.attention(*(x[item] for x in qkv), **options)
        np.testing.assert_array_equal(alone, together[item])


def gradients(q, k, v, options, num_threads=None):
    """Return them for fixed gradients with respect to the results."""
    (out, lse), vjp = na.attention_vjp(q, k, v, **options, return_lse=True, num_threads=num_threads)
    return [x for x in vjp(out, out[..., 0].astype(lse.dtype)) if x is not None]


@pytest.mark.parametrize("lengths", [(333, 403), (1500, 40), (30, 3300)], ids=str)
def test_threads_of_gradients(native_dtype, arrays, rng, options, lengths):
    """Whichever thread adds to a key's gradient first, and to a bias's that many rows share."""
    q, k, v = arrays(2, hq=4, hkv=2, lq=lengths[0], lk=lengths[1], d=20, dtype=native_dtype)
    bias = rng.standard_normal((4, 1, lengths[1]), dtype=np.float32)
    for more in ({}, {"bias": bias, "bias_gradient": True}):
        expected = gradients(q, k, v, options | more, 1)
        for num_threads in (2, 3):
            actual = gradients(q, k, v, options | more, num_threads)
            for x, wanted in zip(actual, expected, strict=True):
                np.testing.assert_array_equal(x, wanted)


def test_batch_neighbours_of_gradients(qkv, options):
    together = gradients(*qkv, options)
    for item in range(3):
        alone = gradients(*(x[item] for x in qkv), options)
        for x, wanted in zip(alone[:3], together, strict=False):
            np.testing.assert_array_equal(x, wanted[item])


DROPOUT = {"dropout": 0.4, "rng": 2**63 + 1}


def test_threads_with_dropout(qkv, options):
    expected = na.attention(*qkv, **options, **DROPOUT, return_lse=True, num_threads=1)
    of_inputs = gradients(*qkv, options | DROPOUT, 1)
    for num_threads in (2, 3):
        actual = na.attention(*qkv, **options, **DROPOUT, return_lse=True, num_threads=num_threads)
        again = gradients(*qkv, options | DROPOUT, num_threads)
        for x, wanted in zip((*actual, *again), (*expected, *of_inputs), strict=True):
            np.testing.assert_array_equal(x, wanted)


def test_layouts_and_strides_with_dropout(qkv):
    expected = na.attention(*qkv, **DROPOUT)
    as_blhd = [np.ascontiguousarray(x.swapaxes(1, 2)) for x in qkv]
    for moved in (as_blhd, [np.asfortranarray(x) for x in as_blhd]):
        actual = na.attention(*moved, layout="blhd", **DROPOUT).swapaxes(1, 2)
        np.testing.assert_array_equal(actual, expected)
    split = [x.reshape(1, 3, 1, *x.shape[1:]) for x in qkv]
    np.testing.assert_array_equal(na.attention(*split, **DROPOUT)[0, :, 0], expected)


def test_batch_neighbours_with_dropout(qkv):
    """Their values are nothing to an item, which has to keep its place."""
    together = na.attention(*qkv, **DROPOUT)
    of_inputs = gradients(*qkv, DROPOUT)
    for item in range(3):
        others = [np.zeros_like(x) for x in qkv]
        for x, of_all in zip(others, qkv, strict=True):
            x[item] = of_all[item]
        np.testing.assert_array_equal(na.attention(*others, **DROPOUT)[item], together[item])
        for x, wanted in zip(gradients(*others, DROPOUT), of_inputs, strict=True):
            np.testing.assert_array_equal(x[item], wanted[item])


def side_by_side(x):
    """Return an equal array in which the heads of each token are neighbours."""
    return np.ascontiguousarray(x.swapaxes(1, 2)).swapaxes(1, 2)


def test_layouts_and_strides(qkv, options):
    expected = na.attention(*qkv, **options)
    as_bhld = [side_by_side(x) for x in qkv]
    np.testing.assert_array_equal(na.attention(*as_bhld, **options), expected)
    as_blhd = [x.swapaxes(1, 2) for x in as_bhld]
    np.testing.assert_array_equal(
        na.attention(*as_blhd, layout="blhd", **options).swapaxes(1, 2), expected
    )
    fortran = [np.asfortranarray(x) for x in qkv]
    np.testing.assert_array_equal(na.attention(*fortran, **options), expected)
    reversed_ = [np.ascontiguousarray(x[..., ::-1])[..., ::-1] for x in qkv]
    np.testing.assert_array_equal(na.attention(*reversed_, **options), expected)


@pytest.mark.parametrize("lq", [1, 5])
def test_heads_side_by_side(native_dtype, arrays, lq):
    """Few queries go through several heads of k and v at once where those are neighbours."""
    q, k, v = arrays(2, hq=12, hkv=6, lq=lq, lk=3333, d=24, dv=20, dtype=native_dtype)
    per_head = np.linspace(0.1, 1.2, 12)
    (k8, k_scale), (v8, v_scale) = na.quantize_kv(k), na.quantize_kv(v)
    for options in (
        {},
        {"kv_lengths": [3333, 77], "q_lengths": lq, "is_causal": True},
        {"window": (1700, 0), "alibi_slopes": per_head, "sinks": per_head, "softcap": 9.0},
    ):
        scales = {"k_scale": k_scale, "v_scale": v_scale, **options}
        for num_threads in (1, 2):
            for keys, values, more in (
                (k, v, options),
                (k, v8, {"v_scale": v_scale, **options}),
                (k8, v8, scales),
            ):
                expected = na.attention(q, keys, values, **more, return_lse=True)
                actual = na.attention(
                    q,
                    side_by_side(keys),
                    side_by_side(values),
                    **more,
                    return_lse=True,
                    num_threads=num_threads,
                )
                np.testing.assert_array_equal(actual[0], expected[0])
                np.testing.assert_array_equal(actual[1], expected[1])


def test_unaligned_arrays(qkv, options):
    def unaligned(x):
        raw = np.zeros(x.nbytes + 1, np.uint8)[1:]
        result = raw.view(np.uint8).reshape(-1)[: x.nbytes].view(x.dtype).reshape(x.shape)
        result[...] = x
        assert not result.flags.aligned
        return result

    moved = [unaligned(x) for x in qkv]
    out = unaligned(np.zeros_like(qkv[0]))
    na.attention(*moved, **options, out=out)
    np.testing.assert_array_equal(out, na.attention(*qkv, **options))


class Subclass(np.ndarray):
    """What is checked at length."""


@pytest.mark.thread_unsafe
def test_common_call_and_general_call(qkv, monkeypatch):
    """The short way into the kernels and the one through all checks."""
    q, k, v = qkv
    pairs = (*q.shape[:-1], k.shape[-2])
    heads = np.linspace(-1, 1, q.shape[-3]).tolist()
    for options in (
        {},
        {"is_causal": True},
        {"scale": 0.3},
        {"window": (40, None), "softcap": 3.0, "return_lse": True, "num_threads": 2},
        {"mask": np.arange(pairs[-1]) % 3 > 0, "sinks": heads, "alibi_slopes": np.array(heads)},
        {"bias": np.ones((1, 1, *pairs[-2:]), np.float32), "q_offset": 5},
        {"kv_lengths": 77, "q_lengths": 50, "is_causal": True},
    ):
        with monkeypatch.context() as patch:
            patch.delattr(_arguments, "check")  # a call that needs it fails
            common = na.attention(*qkv, **options)
        general = na.attention(q.view(Subclass), k, v, **options)
        assert type(common) is type(general)
        for actual, expected in zip(common, general, strict=True):
            np.testing.assert_array_equal(actual, expected)


def test_full_mask_is_no_mask(qkv):
    mask = np.ones((333, 403), bool)
    np.testing.assert_array_equal(na.attention(*qkv, mask=mask), na.attention(*qkv))


LAYERS = {
    "plain": (na.MultiHeadAttention, {}),
    "rotary": (na.MultiHeadAttention, {"rotary": True, "kv_heads": 2}),
    "norms": (na.MultiHeadAttention, {"rotary": {"rotary_dim": 6}, "qk_norm": True, "bias": False}),
    "block": (na.TransformerBlock, {"norm_first": False}),
    "gated": (na.TransformerBlock, {"rotary": True, "gated": True, "norm": "rms"}),
}


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("kind", LAYERS)
def test_layers_in_a_batch_with_padding(native_dtype, kind, causal):
    """A sequence has the same bits alone, padded, and beside others; so do threads."""
    rng = np.random.default_rng(0)
    make, options = LAYERS[kind]
    layer = make(40, 4, dtype=native_dtype, rng=0, **options)
    x = rng.standard_normal((6, 130, 40)).astype(native_dtype)
    lengths = np.array([130, 64, 33, 19, 7, 1])
    padded = layer(x, lengths=lengths, is_causal=causal)
    for threads in (1, 3, 64):
        again = layer(x, lengths=lengths, is_causal=causal, num_threads=threads)
        np.testing.assert_array_equal(again, padded)
    for own, out, n in zip(x, padded, lengths, strict=True):
        np.testing.assert_array_equal(layer(own[:n], is_causal=causal), out[:n])
