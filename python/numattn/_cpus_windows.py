"""The number of CPUs that Windows lets this process use.

`kernel32` is the Windows library of that name.
"""

from __future__ import annotations

import ctypes
from typing import Any

_THIS_PROCESS = ctypes.c_void_p(-1)
_OWN_JOB = None
# The class of information to query with QueryInformationJobObject, and the flags of its answer.
_CPU_RATE_CONTROL = 15
_IS_LIMITED, _IS_A_CAP, _HAS_TWO_RATES = 0x1, 0x4, 0x10


class _CpuRate(ctypes.Structure):
    _fields_ = (("flags", ctypes.c_uint32), ("rate", ctypes.c_uint32))


def affinity(kernel32: Any, cpus: int) -> int:
    """Return how many of the machine's CPUs the process's affinity allows.

    Windows reports only one group of up to 64 CPUs. A process without a limit may use all groups.
    """
    own, group = ctypes.c_size_t(), ctypes.c_size_t()
    found = kernel32.GetProcessAffinityMask(_THIS_PROCESS, ctypes.byref(own), ctypes.byref(group))
    if not found or own.value in (0, group.value):  # 0: its threads are in several groups
        return cpus
    return own.value.bit_count()


def quota(kernel32: Any, cpus: int) -> int | None:
    """Return the number of CPUs that the cap of this process's job allows, rounded up, or None.

    A container is such a job. `cpus` is the number of CPUs of the machine; the cap is a share of
    them.
    """
    answer = _CpuRate()
    found = kernel32.QueryInformationJobObject(
        _OWN_JOB, _CPU_RATE_CONTROL, ctypes.byref(answer), ctypes.sizeof(answer), None
    )
    if not found or not answer.flags & _IS_LIMITED:
        return None
    if answer.flags & _HAS_TWO_RATES:
        rate: int = answer.rate >> 16  # the higher one
    elif answer.flags & _IS_A_CAP:
        rate = answer.rate
    else:  # a share that matters only when other jobs want the CPUs
        return None
    return max(1, -(-rate * cpus // 10_000))
