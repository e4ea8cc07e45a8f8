"""Regions: ops that share factors and are therefore sharded together. The nodes of the search.

Elementwise ops, broadcasts, transposes and the reductions of a normalisation or a softmax follow one
another's sharding for free, so their factors are joined along the values between them. What does the
work (contractions, convolutions, gathers, sorts, reshapes that merge dimensions) stays alone: between
it and its neighbours a value may be resharded.

Joining never makes one factor index two dimensions of one value, and never joins a factor that can be
split with one that cannot: there the edge stays, and resharding across it is priced like any other.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from ffjax.ir.atoms import Atoms, View
from ffjax.ir.compose import NEED_REPLICATION
from ffjax.ir.graph import NO_VALUE, Graph, Op
from ffjax.ir.merging import merged_copies, merged_sums
from ffjax.ir.op_kinds import is_light, is_reduction
from ffjax.ir.sums import CONTRACTION, Contracted, DelayedSum, delayed_sums

Dims = tuple[tuple[int, ...], ...]
"""For each dimension of a value the atoms that index it, major to minor, numbered within one region."""


@dataclass(slots=True, kw_only=True)
class OpDims:
    """The dimensions of an op's operands and results, in atoms of its region."""

    operands: tuple[Dims, ...]
    results: tuple[Dims, ...]
    reduced: tuple[int, ...]
    """Atoms over which the op reduces: where they are split, its results are partial sums."""
    pending: tuple[int, ...] = ()
    """Atoms over which its results stay partial sums, to be reduced by an op to come (`ffjax.ir.sums`)."""


@dataclass(slots=True, kw_only=True)
class Region:
    """A node of the search. Atoms are numbered in order of appearance, so alike regions number alike."""

    id: int
    ops: list[int] = field(default_factory=list)
    dims: list[OpDims] = field(default_factory=list)
    """Beside `ops`: the dimensions of each."""
    sizes: tuple[int, ...] = ()
    kinds: tuple[int, ...] = ()
    solo: bool = False
    """One op that does work, or one delayed sum: the partial results of the last op may be reduce-scattered."""

    def can_split(self, atom: int) -> bool:
        return not self.kinds[atom] & NEED_REPLICATION


@dataclass(slots=True, kw_only=True)
class Edge:
    """A value read where its dimensions are other atoms than where it was made."""

    value: int
    source: int
    source_dims: Dims
    target: int
    target_dims: Dims
    op: int
    operand: int


@dataclass(slots=True, kw_only=True)
class Regions:
    graph: Graph
    regions: list[Region]
    region_of: list[int]
    """For each op its region."""
    ports: list[OpDims]
    """For each op its dimensions, in atoms of its region."""
    home: list[Dims]
    """For each value its dimensions, in atoms of its producer's region."""
    edges: list[Edge]
    merged_sums: list[bool]
    """For each value whether a sum that makes it can be merged with others; see `ffjax.ir.merging`."""
    merged_copies: list[bool]
    """The same of a copy of it in another sharding."""

    def may_scatter(self, value: int) -> bool:
        """Whether an assignment's `scatter` is about this value."""
        producer = self.graph.values[value].producer
        region = self.regions[self.region_of[producer]]
        return region.solo and region.ops[-1] == producer


def find_regions(graph: Graph) -> Regions:
    """Joins the program's ops into regions, in near-linear time."""
    return _Joiner(graph).join()


class _Joiner:
    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        self.atoms = Atoms(graph)
        self.factors, self.dims = self.atoms.factors, self.atoms.dims
        self.consumers: list[list[tuple[int, int]]] = [[] for _ in graph.values]
        for op in graph.ops:
            for index, value in enumerate(op.operands):
                if value != NO_VALUE:
                    self.consumers[value].append((op.id, index))
        self.light = [is_light(op) for op in graph.ops]
        self.sums: list[DelayedSum] = []

    def join(self) -> Regions:
        graph = self.graph
        for (op_a, side_a, i), (op_b, side_b, j) in graph.ties:
            self.atoms.unify(self.atoms.port(op_a, side_a, i), self.atoms.port(op_b, side_b, j), force=True)
        self.join_sums()
        for op in graph.ops:
            if not self.light[op.id]:
                continue
            for index, value in enumerate(op.operands):
                if value != NO_VALUE and self.follows(op, value):
                    producer = graph.values[value].producer
                    result = graph.ops[producer].results.index(value)
                    self.atoms.unify(self.dims[producer][1][result], self.dims[op.id][0][index])
        self.join_reductions()
        self.join_namesakes()
        return self.collect()

    def follows(self, op: Op, value: int) -> bool:
        """Whether an op takes over the sharding of the value that it reads."""
        graph = self.graph
        producer = graph.ops[graph.values[value].producer]
        if graph.values[value].constant or op.kind == "result":
            return False
        if op.kind == "enter":
            # A slice of a stacked array is sharded like the whole; what else enters may be resharded outside.
            return self.light[producer.id] and len(op.rule.operands[0]) > len(op.rule.results[0])
        if producer.kind == "argument":
            # An array that is read in several places keeps a sharding of its own (ZeRO needs that freedom).
            return len(self.consumers[value]) == 1
        return self.light[producer.id]

    def join_sums(self) -> None:
        """The contractions of a delayed sum and the ops that add them up are one region, sharded alike."""
        name = self.atoms.names()
        contracted = Contracted(atoms=self.atoms.contracted, size=self.factors.size, name=lambda atom: name[atom])
        for found in delayed_sums(self.graph, self.consumers, contracted):
            views = [*self.inside(found), *(([[a]], [[b]]) for a, b in found.pairs)]
            if all(self.atoms.joins(a, b) for a, b in views):
                for a, b in views:
                    self.atoms.unify(a, b)
                self.sums.append(found)
                for op in found.ops:
                    self.light[op] = False

    def inside(self, found: DelayedSum) -> Iterable[tuple[View, View]]:
        """Both views of each value that passes from one op of a delayed sum to the next."""
        for op in (self.graph.ops[o] for o in found.ops):
            for index, value in enumerate(op.operands):
                if op.kind != CONTRACTION and value != NO_VALUE:
                    yield self.dims[self.graph.values[value].producer][1][0], self.dims[op.id][0][index]

    def join_reductions(self) -> None:
        """A reduction whose result comes back to its operand's region (mean, max, norm) belongs to it."""
        roots = self.atoms.components()
        joined: dict[int, int] = {}

        def root(op: int) -> int:
            at = roots[op]
            while at in joined:
                at = joined[at]
            return at

        for op in self.graph.ops:
            if not is_reduction(op) or op.operands[0] == NO_VALUE or len(op.results) != 1:
                continue
            value = self.graph.values[op.operands[0]]
            producer = self.graph.ops[value.producer]
            if value.constant or producer.kind == "argument" or not self.light[producer.id]:
                continue
            readers = [(c, i) for c, i in self.consumers[op.results[0]] if self.light[c]]
            if any(root(c) == root(producer.id) for c, _ in readers):
                self.atoms.unify(self.dims[producer.id][1][producer.results.index(value.id)], self.dims[op.id][0][0])
                for c, i in readers:
                    self.atoms.unify(self.dims[op.id][1][0], self.dims[c][0][i])
                    if root(c) != root(producer.id):
                        joined[root(c)] = root(producer.id)

    def join_namesakes(self) -> None:
        """Joins atoms of one region that are the same dimension of the program but never meet in one value.

        Two computations that share only a small table have a batch each: one mesh axis could not split both.
        """
        name, parts = self.atoms.names(), self.atoms.components()
        atoms = {a for a in self.atoms.where if self.factors.find(a) == a}
        alike: dict[tuple[int, int, int], list[int]] = {}
        for atom in sorted(atoms):
            key = (parts[min(self.atoms.where[atom])[0]], name[atom], self.factors.size(atom))
            alike.setdefault(key, []).append(atom)
        for group in alike.values():
            for other in group[1:]:
                self.atoms.unify([[group[0]]], [[other]])

    def collect(self) -> Regions:
        """Numbers the regions and, within each, its atoms, both in the order of the ops."""
        graph, factors = self.graph, self.factors
        roots = self.atoms.components()
        resolved: list[tuple[list[tuple[tuple[int, ...], ...]], list[tuple[tuple[int, ...], ...]]]] = []
        for op in graph.ops:
            both = tuple(
                [tuple(tuple(factors.leaves(dim)) for dim in value) for value in side] for side in self.dims[op.id]
            )
            resolved.append((both[0], both[1]))
        regions: list[Region] = []
        numbers: dict[int, int] = {}
        region_of: list[int] = []
        local: list[dict[int, int]] = []
        home: list[Dims] = [()] * len(graph.values)
        ports: list[OpDims] = []
        for op in graph.ops:
            root = roots[op.id]
            if root not in numbers:
                numbers[root] = len(regions)
                regions.append(Region(id=len(regions)))
                local.append({})
            region, names = regions[numbers[root]], local[numbers[root]]

            def name(value: tuple[tuple[int, ...], ...], names: dict[int, int] = names) -> Dims:
                return tuple(tuple(names.setdefault(a, len(names)) for a in dim) for dim in value)

            operands = tuple(name(v) for v in resolved[op.id][0])
            results = tuple(name(v) for v in resolved[op.id][1])
            reduced = tuple(dict.fromkeys(names[leaf] for leaf in self.atoms.reduced(op)))
            region.ops.append(op.id)
            ports.append(OpDims(operands=operands, results=results, reduced=reduced))
            region.dims.append(ports[-1])
            region_of.append(region.id)
            for value, dims in zip(op.results, results, strict=True):
                home[value] = dims
        for region, names in zip(regions, local, strict=True):
            region.sizes = tuple(factors.size(a) for a in names)
            twice = _indexed_twice(region)
            region.kinds = tuple(factors.kind(a) | (NEED_REPLICATION if n in twice else 0) for a, n in names.items())
            region.solo = len(region.ops) == 1 and not self.light[region.ops[0]]
        for found in self.sums:
            region = regions[region_of[found.ops[-1]]]
            shared = {local[region.id][self.factors.find(a)] for a in found.reduced}
            if tuple(region.ops) == found.ops and shared:
                region.solo = True
                _delay(region, shared)
        edges = [
            Edge(
                value=value,
                source=region_of[graph.values[value].producer],
                source_dims=home[value],
                target=region_of[op.id],
                target_dims=ports[op.id].operands[index],
                op=op.id,
                operand=index,
            )
            for op in graph.ops
            for index, value in enumerate(op.operands)
            if value != NO_VALUE
            and graph.values[value].shape
            and not graph.values[value].constant
            and (region_of[graph.values[value].producer], home[value])
            != (region_of[op.id], ports[op.id].operands[index])
        ]
        return Regions(
            graph=graph,
            regions=regions,
            region_of=region_of,
            ports=ports,
            home=home,
            edges=edges,
            merged_sums=merged_sums(graph),
            merged_copies=merged_copies(graph),
        )


def _delay(region: Region, shared: set[int]) -> None:
    """Leaves the sums over the atoms that all contractions of a delayed sum reduce over to its last op."""
    for port in region.dims:
        port.reduced = tuple(a for a in port.reduced if a not in shared)
        port.pending = tuple(sorted(shared))
    last = region.dims[-1]
    last.reduced, last.pending = last.pending, ()


def _indexed_twice(region: Region) -> set[int]:
    """Atoms that index two dimensions of one value, or a sum and what is summed: no mesh axis can split both."""
    twice: set[int] = set()
    for dims in region.dims:
        for value in dims.operands + dims.results:
            flat = [a for dim in value for a in dim]
            if len(flat) != len(set(flat)):
                twice |= {a for a in flat if flat.count(a) > 1}
        twice |= {a for value in dims.results for dim in value for a in dim if a in dims.reduced}
    return twice
