"""Promise: safe from several Python threads at once, after fork, and interrupted by Ctrl-C."""

import multiprocessing
import os
import platform
import signal
import subprocess
import sys
import sysconfig
import threading
import time
import warnings
from concurrent.futures import ThreadPoolExecutor

import numattn as na
import numpy as np
import pytest
from numattn import _runtime

pytestmark = pytest.mark.skipif(
    _runtime.native is None, reason="the NumPy backend has no threads of its own"
)

needs_signals = pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="no signals here")


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


def test_gradients_in_python_threads_at_once(arrays):
    """Also of one result: what it keeps is only read."""
    problems = [arrays(hq=4, hkv=2, lq=60 + 40 * i, lk=200, d=20 + i) for i in range(4)]
    functions = [na.attention_vjp(*p, is_causal=True)[1] for p in problems]
    expected = [vjp(q) for vjp, (q, _, _) in zip(functions, problems, strict=True)]

    def compute(i):
        q, vjp = problems[i % 4][0], functions[i % 4]
        return all(
            np.array_equal(x, wanted)
            for _ in range(20)
            for x, wanted in zip(vjp(q)[:3], expected[i % 4][:3], strict=True)
        )

    with ThreadPoolExecutor(8) as threads:
        assert all(threads.map(compute, range(8)))


ROUNDING = """
import ctypes, numattn as na, numpy as np
libm = ctypes.CDLL("libm.so.6")
x = np.random.default_rng(0).standard_normal((3, 6, 300, 40), dtype=np.float32)
tiny = x * np.float32(1e-38)  # subnormal results
calls = {
    "attention": lambda n: na.attention(*x, num_threads=n),
    "subnormal": lambda n: na.attention(x[0], x[1], tiny[2], num_threads=n),
    "one query": lambda n: na.attention(x[0, :, :1], *x[1:], num_threads=n),
    "small": lambda n: na.attention(*x[:, :, :3], num_threads=n),
    "weights": lambda n: na.attention_weights(*x[:2], num_threads=n),
    "received": lambda n: na.attention_received(*x[:2], num_threads=n),
    "gradients": lambda n: na.attention_vjp(*x, num_threads=n)[1](x[1]).k,
    "softmax": lambda n: na.masked_softmax(x),
}
expected = {name: call(1) for name, call in calls.items()}
assert libm.fesetround(0x800) == 0  # upward
for n in (1, 2, 5):
    for name, call in calls.items():
        assert np.array_equal(call(n), expected[name]), (name, n)
assert libm.fegetround() == 0x800
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the C library by its name there")
@pytest.mark.skipif(platform.machine() != "x86_64", reason="x86's number of a rounding mode")
def test_rounding_of_the_caller():
    """Helpers have settings of their own; the caller's come back."""
    subprocess.run([sys.executable, "-c", ROUNDING], check=True)


@pytest.mark.skipif(not os.path.exists("/proc/self/task"), reason="needs Linux")
def test_helpers_end(arrays):
    code = """
import os, time, numattn as na, numpy as np
def threads(): return len(os.listdir("/proc/self/task"))
before = threads()
x = np.ones((128, 200, 64), np.float32)
na.attention(x, x, x, num_threads=64)
assert threads() > before
for _ in range(150):
    time.sleep(0.1)
    if threads() == before: break
assert threads() == before, threads()
na.attention(x, x, x, num_threads=3)
"""
    subprocess.run([sys.executable, "-c", code], check=True)


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


FORKING_IN_A_HANDLER = """
import os, signal, sys, numpy as np, numattn as na
q = np.random.default_rng(0).standard_normal((4, 6000, 64)).astype(np.float32)
expected = na.attention(q, q, q)
child = None
def handle(signum, frame):
    global child
    if child is None:
        child = os.fork()
signal.signal(signal.SIGALRM, handle)
for threads in (2, 1):
    child = None
    while child is None:
        signal.setitimer(signal.ITIMER_REAL, 0.02)
        try:
            out = na.attention(q, q, q, num_threads=threads)
        except RuntimeError as error:  # some of the work was the helpers'
            assert child == 0 and threads > 1 and "a signal handler forked" in str(error), error
        else:
            assert np.array_equal(out, expected)
    if child == 0:
        os._exit(0 if np.array_equal(na.attention(q, q, q, num_threads=threads), expected) else 1)
    assert os.waitpid(child, 0)[1] == 0
print("fine")
"""


@needs_signals
def test_fork_in_a_signal_handler():
    """The child comes back into the middle of a call, without the threads that worked on it."""
    result = run_python(FORKING_IN_A_HANDLER)
    assert result.stdout == "fine\n", result.stderr


@pytest.mark.parametrize("num_threads", [1, 2])
@pytest.mark.parametrize("isa", ["generic"], indirect=True)
def test_ctrl_c(isa, num_threads):
    """One work item of one row block against many keys, far longer than the test waits."""
    q = np.ones((1, 64, 64), np.float32)
    k = np.lib.stride_tricks.as_strided(q, (1, 2**33, 64), (0, 0, 4))  # minutes of work
    sent = []

    def interrupt():
        time.sleep(0.5)
        sent.append(time.monotonic())
        signal.raise_signal(signal.SIGINT)  # in this thread, as Windows does

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


@needs_signals
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


@pytest.mark.parametrize("changed", ["q", "k", "v", "out"])
def test_shapes_that_change_meanwhile(arrays, changed):
    """A number of the caller's kind runs the caller's code in the middle of the checks."""
    q, k, v = (x.copy() for x in arrays(hq=1, lq=60, d=8))
    given = {"q": q, "k": k, "v": v, "out": np.empty_like(q)}
    expected = na.attention(q, k, v, scale=0.5)

    class Number(float):
        def __float__(self):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", DeprecationWarning)
                given[changed].shape = 1, 1, 480
            return 0.5

    if changed == "out":  # not looked at yet
        with pytest.raises(ValueError, match="out: got shape"):
            na.attention(**given, scale=Number(0.5))
        return
    na.attention(**given, scale=Number(0.5))
    np.testing.assert_array_equal(given["out"], expected)


@pytest.mark.skipif(not sysconfig.get_config_var("Py_GIL_DISABLED"), reason="with a GIL")
def test_no_gil_is_needed():
    result = run_python(
        "import sys, numpy; before = sys._is_gil_enabled()\n"
        "import numattn; print(before, sys._is_gil_enabled())"
    )
    assert result.stdout == "False False\n", result.stderr


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


def as_pages(x):
    return x.swapaxes(0, 1).reshape(-1, 50, x.shape[0], x.shape[2])


@needs_signals
@pytest.mark.parametrize(
    "call",
    [
        lambda q, k, v, n: na.attention(q, k, v, num_threads=n),
        lambda q, k, v, n: na.attention_varlen(
            *(x.swapaxes(0, 1) for x in (q, k, v)), [0, 400, 1000], [0, 400, 1000], num_threads=n
        ),
        lambda q, k, v, n: na.attention_paged(
            q[np.newaxis], as_pages(k), as_pages(v), [range(20)], [1000], num_threads=n
        ),
        lambda q, k, v, n: na.attention_received(q, k, num_threads=n),
        lambda q, k, v, n: na.attention_vjp(q, k, v, num_threads=n)[1](v),
        lambda q, k, v, n: na.masked_softmax(q),
        lambda q, k, v, n: na.rotary_embedding(q),
    ],
    ids=["attention", "varlen", "paged", "received", "gradients", "softmax", "rotary"],
)
def test_ctrl_c_at_any_moment(arrays, call):
    """An interrupt that comes as the last item is done is no other error."""
    q, k, v = arrays(hq=4, lq=1000, d=64)
    interrupted = 0
    for n in range(30):
        before = signal.signal(signal.SIGALRM, signal.default_int_handler)
        try:
            signal.setitimer(signal.ITIMER_REAL, 0.0005 + 0.0004 * n)
            while True:
                call(q, k, v, 1 + n % 2)
        except KeyboardInterrupt:
            interrupted += 1
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, before)
    assert interrupted == 30


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


@pytest.mark.parametrize("number", [0, -1, 5000])
def test_threadpoolctl_limits_whatever_the_number(number):
    threadpoolctl = pytest.importorskip("threadpoolctl")
    before = na.get_num_threads()
    with threadpoolctl.threadpool_limits(number, user_api="numattn"):
        assert na.get_num_threads() == min(max(number, 1), 1024)
    assert na.get_num_threads() == before


@pytest.mark.parametrize("content", ["", "raise OSError", "class LibController: pass"])
def test_a_threadpoolctl_that_is_too_old_or_broken(tmp_path, content):
    (tmp_path / "threadpoolctl.py").write_text(content)
    result = run_python("import numattn; print('fine')", PYTHONPATH=str(tmp_path))
    assert result.stdout == "fine\n", result.stderr


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
