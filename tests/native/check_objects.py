"""The objects of the kernels leave nothing to others, and common objects run on every CPU.

    check_objects.py OBJECT... LIBRARY

A kernel's object may have no weak symbol (an inline function or a template compiled there could be
the copy that the linker keeps for everybody) and nothing that runs before dispatch. The objects
that every CPU runs, the library's own and the generic kernels, may have no instruction beyond the
baseline of x86-64: VEX and EVEX encodings begin with a v in the disassembly.
"""

import platform
import re
import subprocess
import sys
from pathlib import Path

LEVELS = ("avx2", "avx512", "avx512_bf16")
# Of those on general registers, what came later. (tzcnt is bsf to CPUs that don't know it.)
GENERAL = {"andn", "bextr", "blsi", "blsmsk", "blsr", "bzhi", "lzcnt", "movbe", "mulx", "pdep",
           "pext", "popcnt", "rorx", "sarx", "shlx", "shrx"}  # fmt: skip


def output(*command):
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def level_of(name):
    return name.split(".")[0]


def problems_of_kernels(path):
    words = [line.split() for line in output("nm", path).splitlines()]
    shared = [(w[-2], w[-1]) for w in words if w[-2] not in "trU"]
    if [kind for kind, _ in shared] != ["D"] or f"kernels_{level_of(path.name)}" not in shared[0][
        1
    ]:
        yield f"symbols other than its table: {shared}"
    sections = output("objdump", "-h", path)
    for section in (".init_array", ".ctors", ".preinit_array"):
        if section in sections:
            yield f"a section {section}, which runs before dispatch"


def problems_of_the_baseline(path):
    if platform.machine() not in ("x86_64", "AMD64"):
        return
    function = ""
    for line in output("objdump", "-d", "--no-show-raw-insn", path).splitlines():
        if line.endswith(">:"):
            function = line[line.index("<") + 1 : -2]
        found = re.match(r"\s+[0-9a-f]+:\s+(?:\{\w+\}\s+)?(\w+)", line)
        if found and (re.match(r"v(?!err|erw|m)", found[1]) or found[1] in GENERAL):
            yield f"{found[1]}, which not every CPU has, in {function}"
            return


def main():
    *objects, library = map(Path, sys.argv[1:])
    if not objects or library.suffix != ".a":
        sys.exit("usage: check_objects.py OBJECT... LIBRARY")
    problems = [f"{path.name}: {x}" for path in objects for x in problems_of_kernels(path)]
    members = [x for x in output("ar", "t", library).split() if level_of(x) not in LEVELS]
    for member in members:
        alone = library.parent / f"alone-{member}"
        content = subprocess.run(["ar", "p", library, member], capture_output=True, check=True)
        alone.write_bytes(content.stdout)
        problems += [f"{member}: {x}" for x in problems_of_the_baseline(alone)]
        alone.unlink()
    print(f"kernels: {', '.join(sorted(path.name for path in objects))}")
    print(f"baseline: {', '.join(sorted(members))}")
    if not any(level_of(x) == "generic" for x in members) or len(members) < 6:
        problems.append(f"{library.name}: common objects are missing")
    print("\n".join(problems) if problems else "fine")
    return bool(problems)


if __name__ == "__main__":
    sys.exit(main())
