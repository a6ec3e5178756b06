"""Promise: `python -m numattn` tells what runs, and notices wrong results."""

import subprocess
import sys

import numattn as na
import numpy as np
import pytest
from numattn import __main__ as command_line
from numattn import _bench, _runtime, _self_check


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


def test_wrong_results_are_noticed(monkeypatch, capsys):
    right = _self_check._compute

    def wrong(level, *arguments):
        out, lse = right(level, *arguments)
        if level == "numpy" and out.dtype == np.float64:
            out[-1, -1, -1, -1] += 1e-6
        return [out, lse]

    monkeypatch.setattr(_self_check, "_compute", wrong)
    monkeypatch.setattr(sys, "argv", ["numattn"])
    assert command_line.main() == 1
    printed = capsys.readouterr().out
    assert "WRONG RESULTS" in printed
    (line,) = [x for x in printed.splitlines() if x.startswith("numpy ")]
    assert line.count("!") == 1


def test_nan_is_noticed(monkeypatch):
    right = _self_check._compute

    def wrong(*arguments):
        out, lse = right(*arguments)
        return [out, lse * np.nan]

    monkeypatch.setattr(_self_check, "_compute", wrong)
    assert _self_check.self_check() is False


def test_bench(monkeypatch, capsys):
    monkeypatch.setattr(_bench, "_SHAPES", _bench._SHAPES[:2])
    monkeypatch.setattr(sys, "argv", ["numattn", "bench"])
    assert command_line.main() == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 3
    for line in lines[1:]:
        *_, times, difference = line.split()
        assert float(times.removesuffix("x")) > 0
        assert float(difference) < 1e-5


def test_unknown_command():
    result = run_module("fly")
    assert result.returncode == 2
    assert "invalid choice: 'fly'" in result.stderr


@pytest.mark.skipif(_runtime.native is None, reason="needs the compiled kernels")
def test_level_in_use_stays_the_same(capsys):
    before = _runtime.native.isa()
    assert _self_check.self_check()
    assert _runtime.native.isa() == before
