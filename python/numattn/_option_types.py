"""The options of functions with overloads, for type checkers.

The result type of these functions depends on an argument, so they have overloads, whose other
options are listed here. A test compares them with the options of the function itself.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal, TypedDict

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import ArrayLike, NDArray

    from ._block_mask import BlockMask
    from ._kv_cache import KVCache


class _OfAll(TypedDict, total=False):
    tail_mask: ArrayLike | None
    window: tuple[int | None, int | None] | None
    scale: float | None
    softcap: float | None
    alibi_slopes: ArrayLike | None
    sinks: ArrayLike | None
    num_threads: int | None


class _OfPairs(TypedDict, total=False):
    mask: ArrayLike | BlockMask | None
    bias: ArrayLike | None


class _OfLayouts(TypedDict, total=False):
    is_causal: bool
    layout: Literal["bhld", "blhd"]


class _OfScales(TypedDict, total=False):
    k_scale: ArrayLike | None
    v_scale: ArrayLike | None


class _OfLengths(TypedDict, total=False):
    q_offset: int | ArrayLike | None
    kv_lengths: int | ArrayLike | None
    q_lengths: int | ArrayLike | None


class AttentionOptions(_OfAll, _OfPairs, _OfLayouts, _OfLengths, _OfScales, total=False):
    dropout: float
    rng: int | None
    out: NDArray[Any] | None


class VjpOptions(_OfAll, _OfPairs, _OfLayouts, _OfLengths, total=False):
    bias_gradient: bool
    dropout: float
    rng: int | np.random.Generator | None


class DaskOptions(_OfLayouts, _OfLengths, total=False):
    mask: Any
    bias: Any
    window: tuple[int | None, int | None] | None
    scale: float | None
    softcap: float | None
    alibi_slopes: ArrayLike | None
    sinks: ArrayLike | None
    num_threads: int | None
    split_every: int | None


class VarlenOptions(_OfAll, _OfScales, total=False):
    is_causal: bool
    q_offset: int | ArrayLike | None
    dropout: float
    rng: int | None
    out: NDArray[Any] | None


class PagedOptions(_OfAll, _OfLayouts, _OfScales, total=False):
    q_offset: int | ArrayLike | None
    q_lengths: int | ArrayLike | None
    out: NDArray[Any] | None


class SelectedPagesOptions(_OfScales, total=False):
    is_causal: bool
    scale: float | None
    softcap: float | None
    sinks: ArrayLike | None
    num_threads: int | None


class AppendAndAttendOptions(_OfAll, _OfPairs, _OfLayouts, total=False):
    out: NDArray[Any] | None


class AttendOptions(AppendAndAttendOptions, total=False):
    q_offset: int | ArrayLike | None
    q_lengths: int | ArrayLike | None


class BlockCallOptions(_OfAll, _OfPairs, total=False):
    is_causal: bool | None
    positions: ArrayLike | None
    cache: KVCache | None


class LayerOptions(BlockCallOptions, total=False):
    lengths: int | ArrayLike | None


class BlockVjpOptions(_OfAll, _OfPairs, total=False):
    is_causal: bool
    positions: ArrayLike | None
    bias_gradient: bool
    dropout: float
    rng: int | np.random.Generator | None
