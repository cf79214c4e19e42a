"""XLA's text of a compiled program, as computations of instructions.

Only what `compiled.py` counts is read: names, shapes, opcodes, operands; all else stays
the `text` of an instruction.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field
from typing import NamedTuple

_BITS = {"pred": 8, "bf16": 16, "tf32": 32, "token": 0, "opaque": 0}
_ARRAY = re.compile(r"(\w+)\[([\d,]*)\](\{[^}]*\})?")
_LINE = re.compile(r"^\s+(ROOT )?%?([\w.\-]+) = (.*)$")


class Array(NamedTuple):
    dtype: str
    shape: tuple[int, ...]
    on_chip: bool  # kept in the memory beside a TPU's units

    @property
    def elements(self) -> int:
        return math.prod(self.shape)

    @property
    def bytes(self) -> float:
        bits = re.search(r"\d+", self.dtype)
        size = _BITS.get(self.dtype, int(bits[0]) if bits else 8)
        return self.elements * size / 8


@dataclass
class Instruction:
    name: str
    arrays: list[Array]
    opcode: str
    operands: list[str]
    text: str

    @property
    def bytes(self) -> float:
        return sum(array.bytes for array in self.arrays)


@dataclass
class Computation:
    name: str
    instructions: dict[str, Instruction] = field(default_factory=dict)
    root: Instruction | None = None


def parse(text: str) -> tuple[dict[str, Computation], str]:
    computations: dict[str, Computation] = {}
    entry, current = "", None
    # The attributes of kernels span lines.
    for line in re.sub(r'\n(?="|\}\})', "", text).splitlines():
        if line.endswith("{") and not line.startswith((" ", "HloModule")):
            name = line.removeprefix("ENTRY ").lstrip("%").split()[0]
            current = computations[name] = Computation(name)
            entry = name if line.startswith("ENTRY") else entry
        elif current is not None and (found := _LINE.match(line)):
            instruction = _instruction(found[2], found[3])
            current.instructions[found[2]] = instruction
            if found[1]:
                current.root = instruction
    if not entry:
        raise ValueError("this is no text of a compiled program: it has no ENTRY")
    return computations, entry


def _instruction(name: str, rest: str) -> Instruction:
    end = _closing(rest, 0) if rest.startswith("(") else rest.index(" ")
    shape, rest = rest[:end], rest[end:].lstrip()
    opening = rest.index("(")
    close = _closing(rest, opening)
    made = [
        Array(
            kind, tuple(int(n) for n in sizes.split(",") if n), "S(1)" in (layout or "")
        )
        for kind, sizes, layout in _ARRAY.findall(shape)
    ]
    # Of a constant, its value: nothing else in brackets is without a name.
    operands = re.findall(r"%([\w.\-]+)|(?<=\()(\d+)(?=\))", rest[opening:close])
    operands = [name or value for name, value in operands]
    return Instruction(name, made, rest[:opening], operands, rest[close:])


def _closing(text: str, start: int) -> int:
    """The place after the bracket that closes the one at `start`."""
    depth = 0
    for i in range(start, len(text)):
        depth += (text[i] == "(") - (text[i] == ")")
        if not depth:
            return i + 1
    return len(text)
