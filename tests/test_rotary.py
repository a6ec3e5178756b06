"""Promise: rotary embedding is that of ONNX and of the models that use it."""

import math
import warnings

import numattn as na
import numpy as np
import pytest


def rotated(x, positions, base=10000.0, rotary_dim=None, interleaved=False, frequencies=None):
    """Rotate complex numbers in long double; x is (..., L, D)."""
    x = x.astype(np.longdouble)
    r = rotary_dim or x.shape[-1]
    if frequencies is None:
        frequencies = np.longdouble(base) ** (-np.arange(0, r, 2, dtype=np.longdouble) / r)
    angles = np.asarray(positions, np.longdouble)[..., None] * frequencies
    turn = np.cos(angles) + 1j * np.sin(angles)
    pairs = (
        (slice(0, r, 2), slice(1, r, 2)) if interleaved else (slice(0, r // 2), slice(r // 2, r))
    )
    z = (x[..., pairs[0]] + 1j * x[..., pairs[1]]) * turn
    out = x.copy()
    out[..., pairs[0]], out[..., pairs[1]] = z.real, z.imag
    return out


def assert_rotated(out, expected, dtype):
    assert out.dtype == dtype
    bound = {8: 1e-13, 4: 2e-6, 2: 4e-3 if dtype == np.float16 else 4e-2}[dtype.itemsize]
    np.testing.assert_allclose(out.astype(float), expected.astype(float), rtol=0, atol=bound)


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("dim", [2, 6, 16, 34, 64, 130])
def test_every_size(dtype, rng, dim, interleaved):
    x = rng.standard_normal((2, 3, 17, dim)).astype(dtype)
    out = na.rotary_embedding(x, interleaved=interleaved)
    assert_rotated(out, rotated(x, np.arange(17), interleaved=interleaved), dtype)


@pytest.mark.parametrize("rotary_dim", [2, 10, 16, 20])
@pytest.mark.parametrize("interleaved", [False, True])
def test_partly(backend, rng, rotary_dim, interleaved):
    x = rng.standard_normal((3, 9, 20), dtype=np.float32)
    out = na.rotary_embedding(x, rotary_dim=rotary_dim, interleaved=interleaved, base=500.0)
    expected = rotated(x, np.arange(9), 500.0, rotary_dim, interleaved)
    assert_rotated(out, expected, x.dtype)
    np.testing.assert_array_equal(out[..., rotary_dim:], x[..., rotary_dim:])


def test_positions_layouts_and_strides(backend, rng):
    x = rng.standard_normal((2, 4, 9, 16), dtype=np.float32)
    positions = rng.integers(0, 5000, (2, 9))
    expected = rotated(x, positions[:, None])
    bound = 1e-6
    np.testing.assert_allclose(na.rotary_embedding(x, positions), expected, atol=bound, rtol=0)
    moved = na.rotary_embedding(x.swapaxes(1, 2), positions, layout="blhd")
    np.testing.assert_allclose(moved.swapaxes(1, 2), expected, atol=bound, rtol=0)
    reversed_ = na.rotary_embedding(x[:, ::-1, :, ::-1][..., ::-1], positions)
    np.testing.assert_allclose(reversed_, expected[:, ::-1], atol=bound, rtol=0)
    alone = na.rotary_embedding(x[0, 0], positions[0])
    np.testing.assert_allclose(alone, expected[0, 0], atol=bound, rtol=0)
    in_place = x.copy()
    assert na.rotary_embedding(in_place, positions, out=in_place) is in_place
    np.testing.assert_allclose(in_place, expected, atol=bound, rtol=0)
    strided = np.empty((2, 4, 9, 32), np.float32)[..., ::2]
    na.rotary_embedding(x, positions, out=strided)
    np.testing.assert_allclose(strided, expected, atol=bound, rtol=0)


def test_scores_depend_on_distances_alone(backend, rng):
    q, k = rng.standard_normal((2, 1, 64), dtype=np.float32)
    scores = np.array(
        [na.rotary_embedding(q, [p + 7]) @ na.rotary_embedding(k, [p]).T for p in (0, 100, 30000)]
    )
    np.testing.assert_allclose(scores, np.broadcast_to(scores[0], scores.shape), atol=1e-4)


def test_scaling(backend, rng):
    x = rng.standard_normal((4, 9, 16), dtype=np.float32)
    linear = na.rotary_embedding(x, scaling={"type": "linear", "factor": 4})
    np.testing.assert_allclose(linear, rotated(x, np.arange(9) / 4), atol=1e-6, rtol=0)

    # Llama 3.1 as its reference code has it, one wave at a time.
    frequencies = []
    for i in range(8):
        frequency = 500000.0 ** (-2 * i / 16)
        length = 2 * math.pi / frequency
        if length < 8192 / 4:
            frequencies.append(frequency)
        elif length > 8192 / 1:
            frequencies.append(frequency / 8)
        else:
            smooth = (8192 / length - 1) / (4 - 1)
            frequencies.append((1 - smooth) * frequency / 8 + smooth * frequency)
    assert len({f > g for f, g in zip(frequencies, 500000.0 ** (-np.arange(8) / 8), strict=True)})
    positions = np.arange(9) * 1000
    out = na.rotary_embedding(x, positions, base=500000.0, scaling={"rope_type": "llama3"})
    expected = rotated(x, positions, frequencies=np.array(frequencies, np.longdouble))
    np.testing.assert_allclose(out, expected, atol=2e-6, rtol=0)


def test_onnx_cases(any_backend):
    onnx = pytest.importorskip("onnx")
    node = pytest.importorskip("onnx.backend.test.case.node")
    with warnings.catch_warnings():  # it makes the cases of all operators
        warnings.simplefilter("ignore")
        cases = [c for c in node.collect_testcases("RotaryEmbedding") if "expanded" not in c.name]
    assert len(cases) >= 5
    for case in cases:
        attributes = {
            a.name: onnx.helper.get_attribute_value(a) for a in case.model.graph.node[0].attribute
        }
        for inputs, outputs in case.data_sets:
            x, cos, sin, *ids = inputs
            heads = attributes.get("num_heads", 0)
            shape = x.shape
            if x.ndim == 3:  # (batch, length, hidden)
                x = x.reshape(shape[0], shape[1], heads, -1).swapaxes(1, 2)
            if ids:
                cos, sin = cos[ids[0]], sin[ids[0]]
            # Its angles are arrays of any numbers, ours those of positions: what lies below.
            out = np.empty_like(x)
            angles = (
                np.broadcast_to(a[:, np.newaxis], (*x.shape[:-1], a.shape[-1])) for a in (cos, sin)
            )
            interleaved = bool(attributes.get("interleaved", 0))
            na._runtime.computations.rotate(x, *angles, out, interleaved)
            if len(shape) == 3:
                out = out.swapaxes(1, 2).reshape(shape)
            np.testing.assert_allclose(out, outputs[0], rtol=1e-5, atol=1e-6, err_msg=case.name)


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"rotary_dim": 3}, ValueError, ["rotary_dim", "3", "even"]),
        ({"rotary_dim": 18}, ValueError, ["rotary_dim", "18", "16"]),
        ({"rotary_dim": 2.0}, TypeError, ["rotary_dim", "2.0"]),
        ({"base": 0}, ValueError, ["base", "0"]),
        ({"interleaved": 1}, TypeError, ["interleaved", "1"]),
        ({"positions": [1, 2]}, ValueError, ["positions", "(2,)", "9"]),
        ({"positions": np.zeros((3, 9))}, ValueError, ["positions", "(3, 9)", "(2, 9)"]),
        ({"positions": ["a"] * 9}, TypeError, ["positions"]),
        ({"positions": [np.nan] * 9}, ValueError, ["positions", "finite"]),
        ({"scaling": {"type": "yarn"}}, ValueError, ["scaling", "yarn", "llama3"]),
        ({"scaling": {"type": "linear"}}, ValueError, ["scaling", "factor"]),
        ({"scaling": {"type": "linear", "factor": 0}}, ValueError, ["factor", "0"]),
        ({"scaling": {"type": "linear", "scale": 2}}, ValueError, ["scaling", "scale"]),
        ({"scaling": 3}, TypeError, ["scaling", "int"]),
        ({"layout": "lbd"}, ValueError, ["layout", "lbd"]),
        ({"out": np.zeros(3, np.float32)}, ValueError, ["out", "(3,)"]),
    ],
    ids=str,
)
def test_bad_input(rng, options, error, words):
    x = rng.standard_normal((2, 4, 9, 16), dtype=np.float32)
    with pytest.raises(error) as caught:
        na.rotary_embedding(x, **options)
    for word in words:
        assert word in str(caught.value)


def test_x_of_a_wrong_kind():
    with pytest.raises(TypeError, match="x: got dtype int64"):
        na.rotary_embedding(np.zeros((3, 4), int))
    with pytest.raises(ValueError, match=r"x: got shape \(4,\)"):
        na.rotary_embedding(np.zeros(4))
