"""Promise: what is pinned runs, nothing falls back silently, and one can ask what is in use."""

import os
import subprocess
import sys
from pathlib import Path

import numattn as na
import numpy as np
import pytest
from numattn import _runtime

WITHOUT_EXTENSION = "import sys; sys.modules['numattn._core'] = None\n"
ATTEND = (
    "import numpy as np, numattn as na\n"
    "x = np.eye(3, dtype=np.float32)\n"
    "na.attention(x, x, x)\n"
    "info = na.runtime_info()\n"
    "print(info['backend'], info['isa']['chosen'], info['num_threads'])\n"
)

needs_native = pytest.mark.skipif(_runtime.native is None, reason="needs the compiled kernels")


def run_python(code, **environment):
    clean = {k: v for k, v in os.environ.items() if not k.startswith("NUMATTN_")}
    return subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True, text=True, check=False, env=clean | environment,
    )  # fmt: skip


@needs_native
def test_every_level_of_this_cpu_can_be_pinned():
    for name, available in _runtime.native.isa_names().items():
        result = run_python(ATTEND, NUMATTN_ISA=name, NUMATTN_NUM_THREADS="3")
        if available:
            assert result.stdout.split() == ["native", name, "3"], result.stderr
        else:
            assert "RuntimeError" in result.stderr
            assert f"NUMATTN_ISA={name}: this CPU" in result.stderr


@needs_native
def test_best_level_is_the_default():
    available = na.runtime_info()["isa"]["available"]
    assert run_python(ATTEND).stdout.split()[:2] == ["native", available[-1]]


@pytest.mark.parametrize(
    ("variable", "value", "message"),
    [
        ("NUMATTN_ISA", "foo", "ValueError: NUMATTN_ISA='foo': expected one of generic, avx2"),
        ("NUMATTN_BACKEND", "gpu", "ValueError: NUMATTN_BACKEND='gpu': expected native or numpy"),
        ("NUMATTN_NUM_THREADS", "0", "ValueError: NUMATTN_NUM_THREADS: got 0, expected"),
        ("NUMATTN_NUM_THREADS", "-1", "ValueError: NUMATTN_NUM_THREADS: got -1, expected"),
        (
            "NUMATTN_NUM_THREADS",
            "abc",
            "ValueError: NUMATTN_NUM_THREADS: got 'abc' (str), expected",
        ),
        ("NUMATTN_NUM_THREADS", "10000", "ValueError: NUMATTN_NUM_THREADS: got 10000, expected"),
        ("NUMATTN_NUM_THREADS", "+2", "ValueError: NUMATTN_NUM_THREADS: got '+2' (str), expected"),
        ("NUMATTN_NUM_THREADS", "1_0", "ValueError: NUMATTN_NUM_THREADS: got '1_0' (str), exp"),
        ("NUMATTN_NUM_THREADS", " ", "ValueError: NUMATTN_NUM_THREADS: got ' ' (str), expected"),
    ],
)
def test_bad_environment(variable, value, message):
    result = run_python("import numattn", **{variable: value})
    assert result.returncode == 1
    assert message in result.stderr


def test_missing_extension_warns_once_and_computes():
    result = run_python(WITHOUT_EXTENSION + ATTEND)
    assert result.stdout.split()[:2] == ["numpy", "None"]
    assert result.stderr.count("RuntimeWarning") == 1
    assert "install a C++20 compiler" in result.stderr


def test_missing_extension_where_it_is_required():
    result = run_python(WITHOUT_EXTENSION + ATTEND, NUMATTN_BACKEND="native")
    assert "ImportError: NUMATTN_BACKEND=native, but the compiled kernels" in result.stderr
    result = run_python(WITHOUT_EXTENSION + ATTEND, NUMATTN_ISA="avx2")
    assert "RuntimeError: NUMATTN_ISA=avx2, but the compiled kernels are missing" in result.stderr


def test_numpy_backend_by_choice_is_quiet():
    result = run_python(WITHOUT_EXTENSION + ATTEND, NUMATTN_BACKEND="numpy", NUMATTN_ISA="avx2")
    assert result.stdout.split()[:2] == ["numpy", "None"]
    assert result.stderr == ""


def test_show_runtime(capsys):
    na.show_runtime()
    printed = capsys.readouterr().out
    info = na.runtime_info()
    for said in (na.__version__, np.__version__, info["backend"], info["cpu"], "threads"):
        assert said in printed


@pytest.mark.slow
def test_installation_without_a_compiler(tmp_path):
    """`pip install .` gives the pure-Python package and says so."""
    project = Path(__file__).parent.parent
    result = subprocess.run(
        [sys.executable, "-m", "pip", "install", "-v", "--no-deps", "--target", tmp_path, project],
        capture_output=True, text=True, check=True, env=os.environ | {"CXX": "/bin/false"},
    )  # fmt: skip
    assert "installed the NumPy fallback instead" in result.stdout + result.stderr
    assert not list((tmp_path / "numattn").glob("_core*.so"))
    result = run_python(ATTEND, PYTHONPATH=str(tmp_path))
    assert result.stdout.split()[:2] == ["numpy", "None"]
    assert "RuntimeWarning" in result.stderr
