"""`torch.func.vmap` of both passes: the mapped axis becomes the first batch axis.

Numbers per head, such as sinks, have no batch axes. If they are mapped, items are computed one by
one.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from ._torch_passes import GIVEN, Tensors

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

Mapped = tuple[Tensors, tuple[int | None, ...]]


class _Call(NamedTuple):
    """The arguments of one of the two passes by name, and the mapped axis of each."""

    items: int
    arguments: dict[str, Any]
    axes: dict[str, int | None]


def _one_by_one(run: Callable[..., Tensors], call: _Call) -> Mapped:
    def item(name: str, i: int) -> Any:
        x, axis = call.arguments[name], call.axes[name]
        return x if axis is None else x.select(axis, i)

    results = [run(*(item(name, i) for name in call.arguments)) for i in range(call.items)]
    stacked = tuple(torch.stack(parts) for parts in zip(*results, strict=True))
    return stacked, (0,) * len(stacked)


class _Batches:
    """The arguments of a call with the mapped axis in front."""

    def __init__(self, call: _Call) -> None:
        self.call = call
        given = call.arguments
        ndims = [self.ndim(name) for name in ("q", "k", "v")]
        # A single head without an axis gets one. Otherwise the mapped axis would be taken for it.
        self.one_head = max(ndims) == 2
        self.head_axis = -2 if given["layout"] == "blhd" else -3
        self.batch_axes = max(*ndims, 3) - 3

    def ndim(self, name: str) -> int:
        ndim: int = self.call.arguments[name].ndim
        return ndim - (self.call.axes[name] is not None)

    def in_front(self, name: str, ndim: int, *, expands: bool) -> torch.Tensor | None:
        """Return an argument with the mapped axis first and at least `ndim` axes after it.

        If the argument is not mapped, it is repeated along the first axis if `expands`, and
        broadcasts otherwise.
        """
        x, axis = self.call.arguments[name], self.call.axes[name]
        if x is None:
            return None
        if axis is None:
            x = x.expand(self.call.items if expands else 1, *x.shape)
        else:
            x = x.movedim(axis, 0)
        return x.reshape(x.shape[0], *(1,) * (ndim - x.ndim + 1), *x.shape[1:])

    def heads(self, name: str, columns: int = 1) -> torch.Tensor | None:
        """Return q, k, v, a result (or, without columns, lse) or a gradient of one of them."""
        x = self.in_front(name, 0, expands=True)
        if x is None:
            return None
        # Arrays without an axis of heads have one head.
        if x.ndim == 2 + columns:
            x = x.unsqueeze(self.head_axis + 1 - columns)
        missing = self.batch_axes + 3 + columns - x.ndim
        return x.reshape(x.shape[0], *(1,) * missing, *x.shape[1:])

    def options(self, *, expands_bias: bool = False) -> dict[str, Any]:
        pairs = self.batch_axes + 3
        items = self.batch_axes
        front = {name: self.in_front(name, pairs, expands=False) for name in ("mask", "tail_mask")}
        front["bias"] = self.in_front("bias", pairs, expands=expands_bias)
        for name in ("q_offset", "kv_lengths", "q_lengths"):
            front[name] = self.in_front(name, items, expands=False)
        return front

    def without_head(self, x: torch.Tensor, columns: int = 1) -> torch.Tensor:
        return x.squeeze(self.head_axis + 1 - columns) if self.one_head else x


def _has_mapped_numbers(call: _Call) -> bool:
    return any(call.axes[name] is not None for name in ("sinks", "alibi_slopes", "seed"))


def attention_in_batches(
    run: Callable[..., Tensors], info: Any, in_dims: Sequence[int | None], *args: Any
) -> Mapped:
    """Call `run`, with the arguments of `_torch_passes.forward`, for all items at once."""
    names = ("q", "k", "v", *GIVEN, "keeps")
    call = _call(names, info, in_dims, args)
    if _has_mapped_numbers(call):
        return _one_by_one(run, call)
    batches = _Batches(call)
    arrays = {name: batches.heads(name) for name in ("q", "k", "v")}
    out, kept, lse = run(*{**call.arguments, **arrays, **batches.options()}.values())
    is_kept = kept.ndim > 1
    if is_kept:
        kept = batches.without_head(kept)
    results = (batches.without_head(out), kept, batches.without_head(lse, 0))
    return results, (0, 0 if is_kept else None, 0)


def backward_in_batches(
    run: Callable[..., Tensors], info: Any, in_dims: Sequence[int | None], *args: Any
) -> Mapped:
    """Call `run`, with the arguments of `_torch_passes.backward`, for all items at once."""
    names = ("dout", "dlse", "q", "k", "v", "kept", "lse", *GIVEN, "bias_gradient")
    call = _call(names, info, in_dims, args)
    given = call.arguments
    # The gradient of sinks is a sum over all batch items.
    if _has_mapped_numbers(call) or given["sinks"] is not None:
        return _one_by_one(run, call)
    batches = _Batches(call)
    arrays = {name: batches.heads(name) for name in ("dout", "q", "k", "v", "kept")}
    rows = {name: batches.heads(name, 0) for name in ("dlse", "lse")}
    options = batches.options(expands_bias=given["bias_gradient"])
    *gradients, no_sinks = run(*{**given, **arrays, **rows, **options}.values())

    def as_given(name: str, x: torch.Tensor) -> torch.Tensor:
        shape, axis = list(given[name].shape), call.axes[name]
        if axis is not None:
            del shape[axis]
        return x.reshape(call.items, *shape)

    of = ("q", "k", "v", "bias")[: 4 if given["bias_gradient"] else 3]
    mapped = [as_given(name, x) for name, x in zip(of, gradients, strict=False)]
    others = (*gradients[len(of) :], no_sinks)
    return (*mapped, *others), (*(0 for _ in mapped), *(None for _ in others))


def _call(
    names: Sequence[str], info: Any, in_dims: Sequence[int | None], args: Sequence[Any]
) -> _Call:
    arguments, axes = (dict(zip(names, x, strict=True)) for x in (args, in_dims))
    return _Call(info.batch_size, arguments, axes)
