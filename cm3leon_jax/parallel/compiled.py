"""What a compiled program does on one device: counted in XLA's own text of it.

The compiler's cost analysis counts the body of a loop once, and on some targets gives
nothing at all; here every instruction counts as often as its loops run. Nothing is
measured: FLOPs are those of matrix products and convolutions, bytes those that the
shapes imply.
"""

from __future__ import annotations

import itertools
import math
import re
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from cm3leon_jax.parallel.program_text import Computation, Instruction, parse

COLLECTIVES = (
    *("all-gather", "all-reduce", "reduce-scatter", "all-to-all"),
    "collective-permute",
)
_CALLED = re.compile(r"\b(?:calls|body|to_apply)=%?([\w.\-]+)")
_BRANCHES = re.compile(
    r"(?:branch_computations=\{|(?:true|false)_computation=)([\w.\-%, ]+)"
)
_TRIPS = re.compile(r'known_trip_count":\{"n":"(\d+)"')
_GROUPS = re.compile(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?")
_MESH = re.compile(r"replica_groups=(?:@?\w*)?mesh\[([^\]]*)\] ?\{([^}]*)\}")
_LISTED = re.compile(r"replica_groups=\{\{([\d,]*)\}")
_DOT = re.compile(r"lhs_contracting_dim(?:s=\{|ensions\":\[)([\d,\"]*)")
_CONVOLUTION = re.compile(r"dim_labels=(\w+)_(\w+)->(\w+)")
_WINDOW = re.compile(r"window=\{([^}]*)\}")
_CONDITION = re.compile(r"condition=%?([\w.\-]+)")
_NO_TRAFFIC = {
    *("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while"),
    *("conditional", "call", "after-all", "partition-id", "iota", "async-start"),
}
_COPIES = ("copy", "copy-start", "copy-done", "bitcast")
# Products of a pass of an attention kernel: scores and values, and backwards their
# gradients too, after the scores have been made again.
_KERNELS = (
    (re.compile(r"splash_\w*_dkv|fmha\w*Backward|flash\w*backward", re.I), 5),
    (re.compile(r"splash_\w*_dq", re.I), 3),
    (re.compile(r"splash_\w*fwd|fmha|flash", re.I), 2),
)


@dataclass
class Counts:
    """Of one device and one run: FLOPs of products, bytes written to and read from
    memory, bytes sent by each kind of collective, all in all (`near`) and that leave a
    device's neighbourhood (`far`). `unknown`: loops of which nobody can say how often
    they run; they count once."""

    flops: float = 0.0
    traffic: float = 0.0
    collectives: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    near: float = 0.0
    far: float = 0.0
    unknown: int = 0

    def add(self, other: Counts) -> None:
        for name in ("flops", "traffic", "near", "far", "unknown"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        for kind, size in other.collectives.items():
            self.collectives[kind] += size


def count(text: str, near: int) -> Counts:
    """What `compiled.as_text()` says; `near` devices in a row are neighbours.

    Of the branches of a condition the costliest counts. Raises ValueError for a text
    without an entry.
    """
    computations, entry = parse(text)

    def walk(name: str, times: float, fused: bool) -> Counts:
        counts = Counts()
        computation = computations[name]
        for instruction in computation.instructions.values():
            counts.flops += times * _flops(instruction, computation)
            kind = _kind(instruction, computation, computations)
            if kind is not None:
                _collective(instruction, kind, times, near, counts)
            if not fused:
                counts.traffic += times * _traffic(instruction, computations)
            inner = times
            if instruction.opcode == "while":
                trips = _trips(instruction, computations)
                inner *= trips or 1
                counts.unknown += trips is None
            below = fused or instruction.opcode == "fusion"
            parts = [
                walk(called, inner, below)
                for called in _called(instruction)
                if called in computations
            ]
            if parts and instruction.opcode == "conditional":
                parts = [max(parts, key=lambda x: (x.flops, x.near, x.traffic))]
            for part in parts:
                counts.add(part)
        return counts

    return walk(entry, 1.0, False)


def _trips(loop: Instruction, computations: dict[str, Computation]) -> int | None:
    """How often a loop runs: the compiler's note, or else, of a loop that counts from
    0, the constant that its condition compares the counter with."""
    if noted := _TRIPS.search(loop.text):
        return int(noted[1])
    condition = _CONDITION.search(loop.text)
    inside = computations[condition[1]].instructions if condition else {}
    constants = [i for i in inside.values() if i.opcode == "constant"]
    return max((int(n) for i in constants for n in i.operands), default=None)


def arrays(text: str) -> set[tuple[str, tuple[int, ...]]]:
    """(dtype, shape) of every array that any instruction makes."""
    return {
        (array.dtype, array.shape)
        for computation in parse(text)[0].values()
        for instruction in computation.instructions.values()
        for array in instruction.arrays
    }


def _called(instruction: Instruction) -> Iterator[str]:
    if instruction.opcode in ("while", "fusion", "call", "async-start"):
        yield from _CALLED.findall(instruction.text)
    elif instruction.opcode == "conditional":
        for names in _BRANCHES.findall(instruction.text):
            for name in names.split(","):
                yield name.strip().removeprefix("%")


def _flops(instruction: Instruction, computation: Computation) -> float:
    text, opcode = instruction.text, instruction.opcode
    product = opcode == "dot" or (opcode == "custom-call" and "blas" in text)
    if product and (axes := _DOT.search(text)):
        left = computation.instructions[instruction.operands[0]].arrays[0]
        inner = [left.shape[int(n)] for n in re.findall(r"\d+", axes[1])]
        return 2.0 * instruction.arrays[0].elements * math.prod(inner)
    if opcode == "convolution" and (labels := _CONVOLUTION.search(text)):
        picture, kernel = (
            computation.instructions[name].arrays[0].shape
            for name in instruction.operands[:2]
        )
        made = instruction.arrays[0].shape
        return 2.0 * _pairs(text, labels.groups(), (picture, kernel, made))
    if opcode == "custom-call":
        for pattern, products in _KERNELS:
            if pattern.search(text):
                made = (
                    instruction.arrays
                )  # on TPUs with working memory and partial sums
                half = [x for x in made if x.dtype != "f32" and len(x.shape) > 2]
                out = min(half or made[:1], key=lambda x: x.elements)
                # Causal: half of the scores.
                return products * out.elements * float(max(out.shape, default=0))
    return 0.0


def _pairs(text: str, labels: Sequence[str], shapes: Sequence[Any]) -> float:
    """Multiplications of a convolution, without those with its padding.

    A TPU's products of matrices with more than one axis are convolutions whose kernel
    is mostly beside the picture. `shapes` and `labels`: of picture, kernel, result.
    """
    (seen, taps, wanted), (picture, kernel, made) = labels, shapes
    window = _WINDOW.search(text)
    given = dict(part.split("=") for part in window[1].split()) if window else {}
    count = made[wanted.index("b")] * made[wanted.index("f")] * kernel[taps.index("i")]
    for i in range(len(made) - 2):
        axis = str(i)
        before, stride, apart, spread = 0, 1, 1, 1
        if "pad" in given:
            before = int(given["pad"].split("x")[i].split("_")[0])
        if "stride" in given:
            stride = int(given["stride"].split("x")[i])
        if "rhs_dilate" in given:
            apart = int(given["rhs_dilate"].split("x")[i])
        if "lhs_dilate" in given:
            spread = int(given["lhs_dilate"].split("x")[i])
        at = np.arange(made[wanted.index(axis)])[:, None] * stride - before
        at = at + np.arange(kernel[taps.index(axis)]) * apart
        last = (picture[seen.index(axis)] - 1) * spread
        count *= int(np.sum((at >= 0) & (at <= last) & (at % spread == 0)))
    return float(count)


def _kind(
    instruction: Instruction, inside: Computation, computations: dict[str, Computation]
) -> str | None:
    """Which collective it is.

    TPUs write gathers as sums of what is zero but for a device's part, and scatters as
    sums of which a device keeps its part. They may send more than is counted here.
    """
    kind = instruction.opcode.removesuffix("-start")
    ends = "" if inside.root is None else inside.root.text
    if "async_collective_fusion" in inside.name or "AsyncCollectiveDone" in ends:
        return None  # counted where it starts, in a fusion of its own
    if kind != "all-reduce":
        return kind if kind in COLLECTIVES else None
    if "all-reduce-scatter" in inside.name:
        return "reduce-scatter"
    members = _groups(instruction.text).shape[1]
    if _is_only_sliced(instruction, inside, computations, members):
        return "reduce-scatter"
    parts = [_source(name, inside) for name in instruction.operands]
    gathers = [_is_part_of_zeros(part, inside, computations) for part in parts]
    return "all-gather" if gathers and all(gathers) else kind


def _is_only_sliced(
    made: Instruction,
    inside: Computation,
    computations: dict[str, Computation],
    members: int,
) -> bool:
    """Whether of an array, or all those of a tuple, nothing is used but the slice that
    is one of the members' share."""

    def fits(user: Instruction) -> bool:
        if user.opcode == "fusion":
            inner = computations[next(_called(user))]
            given = [str(i) for i, x in enumerate(user.operands) if x == made.name]
            return all(
                _is_only_sliced(x, inner, computations, members)
                for x in inner.instructions.values()
                if x.opcode == "parameter" and x.operands[0] in given
            )
        if user.opcode in (*_COPIES, "get-tuple-element"):
            return _is_only_sliced(user, inside, computations, members)
        return (
            user.opcode == "dynamic-slice"
            and user.arrays[0].elements * members == made.arrays[0].elements
        )

    users = [x for x in inside.instructions.values() if made.name in x.operands]
    return bool(users) and all(map(fits, users))


def _source(name: str, inside: Computation) -> Instruction:
    """What made an array, before it was copied."""
    found = inside.instructions[name]
    while found.opcode in _COPIES:
        found = inside.instructions[found.operands[0]]
    return found


def _is_part_of_zeros(
    made: Instruction, inside: Computation, computations: dict[str, Computation]
) -> bool:
    """Whether every device has put its own part among zeros: their sum is all parts."""
    if made.opcode != "fusion":
        return made.opcode == "dynamic-update-slice" and _is_zero(
            _source(made.operands[0], inside), inside
        )
    inner = computations[next(_called(made))]
    root = inner.root
    while root is not None and root.opcode in _COPIES:
        root = inner.instructions[root.operands[0]]
    if root is None or root.opcode != "dynamic-update-slice":
        return root is not None and _is_part_of_zeros(root, inner, computations)
    below = _source(root.operands[0], inner)
    if below.opcode == "parameter":  # of the fusion: what it is given
        return _is_zero(_source(made.operands[int(below.operands[0])], inside), inside)
    return _is_zero(below, inner)


def _is_zero(made: Instruction, inside: Computation) -> bool:
    if made.opcode == "broadcast":
        made = _source(made.operands[0], inside)
    return made.opcode == "constant" and made.operands == ["0"]


def _collective(
    instruction: Instruction, kind: str, times: float, near: int, counts: Counts
) -> None:
    started = instruction.opcode.endswith("-start")
    summed = instruction.opcode.startswith("all-reduce")
    groups = _groups(instruction.text)
    n = groups.shape[1]
    size = instruction.bytes
    if kind == "all-reduce":
        size *= 2 * (n - 1) / n
    elif summed:  # of arrays that are whole
        size *= (n - 1) / n
    elif kind == "all-gather":
        size = size * (n / (n + 1) if started else 1) * (n - 1) / n
    elif kind == "reduce-scatter":
        size = size * (1 / (n + 1) if started else 1) * (n - 1)
    elif kind == "all-to-all":
        size *= (n - 1) / n / (2 if started else 1)
    elif started:
        size /= 2  # what is sent and what comes
    if n < 2 and kind != "collective-permute":
        return
    counts.collectives[kind] += times * size
    counts.near += times * size
    together = np.unique(groups[0] // near, return_counts=True)[1]
    if len(together) > 1:
        counts.far += times * size / together.min()


def _groups(text: str) -> np.ndarray:
    """Which devices take part together, [groups, members]; the first group suffices."""
    if found := _GROUPS.search(text):
        shape, sizes, order = (
            [int(n) for n in part.split(",")] if part else [] for part in found.groups()
        )
        ids = np.arange(math.prod(sizes)).reshape(sizes)
        return (ids.transpose(order) if order else ids).reshape(shape)
    if found := _MESH.search(text):
        return _groups_of_mesh(*found.groups())
    if found := _LISTED.search(text):
        return np.array([[int(n) for n in found[1].split(",") if n]])
    return np.zeros((1, 1), int)


def _groups_of_mesh(mesh: str, axes: str) -> np.ndarray:
    """`'a'=4,'b'=2` and `'a'`, or `'a':(2)2`, the part of size 2 after one of 2."""
    shape, chosen = [], []
    wanted = re.findall(r"'(\w+)'(?::\((\d+)\)(\d+))?", axes)
    for name, digits in re.findall(r"'(\w+)'=(\d+)", mesh):
        size = int(digits)
        mine = [(int(a or 1), int(b or size)) for key, a, b in wanted if key == name]
        cuts = {1, size, *(n for a, b in mine for n in (a, a * b))}
        for before, cut in itertools.pairwise(sorted(cuts)):
            if any(a <= before and cut <= a * b for a, b in mine):
                chosen.append(len(shape))
            shape.append(cut // before)
    others = [i for i in range(len(shape)) if i not in chosen]
    ids = np.arange(math.prod(shape)).reshape(shape).transpose(others + chosen)
    return ids.reshape(-1, math.prod(shape[i] for i in chosen))


def _traffic(instruction: Instruction, computations: dict[str, Computation]) -> float:
    """Bytes written, and read once by whoever wanted them. A copy to or from the memory
    on the chip passes the other one once."""
    opcode = instruction.opcode
    if opcode in _NO_TRAFFIC or opcode.endswith("-done"):
        return 0.0
    if opcode.endswith("-start") and opcode != "all-reduce-start":
        # What is given, what is made, and a number: of both, the part that moves.
        moved = [array for array in instruction.arrays if array.shape]
        if opcode in ("copy-start", "slice-start"):
            size = min((array.bytes for array in moved), default=0.0)
            return size * (1.0 if any(array.on_chip for array in moved) else 2.0)
        return 2.0 * sum(array.bytes for array in moved[len(moved) // 2 :])
    made = [array for array in instruction.arrays if not array.on_chip]
    if instruction.opcode == "fusion":
        inner = computations[next(_called(instruction))]
        if inner.root is not None and inner.root.opcode == "dynamic-update-slice":
            return 2.0 * inner.instructions[inner.root.operands[1]].bytes
    return 2.0 * sum(array.bytes for array in made)
