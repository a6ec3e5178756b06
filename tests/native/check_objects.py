"""The objects of the kernels leave nothing to others, and common objects run on every CPU.

    check_objects.py [--nm NM] [--objdump OBJDUMP] [--ar AR] ARCHITECTURE LIST_OF_LEVELS OBJECT...
                     LIBRARY

A kernel's object may have no weak symbol (an inline function or a template compiled there could be
the copy that the linker keeps for everybody) and nothing that runs before dispatch. The objects
that every CPU runs, the library's own and the generic kernels, may have no instruction beyond the
baseline of x86-64 or 64-bit Arm, the AVX2 kernels none of AVX-512, and so on.
"""

import argparse
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
# What came after Armv8.0: with Armv8.1 and 8.2, which BF16 needs,
ARM_8_2 = re.compile(
    r"bf(dot|mmla|cvt\w*|mlal\w*)|sqrdml[as]h|"
    r"(ld|st)(add|clr|eor|set|[su]max|[su]min)[alhb]*|cas\w*|swp\w*"
)
# and else: products of 8 bits, complex numbers, cryptography, loads in order. (Instructions that
# sign addresses do nothing on CPUs that don't know them.)
ARM_LATER = re.compile(
    r"(us|su|[us])dot|(us|[us])mmla|fcadd|fcmla|fml[as]l2?|fjcvtzs|crc32\w*|aes\w+|sha\d\w+|pmull2?|"
    r"eor3|bcax|rax1|xar|ldapu?r\w*|stlur\w*|ldlar\w*|stllr\w*|reta[ab]|ldra[ab]|sb|frint(32|64)[xz]|"
    r"cpy\w+|set[gmpe]\w*|sm[34]\w+"
)
# Arithmetic of float16, and SVE by its registers. Conversions of float16 are in the baseline.
ARM_FLOAT16 = re.compile(r"(f(?!cvt([ln]2?)?\s)|[su]cvtf)\w*\s.*(\bv\d+\.[48]h|\bh\d+\b)")
SVE = re.compile(r"\bz\d+\.|\bp\d+[./]")


def is_arm_later(instruction):
    is_found = ARM_LATER.fullmatch(mnemonic(instruction)) or SVE.search(instruction)
    return is_found or ARM_FLOAT16.match(instruction)


def is_arm_8_2(instruction):
    return ARM_8_2.fullmatch(mnemonic(instruction)) or is_arm_later(instruction)


# For each level, what tells an instruction that its CPUs may not have.
BEYOND = {
    "generic": lambda instruction: LATER.fullmatch(mnemonic(instruction)),
    "avx2": AVX512.search,
    "avx512": lambda instruction: LATER_AVX512.fullmatch(mnemonic(instruction)),
    "avx512_bf16": lambda instruction: None,  # nothing that compilers make without being asked to
    "neon": is_arm_8_2,
    "neon_bf16": is_arm_later,
}
ARM_GENERIC = {"generic": is_arm_8_2}

# Windows' objects, of the format COFF, have symbols for these.
COFF_SECTIONS = (".bss", ".data", ".pdata")


ARGUMENTS = argparse.ArgumentParser(description=__doc__.splitlines()[0])
for tool in ("nm", "objdump", "ar"):
    ARGUMENTS.add_argument(f"--{tool}", default=tool)
ARGUMENTS.add_argument("architecture", help="x86_64 or aarch64; of others, symbols are looked at")
ARGUMENTS.add_argument("files", nargs="+", type=Path)


def output(*command):
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def level_of(name):
    return name.split(".")[0]


def problems_of_kernels(given, path):
    words = [line.split() for line in output(given.nm, path).splitlines()]
    shared = sorted(
        (w[-2], w[-1]) for w in words if w[-2] not in "trU" and w[-1] not in COFF_SECTIONS
    )
    level = level_of(path.name)
    tables = (f"kernels_{level}", f"probes_{level}")
    kind = "R" if path.suffix == ".obj" else "D"  # ELF: written to as the library is loaded
    if shared != sorted((kind, f"_ZN7numattn{len(x)}{x}E") for x in tables):
        yield f"symbols other than its two tables: {shared}"
    sections = output(given.objdump, "-h", path)
    for section in (".init_array", ".ctors", ".preinit_array", ".CRT$X"):
        if section in sections:
            yield f"a section {section}, which runs before dispatch"


def mnemonic(instruction):
    return re.sub(r"^\{\w+\}\s+", "", instruction).split()[0]


def is_beyond(architecture, level, instruction):
    """Whether an instruction, as objdump writes it, is one that CPUs of a level may not have."""
    levels = BEYOND | (ARM_GENERIC if architecture == "aarch64" else {})
    return bool(levels[level](instruction))


def problems_of_instructions(given, path, level):
    if given.architecture not in ("x86_64", "aarch64"):
        return
    function = ""
    for line in output(given.objdump, "-d", "--no-show-raw-insn", path).splitlines():
        if line.endswith(">:"):
            function = line[line.index("<") + 1 : -2]
        found = re.match(r"\s+[0-9a-f]+:\s+(\S.*)", line)
        if found and is_beyond(given.architecture, level, found[1]):
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


ARM_LATER_EXAMPLES = """
udot v0.4s, v1.16b, v2.16b
fmla v0.8h, v1.8h, v2.8h
fmov v0.8h, #5.000000000000000000e-01
fadd h0, h1, h2
ld1w {z0.s}, p0/z, [x0]
whilelt p0.s, x0, x1
fcvtzs h0, h1
ldapr w0, [x1]
scvtf h0, w0
retaa
cpyfp [x0]!, [x1]!, x2!
frint32z v0.4s, v1.4s
"""
ARM_8_2_EXAMPLES = """
bfdot v0.4s, v1.8h, v2.2h[1]
bfcvtn v0.4h, v1.4s
ldaddal x0, x1, [x2]
casal x0, x1, [x2]
swpb w0, w1, [x2]
"""
ARM_BASELINE_EXAMPLES = """
fmla v0.4s, v1.4s, v2.s[3]
fcvtl v0.4s, v1.4h
fcvtn v0.4h, v1.4s
fcvt s0, h0
scvtf v0.4s, v1.4s
ldr h0, [x1]
ushll v0.4s, v1.4h, #0
ldaxr w0, [x1]
prfm pldl1keep, [x0]
paciasp
"""


def check_that_instructions_are_told_apart():
    def all_of(examples, level, architecture="aarch64"):
        return [is_beyond(architecture, level, x) for x in examples.strip().splitlines()]

    assert all(all_of(LATER_EXAMPLES, "generic", "x86_64"))
    assert not any(all_of(BASELINE_EXAMPLES, "generic", "x86_64"))
    assert is_beyond("x86_64", "avx2", "vaddps %ymm17,%ymm1,%ymm0")
    assert is_beyond("x86_64", "avx2", "vaddps %ymm1,%ymm1,%ymm0{%k1}")
    assert not is_beyond("x86_64", "avx2", "vaddps %ymm15,%ymm1,%ymm0")
    assert is_beyond("x86_64", "avx512", "vdpbf16ps %zmm1,%zmm2,%zmm0")
    assert not is_beyond("x86_64", "avx512", "vaddps %zmm1,%zmm2,%zmm0")
    for level in ("generic", "neon"):
        assert all(all_of(ARM_LATER_EXAMPLES + ARM_8_2_EXAMPLES.lstrip(), level))
        assert not any(all_of(ARM_BASELINE_EXAMPLES, level))
    assert all(all_of(ARM_LATER_EXAMPLES, "neon_bf16"))
    assert not any(all_of(ARM_BASELINE_EXAMPLES + ARM_8_2_EXAMPLES.lstrip(), "neon_bf16"))


def main():
    given = ARGUMENTS.parse_args()
    if len(given.files) < 3 or given.files[-1].suffix != ".a":
        ARGUMENTS.error("expected LIST_OF_LEVELS OBJECT... LIBRARY, the last one ending in .a")
    list_of_levels, *objects, library = given.files
    lines = list_of_levels.read_text().splitlines()
    levels = [x.split()[0] for x in lines if x and not x.startswith("#")]
    if set(levels) != set(BEYOND):
        sys.exit(f"the list has the levels {levels}, this program knows {list(BEYOND)}")
    check_that_instructions_are_told_apart()
    problems = [f"{path.name}: {x}" for path in objects for x in problems_of_kernels(given, path)]
    for path in objects:
        level = level_of(path.name)
        problems += [f"{path.name}: {x}" for x in problems_of_instructions(given, path, level)]
    members = [x for x in output(given.ar, "t", library).split() if level_of(x) not in levels[1:]]
    for member in members:
        alone = library.parent / f"alone-{member}"
        content = subprocess.run([given.ar, "p", library, member], capture_output=True, check=True)
        alone.write_bytes(content.stdout)
        problems += [f"{member}: {x}" for x in problems_of_instructions(given, alone, "generic")]
        alone.unlink()
    print(f"kernels: {', '.join(sorted(path.name for path in objects))}")
    print(f"baseline: {', '.join(sorted(members))}")
    if not any(level_of(x) == "generic" for x in members) or len(members) < 6:
        problems.append(f"{library.name}: common objects are missing")
    print("\n".join(problems) if problems else "fine")
    return bool(problems)


if __name__ == "__main__":
    sys.exit(main())
