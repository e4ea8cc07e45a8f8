"""What a compiled program communicates, how often its computations run, and what memory it needs.

A collective is reported with the convention of `Collective`, so that a plan's prediction and the compiler's result
compare directly.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ffjax.cost.hlo.groups import Groups, parse_groups, parse_pairs
from ffjax.cost.hlo.module import Computation, Instruction, Module
from ffjax.cost.hlo.shapes import Array, shape_bytes
from ffjax.cost.hlo.source import HloSource, read_module
from ffjax.errors import HloError
from ffjax.ir.device_groups import axes_of_groups, axes_of_pairs
from ffjax.ir.spec import Collective, CollectiveKind, CountedCollective, MeshShape

if TYPE_CHECKING:
    import jax

_KINDS: dict[str, CollectiveKind] = {
    "all-reduce": "all_reduce",
    "all-gather": "all_gather",
    "reduce-scatter": "reduce_scatter",
    "all-to-all": "all_to_all",
    "ragged-all-to-all": "all_to_all",
    "collective-permute": "collective_permute",
    "collective-broadcast": "collective_permute",  # each device but one receives its bytes once
}
_CALLERS = frozenset(["call", "fusion", "conditional", "async-start", "custom-call"])


@dataclass(frozen=True, slots=True, kw_only=True)
class HloCollective:
    """A collective, its bytes as `Collective` counts them; the groups of a permute are (source, target) pairs."""

    kind: CollectiveKind
    bytes: float
    groups: Groups

    @property
    def paired(self) -> bool:
        return self.kind == "collective_permute"

    def axes(self, mesh: MeshShape | None) -> tuple[str, ...]:
        """The mesh axes that it runs over; none, where there is no mesh or its groups are no product of axes."""
        if mesh is None:
            return ()
        return axes_of_pairs(self.groups, mesh) if self.paired else axes_of_groups(self.groups, mesh)


def collectives_of(source: HloSource, mesh: MeshShape | None = None, *, split: bool = False) -> list[CountedCollective]:
    """The collectives of a compiled program, loops multiplied out, in the order of the text.

    Args:
      source: a compiled program, its HLO text, a serialized proto, or a `Module`.
      mesh: names the axes that each collective runs over; without it, or where the devices of a group are no
        product of mesh axes, `axes` is empty.
      split: report a collective that the compiler merged out of several as those several, each with its own source.

    A loop whose trip count the compiler does not know counts once, and so does each branch of a conditional.
    """
    module = read_module(source)
    devices = mesh.devices if mesh and module.devices == 1 else module.devices
    return [
        CountedCollective(
            collective=Collective(one.kind, one.axes(mesh), size),
            count=count,
            source=source_of(asker, computation),
            op_name=asker.op_name,
        )
        for computation, count in reached(module)
        for instruction in computation
        if (one := collective_of(instruction, devices)) is not None
        for asker, size in (parts_of(instruction, one, computation, module) if split else [(instruction, one.bytes)])
    ]


def collective_of(instruction: Instruction, devices: int) -> HloCollective | None:
    """The collective that an instruction is or starts; None for other instructions, those that end one among them."""
    opcode = instruction.opcode.removesuffix("-start")
    kind = _KINDS.get(opcode)
    if kind is None:
        return None
    shape = instruction.shape
    operand, result = 0.0, shape_bytes(shape)
    tupled = not isinstance(shape, Array) and len(shape) > 1 and instruction.opcode.endswith("-start")
    if tupled and not isinstance(shape, Array) and (kind != "all_reduce" or not isinstance(shape[0], Array)):
        # An asynchronous start holds (operands, results, context...); a plain all-reduce-start only the results.
        operand, result = shape_bytes(shape[0]), shape_bytes(shape[1])
    try:
        if kind == "collective_permute" and "source_target_pairs" in instruction.attributes:
            groups = parse_pairs(instruction.attributes["source_target_pairs"])
        else:
            groups = parse_groups(instruction.attributes.get("replica_groups", ""), devices)
    except ValueError as error:
        raise HloError(f"{instruction.opcode} {instruction.name!r}: {error}; pass the text as printed") from error
    if kind == "collective_permute" and opcode == "collective-broadcast":
        groups = tuple((group[0], other) for group in groups for other in group[1:])
    if kind == "reduce_scatter":
        result = operand or result * len(groups[0])
    return HloCollective(kind=kind, bytes=result, groups=groups)


def parts_of(
    instruction: Instruction, collective: HloCollective, computation: Computation, module: Module
) -> list[tuple[Instruction, float]]:
    """Who asked for a collective, and how much of its bytes is theirs: one part, unless the compiler merged several.

    Compilers merge by giving one collective several operands, or one that is the concatenation of several.
    """
    asked: list[Instruction] = []
    for operand in computation.operands(instruction):
        joins = operand.opcode == "concatenate" or any(
            called.root.opcode == "concatenate" and all(o.opcode == "parameter" for o in called.operands(called.root))
            for called in module.called(operand)
        )
        joined = computation.operands(operand) if joins else []
        whole = sum(shape_bytes(one.shape) for one in joined) == shape_bytes(operand.shape)
        asked += joined if joined and whole else [operand]
    total = sum(shape_bytes(one.shape) for one in asked)
    if len(asked) < 2 or not total:
        return [(instruction, collective.bytes)]
    return [(one, collective.bytes * shape_bytes(one.shape) / total) for one in asked]


def source_of(instruction: Instruction, computation: Computation) -> str:
    """`file:line` of an instruction, else its op's name, else those of what it reads, which a merged one stands for."""
    level, seen = [instruction], {instruction.name}
    while level:
        for one in level:
            if one.source or one.op_name:
                return one.source or one.op_name
        level = [made for one in level for made in computation.operands(one) if made.name not in seen]
        level = [one for one in level if one.opcode != "parameter"]
        seen.update(one.name for one in level)
    return ""


def reached(module: Module) -> Iterator[tuple[Computation, float]]:
    """Each computation that runs, with how often, once for every place that runs it."""
    stack = [(module.entry, 1.0)]
    while stack:
        name, count = stack.pop()
        computation = module.computations[name]
        yield computation, count
        inner: list[tuple[str, float]] = []
        for instruction in computation:
            if instruction.opcode == "while":
                trips = trip_count(instruction, module)
                inner.append((_named(instruction, "body"), count * (1.0 if trips is None else trips)))
            elif instruction.opcode in _CALLERS:
                inner += [(called.name, count) for called in module.called(instruction)]
        stack += reversed(inner)


def trip_count(loop: Instruction, module: Module) -> float | None:
    """How often a `while` runs, from the compiler's own note or from its condition; None where neither tells."""
    match loop.backend_config:
        case {"known_trip_count": {"n": str() | int() as n}}:
            return float(n)
    # A counted loop from 0: its condition compares the counter with its only constant.
    condition = module.computations.get(_named(loop, "condition"))
    if condition is None:
        return None
    scalars = [i for i in condition if i.opcode == "constant" and isinstance(i.shape, Array) and not i.shape.dims]
    compared = any(i.attributes.get("direction") == "LT" or i.opcode == "fusion" for i in condition)
    return float(scalars[0].literal) if len(scalars) == 1 and compared and scalars[0].literal.isdigit() else None


def _named(instruction: Instruction, attribute: str) -> str:
    return instruction.attributes.get(attribute, "").lstrip("%")


def peak_bytes(compiled: jax.stages.Compiled) -> int:
    """The memory that one device needs to run `compiled`: arguments, results and temporaries, shared ones once."""
    stats = compiled.memory_analysis()
    if stats is None:
        raise HloError("the compiled program has no memory analysis; compile it for cpu, gpu or tpu")
    return int(
        stats.argument_size_in_bytes + stats.output_size_in_bytes + stats.temp_size_in_bytes - stats.alias_size_in_bytes
    )
