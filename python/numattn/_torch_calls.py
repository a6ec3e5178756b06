"""Calls of attention on tensors, with as little overhead as possible."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch._subclasses.fake_tensor import FakeTensor

from . import _runtime, _torch_operator
from ._block_mask_store import BlockMaskStore
from ._checks import integer, refuse, refuse_kind, value_and_kind
from ._torch_function import Attention
from ._torch_passes import GIVEN, attend_rows_first
from ._torch_tensors import (
    BFLOAT16,
    EAGER_TYPES,
    array_of,
    is_recorded,
    is_transformed,
    needs_gradient,
    tensor_of,
    unfit,
)

_INT16 = np.dtype(np.int16)

# Arguments that may be arrays in `numattn.attention`.
_TENSOR_LIKE = (
    "mask", "tail_mask", "bias", "q_offset", "alibi_slopes", "sinks", "kv_lengths", "q_lengths",
)  # fmt: skip

Options = dict[str, Any]
DEFAULTS: Options = {
    "mask": None, "tail_mask": None, "bias": None, "is_causal": False, "q_offset": None,
    "window": None, "scale": None, "softcap": None, "alibi_slopes": None, "sinks": None,
    "kv_lengths": None, "q_lengths": None, "dropout": 0.0, "rng": None, "layout": "bhld",
    "num_threads": None,
}  # fmt: skip


def usual_call(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: Any, tail_mask: Any, bias: Any,
    is_causal: Any, q_offset: Any, window: Any, scale: Any, softcap: Any, alibi_slopes: Any,
    sinks: Any, kv_lengths: Any, q_lengths: Any, layout: str, return_lse: Any, num_threads: Any,
    shares_heads: bool,
) -> Any:  # fmt: skip
    """Compute a call that `attention_common` takes, with little overhead; return None for others.

    `shares_heads`: whether several query heads may share one of several heads of k and v.
    """
    common = _runtime.attention_common
    if common is None:
        return None
    q_: Any
    is_bfloat16 = q.dtype is torch.bfloat16
    try:
        if is_bfloat16:
            # A view as int16 drops gradients, but `numpy` would refuse them.
            if q.requires_grad or k.requires_grad or v.requires_grad:
                return None
            int16 = torch.int16
            q_ = q.view(int16).numpy().view(BFLOAT16)
            k_ = k.view(int16).numpy().view(BFLOAT16)
            v_ = v.view(int16).numpy().view(BFLOAT16)
        else:
            q_, k_, v_ = q.numpy(), k.numpy(), v.numpy()
        if mask is not None:
            mask = _usual(mask)
        if tail_mask is not None:
            tail_mask = _usual(tail_mask)
        if bias is not None:
            bias = _usual(bias)
        if sinks is not None:
            sinks = _usual_numbers(sinks)
        if alibi_slopes is not None:
            alibi_slopes = _usual_numbers(alibi_slopes)
        if q_offset is not None:
            q_offset = _usual(q_offset)
        if kv_lengths is not None:
            kv_lengths = _usual(kv_lengths)
        if q_lengths is not None:
            q_lengths = _usual(q_lengths)
    except (RuntimeError, TypeError):  # the usual path explains the error
        return None
    rows_first = False
    q_shape, k_shape = q_.shape, k_.shape
    if layout == "bhld" and len(q_shape) > 2 and len(k_shape) > 2:
        heads = q_shape[-3]
        if not shares_heads and k_shape[-3] not in (heads, 1):
            return None
        rows_first = heads > 1 and q_shape[-2] > 1 and v_.ndim > 2
        if rows_first:
            layout = "blhd"
            q_, k_, v_ = q_.swapaxes(-3, -2), k_.swapaxes(-3, -2), v_.swapaxes(-3, -2)
    result = common(
        q_, k_, v_, mask, tail_mask, bias, is_causal, q_offset, window, scale, softcap,
        alibi_slopes, sinks, kv_lengths, q_lengths, layout, return_lse, None, num_threads, None,
        None, 0.0, None,
    )  # fmt: skip
    if result is None:
        return None
    out = result[0] if return_lse else result
    if rows_first:
        out = out.swapaxes(-3, -2)
    if is_bfloat16:
        out = torch.from_numpy(out.view(_INT16)).view(torch.bfloat16)
    else:
        out = torch.from_numpy(out)
    if not return_lse:
        return out
    return out, torch.from_numpy(result[1].swapaxes(-2, -1) if rows_first else result[1])


def _usual(x: Any) -> Any:
    """Return an array for a plain tensor that needs no gradient; return anything else unchanged."""
    if not isinstance(x, torch.Tensor):
        return x
    x = _without_gradient(x)
    if x.dtype is torch.bfloat16:
        return x.view(torch.int16).numpy().view(BFLOAT16)
    return x.numpy()


def _usual_numbers(x: Any) -> Any:
    """Return numbers per head in a form that `attention_common` takes: not in 16 bits."""
    if not isinstance(x, torch.Tensor):
        return x
    x = _without_gradient(x)
    return (x.float() if x.element_size() == 2 else x).numpy()


def _without_gradient(x: torch.Tensor) -> torch.Tensor:
    if type(x) not in EAGER_TYPES or (x.requires_grad and torch.is_grad_enabled()):
        raise TypeError
    return x.detach() if x.requires_grad else x


def call(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, options: Options, returns_lse: bool = False
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Return the result and, if wanted, the log-sum-exp."""
    is_eager = type(q) in EAGER_TYPES and not is_recorded()
    dropout = options["dropout"]
    if isinstance(dropout, (int, float)) and dropout > 0 and options["rng"] is None:
        seed = torch.randint(2**63 - 1, (), device="cpu")
        options = {**options, "rng": int(seed) if is_eager else seed}
    if isinstance(options["mask"], BlockMaskStore) and not is_eager:
        seen = "a BlockMask in a recorded program"
        refuse_kind("mask", seen, "a tensor", "pass `torch.from_numpy(mask.to_dense())`")
    for name, x in options.items():
        if isinstance(x, torch.Tensor):
            check_fits(name, x)
            if name not in ("bias", "sinks") and needs_gradient(x):
                seen = "a tensor that requires a gradient"
                advice = f"pass `{name}.detach()`"
                refuse_kind(name, seen, "a tensor without gradient", advice)
    if not is_eager or needs_gradient(q, k, v, options["bias"], options["sinks"]):
        run = Attention.apply if is_eager or is_transformed() else _torch_operator.attention
        out, _, lse = run(q, k, v, *_as_given(options, q), torch.is_grad_enabled())
        return out, lse
    arrays = {name: _as_array(x) for name, x in options.items()}
    result = attend_rows_first(
        array_of(q), array_of(k), array_of(v), **arrays, return_lse=returns_lse
    )
    if returns_lse:
        return tensor_of(result[0]), tensor_of(result[1])
    return tensor_of(result), None


def check_fits(name: str, x: object) -> None:
    seen = unfit(x)
    if seen is not None:
        refuse_kind(name, seen, "a plain torch.Tensor on the CPU")


def _as_array(x: Any) -> Any:
    """Return an array for a tensor; return anything else unchanged."""
    return array_of(x) if isinstance(x, torch.Tensor) else x


def _as_given(options: Options, q: torch.Tensor) -> list[Any]:
    """Return the options in the order of `GIVEN`, with the types that the operators take."""
    window = options["window"]
    if window is None:
        window = (None, None)
    elif not isinstance(window, (tuple, list)):
        sides = "(left, right), the keys before and after the query, with None for no limit"
        refuse_kind("window", value_and_kind(window), sides)
    elif len(window) != 2:
        refuse("window", repr(window), "two sides, (left, right)")
    given = {
        **options,
        **{name: _as_tensor(options[name], q) for name in _TENSOR_LIKE},
        "seed": _seed(options["rng"], q),
        "window_left": window[0],
        "window_right": window[1],
    }
    return [given[name] for name in GIVEN]


def _as_tensor(x: Any, q: torch.Tensor) -> torch.Tensor | BlockMaskStore | None:
    if x is None or isinstance(x, (torch.Tensor, BlockMaskStore)):
        return x
    if isinstance(x, (int, torch.SymInt)):
        return _int_tensor(x, q)
    if isinstance(x, (list, tuple)) and torch.compiler.is_compiling():
        # Python floats are float64 in numattn.
        is_float = any(isinstance(number, float) for number in x)
        return torch.tensor(x, dtype=torch.float64 if is_float else None, device="cpu")
    array = np.asarray(x)
    return tensor_of(array if array.flags.writeable else array.copy())


def _seed(rng: Any, q: torch.Tensor) -> torch.Tensor | None:
    """Return a seed as a tensor of int64, which wraps large seeds."""
    if rng is None or isinstance(rng, torch.Tensor):
        return rng
    seed = integer("rng", rng)
    if not 0 <= seed < 2**64:
        refuse("rng", str(seed), f"a seed from 0 to {2**64 - 1}")
    return _int_tensor(seed - 2**64 if seed >= 2**63 else seed, q)


def _int_tensor(x: Any, q: torch.Tensor) -> torch.Tensor:
    """Return an int as a tensor, which is fake if q is, even after the fake mode has ended."""
    if isinstance(q, FakeTensor):
        return q.new_full((), x, dtype=torch.int64)
    return torch.scalar_tensor(x, dtype=torch.int64, device="cpu")
