"""Conversion of tensors to arrays over the same memory and back, and checks of tensors."""

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
# The last two replace tensors while a program is recorded.
_TYPES = (*EAGER_TYPES, FakeTensor, FunctionalTensor)

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
_INT16 = np.dtype(np.int16)


def array_of(x: torch.Tensor) -> Array:
    """Return an array over the memory of a tensor, whether or not it requires a gradient."""
    if x.requires_grad:
        x = x.detach()
    if x.is_neg():  # a lazily negated view
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
    """Describe x if numattn cannot read it, whatever its dtype; else return None."""
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
    """Return whether forward-mode derivatives go through any of the tensors among these."""
    if torch.compiler.is_compiling() or forward_ad._current_level < 0:
        return False
    given = [x for x in tensors if isinstance(x, torch.Tensor)]
    return any(forward_ad.unpack_dual(x).tangent is not None for x in given)


def is_transformed() -> bool:
    """Return whether `torch.func` transforms operators, outside compilation."""
    return not torch.compiler.is_compiling() and _transforms_are_active()


def is_recorded() -> bool:
    """Return whether operators are recorded or transformed instead of run eagerly."""
    return (
        torch.compiler.is_compiling()
        or _transforms_are_active()
        or _dispatch_modes() > 0
        or _tracing_state() is not None
    )


def runs_alone() -> bool:
    """Return whether operators run eagerly, with nothing active but gradients."""
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
    """Return the dtype to which autocast converts float tensors on the CPU, None without it."""
    return torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else None


def after_autocast(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype that a tensor of this dtype has after autocast."""
    wanted = autocast_dtype()
    is_cast = wanted is not None and dtype.is_floating_point and dtype != torch.float64
    return wanted if is_cast else dtype
