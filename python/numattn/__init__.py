"""Scaled dot-product attention for NumPy on CPUs: fast, exact to a stated bound, linear in memory.

Attention:

- `attention` computes it for arrays. `attention_varlen` takes sequences of different lengths, one
  after another in one array, and `attention_paged` takes keys and values in pages.
- `BlockMask` is a mask by blocks of queries and keys, for long contexts.
- `merge_states` merges attention over disjoint sets of keys.
- `quantize_kv` rounds keys and values to 8 bits.

Gradients: `attention_vjp`, `attention_backward` and `attention_varlen_backward` return `Gradients`.

Generating text: `KVCache` keeps the keys and values of the tokens so far. `PageBounds` chooses the
pages of a long text that matter to a query.

Stages: `qk_scores`, `masked_softmax` and `aggregate_values` compute each step separately.
`attention_weights` and `attention_received` return the pattern of attention.

Models:

- `MultiHeadAttention` is a layer around attention, with `LayerGradients`. `ContextCache` keeps the
  keys and values of a context for cross-attention.
- `TransformerBlock` is a whole block, with `BlockGradients`.
- `rotary_embedding` and `alibi_slopes` encode positions. `parameter_count` counts parameters.

Runtime: `set_num_threads` and `get_num_threads` set and return the number of threads.
`show_runtime` and `runtime_info` say what numattn runs on in this process.

`numattn.plot` draws attention. `numattn.dask`, `numattn.torch`, `numattn.transformers` and
`numattn.onnx` work with these packages.
"""

# Import this first: it fails where NumPy must not be imported.
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
