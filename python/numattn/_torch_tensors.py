"""Tensors as arrays over the same memory and back, and which tensors numattn takes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import ml_dtypes
import numpy as np
import torch
from torch._subclasses.fake_tensor import FakeTensor
from torch._subclasses.functional_tensor import FunctionalTensor
from torch.autograd import forward_ad

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Array = NDArray[Any]

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
EAGER_TYPES = (torch.Tensor, torch.nn.Parameter)
# The latter two take the place of tensors while a program is recorded.
_TYPES = (*EAGER_TYPES, FakeTensor, FunctionalTensor)

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
_INT16 = np.dtype(np.int16)


def array_of(x: torch.Tensor) -> Array:
    """Return an array over the memory of a tensor, whether or not it requires a gradient."""
    if x.requires_grad:
        x = x.detach()
    if x.is_neg():  # a view whose sign has yet to be changed
        x = x.resolve_neg()
    # `Tensor.numpy` does not know bfloat16.
    is_bfloat16 = x.dtype is torch.bfloat16
    array: Array = x.view(torch.int16).numpy() if is_bfloat16 else x.numpy()
    return array.view(BFLOAT16) if is_bfloat16 else array


def tensor_of(x: Array) -> torch.Tensor:
    """Return a tensor over the memory of an array."""
    if x.dtype == BFLOAT16:
        return torch.from_numpy(x.view(_INT16)).view(torch.bfloat16)
    return torch.from_numpy(x)


def unfit(x: object) -> str | None:
    """Say what x is if numattn cannot read it, whatever the dtype."""
    if not isinstance(x, torch.Tensor):
        return type(x).__name__
    if x.is_nested:
        return "a nested tensor"
    if type(x) not in _TYPES:
        return f"a {type(x).__name__}, a subclass of Tensor"
    if x.layout != torch.strided:
        return f"a tensor of layout {x.layout}"
    if x.device.type != "cpu":
        return f"a tensor on {x.device}"
    return None


def has_tangent(*tensors: object) -> bool:
    """Whether forward-mode derivatives go through one of these that are tensors."""
    if torch.compiler.is_compiling() or forward_ad._current_level < 0:
        return False
    given = [x for x in tensors if isinstance(x, torch.Tensor)]
    return any(forward_ad.unpack_dual(x).tangent is not None for x in given)


def is_transformed() -> bool:
    """Whether operators that are not being compiled are transformed by `torch.func`."""
    return not torch.compiler.is_compiling() and _transforms_are_active()


def is_recorded() -> bool:
    """Whether operators are recorded or transformed, rather than run one by one."""
    return (
        torch.compiler.is_compiling()
        or _transforms_are_active()
        or _dispatch_modes() > 0
        or _tracing_state() is not None
    )


def runs_alone() -> bool:
    """Whether nothing but gradients concerns an operator outside of `torch.compile`."""
    return not (
        _transforms_are_active()
        or _dispatch_modes()
        or forward_ad._current_level >= 0
        or _tracing_state() is not None
        or torch.is_autocast_enabled("cpu")
    )


_transforms_are_active = torch._C._are_functorch_transforms_active
_dispatch_modes = torch._C._len_torch_dispatch_stack
_tracing_state = torch._C._get_tracing_state


def needs_gradient(*tensors: object) -> bool:
    return torch.is_grad_enabled() and any(
        isinstance(x, torch.Tensor) and x.requires_grad for x in tensors
    )


def autocast_dtype() -> torch.dtype | None:
    """Return what autocast makes of float tensors on the CPU, None outside of it."""
    return torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else None


def after_autocast(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype that a tensor of this dtype has once autocast is done with it."""
    wanted = autocast_dtype()
    is_cast = wanted is not None and dtype.is_floating_point and dtype != torch.float64
    return wanted if is_cast else dtype
