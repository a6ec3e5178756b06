"""Promise: docstrings of public objects have an example that runs, and say what is related."""

import doctest
import importlib
import inspect

import pytest
from checks import PUBLIC_MODULES


def public(module):
    """Return the functions, classes and methods that a module documents, by their names."""
    found = {}
    for name in module.__all__:
        one = getattr(module, name)
        if not callable(one):
            continue
        found[name] = one
        for cls in inspect.getmro(one) if inspect.isclass(one) else ():
            if not cls.__module__.startswith("numattn"):
                continue
            for method, static in vars(cls).items():
                is_method = callable(static) or isinstance(static, classmethod | staticmethod)
                if is_method and (method == "__call__" or not method.startswith("_")):
                    found[f"{name}.{method}"] = getattr(one, method)
    return found


@pytest.mark.parametrize("name", PUBLIC_MODULES)
def test_docstrings(name, tmp_path, monkeypatch):
    for package in PUBLIC_MODULES[name]:
        pytest.importorskip(package)
    if name == "numattn.plot":
        importlib.import_module("matplotlib").use("Agg")
    monkeypatch.chdir(tmp_path)  # examples write files
    found = public(importlib.import_module(name))
    assert found
    finder, runner = doctest.DocTestFinder(recurse=False), doctest.DocTestRunner()
    for one, documented in found.items():
        (test,) = finder.find(documented, one, globs={})
        assert test.examples, one
        assert not any(doctest.SKIP in example.options for example in test.examples), one
        assert runner.run(test).failed == 0, one


@pytest.mark.parametrize("name", PUBLIC_MODULES)
def test_see_also_says_why(name):
    for package in PUBLIC_MODULES[name]:
        pytest.importorskip(package)
    for one, documented in public(importlib.import_module(name)).items():
        section = inspect.getdoc(documented).partition("See Also\n--------\n")[2]
        lines = section.partition("\n\n")[0].splitlines()
        assert lines, one
        for line in lines:
            assert line.startswith(" ") or " : " in line, f"{one}: {line}"
