"""Run the package for 64-bit Arm in an Arm Python under qemu-user: `make emulate-arm-python`.

apt downloads Debian's Python and its dependencies to a temporary folder, which is kept. It uses its
own state there. pip installs the Arm wheels of NumPy and of the tests' dependencies, and
cross-compiles the package. Then the program checks, on each CPU, that the best level is chosen and
computes correctly. On the last CPU, the tests marked `smoke` run too.

The package is compiled with the headers of the Python that runs this program. The stable ABI and
NumPy's ABI are the same on all 64-bit Linux systems.
"""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from wheels import PROJECT, SMOKE, run

# Not in the project: it contains circular links, which `make wheel` would follow.
FOLDER = Path(tempfile.gettempdir()) / f"numattn-arm64-{os.getuid()}"
ROOT = FOLDER / "root"
PACKAGES = FOLDER / "packages"
PYTHON = ROOT / "usr/bin/python"
# The best level of each CPU. With SVE, an emulated NumPy takes five times as long.
CPUS = {"cortex-a72": "neon", "max,sve=off,sme=off": "neon_bf16"}


def find(program, package):
    return shutil.which(program) or sys.exit(
        f"{program} is not on the path; it is in Debian's package {package}: install it"
    )


def make_root(emulator):
    """Extract Debian's Python, and return the first two numbers of its version."""
    apt = FOLDER / "apt"
    for folder in ("var/lib/apt", "var/cache/apt"):
        (apt / folder).mkdir(parents=True, exist_ok=True)
    installed = apt / "nothing-is-installed"
    installed.touch()
    options = [
        "-qq", "-o", f"Dir={apt}", "-o", "Dir::Etc=/etc/apt",
        "-o", f"Dir::State::status={installed}",
        "-o", "APT::Architecture=arm64", "-o", "APT::Architectures=arm64",
    ]  # fmt: skip
    run(find("apt-get", "apt"), *options, "update")
    run(
        "apt-get", *options, "--no-install-recommends", "--download-only", "install",
        "python3-minimal", "libpython3-stdlib", "libstdc++6",
    )  # fmt: skip
    for package in sorted(apt.glob("var/cache/apt/archives/*.deb")):
        subprocess.run(["dpkg-deb", "-x", package, ROOT], check=True)
    name = os.readlink(ROOT / "usr/bin/python3")
    # -0: Python takes this file for its own executable, and starts it to start itself.
    PYTHON.write_text(
        f'#!/bin/sh\nexec {emulator} -L "{ROOT}" -0 "$0" "{ROOT}/usr/bin/{name}" "$@"\n'
    )
    PYTHON.chmod(0o755)
    return name.removeprefix("python")


def install(version, definitions):
    """Install what the tests need, and the package."""
    into = ["-m", "pip", "install", "--quiet", "--target", PACKAGES, "--upgrade"]
    platforms = [f"--platform=manylinux_2_{x}_aarch64" for x in (28, 27, 17)]
    run(
        sys.executable, *into, *platforms, "--python-version", version, "--implementation", "cp",
        "--only-binary=:all:", "numpy", "--group", f"{PROJECT / 'pyproject.toml'}:smoke",
    )  # fmt: skip
    # pip takes the wheel for one of this machine and installs it. The compiler, and the Python that
    # CMake asks for its headers, run without the emulator.
    toolchain = PROJECT / "tests/native/toolchains/aarch64.cmake"
    arguments = f"--toolchain {toolchain} -DCMAKE_CROSSCOMPILING_EMULATOR= {definitions}"
    run(
        sys.executable, *into, "--no-deps", "-C", f"build-dir={FOLDER / 'build'}", PROJECT,
        env=os.environ | {"CMAKE_ARGS": arguments},
    )  # fmt: skip


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("definitions", nargs="*", help="for CMake: -- -DNUMATTN_OPTIMIZE=-O1")
    definitions = " ".join(parser.parse_args().definitions)
    find("aarch64-linux-gnu-g++", "g++-aarch64-linux-gnu")
    emulator = find("qemu-aarch64", "qemu-user")
    shutil.rmtree(FOLDER, ignore_errors=True)
    install(make_root(emulator), definitions)
    environment = os.environ | {"PYTHONPATH": str(PACKAGES), "NUMATTN_BACKEND": "native"}
    for cpu, level in CPUS.items():
        environment["QEMU_CPU"] = cpu
        run(PYTHON, PROJECT / "tests/emulated.py", level, env=environment)
    # qemu-user crashes if a process with several threads forks and the child starts a thread.
    run(
        PYTHON, "-m", "pytest", "-q", "-m", "smoke", "-p", "no:cacheprovider",
        "--rootdir", PROJECT, "-c", PROJECT / "pyproject.toml",
        "-k", "not test_fork", *SMOKE,
        cwd=FOLDER, env=environment,
    )  # fmt: skip


if __name__ == "__main__":
    main()
