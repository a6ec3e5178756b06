"""Run one library in its own process: `python worker.py MODULE PEER THREADS`.

MODULE is `peers`, `layer_peers` or `model_peers`: it has the libraries and their cases.

The program reads one JSON request per line from standard input, and answers with one JSON line:

- {"prepare": case} makes the arrays and calls the library once;
- {"time": calls} times this number of calls, by the fastest variant;
- {"sample": n} returns n values of each array of the results;
- {"blas": true} names NumPy's BLAS;
- {"peak": seconds, "dtype": name, "threads": n} measures multiply-adds on n threads (numattn only);
- {"bandwidth": seconds} measures the bytes that can be read (numattn only).
"""

from __future__ import annotations

import importlib
import json
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from peers import Unsupported


def seconds(call, calls):
    begin = time.perf_counter()
    for _ in range(calls):
        call()
    return (time.perf_counter() - begin) / calls


def measure_peak(threads, wanted, dtype):
    """Return the operations per second of all threads together."""
    from numattn import _core

    def multiply_adds(rounds):
        return _core.multiply_adds(rounds, dtype)

    multiply_adds(200)
    begin = time.perf_counter()
    multiply_adds(2000)
    rounds = max(2000, int(2000 * wanted / (time.perf_counter() - begin)))
    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(multiply_adds, [200] * threads))
        begin = time.perf_counter()
        flops = sum(pool.map(multiply_adds, [rounds] * threads))
        return flops / (time.perf_counter() - begin)


def measure_bandwidth(threads, wanted):
    """Return the bytes per second that all threads read from arrays larger than any cache."""
    from numattn import _core

    parts = np.array_split(np.ones(1 << 26, np.float32), threads)
    parts = [x[: len(x) // 64 * 64] for x in parts]
    size = sum(x.nbytes for x in parts)
    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(_core.read_floats, parts))
        best = 0.0
        begin = time.perf_counter()
        while best == 0 or time.perf_counter() - begin < wanted:
            start = time.perf_counter()
            list(pool.map(_core.read_floats, parts))
            best = max(best, size / (time.perf_counter() - start))
    return best


def sample(result, count):
    """Return up to `count` values of each array of a result."""
    arrays = result if isinstance(result, list | tuple) else [result]
    flat = [np.asarray(x).astype(np.float64).ravel() for x in arrays]
    return [x[:: -(-x.size // count)].tolist() for x in flat]


def main():
    module, peer, threads = importlib.import_module(sys.argv[1]), sys.argv[2], int(sys.argv[3])
    calls = {}
    answers = sys.stdout
    sys.stdout = sys.stderr  # libraries may print
    for line in sys.stdin:
        request = json.loads(line)
        if "prepare" in request:
            try:
                calls = module.PEERS[peer](module.Case(**request["prepare"]), threads)
                for each in calls.values():
                    each()
                times = {name: seconds(each, 1) for name, each in calls.items()}
                times = {
                    # Three times, unless one call takes long.
                    name: min(
                        seconds(each, 1 + int(0.02 / times[name]))
                        for _ in range(3 if times[name] < 0.3 else 1)
                    )
                    for name, each in calls.items()
                }
                variant = min(times, key=times.__getitem__)
                # Which variant is fastest may change from turn to turn: keep all that are close.
                calls = {name: calls[name] for name in calls if times[name] < 1.3 * times[variant]}
                answer = {"variant": variant, "seconds": times[variant]}
            except Unsupported as why:
                answer = {"unsupported": str(why)}
            except ImportError as error:
                answer = {"missing": str(error)}
        elif "time" in request:
            answer = {"seconds": min(seconds(call, request["time"]) for call in calls.values())}
        elif "sample" in request:
            answer = {"samples": [sample(call(), request["sample"]) for call in calls.values()]}
        elif "blas" in request:
            from numattn._blas import describe

            answer = {"blas": describe()}
        elif "bandwidth" in request:
            answer = {"per_second": measure_bandwidth(threads, request["bandwidth"])}
        else:
            answer = {
                "per_second": measure_peak(
                    request.get("threads", threads), request["peak"], request["dtype"]
                )
            }
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


if __name__ == "__main__":
    main()
