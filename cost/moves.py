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
    scatters: bool = False
    """Whether it leaves each device a piece of its sums only."""
    readers: tuple[tuple[int, int], ...] = ()
    """Of what is resharded each value with each op that reads it so; of a sum none, as all who read it wait."""


@dataclass(slots=True)
class _Group:
    values: list[int]
    readers: list[tuple[int, int]]
    bytes: float
    scatters: bool


def moves_of(layout: Layout, compiler: Compiler) -> list[Move]:
    """The collectives of a layout, merged as the compiler does."""
    graph, regions = layout.graph, layout.regions
    made: list[_Group] = []
    groups: dict[tuple[object, ...], _Group] = {}

    def add(
        key: tuple[object, ...], value: int, readers: list[tuple[int, int]], pieces: int, *, scatters: bool = False
    ) -> None:
        size = graph.values[value].bytes / pieces
        key = (*key, bool(readers), scatters, graph.values[value].dtype, _body(graph, graph.values[value].scope))
        group = groups.get(key)
        if group is None or group.bytes + size > compiler.combined_bytes:
            group = groups[key] = _Group([], [], 0.0, scatters)
            made.append(group)
        group.values.append(value)
        group.readers += readers
        group.bytes += size

    # Collectives of one level, how many come before them at most, do not wait for each other.
    level = [0] * len(graph.values)
    merged_level = [0] * len(graph.values)
    sums: list[tuple[int, int, bool, int]] = []
    rank = _ranks(graph)
    read: dict[tuple[int, Spec, int], tuple[tuple[int, int], list[int]]] = {}
    for op in graph.ops:
        above, merged_above = 0, 0
        for index, value in enumerate(op.operands):
            if value == NO_VALUE:
                continue
            above, merged_above = max(above, level[value]), max(merged_above, merged_level[value])
            if graph.values[value].constant or not graph.values[value].shape:
                continue
            spec = layout.operand(op.id, index)
            if spec != layout.home(value) and any(hop.step is not None for hop in layout.way(value, spec)):
                at, ops = read.setdefault((value, spec, op.scope), ((merged_level[value], level[value]), []))
                ops.append(op.id)
                above = max(above, at[1] + 1)
        axes = layout.partial_axes(op.id)
        for value in op.results:
            level[value], merged_level[value] = above, merged_above
            if axes:
                merged = regions.merged_sums[value]
                sums.append((rank[value] if merged else 0, value, merged, merged_above if merged else above))
                merged_level[value] += merged
                level[value] += 1
    reads = layout.reads()
    # The compiler walks from the first result back to what it is made of, then from the second.
    for _, value, merged, before in sorted(sums):
        axes = layout.partial_axes(graph.values[value].producer)
        scatters = layout.scatters(value, axes, reads.get(value, set()))
        pieces = shard_count(layout.partial(value), layout.mesh) * (layout.mesh.size(axes) if scatters else 1)
        add((axes, merged, before), value, [], pieces, scatters=scatters)
    for (value, spec, _), (at, ops) in read.items():
        shards = shard_count(spec, layout.mesh)
        first = next(hop.step for hop in layout.way(value, spec) if hop.step is not None)
        add((*first[:2], regions.merged_copies[value], at), value, [(value, op) for op in ops], shards)
    return [Move(values=tuple(g.values), readers=tuple(g.readers), scatters=g.scatters) for g in made]


def _ranks(graph: Graph) -> list[int]:
    """For each value the first result of the program that depends on it."""
    rank = [len(graph.outputs)] * len(graph.values)
    place = {op: position for position, op in enumerate(graph.outputs)}
    for op in reversed(graph.ops):
        first = min([place.get(op.id, len(graph.outputs)), *(rank[v] for v in op.results)])
        for value in op.operands:
            if value != NO_VALUE:
                rank[value] = min(rank[value], first)
    return rank


def _body(graph: Graph, scope: int) -> int:
    """The loop body that a scope is part of: what is recomputed is part of what it stands in."""
    while graph.scopes[scope].kind == "remat":
        scope = graph.scopes[scope].parent
    return scope
