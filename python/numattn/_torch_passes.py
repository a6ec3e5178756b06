"""Both passes of attention on tensors, computed on arrays over their memory.

Results have the memory layout (batch..., length, heads, dim), whatever the layout of the call. The
next step of models, ``out.transpose(1, 2).reshape(B, L, H * D)``, then copies nothing.
"""

from __future__ import annotations

from contextlib import suppress
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from ._attention import attend, attention
from ._gradients import attention_backward
from ._torch_tensors import array_of, tensor_of

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Array = NDArray[Any]

Tensors = tuple[torch.Tensor, ...]

# The arguments of both passes after q, k, v and their own arguments, as operators declare them.
# Numbers per head or batch item are tensors. `seed` is the seed of dropout, as a signed number.
DECLARED = (
    "Tensor? mask, Tensor? tail_mask, Tensor? bias, Tensor? sinks, Tensor? alibi_slopes, "
    "Tensor? q_offset, Tensor? kv_lengths, Tensor? q_lengths, Tensor? seed, bool is_causal, "
    "SymInt? window_left, SymInt? window_right, float? scale, float? softcap, float dropout, "
    "str layout, int? num_threads"
)
GIVEN = tuple(part.split()[1] for part in DECLARED.split(", "))

# These have the same names in `attention`, whose other options are made from the rest.
_PAIRS = ("mask", "tail_mask", "bias", "sinks")
_NUMBERS = ("alibi_slopes", "q_offset", "kv_lengths", "q_lengths")
_SAME = ("is_causal", "scale", "softcap", "dropout", "num_threads")


def swapped(x: Any) -> Any:
    """View an array or a tensor with heads and rows swapped."""
    return x.swapaxes(-3, -2)


def puts_rows_first(layout: str, *inputs: Any) -> bool:
    """Return whether results are computed with heads and rows swapped, and viewed in the layout."""
    return layout == "bhld" and all(x.ndim > 2 for x in inputs)


def result_shape(q: Any, k: Any, v: Any, layout: str) -> tuple[int, ...]:
    """Return the shape of the result for arrays or tensors, in the layout."""
    if q.ndim == k.ndim == v.ndim == 2:
        return (q.shape[0], v.shape[1])
    batch = torch.broadcast_shapes(q.shape[:-3], k.shape[:-3], v.shape[:-3])
    rows = q.shape[-3:-1]
    if q.ndim == 2:
        rows = (1, q.shape[0]) if layout == "bhld" else (q.shape[0], 1)
    return (*batch, *rows, v.shape[-1])


def attend_rows_first(
    q: Array, k: Array, v: Array, mask: Any, tail_mask: Any, bias: Any, is_causal: Any,
    q_offset: Any, window: Any, scale: Any, softcap: Any, alibi_slopes: Any, sinks: Any,
    kv_lengths: Any, q_lengths: Any, layout: str, return_lse: bool, num_threads: Any,
    dropout: float, rng: int | None,
) -> Any:  # fmt: skip
    """Do what `attention` does; if a result has heads and rows, rows come first in memory."""
    if puts_rows_first(layout, q, k, v) and q.shape[-2] != 1 and q.shape[-3] != 1:
        # Errors must refer to the caller's axes: the call below raises them.
        with suppress(TypeError, ValueError):
            result = attend(
                swapped(q), swapped(k), swapped(v), mask, tail_mask, bias, is_causal, q_offset,
                window, scale, softcap, alibi_slopes, sinks, kv_lengths, q_lengths, "blhd",
                return_lse, None, num_threads, None, None, dropout, rng,
            )  # fmt: skip
            if return_lse:
                return swapped(result[0]), result[1].swapaxes(-2, -1)
            return swapped(result)
    return attend(
        q, k, v, mask, tail_mask, bias, is_causal, q_offset, window, scale, softcap, alibi_slopes,
        sinks, kv_lengths, q_lengths, layout, return_lse, None, num_threads, None, None, dropout,
        rng,
    )  # fmt: skip


def forward(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *given: Any, keeps: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the result, the copy of it that the backward pass reads, and the log-sum-exp.

    If `keeps`, the copy for 16-bit tensors is the result in float32, before rounding. Otherwise the
    backward pass reads the result itself, and the copy is empty.
    """
    q_, k_, v_ = array_of(q), array_of(k), array_of(v)
    options = _options(given)
    layout = given[GIVEN.index("layout")]
    if keeps and q.element_size() == 2:
        is_swapped = puts_rows_first(layout, q_, k_, v_)
        if is_swapped:
            q_, k_, v_, layout = swapped(q_), swapped(k_), swapped(v_), "blhd"
        kept = np.empty(result_shape(q_, k_, v_, layout), np.float32)
        _, lse = attention(q_, k_, v_, **options, layout=layout, return_lse=True, out=kept)
        if is_swapped:
            kept, lse = swapped(kept), lse.swapaxes(-2, -1)
        of_float32 = tensor_of(kept)
        return of_float32.to(q.dtype), of_float32, tensor_of(lse)
    out, lse = attend_rows_first(q_, k_, v_, layout=layout, return_lse=True, **options)
    nothing = tensor_of(np.empty(0, lse.dtype))
    return tensor_of(out), nothing, tensor_of(lse)


def backward(
    dout: torch.Tensor, dlse: torch.Tensor | None, q: torch.Tensor, k: torch.Tensor,
    v: torch.Tensor, kept: torch.Tensor, lse: torch.Tensor, *given: Any, bias_gradient: bool,
) -> Tensors:  # fmt: skip
    """Return the gradients of q, k, v, the bias and the sinks; missing ones are empty tensors."""
    options = _options(given)
    layout = given[GIVEN.index("layout")]
    arrays = [array_of(x) for x in (dout, q, k, v, kept)]
    lse_, dlse_ = array_of(lse), None if dlse is None else array_of(dlse)
    is_swapped = puts_rows_first(layout, *arrays)
    if is_swapped:
        arrays, layout = [swapped(x) for x in arrays], "blhd"
        lse_ = lse_.swapaxes(-2, -1)
        dlse_ = None if dlse_ is None else dlse_.swapaxes(-2, -1)
    dout_, q_, k_, v_, kept_ = arrays
    gradients = attention_backward(
        dout_, q_, k_, v_, kept_, lse_, dlse=dlse_, bias_gradient=bias_gradient, layout=layout,
        **options,
    )  # fmt: skip

    def tensor(x: Array | None, rows_first: bool = False) -> torch.Tensor:
        if x is None:
            return q.new_empty(0)
        x = np.ascontiguousarray(x)
        return tensor_of(swapped(x) if rows_first else x)

    of_inputs = (tensor(x, is_swapped) for x in gradients[:3])
    return *of_inputs, tensor(gradients.bias), tensor(gradients.sinks)


def _options(values: tuple[Any, ...]) -> dict[str, Any]:
    """Return the options of `attention`, except the layout."""
    given = dict(zip(GIVEN, values, strict=True))
    seed = given["seed"]
    tensors = {name: given[name] for name in (*_PAIRS, *_NUMBERS)}
    return {
        **{name: array_of(x) if isinstance(x, torch.Tensor) else x for name, x in tensors.items()},
        **{name: given[name] for name in _SAME},
        "window": (given["window_left"], given["window_right"]),
        "rng": None if seed is None else int(seed) % 2**64,
    }
