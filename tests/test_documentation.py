"""Promise: what the documentation shows runs."""

import doctest
import inspect
import re
from pathlib import Path

import numattn as na
import pytest

README = Path(__file__).parent.parent / "README.md"


@pytest.mark.parametrize("name", [name for name in na.__all__ if callable(getattr(na, name))])
def test_docstring(name):
    function = getattr(na, name)
    assert "Examples\n" in inspect.getdoc(function)
    tests = doctest.DocTestFinder(recurse=False).find(function, name, globs={})
    assert sum(len(test.examples) for test in tests) > 0
    runner = doctest.DocTestRunner()
    for test in tests:
        assert runner.run(test).failed == 0


def test_readme():
    blocks = re.findall(r"^```python\n(.*?)^```", README.read_text(), re.DOTALL | re.MULTILINE)
    assert blocks
    namespace = {}
    for block in blocks:
        exec(compile(block, str(README), "exec"), namespace)


def test_readme_links_to_files_that_exist():
    links = re.findall(r"\]\(([^)#:]+)\)", README.read_text())
    assert len(links) > 3
    for link in links:
        assert (README.parent / link).exists(), link


def test_readme_lists_every_option():
    table = README.read_text()
    for name in inspect.signature(na.attention).parameters:
        assert f"`{name}`" in table, name
