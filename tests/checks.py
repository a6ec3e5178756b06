"""How results are compared with the reference."""

import numattn as na
import numpy as np
import reference
from numattn import _runtime


def error_factor():
    """Return how many times plain NumPy's error is allowed: 2.

    3 on the generic level of x86-64, which has no fused multiply-add, where NumPy's BLAS has it.
    """
    return 3 if _runtime.native is not None and _runtime.native.isa() == "generic" else 2


def assert_close_to_reference(q, k, v, *, factor=None, **options):
    """Check out and lse against float64 (float64 against long double).

    The largest error may be `factor` (default: `error_factor`) times that of plain NumPy in the
    same precision (float32 for 16-bit floats), plus one unit in the last place. Both are the
    largest of many numbers, so that the arrays should give some thousand: plain NumPy's error of a
    few can be 0 by luck. How a matmul rounds is the BLAS's choice, which differs between CPUs;
    plain NumPy's error is the larger one of matmul and of einsum, which uses no BLAS.
    """
    factor = factor or error_factor()
    precision = np.float64 if q.dtype == np.float64 else np.float32
    trusted = np.longdouble if precision is np.float64 else np.float64
    expected, expected_lse = reference.attention(q, k, v, **options, dtype=trusted)
    plain = [
        reference.attention(q, k, v, **options, dtype=precision, matmul=matmul)
        for matmul in (np.matmul, reference.matmul_by_einsum)
    ]
    out, lse = na.attention(q, k, v, **options, return_lse=True)
    assert out.dtype == q.dtype
    assert lse.dtype == precision
    assert out.shape == expected.shape
    assert lse.shape == expected_lse.shape == out.shape[:-1]
    assert_within(out, [x.astype(q.dtype) for x, _ in plain], expected, factor)
    assert_within(lse, [x for _, x in plain], expected_lse, factor)


def assert_within(actual, plain, expected, factor=2):
    """Check |actual - expected| <= factor * |plain - expected| + 1 ulp, by the largest of each.

    `plain` is a list of arrays, whose largest error counts.
    """
    finite = np.isfinite(expected)
    np.testing.assert_array_equal(
        actual[~finite].astype(np.float64), expected[~finite], "not finite in the reference"
    )
    if not finite.any():
        return
    expected = expected[finite]

    def largest_error(x):
        # Widened to the reference's precision; 16-bit floats of other packages via float64.
        wide = x[finite].astype(np.float64).astype(expected.dtype)
        return np.abs(wide - expected).max()

    assert np.isfinite(actual[finite].astype(np.float64)).all(), "finite in the reference"
    ulp = float(np.spacing(np.abs(expected).max().astype(actual.dtype)))
    error = largest_error(actual)
    bound = factor * max(largest_error(x) for x in plain) + ulp
    assert error <= bound, f"error {error:.3g}, bound {bound:.3g} ({error / bound:.2f} of it)"
