"""Scaled dot-product attention for NumPy on CPUs: fast, exact to a stated bound, linear in memory.

`attention` computes it; `attention_varlen` and `attention_paged` do for sequences that follow one
another in one array or lie in pages; `merge_states` merges attention over sets of keys, and
`quantize_kv` rounds keys and values to 8 bits. `BlockMask` is a mask by blocks of queries and keys.
`attention_vjp`, `attention_backward` and `attention_varlen_backward` give its `Gradients`.
`KVCache` keeps keys and values while text is generated; `PageBounds` says which pages of a long
text matter to a query. `set_num_threads` and `get_num_threads` say with how many threads, and
`show_runtime` and `runtime_info` tell what this process runs on. `qk_scores`, `masked_softmax` and
`aggregate_values` are the stages by themselves, `attention_weights` and `attention_received` what
they give. `MultiHeadAttention` is the layer of a model around attention, with `LayerGradients` and
`ContextCache`, which keeps the keys and values of what it attends to in every step;
`TransformerBlock` is a whole block of one, with `BlockGradients`. `rotary_embedding` and
`alibi_slopes` are their positions, `parameter_count` their size. `numattn.plot` draws.
"""

# The first import of all: it fails where NumPy is not to be imported.
from . import _main_interpreter as _main_interpreter  # isort: skip
from . import _threadpoolctl
from ._alibi import alibi_slopes
from ._attention import attention
from ._block import TransformerBlock
from ._block_gradients import BlockGradients
from ._block_mask import BlockMask
from ._context_cache import ContextCache
from ._gradients import (
    Gradients,
    attention_backward,
    attention_varlen_backward,
    attention_vjp,
)
from ._kv_cache import KVCache
from ._layer import MultiHeadAttention
from ._layer_gradients import LayerGradients
from ._merge_states import merge_states
from ._page_bounds import PageBounds
from ._parameter_count import parameter_count
from ._quantize import quantize_kv
from ._rotary import rotary_embedding
from ._runtime import __version__, get_num_threads, runtime_info, set_num_threads, show_runtime
from ._sequences import attention_paged, attention_varlen
from ._softmax import masked_softmax
from ._stages import aggregate_values, attention_received, attention_weights, qk_scores

__all__ = [
    "BlockGradients",
    "BlockMask",
    "ContextCache",
    "Gradients",
    "KVCache",
    "LayerGradients",
    "MultiHeadAttention",
    "PageBounds",
    "TransformerBlock",
    "__version__",
    "aggregate_values",
    "alibi_slopes",
    "attention",
    "attention_backward",
    "attention_paged",
    "attention_received",
    "attention_varlen",
    "attention_varlen_backward",
    "attention_vjp",
    "attention_weights",
    "get_num_threads",
    "masked_softmax",
    "merge_states",
    "parameter_count",
    "qk_scores",
    "quantize_kv",
    "rotary_embedding",
    "runtime_info",
    "set_num_threads",
    "show_runtime",
]

_threadpoolctl.register()
