"""Train a small GPT on English text in two minutes: `python examples/language_model.py`.

The text is the manual that comes with every CPython (`pydoc_data.topics`). The model (`gpt.py`)
reads it character by character, and is trained in NumPy. Then the program shows what attention is
good for: how well the model predicts a character from the 1 to 128 characters before it, in a part
of the text that it was not trained on. At the end the model writes a text of its own.

`--save PATH` keeps the weights, and `--load PATH` uses them again.
"""

from __future__ import annotations

import argparse
import importlib.util
import math
import os
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from pydoc_data.topics import topics

# Two Python threads compute half of the characters each, including what NumPy does with them, so
# NumPy's product with the output matrix needs no threads. NumPy reads this when it is imported.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import numattn as na
import numpy as np
from gpt import GPT, Vocabulary, log_softmax

RESULTS = Path(__file__).resolve().parent.parent / "demo-results"
CONTEXTS = (1, 8, 32, 128)  # how many characters a prediction is made from
LONGEST = CONTEXTS[-1]
CHUNK, SHORT_CHUNK = 256, 8  # characters of a training example
CHARACTERS_PER_STEP = 2 * CHUNK
STEPS = 3000
RATE = 4e-3
SENTENCE = "A list is a mutable sequence, and a tuple is an immutable sequen"
BEGINNING = "If the object "
PICTURE_TEXT = "mutable sequence, immutable sequence"


# ---- the text ----------------------------------------------------------------------------------


def read_text() -> str:
    """Return the manual, with each repeated paragraph only once.

    A repeated paragraph could be in both parts of the text, and the model could learn it by heart.
    """
    paragraphs = {}
    for name in sorted(topics):
        for paragraph in topics[name].split("\n\n"):
            paragraphs.setdefault(" ".join(paragraph.split()), paragraph)
    return "\n\n".join(paragraphs.values())


# ---- training ----------------------------------------------------------------------------------


class Adam:
    """Kingma and Ba, "Adam: A Method for Stochastic Optimization", ICLR 2015.

    Every parameter moves against the running mean of its gradients, divided by the square root of
    the running mean of their squares. It moves equally far whether gradients are small or large.
    """

    def __init__(self, parameters, decays=(0.9, 0.99)) -> None:
        self._parameters = parameters
        self._decays = decays
        self._means = {name: np.zeros_like(x) for name, x in parameters.items()}
        self._squares = {name: np.zeros_like(x) for name, x in parameters.items()}
        self._steps = 0

    def step(self, gradients, rate: float) -> None:
        self._steps += 1
        # Both means begin at 0. These are their shares that come from gradients, not from that 0.
        seen, seen_squares = (1 - decay**self._steps for decay in self._decays)
        decay, decay_squares = self._decays
        for name, d in gradients.items():
            mean, squares = self._means[name], self._squares[name]
            mean += (1 - decay) * (d - mean)
            squares += (1 - decay_squares) * (d * d - squares)
            self._parameters[name] -= rate / seen * mean / (np.sqrt(squares / seen_squares) + 1e-8)


def clip(gradients, largest: float = 1.0) -> None:
    """Scale all gradients down by one factor if their length is more than `largest`."""
    length = math.sqrt(sum(float(np.vdot(d, d)) for d in gradients.values()))
    if length > largest:
        for d in gradients.values():
            d *= largest / length


def learning_rate(step: int, done: float, highest: float = RATE) -> float:
    """Return the rate: it rises for a hundred steps, then falls along half a cosine to 1/20."""
    return highest * min((step + 1) / 100, 0.525 + 0.475 * math.cos(math.pi * done))


def random_chunks(text, length: int, rng):
    """Return chunks (chunks, length) from random places, and what follows each character."""
    begins = rng.integers(0, len(text) - length, CHARACTERS_PER_STEP // length)
    places = begins[:, np.newaxis] + np.arange(length)
    return text[places], text[places + 1]


def shared_gradients(model, pool, tokens, targets):
    """Compute the halves of a batch in two threads; return the mean loss and gradients."""
    halves = zip(np.split(tokens, 2), np.split(targets, 2), strict=True)
    (loss, d), (other_loss, other_d) = pool.map(
        lambda half: model.loss_and_gradients(*half), halves
    )
    return (loss + other_loss) / 2, {name: (d[name] + other_d[name]) / 2 for name in d}


def train(model, text, pool, steps: int, minutes: float | None = None, seed: int = 0) -> None:
    """Follow the gradients of random chunks downhill, for `minutes` if given, else for `steps`."""
    rng = np.random.default_rng(seed)
    adam = Adam(model.parameters())
    begin = time.perf_counter()
    recent, done, step = None, 0.0, 0
    while done < 1:
        # Few characters of a long chunk are near its beginning. Every sixth step has short chunks,
        # so the model also learns to predict from little context.
        length = SHORT_CHUNK if step % 6 == 5 else CHUNK
        loss, gradients = shared_gradients(model, pool, *random_chunks(text, length, rng))
        clip(gradients)
        adam.step(gradients, learning_rate(step, done))
        step += 1
        seconds = time.perf_counter() - begin
        done = min(1.0, seconds / (60 * minutes) if minutes else step / steps)
        if length == CHUNK:
            recent = loss if recent is None else recent + 0.05 * (loss - recent)
        speed = step * CHARACTERS_PER_STEP / seconds
        progress(done, f"{bits(recent):.2f} bits per character, {speed:,.0f} characters/s")
    print(f"Trained for {step} steps, {seconds:.0f} s, {speed:,.0f} characters/s.")


def progress(done: float, text: str) -> None:
    if sys.stderr.isatty():
        bar = "#" * int(30 * done)
        sys.stderr.write(f"\r\033[K[{bar:30}] {text}" + ("\n" if done == 1 else ""))


def bits(nats: float) -> float:
    return nats / math.log(2)


# ---- what it has learned -----------------------------------------------------------------------


def held_out_bits(model, text, pool, context: int, count: int) -> float:
    """Return the bits that a character costs if it is predicted from only `context` characters.

    The `count` characters are spread over the text and are the same for every context. Each has its
    own chunk, which ends just before it: only this last prediction counts.
    """
    places = np.linspace(LONGEST, len(text) - 1, count).astype(int)

    def log_probabilities(places):
        chunks = text[places[:, np.newaxis] + np.arange(-context, 0)]
        log_p = log_softmax(model.logits(chunks, last_only=True)[:, 0])
        return log_p[np.arange(len(places)), text[places]]

    parts = np.array_split(places, max(1, count * context // (8 * CHARACTERS_PER_STEP)))
    return -bits(np.concatenate(list(pool.map(log_probabilities, parts))).mean())


def counted_bits(train_text, text, characters: int, count: int) -> tuple[float, float]:
    """Return the same for tables of the frequencies of characters and of pairs of them."""
    places = np.linspace(LONGEST, len(text) - 1, count).astype(int)
    pairs = np.zeros((characters, characters))
    np.add.at(pairs, (train_text[:-1], train_text[1:]), 1)
    single = (pairs.sum(axis=0) + 1) / (pairs.sum() + characters)
    # A pair that was never seen counts like its second character.
    p = (pairs + single) / (pairs.sum(axis=1, keepdims=True) + 1)
    found = single[text[places]], p[text[places - 1], text[places]]
    single_bits, pair_bits = (-np.log2(x).mean() for x in found)
    return single_bits, pair_bits


def write(model, beginning: str, count: int, rng, temperature: float = 0.6) -> str:
    """Continue a text. A temperature below 1 makes likely characters even more likely."""
    caches = model.new_caches(CHUNK)
    tokens = model.vocabulary.encode(beginning)[np.newaxis]
    written = []
    for _ in range(count):
        logits = model.logits(tokens, caches, last_only=True)[0, 0].astype(float)
        logits[0] = -np.inf  # not the token of all rare characters, which has no single meaning
        p = np.exp(log_softmax(logits / temperature))
        tokens = rng.choice(len(p), size=(1, 1), p=p / p.sum())
        written.append(tokens[0, 0])
    return model.vocabulary.decode(written)


def likeliest(model, text: str, count: int = 5) -> str:
    """Return the most likely next characters with their probabilities."""
    tokens = model.vocabulary.encode(text)[np.newaxis]
    p = np.exp(log_softmax(model.logits(tokens, last_only=True)[0, 0]))
    best = np.argsort(p)[::-1][:count]
    return "  ".join(f"{model.vocabulary.characters[i]!r} {p[i]:.2f}" for i in best)


def farthest_head(model, text: str):
    """Return the weights, layer and head number of the head that looks furthest back on average.

    Most heads look at the few previous characters, which say the most about the next one.
    """
    tokens = model.vocabulary.encode(text)
    weights = []
    model.logits(tokens[np.newaxis], weights=weights)
    weights = np.concatenate(weights)  # (layers, heads, characters, characters)
    places = np.arange(len(tokens))
    distances = np.sum(weights * (places[:, np.newaxis] - places), axis=(-2, -1))
    layer, head = np.unravel_index(distances.argmax(), distances.shape)
    return weights[layer, head], int(layer), int(head)


def draw(model, path: Path) -> str:
    import matplotlib

    matplotlib.use("Agg")  # a file, wherever this runs
    from numattn import plot

    weights, layer, head = farthest_head(model, PICTURE_TEXT)
    labels = [character.replace(" ", "\N{OPEN BOX}") for character in PICTURE_TEXT]
    title = f"layer {layer}, head {head}"
    path.parent.mkdir(parents=True, exist_ok=True)
    plot.plot_pattern(weights, labels, title=title).figure.savefig(path, dpi=150)
    return title


# ---- the program -------------------------------------------------------------------------------


def print_table(model, train_text, held_out, pool, count: int) -> None:
    costs = counted_bits(train_text, held_out, len(model.vocabulary.characters), count)
    names = "how frequent each character is", "how frequent each pair is"
    table = dict(zip(names, costs, strict=True))
    for context in CONTEXTS:
        seen = "only the last character" if context == 1 else f"the last {context} characters"
        table[f"the model, {seen}"] = held_out_bits(model, held_out, pool, context, count)
    print(
        "\nHow well does the model predict? The fewer bits it needs per character, the better. If "
        "all\ncharacters were equally likely, one would take "
        f"{math.log2(len(model.vocabulary.characters)):.2f} bits.\n"
    )
    print(f"{count} held-out characters, predicted from          bits per character\n")
    for what, cost in table.items():
        print(f"  {what:48}{cost:5.2f}")


def require(module: str, package: str, what: str) -> None:
    if importlib.util.find_spec(module) is None:
        raise SystemExit(f"{what} needs {module}. Install it: pip install '{package}'")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--minutes", type=float, help="train for this long, and ignore --steps")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--save", metavar="PATH", help="write the weights (safetensors)")
    parser.add_argument("--load", metavar="PATH", help="read weights instead of training")
    parser.add_argument(
        "--picture", metavar="PATH", type=Path, default=RESULTS / "language_model.png",
        help="where to write the picture of a head",
    )  # fmt: skip
    parser.add_argument("--no-picture", action="store_true", help="draw no picture")
    parser.add_argument("--count", type=int, default=4096, help="held-out characters to predict")
    parser.add_argument("--characters", type=int, default=400, help="how many to write")
    arguments = parser.parse_args()
    if arguments.steps < 1 or arguments.count < 1 or (arguments.minutes or 1) <= 0:
        parser.error("--steps, --minutes, --count: expected positive values")
    # Before the training, which takes minutes.
    if arguments.save or arguments.load:
        require("safetensors", "numattn[weights]", "--save or --load")
    if not arguments.no_picture:
        require("matplotlib", "numattn[plot]", "the picture (unless you pass --no-picture)")

    na.set_num_threads(1)  # for each of the two Python threads
    text = read_text()
    if arguments.load:
        model = GPT.load(arguments.load)
    else:
        model = GPT(Vocabulary.of_text(text), seed=arguments.seed)
    tokens = model.vocabulary.encode(text)
    train_text, held_out = np.split(tokens, [len(tokens) * 9 // 10])
    size = sum(x.size for x in model.parameters().values())
    print(
        f"The model learns from {len(train_text):,} characters of Python's manual; the last "
        f"{len(held_out):,} are held out for the test."
    )
    sizes = ", ".join(f"{name} {value}" for name, value in model.sizes.items())
    print(f"It has {size:,} parameters: {sizes}.")
    with ThreadPoolExecutor(2) as pool:
        if not arguments.load:
            train(model, train_text, pool, arguments.steps, arguments.minutes, arguments.seed)
        if arguments.save:
            model.save(arguments.save)
            print(f"Its weights are in {arguments.save}.")
        print_table(model, train_text, held_out, pool, arguments.count)

    print(f"\nWhat follows {SENTENCE!r}? Its guesses, with their probabilities:\n")
    print(f"  from the whole text           {likeliest(model, SENTENCE)}")
    print(f"  from only the last character  {likeliest(model, SENTENCE[-1])}")
    rng = np.random.default_rng(arguments.seed)
    print(f"\nIt writes:\n\n{BEGINNING}{write(model, BEGINNING, arguments.characters, rng)}")
    if not arguments.no_picture:
        title = draw(model, arguments.picture)
        print(f"\nA picture of the head that looks furthest back ({title}): {arguments.picture}")


if __name__ == "__main__":
    main()
