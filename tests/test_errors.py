"""Promise: bad input gives one clear error that names the argument, what came and what was
expected; the same from every backend."""

import re

import numattn as na
import numpy as np
import pytest
from conftest import BACKENDS


def zeros(*shape, dtype=np.float32):
    return np.zeros(shape, dtype)


class Refusing:
    """As an array on a GPU, which does not move to the CPU by itself, or one whose file is gone."""

    def __init__(self, error=TypeError):
        self.error = error

    def __array__(self, dtype=None, copy=None):
        raise self.error("no implicit conversion")


Q, K, V = zeros(2, 4, 5, 8), zeros(2, 2, 7, 8), zeros(2, 2, 7, 6)
READ_ONLY = zeros(2, 4, 5, 6)
READ_ONLY.flags.writeable = False
OVERLAPPING = np.lib.stride_tricks.as_strided(zeros(1000), (2, 4, 5, 6), (480, 120, 4, 4))
SHARED = zeros(2, 4, 5, 14)

# arguments that replace the good ones, the error, and what its message has to say
CASES = {
    "rank of q": ({"q": zeros(8)}, ValueError, "q: got shape (8,), expected (..., heads"),
    "rank of k": ({"k": np.float32(1)}, ValueError, "k: got shape ()"),
    "heads": ({"q": zeros(2, 3, 5, 8)}, ValueError, "q: got 3 heads, expected a multiple of the 2"),
    "no KV heads": (
        {"k": zeros(2, 0, 7, 8), "v": zeros(2, 0, 7, 6)},
        ValueError,
        "q: got 4 heads, expected a multiple of the 0",
    ),
    "heads of v": ({"v": zeros(2, 1, 7, 6)}, ValueError, "v: got 1 heads, expected 2 as in k"),
    "head_dim": ({"k": zeros(2, 2, 7, 9)}, ValueError, "k: got head_dim 9, expected 8 as in q"),
    "key_length": ({"v": zeros(2, 2, 6, 6)}, ValueError, "v: got 6 keys, expected 7 as in k"),
    "no elements": ({"v": zeros(2, 2, 7, 0)}, ValueError, "v: got shape (2, 2, 7, 0), expected at"),
    "batch": ({"k": zeros(3, 2, 7, 8)}, ValueError, "q, k, v: got q (2, 4, 5, 8), k (3, 2, 7, 8)"),
    "integers": (
        {"q": zeros(2, 4, 5, 8, dtype=int)},
        TypeError,
        "q: got dtype int64, expected one",
    ),
    "no values": ({"v": None}, TypeError, "v: got None, expected an array"),
    "complex": ({"v": zeros(2, 2, 7, 6, dtype=complex)}, TypeError, "v: got dtype complex128"),
    "objects": ({"k": K.astype(object)}, TypeError, "k: got dtype object, expected one of float16"),
    "strings": ({"k": "no array"}, TypeError, "k: got dtype str"),
    "ragged": (
        {"k": [[1.0], [1.0, 2.0]]},
        ValueError,
        "k: got list, which NumPy cannot convert to an array",
    ),
    "mixed dtypes": (
        {"k": K.astype(float)},
        TypeError,
        "q, k, v: got q float32, k float64, v float32, expected one dtype for all three: float16,",
    ),
    "foreign byte order": (
        {"q": Q.astype(">f4")},
        TypeError,
        "q: got dtype float32 in non-native byte",
    ),
    "masked array": ({"k": np.ma.array(K)}, TypeError, "k: got a masked array, expected a plain"),
    "masked arrays": (
        {"k": [np.ma.array(x) for x in K]},
        TypeError,
        "k: got a list of masked arrays, expected a plain array",
    ),
    "float mask": ({"mask": zeros(5, 7)}, TypeError, "mask: got dtype float32, expected bool"),
    "mask shape": (
        {"mask": zeros(5, 6, dtype=bool)},
        ValueError,
        "mask: got shape (5, 6), expected one that broadcasts to (..., Hq, Lq, Lk) = (2, 4, 5, 7)",
    ),
    "mask adds axes": (
        {"mask": zeros(3, 2, 4, 5, 7, dtype=bool)},
        ValueError,
        "mask: got shape (3,",
    ),
    "float tail": (
        {"tail_mask": zeros(5, 3)},
        TypeError,
        "tail_mask: got dtype float32, expected bool (True = attend); "
        "use `tail_mask == 0` if it is a bias of 0 and -inf",
    ),
    "tail of 0 and 1": (
        {"tail_mask": zeros(5, 3, dtype=int)},
        TypeError,
        "tail_mask: got dtype int64, expected bool (True = attend); use `tail_mask.as",
    ),
    "tail without axes": (
        {"tail_mask": True},
        ValueError,
        "tail_mask: got shape (), expected (..., Hq, Lq, T), one column for each of the last",
    ),
    "long tail": (
        {"tail_mask": zeros(5, 8, dtype=bool)},
        ValueError,
        "tail_mask: got T = 8 (shape (5, 8)), expected T of at most Lk = 7",
    ),
    "tail shape": (
        {"tail_mask": zeros(4, 3, dtype=bool)},
        ValueError,
        "tail_mask: got shape (4, 3), expected one that broadcasts to (..., Hq, Lq, T) = "
        "(2, 4, 5, 3)",
    ),
    "tail adds axes": (
        {"tail_mask": zeros(3, 2, 4, 5, 7, dtype=bool)},
        ValueError,
        "tail_mask: got shape (3,",
    ),
    "masked tail": (
        {"tail_mask": np.ma.ones((5, 7), bool)},
        TypeError,
        "tail_mask: got a masked array",
    ),
    "bias kind": (
        {"bias": zeros(5, 7, dtype=bool)},
        TypeError,
        "bias: got dtype bool, expected fl",
    ),
    "bias precision": ({"bias": zeros(5, 7, dtype=float)}, TypeError, "bias: got dtype float64"),
    "bias shape": ({"bias": zeros(4, 7)}, ValueError, "bias: got shape (4, 7), expected one that"),
    "causal": (
        {"is_causal": "yes"},
        TypeError,
        "is_causal: got 'yes' (str), expected True or False",
    ),
    "causal int": ({"is_causal": 1}, TypeError, "is_causal: got 1 (int)"),
    "lse": ({"return_lse": None}, TypeError, "return_lse: got None"),
    "bare window": ({"window": 3}, TypeError, "window: got 3 (int), expected (left, right)"),
    "window sides": (
        {"window": (1, 2, 3)},
        ValueError,
        "window: got (1, 2, 3), expected two sides",
    ),
    "negative window": (
        {"window": (-1, 0)},
        ValueError,
        "window: got (-1, 0), expected sides of",
    ),
    "float window": ({"window": (1.0, 0)}, TypeError, "window: got 1.0 (float), expected an int"),
    "NaN scale": ({"scale": np.nan}, ValueError, "scale: got nan, expected a finite number"),
    "infinite scale": ({"scale": np.inf}, ValueError, "scale: got inf, expected a finite number"),
    "scale overflow": (
        {"scale": 1e39},
        ValueError,
        "scale: got 1e+39, expected a magnitude of at most 2.4e+38",
    ),
    "huge int scale": ({"scale": 10**400}, ValueError, "scale: got 1"),
    "scale kind": ({"scale": "1"}, TypeError, "scale: got '1' (str), expected a real number"),
    "complex scale": ({"scale": 1j}, TypeError, "scale: got 1j (complex)"),
    "zero softcap": ({"softcap": 0}, ValueError, "softcap: got 0, expected a positive number"),
    "negative softcap": ({"softcap": -2.0}, ValueError, "softcap: got -2.0, expected a positive"),
    "NaN softcap": ({"softcap": np.nan}, ValueError, "softcap: got nan, expected a finite number"),
    "tiny softcap": ({"softcap": 1e-45}, ValueError, "softcap: got 1e-45, expected 1e-39 to"),
    "huge softcap": ({"softcap": 3e38}, ValueError, "softcap: got 3e+38, expected 1e-39 to"),
    "none": ({"q": None}, TypeError, "q: got None, expected an array"),
    "huge sink": ({"sinks": [0, 1e39, 0, 0]}, ValueError, "sinks: got 1e+39 for head 1, expected"),
    "huge slope": (
        {"alibi_slopes": [-1e39] * 4},
        ValueError,
        "alibi_slopes: got -1e+39 for",
    ),
    "layout kind": ({"layout": 5}, TypeError, "layout: got int, expected a str"),
    "layout array": ({"layout": Q}, TypeError, "layout: got ndarray, expected a str"),
    "out byte order": (
        {"out": zeros(2, 4, 5, 6, dtype=">f4")},
        TypeError,
        "out: got dtype float32 in non-native byte order, expected float32, the dtype of the input",
    ),
    "negative length": (
        {"kv_lengths": [-1, 3]},
        ValueError,
        "kv_lengths: got -1 at index 0, expected 0 t",
    ),
    "long length": (
        {"kv_lengths": [7, 8]},
        ValueError,
        "kv_lengths: got 8 at index 1, expected 0 to 7",
    ),
    "float length": ({"kv_lengths": [1.0, 2.0]}, TypeError, "kv_lengths: got dtype float64, exp"),
    "bool length": ({"kv_lengths": [True, False]}, TypeError, "kv_lengths: got dtype bool"),
    "lengths shape": (
        {"kv_lengths": [1, 2, 3]},
        ValueError,
        "kv_lengths: got shape (3,), expected",
    ),
    "query length range": (
        {"q_lengths": [5, 6]},
        ValueError,
        "q_lengths: got 6 at index 1, expected 0 to 5",
    ),
    "query length kind": ({"q_lengths": 2.0}, TypeError, "q_lengths: got dtype float64, expected"),
    "axes": ({"q": zeros(*[1] * 40, 2, 3)}, ValueError, "q: got 42 axes, expected at most 32"),
    "mask of 0 and 1": (
        {"mask": zeros(5, 7, dtype=int)},
        TypeError,
        "mask: got dtype int64, expected bool (True = attend); use `mask.astype(bool)`",
    ),
    "refusing array": (
        {"k": Refusing()},
        TypeError,
        "k: got Refusing, which NumPy cannot convert to an array (no implicit conversion), exp",
    ),
    **{
        f"array with {error.__name__}": (
            {"v": Refusing(error)},
            TypeError,
            "v: got Refusing, which NumPy cannot convert to an array (no implicit conversion), exp",
        )
        for error in (AttributeError, BufferError, OSError, RuntimeError)
    },
    "refusing mask": ({"mask": Refusing()}, TypeError, "mask: got Refusing, which NumPy"),
    "refusing lengths": ({"kv_lengths": Refusing()}, TypeError, "kv_lengths: got Refusing, which"),
    "offset kind": ({"q_offset": 1.5}, TypeError, "q_offset: got dtype float64, expected ints"),
    "offset range": ({"q_offset": 2**80}, ValueError, f"q_offset: got {2**80}, expected -"),
    "offset shape": (
        {"q_offset": [[1, 2]]},
        ValueError,
        "q_offset: got shape (1, 2), expected one",
    ),
    "slopes": (
        {"alibi_slopes": [1, 2]},
        ValueError,
        "alibi_slopes: got shape (2,), expected one nu",
    ),
    "NaN slope": (
        {"alibi_slopes": [1, np.nan, 1, 1]},
        ValueError,
        "alibi_slopes: got nan for head 1",
    ),
    "slope kind": ({"alibi_slopes": ["a"] * 4}, TypeError, "alibi_slopes: got dtype <U1"),
    "sinks": (
        {"sinks": 1.0},
        ValueError,
        "sinks: got shape (), expected one number per query head",
    ),
    "infinite sink": ({"sinks": [0, 0, np.inf, 0]}, ValueError, "sinks: got inf for head 2"),
    "negative dropout": (
        {"dropout": -0.1, "rng": 0},
        ValueError,
        "dropout: got -0.1, expected the fraction of weights to drop, from 0 to less than 1",
    ),
    "dropout of all": (
        {"dropout": 1, "rng": 0},
        ValueError,
        "dropout: got 1, expected the fraction",
    ),
    "dropout in percent": ({"dropout": 10.0, "rng": 0}, ValueError, "dropout: got 10.0, expected"),
    "NaN dropout": ({"dropout": np.nan, "rng": 0}, ValueError, "dropout: got nan, expected a fin"),
    "dropout kind": ({"dropout": "0.1", "rng": 0}, TypeError, "dropout: got '0.1' (str), expected"),
    "dropout flag": ({"dropout": True, "rng": 0}, TypeError, "dropout: got True (bool), expected"),
    "no dropout given": (
        {"dropout": None},
        TypeError,
        "dropout: got None, expected a r",
    ),
    "dropout per head": ({"dropout": [0.1] * 4, "rng": 0}, TypeError, "dropout: got [0.1, 0.1, "),
    "no seed": (
        {"dropout": 0.1},
        ValueError,
        "rng: got None with dropout=0.1, expected a seed, an int that forward and backward share",
    ),
    "seed kind": ({"dropout": 0.1, "rng": 1.0}, TypeError, "rng: got 1.0 (float), expected an int"),
    "seed flag": ({"rng": True}, TypeError, "rng: got True, expected an int"),
    "seeds": ({"rng": [1, 2]}, TypeError, "rng: got [1, 2] (list), expected an int"),
    "negative seed": (
        {"dropout": 0.1, "rng": -1},
        ValueError,
        "rng: got -1, expected a seed from 0 to 18446744073709551615",
    ),
    "large seed": ({"rng": 2**64}, ValueError, "rng: got 18446744073709551616, expected a seed"),
    "layout": (
        {"layout": "bldh"},
        ValueError,
        "layout: got 'bldh', expected one of 'bhld', 'blhd'",
    ),
    "no threads": (
        {"num_threads": 0},
        ValueError,
        "num_threads: got 0, expected a number of threads",
    ),
    "threads kind": (
        {"num_threads": 1.0},
        TypeError,
        "num_threads: got 1.0 (float), expected an int",
    ),
    "many threads": (
        {"num_threads": 10**6},
        ValueError,
        "num_threads: got 1000000, expected a num",
    ),
    "out kind": ({"out": [0.0]}, TypeError, "out: got list, expected a numpy.ndarray"),
    "out shape": (
        {"out": zeros(2, 4, 5, 7)},
        ValueError,
        "out: got shape (2, 4, 5, 7), expected (2,",
    ),
    "out dtype": (
        {"out": zeros(2, 4, 5, 6, dtype=float)},
        TypeError,
        "out: got dtype float64, expec",
    ),
    "out read-only": (
        {"out": READ_ONLY},
        ValueError,
        "out: got a read-only array, expected a writ",
    ),
    "out overlaps": (
        {"out": OVERLAPPING},
        ValueError,
        "out: got overlapping strides (480, 120, 4, 4), exp",
    ),
    "out is q": (
        {"v": zeros(2, 2, 7, 8), "out": Q},
        ValueError,
        "out: got an array that shares memory with q, expected memory of its own",
    ),
    "out on q": (
        {"q": SHARED[..., :8], "out": SHARED[..., 6:12]},
        ValueError,
        "out: got an array that shares memory with q",
    ),
}


@pytest.mark.smoke
@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("backend", ["numpy", BACKENDS[-1]], indirect=True)
def test_bad_arguments(backend, name):
    arguments, error, message = CASES[name]
    arguments = {"q": Q, "k": K, "v": V} | arguments
    with pytest.raises(error, match="^" + re.escape(message)) as caught:
        na.attention(arguments.pop("q"), arguments.pop("k"), arguments.pop("v"), **arguments)
    assert caught.type is error


AMBIGUOUS = {
    "is_causal": {"is_causal": True},
    "window": {"window": (3, None)},
    "window, to the right": {"window": (None, 2)},
    "window, which is causal": {"window": (2, 0)},
    "is_causal and window": {"is_causal": True, "window": (2, None)},
    "is_causal, window without limits": {"is_causal": True, "window": (None, 2**70)},
    "alibi_slopes": {"alibi_slopes": [0.1, 0.2, 0.3, 0.4]},
}


@pytest.mark.parametrize("name", AMBIGUOUS)
def test_lengths_of_keys_alone_do_not_say_where_queries_are(backend, name):
    """A batch padded on the right would be computed as if its padding were in front."""
    options = AMBIGUOUS[name] | {"kv_lengths": [7, 3]}
    message = rf"^kv_lengths: got lengths with {name.split(',')[0]} and 5 queries"
    calls = {
        "attention": lambda **more: na.attention(Q, K, V, **options, **more),
        "qk_scores": lambda **more: na.qk_scores(Q, K, **options, **more),
        "weights": lambda **more: na.attention_weights(Q, K, **options, **more),
        "received": lambda **more: na.attention_received(Q, K, **options, **more),
        "paged": lambda **more: na.attention_paged(
            Q, K.swapaxes(1, 2), V.swapaxes(1, 2), [[0], [1]], **options, **more
        ),
    }
    for call in calls.values():
        with pytest.raises(ValueError, match=message) as caught:
            call()
        assert "`q_lengths=n, kv_lengths=n`" in str(caught.value)
        assert "`q_offset=kv_lengths - Lq`" in str(caught.value)
        call(q_lengths=[5, 3])
        call(q_offset=[2, -2])
    na.attention(Q[:, :, :1], K, V, **options)  # one query is at the last valid key
    na.attention(Q, K, V, kv_lengths=[7, 3], window=(None, None))  # no position matters


def pairs(rng, name, *shape):
    """Return a mask or a bias."""
    return rng.random(shape, dtype=np.float32) if name == "bias" else rng.random(shape) < 0.7


PAIRS = pytest.mark.parametrize("name", ["mask", "tail_mask", "bias"])


@PAIRS
def test_pairs_that_may_mean_the_batch_are_warned_of(backend, rng, name):
    x = rng.standard_normal((4, 4, 3, 8), dtype=np.float32)  # as many batch items as heads
    given = pairs(rng, name, 4, 3, 3)
    keys = "T" if name == "tail_mask" else "Lk"
    taken = rf"shape \(4, 3, 3\) is taken as \(Hq, Lq, {keys}\)"
    message = rf"{name}: {taken}, .* `{name}\[:, np.newaxis\]`"
    with pytest.warns(UserWarning, match=message):
        out = na.attention(x, x, x, **{name: given})
    np.testing.assert_array_equal(out, na.attention(x, x, x, **{name: given[np.newaxis]}))
    x = rng.standard_normal((3, 2, 3, 8), dtype=np.float32)  # as many as queries
    given = pairs(rng, name, 3, 3)
    for call in (na.attention, lambda q, k, _, **options: na.attention_weights(q, k, **options)):
        message = (
            rf"{name}: .* is taken as \(Lq, {keys}\), .* `{name}\[:, np.newaxis, np.newaxis\]`"
        )
        with pytest.warns(UserWarning, match=message) as caught:
            call(x, x, x, **{name: given})
        assert len(caught) == 1
        assert caught[0].filename == __file__  # and no file of the package
    na.attention(x, x, x, **{name: given[:, np.newaxis, np.newaxis]})
    na.attention(x[:2], x[:2], x[:2], **{name: given})
    na.attention(x[0], x[0], x[0], **{name: given})


@PAIRS
@pytest.mark.parametrize(
    ("sizes", "shape", "inserted"),  # of the batch, heads and queries; None: not warned of
    [
        ((4, 3, 4, 3), (4, 3, 5), ":, :, np.newaxis, np.newaxis"),
        ((3, 3, 3, 2), (3, 3, 2, 5), ":, :, np.newaxis"),
        ((4, 1, 4, 3), (4, 1, 5), ":, :, np.newaxis, np.newaxis"),
        ((2, 3, 4, 2, 3), (2, 3, 4, 2, 5), None),  # which would have to be (3, 4, 2, 3, 5)
        ((4, 3, 4, 3), (1, 4, 3, 5), None),
        ((4, 3, 4, 3), (4, 1, 5), None),  # a mask of the heads
        ((4, 3, 4, 3), (3, 5), None),
        ((1, 1, 4, 3), (1, 1, 5), None),
        ((4, 3, 4, 3), (4, 3, 4, 3, 5), None),
    ],
)
def test_several_batch_axes_are_compared_as_a_whole(backend, rng, name, sizes, shape, inserted):
    q = rng.standard_normal((*sizes, 8), dtype=np.float32)
    k, v = rng.standard_normal((2, *sizes[:-1], 5, 8), dtype=np.float32)
    given = pairs(rng, name, *shape)
    if inserted is None:
        if shape[0] == sizes[0] == 2:  # which does not fit: the error says enough
            with pytest.raises(ValueError, match=rf"^{name}: got shape"):
                na.attention(q, k, v, **{name: given})
        else:
            na.attention(q, k, v, **{name: given})
        return
    with pytest.warns(UserWarning, match=re.escape(f"`{name}[{inserted}]`")) as caught:
        out = na.attention(q, k, v, **{name: given})
    assert len(caught) == 1
    np.testing.assert_array_equal(out, na.attention(q, k, v, **{name: given[np.newaxis]}))


LEAVE_OUT = "leave it out: the shapes say which heads are grouped. See Porting"


@pytest.mark.parametrize(
    ("name", "meant", "meant_in_sequences"),
    [
        ("attn_mask", "`mask=`", "`tail_mask=`"),
        ("causal", "`is_causal=`", "`is_causal=`"),
        ("enable_gqa", LEAVE_OUT, LEAVE_OUT),
        ("key_padding_mask", "`kv_lengths=`", "`kv_lengths=`"),
        ("query_seq_lengths", "`q_lengths=`", "`q_lengths=`"),
        ("tree_mask", "`tail_mask=`", "`tail_mask=`"),
        ("qq_bias", "`tail_mask=qq_bias == 0`", "`tail_mask=qq_bias == 0`"),
    ],
)
def test_names_of_other_libraries(name, meant, meant_in_sequences):
    starts = [0, 5]
    calls = [
        (lambda **more: na.attention(Q, K, V, **more), meant),
        (
            lambda **more: na.attention_varlen(Q[0], K[0], V[0], starts, starts, **more),
            meant_in_sequences,
        ),
        (
            lambda **more: na.attention_paged(Q, K, V, [[0], [1]], [1, 1], **more),
            meant_in_sequences,
        ),
        (lambda **more: na.qk_scores(Q, K, **more), meant),
        (lambda **more: na.attention_weights(Q, K, **more), meant),
        (lambda **more: na.attention_received(Q, K, **more), meant),
    ]
    for call, meant_here in calls:
        hint = meant_here if meant_here == LEAVE_OUT else f"did you mean {meant_here}"
        message = f"unexpected keyword argument '{name}'; {hint}"
        with pytest.raises(TypeError, match=re.escape(message)):
            call(**{name: None})
        with pytest.raises(TypeError, match=r"unexpected keyword argument 'nonsense'$"):
            call(nonsense=1)


GENERATOR = (
    "rng: got a numpy.random.Generator, expected a seed, an int that forward and backward share; "
    "pass `int(rng.integers(2**63))`"
)


def test_seeds_are_no_generators(backend):
    starts = [0, 5], [0, 7]
    ragged = [x[0].swapaxes(0, 1) for x in (Q, K, V)]
    out, lse = na.attention(Q, K, V, return_lse=True)
    one, one_lse = na.attention_varlen(*ragged, *starts, return_lse=True)
    calls = [
        lambda **more: na.attention(Q, K, V, **more),
        lambda **more: na.attention_varlen(*ragged, *starts, **more),
        lambda **more: na.attention_backward(out, Q, K, V, out, lse, **more),
        lambda **more: na.attention_varlen_backward(one, *ragged, one, one_lse, *starts, **more),
    ]
    for call in calls:
        for dropout in (0, 0.5):
            with pytest.raises(TypeError, match="^" + re.escape(GENERATOR)):
                call(dropout=dropout, rng=np.random.default_rng(0))
        call(dropout=0.5, rng=0)


def test_nothing_is_written_where_dropout_is_refused(backend):
    out = np.full((2, 4, 5, 6), np.nan, np.float32)
    for options in ({"dropout": 1.0, "rng": 0}, {"dropout": 0.5}, {"dropout": 0.5, "rng": -1}):
        with pytest.raises(ValueError, match=r"^(dropout|rng): got"):
            na.attention(Q, K, V, out=out, **options)
    assert np.isnan(out).all()


@pytest.mark.parametrize("name", ["dropout", "dropout_p"])
def test_dropout_is_for_training(name):
    cache = na.KVCache(2, 2, 8, value_dim=6)
    cache.append(K, V)
    pages = K.swapaxes(1, 2), V.swapaxes(1, 2)
    weights = na.attention_weights(Q, K)
    calls = [
        lambda **more: na.attention_paged(Q, *pages, [[0], [1]], [7, 7], **more),
        lambda **more: cache.attend(Q, **more),
        lambda **more: cache.append_and_attend(Q[:, :, :1], K[:, :, :1], V[:, :, :1], **more),
        lambda **more: na.qk_scores(Q, K, **more),
        lambda **more: na.attention_weights(Q, K, **more),
        lambda **more: na.attention_received(Q, K, **more),
        lambda **more: na.aggregate_values(weights, V, **more),
    ]
    message = f"keyword argument '{name}'; did you mean `dropout=` of `attention`, for training?"
    for call in calls:
        with pytest.raises(TypeError, match=re.escape(message)):
            call(**{name: 0.1})
    starts = [0, 5], [0, 7]
    ragged = [x[0].swapaxes(0, 1) for x in (Q, K, V)]
    calls = [
        lambda **more: na.attention(Q, K, V, **more),
        lambda **more: na.attention_varlen(*ragged, *starts, **more),
        lambda **more: na.attention_vjp(Q, K, V, **more),
    ]
    for call in calls:
        if name == "dropout":
            call(dropout=0.1, rng=0)
        else:
            with pytest.raises(TypeError, match=r"did you mean `dropout=p, rng=seed`\?"):
                call(**{name: 0.1})


OTHERS = {
    "rotary_embedding": (lambda **more: na.rotary_embedding(Q, **more), "rope_theta", "`base=`"),
    "aggregate_values": (
        lambda **more: na.aggregate_values(K[..., :7], V, **more), "scale", "`v_scale=`",
    ),
    "masked_softmax": (lambda **more: na.masked_softmax(Q, **more), "where", "`mask=`"),
    "quantize_kv": (lambda **more: na.quantize_kv(K, **more), "per_channel", "`channel_scale=`"),
    "MultiHeadAttention": (
        lambda **more: na.MultiHeadAttention(8, 2, **more), "num_key_value_heads", "`kv_heads=`",
    ),
    "MultiHeadAttention.from_weights": (
        lambda **more: na.MultiHeadAttention.from_weights(
            *[np.eye(8, dtype=np.float32)] * 4, num_heads=2, transposed=False, **more
        ), "rope_scaling", "`rotary={'scaling': rope_scaling}`",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", OTHERS)
def test_names_of_other_libraries_for_what_is_around_attention(name):
    call, other, meant = OTHERS[name]
    call()
    message = rf"{name}() got an unexpected keyword argument {other!r}; did you mean {meant}"
    with pytest.raises(TypeError, match="^" + re.escape(message)):
        call(**{other: None})
    with pytest.raises(TypeError, match=r"unexpected keyword argument 'nonsense'$"):
        call(nonsense=1)


def test_names_of_other_libraries_in_a_layer():
    layer = na.MultiHeadAttention(8, 2, rng=0)
    for name, hint in (
        ("return_lse", "only `attention` has it. See Porting"),
        ("attn_bias", "did you mean `bias=`?"),
        ("logits_soft_cap", "did you mean `softcap=`?"),
    ):
        with pytest.raises(TypeError, match=re.escape(f"argument '{name}'; {hint}")):
            layer(zeros(3, 8), **{name: None})
    message = r"^rotary: got 'rope_theta', expected only base, .*; did you mean `base=`\?"
    with pytest.raises(ValueError, match=message):
        na.MultiHeadAttention(8, 2, rotary={"rope_theta": 5.0})


def test_numbers_may_be_arrays_without_axes(backend):
    plain = na.attention(Q + 1, K + 1, V, scale=0.5, softcap=2.0, is_causal=True, num_threads=1)
    of_arrays = na.attention(
        Q + 1, K + 1, V, scale=np.array(0.5), softcap=np.array(2), is_causal=np.array(True),
        num_threads=np.array(1),
    )  # fmt: skip
    np.testing.assert_array_equal(of_arrays, plain)


def test_numbers_may_be_bfloat16(backend, rng):
    bfloat16 = pytest.importorskip("ml_dtypes").bfloat16
    q, k, v = (rng.standard_normal(x.shape, dtype=np.float32) for x in (Q, K, V))
    plain = na.attention(q, k, v, scale=0.5, softcap=2.0)
    for scale, softcap in ((bfloat16(0.5), bfloat16(2)), (np.array(0.5, bfloat16), 2.0)):
        out = na.attention(q, k, v, scale=scale, softcap=softcap)
        np.testing.assert_array_equal(out, plain)
    with pytest.raises(ValueError, match=r"^scale: got nan, expected a finite number"):
        na.attention(q, k, v, scale=bfloat16(np.nan))
    rotated = na.rotary_embedding(q, np.arange(5).astype(bfloat16), base=bfloat16(512))
    np.testing.assert_array_equal(rotated, na.rotary_embedding(q, np.arange(5), base=512.0))
    waves = np.array([1, 0.5], bfloat16)
    rotated = na.rotary_embedding(q, frequencies=waves)
    np.testing.assert_array_equal(rotated, na.rotary_embedding(q, frequencies=[1, 0.5]))


def test_stages_speak_of_their_own_arguments():
    with pytest.raises(ValueError, match=r"^k: got head_dim 7, expected 8 as in q \(q .*, k .*\)$"):
        na.qk_scores(Q, K[..., :7])
    with pytest.raises(
        TypeError, match=r"^q, k: got q float32, k float64, expected one dtype for bo"
    ):
        na.attention_weights(Q, K.astype(float))


@PAIRS
def test_one_head_has_pairs_of_two_axes(backend, name):
    x = zeros(5, 8)
    pairs = np.ones((1, 5, 5), np.float32 if name == "bias" else bool)
    axes = r"\(Lq, T\)" if name == "tail_mask" else r"\(Lq, Lk\)"
    message = rf"^{name}: got shape \(1, 5, 5\), expected one that broadcasts to {axes}"
    with pytest.raises(ValueError, match=message):
        na.attention(x, x, x, **{name: pairs})
    na.attention(x, x, x, **{name: pairs[0]})


def test_out_may_be_a_matrix(backend, rng):
    x = rng.standard_normal((5, 8), dtype=np.float32)
    with pytest.warns(PendingDeprecationWarning):
        out = np.asmatrix(np.zeros((5, 8), np.float32))
    assert na.attention(x, x, x, out=out) is out
    np.testing.assert_array_equal(out.view(np.ndarray), na.attention(x, x, x))


def test_overlap_is_seen_through_buffers(backend):
    """And only where memory is shared that is read."""
    x = zeros(6, 8)
    for name in ("q", "k", "v"):
        arguments = {"q": zeros(6, 8), "k": zeros(6, 8), "v": zeros(6, 8), name: memoryview(x)}
        with pytest.raises(ValueError, match=rf"^out: got an array that shares memory with {name}"):
            na.attention(**arguments, out=x)
    na.attention([*x], x.copy(), x.copy(), out=x)  # a list of views is copied
    sinks = zeros(6, 8)
    na.attention(x.copy(), x.copy(), x.copy(), sinks=sinks[0, :1], out=sinks)  # numbers are, too
    for name in ("mask", "tail_mask"):
        pairs = x.view(bool).reshape(-1)[:6]
        with pytest.raises(ValueError, match=rf"^out: got an array that shares memory with {name}"):
            na.attention(x.copy(), x.copy(), x.copy(), **{name: pairs}, out=x)
    numbers, scale = zeros(1, 6, 8, dtype=np.int8), zeros(1, 6)
    for out, of in ((scale.reshape(1, 6, 1), memoryview(scale)), (scale.reshape(1, 6, 1), scale)):
        with pytest.raises(ValueError, match=r"^out: got an array that shares memory with k_scale"):
            na.attention(zeros(1, 6, 8), numbers, zeros(1, 6, 1), k_scale=of, out=out)


def test_out_beside_q_is_fine(backend, rng):
    shared = rng.standard_normal((2, 4, 5, 14)).astype(np.float32)
    q, out = shared[..., :8], shared[..., 8:14]
    expected = na.attention(q, K, V)
    assert na.attention(q, K, V, out=out) is out
    np.testing.assert_array_equal(out, expected)


def test_too_large_a_result(backend):
    huge = np.lib.stride_tricks.as_strided(zeros(1), (2**40, 2**20, 1), (0, 0, 0))
    with pytest.raises((ValueError, MemoryError)):
        na.attention(huge, huge, huge)
    wide = np.lib.stride_tricks.as_strided(zeros(1), (1, 1, 2**45), (0, 0, 4))
    with pytest.raises(ValueError, match=r"^v: got shape"):
        na.attention(zeros(1, 1, 1), zeros(1, 1, 1), wide)
    deep = np.lib.stride_tricks.as_strided(zeros(1), (1, 1, 2**55), (0, 0, 0))
    with pytest.raises(ValueError, match=r"^q: got shape"):
        na.attention(deep, deep, zeros(1, 1, 4))


@pytest.mark.thread_unsafe(reason="sets what belongs to the process")
def test_thread_counts():
    before = na.get_num_threads()
    with pytest.raises(ValueError, match="num_threads: got 0"):
        na.set_num_threads(0)
    with pytest.raises(TypeError, match="num_threads: got 'two'"):
        na.set_num_threads("two")
    assert na.get_num_threads() == before
    na.set_num_threads(3)
    assert na.get_num_threads() == na.runtime_info()["num_threads"] == 3
    na.set_num_threads(before)


def test_other_dtypes_are_named(backend):
    ml_dtypes = pytest.importorskip("ml_dtypes")
    accepted = "expected one of float16, bfloat16, float32, float64"
    for dtype, seen in {
        ml_dtypes.float8_e4m3fn: "dtype float8_e4m3fn",
        np.int8: "dtype int8",
        np.longdouble: f"dtype {np.dtype(np.longdouble).name}",
        ">f2": "dtype float16 in non-native byte order",
        ">f8": "dtype float64 in non-native byte order",
    }.items():
        x = Q.astype(dtype)
        with pytest.raises(TypeError, match=re.escape(f"q: got {seen}, {accepted}")):
            na.attention(x, x, x)
    half, brain = Q.astype(np.float16), Q.astype(ml_dtypes.bfloat16)
    with pytest.raises(TypeError, match="q float16, k bfloat16, v float16, expected one dtype"):
        na.attention(half, brain, half)
    bias = np.zeros((5, 5), np.float16)
    wanted = "bias: got dtype float16, expected bfloat16 or float32 with q of dtype bfloat16"
    with pytest.raises(TypeError, match=wanted):
        na.attention(brain, brain, brain, bias=bias)
    wanted = "^out: got dtype float16, expected bfloat16, the dtype of the input, or float32$"
    with pytest.raises(TypeError, match=wanted):
        na.attention(brain, brain, brain, out=np.zeros_like(half))


@pytest.mark.parametrize(
    ("call", "hint"),
    [
        (lambda: na.attention(Q, Q, Q, is_causl=True), "; did you mean `is_causal=`?"),
        (lambda: na.masked_softmax(Q, axes=1), ""),
        (lambda: na.attention_weights(Q, Q, row=1), "; did you mean `rows=`?"),
        (lambda: na.attention(Q, Q, Q, fast=True), ""),
    ],
)
def test_misspelt_arguments(call, hint):
    with pytest.raises(TypeError) as raised:
        call()
    assert str(raised.value).partition("'")[2].partition("'")[2] == hint


@pytest.mark.parametrize(
    ("call", "name"),
    [
        (lambda: na.BlockMask.causal(4), "BlockMask.causal"),
        (lambda: na.KVCache(1), "KVCache.__init__"),
        (lambda: na.KVCache(1, 1, 8).select(), "KVCache.select"),
        (lambda: na.MultiHeadAttention.from_torch(), "MultiHeadAttention.from_torch"),
    ],
)
def test_missing_arguments_name_the_public_class(call, name):
    with pytest.raises(TypeError, match=rf"^{name}\(\) missing"):
        call()


def test_advice_for_first_mistakes(rng):
    """What newcomers pass first: batches without heads, tokenizers' masks, double precision."""
    x = rng.standard_normal((4, 10, 64), dtype=np.float32)
    q = rng.standard_normal((4, 2, 8, 16), dtype=np.float32)
    layer, block = na.MultiHeadAttention(64, 4, rng=0), na.TransformerBlock(64, 4, rng=0)
    for call, error, advice in (
        (
            lambda: na.attention(x, x, x, kv_lengths=[1, 2, 3, 4]),
            ValueError,
            "an axis for the batch",
        ),
        (
            lambda: na.attention(q, q, q, mask=np.ones((4, 8), bool)),
            ValueError,
            "mask[:, None, None,",
        ),
        (lambda: na.attention(q, q, q, bias=np.ones((8, 8))), TypeError, ".astype(np.float32)"),
        (lambda: na.attention(q.astype(int), q, q), TypeError, ".astype(np.float32)"),
        (lambda: layer(x.astype(float)), TypeError, "make the layer with `dtype='float64'`"),
        (lambda: layer(x, bias=True), TypeError, "it is added to the logits"),
        (lambda: block(x, is_casual=True), TypeError, "TransformerBlock() got an unexpected"),
        (lambda: block(x, src_key_padding_mask=None), TypeError, "did you mean `lengths=`"),
        (lambda: block.vjp(x, foo=1), TypeError, "TransformerBlock.vjp() got an unexpected"),
        (lambda: na.attention_vjp(q, q, q, k_scale=1), TypeError, "multiply int8 keys and values"),
        (lambda: na.qk_scores(q, q, v_scale=1), TypeError, "takes no 'v_scale': it has no v"),
    ):
        with pytest.raises(error) as raised:
            call()
        assert advice in str(raised.value)
