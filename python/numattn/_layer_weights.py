"""A layer's weights: written to files, read from them, and taken from other libraries' layers."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import numpy as np

from ._checks import ACCEPTED_DTYPES, at_least, refuse, refuse_kind

if TYPE_CHECKING:
    import os
    from collections.abc import Mapping

    from numpy.typing import ArrayLike, NDArray

    Array = NDArray[Any]

_METADATA = "numattn.MultiHeadAttention"
_TORCH_NAMES = (
    "in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight", "in_proj_bias",
    "out_proj.weight", "out_proj.bias", "bias_k", "bias_v",
)  # fmt: skip


def copy(
    arrays: Mapping[str, Array], parameters: Mapping[str, Array], *, are_transposed: bool = False
) -> None:
    """Copy arrays into all parameters of a layer; an error names shapes as they were given."""
    for name, to in parameters.items():
        x = _present(arrays, name)
        if x.shape != to.shape:
            flip = -1 if are_transposed and x.ndim == 2 else 1
            refuse(name, f"shape {x.shape[::flip]}", str(to.shape[::flip]))
        to[...] = x
    for name in arrays:
        if name not in parameters:
            refuse("arrays", repr(name), "only " + ", ".join(parameters))


def _present(arrays: Mapping[str, Array], name: str) -> Array:
    if arrays.get(name) is None:
        there = ", ".join(f"{n} {x.shape}" for n, x in arrays.items())
        refuse(name, f"nothing among {there or 'no arrays'}", "an array of that name")
    return arrays[name]


# ---- files of safetensors ----------------------------------------------------------------------


def save(
    path: str | os.PathLike[str], description: dict[str, Any], parameters: Mapping[str, Array]
) -> None:
    """Write parameters, and the options of the layer that has them."""
    arrays = {name: np.ascontiguousarray(x) for name, x in parameters.items()}
    _safetensors().numpy.save_file(arrays, path, metadata={_METADATA: json.dumps(description)})


def load(path: str | os.PathLike[str]) -> tuple[dict[str, Any], dict[str, Array]]:
    """Return the options of a layer and its parameters."""
    package = _safetensors()
    try:
        with package.safe_open(path, framework="numpy") as file:
            metadata = file.metadata() or {}
            arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except package.SafetensorError as error:
        refuse("path", f"{path} ({error})", "a file of safetensors")
    if _METADATA not in metadata:
        refuse("path", f"{path} without a layer's sizes", "a file that `save` wrote")
    description = json.loads(metadata[_METADATA])
    description["context_dim"] = tuple(description["context_dim"])
    return description, arrays


def _safetensors() -> Any:
    try:
        import safetensors
        import safetensors.numpy
    except ImportError:
        raise ImportError(
            "saving and loading layers needs safetensors: pip install 'numattn[weights]'"
        ) from None
    return safetensors


# ---- separate matrices -------------------------------------------------------------------------


def float_matrices(**matrices: ArrayLike) -> dict[str, Array]:
    """Return arrays of two axes by their names."""
    return {name: _float_matrix(name, x) for name, x in matrices.items()}


def sizes(
    matrices: dict[str, Array], num_heads: int, kv_heads: int | None
) -> tuple[int, int, dict[str, Any]]:
    """Return embed_dim, num_heads, and the other sizes of a layer of matrices (out, in)."""
    heads = at_least("num_heads", num_heads, 1)
    shapes = {name: x.shape for name, x in matrices.items()}
    if shapes["q_weight"][0] % heads:
        refuse("q_weight", f"shape {shapes['q_weight']}", f"rows for {heads} heads")
    head_dim = shapes["q_weight"][0] // heads
    if kv_heads is None:
        kv_heads = shapes["k_weight"][0] // max(head_dim, 1)
    groups = at_least("kv_heads", kv_heads, 1)
    if shapes["k_weight"][0] != groups * head_dim:
        expected = f"{groups * head_dim} rows: {groups} heads of {head_dim}"
        refuse("k_weight", f"shape {shapes['k_weight']}", expected)
    if shapes["v_weight"][0] % groups:
        refuse("v_weight", f"shape {shapes['v_weight']}", f"rows for {groups} heads")
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
    """Return an array of real numbers, also of a tensor of PyTorch."""
    array = _from_tensor(x)
    if array.dtype.name not in ACCEPTED_DTYPES and array.dtype.kind not in "iu":
        refuse_kind(name, f"dtype {array.dtype.name}", "real numbers")
    return array


def _float_matrix(name: str, x: ArrayLike) -> Array:
    array = numbers(name, x)
    if array.ndim != 2:
        refuse(name, f"shape {array.shape}", "two axes")
    return array


def _from_tensor(x: Any) -> Array:
    """Return an array of what may be a tensor of PyTorch, also of its 16-bit floats."""
    if hasattr(x, "detach"):
        x = (
            x.detach().cpu().double()
            if str(x.dtype) == "torch.float64"
            else x.detach().cpu().float()
        )
        x = x.numpy()
    return np.asarray(x)


# ---- PyTorch -----------------------------------------------------------------------------------


def of_torch(module: Any, num_heads: int | None) -> dict[str, Any]:
    """Return the arguments of `MultiHeadAttention.from_weights` for a layer of PyTorch."""
    if getattr(module, "add_zero_attn", False):
        refuse("module", "add_zero_attn=True", "a module without it")
    if not hasattr(module, "keys") and not hasattr(module, "state_dict"):
        seen = type(module).__name__
        refuse_kind("module", seen, "a torch.nn.MultiheadAttention or its state_dict")
    state = module if hasattr(module, "keys") else module.state_dict()
    if num_heads is None:
        num_heads = getattr(module, "num_heads", None)
        if num_heads is None:
            refuse_kind("num_heads", "None", "the number of heads beside a state_dict")
    arrays = {name: _from_tensor(x) for name, x in state.items()}
    for name in ("bias_k", "bias_v"):
        if arrays.get(name) is not None:
            refuse("module", f"{name} (add_bias_kv=True)", "a module without it")
    for name in arrays:
        if name not in _TORCH_NAMES:
            refuse("module", repr(name), "only " + ", ".join(_TORCH_NAMES))
    if "in_proj_weight" in arrays:
        packed = arrays["in_proj_weight"]
        if packed.ndim != 2 or packed.shape[0] != 3 * packed.shape[1]:
            refuse("in_proj_weight", f"shape {packed.shape}", "(3 * embed_dim, embed_dim)")
        weights = dict(zip("qkv", np.split(packed, 3), strict=True))
    else:
        weights = {name: _present(arrays, f"{name}_proj_weight") for name in "qkv"}
    biases: dict[str, Array | None] = dict.fromkeys("qkv")
    if "in_proj_bias" in arrays:
        packed = arrays["in_proj_bias"]
        if packed.shape != (3 * weights["q"].shape[0],):
            refuse("in_proj_bias", f"shape {packed.shape}", f"({3 * weights['q'].shape[0]},)")
        biases = dict(zip("qkv", np.split(packed, 3), strict=True))
    return {
        "q_weight": weights["q"],
        "k_weight": weights["k"],
        "v_weight": weights["v"],
        "o_weight": _present(arrays, "out_proj.weight"),
        "num_heads": num_heads,
        "kv_heads": num_heads,
        "q_bias": biases["q"],
        "k_bias": biases["k"],
        "v_bias": biases["v"],
        "o_bias": arrays.get("out_proj.bias"),
    }
