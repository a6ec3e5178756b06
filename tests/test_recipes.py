"""Promise: CONTRIBUTING's recipes are true: a level or an option that misses a place is noticed."""

import dataclasses
import inspect
import re
import typing
from pathlib import Path

import numattn as na
import pytest
from numattn import _arguments, _option_types, _reference, _runtime

ROOT = Path(__file__).parent.parent
pytestmark = pytest.mark.skipif(
    not (ROOT / "CONTRIBUTING.md").exists(), reason="needs the repository"
)
# Where the results lie and how they are computed: no formula knows of these.
NOT_IN_THE_FORMULA = {"layout", "return_lse", "out", "num_threads", "k_scale", "v_scale"}
# What the stages do not have: their results are arrays of their own, without values and dropout.
NOT_OF_STAGES = {"return_lse", "out", "v_scale", "dropout", "rng"}
OPTIONS = [
    name
    for name, parameter in inspect.signature(na.attention).parameters.items()
    if parameter.kind is parameter.KEYWORD_ONLY
]


def text(path):
    return (ROOT / path).read_text(encoding="utf-8")


@pytest.mark.parametrize("level", _runtime.ISA_LEVELS)
@pytest.mark.parametrize(
    ("path", "wanted"),
    [
        ("csrc/CMakeLists.txt", r"set\(flags_{level} "),
        ("csrc/runtime/cpu.h", r"bool cpu_has_{level}\(\)"),
        ("csrc/runtime/cpu.h", r"bool cpu_prefers_{level}\(\)"),
        ("csrc/kernels/{level}.cpp", r"KernelTable kernels_{level} ="),
        ("csrc/kernels/{level}.cpp", r"Probes probes_{level} ="),
        ("csrc/kernels/{level}.cpp", r'#include "kernels/simd/{level}\.h"'),
        ("docs/performance.rst", r"NUMATTN_ISA=[a-z0-9_|]*\b{level}\b"),
    ],
)
def test_a_level_is_everywhere(level, path, wanted):
    path, wanted = (x.replace("{level}", level) for x in (path, wanted))
    assert re.search(wanted, text(path)), f"{path} lacks what matches {wanted}"


@pytest.mark.parametrize("level", _runtime.ISA_LEVELS)
def test_the_list_says_which_kernels_are_a_level_s_own(level):
    has_all = "make_table<" in text(f"csrc/kernels/{level}.cpp")
    assert has_all == (_runtime.ISA_LEVELS[level] == ["all"])


def test_the_list_of_levels_has_no_more_than_there_are_files():
    sources = {path.stem for path in (ROOT / "csrc/kernels").glob("*.cpp")}
    assert sources == set(_runtime.ISA_LEVELS)


def members(source, beginning):
    """Return the names of the members in the block of C++ or Cython after `beginning`."""
    block = re.split(r"\n\n|\n};", source.partition(beginning)[2])[0]
    lines = [re.sub(r" = [^,;]+|//.*", "", line) for line in block.splitlines()[1:]]
    return {x.split()[-1].strip("*") for line in lines for x in line.rstrip(" ;").split(",") if x}


def test_the_binding_has_every_option_of_the_native_library():
    native = members(text("csrc/problem.h"), "struct Options {")
    binding = text("python/numattn/_core.pyx")
    assert {"scale", "window_left", "mask", "sinks"} <= native
    assert members(binding, "cdef cppclass Options:") == native
    for name in native:
        assert re.search(rf"problem\.options\.{name}\b", binding), f"nothing sets {name}"
        assert re.search(rf"options\.{name}\b", text("tests/native/problems.cpp"))


@pytest.mark.parametrize("option", OPTIONS)
def test_an_option_is_everywhere(option):
    fields = {field.name for field in dataclasses.fields(_arguments.Arguments)}
    # A window and a causal limit become the two sides of a window.
    stored = {
        "is_causal": "window_right",
        "window": "window_left",
        "return_lse": "lse",
        "rng": "dropout_seed",
    }
    if option != "layout":
        assert stored.get(option, option) in fields
    assert option in inspect.signature(_arguments.check).parameters
    assert re.search(rf"^    (\w+, )*{option}(, \w+)* : ", na.attention.__doc__, re.M)
    if option not in {"return_lse", "out", "k_scale", "v_scale"}:
        for function in (na.attention_backward, na.attention_vjp):
            assert option in inspect.signature(function).parameters
    if option not in NOT_IN_THE_FORMULA:
        assert option in inspect.signature(_reference.attention).parameters
        assert re.search(rf'"{option}": ', text("tests/test_options.py"))
    word = re.compile(rf"\b{option}\b")
    assert word.search(text("tests/test_errors.py") + text("tests/test_sequences.py"))
    assert word.search(text("tests/fuzz.py"))
    if option not in NOT_OF_STAGES:
        assert option in inspect.signature(na.attention_weights).parameters
    assert re.search(rf"^   \* - (``\w+``, )*``{option}``", text("docs/options/index.rst"), re.M)
    pages = [path.read_text(encoding="utf-8") for path in (ROOT / "docs/options").glob("*.rst")]
    assert any(option in page.splitlines()[0] for page in pages), f"no page is headed {option}"


@pytest.mark.parametrize(
    ("function", "options", "switch"),
    [
        (na.attention, "AttentionOptions", "return_lse"),
        (na.attention_vjp, "VjpOptions", "return_lse"),
        (na.attention_varlen, "VarlenOptions", "return_lse"),
        (na.attention_paged, "PagedOptions", "return_lse"),
        (na.PageBounds.attend, "SelectedPagesOptions", "return_lse"),
        (na.KVCache.attend, "AttendOptions", "return_lse"),
        (na.KVCache.append_and_attend, "AppendAndAttendOptions", "return_lse"),
        (na.MultiHeadAttention.__call__, "LayerOptions", "return_weights"),
        ("numattn.dask", "DaskOptions", "return_lse"),
    ],
)
def test_type_checkers_know_every_option(function, options, switch):
    """Overloads have the switch and these options; the function itself has all of them."""
    if isinstance(function, str):
        function = pytest.importorskip(function, exc_type=ImportError).attention
    typed = {
        name: x.__forward_arg__
        for name, x in getattr(_option_types, options).__annotations__.items()
    }
    parameters = inspect.signature(function).parameters
    own = {
        name: parameter.annotation
        for name, parameter in parameters.items()
        if parameter.kind is parameter.KEYWORD_ONLY and name != switch
    }
    assert typed == own
    overloads = typing.get_overloads(function)
    assert len(overloads) == 3
    by_place = [x for x in parameters.values() if x.kind is x.POSITIONAL_OR_KEYWORD]
    for overload in overloads:
        *given, of_switch, others = inspect.signature(overload).parameters.values()
        assert given == by_place
        assert of_switch.name == switch
        assert others.annotation == f"Unpack[{options}]"


def test_the_map_names_every_file():
    the_map = text("CONTRIBUTING.md").split("```")[1]
    sources = [x for x in (ROOT / "csrc").rglob("*") if x.suffix in (".h", ".cpp")]
    sources += (ROOT / "python/numattn").glob("_*.py")
    # Rooms that are described as a whole.
    rooms = {"runtime", "products", "memory", "simd", "softmax"}
    for path in sources:
        if path.parent.name not in rooms and path.stem not in {*_runtime.ISA_LEVELS, "__init__"}:
            assert re.search(rf"(?<![\w]){path.stem}\.", the_map), f"{path.name} is not on the map"
    assert all(re.search(rf"\b{room}/", the_map) for room in rooms)
    folders = [x for x in ROOT.iterdir() if x.is_dir() and x.name[0] != "." and x.name != "build"]
    files = [f"/{x.relative_to(ROOT).as_posix()}" for folder in folders for x in folder.rglob("*")]
    for name in re.findall(r"(?<![\w/.-])(\w[\w/-]*\.(?:h|cpp|py|pyx|txt|html))\b", the_map):
        found = any(path.endswith(f"/{name}") for path in files)
        assert found, f"the map names {name}, which is not there"
