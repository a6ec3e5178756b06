"""Tensors to call `numattn.torch` with, and what its results are compared with."""

import ml_dtypes
import torch

TOLERANCE = {torch.float64: 1e-12, torch.float32: 3e-6, torch.float16: 2e-3, torch.bfloat16: 2e-2}


def tensors(batch, heads, length, dim, *, lk=None, kv_heads=None, dtype=torch.float32):
    """Return random q, k and v, the same for every run."""
    generator = torch.Generator().manual_seed(20240607)
    rows = length if lk is None else lk
    kv = (batch, kv_heads or heads, rows, dim)
    shapes = ((batch, heads, length, dim), kv, kv)
    return [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]


def array(x):
    """Return a tensor as an array, apart from how `numattn.torch` does it."""
    x = x.detach()
    if x.dtype == torch.bfloat16:
        return x.float().numpy().astype(ml_dtypes.bfloat16)
    return x.numpy()


def math_attention(q, k, v, attn_mask=None, is_causal=False, scale=None):
    """Return attention by its formula in float64."""
    logits = q.double() @ k.double().mT * (q.shape[-1] ** -0.5 if scale is None else scale)
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        logits = logits.masked_fill(~attn_mask, -torch.inf)
    elif attn_mask is not None:
        logits = logits + attn_mask.double()
    if is_causal:
        after = torch.ones(logits.shape[-2:], dtype=torch.bool).triu(1)
        logits = logits.masked_fill(after, -torch.inf)
    return logits.softmax(-1).nan_to_num() @ v.double()


def assert_close(actual, expected, dtype):
    """Compare within what the dtype resolves."""
    tolerance = TOLERANCE[dtype]
    torch.testing.assert_close(
        actual.double(), expected.double(), rtol=tolerance, atol=tolerance, check_stride=False
    )
