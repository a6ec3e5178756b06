"""Promise: `python -m numattn` tells what runs, and notices wrong results."""

import itertools
import json
import os
import re
import subprocess
import sys

import numattn as na
import numpy as np
import pytest
from numattn import __main__ as command_line
from numattn import _bench, _blas, _runtime, _self_check
from numattn import _reference as reference


def run_module(*arguments):
    return subprocess.run(
        [sys.executable, "-m", "numattn", *arguments], capture_output=True, text=True, check=False
    )


@pytest.mark.smoke
def test_check():
    result = run_module()
    assert result.returncode == 0
    assert result.stderr == "", "progress is for terminals"
    assert f"numattn {na.__version__}" in result.stdout
    assert "all is well" in result.stdout
    levels = {} if _runtime.native is None else _runtime.native.isa_names()
    for name, available in {"numpy": True, **levels}.items():
        (line,) = [x for x in result.stdout.splitlines() if x.startswith(f"{name} ")]
        assert ("not on this CPU" in line) is not available
        assert len(line.split()) >= 5


@pytest.fixture
def few_problems(monkeypatch):
    of_all = _self_check._problems
    monkeypatch.setattr(_self_check, "_problems", lambda dtype: itertools.islice(of_all(dtype), 1))
    if _runtime.native is not None:
        in_use = _runtime.native.isa()
        monkeypatch.setattr(_runtime.native, "isa_names", lambda: {in_use: True})


@pytest.mark.usefixtures("few_problems")
@pytest.mark.parametrize("name", ["_attention", "_gradients"])
def test_wrong_results_are_noticed(name, monkeypatch, capsys):
    right = getattr(_self_check, name)

    def wrong(level, *arguments):
        results = right(level, *arguments)
        if level == "numpy" and results[0].dtype == np.float64:
            results[0][-1, -1, -1, -1] += 1e-6
        return results

    monkeypatch.setattr(_self_check, name, wrong)
    monkeypatch.setattr(sys, "argv", ["numattn"])
    assert command_line.main() == 1
    printed = capsys.readouterr().out
    assert "WRONG RESULTS" in printed
    (line,) = [x for x in printed.splitlines() if x.startswith("numpy ")]
    assert line.count("!") == 1


@pytest.mark.usefixtures("few_problems")
def test_nan_is_noticed(monkeypatch):
    right = _self_check._attention

    def wrong(*arguments):
        out, lse = right(*arguments)
        return out, lse * np.nan

    monkeypatch.setattr(_self_check, "_attention", wrong)
    # CPUs take a hundred times as long for NaN in the precision that is compared with.
    monkeypatch.setattr(
        _self_check, "_dtype", lambda name: np.dtype(name) if name == "float32" else None
    )
    assert _self_check.self_check() is False


def test_bench(monkeypatch, capsys):
    monkeypatch.setattr(_bench, "_SHAPES", _bench._SHAPES[:2])
    monkeypatch.setattr(sys, "argv", ["numattn", "bench"])
    monkeypatch.setattr(_blas, "_SLOWING", ())  # this process has imported NumPy
    assert command_line.main() == 0
    ours, numpys, _, *lines = capsys.readouterr().out.splitlines()
    assert f"threads: {na.get_num_threads()}" in ours
    assert _blas.describe() in numpys
    assert len(lines) == 2
    for line in lines:
        found = re.search(r"([\d.]+)x +([\d.]+) to ([\d.]+) +(\S+)(  disturbed: .*)?$", line)
        times, low, high, difference = map(float, found.groups()[:4])
        assert 0 < low <= times <= high
        assert difference < 1e-5
        assert (found[5] is not None) == (high > 3 * low) or high / low == pytest.approx(3, rel=0.2)


def test_bench_as_json(monkeypatch, capsys):
    monkeypatch.setattr(_bench, "_SHAPES", _bench._SHAPES[:1])
    monkeypatch.setattr(_blas, "_SLOWING", ())
    assert command_line.main(["bench", "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["numattn"] == na.__version__
    assert printed["threads"] == na.get_num_threads()
    (case,) = printed["cases"]
    assert case["case"] == "one small head"
    assert len(case["rounds"]) == 5
    assert min(case["rounds"]) <= case["times_as_fast"] <= max(case["rounds"])
    assert case["largest_difference"] < 1e-5


@pytest.mark.parametrize("arguments", [["--help"], ["bench", "--help"], ["--version"]])
def test_help(arguments):
    result = run_module(*arguments)
    assert result.returncode == 0
    assert result.stdout.startswith(("usage: python -m numattn", f"numattn {na.__version__}"))


def test_bench_without_variables_that_slow_numpy(tmp_path):
    """They are gone before NumPy is imported, and the exit code comes back."""
    program = tmp_path / "program.py"
    program.write_text(
        "import os, sys\n"
        "from numattn import _blas\n"
        "_blas.restart_at_full_speed()\n"
        "print(sys.argv[1:], [x for x in os.environ if x.startswith('OPENBLAS_')])\n"
        "sys.exit(7)\n"
    )
    slowing = {"OPENBLAS_CORETYPE": "Nehalem", "OPENBLAS_L2_SIZE": "256"}
    clean = {name: x for name, x in os.environ.items() if not name.startswith("OPENBLAS_")}
    for variables in (slowing, {}):
        result = subprocess.run(
            [sys.executable, program, "an argument"],
            capture_output=True, text=True, check=False, env=clean | variables,
        )  # fmt: skip
        assert result.stdout == "['an argument'] []\n", result.stderr
        assert result.returncode == 7


@pytest.mark.parametrize(
    "case", [{}, {"softcap": 3.0}, {"penalty": True}, {"sinks": True}], ids=str
)
@pytest.mark.parametrize("shape", [(4, 4, 1, 60), (4, 2, 7, 9), (4, 2, 9, 60)], ids=str)
def test_plain_numpy_computes_the_same(rng, shape, case):
    heads, kv_heads, queries, keys = shape
    q = rng.standard_normal((3, heads, queries, 16), dtype=np.float32)
    k, v = rng.standard_normal((2, 3, kv_heads, keys, 16), dtype=np.float32)
    plain, options = dict(case), dict(case)
    if "penalty" in case:
        plain["penalty"] = rng.standard_normal((heads, queries, keys), dtype=np.float32)
        options = {"bias": plain["penalty"]}
    if "sinks" in case:
        options["sinks"] = rng.standard_normal(heads, dtype=np.float32)
        plain["sinks"] = options["sinks"][:, np.newaxis, np.newaxis]
    expected, _ = reference.attention(q, k, v, **options, dtype=np.float64)
    calls = _bench.plain_calls(q, k, v, **plain)
    assert len(calls) == (3 if shape[:3] == (4, 4, 1) else 1)
    for call in calls.values():
        np.testing.assert_allclose(call(), expected, rtol=0, atol=3e-6)


def test_unknown_command():
    result = run_module("fly")
    assert result.returncode == 2
    assert "invalid choice: 'fly'" in result.stderr


@pytest.mark.skipif(_runtime.native is None, reason="needs the compiled kernels")
@pytest.mark.usefixtures("few_problems")
def test_level_in_use_stays_the_same(capsys):
    before = _runtime.native.isa()
    assert _self_check.self_check()
    assert _runtime.native.isa() == before
