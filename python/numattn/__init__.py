"""Scaled dot-product attention for NumPy on CPUs: fast, exact to a stated bound, linear in memory.

`attention` computes it, `set_num_threads` and `get_num_threads` say with how many threads, and
`show_runtime` and `runtime_info` tell what this process runs on.
"""

from ._attention import attention
from ._runtime import __version__, get_num_threads, runtime_info, set_num_threads, show_runtime

__all__ = [
    "__version__",
    "attention",
    "get_num_threads",
    "runtime_info",
    "set_num_threads",
    "show_runtime",
]
