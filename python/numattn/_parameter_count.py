"""`parameter_count`: counts of attention's parameters."""

from __future__ import annotations

from typing import NamedTuple

from ._checks import at_least, refuse


class ParameterCount(NamedTuple):
    """The number of elements in the matrices of attention, without biases."""

    query: int
    key: int
    value: int
    output: int
    head: int
    block: int
    model: int

    def __str__(self) -> str:
        """Return a table."""
        names = {
            "query": "query matrix of a head",
            "key": "key matrix of a head",
            "value": "value matrix of a head, down",
            "output": "value matrix of a head, up",
            "head": "one head",
            "block": "one block",
            "model": "all blocks",
        }
        return "\n".join(f"{names[n]:30}{x:>20,}" for n, x in self._asdict().items())


def parameter_count(
    embed_dim: int,
    num_heads: int,
    *,
    kv_heads: int | None = None,
    head_dim: int | None = None,
    value_dim: int | None = None,
    context_dim: int | None = None,
    blocks: int = 1,
) -> ParameterCount:
    """Count the parameters of attention by matrix, head, block and model.

    The value matrix of a head, from embeddings to embeddings, is a product of two matrices: one
    takes an embedding down to a value, and the other, the head's part of the output matrix, takes
    it back up.

    Parameters
    ----------
    embed_dim, num_heads, kv_heads, head_dim, value_dim, context_dim
        As in `MultiHeadAttention`.
    blocks : int, default 1
        Number of attention blocks in the model.

    Returns
    -------
    ParameterCount
        A named tuple ``(query, key, value, output, head, block, model)``, which prints as a table.
        With fewer heads of keys and values than of queries, `head` counts what one query head uses,
        and `block` counts shared matrices once.

    Raises
    ------
    TypeError, ValueError
        If a number is not a positive int, or does not divide another as it must.

    See Also
    --------
    MultiHeadAttention : the layer; its `num_parameters` includes biases.

    Examples
    --------
    GPT-3:

    >>> import numattn as na
    >>> print(na.parameter_count(12288, 96, head_dim=128, blocks=96))
    query matrix of a head                   1,572,864
    key matrix of a head                     1,572,864
    value matrix of a head, down             1,572,864
    value matrix of a head, up               1,572,864
    one head                                 6,291,456
    one block                              603,979,776
    all blocks                          57,982,058,496
    """
    embed_dim = at_least("embed_dim", embed_dim, 1)
    heads = at_least("num_heads", num_heads, 1)
    shared = heads if kv_heads is None else at_least("kv_heads", kv_heads, 1)
    if heads % shared:
        refuse("kv_heads", str(shared), f"a divisor of num_heads, which is {heads}")
    if head_dim is None and embed_dim % heads:
        expected = f"a multiple of num_heads, which is {heads}"
        refuse("embed_dim", str(embed_dim), expected, "pass `head_dim=` for other sizes")
    size = embed_dim // heads if head_dim is None else at_least("head_dim", head_dim, 1)
    of_values = size if value_dim is None else at_least("value_dim", value_dim, 1)
    context = embed_dim if context_dim is None else at_least("context_dim", context_dim, 1)
    query, key = embed_dim * size, context * size
    value, output = context * of_values, of_values * embed_dim
    block = heads * (query + output) + shared * (key + value)
    return ParameterCount(
        query, key, value, output, query + key + value + output, block,
        block * at_least("blocks", blocks, 1),
    )  # fmt: skip
