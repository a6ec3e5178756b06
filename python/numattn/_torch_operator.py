"""Attention and its backward pass as custom operators of PyTorch.

`torch.compile` and `torch.export` record these operators.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch

from . import _torch_passes
from ._torch_function import differentiate, keep, refuse_second_derivatives
from ._torch_passes import DECLARED, GIVEN, Tensors, puts_rows_first, result_shape, swapped
from ._torch_vmap import attention_in_batches, backward_in_batches


@torch.library.custom_op(  # type: ignore[untyped-decorator]
    "numattn::attention",
    mutates_args=(),
    device_types="cpu",
    schema=f"(Tensor q, Tensor k, Tensor v, {DECLARED}, bool keeps) -> (Tensor, Tensor, Tensor)",
)
def _attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *given: Any) -> Tensors:
    *values, keeps = given
    return _torch_passes.forward(q, k, v, *values, keeps=keeps)


@_attention.register_fake  # type: ignore[untyped-decorator]
def _(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *given: Any) -> Tensors:
    *values, keeps = given
    layout = dict(zip(GIVEN, values, strict=True))["layout"]
    shape = result_shape(q, k, v, layout)
    precision = torch.float64 if q.dtype == torch.float64 else torch.float32
    keeps = keeps and q.element_size() == 2
    nothing = q.new_empty(0, dtype=precision)
    if not puts_rows_first(layout, q, k, v):
        kept = q.new_empty(shape, dtype=precision) if keeps else nothing
        return q.new_empty(shape), kept, q.new_empty(shape[:-1], dtype=precision)
    rows_first = (*shape[:-3], shape[-2], shape[-3], shape[-1])
    kept = swapped(q.new_empty(rows_first, dtype=precision)) if keeps else nothing
    lse = q.new_empty(rows_first[:-1], dtype=precision).swapaxes(-2, -1)
    return swapped(q.new_empty(rows_first)), kept, lse


@torch.library.custom_op(  # type: ignore[untyped-decorator]
    "numattn::attention_backward",
    mutates_args=(),
    device_types="cpu",
    schema="(Tensor dout, Tensor? dlse, Tensor q, Tensor k, Tensor v, Tensor kept, Tensor lse, "
    f"{DECLARED}, bool bias_gradient) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
)
def _attention_backward(dout: torch.Tensor, *others: Any) -> Tensors:
    *values, bias_gradient = others
    return _torch_passes.backward(dout, *values, bias_gradient=bias_gradient)


@_attention_backward.register_fake  # type: ignore[untyped-decorator]
def _(
    dout: torch.Tensor, dlse: torch.Tensor | None, q: torch.Tensor, k: torch.Tensor,
    v: torch.Tensor, kept: torch.Tensor, lse: torch.Tensor, *others: Any,
) -> Tensors:  # fmt: skip
    *values, bias_gradient = others
    given = dict(zip(GIVEN, values, strict=True))

    def like(x: torch.Tensor | None) -> torch.Tensor:
        return q.new_empty(0) if x is None else x.new_empty(x.shape)

    def like_input(x: torch.Tensor) -> torch.Tensor:
        if not puts_rows_first(given["layout"], q, k, v):
            return like(x)
        return swapped(x.new_empty(swapped(x).shape))

    dbias = like(given["bias"] if bias_gradient else None)
    return *map(like_input, (q, k, v)), dbias, like(given["sinks"])


attention: Any = torch.ops.numattn.attention.default
_backward: Any = torch.ops.numattn.attention_backward.default


def _differentiate(
    ctx: Any, dout: torch.Tensor | None, _: torch.Tensor | None, dlse: torch.Tensor | None
) -> tuple[torch.Tensor | None, ...]:
    return differentiate(_backward, ctx, dout, dlse)


_attention.register_autograd(_differentiate, setup_context=keep)
_attention_backward.register_autograd(refuse_second_derivatives)
_attention.register_vmap(partial(attention_in_batches, attention))
_attention_backward.register_vmap(partial(backward_in_batches, _backward))
