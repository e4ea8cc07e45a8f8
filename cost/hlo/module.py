"""A compiled program as data: scheduled HLO text -> `Module`, `Computation`, `Instruction`.

Text, not protos: it is what every backend and every stored dump has. Instructions stay in the order of the text,
which in a scheduled module is the order in which they run.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import TypeAlias

from ffjax.cost.hlo.shapes import Shape, parse_shape
from ffjax.errors import HloError

Json: TypeAlias = "bool | int | float | str | list[Json] | dict[str, Json] | None"


@dataclass(frozen=True, slots=True, kw_only=True)
class Instruction:
    """One instruction. `source` is `file:line` of the innermost line that made it, where the text has one.

    `attributes` are as printed, by name; `literal` is what a parameter or a constant has in its parentheses.
    """

    name: str
    opcode: str
    shape: Shape
    operands: tuple[str, ...]
    attributes: Mapping[str, str]
    literal: str = ""
    op_name: str = ""
    source: str = ""
    is_root: bool = False

    @property
    def called(self) -> tuple[str, ...]:
        """The computations that it names: a body, a condition, branches, a fusion's, a reduction's."""
        found: list[str] = []
        for key, value in self.attributes.items():
            if key in _CALLS:
                found += [name.strip().lstrip("%") for name in value.strip("{}").split(",") if name.strip()]
        return tuple(found)

    def numbers(self, attribute: str) -> tuple[int, ...]:
        """An attribute that is a list of whole numbers, such as `dimensions={0,1}`; empty where it is missing."""
        return tuple(int(n) for n in re.findall(r"-?\d+", self.attributes.get(attribute, "")))

    @property
    def backend_config(self) -> dict[str, Json]:
        """What the backend wrote down for itself; empty where that is no JSON object."""
        text = self.attributes.get("backend_config", "")
        if text.startswith('"'):  # older texts quote it
            text = text[1:-1].replace('\\"', '"').replace("\\\\", "\\")
        try:
            config = json.loads(text) if text else {}
        except ValueError:
            return {}
        return config if isinstance(config, dict) else {}


@dataclass(frozen=True, slots=True, kw_only=True)
class Computation:
    """Instructions by name, in order."""

    name: str
    instructions: Mapping[str, Instruction]

    @property
    def root(self) -> Instruction:
        """What it returns; the last instruction where none is marked."""
        instructions = list(self)
        return next((i for i in instructions if i.is_root), instructions[-1])

    def __iter__(self) -> Iterator[Instruction]:
        return iter(self.instructions.values())

    def parameters(self) -> dict[int, Instruction]:
        return {int(i.literal): i for i in self if i.opcode == "parameter"}

    def operands(self, instruction: Instruction) -> list[Instruction]:
        """The instructions that make its operands, without names that this computation lacks."""
        return [self.instructions[name] for name in instruction.operands if name in self.instructions]


@dataclass(frozen=True, slots=True, kw_only=True)
class Module:
    """A whole program. `devices` is how many run it together: partitions times replicas."""

    name: str
    entry: str
    computations: Mapping[str, Computation]
    devices: int = 1
    scheduled: bool = False
    aliases: Mapping[tuple[int, ...], int] = field(default_factory=dict)
    """By index of a result, in tuples: the parameter whose memory it takes over, which was donated."""

    def called(self, instruction: Instruction) -> list[Computation]:
        return [self.computations[name] for name in instruction.called if name in self.computations]


_CALLS = frozenset(
    {
        "body",
        "branch_computations",
        "called_computations",
        "calls",
        "comparator",
        "condition",
        "false_computation",
        "scatter",
        "select",
        "to_apply",
        "true_computation",
    }
)
_COMPUTATION = re.compile(r"^(ENTRY\s+)?%?([\w.\-]+)\s(?:.*\s)?\{\s*$")
_INSTRUCTION = re.compile(r"^\s+(ROOT\s+)?%?([^\s=]+) = (\(|\S+\s*)")
_OPCODE = re.compile(r"\s*([a-z][\w\-]*)\(")
_COMMENT = re.compile(r"/\*index=\d+\*/")
_BRACKETS = re.compile(r'"(?:[^"\\]|\\.)*"|[()\[\]{}]')
_TOP_LEVEL = re.compile(r'"(?:[^"\\]|\\.)*"|[()\[\]{},]')
_ALIAS = re.compile(r"\{([\d,\s]*)\}:\s*\((\d+),")
_TABLES = ("FileNames", "FunctionNames", "FileLocations", "StackFrames")


def parse_module(text: str) -> Module:
    """Reads the text of one module; raises HloError that quotes what is no HLO.

    >>> module = parse_module('''HloModule m, is_scheduled=true
    ...
    ... ENTRY %main (p: f32[4]) -> f32[4] {
    ...   %p = f32[4]{0} parameter(0)
    ...   ROOT %neg = f32[4]{0} negate(%p)
    ... }
    ... ''')
    >>> [instruction.opcode for instruction in module.computations[module.entry]]
    ['parameter', 'negate']
    """
    lines = text.splitlines()
    header = next((line for line in lines if line.startswith("HloModule")), None)
    if header is None:
        raise HloError(
            f"this is no HLO text: {text.strip()[:80]!r}; no line of it starts with HloModule: {_remedy(text)}"
        )
    sources = _Sources()
    computations: dict[str, Computation] = {}
    table, entry, name = "", "", ""
    body: dict[str, Instruction] | None = None
    for number, line in enumerate(lines, 1):
        if body is not None:
            if line.startswith("}"):
                if not body:
                    raise HloError(f"HLO text, line {number}: the computation {name!r} is empty; pass the whole text")
                computations[name] = Computation(name=name, instructions=body)
                body = None
            elif line.strip():
                instruction = _instruction(line, number, sources)
                body[instruction.name] = instruction
        elif line in _TABLES:
            table = line
        elif line[:1].isdigit():
            sources.add(table, line)
        elif (match := _COMPUTATION.match(line)) and not line.startswith("HloModule"):
            name, body = match[2], {}
            entry = name if match[1] else entry
    if body is not None:
        raise HloError(f"HLO text ends inside the computation {name!r}; it was cut off: pass the whole text")
    if not entry:
        raise HloError(f"no ENTRY computation in HLO text that starts {text[:80]!r}; pass the whole module's text")
    return Module(
        name=re.split(r"[\s,]", header, maxsplit=2)[1],
        entry=entry,
        computations=computations,
        devices=math.prod(int(n) for n in re.findall(r"\b(?:num_partitions|replica_count)=(\d+)", header)),
        scheduled="is_scheduled=true" in header,
        aliases={tuple(map(int, re.findall(r"\d+", index))): int(n) for index, n in _ALIAS.findall(header)},
    )


def _remedy(text: str) -> str:
    if re.match(r"\s*(#loc|module\s*[@{]|builtin\.module)", text):
        return "it is an MLIR module; compile it first: lowered.compile().as_text()"
    if re.match(r"\s*\{\s*lambda", text):
        return "it is a jaxpr; compile it first: jax.jit(f).lower(*args).compile().as_text()"
    return "pass compiled.as_text(), or a dump"


@dataclass(slots=True)
class _Sources:
    """The tables that newer texts have at their top: files, places in them, and frames of a stack."""

    files: dict[str, str] = field(default_factory=dict)
    places: dict[str, str] = field(default_factory=dict)
    frames: dict[str, str] = field(default_factory=dict)

    def add(self, table: str, line: str) -> None:
        if table == "FileNames" and (match := re.match(r'(\d+) "(.*)"', line)):
            self.files[match[1]] = match[2]
        elif table == "FileLocations" and (match := re.match(r"(\d+) \{file_name_id=(\d+).*?\bline=(\d+)", line)):
            self.places[match[1]] = f"{self.files.get(match[2], '')}:{match[3]}"
        elif table == "StackFrames" and (match := re.match(r"(\d+) \{file_location_id=(\d+)", line)):
            self.frames[match[1]] = self.places.get(match[2], "")

    def of(self, metadata: str) -> str:
        if match := re.search(r'source_file="([^"]*)"(?:.*?source_line=(\d+))?', metadata):
            return f"{match[1]}:{match[2]}" if match[2] else match[1]
        match = re.search(r"stack_frame_id=(\d+)", metadata)
        return self.frames.get(match[1], "") if match else ""


def _instruction(line: str, number: int, sources: _Sources) -> Instruction:
    text = _COMMENT.sub("", line) if "/*" in line else line
    match = _INSTRUCTION.match(text)
    if match is None:
        raise HloError(f"HLO text, line {number} is no instruction: {line.strip()[:80]!r}; pass the text as printed")
    tupled = match[3] == "("
    at = _closing(text, match.start(3)) + 1 if tupled else match.end(3)
    opcode = _OPCODE.match(text, at)
    try:
        shape = parse_shape(text[match.start(3) : at])
    except ValueError as error:
        raise HloError(f"HLO text, line {number}: {error}; pass the text as printed") from error
    if opcode is None:
        raise HloError(f"HLO text, line {number} has no opcode: {line.strip()[:80]!r}; pass the text as printed")
    end = _closing(text, opcode.end() - 1)
    inside = text[opcode.end() : end]
    attributes = dict(_attributes(text[end + 1 :]))
    metadata = attributes.pop("metadata", "")
    op_name = re.search(r'op_name="([^"]*)"', metadata)
    valued = opcode[1] in ("parameter", "constant", "iota")
    return Instruction(
        name=match[2],
        opcode=opcode[1],
        shape=shape,
        # Older texts print an operand's shape before its name.
        operands=() if valued else tuple(part.split()[-1].lstrip("%") for part in _split(inside) if part.strip()),
        attributes=attributes,
        literal=inside if valued else "",
        op_name=op_name[1] if op_name else "",
        source=sources.of(metadata) if metadata else "",
        is_root=match[1] is not None,
    )


def _closing(text: str, opening: int) -> int:
    """Where the bracket at `opening` is closed; the end of the text if it is not."""
    depth = 0
    for match in _BRACKETS.finditer(text, opening):
        token = match[0]
        if token in "([{":
            depth += 1
        elif token in ")]}":
            depth -= 1
            if depth == 0:
                return match.start()
    return len(text)


def _split(text: str) -> Iterator[str]:
    """Parts between commas that are in no brackets."""
    depth = start = 0
    for match in _TOP_LEVEL.finditer(text):
        token = match[0]
        if token in "([{":
            depth += 1
        elif token in ")]}":
            depth -= 1
        elif token == "," and depth == 0:
            yield text[start : match.start()]
            start = match.end()
    yield text[start:]


def _attributes(text: str) -> Iterator[tuple[str, str]]:
    waiting: tuple[str, str] | None = None
    for part in _split(text):
        key, equals, value = part.strip().partition("=")
        if not equals:
            continue
        if key == "device_ids" and waiting is not None:
            # The one value with a comma of its own: replica_groups=mesh['x'=8], device_ids=(...) {'x'}
            waiting = (waiting[0], f"{waiting[1]}, {key}={value}")
            continue
        if waiting is not None:
            yield waiting
        waiting = (key, value)
    if waiting is not None:
        yield waiting
