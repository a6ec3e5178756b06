"""Promise: the search of the examples finds passages by their meaning, and says where they are."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from checks import needs_model

EXAMPLES = Path(__file__).parent.parent / "examples"
EXAMPLE = EXAMPLES / "search.py"
with pytest.MonkeyPatch.context() as _patch:
    _patch.syspath_prepend(EXAMPLES)
    import search as example

TEXT = """\
Lamps
=====

Wipe the shade with a dry cloth, and never use water on it.

Sending it back
---------------
Returns are free within 30 days. Print the label and drop the
parcel at any post office.

Short end.
"""


def test_passages_are_paragraphs_with_their_headings():
    passages = list(example.split(Path("a.rst"), TEXT))
    assert [(x.line, x.text[:22], x.text[-7:]) for x in passages] == [
        (1, "Lamps Wipe the shade w", " on it."),
        (6, "Sending it back Return", "office."),
        (11, "Short end.", "rt end."),
    ]


@pytest.mark.parametrize(("text", "count"), [("", 0), (" \n\n ", 0), ("One.", 1), ("a b\n\nc", 1)])
def test_passages_of_short_texts(text, count):
    passages = list(example.split(Path("a"), text))
    assert len(passages) == count
    assert " ".join(x.text for x in passages).split() == text.split()


def test_long_paragraphs_are_cut():
    words = [f"word{i}" for i in range(2 * example.MOST_WORDS + 5)]
    passages = list(example.split(Path("a"), "\n" + "\n".join(words)))
    assert [len(x.text.split()) for x in passages] == [example.MOST_WORDS] * 2 + [5]
    assert " ".join(x.text for x in passages).split() == words
    assert {x.line for x in passages} == {2}


def test_files_of_a_folder(tmp_path):
    for name in ("b.md", "a.TXT", "deep/c.rst", "d.py", ".hidden/e.md"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"caf\xe9 text")
    found = [x.relative_to(tmp_path).as_posix() for x in example.find_files(tmp_path)]
    assert found == ["a.TXT", "b.md", "deep/c.rst"]
    assert example.find_files(tmp_path / "d.py") == [tmp_path / "d.py"]
    assert len(example.read_passages(tmp_path)) == 3  # whatever the bytes


def test_embeddings_are_in_the_order_of_the_texts():
    class Model:
        def encode(self, texts):
            return np.array([[len(text), int(text.split()[0])] for text in texts])

    rng = np.random.default_rng(0)
    texts = [f"{i} " + "x" * rng.integers(100) for i in range(3 * example.TEXTS_AT_A_TIME + 1)]
    found = example.embed(Model(), texts)
    assert found.tolist() == [[len(text), i] for i, text in enumerate(texts)]


def run(*options, text=""):
    return subprocess.run(
        [sys.executable, EXAMPLE, *options], input=text, capture_output=True, text=True, check=False
    )


@needs_model
def test_the_program(tmp_path):
    (tmp_path / "shop.rst").write_text(TEXT, encoding="utf-8")
    done = run(tmp_path, "Can I get my money back if I do not like it?", "--count", "1")
    assert done.returncode == 0, done.stderr
    first, *rest = done.stdout.strip().splitlines()
    assert first.endswith("shop.rst:6")
    assert 0 < float(first.split()[0]) < 1
    assert "Returns are free" in " ".join(rest)


@needs_model
def test_the_program_asks(tmp_path):
    (tmp_path / "shop.rst").write_text(TEXT, encoding="utf-8")
    for end in ("\n\n", "\n"):  # an empty line, and the end of the input
        done = run(tmp_path / "shop.rst", text="How do I clean it?" + end)
        assert done.returncode == 0, done.stderr
        assert done.stdout.count("shop.rst:") == 3
        assert done.stdout.index("shop.rst:1\n") < done.stdout.index("shop.rst:6\n")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["nowhere", "x"], "nowhere: no such file or folder"),
        ([".", "x", "--count", "0"], "--count 0: expected 1 or more"),
        (["empty", "x"], r"empty: no text in it (.md, .rst, .txt)"),
    ],
)
def test_what_is_refused(options, message, tmp_path, monkeypatch):
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path)
    done = run(*options)
    assert done.returncode == 2
    assert message in done.stderr
