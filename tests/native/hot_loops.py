"""What the hot loops of the products consist of, counted in the objects of the NEON levels.

    hot_loops.py OBJDUMP OBJECT...

An emulator tells no speed. What it depends on can be counted: multiply-adds for each load, and
sums that found no register and go through memory.
"""

import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

# The register tiles of six scalars times four vectors, by their functions. GCC inlines some of them
# in others.
PRODUCTS = {
    "QK^T": r"qk_step<.*, 4, (8|16)>\(",
    "values": r"value_aggregation<.*, 4>\(|value_register_tile<.*, 6, 4>\(",
    "any two matrices": r"matmul_(rows|last_columns|register_tile)<.*6(, 4)?>\(",
}
# A vector times one lane of another one, which is what these levels are for: how it is written, how
# many lanes there are, and the least multiply-adds for a load. The steps that are left at the end
# of a product use lane 0 only.
BY_LANE = {
    "float32": (r"fmla\s+v\d+\.4s, v\d+\.4s, v\d+\.s\[(\d)\]", 4, 4.0),
    "float64": (r"fmla\s+v\d+\.2d, v\d+\.2d, v\d+\.d\[(\d)\]", 2, 3.4),
    "pairs of bfloat16": (r"bfdot\s+v\d+\.4s, v\d+\.8h, v\d+\.2h\[(\d)\]", 4, 4.0),
}
MOST_SPILLS = 2  # one register written and read
LOADS = {"ldr": 1, "ldur": 1, "ldp": 2, "ld1": 1, "ld1r": 1}


def functions(objdump, path):
    """Return the instructions (address, mnemonic, operands) of each function."""
    command = [objdump, "-d", "-C", "--no-show-raw-insn", path]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found, name = {}, ""
    for line in text.splitlines():
        if head := re.match(r"[0-9a-f]+ <(.*)>:$", line):
            name = head[1].replace("(anonymous namespace)::", "")
            found[name] = []
        elif instruction := re.match(r"\s*([0-9a-f]+):\s+(\S+)\s*(.*)", line):
            address, mnemonic, operands = instruction.groups()
            found[name].append((int(address, 16), mnemonic, operands))
    return found


def loops(instructions):
    """Yield the instructions of each loop that has none within it."""
    places = {address: n for n, (address, *_) in enumerate(instructions)}
    found = []
    for n, (address, mnemonic, operands) in enumerate(instructions):
        target = re.search(r"\b([0-9a-f]+) <", operands)
        is_jump = mnemonic.startswith("b.") or mnemonic in ("b", "cbnz", "cbz", "tbnz", "tbz")
        if is_jump and target and int(target[1], 16) <= address and int(target[1], 16) in places:
            found.append((places[int(target[1], 16)], n + 1))
    for begin, end in found:
        if not any((a, b) != (begin, end) and a >= begin and b <= end for a, b in found):
            yield instructions[begin:end]


def count(loop):
    counted = Counter()
    for _, mnemonic, operands in loop:
        if mnemonic in ("fmla", "bfdot"):
            counted["multiply-adds"] += 1
        elif mnemonic in (*LOADS, "str", "stp") and re.match(r"[qdsh]\d|\{v", operands):
            counted["spills" if "[sp" in operands else "loads"] += LOADS.get(mnemonic, 1)
    return counted


def main_loops(all_functions, product, by_lane, lanes):
    """Yield what a product's loops consist of that multiply by every lane, and by lane only."""
    for name, instructions in all_functions.items():
        if re.search(product, name):
            for loop in loops(instructions):
                lines = [f"{mnemonic} {operands}" for _, mnemonic, operands in loop]
                of_lanes = [int(found[1]) for line in lines if (found := re.match(by_lane, line))]
                counted = count(loop)
                if set(of_lanes) == set(range(lanes)) and len(of_lanes) == counted["multiply-adds"]:
                    yield counted


def problems_of(objdump, path):
    all_functions = functions(objdump, path)
    # neon_bf16 has only the products of pairs; the others are neon's.
    kinds = [kind for kind in BY_LANE if ("bf16" in path.name) == ("bfloat16" in kind)]
    for product, pattern in PRODUCTS.items():
        for kind in kinds:
            what = f"{path.name}, {product}, {kind}"
            by_lane, lanes, least = BY_LANE[kind]
            counts = list(main_loops(all_functions, pattern, by_lane, lanes))
            if not counts:
                yield f"{what}: no loop that multiplies by lane"
                continue
            # The whole tile has the most multiply-adds; of several such loops, the worst.
            most = max(counts, key=lambda x: (x["multiply-adds"], x["spills"], x["loads"]))
            per_load = most["multiply-adds"] / max(1, most["loads"])
            print(f"{what}: {dict(most)}, {per_load:.1f} multiply-adds for a load")
            if round(per_load, 1) < least:
                yield f"{what}: expected at least {least} multiply-adds for a load"
            if most["spills"] > MOST_SPILLS:
                yield f"{what}: sums go through memory {most['spills']} times"


def main():
    objdump, *objects = sys.argv[1:]
    paths = [path for path in map(Path, objects) if path.name.startswith("neon")]
    problems = [problem for path in paths for problem in problems_of(objdump, path)]
    if not paths:
        problems.append(f"no object of NEON among {objects}")
    print("\n".join(problems) if problems else "fine")
    return bool(problems)


if __name__ == "__main__":
    sys.exit(main())
