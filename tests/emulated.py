"""A CPU without AVX2: python tests/emulated.py, under an emulator of one (`make emulate`).

qemu-x86_64 -cpu Nehalem .venv/bin/python tests/emulated.py
"""

import sys

import numattn as na
import numpy as np
from numattn import _runtime, _self_check

info = na.runtime_info()
assert info["backend"] == "native", info
assert info["isa"]["chosen"] == "generic", info
assert info["isa"]["available"] == ["generic"], info
for level in list(_runtime.ISA_LEVELS)[1:]:
    try:
        _runtime.native.set_isa(level)
    except ValueError as error:
        assert "does not have the instructions" in str(error), error  # noqa: PT017
    else:
        sys.exit(f"{level} could be pinned")
na.show_runtime()
shares = [max(_self_check._shares("generic", np.dtype(x))) for x in ("float32", "float16")]
print("errors, as shares of what is allowed:", *(f"{x:.2f}" for x in shares))
sys.exit(0 if max(shares) <= 1 else "WRONG RESULTS")
