"""The wheel and the source distribution, installed and run where nothing else is.

A wheel for the stable ABI is built from the source distribution by the oldest Python, accepted by
auditwheel without a library in it, and for every Python of VERSIONS installed into a clean
environment with the oldest and with the newest NumPy, where the tests marked `smoke` run.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

PROJECT = Path(__file__).parent.parent
# The oldest NumPy that has wheels for each Python.
VERSIONS = {"3.11": "2.0.0", "3.12": "2.0.0", "3.13": "2.1.0"}
LARGEST = 3 * 2**20
# The files that have such tests, and need no more than the dependency group of that name.
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
    pyenv = sorted(Path.home().glob(f".pyenv/versions/{version}.*/bin/python"))
    return str(pyenv[-1]) if pyenv else None


def build_sdist(to):
    run(sys.executable, "-m", "build", "--sdist", "--outdir", to, PROJECT)
    (sdist,) = to.glob("*.tar.gz")
    return sdist


def build_wheel(python, sdist, to):
    """Return a wheel with a manylinux tag (with the plain one where there is no auditwheel)."""
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
    assert "numattn/_core.abi3.so" in names, "no kernels for the stable ABI in it"
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
    # Outside of the project, whose own package must not be found.
    run(
        environment / "bin/python", "-m", "pytest", "-q", "-m", "smoke", "-p", "no:cacheprovider",
        "--rootdir", PROJECT, "-c", PROJECT / "pyproject.toml", *SMOKE,
        cwd=folder, env={"NUMATTN_BACKEND": "native", "PATH": "/usr/bin:/bin"},
    )  # fmt: skip


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--keep", type=Path, help="a folder for the wheel and the sdist")
    parser.add_argument("--only-build", action="store_true", help="no tests")
    parser.add_argument(
        "--extremes", action="store_true",
        help="of those that there are only the oldest Python with the oldest NumPy, and the newest",
    )  # fmt: skip
    parser.add_argument("versions", nargs="*", help=f"default: {' '.join(VERSIONS)}")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        sdist = build_sdist(folder)
        wheel = build_wheel(find_python(next(iter(VERSIONS))) or sys.executable, sdist, folder)
        if arguments.keep:
            arguments.keep.mkdir(parents=True, exist_ok=True)
            for path in (sdist, wheel):
                shutil.copy(path, arguments.keep)
        if arguments.only_build:
            return False
        versions = arguments.versions or VERSIONS
        pythons = {version: find_python(version) for version in versions}
        missing = [version for version in versions if not pythons[version]]
        environments = [
            (version, numpy)
            for version in versions
            if pythons[version]
            for numpy in (VERSIONS[version], None)
        ]
        if arguments.extremes:
            environments = environments[:1] + environments[-1:]
        for version, numpy in environments:
            test_wheel(pythons[version], wheel, numpy, folder / version)
    if missing:
        print("NOT TESTED, for want of these Pythons:", *missing)
    print(f"{wheel.name} is fine in {len(environments)} environments")
    # A machine may lack a version, but not all of them, nor one that was asked for.
    return bool(missing and (arguments.versions or not environments))


if __name__ == "__main__":
    sys.exit(main())
