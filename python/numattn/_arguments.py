"""Checks of the arguments of `attention`, once for every backend, and their common form.

Whatever the user passed, a backend gets arrays with the axes ``(batch..., heads, rows, columns)``,
all with the same batch axes (broadcast axes have a stride of 0). `_sequence_arguments` checks
ragged and paged problems, whose rows are elsewhere in memory.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from ._block_mask_broadcast import broadcast_blocks
from ._block_mask_store import BlockMaskStore
from ._checks import (
    ACCEPTED_DTYPES,
    as_array,
    at_index,
    check_dtype,
    check_layout,
    check_out,
    check_overlap,
    dtype_name,
    flag,
    heads_first,
    integer,
    is_real,
    real,
    refuse,
    refuse_kind,
    snapshot,
    thread_count,
    value_and_kind,
    warn,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from numpy.typing import ArrayLike, NDArray

    from ._block_mask_broadcast import MaskBlocks

    Array = NDArray[Any]

# A side of a window that excludes nothing, and the largest position of a query. Their sum plus the
# length of an array fits into 64 bits.
UNBOUNDED = 2**62
MAX_POSITION = 2**60

# More than any memory holds. Only arrays with strides of 0 have such an axis.
MAX_DIM = 2**40

# The most axes that NumPy broadcasts.
MAX_AXES = 32

_FLOAT32_MAX = float(np.finfo(np.float32).max)
_LOG2_E = math.log2(math.e)


@dataclass(slots=True)
class Arguments:
    """The arguments of one call, in the form that backends take."""

    q: Array  # (batch..., Hq, Lq, D); ragged: (Hq, total of Lq, D)
    k: Array  # (batch..., Hkv, Lk, D); ragged: (Hkv, total of Lk, D); paged: (pages, Hkv, size, D)
    # (batch..., Hkv, Lk, Dv), ragged and paged like k; None for a stage without values
    v: Array | None
    out: Array | None  # (batch..., Hq, Lq, Dv); None without v
    lse: Array | None  # (batch..., Hq, Lq)
    mask: Array | None  # (batch..., Hq, Lq, Lk) bool
    # (batch..., Hq, Lq, T) bool, for the last T valid keys; ragged: (Hq, total of Lq, T). None if
    # there is a mask, which then includes the tail mask.
    tail_mask: Array | None
    mask_blocks: MaskBlocks | None  # instead of a mask
    bias: Array | None  # (batch..., Hq, Lq, Lk) float
    q_offset: NDArray[np.int64] | None  # (batch...); None: positions end with the valid keys
    kv_lengths: NDArray[np.int64] | None  # (batch...); None: all keys
    q_lengths: NDArray[np.int64] | None  # (batch...); None: all queries
    window_left: int
    window_right: int  # 0 where causal
    scale: float
    softcap: float  # 0 for none
    alibi_slopes: NDArray[np.float64] | None  # (Hq,)
    sinks: NDArray[np.float64] | None  # (Hq,)
    num_threads: int | None
    result: Array | None  # `out` in the layout of the caller
    result_lse: Array | None
    k_scale: Array | None = None  # if k is int8: like k without its last axis
    v_scale: Array | None = None
    query_starts: NDArray[np.int64] | None = None  # ragged: (B + 1,)
    key_starts: NDArray[np.int64] | None = None
    block_table: NDArray[np.int64] | None = None  # paged: (B, pages of an item)
    dropout: float = 0.0
    dropout_seed: int = 0
    first_item: int = 0  # the index of the first batch item, for dropout


def check_options(
    dtype: np.dtype[Any],
    query_heads: int,
    head_dim: int,
    is_causal: bool,
    window: tuple[int | None, int | None] | None,
    scale: float | None,
    softcap: float | None,
    alibi_slopes: ArrayLike | None,
    sinks: ArrayLike | None,
    num_threads: int | None,
    dropout: float = 0.0,
    rng: int | None = None,
) -> dict[str, Any]:
    """Check the options that all entry points share; return them by the names of `Arguments`."""
    window_left, window_right = _window(window)
    if flag("is_causal", is_causal):
        window_right = 0
    softcap_ = 0.0 if softcap is None else real("softcap", softcap)
    if softcap is not None and not softcap_ > 0:
        refuse("softcap", repr(softcap), "a positive number, or None for no cap")
    scale_ = 1 / math.sqrt(head_dim) if scale is None else real("scale", scale)
    _check_scale_fits(scale_, softcap_, dtype)
    largest = float(np.finfo(np.float64 if dtype.itemsize == 8 else np.float32).max)
    dropout_, seed = _dropout(dropout, rng)
    return {
        "window_left": window_left,
        "window_right": window_right,
        "scale": scale_,
        "softcap": softcap_,
        "alibi_slopes": _floats_per_head("alibi_slopes", alibi_slopes, query_heads, largest),
        "sinks": _floats_per_head("sinks", sinks, query_heads, largest),
        "num_threads": None if num_threads is None else thread_count("num_threads", num_threads),
        "dropout": dropout_,
        "dropout_seed": seed,
    }


def check(
    q: ArrayLike,
    k: ArrayLike,
    v: ArrayLike | None,
    mask: ArrayLike | BlockMaskStore | None,
    tail_mask: ArrayLike | None,
    bias: ArrayLike | None,
    is_causal: bool,
    q_offset: int | ArrayLike | None,
    window: tuple[int | None, int | None] | None,
    scale: float | None,
    softcap: float | None,
    alibi_slopes: ArrayLike | None,
    sinks: ArrayLike | None,
    kv_lengths: int | ArrayLike | None,
    q_lengths: int | ArrayLike | None,
    layout: str,
    return_lse: bool,
    out: Array | None,
    num_threads: int | None,
    k_scale: ArrayLike | None = None,
    v_scale: ArrayLike | None = None,
    dropout: float = 0.0,
    rng: int | None = None,
    scales_are_finite: bool = False,
    makes_results: bool = True,
) -> Arguments:
    """Check the arguments of `attention`; raise TypeError for types and ValueError for values.

    Stages use it too; without `v` there is no `out` either. Pass `scales_are_finite` if all scales
    are known to be finite. Without `makes_results`, no results are allocated: the caller has its
    own.
    """
    check_layout(layout)
    arrays = {"q": as_array("q", q), "k": as_array("k", k)}
    if v is not None:
        arrays["v"] = as_array("v", v)
    dtype = common_dtype(arrays)
    k_scale_ = key_scales("k", arrays["k"], k_scale)
    v_scale_ = None if v is None else key_scales("v", arrays["v"], v_scale)
    for name, x in arrays.items():
        if x.ndim < 2:
            axes = "(..., heads, length, dim)" if layout == "bhld" else "(..., length, heads, dim)"
            refuse(name, f"shape {x.shape}", f"{axes}, or two axes for one head")
        if x.ndim > MAX_AXES:
            refuse(name, f"{x.ndim} axes", f"at most {MAX_AXES}")
    one_head = all(x.ndim == 2 for x in arrays.values())
    views = [heads_first(x, layout) for x in arrays.values()]
    q_, k_ = views[:2]
    v_ = None if v is None else views[2]
    check_shapes(q_, k_, v_, arrays)

    batch = _batch_shape(arrays, views)
    query_heads, query_length, head_dim = q_.shape[-3:]
    key_length = k_.shape[-2]
    pairs = (*batch, query_heads, query_length, key_length)

    blocks = None
    if isinstance(mask, BlockMaskStore):
        check_meaning_of_axes(mask, batch, query_heads, query_length)
        blocks, mask = broadcast_blocks(mask, pairs, one_head), None
    mask_ = None if mask is None else as_array("mask", mask)
    if mask_ is not None:
        check_mask(mask_)
        check_meaning_of_axes(mask_, batch, query_heads, query_length)
    tail_mask_ = None if tail_mask is None else as_array("tail_mask", tail_mask)
    if tail_mask_ is not None:
        check_tail_mask(tail_mask_, key_length, f"Lk = {key_length}")
        check_meaning_of_axes(tail_mask_, batch, query_heads, query_length, "T", "tail_mask")
    bias_ = None if bias is None else as_array("bias", bias)
    if bias_ is not None:
        check_bias(bias_, dtype)
        check_meaning_of_axes(bias_, batch, query_heads, query_length, name="bias")

    options = check_options(
        dtype, query_heads, head_dim, is_causal, window, scale, softcap, alibi_slopes, sinks,
        num_threads, dropout, rng,
    )  # fmt: skip
    result = result_lse = None
    if v_ is not None and makes_results:
        result, result_lse = outputs(
            out, flag("return_lse", return_lse), one_head, layout, dtype,
            (*batch, query_heads, query_length, v_.shape[-1]),
        )  # fmt: skip
    kv_lengths_ = ints_per_batch("kv_lengths", kv_lengths, batch, 0, key_length)
    check_positions(
        query_length, kv_lengths, q_offset, q_lengths,
        positional_options(is_causal, window, alibi_slopes),
    )  # fmt: skip
    of_all_keys = None if mask_ is None else _broadcast_pairs("mask", mask_, pairs, one_head)
    of_tail = None
    if tail_mask_ is not None:
        of_tail = _broadcast_pairs(
            "tail_mask", tail_mask_, (*pairs[:-1], tail_mask_.shape[-1]), one_head, "T"
        )
    if blocks is not None and of_tail is not None:
        of_all_keys, blocks = blocks.part(slice(0, query_length), slice(0, key_length)), None
    if of_all_keys is not None and of_tail is not None:
        expanded = expanded_tail(of_tail, kv_lengths_, key_length)
        of_all_keys, of_tail = _broadcast(_once(of_all_keys) & expanded, pairs), None
    arguments = Arguments(
        q=_broadcast(q_, (*batch, *q_.shape[-3:])),
        k=_broadcast(k_, (*batch, *k_.shape[-3:])),
        v=None if v_ is None else _broadcast(v_, (*batch, *v_.shape[-3:])),
        out=None if result is None else heads_first(result, layout),
        lse=None if result_lse is None else lse_heads_first(result_lse, one_head, layout),
        mask=of_all_keys,
        tail_mask=of_tail,
        mask_blocks=blocks,
        bias=None if bias_ is None else _broadcast_pairs("bias", bias_, pairs, one_head),
        q_offset=ints_per_batch("q_offset", q_offset, batch, -MAX_POSITION, MAX_POSITION),
        kv_lengths=kv_lengths_,
        q_lengths=ints_per_batch("q_lengths", q_lengths, batch, 0, query_length),
        **options,
        result=result if out is None else out,
        result_lse=result_lse,
        k_scale=_broadcast_scales(k_scale_, one_head, layout, (*batch, *k_.shape[-3:-1])),
        v_scale=_broadcast_scales(v_scale_, one_head, layout, (*batch, *k_.shape[-3:-1])),
    )
    for name, of_keys in (("k_scale", arguments.k_scale), ("v_scale", arguments.v_scale)):
        if not scales_are_finite:
            check_scales(name, of_keys, lambda: _valid_keys(kv_lengths_, key_length))
    if out is not None:
        pairs_given = {"mask": mask_, "tail_mask": tail_mask_, "bias": bias_}
        check_overlap(out, {**arrays, **pairs_given, "k_scale": k_scale_, "v_scale": v_scale_})
    return arguments


# ---- arrays ------------------------------------------------------------------------------------


def common_dtype(arrays: dict[str, Array]) -> np.dtype[Any]:
    """Return the dtype of q, after checking that k and v (or their pages) have it or are int8."""
    arrays = {name: x for name, x in arrays.items() if name == "q" or x.dtype != np.int8}
    for name, x in arrays.items():
        check_dtype(name, x)
    dtypes = {name: x.dtype.name for name, x in arrays.items()}
    if len(set(dtypes.values())) > 1:
        seen = ", ".join(f"{name} {dtype}" for name, dtype in dtypes.items())
        every = "both" if len(arrays) == 2 else "all three"
        accepted = ", ".join(ACCEPTED_DTYPES)
        refuse_kind(", ".join(arrays), seen, f"one dtype for {every}: {accepted}")
    return arrays["q"].dtype


def key_scales(
    name: str, x: Array, scale: ArrayLike | None, argument: str | None = None
) -> Array | None:
    """Check the scales of an int8 array: one float per key, with the shape ``x.shape[:-1]``.

    `argument` is the name of the scales. Default: the name of x, with ``_scale``.
    """
    argument = argument or f"{name}_scale"
    if x.dtype != np.int8:
        if scale is not None:
            seen = f"scales for {name} of {dtype_name(x)}"
            advice = f"leave `{argument}` out; the factor of the dot products is `scale`"
            refuse_kind(argument, seen, f"{name} of dtype int8", advice)
        return None
    if scale is None:
        seen = f"dtype int8 without `{argument}`"
        refuse_kind(name, seen, "both", "`quantize_kv` returns them")
    scales = as_array(argument, scale)
    if scales.dtype.kind != "f" or not scales.dtype.isnative:
        refuse_kind(argument, dtype_name(scales), "float32")
    if scales.shape != x.shape[:-1]:
        refuse(argument, f"shape {scales.shape}", f"{x.shape[:-1]}, one scale per key")
    with np.errstate(all="ignore"):  # `check_scales` refuses an infinite scale that is read
        return scales.astype(np.float32, copy=False)


def check_mask(
    mask: Array, hint: str = "pass floats to add to the logits as `bias=`", name: str = "mask"
) -> None:
    """Refuse a mask that is not bool; `hint` says what to do with floats, if anything."""
    if mask.dtype == np.bool_:
        return
    if mask.dtype.kind in "iu":
        hint = f"use `{name}.astype(bool)` if 1 means attend"
    refuse_kind(name, dtype_name(mask), "bool (True = attend)", hint)


def check_tail_mask(tail_mask: Array, most: int, meaning: str) -> None:
    """Refuse a wrong mask of the last T valid keys; `meaning` explains `most`, the largest T."""
    check_mask(tail_mask, "use `tail_mask == 0` if it is a bias of 0 and -inf", "tail_mask")
    if tail_mask.ndim == 0:
        refuse("tail_mask", "shape ()", "(..., Hq, Lq, T), one column for each of the last T keys")
    last = tail_mask.shape[-1]
    if last > most:
        refuse("tail_mask", f"T = {last} (shape {tail_mask.shape})", f"T of at most {meaning}")


def expanded_tail(tail_mask: Array, kv_lengths: NDArray[np.int64] | None, key_length: int) -> Array:
    """Expand a mask (batch..., Hq, Lq, T) of the last valid keys to all keys.

    The result broadcasts to (batch..., Hq, Lq, Lk). If fewer than T keys are valid, the last
    columns apply to them. Elements for keys that are not valid are arbitrary.
    """
    last = tail_mask.shape[-1]
    if last == 0:
        return np.ones((1,) * (tail_mask.ndim - 1) + (key_length,), np.bool_)
    lengths = kv_lengths
    if lengths is None:
        lengths = np.full((1,) * (tail_mask.ndim - 3), key_length)
    columns = np.arange(key_length) - (lengths[..., np.newaxis, np.newaxis, np.newaxis] - last)
    of_keys = np.take_along_axis(_once(tail_mask), np.clip(columns, 0, last - 1), axis=-1)
    return np.asarray(of_keys | (columns < 0))


def _once(x: Array) -> Array:
    """Return x with a length of 1 along axes that were broadcast, except the last one."""
    return x[tuple(slice(0, 1 if stride == 0 else None) for stride in x.strides[:-1])]


def check_meaning_of_axes(
    x: Array | BlockMaskStore,
    batch: tuple[int, ...],
    query_heads: int,
    query_length: int,
    keys: str = "Lk",
    name: str = "mask",
) -> None:
    """Warn if a mask or bias with fewer axes broadcasts, but its first axes also match the batch.

    The caller may have meant the batch. This is not an error, because a correct program must not
    fail at one batch size.
    """
    axes = len(x.shape)
    missing = len(batch) + 3 - axes
    if missing < 1 or x.shape[: len(batch)] != batch or max(batch, default=1) < 2:
        return
    wanted = (*batch, query_heads, query_length)[missing:]
    if not wanted or any(n not in (1, w) for n, w in zip(x.shape, wanted, strict=False)):
        return
    taken = ["...", "Hq", "Lq", keys][-axes if axes < 4 else 0 :]
    inserted = ", ".join([":"] * len(batch) + ["np.newaxis"] * missing)
    warn(
        f"{name}: shape {x.shape} is taken as ({', '.join(taken)}), but its first axes also have "
        f"the shape of the batch, {batch}; pass `{name}[{inserted}]` if they are the batch axes, "
        f"or `{name}[np.newaxis]` if they are not"
    )


def positional_options(
    is_causal: bool,
    window: tuple[int | None, int | None] | None,
    alibi_slopes: ArrayLike | None = None,
) -> list[str]:
    """Return the names of the given options that depend on the positions of queries."""
    are_given = {
        "is_causal": flag("is_causal", is_causal),
        "window": _window(window) != (UNBOUNDED, UNBOUNDED),
        "alibi_slopes": alibi_slopes is not None,
    }
    return [name for name, is_given in are_given.items() if is_given]


def check_positions(
    query_length: int, kv_lengths: object, q_offset: object, q_lengths: object, given: list[str]
) -> None:
    """Refuse `kv_lengths` if the positions of the queries matter but are not known.

    `given` are the `positional_options`.
    """
    if query_length <= 1 or kv_lengths is None or q_offset is not None or q_lengths is not None:
        return
    if given:
        refuse(
            "kv_lengths",
            f"lengths with {' and '.join(given)} and {query_length} queries per batch item, which "
            "do not say at which positions the queries are",
            "`q_lengths` or `q_offset` too",
            "pass `q_lengths=n, kv_lengths=n` for a batch padded on the right, or "
            "`q_offset=kv_lengths - Lq` if all queries are valid and end with the keys",
        )


def check_scales(name: str, scales: Array | None, is_read: Callable[[], Array]) -> None:
    """Refuse scales that are read but not finite.

    `is_read` returns which scales are read; its result is broadcast.
    """
    if scales is None or np.isfinite(scales).all():
        return
    wrong = ~np.isfinite(scales) & is_read()
    if wrong.any():
        where = tuple(map(int, np.argwhere(wrong)[0]))
        refuse(name, f"{scales[where]}{at_index(where)}", "finite numbers")


def _valid_keys(kv_lengths: NDArray[np.int64] | None, key_length: int) -> Array:
    """Return which keys are read, (batch..., 1, Lk)."""
    if kv_lengths is None:
        return np.ones(key_length, np.bool_)
    return np.arange(key_length) < kv_lengths[..., np.newaxis, np.newaxis]


def _broadcast_scales(
    scales: Array | None, one_head: bool, layout: str, shape: tuple[int, ...]
) -> Array | None:
    if scales is None:
        return None
    if one_head or scales.ndim == 1:
        return _broadcast(scales[np.newaxis], shape)
    return _broadcast(scales if layout == "bhld" else scales.swapaxes(-2, -1), shape)


def check_bias(bias: Array, dtype: np.dtype[Any]) -> None:
    accepted = tuple(dict.fromkeys((dtype.name, "float32")))
    if bias.dtype.name not in accepted or not bias.dtype.isnative:
        if bias.dtype == np.bool_:
            advice = "pass a bool mask as `mask=`" if bias.ndim else "it is added to the logits"
        else:
            advice = "convert it with `.astype(np.float32)`" if is_real(bias.dtype) else ""
        expected = " or ".join(accepted) + f" with q of dtype {dtype.name}"
        refuse_kind("bias", dtype_name(bias), expected, advice)


def lse_heads_first(lse: Array, one_head: bool, layout: str) -> Array:
    if one_head:
        return lse[np.newaxis]
    return lse if layout == "bhld" else lse.swapaxes(-2, -1)


def check_shapes(q: Array, k: Array, v: Array | None, given: dict[str, Array]) -> None:
    """Check that the shapes fit together; `given` has the user's q, k and v by name."""
    shapes = ", ".join(f"{name} {x.shape}" for name, x in given.items())
    k_name, v_name = [*given, "v"][1:3]
    if q.shape[-1] != k.shape[-1]:
        refuse(k_name, f"head_dim {k.shape[-1]}", f"{q.shape[-1]} as in q ({shapes})")
    for name, x in (("q", q), (v_name, v)):
        if x is not None and not 1 <= x.shape[-1] <= MAX_DIM:
            limit = "at least one element" if x.shape[-1] < 1 else f"at most {MAX_DIM} elements"
            refuse(name, f"shape {given[name].shape}", f"{limit} in the last axis")
    if v is not None and k.shape[-2] != v.shape[-2]:
        refuse(v_name, f"{v.shape[-2]} keys", f"{k.shape[-2]} as in {k_name} ({shapes})")
    if v is not None and k.shape[-3] != v.shape[-3]:
        refuse(v_name, f"{v.shape[-3]} heads", f"{k.shape[-3]} as in {k_name} ({shapes})")
    query_heads, kv_heads = q.shape[-3], k.shape[-3]
    if (query_heads % kv_heads != 0) if kv_heads else query_heads > 0:
        names = k_name if v is None else f"{k_name} and {v_name}"
        expected = f"a multiple of the {kv_heads} heads of {names} ({shapes})"
        refuse("q", f"{query_heads} heads", expected)


def _batch_shape(given: dict[str, Array], arrays: Sequence[Array]) -> tuple[int, ...]:
    try:
        return np.broadcast_shapes(*(x.shape[:-3] for x in arrays))
    except ValueError:
        shapes = ", ".join(f"{name} {x.shape}" for name, x in given.items())
        refuse(", ".join(given), shapes, "leading axes that broadcast")


def _broadcast(x: Array, shape: tuple[int, ...]) -> Array:
    return x if x.shape == shape else np.broadcast_to(x, shape)


def _broadcast_pairs(
    name: str, x: Array, pairs: tuple[int, ...], one_head: bool, keys: str = "Lk"
) -> Array:
    if not one_head:
        return broadcast_pairs(name, x, pairs, f"(..., Hq, Lq, {keys})")
    return _broadcast(broadcast_pairs(name, x, pairs[-2:], f"(Lq, {keys})"), pairs)


def broadcast_pairs(name: str, x: Array, pairs: tuple[int, ...], axes: str) -> Array:
    """Broadcast a mask or bias to `pairs`; `axes` names the axes in an error."""
    try:
        return _broadcast(x, pairs)
    except ValueError:
        advice = ""
        if len(pairs) == 4 and x.shape == (pairs[0], pairs[-1]):
            advice = f"pass a {name} of (batch, keys) as `{name}[:, None, None, :]`"
        refuse(name, f"shape {x.shape}", f"one that broadcasts to {axes} = {pairs}", advice)


def outputs(
    out: Array | None,
    return_lse: bool,
    one_head: bool,
    layout: str,
    dtype: np.dtype[Any],
    shape: tuple[int, ...],
) -> tuple[Array, Array | None]:
    """Return out, a view of the caller's array if given, and lse. `shape` has heads first."""
    shape = shape_in_layout(shape, one_head, layout)
    out = np.empty(shape, dtype) if out is None else check_out(out, shape, dtype, True)
    if not return_lse:
        return out, None
    return out, np.empty(shape[:-1], np.float64 if dtype.itemsize == 8 else np.float32)


def shape_in_layout(shape: tuple[int, ...], one_head: bool, layout: str) -> tuple[int, ...]:
    """Convert a shape, which has heads before rows, to the caller's layout."""
    if one_head:
        return shape[1:]
    if layout == "blhd":
        return (*shape[:-3], shape[-2], shape[-3], shape[-1])
    return shape


# ---- numbers -----------------------------------------------------------------------------------


def _check_scale_fits(scale: float, softcap: float, dtype: np.dtype[Any]) -> None:
    if dtype.itemsize == 8:
        return
    factor = abs(scale) / softcap if softcap else abs(scale) * _LOG2_E
    if factor > _FLOAT32_MAX or softcap * _LOG2_E > _FLOAT32_MAX:
        overflow = "so that float32 does not overflow"
        most = _FLOAT32_MAX / _LOG2_E
        if softcap:
            least = abs(scale) / _FLOAT32_MAX
            expected = f"{least:.2g} to {most:.2g} with scale={scale:.3g}, {overflow}"
            refuse("softcap", repr(softcap), expected)
        refuse("scale", repr(scale), f"a magnitude of at most {most:.2g}, {overflow}")


def _dropout(dropout: float, rng: int | None) -> tuple[float, int]:
    """Return the share that is dropped, and the seed, which is 0 if nothing is dropped."""
    share = real("dropout", dropout)
    if not 0 <= share < 1:
        refuse("dropout", repr(dropout), "the fraction of weights to drop, from 0 to less than 1")
    wanted = "a seed, an int that forward and backward share"
    advice = "pass `int(rng.integers(2**63))`, for example"
    if isinstance(rng, np.random.Generator):
        refuse_kind("rng", "a numpy.random.Generator", wanted, advice)
    seed = 0 if rng is None else integer("rng", rng)
    if not 0 <= seed < 2**64:
        refuse("rng", str(seed), f"a seed from 0 to {2**64 - 1}")
    if rng is None and share > 0:
        refuse("rng", f"None with dropout={share}", wanted, advice)
    return share, seed if share > 0 else 0


def _window(window: tuple[int | None, int | None] | None) -> tuple[int, int]:
    if window is None:
        return UNBOUNDED, UNBOUNDED
    if not isinstance(window, (tuple, list)):
        refuse_kind(
            "window",
            value_and_kind(window),
            "(left, right), the keys before and after the query, with None for no limit",
        )
    if len(window) != 2:
        refuse("window", repr(window), "two sides, (left, right)")
    sides = [UNBOUNDED if side is None else integer("window", side) for side in window]
    if min(sides) < 0:
        refuse("window", repr(window), "sides of at least 0, or None for no limit")
    return min(sides[0], UNBOUNDED), min(sides[1], UNBOUNDED)


def ints_per_batch(
    name: str, values: int | ArrayLike | None, batch: tuple[int, ...], low: int, high: int
) -> NDArray[np.int64] | None:
    if values is None:
        return None
    array = snapshot(name, values)
    if array.dtype == object:  # Python ints beyond 64 bits
        array = np.asarray([integer(name, x) for x in array.ravel()], object).reshape(array.shape)
    elif array.dtype.kind not in "iu" and array.size > 0:
        refuse_kind(name, f"dtype {array.dtype}", "ints")
    outside = (array < low) | (array > high)
    if np.any(outside):
        where = tuple(map(int, np.argwhere(outside)[0]))
        expected = f"{low} to {high}" if high < 2**62 else f"at least {low}"
        refuse(name, f"{array[where]}{at_index(where)}", expected)
    try:
        broadcast = np.broadcast_to(array, batch)
    except ValueError:
        expected = f"one that broadcasts to the batch shape {batch}"
        advice = "three axes are (heads, length, dim): give the arrays an axis for the batch"
        refuse(name, f"shape {array.shape}", expected, "" if batch else advice)
    return np.array(broadcast, np.int64, order="C")


def _floats_per_head(
    name: Literal["alibi_slopes", "sinks"],
    values: ArrayLike | None,
    query_heads: int,
    largest: float,
) -> NDArray[np.float64] | None:
    if values is None:
        return None
    array = snapshot(name, values)
    if not is_real(array.dtype):
        refuse_kind(name, f"dtype {array.dtype}", "real numbers")
    if array.shape != (query_heads,):
        refuse(name, f"shape {array.shape}", f"one number per query head, ({query_heads},)")
    numbers = np.asarray(array, np.float64, order="C")
    bad = ~(np.abs(numbers) <= largest)
    if name == "sinks":
        bad &= numbers != -np.inf  # no sink
    if bad.any():
        head = int(np.argmax(bad))
        expected = f"numbers of at most {largest:.2g} in magnitude"
        refuse(name, f"{numbers[head]} for head {head}", expected)
    return numbers
