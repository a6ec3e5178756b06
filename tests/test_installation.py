"""Promise: what is pinned runs, nothing falls back silently, and one can ask what is in use."""

import ctypes
import os
import shutil
import struct
import subprocess
import sys
import zipapp
from pathlib import Path

import numattn as na
import numpy as np
import pytest
from numattn import _cpus, _cpus_windows, _runtime

WITHOUT_EXTENSION = "import sys; sys.modules['numattn._core'] = None\n"
ATTEND = (
    "import numpy as np, numattn as na\n"
    "x = np.eye(3, dtype=np.float32)\n"
    "na.attention(x, x, x)\n"
    "info = na.runtime_info()\n"
    "print(info['backend'], info['isa']['chosen'], info['num_threads'])\n"
)

needs_native = pytest.mark.skipif(_runtime.native is None, reason="needs the compiled kernels")


def run_python(*arguments, **environment):
    """Run code, or Python with these arguments."""
    clean = {k: v for k, v in os.environ.items() if not k.startswith("NUMATTN_")}
    options = ["-c"] if len(arguments) == 1 else []
    return subprocess.run(
        [sys.executable, *options, *arguments],
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
def test_fastest_level_is_the_default():
    """It is the last one available, except that Intel's CPUs multiply bfloat16 pairs slowly."""
    fastest = na.runtime_info()["isa"]["available"][-1]
    cpus = Path("/proc/cpuinfo")
    if fastest == "avx512_bf16" and cpus.exists() and "GenuineIntel" in cpus.read_text():
        fastest = "avx512"
    assert run_python(ATTEND).stdout.split()[:2] == ["native", fastest]


@pytest.mark.parametrize(
    ("variable", "value", "message"),
    [
        ("NUMATTN_ISA", "foo", "ValueError: NUMATTN_ISA: got 'foo', expected one of generic, avx2"),
        ("NUMATTN_BACKEND", "gpu", "ValueError: NUMATTN_BACKEND: got 'gpu', expected native"),
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
    assert result.stderr.startswith("<string>:2: RuntimeWarning")  # the line of the import
    assert result.stderr.count("RuntimeWarning") == 1
    assert _runtime._compiler_advice(sys.platform) in result.stderr


def test_extension_that_is_not_there(tmp_path):
    package = Path(na.__file__).parent
    shutil.copytree(package, tmp_path / "numattn", ignore=shutil.ignore_patterns("_core*"))
    result = run_python("import numattn", PYTHONPATH=str(tmp_path), NUMATTN_BACKEND="native")
    assert "kernels are missing (no module named numattn._core): install a C++20" in result.stderr


@pytest.mark.parametrize(
    ("platform", "advice"),
    [("linux", "GCC 11"), ("win32", "SKBUILD_CMAKE_ARGS=-TClangCL"), ("darwin", "ARCHFLAGS")],
)
def test_advice_is_for_the_platform(platform, advice):
    """The build refuses some compilers with more words, which pip shows only with -v."""
    assert advice in _runtime._compiler_advice(platform)


def test_missing_extension_where_it_is_required():
    result = run_python(WITHOUT_EXTENSION + ATTEND, NUMATTN_BACKEND="native")
    assert "ImportError: NUMATTN_BACKEND=native, but the compiled kernels" in result.stderr
    result = run_python(WITHOUT_EXTENSION + ATTEND, NUMATTN_ISA="avx2")
    assert "RuntimeError: NUMATTN_ISA=avx2, but the compiled kernels are missing" in result.stderr


@pytest.mark.parametrize(
    ("name", "data"),
    [("numattn", True), ("other._vendor.numattn", True), ("numattn", False)],
    ids=["frozen", "vendored", "frozen, without data files"],
)
def test_a_copy_of_the_package_without_its_metadata(tmp_path, name, data):
    """As in a frozen program, or vendored by another package."""
    copy = tmp_path.joinpath(*name.split("."))
    shutil.copytree(Path(na.__file__).parent, copy)
    if not data:
        (copy / "isa_levels.txt").unlink()
    if _runtime.native is not None:  # elsewhere in an editable installation
        shutil.copy(_runtime.native.__file__, copy)
    packages = Path(np.__file__).parent.parent
    for needed in ("numpy", "numpy.libs"):
        if (packages / needed).exists():
            try:
                (tmp_path / needed).symlink_to(packages / needed)
            except OSError:  # Windows asks for a privilege
                pytest.skip("no symbolic links here")
    code = ATTEND.replace("numattn as na", f"{name} as na") + (
        f"from {name} import plot; print(len(plot.html_page(x[None], list('abc'))) > 1000)\n"
        "print(na.__version__, na.__file__)"
    )

    # -S: without site-packages, where the metadata of an installed numattn is.
    def run(**environment):
        return subprocess.run(
            [sys.executable, "-S", "-c", code],
            capture_output=True, text=True, check=False,
            env=os.environ | environment | {
                "PYTHONPATH": str(tmp_path), "NUMATTN_BACKEND": _runtime.backend,
            },
        )  # fmt: skip

    result = run()
    assert result.stderr == ""
    runs, plots, what = result.stdout.splitlines()
    assert runs.split()[0] == _runtime.backend
    assert plots == "True"
    assert what == f"0+unknown {copy / '__init__.py'}"
    if _runtime.native is not None:  # which knows its levels, list or not
        assert run(NUMATTN_ISA="generic").stdout.split()[1] == "generic"
        refusal = "ValueError: NUMATTN_ISA: got 'foo', expected one of generic"
        assert refusal in run(NUMATTN_ISA="foo").stderr


SUBINTERPRETER = """
import sys
try:
    import _interpreters as interpreters
except ImportError:
    import _xxsubinterpreters as interpreters
{first}
code = f"import sys; sys.path[:] = {{sys.path}}\\n" + '''
try:
    import numattn
except ImportError as error:
    print(error, "numpy" in sys.modules)
'''
for _ in range(2):
    interpreters.run_string(interpreters.create(), code)
sys.stdout.flush()
{last}
"""


@pytest.mark.parametrize("first", ["", "import numattn"])
def test_a_subinterpreter_is_refused_before_numpy_is_imported_there(first):
    """The main interpreter goes on, whether it had imported numattn before or not."""
    result = run_python(
        SUBINTERPRETER.format(first=first, last=ATTEND), NUMATTN_BACKEND=_runtime.backend
    )
    assert result.stderr == ""
    *refusals, attends = result.stdout.splitlines()
    assert len(refusals) == 2
    for refusal in refusals:
        assert "numattn was imported in a subinterpreter" in refusal
        assert "Use threads" in refusal
        assert refusal.endswith("False")
    assert attends.split()[0] == _runtime.backend


def test_from_a_zip_archive(tmp_path):
    """It computes in NumPy and says why, or is refused where the kernels are required."""
    source = tmp_path / "program"
    shutil.copytree(
        Path(na.__file__).parent, source / "numattn", ignore=shutil.ignore_patterns("__pycache__")
    )
    (source / "__main__.py").write_text(ATTEND)
    archive = tmp_path / "program.pyz"
    zipapp.create_archive(source, archive)
    what = f"Python cannot load compiled modules from a zip archive, here {archive}"
    result = run_python("-S", archive, PYTHONPATH=str(Path(np.__file__).parent.parent))
    assert result.stdout.split()[:2] == ["numpy", "None"]
    assert result.stderr.count("RuntimeWarning") == 1
    assert what in result.stderr
    assert "compiler" not in result.stderr
    result = run_python(
        "-S", archive, NUMATTN_BACKEND="native", PYTHONPATH=str(Path(np.__file__).parent.parent)
    )
    assert (
        f"ImportError: NUMATTN_BACKEND=native, but the compiled kernels are missing ({what}): keep"
        in result.stderr
    )


@pytest.mark.parametrize("options", [["-S", "-I"], ["-OO"]])
def test_options_of_the_interpreter(options):
    """Without site-packages, the user's variables and the current folder; without docstrings."""
    code = f"import sys; sys.path[:] = {sys.path}\n{ATTEND}"
    result = run_python(*options, "-c", code, NUMATTN_BACKEND=_runtime.backend)
    assert result.stderr == ""
    assert result.stdout.split()[0] == _runtime.backend


def test_numpy_backend_by_choice_is_quiet():
    result = run_python(WITHOUT_EXTENSION + ATTEND, NUMATTN_BACKEND="numpy", NUMATTN_ISA="avx2")
    assert result.stdout.split()[:2] == ["numpy", "None"]
    assert result.stderr == ""


def fake_proc(folder, cgroup, mounts, files):
    """Write what the kernel tells of a process; return the folder that is its /proc/self."""
    proc = folder / "proc"
    proc.mkdir()
    (proc / "cgroup").write_text(cgroup)
    lines = ["22 1 0:20 / / rw - ext4 /dev/root rw"]
    for root, at, kind in mounts:
        mounted = str(folder / at).replace(" ", r"\040")
        lines.append(f"30 22 0:26 {root} {mounted} rw shared:4 - {kind}")
    (proc / "mountinfo").write_text("\n".join(lines))
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(content)
    return proc


V2 = [("/", "fs/cgroup", "cgroup2 cgroup2 rw")]
V1 = [
    ("/", "fs/memory", "cgroup cgroup rw,memory"),
    ("/", "fs/cpu", "cgroup cgroup rw,cpu,cpuacct"),
]


@pytest.mark.skipif(sys.platform == "win32", reason="paths that Windows does not have")
@pytest.mark.parametrize(
    ("cgroup", "mounts", "files", "expected"),
    [
        # a container with a namespace of cgroups
        ("0::/\n", V2, {"fs/cgroup/cpu.max": "200000 100000\n"}, 2),
        ("0::/\n", V2, {"fs/cgroup/cpu.max": "150000 100000\n"}, 2),
        ("0::/\n", V2, {"fs/cgroup/cpu.max": "20000 100000\n"}, 1),
        ("0::/\n", V2, {"fs/cgroup/cpu.max": "max 100000\n"}, None),
        ("0::/\n", V2, {}, None),
        ("0::/\n", [("/", "a b", "cgroup2 none rw")], {"a b/cpu.max": "300000 100000\n"}, 3),
        # a slice of systemd: the smallest quota of the ancestors
        (
            "0::/user.slice/job:1\n",
            V2,
            {
                "fs/cgroup/user.slice/job:1/cpu.max": "max 100000\n",
                "fs/cgroup/user.slice/cpu.max": "500000 100000\n",
            },
            5,
        ),
        (
            "0::/user.slice/job\n",
            V2,
            {
                "fs/cgroup/user.slice/job/cpu.max": "30000 10000\n",
                "fs/cgroup/user.slice/cpu.max": "500000 100000\n",
                "fs/cgroup/other/cpu.max": "100000 100000\n",
            },
            3,
        ),
        # a container without one, which sees its own folder alone
        (
            "0::/docker/1f\n",
            [("/docker/1f", "fs/cgroup", "cgroup2 cgroup2 rw")],
            {"fs/cgroup/cpu.max": "400000 100000\n"},
            4,
        ),
        (
            "0::/docker/1f/job\n",
            [("/docker/1f", "fs/cgroup", "cgroup2 cgroup2 rw")],
            {"fs/cgroup/job/cpu.max": "200000 100000\n"},
            2,
        ),
        # version 1, with and without a folder that the process sees
        (
            "4:memory:/job\n3:cpu,cpuacct:/job\n0::/\n",
            V1,
            {"fs/cpu/job/cpu.cfs_quota_us": "250000\n", "fs/cpu/job/cpu.cfs_period_us": "100000\n"},
            3,
        ),
        (
            "3:cpu,cpuacct:/docker/1f\n",
            V1,
            {"fs/cpu/cpu.cfs_quota_us": "100000\n", "fs/cpu/cpu.cfs_period_us": "50000\n"},
            2,
        ),
        (
            "3:cpu,cpuacct:/\n",
            V1,
            {"fs/cpu/cpu.cfs_quota_us": "-1\n", "fs/cpu/cpu.cfs_period_us": "100000\n"},
            None,
        ),
        # both at once
        (
            "3:cpu:/\n0::/job\n",
            [*V2, *V1],
            {
                "fs/cgroup/job/cpu.max": "700000 100000\n",
                "fs/cpu/cpu.cfs_quota_us": "600000\n",
                "fs/cpu/cpu.cfs_period_us": "100000\n",
            },
            6,
        ),
        # what nobody documents
        ("0::/\n", V2, {"fs/cgroup/cpu.max": "many\n"}, None),
        ("nonsense\n", V2, {"fs/cgroup/cpu.max": "200000 100000\n"}, None),
    ],
)
def test_cpu_quota(tmp_path, cgroup, mounts, files, expected):
    assert _cpus.cgroup_quota(fake_proc(tmp_path, cgroup, mounts, files)) == expected


def test_cpu_quota_without_a_kernel_that_tells(tmp_path):
    assert _cpus.cgroup_quota(tmp_path) is None


class FakeKernel32:
    """What Windows tells of a process: the CPUs that it may use and its group's, its job's cap."""

    def __init__(self, own=0, group=0, flags=None, rate=0):
        self.masks = own, group
        self.cap = None if flags is None else struct.pack("<II", flags, rate)

    def GetProcessAffinityMask(self, process, *pointers):
        for pointer, mask in zip(pointers, self.masks, strict=True):
            pointer._obj.value = mask
        return self.masks[1] != 0

    def QueryInformationJobObject(self, job, kind, pointer, size, length):
        assert (job, kind, size, length) == (None, 15, 8, None)
        if self.cap is None:
            return 0
        ctypes.memmove(pointer, self.cap, size)
        return 1


@pytest.mark.parametrize(
    ("own", "group", "expected"),
    [
        (0b1010, 0b1111, 2),
        (0b1111, 0b1111, 72),  # a machine of two groups, and no limit
        (0, 0b1111, 72),
        (0, 0, 72),
        (1 << 63, (1 << 64) - 1, 1),
    ],
)
def test_affinity_on_windows(own, group, expected):
    assert _cpus_windows.affinity(FakeKernel32(own, group), 72) == expected


@pytest.mark.parametrize(
    ("flags", "rate", "expected"),
    [
        (None, 0, None),
        (0, 5000, None),
        (0x5, 5000, 4),
        (0x5, 1250, 1),
        (0x5, 1251, 2),
        (0x5, 1, 1),
        (0x11, 2500 << 16 | 100, 2),
        (0x3, 5, None),  # a weight
    ],
)
def test_cpu_quota_on_windows(flags, rate, expected):
    assert _cpus_windows.quota(FakeKernel32(flags=flags, rate=rate), 8) == expected


@pytest.mark.parametrize(
    ("affinity", "quota", "environment", "expected"),
    [
        (8, None, {}, (8, "the CPUs that this process may use")),
        (8, 3, {}, (3, f"the CPU quota of its {_cpus._WHOSE_QUOTA}")),
        (2, 3, {}, (2, "the CPUs that this process may use")),
        (8, 3, {"LOKY_MAX_CPU_COUNT": "2"}, (2, "LOKY_MAX_CPU_COUNT")),
        (8, 3, {"LOKY_MAX_CPU_COUNT": "4"}, (3, f"the CPU quota of its {_cpus._WHOSE_QUOTA}")),
        (8, None, {"OMP_NUM_THREADS": "4"}, (4, "OMP_NUM_THREADS")),
        (8, None, {"OMP_NUM_THREADS": " 04 , 2"}, (4, "OMP_NUM_THREADS")),
        (8, None, {"LOKY_MAX_CPU_COUNT": "5", "OMP_NUM_THREADS": "6"}, (5, "LOKY_MAX_CPU_COUNT")),
        (8, None, {"OMP_NUM_THREADS": "16"}, (8, "the CPUs that this process may use")),
        (8, None, {"OMP_NUM_THREADS": "0"}, (8, "the CPUs that this process may use")),
        (8, None, {"OMP_NUM_THREADS": "-2"}, (8, "the CPUs that this process may use")),
        (8, None, {"OMP_NUM_THREADS": "many"}, (8, "the CPUs that this process may use")),
        (8, None, {"OMP_NUM_THREADS": ""}, (8, "the CPUs that this process may use")),
    ],
)
def test_what_limits_the_number_of_threads(monkeypatch, affinity, quota, environment, expected):
    monkeypatch.setattr(_cpus, "_affinity", lambda: affinity)
    monkeypatch.setattr(_cpus, "quota", lambda: quota)
    for variable in _cpus._SHARES:
        monkeypatch.delenv(variable, raising=False)
    for variable, value in environment.items():
        monkeypatch.setenv(variable, value)
    assert _cpus.fair_share() == expected
    monkeypatch.setenv("NUMATTN_NUM_THREADS", "11")
    assert _runtime._initial_num_threads() == (11, "NUMATTN_NUM_THREADS")
    monkeypatch.setenv("NUMATTN_NUM_THREADS", "")
    assert _runtime._initial_num_threads() == expected


def test_workers_of_a_pool_share_the_cpus():
    """What joblib sets in each of its workers: all CPUs over the number of workers."""
    cpus = na.runtime_info()["cpus"]
    share = str(max(1, cpus // 2))
    code = "import numattn as na\ni = na.runtime_info()\nprint(i['num_threads'], i['cpus'])"
    worker = run_python(code, OMP_NUM_THREADS=share, OPENBLAS_NUM_THREADS=share)
    assert worker.stdout.split() == [share, str(cpus)], worker.stderr


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
