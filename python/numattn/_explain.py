"""What the heads of a real model attend to in a sentence: `python -m numattn explain "..."`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from . import plot
from .demo import MiniLM

if TYPE_CHECKING:
    from pathlib import Path

    from numpy.typing import NDArray

_MARKS = ("[CLS]", "[SEP]")  # which the model puts around a sentence
_STRONGEST = 3


def explain(sentence: str, path: Path) -> None:
    """Write the interactive page of a sentence, and print for each word what it attends to most."""
    model = MiniLM()
    ids, lengths = model.tokens([sentence])
    tokens = model.token_texts(ids[0])
    weights = model.attention_weights(ids, lengths)[:, 0]  # [layer][head][query][key]
    most = model.config["max_position_embeddings"]
    if len(tokens) == most:
        print(f"The model reads {most} tokens; what comes after them is left out.")
    plot.html_page(weights, tokens, path, title=sentence)
    print(f'The words of "{sentence}", and the words each attends to most')
    layers, heads = weights.shape[:2]
    print(f"(mean over {layers} layers of {heads} heads; its weight on itself is left out):\n")
    for token, row in zip(tokens, strongest(weights, tokens), strict=True):
        if token not in _MARKS:
            print(f"  {token:14} " + "   ".join(f"{other} {share:.0%}" for other, share in row))
    print(f"\nThe page with every head: {path.resolve()}")
    print("Open it in a browser and point at a word. It needs no network.")


def strongest(weights: NDArray[Any], tokens: list[str]) -> list[list[tuple[str, float]]]:
    """Return for each query the other words with the largest weights."""
    mean = weights.mean(axis=(0, 1))  # [query][key]
    found = []
    for query, row in enumerate(mean):
        keys = [n for n in (-row).argsort() if n != query and tokens[n] not in _MARKS]
        found.append([(tokens[n], float(row[n])) for n in keys[:_STRONGEST]])
    return found
