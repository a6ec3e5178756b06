"""Whether this installation computes what it should: `python -m numattn`."""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import sys
from typing import TYPE_CHECKING, Any

import numpy as np

from . import (
    _arguments,
    _checks,
    _gradient_arguments,
    _numpy_backend,
    _reference,
    _runtime,
    _terminal,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from numpy.typing import NDArray

    Array = NDArray[Any]

# The generic level of x86-64 has no fused multiply-add, but NumPy's BLAS has. How well NumPy itself
# rounds in these few problems is also a matter of luck. A wrong result is thousands of times off.
_FACTOR = 4.0


def self_check() -> bool:
    """Compare attention and its gradients with float64 on every ISA level and dtype; print a table.

    Returns
    -------
    bool
        Whether every error is within its bound (four times plain NumPy's in the same
        precision, plus one unit in the last place).
    """
    levels = [] if _runtime.native is None else list(_runtime.native.isa_names().items())
    dtypes = {name: _dtype(name) for name in _checks.ACCEPTED_DTYPES}
    print("\nerrors, as shares of what is allowed:", flush=True)
    print(f"{'':14}" + "".join(f"{name:>10}" for name in dtypes))
    all_good = True
    for level, available in [("numpy", True), *levels]:
        cells = []
        for name, dtype in dtypes.items():
            if not available or dtype is None:
                cells.append(f"{'-':>10}")
                continue
            _terminal.progress(f"{level}, {name}")
            share = max(_shares(level, dtype))
            all_good &= share <= 1
            cells.append(f"{share:10.2f}" if share <= 1 else f"{share:>9.2g}!")
        _terminal.progress("")
        note = "" if available else "   (not on this CPU)"
        print(f"{level:14}" + "".join(cells) + note, flush=True)
    if dtypes["bfloat16"] is None:
        print("bfloat16 needs ml_dtypes, which is not installed")
    print("all is well" if all_good else "WRONG RESULTS: please report this table")
    return all_good


def _dtype(name: str) -> np.dtype[Any] | None:
    if name == "bfloat16":
        if importlib.util.find_spec("ml_dtypes") is None:
            return None
        importlib.import_module("ml_dtypes")  # registers the name
    return np.dtype(name)


def _problems(dtype: np.dtype[Any]) -> Iterator[tuple[list[Array], dict[str, Any]]]:
    rng = np.random.default_rng(1)

    def arrays(query_length: int, key_length: int, head_dim: int, value_dim: int) -> list[Array]:
        shapes = ((2, 4, query_length, head_dim), (2, 2, key_length, head_dim),
                  (2, 2, key_length, value_dim))  # fmt: skip
        return [rng.standard_normal(shape).astype(dtype) for shape in shapes]

    yield arrays(70, 200, 64, 64), {}
    yield (
        arrays(131, 131, 24, 40),
        {"is_causal": True, "kv_lengths": [131, 50], "q_lengths": [131, 60]},
    )
    yield (
        arrays(90, 200, 33, 65),
        {
            "window": (50, 3),
            "softcap": 7.0,
            "alibi_slopes": [0.1, 0.2, 0.3, 0.4],
            "sinks": [0.5, 0.0, -1.0, 2.0],
        },
    )
    yield (
        arrays(70, 150, 17, 31),
        {
            "mask": rng.random((2, 1, 70, 150)) < 0.7,
            "bias": rng.standard_normal((4, 70, 150)).astype(np.float32),
        },
    )
    yield arrays(3, 2100, 24, 24), {"is_causal": True}


def _shares(level: str, dtype: np.dtype[Any]) -> Iterator[float]:
    """Yield the errors of results and gradients over their bounds, problem by problem."""
    precision = np.float64 if dtype.itemsize == 8 else np.float32
    trusted = np.longdouble if precision is np.float64 else np.float64
    matmuls = (np.matmul, _reference.matmul_by_einsum)
    rng = np.random.default_rng(2)
    for (q, k, v), options in _problems(dtype):
        out, lse = _attention(level, q, k, v, options)
        dout = rng.standard_normal(out.shape).astype(dtype)
        given = (dout, q, k, v, out, lse)
        gradients = _gradients(level, *given, options)
        expected = _plain(*given, options, trusted)
        plain = [_plain(*given, options, precision, matmul) for matmul in matmuls]
        for actual, wanted, *of_plain in zip((out, lse, *gradients), expected, *plain, strict=True):
            if actual is not None:
                rounded = [x.astype(actual.dtype) for x in of_plain]
                error, bound = _reference.error_and_bound(actual, rounded, wanted, _FACTOR)
                yield error / bound


def _plain(
    dout: Array, q: Array, k: Array, v: Array, out: Array, lse: Array, options: dict[str, Any],
    dtype: Any, matmul: Callable[..., Any] = np.matmul,
) -> list[Any]:  # fmt: skip
    """Return out, lse and the gradients of q, k, v and the bias; sinks are too few to check."""
    results = _reference.attention(q, k, v, **options, dtype=dtype, matmul=matmul)
    gradients = _reference.attention_backward(
        dout, q, k, v, out, lse, **options, dtype=dtype, matmul=matmul
    )
    return [*results, *gradients[:4]]


_OPTIONS: dict[str, Any] = dict.fromkeys(
    ("mask", "tail_mask", "bias", "q_offset", "window", "scale", "softcap", "alibi_slopes",
     "sinks", "kv_lengths", "q_lengths", "num_threads")
) | {"is_causal": False, "layout": "bhld"}  # fmt: skip


def _attention(
    level: str, q: Array, k: Array, v: Array, options: dict[str, Any]
) -> tuple[Array, Array]:
    arguments = _arguments.check(q, k, v, **(_OPTIONS | options), out=None, return_lse=True)
    with _backend(level) as backend:
        backend.attention(arguments)
    return np.asarray(arguments.result), np.asarray(arguments.result_lse)


def _gradients(
    level: str, dout: Array, q: Array, k: Array, v: Array, out: Array, lse: Array,
    options: dict[str, Any],
) -> tuple[Array, Array, Array, Array | None]:  # fmt: skip
    problem = _gradient_arguments.check(q, k, v, "bias" in options, **(_OPTIONS | options))
    _gradient_arguments.set_results(problem, out, lse)
    arguments = _gradient_arguments.with_gradients(problem, dout)
    with _backend(level) as backend:
        backend.attention_backward(arguments)
    return _gradient_arguments.as_inputs(problem, arguments)


@contextlib.contextmanager
def _backend(level: str) -> Iterator[Any]:
    """Pin a level, or "numpy", and yield what computes then."""
    if level == "numpy":
        yield _numpy_backend
        return
    native = _runtime.native
    assert native is not None
    before = native.isa()
    native.set_isa(level)
    try:
        if native.isa() != level:
            sys.exit(f"numattn: asked for {level}, got {native.isa()}")
        yield native
    finally:
        native.set_isa(before)
