"""Promise: `make lint` finds the phrases that this project avoids, in prose and nowhere else."""

import check_words
import pytest


def found_in(tmp_path, name, text):
    path = tmp_path / name
    path.write_text(text, encoding="utf-8")
    return check_words.check(path)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("The bias stands in the table.", "stands"),
        ("The rows lie behind\neach other.", "behind each other"),
        ("The error is that of `matmul`.", "that of"),
        ("It takes arrays of dask.", "arrays of dask"),
        ("It keeps one row alone.", "alone"),
        (f"It works ({'word ' * 26}).", "word word word word ..."),
    ],
)
def test_a_phrase_is_found(tmp_path, text, words):
    (line,) = found_in(tmp_path, "page.md", f"# Title\n\n{text}\n")
    assert f"page.md:3: {words!r}: write" in line


def test_every_phrase_says_what_to_write_instead():
    for phrase in check_words.PHRASES:
        assert phrase.instead
        assert phrase.why


@pytest.mark.parametrize(
    "text",
    [
        "lse stands for log-sum-exp; leave it alone.",
        "Call `beside(x)`.",
        "```python\nbeside = 1  # besides\n```",
        "A [link](besides.md) and https://example.org/likewise.",
    ],
)
def test_good_prose_and_code_pass(tmp_path, text):
    assert not found_in(tmp_path, "page.md", f"{text}\n")


def test_a_page_of_the_site(tmp_path):
    text = """\
Title
=====

Text::

    beside = 1

.. plot::

    >>> beside = 1

.. note::

   It is beside the point.

>>> beside
1
"""
    (line,) = found_in(tmp_path, "page.rst", text)
    assert "page.rst:14: 'beside'" in line


def test_strings_of_programs(tmp_path):
    text = '''\
"""Do it.

It stands here.
"""

beside = besides = 1  # alone
raise ValueError(f"{beside}: expected that of {besides}")
'''
    first, second = found_in(tmp_path, "program.py", text)
    assert "program.py:3: 'stands'" in first
    assert "program.py:7: 'that of'" in second
