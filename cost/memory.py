"""Peak memory of one device: the bytes that are live at each op, under a layout.

    live(t) = sum over materialised values alive at t of their local bytes
            + sum over reshardings alive at t of the copy's local bytes
            + the partial sums that the op at t makes and scatters

A value lives from the op that makes it to the last op that reads it, directly or through fused values that are never
in memory themselves. Crossing into a loop: what a body only reads stays alive for the whole loop and is not copied, a
stacked result is allocated when its loop starts, a carry takes over its initial value's place. Arguments live for the
whole step unless they are donated; a result that replaces a donated argument takes over its buffer.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from ffjax.cost.kernels import fusible, materialised
from ffjax.ir.graph import NO_VALUE, Graph
from ffjax.ir.layout import Layout
from ffjax.ir.regions import Regions, is_reduction
from ffjax.ir.spec import Spec, shard_count


@dataclass(frozen=True, slots=True, kw_only=True)
class Lifetimes:
    """For each value the first and the last op at which it is in memory; `first > last` if it never is.

    `until` is for each op when it has really read its operands: a fused one reads them in the op that it is fused into,
    a body all through its loop.
    """

    first: NDArray[np.int64]
    last: NDArray[np.int64]
    until: NDArray[np.int64]


@dataclass(frozen=True, slots=True, kw_only=True)
class Peak:
    """The op at which most is live, and what is."""

    bytes: float
    op: int
    live: tuple[tuple[str, float], ...]
    """The largest arrays alive there: what they are, and their local bytes."""
    over_time: NDArray[np.float64] = field(default_factory=lambda: np.zeros(0), compare=False, repr=False)
    """The bytes that are live at each op, and at the step's end."""


def lifetimes(graph: Graph) -> Lifetimes:
    """When each value is in memory, whatever its sharding."""
    end = len(graph.ops)
    span = _scope_spans(graph)
    carries = _carries(graph)
    in_memory = materialised(graph)
    first = np.array([v.producer for v in graph.values], dtype=np.int64)
    last = first.copy()
    stays = [False] * len(graph.values)
    untils = np.arange(end, dtype=np.int64)
    # Backwards, so that what a fused value reads inherits the ops that read the fused value.
    for op in reversed(graph.ops):
        until = op.id
        if fusible(op) and not is_reduction(op):
            until = max([op.id, *(int(last[v]) for v in op.results if not in_memory[v])])
        if op.kind == "enter":
            inner = graph.values[op.results[0]].scope
            # What a body only reads is the outer array itself, for as long as the loop runs.
            until = op.id if op.id in carries else span[inner][1]
        untils[op.id] = until
        for value in op.operands:
            if value != NO_VALUE:
                last[value] = max(last[value], until)
    donated = _donated(graph)
    replaced = _replaced(graph)
    for position, op_id in enumerate(graph.arguments):
        value = graph.ops[op_id].results[0]
        first[value] = 0
        if not donated[position] or position in replaced:
            last[value] = end
    for op_id in graph.outputs:
        value = graph.ops[op_id].operands[0]
        if value != NO_VALUE:
            last[value] = end
            stays[value] = True
    taken_over = {graph.ops[graph.outputs[r]].operands[0] for a, r in _replacing(graph)}
    for op in graph.ops:
        for value in op.results:
            inner = graph.values[value].scope
            if op.kind == "exit" and op.rule.need_replication:
                first[value] = span[graph.ops[op.id].scope][0]  # a stacked result is there from the loop's start
            if op.kind == "enter" and op.id not in carries:
                last[value] = first[value] - 1
            elif op.kind == "enter" and inner:
                last[value] = max(last[value], first[value])
            if not in_memory[value] and not stays[value]:
                last[value] = first[value] - 1
            if value in taken_over and value != NO_VALUE:
                last[value] = first[value] - 1
    return Lifetimes(first=first, last=last, until=untils)


class MemoryModel:
    """What is in memory when, grouped by what is sharded alike, so that a layout is priced group by group.

    `keys` are the regions' families, if regions of one family have one assignment in all layouts that are asked about.
    """

    def __init__(self, regions: Regions, times: Lifetimes, keys: Sequence[Hashable] | None = None) -> None:
        graph = regions.graph
        self.graph = graph
        family: Sequence[Hashable] = range(len(regions.regions)) if keys is None else keys
        alive = [v for v in graph.values if times.first[v.id] <= times.last[v.id] and v.bytes]
        self.values = np.array([v.id for v in alive], dtype=np.int64)
        self.first, self.last = times.first[self.values], times.last[self.values]
        self.bytes = np.array([v.bytes for v in alive])
        groups: dict[Hashable, int] = {}
        self.homes: list[int] = []
        """For each group of values one of them."""
        self.group = np.zeros(len(alive), dtype=np.int64)
        for index, value in enumerate(alive):
            key: Hashable = (family[regions.region_of[value.producer]], regions.home[value.id])
            if key not in groups:
                groups[key] = len(self.homes)
                self.homes.append(value.id)
            self.group[index] = groups[key]
        reads: dict[tuple[int, int], dict[Hashable, tuple[int, int, int, int]]] = {}
        for edge in regions.edges:
            ports = reads.setdefault((edge.value, graph.ops[edge.op].scope), {})
            key = (family[edge.target], edge.target_dims)
            first, last, op, operand = ports.get(key, (edge.op, edge.op, edge.op, edge.operand))
            ports[key] = (first, max(last, int(times.until[edge.op])), op, operand)
        gathered: dict[Hashable, list[tuple[int, list[tuple[int, int, int, int]]]]] = {}
        for (value_id, _), ports in reads.items():
            producer = graph.values[value_id].producer
            key = (family[regions.region_of[producer]], regions.home[value_id], tuple(ports))
            gathered.setdefault(key, []).append((value_id, list(ports.values())))
        self.copies = [_Copies(members) for members in gathered.values()]
        sums: dict[Hashable, list[int]] = {}
        for region in regions.regions:
            results = graph.ops[region.ops[0]].results
            if region.solo and region.dims[0].reduced and len(results) == 1:
                sums.setdefault((family[region.id], regions.home[results[0]]), []).append(results[0])
        self.sums = [np.array(values, dtype=np.int64) for values in sums.values()]
        """Results that may be partial sums, by what is sharded alike."""

    def peak(self, layout: Layout) -> Peak:
        """The most bytes that are live on one device at once, and where."""
        graph = self.graph
        pieces = np.array([shard_count(layout.home(value), layout.mesh) for value in self.homes], dtype=float)
        first, last, sizes = [self.first], [self.last], [self.bytes / pieces[self.group] if len(pieces) else self.bytes]
        values, what = [self.values], [np.zeros(len(self.values), dtype=np.int64)]

        def add(
            begins: NDArray[np.int64], ends: NDArray[np.int64], of: NDArray[np.int64], pieces: int, kind: int
        ) -> None:
            first.append(begins)
            last.append(ends)
            values.append(of)
            sizes.append(np.array([graph.values[v].bytes for v in of]) / pieces)
            what.append(np.full(len(of), kind))

        for copies in self.copies:
            for begins, ends, pieces_ in copies.under(layout):
                add(begins, ends, copies.values, pieces_, 1)
        for scattered in self.sums:
            partial = layout.partial(int(scattered[0]))
            if partial != layout.home(int(scattered[0])):
                made = np.array([graph.values[v].producer for v in scattered])
                add(made, made, scattered, shard_count(partial, layout.mesh), 2)
        begins, ends, size = np.concatenate(first), np.concatenate(last), np.concatenate(sizes)
        count = len(graph.ops) + 2
        live = np.cumsum(np.bincount(begins, size, count) - np.bincount(ends + 1, size, count))
        at = int(np.argmax(live[: len(graph.ops) + 1]))
        alive = np.flatnonzero((begins <= at) & (at <= ends))
        largest = alive[np.argsort(-size[alive], kind="stable")][:12]
        value, kinds = np.concatenate(values), np.concatenate(what)
        prefix = ("", "copy of ", "partial sums of ")
        named = tuple((prefix[kinds[i]] + describe(graph, int(value[i])), float(size[i])) for i in largest.tolist())
        return Peak(bytes=float(live[at]), op=min(at, len(graph.ops) - 1), live=named, over_time=live[:-1])


class _Copies:
    """Values that are made alike and read alike: when each reader first and last needs them."""

    def __init__(self, members: list[tuple[int, list[tuple[int, int, int, int]]]]) -> None:
        self.values = np.array([value for value, _ in members], dtype=np.int64)
        spans = np.array([[port[:2] for port in ports] for _, ports in members], dtype=np.int64)
        self.first, self.last = spans[:, :, 0], spans[:, :, 1]
        self.readers = [port[2:] for port in members[0][1]]

    def under(self, layout: Layout) -> Iterator[tuple[NDArray[np.int64], NDArray[np.int64], int]]:
        """For each sharding that is not the values' own: from when to when each copy lives, in how many pieces."""
        home = layout.home(int(self.values[0]))
        by_spec: dict[Spec, list[int]] = {}
        for index, (op, operand) in enumerate(self.readers):
            spec = layout.operand(op, operand)
            if spec != home:
                by_spec.setdefault(spec, []).append(index)
        for spec, who in by_spec.items():
            yield self.first[:, who].min(axis=1), self.last[:, who].max(axis=1), shard_count(spec, layout.mesh)


def peak(layout: Layout, times: Lifetimes | None = None) -> Peak:
    """The most bytes that are live on one device at once, and where. For many layouts, make a `MemoryModel`."""
    return MemoryModel(layout.regions, lifetimes(layout.graph) if times is None else times).peak(layout)


def describe(graph: Graph, value: int) -> str:
    """A value as a user knows it: its path, or its shape and the line that makes it."""
    entry = graph.values[value]
    producer = graph.ops[entry.producer]
    text = f"{entry.dtype}[{','.join(map(str, entry.shape))}]"
    if producer.kind == "argument":
        return f"{producer.label}: {text}"
    return f"{producer.kind} {text} at {graph.source(producer)}"


def _scope_spans(graph: Graph) -> list[tuple[int, int]]:
    """The first and the last op of each body, what enters and leaves included."""
    spans = [(len(graph.ops), -1)] * len(graph.scopes)
    for scope in graph.scopes:
        for border in scope.enter + scope.exit:
            spans[scope.id] = (min(spans[scope.id][0], border), max(spans[scope.id][1], border))
    for op in graph.ops:
        spans[op.scope] = (min(spans[op.scope][0], op.id), max(spans[op.scope][1], op.id))
    return spans


def _carries(graph: Graph) -> set[int]:
    """The `enter` ops that bring in a carry's first value, rather than a constant or a stacked array."""
    return {op for pair in graph.ties for op, side, _ in pair if side == "result"}


def _donated(graph: Graph) -> list[bool]:
    return [False] * len(graph.program.closures) + list(graph.program.donated)


def _replacing(graph: Graph) -> list[tuple[int, int]]:
    """The ties whose argument is donated: the result takes over its buffer."""
    return [(a, r) for a, r in graph.program.ties if graph.program.donated[a]]


def _replaced(graph: Graph) -> set[int]:
    offset = len(graph.program.closures)
    return {a + offset for a, _ in _replacing(graph)}
