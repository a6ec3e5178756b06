"""Promise: safe from several Python threads at once, after fork, and interrupted by Ctrl-C."""

import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import numattn as na
import numpy as np
import pytest
from numattn import _runtime

pytestmark = pytest.mark.skipif(
    _runtime.native is None, reason="the NumPy backend has no threads of its own"
)


def test_python_threads_at_once(arrays):
    problems = [arrays(hq=3, lq=100 + 40 * i, lk=300, d=20 + i) for i in range(8)]
    expected = [na.attention(*p, num_threads=1) for p in problems]

    def compute(i):
        return all(
            np.array_equal(na.attention(*problems[i], num_threads=1 + n % 4), expected[i])
            for n in range(50)
        )

    with ThreadPoolExecutor(8) as threads:
        assert all(threads.map(compute, range(8)))


def test_set_num_threads_while_computing(arrays):
    q, k, v = arrays(hq=4, lq=200)
    expected = na.attention(q, k, v)
    before = na.get_num_threads()
    stop = threading.Event()

    def change():
        while not stop.is_set():
            for n in (1, 2, 5):
                na.set_num_threads(n)

    changer = threading.Thread(target=change)
    changer.start()
    try:
        for _ in range(200):
            np.testing.assert_array_equal(na.attention(q, k, v), expected)
    finally:
        stop.set()
        changer.join()
        na.set_num_threads(before)


def run_python(code, **environment):
    return subprocess.run(
        [sys.executable, "-W", "ignore::DeprecationWarning", "-c", code],
        capture_output=True, text=True, timeout=120, check=False, env=os.environ | environment,
    )  # fmt: skip


FORKING = """
import os, sys, threading, numpy as np, numattn as na
x = np.random.default_rng(0).standard_normal((8, 300, 32)).astype(np.float32)
expected = na.attention(x, x, x, num_threads=4)
if {while_computing}:
    def compute():
        while True:
            na.attention(x, x, x, num_threads=4)
    threading.Thread(target=compute, daemon=True).start()
def same():
    return all(np.array_equal(na.attention(x, x, x, num_threads=4), expected) for _ in range(20))
for _ in range(10):
    child = os.fork()
    if child == 0:
        ok = same()
        grandchild = os.fork()
        if grandchild == 0:
            os._exit(0 if same() else 1)
        os._exit(0 if ok and os.waitpid(grandchild, 0)[1] == 0 else 1)
    assert os.waitpid(child, 0)[1] == 0
assert same()
print("fine")
"""


@pytest.mark.smoke
@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
@pytest.mark.parametrize("while_computing", [False, True])
def test_fork(while_computing):
    result = run_python(FORKING.format(while_computing=while_computing))
    assert result.stdout == "fine\n", result.stderr


def test_exit_while_computing():
    code = """
import threading, time, numpy as np, numattn as na
x = np.ones((4, 4000, 64), np.float32)
def compute():
    while True:
        na.attention(x, x, x, num_threads=3)
threading.Thread(target=compute, daemon=True).start()
time.sleep(0.2)
print("fine", flush=True)
"""
    result = run_python(code)
    assert result.stdout == "fine\n"
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("num_threads", [1, 2])
@pytest.mark.parametrize("isa", ["generic"], indirect=True)
def test_ctrl_c(isa, num_threads):
    """One work item of one row block against many keys, far longer than the test waits."""
    q = np.ones((1, 64, 64), np.float32)
    k = np.lib.stride_tricks.as_strided(q, (1, 2**33, 64), (0, 0, 4))  # minutes of work
    main = threading.get_ident()
    sent = []

    def interrupt():
        time.sleep(0.5)
        sent.append(time.monotonic())
        signal.pthread_kill(main, signal.SIGINT)

    # A shell starts what it does not wait for with the signal ignored.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    thread = threading.Thread(target=interrupt)
    thread.start()
    try:
        with pytest.raises(KeyboardInterrupt):
            na.attention(q, k, k, num_threads=num_threads)
    finally:
        signal.signal(signal.SIGINT, before)
    assert time.monotonic() - sent[0] < 1
    thread.join()
    assert np.isfinite(na.attention(q, q, q)).all()


def test_computing_in_a_signal_handler(arrays):
    """Scratch that a computation uses is not given away to one inside of it."""
    # Handlers run inside a call only if it takes longer than the tenth of a second between looks.
    q, k, v = arrays(hq=4, lq=8000, d=64)
    expected = na.attention(q, k, v, num_threads=1)
    small = arrays(hq=2, lq=300, d=200)
    handled = []

    def handle(signum, frame):
        handled.append(na.attention(*small, num_threads=1))

    before = signal.signal(signal.SIGALRM, handle)
    signal.setitimer(signal.ITIMER_REAL, 0.02, 0.02)
    try:
        for _ in range(3):
            np.testing.assert_array_equal(na.attention(q, k, v, num_threads=1), expected)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert handled
    for result in handled:
        np.testing.assert_array_equal(result, handled[0])


def with_lengths(q, k, v, lengths):
    return na.attention(q, k, v, kv_lengths=lengths)


def with_starts(q, k, v, starts):
    rows = [x.swapaxes(1, 2).reshape(-1, *x.shape[1::2]) for x in (q, k, v)]
    return na.attention_varlen(*rows, starts, starts)


def with_pages(q, k, v, pages):
    paged = [x.swapaxes(1, 2).reshape(-1, 50, *x.shape[1::2]) for x in (k, v)]
    return na.attention_paged(q, *paged, pages.reshape(2, 10), [500, 500])


@pytest.mark.parametrize(
    ("call", "good"),
    [(with_lengths, [500, 100]), (with_starts, [0, 500, 1000]), (with_pages, range(20))],
)
def test_numbers_that_change_meanwhile(arrays, call, good):
    """What says where to read is copied, then checked. Without the GIL each step can be met."""
    q, k, v = arrays(2, hq=4, lq=500)
    numbers = np.array(good)
    expected = call(q, k, v, numbers)
    stop = threading.Event()

    def change():
        while not stop.is_set():
            numbers[:] = 2**40
            numbers[:] = good

    changer = threading.Thread(target=change)
    changer.start()
    try:
        for _ in range(100):
            try:
                out = call(q, k, v, numbers)
            except ValueError:
                continue
            np.testing.assert_array_equal(out, expected)
    finally:
        stop.set()
        changer.join()


def test_exit_in_the_middle_of_a_long_call():
    """The interpreter goes away slowly while a daemon thread computes for seconds."""
    code = """
import threading, time, numpy as np, numattn as na
class Slow:
    def __del__(self):
        time.sleep(0.5)
slow = Slow()
q = np.ones((8, 64, 64), np.float32)
k = np.lib.stride_tricks.as_strided(q, (8, 2**24, 64), (0, 0, 4))
threading.Thread(target=lambda: na.attention(q, k, k, num_threads=2), daemon=True).start()
time.sleep(0.3)
print("fine", flush=True)
"""
    result = run_python(code)
    assert result.stdout == "fine\n"
    assert result.returncode == 0, result.stderr


def test_ctrl_c_at_any_moment(arrays):
    """An interrupt that comes as the last item is done is no other error."""
    q, k, v = arrays(hq=4, lq=1000, d=64)
    interrupted = 0
    for n in range(60):
        signal.setitimer(signal.ITIMER_REAL, 0.0005 + 0.0002 * n)
        before = signal.signal(signal.SIGALRM, signal.default_int_handler)
        try:
            signal.setitimer(signal.ITIMER_REAL, 0.0005 + 0.0002 * n)
            for _ in range(100):
                na.attention(q, k, v, num_threads=1 + n % 2)
        except KeyboardInterrupt:
            interrupted += 1
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, before)
    assert interrupted == 60


@pytest.mark.smoke
def test_threadpoolctl_lists_and_limits(arrays):
    threadpoolctl = pytest.importorskip("threadpoolctl")
    q, k, v = arrays(hq=4, lq=300)
    before = na.get_num_threads()
    expected = na.attention(q, k, v)

    def listed():
        return [x for x in threadpoolctl.threadpool_info() if x["user_api"] == "numattn"]

    (info,) = listed()
    assert info["num_threads"] == before
    assert info["version"] == na.__version__
    na.set_num_threads(3)
    try:
        with threadpoolctl.threadpool_limits(1):
            assert na.get_num_threads() == 1
            np.testing.assert_array_equal(na.attention(q, k, v), expected)
        assert na.get_num_threads() == 3
        with threadpoolctl.threadpool_limits(2, user_api="numattn"):
            assert listed()[0]["num_threads"] == 2
        with threadpoolctl.threadpool_limits(1, user_api="blas"):
            assert na.get_num_threads() == 3
    finally:
        na.set_num_threads(before)


MULTIPROCESSING = """
import multiprocessing, numpy as np, numattn as na
x = np.random.default_rng(0).standard_normal((8, 300, 32)).astype(np.float32)
def attend(_):
    return na.attention(x, x, x, num_threads=4)
if __name__ == "__main__":
    expected = attend(0)
    with multiprocessing.get_context("{method}").Pool(2) as pool:
        assert all(np.array_equal(out, expected) for out in pool.map(attend, range(6)))
    print("fine")
"""


@pytest.mark.parametrize("method", ["fork", "spawn", "forkserver"])
def test_multiprocessing(method, tmp_path):
    if method not in multiprocessing.get_all_start_methods():
        pytest.skip(f"no {method} here")
    script = tmp_path / "script.py"
    script.write_text(MULTIPROCESSING.format(method=method))
    result = subprocess.run(
        [sys.executable, "-W", "ignore::DeprecationWarning", script],
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert result.stdout == "fine\n", result.stderr
