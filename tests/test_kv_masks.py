"""Promise: mask and bias mean in a cache what they mean in `attention`, by positions."""

import numattn as na
import numpy as np
import pytest
from checks import numbers, of_all_tokens, seen
from numattn import _arguments, _kv_attend, _runtime
from numattn import _reference as reference

BATCH, HEADS, KV_HEADS, DIM = 3, 4, 2, 8
# Little can be taken back, so that memory moves and sequences begin at different positions.
WINDOW = {"window": 6, "max_rollback": 1}
LIMITS = pytest.mark.parametrize(
    "limits", [{}, WINDOW, WINDOW | {"keep_first": 2}], ids=["all", "window", "first"]
)


class Texts:
    """A cache, and all that its sequences have had."""

    def __init__(self, rng, limits, dtype=np.float32, quantize=False, batch=BATCH):
        self.rng, self.limits, self.dtype = rng, limits, dtype
        self.cache = na.KVCache(
            batch, KV_HEADS, DIM, DIM + 4, dtype=dtype, quantize=quantize, **limits
        )
        self.k = [np.zeros((KV_HEADS, 0, DIM)) for _ in range(batch)]
        self.v = [np.zeros((KV_HEADS, 0, DIM + 4)) for _ in range(batch)]

    def append(self, counts):
        n = max(counts)
        k, v = (
            numbers(self.rng, len(counts), KV_HEADS, n, dim, dtype=self.dtype)
            for dim in (DIM, DIM + 4)
        )
        self.cache.append(k, v, lengths=counts)
        for i, count in enumerate(counts):
            self.k[i] = np.concatenate([self.k[i], k[i, :, :count]], axis=1)
            self.v[i] = np.concatenate([self.v[i], v[i, :, :count]], axis=1)

    def expected(self, i, q, first, mask=True, bias=None, **options):
        """Return out and lse of one sequence's queries from the position `first` on."""
        length = self.k[i].shape[1]
        mask = mask & seen(first + np.arange(q.shape[1]), length, self.limits)
        return reference.attention(
            q, self.k[i], self.v[i], mask=mask, bias=bias, q_offset=first, **options
        )


@LIMITS
@pytest.mark.parametrize("layout", ["bhld", "blhd"])
@pytest.mark.parametrize("quantize", [False, True])
def test_any_mask_and_bias(backend, rng, limits, layout, quantize):
    """Ragged sequences whose windows have moved on, axes of 1 and missing ones."""
    texts = Texts(rng, limits, quantize=quantize)
    options = {"alibi_slopes": [0.1, 0.2, 0, 0.3], "sinks": [0.5, -1, 2, 0]}
    broadcast = ((), (0,), (1,), (0, 1), (2,), (0, 1, 2), (3,), (0, 1, 2, 3))
    for step, counts in enumerate(
        ([5, 3, 6], [1, 1, 1], [2, 0, 3], [6, 0, 5], [1, 1, 1], [6, 6, 6], [1, 6, 2], [3, 3, 3])
    ):
        texts.append(counts)
        rows, length = max(counts), int(texts.cache.lengths.max())
        q = numbers(rng, BATCH, HEADS, rows, DIM)
        pairs = (BATCH, HEADS, rows, length)
        for axes in (broadcast[step], broadcast[-1 - step]):
            shape = tuple(1 if axis in axes else n for axis, n in enumerate(pairs))
            mask = rng.random(shape) < 0.6
            bias = numbers(rng, *shape)
            bias[rng.random(shape) < 0.2] = -np.inf
            for given in ({"mask": mask}, {"bias": bias}, {"mask": mask, "bias": bias}):
                if shape[:2] == (1, 1):  # axes may be missing
                    given = {name: x[0, 0] for name, x in given.items()}
                out, lse = texts.cache.attend(
                    q if layout == "bhld" else q.swapaxes(1, 2),
                    layout=layout, return_lse=True, **given, **options,
                )  # fmt: skip
                if layout == "blhd":
                    out, lse = out.swapaxes(1, 2), lse.swapaxes(1, 2)
                full = {name: np.broadcast_to(x, pairs) for name, x in given.items()}
                for i, count in enumerate(counts):
                    first = texts.k[i].shape[1] - count
                    own = {n: x[i, :, :count, : first + count] for n, x in full.items()}
                    expected = texts.expected(i, q[i, :, :count], first, **own, **options)
                    atol = 0.2 if quantize else 2e-5
                    np.testing.assert_allclose(out[i, :, :count], expected[0], rtol=0, atol=atol)
                    np.testing.assert_allclose(lse[i, :, :count], expected[1], rtol=0, atol=atol)
                    assert not out[i, :, count:].any()


@LIMITS
def test_every_dtype(dtype, rng, limits):
    texts = Texts(rng, limits, dtype)
    for _ in range(4):
        texts.append([5, 5, 5])
    q = numbers(rng, BATCH, HEADS, 2, DIM, dtype=dtype)
    mask = rng.random((BATCH, HEADS, 2, 20)) < 0.6
    tolerance = {8: 1e-13, 4: 1e-5, 2: 3e-2}[dtype.itemsize]
    for kind in {dtype, np.dtype(np.float32)}:
        bias = numbers(rng, BATCH, 1, 2, 20, dtype=kind)
        if dtype == np.float64 and kind != dtype:
            bias = bias.astype(np.float32)
        out = texts.cache.attend(q, mask=mask, bias=bias)
        for i in range(BATCH):
            expected, _ = texts.expected(i, q[i], 18, mask=mask[i], bias=bias[i].astype(float))
            np.testing.assert_allclose(out[i].astype(float), expected, rtol=0, atol=tolerance)


@pytest.mark.parametrize("dtype_name", ["float32", "float64"])
def test_padding_on_the_left(any_backend, rng, dtype_name):
    """A batch of prompts that end together gives what each gives alone."""
    dtype = np.dtype(dtype_name)
    q, k, v = numbers(rng, 3, 3, KV_HEADS, 9, DIM, dtype=dtype)
    padding = np.array([0, 4, 7])
    is_token = (np.arange(9) >= padding[:, np.newaxis])[:, np.newaxis, np.newaxis]
    for x in (k, v):
        x[~np.broadcast_to(is_token.swapaxes(2, 3), x.shape)] = np.nan
    cache = na.KVCache(3, KV_HEADS, DIM, dtype=dtype)
    outs = []
    for part in (slice(0, 6), slice(6, 8), slice(8, 9)):
        cache.append(k[:, :, part], v[:, :, part])
        outs.append(cache.attend(q[:, :, part], mask=is_token[..., : part.stop]))
    out = np.concatenate(outs, axis=2)
    atol = 1e-13 if dtype == np.float64 else 1e-5
    for i, n in enumerate(padding):
        text = (i, slice(None), slice(n, None))
        expected, _ = reference.attention(q[text], k[text], v[text], is_causal=True)
        np.testing.assert_allclose(out[text], expected, rtol=0, atol=atol)
        assert not out[i, :, :n].any()


def test_a_prefix_that_all_queries_see(backend, rng):
    q, k, v = numbers(rng, 3, 2, KV_HEADS, 12, DIM)
    cache = na.KVCache(2, KV_HEADS, DIM)
    j = np.arange(12)
    mask = (j <= j[:, np.newaxis]) | (j < np.array([[[5]], [[7]]]))
    expected, _ = reference.attention(q, k, v, mask=mask[:, np.newaxis])
    cache.append(k[:, :, :8], v[:, :, :8])
    prompt = cache.attend(q[:, :, :8], is_causal=False, mask=mask[:, np.newaxis, :8, :8])
    np.testing.assert_allclose(prompt, expected[:, :, :8], rtol=0, atol=1e-5)
    for i in range(8, 12):
        cache.append(k[:, :, i : i + 1], v[:, :, i : i + 1])
        out = cache.attend(q[:, :, i : i + 1])
        np.testing.assert_allclose(out, expected[:, :, i : i + 1], rtol=0, atol=1e-5)


@LIMITS
def test_a_tree_of_drafts(backend, rng, limits):
    """Each branch gives what the texts along it give, whatever else was appended."""
    parents = [-1, 0, 0, 1, 2]  # of the drafts, -1 is the last token of the text
    texts = Texts(rng, limits)
    for counts in ([6, 2, 5], [6, 6, 6], [5, 5, 5]):
        texts.append(counts)
    before = [x.shape[1] - 5 for x in texts.k]
    q = numbers(rng, BATCH, HEADS, 5, DIM)
    mask = np.zeros((BATCH, 1, 5, int(texts.cache.lengths.max())), bool)
    paths = []
    for draft, parent in enumerate(parents):
        paths.append([draft] if parent < 0 else [*paths[parent], draft])
        for i, n in enumerate(before):
            mask[i, :, draft, :n] = True
            mask[i, :, draft, n + np.array(paths[draft])] = True
    out = texts.cache.attend(q, mask=mask)
    tree = np.array([[draft in path for draft in range(5)] for path in paths])
    by_tail = texts.cache.attend(q, tail_mask=tree)
    np.testing.assert_allclose(by_tail, out, rtol=0, atol=1e-6)
    for i, n in enumerate(before):
        for draft, path in enumerate(paths):
            tokens = [*range(n), *(n + np.array(path))]
            # Positions are places in the cache, which the window counts from.
            is_seen = seen([n + draft], n + 5, limits)[:, tokens]
            expected, _ = reference.attention(
                q[i, :, draft : draft + 1], texts.k[i][:, tokens], texts.v[i][:, tokens],
                mask=is_seen,
            )  # fmt: skip
            np.testing.assert_allclose(out[i, :, draft : draft + 1], expected, rtol=0, atol=1e-5)


@LIMITS
@pytest.mark.parametrize("layout", ["bhld", "blhd"])
@pytest.mark.parametrize("quantize", [False, True])
def test_any_tail_mask(backend, rng, limits, layout, quantize):
    """Of any length up to all tokens; it is the mask that has True for the tokens before."""
    texts = Texts(rng, limits, quantize=quantize)
    for counts in ([2, 0, 3], [5, 3, 6], [1, 1, 1], [6, 0, 5], [1, 1, 1], [6, 6, 6], [1, 6, 2]):
        texts.append(counts)
        rows, lengths = max(counts), texts.cache.lengths
        q = numbers(rng, BATCH, HEADS, rows, DIM)
        (q,) = [q] if layout == "bhld" else [q.swapaxes(1, 2)]
        for last in {0, 1, min(5, lengths.max()), lengths.max() - 1, lengths.max()}:
            for shape in ((BATCH, HEADS, rows), (1, 1, rows), (BATCH, 1, 1), (1, HEADS, rows)):
                tail = rng.random((*shape, last)) < 0.5
                full = of_all_tokens(tail, rows, lengths)
                other = rng.random((rows, lengths.max()))[np.newaxis] < 0.8
                for more, mask in (({}, full), ({"mask": other}, full & other)):
                    options = {"layout": layout, "return_lse": True}
                    actual = texts.cache.attend(q, tail_mask=tail, **more, **options)
                    expected = texts.cache.attend(q, mask=mask, **options)
                    for x, wanted in zip(actual, expected, strict=True):
                        np.testing.assert_allclose(x, wanted, rtol=0, atol=2e-6)


@LIMITS
def test_what_is_forgotten_or_beyond_a_sequence_counts_for_nothing(backend, rng, limits):
    texts = Texts(rng, limits)
    for counts in ([6, 4, 2], [6, 6, 6], [4, 6, 1]):
        texts.append(counts)
    q = numbers(rng, BATCH, HEADS, 1, DIM)
    lengths = texts.cache.lengths
    options = {"q_offset": lengths - 1, "q_lengths": 1}
    bias = np.full((BATCH, 1, 1, int(lengths.max())), np.nan, np.float32)
    for i, n in enumerate(lengths):
        bias[i, ..., :n][..., seen([n - 1], n, limits)] = 0
    plain = texts.cache.attend(q, **options)
    mask = bias == 0
    np.testing.assert_allclose(texts.cache.attend(q, bias=bias, **options), plain, atol=1e-6)
    np.testing.assert_allclose(texts.cache.attend(q, mask=mask, **options), plain, atol=1e-6)
    np.testing.assert_array_equal(
        texts.cache.attend(q, mask=mask, **options), texts.cache.attend(q, mask=True, **options)
    )


@LIMITS
def test_a_query_that_is_masked_from_all_gets_zeros(backend, rng, limits):
    texts = Texts(rng, limits)
    for _ in range(3):
        texts.append([5, 5, 5])
    q = numbers(rng, BATCH, HEADS, 2, DIM)
    mask = np.ones((2, 15), bool)
    mask[1] = False
    for options in ({"mask": mask}, {"bias": np.where(mask, 0, -np.inf).astype(np.float32)}):
        out, lse = texts.cache.attend(q, return_lse=True, **options)
        plain, plain_lse = texts.cache.attend(q, return_lse=True)
        np.testing.assert_allclose(out[:, :, 0], plain[:, :, 0], rtol=0, atol=1e-6)
        np.testing.assert_allclose(lse[:, :, 0], plain_lse[:, :, 0], rtol=0, atol=1e-6)
        assert not out[:, :, 1].any()
        assert np.isneginf(lse[:, :, 1]).all()


@LIMITS
def test_sequences_without_tokens(rng, limits):
    cache = na.KVCache(2, KV_HEADS, DIM, **limits)
    q = numbers(rng, 2, HEADS, 1, DIM)
    for shape in ((), (1,), (2, 1, 1, 1), (2, 1, 1, 0)):
        assert not cache.attend(q, mask=np.ones(shape, bool), bias=np.zeros(shape, "f4")).any()
    with pytest.raises(ValueError, match=r"mask: got shape \(3,\), expected one that broadcasts"):
        cache.attend(q, mask=np.ones(3, bool))
    cache.append(*numbers(rng, 2, 2, KV_HEADS, 2, DIM), lengths=[0, 1])
    assert cache.attend(q, mask=np.ones(1, bool), q_offset=0)[1].any()
    with pytest.raises(ValueError, match=r"tail_mask: got T = 2 .*, expected T of at most 1, the"):
        cache.attend(q, tail_mask=np.ones((1, 2), bool))
    assert not cache.attend(q, tail_mask=np.zeros((1, 1), bool), q_offset=0).any()
    nobody = na.KVCache(0, KV_HEADS, DIM, **limits)
    assert nobody.attend(q[:0], tail_mask=np.ones((1, 0), bool)).shape == (0, HEADS, 1, DIM)
    assert nobody.attend(q[:0], mask=np.ones((0, 1, 1, 0), bool)).shape == (0, HEADS, 1, DIM)


@pytest.mark.parametrize("name", ["mask", "tail_mask", "bias"])
def test_pairs_that_may_mean_the_batch_are_warned_of(rng, name):
    texts = Texts(rng, {})
    texts.append([3, 3, 3])
    q = numbers(rng, BATCH, HEADS, 3, DIM)
    pairs = numbers(rng, 3, 3) if name == "bias" else np.tri(3, dtype=bool)
    with pytest.warns(UserWarning, match=rf"{name}: .* is taken as \(Lq, T\), but") as caught:
        out = texts.cache.attend(q, **{name: pairs})
    assert caught[0].filename == __file__
    np.testing.assert_array_equal(texts.cache.attend(q, **{name: pairs[np.newaxis]}), out)


@LIMITS
def test_out_is_no_memory_of_a_mask(rng, limits):
    texts = Texts(rng, limits, batch=1)
    for _ in range(3):
        texts.append([5])
    q = numbers(rng, 1, HEADS, 1, DIM)
    memory = np.zeros(1000, np.float32)
    out = memory[: HEADS * (DIM + 4)].reshape(1, HEADS, 1, DIM + 4)
    bits = memory.view(bool)[:15]
    for name, pairs in (("bias", memory[:15]), ("mask", bits), ("tail_mask", bits)):
        with pytest.raises(ValueError, match=rf"shares memory with {name}"):
            texts.cache.attend(q, out=out, **{name: pairs})
    bias = numbers(rng, 15)
    assert texts.cache.attend(q, out=out, bias=bias) is out
    np.testing.assert_array_equal(texts.cache.attend(q, bias=bias), out)


@pytest.mark.skipif(_runtime.native is None, reason="needs the compiled kernels")
@LIMITS
def test_usual_masks_are_accepted_in_c(rng, monkeypatch, limits):
    texts = Texts(rng, limits)
    for counts in ([6, 6, 6], [5, 2, 4], [6, 6, 6]):
        texts.append(counts)
    q = numbers(rng, BATCH, HEADS, 1, DIM)
    length = int(texts.cache.lengths.max())
    masks = [rng.random(shape) < 0.6 for shape in ((length,), (1, 1), (BATCH, HEADS, 1, length))]
    expected = [texts.cache.attend(q, mask=mask) for mask in masks]
    monkeypatch.setattr(_arguments, "check", None)
    for mask, wanted in zip(masks, expected, strict=True):
        np.testing.assert_array_equal(texts.cache.attend(q, mask=mask), wanted)


@pytest.mark.parametrize(
    "sizes", [{}, {"window": 4, "max_rollback": 0}, {"window": 4, "keep_first": 1}], ids=str
)
def test_a_layer_passes_a_mask_to_its_cache(backend, rng, sizes):
    layer = na.MultiHeadAttention(24, 4, kv_heads=2, rotary=True, rng=1)
    x = numbers(rng, 2, 10, 24)
    mask = rng.random((2, 1, 10, 10)) < 0.7
    cache = na.KVCache(2, 2, 6, **sizes)
    outs = []
    for part in (slice(0, 4), slice(4, 7), slice(7, 8), slice(8, 10)):
        outs.append(layer(x[:, part], cache=cache, mask=mask[:, :, part, : part.stop]))
    whole = layer(x, mask=mask & seen(np.arange(10), 10, sizes))
    np.testing.assert_allclose(np.concatenate(outs, axis=1), whole, rtol=0, atol=2e-5)
    tree = np.array([[1, 0, 0], [1, 1, 0], [1, 0, 1]], bool)
    copy, x = cache.copy(), numbers(rng, 2, 3, 24)
    out = layer(x, cache=copy, tail_mask=tree)
    copy = cache.copy()
    expected = layer(x, cache=copy, mask=of_all_tokens(tree, 3, copy.lengths + 3))
    np.testing.assert_allclose(out, expected, rtol=0, atol=1e-6)
    before = cache.lengths.tolist()
    with pytest.raises(ValueError, match=r"tail_mask: got T = 14 .* at most 13"):
        layer(x, cache=cache, tail_mask=np.ones((3, 14), bool))
    assert cache.lengths.tolist() == before
    for wrong in (mask, mask.astype(int)):
        with pytest.raises((TypeError, ValueError), match="mask: got"):
            layer(x[:, :3], cache=cache, mask=wrong)
        assert cache.lengths.tolist() == before


@pytest.mark.parametrize("with_cache", [True, False])
def test_drafts_of_a_rotary_layer_are_where_they_are_in_the_text(backend, rng, with_cache):
    """Each branch gives what it gives alone, at the same positions."""
    layer = na.MultiHeadAttention(24, 4, kv_heads=2, rotary=True, rng=1)
    x = numbers(rng, 2, 12, 24)
    tree = np.array(
        [[1, 0, 0, 0, 0], [1, 1, 0, 0, 0], [1, 1, 1, 0, 0], [1, 0, 0, 1, 0], [1, 0, 0, 1, 1]], bool
    )
    depths = tree.sum(axis=1) - 1
    cache = na.KVCache(2, 2, 6)
    if with_cache:
        layer(x[:, :7], cache=cache)
        drafts = layer(x[:, 7:], cache=cache.copy(), tail_mask=tree, positions=7 + depths)
    else:
        positions = np.broadcast_to([*range(7), *(7 + depths)], (2, 12))
        drafts = layer(x, is_causal=True, tail_mask=tree_of_all(tree, 12), positions=positions)
        drafts = drafts[:, 7:]
    for branch in ([0, 1, 2], [0, 3, 4]):
        tokens = [*range(7), *(7 + np.array(branch))]
        alone = layer(x[:, tokens], is_causal=True)[:, 7:]
        np.testing.assert_allclose(drafts[:, branch], alone, rtol=0, atol=2e-6)


def tree_of_all(tree, length):
    """Return a tail mask for all tokens, of which the last ones are the tree's."""
    whole = np.ones((length, len(tree)), bool)
    whole[-len(tree) :] = tree
    return whole


def test_positions_of_a_layer_are_checked(rng):
    x = numbers(rng, 2, 3, 24)
    plain = na.MultiHeadAttention(24, 4, rng=1)
    with pytest.raises(TypeError, match=r"positions: got an array, expected None; this layer has"):
        plain(x, positions=[0, 1, 2])
    rotary = na.MultiHeadAttention(24, 4, rotary=True, rng=1)
    for options in ({}, {"cache": na.KVCache(2, 4, 6)}):
        with pytest.raises(ValueError, match=r"positions: got shape \(2,\)"):
            rotary(x, positions=[0, 1], **options)
    with pytest.raises(TypeError, match=r"did you mean `positions=`"):
        rotary(x, position_ids=[0, 1, 2])


def test_a_tail_mask_takes_no_memory_of_forgotten_tokens(rng):
    """Two parts, of which the first one is `keep_first` long."""
    cache = na.KVCache(1, KV_HEADS, DIM, window=8, keep_first=3)
    k, v, q = (numbers(rng, 1, heads, 300, DIM) for heads in (KV_HEADS, KV_HEADS, HEADS))
    whole = rng.random((4, 4)) < 0.6
    for begin in range(0, 300, 6):
        cache.append(k[:, :, begin : begin + 6], v[:, :, begin : begin + 6])
    sizes = []
    kept = _kv_attend.expanded_tail
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            _kv_attend, "expanded_tail", lambda *a: sizes.append(kept(*a).shape) or kept(*a)
        )
        out = cache.attend(q[:, :, -4:], tail_mask=whole)
    assert sizes == []
    mask = seen(np.arange(296, 300), 300, {"window": 8, "keep_first": 3})
    mask[:, -4:] &= whole
    expected, _ = reference.attention(q[:, :, -4:], k, v, mask=mask)
    np.testing.assert_allclose(out, expected, rtol=0, atol=1e-5)
