"""Attention and its backward pass as operators of PyTorch, for programs that are recorded or
transformed: `torch.compile`, `torch.export`, `torch.func`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from . import _torch_passes
from ._torch_passes import puts_rows_first, result_shape, swapped
from ._torch_tensors import array_of
from ._torch_vmap import attention_in_batches, backward_in_batches

if TYPE_CHECKING:
    from collections.abc import Callable

# What both operators take after their own arguments. `q_offset` and lengths are tensors of ints;
# `seed` is dropout's, as a signed number.
_PAIRS_AND_OPTIONS = (
    "Tensor? mask, Tensor? tail_mask, Tensor? bias, Tensor? sinks, Tensor? alibi_slopes, "
    "Tensor? q_offset, Tensor? kv_lengths, Tensor? q_lengths, Tensor? seed, bool is_causal, "
    "SymInt? window_left, SymInt? window_right, float? scale, float? softcap, float dropout, "
    "str layout, int? num_threads"
)
_GIVEN = tuple(part.split()[1] for part in _PAIRS_AND_OPTIONS.split(", "))

Tensors = tuple[torch.Tensor, ...]


def _options(given: dict[str, Any]) -> dict[str, Any]:
    """Return the options of `attention` for what the operators take."""
    numbers = ("alibi_slopes", "q_offset", "kv_lengths", "q_lengths")
    arrays = {name: None if given[name] is None else array_of(given[name]) for name in numbers}
    seed = given["seed"]
    same = ("is_causal", "scale", "softcap", "dropout", "layout", "num_threads")
    return {
        **arrays,
        **{name: given[name] for name in same},
        "window": (given["window_left"], given["window_right"]),
        "rng": None if seed is None else int(seed) % 2**64,
    }


def _pairs(given: dict[str, Any]) -> Tensors:
    return tuple(given[name] for name in ("mask", "tail_mask", "bias", "sinks"))


@torch.library.custom_op(
    "numattn::attention",
    mutates_args=(),
    device_types="cpu",
    schema=f"(Tensor q, Tensor k, Tensor v, {_PAIRS_AND_OPTIONS}, bool keeps) "
    "-> (Tensor, Tensor, Tensor)",
)
def _attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *others: Any) -> Tensors:
    """Return the result, the same in float32 where a backward pass needs it, and the lse."""
    given = dict(zip((*_GIVEN, "keeps"), others, strict=True))
    out, kept, lse = _torch_passes.forward(q, k, v, *_pairs(given), _options(given))
    if kept is out or not given["keeps"]:
        kept = lse.new_empty(0)
    return out, kept, lse


@_attention.register_fake
def _(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *others: Any) -> Tensors:
    given = dict(zip((*_GIVEN, "keeps"), others, strict=True))
    layout = given["layout"]
    shape = result_shape(q, k, v, layout)
    of_float32 = torch.float64 if q.dtype == torch.float64 else torch.float32

    def like(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        return q.new_empty(shape, dtype=dtype)

    kept_shape = shape if given["keeps"] and q.element_size() == 2 else (0,)
    if not puts_rows_first(layout, q, k, v):
        return like(shape, q.dtype), like(kept_shape, of_float32), like(shape[:-1], of_float32)
    rows_first = (*shape[:-3], shape[-2], shape[-3], shape[-1])
    kept = like((0,) if kept_shape == (0,) else rows_first, of_float32)
    return (
        swapped(like(rows_first, q.dtype)),
        kept if kept_shape == (0,) else swapped(kept),
        like(rows_first[:-1], of_float32).swapaxes(-2, -1),
    )


@torch.library.custom_op(
    "numattn::attention_backward",
    mutates_args=(),
    device_types="cpu",
    schema="(Tensor dout, Tensor? dlse, Tensor q, Tensor k, Tensor v, Tensor kept, Tensor lse, "
    f"{_PAIRS_AND_OPTIONS}, bool bias_gradient) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
)
def _attention_backward(
    dout: torch.Tensor, dlse: torch.Tensor | None, q: torch.Tensor, k: torch.Tensor,
    v: torch.Tensor, kept: torch.Tensor, lse: torch.Tensor, *others: Any,
) -> Tensors:  # fmt: skip
    """Return the gradients of q, k, v, the bias and the sinks; empty tensors where there is none."""
    given = dict(zip((*_GIVEN, "bias_gradient"), others, strict=True))
    gradients = _torch_passes.backward(
        dout, dlse, q, k, v, kept, lse, *_pairs(given), given["bias_gradient"], _options(given)
    )
    return tuple(q.new_empty(0) if x is None else x for x in gradients)


@_attention_backward.register_fake
def _(
    dout: torch.Tensor, dlse: torch.Tensor | None, q: torch.Tensor, k: torch.Tensor,
    v: torch.Tensor, kept: torch.Tensor, lse: torch.Tensor, *others: Any,
) -> Tensors:  # fmt: skip
    given = dict(zip((*_GIVEN, "bias_gradient"), others, strict=True))

    def like(x: torch.Tensor | None) -> torch.Tensor:
        return q.new_empty(0) if x is None else x.new_empty(x.shape)

    def rows_first(x: torch.Tensor) -> torch.Tensor:
        if not puts_rows_first(given["layout"], q, k, v):
            return like(x)
        return swapped(x.new_empty(swapped(x).shape))

    bias = given["bias"] if given["bias_gradient"] else None
    return rows_first(q), rows_first(k), rows_first(v), like(bias), like(given["sinks"])


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensors) -> None:
    out, kept, lse = output
    q, k, v, *others = inputs
    given = dict(zip((*_GIVEN, "keeps"), others, strict=True))
    ctx.keeps = given.pop("keeps")
    ctx.tensors = tuple(name for name, x in given.items() if isinstance(x, torch.Tensor))
    ctx.others = {name: x for name, x in given.items() if name not in ctx.tensors}
    kept = out if q.element_size() > 2 else kept
    ctx.save_for_backward(q, k, v, kept, lse, *(given[name] for name in ctx.tensors))
    ctx.set_materialize_grads(False)


def _differentiate(
    ctx: Any, dout: torch.Tensor | None, _: torch.Tensor | None, dlse: torch.Tensor | None
) -> tuple[torch.Tensor | None, ...]:
    if not ctx.keeps:
        raise RuntimeError(
            "numattn::attention: got a gradient of a call with keeps=False, as it is recorded "
            "under no_grad; expected keeps=True"
        )
    q, k, v, kept, lse, *tensors = ctx.saved_tensors
    given = {**ctx.others, **dict(zip(ctx.tensors, tensors, strict=True))}
    names = list(_GIVEN)
    needs_bias = ctx.needs_input_grad[3 + names.index("bias")]
    dout = torch.zeros_like(kept) if dout is None else dout
    gradients = torch.ops.numattn.attention_backward.default(
        dout, dlse, q, k, v, kept, lse, *(given[name] for name in names), needs_bias
    )
    of = dict.fromkeys(names)
    if needs_bias:
        of["bias"] = gradients[3]
    if ctx.needs_input_grad[3 + names.index("sinks")]:
        of["sinks"] = gradients[4]
    return *gradients[:3], *of.values(), None


def _refuse_twice(ctx: Any, inputs: tuple[Any, ...], output: Tensors) -> None:
    pass


def _no_second_derivative(ctx: Any, *gradients: torch.Tensor | None) -> Any:
    raise RuntimeError(
        "numattn.torch: got a derivative of gradients, expected first derivatives: there are no "
        "second ones; with torch.nn.functional.scaled_dot_product_attention and "
        "torch.nn.attention.sdpa_kernel(SDPBackend.MATH) there are"
    )


_attention.register_autograd(_differentiate, setup_context=_keep)
_attention_backward.register_autograd(_no_second_derivative, setup_context=_refuse_twice)
torch.library.register_vmap("numattn::attention", attention_in_batches)
torch.library.register_vmap("numattn::attention_backward", backward_in_batches)


def attend(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, given: dict[str, Any]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Record the operator; return the result and the log-sum-exp.

    `given` has the options of `attention` by name, whatever is not None as numattn takes it.
    """
    left, right = (None, None) if given["window"] is None else given["window"]
    operator: Callable[..., Tensors] = torch.ops.numattn.attention.default
    out, _, lse = operator(
        q, k, v, *(_tensor(given[name]) for name in _GIVEN[:4]), _floats(given["alibi_slopes"]),
        *(_ints(given[name]) for name in ("q_offset", "kv_lengths", "q_lengths")), _seed(given["rng"]),
        given["is_causal"], left, right, given["scale"], given["softcap"], given["dropout"],
        given["layout"], given["num_threads"], torch.is_grad_enabled(),
    )  # fmt: skip
    return out, lse


def _tensor(x: Any) -> torch.Tensor | None:
    return x if x is None or isinstance(x, torch.Tensor) else torch.as_tensor(x)


def _floats(x: Any) -> torch.Tensor | None:
    """Return a tensor of slopes; numbers of Python are float64, as in numattn."""
    return torch.tensor(x, dtype=torch.float64) if isinstance(x, list | tuple) else _tensor(x)


def _ints(x: Any) -> torch.Tensor | None:
    if isinstance(x, int | torch.SymInt):
        return torch.scalar_tensor(x, dtype=torch.int64)
    return _tensor(x)


def _seed(rng: Any) -> torch.Tensor | None:
    """Return a seed as a tensor, whose ints have a sign."""
    if rng is None or isinstance(rng, torch.Tensor):
        return rng
    return torch.scalar_tensor(rng - 2**64 if rng >= 2**63 else rng, dtype=torch.int64)
