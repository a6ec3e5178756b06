"""Promise: scratch memory goes with threads and tiles, never with Lq * Lk, and is not lost."""

import ctypes
import mmap
import os
import subprocess
import sys
import threading

import numattn as na
import numpy as np
import pytest
from numattn import _runtime, _workspace

# The peak of the process before and after; arrays are made before, and touched.
PEAK = """
import numpy as np, numattn as na
def memory(what):
    for line in open("/proc/self/status"):
        if line.startswith(what):
            return int(line.split()[1]) * 1024
length, d = {length}, 32
dtype = {dtype}
rng = np.random.default_rng(0)
q, k, v = rng.standard_normal((3, 1, length, d), dtype=np.float32).astype(dtype)
out = np.ones_like(q)
small = q[:, :64]
na.attention(small, small, small, is_causal=True, out=out[:, :64])
open("/proc/self/clear_refs", "w").write("5")  # the peak begins anew
before = memory("VmRSS")
{use}
print(memory("VmHWM") - before)
"""


ATTEND = "na.attention(q[:, -{rows}:], k, v, is_causal=True, out=out[:, -{rows}:])"


def added_peak(length, rows, use=ATTEND, dtype="np.float32", **environment):
    code = PEAK.format(length=length, use=use.format(rows=rows), dtype=dtype)
    result = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True, text=True, check=True, env=os.environ | environment,
    )  # fmt: skip
    return int(result.stdout)


DTYPES = ["np.float32", "np.float64", "np.float16", "__import__('ml_dtypes').bfloat16"]

needs_linux = pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="needs Linux")


@needs_linux
def test_the_measurement_sees_memory_come_and_go():
    assert added_peak(1024, 0, use="x = np.ones(3 * 2**20); del x") > 20 * 2**20


@needs_linux
@pytest.mark.skipif(_runtime.native is None, reason="needs the compiled kernels")
@pytest.mark.parametrize("dtype", DTYPES)
def test_native_scratch_of_long_sequences(dtype):
    assert added_peak(131072, 1024, dtype=dtype) < 16 * 2**20


@needs_linux
@pytest.mark.skipif(_runtime.native is None, reason="needs the compiled kernels")
@pytest.mark.parametrize("dtype", DTYPES)
def test_native_scratch_of_one_query(dtype):
    # k alone is 16 to 32 MiB.
    assert added_peak(131072, 1, dtype=dtype) < 4 * 2**20


@needs_linux
@pytest.mark.skipif(_runtime.native is None, reason="needs the compiled kernels")
@pytest.mark.parametrize(
    "call",
    [
        # ten million keys, of which a window leaves a hundred
        "keys(1, 10**7), window=(100, 0)",
        # one long sequence among short ones
        "keys(64, 10**6), kv_lengths=[10**6] + [100] * 63",
    ],
)
def test_native_scratch_goes_with_the_keys_that_are_read(call):
    use = (
        "keys = lambda batch, n: (np.broadcast_to(q[:1, :1], (batch, 8, 1, d)), "
        "*[np.broadcast_to(q[:1, :1], (batch, 8, n, d))] * 2); "
        f"na.attention(*{call.partition(')')[0]}){call.partition(')')[2]})"
    )
    assert added_peak(1024, 0, use=use) < 8 * 2**20


@needs_linux
@pytest.mark.skipif(_runtime.native is None, reason="needs the compiled kernels")
def test_scratch_of_a_huge_call_is_given_back():
    use = "x = np.ones((1, 64, 40_000), dtype); na.attention(x, x, x, out=x.copy()); del x"
    use += "; print(memory('VmRSS') - before); raise SystemExit"
    assert added_peak(1024, 0, use=use) < 12 * 2**20


@needs_linux
@pytest.mark.parametrize("dtype", DTYPES)
def test_numpy_scratch_of_long_sequences(dtype):
    limit = 128 if dtype == "np.float64" else 64
    assert added_peak(131072, 160, dtype=dtype, NUMATTN_BACKEND="numpy") < limit * 2**20


GRADIENTS = (
    "rows = q[:, -{rows}:]; out, vjp = na.attention_vjp(rows, k, v, is_causal=True); "
    "vjp(np.ones_like(out))"
)


@needs_linux
@pytest.mark.parametrize(
    ("backend", "dtype"),
    [*(("native", dtype) for dtype in DTYPES), ("numpy", "np.float32"), ("numpy", "np.float16")],
)
def test_scratch_of_gradients(backend, dtype):
    """Beside the gradients of k and v: 32 MiB, 64 MiB in float64, 48 MiB with sums in float32."""
    if backend == "native" and _runtime.native is None:
        pytest.skip("needs the compiled kernels")
    rows, scratch = (512, 32) if backend == "native" else (128, 64)
    limit = scratch + (32 if dtype == "np.float32" else 48)
    limit *= 2 if dtype == "np.float64" else 1
    # All logits have 256 MiB, or 64 MiB with several arrays of them.
    environment = {"NUMATTN_BACKEND": backend, "OPENBLAS_NUM_THREADS": "1"}
    uses = [GRADIENTS]
    if dtype == "np.float32":  # random numbers are the same for all, and slow
        uses.append(GRADIENTS.replace("is_causal=True", "dropout=0.1, rng=0"))
    for use in uses:
        assert added_peak(131072, rows, use, dtype, **environment) < limit * 2**20


@needs_linux
@pytest.mark.slow
@pytest.mark.parametrize(("backend", "limit"), [("native", 16), ("numpy", 64)])
def test_scratch_of_a_long_causal_sequence(backend, limit):
    assert added_peak(131072, 131072, NUMATTN_BACKEND=backend) < limit * 2**20


@pytest.mark.skipif(sys.platform == "win32", reason="needs mprotect")
@pytest.mark.parametrize("at_end", [False, True])
@pytest.mark.parametrize(
    ("lq", "lk", "d"),
    [(1, 1, 1), (5, 7, 3), (3, 98, 16), (65, 97, 17), (70, 99, 32), (130, 193, 33)],
)
def test_nothing_outside_the_arrays_is_touched(dtype, arrays, at_end, lq, lk, d):
    """Every array begins or ends at a page that may not be read or written."""
    q, k, v = arrays(hq=2, lq=lq, lk=lk, d=d, dtype=dtype)
    rng = np.random.default_rng(1)
    mask = rng.random((lq, lk)) < 0.7
    bias = rng.standard_normal((2, lq, lk)).astype(dtype)
    expected = na.attention(q, k, v, mask=mask, bias=bias, is_causal=True)
    plain = na.attention(q, k, v)
    q, k, v, mask, bias = (between_guards(x, at_end) for x in (q, k, v, mask, bias))
    out = between_guards(np.zeros_like(expected), at_end)
    na.attention(q, k, v, out=out)
    np.testing.assert_array_equal(out, plain)
    na.attention(q, k, v, mask=mask, bias=bias, is_causal=True, out=out)
    np.testing.assert_array_equal(out, expected)


def between_guards(x, at_end):
    """Copy an array to memory that has a protected page on either side."""
    page = mmap.PAGESIZE
    inside = -(-x.nbytes // page) * page
    memory = mmap.mmap(-1, inside + 2 * page)
    start = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    mprotect = ctypes.CDLL(None, use_errno=True).mprotect
    mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    for guard in (start, start + page + inside):
        assert mprotect(guard, page, 0) == 0
    offset = page + (inside - x.nbytes if at_end else 0)
    result = np.frombuffer(memory, np.uint8)[offset : offset + x.nbytes].view(x.dtype)
    result = result.reshape(x.shape)
    result[...] = x
    return result


def resident():
    with open("/proc/self/statm") as statm:
        return int(statm.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@needs_linux
def test_nothing_leaks(backend, arrays):
    q, k, v = arrays(2, hq=2, lq=20, lk=20)
    mask = np.ones((20, 20), bool)

    def use():
        na.attention(q, k, v)
        na.attention(q, k, v, mask=mask, kv_lengths=[3, 4], return_lse=True, sinks=[1, 2])
        with pytest.raises(ValueError, match="layout"):
            na.attention(q, k, v, layout="no")

    for _ in range(200):
        use()
    before = resident()
    for _ in range(2000):
        use()
    assert resident() - before < 2**20


SCARCE = """
import gc, os, resource, numpy as np, numattn as na
rng = np.random.default_rng(0)
q, k, v = rng.standard_normal((3, 2, 4, 700, 64), dtype=np.float32)
one = q[:, :, :1]
starts = np.array([0, 300, 700])
ragged = [np.ascontiguousarray(x[0].swapaxes(0, 1)) for x in (q, k, v)]
pages = [np.ascontiguousarray(x[0].swapaxes(0, 1)).reshape(7, 100, 4, 64) for x in (k, v)]
mask = rng.random((700, 700)) < 0.5
calls = {
    "attention": lambda: na.attention(q, k, v, num_threads=3),
    "mask": lambda: na.attention(q, k, v, mask=mask, return_lse=True, num_threads=3),
    "one query": lambda: na.attention(np.broadcast_to(one, (300, 2, 4, 1, 64)), k, v),
    "varlen": lambda: na.attention_varlen(*ragged, starts, starts, num_threads=3),
    "paged": lambda: na.attention_paged(q[:1], *pages, [list(range(7))], [700], num_threads=3),
    "weights": lambda: na.attention_weights(q, k),
    "received": lambda: na.attention_received(np.broadcast_to(one, (100, 2, 4, 1, 64)), k),
    "scores": lambda: na.qk_scores(q, k),
    "softmax": lambda: na.masked_softmax(q),
    "rotary": lambda: na.rotary_embedding(q),
    "quantize": lambda: na.quantize_kv(k),
    "merge": lambda: na.merge_states([(q, q[..., 0]), (v, v[..., 0])]),
    "values": lambda: na.aggregate_values(np.ones((2, 4, 700, 700), np.float32), v),
    "layer": lambda: layer(q[0]),
    "gradients": lambda: na.attention_vjp(q, k, v, num_threads=3)[1](q),
}
layer = na.MultiHeadAttention(64, 4, rng=0)
def fill():
    cache = na.KVCache(2, 4, 64)
    cache.append(k, v)
    cache.append(k, v)
    return cache.attend(one)
calls["cache"] = fill
def first(x):
    return x[0] if isinstance(x, tuple) else x
statm = os.open("/proc/self/statm", os.O_RDONLY)
def size():  # without the buffers of a file, which would be room when they are gone
    return int(os.pread(statm, 100, 0).split()[0]) * resource.getpagesize()
{warm}
# NumPy's iterators, with which angles are made, crash where they get no buffer, and its BLAS ends
# the process.
calls["rotary"]()
q @ q.swapaxes(-1, -2)
soft, hard = resource.getrlimit(resource.RLIMIT_AS)
all_refused = 0
for name, call in calls.items():
    refused = 0
    for room in [0] + [2**n for n in range(12, 27)]:
        gc.collect()
        resource.setrlimit(resource.RLIMIT_AS, (size() + room, hard))
        try:
            out = call()
        except MemoryError:
            refused += 1
            out = None
        finally:
            resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
        assert out is None or np.isfinite(first(out)).all(), (name, room)
    out = call()
    assert np.isfinite(first(out)).all(), name
    assert refused > 0, name
    all_refused += refused
print("fine", all_refused)
"""


def test_memory_of_a_layer_is_for_calls_alone(any_backend):
    """What a thread keeps is bounded, given back, and never part of a result."""
    layer = na.MultiHeadAttention(32, 4, kv_heads=2, rotary=True, rng=0)
    x = np.random.default_rng(0).standard_normal((4, 2000, 32), dtype=np.float32)
    expected = layer(x, window=(3, 3)).copy()
    kept = []

    def use():
        results = []
        for _ in range(3):
            results.append(layer(x, window=(3, 3)))
            kept.append(_workspace._kept.memory.size)
        layer(-x, window=(3, 3))
        for result in results:
            np.testing.assert_array_equal(result, expected)
        for _ in range(16):
            kept.append(_workspace._kept.memory.size)
            layer(x[:, :5])
        kept.append(_workspace._kept.memory.size)

    thread = threading.Thread(target=use)
    thread.start()
    thread.join()
    q_k_v_and_result = (4 + 2 + 2 + 4) * 8 * 4 * 2000 * 4
    first, *several, last = kept
    assert first == last == 0
    assert set(several) == {several[0]}
    assert q_k_v_and_result <= several[0] <= q_k_v_and_result + 1000


def use_memory(size, uses=1):
    """Return whether an array of so many bytes was in kept memory, each time."""
    kept = []
    for _ in range(uses):
        with _workspace.Workspace() as workspace:
            array = workspace.empty((size,), np.dtype(np.uint8))
            kept.append(np.shares_memory(array, _workspace._kept.memory))
    return kept


def test_large_arrays_are_not_kept():
    most = _workspace._MOST_BYTES
    use_memory(2**20, 16)
    assert use_memory(most, 3) == [False] * 3  # there is room for a little less
    assert _workspace._kept.memory.size == most
    assert use_memory(most - 64, 3) == [True] * 3
    assert use_memory(2**20, 16) == [True] * 16
    assert _workspace._kept.memory.size == 0


def test_memory_is_kept_where_large_and_small_uses_alternate():
    use_memory(2**20, 16)
    use_memory(2**24)
    for _ in range(20):
        assert use_memory(2**20, 7) + use_memory(2**24) + use_memory(0) == [True] * 8 + [False]


def test_memory_that_is_not_to_be_had():
    use_memory(2**20, 16)
    _workspace._kept.bytes = 2**60  # which an earlier call needed
    _workspace._kept.memory = np.empty(0, np.uint8)
    assert use_memory(2**20, 3) == [False, True, True]


def test_memory_that_an_exception_left_in_use():
    use_memory(2**20, 2)
    workspace = _workspace.Workspace().__enter__()
    mine = workspace.empty((2**20,), np.dtype(np.uint8))
    assert np.shares_memory(mine, _workspace._kept.memory)
    assert use_memory(2**20) == [False]  # as in a signal handler
    del workspace, mine
    assert use_memory(2**20) == [True]


@needs_linux
@pytest.mark.skipif(_runtime.native is None, reason="NumPy's BLAS ends the process")
@pytest.mark.parametrize("warm", [True, False], ids=["after use", "at first use"])
def test_scarce_memory(warm):
    """A limit just above what is in use: every entry point works or gives MemoryError."""
    first_use = "for call in calls.values(): call()" if warm else ""
    result = subprocess.run(
        [sys.executable, "-c", SCARCE.replace("{warm}", first_use)],
        capture_output=True, text=True, check=False, timeout=300,
        # Each array has pages of its own, which go when it goes: nothing is left from before.
        env=os.environ | {"OPENBLAS_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": "1024"},
    )  # fmt: skip
    assert result.stdout.startswith("fine"), result.stderr


@needs_linux
@pytest.mark.slow
def test_nothing_leaks_in_100000_calls(arrays):
    q, k, v = arrays(2, hq=2, lq=20, lk=20)

    pages = [x.swapaxes(1, 2) for x in (k, v)]
    rows = [x[0].swapaxes(0, 1) for x in (q, k, v)]
    cases = [
        lambda: na.attention(q, k, v),
        lambda: na.attention(q, k, v, softcap=3, alibi_slopes=[1, 2], kv_lengths=[3, 4]),
        lambda: na.attention_varlen(*rows, [0, 5, 20], [0, 5, 20]),
        lambda: na.attention_paged(q, *pages, [[0], [1]], [20, 7]),
        lambda: na.attention_vjp(q, k, v, sinks=[1, 2], bias=k[..., 0], bias_gradient=True)[1](q),
        lambda: na.attention_received(q, k),
        lambda: na.masked_softmax(q),
        lambda: na.rotary_embedding(q),
    ]
    # Refused at the beginning, at the end, and by an array that cannot be had.
    huge = np.lib.stride_tricks.as_strided(q, (2, 2, 2**50, 8), (0, 0, 0, 4))
    failing = [
        (ValueError, lambda: na.attention(q, k, v, layout="no")),
        (ValueError, lambda: na.attention(q, k, v, out=q, scale=2.0)),
        (MemoryError, lambda: na.attention(huge, k, v)),
    ]

    def use(calls, failing_calls):
        for n in range(calls):
            cases[n % len(cases)]()
        for n in range(failing_calls):
            error, call = failing[n % len(failing)]
            with pytest.raises(error):
                call()

    use(2000, 200)
    before = resident()
    use(100_000, 10_000)
    assert resident() - before < 2**20
