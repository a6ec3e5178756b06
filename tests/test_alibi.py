"""Promise: the slopes of ALiBi are those that it was published with."""

import numattn as na
import numpy as np
import pytest

PUBLISHED = {
    1: [2**-8],
    2: [2**-4, 2**-8],
    8: [0.5, 0.25, 0.125, 0.0625, 0.03125, 0.015625, 0.0078125, 0.00390625],
    12: [
        *[0.5, 0.25, 0.125, 0.0625, 0.03125, 0.015625, 0.0078125, 0.00390625],
        *[2**-0.5, 2**-1.5, 2**-2.5, 2**-3.5],
    ],
}


@pytest.mark.parametrize("heads", PUBLISHED)
def test_written_down(heads):
    np.testing.assert_allclose(na.alibi_slopes(heads), PUBLISHED[heads], rtol=1e-15)


@pytest.mark.parametrize("heads", [3, 5, 6, 7, 16, 20, 40, 112])
def test_by_the_recipe(heads):
    """The slopes of a power of two are a geometric sequence that begins with its ratio."""

    def slopes(n):
        if n & (n - 1) == 0:
            return [2.0 ** (-8.0 * (i + 1) / n) for i in range(n)]
        below = max(2**i for i in range(10) if 2**i < n)
        return slopes(below) + slopes(2 * below)[::2][: n - below]

    np.testing.assert_allclose(na.alibi_slopes(heads), slopes(heads), rtol=1e-14)


def test_in_attention(backend, arrays):
    q, k, v = arrays(hq=3, lq=9, d=8)
    bias = -na.alibi_slopes(3)[:, None, None] * abs(np.arange(9)[:, None] - np.arange(9))
    expected = na.attention(q, k, v, bias=bias.astype(np.float32))
    out = na.attention(q, k, v, alibi_slopes=na.alibi_slopes(3))
    np.testing.assert_allclose(out, expected, atol=1e-6)


def test_bad_counts():
    with pytest.raises(ValueError, match="num_heads: got 0, expected at least 1"):
        na.alibi_slopes(0)
    with pytest.raises(TypeError, match=r"num_heads: got 2.0 \(float\), expected an int"):
        na.alibi_slopes(2.0)
