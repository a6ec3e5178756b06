"""Promise: ragged batches, pages, 8-bit keys and merged parts are the same attention."""

from itertools import pairwise

import numattn as na
import numpy as np
import pytest
from checks import assert_within
from numattn import _reference as reference

OPTIONS = {
    "plain": {},
    "causal": {"is_causal": True},
    "many": {
        "window": (100, 5),
        "softcap": 5.0,
        "sinks": [0.1, 0.2, -np.inf, 0.4],
        "alibi_slopes": [0.1, 0.2, 0.0, 0.4],
        "scale": -0.3,
    },
}
LENGTHS_Q = [5, 0, 1, 64, 130, 3, 17, 2]
LENGTHS_K = [9, 7, 3300, 64, 150, 0, 200, 1]


@pytest.fixture(params=OPTIONS)
def options(request):
    return OPTIONS[request.param]


def cumulative(lengths):
    return np.concatenate([[0], np.cumsum(lengths)])


@pytest.fixture
def ragged(rng):
    def make(dtype, d=16, dv=20):
        q = rng.standard_normal((sum(LENGTHS_Q), 4, d)).astype(dtype)
        k = rng.standard_normal((sum(LENGTHS_K), 2, d)).astype(dtype)
        v = rng.standard_normal((sum(LENGTHS_K), 2, dv)).astype(dtype)
        return q, k, v

    return make


def pairs_of_slices():
    q, k = cumulative(LENGTHS_Q), cumulative(LENGTHS_K)
    return [(slice(*a), slice(*b)) for a, b in zip(pairwise(q), pairwise(k), strict=True)]


def test_varlen_is_attention_of_each_sequence(native_dtype, ragged, options):
    """To the bit: neither the neighbours nor the threads matter."""
    q, k, v = ragged(native_dtype)
    starts = cumulative(LENGTHS_Q), cumulative(LENGTHS_K).astype(np.int32)
    out, lse = na.attention_varlen(q, k, v, *starts, **options, return_lse=True, num_threads=1)
    for threads in (2, 5):
        again = na.attention_varlen(q, k, v, *starts, **options, num_threads=threads)
        np.testing.assert_array_equal(again, out)
    for rows, keys in pairs_of_slices():
        alone, alone_lse = na.attention(
            q[rows], k[keys], v[keys], **options, layout="blhd", return_lse=True
        )
        np.testing.assert_array_equal(out[rows], alone)
        np.testing.assert_array_equal(lse[rows], alone_lse)


def test_varlen_against_the_reference(backend, ragged, options):
    q, k, v = ragged(np.float32)
    out, lse = na.attention_varlen(
        q, k, v, cumulative(LENGTHS_Q), cumulative(LENGTHS_K), **options, return_lse=True
    )
    for rows, keys in pairs_of_slices():
        expected = reference.attention(q[rows], k[keys], v[keys], **options, layout="blhd")
        np.testing.assert_allclose(out[rows], expected[0], rtol=0, atol=1e-5)
        np.testing.assert_allclose(lse[rows], expected[1], rtol=0, atol=2e-5)


def test_varlen_offsets_and_out(backend, ragged):
    q, k, v = ragged(np.float32)
    starts = cumulative(LENGTHS_Q), cumulative(LENGTHS_K)
    offsets = np.arange(len(LENGTHS_Q)) * 3
    out = np.full((*q.shape[:2], v.shape[-1]), np.nan, np.float32)
    result = na.attention_varlen(q, k, v, *starts, is_causal=True, q_offset=offsets, out=out)
    assert result is out
    for i, (rows, keys) in enumerate(pairs_of_slices()):
        expected, _ = reference.attention(
            q[rows], k[keys], v[keys], is_causal=True, q_offset=offsets[i], layout="blhd"
        )
        np.testing.assert_allclose(out[rows], expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("shape", [(4, True, 6), (True, 200), (1, 3300), (4, 1, 0)], ids=str)
def test_varlen_tail_mask(backend, ragged, rng, options, shape):
    """Of the last keys of each sequence, also of one that has fewer."""
    q, k, v = ragged(np.float32)
    starts = cumulative(LENGTHS_Q), cumulative(LENGTHS_K)
    tail = rng.random(tuple(sum(LENGTHS_Q) if n is True else n for n in shape)) < 0.5
    every = np.broadcast_to(tail, (4, len(q), shape[-1]))
    out, lse = na.attention_varlen(q, k, v, *starts, tail_mask=tail, **options, return_lse=True)
    for rows, keys in pairs_of_slices():
        own = every[:, rows, max(shape[-1] - (keys.stop - keys.start), 0) :]
        expected = reference.attention(
            q[rows], k[keys], v[keys], tail_mask=own, **options, layout="blhd"
        )
        np.testing.assert_allclose(out[rows], expected[0], rtol=0, atol=1e-5)
        np.testing.assert_allclose(lse[rows], expected[1], rtol=0, atol=2e-5)


def test_varlen_without_sequences(backend):
    nothing = np.zeros((0, 2, 4), np.float32)
    assert na.attention_varlen(nothing, nothing, nothing, [0], [0]).shape == (0, 2, 4)
    assert na.attention_varlen(nothing, nothing, nothing, [0, 0], [0, 0]).shape == (0, 2, 4)


def in_pages(x, lengths, page_size, rng):
    """Return pages in random order with NaN where there is nothing, and the table."""
    batch, heads, _, d = x.shape
    needed = [-(-n // page_size) for n in lengths]
    order = rng.permutation(sum(needed) + 3)
    pages = np.full((len(order), page_size, heads, d), np.nan).astype(x.dtype)
    table = np.full((batch, max(needed) + 1), -7)
    used = 0
    for i, n in enumerate(lengths):
        for j in range(needed[i]):
            table[i, j] = order[used]
            part = x[i, :, j * page_size : min((j + 1) * page_size, n)]
            pages[order[used], : part.shape[1]] = part.swapaxes(0, 1)
            used += 1
    return pages, table


@pytest.mark.parametrize("page_size", [1, 3, 16, 200])
@pytest.mark.parametrize("lq", [1, 3, 40])
def test_pages(native_dtype, arrays, rng, options, page_size, lq):
    """To the bit the attention to the same keys side by side."""
    lengths = [150, 0, 33, 1]
    q, k, v = arrays(4, hq=4, hkv=2, lq=lq, lk=150, d=16, dv=20, dtype=native_dtype)
    k_pages, table = in_pages(k, lengths, page_size, np.random.default_rng(1))
    v_pages, _ = in_pages(v, lengths, page_size, np.random.default_rng(1))
    options = {"q_offset": np.array(lengths) - lq} | options
    expected, expected_lse = na.attention(q, k, v, kv_lengths=lengths, **options, return_lse=True)
    out, lse = na.attention_paged(q, k_pages, v_pages, table, lengths, **options, return_lse=True)
    np.testing.assert_array_equal(out, expected)
    np.testing.assert_array_equal(lse, expected_lse)
    blhd = na.attention_paged(
        q.swapaxes(1, 2), k_pages, v_pages, table, lengths, **options, layout="blhd"
    )
    np.testing.assert_array_equal(blhd.swapaxes(1, 2), expected)


def test_pages_in_numpy_and_shared_pages(backend, arrays, rng):
    q, k, v = arrays(2, hq=4, hkv=2, lq=2, lk=64, d=8)
    k_pages, table = in_pages(k, [64, 64], 16, np.random.default_rng(1))
    v_pages, _ = in_pages(v, [64, 64], 16, np.random.default_rng(1))
    table[1, 0] = table[0, 0]
    k[1, :, :16], v[1, :, :16] = k[0, :, :16], v[0, :, :16]
    more = {"q_lengths": [2, 1], "is_causal": True}
    out = na.attention_paged(q, k_pages, v_pages, table, [64, 50], **more)
    expected, _ = reference.attention(q, k, v, kv_lengths=[64, 50], **more)
    np.testing.assert_allclose(out, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("shape", [(4, 4, 3, 3), (4, 1, 1, 40), (3, 150), (1, 3, 0)], ids=str)
@pytest.mark.parametrize("layout", ["bhld", "blhd"])
def test_tail_mask_of_pages(backend, arrays, rng, options, shape, layout):
    lengths = [150, 0, 33, 1]
    q, k, v = arrays(4, hq=4, hkv=2, lq=3, lk=150, d=16, dv=20)
    k_pages, table = in_pages(k, lengths, 16, np.random.default_rng(1))
    v_pages, _ = in_pages(v, lengths, 16, np.random.default_rng(1))
    options = {"q_offset": np.array(lengths) - 3, "tail_mask": rng.random(shape) < 0.5} | options
    queries = q if layout == "bhld" else q.swapaxes(1, 2)
    out, lse = na.attention_paged(
        queries, k_pages, v_pages, table, lengths, **options, layout=layout, return_lse=True
    )
    if layout == "blhd":
        out, lse = out.swapaxes(1, 2), lse.swapaxes(1, 2)
    expected = reference.attention(q, k, v, kv_lengths=lengths, **options)
    np.testing.assert_allclose(out, expected[0], rtol=0, atol=1e-5)
    np.testing.assert_allclose(lse, expected[1], rtol=0, atol=2e-5)


def test_chunks_are_merged(dtype, arrays):
    """More keys than a chunk of decoding has; windows that leave whole chunks out."""
    q, k, v = arrays(2, hq=4, hkv=2, lq=2, lk=5000, d=20, dtype=dtype)
    precision = np.float64 if dtype == np.float64 else np.float32
    trusted = np.longdouble if dtype == np.float64 else np.float64
    for more in (
        {},
        {"is_causal": True, "window": (100, 0)},
        {"sinks": [9.0, 1, 2, -np.inf], "kv_lengths": [4000, 1537]},
        {"q_offset": -1, "is_causal": True},
    ):
        expected = reference.attention(q, k, v, **more, dtype=trusted)
        plain = [
            reference.attention(q, k, v, **more, dtype=precision, matmul=matmul)
            for matmul in (np.matmul, reference.matmul_by_einsum)
        ]
        out, lse = na.attention(q, k, v, **more, return_lse=True)
        assert_within(out, [x.astype(dtype) for x, _ in plain], expected[0], 4)
        assert_within(lse, [x for _, x in plain], expected[1], 4)


@pytest.mark.parametrize("lq", [1, 4, 70])
@pytest.mark.parametrize("which", ["k", "v", "kv"])
def test_8_bits_are_attention_to_what_they_stand_for(dtype, arrays, lq, which):
    q, k, v = arrays(2, hq=4, hkv=2, lq=lq, lk=211, d=24, dv=40, dtype=dtype)
    precision = np.float64 if dtype == np.float64 else np.float32
    given, options = {"k": k, "v": v}, {"is_causal": True, "window": (180, None)}
    meant = {name: x.astype(precision) for name, x in given.items()}
    scales = {}
    for name in which:
        given[name], scale = na.quantize_kv(given[name])
        scales[f"{name}_scale"] = scale
        meant[name] = given[name] * scale[..., None].astype(precision)
    out, lse = na.attention(q, **given, **scales, **options, return_lse=True)
    assert out.dtype == dtype
    wide = q.astype(precision)
    trusted = np.longdouble if dtype == np.float64 else np.float64
    expected = reference.attention(wide, **meant, **options, dtype=trusted)
    plain, plain_lse = reference.attention(wide, **meant, **options, dtype=precision)
    # Some hundred numbers are few to judge by; weights in bfloat16 lose what bfloat16 does.
    factor = 6 if dtype.itemsize > 2 else 2
    assert_within(out, [plain.astype(dtype)], expected[0], factor)
    assert_within(lse, [plain_lse], expected[1], 6)
    for threads in (1, 3):
        again = na.attention(q, **given, **scales, **options, num_threads=threads)
        np.testing.assert_array_equal(again, out)
    swapped = {name: x.swapaxes(1, 2) for name, x in given.items()}
    swapped |= {name: x.swapaxes(1, 2) for name, x in scales.items()}
    blhd = na.attention(q.swapaxes(1, 2), **swapped, **options, layout="blhd")
    np.testing.assert_allclose(
        blhd.swapaxes(1, 2).astype(precision), out.astype(precision), rtol=0, atol=1e-5
    )


def test_8_bits_in_pages_and_ragged(backend, arrays):
    q, k, v = arrays(2, hq=4, hkv=2, lq=2, lk=64, d=8)
    (k8, k_scale), (v8, v_scale) = na.quantize_kv(k), na.quantize_kv(v)
    scales = {"k_scale": k_scale, "v_scale": v_scale}
    expected = na.attention(q, k8, v8, **scales, is_causal=True)
    pages = [x.reshape(2, 2, 4, 16, -1).transpose(0, 2, 3, 1, 4).reshape(8, 16, 2, -1)
             for x in (k8, v8)]  # fmt: skip
    paged_scales = {
        name: x.reshape(2, 2, 4, 16).transpose(0, 2, 3, 1).reshape(8, 16, 2)
        for name, x in scales.items()
    }
    table = np.arange(8).reshape(2, 4)
    out = na.attention_paged(
        q, *pages, table, [64, 64], **paged_scales, q_lengths=2, is_causal=True
    )
    np.testing.assert_array_equal(out, expected)
    flat = [x.swapaxes(1, 2).reshape(-1, x.shape[1], x.shape[3]) for x in (q, k8, v8)]
    flat_scales = {name: x.swapaxes(1, 2).reshape(-1, 2) for name, x in scales.items()}
    out = na.attention_varlen(*flat, [0, 2, 4], [0, 64, 128], **flat_scales, is_causal=True)
    np.testing.assert_array_equal(out.reshape(2, 2, 4, 8).swapaxes(1, 2), expected)


def test_8_bits_lose_less_than_a_percent(isa, arrays):
    q, k, v = arrays(hq=8, hkv=2, lq=4, lk=2000, d=128)
    (k8, k_scale), (v8, v_scale) = na.quantize_kv(k), na.quantize_kv(v)
    exact = na.attention(q, k, v)
    out = na.attention(q, k8, v8, k_scale=k_scale, v_scale=v_scale)
    assert np.linalg.norm(out - exact) <= 0.01 * np.linalg.norm(exact)


@pytest.mark.parametrize("shape", [(3,), (2, 5, 7)])
def test_quantize(dtype, rng, shape):
    x = rng.standard_normal(shape).astype(dtype)
    x[..., 0] = 0
    numbers, scale = na.quantize_kv(x)
    assert numbers.dtype == np.int8
    assert scale.dtype == np.float32
    assert scale.shape == shape[:-1]
    back = numbers * scale[..., None]
    assert np.all(np.abs(back - x.astype(np.float32)) <= 0.51 * scale[..., None])


def test_merging_two_and_more(dtype, arrays):
    q, k, v = arrays(2, hq=4, hkv=2, lq=10, lk=90, d=8, dtype=dtype)
    ends = [0, 13, 13, 60, 90]
    parts = [
        na.attention(
            q, k[..., a:b, :], v[..., a:b, :], sinks=[1, 2, 3, 4] if a == 0 and b else None,
            return_lse=True,
        )
        for a, b in pairwise(ends)
    ]  # fmt: skip
    expected, expected_lse = reference.attention(q, k, v, sinks=[1, 2, 3, 4])
    step = {8: 1e-14, 4: 2e-6, 2: 2e-2}[dtype.itemsize]
    stacked = [np.stack(x) for x in zip(*parts, strict=True)]
    state = parts[0]
    for part in parts[1:]:
        state = na.merge_states([state, part])
    for out, lse in (state, na.merge_states(parts), na.merge_states(zip(*stacked, strict=True))):
        assert out.dtype == dtype
        np.testing.assert_allclose(out.astype(float), expected, rtol=0, atol=3 * step)
        np.testing.assert_allclose(lse, expected_lse, rtol=0, atol=1e-5)


def test_merging_with_nothing():
    nothing = np.zeros((2, 3), np.float32), np.full(2, -np.inf, np.float32)
    something = np.ones((2, 3), np.float32), np.zeros(2, np.float32)
    out, lse = na.merge_states([nothing, nothing])
    assert not out.any()
    assert np.all(lse == -np.inf)
    out, lse = na.merge_states([nothing, something])
    np.testing.assert_array_equal(out, something[0])
    np.testing.assert_array_equal(lse, something[1])
    into = something[0].copy()
    assert na.merge_states([(into, something[1]), nothing], out=into)[0] is into
    np.testing.assert_array_equal(into, something[0])


X = np.zeros((6, 2, 4), np.float32)
VARLEN = {
    "decreasing": (
        [0, 4, 3, 6],
        [0, 2, 4, 6],
        ValueError,
        "cu_seqlens_q: got 3 after 4 at index 2",
    ),
    "beyond": ([0, 7], [0, 6], ValueError, "cu_seqlens_q: got 7 at index 1, expected 0 to 6"),
    "negative": ([0, 6], [-1, 6], ValueError, "cu_seqlens_k: got -1 at index 0"),
    "begin": ([1, 6], [0, 6], ValueError, "cu_seqlens_q: got 1 as the first number, expected 0"),
    "end": ([0, 6], [0, 5], ValueError, "cu_seqlens_k: got 5 as the last number, expected 6"),
    "number": ([0, 6], [0, 3, 6], ValueError, "cu_seqlens_k: got 3 numbers, expected 2"),
    "kind": ([0.0, 6.0], [0, 6], TypeError, "cu_seqlens_q: got dtype float64, expected ints"),
    "shape": ([[0, 6]], [0, 6], ValueError, "cu_seqlens_q: got shape (1, 2)"),
    "empty": ([], [0, 6], TypeError, "cu_seqlens_q: got dtype float64"),
}


@pytest.mark.parametrize("name", VARLEN)
def test_bad_varlen(backend, name):
    starts_q, starts_k, error, message = VARLEN[name]
    with pytest.raises(error) as raised:
        na.attention_varlen(X, X, X, starts_q, starts_k)
    assert message in str(raised.value)


PAGES = np.zeros((3, 2, 1, 4), np.float32)
Q = np.zeros((2, 1, 1, 4), np.float32)
PAGED = {
    "page": (
        [[0, 3], [0, 0]],
        [4, 1],
        ValueError,
        "block_table: got 3 at index (0, 1), expected a page",
    ),
    "negative": ([[0, 1], [-1, 0]], [4, 1], ValueError, "block_table: got -1 at index (1, 0)"),
    "length": (
        [[0, 1], [0, 0]],
        [5, 1],
        ValueError,
        "kv_lengths: got 5 at index 0, expected 0 to 4",
    ),
    "table": ([[0, 1]], [4, 4], ValueError, "block_table: got shape (1, 2), expected (2, pages"),
    "kind": ([[0.0], [0.0]], [1, 1], TypeError, "block_table: got dtype float64, expected ints"),
    "no lengths": ([[0], [0]], None, TypeError, "kv_lengths: got None"),
}


@pytest.mark.parametrize("name", PAGED)
def test_bad_pages(backend, name):
    table, lengths, error, message = PAGED[name]
    with pytest.raises(error) as raised:
        na.attention_paged(Q, PAGES, PAGES, table, lengths)
    assert message in str(raised.value)


def test_bad_tails(backend):
    def varlen(tail, **options):
        na.attention_varlen(X, X, X, [0, 6], [0, 6], tail_mask=tail, **options)

    def paged(tail, **options):
        na.attention_paged(Q, PAGES, PAGES, [[0, 1], [2, 0]], [3, 1], tail_mask=tail, **options)

    memory = np.zeros(X.shape, np.float32)
    for call, tail, options, error, message in (
        (varlen, (6, 7), {}, ValueError, "got T = 7 (shape (6, 7)), expected T of at most 6,"),
        (varlen, (5, 6), {}, ValueError, "got shape (5, 6), expected one that broadcasts to (Hq, "
         "total_q, T) = (2, 6, 6)"),
        (varlen, (), {}, ValueError, "got shape ()"),
        (varlen, np.zeros((6, 1)), {}, TypeError, "got dtype float64, expected bool"),
        (varlen, memory.view(bool)[0, 0, :1], {"out": memory}, ValueError,
         "got an array that shares memory with tail_mask"),
        (paged, (1, 5), {}, ValueError, "got T = 5 (shape (1, 5)), expected T of at most Lk = 4"),
        (paged, (2, 3), {}, ValueError, "got shape (2, 3), expected one that broadcasts to (B, Hq, "
         "Lq, T) = (2, 1, 1, 3)"),
        (paged, (), {}, ValueError, "got shape ()"),
        (paged, np.zeros((1, 1), int), {}, TypeError, "got dtype int64, expected bool"),
    ):  # fmt: skip
        with pytest.raises(error) as raised:
            call(np.ones(tail, bool) if isinstance(tail, tuple) else tail, **options)
        assert message in str(raised.value)
    x = np.ones((3, 2, 3, 4), np.float32)  # as many batch items as queries
    pages = x.reshape(3, 3, 2, 4)
    with pytest.warns(UserWarning, match=r"^tail_mask: .* is taken as \(Lq, T\), but"):
        na.attention_paged(
            x, pages, pages, [[0], [1], [2]], [3] * 3, tail_mask=np.ones((3, 2), bool)
        )


def test_bad_scales(backend):
    k8, scale = na.quantize_kv(Q)
    bad = scale.copy()
    bad[1, 0, 0] = np.nan
    for options, error, message in (
        ({}, TypeError, "k: got dtype int8 without `k_scale`, expected both"),
        ({"k_scale": scale[0]}, ValueError, "k_scale: got shape (1, 1), expected (2, 1, 1)"),
        ({"k_scale": bad}, ValueError, "k_scale: got nan at index (1, 0, 0), expected finite"),
        ({"k_scale": scale.astype(int)}, TypeError, "k_scale: got dtype int64, expected float32"),
        ({"k_scale": scale, "v_scale": scale}, TypeError, "v_scale: got scales for v of dtype f"),
    ):
        with pytest.raises(error) as raised:
            na.attention(Q, k8, Q, **options)
        assert message in str(raised.value)
    with pytest.raises(ValueError, match="x: got nan in the vector at"):
        na.quantize_kv(np.full((2, 3), np.nan))
    with pytest.raises(TypeError, match="x: got dtype int64"):
        na.quantize_kv(np.zeros((2, 3), int))
    with pytest.raises(TypeError, match="x: got dtype float32 in non-native byte order"):
        na.quantize_kv(np.zeros((2, 3), ">f4"))


def test_bad_states():
    out, lse = np.zeros((2, 3), np.float32), np.zeros(2, np.float32)
    for states, error, message in (
        (None, TypeError, "states: got None, expected an iterable of pairs (out, lse)"),
        ([], ValueError, "states: got no state, expected at least one pair"),
        ((out, lse), TypeError, "states[0]: got shape (2, 3), expected a pair (out, lse)"),
        ([(out, lse, lse)], TypeError, "states[0]: got tuple, expected a pair (out, lse)"),
        ([(out, lse), (out[:1], lse)], ValueError, "states[1][0]: got shape (1, 3), expected (2"),
        ([(out, lse), (out, out)], ValueError, "states[1][1]: got shape (2, 3), expected (2,)"),
        ([(out, lse), (out.astype(float), lse)], TypeError, "states[1][0]: got dtype float64"),
        ([(out.astype(">f4"), lse)], TypeError, "states[0][0]: got dtype float32 in non-nat"),
        ([(out, lse.astype(int))], TypeError, "states[0][1]: got dtype int64"),
        ([(lse[0], lse[0])], ValueError, "states[0][1]: got shape ()"),
    ):
        with pytest.raises(error) as raised:
            na.merge_states(states)
        assert message in str(raised.value)


def test_bits_do_not_depend_on_the_batch_or_the_threads(native_dtype, arrays):
    """A long sequence among short ones, decoded."""
    q, k, v = arrays(5, hq=4, hkv=2, lq=1, lk=4000, d=16, dtype=native_dtype)
    lengths = [4000, 3, 0, 1600, 96]
    out = na.attention(q, k, v, kv_lengths=lengths, num_threads=1)
    for threads in (2, 5):
        again = na.attention(q, k, v, kv_lengths=lengths, num_threads=threads)
        np.testing.assert_array_equal(again, out)
    for i, n in enumerate(lengths):
        np.testing.assert_array_equal(na.attention(q[i], k[i, :, :n], v[i, :, :n]), out[i])


def test_scales_of_keys_that_are_not_read_may_be_anything(backend, rng):
    k = rng.standard_normal((2, 1, 5, 4), dtype=np.float32)
    k8, scale = na.quantize_kv(k)
    scale[1, :, 3:] = np.nan
    q = rng.standard_normal((2, 1, 1, 4), dtype=np.float32)
    out = na.attention(q, k8, k, k_scale=scale, kv_lengths=[5, 3])
    assert np.isfinite(out).all()
    with pytest.raises(ValueError, match=r"k_scale: got nan at index \(1, 0, 3\), expected finite"):
        na.attention(q, k8, k, k_scale=scale, kv_lengths=[5, 4])
    pages, scales = k8.swapaxes(1, 2), scale.swapaxes(1, 2)  # two pages of 5 keys
    table = np.array([[0, 1], [1, 7]])
    options = {"k_scale": scales}
    out = na.attention_paged(q, pages, k.swapaxes(1, 2), table, [8, 2], **options)
    assert np.isfinite(out).all()
    with pytest.raises(ValueError, match=r"k_scale: got nan at index \(1, 3, 0\), expected finite"):
        na.attention_paged(q, pages, k.swapaxes(1, 2), table, [9, 2], **options)


def test_errors_of_pages_and_states_name_what_is_wrong(rng):
    q = rng.standard_normal((1, 1, 1, 4), dtype=np.float32)
    pages = rng.standard_normal((2, 3, 1, 4), dtype=np.float32)
    with pytest.raises(ValueError, match="v_pages: got 2 pages of 2 keys, expected 2 of 3"):
        na.attention_paged(q, pages, pages[:, :2], [[0]], [1])
    with pytest.raises(ValueError, match=r"k_pages: got shape .* expected pages of at least"):
        na.attention_paged(q, pages[:, :0], pages[:, :0], [[0]], [0])
    with pytest.raises(ValueError, match=r"head_dim 3, expected 4 .*k_pages \(2, 3, 1, 3\)"):
        na.attention_paged(q, pages[..., :3], pages, [[0]], [1])
    out, lse = na.attention(q, q, q, return_lse=True)
    fixed = out.copy()
    fixed.flags.writeable = False
    with pytest.raises(ValueError, match="out: got a read-only array"):
        na.merge_states([(out, lse), (out, lse)], out=fixed)
    with pytest.raises(TypeError, match="out: got MaskedArray"):
        na.merge_states([(out, lse), (out, lse)], out=np.ma.array(out))


def test_pages_of_more_keys_than_64_bits_count(isa, arrays):
    """Only the table's valid keys count, however many its pages could hold."""
    q, k, v = arrays(1, hq=1, lk=1, lq=1, d=1)
    pages = [np.lib.stride_tricks.as_strided(x, (1, 2**58, 1, 1), (0, 0, 0, 4)) for x in (k, v)]
    table = np.zeros((1, 64), np.int64)
    out = na.attention_paged(q, *pages, table, [5000], return_lse=True)[1]
    logit = (q.astype(float) @ k.swapaxes(2, 3))[0, 0, 0, 0]
    np.testing.assert_allclose(out, logit + np.log(5000), rtol=1e-5)
