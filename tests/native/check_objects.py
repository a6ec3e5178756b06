"""The objects of the kernels leave nothing to others, and common objects run on every CPU.

    check_objects.py LIST_OF_LEVELS OBJECT... LIBRARY

A kernel's object may have no weak symbol (an inline function or a template compiled there could be
the copy that the linker keeps for everybody) and nothing that runs before dispatch. The objects
that every CPU runs, the library's own and the generic kernels, may have no instruction beyond the
baseline of x86-64, and the AVX2 kernels none of AVX-512.
"""

import platform
import re
import subprocess
import sys
from pathlib import Path

# What came after SSE2. (tzcnt is bsf to CPUs that don't know it; VEX and EVEX encodings begin with
# a v in the disassembly; of the baseline only verr and verw do, which no compiler makes.)
LATER = re.compile(
    r"v\w+|andn|bextr|blsi|blsmsk|blsr|bzhi|lzcnt|movbe|mulx|pdep|pext|popcnt|rorx|sarx|shlx|shrx|"
    # SSE3, SSSE3
    r"addsubp[sd]|hf?(add|sub)p[sd]|lddqu|mov(d|sh|sl)dup|pabs[bwd]|palignr|ph(add|sub)\w+|"
    r"pmaddubsw|pmulhrsw|pshufb|psign[bwd]|"
    # SSE4
    r"p?blend\w+|dpp[sd]|extractps|insertps|mpsadbw|movntdqa|packusdw|pcmp(eq|gt)q|pcmp[ei]str[im]|"
    r"pextr[bdq]|phminposuw|pinsr[bdq]|p(max|min)(sb|sd|ud|uw)|pmov[sz]x\w+|pmuldq|pmulld|ptest|"
    r"round[ps][sd]|crc32\w*|"
    # others
    r"cmpxchg16b|aes\w+|pclmul\w+|sha(1|256)\w+"
)
# Of AVX-512 are masks, registers from 16 on and the widest ones, as objdump shows them.
AVX512 = re.compile(r"%zmm|%[xy]mm(1[6-9]|2\d|3[01])\b|%k[0-7]\b")
# Beyond the AVX-512 of Skylake-SP: products of bfloat16, of 8 and of 16 bits.
LATER_AVX512 = re.compile(r"vdpbf16ps|vcvtne\w*bf16|vpdp\w+")
# For each level, what tells an instruction that its CPUs may lack.
BEYOND = {
    "generic": lambda instruction: LATER.fullmatch(mnemonic(instruction)),
    "avx2": AVX512.search,
    "avx512": lambda instruction: LATER_AVX512.fullmatch(mnemonic(instruction)),
    "avx512_bf16": lambda instruction: None,  # nothing that compilers make without being asked to
}

# Windows' objects, of the format COFF, have symbols for these.
COFF_SECTIONS = (".bss", ".data", ".pdata")


def output(*command):
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def level_of(name):
    return name.split(".")[0]


def problems_of_kernels(path):
    words = [line.split() for line in output("nm", path).splitlines()]
    shared = sorted(
        (w[-2], w[-1]) for w in words if w[-2] not in "trU" and w[-1] not in COFF_SECTIONS
    )
    level = level_of(path.name)
    tables = (f"kernels_{level}", f"probes_{level}")
    kind = "R" if path.suffix == ".obj" else "D"  # ELF: written to as the library is loaded
    if shared != sorted((kind, f"_ZN7numattn{len(x)}{x}E") for x in tables):
        yield f"symbols other than its two tables: {shared}"
    sections = output("objdump", "-h", path)
    for section in (".init_array", ".ctors", ".preinit_array", ".CRT$X"):
        if section in sections:
            yield f"a section {section}, which runs before dispatch"


def mnemonic(instruction):
    return re.sub(r"^\{\w+\}\s+", "", instruction).split()[0]


def is_beyond(level, instruction):
    """Whether an instruction, as objdump writes it, is one that CPUs of a level may lack."""
    return BEYOND[level](instruction) is not None


def problems_of_instructions(path, level):
    if platform.machine() not in ("x86_64", "AMD64"):
        return
    function = ""
    for line in output("objdump", "-d", "--no-show-raw-insn", path).splitlines():
        if line.endswith(">:"):
            function = line[line.index("<") + 1 : -2]
        found = re.match(r"\s+[0-9a-f]+:\s+(\S.*)", line)
        if found and is_beyond(level, found[1]):
            yield f"'{found[1].strip()}', which not every CPU of {level} has, in {function}"
            return


LATER_EXAMPLES = """
vmovups (%rax),%xmm0
{vex} vpdpbusd %xmm0,%xmm1,%xmm2
pmulld %xmm0,%xmm1
roundps $0x1,%xmm0,%xmm1
pshufb %xmm0,%xmm1
crc32l %eax,%edx
popcnt %rax,%rdx
cmpxchg16b (%rdi)
pmovzxbw %xmm0,%xmm1
"""
BASELINE_EXAMPLES = """
movups (%rax),%xmm0
pmuludq %xmm0,%xmm1
pshufd $0x1,%xmm0,%xmm1
pinsrw $0x1,%eax,%xmm0
pmaxsw %xmm0,%xmm1
tzcnt %rax,%rdx
cvttps2dq %xmm0,%xmm1
ret
"""


def check_that_instructions_are_told_apart():
    assert all(is_beyond("generic", x) for x in LATER_EXAMPLES.strip().splitlines())
    assert not any(is_beyond("generic", x) for x in BASELINE_EXAMPLES.strip().splitlines())
    assert is_beyond("avx2", "vaddps %ymm17,%ymm1,%ymm0")
    assert is_beyond("avx2", "vaddps %ymm1,%ymm1,%ymm0{%k1}")
    assert not is_beyond("avx2", "vaddps %ymm15,%ymm1,%ymm0")
    assert is_beyond("avx512", "vdpbf16ps %zmm1,%zmm2,%zmm0")
    assert not is_beyond("avx512", "vaddps %zmm1,%zmm2,%zmm0")


def main():
    list_of_levels, *objects, library = map(Path, sys.argv[1:])
    if not objects or library.suffix != ".a":
        sys.exit("usage: check_objects.py LIST_OF_LEVELS OBJECT... LIBRARY")
    lines = list_of_levels.read_text().splitlines()
    levels = [x.split()[0] for x in lines if x and not x.startswith("#")]
    if set(levels) != set(BEYOND):
        sys.exit(f"the list has the levels {levels}, this program knows {list(BEYOND)}")
    check_that_instructions_are_told_apart()
    problems = [f"{path.name}: {x}" for path in objects for x in problems_of_kernels(path)]
    for path in objects:
        level = level_of(path.name)
        problems += [f"{path.name}: {x}" for x in problems_of_instructions(path, level)]
    members = [x for x in output("ar", "t", library).split() if level_of(x) not in levels[1:]]
    for member in members:
        alone = library.parent / f"alone-{member}"
        content = subprocess.run(["ar", "p", library, member], capture_output=True, check=True)
        alone.write_bytes(content.stdout)
        problems += [f"{member}: {x}" for x in problems_of_instructions(alone, "generic")]
        alone.unlink()
    print(f"kernels: {', '.join(sorted(path.name for path in objects))}")
    print(f"baseline: {', '.join(sorted(members))}")
    if not any(level_of(x) == "generic" for x in members) or len(members) < 6:
        problems.append(f"{library.name}: common objects are missing")
    print("\n".join(problems) if problems else "fine")
    return bool(problems)


if __name__ == "__main__":
    sys.exit(main())
