"""Promise: bad arguments of the gradients give one clear error that names the argument, what came
and what was expected; the same from every backend."""

import re

import ml_dtypes
import numattn as na
import numpy as np
import pytest
from conftest import BACKENDS
from test_errors import AMBIGUOUS
from test_errors import CASES as FORWARD


def zeros(*shape, dtype=np.float32):
    return np.zeros(shape, dtype)


GIVEN = {
    "dout": zeros(2, 4, 5, 6),
    "q": zeros(2, 4, 5, 8),
    "k": zeros(2, 2, 7, 8),
    "v": zeros(2, 2, 7, 6),
    "out": zeros(2, 4, 5, 6),
    "lse": zeros(2, 4, 5),
}
HALF = {name: x.astype(np.float16) for name, x in GIVEN.items() if name != "lse"}
BRAIN = {name: x.astype(ml_dtypes.bfloat16) for name, x in GIVEN.items() if name != "lse"}
DOUBLE = {name: x.astype(np.float64) for name, x in GIVEN.items()}
# arguments that replace the good ones, the error, and what its message has to say
CASES = {
    "out of other sizes": (
        {"out": zeros(2, 4, 5, 8)},
        ValueError,
        "out: got shape (2, 4, 5, 8), expected (2, 4, 5, 6), the shape of out for these q, k",
    ),
    "out of fewer axes": ({"out": zeros(4, 5, 6)}, ValueError, "out: got shape (4, 5, 6), exp"),
    "out of another layout": (
        {"out": zeros(2, 5, 4, 6)},
        ValueError,
        "out: got shape (2, 5, 4, 6), expected (2, 4, 5, 6)",
    ),
    "out that would broadcast": ({"out": zeros(1, 4, 5, 6)}, ValueError, "out: got shape (1, 4, "),
    "out of float64": (
        {"out": DOUBLE["out"]},
        TypeError,
        "out: got dtype float64, expected float32, the dtype of q",
    ),
    "out of float32 beside float64": (
        DOUBLE | {"out": GIVEN["out"]},
        TypeError,
        "out: got dtype float32, expected float64, the dtype of q",
    ),
    "out of other 16 bits": (
        BRAIN | {"out": HALF["out"]},
        TypeError,
        "out: got dtype float16, expected bfloat16, the dtype of q, or float32",
    ),
    "no out": ({"out": None}, TypeError, "out: got None, expected an array"),
    "masked out": ({"out": np.ma.array(GIVEN["out"])}, TypeError, "out: got a masked array"),
    "dout of other sizes": (
        {"dout": zeros(2, 4, 6, 6)},
        ValueError,
        "dout: got shape (2, 4, 6, 6), expected (2, 4, 5, 6), the shape of out for these",
    ),
    "dout of one number": ({"dout": 1.0}, TypeError, "dout: got dtype float64, expected float32"),
    "no dout": ({"dout": None}, TypeError, "dout: got None, expected an array"),
    "dout of ints": ({"dout": zeros(2, 4, 5, 6, dtype=int)}, TypeError, "dout: got dtype int64"),
    "dout of foreign byte order": (
        {"dout": GIVEN["dout"].astype(">f4")},
        TypeError,
        "dout: got dtype float32 in non-native byte order, expected float32, the dtype of q",
    ),
    "dout of float64 beside 16 bits": (
        HALF | {"dout": DOUBLE["dout"]},
        TypeError,
        "dout: got dtype float64, expected float16, the dtype of q, or float32",
    ),
    "lse of other sizes": (
        {"lse": zeros(2, 5, 4)},
        ValueError,
        "lse: got shape (2, 5, 4), expected (2, 4, 5), the shape of lse for these q, k and v",
    ),
    "lse with a last axis": ({"lse": zeros(2, 4, 5, 1)}, ValueError, "lse: got shape (2, 4, 5, 1)"),
    "lse of float64": (
        {"lse": DOUBLE["lse"]},
        TypeError,
        "lse: got dtype float64, expected float32 with q of dtype float32",
    ),
    "lse of 16 bits": (
        HALF | {"lse": GIVEN["lse"].astype(np.float16)},
        TypeError,
        "lse: got dtype float16, expected float32 with q of dtype float16",
    ),
    "lse of float32 beside float64": (
        DOUBLE | {"lse": GIVEN["lse"]},
        TypeError,
        "lse: got dtype float32, expected float64 with q of dtype float64",
    ),
    "no lse": ({"lse": None}, TypeError, "lse: got None, expected an array"),
    "lse of foreign byte order": (
        {"lse": GIVEN["lse"].astype(">f4")},
        TypeError,
        "lse: got dtype float32 in non-native byte order, expected float32 with q of",
    ),
    "dlse of other sizes": ({"dlse": zeros(5)}, ValueError, "dlse: got shape (5,), expected (2, 4"),
    "dlse of float64": ({"dlse": DOUBLE["lse"]}, TypeError, "dlse: got dtype float64, expected"),
    "no bias": (
        {"bias_gradient": True},
        ValueError,
        "bias_gradient: got True without `bias=`, expected both, or False",
    ),
    "bias gradient of 1": ({"bias_gradient": 1}, TypeError, "bias_gradient: got 1 (int), expected"),
    **{
        f"{name} of 8 bits": (
            {name: GIVEN[name].astype(np.int8)},
            TypeError,
            f"{name}: got dtype int8, expected floats; 8-bit keys and values have no gradients",
        )
        for name in "qkv"
    },
    "scales": (
        {"k_scale": zeros(2, 2, 7)},
        TypeError,
        "attention_backward() takes no 'k_scale': multiply int8 keys and values by",
    ),
    "another library's name": (
        {"attn_mask": zeros(5, 7, dtype=bool)},
        TypeError,
        "attention_backward() got an unexpected keyword argument 'attn_mask'; did you mean `mask=`",
    ),
}


@pytest.mark.smoke
@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("backend", ["numpy", BACKENDS[-1]], indirect=True)
def test_bad_arguments(backend, name):
    arguments, error, message = CASES[name]
    with pytest.raises(error, match="^" + re.escape(message)) as caught:
        na.attention_backward(**GIVEN | arguments)
    assert caught.type is error


NOT_OF_THE_GRADIENTS = {"return_lse", "out"}
SHARED = [name for name, case in FORWARD.items() if not NOT_OF_THE_GRADIENTS & set(case[0])]


@pytest.mark.parametrize("name", SHARED)
@pytest.mark.parametrize("backend", ["numpy", BACKENDS[-1]], indirect=True)
def test_what_attention_refuses_is_refused_alike(backend, name):
    arguments, error, message = FORWARD[name]
    given = {name: GIVEN[name] for name in "qkv"} | arguments
    results = {name: GIVEN[name] for name in ("dout", "out", "lse")}
    for function, more in ((na.attention_backward, results), (na.attention_vjp, {})):
        with pytest.raises(error, match="^" + re.escape(message)) as caught:
            function(**given, **more)
        assert caught.type is error


def test_lengths_of_keys_alone_do_not_say_where_queries_are(backend):
    for options in AMBIGUOUS.values():
        with pytest.raises(ValueError, match=r"^kv_lengths: got lengths with"):
            na.attention_backward(**GIVEN, **options, kv_lengths=[7, 3])


def test_vjp_refuses_what_does_not_fit(backend):
    out, vjp = na.attention_vjp(*(GIVEN[name] for name in "qkv"))
    with pytest.raises(ValueError, match=r"^dout: got shape \(4, 5, 6\), expected \(2, 4, 5, 6\)"):
        vjp(out[0])
    with pytest.raises(
        TypeError, match=r"^dout: got dtype float64, expected float32, the dtype of q$"
    ):
        vjp(DOUBLE["dout"])
    with pytest.raises(ValueError, match=r"^dlse: got shape \(2, 4, 5, 6\), expected \(2, 4, 5\)"):
        vjp(out, out)
    with pytest.raises(ValueError, match=r"^bias_gradient: got True without `bias=`"):
        na.attention_vjp(*(GIVEN[name] for name in "qkv"), bias_gradient=True)
    with pytest.raises(TypeError, match=r"^return_lse: got 1 \(int\)"):
        na.attention_vjp(*(GIVEN[name] for name in "qkv"), return_lse=1)
    with pytest.raises(TypeError, match=r"^attention_vjp\(\) got an unexpected .* 'out'$"):
        na.attention_vjp(*(GIVEN[name] for name in "qkv"), out=out)


RAGGED = {
    "dout": zeros(9, 4, 6),
    "q": zeros(9, 4, 8),
    "k": zeros(11, 2, 8),
    "v": zeros(11, 2, 6),
    "out": zeros(9, 4, 6),
    "lse": zeros(9, 4),
    "cu_seqlens_q": [0, 4, 9],
    "cu_seqlens_k": [0, 7, 11],
}


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"out": zeros(4, 9, 6)}, ValueError, "out: got shape (4, 9, 6), expected (9, 4, 6), the"),
        ({"dout": zeros(8, 4, 6)}, ValueError, "dout: got shape (8, 4, 6), expected (9, 4, 6)"),
        ({"lse": zeros(4, 9)}, ValueError, "lse: got shape (4, 9), expected (9, 4), the shape"),
        ({"dlse": zeros(4, 9)}, ValueError, "dlse: got shape (4, 9), expected (9, 4)"),
        ({"lse": zeros(9, 4, dtype=float)}, TypeError, "lse: got dtype float64, expected float32"),
        ({"v": None}, TypeError, "v: got None, expected an array"),
        ({"k": zeros(11, 2, 8, dtype=np.int8)}, TypeError, "k: got dtype int8, expected floats"),
        ({"q": zeros(9, 32)}, ValueError, "q: got shape (9, 32), expected (total length, heads"),
        (
            {"cu_seqlens_k": [0, 7]},
            ValueError,
            "cu_seqlens_k: got 7 as the last number, expected 11",
        ),
        ({"cu_seqlens_q": [0, 5, 4, 9]}, ValueError, "cu_seqlens_q: got 4 after 5 at index 2"),
        ({"sinks": [1, 2]}, ValueError, "sinks: got shape (2,), expected one number per query"),
        ({"softcap": -1}, ValueError, "softcap: got -1, expected a positive number"),
        (
            {"attn_mask": zeros(9, 3)},
            TypeError,
            "attention_varlen_backward() got an unexpected keyword argument 'attn_mask'; did you "
            "mean `tail_mask=`",
        ),
    ],
)
def test_bad_arguments_of_sequences(backend, arguments, error, message):
    with pytest.raises(error, match="^" + re.escape(message)) as caught:
        na.attention_varlen_backward(**RAGGED | arguments)
    assert caught.type is error
