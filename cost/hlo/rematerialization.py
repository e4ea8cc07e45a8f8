"""Arrays that the compiler gathers whole although all who read them need a part only.

XLA's partitioner does so where it knows no direct way from one sharding to another (an "involuntary full
rematerialization"). In the compiled module it shows as an all-gather of which every reader touches a slice.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import dataclass

from ffjax.cost.hlo.collectives import collective_of, parts_of, source_of
from ffjax.cost.hlo.module import Computation, Instruction, Module
from ffjax.cost.hlo.shapes import shape_bytes
from ffjax.cost.hlo.traffic import reads

_NAMES = frozenset({"bitcast", "get-tuple-element", "copy", "reshape", "transpose", "convert"})
"""What gives an array another name, layout or type."""
_WHOLE = 0.75
"""The share of an array from which on reading it counts as reading it whole."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Rematerialization:
    """An array that is gathered whole and of which only parts are read. `bytes` of the whole; 0 where not known."""

    name: str
    bytes: float
    source: str
    op_name: str


def rematerialized(module: Module, planned: Collection[float]) -> list[Rematerialization]:
    """The gathers of a module, of other sizes than the `planned` ones, that nobody reads whole."""
    found = []
    for computation in module.computations.values():
        readers = _readers(computation)
        for instruction in computation:
            collective = collective_of(instruction, module.devices)
            if collective is None or collective.kind != "all_gather":
                continue
            if all(size in planned for _, size in parts_of(instruction, collective, computation, module)):
                continue
            if _read_in_part(instruction, computation, readers, module):
                found.append(
                    Rematerialization(
                        name=instruction.name,
                        bytes=collective.bytes,
                        source=source_of(instruction, computation),
                        op_name=instruction.op_name,
                    )
                )
    return found


def _readers(computation: Computation) -> dict[str, list[Instruction]]:
    readers: dict[str, list[Instruction]] = {}
    for instruction in computation:
        for name in dict.fromkeys(instruction.operands):
            readers.setdefault(name, []).append(instruction)
    return readers


def _read_in_part(
    whole: Instruction, computation: Computation, readers: dict[str, list[Instruction]], module: Module
) -> bool:
    """Whether someone reads `whole`, or what is but another name or layout of it, and nobody reads all of it."""
    some = readers.get(whole.name, [])
    for reader in some:
        if reader.opcode in _NAMES or reader.opcode.endswith("-done"):
            if not _read_in_part(reader, computation, readers, module):
                return False
            continue
        operands = computation.operands(reader)
        read = sum(
            size
            for size, operand in zip(reads(reader, operands, module), operands, strict=True)
            if operand.name == whole.name
        )
        if read > _WHOLE * shape_bytes(whole.shape):
            return False
    return bool(some)


def logged_rematerializations(log: str) -> list[Rematerialization]:
    """XLA's own warnings of full rematerialization, out of what it wrote to stderr."""
    found = []
    for line in dict.fromkeys(log.splitlines()):
        if "nvoluntary full rematerialization" not in line:
            continue
        name = re.search(r"for HLO operation:? %?([\w.\-]+)", line)
        op_name = re.search(r'op_name="([^"]*)"', line)
        place = re.search(r'source_file="([^"]*)"(?:.*?source_line=(\d+))?', line)
        found.append(
            Rematerialization(
                name=name[1] if name else "unknown",
                bytes=0.0,
                source=":".join(part for part in place.groups() if part) if place else "",
                op_name=op_name[1] if op_name else "",
            )
        )
    return found
