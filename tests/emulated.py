"""Run the package on an emulated CPU: python tests/emulated.py LEVEL, the best level of the CPU.

qemu-x86_64 -cpu Nehalem .venv/bin/python tests/emulated.py generic
"""

import sys

import numattn as na
from numattn import _runtime, _self_check

best = sys.argv[1]
levels = list(_runtime.native.isa_names())
number = levels.index(best) + 1
info = na.runtime_info()
assert info["backend"] == "native", info
assert info["isa"]["chosen"] == best, info
assert info["isa"]["available"] == levels[:number], info
for level in levels[number:]:
    try:
        _runtime.native.set_isa(level)
    except ValueError as error:
        assert "does not have the instructions" in str(error), error  # noqa: PT017
    else:
        sys.exit(f"{level} could be pinned")
na.show_runtime()
dtypes = [_self_check._dtype(x) for x in ("float32", "float16", "bfloat16")]
shares = [max(_self_check._shares(best, x)) for x in dtypes]
print("errors, as shares of what is allowed:", *(f"{x:.2f}" for x in shares))
sys.exit(0 if max(shares) <= 1 else "WRONG RESULTS")
