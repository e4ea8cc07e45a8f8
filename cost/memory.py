"""Peak memory of one device: the bytes that are live at each op, under a layout.

    live(t) = sum over values in memory at t                  of their local bytes
            + sum over reshardings alive at t                 of the copy's local bytes
            + sum over partial sums that wait to be reduced   of their local bytes
            + images beside their neighbours' edges               of their local bytes, where a window slides over them
            + room for results, which have theirs from the start, less the temporaries that use it meanwhile

`ffjax.cost.lifetimes` says when each value is alive, under the order and the fusions of the platform's compiler;
sharding decides how large it is, and which copies of it there are. Every term is a value's bytes over the pieces that
one candidate of one region (or of a pair) cuts it into, so the search bounds the same sum (`strategies/instants.py`).
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from ffjax.cost.lifetimes import Lifetimes, lifetimes
from ffjax.cost.merged_remat import MERGED
from ffjax.cost.moves import moves_of
from ffjax.cost.result_buffers import in_result_buffers
from ffjax.ir.graph import NO_VALUE, Graph
from ffjax.ir.halo import halos
from ffjax.ir.layout import Layout
from ffjax.ir.regions import Regions
from ffjax.ir.spec import Spec, shard_count

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]

_PREFIX = ("", "copy of ", "partial sums of ", "room for ", "copy with edges of ")
_HOME, _COPY, _SUM, _ROOM, _EDGES = range(5)


@dataclass(frozen=True, slots=True, kw_only=True)
class Peak:
    """The instant at which most is live (see `Lifetimes`), the op that runs then, and what is live."""

    bytes: float
    instant: int
    op: int
    live: tuple[tuple[str, float], ...]
    """The largest arrays alive there: what they are, and their local bytes."""
    over_time: NDArray[np.float64] = field(default_factory=lambda: np.zeros(0), compare=False, repr=False)
    """The bytes that are live at each op, and at the step's end."""


class MemoryModel:
    """What is in memory when, grouped by what is sharded alike, so that a layout is priced group by group.

    `keys` are the regions' families, if regions of one family have one assignment in all layouts that are asked about.
    """

    def __init__(self, regions: Regions, times: Lifetimes, keys: Sequence[Hashable] | None = None) -> None:
        graph = regions.graph
        self.regions = regions
        self.graph = graph
        self.times = times
        self.keys = keys
        family: Sequence[Hashable] = range(len(regions.regions)) if keys is None else keys
        self.bytes = times.bytes()
        self.values = np.flatnonzero((times.first <= times.last) & (self.bytes > 0))
        self.last_at_home = _last_at_home(regions, times)
        self.own_memory = np.append(times.new_results, [graph.ops[op].results[0] for op in graph.arguments])
        """Arguments, and results that replace none: they are no temporaries."""
        groups: dict[Hashable, int] = {}
        self.homes: list[int] = []
        """For each group of values one of them."""
        self.group = np.zeros(len(self.values), dtype=np.int64)
        for index, value in enumerate(self.values.tolist()):
            made_in = family[regions.region_of[graph.values[value].producer]]
            key: Hashable = (made_in, regions.home[value], regions.may_scatter(value))
            if key not in groups:
                groups[key] = len(self.homes)
                self.homes.append(value)
            self.group[index] = groups[key]
        reads: dict[tuple[int, int], dict[Hashable, _Port]] = {}
        for edge in regions.edges:
            if times.graph.ops[edge.op].kind == MERGED:
                continue
            ports = reads.setdefault((edge.value, graph.ops[edge.op].scope), {})
            key = (family[edge.target], edge.target_dims)
            port = ports.setdefault(key, _Port(op=edge.op, operand=edge.operand))
            start, done = times.copies.get((edge.value, edge.op), (int(times.when[edge.op]),) * 2)
            port.first = min(port.first, start)
            port.gathered = max(port.gathered, done)
            port.last = max(port.last, int(times.until[edge.op]))
        gathered: dict[Hashable, list[tuple[int, list[_Port]]]] = {}
        for (value, _), ports in reads.items():
            producer = graph.values[value].producer
            key = (family[regions.region_of[producer]], regions.home[value], tuple(ports))
            gathered.setdefault(key, []).append((value, list(ports.values())))
        self.copies = [_Copies(members) for members in gathered.values()]
        sums: dict[Hashable, list[int]] = {}
        self.all_sums = possible_sums(regions)
        for value in self.all_sums:
            key = (family[regions.region_of[graph.values[value].producer]], regions.home[value])
            sums.setdefault(key, []).append(value)
        self.sums = [np.array(values, dtype=np.int64) for values in sums.values()]
        """Results that may be partial sums, by what is sharded alike."""
        self._known_spans: dict[tuple[int, bool], Ints] = {}
        self.windows = [(op.id, op.operands[found[0].operand]) for op in graph.ops if (found := halos(op.eqn))]
        """Ops that slide a window over an image, and the image."""

    def _spans(self, index: int, *, scattered: bool) -> Ints:
        """When partial sums of one group begin and end, [spans, 2, values]; whatever the layout."""
        if (index, scattered) not in self._known_spans:
            values = self.sums[index].tolist()
            spans = np.array([self.times.partial_sums(v, scattered=scattered) for v in values], dtype=np.int64)
            self._known_spans[index, scattered] = spans.reshape(len(values), -1, 2).transpose(1, 2, 0)
        return self._known_spans[index, scattered]

    def under(self, layout: Layout) -> MemoryModel:
        """The model with the schedule that the compiler makes for a layout's collectives."""
        compiler = self.times.compiler
        if not (compiler.runs_late or compiler.runs_early):
            return self
        times = lifetimes(self.graph, compiler, moves_of(layout, compiler), self.times.fused)
        return MemoryModel(self.regions, times, self.keys)

    def peak(self, layout: Layout) -> Peak:
        """The most bytes that are live on one device at once, and where."""
        held = self.held(layout)
        begins, ends, size = np.concatenate(held.first), np.concatenate(held.last), np.concatenate(held.sizes)
        value, kinds = np.concatenate(held.values), np.concatenate(held.kinds)
        size = np.where(self._in_result_buffers(value, kinds, begins, ends, size), 0.0, size)
        end = len(self.graph.ops)
        live = np.cumsum(np.bincount(begins, size, end + 2) - np.bincount(ends + 1, size, end + 2))
        at = int(np.argmax(live[: end + 1]))
        alive = np.flatnonzero((begins <= at) & (at <= ends))
        largest = alive[np.argsort(-size[alive], kind="stable")][:12]
        named = tuple(
            (_PREFIX[kinds[i]] + describe(self.graph, int(value[i])), float(size[i])) for i in largest.tolist()
        )
        op = int(np.flatnonzero(self.times.when == min(at, end - 1))[0])
        over_time = np.append(live[self.times.when], live[end])
        return Peak(bytes=float(live[at]), instant=at, op=op, live=named, over_time=over_time)

    def _in_result_buffers(self, value: Ints, kinds: Ints, first: Ints, last: Ints, size: Floats) -> NDArray[np.bool_]:
        """What of all that is held is in memory that a result will need later."""
        found = np.zeros(len(value), dtype=np.bool_)
        rooms = kinds == _ROOM
        if rooms.any():
            own = np.isin(value, self.own_memory) & (kinds == _HOME)
            free = np.flatnonzero(~(rooms | own))
            found[free] = in_result_buffers(size[rooms], last[rooms] + 1, size[free], first[free], last[free])
        return found

    def held(self, layout: Layout) -> Held:
        """Everything that is in memory at some instant, from when to when, in local bytes."""
        held = Held(bytes=self.bytes)
        times, compiler, mesh = self.times, self.times.compiler, layout.mesh
        home_last = self.last_at_home.copy()
        moved: list[tuple[_Copies, Spec, Ints, Ints]] = []
        for copies in self.copies:
            home = layout.home(int(copies.values[0]))
            for spec, begins, gathered, ends in copies.under(layout):
                # The values themselves are needed until they are read for the last time, or gathered.
                if not is_slice(home, spec) or spec == home:
                    np.maximum.at(home_last, copies.values, ends if spec == home else gathered)
                if spec != home:
                    moved.append((copies, spec, begins, ends))
        for copies, spec, begins, ends in moved:
            home, pieces = layout.home(int(copies.values[0])), shard_count(spec, mesh)
            first = begins
            if is_slice(home, spec):
                # A slice is taken when nothing else needs the whole any more.
                whole = times.first[copies.values] <= times.last[copies.values]
                first = np.where(whole, np.minimum(begins, home_last[copies.values] + 1), begins)
            elif compiler.copies_gathered and _gathers_inside(home, spec):
                held.add(_COPY, copies.values, begins, begins, pieces)
            held.add(_COPY, copies.values, first, ends, pieces)
        for index, reduced in enumerate(self.sums):
            value = int(reduced[0])
            producer = self.graph.values[value].producer
            partial = layout.partial(value)
            scattered = partial != layout.home(value)
            if layout.partial_axes(producer):
                for made, until in self._spans(index, scattered=scattered):
                    held.add(_SUM, reduced, made, until, shard_count(partial, mesh))
        for op, image in self.windows:
            if layout.exchanges(op):
                spec = layout.operand(op, self.graph.ops[op].operands.index(image))
                now = times.when[[op]]
                held.add(_EDGES, np.array([image]), now, now, shard_count(spec, mesh))
        if compiler.results_apart:
            for value in times.new_results.tolist():
                one, start, until = np.array([value]), np.zeros(1, dtype=np.int64), times.first[[value]] - 1
                held.add(_ROOM, one, start, until, shard_count(layout.home(value), mesh))
        for copied, since, until, larger in times.copied:
            larger_by = shard_count(layout.home(copied), mesh) / larger
            held.add(_COPY, np.array([copied]), np.array([since]), np.array([until]), larger_by)
        shards = np.array([shard_count(layout.home(value), mesh) for value in self.homes], dtype=float)
        held.add(_HOME, self.values, times.first[self.values], home_last[self.values], shards[self.group])
        return held


@dataclass(frozen=True, slots=True, kw_only=True)
class Held:
    """What is in memory from when to when, in parallel arrays: kinds, values, instants and local bytes."""

    bytes: Floats
    """Of each value of the program, unsharded."""
    kinds: list[Ints] = field(default_factory=list)
    values: list[Ints] = field(default_factory=list)
    first: list[Ints] = field(default_factory=list)
    last: list[Ints] = field(default_factory=list)
    sizes: list[Floats] = field(default_factory=list)

    def add(self, kind: int, values: Ints, first: Ints, last: Ints, pieces: float | Floats) -> None:
        self.kinds.append(np.full(len(values), kind))
        self.values.append(values)
        self.first.append(first)
        self.last.append(np.maximum(last, first - 1))
        self.sizes.append(self.bytes[values] / pieces)


@dataclass(slots=True, kw_only=True)
class _Port:
    """Ops that read a value alike: one of them, and when the first and the last of them need it."""

    op: int
    operand: int
    first: int = np.iinfo(np.int64).max
    gathered: int = -1
    """When the last of them has what it reads, if that is gathered."""
    last: int = -1


class _Copies:
    """Values that are made alike and read alike, and when each reader first and last needs each of them."""

    def __init__(self, members: list[tuple[int, list[_Port]]]) -> None:
        self.values = np.array([value for value, _ in members], dtype=np.int64)
        self.first = np.array([[port.first for port in ports] for _, ports in members], dtype=np.int64)
        self.gathered = np.array([[port.gathered for port in ports] for _, ports in members], dtype=np.int64)
        self.last = np.array([[port.last for port in ports] for _, ports in members], dtype=np.int64)
        self.readers = members[0][1]

    def under(self, layout: Layout) -> Iterator[tuple[Spec, Ints, Ints, Ints]]:
        """For each sharding in which the values are read: when each is first there, gathered, and last needed so."""
        by_spec: dict[Spec, list[int]] = {}
        for index, port in enumerate(self.readers):
            by_spec.setdefault(layout.operand(port.op, port.operand), []).append(index)
        for spec, who in by_spec.items():
            first = self.first[:, who].min(axis=1)
            yield spec, first, self.gathered[:, who].min(axis=1), self.last[:, who].max(axis=1)


def is_slice(source: Spec, target: Spec) -> bool:
    """Whether a device has its piece under `target` within the one under `source`."""
    return all(t[: len(s)] == s for s, t in zip(source, target, strict=True))


def _gathers_inside(source: Spec, target: Spec) -> bool:
    """Whether some dimension but the first is gathered."""
    return any(t[: len(s)] != s for s, t in zip(source[1:], target[1:], strict=True))


def possible_sums(regions: Regions) -> list[int]:
    """Values that are partial sums where what their op reduces over is split."""
    last = [(region, regions.graph.ops[region.ops[-1]].results) for region in regions.regions]
    return [made[0] for region, made in last if region.solo and region.dims[-1].reduced and len(made) == 1]


def _last_at_home(regions: Regions, times: Lifetimes) -> Ints:
    """For each value until when it is in memory as it is made, if all who may read it otherwise do so."""
    graph = times.graph
    last = np.where(times.last == len(graph.ops), times.last, np.minimum(times.first, times.last))
    # What reads a merged value otherwise than it is made reads the original, of which no copy is known here.
    moving = {(e.op, e.operand) for e in regions.edges if e.value in graph.ops[e.op].operands}
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
