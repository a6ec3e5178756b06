"""Products with matrices: as exact as NumPy's, with the same bits alone and in a batch."""

import numpy as np
import pytest
from checks import assert_within, error_factor, numbers
from numattn import _numpy_backend, _runtime
from numattn import _reference as reference
from numattn._checks import precision_of
from numattn._projection import Product, bias_gradient, compute, project, weight_gradient
from numattn._rotary import make_rotation

# Few and many rows, sums of one piece and of several, columns that fill register tiles or do not.
SIZES = [
    (1, 1, 1), (1, 5, 3), (2, 7, 17), (3, 33, 64), (4, 200, 65), (5, 257, 31), (6, 256, 16),
    (7, 385, 48), (8, 63, 130), (9, 31, 15), (17, 520, 33), (65, 63, 130), (200, 300, 300),
    (1, 500, 4200), (4, 31, 600), (800, 20, 70), (30, 40, 1600),
]  # fmt: skip


def product(x, weight, bias, precision, matmul=np.matmul):
    return matmul(x.astype(precision), weight.astype(precision)) + bias.astype(precision)


def empty(rows, columns, dtype, gaps=False):
    """Return an array that a kernel has to fill: what it leaves out is not a number."""
    if gaps:
        return np.full((rows, 2 * columns), np.nan, dtype)[:, ::2]
    return np.full((rows, columns), np.nan, dtype)


def operands(rng, rows, depth, columns, dtype, x_order="C", weight_order="C"):
    x = np.asarray(numbers(rng, rows, depth, dtype=dtype), order=x_order)
    weight = np.asarray(numbers(rng, depth, columns, dtype=dtype), order=weight_order)
    return x, weight, numbers(rng, columns, dtype=dtype)


@pytest.mark.parametrize("orders", ["CC", "FC", "CF", "FF"])
def test_as_exact_as_numpy(dtype, orders):
    rng = np.random.default_rng(0)
    precision = precision_of(dtype)
    trusted = np.longdouble if precision == np.float64 else np.float64
    for sizes in SIZES if orders == "CC" else SIZES[::3]:
        x, weight, bias = operands(rng, *sizes, dtype, *orders)
        out = empty(sizes[0], sizes[2], dtype, gaps=orders == "FF")
        compute([Product(x, weight, bias, out)])
        # BLAS sums the products of one row with a matrix stored by columns in many lanes.
        plain = [
            product(np.ascontiguousarray(x), np.ascontiguousarray(weight), bias, precision, matmul)
            for matmul in (np.matmul, reference.matmul_by_einsum)
        ]
        expected = product(x, weight, bias, trusted)
        assert_within(out, [one.astype(dtype) for one in plain], expected, error_factor())


def test_same_bits_alone_in_a_batch_and_for_any_number_of_threads(dtype):
    rng = np.random.default_rng(1)
    for sizes in SIZES:
        x, weight, bias = operands(rng, *sizes, dtype)
        out = project(x, weight, bias, num_threads=1)
        for threads in (2, 3):
            np.testing.assert_array_equal(project(x, weight, bias, num_threads=threads), out)
        by_columns = project(np.asfortranarray(x), np.asfortranarray(weight), bias)
        if _runtime.computations is not _numpy_backend:  # BLAS has other bits for other shapes
            np.testing.assert_array_equal(by_columns, out)
            for some in (slice(0, 1), slice(-1, None), slice(0, 7)):
                np.testing.assert_array_equal(project(x[some], weight, bias), out[some])
                np.testing.assert_array_equal(
                    project(x, weight[:, some].copy(), bias[some]), out[:, some]
                )


def test_several_products_at_once(dtype):
    rng = np.random.default_rng(2)
    products, alone = [], []
    for rows, depth, columns in ((50, 40, 130), (0, 40, 20), (1, 70, 300), (9, 0, 5), (200, 9, 1)):
        x, weight, bias = operands(rng, rows, depth, columns, dtype)
        for of_product in (bias, None):
            products.append(Product(x, weight, of_product, empty(rows, columns, dtype)))
            alone.append(project(x, weight, of_product))
    compute(products, 2)
    for together, one in zip(products, alone, strict=True):
        np.testing.assert_array_equal(together.out, one)
    np.testing.assert_array_equal(products[6].out, np.broadcast_to(products[6].bias, (9, 5)))
    assert not products[7].out.any()


def test_16_bits_are_rounded_once_or_not_at_all(any_backend):
    rng = np.random.default_rng(3)
    for sizes in ((1, 300, 40), (70, 300, 40)):
        x, weight, bias = operands(rng, *sizes, np.float16)
        wide = np.empty((sizes[0], sizes[2]), np.float32)
        project(x, weight, bias, wide)
        np.testing.assert_array_equal(project(x, weight, bias), wide.astype(np.float16))
        assert (wide != wide.astype(np.float16)).any()


def test_nothing_but_its_operands_shows(dtype):
    """What lies around x, the weight and out is neither read into a result nor written."""
    rng = np.random.default_rng(4)
    for rows, depth, columns in ((3, 13, 21), (40, 13, 21), (40, 300, 70)):
        x, weight, bias = operands(rng, rows, depth, columns, dtype)
        framed = []
        for array in (x, weight, np.zeros((rows, columns), dtype)):
            frame = np.full((array.shape[0] + 4, array.shape[1] + 4), np.nan, dtype)
            frame[2:-2, 2:-2] = array
            framed.append(frame)
        inner = [frame[2:-2, 2:-2] for frame in framed]
        compute([Product(inner[0], inner[1], bias, inner[2])])
        np.testing.assert_allclose(
            inner[2].astype(np.float64), project(x, weight, bias).astype(np.float64), rtol=1e-3,
            atol=1e-3,
        )  # fmt: skip
        inner[2][...] = np.nan
        assert np.isnan(framed[2].astype(np.float64)).all()


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("batch", [(), (3,)])
@pytest.mark.parametrize(("head_dim", "rotary_dim"), [(16, 16), (80, 80), (24, 10)])
def test_heads_are_rotated(dtype, interleaved, batch, head_dim, rotary_dim):
    rng = np.random.default_rng(5)
    heads, tokens = 5, (*batch, 4, 7)
    positions = rng.integers(0, 1000, tokens) if batch else None
    rotation = make_rotation(
        (*tokens[:-1], heads, 7, head_dim), dtype, positions, rotary_dim=rotary_dim,
        interleaved=interleaved,
    )  # fmt: skip
    rows = int(np.prod(tokens))
    for count in (rows, 7):  # many rows, few
        x, weight, bias = operands(rng, rows, 40, heads * head_dim, dtype)
        out = np.empty((rows, heads * head_dim), precision_of(dtype))
        of_rows = rotation.of_rows(tokens)
        compute([Product(x[:count], weight, bias, out[:count], of_rows, head_dim)])
        expected = project(x, weight, bias, np.empty_like(out))
        vectors = expected.reshape(*tokens, heads, head_dim).swapaxes(-3, -2)
        rotation.apply(vectors, vectors)
        np.testing.assert_allclose(out[:count], expected[:count], rtol=1e-5, atol=1e-5)


def test_gradients_of_a_product(any_backend):
    rng = np.random.default_rng(6)
    x, d = numbers(rng, 300, 20), numbers(rng, 300, 40)
    np.testing.assert_allclose(weight_gradient(x, d), x.T @ d, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(bias_gradient(d), d.sum(0), rtol=1e-4, atol=1e-4)
    assert not weight_gradient(x[:0], d[:0]).any()
    assert weight_gradient(x[:0], d[:0]).shape == (20, 40)


def test_nan_and_infinity_stay_in_their_rows_and_columns(any_backend):
    rng = np.random.default_rng(7)
    for rows in (4, 40):
        x, weight, bias = operands(rng, rows, 30, 50, np.float32)
        clean = project(x, weight, bias)
        x[1, 3], weight[5, 7] = np.inf, np.nan
        out = project(x, weight, bias)
        bad = np.zeros(out.shape, bool)
        bad[1], bad[:, 7] = True, True
        assert not np.isfinite(out[bad]).any()
        np.testing.assert_allclose(out[~bad], clean[~bad], rtol=1e-5)
