"""Which sentences say the same? Encodes them with MiniLM, by numattn and in plain NumPy."""

from __future__ import annotations

import time

import numattn as na
import numpy as np
from numattn.demo import MiniLM
from numpy_minilm import numpy_attention, numpy_block

SENTENCES = [
    "A cat is sleeping on the warm windowsill.",
    "The kitten naps in the sun by the window.",
    "The dog chased a ball across the park.",
    "A puppy is running after its toy on the grass.",
    "Shares fell sharply after the bank reported a loss.",
    "The lender's disappointing results sent its stock down.",
    "The central bank raised interest rates by half a point.",
    "Borrowing became more expensive when rates went up again.",
    "She planted tomatoes and basil in the garden this spring.",
    "In April he sowed vegetables and herbs behind the house.",
    "Heavy rain flooded the streets of the old town.",
    "After the storm the city's roads were under water.",
    "The telescope took its first pictures of a distant galaxy.",
    "Astronomers published images of stars billions of light years away.",
    "Add a pinch of salt and let the soup simmer for an hour.",
    "Cook the broth slowly over a low flame and season it.",
    "The train to Vienna leaves at noon from platform seven.",
    "Our rail connection to the Austrian capital departs at 12.",
    "The orchestra rehearsed the symphony until late at night.",
    "Musicians practised the new concert piece all evening.",
]
# Long ones: all sentences, twice, from another one on.
PASSAGES = [" ".join(2 * (SENTENCES[i:] + SENTENCES[:i])) for i in range(0, len(SENTENCES), 2)]


def best_time(function, repeats=5):
    times = []
    for _ in range(repeats):
        begin = time.perf_counter()
        function()
        times.append(time.perf_counter() - begin)
    return min(times)


def compare_speed(model: MiniLM, what: str, texts: list[str]) -> None:
    ids, lengths = model.tokens(texts)
    ours = best_time(lambda: model.encode_tokens(ids, lengths))
    theirs = best_time(lambda: model.encode_tokens(ids, lengths, numpy_block))
    # The attention of one layer by itself, on vectors of the right shape.
    shape = (len(texts), model.config["num_attention_heads"], ids.shape[1], 32)
    q, k, v = np.random.default_rng(0).standard_normal((3, *shape), dtype=np.float32)
    our_attention = best_time(lambda: na.attention(q, k, v, kv_lengths=lengths))
    their_attention = best_time(lambda: numpy_attention(q, k, v, lengths))
    print(
        f"{what} ({len(texts)} x {ids.shape[1]} tokens, padded): "
        f"{len(texts) / ours:.0f} a second with numattn, {len(texts) / theirs:.0f} in plain "
        f"NumPy ({theirs / ours:.2f}x); the attention alone {their_attention / our_attention:.1f}x"
    )


def main() -> None:
    model = MiniLM()
    ids, lengths = model.tokens(SENTENCES)
    embeddings = model.encode_tokens(ids, lengths)
    similar = embeddings @ embeddings.T
    np.fill_diagonal(similar, -1)
    print("Each sentence, and the one nearest to it (cosine):\n")
    for i, sentence in enumerate(SENTENCES):
        nearest = int(similar[i].argmax())
        print(f"  {sentence:68} {similar[i, nearest]:.2f}  {SENTENCES[nearest]}")
    plain = model.encode_tokens(ids, lengths, numpy_block)
    print(f"\nLargest difference from plain NumPy: {np.abs(embeddings - plain).max():.1e}")
    compare_speed(model, "Sentences", SENTENCES)
    compare_speed(model, "Passages", PASSAGES)
    print()


if __name__ == "__main__":
    main()
