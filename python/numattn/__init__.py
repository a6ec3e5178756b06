"""Scaled dot-product attention for NumPy on CPUs: fast, exact to a stated bound, linear in memory.

`attention` computes it; `attention_varlen` and `attention_paged` do for sequences that stand behind
each other or lie in pages; `merge_states` puts parts together, and `quantize_kv` rounds keys and
values to 8 bits. `KVCache` keeps them while text is generated. `set_num_threads` and
`get_num_threads` say with how many threads, and `show_runtime` and `runtime_info` tell what this
process runs on.
"""

from ._attention import attention
from ._kv_cache import KVCache
from ._runtime import __version__, get_num_threads, runtime_info, set_num_threads, show_runtime
from ._sequences import attention_paged, attention_varlen
from ._states import merge_states, quantize_kv

__all__ = [
    "KVCache",
    "__version__",
    "attention",
    "attention_paged",
    "attention_varlen",
    "get_num_threads",
    "merge_states",
    "quantize_kv",
    "runtime_info",
    "set_num_threads",
    "show_runtime",
]
