"""Bytes that one HLO instruction moves to and from memory.

A fusion reads and writes at its border only. What it reads of an operand is what its results need of it, found by
going backwards through its computation: a slice needs the slice, an elementwise op as many elements as are needed of
its result, a reduction its operand in proportion. An update in place (`dynamic-update-slice`, `scatter`) writes the
update and reads nothing of what it leaves as it is.
"""

from __future__ import annotations

from collections.abc import Mapping

from ffjax.cost.hlo.module import Computation, Instruction, Module
from ffjax.cost.hlo.shapes import Array, arrays, shape_bytes, shape_elements

_SLICES = frozenset({"slice", "dynamic-slice", "gather"})
_UPDATES = {"dynamic-update-slice": 1, "scatter": -1}
"""Which operand holds the update of an array that is changed in place."""
_SAME_MEMORY = frozenset({"bitcast", "reshape"})


def traffic(instruction: Instruction, computation: Computation, module: Module) -> float:
    """Bytes read and written by one run of an instruction that is not free."""
    operands = computation.operands(instruction)
    read = sum(reads(instruction, operands, module))
    if instruction.opcode == "fusion":
        return read + sum(_written(c) for c in module.called(instruction))
    if instruction.opcode == "copy-start":  # its result holds the operand too
        return 2 * read
    if instruction.opcode in _UPDATES:
        return read + shape_bytes(_update(instruction, operands).shape)
    if instruction.opcode == "custom-call":
        return read + shape_bytes(instruction.shape) - _workspace(instruction)
    return read + shape_bytes(instruction.shape)


def reads(instruction: Instruction, operands: list[Instruction], module: Module) -> list[float]:
    """For each operand the bytes that an instruction reads of it; of one that it names twice once."""
    sizes = [shape_bytes(operand.shape) for operand in operands]
    if instruction.opcode == "fusion":
        needs = [needed(called) for called in module.called(instruction)]
        parameters = [called.parameters() for called in module.called(instruction)]
        for i, operand in enumerate(operands):
            share = max(
                (_share(need, own[i]) for need, own in zip(needs, parameters, strict=True) if i in own), default=1
            )
            sizes[i] = share * shape_bytes(operand.shape)
    elif instruction.opcode in _SLICES and sizes:
        sizes[0] = min(sizes[0], shape_bytes(instruction.shape))
    elif instruction.opcode == "dynamic-update-slice":
        sizes[0] = 0.0
    elif instruction.opcode == "scatter":  # adds to what is there: reads as much as it writes
        sizes[0] = shape_bytes(_update(instruction, operands).shape)
    seen: dict[str, float] = {}
    for i, operand in enumerate(operands):
        sizes[i] = max(0.0, sizes[i] - seen.get(operand.name, 0.0))
        seen[operand.name] = seen.get(operand.name, 0.0) + sizes[i]
    return sizes


def needed(computation: Computation) -> dict[str, float]:
    """For each instruction of a fusion's computation the elements of it that the fusion's results need."""
    root = computation.root
    need: dict[str, float] = {root.name: float(shape_elements(root.shape))}
    in_place = {one.name for output in _outputs(computation) if (one := _updated_in_place(output, computation))}
    for instruction in reversed(list(computation)):
        want = need.get(instruction.name, 0.0)
        made = shape_elements(instruction.shape)
        if not want or not made:
            continue
        operands = computation.operands(instruction)
        for i, operand in enumerate(operands):
            size = shape_elements(operand.shape)
            if instruction.opcode in _SLICES and i == 0:
                part = want
            elif instruction.opcode in _UPDATES and i == 0:
                update = shape_elements(_update(instruction, operands).shape)
                kept = 0.0 if instruction.name in in_place else max(want - update, 0.0)
                part = kept + (update if instruction.opcode == "scatter" else 0)
            elif instruction.opcode in _UPDATES or instruction.opcode == "tuple":
                part = size
            else:
                part = min(size, want) if size <= made else size * want / made
            need[operand.name] = min(float(size), need.get(operand.name, 0.0) + part)
    return need


def updated_operands(fusion: Instruction, module: Module) -> dict[int, int]:
    """By index of a fusion's output that is an operand updated in place: the operand's index."""
    found: dict[int, int] = {}
    for computation in module.called(fusion):
        for i, output in enumerate(_outputs(computation)):
            if one := _updated_in_place(output, computation):
                found[i] = int(_memory_of(computation.operands(one)[0], computation).literal)
    return found


def _share(need: Mapping[str, float], parameter: Instruction) -> float:
    return need.get(parameter.name, 0.0) / max(shape_elements(parameter.shape), 1)


def _outputs(computation: Computation) -> list[Instruction]:
    root = computation.root
    return computation.operands(root) if root.opcode == "tuple" else [root]


def _written(computation: Computation) -> float:
    """Bytes that a fusion writes: of an array that it updates in place the update only."""
    return sum(
        shape_bytes((_update(one, computation.operands(one)) if one else output).shape)
        for output in _outputs(computation)
        for one in [_updated_in_place(output, computation)]
    )


def _updated_in_place(output: Instruction, computation: Computation) -> Instruction | None:
    """The update that makes an output of a fusion out of a parameter's own memory; None for other outputs."""
    made = _memory_of(output, computation)
    if made.opcode not in _UPDATES:
        return None
    return made if _memory_of(computation.operands(made)[0], computation).opcode == "parameter" else None


def _memory_of(instruction: Instruction, computation: Computation) -> Instruction:
    while instruction.opcode in _SAME_MEMORY:
        instruction = computation.operands(instruction)[0]
    return instruction


def _update(instruction: Instruction, operands: list[Instruction]) -> Instruction:
    return operands[_UPDATES[instruction.opcode]]


def _workspace(instruction: Instruction) -> float:
    """Scratch memory that a library's call lists as its last result."""
    shape = instruction.shape
    if isinstance(shape, Array) or len(shape) < 2:
        return 0.0
    return next(arrays(shape[-1])).bytes if isinstance(shape[-1], Array) and shape[-1].dtype in ("s8", "u8") else 0.0
