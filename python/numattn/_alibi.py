"""The slopes of ALiBi."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from ._checks import at_least

if TYPE_CHECKING:
    from numpy.typing import NDArray


def alibi_slopes(num_heads: int) -> NDArray[Any]:
    """Return the slopes of the ALiBi paper, for the argument `alibi_slopes` of `attention`.

    The paper is [1]_. For n heads, a power of two, the slopes are ``2 ** (-8 / n)`` and its powers
    up to the n-th. For any other number they are the slopes of the largest power of two below it,
    followed by every other slope of twice that many heads.

    Parameters
    ----------
    num_heads : int
        Number of query heads, at least 1.

    Returns
    -------
    ndarray of float64, shape (num_heads,)
        Positive numbers, in natural logarithms per token of distance.

    Raises
    ------
    TypeError, ValueError
        If `num_heads` is not an int, or less than 1.

    See Also
    --------
    attention : takes the slopes as ``alibi_slopes=``.

    References
    ----------
    .. [1] O. Press, N. A. Smith, M. Lewis, "Train Short, Test Long: Attention with Linear Biases
       Enables Input Length Extrapolation", ICLR 2022.

    Examples
    --------
    >>> import numattn as na
    >>> na.alibi_slopes(4)
    array([0.25      , 0.0625    , 0.015625  , 0.00390625])
    >>> na.alibi_slopes(3)
    array([0.0625    , 0.00390625, 0.25      ])
    """
    heads = at_least("num_heads", num_heads, 1)
    power = 1 << heads.bit_length() - 1  # the largest power of two up to `heads`
    slopes = _of_power_of_two(power)
    return np.concatenate([slopes, _of_power_of_two(2 * power)[::2]])[:heads]


def _of_power_of_two(heads: int) -> NDArray[Any]:
    return 2.0 ** (-8 * np.arange(1, heads + 1) / heads)
