"""Promise: pictures of attention weights show all of them, labelled, with nothing cut off, and the
web page works by itself."""

import itertools
import json
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser

import numpy as np
import pytest
from numattn import BlockMask, plot

CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)
WORDS = ["The", " cat", "sat", "on", "$x$", "</script><!--", "&amp;", "\n"]
SHOWN = ["The", "\u2423cat", "sat", "on", "$x$", "</script><!--", "&amp;", "\\n"]


def make_weights(rng, *shape, causal=True):
    logits = 2 * rng.standard_normal(shape)
    if causal:
        allowed = np.tril(np.ones(shape[-2:], bool), shape[-1] - shape[-2])
        logits = np.where(allowed, logits, -np.inf)
    weights = np.exp(logits - logits.max(axis=-1, keepdims=True))
    return weights / weights.sum(axis=-1, keepdims=True)


# ---- pictures ----------------------------------------------------------------------------------


@pytest.fixture
def plt():
    matplotlib = pytest.importorskip("matplotlib")
    before = matplotlib.get_backend()
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        yield plt
    plt.close("all")
    matplotlib.use(before)


def shown_labels(axis):
    low, high = sorted(axis.get_view_interval())
    ticks = [tick for tick in axis.get_major_ticks() if low <= tick.get_loc() <= high]
    labels = [label for tick in ticks for label in (tick.label1, tick.label2)]
    return [label for label in labels if label.get_visible() and label.get_text()]


def texts(axis):
    return [label.get_text() for label in shown_labels(axis)]


def assert_nothing_cut_off(figure):
    figure.canvas.draw()
    renderer = figure.canvas.get_renderer()
    box = figure.get_tightbbox(renderer).padded(-0.01)
    width, height = figure.get_size_inches()
    assert box.x0 >= 0
    assert box.y0 >= 0
    assert box.x1 <= width
    assert box.y1 <= height
    # Neither do labels run into each other.
    for ax in figure.axes:
        for axis, low, high in ((ax.xaxis, "x0", "x1"), (ax.yaxis, "y0", "y1")):
            boxes = [label.get_window_extent(renderer) for label in shown_labels(axis)]
            boxes.sort(key=lambda box: getattr(box, low))
            for one, next_one in itertools.pairwise(boxes):
                assert getattr(next_one, low) >= getattr(one, high) - 1


def test_pattern(rng, plt):
    weights = make_weights(rng, 8, 8)
    ax = plot.plot_pattern(weights, WORDS, title="layer 1, head 2")
    assert_nothing_cut_off(ax.figure)
    assert texts(ax.xaxis) == texts(ax.yaxis) == SHOWN
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("keys", "queries")
    assert ax.get_title() == "layer 1, head 2"
    image = ax.images[0]
    np.testing.assert_array_equal(image.get_array().filled(0), weights)
    assert image.get_clim() == (0, weights.max())
    # Query 0 is at the top and key 0 on the left.
    assert ax.transData.transform((0, 0))[1] > ax.transData.transform((0, 7))[1]
    assert ax.transData.transform((0, 0))[0] < ax.transData.transform((7, 0))[0]
    assert image.colorbar.ax.get_ylabel() == "weight"
    assert image.colorbar.extend == "neither"


def test_dollar_signs_are_no_mathematics(rng, plt):
    # An unbalanced brace between them would fail as such.
    ax = plot.plot_pattern(make_weights(rng, 2, 2), ["${$", "$x_1$"])
    assert_nothing_cut_off(ax.figure)
    ax = plot.plot_lines(make_weights(rng, 2, 2), ["${$", "$x_1$"])
    assert_nothing_cut_off(ax.figure)
    figure = plot.plot_heads(make_weights(rng, 3, 2, 2), ["${$", "$x_1$"])
    assert_nothing_cut_off(figure)


def pixel(ax, row, column, offset=0.0):
    ax.figure.canvas.draw()
    image = np.asarray(ax.figure.canvas.buffer_rgba())
    x, y = ax.transData.transform((column + offset, row + offset))
    return image[image.shape[0] - 1 - int(y), int(x), :3].astype(int)


def test_masked_cells_differ_from_small_ones(plt):
    weights = np.array([[1.0, 0.0, 0.0], [0.5, 0.5, 0.0], [1e-9, 1e-9, 1.0]])
    ax = plot.plot_pattern(weights)
    small = pixel(ax, 2, 0)
    assert np.abs(small - pixel(ax, 2, 1)).max() == 0
    # Grey, whether the hatching or what is between it is hit.
    for row, column in ((0, 1), (0, 2), (1, 2)):
        for offset in (-0.2, 0, 0.2):
            masked = pixel(ax, row, column, offset)
            assert np.ptp(masked) <= 2
            assert np.abs(masked - small).max() > 50
    assert [text.get_text() for text in ax.get_legend().get_texts()] == ["weight 0 (masked)"]
    assert ax.patch.get_hatch()


def test_mask(plt):
    weights = np.array([[1.0, 0.0], [0.75, 0.25]])
    mask = np.array([[True, True], [False, True]])
    ax = plot.plot_pattern(weights, mask=mask)
    np.testing.assert_array_equal(np.ma.getmaskarray(ax.images[0].get_array()), ~mask)
    assert [text.get_text() for text in ax.get_legend().get_texts()] == ["masked"]
    ax = plot.plot_pattern(weights, mask=[True, False])  # broadcasts
    assert np.ma.getmaskarray(ax.images[0].get_array()).tolist() == [[False, True]] * 2
    ax = plot.plot_pattern(weights, mask=np.True_)
    assert ax.get_legend() is None
    assert not ax.patch.get_hatch()
    plot.plot_pattern(weights, mask=np.False_).figure.canvas.draw()
    # What is masked is no part of the scale.
    ax = plot.plot_pattern(np.array([[9.0, 0.5]]), mask=[[False, True]])
    assert ax.images[0].get_clim() == (0, 0.5)
    assert ax.images[0].colorbar.extend == "neither"


@pytest.mark.parametrize(("count", "step"), [(40, 1), (41, 2), (200, 5), (300, 8)])
def test_some_tokens_label_a_long_pattern(rng, plt, count, step):
    tokens = [f"token{i}" for i in range(count)]
    ax = plot.plot_pattern(make_weights(rng, count, count), tokens, title="long")
    assert_nothing_cut_off(ax.figure)
    assert texts(ax.xaxis) == texts(ax.yaxis) == tokens[::step]
    assert list(ax.get_xticks()) == list(range(0, count, step))
    assert min(label.get_fontsize() for label in shown_labels(ax.xaxis)) >= 5


@pytest.mark.parametrize("tokens", [None, ["word"] * 1000])
def test_positions_label_a_very_long_pattern(rng, plt, tokens):
    weights = np.full((1000, 1000), 1e-4)
    weights[np.triu_indices(1000, 1)] = 0
    weights[:, 700] = 0.9
    ax = plot.plot_pattern(weights, tokens)
    assert_nothing_cut_off(ax.figure)
    assert 3 <= len(texts(ax.xaxis)) <= 12
    assert all(re.fullmatch(r"\d+", text) for text in texts(ax.xaxis) + texts(ax.yaxis))
    assert ax.get_xlim() == (-0.5, 999.5)
    assert ax.get_ylim() == (999.5, -0.5)
    # Cells are fewer than weights, and a single column still has its colour, where it belongs.
    cells = ax.images[0].get_array()
    assert cells.shape[0] < 1000
    left, right, _, _ = ax.images[0].get_extent()
    column = int((700 - left) / ((right - left) / cells.shape[1]))
    assert cells[:, column].min() == 0.9
    assert (cells.max(axis=0).filled(0) > 0.5).sum() == 1
    assert not np.ma.getmaskarray(cells)[-1].any()
    assert np.ma.getmaskarray(cells)[0, 10:column].all()


def test_first_query_of_a_long_text_does_not_set_the_scale(plt):
    rows = np.arange(1, 101)
    ax = plot.plot_pattern(np.tril(np.ones((100, 100))) / rows[:, None])
    assert ax.images[0].get_clim()[1] == pytest.approx(np.median(1 / rows))
    assert ax.images[0].colorbar.extend == "max"


@pytest.mark.parametrize("shape", [(1, 1), (1, 12), (12, 1), (5, 60), (60, 5), (3, 1000)])
def test_pattern_of_few_queries_or_keys(rng, plt, shape):
    queries = [f"query{i}" for i in range(shape[0])]
    keys = [f"key{i}" for i in range(shape[1])]
    weights = make_weights(rng, *shape, causal=False)
    weights[-1, -1] = 0
    ax = plot.plot_pattern(weights, queries, key_tokens=keys, title="few")
    assert_nothing_cut_off(ax.figure)
    assert texts(ax.yaxis)[0] == "query0"
    assert texts(ax.xaxis)[0] == ("key0" if shape[1] < 300 else "0")


def test_very_long_tokens_are_shortened(rng, plt):
    ax = plot.plot_pattern(make_weights(rng, 40, 40), ["word" * 30] * 40, title="long")
    assert_nothing_cut_off(ax.figure)
    assert set(texts(ax.xaxis)) == {"word" * 5 + "wor\u2026"}
    assert_nothing_cut_off(plot.plot_lines(make_weights(rng, 3, 3), ["word" * 30] * 3).figure)


def test_given_axes_are_used(rng, plt):
    weights = make_weights(rng, 8, 8)
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 4), layout="constrained")
    assert plot.plot_pattern(weights, WORDS, title="left", ax=left) is left
    assert plot.plot_lines(weights, WORDS, ax=right) is right
    assert plt.get_fignums() == [figure.number]
    assert_nothing_cut_off(figure)


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64", "int8", "bfloat16"])
def test_dtypes(plt, dtype):
    if dtype == "bfloat16":
        dtype = pytest.importorskip("ml_dtypes").bfloat16
    ax = plot.plot_pattern(np.eye(3).astype(dtype))
    np.testing.assert_array_equal(ax.images[0].get_array().filled(0), np.eye(3))
    assert '"tenThousandths":[[[[10000' in plot.html_page(np.eye(3).astype(dtype)[None], WORDS[:3])


def test_a_page_of_numbers_that_are_no_weights():
    """What JavaScript has no integers for is the largest that it has."""
    page = plot.html_page(np.full((1, 1, 1), 1e300), ["a"])
    assert f'"tenThousandths":[[[[{2**53}]]]]' in page


def test_heads(rng, plt):
    weights = make_weights(rng, 12, 8, 8)
    figure = plot.plot_heads(weights, WORDS, columns=6)
    assert_nothing_cut_off(figure)
    panels = figure.axes[:12]
    assert [ax.get_title() for ax in panels] == [f"head {i}" for i in range(12)]
    for ax, head in zip(panels, weights, strict=True):
        np.testing.assert_array_equal(ax.images[0].get_array().filled(0), head)
        assert ax.images[0].get_clim() == (0, weights.max())
    assert [ax.get_subplotspec().colspan.start for ax in panels] == 2 * list(range(6))
    # Labels stand on the left and below alone.
    for index, ax in enumerate(panels):
        assert texts(ax.yaxis) == (SHOWN if index % 6 == 0 else [])
        assert texts(ax.xaxis) == (SHOWN if index >= 6 else [])
    assert len(figure.axes) == 13  # one colour scale
    assert figure.axes[12].get_ylabel() == "weight"
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["weight 0 (masked)"]


def test_layers_and_heads(rng, plt):
    weights = make_weights(rng, 3, 4, 8, 8, causal=False)
    figure = plot.plot_heads(weights, WORDS, titles=list("abcd"))
    assert_nothing_cut_off(figure)
    panels = figure.axes[:12]
    assert [ax.get_title() for ax in panels] == [*"abcd", *[""] * 8]
    assert [ax.get_ylabel() for ax in panels[::4]] == ["layer 0", "layer 1", "layer 2"]
    np.testing.assert_array_equal(panels[6].images[0].get_array(), weights[1, 2])
    assert not figure.legends


def test_heads_that_leave_places_empty(rng, plt):
    figure = plot.plot_heads(make_weights(rng, 7, 30, 30), columns=3)
    assert_nothing_cut_off(figure)
    assert len(figure.axes) == 8
    assert [bool(texts(ax.xaxis)) for ax in figure.axes[:7]] == [False] * 4 + [True] * 3


@pytest.mark.parametrize(
    ("heads", "columns"), [(1, 1), (5, 5), (8, 4), (12, 4), (16, 4), (32, 8), (11, 4)]
)
def test_grid_of_heads(plt, heads, columns):
    figure = plot.plot_heads(np.full((heads, 2, 3), 1 / 3))
    assert figure.axes[0].get_subplotspec().get_gridspec().ncols == columns


def test_lines(rng, plt):
    weights = make_weights(rng, 8, 5, causal=False)
    keys = list("vwxyz")
    ax = plot.plot_lines(weights, WORDS, key_tokens=keys, threshold=0.1)
    assert_nothing_cut_off(ax.figure)
    assert [text.get_text() for text in ax.texts] == [*SHOWN, "queries", *keys, "keys"]
    lines = ax.collections[0]
    segments, opacity = np.array(lines.get_segments()), lines.get_colors()[:, 3]
    rows = np.rint(segments[:, 0, 1] * 8 - 0.5).astype(int)
    columns = np.rint(segments[:, 1, 1] * 5 - 0.5).astype(int)
    assert sorted(zip(rows, columns, strict=True)) == sorted(map(tuple, np.argwhere(weights > 0.1)))
    np.testing.assert_allclose(opacity, weights[rows, columns])
    assert (np.diff(opacity) >= 0).all()
    # Queries are left and their lines begin where they stand.
    for text, row in zip(ax.texts[:8], range(8), strict=True):
        assert text.get_position()[0] < 0
        assert text.get_position()[1] == pytest.approx((row + 0.5) / 8)
    assert (segments[:, 0, 0] == 0).all()
    assert (segments[:, 1, 0] == 1).all()


def test_no_lines(plt):
    ax = plot.plot_lines(np.zeros((2, 2)), ["a", "b"])
    assert len(ax.collections[0].get_segments()) == 0
    assert_nothing_cut_off(ax.figure)


def test_long_lines(rng, plt):
    tokens = [f"token{i}" for i in range(100)]
    ax = plot.plot_lines(make_weights(rng, 100, 100), tokens)
    assert_nothing_cut_off(ax.figure)
    assert [text.get_text() for text in ax.texts[:-1] if text.get_position()[0] > 1] == tokens[::3]


# ---- block masks -------------------------------------------------------------------------------


def test_block_mask(plt):
    mask = BlockMask.causal(500, 400, block_size=(100, 50))
    ax = plot.plot_block_mask(mask, title="causal")
    assert_nothing_cut_off(ax.figure)
    assert (ax.get_xlabel(), ax.get_ylabel(), ax.get_title()) == ("keys", "queries", "causal")
    image = ax.images[0]
    np.testing.assert_array_equal(image.get_array().filled(0), mask.shares_of_blocks())
    assert image.get_clim() == (0, 1)
    assert image.get_extent() == [-0.5, 399.5, 499.5, -0.5]
    assert (ax.get_xlim(), ax.get_ylim()) == ((-0.5, 399.5), (499.5, -0.5))
    assert [text.get_text() for text in ax.get_legend().get_texts()] == ["empty block"]
    # Empty ones are grey, full ones have the last colour, mixed ones another.
    empty, full, mixed = pixel(ax, 50, 350), pixel(ax, 450, 100), pixel(ax, 350, 220)
    assert np.ptp(empty) <= 2
    np.testing.assert_allclose(full, np.multiply(plt.get_cmap()(1.0)[:3], 255), atol=1)
    assert min(np.abs(mixed - full).max(), np.abs(mixed - empty).max()) > 30


def test_block_mask_of_partial_blocks(plt):
    """The last blocks are drawn as far as there are queries and keys."""
    ax = plot.plot_block_mask(BlockMask.window(130, 90, None, None, block_size=(64, 32)))
    assert_nothing_cut_off(ax.figure)
    assert (ax.get_xlim(), ax.get_ylim()) == ((-0.5, 89.5), (129.5, -0.5))
    assert ax.images[0].get_extent() == [-0.5, 95.5, 191.5, -0.5]
    assert ax.get_legend() is None
    assert (pixel(ax, 128, 88) == pixel(ax, 3, 3)).all()


def test_block_mask_of_very_many_blocks(plt):
    keep = np.zeros((2000, 2000), bool)
    keep[1234, 77] = True
    figure, ax = plt.subplots(layout="constrained")
    assert plot.plot_block_mask(BlockMask.from_blocks(keep, 4000, 4000, (2, 2)), ax=ax) is ax
    assert plt.get_fignums() == [figure.number]
    assert_nothing_cut_off(figure)
    cells = ax.images[0].get_array()
    assert cells.shape[0] < 2000
    row, column = np.argwhere(cells.filled(0)).ravel()
    _, right, bottom, _ = ax.images[0].get_extent()
    assert abs((column + 0.5) / cells.shape[1] * (right + 0.5) - 155) < right / cells.shape[1]
    assert abs((row + 0.5) / cells.shape[0] * (bottom + 0.5) - 2469) < bottom / cells.shape[0]


@pytest.mark.parametrize(("shape", "block_size"), [((1, 1), (1, 1)), ((3, 5000), (64, 64))])
def test_block_mask_of_few_queries(plt, shape, block_size):
    ax = plot.plot_block_mask(BlockMask.causal(*shape, block_size=block_size), title="few")
    assert_nothing_cut_off(ax.figure)


@pytest.mark.parametrize(
    ("mask", "error", "message"),
    [
        (np.eye(3, dtype=bool), TypeError, "mask: got ndarray, expected a BlockMask"),
        (BlockMask.causal(0, 3), ValueError, r"mask: got shape \(0, 3\), expected \(Lq, Lk\)"),
        (BlockMask.prefix(3, 3, [1]), ValueError, r"got shape \(1, 1, 3, 3\), expected \(Lq, Lk"),
    ],
)
def test_what_is_no_picture_of_a_block_mask(mask, error, message):
    with pytest.raises(error, match=message):
        plot.plot_block_mask(mask)


def test_without_matplotlib(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)
    for draw in (plot.plot_pattern, plot.plot_lines):
        with pytest.raises(ImportError, match=re.escape("pip install 'numattn[plot]'")):
            draw(np.eye(2), ["a", "b"])
    with pytest.raises(ImportError, match=re.escape("pip install 'numattn[plot]'")):
        plot.plot_heads(np.ones((1, 2, 2)))
    with pytest.raises(ImportError, match=re.escape("pip install 'numattn[plot]'")):
        plot.plot_block_mask(BlockMask.causal(2, 2))
    assert plot.html_page(np.ones((1, 2, 2)), ["a", "b"])


def test_import_of_numattn_imports_no_plot():
    code = "import sys, numattn; print(sorted({'matplotlib', 'numattn.plot'} & set(sys.modules)))"
    code += "; import numattn.plot; print('matplotlib' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.stdout.split() == ["[]", "False"], result.stderr


# ---- errors ------------------------------------------------------------------------------------

AB = ["a", "b"]
NAN = np.array([[1.0, 0.0], [np.nan, 1.0]])

# a call, the error, and what its message has to say
CASES = {
    "axes": (lambda: plot.plot_pattern(np.ones((1, 2, 2))), ValueError,
             "weights: got shape (1, 2, 2), expected (Lq, Lk)"),
    "axes of heads": (lambda: plot.plot_heads(np.eye(2)), ValueError,
                      "weights: got shape (2, 2), expected (H, Lq, Lk) or (layers, H, Lq, Lk)"),
    "axes of lines": (lambda: plot.plot_lines(np.ones(2), AB), ValueError, "weights: got shape (2"),
    "axes of a page": (lambda: plot.html_page(np.eye(2), AB), ValueError, "weights: got shape (2"),
    "nothing": (lambda: plot.plot_pattern(np.ones((0, 2))), ValueError, "weights: got shape (0, "),
    "text": (lambda: plot.plot_pattern([["a"]]), TypeError, "weights: got dtype str"),
    "complex": (lambda: plot.plot_pattern(1j * np.eye(2)), TypeError, "weights: got dtype complex"),
    "bool": (lambda: plot.plot_pattern(np.eye(2) > 0), TypeError,
             "weights: got dtype bool, expected real numbers"),
    "mask of 0 and 1": (lambda: plot.plot_pattern(np.eye(2), mask=[[1, 0]]), TypeError,
                        "mask: got dtype int64, expected bool (True = attend); use"),
    "masked array": (lambda: plot.plot_pattern(np.ma.array(np.eye(2))), TypeError,
                     "weights: got a masked array"),
    "ragged": (lambda: plot.plot_pattern([[1.0], [0.5, 0.5]]), ValueError, "weights: got list, wh"),
    "NaN": (lambda: plot.plot_pattern(NAN), ValueError,
            "weights: got nan at index (1, 0), expected finite numbers"),
    "NaN in a page": (lambda: plot.html_page(NAN[None], AB), ValueError,
                      "weights: got nan at index (0, 1, 0), expected finite"),
    "infinite": (lambda: plot.plot_lines(np.full((2, 2), np.inf), AB), ValueError, "weights: got"),
    "logits": (lambda: plot.plot_heads(-np.ones((1, 2, 2))), ValueError,
               "weights: got -1.0 at index (0, 0, 0), expected numbers of at least 0"),
    "tokens": (lambda: plot.plot_pattern(np.eye(2), list("abc")), ValueError,
               "tokens: got 3 tokens, expected 2, the queries of weights of shape (2, 2)"),
    "tokens of heads": (lambda: plot.plot_heads(np.ones((3, 2, 2)), list("abc")), ValueError,
                        "tokens: got 3 tokens, expected 2, the queries of weights of shape (3, 2"),
    "tokens of a page": (lambda: plot.html_page(np.ones((3, 2, 2)), ["a"]), ValueError,
                         "tokens: got 1 tokens, expected 2, the queries of weights of shape (3"),
    "key tokens": (lambda: plot.plot_lines(np.eye(2), AB, key_tokens=["a"]), ValueError,
                   "key_tokens: got 1 tokens, expected 2, the keys of weights of shape (2, 2)"),
    "no key tokens": (lambda: plot.plot_pattern(np.ones((2, 3)), AB), ValueError,
                      "tokens: got 2 tokens, expected `key_tokens=` too, for the 3 keys of"),
    "tokens as one text": (lambda: plot.plot_pattern(np.eye(2), "ab"), TypeError,
                           "tokens: got a str, expected a sequence of str"),
    "numbers as tokens": (lambda: plot.plot_pattern(np.eye(2), ["a", 1]), TypeError,
                          "tokens: got 1 (int) at index 1, expected a sequence of str"),
    "no sequence": (lambda: plot.plot_pattern(np.eye(2), 7), TypeError, "tokens: got int"),
    "lines without tokens": (lambda: plot.plot_lines(np.eye(2), None), TypeError,
                             "tokens: got None, expected a sequence of str"),
    "page without tokens": (lambda: plot.html_page(np.ones((1, 2, 2)), None), TypeError,
                            "tokens: got None"),
    "float mask": (lambda: plot.plot_pattern(np.eye(2), mask=np.eye(2)), TypeError,
                   "mask: got dtype float64, expected bool"),
    "shape of the mask": (lambda: plot.plot_pattern(np.eye(2), mask=np.ones((3, 2), bool)),
                          ValueError, "mask: got shape (3, 2), expected one that broadcasts to (2"),
    "titles": (lambda: plot.plot_heads(np.ones((3, 2, 2)), titles=AB), ValueError,
               "titles: got 2 titles, expected 3, one per head of weights of shape (3, 2, 2)"),
    "columns": (lambda: plot.plot_heads(np.ones((3, 2, 2)), columns=0), ValueError,
                "columns: got 0, expected at least 1"),
    "half a column": (lambda: plot.plot_heads(np.ones((3, 2, 2)), columns=1.5), TypeError,
                      "columns: got 1.5 (float), expected an int"),
    "true columns": (lambda: plot.plot_heads(np.ones((3, 2, 2)), columns=True), TypeError,
                     "columns: got True, expected an int"),
    "columns of layers": (lambda: plot.plot_heads(np.ones((1, 3, 2, 2)), columns=3), ValueError,
                          "columns: got 3 for weights with layers, exp"),
    "threshold": (lambda: plot.plot_lines(np.eye(2), AB, threshold=-1), ValueError,
                  "threshold: got -1, expected a number of at least 0"),
    "title of a page": (lambda: plot.html_page(np.ones((1, 2, 2)), AB, title=3), TypeError,
                        "title: got int, expected a str"),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_bad_input_is_refused_before_anything_is_drawn(name, monkeypatch):
    def drawn():
        raise AssertionError("drawn")

    monkeypatch.setattr(plot, "_pyplot", drawn)
    call, error, message = CASES[name]
    with pytest.raises(error, match="^" + re.escape(message)):
        call()


# ---- the page ----------------------------------------------------------------------------------


class Page(HTMLParser):
    """The elements of a page: attributes and text, each with the name of what it is in."""

    def __init__(self, text):
        super().__init__(convert_charrefs=True)
        self.elements, self.open = [], []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        element = {
            "tag": tag,
            "inside": [e.get("id") for e in self.open],
            "text": "",
            **dict(attrs),
        }
        self.elements.append(element)
        if tag not in ("meta", "link"):
            self.open.append(element)

    def handle_endtag(self, tag):
        assert self.open.pop()["tag"] == tag

    def handle_data(self, data):
        if self.open:
            self.open[-1]["text"] += data

    def find(self, tag, **attributes):
        wanted = {"tag": tag, **attributes}
        return [e for e in self.elements if wanted.items() <= e.items()]

    def tokens(self, parent):
        return [e for e in self.find("span") if parent in e["inside"]]


def test_page_has_the_weights(rng):
    weights = make_weights(rng, 2, 3, 8, 8)
    page = plot.html_page(weights, WORDS)
    (data,) = Page(page).find("script", id="data")
    assert data["type"] == "application/json"
    data = json.loads(data["text"])
    assert data["queries"] == data["keys"] == SHOWN
    weights_of_page = np.array(data["tenThousandths"]) / 10_000
    assert weights_of_page.shape == weights.shape
    np.testing.assert_allclose(weights_of_page, weights, rtol=0, atol=5.000001e-5)


def test_page_of_one_layer_and_other_keys(rng):
    weights = make_weights(rng, 3, 2, 8)
    page = Page(plot.html_page(weights, AB, key_tokens=WORDS))
    data = json.loads(page.find("script", id="data")[0]["text"])
    assert (data["queries"], data["keys"]) == (AB, SHOWN)
    assert np.shape(data["tenThousandths"]) == (1, 3, 2, 8)


def test_page_is_safe_and_needs_no_network(rng):
    hostile = [
        "</script><script>alert(1)</script>",
        "<!--<script>",
        "&lt;",
        "$data",
        "\ud800",
        "\0",
    ]
    title = "</title><script>alert(2)</script> $data & \ud800"
    text = plot.html_page(np.ones((1, 6, 6)), hostile, title=title)
    assert "http://" not in text
    assert "https://" not in text
    text.encode()
    page = Page(text)
    assert not page.open
    assert len(page.find("script")) == 2
    assert not any("alert(1)" in e["text"] for e in page.elements if e.get("id") != "data")
    shown = title.replace("\ud800", "\\ud800")
    assert [e["text"] for e in page.find("title") + page.find("h1")] == [shown, shown]
    data = json.loads(page.find("script", id="data")[0]["text"])
    assert data["queries"] == [*hostile[:4], "\\ud800", "\\x00"]
    # Nothing to load, and nothing that may.
    for element in page.elements:
        assert "src" not in element
        assert element.get("href", "data:,") == "data:,"
    assert "default-src 'none'" in text
    assert len(page.find("select", id="layer")) == len(page.find("select", id="head")) == 1


def test_page_is_written(rng, tmp_path):
    text = plot.html_page(np.ones((1, 1, 1)), ["\u4f60\u597d"], tmp_path / "a.html", title="\u6ce8")
    assert (tmp_path / "a.html").read_bytes() == text.encode()
    assert plot.html_page(np.ones((1, 1, 1)), ["a"], str(tmp_path / "b.html"))
    assert (tmp_path / "b.html").exists()


def dump_dom(page, script, folder):
    """Return the page after `script` has run in it."""
    file = folder / "page.html"
    file.write_text(page.replace("</body>", f"<script>{script}</script></body>"), encoding="utf-8")
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--dump-dom"]
    command += ["--virtual-time-budget=2000", f"--user-data-dir={folder / 'profile'}"]
    result = subprocess.run([*command, file.as_uri()], capture_output=True, timeout=120)
    assert result.returncode == 0, result.stderr
    return Page(result.stdout.decode())


@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")
def test_page_in_a_browser(rng, tmp_path):
    weights = make_weights(rng, 2, 3, 8, 8)
    page = plot.html_page(weights, WORDS, title="A cat")

    def assert_shows(dom, layer, head, query):
        row = weights[layer, head, query]
        assert [e["text"] for e in dom.tokens("queries")] == SHOWN
        assert [e["text"] for e in dom.tokens("keys")] == SHOWN
        assert [e["data-index"] for e in dom.tokens("keys")] == list("01234567")
        assert [e["data-index"] for e in dom.tokens("queries")] == list("01234567")
        numbers = [float(e["data-weight"]) for e in dom.tokens("keys")]
        np.testing.assert_allclose(numbers, row, rtol=0, atol=5.000001e-5)
        tints = [float(e["style"].removeprefix("--tint:").strip(" ;")) for e in dom.tokens("keys")]
        np.testing.assert_allclose(tints, row / row.max(), atol=2e-3)
        selected = [e["aria-selected"] for e in dom.tokens("queries")]
        assert selected == ["true" if i == query else "false" for i in range(8)]
        (summary,) = dom.find("p", id="summary")
        assert f"Token {query}, \u201c{SHOWN[query]}\u201d, attends most" in summary["text"]
        assert SHOWN[row.argmax()] in summary["text"]

    assert_shows(dump_dom(page, "", tmp_path), 0, 0, 7)
    act = """
      function choose(id, value) {
        const select = document.getElementById(id);
        select.value = value;
        select.dispatchEvent(new Event("change", {bubbles: true}));
      }
      function query(index) {
        return document.querySelector('#queries span[data-index="' + index + '"]');
      }
      query(3).dispatchEvent(new MouseEvent("mouseenter"));
      choose("head", "2");
    """
    assert_shows(dump_dom(page, act, tmp_path), 0, 2, 3)
    # By the keyboard: the focus chooses, and the arrow keys move it.
    press = 'query(5).focus(); choose("layer", "1"); document.activeElement.dispatchEvent('
    press += 'new KeyboardEvent("keydown", {key: "ArrowLeft", bubbles: true}));'
    assert_shows(dump_dom(page, act + press, tmp_path), 1, 2, 4)


def test_where_to_draw_and_write(plt, tmp_path):
    weights = np.full((2, 2), 0.5)
    for call in (plot.plot_pattern, plot.plot_lines):
        with pytest.raises(TypeError, match=r"ax: got 3 \(int\), expected matplotlib.axes.Axes"):
            call(weights, ["a", "b"], ax=3)
    with pytest.raises(
        TypeError, match=r"path: got 3.5 \(float\), expected a str or a pathlib.Path"
    ):
        plot.html_page(weights[np.newaxis], ["a", "b"], 3.5)
