"""How long tasks take under an assignment: kernels, copies and sums, each distinct case priced once.

Seconds are the search's own: a region's kernels share `compute_seconds` of the region in proportion to their own
rooflines, a collective takes `CollectiveModel.seconds`. Times are whole ticks of an attosecond, so that they add up
the same in any order: simulating a part again then gives exactly what simulating everything gives.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Hashable, Iterator, Sequence
from operator import itemgetter
from typing import NamedTuple

from ffjax.cost.collectives import CollectiveModel
from ffjax.cost.kernels import Kernel
from ffjax.cost.region_costs import Splits, compute_seconds, halo_seconds
from ffjax.cost.roofline import op_seconds
from ffjax.cost.simulation.task_graph import Kinds, Read, Sum, TaskGraph, Touched
from ffjax.ir import manual
from ffjax.ir.assignment import Assignment
from ffjax.ir.halo import halos
from ffjax.ir.layout import Layout
from ffjax.ir.regions import Dims, Regions
from ffjax.ir.spec import Collective, CollectiveKind, Spec

TICKS_PER_S = 10**18


class Hop(NamedTuple):
    """One collective: its ticks, and the links that it occupies, as indices into the cluster's."""

    ticks: int
    links: tuple[int, ...]
    collective: Collective


class Copy(NamedTuple):
    """A value in one other sharding: who reads it so, counted in `Read.ports`, and the collectives that make it."""

    readers: tuple[int, ...]
    hops: tuple[Hop, ...]
    base: int
    """The copy whose collectives it goes on from, by its place among the copies of the read; -1 for none."""
    bytes: float


class TaskCosts:
    """Prices for one program on one mesh. Alike regions, reads and sums share entries."""

    def __init__(self, regions: Regions, kernels: Sequence[Kernel], model: CollectiveModel, tasks: TaskGraph) -> None:
        self.regions = regions
        self._forget(model)
        self.own = own_kernels(regions, kernels)
        """The kernels of each region."""
        if tasks.kinds is None:
            tasks.kinds = _kinds(regions, self.own, tasks)
        self.kinds = tasks.kinds

    def on(self, model: CollectiveModel) -> TaskCosts:
        """Prices for the same program on another mesh or other links."""
        other = copy.copy(self)
        other._forget(model)
        return other

    def _forget(self, model: CollectiveModel) -> None:
        self.model = model
        self._links: dict[tuple[str, ...], tuple[int, ...]] = {}
        self._numbers: dict[Assignment, int] = {}
        self._kernels: dict[tuple[int, int], tuple[int, ...]] = {}
        self._copies: dict[Hashable, tuple[Copy, ...]] = {}
        self._sums: dict[Hashable, tuple[Hop, ...]] = {}

    def number(self, assignment: Assignment) -> int:
        """A small number that stands for an assignment in keys."""
        return self._numbers.setdefault(assignment, len(self._numbers))

    def numbers(self, assignments: Sequence[Assignment]) -> list[int]:
        """`number` of each; those of a family are mostly one object."""
        objects = {id(a): a for a in assignments}
        known = {key: self.number(a) for key, a in objects.items()}
        return [known[id(a)] for a in assignments]

    def kernel_ticks(self, region: int, assignment: Assignment, number: int) -> tuple[int, ...]:
        """One trip of each of a region's ops that run kernels, in order."""
        key = (self.kinds.kernels[region], number)
        found = self._kernels.get(key)
        if found is None:
            found = self._kernels[key] = self._price(region, assignment)
        return found

    def copies(self, index: int, read: Read, numbers: Sequence[int], layout: Layout) -> tuple[Copy, ...]:
        """The copies that a read takes, and of each the collectives that no copy before it has made."""
        key = (self.kinds.reads[index], self.kinds.read_regions[index](numbers))
        found = self._copies.get(key)
        if found is None:
            found = self._copies[key] = self._reshard(read, layout)
        return found

    def sums(self, index: int, entry: Sum, numbers: Sequence[int], layout: Layout) -> tuple[Hop, ...]:
        """The collectives that sum an op's partial results."""
        key = (self.kinds.sums[index], self.kinds.sum_regions[index](numbers))
        found = self._sums.get(key)
        if found is None:
            found = self._sums[key] = self._reduce(entry, layout)
        return found

    def _price(self, region: int, assignment: Assignment) -> tuple[int, ...]:
        device = self.model.cluster.device
        distinct, which = self._distinct(region)
        splits = Splits(self.regions.regions[region], [assignment], self.model)
        total = float(compute_seconds(distinct, splits, self.model)[0])
        total += float(halo_seconds(self.regions, self.regions.regions[region], [assignment], self.model)[0][0])
        shares = []
        for k in distinct:
            traffic = sum(float(whole / splits.of_dims(dims)[0]) for dims, whole in k.traffic)
            flops = k.flops / float(splits.of(k.iteration)[0])
            dtype = k.dtype if k.matmul else "float32"
            shares.append(op_seconds(flops, traffic, dtype, device, matmul=k.matmul) + k.launches * device.kernel_s)
        whole = sum(k.trips * s for k, s in zip(distinct, shares, strict=True))
        scale = total / whole if whole else 0.0
        ticks: dict[int, int] = {}
        for k, place in zip(self.own[region], which, strict=True):
            ticks[k.op] = ticks.get(k.op, 0) + round(shares[place] * scale * TICKS_PER_S)
        return tuple(ticks.values())

    def _distinct(self, region: int) -> tuple[list[Kernel], list[int]]:
        """A region's kernels, those that do the same as one with all their trips; and for each kernel its place there.

        A trunk that all layers hang on is one region, with as many kernels as there are layers, but few distinct ones.
        """
        kind = self.kinds.kernels[region]
        found = self.kinds.distinct.get(kind)
        if found is None:
            places: dict[Hashable, int] = {}
            own = self.own[region]
            which = [places.setdefault(content, len(places)) for content in _contents(own)]
            trips = [0.0] * len(places)
            for k, place in zip(own, which, strict=True):
                trips[place] += k.trips
            first = {place: k for k, place in zip(reversed(own), reversed(which), strict=True)}
            distinct = [dataclasses.replace(first[i], trips=t) for i, t in enumerate(trips)]
            found = self.kinds.distinct[kind] = distinct, which
        return found

    def _reshard(self, read: Read, layout: Layout) -> tuple[Copy, ...]:
        home, local = layout.home(read.value), layout.local_bytes(read.value)
        by_spec: dict[Spec, list[int]] = {}
        for index, port in enumerate(read.ports):
            edge = self.regions.edges[port]
            spec = layout.operand(edge.op, edge.operand)
            if spec != home:
                by_spec.setdefault(spec, []).append(index)
        # Ways that begin alike share their beginning, as in `Layout.collectives`.
        made: dict[tuple[Spec, ...], int] = {}
        copies: list[Copy] = []
        for spec, readers in by_spec.items():
            way: tuple[Spec, ...] = ()
            hops, base = [], -1
            for hop in layout.way(read.value, spec):
                way += (hop.spec,)
                if hop.step is None:
                    continue
                if way in made:
                    base = made[way]
                    continue
                made[way] = len(copies)
                kind, axes, multiplier = hop.step
                hops.append(self._hop(kind, axes, local * multiplier, self.regions.merged_copies[read.value]))
            if hops or base >= 0:
                copies.append(Copy(tuple(readers), tuple(hops), base, layout.local_bytes(read.value, spec)))
        return tuple(copies)

    def _reduce(self, entry: Sum, layout: Layout) -> tuple[Hop, ...]:
        hops = [self._hop(c.kind, c.axes, c.bytes, False) for c in layout.fetches(entry.op)]
        for own, often in layout.own_collectives(entry.op):
            one = self._hop(own.kind, own.axes, own.bytes, False)
            hops.append(one._replace(ticks=round(one.ticks * often)))
        axes = layout.partial_axes(entry.op)
        if not axes:
            return tuple(hops)
        for index, value in enumerate(layout.graph.ops[entry.op].results):
            reads = {layout.operand(op, i) for v, op, i in entry.readers if v == index}
            scatters = layout.scatters(value, axes, reads)
            size = layout.local_bytes(value, layout.partial(value))
            made: CollectiveKind = "reduce_scatter" if scatters else "all_reduce"
            hops.append(self._hop(made, axes, size, self.regions.merged_sums[value]))
        return tuple(hops)

    def _hop(self, kind: CollectiveKind, axes: tuple[str, ...], size: float, merged: bool) -> Hop:
        collective = Collective(kind, axes, size)
        return Hop(round(self.model.seconds(collective, merged=merged) * TICKS_PER_S), self._crossed(axes), collective)

    def _crossed(self, axes: tuple[str, ...]) -> tuple[int, ...]:
        """The links between the devices of a group: inside a host, across hosts, or both."""
        found = self._links.get(axes)
        if found is None:
            group, last = self.model.group(axes), len(self.model.cluster.links) - 1
            inside = (0,) if group.shares_host else ()
            found = self._links[axes] = (*inside, last) if group.crosses_hosts else inside
        return found


def own_kernels(regions: Regions, kernels: Sequence[Kernel]) -> list[list[Kernel]]:
    """The kernels of each region."""
    own: list[list[Kernel]] = [[] for _ in regions.regions]
    for kernel in kernels:
        own[kernel.region].append(kernel)
    return own


def _kinds(regions: Regions, own: Sequence[Sequence[Kernel]], tasks: TaskGraph) -> Kinds:
    alike: dict[Hashable, int] = {}

    def kind(*content: Hashable) -> int:
        return alike.setdefault(content, len(alike))

    sizes = [kind(r.sizes, r.solo) for r in regions.regions]
    values, ops, edges, ports = regions.graph.values, regions.graph.ops, regions.edges, regions.ports

    def view(region: int, dims: Dims) -> tuple[int, Dims]:
        return sizes[region], dims

    by_kernels = [
        kind(sizes[r.id], _image_kind(regions, r.ops[0]) if r.solo else (), *_contents(ks))
        for r, ks in zip(regions.regions, own, strict=True)
    ]
    reads = [
        kind(
            values[r.value].bytes,
            values[r.value].shape,
            regions.merged_copies[r.value],
            view(r.regions[0], regions.home[r.value]),
            *[view(edges[p].target, edges[p].target_dims) for p in r.ports],
        )
        for r in tasks.reads
    ]
    sums = [
        kind(
            tuple([(values[v].bytes, values[v].shape, regions.merged_sums[v]) for v in ops[s.op].results]),
            sizes[s.regions[0]],
            _image_kind(regions, s.op),
            *[(_image_kind(regions, op), sizes[regions.region_of[op]]) for op in regions.same_images.get(s.op, ())],
            ports[s.op].results,
            ports[s.op].reduced,
            *[(v, view(regions.region_of[op], ports[op].operands[i])) for v, op, i in s.readers],
        )
        for s in tasks.sums
    ]
    names: Sequence[Hashable] = range(len(regions.regions)) if tasks.families is None else tasks.families
    touched: dict[Hashable, Touched] = {name: Touched() for name in names}

    def grouped(
        kinds: Sequence[int], of: Sequence[tuple[int, ...]], side: Callable[[Touched], list[int]]
    ) -> list[list[int]]:
        groups: dict[Hashable, list[int]] = {}
        for index, (number, decided_by) in enumerate(zip(kinds, of, strict=True)):
            families = tuple([names[r] for r in decided_by])
            key = number, families
            if key not in groups:
                for family in set(families):
                    side(touched[family]).append(len(groups))
                groups[key] = []
            groups[key].append(index)
        return list(groups.values())

    return Kinds(
        kernels=by_kernels,
        reads=reads,
        sums=sums,
        read_regions=[_getter(r.regions) for r in tasks.reads],
        sum_regions=[_getter(s.regions) for s in tasks.sums],
        region_groups=grouped(by_kernels, [(r.id,) for r in regions.regions], lambda t: t.regions),
        read_groups=grouped(reads, [r.regions for r in tasks.reads], lambda t: t.reads),
        sum_groups=grouped(sums, [s.regions for s in tasks.sums], lambda t: t.sums),
        touched=[touched[name] for name in names],
    )


def _image_kind(regions: Regions, op: int) -> Hashable:
    """What an op's exchanges of edges depend on, beside the assignment of its region."""
    node = regions.graph.ops[op]
    if node.eqn is not None and node.kind == manual.NAME:
        return tuple(manual.own_collectives(node.eqn)), manual.manual(node.eqn).axes
    found = halos(node.eqn)
    if not found:
        return ()
    value = regions.graph.values[node.operands[found[0].operand]]
    return found, value.bytes, regions.ports[op].operands[found[0].operand]


def _contents(kernels: Sequence[Kernel]) -> Iterator[Hashable]:
    """What the ticks of a region's ops depend on; an op may run several kernels."""
    for i, k in enumerate(kernels):
        same_op = i > 0 and kernels[i - 1].op == k.op
        yield k.trips, k.flops, k.matmul, k.dtype, k.launches, k.traffic, k.iteration, same_op


def _getter(regions: tuple[int, ...]) -> Callable[[Sequence[int]], Hashable]:
    return itemgetter(*regions)
