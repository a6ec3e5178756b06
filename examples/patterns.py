"""Show what the heads of a real model look at in a sentence: `python examples/patterns.py "..."`.

The program draws the attention patterns of all heads in one picture, and one head in a larger one.
It also writes an interactive page: point at a word to see what each head looks at from there.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import matplotlib
from numattn import plot
from numattn.demo import MiniLM

RESULTS = Path(__file__).resolve().parent.parent / "demo-results"
SENTENCE = "The bank raised its rates, so we sat on the bank of the river."


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("sentence", nargs="?", default=SENTENCE, help="in English")
    # Both count from 0, as in the pictures.
    parser.add_argument("--layer", type=int, default=2, help="layer of the larger picture, 0 to 5")
    parser.add_argument("--head", type=int, default=1, help="head of the larger picture, 0 to 11")
    arguments = parser.parse_args()

    model = MiniLM()
    layers, heads = model.config["num_hidden_layers"], model.config["num_attention_heads"]
    for name, number, count in (
        ("layer", arguments.layer, layers),
        ("head", arguments.head, heads),
    ):
        if not 0 <= number < count:
            parser.error(f"--{name}: got {number}, expected 0 to {count - 1}")
    ids, lengths = model.tokens([arguments.sentence])
    weights = model.attention_weights(ids, lengths)[:, 0]  # (layers, heads, tokens, tokens)
    tokens = model.token_texts(ids[0])

    matplotlib.use("Agg")  # files, wherever this runs
    RESULTS.mkdir(exist_ok=True)
    plot.plot_heads(weights, tokens).savefig(RESULTS / "heads.png", dpi=100)
    chosen = weights[arguments.layer, arguments.head]
    title = f"layer {arguments.layer}, head {arguments.head}"
    plot.plot_pattern(chosen, tokens, title=title).figure.savefig(RESULTS / "head.png", dpi=150)
    plot.html_page(weights, tokens, RESULTS / "patterns.html", title=arguments.sentence)

    print(f'What {layers} layers with {heads} heads each look at in "{arguments.sentence}":\n')
    print(f"all heads            {RESULTS / 'heads.png'}")
    print(f"{title:21}{RESULTS / 'head.png'}")
    print(f"an interactive page  {RESULTS / 'patterns.html'}")


if __name__ == "__main__":
    main()
