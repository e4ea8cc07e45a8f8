"""A layout: the program with an assignment for every region, and all that follows from it.

Where each value is made, in which sharding; where it is read in another; which collectives that takes. Memory, the
estimate and emission all read this one object, so that what is priced is what is emitted.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from ffjax.ir import manual
from ffjax.ir.assignment import Assignment, scattered, spec_of
from ffjax.ir.graph import Graph, Op
from ffjax.ir.halo import Cut, exchanges, halos, split_halos
from ffjax.ir.op_kinds import ends_in_its_sum
from ffjax.ir.regions import Dims, Regions
from ffjax.ir.reshard_chain import Hop, reshard_chain
from ffjax.ir.spec import Collective, CollectiveKind, MeshShape, Spec, shard_count


@dataclass(frozen=True, slots=True, kw_only=True)
class PlannedCollective:
    """A collective that the plan implies: `count` times in a step, because of this op."""

    collective: Collective
    count: float
    op: int
    value: int
    merged: bool
    """Whether the compiler may merge it with others of its kind; see `ffjax.ir.merging`."""
    user: bool = False
    """Whether the program itself spells it out, inside `shard_map`."""


@dataclass(slots=True, kw_only=True)
class Layout:
    """The program under one plan on one mesh. `assignments` has one entry per region."""

    regions: Regions
    mesh: MeshShape
    assignments: Sequence[Assignment]
    axis_prices: tuple[float, ...]
    """What a byte costs on each mesh axis, relative to the others: it decides the way a resharding takes."""
    _specs: dict[tuple[int, Dims], Spec] = field(default_factory=dict)

    @property
    def graph(self) -> Graph:
        return self.regions.graph

    def _spec(self, region: int, dims: Dims) -> Spec:
        key = (region, dims)
        found = self._specs.get(key)
        if found is None:
            spec = spec_of(dims, self.regions.regions[region].sizes, self.assignments[region], self.mesh)
            if spec is None:
                raise ValueError(f"the assignment of region {region} cannot be written as a PartitionSpec")
            found = self._specs[key] = spec
        return found

    def partial(self, value: int) -> Spec:
        """The sharding of a value as its op leaves it, reductions done, before any scatter."""
        return self._spec(self.regions.region_of[self.graph.values[value].producer], self.regions.home[value])

    def home(self, value: int) -> Spec:
        """The sharding in which a value is made."""
        if not self.regions.may_scatter(value):
            return self.partial(value)
        region = self.regions.region_of[self.graph.values[value].producer]
        return scattered(self.partial(value), self.assignments[region], self.mesh)

    def operand(self, op: int, index: int) -> Spec:
        """The sharding in which an op reads its operand."""
        region = self.regions.region_of[op]
        return self._spec(region, self.regions.ports[op].operands[index])

    def partial_axes(self, op: int) -> tuple[str, ...]:
        """The mesh axes over which an op's results are partial sums that are reduced there."""
        return self._axes(op, self.regions.ports[op].reduced)

    def pending_axes(self, op: int) -> tuple[str, ...]:
        """The mesh axes over which an op's results stay partial sums, for an op to come to reduce."""
        return self._axes(op, self.regions.ports[op].pending)

    def _axes(self, op: int, atoms: tuple[int, ...]) -> tuple[str, ...]:
        if not atoms:
            return ()
        assignment = self.assignments[self.regions.region_of[op]]
        return tuple(n for n, a in zip(self.mesh.axes, assignment.atoms, strict=True) if a in atoms)

    def local_bytes(self, value: int, spec: Spec | None = None) -> float:
        return self.graph.values[value].bytes / shard_count(self.home(value) if spec is None else spec, self.mesh)

    def copies(self) -> Iterator[tuple[int, Spec, int, int]]:
        """Every resharding: (value, the sharding it is read in, scope, first op that reads it so)."""
        seen: set[tuple[int, Spec, int]] = set()
        ops = self.graph.ops
        for edge in self.regions.edges:
            spec, scope = self.operand(edge.op, edge.operand), ops[edge.op].scope
            if spec != self.home(edge.value) and (edge.value, spec, scope) not in seen:
                seen.add((edge.value, spec, scope))
                yield edge.value, spec, scope, edge.op

    def collectives(self) -> list[PlannedCollective]:
        """All collectives of a step: reductions of partial sums, and resharding."""
        graph = self.graph
        reads = self.reads()
        found: list[PlannedCollective] = []
        for op in graph.ops:
            axes = self.partial_axes(op.id)
            if not axes:
                continue
            for value in op.results:
                partial = self.partial(value)
                kind: CollectiveKind = (
                    "reduce_scatter" if self.scatters(value, axes, reads.get(value, set())) else "all_reduce"
                )
                collective = Collective(kind, axes, self.local_bytes(value, partial))
                found.append(
                    PlannedCollective(
                        collective=collective,
                        count=graph.scopes[op.scope].trips,
                        op=op.id,
                        value=value,
                        merged=self.regions.merged_sums[value],
                    )
                )
        for op in graph.ops:
            found += [
                PlannedCollective(
                    collective=collective,
                    count=graph.scopes[op.scope].trips,
                    op=op.id,
                    value=op.operands[halos(op.eqn)[0].operand],
                    merged=False,
                )
                for collective in self.fetches(op.id)
            ]
            found += [
                PlannedCollective(
                    collective=collective,
                    count=often * graph.scopes[op.scope].trips,
                    op=op.id,
                    value=(*op.results, *op.operands)[0],
                    merged=False,
                    user=True,
                )
                for collective, often in self.own_collectives(op.id)
            ]
        # Ways that begin alike share their beginning.
        moved: set[tuple[int, int, tuple[Spec, ...]]] = set()
        for value, spec, scope, op_id in self.copies():
            local_bytes = self.local_bytes(value)
            way: tuple[Spec, ...] = ()
            for hop in self.way(value, spec):
                way += (hop.spec,)
                if hop.step is None or (value, scope, way) in moved:
                    continue
                moved.add((value, scope, way))
                kind, step_axes, multiplier = hop.step
                found.append(
                    PlannedCollective(
                        collective=Collective(kind, step_axes, local_bytes * multiplier),
                        count=graph.scopes[scope].trips,
                        op=op_id,
                        value=value,
                        merged=self.regions.merged_copies[value],
                    )
                )
        return found

    def cuts(self, op: int) -> list[Cut]:
        """The dimensions of an op's image that are cut where a window slides over it."""
        eqn = self.graph.ops[op].eqn
        found = halos(eqn)
        return split_halos(eqn, self.operand(op, found[0].operand), self.mesh) if found else []

    def exchanges(self, op: int, *, fetched: bool = False) -> list[Collective]:
        """The permutes by which devices fetch the edges of their neighbours' pieces of an image."""
        if not self.cuts(op):
            return []
        eqn = self.graph.ops[op].eqn
        index = halos(eqn)[0].operand
        spec = self.operand(op, index)
        local_bytes = self.local_bytes(self.graph.ops[op].operands[index], spec)
        return exchanges(eqn, spec, self.mesh, local_bytes, fetched=fetched)

    def fetches(self, op: int) -> list[Collective]:
        """Its exchanges, without those of edges that an op before it has brought."""
        return self.exchanges(op, fetched=self.fetched_by(op) != op)

    def fetched_by(self, op: int) -> int:
        """The first op that brings the edges of an image that this one needs."""
        before = self.regions.same_images.get(op, ())
        edges = self._edges(op) if before else ()
        return next((other for other in before if self._edges(other) == edges), op)

    def _edges(self, op: int) -> tuple[object, ...]:
        cuts = self.cuts(op)
        if not cuts:
            return ()
        widths = [(cut.halo.dim, cut.axes, cut.halo.widths(cut.pieces)) for cut in cuts]
        return self.operand(op, cuts[0].halo.operand), *widths

    def own_collectives(self, op: int) -> list[tuple[Collective, float]]:
        """Those that the user's own `shard_map` region spells out, and how often each runs when the op runs once.

        None where it does not run over this mesh.
        """
        return own_collectives(self.graph.ops[op], self.mesh)

    def reads(self) -> dict[int, set[Spec]]:
        """For each value that is a reduced partial sum the shardings in which it is read."""
        graph = self.graph
        reads: dict[int, set[Spec]] = {v: set() for op in graph.ops if self.partial_axes(op.id) for v in op.results}
        for op in graph.ops:
            for index, value in enumerate(op.operands):
                if value in reads:
                    reads[value].add(self.operand(op.id, index))
        return reads

    def scatters(self, value: int, axes: tuple[str, ...], reads: set[Spec]) -> bool:
        """Whether partial sums over `axes` are reduce-scattered: by plan, or because all who read them slice so.

        An all-reduce that only a slice of one dimension over the same axes reads is a reduce-scatter to the compiler.
        """
        home, partial = self.home(value), self.partial(value)
        if home != partial:
            return True
        if len(reads) != 1 or not ends_in_its_sum(self.graph.ops[self.graph.values[value].producer]):
            return False
        way = self.way(value, *reads)
        if not way or way[0].step is not None:
            return False
        sliced = [set(after) - set(before) for before, after in zip(home, way[0].spec, strict=True)]
        return [some for some in sliced if some] == [set(axes)]

    def way(self, value: int, spec: Spec) -> tuple[Hop, ...]:
        """The moves that take a value from its home to another sharding."""
        return reshard_chain(self.home(value), spec, self.mesh, self.graph.values[value].shape, self.axis_prices)


def own_collectives(op: Op, mesh: MeshShape) -> list[tuple[Collective, float]]:
    """What `Layout.own_collectives` says of an op under any layout on a mesh."""
    if op.eqn is None or op.kind != manual.NAME or not manual.manual(op.eqn).runs_on(mesh):
        return []
    return manual.own_collectives(op.eqn)
