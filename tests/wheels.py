"""Install the wheels and the source distribution in clean environments, and run them.

The oldest Python builds a wheel for the stable ABI from the source distribution. abi3audit must
accept it, and auditwheel must find no library to add. Each free-threaded Python builds its own.
Every Python that pyproject.toml lists for cibuildwheel installs its wheel into a clean environment
with the oldest and with the newest NumPy, where the tests marked `smoke` run.
"""

from __future__ import annotations

import argparse
import re
import shutil
import subprocess
import sys
import tempfile
import tomllib
import zipfile
from pathlib import Path

from packaging.requirements import Requirement
from packaging.version import Version

PROJECT = Path(__file__).parent.parent
PYPROJECT = tomllib.loads((PROJECT / "pyproject.toml").read_text())
# "3.11", ..., "3.14t"
VERSIONS = [
    re.sub(r"cp3(\d+t?)-\*", r"3.\1", build) for build in PYPROJECT["tool"]["cibuildwheel"]["build"]
]
LARGEST = 3 * 2**20
# The files with tests marked `smoke`; they need only the dependency group `smoke`.
SMOKE = [
    PROJECT / "tests" / f"test_{name}.py"
    for name in ("command_line", "concurrency", "errors", "options")
]


def run(*command, **options):
    print(
        "+", *(Path(str(x)).name if Path(str(x)).is_absolute() else x for x in command), flush=True
    )
    subprocess.run([str(x) for x in command], check=True, **options)


def find_python(version):
    """Return an interpreter on the path, or one of pyenv's."""
    found = shutil.which(f"python{version}")
    if found and subprocess.run([found, "--version"], capture_output=True).returncode == 0:
        return found
    pyenv = Path.home() / ".pyenv/versions"
    number = version.removesuffix("t")
    found = [
        path
        for path in sorted(pyenv.glob(f"{number}.*/bin/python"), key=release)
        if path.parent.parent.name.endswith("t") == is_free_threaded(version)
    ]
    return str(found[-1]) if found else None


def release(python):
    """Return the release of one of pyenv's interpreters, to compare it with others."""
    return [int(x) for x in re.findall(r"\d+", python.parent.parent.name)]


def is_free_threaded(version):
    return version.endswith("t")


def oldest_numpy(version):
    """Return the oldest NumPy that the package takes on this Python."""
    requirements = map(Requirement, PYPROJECT["project"]["dependencies"])
    bounds = [
        specifier.version
        for requirement in requirements
        if requirement.name == "numpy"
        and (
            requirement.marker is None
            or requirement.marker.evaluate({"python_version": version.removesuffix("t")})
        )
        for specifier in requirement.specifier
    ]
    return max(bounds, key=Version)


def build_sdist(to):
    run(sys.executable, "-m", "build", "--sdist", "--outdir", to, PROJECT)
    (sdist,) = to.glob("*.tar.gz")
    return sdist


def build_wheel(version, python, sdist, to):
    """Return a wheel: with a manylinux tag on Linux, with the plain tag elsewhere."""
    to.mkdir()
    raw = to / "raw"
    environment = to / "build-environment"
    run(python, "-m", "venv", environment)
    run(environment / "bin/pip", "install", "--quiet", "--upgrade", "pip")
    run(environment / "bin/pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", raw, sdist)
    (wheel,) = raw.glob("*.whl")
    if sys.platform == "linux":
        run(sys.executable, "-m", "auditwheel", "repair", "--only-plat", "--wheel-dir", to, wheel)
        (wheel,) = to.glob("*.whl")
        assert "manylinux" in wheel.name, wheel.name
    names = zipfile.ZipFile(wheel).namelist()
    kernels = [name for name in names if re.match(r"numattn/_core\..*(so|pyd)$", name)]
    assert len(kernels) == 1, f"compiled kernels in {wheel.name}: {kernels}"
    if not is_free_threaded(version):
        assert "-abi3-" in wheel.name, f"{wheel.name} is not for the stable ABI"
        run(sys.executable, "-m", "abi3audit", "--strict", wheel)
    assert not any(".libs/" in name for name in names), "a library is bundled"
    assert wheel.stat().st_size < LARGEST, f"{wheel.name} has {wheel.stat().st_size} bytes"
    print(f"{wheel.name}: {wheel.stat().st_size / 2**20:.2f} MiB", flush=True)
    return wheel


def test_wheel(python, wheel, numpy, folder):
    folder.mkdir(exist_ok=True)
    environment = folder / f"numpy-{numpy or 'newest'}"
    run(python, "-m", "venv", environment)
    pip = environment / "bin/pip"
    run(pip, "install", "--quiet", "--upgrade", "pip")
    run(pip, "install", "--quiet", wheel, f"numpy=={numpy}" if numpy else "numpy",
        "--group", f"{PROJECT / 'pyproject.toml'}:smoke")  # fmt: skip
    # Run outside the project, so that its own package is not found.
    run(
        environment / "bin/python", "-m", "pytest", "-q", "-m", "smoke", "-p", "no:cacheprovider",
        "--rootdir", PROJECT, "-c", PROJECT / "pyproject.toml", *SMOKE,
        cwd=folder, env={"NUMATTN_BACKEND": "native", "PATH": "/usr/bin:/bin"},
    )  # fmt: skip


def build_wheels(pythons, sdist, folder):
    """Return the wheel that each version of Python installs."""
    wheels = {
        version: build_wheel(version, python, sdist, folder / f"for-{version}")
        for version, python in pythons.items()
        if python and is_free_threaded(version)
    }
    with_lock = [version for version in pythons if not is_free_threaded(version)]
    if with_lock:
        python = next((pythons[version] for version in with_lock if pythons[version]), None)
        stable = build_wheel(with_lock[0], python or sys.executable, sdist, folder / "stable")
        wheels |= dict.fromkeys(with_lock, stable)
    return wheels


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--keep", type=Path, help="a folder for the wheels and the sdist")
    parser.add_argument("--only-build", action="store_true", help="no tests")
    parser.add_argument(
        "--extremes", action="store_true",
        help="the stable ABI alone, by the oldest Python with the oldest NumPy, and by the newest",
    )  # fmt: skip
    parser.add_argument("versions", nargs="*", help=f"default: {' '.join(VERSIONS)}")
    arguments = parser.parse_args()
    unknown = set(arguments.versions) - set(VERSIONS)
    if unknown:
        parser.error(f"{', '.join(sorted(unknown))}: expected some of {', '.join(VERSIONS)}")
    wanted = arguments.versions or VERSIONS
    if arguments.extremes:
        wanted = [version for version in wanted if not is_free_threaded(version)]
    pythons = {version: find_python(version) for version in wanted}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        sdist = build_sdist(folder)
        wheels = build_wheels(pythons, sdist, folder)
        if arguments.keep:
            arguments.keep.mkdir(parents=True, exist_ok=True)
            for path in (sdist, *set(wheels.values())):
                shutil.copy(path, arguments.keep)
        if arguments.only_build:
            return False
        missing = [version for version in wanted if not pythons[version]]
        environments = [
            (version, numpy)
            for version in wanted
            if pythons[version]
            for numpy in (oldest_numpy(version), None)
        ]
        if arguments.extremes:
            environments = environments[:1] + environments[-1:]
        for version, numpy in environments:
            test_wheel(pythons[version], wheels[version], numpy, folder / version)
    if missing:
        print("NOT TESTED, for want of these Pythons:", *missing)
    names = sorted({wheels[version].name for version, _ in environments})
    print(f"{', '.join(names)}: fine in {len(environments)} environments")
    # A machine may lack a version, but not all of them, nor one that was asked for.
    return bool(missing and (arguments.versions or not environments))


if __name__ == "__main__":
    sys.exit(main())
