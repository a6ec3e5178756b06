"""Promise: scratch memory goes with threads and tiles, never with Lq * Lk, and is not lost."""

import os
import subprocess
import sys

import numattn as na
import numpy as np
import pytest
from numattn import _runtime

# The peak of the process before and after; arrays are made before, and touched.
PEAK = """
import numpy as np, numattn as na
def memory(what):
    for line in open("/proc/self/status"):
        if line.startswith(what):
            return int(line.split()[1]) * 1024
length, d = {length}, 32
q, k, v = np.random.default_rng(0).standard_normal((3, 1, length, d), dtype=np.float32)
out = np.ones_like(q)
small = q[:, :64]
na.attention(small, small, small, is_causal=True, out=out[:, :64])
open("/proc/self/clear_refs", "w").write("5")  # the peak begins anew
before = memory("VmRSS")
{use}
print(memory("VmHWM") - before)
"""


ATTEND = "na.attention(q[:, -{rows}:], k, v, is_causal=True, out=out[:, -{rows}:])"


def added_peak(length, rows, use=ATTEND, **environment):
    result = subprocess.run(
        [sys.executable, "-c", PEAK.format(length=length, use=use.format(rows=rows))],
        capture_output=True, text=True, check=True, env=os.environ | environment,
    )  # fmt: skip
    return int(result.stdout)


needs_linux = pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="needs Linux")


@needs_linux
def test_the_measurement_sees_memory_come_and_go():
    assert added_peak(1024, 0, use="x = np.ones(3 * 2**20); del x") > 20 * 2**20


@needs_linux
@pytest.mark.skipif(_runtime.native is None, reason="needs the compiled kernels")
def test_native_scratch_of_long_sequences():
    assert added_peak(131072, 4096) < 16 * 2**20


@needs_linux
def test_numpy_scratch_of_long_sequences():
    assert added_peak(131072, 256, NUMATTN_BACKEND="numpy") < 64 * 2**20


@needs_linux
@pytest.mark.slow
@pytest.mark.parametrize(("backend", "limit"), [("native", 16), ("numpy", 64)])
def test_scratch_of_a_long_causal_sequence(backend, limit):
    assert added_peak(131072, 131072, NUMATTN_BACKEND=backend) < limit * 2**20


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
