"""Search your own texts by meaning: `python examples/search.py PATH "question"`.

PATH is a file, or a folder with .txt, .md and .rst files. Each passage is a paragraph. The program
prints the passages whose meaning is nearest to the question, with the cosine between both. Without
a question on the command line, it asks for questions. The model, `numattn.demo.MiniLM`, knows
English.
"""

from __future__ import annotations

import argparse
import re
import sys
import textwrap
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numattn.demo import MiniLM

SUFFIXES = {".txt", ".md", ".rst"}
FEWEST_WORDS = 8  # of a passage; headings have fewer
MOST_WORDS = 150  # of a passage; the model reads 512 tokens and was trained on shorter texts
UNDERLINE = re.compile(r"[^\w\s]{3,}")  # of a heading
TEXTS_AT_A_TIME = 256  # from one step of the progress bar to the next


class Passage(NamedTuple):
    path: Path
    line: int  # where it begins, from 1 on
    text: str


# ---- passages ----------------------------------------------------------------------------------


def find_files(path: Path) -> list[Path]:
    """Return a file itself, or the texts of a folder; hidden ones are left out."""
    if path.is_file():
        return [path]
    found = (x for x in path.rglob("*") if x.suffix.lower() in SUFFIXES and x.is_file())
    return sorted(
        x for x in found if not any(part.startswith(".") for part in x.relative_to(path).parts)
    )


def split(path: Path, text: str):
    """Yield the paragraphs of a text, headings with what follows them, long ones in parts."""
    words, line = [], 1
    found = re.finditer(r"\S.*?(?=\n\s*\n|\s*\Z)", text, re.DOTALL)
    paragraphs = [one for one in found if not one[0].startswith((".. ", ">>>"))]  # not markup, code
    for i, paragraph in enumerate(paragraphs):
        if not words:
            line = 1 + text.count("\n", 0, paragraph.start())
        words += (word for word in paragraph[0].split() if not UNDERLINE.fullmatch(word))
        if len(words) < FEWEST_WORDS and i + 1 < len(paragraphs):
            continue
        for begin in range(0, len(words), MOST_WORDS):
            yield Passage(path, line, " ".join(words[begin : begin + MOST_WORDS]))
        words = []


def read_passages(path: Path) -> list[Passage]:
    texts = ((x, x.read_text(encoding="utf-8", errors="replace")) for x in find_files(path))
    return [passage for file, text in texts for passage in split(file, text)]


# ---- embeddings --------------------------------------------------------------------------------


def embed(model, texts: list[str]) -> np.ndarray:
    """Return the embeddings of texts, (texts, 384), and show the progress."""
    parts = []
    for begin in range(0, len(texts), TEXTS_AT_A_TIME):
        parts.append(model.encode(texts[begin : begin + TEXTS_AT_A_TIME]))
        progress(min(begin + TEXTS_AT_A_TIME, len(texts)), len(texts))
    return np.concatenate(parts)


def progress(done: int, all_: int) -> None:
    if sys.stderr.isatty():
        bar = "#" * (30 * done // all_)
        sys.stderr.write(f"\r\033[K[{bar:30}] {done} passages" + ("\n" if done == all_ else ""))


# ---- the program -------------------------------------------------------------------------------


def answer(model, passages: list[Passage], embeddings: np.ndarray, question: str, count: int):
    """Print the passages nearest to a question, the nearest first."""
    cosines = embeddings @ model.encode([question])[0]
    for i in np.argsort(-cosines)[:count]:
        print(f"\n{cosines[i]:.2f}  {passages[i].path}:{passages[i].line}")
        print(textwrap.indent(textwrap.fill(passages[i].text, 90), "      "))


def questions(given: str | None):
    if given is not None:
        yield given
        return
    try:
        while question := input("\nYour question (Enter to end): ").strip():
            yield question
    except EOFError:
        print()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("path", metavar="PATH", type=Path, help="a folder of texts, or a file")
    parser.add_argument("question", nargs="?", help="without it, the program asks for questions")
    parser.add_argument("--count", type=int, default=3, help="passages to print (default: 3)")
    arguments = parser.parse_args()
    if not arguments.path.exists():
        parser.error(f"{arguments.path}: no such file or folder")
    if arguments.count < 1:
        parser.error(f"--count {arguments.count}: expected 1 or more")
    passages = read_passages(arguments.path)
    if not passages:
        parser.error(f"{arguments.path}: no text in it ({', '.join(sorted(SUFFIXES))})")

    try:
        model = MiniLM()
    except ImportError as error:  # says what to install
        raise SystemExit(str(error)) from None
    embeddings = embed(model, [passage.text for passage in passages])
    for question in questions(arguments.question):
        answer(model, passages, embeddings, question, arguments.count)


if __name__ == "__main__":
    main()
