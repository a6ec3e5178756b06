"""Pictures of attention weights and block masks, and an interactive web page.

These functions draw weights, but do not compute them: pass the weights of a model, of
`attention_weights`, or of any softmax. The pictures need Matplotlib (``pip install
'numattn[plot]'``); `html_page` does not. ``import numattn`` does not import this module: use ``from
numattn import plot``.
"""

from __future__ import annotations

import html
import json
import math
import os
import string
import unicodedata
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from . import _runtime
from ._arguments import check_mask
from ._block_mask import BlockMask
from ._checks import (
    as_array,
    at_index,
    at_least,
    dtype_name,
    is_real,
    kind_of,
    real,
    refuse,
    refuse_kind,
    value_and_kind,
)

if TYPE_CHECKING:
    from collections.abc import Sequence
    from types import ModuleType

    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure
    from matplotlib.image import AxesImage
    from matplotlib.patches import Patch
    from numpy.typing import ArrayLike, NDArray

    Array = NDArray[Any]
    Aspect = Literal["equal", "auto"]

__all__ = ["html_page", "plot_block_mask", "plot_heads", "plot_lines", "plot_pattern"]

# The most labels on an axis, and the most tokens that are used as labels: with more tokens, the few
# words that fit say less than positions.
_MOST_LABELS = 40
_MOST_TOKENS = 300
_LONGEST_LABEL = 24

# The smallest and largest font size of labels, and the least room for a label, in points.
_FONT_SIZES = (5.0, 10.0)
_LABEL_ROOM = 7.0

# Cells are squares unless one axis is more than this many times as long as the other.
_MOST_UNEQUAL = 4

# If there are more cells per point, squares of cells are drawn as one.
_CELLS_A_POINT = 1.4

_MASKED_STYLE: dict[str, Any] = {
    "facecolor": "0.95",
    "edgecolor": "0.75",
    "hatch": "////",
    "linewidth": 0,
}

_PAGE = "plot_page.html"  # a string.Template with $title and $data; $$ is a dollar sign
_HTML_STEPS = 10_000  # per unit: four decimals
_MOST_STEPS = 2**53  # the largest exact integer in JavaScript


def plot_pattern(
    weights: ArrayLike,
    tokens: Sequence[str] | None = None,
    *,
    key_tokens: Sequence[str] | None = None,
    mask: ArrayLike | None = None,
    title: str | None = None,
    ax: Axes | None = None,
) -> Axes:
    """Draw the attention pattern of one head: queries from top to bottom, keys from left to right.

    Parameters
    ----------
    weights : array_like, shape (Lq, Lk)
        Weight of key j for query i: finite numbers of at least 0.
    tokens : sequence of Lq str, optional
        Labels of the queries and, without `key_tokens`, of the keys. With more than 40 tokens, only
        every second, third, ... token is a label. By default, and with more than 300 tokens,
        positions are the labels.
    key_tokens : sequence of Lk str, optional
        Labels of the keys.
    mask : array_like of bool, optional
        True where a query attends to a key, as in `numattn.attention`. Broadcasts to (Lq, Lk).
        By default cells whose weight is exactly 0 are drawn as masked.
    title : str, optional
        Title above the pattern.
    ax : matplotlib.axes.Axes, optional
        Axes to draw in. The colour scale and the labels are outside of them; a figure with
        ``layout="constrained"`` makes room for them. Default: axes of a new figure.

    Returns
    -------
    matplotlib.axes.Axes
        ``ax.images[0]`` is the pattern, and ``ax.images[0].colorbar`` is its colour scale. The
        scale ends at the largest weight or, with more than 40 keys, at the median of the queries'
        largest weights; larger weights have the last colour. ``ax.images[0].set_clim(0, 1)``
        changes that. The colours come from ``matplotlib.rcParams["image.cmap"]``. If there are more
        cells than pixels, each square of cells shows its largest weight.

    Raises
    ------
    ImportError
        If Matplotlib is not installed.
    TypeError, ValueError
        If the weights are not finite real numbers of at least 0 or have other axes, or if the
        tokens or the mask do not fit them.

    See Also
    --------
    plot_heads : draw the patterns of all heads.
    plot_lines : draw lines between tokens.
    html_page : make an interactive web page.
    numattn.attention_weights : compute weights.

    Examples
    --------
    >>> import numpy as np
    >>> from numattn import plot
    >>> weights = np.array([[1.0, 0.0, 0.0], [0.5, 0.5, 0.0], [0.1, 0.7, 0.2]])
    >>> ax = plot.plot_pattern(weights, ["the", "cat", "sat"], title="head 3")
    >>> [label.get_text() for label in ax.get_xticklabels()]
    ['the', 'cat', 'sat']
    """
    pattern = _weights(weights, {2: "(Lq, Lk)"})
    queries, keys = _tokens(tokens, key_tokens, pattern.shape)
    masked = pattern == 0 if mask is None else _masked(mask, pattern.shape)
    plt = _pyplot()
    width, height, aspect = _lengths(*pattern.shape, longest=7.5)
    size = (width + 1.2 + _label_inches(queries), height + 0.8 + _label_inches(keys))
    ax = _axes(plt, ax, *size)
    room = max(_points(ax, height=True), _points(ax, height=False))
    image = _draw(ax, pattern, masked, _scale_end(pattern, masked), aspect, room)
    _label_axis(ax.yaxis, queries, pattern.shape[0], _points(ax, height=True))
    _label_axis(ax.xaxis, keys, pattern.shape[1], _points(ax, height=False))
    ax.set_xlabel("keys")
    ax.set_ylabel("queries")
    scale = _axes_beside(ax)
    ax.figure.colorbar(image, cax=scale, label="weight", extend=_extend(pattern, masked, image))
    if masked.any():
        handle = _masked_patch("masked" if mask is not None else "weight 0 (masked)")
        ax.legend(
            handles=[handle], loc="lower right", bbox_to_anchor=(1.0, 1.0),
            borderaxespad=0.3, borderpad=0, frameon=False, fontsize="small", handleheight=1.2,
        )  # fmt: skip
    if title is not None:
        ax.set_title(title, pad=24.0 if masked.any() else 6.0)
    return ax


def plot_heads(
    weights: ArrayLike,
    tokens: Sequence[str] | None = None,
    *,
    key_tokens: Sequence[str] | None = None,
    titles: Sequence[str] | None = None,
    columns: int | None = None,
) -> Figure:
    """Draw the attention patterns of all heads in a grid, with one colour scale.

    Parameters
    ----------
    weights : array_like, shape (H, Lq, Lk) or (layers, H, Lq, Lk)
        Weights of each head: finite numbers of at least 0. With layers, each layer is a row of the
        grid. Cells whose weight is exactly 0 are drawn as masked.
    tokens : sequence of Lq str, optional
        Labels of the queries and, without `key_tokens`, of the keys, on the outer patterns. By
        default, and with more than 300 tokens, positions are the labels.
    key_tokens : sequence of Lk str, optional
        Labels of the keys.
    titles : sequence of H str, optional
        Title above the pattern of each head or, with layers, above each column. Default: "head 0"
        and so on.
    columns : int, optional
        Number of patterns in a row. Not allowed with layers. Default: a number that makes the grid
        about as wide as high.

    Returns
    -------
    matplotlib.figure.Figure
        A new figure. The first ``H`` (or ``layers * H``) of ``figure.axes`` are the patterns. The
        colour scale ends at the largest of all weights or, with more than 40 keys, at the largest
        of the ends that `plot_pattern` would choose for the heads.

    Raises
    ------
    ImportError
        If Matplotlib is not installed.
    TypeError, ValueError
        If the weights are not finite real numbers of at least 0 or have other axes, or if the
        tokens, the titles or the columns do not fit them.

    See Also
    --------
    plot_pattern : draw the pattern of one head.
    html_page : make an interactive web page.

    Examples
    --------
    >>> import numpy as np
    >>> from numattn import plot
    >>> weights = np.full((12, 5, 5), 0.2)  # 12 heads
    >>> figure = plot.plot_heads(weights, "a cat sat down .".split(), columns=6)
    >>> [axes.get_title() for axes in figure.axes[:3]]
    ['head 0', 'head 1', 'head 2']
    """
    patterns = _weights(weights, {3: "(H, Lq, Lk)", 4: "(layers, H, Lq, Lk)"})
    queries, keys = _tokens(tokens, key_tokens, patterns.shape)
    *layers, heads, query_count, key_count = patterns.shape
    if titles is None:
        titles = [f"head {head}" for head in range(heads)]
    else:
        titles = _strings("titles", titles)
        if len(titles) != heads:
            expected = f"{heads}, one per head of weights of shape {patterns.shape}"
            refuse("titles", f"{len(titles)} titles", expected)
    if layers:
        if columns is not None:
            seen = f"{columns!r} for weights with layers"
            refuse("columns", seen, "None", "each layer is a row")
        columns = heads
    else:
        columns = _columns(columns, heads)
    flat = patterns.reshape(-1, query_count, key_count)
    rows = -(-len(flat) // columns)

    plt = _pyplot()
    longest = min(2.6, max(1.0, 13 / max(rows, columns)))
    width, height, aspect = _lengths(query_count, key_count, longest=longest, shortest=longest)
    size = (
        columns * (width + 0.1) + 1.6 + _label_inches(queries),
        rows * (height + 0.35) + 0.5 + _label_inches(keys),
    )
    figure: Figure
    figure, grid = plt.subplots(
        rows, columns, squeeze=False, sharex=True, sharey=True, layout="constrained",
        figsize=size,
    )  # fmt: skip
    masked = flat == 0
    scale_end = _scale_end(flat, masked)
    places = list(grid.flat)
    for index, ax in enumerate(places):
        if index >= len(flat):
            ax.remove()
            continue
        image = _draw(ax, flat[index], masked[index], scale_end, aspect, 72 * longest)
        if index < heads:
            ax.set_title(titles[index], fontsize="medium")
        # The last row may have fewer patterns than the others.
        if index + columns >= len(flat):
            ax.tick_params(labelbottom=True)
        if layers and index % columns == 0:
            ax.set_ylabel(f"layer {index // columns}", fontsize="medium")
    # The axes are shared: labels of one apply to all.
    _label_axis(places[0].yaxis, queries, query_count, height * 72)
    _label_axis(places[0].xaxis, keys, key_count, width * 72)
    for ax in places[: len(flat)]:
        _style_labels(ax.yaxis, queries, query_count, height * 72)
        _style_labels(ax.xaxis, keys, key_count, width * 72)
    figure.supxlabel("keys", fontsize="medium")
    figure.supylabel("queries", fontsize="medium")
    figure.colorbar(
        image, ax=places[: len(flat)], label="weight", aspect=max(20, 6 * rows), pad=0.02,
        extendfrac=0.05 / rows,
        extend=_extend(flat, masked, image),
    )  # fmt: skip
    if masked.any():
        figure.legend(
            handles=[_masked_patch("weight 0 (masked)")], loc="outside lower right",
            frameon=False, fontsize="small", handleheight=1.2,
        )  # fmt: skip
    return figure


def plot_lines(
    weights: ArrayLike,
    tokens: Sequence[str],
    *,
    key_tokens: Sequence[str] | None = None,
    threshold: float = 0.0,
    ax: Axes | None = None,
) -> Axes:
    """Draw the attention of one head as lines from queries on the left to keys on the right.

    Parameters
    ----------
    weights : array_like, shape (Lq, Lk)
        Weight of key j for query i: finite numbers of at least 0. It is the opacity of the line,
        divided by the largest weight if that is above 1.
    tokens : sequence of Lq str
        Labels of the queries and, without `key_tokens`, of the keys. With more than 40 tokens, only
        every second, third, ... token is shown.
    key_tokens : sequence of Lk str, optional
        Labels of the keys.
    threshold : float, default 0
        Draw lines only for weights above it.
    ax : matplotlib.axes.Axes, optional
        Axes to draw in. The tokens are outside of them; a figure with ``layout="constrained"``
        makes room for them. Default: axes of a new figure.

    Returns
    -------
    matplotlib.axes.Axes
        ``ax.collections[0]`` holds the lines, in ascending order of weight.

    Raises
    ------
    ImportError
        If Matplotlib is not installed.
    TypeError, ValueError
        If the weights are not finite real numbers of at least 0 or have other axes, if the tokens
        do not fit them, or if the threshold is negative.

    See Also
    --------
    plot_pattern : draw weights as a grid of cells.
    html_page : make an interactive web page.

    Examples
    --------
    >>> import numpy as np
    >>> from numattn import plot
    >>> weights = np.array([[1.0, 0.0, 0.0], [0.5, 0.5, 0.0], [0.1, 0.7, 0.2]])
    >>> ax = plot.plot_lines(weights, ["the", "cat", "sat"], threshold=0.15)
    >>> len(ax.collections[0].get_segments())
    5
    """
    pattern = _weights(weights, {2: "(Lq, Lk)"})
    if tokens is None:
        refuse_kind("tokens", "None", "a sequence of str")
    queries, keys = _tokens(tokens, key_tokens, pattern.shape)
    if real("threshold", threshold) < 0:
        refuse("threshold", repr(threshold), "a number of at least 0")
    plt = _pyplot()
    from matplotlib.collections import LineCollection
    from matplotlib.colors import to_rgb

    height = min(10.0, max(2.5, 0.27 * max(pattern.shape)))
    ax = _axes(plt, ax, 5.0, height + 0.6)
    ax.set_xlim(0, 1)
    ax.set_ylim(1, 0)
    ax.set_axis_off()
    room = _points(ax, height=True)
    sides = ((queries, 0.0, -0.02, "right", "queries"), (keys, 1.0, 1.02, "left", "keys"))
    for labels, edge, x, side, heading in sides:
        assert labels is not None  # because the tokens were not
        step, size = _thinning(len(labels), room)
        for index in range(0, len(labels), step):
            ax.text(
                x, (index + 0.5) / len(labels), _short(labels[index]), fontsize=size,
                ha=side, va="center", parse_math=False,
            )  # fmt: skip
        ax.text(edge, -0.01, heading, ha=side, va="bottom", fontsize="small", fontstyle="italic")

    rows, columns = np.nonzero(pattern > threshold)
    strengths = pattern[rows, columns] / max(1.0, float(pattern.max()))
    order = np.argsort(strengths, kind="stable")
    segments = np.zeros((len(order), 2, 2))
    segments[:, 0, 1] = (rows[order] + 0.5) / pattern.shape[0]
    segments[:, 1, 0] = 1.0
    segments[:, 1, 1] = (columns[order] + 0.5) / pattern.shape[1]
    colors = np.empty((len(order), 4))
    colors[:, :3] = to_rgb("C0")
    colors[:, 3] = strengths[order]
    ax.add_collection(
        LineCollection(list(segments), colors=colors, linewidths=1.8, capstyle="round"),
        autolim=False,
    )
    return ax


def plot_block_mask(mask: BlockMask, *, title: str | None = None, ax: Axes | None = None) -> Axes:
    """Draw a block mask: queries from top to bottom, keys from left to right.

    Parameters
    ----------
    mask : BlockMask, shape (Lq, Lk)
        If a mask has more axes, pass one item, such as ``mask[0, 3]`` for batch item 0 and head 3.
    title : str, optional
        Title above the mask.
    ax : matplotlib.axes.Axes, optional
        Axes to draw in. The colour scale is outside of them; a figure with
        ``layout="constrained"`` makes room for it. Default: axes of a new figure.

    Returns
    -------
    matplotlib.axes.Axes
        ``ax.images[0]`` shows the blocks. The colour of a block is the share of its pairs that
        attend: a full block has the last colour, and an empty block is hatched. If there are more
        blocks than pixels, each square of blocks shows its largest share. The axes count queries
        and keys.

    Raises
    ------
    ImportError
        If Matplotlib is not installed.
    TypeError, ValueError
        If `mask` is not a BlockMask, has more axes, or has no queries or keys.

    See Also
    --------
    plot_pattern : draw weights, or every pair of a mask with ``mask.to_dense()``.

    Examples
    --------
    >>> import numattn as na
    >>> from numattn import plot
    >>> mask = na.BlockMask.global_and_window(2048, 2048, 256, 256, 64)
    >>> ax = plot.plot_block_mask(mask, title="Longformer")
    >>> ax.images[0].get_array().shape
    (32, 32)
    """
    if not isinstance(mask, BlockMask):
        advice = "`plot_pattern` draws arrays"
        refuse_kind("mask", kind_of(mask), "a BlockMask", advice)
    if len(mask.shape) != 2 or 0 in mask.shape:
        advice = "pass for example `mask[0, 3]` for batch item 0 and head 3"
        refuse("mask", f"shape {mask.shape}", "(Lq, Lk), neither of them 0", advice)
    shares = mask.shares_of_blocks()
    plt = _pyplot()
    query_count, key_count = mask.shape
    width, height, aspect = _lengths(query_count, key_count, longest=7.5)
    ax = _axes(plt, ax, width + 2.0, height + 1.2)
    room = max(_points(ax, height=True), _points(ax, height=False))
    empty = shares == 0
    image = _draw(ax, shares, empty, 1.0, aspect, room)
    # In queries and keys, not in blocks.
    _, right, bottom, _ = image.get_extent()
    block_queries, block_keys = mask.block_size
    right, bottom = (right + 0.5) * block_keys - 0.5, (bottom + 0.5) * block_queries - 0.5
    image.set_extent((-0.5, right, bottom, -0.5))
    ax.set_xlim(-0.5, key_count - 0.5)
    ax.set_ylim(query_count - 0.5, -0.5)
    _label_axis(ax.yaxis, None, query_count, _points(ax, height=True))
    _label_axis(ax.xaxis, None, key_count, _points(ax, height=False))
    ax.set_xlabel("keys")
    ax.set_ylabel("queries")
    ax.figure.colorbar(image, cax=_axes_beside(ax), label="share of a block's pairs that attend")
    if empty.any():
        ax.legend(
            handles=[_masked_patch("empty block")], loc="lower right", bbox_to_anchor=(1.0, 1.0),
            borderaxespad=0.3, borderpad=0, frameon=False, fontsize="small", handleheight=1.2,
        )  # fmt: skip
    if title is not None:
        ax.set_title(title, pad=24.0 if empty.any() else 6.0)
    return ax


def html_page(
    weights: ArrayLike,
    tokens: Sequence[str],
    path: str | os.PathLike[str] | None = None,
    *,
    key_tokens: Sequence[str] | None = None,
    title: str = "Attention",
) -> str:
    """Make a web page that shows what the token under the mouse attends to.

    The page is one file that needs no network and no server. Choose the layer and head at the top;
    the arrow keys move between tokens like the mouse.

    Parameters
    ----------
    weights : array_like, shape (H, Lq, Lk) or (layers, H, Lq, Lk)
        Weights of each head: finite numbers of at least 0. The page stores them with four decimals,
        in about three to five bytes each.
    tokens : sequence of Lq str
        The queries and, without `key_tokens`, the keys.
    path : path-like, optional
        File to write the page to, in UTF-8.
    key_tokens : sequence of Lk str, optional
        The keys.
    title : str, default "Attention"
        Title and heading of the page.

    Returns
    -------
    str
        The HTML of the page.

    Raises
    ------
    TypeError, ValueError
        If the weights are not finite real numbers of at least 0 or have other axes, or if the
        tokens do not fit them.
    OSError
        If the file cannot be written.

    See Also
    --------
    plot_pattern : draw the pattern of one head.
    plot_heads : draw the patterns of all heads.

    Notes
    -----
    These elements keep their names from release to release:

    - ``select#layer`` and ``select#head``;
    - the queries, ``#queries span``, with the attribute ``data-index``;
    - the keys, ``#keys span``, with the attributes ``data-index`` and ``data-weight``;
    - ``script#data``, JSON with ``queries`` and ``keys`` as the page shows them, and
      ``tenThousandths``, integers with the axes (layers, H, Lq, Lk).

    Examples
    --------
    >>> import numpy as np
    >>> from numattn import plot
    >>> weights = np.full((2, 12, 3, 3), 1 / 3)  # 2 layers of 12 heads
    >>> page = plot.html_page(weights, ["the", "cat", "sat"], title="A cat")
    >>> "<title>A cat</title>" in page
    True
    """
    patterns = _weights(weights, {3: "(H, Lq, Lk)", 4: "(layers, H, Lq, Lk)"})
    if tokens is None:
        refuse_kind("tokens", "None", "a sequence of str")
    queries, keys = _tokens(tokens, key_tokens, patterns.shape)
    if not isinstance(title, str):
        refuse_kind("title", kind_of(title), "a str")
    with np.errstate(all="ignore"):
        steps = np.rint(patterns.astype(np.float64) * _HTML_STEPS).clip(max=_MOST_STEPS)
    if path is not None and not isinstance(path, str | os.PathLike):
        refuse_kind("path", value_and_kind(path), "a str or a pathlib.Path")
    data = {
        "queries": queries,
        "keys": keys,
        "tenThousandths": steps.astype(np.int64).reshape(-1, *patterns.shape[-3:]).tolist(),
    }
    # A script element ends at "</script>", and "<!--" changes how it is read: no such character
    # is left in it.
    text = json.dumps(data, separators=(",", ":"))
    for character in "<>&":
        text = text.replace(character, f"\\u{ord(character):04x}")
    # Substitute once, so that inserted text is not substituted again.
    template = string.Template(resources.files(_runtime.PACKAGE).joinpath(_PAGE).read_text("utf-8"))
    page = template.substitute(title=html.escape(_visible(title)), data=text)
    if path is not None:
        Path(path).write_text(page, encoding="utf-8", newline="\n")
    return page


# ---- arguments ---------------------------------------------------------------------------------


def _weights(x: ArrayLike, axes: dict[int, str]) -> Array:
    """Check and return the weights; `axes` describes each accepted number of axes."""
    array = as_array("weights", x)
    if not is_real(array.dtype):
        refuse_kind("weights", dtype_name(array), "real numbers")
    if array.ndim not in axes or 0 in array.shape:
        expected = " or ".join(axes.values()) + ", without an axis of length 0"
        refuse("weights", f"shape {array.shape}", expected)
    # Matplotlib does not draw bfloat16, and sums of float16 overflow early.
    with np.errstate(all="ignore"):
        array = array.astype(np.float32 if array.dtype.itemsize <= 2 else np.float64, copy=False)
    for wrong, expected in (
        (~np.isfinite(array), "finite numbers"),
        (array < 0, "numbers of at least 0, as a softmax returns them"),
    ):
        if wrong.any():
            where = tuple(map(int, np.argwhere(wrong)[0]))
            refuse("weights", f"{array[where]}{at_index(where)}", expected)
    return array


def _masked(mask: ArrayLike, shape: tuple[int, ...]) -> NDArray[np.bool_]:
    array = as_array("mask", mask)
    check_mask(array, hint="")
    try:
        attended = np.broadcast_to(array, shape)
    except ValueError:
        expected = f"one that broadcasts to {shape}, the shape of weights"
        refuse("mask", f"shape {array.shape}", expected)
    return ~attended


def _tokens(
    tokens: Sequence[str] | None, key_tokens: Sequence[str] | None, shape: tuple[int, ...]
) -> tuple[list[str] | None, list[str] | None]:
    """Return the labels of the queries and of the keys."""
    queries = keys = None
    if tokens is not None:
        queries = _strings("tokens", tokens)
        _check_count("tokens", len(queries), shape, shape[-2], "queries")
        if key_tokens is None:
            if shape[-1] != len(queries):
                expected = f"`key_tokens=` too, for the {shape[-1]} keys of weights of shape "
                refuse("tokens", f"{len(queries)} tokens", expected + str(shape))
            keys = queries
    if key_tokens is not None:
        keys = _strings("key_tokens", key_tokens)
        _check_count("key_tokens", len(keys), shape, shape[-1], "keys")
    return (
        None if queries is None else [_visible(token) for token in queries],
        None if keys is None else [_visible(token) for token in keys],
    )


def _check_count(name: str, count: int, shape: tuple[int, ...], expected: int, axis: str) -> None:
    if count != expected:
        refuse(
            name, f"{count} tokens", f"{expected}, the {axis} of weights of shape {tuple(shape)}"
        )


def _strings(name: str, strings: Sequence[str]) -> list[str]:
    # A str is a sequence of str, but never the intended one.
    if isinstance(strings, (str, bytes)):
        refuse_kind(name, f"a {type(strings).__name__}", "a sequence of str")
    try:
        result = list(strings)
    except TypeError:
        refuse_kind(name, kind_of(strings), "a sequence of str")
    for index, text in enumerate(result):
        if not isinstance(text, str):
            refuse_kind(name, f"{value_and_kind(text)}{at_index(index)}", "a sequence of str")
    return result


def _columns(columns: int | None, heads: int) -> int:
    if columns is None:
        square = math.isqrt(heads - 1) + 1
        return next((n for n in range(square, 9) if heads % n == 0), square)
    return min(at_least("columns", columns, 1), heads)


def _visible(token: str) -> str:
    """Return the token with invisible characters written out: control characters, outer spaces.

    Half a surrogate pair, which cannot be encoded, is written out too.
    """
    text = "".join(
        c.encode("unicode_escape").decode() if unicodedata.category(c) in ("Cc", "Cs") else c
        for c in token
    )
    start = len(text) - len(text.lstrip(" "))
    end = len(text.rstrip(" ")) if start < len(text) else len(text)
    return "\u2423" * start + text[start:end] + "\u2423" * (len(text) - end)


def _short(label: str) -> str:
    return label if len(label) <= _LONGEST_LABEL else label[: _LONGEST_LABEL - 1] + "\u2026"


# ---- pictures ----------------------------------------------------------------------------------


def _pyplot() -> ModuleType:
    try:
        import matplotlib.pyplot as plt
    except ImportError as error:
        message = f"numattn.plot needs Matplotlib, which is missing ({error}): "
        raise ImportError(message + "pip install 'numattn[plot]'") from error
    return plt


def _axes(plt: ModuleType, ax: Axes | None, width: float, height: float) -> Axes:
    """Return the given axes, or the axes of a new figure of this size in inches."""
    from matplotlib.axes import Axes
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    if ax is not None:
        if not isinstance(ax, Axes):
            refuse_kind("ax", value_and_kind(ax), "matplotlib.axes.Axes")
        return ax
    # A wide margin, because the colour scale may get longer numbers after the layout is done.
    layout = ConstrainedLayoutEngine(w_pad=0.1, h_pad=0.08)
    figure: Figure = plt.figure(figsize=(width, height), layout=layout)
    return figure.add_subplot()


def _scale_end(weights: Array, masked: NDArray[np.bool_]) -> float:
    """Return the weight that has the last colour, for one pattern or several."""
    largest = weights.max(axis=-1, where=~masked, initial=0)
    if weights.shape[-1] > _MOST_LABELS:
        # In a long text, the first causal query's weight of 1 would make all others dark.
        largest = np.median(largest, axis=-1)
    return float(largest.max()) or float(weights.max(where=~masked, initial=0)) or 1.0


def _lengths(
    query_count: int, key_count: int, *, longest: float, shortest: float = 2.5
) -> tuple[float, float, Aspect]:
    """Return the width and height of a pattern in inches, and whether its cells are squares."""
    many, few = max(query_count, key_count), min(query_count, key_count)
    length = min(longest, max(shortest, 0.32 * many))
    if many <= _MOST_UNEQUAL * few:
        cell = length / many
        return cell * key_count, cell * query_count, "equal"
    other = max(length / _MOST_UNEQUAL, 1.0)
    return (length, other, "auto") if key_count == many else (other, length, "auto")


def _draw(
    ax: Axes,
    weights: Array,
    masked: NDArray[np.bool_],
    scale_end: float,
    aspect: Aspect,
    room: float,
) -> AxesImage:
    """Draw a pattern whose longer side takes `room` points."""
    rows, columns = weights.shape
    # The average of many cells on one pixel would hide a single strong one.
    block = -(-max(rows, columns) // max(1, int(room * _CELLS_A_POINT)))
    if block > 1:
        weights = _largest_of_blocks(np.where(masked, 0, weights), block)
        masked = ~_largest_of_blocks(~masked, block)
    # Masked cells are transparent and show the hatching of the axes' background.
    image = ax.imshow(
        np.ma.array(weights, mask=masked), vmin=0, vmax=scale_end, aspect=aspect,
        extent=(-0.5, weights.shape[1] * block - 0.5, weights.shape[0] * block - 0.5, -0.5),
    )  # fmt: skip
    ax.set_xlim(-0.5, columns - 0.5)
    ax.set_ylim(rows - 0.5, -0.5)
    if masked.any():
        ax.patch.set(**_MASKED_STYLE)
    return image


def _largest_of_blocks(cells: Array, block: int) -> Array:
    for axis in (0, 1):
        cells = np.maximum.reduceat(cells, np.arange(0, cells.shape[axis], block), axis=axis)
    return cells


def _axes_beside(ax: Axes) -> Axes:
    """Return new axes for the colour scale, as high as `ax`.

    They are an inset, so that they follow a pattern that square cells make smaller than its place.
    Their width is in inches, because the layout makes room before it knows the width of `ax`.
    """
    from matplotlib.transforms import BboxTransformTo, ScaledTranslation, blended_transform_factory

    right_edge = ScaledTranslation(1, 0, BboxTransformTo(ax.bbox))
    inches = ax.figure.dpi_scale_trans + right_edge
    place = blended_transform_factory(inches, ax.transAxes)
    return ax.inset_axes((0.12, 0.0, 0.16, 1.0), transform=place)


def _extend(weights: Array, masked: NDArray[np.bool_], image: AxesImage) -> str:
    """Return whether the colour scale ends in an arrow, for weights beyond its end."""
    beyond = weights.max(where=~masked, initial=0) > image.norm.vmax
    return "max" if beyond else "neither"


def _masked_patch(label: str) -> Patch:
    from matplotlib.patches import Patch

    return Patch(**_MASKED_STYLE, label=label)


def _label_inches(labels: list[str] | None) -> float:
    """Return the approximate room for labels next to a pattern or below it."""
    return 0.4 if labels is None else 0.08 * max(len(_short(label)) for label in labels)


def _points(ax: Axes, *, height: bool) -> float:
    box = ax.get_window_extent()
    return (box.height if height else box.width) * 72 / ax.figure.dpi


def _thinning(count: int, room: float) -> tuple[int, float]:
    """Return the step from label to label of `count`, and their size, in `room` points."""
    most = max(1, min(_MOST_LABELS, int(room / _LABEL_ROOM)))
    step = -(-count // most)
    smallest, largest = _FONT_SIZES
    return step, min(largest, max(smallest, 0.8 * room * step / count))


def _label_axis(axis: Axis, labels: list[str] | None, count: int, room: float) -> None:
    if labels is None or count > _MOST_TOKENS:
        from matplotlib.ticker import MaxNLocator

        most = max(1, min(9, int(room / 20)))
        axis.set_major_locator(MaxNLocator(nbins=most, integer=True, min_n_ticks=1))
    else:
        step, _ = _thinning(count, room)
        axis.set_ticks(range(0, count, step), [_short(text) for text in labels[::step]])
    _style_labels(axis, labels, count, room)


def _style_labels(axis: Axis, labels: list[str] | None, count: int, room: float) -> None:
    if labels is None or count > _MOST_TOKENS:
        return
    from matplotlib.axis import XAxis

    _, size = _thinning(count, room)
    axis.set_tick_params(labelsize=size)
    for text in axis.get_ticklabels():
        text.set_parse_math(False)
        if isinstance(axis, XAxis):
            text.set_rotation(90)
