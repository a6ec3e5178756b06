"""Checks that all entry points share: arrays, layouts, `out` and numbers; and the form of errors.

An error names the argument, then says what came, what was expected and, if that is not obvious,
what to do: "mask: got dtype int64, expected bool (True = attend); use `mask.astype(bool)` if 1
means attend".
"""

from __future__ import annotations

import math
import operator
import sys
import warnings
from numbers import Real
from typing import TYPE_CHECKING, Any, NoReturn

import numpy as np
from numpy.ma import MaskedArray, isMaskedArray  # NumPy loads it late, which slows a first call

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence
    from types import CodeType

    from numpy.typing import ArrayLike, NDArray

    Array = NDArray[Any]

ACCEPTED_DTYPES = ("float16", "bfloat16", "float32", "float64")
LAYOUTS = ("bhld", "blhd")
MAX_THREADS = 1024

# ---- errors ------------------------------------------------------------------------------------


def refuse(name: str, seen: str, expected: str, advice: str = "") -> NoReturn:
    """Refuse an argument for its value; `advice` says what to do."""
    raise ValueError(_sentence(name, seen, expected, advice))


def refuse_kind(name: str, seen: str, expected: str, advice: str = "") -> NoReturn:
    """Refuse an argument for its type or dtype."""
    raise TypeError(_sentence(name, seen, expected, advice))


def _sentence(name: str, seen: str, expected: str, advice: str) -> str:
    return f"{name}: got {seen}, expected {expected}" + (f"; {advice}" if advice else "")


def at_index(where: int | tuple[int, ...]) -> str:
    """Return the words " at index ..." for an error; "" for an array without axes."""
    if isinstance(where, tuple) and len(where) == 1:
        (where,) = where
    return "" if where == () else f" at index {where}"


def kind_of(value: object) -> str:
    """Return the type of a refused value, for an error."""
    return "None" if value is None else type(value).__name__


def value_and_kind(value: object) -> str:
    """Return a refused value and its type, for an error."""
    return "None" if value is None else f"{value!r} ({type(value).__name__})"


def warn(message: str, category: type[Warning] = UserWarning) -> None:
    """Warn, and name the line that called or imported the package."""
    level, frame = 1, sys._getframe()
    while frame.f_back is not None:
        package = frame.f_globals.get("__package__")
        if package == __package__:
            level += 1
        elif package != "importlib":  # frames of the import system, which `warnings` does not count
            break
        frame = frame.f_back
    warnings.warn(message, category, stacklevel=level)


# The names that other libraries use for arguments of attention, and what to write here.
# docs/porting.rst lists the names of all such tables.
ELSEWHERE = {
    "block_mask": "`mask=`, which takes a `BlockMask` too",
    "score_mod": "numattn takes no function of a logit: use `bias=`, `alibi_slopes=` or `softcap=`",
    "attn_mask": "`mask=` if it is bool (True = attend), `bias=` if it is float",
    "attention_mask": "`mask=` if it is bool (True = attend), `bias=` if it is float",
    "attn_bias": "`bias=`",
    "tree_mask": "`tail_mask=`",
    "medusa_attn_mask": "`tail_mask=`",
    "custom_mask": "`mask=`, or `tail_mask=` for the last keys only",
    "tree_attn_bias": "`tail_mask=tree_attn_bias == 0`",
    "qq_bias": "`tail_mask=qq_bias == 0`",
    "key_padding_mask": "`kv_lengths=`, or `mask=~key_padding_mask[:, None, None, :]`",
    "causal": "`is_causal=` (PyTorch and JAX begin at the top left: `q_offset=0`)",
    "enable_gqa": "leave it out: the shapes say which heads are grouped",
    "dropout_p": "`dropout=p, rng=seed`",
    "softmax_scale": "`scale=`",
    "window_size": "`window=(left, right)`, with None for flash-attn's -1",
    "local_window_size": "`window=(left, right), q_offset=0`",
    "sliding_window": "`window=(sliding_window - 1, 0)`",
    "key_value_seq_lengths": "`kv_lengths=` (JAX begins at the top left: `q_offset=0`)",
    "query_seq_lengths": "`q_lengths=`",
    "nonpad_kv_seqlen": "`kv_lengths=`",
    "return_attn_probs": "`return_lse=`, or `attention_weights`",
    "return_weights": "`attention_weights`",
    "lengths": "`q_lengths=n, kv_lengths=n`",
    "need_weights": "`attention_weights`",
    "logits_soft_cap": "`softcap=`",
    "s_aux": "`sinks=`",
}

# For functions that do not take 8-bit keys and values. Without this, errors would suggest `scale`.
_SCALES = ("k_scale", "v_scale")
_WITHOUT_8_BITS = "multiply int8 keys and values by their scales, and pass floats"

# For functions without dropout.
NO_DROPOUT = dict.fromkeys(("dropout", "dropout_p"), "`dropout=` of `attention`, for training")
INFERENCE_ELSEWHERE = {**ELSEWHERE, **NO_DROPOUT}


def refuse_unknown(
    function: str,
    arguments: Iterable[str],
    meanings: Mapping[str, str] = ELSEWHERE,
    known: Sequence[str] = (),
) -> NoReturn:
    """Refuse unknown keyword arguments; suggest numattn's name for one of another library.

    `known` are the correct names, one of which may be misspelt. Default: the parameters of the
    caller.
    """
    import difflib  # here: only errors need it

    known = known or parameters_of(sys._getframe(1).f_code)
    for name in arguments:
        if name in _SCALES and name not in meanings:
            reason = _WITHOUT_8_BITS if name[0] in known else f"it has no {name[0]}"
            raise TypeError(f"{function}() takes no {name!r}: {reason}")
        hint = meant(name, meanings)
        if not hint and (alike := difflib.get_close_matches(name, known, 1, 0.8)):
            hint = f"; did you mean `{alike[0]}=`?"
        raise TypeError(f"{function}() got an unexpected keyword argument {name!r}{hint}")
    raise AssertionError("no arguments")


def parameters_of(code: CodeType) -> tuple[str, ...]:
    return code.co_varnames[: code.co_argcount + code.co_kwonlyargcount]


def meant(name: str, meanings: Mapping[str, str]) -> str:
    """Return a hint for an error about a name that another library uses, or an empty string.

    A meaning in backticks is code to write instead; any other is a sentence.
    """
    meaning = meanings.get(name)
    if meaning is None:
        return ""
    hint = f"did you mean {meaning}?" if meaning.startswith("`") else f"{meaning}."
    return f"; {hint} See Porting in the documentation"


# ---- arrays ------------------------------------------------------------------------------------


# What array-likes raise if NumPy cannot convert them: tensors on a GPU or with a gradient, closed
# files, objects with an incomplete array interface.
REFUSALS = (TypeError, RuntimeError, AttributeError, BufferError, OSError)


def as_array(name: str, x: ArrayLike) -> Array:
    """Return a new view of the same memory, whose shape and strides no other code can change."""
    masked = isinstance(x, MaskedArray)
    if masked or (isinstance(x, list | tuple) and any(map(isMaskedArray, x))):
        what = "a masked array" if masked else f"a {type(x).__name__} of masked arrays"
        advice = "convert it with `.filled(...)`; attention leaves keys out with `mask=`"
        refuse_kind(name, what, "a plain array", advice)
    try:
        array = np.asarray(x)
    except ValueError as error:  # NumPy does not say which argument it was
        refuse(name, not_converted(x, error), "an array, or something that np.asarray accepts")
    except REFUSALS as error:
        is_tensor = type(x).__module__.partition(".")[0] == "torch"
        advice = "use `numattn.torch.attention`" if is_tensor else "convert it first"
        refuse_kind(name, not_converted(x, error), "a NumPy array", advice)
    if array.dtype == object and not isinstance(x, np.ndarray | int | list | tuple):
        kind = type(x)
        if kind.__name__ == "BlockMask":  # PyTorch's
            advice = "`BlockMask.from_mask_mod` takes the same function"
            refuse_kind(name, f"{kind.__module__}.BlockMask", "numattn.BlockMask", advice)
        refuse_kind(name, kind_of(x), "an array")
    return array.view()


def not_converted(x: object, error: Exception) -> str:
    """Describe something that NumPy could not convert to an array."""
    return f"{type(x).__name__}, which NumPy cannot convert to an array ({error})"


def snapshot(name: str, x: ArrayLike) -> Array:
    """Return a copy of values that decide which memory is read, such as lengths.

    The copy is both checked and used, so other threads cannot change the values in between.
    """
    return np.array(as_array(name, x))


def float_array(name: str, x: ArrayLike) -> Array:
    """Return an array of one of the accepted dtypes."""
    array = as_array(name, x)
    check_dtype(name, array)
    return array


def check_dtype(name: str, x: Array) -> None:
    if not is_accepted(x.dtype):
        is_number = x.dtype.kind in "iufb" or not x.dtype.isnative
        advice = "convert it with `.astype(np.float32)`" if is_number else ""
        refuse_kind(name, dtype_name(x), "one of " + ", ".join(ACCEPTED_DTYPES), advice)


def accepted_dtype(dtype: object) -> np.dtype[Any]:
    """Return the NumPy dtype that the argument `dtype` means."""
    accepted = "one of " + ", ".join(ACCEPTED_DTYPES)
    if dtype is None:  # NumPy takes None for float64
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
    """Import ml_dtypes, after which NumPy knows the name "bfloat16"."""
    try:
        import ml_dtypes  # noqa: F401
    except ImportError:
        raise ImportError("dtype bfloat16 needs ml_dtypes: pip install ml_dtypes") from None


def is_accepted(dtype: np.dtype[Any]) -> bool:
    return dtype.name in ACCEPTED_DTYPES and dtype.isnative


def precision_of(dtype: np.dtype[Any]) -> np.dtype[Any]:
    """Return the dtype that values of `dtype` are computed in."""
    return np.dtype(np.float32) if dtype.itemsize == 2 else dtype


def is_real(dtype: np.dtype[Any]) -> bool:
    """Return whether elements are real numbers; NumPy does not report it for bfloat16."""
    return dtype.kind in "iuf" or dtype.name == "bfloat16"


def dtype_name(x: Array) -> str:
    return f"dtype {x.dtype.name}" + ("" if x.dtype.isnative else " in non-native byte order")


def same_elements(a: Array, b: Array) -> bool:
    """Return whether both arrays have the same elements in memory."""
    return (
        a.shape == b.shape
        and a.strides == b.strides
        and a.__array_interface__["data"][0] == b.__array_interface__["data"][0]
    )


# ---- layouts -----------------------------------------------------------------------------------


def check_layout(layout: str) -> None:
    if not isinstance(layout, str):
        refuse_kind("layout", kind_of(layout), "a str")
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
    """Return a plain view of `out`; refuse a wrong type, dtype or shape.

    With `may_be_wider`, the result for 16-bit inputs may also be float32, as it is computed.
    """
    if not isinstance(out, np.ndarray) or isinstance(out, MaskedArray):
        refuse_kind("out", kind_of(out), "a numpy.ndarray")
    may_be_wider = may_be_wider and dtype.itemsize == 2
    if out.dtype != dtype and not (may_be_wider and out.dtype == np.float32):
        hint = ", or float32" if may_be_wider else ""
        refuse_kind("out", dtype_name(out), f"{dtype.name}, the dtype of the input{hint}")
    if out.shape != shape:
        refuse("out", f"shape {out.shape}", str(shape))
    if not out.flags.writeable:
        refuse("out", "a read-only array", "a writable one")
    return out.view(np.ndarray)


def check_overlap(out: Array, inputs: Mapping[str, Array | None]) -> None:
    """Refuse an `out` whose elements overlap, or that shares memory with an input.

    `inputs` are the arrays that the computation reads. Leave out those that were copied before.
    """
    # Sort the strides. Each must be at least the extent of all smaller ones. Every view made by
    # slicing and transposing passes.
    reach = out.itemsize
    for stride, length in sorted((abs(s), n) for s, n in zip(out.strides, out.shape, strict=True)):
        if length > 1:
            if stride < reach and out.size > 0:
                refuse("out", f"overlapping strides {out.strides}", "elements that do not overlap")
            reach += stride * (length - 1)
    for name, x in inputs.items():
        if x is not None and _shares_memory(out, x):
            refuse("out", f"an array that shares memory with {name}", "memory of its own")


def _shares_memory(a: Array, b: Array) -> bool:
    try:
        return np.shares_memory(a, b, max_work=10_000)  # type: ignore[arg-type]
    except np.exceptions.TooHardError:
        return True


# ---- numbers -----------------------------------------------------------------------------------


def _scalar(value: object) -> object:
    """Return the element of an array with no axes; return anything else unchanged."""
    return value[()] if isinstance(value, np.ndarray) and value.ndim == 0 else value


def flag(name: str, value: object, advice: str = "") -> bool:
    value = _scalar(value)
    if not isinstance(value, (bool, np.bool_)):
        refuse_kind(name, value_and_kind(value), "True or False", advice)
    return bool(value)


def integer(name: str, value: object) -> int:
    """Return a Python int; refuse a bool."""
    value = _scalar(value)
    if isinstance(value, (bool, np.bool_)):
        refuse_kind(name, repr(value), "an int")
    try:
        return operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        refuse_kind(name, value_and_kind(value), "an int")


def at_least(name: str, value: object, least: int) -> int:
    number = integer(name, value)
    if number < least:
        refuse(name, str(number), f"at least {least}")
    return number


def thread_count(name: str, value: object) -> int:
    """Check a number of threads; `name` is the argument or variable that it came from."""
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
        refuse_kind(name, value_and_kind(value), "a real number")
    if isinstance(value, np.complexfloating):
        refuse_kind(name, f"{value!r}", "a real number")
    try:
        number = float(value)  # type: ignore[arg-type]
    except OverflowError:
        number = math.inf
    if not math.isfinite(number):
        refuse(name, repr(value), "a finite number")
    return number
