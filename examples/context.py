"""How the vector of one word takes in its sentence, block by block: `python examples/context.py`.

A word's embedding is nearly the same wherever it stands; after the blocks of the model it depends
on what stands around it. The cosine between the vectors of a word in two sentences says how far:
it stays high where the word means the same, and falls where it does not.

Words and sentences of your own: `python examples/context.py --word spring "..." "..." "..."`.
"""

from __future__ import annotations

import argparse
import itertools
from pathlib import Path

import matplotlib
import numpy as np
from numattn.demo import MiniLM

RESULTS = Path(__file__).resolve().parent.parent / "demo-results"

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
            raise SystemExit(f"no token {word.lower()!r} in {sentence!r}, but {' '.join(tokens)}")
        places.append(tokens.index(word.lower()))
    rows = np.arange(len(sentences))
    vectors = np.stack([x[rows, places] for x in model.hidden_states(ids, lengths)])
    return vectors / np.linalg.norm(vectors, axis=-1, keepdims=True)


def compare(model: MiniLM, word: str, meanings: dict[str, list[str]]) -> list[dict]:
    """Return the pairs of sentences with the cosine of the word's vectors at each stage."""
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
    # Pairs of one meaning first.
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
    parser.add_argument("--word", help="a word, with sentences that have it")
    parser.add_argument("sentences", nargs="*")
    arguments = parser.parse_args()
    words = WORDS
    if arguments.word:
        if len(arguments.sentences) < 2:
            parser.error("--word needs two sentences at least")
        words = {arguments.word: {"": arguments.sentences}}
    elif arguments.sentences:
        parser.error("sentences need --word")

    model = MiniLM()
    print("The cosine between the vectors of a word in two sentences (= one meaning, / two):")
    results = {}
    for word, meanings in words.items():
        results[word] = compare(model, word, meanings)
        print_table(word, meanings, results[word])
    path = RESULTS / "context.png"
    draw(results, path)
    print(f"\nThe same as a picture: {path}")


if __name__ == "__main__":
    main()
