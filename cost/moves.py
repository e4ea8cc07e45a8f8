"""The collectives of a layout as a scheduler sees them: what each waits for, and which kernels wait for it.

XLA:GPU makes one of several that wait for nothing, or that only the optimizer waits for (`ffjax.ir.merging`), as long
as their results are no larger than a threshold and none waits for another.
"""

from __future__ import annotations

from dataclasses import dataclass

from ffjax.cost.compilers import Compiler
from ffjax.ir.graph import NO_VALUE, Graph
from ffjax.ir.layout import Layout
from ffjax.ir.spec import Spec, shard_count


@dataclass(frozen=True, slots=True, kw_only=True)
class Move:
    """One collective: the values that it sums or reshards."""

    values: tuple[int, ...]
    readers: tuple[tuple[int, int], ...] = ()
    """Of what is resharded each value with each op that reads it so; of a sum none, as all who read it wait."""


@dataclass(slots=True)
class _Group:
    values: list[int]
    readers: list[tuple[int, int]]
    bytes: float
    needed: int


def moves_of(layout: Layout, compiler: Compiler) -> list[Move]:
    """The collectives of a layout, merged as the compiler does."""
    graph = layout.graph
    made: list[_Group] = []
    first_reader = _first_readers(graph)
    open_groups: dict[tuple[object, ...], _Group] = {}
    for op in graph.ops:
        axes = layout.partial_axes(op.id)
        for value in op.results if axes else ():
            entry = graph.values[value]
            home = layout.home(value)
            size = entry.bytes / shard_count(home, layout.mesh)
            key = (axes, home != layout.partial(value), entry.dtype, entry.scope)
            group = open_groups.get(key) if layout.regions.merged_sums[value] else None
            if group is not None and op.id < group.needed and group.bytes + size <= compiler.combined_bytes:
                group.values.append(value)
                group.bytes += size
                group.needed = min(group.needed, first_reader[value])
                continue
            group = _Group([value], [], size, first_reader[value])
            made.append(group)
            if layout.regions.merged_sums[value]:
                open_groups[key] = group
    reads: dict[tuple[int, Spec, int], list[int]] = {}
    for op in graph.ops:
        for index, value in enumerate(op.operands):
            if value == NO_VALUE or graph.values[value].constant or not graph.values[value].shape:
                continue
            spec = layout.operand(op.id, index)
            if spec != layout.home(value):
                reads.setdefault((value, spec, op.scope), []).append(op.id)
    copies: dict[tuple[object, ...], _Group] = {}
    for (value, spec, scope), ops in reads.items():
        way = [hop.step for hop in layout.way(value, spec) if hop.step is not None]
        if not way:
            continue
        merged = layout.regions.merged_copies[value]
        size = graph.values[value].bytes / shard_count(spec, layout.mesh)
        key = (way[0][0], way[0][1], graph.values[value].dtype, scope)
        group = copies.get(key) if merged else None
        readers = [(value, op) for op in ops]
        if group is not None and group.bytes + size <= compiler.combined_bytes:
            group.values.append(value)
            group.readers += readers
            group.bytes += size
            continue
        group = _Group([value], readers, size, 0)
        made.append(group)
        if merged:
            copies[key] = group
    return [Move(values=tuple(g.values), readers=tuple(g.readers)) for g in made]


def _first_readers(graph: Graph) -> list[int]:
    first = [len(graph.ops)] * len(graph.values)
    for op in graph.ops:
        for value in op.operands:
            if value != NO_VALUE:
                first[value] = min(first[value], op.id)
    return first
