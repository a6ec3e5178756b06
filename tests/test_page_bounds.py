"""Promise: the pages with the largest bounds are chosen, and attention to them is exact."""

import copy
import itertools
import pickle
from types import SimpleNamespace

import numattn as na
import numpy as np
import pytest
from checks import assert_within, error_factor
from numattn import _reference as reference

LENGTHS = [150, 0, 33, 1, 96]
PAGE_SIZE = 8


def paged(rng, lengths=LENGTHS, *, hkv=2, d=16, dv=20, size=PAGE_SIZE, dtype=np.float32):
    """Return random keys and values, also in pages in random order; free places are NaN."""
    k, v = (
        rng.standard_normal((len(lengths), hkv, max(lengths), n)).astype(dtype) for n in (d, dv)
    )
    needed = [-(-n // size) for n in lengths]
    order = iter(rng.permutation(sum(needed) + 3).tolist())
    k_pages, v_pages = (
        np.full((sum(needed) + 3, size, hkv, n), np.nan).astype(dtype) for n in (d, dv)
    )
    table = np.full((len(lengths), max(needed) + 1), -7)
    for i, n in enumerate(lengths):
        for place in range(needed[i]):
            page = table[i, place] = next(order)
            part = slice(place * size, min((place + 1) * size, n))
            for pages, x in ((k_pages, k), (v_pages, v)):
                pages[page, : part.stop - part.start] = x[i, :, part].swapaxes(0, 1)
    return SimpleNamespace(
        k=k, v=v, k_pages=k_pages, v_pages=v_pages, table=table, lengths=np.array(lengths)
    )


def bounds_of(cache, **options):
    dtype = np.float32 if cache.k_pages.dtype == np.int8 else cache.k_pages.dtype
    bounds = na.PageBounds(*cache.k_pages.shape, dtype)
    bounds.update(cache.k_pages, cache.table, cache.lengths, **options)
    return bounds


def queries(rng, cache, lq, group=2):
    batch, hkv, _, d = cache.k.shape
    return rng.standard_normal((batch, hkv * group, lq, d)).astype(cache.k.dtype)


def attend(bounds, q, cache, count, **options):
    return bounds.attend(
        q, cache.k_pages, cache.v_pages, cache.table, cache.lengths, count, **options
    )


def chosen_keys(places, cache, group):
    """Return which keys lie in the chosen pages, (B, Hq, 1, Lk)."""
    batch, hkv, keys, _ = cache.k.shape
    page_of = np.arange(keys) // PAGE_SIZE
    mask = (places[..., np.newaxis] == page_of).any(axis=2)
    assert mask.shape == (batch, hkv, keys)
    return np.repeat(mask, group, axis=1)[:, :, np.newaxis]


# ---- bounds ------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "float64", "float16", "bfloat16"])
def test_bounds_are_of_the_valid_keys_of_each_page(rng, dtype):
    if dtype == "bfloat16":
        dtype = pytest.importorskip("ml_dtypes").bfloat16
    cache = paged(rng, dtype=dtype)
    bounds = bounds_of(cache)
    wide = np.float64 if np.dtype(dtype) == np.float64 else np.float32
    assert bounds.largest.dtype == bounds.least.dtype == wide
    assert bounds.largest.shape == (len(cache.k_pages), 2, 16)
    assert bounds.nbytes == 2 * bounds.largest.size * np.dtype(wide).itemsize
    known = set()
    for i, n in enumerate(LENGTHS):
        for place in range(-(-n // PAGE_SIZE)):
            page = cache.table[i, place]
            known.add(int(page))
            keys = cache.k[i, :, place * PAGE_SIZE : min((place + 1) * PAGE_SIZE, n)].astype(wide)
            np.testing.assert_array_equal(bounds.largest[page], keys.max(axis=1))
            np.testing.assert_array_equal(bounds.least[page], keys.min(axis=1))
            assert bounds.valid_keys[page] == keys.shape[1]
    others = [page for page in range(len(cache.k_pages)) if page not in known]
    assert len(others) == 3
    assert (bounds.largest[others] == -np.inf).all()
    assert (bounds.least[others] == np.inf).all()
    assert (bounds.valid_keys[others] == 0).all()


def test_no_key_of_a_page_is_beyond_its_bound(rng):
    cache = paged(rng)
    bounds = bounds_of(cache)
    q = queries(rng, cache, 3).astype(np.float64)
    for i, n in enumerate(LENGTHS):
        for head in range(q.shape[1]):
            products = q[i, head] @ cache.k[i, head // 2, :n].T.astype(np.float64)
            for key in range(n):
                page = cache.table[i, key // PAGE_SIZE]
                largest, least = (x[page, head // 2] for x in (bounds.largest, bounds.least))
                bound = np.maximum(q[i, head] * largest, q[i, head] * least).sum(axis=-1)
                assert (products[:, key] <= bound + 1e-12).all()


def test_updates_of_new_tokens_are_those_of_all(rng):
    """Token by token, also where a page is used for another sequence."""
    cache = paged(rng)
    step = na.PageBounds(*cache.k_pages.shape)
    for new in (1, 5, [3, 40, 1, 0, 2]):
        lengths = np.zeros(len(LENGTHS), int)
        while (lengths < LENGTHS).any():
            before, lengths = lengths, np.minimum(lengths + np.maximum(new, 1), LENGTHS)
            step.update(cache.k_pages, cache.table, lengths, new_tokens=lengths - before)
        whole = bounds_of(cache)
        for name in ("largest", "least", "valid_keys"):
            np.testing.assert_array_equal(getattr(step, name), getattr(whole, name))


def test_only_pages_of_new_tokens_are_read(rng):
    cache = paged(rng)
    bounds = bounds_of(cache)
    before = bounds.largest.copy()
    cache.k_pages[...] = 9
    bounds.update(cache.k_pages, cache.table, cache.lengths, new_tokens=[9, 3, 2, 0, 8])
    changed = (bounds.largest != before).any(axis=(1, 2))
    # 150 keys are 18 pages and 6 keys, 33 are 4 and 1, 96 are 12.
    named = [*cache.table[0, 17:19], *cache.table[2, 3:5], cache.table[4, 11]]
    assert set(np.flatnonzero(changed)) == set(named)


def test_a_shared_page_has_the_keys_of_the_longest_sequence(rng):
    cache = paged(rng, [20, 20, 20])
    cache.table[0] = cache.table[2] = cache.table[1]
    for new in (None, 1):
        bounds = na.PageBounds(*cache.k_pages.shape)
        bounds.update(cache.k_pages, cache.table, [18, 20, 17], new_tokens=new)
        page = cache.table[1, 2]
        assert bounds.valid_keys[page] == 4
        np.testing.assert_array_equal(bounds.largest[page], cache.k_pages[page, :4].max(axis=0))


def test_bounds_of_8_bits_are_those_of_their_numbers(rng):
    cache = paged(rng)
    k8, scale = na.quantize_kv(np.nan_to_num(cache.k_pages))
    wide = k8 * scale[..., np.newaxis]
    bounds = na.PageBounds(*k8.shape)
    bounds.update(k8, cache.table, cache.lengths, k_scale=scale)
    expected = na.PageBounds(*k8.shape)
    expected.update(wide, cache.table, cache.lengths)
    np.testing.assert_array_equal(bounds.largest, expected.largest)
    np.testing.assert_array_equal(bounds.least, expected.least)
    scale[...] = 3e38  # whose products are beyond float32
    with np.errstate(all="raise"):
        bounds.update(k8, cache.table, cache.lengths, k_scale=scale)
    assert (bounds.largest == np.inf).any()
    scale[cache.table[0, 0], 1, 1] = np.inf
    with pytest.raises(ValueError, match=r"k_scale: got inf at .* expected finite numbers"):
        bounds.update(k8, cache.table, cache.lengths, k_scale=scale)


def test_copies_and_pickles_are_the_same_bounds(rng):
    cache = paged(rng)
    bounds = bounds_of(cache)
    assert repr(bounds) == (
        "PageBounds(num_pages=40, page_size=8, kv_heads=2, head_dim=16, dtype=float32): "
        "bounds of 37 pages"
    )
    for other in (copy.deepcopy(bounds), pickle.loads(pickle.dumps(bounds))):
        assert repr(other) == repr(bounds)
        np.testing.assert_array_equal(other.largest, bounds.largest)
        assert not np.shares_memory(other.largest, bounds.largest)
    for x in (bounds.largest, bounds.least, bounds.valid_keys):
        assert not x.flags.writeable


# ---- the choice --------------------------------------------------------------------------------


def choose(q, cache, count):
    """Return what `select` is to return, page by page."""
    batch, hq, lq, _ = q.shape
    hkv = cache.k.shape[1]
    places = np.full((batch, hkv, min(count, cache.table.shape[1])), -1)
    for i, n in enumerate(cache.lengths.tolist()):
        pages = -(-n // PAGE_SIZE)
        always = {0, *(key // PAGE_SIZE for key in range(max(n - lq, 0), n))} if n else set()
        for head in range(hkv):
            rows = q[i, head * hq // hkv : (head + 1) * hq // hkv].astype(np.float64)
            scores = {}
            for place in set(range(pages)) - always:
                keys = cache.k[i, head, place * PAGE_SIZE : (place + 1) * PAGE_SIZE]
                largest, least = keys.max(axis=0), keys.min(axis=0)
                scores[place] = np.maximum(rows * largest, rows * least).sum(axis=-1).max()
            best = sorted(scores, key=lambda place: (-scores[place], place))
            chosen = sorted(always | set(best[: max(count - len(always), 0)]))
            places[i, head, : len(chosen)] = chosen
    return places


@pytest.mark.parametrize("lq", [1, 2, 4, 9])
@pytest.mark.parametrize("group", [1, 3])
def test_select_chooses_the_largest_bounds(rng, lq, group):
    """Of small whole numbers, whose sums are exact and often equal."""
    cache = paged(rng)
    for x in (cache.k, cache.k_pages):
        np.round(x, out=x)
    bounds = bounds_of(cache)
    q = np.round(queries(rng, cache, lq, group))
    for count in (5, 7, 12, 18, 19, 30):
        places = bounds.select(q, cache.table, cache.lengths, count)
        assert places.dtype == np.int64
        np.testing.assert_array_equal(places, choose(q, cache, count))


@pytest.mark.parametrize("order", ["ascending", "scattered", "scattered within a range"])
def test_select_in_blocks(rng, order):
    """More pages than are multiplied at a time, side by side or not."""
    cache = paged(rng, [8 * 3000, 8 * 1500], hkv=1, d=64)
    if order != "scattered":
        numbers = np.arange(4500)
        if order != "ascending":
            numbers[2:1000] = numbers[2:1000][::-1]
        is_page = cache.table >= 0
        cache.k_pages[numbers] = cache.k_pages[cache.table[is_page]]
        cache.table[is_page] = numbers
    bounds = bounds_of(cache)
    q = queries(rng, cache, 2)
    places = bounds.select(q, cache.table, cache.lengths, 100)
    expected = choose(q, cache, 100)
    # Bounds that differ by rounding alone may change places.
    assert (places == expected).mean() > 0.98
    assert (np.diff(places, axis=-1) > 0).all()


@pytest.mark.parametrize("lq", [1, 2, 3, 4])
def test_a_needle_is_always_found(backend, rng, lq):
    """A large key that one of the queries is like."""
    lengths = [2000, 700, 41]
    cache = paged(rng, lengths)
    for _ in range(10):
        keys = [int(rng.integers(PAGE_SIZE, n - PAGE_SIZE)) for n in lengths]
        k_pages, q = cache.k_pages.copy(), queries(rng, cache, lq)
        for i, key in enumerate(keys):
            place = cache.table[i, key // PAGE_SIZE], key % PAGE_SIZE
            k_pages[place] = 5 * np.sign(k_pages[place])
            for head in range(2):
                q[i, 2 * head + rng.integers(2), rng.integers(lq)] = k_pages[place][head]
        bounds = na.PageBounds(*k_pages.shape)
        bounds.update(k_pages, cache.table, lengths)
        places = bounds.select(q, cache.table, lengths, 4)
        for i, key in enumerate(keys):
            assert (places[i] == key // PAGE_SIZE).any(axis=-1).all()
        out = bounds.attend(q, k_pages, cache.v_pages, cache.table, lengths, 4)
        whole = na.attention_paged(q, k_pages, cache.v_pages, cache.table, lengths)
        finds = (np.abs(q) == 5).all(axis=-1)
        assert finds.sum() == len(lengths) * 2
        np.testing.assert_allclose(out[finds], whole[finds], rtol=0, atol=1e-5)


def test_a_page_with_nan_or_infinity_matters(backend, rng):
    cache = paged(rng, [20 * PAGE_SIZE])
    for value in (np.nan, np.inf, -np.inf):
        k_pages = cache.k_pages.copy()
        k_pages[cache.table[0, 13], 2, :, 3] = value
        bounds = na.PageBounds(*k_pages.shape)
        bounds.update(k_pages, cache.table, cache.lengths)
        q = queries(rng, cache, 1)
        q[..., 3] = 0
        assert (bounds.select(q, cache.table, cache.lengths, 3) == [0, 13, 19]).all()
        out = bounds.attend(q, k_pages, cache.v_pages, cache.table, cache.lengths, 3)
        assert np.isnan(out).all()


# ---- attention ---------------------------------------------------------------------------------

OPTIONS = {
    "plain": {},
    "causal": {"is_causal": True},
    "many": {"is_causal": True, "softcap": 5.0, "scale": -0.3, "sinks": [0.1, 0.2, -np.inf, 3.0]},
}


@pytest.mark.parametrize("lq", [1, 2, 3, 4])
@pytest.mark.parametrize("name", OPTIONS)
def test_attend_is_attention_to_the_chosen_keys(dtype, rng, lq, name):
    options = OPTIONS[name]
    cache = paged(rng, dtype=dtype)
    bounds, q = bounds_of(cache), queries(rng, cache, lq)
    out, lse = attend(bounds, q, cache, 6, **options, return_lse=True)
    assert out.dtype == dtype
    np.testing.assert_array_equal(attend(bounds, q, cache, 6, **options), out)
    places = bounds.select(-q if "scale" in options else q, cache.table, cache.lengths, 6)
    assert ((places >= 0).sum(axis=-1) == [[6], [0], [5], [1], [6]]).all()
    precision = np.float64 if dtype == np.float64 else np.float32
    same = {
        "mask": chosen_keys(places, cache, 2), "kv_lengths": cache.lengths,
        "q_offset": cache.lengths - lq, **options,
    }  # fmt: skip
    trusted = np.longdouble if precision is np.float64 else np.float64
    expected, expected_lse = reference.attention(q, cache.k, cache.v, **same, dtype=trusted)
    plain = [
        reference.attention(q, cache.k, cache.v, **same, dtype=precision, matmul=matmul)
        for matmul in (np.matmul, reference.matmul_by_einsum)
    ]
    assert_within(out, [x.astype(dtype) for x, _ in plain], expected, error_factor())
    seen = np.isfinite(expected_lse)
    np.testing.assert_array_equal(np.isfinite(lse), seen)
    of_plain = [x[seen] for _, x in plain]
    assert_within(lse[seen], of_plain, expected_lse[seen], error_factor())


@pytest.mark.parametrize("lq", [1, 3])
@pytest.mark.parametrize("name", OPTIONS)
def test_all_pages_are_the_attention_to_all(native_dtype, rng, lq, name):
    """To the bit."""
    cache = paged(rng, [3300, 0, 33, 1], dtype=native_dtype)
    bounds, q = bounds_of(cache), queries(rng, cache, lq)
    options = {**OPTIONS[name], "return_lse": True}
    expected = na.attention_paged(
        q, cache.k_pages, cache.v_pages, cache.table, cache.lengths, **options, q_lengths=lq
    )
    for count in (cache.table.shape[1], 10**6):
        for x, wanted in zip(attend(bounds, q, cache, count, **options), expected, strict=True):
            np.testing.assert_array_equal(x, wanted)


def test_bits_do_not_depend_on_the_batch_or_the_threads(native_dtype, rng):
    cache = paged(rng, [3300, 0, 700, 1], size=4, dtype=native_dtype)
    bounds, q = bounds_of(cache), queries(rng, cache, 2)
    out = attend(bounds, q, cache, 500, num_threads=1)
    for threads in (2, 5):
        np.testing.assert_array_equal(attend(bounds, q, cache, 500, num_threads=threads), out)
    for i in range(4):
        alone = bounds.attend(
            q[i : i + 1], cache.k_pages, cache.v_pages, cache.table[i : i + 1],
            cache.lengths[i], 500,
        )  # fmt: skip
        np.testing.assert_array_equal(alone[0], out[i])


def heads_first(x):
    return np.ascontiguousarray(x.swapaxes(1, 2)).swapaxes(1, 2)


def keys_and_values(k, v):
    both = np.concatenate([k, v], axis=-1)
    return both[..., : k.shape[-1]], both[..., k.shape[-1] :]


def one_after_the_other(k, v):
    both = np.stack([np.pad(x, [(0, 0)] * 3 + [(0, 20 - x.shape[-1])]) for x in (k, v)], axis=1)
    return both[:, 0, ..., : k.shape[-1]], both[:, 1]


LAYOUTS = {
    "heads first": lambda k, v: (heads_first(k), heads_first(v)),
    "keys and values side by side": keys_and_values,
    "pages of keys and values in turn": one_after_the_other,
    "each in its own way": lambda k, v: (k, heads_first(v)),
    "pages reversed": lambda k, v: tuple(x[::-1].copy()[::-1] for x in (k, v)),
    "heads reversed": lambda k, v: tuple(x[:, :, ::-1].copy()[:, :, ::-1] for x in (k, v)),
    "columns first": lambda k, v: (np.asfortranarray(k), np.asfortranarray(v)),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_pages_are_read_where_they_lie(any_backend, rng, layout):
    cache = paged(rng)
    bounds, q = bounds_of(cache), queries(rng, cache, 2)
    expected = attend(bounds, q, cache, 6)
    cache.k_pages, cache.v_pages = LAYOUTS[layout](cache.k_pages, cache.v_pages)
    np.testing.assert_array_equal(bounds_of(cache).largest, bounds.largest)
    tolerance = 1e-6 if layout == "columns first" or any_backend == "numpy" else 0
    np.testing.assert_allclose(attend(bounds, q, cache, 6), expected, rtol=0, atol=tolerance)


@pytest.mark.parametrize("copied", [False, True], ids=["side by side", "scales by themselves"])
def test_pages_of_8_bits(backend, rng, copied):
    cache = paged(rng)
    (k8, k_scale), (v8, v_scale) = (
        na.quantize_kv(np.nan_to_num(x)) for x in (cache.k_pages, cache.v_pages)
    )
    if copied:
        k_scale = heads_first(k_scale)
    scales = {"k_scale": k_scale, "v_scale": v_scale}
    wide = copy.copy(cache)
    wide.k_pages, wide.v_pages = k8 * k_scale[..., np.newaxis], v8 * v_scale[..., np.newaxis]
    cache.k_pages, cache.v_pages = k8, v8
    bounds, q = bounds_of(cache, k_scale=k_scale), queries(rng, cache, 2)
    np.testing.assert_allclose(
        attend(bounds, q, cache, 6, **scales), attend(bounds_of(wide), q, wide, 6),
        rtol=0, atol=1e-5,
    )  # fmt: skip


def test_one_head_and_one_page(backend, rng):
    for shape in ([5], [8, 3]):
        cache = paged(rng, shape, hkv=1)
        bounds, q = bounds_of(cache), queries(rng, cache, 1)
        expected = na.attention_paged(q, cache.k_pages, cache.v_pages, cache.table, shape)
        np.testing.assert_allclose(attend(bounds, q, cache, 2), expected, rtol=0, atol=1e-6)


def test_without_anything_to_do(backend):
    pages = np.zeros((0, 4, 2, 8), np.float32)
    bounds = na.PageBounds(*pages.shape)
    bounds.update(pages, np.zeros((0, 3), int), [])
    bounds.update(pages, np.zeros((2, 0), int), 0)
    others = np.ones((3, 4, 2, 8), np.float32)
    for some, (batch, lq, most) in itertools.product(
        (pages, others), ((0, 1, 3), (2, 1, 0), (2, 0, 0))
    ):
        bounds = na.PageBounds(*some.shape)
        q = np.zeros((batch, 4, lq, 8), np.float32)
        table, lengths = np.zeros((batch, most), int), np.zeros(batch, int)
        assert bounds.select(q, table, lengths, 2).shape == (batch, 2, min(2, most))
        out, lse = bounds.attend(q, some, some, table, lengths, 2, return_lse=True)
        assert out.shape == q.shape
        assert (out == 0).all()
        assert (lse == -np.inf).all()


# ---- errors ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((-1, 8, 2, 4), ValueError, "num_pages: got -1, expected at least 0"),
        ((4, 0, 2, 4), ValueError, "page_size: got 0, expected at least 1"),
        ((4, 8, 2.0, 4), TypeError, "kv_heads: got 2.0 (float), expected an int"),
        ((4, 8, 2, True), TypeError, "head_dim: got True, expected an int"),
        ((4, 8, 2, 4, np.int8), TypeError, "dtype: got int8, expected one of float16"),
    ],
)
def test_sizes_that_are_none(arguments, error, message):
    with pytest.raises(error) as raised:
        na.PageBounds(*arguments)
    assert message in str(raised.value)


Q = np.ones((1, 4, 1, 4), np.float32)
PAGES = np.ones((3, 8, 2, 4), np.float32)


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ({"k_pages": PAGES[:2]}, ValueError, "k_pages: got shape (2, 8, 2, 4), expected (3, 8, 2"),
        (
            {"k_pages": PAGES.astype(float)},
            TypeError,
            "k_pages: got dtype float64, expected float",
        ),
        (
            {"k_pages": PAGES.astype(np.int8)},
            TypeError,
            "k_pages: got dtype int8 without `k_",
        ),
        ({"k_scale": PAGES[..., 0]}, TypeError, "k_scale: got scales for k_pages of dtype float32"),
        (
            {"block_table": [[0, 3]]},
            ValueError,
            "block_table: got 3 at index (0, 1), expected a page",
        ),
        ({"block_table": [[0.0]]}, TypeError, "block_table: got dtype float64, expected ints"),
        ({"block_table": [0, 1]}, ValueError, "block_table: got shape (2,), expected (2, pages"),
        ({"block_table": 0}, ValueError, "block_table: got shape (), expected"),
        ({"kv_lengths": [17]}, ValueError, "kv_lengths: got 17 at index 0, expected 0 to 16"),
        ({"kv_lengths": None}, TypeError, "kv_lengths: got None, expected the number of valid"),
        ({"new_tokens": -1}, ValueError, "new_tokens: got -1, expected 0 to"),
        ({"new_tokens": [1, 2]}, ValueError, "new_tokens: got shape (2,), expected one"),
        ({"new_tokens": 1.5}, TypeError, "new_tokens: got dtype float64, expected ints"),
    ],
)
def test_updates_that_do_not_fit(given, error, message):
    arguments = {"k_pages": PAGES, "block_table": [[0, 2]], "kv_lengths": [10]}
    with pytest.raises(error) as raised:
        na.PageBounds(*PAGES.shape).update(**arguments | given)
    assert message in str(raised.value)


SELECT = [
    ({"q": Q[0]}, ValueError, "q: got shape (4, 1, 4), expected (B, "),
    ({"q": Q.astype(float)}, TypeError, "float64"),
    ({"q": Q[:, :3]}, ValueError, "q: got 3 heads, expected a multiple of "),
    ({"q": Q[..., :3]}, ValueError, "head_dim"),
    (
        {"block_table": [[0, 1], [0, 1]]},
        ValueError,
        "block_table: got shape (2, 2), expected (1, ",
    ),
    (
        {"block_table": [[0, -1, 2]]},
        ValueError,
        "block_table: got -1 at index (0, 1), expected a page",
    ),
    ({"kv_lengths": [25]}, ValueError, "kv_lengths: got 25 at index 0, expected 0 to 24"),
    (
        {"count": 1},
        ValueError,
        "count: got 1, expected at least 2: the first page and",
    ),
    ({"count": 2.0}, TypeError, "count: got 2.0 (float), expected an int"),
    (
        {"q": np.ones((1, 4, 2, 4), np.float32)},
        ValueError,
        "count: got 2, expected at least 3: the",
    ),
    (
        {"kv_lengths": [22]},
        ValueError,
        "block_table: got page 2 at index (0, 2), whose bounds cover 5",
    ),
]


@pytest.mark.parametrize(("given", "error", "message"), SELECT)
@pytest.mark.parametrize("method", ["select", "attend"])
def test_choices_that_do_not_fit(method, given, error, message):
    bounds = na.PageBounds(*PAGES.shape)
    bounds.update(PAGES, [[0, 1, 2]], [21])
    arguments = {"q": Q, "block_table": [[0, 1, 2]], "kv_lengths": [21], "count": 2}
    if method == "attend":
        arguments |= {"k_pages": PAGES, "v_pages": PAGES}
    with pytest.raises(error) as raised:
        getattr(bounds, method)(**arguments | given)
    assert message in str(raised.value)


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ({"k_pages": PAGES[:, :, :1]}, ValueError, "v_pages: got 2 heads, expected 1 as in"),
        ({"k_pages": PAGES[:2], "v_pages": PAGES[:2], "block_table": [[0, 1, 1]]}, ValueError,
         "k_pages: got shape (2, 8, 2, 4), expected (3, 8, 2, 4), as in these bounds"),
        ({"v_pages": PAGES[:2]}, ValueError, "v_pages: got 2 pages of 8 keys, expected 3 of 8"),
        ({"v_pages": PAGES.astype(np.int8)}, TypeError, "v_pages: got dtype int8 without `v_sca"),
        ({"softcap": -1.0}, ValueError, "softcap: got -1.0, expected a positive number"),
        ({"scale": "1"}, TypeError, "scale: got '1' (str), expected a real number"),
        ({"sinks": [1.0]}, ValueError, "sinks: got shape (1,), expected one number per query head"),
        ({"is_causal": 1}, TypeError, "is_causal: got 1 (int), expected True or False"),
        ({"return_lse": None}, TypeError, "return_lse: got None"),
        ({"num_threads": 0}, ValueError, "num_threads: got 0"),
        ({"window": (3, 0)}, TypeError, "attend() has no 'window': windows count all keys"),
        ({"sliding_window": 3}, TypeError, "attend() has no 'sliding_window': windows count"),
        ({"alibi_slopes": [1.0]}, TypeError, "attend() has no 'alibi_slopes': distances count"),
        ({"tail_mask": [[True]]}, TypeError, "attend() has no 'tail_mask': the bounds of a page"),
        ({"attn_mask": None}, TypeError, "attend() has no 'attn_mask': the bounds of a page"),
        ({"q_offset": 3}, TypeError, "attend() has no 'q_offset': the queries are the last"),
        ({"layout": "blhd"}, TypeError, "attend() has no 'layout': q is (B, Hq, Lq, D)"),
        ({"logits_soft_cap": 3}, TypeError, "argument 'logits_soft_cap'; did you mean `softcap="),
        ({"anything": 3}, TypeError, "attend() got an unexpected keyword argument 'anything'"),
    ],
)  # fmt: skip
def test_attention_that_does_not_fit(given, error, message):
    bounds = na.PageBounds(*PAGES.shape)
    bounds.update(PAGES, [[0, 1, 2]], [21])
    arguments = {
        "q": Q, "k_pages": PAGES, "v_pages": PAGES, "block_table": [[0, 1, 2]],
        "kv_lengths": [21], "count": 2,
    }  # fmt: skip
    with pytest.raises(error) as raised:
        bounds.attend(**arguments | given)
    assert message in str(raised.value)
