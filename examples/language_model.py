"""A small GPT learns English in two minutes: `python examples/language_model.py`.

Its text is the manual that every CPython has (`pydoc_data.topics`), letter by letter. It is trained
in NumPy: numattn gives the gradients of attention, and the few lines below all others. What it
prints shows what attention is good for: how well a letter is predicted from 1 to 128 letters before
it, on a part of the text that it was not trained on. Then it writes.

Weights are kept and used again with `--save PATH` and `--load PATH`.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import math
import os
import sys
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from pydoc_data.topics import topics

# Two threads of Python take half of the letters each, and all that NumPy does with them; so its
# products with matrices need no threads of their own. It reads this when it is imported.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import numattn as na
import numpy as np

RESULTS = Path(__file__).resolve().parent.parent / "demo-results"
CONTEXTS = (1, 8, 32, 128)  # letters that a prediction is made from
LONGEST = CONTEXTS[-1]
CHUNKS = (128, 128, 32, 128, 128, 8)  # how long the chunks of a step are, in turn
LETTERS_PER_STEP = 1024
STEPS = 2400
RATE = 5e-3
SENTENCE = "A list is a mutable sequence, and a tuple is an immutable sequen"
BEGINNING = "The statement "
PICTURE_TEXT = "mutable sequence, immutable sequence"
RARE = "\N{REPLACEMENT CHARACTER}"  # one letter for all those that the text hardly has


# ---- the text ----------------------------------------------------------------------------------


def read_text() -> str:
    """Return the manual; of paragraphs that it repeats, the first one.

    Repeated ones would be in both parts of the text: a model could know them by heart.
    """
    paragraphs = {}
    for name in sorted(topics):
        for paragraph in topics[name].split("\n\n"):
            paragraphs.setdefault(" ".join(paragraph.split()), paragraph)
    return "\n\n".join(paragraphs.values())


class Vocabulary:
    """The letters that a text has often enough; all others are one."""

    def __init__(self, letters: str) -> None:
        self.letters = letters
        self._numbers = {letter: number for number, letter in enumerate(letters)}

    @classmethod
    def of_text(cls, text: str, at_least: int = 20) -> Vocabulary:
        counts = Counter(text)
        return cls(RARE + "".join(sorted(x for x in counts if counts[x] >= at_least)))

    def encode(self, text: str) -> np.ndarray:
        return np.array([self._numbers.get(letter, 0) for letter in text])

    def decode(self, tokens: np.ndarray) -> str:
        return "".join(self.letters[token] for token in tokens)


# ---- layers and their gradients ----------------------------------------------------------------
# As `na.MultiHeadAttention.vjp` does, each gives its result y and a function. This takes dy, the
# gradient of the loss with respect to y, and gives those with respect to what y was made of.


def norm_vjp(x, gain):
    """Divide vectors by their root mean square r, and multiply them by a learned vector."""
    r = np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + np.float32(1e-6))
    unit = x / r

    def vjp(dy):
        # y = gain x / r, and dr/dx = x / (n r) for vectors of n elements:
        # dx = (gain dy - unit mean(gain dy unit)) / r
        d_gain = (dy * unit).reshape(-1, gain.size).sum(axis=0)
        d_unit = dy * gain
        return (d_unit - unit * np.mean(d_unit * unit, axis=-1, keepdims=True)) / r, d_gain

    return unit * gain, vjp


def feed_forward_vjp(x, up, down):
    """Look at each token by itself: y = max(x up, 0)^2 down."""
    inner = np.maximum(x @ up, 0)
    squares = inner * inner

    def vjp(dy):
        # For a product y = s m: ds = dy m^T and dm = s^T dy, over all tokens.
        # For s = max(a, 0)^2: da = 2 max(a, 0) ds.
        d_down = rows(squares).T @ rows(dy)
        d_inner = dy @ down.T
        d_inner *= 2 * inner
        return d_inner @ up.T, rows(x).T @ rows(d_inner), d_down

    return squares @ down, vjp


def rows(x):
    return x.reshape(-1, x.shape[-1])


def cross_entropy_vjp(logits, targets):
    """Return the mean of -log(probability of the target), and the function of its gradient."""
    log_p = log_softmax(rows(logits))
    places = np.arange(targets.size), targets.ravel()

    def vjp():
        # d(-log p_t)/d(logit_i) = p_i, less 1 for the target i = t.
        d = np.exp(log_p)
        d[places] -= 1
        d /= targets.size
        return d.reshape(logits.shape)

    return -float(log_p[places].mean()), vjp


def log_softmax(logits):
    shifted = logits - logits.max(axis=-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))


# ---- the model ---------------------------------------------------------------------------------


class Block:
    """Attention and a layer of tokens by themselves, each added to what came in."""

    def __init__(self, dim, heads, kv_heads, rng, dtype) -> None:
        self.attention = na.MultiHeadAttention(
            dim, heads, kv_heads=kv_heads, rotary=True, qk_norm=True, bias=False, dtype=dtype,
            rng=rng,
        )  # fmt: skip
        self.own = {
            "norm1": np.ones(dim, dtype),
            "norm2": np.ones(dim, dtype),
            "up": random_matrix(rng, dim, 4 * dim, dtype),
            # A block begins as one that adds nothing, and so does its attention.
            "down": np.zeros((4 * dim, dim), dtype),
        }
        self.attention.parameters()["o_weight"][...] = 0

    def parameters(self) -> dict[str, np.ndarray]:
        """Return the block's own arrays by name."""
        return self.own | self.attention.parameters()

    def vjp(self, x):
        own = self.own
        normed, norm1_vjp = norm_vjp(x, own["norm1"])
        attended, attention_vjp = self.attention.vjp(normed, is_causal=True)
        x = x + attended
        normed, norm2_vjp = norm_vjp(x, own["norm2"])
        y, forward_vjp = feed_forward_vjp(normed, own["up"], own["down"])

        def vjp(dy):
            # What is added up passes its gradient to both: y = x + f(x), so dx = dy + f's.
            d = {}
            d_normed, d["up"], d["down"] = forward_vjp(dy)
            dx, d["norm2"] = norm2_vjp(d_normed)
            dx += dy
            of_attention = attention_vjp(dx)
            d |= of_attention.parameters
            more, d["norm1"] = norm1_vjp(of_attention.x)
            return dx + more, d

        return x + y, vjp

    def __call__(self, x, cache=None, weights=None):
        """Return the block's result; with a cache, x goes on where that ends."""
        normed, _ = norm_vjp(x, self.own["norm1"])
        if weights is None:
            attended = self.attention(normed, is_causal=True, cache=cache)
        else:
            attended, of_heads = self.attention(normed, is_causal=True, return_weights=True)
            weights.append(of_heads)
        x = x + attended
        normed, _ = norm_vjp(x, self.own["norm2"])
        return x + feed_forward_vjp(normed, self.own["up"], self.own["down"])[0]


def random_matrix(rng, rows_, columns, dtype):
    return (rng.standard_normal((rows_, columns)) / np.sqrt(rows_)).astype(dtype)


class GPT:
    """Letters in, the logits of the next letter out."""

    def __init__(
        self, vocabulary, dim=96, layers=3, heads=6, kv_heads=3, seed=0, dtype=np.float32
    ) -> None:
        self.sizes = {"dim": dim, "layers": layers, "heads": heads, "kv_heads": kv_heads}
        self.vocabulary = vocabulary
        letters = len(vocabulary.letters)
        rng = np.random.default_rng(seed)
        self.own = {
            "embedding": random_matrix(rng, letters, dim, dtype),
            "norm": np.ones(dim, dtype),
            "output": np.zeros((dim, letters), dtype),
        }
        self.blocks = [Block(dim, heads, kv_heads, rng, dtype) for _ in range(layers)]

    def parameters(self) -> dict[str, np.ndarray]:
        """Return the model's own arrays by name: what is written into them counts."""
        named = dict(self.own)
        for number, block in enumerate(self.blocks):
            named |= {f"blocks.{number}.{name}": x for name, x in block.parameters().items()}
        return named

    def loss_and_gradients(self, tokens, targets):
        x = self.own["embedding"][tokens]
        block_vjps = []
        for block in self.blocks:
            x, vjp = block.vjp(x)
            block_vjps.append(vjp)
        normed, final_norm_vjp = norm_vjp(x, self.own["norm"])
        loss, loss_vjp = cross_entropy_vjp(normed @ self.own["output"], targets)

        # And back, in the opposite order.
        d_logits = loss_vjp()
        d = {"output": rows(normed).T @ rows(d_logits)}
        dx, d["norm"] = final_norm_vjp(d_logits @ self.own["output"].T)
        for number, vjp in reversed(list(enumerate(block_vjps))):
            dx, of_block = vjp(dx)
            d |= {f"blocks.{number}.{name}": x for name, x in of_block.items()}
        # A letter's embedding gets the sum over the places where the letter is.
        d["embedding"] = np.zeros_like(self.own["embedding"])
        np.add.at(d["embedding"], tokens.ravel(), rows(dx))
        return loss, d

    def logits(self, tokens, caches=None, weights=None, last_only=False):
        """Return the logits of the letter after each one, or after the last one alone."""
        x = self.own["embedding"][tokens]
        for block, cache in zip(self.blocks, caches or [None] * len(self.blocks), strict=True):
            x = block(x, cache, weights)
        if last_only:
            x = x[:, -1:]
        return norm_vjp(x, self.own["norm"])[0] @ self.own["output"]

    def save(self, path: str) -> None:
        from safetensors.numpy import save_file

        sizes = json.dumps(self.sizes | {"letters": self.vocabulary.letters})
        save_file(self.parameters(), path, metadata={"language_model": sizes})

    @classmethod
    def load(cls, path: str) -> GPT:
        from safetensors import safe_open

        with safe_open(path, framework="numpy") as file:
            text = (file.metadata() or {}).get("language_model")
            if text is None:
                raise SystemExit(f"{path} was not written by --save")
            sizes = json.loads(text)
            model = cls(Vocabulary(sizes.pop("letters")), **sizes)
            for name, parameter in model.parameters().items():
                parameter[...] = file.get_tensor(name)
        return model


# ---- training ----------------------------------------------------------------------------------


class Adam:
    """Kingma and Ba, "Adam: A Method for Stochastic Optimization", ICLR 2015.

    Every number moves against the running mean of its gradients, divided by the root of the running
    mean of their squares: as far where gradients are small as where they are large.
    """

    def __init__(self, parameters, decays=(0.9, 0.99)) -> None:
        self._parameters = parameters
        self._decays = decays
        self._means = {name: np.zeros_like(x) for name, x in parameters.items()}
        self._squares = {name: np.zeros_like(x) for name, x in parameters.items()}
        self._steps = 0

    def step(self, gradients, rate: float) -> None:
        self._steps += 1
        # Both means begin at 0; this much of them is not the 0 of the beginning.
        seen, seen_squares = (1 - decay**self._steps for decay in self._decays)
        decay, decay_squares = self._decays
        for name, d in gradients.items():
            mean, squares = self._means[name], self._squares[name]
            mean += (1 - decay) * (d - mean)
            squares += (1 - decay_squares) * (d * d - squares)
            self._parameters[name] -= rate / seen * mean / (np.sqrt(squares / seen_squares) + 1e-8)


def clip(gradients, largest: float = 1.0) -> None:
    """Shorten all gradients together if their length is more than `largest`."""
    length = math.sqrt(sum(float(np.vdot(d, d)) for d in gradients.values()))
    if length > largest:
        for d in gradients.values():
            d *= largest / length


def learning_rate(step: int, done: float, highest: float = RATE) -> float:
    """Return the rate: up for a hundred steps, then down along half a cosine to a twentieth."""
    return highest * min((step + 1) / 100, 0.525 + 0.475 * math.cos(math.pi * done))


def random_chunks(text, length: int, rng):
    """Return letters (chunks, length) from anywhere in a text, and the letter after each one."""
    begins = rng.integers(0, len(text) - length, LETTERS_PER_STEP // length)
    places = begins[:, np.newaxis] + np.arange(length)
    return text[places], text[places + 1]


def shared_gradients(model, pool, tokens, targets):
    """Compute halves of a batch in two threads; return the mean loss and gradients."""
    halves = zip(np.split(tokens, 2), np.split(targets, 2), strict=True)
    (loss, d), (other_loss, other_d) = pool.map(
        lambda half: model.loss_and_gradients(*half), halves
    )
    return (loss + other_loss) / 2, {name: (d[name] + other_d[name]) / 2 for name in d}


def train(model, text, pool, steps: int, minutes: float | None = None, seed: int = 0) -> None:
    """Go down the gradients of random chunks; `minutes` end it before `steps` do."""
    rng = np.random.default_rng(seed)
    adam = Adam(model.parameters())
    begin = time.perf_counter()
    recent, done, step = None, 0.0, 0
    while done < 1:
        # The first letters of a chunk have few before them. Shorter chunks among the long ones see
        # to it that the model has learned to do with those, too.
        length = CHUNKS[step % len(CHUNKS)]
        loss, gradients = shared_gradients(model, pool, *random_chunks(text, length, rng))
        clip(gradients)
        adam.step(gradients, learning_rate(step, done))
        step += 1
        seconds = time.perf_counter() - begin
        done = min(1.0, max(step / steps, seconds / (60 * minutes) if minutes else 0))
        if length == LONGEST:
            recent = loss if recent is None else recent + 0.05 * (loss - recent)
        speed = step * LETTERS_PER_STEP / seconds
        progress(done, f"{bits(recent):.2f} bits a letter, {speed:,.0f} letters/s")
    print(f"Trained for {step} steps, {seconds:.0f} s, {speed:,.0f} letters/s.")


def progress(done: float, text: str) -> None:
    if sys.stderr.isatty():
        bar = "#" * int(30 * done)
        sys.stderr.write(f"\r\033[K[{bar:30}] {text}" + ("\n" if done == 1 else ""))


def bits(nats: float) -> float:
    return nats / math.log(2)


# ---- what it has learned -----------------------------------------------------------------------


def held_out_bits(model, text, pool, context: int, count: int) -> float:
    """Return the bits that a letter costs which is predicted from exactly `context` letters.

    Each of `count` letters all over the text has a chunk of its own, whose last prediction counts.
    They are the same letters for every context.
    """
    places = np.linspace(LONGEST, len(text) - 1, count).astype(int)

    def log_probabilities(places):
        chunks = text[places[:, np.newaxis] + np.arange(-context, 0)]
        log_p = log_softmax(model.logits(chunks, last_only=True)[:, 0])
        return log_p[np.arange(len(places)), text[places]]

    parts = np.array_split(places, max(1, count * context // LETTERS_PER_STEP))
    return -bits(np.concatenate(list(pool.map(log_probabilities, parts))).mean())


def counted_bits(train_text, text, letters: int, count: int) -> tuple[float, float]:
    """Return the same for tables of how often letters, and pairs of letters, are in the text."""
    places = np.linspace(LONGEST, len(text) - 1, count).astype(int)
    pairs = np.zeros((letters, letters))
    np.add.at(pairs, (train_text[:-1], train_text[1:]), 1)
    single = (pairs.sum(axis=0) + 1) / (pairs.sum() + letters)
    # A pair that was never seen counts as its second letter alone does.
    p = (pairs + single) / (pairs.sum(axis=1, keepdims=True) + 1)
    found = single[text[places]], p[text[places - 1], text[places]]
    single_bits, pair_bits = (-np.log2(x).mean() for x in found)
    return single_bits, pair_bits


def new_caches(model):
    """Return a cache for each block, which forgets what is farther away than a chunk was long."""
    sizes = model.sizes
    head_dim = sizes["dim"] // sizes["heads"]
    dtype = model.own["embedding"].dtype
    return [
        na.KVCache(1, sizes["kv_heads"], head_dim, window=LONGEST, dtype=dtype)
        for _ in model.blocks
    ]


def write(model, beginning: str, count: int, rng, temperature: float = 0.7) -> str:
    """Go on with a text. A temperature below 1 makes likely letters more likely."""
    caches = new_caches(model)
    tokens = model.vocabulary.encode(beginning)[np.newaxis]
    written = []
    for _ in range(count):
        logits = model.logits(tokens, caches, last_only=True)[0, 0].astype(float)
        logits[0] = -np.inf  # no rare letter: nobody could tell which one it is
        p = np.exp(log_softmax(logits / temperature))
        tokens = rng.choice(len(p), size=(1, 1), p=p / p.sum())
        written.append(tokens[0, 0])
    return model.vocabulary.decode(written)


def likeliest(model, text: str, count: int = 5) -> str:
    """Return the likeliest next letters with their probabilities."""
    tokens = model.vocabulary.encode(text)[np.newaxis]
    p = np.exp(log_softmax(model.logits(tokens, last_only=True)[0, 0]))
    best = np.argsort(p)[::-1][:count]
    return "  ".join(f"{model.vocabulary.letters[i]!r} {p[i]:.2f}" for i in best)


def head_that_repeats(model, text: str):
    """Return weights, layer and head of the head that best looks for what comes next.

    Where a letter has been there before, the letter after that is a good guess of the next one: a
    head that gives such letters much weight is called an induction head.
    """
    tokens = model.vocabulary.encode(text)
    weights = []
    model.logits(tokens[np.newaxis], weights=weights)
    weights = np.concatenate(weights)  # (layers, heads, letters, letters)
    follows = np.zeros((len(tokens), len(tokens)), bool)
    follows[:, 1:] = tokens[:, np.newaxis] == tokens[:-1]
    shares = np.sum(weights * np.tril(follows), axis=(-2, -1))
    layer, head = np.unravel_index(shares.argmax(), shares.shape)
    return weights[layer, head], int(layer), int(head)


def draw(model, path: Path) -> str:
    import matplotlib

    matplotlib.use("Agg")  # a file, wherever this runs
    from numattn import plot

    weights, layer, head = head_that_repeats(model, PICTURE_TEXT)
    labels = [letter.replace(" ", "\N{OPEN BOX}") for letter in PICTURE_TEXT]
    title = f"layer {layer}, head {head}"
    path.parent.mkdir(exist_ok=True)
    plot.plot_pattern(weights, labels, title=title).figure.savefig(path, dpi=150)
    return title


# ---- the program -------------------------------------------------------------------------------


def report(model, train_text, held_out, pool, count: int) -> None:
    print(f"\nHeld-out text, {count} letters: bits a letter\n")
    letters = len(model.vocabulary.letters)
    single, pairs = counted_bits(train_text, held_out, letters, count)
    print(f"  how often each letter is           {single:5.2f}")
    print(f"  how often each pair of letters is  {pairs:5.2f}")
    for context in CONTEXTS:
        cost = held_out_bits(model, held_out, pool, context, count)
        what = "the letter before alone" if context == 1 else f"attention to {context} letters"
        print(f"  model, {what:27} {cost:5.2f}")


def require(module: str, package: str, what: str) -> None:
    if importlib.util.find_spec(module) is None:
        raise SystemExit(f"{what} needs {module}: pip install '{package}'")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--minutes", type=float, help="end the training after so many")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--save", metavar="PATH", help="write the weights (safetensors)")
    parser.add_argument("--load", metavar="PATH", help="read them instead of training")
    parser.add_argument(
        "--picture", metavar="PATH", type=Path, default=RESULTS / "language_model.png"
    )
    parser.add_argument("--no-picture", action="store_true")
    parser.add_argument("--count", type=int, default=2048, help="held-out letters to predict")
    parser.add_argument("--letters", type=int, default=400, help="how many it writes")
    arguments = parser.parse_args()
    if arguments.steps < 1 or arguments.count < 1 or (arguments.minutes or 1) <= 0:
        parser.error("--steps, --minutes and --count: expected more than 0")
    # Before anything takes its time.
    if arguments.save or arguments.load:
        require("safetensors", "numattn[weights]", "--save or --load")
    if not arguments.no_picture:
        require("matplotlib", "numattn[plot]", "the picture (if not --no-picture)")

    na.set_num_threads(1)  # for each of the two threads here
    text = read_text()
    if arguments.load:
        model = GPT.load(arguments.load)
    else:
        model = GPT(Vocabulary.of_text(text), seed=arguments.seed)
    tokens = model.vocabulary.encode(text)
    train_text, held_out = np.split(tokens, [len(tokens) * 9 // 10])
    numbers = sum(x.size for x in model.parameters().values())
    print(f"{len(train_text):,} letters to learn from, {len(held_out):,} held out: the last tenth.")
    print(f"A model of {numbers:,} numbers: {model.sizes}.")
    with ThreadPoolExecutor(2) as pool:
        if not arguments.load:
            train(model, train_text, pool, arguments.steps, arguments.minutes, arguments.seed)
        if arguments.save:
            model.save(arguments.save)
            print(f"Its weights: {arguments.save}")
        report(model, train_text, held_out, pool, arguments.count)

    print(f"\nThe next letter after {SENTENCE!r}\n")
    print(f"  with attention     {likeliest(model, SENTENCE)}")
    print(f"  last letter alone  {likeliest(model, SENTENCE[-1])}")
    print("\nIt writes:\n")
    print(
        BEGINNING
        + write(model, BEGINNING, arguments.letters, np.random.default_rng(arguments.seed))
    )
    if not arguments.no_picture:
        title = draw(model, arguments.picture)
        print(f"\nWhat {title} looks at: {arguments.picture}")


if __name__ == "__main__":
    main()
