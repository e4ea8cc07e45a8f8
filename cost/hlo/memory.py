"""Bytes that one device holds while each instruction of a scheduled module runs: liveness of buffers.

A buffer lives from the instruction that makes it to the last that reads it. Arguments and results live in memory of
their own: an argument throughout, a result from when it is made, at no cost where it takes over a donated argument.
Tuples, bitcasts, loops and updates in place name buffers and make none; a loop adds what its body holds besides the
loop's state. An elementwise kernel writes over an operand that it is the last to read. What the compiler's allocator
loses to fragments, and its scratch memory of libraries, are left out.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TypeAlias

from ffjax.cost.hlo.module import Computation, Instruction, Module
from ffjax.cost.hlo.shapes import Array, Shape
from ffjax.cost.hlo.traffic import updated_operands

Tree: TypeAlias = "int | tuple[Tree, ...]"
"""The buffers of a value, by index, in the shape of its tuple."""

_SAME = frozenset({"bitcast", "opt-barrier", "reshape", "while", "add-dependency", "domain"})
_CALLERS = frozenset({"while", "conditional", "call", "async-start"})
_IN_PLACE = frozenset({"dynamic-update-slice", "scatter"})
_KEEPS_OPERANDS = frozenset({"dot", "convolution", "custom-call", "gather", "sort", "transpose", "reduce", "pad"})
_FOREIGN = -1
"""A buffer that is counted elsewhere: a caller's, a constant's, a donated argument's."""


def live_bytes(module: Module) -> dict[str, float]:
    """By name of each instruction of the entry: the bytes that are live while it runs, loops at their peak."""
    entry = module.computations[module.entry]
    life = _Life(module=module, computation=entry, top=True)
    return dict(zip(entry.instructions, life.over_time(), strict=True))


@dataclass(slots=True, kw_only=True)
class _Life:
    """The buffers of one computation. A body's parameters are its caller's."""

    module: Module
    computation: Computation
    top: bool = False
    sizes: list[float] = field(default_factory=list)
    born: list[int] = field(default_factory=list)
    dies: list[int] = field(default_factory=list)
    trees: dict[str, Tree] = field(default_factory=dict)

    def over_time(self) -> list[float]:
        instructions = list(self.computation)
        inside = []
        for at, instruction in enumerate(instructions):
            operands = [self.trees.get(name, _FOREIGN) for name in instruction.operands]
            for buffer in _flat(tuple(operands)):
                self.dies[buffer] = max(self.dies[buffer], at)
            self.trees[instruction.name] = self.result(instruction, operands, at)
            bodies = self.module.called(instruction) if instruction.opcode in _CALLERS else []
            inside.append(max((max(_Life(module=self.module, computation=b).over_time()) for b in bodies), default=0.0))
        end = len(instructions)
        root = self.trees[self.computation.root.name]
        for buffer in _flat(root):
            self.dies[buffer] = end
        if self.top:
            self.keep_arguments(end)
            self.overwrite_donated(root)
        self.share(instructions)
        totals = [0.0] * (end + 2)
        for size, born, dies in zip(self.sizes, self.born, self.dies, strict=True):
            totals[born] += size
            totals[max(born, dies) + 1] -= size
        for at in range(1, len(totals)):
            totals[at] += totals[at - 1]
        return [total + own for total, own in zip(totals, inside, strict=False)]

    def result(self, instruction: Instruction, operands: list[Tree], at: int) -> Tree:
        opcode = instruction.opcode
        if opcode == "constant" or (opcode == "parameter" and not self.top):
            return _foreign(instruction.shape)
        if opcode == "tuple":
            return tuple(operands)
        if opcode == "get-tuple-element" and operands and isinstance(operands[0], tuple):
            return operands[0][instruction.numbers("index")[0]]
        if operands and (opcode in _SAME or opcode in _IN_PLACE):
            return operands[0]
        if opcode.endswith("-done") and operands:
            return _done(operands[0], opcode)
        if opcode.endswith("-start") and not isinstance(instruction.shape, Array) and opcode != "all-reduce-start":
            # (operands, results, context...); a copy has its result first.
            made = 0 if opcode == "copy-start" else 1
            return tuple(
                self.make(part, at) if i == made else _foreign(part) for i, part in enumerate(instruction.shape)
            )
        updated = updated_operands(instruction, self.module) if opcode == "fusion" else {}
        if not updated:
            return self.make(instruction.shape, at)
        if isinstance(instruction.shape, Array):
            return operands[updated[0]]
        return tuple(
            operands[updated[i]] if i in updated else self.make(p, at) for i, p in enumerate(instruction.shape)
        )

    def make(self, shape: Shape, at: int) -> Tree:
        if not isinstance(shape, Array):
            return tuple(self.make(part, at) for part in shape)
        self.sizes.append(shape.bytes)
        self.born.append(at)
        self.dies.append(at)
        return len(self.sizes) - 1

    def keep_arguments(self, end: int) -> None:
        for parameter in self.computation.parameters().values():
            for buffer in _flat(self.trees[parameter.name]):
                self.born[buffer], self.dies[buffer] = 0, end

    def overwrite_donated(self, root: Tree) -> None:
        arguments = {b for p in self.computation.parameters().values() for b in _flat(self.trees[p.name])}
        for index in self.module.aliases:
            tree = root
            for i in index:
                tree = tree[i] if isinstance(tree, tuple) else tree
            for buffer in set(_flat(tree)) - arguments:
                self.sizes[buffer] = 0.0

    def share(self, instructions: list[Instruction]) -> None:
        """Elementwise kernels take over the memory of an operand of their size that dies with them."""
        for at, instruction in enumerate(instructions):
            if instruction.opcode in _KEEPS_OPERANDS or instruction.attributes.get("kind") not in (None, "kLoop"):
                continue
            fresh = [b for b in _flat(self.trees[instruction.name]) if self.born[b] == at and self.sizes[b]]
            dying = [
                b
                for name in dict.fromkeys(instruction.operands)
                for b in _flat(self.trees.get(name, ()))
                if self.dies[b] == at and self.born[b] < at
            ]
            for buffer in fresh:
                old = next((b for b in dying if math.isclose(self.sizes[b], self.sizes[buffer])), None)
                if old is not None:
                    dying.remove(old)
                    self.dies[old] = at - 1


def _flat(tree: Tree) -> list[int]:
    if isinstance(tree, tuple):
        return [buffer for part in tree for buffer in _flat(part)]
    return [] if tree == _FOREIGN else [tree]


def _foreign(shape: Shape) -> Tree:
    return _FOREIGN if isinstance(shape, Array) else tuple(_foreign(part) for part in shape)


def _done(started: Tree, opcode: str) -> Tree:
    if not isinstance(started, tuple) or opcode == "all-reduce-done":
        return started
    return started[0 if opcode == "copy-done" or len(started) == 1 else 1]
