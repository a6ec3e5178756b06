"""Attention with gradients in eager mode and under `torch.func`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NoReturn

import torch

from . import _torch_passes
from ._torch_passes import GIVEN, Tensors
from ._torch_vmap import attention_in_batches, backward_in_batches

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from ._torch_vmap import Mapped


def keep(ctx: Any, inputs: tuple[Any, ...], output: Tensors) -> None:
    """Keep the arguments of `_torch_passes.forward` that the backward pass needs."""
    out, kept, lse = output
    q, k, v, *values, ctx.keeps = inputs
    given = dict(zip(GIVEN, values, strict=True))
    ctx.tensors = tuple(name for name, x in given.items() if isinstance(x, torch.Tensor))
    ctx.others = {name: x for name, x in given.items() if name not in ctx.tensors}
    kept = out if q.element_size() > 2 else kept
    ctx.save_for_backward(q, k, v, kept, lse, *(given[name] for name in ctx.tensors))
    ctx.set_materialize_grads(False)


def differentiate(
    backward: Callable[..., Tensors], ctx: Any, dout: torch.Tensor | None, dlse: torch.Tensor | None
) -> tuple[torch.Tensor | None, ...]:
    """Return a gradient for each argument of `_torch_passes.forward`, in its order."""
    if not ctx.keeps:
        raise RuntimeError(
            "numattn::attention: got a backward pass through a call with keeps=False, as recorded "
            "under torch.no_grad(), expected keeps=True; record the program outside torch.no_grad()"
        )
    q, k, v, kept, lse, *tensors = ctx.saved_tensors
    given = {**ctx.others, **dict(zip(ctx.tensors, tensors, strict=True))}
    needs = dict(zip(GIVEN, ctx.needs_input_grad[3:], strict=False))
    if dout is None:
        dout = torch.zeros_like(kept)
    values = (given[name] for name in GIVEN)
    *of_inputs, dbias, dsinks = backward(dout, dlse, q, k, v, kept, lse, *values, needs["bias"])
    gradients: dict[str, torch.Tensor | None] = dict.fromkeys(GIVEN)
    if needs["bias"]:
        gradients["bias"] = dbias
    if needs["sinks"]:
        gradients["sinks"] = dsinks
    return *of_inputs, *gradients.values(), None


def refuse_second_derivatives(*_: Any) -> NoReturn:
    raise RuntimeError(
        "numattn.torch: got a derivative of gradients, expected first derivatives only; for second "
        "derivatives use PyTorch's function in torch.nn.attention.sdpa_kernel(SDPBackend.MATH)"
    )


class Attention(torch.autograd.Function):  # type: ignore[misc]
    """`_torch_passes.forward` with gradients."""

    @staticmethod
    def forward(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *given: Any) -> Tensors:
        *values, keeps = given
        return _torch_passes.forward(q, k, v, *values, keeps=keeps)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensors) -> None:
        keep(ctx, inputs, output)
        ctx.mark_non_differentiable(output[1])

    @staticmethod
    def backward(
        ctx: Any, dout: torch.Tensor | None, _: None, dlse: torch.Tensor | None
    ) -> tuple[torch.Tensor | None, ...]:
        return differentiate(AttentionBackward.apply, ctx, dout, dlse)

    @staticmethod
    def vmap(info: Any, in_dims: Sequence[int | None], *args: Any) -> Mapped:
        return attention_in_batches(Attention.apply, info, in_dims, *args)


class AttentionBackward(torch.autograd.Function):  # type: ignore[misc]
    """`_torch_passes.backward`, without gradients of its own."""

    @staticmethod
    def forward(*arguments: Any) -> Tensors:
        *values, bias_gradient = arguments
        return _torch_passes.backward(*values, bias_gradient=bias_gradient)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensors) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor | None) -> NoReturn:
        refuse_second_derivatives()

    @staticmethod
    def vmap(info: Any, in_dims: Sequence[int | None], *args: Any) -> Mapped:
        return backward_in_batches(AttentionBackward.apply, info, in_dims, *args)
