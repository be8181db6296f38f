"""What a compiled program sends between devices, read from its text (HLO), loops multiplied out.

XLA's own cost analysis counts the body of a loop once. Here every computation is visited from the entry, and what it
contains counts as often as it runs: a `while` by its known trip count, or by the constant its condition compares with
(scans count up from 0); a conditional as all of its branches. What carries the same channel and the same arrays is one
collective, which XLA may have spread over several fusions.

The bytes of a collective are those of the whole array it concerns, on one device: the gathered result, what is to be
scattered, what is to be reduced. On a ring of n devices, one of them sends

    all-gather, reduce-scatter, all-to-all   (n - 1) / n of it           all-reduce   2 (n - 1) / n           permute   1
"""

import collections
import math
import re
from typing import NamedTuple

BYTES = {"pred": 1, "s4": 0.5, "u4": 0.5, "s8": 1, "u8": 1, "s16": 2, "u16": 2, "bf16": 2, "f16": 2, "s32": 4, "u32": 4}
BYTES |= {"f32": 4, "s64": 8, "u64": 8, "f64": 8, "c64": 8, "c128": 16}
KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
_CALLED = re.compile(r"(?:calls|to_apply|body|condition|true_computation|false_computation)=%?([\w.\-]+)")
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
_TRIPS = re.compile(r'"known_trip_count":\s*\{"n":\s*"(\d+)"\}')
_ARRAY = re.compile(r"(\w+)\[([\d,]*)\]")


class Instruction(NamedTuple):
    result: str  # its type, as text
    opcode: str
    rest: str  # operands and attributes


class Traffic(NamedTuple):
    """Of one device, per run of the program."""

    payload: dict[str, float]  # bytes of the arrays concerned, by kind
    sent: float  # bytes over the wire, on rings
    loops_of_unknown_length: int  # counted as running once


def traffic(text: str) -> Traffic:
    """Add up the collectives of `compiled.as_text()`."""
    computations, entry = parse(text)
    payload: dict[str, float] = collections.defaultdict(float)
    state = {"sent": 0.0, "unknown": 0}
    seen: set[tuple] = set()

    def visit(name: str, times: float) -> None:
        for instruction in computations.get(name, ()):
            kind = instruction.opcode.removesuffix("-start")
            if kind in KINDS:
                channel = re.search(r"channel_id=(\d+)", instruction.rest)
                same = (channel and channel[1], kind, *sizes(instruction.result))
                if channel and same in seen:
                    continue
                seen.add(same)
                size, group = _whole(instruction, kind), group_size(instruction.rest)
                payload[kind] += times * size
                state["sent"] += times * size * _factor(kind, group)
            elif instruction.opcode == "while":
                trips = trip_count(instruction.rest, computations)
                state["unknown"] += trips is None
                for called in _CALLED.findall(instruction.rest):
                    visit(called, times * (trips or 1))
            elif not instruction.opcode.endswith(("-done", "-update")):
                branches = _BRANCHES.search(instruction.rest)
                names = branches[1].replace("%", "").replace(" ", "").split(",") if branches else []
                for called in [*_CALLED.findall(instruction.rest), *names]:
                    visit(called, times)

    visit(entry, 1.0)
    return Traffic(dict(payload), state["sent"], int(state["unknown"]))


def trip_count(rest: str, computations: dict[str, list[Instruction]]) -> int | None:
    """How often the `while` with these attributes runs; None if its text does not tell."""
    known = _TRIPS.search(rest)
    if known:
        return int(known[1])
    name = re.search(r"condition=%?([\w.\-]+)", rest)
    condition = computations.get(name[1], []) if name else []
    constants = [i for i in condition if i.opcode == "constant" and i.result.startswith("s32[]")]
    compares = [i for i in condition if i.opcode == "compare" and "direction=LT" in i.rest]
    if len(constants) != 1 or len(compares) != 1:
        return None
    return int(constants[0].rest.split(")")[0])


def parse(text: str) -> tuple[dict[str, list[Instruction]], str]:
    """{computation: instructions}, and the name of the entry."""
    computations: dict[str, list[Instruction]] = {}
    entry, current = "", None
    for line in text.splitlines():
        stripped = line.strip()
        if current is None or not line.startswith(" "):
            header = re.match(r"(ENTRY )?%?([\w.\-]+) .*\{$", stripped)
            if header and "=" not in stripped.split("(")[0]:
                current = computations.setdefault(header[2], [])
                entry = header[2] if header[1] else entry
            continue
        _, equals, right = stripped.partition(" = ")
        if equals:
            result, rest = _split_type(right)
            opcode, _, operands = rest.partition("(")
            current.append(Instruction(result, opcode.strip(), operands))
    return computations, entry


def _split_type(right: str) -> tuple[str, str]:
    """`(f32[2], f32[4]) while(...)` to its type and the rest."""
    if not right.startswith("("):
        result, _, rest = right.partition(" ")
        return result, rest
    depth = 0
    for end, character in enumerate(right):
        depth += (character == "(") - (character == ")")
        if depth == 0:
            return right[: end + 1], right[end + 1 :].strip()
    return right, ""


def sizes(result: str) -> list[float]:
    """Bytes of every array in a type."""
    found = (match for match in _ARRAY.findall(result) if match[0] in BYTES)
    return [BYTES[kind] * math.prod(int(n) for n in shape.split(",") if n) for kind, shape in found]


def _whole(instruction: Instruction, kind: str) -> float:
    arrays = sizes(instruction.result)
    if not arrays:
        return 0.0
    if instruction.opcode.endswith("-start") and kind in ("all-gather", "collective-permute"):
        # operands and results side by side, and for a permute two tickets
        return sum(arrays) - sum(_operands(arrays)) if kind == "all-gather" else max(arrays)
    total = sum(arrays)
    return total * group_size(instruction.rest) if kind == "reduce-scatter" else total


def _operands(arrays: list[float]) -> list[float]:
    return arrays[: len(arrays) // 2]


def group_size(rest: str) -> int:
    """Devices that take part together, from `replica_groups`."""
    named = re.search(r"replica_groups=mesh\[([^\]]*)\] \{([^}]*)\}", rest)
    if named:
        axes = dict(re.findall(r"'(\w+)'=(\d+)", named[1]))
        return math.prod(int(axes[name]) for name in re.findall(r"'(\w+)'", named[2]))
    iota = re.search(r"replica_groups=\[(\d+),(\d+)\]", rest)
    if iota:
        return int(iota[2])
    listed = re.search(r"replica_groups=\{\{([\d,]*)\}", rest)
    return len(listed[1].split(",")) if listed else 2


def _factor(kind: str, group: int) -> float:
    ring = (group - 1) / group
    return {"all-reduce": 2 * ring, "collective-permute": 1.0}.get(kind, ring)
