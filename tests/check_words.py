"""Refuse phrases that make prose hard to read: `make lint` runs it on the whole project.

It reads Markdown and reStructuredText without their code, and the strings of Python files:
docstrings, error messages and what programs print. For each phrase it prints the place and what to
write instead, and it exits with 1. Codespell looks for typing mistakes; this looks for phrases of
correct words that a native engineer would not write.

    python tests/check_words.py [FILE ...]
"""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Iterator

ROOT = Path(__file__).parent.parent
PYTHON_FOLDERS = ("python/numattn/", "examples/", "benchmarks/")


class Phrase(NamedTuple):
    """A regular expression, in which a space matches any white space, and its replacement."""

    pattern: str
    instead: str
    why: str


PHRASES = [
    Phrase(r"stands?(?! for|-)", '"is" or "are"', "nothing here has feet"),
    Phrase(r"(?:that|those) of(?! course)", "repeat the noun", "the reader has to search for it"),
    Phrase(r"behind each other", '"one after the other"', "it is about places, not about time"),
    Phrase(r"besides", '"also", "as well as" or "except"', "it can mean each of them"),
    Phrase(r"beside", '"next to" or "with"', "it is about places, not about relations"),
    Phrase(r"likewise", '"also", "so does"', "stiff"),
    Phrase(
        r"the one(?! (?:that|which|who|with|of|in|from|for))\b[^.:;]{1,60} the other",
        "name both",
        "the reader has to look up which is which",
    ),
    Phrase(r"what (?:\w+ ){1,3}lacks?", '"X has no ...", "without ..."', "a clause as a noun"),
    Phrase(
        r"(?:arrays?|chunks?|clusters?|graphs?) of dask",
        '"dask arrays", "a dask cluster"',
        "a translated genitive",
    ),
    Phrase(r"be (?:it|they)(?! \w+ed)", '"even if", "whether ... or"', "a translated subjunctive"),
    Phrase(r"by themselves", '"separately", "on their own"', "a translated reflexive"),
    Phrase(r"for (?:itself|themselves)", '"on its own", "separately"', "a translated reflexive"),
    Phrase(r"the own", '"its own"', "not English"),
    Phrase(r"(?:is|are) to be", '"must be" or "should be"', "it can also mean a plan"),
    Phrase(
        r"as (?:they are|it is)(?=[.,;:)])", '"unchanged", "in place"', "it says what is not done"
    ),
    Phrase(r"goes with", '"belongs to", "is used with"', "vague"),
    Phrase(r"makes? of", '"turns into", "computes from"', "a translated preposition"),
    Phrase(
        r"makes? no array", '"expected an array or something np.asarray accepts"', "not English"
    ),
    Phrase(
        r"(?:is|are|be) no (?:array|dtype|file|function|layer|mask|matrix|model|module|number|"
        r"operator|option|package|tensor)s?",
        '"is not a ..."',
        "a translated negation",
    ),
    Phrase(r"so that nobody", '"so you never", or the passive', "nobody is not the subject"),
    Phrase(r"where there (?:is|are)", '"if" or "when"', "it is a condition, not a place"),
    Phrase(
        r"(?<!leave\s)(?<!leaves\s)(?<!left\s)(?<!leave\sit\s)(?<!leave\sthem\s)(?<!-)"
        r"alone(?! and)",
        '"only", before the word it limits',
        "alone means without company",
    ),
    Phrase(r"expected it", '"expected ..." and the value', "an error names what it expects"),
    Phrase(r"some (?=\d|hundred|thousand|million|billion)", '"about"', "easily read as several"),
    Phrase(r"map of the house", '"map of the source tree"', "there is no house"),
    Phrase(r"(?:its|their) kin", '"the related functions"', "functions have no family"),
    Phrase(r"to the bit", '"bit for bit"', "not English"),
    Phrase(r"mend(?:s|ed|ing)?", '"fix"', "for clothes"),
    Phrase(r"without a word", '"silently"', "programs do not talk"),
    Phrase(r"here and there", '"sometimes" or "in some places"', "vague"),
    Phrase(r"whoever", '"if you" or "anyone who"', "archaic"),
    Phrase(r"how (?:it|this|that|they|\w+) looks? like", '"what ... looks like"', "not English"),
    Phrase(
        r"(?:allow|enable|permit)(?:s|ed)? to(?! the)", '"lets you ..."', "the verb needs an object"
    ),
    Phrase(r"(?:information|advice|software|hardware)s", "the singular", "it has no plural"),
]
LONGEST_PARENTHESIS = 25  # words; 15 are enough for most
EXPRESSIONS = [
    re.compile(r"\b" + phrase.pattern.replace(" ", r"\s+") + r"(?!\w)", re.IGNORECASE)
    for phrase in PHRASES
]


def find_phrases(text: str) -> Iterator[tuple[int, str, Phrase]]:
    """Yield the line (from 0), the words and the phrase of each place, in the text's order."""
    found = [
        (match.start(), " ".join(match[0].split()), phrase)
        for phrase, expression in zip(PHRASES, EXPRESSIONS, strict=True)
        for match in expression.finditer(text)
    ]
    for match in re.finditer(r"\(([^()]*)\)", text):
        words = match[1].split()
        if len(words) > LONGEST_PARENTHESIS and "\n\n" not in match[1]:
            instead = Phrase("", "a sentence or a list", f"{len(words)} words in parentheses")
            found.append((match.start(), " ".join([*words[:4], "..."]), instead))
    for begin, words, phrase in sorted(found, key=lambda item: item[0]):
        yield text.count("\n", 0, begin), words, phrase


def without_code(text: str) -> str:
    """Replace the code of a document by the letter X, so that lines stay where they are."""
    text = re.sub(r"^```.*?^```", hide, text, flags=re.DOTALL | re.MULTILINE)
    # A literal block, or the block of a directive that is code: more indented than its first line.
    begins = r"(?:(?!\.\. )\S.*::|\.\. (?:code|plot|math|raw)[\w-]*::.*)"
    text = re.sub(
        rf"^( *){begins} *\n((?: *\n)*)((?:\1 +\S.*\n|\s*\n)+)",
        hide, text + "\n", flags=re.MULTILINE,
    )[:-1]  # fmt: skip
    # Doctests, up to the empty line after what they print.
    text = re.sub(r"^ *>>> (?:.*\S.*\n?)+", hide, text, flags=re.MULTILINE)
    text = re.sub(r"(`+)[^`]+\1", hide, text)
    return re.sub(r"\]\([^)\s]*\)|https?://\S+", hide, text)  # the targets of links


def hide(match: re.Match) -> str:
    return re.sub(r"[^\n]", "X", match[0])


def strings(source: str) -> Iterator[tuple[int, str]]:
    """Yield each string of a Python file that may be prose, with its first line (from 1)."""
    tree = ast.parse(source)
    inside = {
        id(part)
        for node in ast.walk(tree)
        if isinstance(node, ast.JoinedStr)
        for part in node.values
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.JoinedStr):
            parts = (x.value if isinstance(x, ast.Constant) else "X" for x in node.values)
            text = "".join(map(str, parts))
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            text = "" if id(node) in inside else node.value
        else:
            continue
        if " " in text.strip():
            yield node.lineno, text


def check(path: Path) -> list[str]:
    """Return a line for each phrase in a file."""
    source = path.read_text(encoding="utf-8")
    places = strings(source) if path.suffix == ".py" else [(1, source)]
    shown = path.relative_to(ROOT) if path.is_relative_to(ROOT) else path
    return [
        f"{shown}:{first + line}: {words!r}: write {phrase.instead} ({phrase.why})"
        for first, text in places
        for line, words, phrase in find_phrases(without_code(text))
    ]


def documents() -> list[Path]:
    """Return the project's files with prose for readers, from Git."""
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT, capture_output=True, text=True, check=True,
    ).stdout.splitlines()  # fmt: skip
    return [
        ROOT / name
        for name in listed
        if name.endswith((".md", ".rst"))
        or (name.endswith(".py") and name.startswith(PYTHON_FOLDERS))
    ]


def main() -> None:
    paths = [Path(name).resolve() for name in sys.argv[1:]] or documents()
    found = [line for path in paths if path.exists() for line in check(path)]
    print("\n".join(found) if found else f"{len(paths)} files have no phrase to avoid")
    sys.exit(bool(found))


if __name__ == "__main__":
    main()
