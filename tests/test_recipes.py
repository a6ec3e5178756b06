"""Promise: CONTRIBUTING's recipes are true: a level or an option that misses a place is noticed."""

import dataclasses
import inspect
import re
from pathlib import Path

import numattn as na
import pytest
from numattn import _arguments, _reference, _runtime

ROOT = Path(__file__).parent.parent
pytestmark = pytest.mark.skipif(
    not (ROOT / "CONTRIBUTING.md").exists(), reason="needs the repository"
)
# Where the results lie and how they are computed: no formula knows of these.
NOT_IN_THE_FORMULA = {"layout", "return_lse", "out", "num_threads", "k_scale", "v_scale"}
OPTIONS = [
    name
    for name, parameter in inspect.signature(na.attention).parameters.items()
    if parameter.kind is parameter.KEYWORD_ONLY
]


def text(path):
    return (ROOT / path).read_text()


@pytest.mark.parametrize("level", _runtime.ISA_LEVELS)
@pytest.mark.parametrize(
    ("path", "wanted"),
    [
        ("csrc/CMakeLists.txt", r"set\(flags_{level} "),
        ("csrc/runtime/cpu.h", r"bool cpu_has_{level}\(\)"),
        ("csrc/kernels/{level}.cpp", r"KernelTable kernels_{level} ="),
        ("csrc/kernels/{level}.cpp", r"Probes probes_{level} ="),
        ("csrc/kernels/{level}.cpp", r'#include "kernels/simd/{level}\.h"'),
        ("README.md", r"NUMATTN_ISA=[a-z0-9_|]*\b{level}\b"),
        ("docs/performance.rst", r"NUMATTN_ISA=[a-z0-9_|]*\b{level}\b"),
    ],
)
def test_a_level_is_everywhere(level, path, wanted):
    path, wanted = (x.replace("{level}", level) for x in (path, wanted))
    assert re.search(wanted, text(path)), f"{path} lacks what matches {wanted}"


def test_the_list_of_levels_has_no_more_than_there_are_files():
    sources = {path.stem for path in (ROOT / "csrc/kernels").glob("*.cpp")}
    assert sources == set(_runtime.ISA_LEVELS)


@pytest.mark.parametrize("option", OPTIONS)
def test_an_option_is_everywhere(option):
    fields = {field.name for field in dataclasses.fields(_arguments.Arguments)}
    # A window and a causal limit become the two sides of a window.
    stored = {"is_causal": "window_right", "window": "window_left", "return_lse": "lse"}
    if option != "layout":
        assert stored.get(option, option) in fields
    assert option in inspect.signature(_arguments.check).parameters
    assert re.search(rf"^    (\w+, )*{option}(, \w+)* : ", na.attention.__doc__, re.M)
    if option not in NOT_IN_THE_FORMULA:
        assert option in inspect.signature(_reference.attention).parameters
        assert re.search(rf'"{option}": ', text("tests/test_options.py"))
    assert option in text("tests/test_errors.py") + text("tests/test_sequences.py")
    assert option in text("tests/fuzz.py")
    assert re.search(rf"^\| (`\w+`, )*`{option}`", text("README.md"), re.M)
    pages = [path.read_text() for path in (ROOT / "docs/options").glob("*.rst")]
    assert any(option in page.splitlines()[0] for page in pages), f"no page is headed {option}"


def test_the_map_names_every_file():
    contributing = text("CONTRIBUTING.md")
    sources = [*(ROOT / "csrc").glob("*.*"), *(ROOT / "csrc/plan").glob("*.*")]
    sources += [*(ROOT / "csrc/kernels").glob("*.*"), *(ROOT / "python/numattn").glob("_*.py")]
    levels = set(_runtime.ISA_LEVELS)
    ignored = {"CMakeLists", "settings", "make_table", "peak", "constant", "__init__"} | levels
    missing = [x.name for x in sources if x.stem not in ignored and x.stem not in contributing]
    assert not missing
    for name in re.findall(r"^[ ]{2,4}([\w/]+\.(?:h|cpp|py|txt)|\w+/) ", contributing, re.M):
        found = [x for x in ROOT.glob(f"*/**/{name.rstrip('/')}") if ".venv" not in x.parts]
        assert found, f"the map names {name}, which is not there"
