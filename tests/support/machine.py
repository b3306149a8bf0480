# SPDX-License-Identifier: Apache-2.0
"""One thread of a kernel, run instruction by instruction from its sm_90 machine code.

It tells how many instructions a thread issues on the way that a given row makes it take. What an
instruction leaves that is not known here is not known from then on; a branch that hangs on such a
value raises.
"""

from __future__ import annotations

import ctypes
import ctypes.util
import math
import re
import struct
from collections.abc import Callable, Sequence

import numpy as np
from support.sass import Instruction

# Where the constants of an sm_90 launch start that the kernel's parameters are.
PARAMETERS = 0x210
MASK = 0xFFFFFFFF
_fmaf = ctypes.CDLL(ctypes.util.find_library("m")).fmaf
_fmaf.restype, _fmaf.argtypes = ctypes.c_float, [ctypes.c_float] * 3
NOTHING = {"BSSY", "BSYNC", "BAR", "WARPSYNC", "ACQBULK", "NOP", "BREAK", "WARPSYNC.ALL"}


class Unknown(Exception):
    """What the thread does next hangs on a value that is not known."""


def signed(v: int) -> int:
    return v - (1 << 32) if v >> 31 else v


def as_float(v: int) -> float:
    return struct.unpack("<f", struct.pack("<I", v & MASK))[0]


def as_bits(v: float) -> int:
    with np.errstate(all="ignore"):
        return int(np.float32(v).view(np.uint32))


def lut(table: int, a: int, b: int, c: int, bits: int) -> int:
    """Bit by bit, what a table of eight says of a, b and c."""
    found = 0
    for k in range(8):
        if table >> k & 1:
            term = bits
            for v, bit in ((a, 4), (b, 2), (c, 1)):
                term &= v if k & bit else ~v
            found |= term
    return found & bits


class Thread:
    """A thread, by its code and by what it finds in memory.

    Attributes:
        issued: The addresses of what it issued, in order; what a predicate keeps from acting too.
        stored: What it left in global memory: the address and the words of each store.
    """

    def __init__(
        self,
        code: Sequence[Instruction],
        parameters: bytes,
        shared: bytearray,
        special: dict[str, int],
        loaded: Callable[[int], int],
    ) -> None:
        """
        Args:
            code: The kernel.
            parameters: Its one argument.
            shared: Shared memory, as it stands when the thread begins.
            special: Thread and block, by the names of special registers.
            loaded: The word at an address of global memory.
        """
        self.code = list(code)
        self.place = {i.address: k for k, i in enumerate(code)}
        self.constants = bytes(PARAMETERS) + parameters
        self.shared, self.special, self.loaded = shared, special, loaded
        self.r: dict[str, int | None] = {}
        self.p: dict[str, bool | None] = {}
        self.issued: list[int] = []
        self.stored: list[tuple[int, list[int]]] = []

    # -- operands ----------------------------------------------------------------------------------

    def predicate(self, text: str) -> bool | None:
        name = text.strip().lstrip("!")
        value = True if name in {"PT", "UPT"} else self.p.get(name)
        return value if value is None or not text.startswith("!") else not value

    def word(self, text: str, part: int = 0) -> int | None:
        """The 32 bits of an operand, or those of the `part`th register from it."""
        name = text.removesuffix(".reuse").strip()
        if name.startswith(("-", "~")):
            value = self.word(name[1:], part)
            if value is None:
                return None
            return (-value if name[0] == "-" else ~value) & MASK
        if name in {"RZ", "URZ", "SRZ"}:
            return 0
        if found := re.fullmatch(r"(U?R)(\d+)(\.64)?", name):
            return self.r.get(f"{found[1]}{int(found[2]) + part}")
        if re.fullmatch(r"0x[0-9a-f]+", name):
            return int(name, 16) >> 32 * part & MASK
        if found := re.fullmatch(r"c\[0x0\]\[(0x[0-9a-f]+)\]", name):
            return self.constant(int(found[1], 16) + 4 * part, 4)
        if re.fullmatch(r"\d+", name):
            return int(name) & MASK
        return None

    def constant(self, at: int, size: int) -> int | None:
        if at == 0xC:  # blocks of the launch
            return self.special["grid"]
        part = self.constants[at : at + size]
        return int.from_bytes(part, "little") if at >= PARAMETERS and len(part) == size else None

    def number(self, text: str) -> float | None:
        """A float32 operand."""
        name = text.removesuffix(".reuse").strip()
        if found := re.fullmatch(r"([-+]?)(INF|\d[\d.]*(?:e[-+]\d+)?)", name):
            value = float(found[2].replace("INF", "inf"))
            return float(np.float32(-value if found[1] == "-" else value))
        if name.startswith("-"):
            value = self.number(name[1:])
            return None if value is None else -value
        if name.startswith("|"):
            value = self.number(name.strip("|"))
            return None if value is None else abs(value)
        word = self.word(name)
        return None if word is None else as_float(word)

    def wide(self, text: str) -> int | None:
        low, high = self.word(text), self.word(text, 1)
        if text in {"RZ", "URZ"}:
            return 0
        return None if low is None or high is None else high << 32 | low

    def address(self, text: str) -> int | None:
        """What stands between the last brackets; shared addresses are 32 bits."""
        inner = text[text.rindex("[") + 1 : text.rindex("]")]
        total = 0
        for part in re.findall(r"-?[^+\s]+", inner):
            value = self.wide(part.removesuffix(".64")) if ".64" in part else self.word(part)
            if value is None:
                return None
            total += value
        return total

    def put(self, name: str, value: int | None, parts: int = 1) -> None:
        found = re.fullmatch(r"(U?R)(\d+)", name)
        if found is None:
            return
        for k in range(parts):
            word = None if value is None else value >> 32 * k & MASK
            self.r[f"{found[1]}{int(found[2]) + k}"] = word

    # -- running -----------------------------------------------------------------------------------

    def run(self, until: Callable[[Thread], bool]) -> None:
        """Issues instructions until `until` says so, asked before each, or the thread exits."""
        k = 0
        while not until(self):
            i = self.code[k]
            self.issued.append(i.address)
            holds = self.predicate(i.guard) if i.guard else True
            k += 1
            if i.name in {"BRA", "EXIT", "CALL", "RET"}:
                asked = [self.predicate(o) for o in i.operands if re.fullmatch(r"!?U?P[T\d]", o)]
                goes = False if holds is False or False in asked else holds and all(asked)
                if holds is None or (goes is not False and None in asked):
                    raise Unknown(f"{i.address:#x}: {i.guard} {i.code} {i.operands}")
                if goes and i.name == "EXIT":
                    return
                if goes and i.name == "RET":
                    k = self.place[self.word(i.operands[0].split()[0])]
                elif goes:
                    k = self.place[int(i.operands[-1], 16)]
            elif i.name not in NOTHING and holds is not False:
                self.act(i, holds is None)

    def act(self, i: Instruction, perhaps: bool) -> None:
        """One instruction. `perhaps`: it is not known whether it acts."""
        method = getattr(self, "_" + i.name.lower(), None)
        if method is None and i.name.startswith("U"):
            method = getattr(self, "_" + i.name[1:].lower(), None)
        if method is None or perhaps:
            if i.name in {"STG", "STS"}:
                raise Unknown(f"{i.address:#x}: {i.guard} {i.code} {i.operands}")
            for name in i.written:
                if "P" in name:
                    self.p[name] = None
                else:
                    self.put(name, None)
            return
        method(i, set(i.code.split(".")[1:]), list(i.operands))

    # -- moves and memory --------------------------------------------------------------------------

    def _mov(self, i, how, o):
        self.put(o[0], self.word(o[1]))

    _r2ur = _mov

    def _cs2r(self, i, how, o):
        self.put(o[0], 0 if o[1] == "SRZ" else None, 1 if "32" in how else 2)

    def _s2r(self, i, how, o):
        self.put(o[0], self.special.get(o[1]))

    _s2ur = _s2r

    def _ldc(self, i, how, o):
        at = int(re.fullmatch(r"c\[0x0\]\[(0x[0-9a-f]+)\]", o[1])[1], 16)
        parts = 2 if "64" in how else 1
        if parts == 2:
            low, high = self.constant(at, 4), self.constant(at + 4, 4)
            self.put(o[0], None if low is None or high is None else high << 32 | low, 2)
        else:
            self.put(o[0], self.constant(at, 1 if "U8" in how else 4))

    def _hfma2(self, i, how, o):
        constant = o[1].lstrip("-") == "RZ" and o[2].lstrip("-") == "RZ"
        halves = [int(np.float16(float(v)).view(np.uint16)) for v in o[3:5]] if constant else []
        self.put(o[0], halves[0] << 16 | halves[1] if constant else None)

    def _lds(self, i, how, o):
        at = self.address(o[1])
        size = {"U8": 1, "S8": 1, "U16": 2, "S16": 2, "64": 8, "128": 16}
        count = next((size[h] for h in how if h in size), 4)
        value = None if at is None else int.from_bytes(self.shared[at : at + count], "little")
        if value is not None and how & {"S8", "S16"} and value >> (8 * count - 1):
            value -= 1 << 8 * count
        self.put(o[0], value, max(count // 4, 1))

    def _sts(self, i, how, o):
        at, count = self.address(o[0]), {"U8": 1, "U16": 2, "64": 8, "128": 16}
        size = next((count[h] for h in how if h in count), 4)
        words = [self.word(o[1], k) for k in range(max(size // 4, 1))]
        if at is None or None in words:
            raise Unknown(f"{i.address:#x}: {i.code} {o}")
        self.shared[at : at + size] = b"".join(struct.pack("<I", w) for w in words)[:size]

    def _ldg(self, i, how, o):
        at, parts = self.address(o[1]), 4 if "128" in how else 2 if "64" in how else 1
        for k in range(parts):
            name = f"R{int(o[0][1:]) + k}"
            self.put(name, None if at is None else self.loaded(at + 4 * k))

    def _stg(self, i, how, o):
        at, parts = self.address(o[0]), 4 if "128" in how else 2 if "64" in how else 1
        self.stored.append((at, [self.word(o[1], k) for k in range(parts)]))

    # -- integers ----------------------------------------------------------------------------------

    def _split(self, o: list[str]) -> tuple[list[str], list[str]]:
        """Predicates that are written behind the first operand, and what follows them."""
        k = 1
        while re.fullmatch(r"U?P[T\d]", o[k]):
            k += 1
        return o[1:k], o[k:]

    def _sum(self, o: list[str], terms: list[str], carries: list[str]) -> None:
        """The sum of up to three words, with the carries that go in and come out."""
        outs, total = self._split(o)[0], 0
        for text in terms:
            word = self.word(text)
            if word is None:
                total = None
                break
            # what is taken away adds 2^32 less itself, which carries where it is 0
            total += (1 << 32) if text.startswith("-") and word == 0 and "RZ" not in text else word
        for text in carries:
            carry = self.predicate(text)
            total = None if total is None or carry is None else total + carry
        self.put(o[0], total)
        for k, name in enumerate(outs):
            self.p[name] = None if total is None else total >> 32 > k

    def _iadd3(self, i, how, o):
        rest = self._split(o)[1]
        self._sum(o, rest[:3], rest[3:] if "X" in how else [])

    def _viadd(self, i, how, o):
        self._sum(o, o[1:3], [])

    def _imad(self, i, how, o):
        outs, rest = self._split(o)
        if how & {"WIDE", "HI"}:
            a, b, c = self.word(rest[0]), self.word(rest[1]), self.wide(rest[2])
            if None in (a, b, c):
                total = None
            else:
                total = (a * b if "U32" in how else signed(a) * signed(b)) + c
            if "HI" in how:
                self.put(o[0], None if total is None else total >> 32)
            else:
                self.put(o[0], total, 2)
            for name in outs:
                self.p[name] = None if total is None else bool(total >> 64)
            return
        a, b, c = (self.word(text) for text in rest[:3])
        carry = self.predicate(rest[3]) if "X" in how else False
        unknown = c is None or carry is None or (0 not in (a, b) and None in (a, b))
        self.put(o[0], None if unknown else (a or 0) * (b or 0) + c + carry)

    def _lea(self, i, how, o):
        outs, rest = self._split(o)
        if "HI" not in how:
            a, b, shift = self.word(rest[0]), self.word(rest[1]), self.word(rest[2])
            total = None if None in (a, b, shift) else (a << shift & MASK) + b
        else:
            a, b = self.word(rest[0]), self.word(rest[1])
            if "SX32" in how:
                high, after = (None if a is None else MASK * (a >> 31)), rest[2:]
            else:
                high, after = self.word(rest[2]), rest[3:]
            shift = self.word(after[0])
            carry = self.predicate(after[1]) if "X" in how else False
            total = None
            if None not in (a, b, high, shift, carry):
                total = ((high << 32 | a) << shift >> 32 & MASK) + b + carry
        self.put(o[0], total)
        for name in outs:
            self.p[name] = None if total is None else bool(total >> 32)

    def _shf(self, i, how, o):
        low, shift, high = (self.word(text) for text in o[1:4])
        if "L" in how:
            known = None not in ((low, shift, high) if "HI" in how else (low, shift))
            value = ((high or 0) << 32 | low) << shift if known else None
            self.put(o[0], value >> 32 if known and "HI" in how else value)
            return
        top = 0 if "HI" not in how and "U32" in how else high
        if None in (low, shift, top):
            self.put(o[0], None)
            return
        whole = (signed(top) if how & {"S32", "S64"} else top) << 32 | low
        self.put(o[0], whole >> shift >> (32 if "HI" in how else 0))

    def _lop3(self, i, how, o):
        out = o[0] if "P" in o[0] else None
        to, a, b, c, table, _ = o[1:] if out else o
        words = [self.word(text) for text in (a, b, c)]
        value = None
        if None not in words:
            value = lut(int(table, 16), *words, MASK)
        self.put(to, value)
        if out:
            self.p[out] = None if value is None else value != 0

    def _plop3(self, i, how, o):
        values = [self.predicate(text) for text in o[2:5]]
        for name, table in ((o[0], o[5]), (o[1], o[6])):
            both = {
                bool(lut(int(table, 16), *(int(v) for v in each), 1))
                for each in np.ndindex(2, 2, 2)
                if all(v is None or v == w for v, w in zip(values, each, strict=True))
            }
            if name not in {"PT", "UPT"}:
                self.p[name] = both.pop() if len(both) == 1 else None

    def _sel(self, i, how, o):
        choice = self.predicate(o[3])
        self.put(o[0], None if choice is None else self.word(o[1] if choice else o[2]))

    _fsel = _sel

    def _prmt(self, i, how, o):
        a, select, c = (self.word(text) for text in o[1:4])
        if select is None:
            self.put(o[0], None)
            return
        found = []
        for k in range(4):
            nibble = select >> 4 * k & 15
            word = a if nibble & 7 < 4 else c
            if word is None:
                self.put(o[0], None)
                return
            byte = word >> 8 * (nibble & 3) & 255
            found.append((255 if byte >> 7 else 0) if nibble & 8 else byte)
        self.put(o[0], int.from_bytes(bytes(found), "little"))

    def _r2p(self, i, how, o):
        word, mask = self.word(o[1]), self.word(o[2])
        for k in range(7):
            if mask >> k & 1:
                self.p[f"P{k}"] = None if word is None else bool(word >> k & 1)

    def _up2ur(self, i, how, o):
        mask = self.word(o[3])
        flags = [(k, self.p.get(f"UP{k}")) for k in range(7) if mask >> k & 1]
        known = None not in [value for _, value in flags]
        self.put(o[0], sum(1 << k for k, value in flags if value) if known else None)

    def _vimnmx(self, i, how, o):
        a, b, least = self.word(o[1]), self.word(o[2]), self.predicate(o[3])
        known = None not in (a, b, least)
        order = (lambda v: v) if "U32" in how else signed
        self.put(o[0], (min if least else max)(a, b, key=order) if known else None)

    # -- comparisons -------------------------------------------------------------------------------

    def _decide(self, how: set[str], o: list[str], holds: bool | None) -> None:
        with_ = self.predicate(o[4])
        for name, value in ((o[0], holds), (o[1], None if holds is None else not holds)):
            if name in {"PT", "UPT"}:
                continue
            sure = "OR" in how  # what one of the two decides alone
            if sure in (value, with_):
                known: bool | None = sure
            else:
                known = None if None in (value, with_) else not sure
            self.p[name] = known

    def _isetp(self, i, how, o):
        a, b = self.word(o[2]), self.word(o[3])
        holds = None
        if None not in (a, b):
            if "U32" not in how:
                a, b = signed(a), signed(b)
            low = self.predicate(o[5]) if "EX" in how else None
            order = next(h for h in ("GE", "GT", "LE", "LT", "EQ", "NE") if h in how)
            if "EX" not in how:
                holds = {
                    "GE": a >= b, "GT": a > b, "LE": a <= b, "LT": a < b, "EQ": a == b, "NE": a != b
                }[order]  # fmt: skip
            elif a == b:
                holds = low
            else:
                holds = {"G": a > b, "L": a < b, "E": False, "N": True}[order[0]]
        self._decide(how, o, holds)

    def _fsetp(self, i, how, o):
        a, b = self.number(o[2]), self.number(o[3])
        holds = None
        if a is not None and b is not None:
            order = next(h for h in i.code.split(".")[1:] if h != "FTZ")
            nan = math.isnan(a) or math.isnan(b)
            sure = {
                "GE": a >= b, "GT": a > b, "LE": a <= b, "LT": a < b, "EQ": a == b, "NE": a != b
            }[order[:2]]  # fmt: skip
            holds = order.endswith("U") if nan else sure
        self._decide(how, o, holds)

    # -- floats ------------------------------------------------------------------------------------

    def _float(self, o: list[str], made: Callable[..., float]) -> None:
        numbers = [self.number(text) for text in o[1:]]
        self.put(o[0], None if None in numbers else as_bits(made(*numbers)))

    def _ffma(self, i, how, o):
        self._float(o, _fmaf)

    def _fmul(self, i, how, o):
        self._float(o, lambda a, b: np.float32(a) * np.float32(b))

    def _fadd(self, i, how, o):
        self._float(o, lambda a, b: np.float32(a) + np.float32(b))

    def _mufu(self, i, how, o):
        if "RSQ" in how:
            self._float(o, lambda v: v**-0.5 if v > 0 else math.inf)
        elif "RCP" in how:
            self._float(o, lambda v: 1 / v if v else math.inf)
        else:
            self.put(o[0], None)

    def _i2fp(self, i, how, o):
        word = self.word(o[1])
        if word is not None:
            word = as_bits(np.float32(signed(word) if "S32" in how else word))
        self.put(o[0], word)
