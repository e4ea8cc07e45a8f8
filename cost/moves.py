"""The collectives of a layout as a scheduler sees them: what each waits for, and which kernels wait for it.

A compiler makes one of several (`xla/service/collective_combiner_utils.h`): gathers first, then all-reduces, then
reduce-scatters. From each that is left, in the order in which the program's results need them, it takes what is alike
(kind, devices, for sums the type), depends on none that it has taken, and fits in with them under a threshold.
What one of them waits for all wait for then, which holds for the combinations after it. XLA:GPU combines gathers of
weights and sums for the optimizer (`ffjax.ir.merging`) only with each other, XLA:CPU all sums and no gathers.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

from ffjax.cost.compilers import Compiler
from ffjax.ir.graph import NO_VALUE, Graph
from ffjax.ir.layout import Layout
from ffjax.ir.spec import Spec, shard_count

_GATHER, _REDUCE, _SCATTER = range(3)


@dataclass(frozen=True, slots=True, kw_only=True)
class Move:
    """One collective: the values that it sums or reshards."""

    values: tuple[int, ...]
    scatters: bool = False
    """Whether it leaves each device a piece of its sums only."""
    readers: tuple[tuple[int, int], ...] = ()
    """Of what is resharded each value with each op that reads it so; of a sum none, as all who read it wait."""


@dataclass(slots=True, kw_only=True)
class _Collective:
    """One collective before any are combined."""

    move: Move
    place: tuple[int, int]
    """The first result that depends on it, and where it is in the program: they are looked at in this order."""
    key: tuple[int, Hashable] | None
    """What is alike in those that can be combined; None for those that cannot."""
    bytes: float
    waits_for: int
    """The others that it depends on, a bit for each."""


def moves_of(layout: Layout, compiler: Compiler) -> list[Move]:
    """The collectives of a layout, combined as the compiler does."""
    found = _collectives(layout, compiler)
    threshold = math.inf if compiler.combines_all_sums else compiler.combined_bytes
    order = sorted(range(len(found)), key=lambda i: found[i].place)
    alike: dict[tuple[int, Hashable], list[int]] = {}
    for index in order:
        if (key := found[index].key) is not None and found[index].bytes <= threshold:
            alike.setdefault(key, []).append(index)
    group_of = list(range(len(found)))
    for key in sorted(alike, key=lambda k: k[0]):
        left = alike[key]
        while left:
            group = _combined(found, left, threshold)
            for index in group:
                group_of[index] = group[0]
            left = [i for i in left if i not in set(group)]
    groups: dict[int, list[Move]] = {}
    for index in order:
        groups.setdefault(group_of[index], []).append(found[index].move)
    return [
        dataclasses.replace(
            group[0],
            values=tuple(v for move in group for v in move.values),
            readers=tuple(r for move in group for r in move.readers),
        )
        for group in groups.values()
    ]


def _combined(found: list[_Collective], left: Sequence[int], threshold: float) -> list[int]:
    """Those that are combined with the first; what depends on one of them then waits for all that they wait for."""
    group: list[int] = []
    members, above, size = 0, 0, 0.0
    for index in left:
        entry = found[index]
        if size + entry.bytes > threshold:
            break
        if entry.waits_for & members or above >> index & 1:
            continue
        group.append(index)
        members |= 1 << index
        above |= entry.waits_for
        size += entry.bytes
    if len(group) > 1:
        for entry in found:
            if entry.waits_for & members:
                entry.waits_for |= above | members
        for index in group:
            found[index].waits_for = above
    return group


def _collectives(layout: Layout, compiler: Compiler) -> list[_Collective]:
    """Every collective of a layout, alone."""
    graph = layout.graph
    rank = _ranks(graph)
    reads = layout.reads()
    sums_unread = layout.regions.merged_sums if compiler.combines_apart else [False] * len(graph.values)
    ready = layout.regions.merged_copies if compiler.combines_apart else [False] * len(graph.values)
    found: list[_Collective] = []
    waits_for = [0] * len(graph.values)
    copies: dict[tuple[int, Spec, int], int] = {}
    readers: dict[int, list[tuple[int, int]]] = {}
    crossed = _crossed(graph)
    entered = [0] * len(graph.scopes)
    for op in graph.ops:
        above = 0
        needed = min((rank[v] for v in op.results), default=len(graph.outputs))
        for index, value in enumerate(op.operands):
            if value == NO_VALUE:
                continue
            above |= waits_for[value]
            if graph.values[value].constant or not graph.values[value].shape:
                continue
            spec = layout.operand(op.id, index)
            if spec == layout.home(value):
                continue
            at = copies.get((value, spec, op.scope))
            if at is None:
                step = next((hop.step for hop in layout.way(value, spec) if hop.step is not None), None)
                if step is None:
                    continue
                at = copies[value, spec, op.scope] = len(found)
                body = _body(graph, op.scope)  # of a branch, which reshards what it reads itself
                combines = compiler.combines_gathers and step[0] == "all_gather"
                readers[at] = []
                found.append(
                    _Collective(
                        move=Move(values=(value,)),
                        place=(needed, op.id),
                        key=(_GATHER, (step[1], body, ready[value])) if combines else None,
                        bytes=graph.values[value].bytes / shard_count(spec, layout.mesh),
                        waits_for=waits_for[value],
                    )
                )
            found[at].place = min(found[at].place, (needed, op.id))
            readers[at].append((value, op.id))
            above |= found[at].waits_for | 1 << at
        if op.id in crossed:
            entered[crossed[op.id]] |= above
            above = entered[crossed[op.id]]
        axes = layout.partial_axes(op.id)
        for value in op.results:
            waits_for[value] = above
            if not axes:
                continue
            scatters = layout.scatters(value, axes, reads.get(value, set()))
            apart = scatters and not compiler.slices_reductions
            pieces = shard_count(layout.partial(value), layout.mesh) * (layout.mesh.size(axes) if apart else 1)
            kind = _SCATTER if apart else _REDUCE
            entry = graph.values[value]
            waits_for[value] |= 1 << len(found)
            found.append(
                _Collective(
                    move=Move(values=(value,), scatters=scatters),
                    place=(rank[value], op.id),
                    key=(kind, (axes, _adds(op.kind), entry.dtype, _body(graph, entry.scope), sums_unread[value])),
                    bytes=entry.bytes / pieces,
                    waits_for=above,
                )
            )
    for at, who in readers.items():
        found[at].move = dataclasses.replace(found[at].move, readers=tuple(who))
    return found


def _crossed(graph: Graph) -> dict[int, int]:
    """For what enters or leaves a loop or a branch its equation's first body.

    It runs as one: what leaves waits for all that enters, also for what it is not computed from.
    """
    return {
        border: scopes[0]
        for scopes in graph.scopes_of.values()
        for scope in scopes
        if graph.scopes[scope].kind != "remat"
        for border in (*graph.scopes[scope].enter, *graph.scopes[scope].exit)
    }


def _adds(kind: str) -> str:
    """What a sum does: those of maxima and minima are other collectives."""
    return kind if kind in ("reduce_max", "reduce_min", "reduce_prod", "reduce_and", "reduce_or") else "add"


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
