"""Check that two builds return the same bits, after a change that must not alter results.

python tests/compare_builds.py BEFORE AFTER [--calls 20000] [--seed 0]

BEFORE and AFTER are the interpreters of two environments, each with a build of numattn, Hypothesis
and ml_dtypes. The program draws the fuzzer's random calls of every entry point, on every level and
dtype, once. Each interpreter runs all of them, and the bytes of their results are compared. The
last line says how many calls there were and how many differ; the exit status is 1 if any differs.
"""

from __future__ import annotations

import argparse
import collections
import hashlib
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import fuzz
import numattn as na
import numpy as np
from hypothesis import HealthCheck, Phase, given, seed, settings

CALLS_PER_SEED = 200
LARGE_SHARE = 0.1


class ComputedError(Exception):
    """Carries the results of an entry point past the comparison with the reference."""

    def __init__(self, results):
        super().__init__()
        self.results = results


def digest(results):
    """Return a hash of the arrays' bytes, dtypes and shapes."""
    state = hashlib.blake2b(digest_size=8)
    for x in results if isinstance(results, tuple) else (results,):
        x = np.asarray(x)
        state.update(f"{x.dtype} {x.shape}".encode() + x.tobytes())
    return state.hexdigest()


def outcome(call):
    """Return the hash of what a call returns, or the error that it raises."""

    def compute(call, function, /, *positional, **arguments):
        results = function(*positional, **arguments)
        results = results if isinstance(results, tuple) else (results,)
        if function is na.attention:
            # The common call, which has its own path.
            q, k, v = (arguments[name] for name in "qkv")
            if call.layout == "bhld" and q.dtype == k.dtype == v.dtype:
                results += (na.attention(q, k, v), na.attention(q, k, v, is_causal=True))
        raise ComputedError(results)

    fuzz.run = compute
    try:
        fuzz.check(call)
    except ComputedError as computed:
        return digest(computed.results)
    except (TypeError, ValueError) as error:
        return f"{type(error).__name__}: {error}"
    return "Error: a window that has moved on"  # the fuzzer expects this of some caches


def enlarge(call):
    """Return a call of several query tiles, several chunks of keys and long vectors, or the same.

    The fuzzer's own problems are small because its reference is slow.
    """
    rng = np.random.default_rng(call.seed)
    small = ("KVCache", "attention_paged", "rotary_embedding", "masked_softmax")
    if call.entry in small or rng.random() > LARGE_SHARE:
        return call
    heads = int(rng.choice([1, 2, 4]))
    return replace(
        call,
        batch=1,
        heads=(heads * int(rng.choice([1, 2])), heads),
        lengths=(int(rng.integers(20, 200)), int(rng.choice([97, 400, 1600, 3200]))),
        dims=(int(rng.choice([16, 80, 200, 400])), int(rng.choice([1, 40, 200]))),
    )


def draw(count, first_seed):
    """Return random calls without wrong arguments."""
    drawn = []
    number = first_seed
    while len(drawn) < count:

        @seed(number)
        @settings(
            max_examples=CALLS_PER_SEED,
            deadline=None,
            database=None,
            phases=[Phase.generate],
            suppress_health_check=list(HealthCheck),
        )
        @given(fuzz.calls())
        def keep(call):
            drawn.append(enlarge(replace(call, wrong=None)))

        keep()
        number += 1
    return drawn[:count]


def run_calls(path):
    """Print the outcome of each call in a file, as the process of one build."""
    for line in path.read_text().splitlines():
        print(repr(outcome(eval(line, vars(fuzz)))), flush=True)


def outcomes(python, path):
    completed = subprocess.run(
        [python, __file__, "--run", path], stdout=subprocess.PIPE, text=True, check=True
    )
    return completed.stdout.splitlines()


def compare(before, after, count, first_seed):
    """Return how many of the calls differ; print each of them, and what was compared."""
    calls = draw(count, first_seed)
    with tempfile.NamedTemporaryFile("w", suffix=".txt") as file, ThreadPoolExecutor(2) as pool:
        file.write("\n".join(map(repr, calls)))
        file.flush()
        old, new = pool.map(outcomes, (before, after), (file.name, file.name))
    differing = [x for x in zip(calls, old, new, strict=True) if x[1] != x[2]]
    for call, was, now in differing:
        print(f"{call}\n  before: {was}\n  after:  {now}")
    for field in ("entry", "level", "dtype"):
        counts = collections.Counter(getattr(call, field) for call in calls)
        print(f"{field}: " + ", ".join(f"{name} {n}" for name, n in sorted(counts.items())))
    large = sum(call.lengths[0] >= 20 and call.lengths[1] >= 1600 for call in calls)
    refused = sum("Error: " in x and x == y for x, y in zip(old, new, strict=True))
    assert refused < len(calls) / 10, f"{refused} of {len(calls)} calls are refused by both"
    print(
        f"{len(calls)} calls ({large} of many queries and several chunks, {refused} refused by "
        f"both), {len(differing)} differ"
    )
    return len(differing)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("before", nargs="?", help="an interpreter that has the one build")
    parser.add_argument("after", nargs="?", help="an interpreter that has the other")
    parser.add_argument("--calls", type=int, default=20_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--run", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.run:
        run_calls(arguments.run)
        return 0
    if arguments.after is None:
        parser.error("two interpreters are needed")
    differ = compare(arguments.before, arguments.after, arguments.calls, arguments.seed)
    return 1 if differ else 0


if __name__ == "__main__":
    sys.exit(main())
