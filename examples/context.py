"""Show how one word's vector takes in its sentence, block by block: `python examples/context.py`.

Before the first block, a word has nearly the same vector in every sentence. After each block of the
model, its vector depends more on the words around it. The program compares the vectors of one word
in two sentences by their cosine: the cosine stays high if the word means the same in both, and it
falls if the word means different things.

Try your own word and sentences: `python examples/context.py --word spring "..." "..." "..."`.
"""

from __future__ import annotations

import argparse
import itertools
from pathlib import Path

import matplotlib
import numpy as np
from numattn.demo import MiniLM

RESULTS = Path(__file__).resolve().parent.parent / "demo-results"

INTRODUCTION = """\
How does a model know which meaning of a word is meant?

Inside the model, each word of a sentence is a vector (a list of 384 values). At first it is nearly
the same in every sentence. Then six blocks follow. In each block, attention lets the word take in
the other words of its sentence, so its vector comes to carry the meaning that the word has there.

Each row compares one word in two sentences. Values near 1 say that its vectors point in the same
direction, and values near 0 that they have little in common. Rows with "=" compare sentences in
which the word means the same, and rows with "/" sentences in which it does not: from left to right,
the values of "/" should fall further than the values of "="."""
OWN_WORD = "The cosine of the word's vectors in two sentences, before the blocks and after each:"

# word: meaning: sentences
WORDS = {
    "tower": {
        "Paris": [
            "Millions of tourists visit the Eiffel tower in Paris.",
            "The tower in Paris was built by Gustave Eiffel.",
        ],
        "toys": [
            "The child built a tower of wooden blocks.",
            "A tower of toy bricks fell over in the nursery.",
        ],
    },
    "model": {
        "person": [
            "The model walked down the runway in a red dress.",
            "A famous model posed for the photographer of a fashion magazine.",
        ],
        "mathematics": [
            "The model predicts the temperature from the air pressure.",
            "We fitted a linear model to the data of the experiment.",
        ],
    },
    "bank": {
        "money": [
            "The bank raised the interest rate on its loans.",
            "He opened a savings account at the bank in the city centre.",
        ],
        "river": [
            "We sat on the bank of the river and watched the ducks.",
            "The flood washed away trees along the muddy bank of the stream.",
        ],
    },
}  # fmt: skip


def vectors_of_word(model: MiniLM, word: str, sentences: list[str]) -> np.ndarray:
    """Return the word's vectors (stages, sentences, 384), each of length 1."""
    ids, lengths = model.tokens(sentences)
    places = []
    for sentence, row in zip(sentences, ids, strict=True):
        tokens = model.token_texts(row)
        if word.lower() not in tokens:
            raise SystemExit(
                f"--word: {word.lower()!r} is not a token of {sentence!r}; its tokens are "
                f"{' '.join(tokens)}"
            )
        places.append(tokens.index(word.lower()))
    rows = np.arange(len(sentences))
    vectors = np.stack([x[rows, places] for x in model.hidden_states(ids, lengths)])
    return vectors / np.linalg.norm(vectors, axis=-1, keepdims=True)


def compare(model: MiniLM, word: str, meanings: dict[str, list[str]]) -> list[dict]:
    """Return each pair of sentences with the cosine of the word's vectors at each stage."""
    sentences = [(meaning, s) for meaning, group in meanings.items() for s in group]
    vectors = vectors_of_word(model, word, [s for _, s in sentences])
    cosines = vectors @ vectors.swapaxes(-1, -2)
    return [
        {"numbers": (a, b), "meanings": (x, y), "cosines": cosines[:, a, b]}
        for (a, (x, _)), (b, (y, _)) in itertools.combinations(enumerate(sentences), 2)
    ]


def stage_names(stages: int) -> list[str]:
    return ["embedded", *(f"block {n}" for n in range(1, stages))]


def print_table(word: str, meanings: dict[str, list[str]], pairs: list[dict]) -> None:
    print(f'\n"{word}" in\n')
    number = itertools.count(1)
    for meaning, group in meanings.items():
        for sentence in group:
            print(f"  {next(number)} {meaning + ':' if meaning else '':13}{sentence}")
    stages = len(pairs[0]["cosines"])
    print("\n  sentences   " + "".join(f"{name:>10}" for name in stage_names(stages)))
    # First the pairs in which the word means the same.
    for pair in sorted(pairs, key=lambda pair: pair["meanings"][0] != pair["meanings"][1]):
        a, b = pair["numbers"]
        sign = "=" if pair["meanings"][0] == pair["meanings"][1] else "/"
        line = "".join(f"{cosine:10.2f}" for cosine in pair["cosines"])
        print(f"  {a + 1} {sign} {b + 1}       {line}")


def draw(results: dict[str, list[dict]], path: Path) -> None:
    matplotlib.use("Agg")  # a file, wherever this runs
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(
        1, len(results), figsize=(1.2 + 3.6 * len(results), 5), sharey=True, squeeze=False,
        layout="constrained",
    )  # fmt: skip
    for ax, (word, pairs) in zip(axes[0], results.items(), strict=True):
        names = stage_names(len(pairs[0]["cosines"]))
        meanings = list(dict.fromkeys(x for pair in pairs for x in pair["meanings"]))
        for pair in pairs:
            x, y = pair["meanings"]
            color, line = f"C{meanings.index(x)}", "-"
            label = f"both {x}" if x else "two sentences"
            if x != y:
                color, line, label = "0.5", "--", f"{x} and {y}"
            ax.plot(names, pair["cosines"], color=color, linestyle=line, marker=".", label=label)
        ax.set_title(f"\u201c{word}\u201d")
        ax.tick_params(axis="x", rotation=60)
        ax.grid(alpha=0.3)
        # One entry for lines of the same kind, below the lines.
        handles = dict(zip(*reversed(ax.get_legend_handles_labels()), strict=True))
        ax.legend(
            handles.values(), handles.keys(), loc="upper center", bbox_to_anchor=(0.5, -0.25),
            frameon=False,
        )  # fmt: skip
    axes[0, 0].set_ylabel("cosine of the word's vectors in two sentences")
    path.parent.mkdir(exist_ok=True)
    figure.savefig(path, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--word", help="a word that is in all of the sentences")
    parser.add_argument("sentences", nargs="*", help="at least two, for --word")
    arguments = parser.parse_args()
    words = WORDS
    if arguments.word:
        if len(arguments.sentences) < 2:
            parser.error(f"--word: got {len(arguments.sentences)} sentences, expected at least two")
        words = {arguments.word: {"": arguments.sentences}}
    elif arguments.sentences:
        parser.error("sentences: pass --word WORD too, the word to compare in them")

    model = MiniLM()
    print(OWN_WORD if arguments.word else INTRODUCTION)
    results = {}
    for word, meanings in words.items():
        results[word] = compare(model, word, meanings)
        print_table(word, meanings, results[word])
    path = RESULTS / "context.png"
    draw(results, path)
    print(f"\nThe same values as a picture: {path}")


if __name__ == "__main__":
    main()
