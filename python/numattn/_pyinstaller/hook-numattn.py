"""The data files of the package, and the metadata that its version is in."""

from PyInstaller.utils.hooks import collect_data_files, copy_metadata

datas = [*collect_data_files("numattn", includes=["*.txt", "*.html"]), *copy_metadata("numattn")]
# What _core imports, which PyInstaller does not read.
hiddenimports = ["os", "threading", "numpy", "numattn._arguments", "numattn._checks"]
