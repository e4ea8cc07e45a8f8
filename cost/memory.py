"""Peak memory of one device: the bytes that are live at each op, under a layout.

    live(t) = sum over materialised values alive at t of their local bytes
            + sum over reshardings alive at t of the copy's local bytes
            + the partial sums that the op at t makes and scatters

`ffjax.cost.lifetimes` says when each value is alive; sharding decides how large it is, and which copies of it there are.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ffjax.cost.compilers import Compiler
from ffjax.cost.lifetimes import Lifetimes, lifetimes
from ffjax.cost.merged_remat import MERGED
from ffjax.ir.graph import NO_VALUE, Graph
from ffjax.ir.layout import Layout
from ffjax.ir.regions import Regions
from ffjax.ir.spec import Spec, shard_count


@dataclass(frozen=True, slots=True, kw_only=True)
class Peak:
    """The instant at which most is live, the op that runs then, and what is live."""

    bytes: float
    instant: int
    op: int
    live: tuple[tuple[str, float], ...]
    """The largest arrays alive there: what they are, and their local bytes."""


class MemoryModel:
    """What is in memory when, grouped by what is sharded alike, so that a layout is priced group by group.

    `keys` are the regions' families, if regions of one family have one assignment in all layouts that are asked about.
    """

    def __init__(self, regions: Regions, times: Lifetimes, keys: Sequence[Hashable] | None = None) -> None:
        graph = regions.graph
        self.graph = graph
        self.times = times
        family: Sequence[Hashable] = range(len(regions.regions)) if keys is None else keys
        alive = [v for v in graph.values if times.first[v.id] <= times.last[v.id] and v.bytes]
        self.values = np.array([v.id for v in alive], dtype=np.int64)
        self.first, self.last = times.first[self.values], _last_at_home(regions, times)
        self.bytes = times.bytes()[self.values]
        self.temporary = times.bytes()
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
            if times.graph.ops[edge.op].kind == MERGED:
                continue
            ports = reads.setdefault((edge.value, graph.ops[edge.op].scope), {})
            key = (family[edge.target], edge.target_dims)
            when, until = int(times.when[edge.op]), int(times.until[edge.op])
            first, last, op, operand = ports.get(key, (when, until, edge.op, edge.operand))
            ports[key] = (min(first, when), max(last, until), op, operand)
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
        self.all_sums = [value for values in sums.values() for value in values]

    def peak(self, layout: Layout) -> Peak:
        """The most bytes that are live on one device at once, and where."""
        graph = self.graph
        pieces = np.array([shard_count(layout.home(value), layout.mesh) for value in self.homes], dtype=float)
        home_last = self.last.copy()
        first: list[NDArray[np.int64]] = []
        last: list[NDArray[np.int64]] = []
        sizes: list[NDArray[np.float64]] = []
        values: list[NDArray[np.int64]] = []
        what: list[NDArray[np.int64]] = []

        def add(
            begins: NDArray[np.int64], ends: NDArray[np.int64], of: NDArray[np.int64], pieces: float, kind: int
        ) -> None:
            first.append(begins)
            last.append(ends)
            values.append(of)
            sizes.append(self.temporary[of] / pieces)
            what.append(np.full(len(of), kind))

        for copies in self.copies:
            np.maximum.at(home_last, copies.values, copies.at_home(layout))
        for copies in self.copies:
            for begins, ends, pieces_, sliced, inner in copies.under(layout):
                if sliced:
                    # A slice is taken when nothing else needs the whole any more.
                    made = self.times.first[copies.values]
                    begins = np.where(home_last[copies.values] >= made, np.minimum(begins, home_last[copies.values]), begins)
                add(begins, ends, copies.values, pieces_, 1)
                if inner and self.times.compiler.copies_gathered:
                    add(begins, begins, copies.values, pieces_, 1)
        flushed = self.times.flushed(self.all_sums, layout.mesh.devices)
        for reduced in self.sums:
            value = int(reduced[0])
            partial = layout.partial(value)
            copies_ = sums_in_memory(self.times.compiler, scattered=partial != layout.home(value))
            if copies_ and layout.partial_axes(graph.values[value].producer):
                made = self.times.when[[graph.values[v].producer for v in reduced]]
                until = flushed[reduced] if partial != layout.home(value) else made
                add(made, until, reduced, shard_count(partial, layout.mesh) / copies_, 2)
        share = self.times.compiler.results_apart
        for value in self.times.new_results.tolist() if share else ():
            made = self.times.first[[value]] - 1
            add(np.zeros(1, dtype=np.int64), made, np.array([value]), shard_count(layout.home(value), layout.mesh) / share, 3)
        first.append(self.first)
        last.append(home_last[self.values])
        sizes.append(self.bytes / pieces[self.group] if len(pieces) else self.bytes)
        values.append(self.values)
        what.append(np.zeros(len(self.values), dtype=np.int64))
        begins, ends, size = np.concatenate(first), np.concatenate(last), np.concatenate(sizes)
        count = len(graph.ops) + 2
        live = np.cumsum(np.bincount(begins, size, count) - np.bincount(ends + 1, size, count))
        at = int(np.argmax(live[: len(graph.ops) + 1]))
        alive = np.flatnonzero((begins <= at) & (at <= ends))
        largest = alive[np.argsort(-size[alive], kind="stable")][:12]
        value, kinds = np.concatenate(values), np.concatenate(what)
        prefix = ("", "copy of ", "partial sums of ", "room for ")
        named = tuple((prefix[kinds[i]] + describe(graph, int(value[i])), float(size[i])) for i in largest.tolist())
        op = int(self.times.op_at[min(at, len(graph.ops) - 1)])
        return Peak(bytes=float(live[at]), instant=at, op=op, live=named)


class _Copies:
    """Values that are made alike and read alike: when each reader first and last needs them."""

    def __init__(self, members: list[tuple[int, list[tuple[int, int, int, int]]]]) -> None:
        self.values = np.array([value for value, _ in members], dtype=np.int64)
        spans = np.array([[port[:2] for port in ports] for _, ports in members], dtype=np.int64)
        self.first, self.last = spans[:, :, 0], spans[:, :, 1]
        self.readers = [port[2:] for port in members[0][1]]

    def at_home(self, layout: Layout) -> NDArray[np.int64]:
        """Until when these readers need the values themselves: to read them as they are made, or to gather them."""
        home = layout.home(int(self.values[0]))
        needed = np.zeros(len(self.values), dtype=np.int64)
        for index, (op, operand) in enumerate(self.readers):
            spec = layout.operand(op, operand)
            if spec == home:
                needed = np.maximum(needed, self.last[:, index])
            elif not is_slice(home, spec):
                needed = np.maximum(needed, self.first[:, index])
        return needed

    def under(self, layout: Layout) -> Iterator[tuple[NDArray[np.int64], NDArray[np.int64], int, bool, bool]]:
        """For each sharding that is not the values' own: from when to when each copy lives, its pieces, if a slice."""
        home = layout.home(int(self.values[0]))
        by_spec: dict[Spec, list[int]] = {}
        for index, (op, operand) in enumerate(self.readers):
            spec = layout.operand(op, operand)
            if spec != home:
                by_spec.setdefault(spec, []).append(index)
        for spec, who in by_spec.items():
            begins, ends = self.first[:, who].min(axis=1), self.last[:, who].max(axis=1)
            inner = any(h[: len(s)] != h for h, s in zip(home[1:], spec[1:], strict=True) if h != s)
            yield begins, ends, shard_count(spec, layout.mesh), is_slice(home, spec), inner


def is_slice(source: Spec, target: Spec) -> bool:
    """Whether a device has its piece under `target` within the one under `source`."""
    return all(t[: len(s)] == s for s, t in zip(source, target, strict=True))


def sums_in_memory(compiler: Compiler, *, scattered: bool) -> int:
    """How many times an op's partial sums are in memory while they are reduced, beside the result as it is made."""
    if scattered:
        return 2 if compiler.slices_reductions else 1
    return 1 if compiler.reduces_out_of_place else 0


def _last_at_home(regions: Regions, times: Lifetimes) -> NDArray[np.int64]:
    """For each value until when it is in memory as it is made, if all who may read it otherwise do so."""
    graph = times.graph
    last = np.where(times.last == len(graph.ops), times.last, np.minimum(times.first, times.last))
    # What reads a merged value otherwise than it is made reads the original, of which no copy is known here.
    moving = {(e.op, e.operand) for e in regions.edges if graph.ops[e.op].operands[e.operand : e.operand + 1] == (e.value,)}
    for op in graph.ops:
        for index, value in enumerate(op.operands):
            if value != NO_VALUE and (op.id, index) not in moving and times.first[value] <= times.last[value]:
                last[value] = max(last[value], times.until[op.id])
    return last


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
