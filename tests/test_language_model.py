"""Promise: the small language model of the examples has the gradients of its loss, and learns."""

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numattn as na
import numpy as np
import pytest

EXAMPLES = Path(__file__).parent.parent / "examples"
EXAMPLE = EXAMPLES / "language_model.py"
with pytest.MonkeyPatch.context() as _patch:
    # Where the examples find each other; and one of them sets a variable of the whole process.
    _patch.syspath_prepend(EXAMPLES)
    _patch.setenv("OPENBLAS_NUM_THREADS", "1")
    import gpt
    import language_model as example

CHARACTERS = "?abcdefg"


def tiny(dtype="float64", **sizes):
    """Return a model in which nothing is 0 or 1 any more."""
    sizes = {"dim": 8, "layers": 2, "heads": 2, "kv_heads": 1} | sizes
    model = gpt.GPT(gpt.Vocabulary(CHARACTERS), **sizes, dtype=np.dtype(dtype).type)
    rng = np.random.default_rng(1)
    for x in model.parameters().values():
        x += (0.2 * rng.standard_normal(x.shape)).astype(dtype)
    return model


def characters(rng, *shape):
    return rng.integers(0, len(CHARACTERS), shape)


def test_gradients_are_the_differences_of_the_loss(rng):
    """Every parameter along a direction of its own, and all of them together."""
    model = tiny()
    tokens, targets = characters(rng, 2, 3, 7)
    _, gradients = model.loss_and_gradients(tokens, targets)
    parameters = model.parameters()
    assert gradients.keys() == parameters.keys()
    for names in [*([name] for name in parameters), list(parameters)]:
        direction = {name: rng.standard_normal(parameters[name].shape) for name in names}

        def loss_at(distance, direction=direction):
            for name, d in direction.items():
                parameters[name] += distance * d
            loss, _ = model.loss_and_gradients(tokens, targets)
            for name, d in direction.items():
                parameters[name] -= distance * d
            return loss

        step = 2e-6
        expected = (loss_at(step) - loss_at(-step)) / (2 * step)
        found = sum(np.vdot(gradients[name], direction[name]) for name in names)
        assert found == pytest.approx(expected, rel=1e-6, abs=1e-9), names


def test_the_loss_is_that_of_the_logits(rng):
    model = tiny()
    tokens, targets = characters(rng, 2, 3, 7)
    p = np.exp(model.logits(tokens))
    p /= p.sum(axis=-1, keepdims=True)
    expected = -np.log(np.take_along_axis(p, targets[..., np.newaxis], axis=-1)).mean()
    assert model.loss_and_gradients(tokens, targets)[0] == pytest.approx(expected, rel=1e-12)


def test_halves_of_a_batch_give_the_gradients_of_the_whole(rng):
    model = tiny()
    tokens, targets = characters(rng, 2, 4, 7)
    loss, gradients = model.loss_and_gradients(tokens, targets)
    with ThreadPoolExecutor(2) as pool:
        of_halves, other = example.shared_gradients(model, pool, tokens, targets)
    assert of_halves == pytest.approx(loss, rel=1e-12)
    for name, d in gradients.items():
        np.testing.assert_allclose(other[name], d, rtol=1e-9, atol=1e-12)


def test_the_loss_falls(capsys):
    text = np.array([1, 2, 3, 4] * 100)
    model = tiny("float32")
    before, _ = model.loss_and_gradients(text[np.newaxis, :32], text[np.newaxis, 1:33])
    with ThreadPoolExecutor(2) as pool:
        example.train(model, text, pool, steps=100)
    after, _ = model.loss_and_gradients(text[np.newaxis, :32], text[np.newaxis, 1:33])
    assert after < before / 4
    assert "100 steps" in capsys.readouterr().out


def test_characters_with_a_cache_are_those_of_the_whole_text(rng):
    model = tiny()
    tokens = characters(rng, 1, 12)
    whole = model.logits(tokens)
    caches = model.new_caches(window=12)
    steps = [model.logits(tokens[:, :5], caches)]
    steps += [model.logits(tokens[:, i : i + 1], caches) for i in range(5, 12)]
    np.testing.assert_allclose(np.concatenate(steps, axis=1), whole, rtol=1e-9, atol=1e-9)
    assert len(example.write(model, "abc", 150, np.random.default_rng(0))) == 150


def test_what_is_saved_is_loaded_to_the_bit(tmp_path, rng):
    pytest.importorskip("safetensors")
    model = tiny("float32")
    model.save(tmp_path / "model.safetensors")
    loaded = gpt.GPT.load(tmp_path / "model.safetensors")
    assert (loaded.sizes, loaded.vocabulary.characters) == (model.sizes, CHARACTERS)
    for name, x in loaded.parameters().items():
        assert x.tobytes() == model.parameters()[name].tobytes(), name
    tokens = characters(rng, 2, 9)
    assert loaded.logits(tokens).tobytes() == model.logits(tokens).tobytes()


def test_another_file_is_no_model(tmp_path):
    pytest.importorskip("safetensors")
    path = tmp_path / "layer.safetensors"
    na.MultiHeadAttention(8, 2).save(path)
    with pytest.raises(SystemExit, match="not written by --save"):
        gpt.GPT.load(path)


def test_a_prediction_sees_the_context_and_no_more(rng):
    """Characters before it change nothing; the first one in it does."""
    model = tiny()
    text = characters(rng, 400)
    with ThreadPoolExecutor(1) as pool:
        cost = example.held_out_bits(model, text, pool, context=8, count=1)
        for place, matters in ((119, False), (120, True), (127, True), (129, False)):
            other = text.copy()
            other[place] = (other[place] + 1) % len(CHARACTERS)
            changed = example.held_out_bits(model, other, pool, context=8, count=1)
            assert (changed != cost) == matters, place


def test_counted_characters_and_pairs():
    text = np.array([0, 1, 2, 3] * 100)
    single, pairs = example.counted_bits(text, text, characters=4, count=50)
    assert single == pytest.approx(2, abs=0.02)
    assert 0 < pairs < 0.05


def test_repeated_paragraphs_are_in_the_text_once():
    paragraphs = [" ".join(x.split()) for x in example.read_text().split("\n\n")]
    assert len(set(paragraphs)) > len(paragraphs) - 2
    assert sum(map(len, paragraphs)) > 200_000


def test_the_program(tmp_path):
    pytest.importorskip("matplotlib")
    pytest.importorskip("safetensors")
    weights, picture = tmp_path / "weights", tmp_path / "picture.png"
    options = ["--count", "16", "--characters", "20"]
    trained = run("--steps", "4", "--save", weights, "--picture", picture, *options)
    assert "held out" in trained
    assert "the last 128 characters" in trained
    assert picture.read_bytes().startswith(b"\x89PNG")
    # The same weights predict and write the same.
    loaded = run("--load", weights, "--no-picture", *options)
    results = loaded.partition("held-out")[2]
    assert results
    assert trained.partition("held-out")[2].startswith(results)


def test_missing_packages_are_named_first(tmp_path):
    code = (
        "import runpy, sys; sys.modules['matplotlib'] = None; sys.modules['safetensors'] = None\n"
        f"sys.path.insert(0, {str(EXAMPLES)!r})\n"
        f"runpy.run_path({str(EXAMPLE)!r}, run_name='__main__')"
    )
    for options, package in (
        (["--no-picture", "--save", "x"], "numattn[weights]"),
        ([], "numattn[plot]"),
    ):
        done = subprocess.run(
            [sys.executable, "-c", code, *options], cwd=tmp_path, capture_output=True, text=True
        )
        assert done.returncode == 1
        assert f"pip install '{package}'" in done.stderr
        assert done.stdout == ""


def run(*options):
    command = [sys.executable, EXAMPLE, *options]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout
