"""What a compiled program says of itself: its collectives with the bytes they move, and the compiler's cycle estimates.

The compiler's own totals (`cost_analysis`) take a loop's body once. Here every instruction counts as often as the loops
around it turn: `known_trip_count` where the compiler wrote it, else the bound that a counting loop's condition compares
with. Both branches of a conditional count. Everything is read from `compiled.as_text()`.
"""

import math
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")

_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{\s*$")
_INSTRUCTION = re.compile(r"^\s+(ROOT )?%?([\w.\-]+) = (.*?) ([a-z][a-z0-9\-]*)\(")
_CALLED = re.compile(r"(?:calls|to_apply|body|condition|true_computation|false_computation)=%?([\w.\-]+)")
_ARRAY = re.compile(r"\b([a-z][a-z0-9]*)\[([\d,]*)\]")
_BITS = {"pred": 8, "bf16": 16, "c64": 64, "c128": 128, "token": 0, "opaque": 0}


class HloError(ValueError):
    """A program whose text is not understood."""


@dataclass(frozen=True)
class Collective:
    """All collectives of one kind, on one device in one run of the program.

    Attributes:
      count: how many run.
      bytes: what the device sends in them if each is a ring: (n - 1) / n of the gathered, scattered or exchanged array
        over n devices, twice that for an all-reduce, the whole array for a permutation.
    """

    count: int
    bytes: int


@dataclass(frozen=True)
class _Instruction:
    name: str
    kind: str
    result: str
    line: str
    is_root: bool

    def operands(self) -> list[str]:
        inside = self.line.split(f" {self.kind}(", 1)[1].split(")", 1)[0]
        return re.findall(r"%([\w.\-]+)", inside)

    def called(self) -> list[str]:
        found = _CALLED.findall(self.line)
        if branches := re.search(r"branch_computations=\{([^}]*)\}", self.line):
            found += [name.strip().lstrip("%") for name in branches.group(1).split(",")]
        return found


Computations = Mapping[str, list[_Instruction]]


def collectives(text: str) -> dict[str, Collective]:
    """The collectives of a compiled program by kind, those that do not occur left out.

    An asynchronous one is counted where it starts.

    Raises:
      HloError: no entry computation, or a loop whose number of turns is not told.
    """
    counts: dict[str, int] = defaultdict(int)
    sent: dict[str, float] = defaultdict(float)
    for instruction, times, computation, _ in _walk(text):
        kind = instruction.kind.removesuffix("-start")
        if kind not in KINDS:
            continue
        size = _moved(instruction)
        if kind == "all-reduce" and "all-reduce-scatter" in computation:  # a TPU's reduce-scatter is a fusion of both
            kind = "reduce-scatter"
        elif kind == "reduce-scatter":
            size *= group_size(instruction.line)
        n = group_size(instruction.line)
        share = 1.0 if kind == "collective-permute" else (n - 1) / n * (2 if kind == "all-reduce" else 1)
        counts[kind] += times
        sent[kind] += times * share * size
    return {kind: Collective(counts[kind], round(sent[kind])) for kind in KINDS if kind in counts}


def estimated_cycles(text: str) -> int:
    """The compiler's estimates of its fusions (TPU), summed; 0 where it writes none. Collectives are not among them."""
    total = 0
    for instruction, times, computation, body in _walk(text):
        if computation == body and (found := re.search(r'"estimated_cycles":"(\d+)"', instruction.line)):
            total += times * int(found.group(1))
    return total


def group_size(line: str) -> int:
    """Devices that take part in one of a collective's groups; 1 where none are named."""
    if found := re.search(r"replica_groups=\{\{([\d,]*)\}", line):
        return found.group(1).count(",") + 1
    if found := re.search(r"replica_groups=\[\d+,(\d+)\]", line):
        return int(found.group(1))
    if found := re.search(r"replica_groups=mesh\[([^\]]*)\][^{]*\{([^}]*)\}", line):
        sizes = {name: int(n) for name, n in re.findall(r"('[^']+')=(\d+)", found.group(1))}
        return math.prod(sizes[name.strip()] for name in found.group(2).split(","))
    return 1


def _moved(instruction: _Instruction) -> int:
    """Bytes of a collective's result."""
    arrays = [_bytes(kind, dims) for kind, dims in _ARRAY.findall(instruction.result) if dims]
    # A start's result is its operands, its results and scalars; an all-reduce's is its results alone.
    if instruction.kind.endswith("-start") and not instruction.kind.startswith("all-reduce"):
        arrays = arrays[len(arrays) // 2 :]
    return sum(arrays)


def _bytes(kind: str, dims: str) -> int:
    bits = _BITS.get(kind) if kind in _BITS else int(re.findall(r"\d+", kind)[0])
    return math.prod(int(n) for n in dims.split(",")) * int(bits or 0) // 8


def _read(text: str) -> tuple[str, Computations]:
    entry, name = "", ""
    computations: dict[str, list[_Instruction]] = {}
    for line in text.splitlines():
        if head := _COMPUTATION.match(line):
            name = head.group(2)
            computations[name] = []
            entry = name if head.group(1) else entry
        elif name and (found := _INSTRUCTION.match(line)):
            root, own, result, kind = found.groups()
            computations[name].append(_Instruction(own, kind, result, line, bool(root)))
    if not entry:
        raise HloError("the text has no ENTRY computation: it is not a compiled program's `as_text()`")
    return entry, computations


def _walk(text: str) -> Iterator[tuple[_Instruction, int, str, str]]:
    """Every instruction that runs: (it, how often, its computation, the loop's body or entry that it belongs to)."""
    entry, computations = _read(text)

    def visit(name: str, times: int, body: str) -> Iterator[tuple[_Instruction, int, str, str]]:
        for instruction in computations.get(name, ()):
            yield instruction, times, name, body
            called = instruction.called()
            if instruction.kind == "while":
                turns = times * _trips(instruction, computations)
                for inner in called:
                    yield from visit(inner, turns, inner)
            elif instruction.kind in ("fusion", "async-start", "custom-call"):
                for inner in called:
                    if not _goes_on(inner, computations.get(inner, ())):
                        yield from visit(inner, times, body)
            elif instruction.kind in ("call", "conditional"):
                for inner in called:
                    yield from visit(inner, times, inner)

    return visit(entry, 1, entry)


def _goes_on(name: str, instructions: Sequence[_Instruction]) -> bool:
    """Whether a fusion carries on or ends a collective that another one started: a TPU's goes on beside computing, even
    inside the loops that follow."""
    if any('"AsyncCollectiveStart"' in i.line for i in instructions):
        return False
    return "async_collective_fusion" in name or any('"AsyncCollectiveDone"' in i.line for i in instructions)


def _trips(loop: _Instruction, computations: Computations) -> int:
    if found := re.search(r'known_trip_count["\\=:{\s]+n["\\:\s]+(\d+)', loop.line):
        return int(found.group(1))
    parts = dict(re.findall(r"(condition|body)=%?([\w.\-]+)", loop.line))
    condition, body = ({i.name: i for i in computations[parts[name]]} for name in ("condition", "body"))
    try:
        compare = next(i for i in condition.values() if i.is_root and "direction=LT" in i.line)
        counter, bound = (condition[name] for name in compare.operands())
        index = int(re.findall(r"index=(\d+)", counter.line)[0])
        added = body[next(i for i in body.values() if i.is_root).operands()[index]]
        steps = [_constant(body[name]) for name in added.operands() if body[name].kind == "constant"]
        return -(-_constant(bound) // sum(steps))
    except (StopIteration, KeyError, IndexError, ValueError, ZeroDivisionError) as error:
        raise HloError(f"how often this loop turns is not told: {loop.line.strip()[:200]}") from error


def _constant(instruction: _Instruction) -> int:
    return int(re.findall(r" constant\((\d+)\)", instruction.line)[0])
