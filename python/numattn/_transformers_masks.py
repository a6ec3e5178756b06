"""Masks of transformers that keep their structure.

A model in transformers asks for its mask once per forward pass, with a function of positions and a
padding mask. It gets a `StructuredMask`. `numattn.transformers` reads its structure: limits,
chunks, padding, or else bools of all pairs. For all other code it is the mask of "eager": floats to
add to the logits, which are made when they are first needed. So models that compute attention
themselves, or use their masks in other ways, get the same as with "eager".
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
    """A mask (batch, 1, queries, keys) of floats whose elements are made when they are needed.

    Every PyTorch operation gets the dense mask and returns plain tensors, so a model may do
    anything with the mask. Only attention that gets this very object, unmodified, uses the
    structure.
    """

    @staticmethod
    def __new__(
        cls: type[StructuredMask],
        shape: tuple[int, ...],
        dtype: torch.dtype,
        device: torch.device | str,
        *_: Any,
    ) -> StructuredMask:
        return torch.Tensor._make_wrapper_subclass(  # type: ignore[no-any-return]
            cls, shape, dtype=dtype, device=device
        )

    def __init__(
        self,
        shape: tuple[int, ...],
        dtype: torch.dtype,
        device: torch.device | str,
        structure: Structure,
        make_pairs: Callable[[], torch.Tensor],
    ) -> None:
        self._structure: Structure | None = structure
        self._make_pairs = make_pairs
        self._dense: torch.Tensor | None = None

    def structure(self) -> Structure | None:
        """Return the structure, or None if the elements may have been written to."""
        return self._structure

    def pairs(self) -> torch.Tensor:
        """Return bools of all pairs, if there is a structure."""
        return self._make_pairs()

    def dense(self) -> torch.Tensor:
        """Return the elements for reading: 0 where a query attends, else the least number."""
        if self._dense is None:
            least = torch.finfo(self.dtype).min
            zero = torch.zeros((), dtype=self.dtype, device=self.device)
            self._dense = torch.where(self._make_pairs(), zero, least)
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
        # The operation writes to the mask, or returns a view that can be written to.
        shares = any(result.alias_info is not None for result in func._schema.returns)

        def dense(mask: StructuredMask) -> torch.Tensor:
            if shares:
                mask._structure = None
            return mask.dense()

        args, kwargs = tree_map_only(cls, dense, (args, kwargs or {}))
        return func(*args, **kwargs)

    # Without this, results would be converted to this class again.
    __torch_function__ = torch._C._disabled_torch_function_impl

    # Methods that do not go through the dispatcher.

    def numpy(self, **options: Any) -> Any:
        self._structure = None  # the array shares the memory
        return self.dense().numpy(**options)

    def __array__(self, *options: Any) -> Any:
        return self.dense().__array__(*options)

    def tolist(self) -> Any:
        return self.dense().tolist()

    def __deepcopy__(self, _: Any) -> torch.Tensor:
        return self.dense().clone()

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.dense().__reduce_ex__(protocol)


def make_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | torch.Tensor = 0,
    kv_offset: int = 0,
    mask_function: MaskFunction = masking_utils.causal_mask_function,
    attention_mask: torch.Tensor | None = None,
    dtype: torch.dtype = torch.float32,
    *,
    allow_is_bidirectional_skip: bool = False,
    use_vmap: bool = False,
    device: torch.device | str = "cpu",
    config: Any = None,
    **others: Any,
) -> torch.Tensor | None:
    """Make the mask of a forward pass; transformers calls this function for "numattn"."""
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
    if config is not None:
        warn_of_no_interface(type(config))
    of_static_cache = isinstance(q_offset, torch.Tensor)
    # The step for one token may be compiled, which takes only plain tensors.
    if is_traced(q_offset, attention_mask) or (of_static_cache and q_length == 1):
        return masking_utils.eager_mask(
            **arguments, dtype=dtype, allow_is_bidirectional_skip=allow_is_bidirectional_skip
        )
    # Copy both, because the cache changes its offset, and the caller may change the padding, before
    # the elements are needed.
    arguments["q_offset"] = int(q_offset)
    if attention_mask is not None:
        arguments["attention_mask"] = attention_mask.clone()

    def make_pairs() -> torch.Tensor:
        return masking_utils.sdpa_mask(**arguments, allow_is_causal_skip=False)

    structure = None
    if not use_vmap:
        structure = find_structure(
            mask_function, arguments["attention_mask"], int(q_offset), kv_offset, q_length,
            kv_length,
        )  # fmt: skip
    if structure is None:
        pairs = make_pairs()
        structure = Structure(pairs=pairs)
        make_pairs = lambda: pairs  # noqa: E731
    elif allow_is_bidirectional_skip and structure == Structure(q_offset=structure.q_offset):
        return None
    shape = (batch_size, 1, q_length, kv_length)
    return StructuredMask(shape, dtype, device, structure, make_pairs)


# Classes of configurations that have been checked.
_seen: set[type] = set()


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def warn_of_no_interface(config_class: type) -> None:
    """Warn once for each kind of model that does not use transformers' attention interface."""
    if config_class in _seen:
        return
    _seen.add(config_class)
    package = config_class.__module__.rpartition(".")[0]
    models = [
        vars(module)
        for name, module in list(sys.modules.items())
        if name.startswith(f"{package}.modeling_")
    ]
    if models and not any("ALL_ATTENTION_FUNCTIONS" in names for names in models):
        warnings.warn(
            f"{config_class.__name__}: this model does not use transformers' attention interface, "
            "so it computes attention without numattn",
            stacklevel=3,
        )


def is_traced(*values: torch.Tensor | int | None) -> bool:
    """Return whether the elements of tensors cannot be read, as during compilation."""
    if torch.compiler.is_compiling() or torch.jit.is_tracing():
        return True
    return any(type(x) not in (torch.Tensor, int, type(None)) for x in values)
