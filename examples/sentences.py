"""Find the sentences that mean the same, with MiniLM in numattn: `python examples/sentences.py`.

The model also runs in plain NumPy, to compare the results and the speed.
"""

from __future__ import annotations

import time

import numattn as na
import numpy as np
from numattn.demo import MiniLM
from numpy_minilm import numpy_attention, numpy_block

INTRODUCTION = """\
MiniLM is a small language model. It reads a sentence and turns it into a vector (a list of 384
values) that describes its meaning. Inside the model, attention lets each word take in the other
words of its sentence; numattn computes this attention. The closer two sentences are in meaning, the
closer their vectors are in direction. The cosine of the angle between them measures this: it is 1
for the same direction and near 0 for unrelated sentences. Here are 20 sentences: ten things, each
said twice in different words.

Each sentence, and the one nearest to it by meaning (cosine):
"""
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
# Long texts: all sentences twice, each text from a different sentence on.
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
    # Only the attention of one layer, on random vectors of the right shape.
    shape = (len(texts), model.config["num_attention_heads"], ids.shape[1], 32)
    q, k, v = np.random.default_rng(0).standard_normal((3, *shape), dtype=np.float32)
    our_attention = best_time(lambda: na.attention(q, k, v, kv_lengths=lengths))
    their_attention = best_time(lambda: numpy_attention(q, k, v, lengths))
    what = f"{len(texts)} {what} of up to {ids.shape[1]} tokens"
    print(
        f"  {what:32}{len(texts) / ours:8.0f}{len(texts) / theirs:8.0f}{theirs / ours:14.2f}x"
        f"{their_attention / our_attention:15.1f}x"
    )


def main() -> None:
    model = MiniLM()
    ids, lengths = model.tokens(SENTENCES)
    embeddings = model.encode_tokens(ids, lengths)
    similar = embeddings @ embeddings.T
    np.fill_diagonal(similar, -1)
    print(INTRODUCTION)
    for i, sentence in enumerate(SENTENCES):
        nearest = int(similar[i].argmax())
        print(f"  {sentence:68} {similar[i, nearest]:.2f}  {SENTENCES[nearest]}")
    plain = model.encode_tokens(ids, lengths, numpy_block)
    print(
        "\nThe same model in plain NumPy returns the same vectors up to rounding: the largest "
        f"difference is\n{np.abs(embeddings - plain).max():.1e}. How many texts per second does "
        'each read? (A token is a word or a piece of one. "Only\nattention" compares the attention '
        "of one layer, without the rest of the model.)\n"
    )
    print(f"{'':34}{'numattn':>8}{'NumPy':>8}{'times as fast':>15}{'only attention':>16}")
    compare_speed(model, "sentences", SENTENCES)
    compare_speed(model, "passages", PASSAGES)
    print()


if __name__ == "__main__":
    main()
