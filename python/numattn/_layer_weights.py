"""A layer's weights: files of them, and weights from other libraries' layers."""

from __future__ import annotations

import errno
import json
import os
import re
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NoReturn

import numpy as np

from ._checks import (
    REFUSALS,
    as_array,
    at_least,
    flag,
    is_real,
    kind_of,
    not_converted,
    refuse,
    refuse_kind,
    value_and_kind,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from numpy.typing import ArrayLike, NDArray

    Array = NDArray[Any]

_METADATA = "numattn.MultiHeadAttention"
_OPTIONS = (
    "embed_dim", "num_heads", "kv_heads", "head_dim", "value_dim", "context_dim", "bias", "rotary",
    "qk_norm", "dtype", "norm_epsilon",
)  # fmt: skip
# The values for older files, which do not contain these options.
_LATER_OPTIONS = {"norm_epsilon": 1e-6}
_DTYPES = {"float16": "F16", "bfloat16": "BF16", "float32": "F32", "float64": "F64"}
_TORCH_NAMES = (
    "in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight", "in_proj_bias",
    "out_proj.weight", "out_proj.bias", "bias_k", "bias_v",
)  # fmt: skip
# Hugging Face's names of separate matrices for q, k, v and the output.
_SEPARATE_NAMES = (
    ("q_proj", "k_proj", "v_proj", "o_proj"),
    ("q_proj", "k_proj", "v_proj", "out_proj"),
    ("q_lin", "k_lin", "v_lin", "out_lin"),
    ("query", "key", "value", "dense"),
    ("q", "k", "v", "o"),
)
_JOINED_NAMES = ("qkv_proj", "qkv", "query_key_value", "c_attn", "Wqkv")


def check_shapes(
    given: Mapping[str, tuple[int, ...]],
    expected: Mapping[str, tuple[int, ...]],
    are_transposed: bool,
) -> None:
    """Check that the arrays of a layer are given; an error shows shapes as the user gave them."""
    for name, shape in expected.items():
        if name not in given:
            refuse_missing(name, given)
        if given[name] != shape:
            flip = -1 if are_transposed and name.endswith("_weight") else 1
            refuse(name, f"shape {given[name][::flip]}", str(shape[::flip]))
    for name in given:
        if name not in expected:
            refuse("arrays", repr(name), "only " + ", ".join(expected))


def refuse_missing(name: str, given: Mapping[str, tuple[int, ...]]) -> NoReturn:
    there = ", ".join(f"{n} {shape}" for n, shape in given.items())
    refuse(name, f"no such array, only {there}" if there else "no arrays", "an array of that name")


def converted(name: str, x: Array, dtype: np.dtype[Any]) -> Array:
    """Return a copy in a dtype, in C order."""
    with np.errstate(all="ignore"):
        copy = np.array(x, dtype, order="C")
    if x.dtype != dtype and np.any(np.isinf(copy) & np.isfinite(x)):
        wider = "a wider dtype" if dtype.itemsize == 2 else "dtype float64"
        refuse(name, f"values too large for {dtype.name}", f"smaller values, or {wider}")
    return copy


# ---- files of safetensors ----------------------------------------------------------------------


def save(
    path: str | os.PathLike[str],
    description: dict[str, Any],
    parameters: Mapping[str, Array],
    kind: str = _METADATA,
) -> None:
    """Write the parameters and the options of a layer or block of this kind."""
    arrays = {name: np.ascontiguousarray(x) for name, x in parameters.items()}
    package = _safetensors()
    filename = _file_name(path)
    try:
        package.numpy.save_file(arrays, filename, metadata={kind: json.dumps(description)})
    except package.SafetensorError as error:
        raise OSError(f"path: {filename} cannot be written ({error})") from error


@contextmanager
def opened(
    path: str | os.PathLike[str],
    kind: str = _METADATA,
    check: Callable[[dict[str, Any]], dict[str, Any]] | None = None,
) -> Iterator[tuple[dict[str, tuple[int, ...]], Callable[[str], Array], dict[str, Any]]]:
    """Yield the shapes of the arrays in a file, a function that reads one, and the options.

    `check` checks and returns the options; by default, the options of an attention layer. Errors
    about the file, and about a layer made from it, name the file.
    """
    package = _safetensors()
    filename = _file_name(path)
    if os.path.isdir(filename):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), filename)
    try:
        with package.safe_open(filename, framework="numpy") as file:
            metadata = file.metadata() or {}
            if kind not in metadata:
                refuse("metadata", f"no {kind!r}", f"the sizes of a layer as {kind!r}")
            description = (check or checked_sizes)(_description(kind, metadata[kind]))
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
            for name, x in slices.items():
                if x.get_dtype() != _DTYPES[description["dtype"]]:
                    refuse_kind(name, f"dtype {x.get_dtype()}", f"{description['dtype']}")
            shapes = {name: tuple(x.get_shape()) for name, x in slices.items()}
            yield shapes, file.get_tensor, description
    except (package.SafetensorError, TypeError, ValueError) as error:
        refuse("path", f"{filename} ({error})", "a file that `save` wrote")


def _file_name(path: str | os.PathLike[str]) -> str:
    try:
        return os.fsdecode(path)
    except TypeError:
        refuse_kind("path", value_and_kind(path), "a str or a pathlib.Path")


def _description(kind: str, text: str) -> dict[str, Any]:
    try:
        description = json.loads(text)
    except (ValueError, RecursionError) as error:
        refuse(kind, f"text that is not JSON ({error})", "JSON")
    if not isinstance(description, dict):
        refuse_kind(kind, kind_of(description), "a mapping")
    return description


def check_names(kind: str, description: dict[str, Any], options: tuple[str, ...]) -> None:
    """Check that a description has all options of a layer and no others."""
    for name in options:
        if name not in description:
            refuse(name, "nothing", "a value among the sizes of the layer")
    for name in description:
        if name not in options:
            refuse(kind, repr(name), "only " + ", ".join(options))


def checked_sizes(description: dict[str, Any]) -> dict[str, Any]:
    """Check and return the options of an attention layer."""
    description = _LATER_OPTIONS | description
    check_names(_METADATA, description, _OPTIONS)
    for name in _OPTIONS[:5]:
        at_least(name, description[name], 1)
    pair = description["context_dim"]
    if not isinstance(pair, list) or len(pair) != 2:
        refuse_kind("context_dim", repr(pair), "two ints")
    if description["dtype"] not in list(_DTYPES):
        refuse("dtype", repr(description["dtype"]), "one of " + ", ".join(_DTYPES))
    return description | {"context_dim": tuple(pair)}


def _safetensors() -> Any:
    try:
        import safetensors
        import safetensors.numpy
    except ImportError:
        raise ImportError(
            "saving and loading a layer needs safetensors: pip install 'numattn[weights]'"
        ) from None
    return safetensors


# ---- separate matrices -------------------------------------------------------------------------


def float_matrices(**matrices: ArrayLike) -> dict[str, Array]:
    """Return the matrices as arrays of two axes, by name."""
    return {name: _float_matrix(name, x) for name, x in matrices.items()}


def with_inputs_first(matrices: dict[str, Array], transposed: bool | None) -> bool:
    """Return whether matrices are (in, out) rather than (out, in).

    If not all matrices are square, a wrong guess makes a layer of other sizes, which shows in its
    first call. If all are square, it would silently change the results, so the caller must say.
    """
    if transposed is not None:
        return flag("transposed", transposed)
    if all(x.shape[0] == x.shape[1] for x in matrices.values()):
        refuse_kind(
            "transposed",
            "None for square matrices, whose shapes do not show which axis holds the inputs",
            "False for (out, in), as in torch.nn.Linear, or True for (in, out), as in GPT-2's "
            "Conv1D",
        )
    return False


def sizes(
    matrices: dict[str, Array], num_heads: int, kv_heads: int | None, inputs_first: bool
) -> tuple[int, int, dict[str, Any]]:
    """Return embed_dim, num_heads and the other sizes of a layer with these matrices.

    An error shows shapes as the user gave them.
    """
    heads = at_least("num_heads", num_heads, 1)
    flip = -1 if inputs_first else 1
    shapes = {name: x.shape[::flip] for name, x in matrices.items()}
    rows = "columns" if inputs_first else "rows"

    def refuse_outputs(name: str, expected: str) -> NoReturn:
        refuse(name, f"shape {matrices[name].shape}", expected)

    if shapes["q_weight"][0] % heads:
        refuse_outputs("q_weight", f"a number of {rows} divisible by the {heads} heads")
    head_dim = shapes["q_weight"][0] // heads
    if kv_heads is None:
        groups = max(shapes["k_weight"][0] // head_dim, 1)
    else:
        groups = at_least("kv_heads", kv_heads, 1)
    if shapes["k_weight"][0] != groups * head_dim:
        expected = f"{groups * head_dim} {rows} for {groups} heads of {head_dim} elements"
        refuse_outputs("k_weight", expected)
    if kv_heads is None and heads % groups:
        expected = f"{rows} for a number of heads that divides the {heads} query heads"
        refuse_outputs("k_weight", expected)
    if shapes["v_weight"][0] % groups:
        refuse_outputs("v_weight", f"a number of {rows} divisible by the {groups} KV heads")
    return (
        shapes["q_weight"][1],
        heads,
        {
            "kv_heads": groups,
            "head_dim": head_dim,
            "value_dim": shapes["v_weight"][0] // groups,
            "context_dim": (shapes["k_weight"][1], shapes["v_weight"][1]),
        },
    )


def numbers(name: str, x: ArrayLike) -> Array:
    """Return an array of real numbers, also from a PyTorch tensor."""
    array = _from_tensor(name, x)
    if not is_real(array.dtype):
        refuse_kind(name, f"dtype {array.dtype.name}", "real numbers")
    return array


def _float_matrix(name: str, x: ArrayLike) -> Array:
    array = numbers(name, x)
    if array.ndim != 2 or array.size == 0:
        refuse(name, f"shape {array.shape}", "two axes, neither of them empty")
    return array


def _from_tensor(name: str, x: Any) -> Array:
    """Return an array from anything, including PyTorch tensors, also of 16-bit floats."""
    if hasattr(x, "detach"):
        try:
            x = x.detach().cpu()
            x = (x.float() if str(x.dtype) == "torch.bfloat16" else x).numpy()
        except REFUSALS as error:  # a tensor without memory, or of 8 bits
            advice = "convert it to float32 first"
            refuse_kind(name, not_converted(x, error), "a tensor with values", advice)
    return as_array(name, x)


# ---- PyTorch -----------------------------------------------------------------------------------


def _refuse_parts(module: Any, state: Mapping[str, Any], is_state: bool) -> None:
    """Refuse a module that has attention as a part, and say how to pass that part."""
    ends = (".in_proj_weight", ".q_proj_weight")
    dotted = [name for name in map(str, state) if name.endswith(ends)]
    parts = [name.rpartition(".")[0] for name in dotted]
    if not parts:
        return
    if is_state:
        prefix = f"{parts[0]}."
        start = f"{{name.removeprefix({prefix!r}): x for name, x in state.items() "
        seen = f"names that begin with {', '.join(map(repr, parts))}"
        advice = f"pass {start}if name.startswith({prefix!r})}}"
        refuse("module", seen, "the weights of one attention layer", advice)
    paths = [re.sub(r"\.(\d+)", r"[\1]", f"module.{name}") for name in parts]
    names = " or ".join(f"`{path}`" for path in paths[:3])
    expected = "a torch.nn.MultiheadAttention"
    refuse_kind("module", kind_of(module), expected, f"pass {names}")


def _refuse_separate(module: Any, state: Mapping[str, Any], is_state: bool) -> None:
    """Refuse a Hugging Face layer or model, and say how to pass its weights."""
    names = list(map(str, state))
    there = {name.removesuffix(".weight") for name in names if name.endswith(".weight")}

    def path(name: str) -> str:
        if is_state:
            return f"module[{name!r}]"
        return re.sub(r"\.(\d+)", r"[\1]", f"module.{name}")

    expected = "in_proj_weight and out_proj.weight, as in a torch.nn.MultiheadAttention"
    for name in (name for name in names if name.removesuffix(".weight") in there):
        prefix, dot, last = name.removesuffix(".weight").rpartition(".")
        for of_q, *others in _SEPARATE_NAMES:
            parts = [f"{prefix}{dot}{part}" for part in (of_q, *others)]
            if last != of_q or not there.issuperset(parts[:3]):
                continue
            if parts[3] not in there and others[-1] != "dense":  # the next names may match
                continue
            paths = [path(f"{part}.weight") for part in parts]
            paths[3:] = paths[3:] if parts[3] in there else ["o_weight"]
            call = f"`from_weights({', '.join(paths)}, num_heads=..., transposed=False)`"
            bias = " and their biases" if f"{parts[0]}.bias" in names else ""
            seen = f"{name!r} in a {type(module).__name__}"
            refuse("module", seen, expected, f"pass separate matrices{bias} to {call}")
        if last in _JOINED_NAMES:
            seen = f"{name!r} in a {type(module).__name__}"
            is_wide = np.argmax(getattr(state[name], "shape", (0,))) == 1  # of a Conv1D
            axes = "(in, out)" if is_wide else "(out, in)"
            take = f"split `{path(name)}` into matrices {axes} of q, k and v for"
            call = f"`from_weights(..., transposed={bool(is_wide)})`"
            refuse("module", seen, expected, f"{take} {call}")


def _present(arrays: Mapping[str, Array], name: str) -> Array:
    if name not in arrays:
        refuse_missing(name, {n: x.shape for n, x in arrays.items()})
    return arrays[name]


def of_torch(module: Any, num_heads: int | None) -> dict[str, Any]:
    """Return the arguments of `MultiHeadAttention.from_weights` for a PyTorch layer."""
    if getattr(module, "add_zero_attn", False):
        refuse("module", "add_zero_attn=True", "a module without it")
    is_state = hasattr(module, "keys")
    if not is_state and not hasattr(module, "state_dict"):
        seen = kind_of(module)
        refuse_kind("module", seen, "a torch.nn.MultiheadAttention or its state_dict")
    state = module if is_state else module.state_dict()
    _refuse_parts(module, state, is_state)
    if not {"in_proj_weight", "q_proj_weight"} & set(state):
        _refuse_separate(module, state, is_state)
    for name in state:
        if name not in _TORCH_NAMES:
            expected = "only " + ", ".join(_TORCH_NAMES)
            advice = "`from_weights` takes matrices with other names"
            refuse("module", repr(name), expected, advice)
    for name in ("bias_k", "bias_v"):
        if state.get(name) is not None:
            refuse("module", f"{name} (add_bias_kv=True)", "a module without it")
    if not getattr(module, "batch_first", True):
        expected = "batch_first=True, because the layer takes (batch, length, embed_dim)"
        advice = (
            "pass `module.state_dict(), module.num_heads`, and call the layer with "
            "`x.swapaxes(0, 1)`"
        )
        refuse("module", "batch_first=False", expected, advice)
    heads_of_module = getattr(module, "num_heads", None)
    if num_heads is None:
        if heads_of_module is None:
            refuse_kind("num_heads", "None with a state_dict", "the number of heads")
        num_heads = heads_of_module
    num_heads = at_least("num_heads", num_heads, 1)
    if heads_of_module not in (None, num_heads):
        refuse("num_heads", str(num_heads), f"{heads_of_module}, as in the module")
    arrays = _torch_arrays(state, num_heads)
    if "in_proj_weight" in arrays:
        weights = np.split(arrays["in_proj_weight"], 3)
    else:
        weights = [_present(arrays, f"{name}_proj_weight") for name in "qkv"]
    biases: list[Any] = [None] * 3
    if "in_proj_bias" in arrays:
        biases = np.split(arrays["in_proj_bias"], 3)
    return {
        **dict(zip(("q_weight", "k_weight", "v_weight"), weights, strict=True)),
        "o_weight": _present(arrays, "out_proj.weight"),
        "num_heads": num_heads,
        "kv_heads": num_heads,
        "transposed": False,
        **dict(zip(("q_bias", "k_bias", "v_bias"), biases, strict=True)),
        "o_bias": arrays.get("out_proj.bias"),
    }


def _torch_arrays(state: Mapping[str, Any], num_heads: int) -> dict[str, Array]:
    """Return the arrays of a state_dict, after checking that their shapes fit."""
    arrays = {name: numbers(name, x) for name, x in state.items() if x is not None}
    first = "in_proj_weight" if "in_proj_weight" in arrays else "q_proj_weight"
    embed_dim = _float_matrix(first, _present(arrays, first)).shape[1]
    for name, x in arrays.items():
        rows = 3 * embed_dim if name.startswith("in_proj") else embed_dim
        columns = x.shape[-1:] if name in ("k_proj_weight", "v_proj_weight") else (embed_dim,)
        expected = (rows,) if name.endswith("bias") else (rows, *columns)
        if x.shape != expected:
            refuse(name, f"shape {x.shape}", str(expected))
        if first == "in_proj_weight" and name.endswith("_proj_weight") and name != first:
            refuse("module", f"{first} and {name}", "only one of them")
    if embed_dim % num_heads:
        refuse("num_heads", str(num_heads), f"a divisor of embed_dim, which is {embed_dim}")
    return arrays
