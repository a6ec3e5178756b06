"""Promise: the function of docs/keras.rst is attention to Keras' layers on NumPy."""

import numpy as np
import pytest
from pages import run_page


@pytest.fixture(scope="module")
def keras(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("KERAS_BACKEND", "numpy")
        patch.setenv("KERAS_HOME", str(tmp_path_factory.mktemp("keras")))
        module = pytest.importorskip("keras")
        if module.config.backend() != "numpy":
            pytest.skip("Keras was imported with another backend")
        yield module


@pytest.fixture(scope="module")
def attention(keras):
    names, failed = run_page("keras.rst")
    assert failed == 0
    assert names["keras"].src.backend.nn.dot_product_attention is names["own"]
    return names["attention"]


@pytest.fixture
def with_both(keras, attention, monkeypatch):
    """Return what computes with numattn and with Keras, and how often numattn was asked."""

    def compute(function):
        calls = []

        def counted(*arguments, **options):
            calls.append(options)
            return attention(*arguments, **options)

        theirs = function()
        with monkeypatch.context() as patch:
            patch.setattr(keras.src.backend.nn, "dot_product_attention", counted)
            ours = function()
        assert len(calls) == 1
        return np.asarray(ours), np.asarray(theirs)

    return compute


@pytest.mark.parametrize("layer", ["MultiHeadAttention", "GroupQueryAttention"])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("lengths", [(20, 20), (7, 20), (20, 7)])
def test_layers(keras, with_both, rng, layer, masked, causal, lengths):
    x, y = (rng.standard_normal((2, length, 32), dtype=np.float32) for length in lengths)
    sizes = {
        "MultiHeadAttention": {"num_heads": 4, "key_dim": 8},
        "GroupQueryAttention": {"num_query_heads": 4, "num_key_value_heads": 2, "head_dim": 8},
    }
    made = getattr(keras.layers, layer)(**sizes[layer])
    mask = None
    if masked:
        mask = rng.random((2, *lengths)) < 0.7
        mask[:, :, 0] = True
    ours, theirs = with_both(lambda: made(x, y, attention_mask=mask, use_causal_mask=causal))
    np.testing.assert_allclose(ours, theirs, atol=2e-6)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_the_function_itself(keras, with_both, rng, dtype):
    q, k, v = (
        keras.ops.cast(rng.standard_normal((2, length, 4, 8)), dtype) for length in (9, 20, 20)
    )
    options = {"bias": rng.standard_normal((2, 4, 9, 20), dtype=np.float32), "scale": 0.3}
    ours, theirs = with_both(lambda: keras.ops.dot_product_attention(q, k, v, **options))
    assert ours.dtype == theirs.dtype == dtype
    tolerance = {"float32": 2e-6, "float16": 3e-3, "bfloat16": 3e-2}[dtype]
    np.testing.assert_allclose(ours.astype(np.float32), theirs.astype(np.float32), atol=tolerance)
