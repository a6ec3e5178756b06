"""`ContextCache`: keys and values of a context that a layer attends to in every step."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Array = NDArray[Any]


class ContextCache:
    """The keys and values that a layer computes from a context, kept for many calls.

    `MultiHeadAttention.context_cache` makes it. Pass it to calls of the same layer instead of the
    context. Other layers compute other keys and values, so each layer needs its own cache.

    Attributes
    ----------
    k, v : ndarray, shape (..., kv_heads, Lk, head_dim or value_dim)
        Read-only views of keys and values.
    lengths : ndarray of int64, or None
        Number of valid tokens of the context, in the shape of its leading axes; None for all.
    nbytes : int
        Bytes of memory that keys and values take.

    See Also
    --------
    MultiHeadAttention.context_cache : make a ContextCache.
    KVCache : a cache for self-attention, which grows with the text.

    Examples
    --------
    >>> import numpy as np
    >>> import numattn as na
    >>> layer = na.MultiHeadAttention(64, 4, context_dim=32, rng=0)
    >>> cache = layer.context_cache(np.zeros((2, 7, 32), np.float32), lengths=[7, 5])
    >>> cache
    ContextCache(kv_heads=4, head_dim=16, value_dim=16, dtype=float32): 7 tokens, lengths [7, 5]
    >>> layer(np.zeros((2, 1, 64), np.float32), cache).shape
    (2, 1, 64)
    """

    def __init__(self, k: Array, v: Array, lengths: NDArray[np.int64] | None) -> None:
        # (..., Lk, kv_heads, dim), the layout of the products with the matrices.
        self._k, self._v, self._lengths = k, v, lengths

    @property
    def k(self) -> Array:
        """The keys, (..., kv_heads, Lk, head_dim)."""
        return _read_only(self._k.swapaxes(-3, -2))

    @property
    def v(self) -> Array:
        """The values, (..., kv_heads, Lk, value_dim)."""
        return _read_only(self._v.swapaxes(-3, -2))

    @property
    def lengths(self) -> NDArray[np.int64] | None:
        """Number of valid tokens of the context, None for all."""
        return None if self._lengths is None else _read_only(self._lengths.view())

    @property
    def nbytes(self) -> int:
        """Bytes of memory that keys and values take."""
        return self._k.nbytes + self._v.nbytes

    def __repr__(self) -> str:
        tokens, heads, dim = self._k.shape[-3:]
        lengths = "" if self._lengths is None else f", lengths {self._lengths.tolist()}"
        return (
            f"ContextCache(kv_heads={heads}, head_dim={dim}, value_dim={self._v.shape[-1]}, "
            f"dtype={self._k.dtype}): {tokens} tokens{lengths}"
        )


def _read_only(x: Array) -> Array:
    x.flags.writeable = False
    return x
