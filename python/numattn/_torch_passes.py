"""Both passes of attention on tensors: numattn on arrays over their memory.

Results lie in memory as (batch..., length, heads, dim), whatever the layout: what models do next,
``out.transpose(1, 2).reshape(B, L, H * D)``, then copies nothing.
"""

from __future__ import annotations

from contextlib import suppress
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch.autograd.function import once_differentiable

from ._attention import attend, attention
from ._gradients import attention_backward
from ._torch_tensors import array_of, tensor_of

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Array = NDArray[Any]

OPTIONS = (
    "is_causal", "q_offset", "window", "scale", "softcap", "alibi_slopes", "kv_lengths",
    "q_lengths", "dropout", "rng", "layout", "num_threads",
)  # fmt: skip


def swapped(x: Any) -> Any:
    """View an array or a tensor with heads and rows exchanged, if it has both."""
    return x if x.ndim == 2 else x.swapaxes(-3, -2)


def result_shape(q: Any, k: Any, v: Any, layout: str) -> tuple[int, ...]:
    """Return the shape of the result for arrays or tensors, in the layout."""
    if q.ndim == k.ndim == v.ndim == 2:
        return (q.shape[0], v.shape[1])
    batch = torch.broadcast_shapes(q.shape[:-3], k.shape[:-3], v.shape[:-3])
    rows = (1, q.shape[0]) if q.ndim == 2 else q.shape[-3:-1]
    if q.ndim == 2 and layout == "blhd":
        rows = rows[::-1]
    return (*batch, *rows, v.shape[-1])


def puts_rows_first(layout: str, *inputs: Any) -> bool:
    """Whether results are computed with heads and rows exchanged, and viewed in the layout."""
    return layout == "bhld" and all(x.ndim > 2 for x in inputs)


def attend_rows_first(
    q: Array, k: Array, v: Array, mask: Any, tail_mask: Any, bias: Any, is_causal: Any,
    q_offset: Any, window: Any, scale: Any, softcap: Any, alibi_slopes: Any, sinks: Any,
    kv_lengths: Any, q_lengths: Any, layout: str, return_lse: bool, num_threads: Any,
    dropout: float, rng: int | None,
) -> Any:  # fmt: skip
    """Do what `attention` does; where a result has heads and rows, rows come first in memory."""
    if puts_rows_first(layout, q, k, v) and q.shape[-2] != 1 and q.shape[-3] != 1:
        # An error is about the caller's axes: it comes from the call below.
        with suppress(TypeError, ValueError):
            result = attend(
                swapped(q), swapped(k), swapped(v), mask, tail_mask, bias, is_causal, q_offset,
                window, scale, softcap, alibi_slopes, sinks, kv_lengths, q_lengths, "blhd",
                return_lse, None, num_threads, None, None, dropout, rng,
            )  # fmt: skip
            if return_lse:
                return result[0].swapaxes(-3, -2), result[1].swapaxes(-2, -1)
            return result.swapaxes(-3, -2)
    return attend(
        q, k, v, mask, tail_mask, bias, is_causal, q_offset, window, scale, softcap, alibi_slopes,
        sinks, kv_lengths, q_lengths, layout, return_lse, None, num_threads, None, None, dropout,
        rng,
    )  # fmt: skip


def _rows_first(layout: str, *arrays: Array) -> tuple[str, tuple[Array, ...]]:
    """Return the layout and the arrays that numattn is called with."""
    if puts_rows_first(layout, *arrays):
        return "blhd", tuple(map(swapped, arrays))
    return layout, arrays


def _arrays(*tensors: torch.Tensor | None) -> list[Array | None]:
    return [None if x is None else array_of(x) for x in tensors]


def forward(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None,
    tail_mask: torch.Tensor | None, bias: torch.Tensor | None, sinks: torch.Tensor | None,
    options: dict[str, Any],
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    """Return the result, the same as the backward pass wants it, and the log-sum-exp.

    Of 16-bit tensors that is the result in float32, before it is rounded; else it is the result.
    """
    arrays = [array_of(x) for x in (q, k, v)]
    mask_, tail_mask_, bias_, sinks_ = _arrays(mask, tail_mask, bias, sinks)
    if q.element_size() > 2:
        out_, lse_ = attend_rows_first(
            *arrays, mask_, tail_mask_, bias_, *(options[name] for name in OPTIONS[:6]), sinks_,
            options["kv_lengths"], options["q_lengths"], options["layout"], True,
            options["num_threads"], options["dropout"], options["rng"],
        )  # fmt: skip
        out = tensor_of(out_)
        return out, out, tensor_of(lse_)
    given = {"mask": mask_, "tail_mask": tail_mask_, "bias": bias_, "sinks": sinks_}
    layout, rows_first = _rows_first(options["layout"], *arrays)
    kept = np.empty(result_shape(*rows_first, layout), np.float32)
    _, lse_ = attention(
        *rows_first, **given, **(options | {"layout": layout}), return_lse=True, out=kept
    )
    if layout != options["layout"]:
        kept, lse_ = swapped(kept), lse_.swapaxes(-2, -1)
    of_float32 = tensor_of(kept)
    return of_float32.to(q.dtype), of_float32, tensor_of(lse_)


def backward(
    dout: torch.Tensor, dlse: torch.Tensor | None, q: torch.Tensor, k: torch.Tensor,
    v: torch.Tensor, kept: torch.Tensor, lse: torch.Tensor, mask: torch.Tensor | None,
    tail_mask: torch.Tensor | None, bias: torch.Tensor | None, sinks: torch.Tensor | None,
    bias_gradient: bool, options: dict[str, Any],
) -> tuple[
    torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None, torch.Tensor | None
]:  # fmt: skip
    """Return the gradients of q, k, v, the bias and the sinks."""
    layout, (dout_, q_, k_, v_, kept_) = _rows_first(
        options["layout"], *(array_of(x) for x in (dout, q, k, v, kept))
    )
    lse_, dlse_ = array_of(lse), None if dlse is None else array_of(dlse)
    is_swapped = layout != options["layout"]
    if is_swapped:
        lse_ = lse_.swapaxes(-2, -1)
        dlse_ = None if dlse_ is None else dlse_.swapaxes(-2, -1)
    mask_, tail_mask_, bias_, sinks_ = _arrays(mask, tail_mask, bias, sinks)
    gradients = attention_backward(
        dout_, q_, k_, v_, kept_, lse_, dlse=dlse_, bias_gradient=bias_gradient, mask=mask_,
        tail_mask=tail_mask_, bias=bias_, sinks=sinks_, **(options | {"layout": layout}),
    )  # fmt: skip

    def tensor(x: Array | None, is_rows_first: bool = False) -> torch.Tensor | None:
        if x is None:
            return None
        x = np.ascontiguousarray(x)
        return tensor_of(swapped(x) if is_rows_first else x)

    return (
        *(tensor(x, is_swapped) for x in gradients[:3]),
        tensor(gradients.bias),
        tensor(gradients.sinks),
    )


class Attention(torch.autograd.Function):  # type: ignore[misc]
    """Attention with gradients, where operators run one by one."""

    @staticmethod
    def forward(
        ctx: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, bias: torch.Tensor | None,
        sinks: torch.Tensor | None, mask: torch.Tensor | None, tail_mask: torch.Tensor | None,
        options: dict[str, Any],
    ) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
        out, kept, lse = forward(q, k, v, mask, tail_mask, bias, sinks, options)
        ctx.save_for_backward(q, k, v, kept, lse, mask, tail_mask, bias, sinks)
        ctx.options = options
        ctx.set_materialize_grads(False)
        return out, lse

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, dout: torch.Tensor | None, dlse: torch.Tensor | None
    ) -> tuple[torch.Tensor | None, ...]:
        q, k, v, kept, lse, *others = ctx.saved_tensors
        if dout is None:
            dout = torch.zeros_like(kept)
        dq, dk, dv, dbias, dsinks = backward(
            dout, dlse, q, k, v, kept, lse, *others, ctx.needs_input_grad[3], ctx.options
        )
        return dq, dk, dv, dbias, dsinks, None, None, None
