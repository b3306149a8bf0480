# SPDX-License-Identifier: Apache-2.0
"""The machine code of CUDA kernels: where it comes from, and what stands in it."""

from __future__ import annotations

import dataclasses
import importlib.util
import re
import shutil
import subprocess
from collections.abc import Iterable, Iterator
from pathlib import Path

from support.gpu import CORE, ROOT

ARCHITECTURES = ("sm_80", "sm_90", "sm_100")
# Compiled where no module is built: state, rows and outputs of each kind, in seconds.
SOME = (
    "stage_shared<Row<float>, float>",
    "stage_samples<Row<float>, Bfloat16>",
    "stage_shared<GrownRow<float>, Float16>",
    "stage_shared<Row<double>, double>",
    "stage_samples<GrownRow<double>, float>",
)


def tool(name: str) -> str | None:
    """A program of the CUDA toolkit; Triton ships some."""
    found = shutil.which(name)
    spec = importlib.util.find_spec("triton")
    if found is None and spec is not None and spec.origin is not None:
        path = Path(spec.origin).parent / "backends" / "nvidia" / "bin" / name
        found = str(path) if path.exists() else None
    return found


def run(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def compiled(source: str, arch: str, folder: Path) -> Path:
    """The machine code of a CUDA source that may include what csrc/ holds."""
    text, target = folder / f"{arch}.cu", folder / f"{arch}.cubin"
    text.write_text(source)
    flags = ["-std=c++17", "-O3", "--fmad=false", f"-I{ROOT / 'csrc'}", f"-arch={arch}", "-cubin"]
    run("nvcc", *flags, "-o", str(target), str(text))
    return target


def some_kernels(kernels: Iterable[str] = SOME) -> str:
    """csrc/cuda/kernels.cu up to the section after its kernels, and with these kernels alone."""
    sections = (ROOT / "csrc" / "cuda" / "kernels.cu").read_text().split("// -- ")
    assert sections[1].startswith("kernels ")
    source = "// -- ".join(sections[:2]).replace("namespace {", "", 1)
    source = source.replace("}  // namespace\n", "")
    lines = [f"template __global__ void {k}(const __grid_constant__ Launch);" for k in kernels]
    return "\n".join([source, *lines, "}"])


def module_with(arch: str, folder: Path) -> Path | None:
    """A file with kernels for `arch`: the module as built, else some that nvcc compiles now."""
    program = tool("cuobjdump")
    if program is None:
        return None
    if CORE is not None and arch in re.findall(
        r"sm_\d+\b", run(program, "--list-elf", CORE.__file__)
    ):
        return Path(CORE.__file__)
    return compiled(some_kernels(), arch, folder) if shutil.which("nvcc") else None


def dumped(path: Path, arch: str, what: str = "--dump-sass") -> dict[str, str]:
    """What cuobjdump says of each kernel."""
    text = run(str(tool("cuobjdump")), what, "--gpu-architecture", arch, str(path))
    parts = re.split(r"^\s*Function\s*:?\s*(\S+?):?\s*$", text, flags=re.MULTILINE)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


# -- instructions ----------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Instruction:
    address: int
    guard: str  # "", "P0", "!P3", "UP1"
    code: str  # with its suffixes, "LDG.E.128"
    operands: tuple[str, ...]

    @property
    def name(self) -> str:
        return self.code.partition(".")[0]

    @property
    def jumps(self) -> bool:
        return self.name in {"BRA", "BRX", "BSYNC", "BREAK", "CALL", "EXIT", "JMP", "RET", "BRXU"}

    @property
    def written(self) -> tuple[str, ...]:
        """Registers and predicates that it writes, as far as their versions matter here."""
        if self.name in {"STG", "STS", "ST", "RED", "ATOMS"} or self.jumps:
            return ()
        names = [self.operands[0]] if self.operands else []
        names += [o for o in self.operands[1:3] if re.fullmatch(r"U?P\d", o)]
        names = [name.partition(".")[0] for name in names]
        if names and re.fullmatch(r"U?R\d+", names[0]):
            kind, first = re.fullmatch(r"(U?R)(\d+)", names[0]).groups()  # type: ignore[union-attr]
            width = 4 if ".128" in self.code else 2 if re.search(r"\.64|WIDE", self.code) else 1
            names += [f"{kind}{int(first) + k}" for k in range(1, width)]
        return tuple(names)

    @property
    def access(self) -> tuple[str, int, int]:
        """Base register, offset and bytes of an access to memory."""
        place = next(o for o in self.operands if "[" in o)
        inner = place[place.rindex("[") + 1 : place.rindex("]")]
        offset = re.search(r"([+-])?(-?0x[0-9a-f]+)$", inner)
        bytes_ = {"128": 16, "64": 8, "U16": 2, "S16": 2, "U8": 1, "S8": 1}
        width = next((bytes_[s] for s in self.code.split(".")[1:] if s in bytes_), 4)
        return inner.split("+")[0].split(".")[0], int(offset[2], 16) if offset else 0, width


def instructions(text: str) -> list[Instruction]:
    found = []
    for address, line in re.findall(r"^\s*/\*([0-9a-f]{4,6})\*/\s+(.+?)\s*;", text, re.MULTILINE):
        guard, body = re.fullmatch(r"(?:@(!?U?P\w+)\s+)?(.+)", line).groups()  # type: ignore[union-attr]
        code, _, rest = body.partition(" ")
        operands = tuple(part.strip() for part in rest.split(",")) if rest else ()
        found.append(Instruction(int(address, 16), guard or "", code, operands))
    return found


def blocks(code: list[Instruction]) -> Iterator[list[Instruction]]:
    """The basic blocks: straight lines that are entered at their first instruction alone."""
    targets = {int(o, 16) for i in code if i.jumps or i.name == "BSSY" for o in i.operands
               if re.fullmatch(r"0x[0-9a-f]+", o)}  # fmt: skip
    block: list[Instruction] = []
    for i in code:
        if block and (i.address in targets or block[-1].jumps):
            yield block
            block = []
        block.append(i)
    if block:
        yield block


def loads_in_flight(code: list[Instruction]) -> int:
    """The most loads of 16 bytes of a thread that stand before the first use of any of them.

    Counted along the code as it stands: where branches pass over a load, those of a row that takes
    none of the branches.
    """
    most, pending = 0, []
    for i in code:
        at = 0 if i.name in {"STG", "STS", "ISETP", "FSETP"} else 1
        used = set(re.findall(r"\bR\d+\b", " ".join(i.operands[at:])))
        if (i.jumps and i.name != "BRA") or used & {r for load in pending for r in load.written}:
            most, pending = max(most, len(pending)), []
        if re.match(r"LDG\.E(\.\w+)*\.128", i.code):
            pending.append(i)
    return most


def split_quads(code: list[Instruction], name: str) -> list[Instruction]:
    """The first access of each four that move four neighbours one by one under one guard.

    The code for single elements, at the end of a sample or where addresses are not aligned, asks
    for each of four elements whether it exists: its accesses stand under four guards, or in four
    blocks. Four under one guard move a whole quad, for which one access should do.
    """
    found = []
    for block in blocks(code):
        version: dict[str, int] = {}
        groups: dict[tuple, dict[int, Instruction]] = {}
        for i in block:
            if i.name == name and i.access[2] < 16:
                base, offset, width = i.access
                guard = i.guard.lstrip("!")
                key = (base, version.get(base), i.guard, version.get(guard), width)
                groups.setdefault(key, {})[offset] = i
            for register in i.written:
                version[register] = i.address
        for key, at in groups.items():
            found += [i for o, i in at.items() if all(o + k * key[-1] in at for k in range(4))]
    return found
