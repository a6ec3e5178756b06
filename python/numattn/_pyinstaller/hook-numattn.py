"""The data files of the package, and the metadata with its version."""

import sys

from PyInstaller.utils.hooks import collect_data_files, copy_metadata

datas = [*collect_data_files("numattn", includes=["*.txt", "*.html"]), *copy_metadata("numattn")]
# Imports of the compiled _core, which PyInstaller cannot read.
hiddenimports = ["os", "threading", "numpy", "numattn._arguments", "numattn._checks"]
# _main_interpreter.py imports it by its name.
hiddenimports.append("_interpreters" if sys.version_info >= (3, 13) else "_xxsubinterpreters")
