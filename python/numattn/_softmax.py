"""The softmax of masked logits."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from . import _runtime
from ._arguments import check_mask
from ._checks import (
    as_array,
    check_out,
    check_overlap,
    float_array,
    integer,
    refuse,
    refuse_unknown,
    same_elements,
)

if TYPE_CHECKING:
    from numpy.typing import ArrayLike, NDArray

    Array = NDArray[Any]

# What other libraries call the arguments.
_ELSEWHERE = {
    "dim": "`axis=`",
    "where": "`mask=`",
    "attn_mask": "`mask=` if it is bool (True = counts); add a float one to the scores",
    "attention_mask": "`mask=` if it is bool (True = counts); add a float one to the scores",
}


def masked_softmax(
    scores: ArrayLike,
    mask: ArrayLike | None = None,
    *,
    axis: int = -1,
    out: Array | None = None,
    **unknown: Any,
) -> Array:
    """Compute the softmax over one axis, where a mask is True.

    Parameters
    ----------
    scores : array_like of float
        Logits, natural logarithm; -inf gets the weight 0.
    mask : array_like of bool, optional
        True where a score counts; broadcasts to the scores' shape.
    axis : int, default -1
        The axis along which the weights add up to 1.
    out : ndarray, optional
        Array to write the result to, of the shape and dtype of `scores`. It may be `scores`.

    Returns
    -------
    ndarray
        Weights, with the shape and dtype of `scores`; all 0 where no score along the axis is left.

    Raises
    ------
    TypeError
        If `scores` is not floating-point, or `mask` is not bool.
    ValueError
        If the mask does not broadcast, the axis does not exist or `out` does not fit.

    See Also
    --------
    qk_scores : the logits, the stage before.
    aggregate_values : the weighted sum of values, the stage after.
    attention_weights : logits and softmax in one call, with sinks.

    Examples
    --------
    >>> import numpy as np
    >>> import numattn as na
    >>> na.masked_softmax(np.zeros((2, 3)), mask=[True, True, False])
    array([[0.5, 0.5, 0. ],
           [0.5, 0.5, 0. ]])
    """
    if unknown:
        refuse_unknown("masked_softmax", unknown, _ELSEWHERE)
    x = float_array("scores", scores)
    if x.ndim == 0:
        refuse("scores", "shape ()", "at least one axis")
    axis = integer("axis", axis)
    if not -x.ndim <= axis < x.ndim:
        refuse("axis", str(axis), f"an axis of scores, whose shape is {x.shape}")
    m = None
    if mask is not None:
        m = as_array("mask", mask)
        check_mask(m, "add logits to the scores")
        try:
            m = np.broadcast_to(m, x.shape)
        except ValueError:
            refuse("mask", f"shape {m.shape}", f"one that broadcasts to {x.shape}, as scores has")
    if out is None:
        out = np.empty(x.shape, x.dtype)
    else:
        check_out(out, x.shape, x.dtype)
        if out is not x and not same_elements(out, x):
            check_overlap(out, {"scores": x, "mask": m})
    # The kernel takes contiguous rows.
    rows = np.ascontiguousarray(np.moveaxis(x, axis, -1))
    kept = None if m is None else np.ascontiguousarray(np.moveaxis(m, axis, -1))
    to = np.moveaxis(out, axis, -1)
    in_place = to.flags.c_contiguous and to.flags.aligned and to.dtype.isnative
    result = to if in_place else np.empty(to.shape, x.dtype)
    _runtime.computations.softmax(rows, kept, result)
    if not in_place:
        to[...] = result
    return out
