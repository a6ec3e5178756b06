"""What all entry points check alike: arrays, layouts, `out` and numbers; and how they refuse."""

from __future__ import annotations

import math
import operator
import sys
import warnings
from numbers import Real
from typing import TYPE_CHECKING, Any, NoReturn

import numpy as np
from numpy.ma import MaskedArray, isMaskedArray  # here: NumPy would do it in a first call

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from numpy.typing import ArrayLike, NDArray

    Array = NDArray[Any]

ACCEPTED_DTYPES = ("float16", "bfloat16", "float32", "float64")
LAYOUTS = ("bhld", "blhd")
MAX_THREADS = 1024

# ---- errors ------------------------------------------------------------------------------------


def refuse(name: str, seen: str, expected: str) -> NoReturn:
    raise ValueError(f"{name}: got {seen}, expected {expected}")


def refuse_kind(name: str, seen: str, expected: str) -> NoReturn:
    raise TypeError(f"{name}: got {seen}, expected {expected}")


def warn(message: str) -> None:
    """Warn whoever called the package."""
    level, frame = 1, sys._getframe()
    while frame.f_back is not None and frame.f_globals.get("__package__") == __package__:
        level, frame = level + 1, frame.f_back
    warnings.warn(message, UserWarning, stacklevel=level)


# What other libraries call arguments of attention, and what to write here; docs/porting.rst has all
# names of such tables.
ELSEWHERE = {
    "block_mask": "`mask=`, which takes a `BlockMask` too",
    "score_mod": "`bias=`, `alibi_slopes=` or `softcap=`: there is no function of single logits",
    "attn_mask": "`mask=` if it is bool (True = attend), `bias=` if it is float",
    "attention_mask": "`mask=` if it is bool (True = attend), `bias=` if it is float",
    "attn_bias": "`bias=`",
    "tree_mask": "`tail_mask=`",
    "medusa_attn_mask": "`tail_mask=`",
    "custom_mask": "`mask=`, or `tail_mask=` for the last keys alone",
    "tree_attn_bias": "`tail_mask=tree_attn_bias == 0`",
    "qq_bias": "`tail_mask=qq_bias == 0`",
    "key_padding_mask": "`kv_lengths=`, or `mask=~key_padding_mask[:, None, None, :]`",
    "causal": "`is_causal=` (PyTorch and JAX begin at the top left: `q_offset=0`)",
    "enable_gqa": "leave it out: grouped heads are seen by the shapes",
    "dropout_p": "`dropout=p, rng=seed`",
    "softmax_scale": "`scale=`",
    "window_size": "`window=(left, right)`, None where flash-attn has -1",
    "local_window_size": "`window=(left, right), q_offset=0`",
    "sliding_window": "`window=(sliding_window - 1, 0)`",
    "key_value_seq_lengths": "`kv_lengths=` (JAX begins at the top left: `q_offset=0`)",
    "query_seq_lengths": "`q_lengths=`",
    "nonpad_kv_seqlen": "`kv_lengths=`",
    "return_attn_probs": "`return_lse=`, or `attention_weights`",
    "need_weights": "`attention_weights`",
    "logits_soft_cap": "`softcap=`",
    "s_aux": "`sinks=`",
}

# For functions that have no dropout.
NO_DROPOUT = dict.fromkeys(("dropout", "dropout_p"), "`dropout=` of `attention`, for training")
INFERENCE_ELSEWHERE = {**ELSEWHERE, **NO_DROPOUT}


def refuse_unknown(
    function: str, arguments: Iterable[str], meanings: Mapping[str, str] = ELSEWHERE
) -> NoReturn:
    """Refuse arguments that a function does not have, and say what may have been meant."""
    for name in arguments:
        hint = meant(name, meanings)
        raise TypeError(f"{function}() got an unexpected keyword argument {name!r}{hint}")
    raise AssertionError("no arguments")


def meant(name: str, meanings: Mapping[str, str]) -> str:
    """Return what to append to an error about a name that may be another library's.

    A meaning is what to write instead, or a sentence.
    """
    meaning = meanings.get(name)
    if meaning is None:
        return ""
    hint = f"did you mean {meaning}?" if meaning.startswith("`") else f"{meaning}."
    return f"; {hint} See Porting in the documentation"


# ---- arrays ------------------------------------------------------------------------------------


# What array-likes raise that do not become arrays: tensors on a GPU or with a gradient, files that
# are gone, objects that do not have what they promise.
REFUSALS = (TypeError, RuntimeError, AttributeError, BufferError, OSError)


def as_array(name: str, x: ArrayLike) -> Array:
    """Return an array over the same memory, whose shape and strides nobody else can change."""
    masked = isinstance(x, MaskedArray)
    if masked or (isinstance(x, list | tuple) and any(map(isMaskedArray, x))):
        what = "a masked array" if masked else f"a {type(x).__name__} of masked arrays"
        refuse_kind(name, what, "a plain array (pass what is masked as `mask`)")
    try:
        array = np.asarray(x)
    except ValueError as error:  # NumPy does not say which argument it was
        refuse(name, f"what NumPy makes no array of ({error})", "an array")
    except REFUSALS as error:
        seen = f"{type(x).__name__} that refuses to become an array ({error})"
        refuse_kind(name, seen, "an array of NumPy: convert it first")
    if array.dtype == object and not isinstance(x, np.ndarray | int | list | tuple):
        kind = type(x)
        if kind.__name__ == "BlockMask":  # PyTorch's
            expected = "numattn's own: `BlockMask.from_mask_mod` takes the same function"
            refuse_kind(name, f"{kind.__module__}.BlockMask", expected)
        refuse_kind(name, kind.__name__, "an array")
    return array.view()


def snapshot(name: str, x: ArrayLike) -> Array:
    """Return a copy, for numbers that say what is read.

    It is what is checked and what is used, whatever the caller's threads write meanwhile.
    """
    return np.array(as_array(name, x))


def float_array(name: str, x: ArrayLike) -> Array:
    """Return an array of one of the accepted dtypes."""
    array = as_array(name, x)
    check_dtype(name, array)
    return array


def check_dtype(name: str, x: Array) -> None:
    if not is_accepted(x.dtype):
        refuse_kind(name, dtype_name(x), "one of " + ", ".join(ACCEPTED_DTYPES))


def accepted_dtype(dtype: object) -> np.dtype[Any]:
    """Return the dtype that an argument of this name means."""
    accepted = "one of " + ", ".join(ACCEPTED_DTYPES)
    if dtype is None:  # which NumPy takes for float64
        refuse_kind("dtype", "None", accepted)
    if isinstance(dtype, str) and dtype == "bfloat16":
        _name_bfloat16()
    try:
        found: np.dtype[Any] = np.dtype(dtype)  # type: ignore[call-overload]
    except (TypeError, ValueError, SyntaxError):
        refuse_kind("dtype", repr(dtype), accepted)
    if not is_accepted(found):
        refuse_kind("dtype", str(found), accepted)
    return found


def _name_bfloat16() -> None:
    """Make NumPy know the name, which it does once ml_dtypes has been imported."""
    try:
        import ml_dtypes  # noqa: F401
    except ImportError:
        raise ImportError("dtype bfloat16 needs ml_dtypes: pip install ml_dtypes") from None


def is_accepted(dtype: np.dtype[Any]) -> bool:
    return dtype.name in ACCEPTED_DTYPES and dtype.isnative


def precision_of(dtype: np.dtype[Any]) -> np.dtype[Any]:
    """Return what numbers of a dtype are computed in."""
    return np.dtype(np.float32) if dtype.itemsize == 2 else dtype


def is_real(dtype: np.dtype[Any]) -> bool:
    """Whether its elements are real numbers; NumPy does not know it of bfloat16."""
    return dtype.kind in "iuf" or dtype.name == "bfloat16"


def dtype_name(x: Array) -> str:
    return f"dtype {x.dtype.name}" + ("" if x.dtype.isnative else " of foreign byte order")


def same_elements(a: Array, b: Array) -> bool:
    """Whether both are one array, element by element."""
    return (
        a.shape == b.shape
        and a.strides == b.strides
        and a.__array_interface__["data"][0] == b.__array_interface__["data"][0]
    )


# ---- layouts -----------------------------------------------------------------------------------


def check_layout(layout: str) -> None:
    if not isinstance(layout, str):
        refuse_kind("layout", f"{type(layout).__name__}", "a str")
    if layout not in LAYOUTS:
        refuse("layout", repr(layout), "one of " + ", ".join(map(repr, LAYOUTS)))


def heads_first(x: Array, layout: str) -> Array:
    """View ``(..., heads, length, dim)`` of an array in the given layout."""
    if x.ndim == 2:
        return x[np.newaxis]
    return x if layout == "bhld" else x.swapaxes(-3, -2)


# ---- out ---------------------------------------------------------------------------------------


def check_out(
    out: object, shape: tuple[int, ...], dtype: np.dtype[Any], may_be_wider: bool = False
) -> Array:
    """Return a plain view of `out`; refuse one that is not what the result needs.

    `may_be_wider`: a result of 16 bits may be left in float32, as it was computed.
    """
    if not isinstance(out, np.ndarray) or isinstance(out, MaskedArray):
        refuse_kind("out", type(out).__name__, "a numpy.ndarray")
    may_be_wider = may_be_wider and dtype.itemsize == 2
    if out.dtype != dtype and not (may_be_wider and out.dtype == np.float32):
        hint = ", or float32" if may_be_wider else ""
        refuse_kind("out", dtype_name(out), f"{dtype.name} as in the input{hint}")
    if out.shape != shape:
        refuse("out", f"shape {out.shape}", str(shape))
    if not out.flags.writeable:
        refuse("out", "a read-only array", "a writable one")
    return out.view(np.ndarray)


def check_overlap(out: Array, inputs: Mapping[str, Array | None]) -> None:
    """Refuse an `out` that shares memory with itself or an input.

    `inputs` are what the computation reads: what was copied beforehand does not count.
    """
    # Every view that slicing and transposing can make passes: from the smallest stride to the
    # largest, a step goes beyond all that the steps before it can reach.
    reach = out.itemsize
    for stride, length in sorted((abs(s), n) for s, n in zip(out.strides, out.shape, strict=True)):
        if length > 1:
            if stride < reach and out.size > 0:
                refuse("out", f"strides {out.strides} that overlap", "elements of its own memory")
            reach += stride * (length - 1)
    for name, x in inputs.items():
        if x is not None and _shares_memory(out, x):
            refuse("out", f"memory that it shares with {name}", "memory of its own")


def _shares_memory(a: Array, b: Array) -> bool:
    try:
        return np.shares_memory(a, b, max_work=10_000)  # type: ignore[arg-type]
    except np.exceptions.TooHardError:
        return True


# ---- numbers -----------------------------------------------------------------------------------


def _scalar(value: object) -> object:
    """Return the element of an array without axes; all else as it is."""
    return value[()] if isinstance(value, np.ndarray) and value.ndim == 0 else value


def flag(name: str, value: object) -> bool:
    value = _scalar(value)
    if not isinstance(value, (bool, np.bool_)):
        refuse_kind(name, f"{value!r} ({type(value).__name__})", "True or False")
    return bool(value)


def integer(name: str, value: object) -> int:
    """Return an int of Python; a bool is none."""
    value = _scalar(value)
    if isinstance(value, (bool, np.bool_)):
        refuse_kind(name, repr(value), "an int")
    try:
        return operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        refuse_kind(name, f"{value!r} ({type(value).__name__})", "an int")


def at_least(name: str, value: object, least: int) -> int:
    number = integer(name, value)
    if number < least:
        refuse(name, str(number), f"at least {least}")
    return number


def thread_count(name: str, value: object) -> int:
    """Check a number of threads; `name` is where it came from."""
    number = integer(name, value)
    if not 1 <= number <= MAX_THREADS:
        refuse(name, str(number), f"a number of threads from 1 to {MAX_THREADS}")
    return number


def real(name: str, value: object) -> float:
    """Return a finite float."""
    value = _scalar(value)
    is_number = isinstance(value, (Real, np.number)) or (
        isinstance(value, np.generic) and is_real(value.dtype)
    )
    if isinstance(value, (bool, np.bool_)) or not is_number:
        refuse_kind(name, f"{value!r} ({type(value).__name__})", "a real number")
    if isinstance(value, np.complexfloating):
        refuse_kind(name, f"{value!r}", "a real number")
    try:
        number = float(value)  # type: ignore[arg-type]
    except OverflowError:
        number = math.inf
    if not math.isfinite(number):
        refuse(name, repr(value), "a finite number")
    return number
