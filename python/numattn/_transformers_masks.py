"""Masks of transformers that keep their structure.

A model of transformers asks for its mask once per forward, as a function of positions and a padding
mask. Where the function is a known one, the mask is a `StructuredMask`: a tensor of bool for
everybody, but without elements until somebody asks for them. `numattn.transformers` reads its
structure instead. Everything else becomes the dense mask that "sdpa" has.
"""

from __future__ import annotations

import sys
import warnings
from typing import TYPE_CHECKING, Any

import torch
from torch.utils._pytree import tree_map_only
from transformers import masking_utils

from ._transformers_structures import Structure, find_structure

if TYPE_CHECKING:
    from collections.abc import Callable

    from ._transformers_structures import MaskFunction


class StructuredMask(torch.Tensor):  # type: ignore[misc]
    """A mask (batch, 1, queries, keys) of bool whose elements are made when they are first needed.

    Every operation of PyTorch gets the dense mask and gives plain tensors, so whatever a model does
    to the mask is right. Only attention that gets this very object, which nobody can have written
    to, sees the structure.
    """

    @staticmethod
    def __new__(
        cls: type[StructuredMask], shape: tuple[int, ...], device: torch.device | str, *_: Any
    ) -> StructuredMask:
        return torch.Tensor._make_wrapper_subclass(  # type: ignore[no-any-return]
            cls, shape, dtype=torch.bool, device=device
        )

    def __init__(
        self,
        shape: tuple[int, ...],
        device: torch.device | str,
        structure: Structure,
        make_dense: Callable[[], torch.Tensor],
    ) -> None:
        self._structure: Structure | None = structure
        self._make_dense = make_dense
        self._dense: torch.Tensor | None = None

    def structure(self) -> Structure | None:
        """Return the structure, or None if somebody may have written to the elements."""
        return self._structure

    def dense(self) -> torch.Tensor:
        """Return the elements, to be read."""
        if self._dense is None:
            # Made contiguous: an expanded mask cannot be written to.
            self._dense = self._make_dense().contiguous()
        return self._dense

    @classmethod
    def __torch_dispatch__(
        cls,
        func: Any,
        types: tuple[type, ...],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Compute with the dense mask."""
        # It writes to the mask, or gives a view that can be written to.
        shares = any(result.alias_info is not None for result in func._schema.returns)

        def dense(mask: StructuredMask) -> torch.Tensor:
            if shares:
                mask._structure = None
            return mask.dense()

        args, kwargs = tree_map_only(cls, dense, (args, kwargs or {}))
        return func(*args, **kwargs)

    # Without this, results would be made into this class again.
    __torch_function__ = torch._C._disabled_torch_function_impl


def make_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | torch.Tensor = 0,
    kv_offset: int = 0,
    mask_function: MaskFunction = masking_utils.causal_mask_function,
    attention_mask: torch.Tensor | None = None,
    *,
    allow_is_bidirectional_skip: bool = False,
    use_vmap: bool = False,
    device: torch.device | str = "cpu",
    config: Any = None,
    **others: Any,
) -> torch.Tensor | None:
    """Make the mask of a forward: what transformers calls for ``attn_implementation="numattn"``."""
    arguments = {
        "batch_size": batch_size,
        "q_length": q_length,
        "kv_length": kv_length,
        "q_offset": q_offset,
        "kv_offset": kv_offset,
        "mask_function": mask_function,
        "attention_mask": attention_mask,
        "use_vmap": use_vmap,
        "device": device,
    }
    skip = {"allow_is_bidirectional_skip": allow_is_bidirectional_skip}
    if config is not None and not uses_interface(type(config)):
        return masking_utils.eager_mask(**arguments, **skip, **others)
    # The mask of one query has no more elements than the padding.
    if q_length == 1 or use_vmap or is_traced(q_offset, attention_mask):
        return masking_utils.sdpa_mask(**arguments, **skip, **others)
    structure = find_structure(
        mask_function, attention_mask, int(q_offset), kv_offset, q_length, kv_length
    )
    if structure is None:
        others["allow_is_causal_skip"] = False  # who knows whether it is causal
        return masking_utils.sdpa_mask(**arguments, **skip, **others)
    if allow_is_bidirectional_skip and structure == Structure(q_offset=structure.q_offset):
        return None
    return StructuredMask(
        (batch_size, 1, q_length, kv_length),
        device,
        structure,
        lambda: masking_utils.sdpa_mask(**arguments, allow_is_causal_skip=False),
    )


# By class of configuration.
_uses_interface: dict[type, bool] = {}


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def uses_interface(config_class: type) -> bool:
    """Whether the model of a configuration asks transformers for its attention function.

    A model that computes attention by itself wants the mask that "eager" has, which is added to the
    logits. One whose code is not found beside its configuration gets that mask too: it is right
    for both.
    """
    if config_class not in _uses_interface:
        _uses_interface[config_class] = _look_for_interface(config_class)
    return _uses_interface[config_class]


def _look_for_interface(config_class: type) -> bool:
    package = config_class.__module__.rpartition(".")[0]
    models = [
        vars(module)
        for name, module in list(sys.modules.items())
        if name.startswith(f"{package}.modeling_")
    ]
    finding = None
    if not models:
        finding = (
            "no module modeling_* beside it, so numattn cannot see whether its model asks for an "
            "attention function; it gets dense masks of floats"
        )
    elif not all("ALL_ATTENTION_FUNCTIONS" in names for names in models):
        finding = "its model computes attention by itself, so numattn is not used"
    if finding is not None:
        warnings.warn(f"{config_class.__name__}: {finding}", stacklevel=4)
    return finding is None


def is_traced(*values: torch.Tensor | int | None) -> bool:
    """Whether the elements of tensors cannot be read, as in a compilation."""
    if torch.compiler.is_compiling() or torch.jit.is_tracing():
        return True
    return any(type(x) not in (torch.Tensor, int, type(None)) for x in values)
