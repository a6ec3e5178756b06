"""Promise: rotary embedding is that of ONNX and of the models that use it."""

import math

import numattn as na
import numpy as np
import pytest
from numattn import _rope_types, _rotary


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


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"rotary_dim": 3}, ValueError, ["rotary_dim", "3", "even"]),
        ({"rotary_dim": 18}, ValueError, ["rotary_dim", "18", "16"]),
        ({"rotary_dim": 2.0}, TypeError, ["rotary_dim", "2.0"]),
        ({"base": 0}, ValueError, ["base", "0"]),
        ({"interleaved": 1}, TypeError, ["interleaved", "1"]),
        ({"inverse": 1}, TypeError, ["inverse", "1"]),
        ({"positions": [1, 2]}, ValueError, ["positions", "(2,)", "9"]),
        ({"positions": np.zeros((3, 9))}, ValueError, ["positions", "(3, 9)", "(2, 9)"]),
        ({"positions": ["a"] * 9}, TypeError, ["positions"]),
        ({"positions": [np.nan] * 9}, ValueError, ["positions", "finite"]),
        ({"scaling": {"type": "moon"}}, ValueError, ["scaling", "moon", "llama3"]),
        (
            {"scaling": {"type": "yarn"}},
            ValueError,
            ["scaling", "original_max", "got nothing", "yarn"],
        ),
        ({"scaling": {"factor": 2}}, ValueError, ["scaling", "rope_type"]),
        ({"scaling": {"type": "linear", "rope_type": "yarn"}}, ValueError, ["rope_type", "yarn"]),
        ({"scaling": {"rope_theta": 5.0}, "base": 6.0}, ValueError, ["base", "5.0", "6.0"]),
        ({"scaling": {"rope_theta": -5.0}}, ValueError, ["rope_theta", "-5.0"]),
        ({"scaling": {"partial_rotary_factor": 2}}, ValueError, ["partial_rotary_factor", "2"]),
        (
            {"scaling": {"partial_rotary_factor": 0.5}, "rotary_dim": 4},
            ValueError,
            ["rotary_dim", "4", "0.5", "8"],
        ),
        ({"frequencies": [1.0] * 9}, ValueError, ["frequencies", "(9,)", "8"]),
        ({"frequencies": [1.0], "base": 5.0}, TypeError, ["frequencies", "base"]),
        ({"frequencies": [np.inf]}, ValueError, ["frequencies", "finite"]),
        ({"frequencies": [1.0], "rotary_dim": 4}, ValueError, ["frequencies", "1", "2"]),
        (
            {
                "scaling": {
                    "type": "longrope",
                    "short_factor": [1.0],
                    "long_factor": [1.0],
                    "factor": 2.0,
                    "original_max_position_embeddings": 4,
                }
            },
            ValueError,
            ["long_factor", "1 numbers", "8"],
        ),
        ({"scaling": {"type": "linear"}}, ValueError, ["scaling", "factor"]),
        ({"scaling": {"type": "linear", "factor": 0}}, ValueError, ["factor", "0"]),
        (
            {"scaling": {"type": "linear", "factor": 1, "scale": 2}},
            ValueError,
            ["got 'scale', exp"],
        ),
        (
            {"scaling": {"type": "default", "mrope_section": [4, 4]}},
            ValueError,
            ["scaling: got 'mrope_section', expected only"],
        ),
        (
            {
                "scaling": {
                    "type": "yarn",
                    "factor": 2,
                    "original_max_position_embeddings": 9,
                    "mscale": [1, 2],
                }
            },
            TypeError,
            ["scaling['mscale']: got [1, 2] (list), expected a real number"],
        ),
        *(
            (
                {
                    "scaling": {
                        "type": "yarn",
                        "factor": 2,
                        "original_max_position_embeddings": 9,
                        "rope_theta": base,
                    }
                },
                ValueError,
                [f"base: got {base}, expected more than 1 with rope_type 'yarn'"],
            )
            for base in (1, 0.5)
        ),
        (
            {"scaling": {"type": "yarn", "original_max_position_embeddings": 9}},
            ValueError,
            ["scaling: got neither 'factor' nor 'max_position_embeddings', expected one"],
        ),
        (
            {
                "scaling": {
                    "type": "longrope",
                    "short_factor": [1.0] * 8,
                    "long_factor": [1.0] * 8,
                    "factor": 2.0,
                    "original_max_position_embeddings": 1,
                }
            },
            ValueError,
            ["scaling['original_max_position_embeddings']: got 1, expected more than 1 token"],
        ),
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


# What configurations have, and what transformers computes for 128 elements; the lengths are seen.
LONG = {
    "short_factor": np.linspace(1, 3, 32).tolist(),
    "long_factor": np.linspace(2, 40, 32).tolist(),
    "original_max_position_embeddings": 4096,
}
ROPE = {
    "default": {"rope_type": "default", "rope_theta": 500.0},
    "linear": {"rope_type": "linear", "factor": 3.0},
    "dynamic": {"rope_type": "dynamic", "factor": 4.0},
    "partial": {"rope_type": "linear", "factor": 2.0, "partial_rotary_factor": 0.5},
    "proportional": {"rope_type": "proportional", "partial_rotary_factor": 0.25, "factor": 2.0},
    "yarn": {
        "rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 2048,
    },
    "yarn of DeepSeek": {
        "rope_type": "yarn", "factor": 40.0, "original_max_position_embeddings": 4096,
        "mscale": 0.8, "mscale_all_dim": 0.4, "beta_fast": 20.0, "beta_slow": 2.0,
    },
    "yarn, one scale": {
        "rope_type": "yarn", "factor": 40.0, "original_max_position_embeddings": 4096,
        "mscale": 0.8, "mscale_all_dim": 0, "beta_fast": 0, "beta_slow": 0,
    },
    "yarn by lengths": {
        "rope_type": "yarn", "factor": None, "original_max_position_embeddings": 1024,
        "max_position_embeddings": 4096, "finetuned": True,
    },
    "linear with lengths": {
        "rope_type": "linear", "factor": 3.0, "max_position_embeddings": 4096,
        "original_max_position_embeddings": 2048, "attention_factor": 1.3,
    },
    "dynamic with lengths": {
        "rope_type": "dynamic", "factor": 4.0, "original_max_position_embeddings": 2048,
        "max_position_embeddings": 4096,
    },
    "yarn, smooth": {
        "rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 2048,
        "truncate": False, "attention_factor": 1.3,
    },
    "longrope": LONG | {"rope_type": "longrope", "factor": 8.0},
    "longrope of Phi": LONG | {"rope_type": "longrope"},
    "llama3": {
        "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192, "rope_theta": 500000.0,
    },
}  # fmt: skip


@pytest.mark.parametrize("name", ROPE)
@pytest.mark.parametrize("length", [100, 9000])
def test_frequencies_of_transformers(name, length):
    rope = pytest.importorskip("transformers.modeling_rope_utils")
    from transformers import LlamaConfig

    given = {"rope_theta": 10000.0} | ROPE[name]
    config = LlamaConfig(
        hidden_size=256, num_attention_heads=4, head_dim=64, max_position_embeddings=4096,
        rope_parameters=dict(given),
    )  # fmt: skip
    if given["rope_type"] == "default":
        expected = 500.0 ** (-np.arange(0, 64, 2) / 64)
        factor = 1.0
    else:
        compute = rope.ROPE_INIT_FUNCTIONS[given["rope_type"]]
        frequencies, factor = compute(config, "cpu", seq_len=length)
        expected = frequencies.double().numpy()
    mapping = dict(given)
    if name in ("dynamic", "longrope of Phi"):
        mapping["max_position_embeddings"] = 4096
    kind, share = _rope_types.rope_type(mapping, None)
    waves = kind.waves(int(64 * share), length)
    np.testing.assert_allclose(waves.frequencies, expected, rtol=2e-6)
    assert waves.attention_factor == pytest.approx(float(factor), rel=1e-6)


@pytest.mark.parametrize("name", ROPE)
def test_every_type_rotates_by_its_frequencies(backend, rng, name):
    x = rng.standard_normal((2, 3, 50, 64), dtype=np.float32)
    mapping = dict(ROPE[name])
    if name in ("dynamic", "longrope of Phi"):
        mapping["max_position_embeddings"] = 16384 if "longrope" in name else 30
    kind, share = _rope_types.rope_type(mapping, None)
    waves = kind.waves(int(64 * share), 50)
    pairs = len(waves.frequencies)
    angles = np.arange(50)[:, np.newaxis] * waves.frequencies
    a, b = (x[..., i * pairs : (i + 1) * pairs].astype(np.float64) for i in (0, 1))
    expected = x.astype(np.float64)
    expected[..., :pairs] = waves.attention_factor * (a * np.cos(angles) - b * np.sin(angles))
    expected[..., pairs : 2 * pairs] = waves.attention_factor * (
        b * np.cos(angles) + a * np.sin(angles)
    )
    out = na.rotary_embedding(x, scaling=mapping)
    np.testing.assert_allclose(out, expected, rtol=0, atol=2e-5)
    if waves.attention_factor == 1:
        same = na.rotary_embedding(x, frequencies=waves.frequencies)
        np.testing.assert_array_equal(same, out)


def test_dynamic_waves_follow_the_length():
    """As published: the base grows with the length beyond what was trained with."""
    mapping = {"rope_type": "dynamic", "factor": 2.0, "max_position_embeddings": 100}
    kind, _ = _rope_types.rope_type(mapping, None)
    short, long = kind.waves(4, 50), kind.waves(4, 300)
    np.testing.assert_allclose(short.frequencies, [1, 0.01])
    np.testing.assert_allclose(long.frequencies, [1, 1 / np.sqrt(10000 * (2 * 3 - 1) ** 2)])
    x = np.ones((1, 4), np.float32)
    far = na.rotary_embedding(x, [299], scaling=mapping)
    np.testing.assert_allclose(
        far, na.rotary_embedding(x, [299], frequencies=long.frequencies), rtol=1e-6
    )


def test_tables_are_extended_and_bounded(rng, monkeypatch):
    computed = []
    angles = _rotary._angles

    def counted(waves, positions, precision):
        computed.append(positions.size)
        return angles(waves, positions, precision)

    monkeypatch.setattr(_rotary, "_angles", counted)
    monkeypatch.setattr(_rotary, "_tables", _rotary._Tables(1 << 20))
    x = rng.standard_normal((1, 700, 64), dtype=np.float32)
    outs = {n: na.rotary_embedding(x[:, :n]) for n in (500, 499, 501, 700, 3)}
    assert computed == [500, 1, 199]
    for n, out in outs.items():
        fresh = na.rotary_embedding(x[:, :n], np.arange(n))
        np.testing.assert_array_equal(out, fresh)
    for base in range(2, 40):
        na.rotary_embedding(x, base=float(base))
    assert 0 < _rotary._tables.nbytes <= 1 << 20
    huge = np.zeros((1, 9000, 64), np.float32)
    na.rotary_embedding(huge)  # more than is kept
    assert _rotary._tables.nbytes <= 1 << 20
    assert not _rotary._tables.of(_rope_types.Waves(np.ones(2), 1.0), 0, np.float32)[0].size


def test_of_a_table_that_is_too_large_the_beginning_is_kept(rng, monkeypatch):
    computed = []
    angles = _rotary._angles

    def counted(waves, positions, precision):
        if len(computed) == 6:
            raise MemoryError
        computed.append(positions.size)
        return angles(waves, positions, precision)

    monkeypatch.setattr(_rotary, "_angles", counted)
    monkeypatch.setattr(_rotary, "_tables", _rotary._Tables(1 << 20))  # 4096 positions of 64
    x = rng.standard_normal((1, 9000, 64), dtype=np.float32)
    lengths = (1000, 5000, 5000, 4096, 1000, 9000, 4000)
    outs = {n: na.rotary_embedding(x[:, :n]) for n in lengths}
    assert computed == [1000, 4000, 5000 - 4096, 9000 - 4096]
    assert _rotary._tables.nbytes == 1 << 20
    for base in (5.0, 6.0):  # which has not been there before, and another one in its place
        assert na.rotary_embedding(x, base=base).shape == x.shape
    assert computed[4:] == [9000, 9000]
    assert _rotary._tables.nbytes == 1 << 20
    with pytest.raises(MemoryError):
        na.rotary_embedding(x, base=6.0)
    na.rotary_embedding(x[:, :4096], base=6.0)  # is still there
    monkeypatch.undo()
    for n, out in outs.items():
        fresh = na.rotary_embedding(x[:, :n], np.arange(n))
        np.testing.assert_array_equal(out, fresh)


def test_numpy_s_error_state_changes_nothing(backend, rng):
    x = (rng.standard_normal((1, 5, 8)) * 1e-38).astype(np.float32)
    calls = [
        {"base": 1e300}, {"positions": [1e-320] * 5}, {"positions": [1e300] * 5}, {},
        {"scaling": {"type": "linear", "factor": 1e300}},
    ]  # fmt: skip
    for options in calls:
        plain = na.rotary_embedding(x, **options)
        with np.errstate(all="raise"):
            np.testing.assert_array_equal(na.rotary_embedding(x, **options), plain)


YARN = {"type": "yarn", "factor": 8.0, "original_max_position_embeddings": 2048}


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"base": 500.0, "rotary_dim": 10},
        {"interleaved": True},
        {"interleaved": True, "rotary_dim": 4, "positions": [[3, 1, 4, 1, 5], [9, 2, 6, 5, 3]]},
        {"positions": [-2.5, 0, 1e5, 7, 7]},
        {"frequencies": [1.0, 0.0, -0.3]},
        {"scaling": {"type": "linear", "factor": 4}},
        {"scaling": {"type": "llama3"}},
    ],
    ids=str,
)
def test_inverse_turns_back(dtype, rng, options):
    x = rng.standard_normal((2, 3, 5, 16)).astype(dtype)
    out = na.rotary_embedding(x, **options)
    back = na.rotary_embedding(out, **options, inverse=True)
    assert_rotated(back, x, dtype)
    np.testing.assert_array_equal(na.rotary_embedding(x, **options), out)  # of the same tables
    # By the negative angles.
    negative = {"positions": -np.asarray(options.get("positions", np.arange(5)), np.float64)}
    np.testing.assert_array_equal(back, na.rotary_embedding(out, **options | negative))


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"interleaved": True, "rotary_dim": 6},
        {"positions": [5.5, 1000.0, 3.0]},
        {"scaling": YARN},
        {"scaling": YARN | {"attention_factor": 3.0}, "positions": [5, 1000, 3]},
    ],
    ids=str,
)
def test_inverse_is_the_transpose(any_backend, rng, options):
    dim = 8
    each = np.tile(np.eye(dim)[:, np.newaxis], (3, 1))  # (vectors, L, D)
    matrix = na.rotary_embedding(each, **options)
    transposed = na.rotary_embedding(each, **options, inverse=True)
    np.testing.assert_allclose(transposed, matrix.transpose(2, 1, 0), rtol=0, atol=1e-15)
    x, y = rng.standard_normal((2, 4, 3, dim))
    turned = na.rotary_embedding(x, **options)
    back = na.rotary_embedding(y, **options, inverse=True)
    np.testing.assert_allclose((turned * y).sum(), (x * back).sum(), rtol=1e-12)


def test_inverse_scales_as_the_rotation_does(backend, rng):
    x = rng.standard_normal((2, 9, 16), dtype=np.float32)
    factor = 0.1 * math.log(YARN["factor"]) + 1
    back = na.rotary_embedding(na.rotary_embedding(x, scaling=YARN), scaling=YARN, inverse=True)
    np.testing.assert_allclose(back, factor**2 * x, rtol=0, atol=1e-5)


def test_inverse_with_layouts_and_out(backend, rng):
    x = rng.standard_normal((2, 4, 9, 16), dtype=np.float32)
    positions = rng.integers(0, 5000, (2, 9))
    expected = na.rotary_embedding(x, -positions)
    moved = na.rotary_embedding(x.swapaxes(1, 2), positions, layout="blhd", inverse=True)
    np.testing.assert_array_equal(moved.swapaxes(1, 2), expected)
    in_place = x.copy()
    assert na.rotary_embedding(in_place, positions, out=in_place, inverse=np.True_) is in_place
    np.testing.assert_array_equal(in_place, expected)
    np.testing.assert_array_equal(na.rotary_embedding(x[:, :, :0], inverse=True), x[:, :, :0])
