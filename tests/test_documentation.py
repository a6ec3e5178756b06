"""Promise: what the documentation shows runs."""

import doctest
import importlib
import importlib.util
import inspect
import re
from pathlib import Path

import numattn as na
import pytest
from checks import MODEL_PACKAGES, PUBLIC_MODULES
from numattn import (
    _block_arguments,
    _checks,
    _layer_arguments,
    _quantize,
    _rotary,
    _sequences,
    _softmax,
    _stages,
)

README = Path(__file__).parent.parent / "README.md"
DOCS = Path(__file__).parent.parent / "docs"
# Without the templates of pages, and the pages that `make docs` makes of them.
PAGES = sorted(
    page
    for page in DOCS.rglob("*.rst")
    if not {"_templates", "generated"} & set(page.relative_to(DOCS).parts)
)
PARAMETERS = [
    name
    for name, parameter in inspect.signature(na.attention).parameters.items()
    if parameter.kind is not parameter.VAR_KEYWORD
]


def test_readme():
    blocks = re.findall(
        r"^```python\n(.*?)^```", README.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE
    )
    assert len(blocks) > 5
    namespace, missing = {}, set()
    for block in blocks:
        packages = re.findall(r"^(?:from|import) (\w+)", block, re.MULTILINE)
        absent = {name for name in packages if importlib.util.find_spec(name) is None}
        missing |= absent
        if not absent:
            exec(compile(block, str(README), "exec"), namespace)
    if missing:
        pytest.skip(f"all other blocks ran, but not those that need {', '.join(sorted(missing))}")


def test_readme_links_to_files_that_exist():
    links = re.findall(r"\]\(([^)#:]+)\)", README.read_text(encoding="utf-8"))
    assert len(links) > 3
    for link in links:
        assert (README.parent / link).exists(), link


# ---- the documentation site ---------------------------------------------------------------------


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(DOCS)))
def test_page(page, monkeypatch, tmp_path):
    """What a page shows runs from top to bottom, pictures included."""
    text = page.read_text(encoding="utf-8")
    monkeypatch.setenv("KERAS_BACKEND", "numpy")  # before it is imported
    monkeypatch.setenv("KERAS_HOME", str(tmp_path))
    packages = re.findall(r"^>>> (?:from|import) (\w+)", text, re.MULTILINE)
    if "from numattn.demo import" in text:
        packages += MODEL_PACKAGES
    for package in packages:
        pytest.importorskip(package)
    pictures = ".. plot::" in text
    if pictures:
        matplotlib = pytest.importorskip("matplotlib")
        matplotlib.use("Agg")
    test = doctest.DocTestParser().get_doctest(text, {}, page.name, str(page), 0)
    runner = doctest.DocTestRunner()
    try:
        assert runner.run(test).failed == 0
    finally:
        if pictures:
            matplotlib.pyplot.close("all")


def test_pages_have_no_code_that_does_not_run():
    assert len(PAGES) > 10
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        assert not re.search(r"code(-block)?:: *(python|py|ipython)", text), page
        # Code of pictures that is no doctest would be run by Sphinx alone.
        for block in re.findall(r"^\.\. plot::.*\n((?: +.*\n|\n)+)", text, re.MULTILINE):
            code = [line for line in block.splitlines() if not line.lstrip().startswith(":")]
            assert "\n".join(code).strip().startswith(">>>"), page


def test_pictures_have_a_text_for_those_who_do_not_see_them():
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        for block in re.findall(r"^\.\. (?:plot|image)::.*\n((?: +.*\n|\n)+)", text, re.MULTILINE):
            options = block.partition("\n\n")[0]
            assert ":alt:" in options or ":nofigs:" in options, page


def headings(page):
    return [
        match[1]
        for match in re.finditer(
            r"^(\S.*)\n([=\-])\2+$", page.read_text(encoding="utf-8"), re.MULTILINE
        )
    ]


def test_every_option_is_in_the_table():
    table = (DOCS / "options/index.rst").read_text(encoding="utf-8")
    for name in PARAMETERS:
        assert f"``{name}``" in table, name


def test_every_option_has_its_section():
    sections = [title for page in DOCS.glob("options/*.rst") for title in headings(page)]
    for name in PARAMETERS:
        assert any(f"``{name}``" in title for title in sections), name


@pytest.mark.parametrize(
    "page", [p for p in DOCS.glob("options/*.rst") if p.stem != "index"], ids=lambda p: p.stem
)
def test_every_option_says_what_others_call_it(page):
    assert "The same in other libraries" in headings(page)
    table = page.read_text(encoding="utf-8").partition("list-table")[2]
    for library in ("PyTorch", "JAX", "ONNX", "flash-attn"):
        assert f"* - {library}\n" in table, library


def test_every_page_can_be_reached():
    linked = {"index"}
    for page in PAGES:
        folder = page.parent.relative_to(DOCS)
        for tree in re.findall(
            r"\.\. toctree::\n((?: +.*\n|\n)+)", page.read_text(encoding="utf-8")
        ):
            linked |= {str(folder / line.strip()) for line in tree.splitlines() if line.strip()}
    for page in PAGES:
        assert str(page.relative_to(DOCS).with_suffix("")) in linked, page


def test_what_show_runtime_prints_is_what_the_docs_show(capsys):
    na.show_runtime()
    printed = capsys.readouterr().out.splitlines()
    block = (
        (DOCS / "performance.rst")
        .read_text(encoding="utf-8")
        .partition("prints what a process runs on::\n\n")[2]
    )
    shown = [line.removeprefix("    ") for line in block.partition("\n\n")[0].splitlines()]
    assert [heading(line) for line in shown] == [heading(line) for line in printed]


def heading(line):
    """Return what a line of `show_runtime` begins with, whatever the machine."""
    return re.match("numattn|(?:ISA level)|\\w+|  +(?:built|available here):", line)[0]


@pytest.mark.parametrize(
    "names",
    [
        _checks.INFERENCE_ELSEWHERE, _sequences.SEQUENCES_ELSEWHERE,
        _layer_arguments.ELSEWHERE, _layer_arguments.OPTIONS_ELSEWHERE,
        _block_arguments.OPTIONS_ELSEWHERE, _block_arguments.CALL_ELSEWHERE,
        _block_arguments.ACTIVATIONS_ELSEWHERE, _block_arguments.NORMS_ELSEWHERE,
        _rotary.ELSEWHERE, _stages._ELSEWHERE, _softmax._ELSEWHERE, _quantize._ELSEWHERE,
    ],
    ids=[
        "attention", "sequences", "a layer's call", "a layer",
        "a block", "a block's call", "activations", "norms",
        "rotary", "values", "softmax", "8 bits",
    ],
)  # fmt: skip
def test_names_whose_errors_send_to_porting_are_there(names):
    page = (DOCS / "porting.rst").read_text(encoding="utf-8")
    missing = [name for name in names if not re.search(rf"``[^`\n]*\b{name}\b[^`\n]*``", page)]
    assert not missing


@pytest.mark.parametrize("module", PUBLIC_MODULES)
def test_reference_has_everything_public(module):
    """The methods of a class are listed by the template of its page."""
    for package in PUBLIC_MODULES[module]:
        pytest.importorskip(package)
    public = importlib.import_module(module)
    reference = (DOCS / "reference.rst").read_text(encoding="utf-8")
    listed, current = set(), ""
    for line in reference.splitlines():
        if line.startswith(".. currentmodule::"):
            current = line.split()[-1]
        elif re.fullmatch(r"   \w+", line):
            listed.add((current, line.strip()))
    for name in public.__all__:
        if callable(getattr(public, name)):
            assert (module, name) in listed, name
