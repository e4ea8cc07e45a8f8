"""Regions: ops that share factors and are therefore sharded together. The nodes of the search.

Elementwise ops, broadcasts, transposes and the reductions of a normalisation or a softmax follow one
another's sharding for free, so their factors are joined along the values between them. What does the
work (contractions, convolutions, gathers, sorts, reshapes that merge dimensions) stays alone: between
it and its neighbours a value may be resharded.

Joining never makes one factor index two dimensions of one value, and never joins a factor that can be
split with one that cannot: there the edge stays, and resharding across it is priced like any other.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np

from ffjax.ir.atoms import Atoms, Dims, Ints, OpDims, connected
from ffjax.ir.compose import NEED_REPLICATION
from ffjax.ir.graph import NO_VALUE, Graph, Op
from ffjax.ir.merging import merged_copies, merged_sums, same_images
from ffjax.ir.op_kinds import is_light, is_reduction
from ffjax.ir.sums import CONTRACTION, Contracted, DelayedSum, delayed_sums

__all__ = ["Dims", "Edge", "OpDims", "Region", "Regions", "find_regions"]


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
    merged: frozenset[Dims] = frozenset()
    """The views of its values that have a dimension of several factors."""

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
    same_images: dict[int, tuple[int, ...]]
    """For each op with a window the earlier ones over the same image; see `ffjax.ir.merging`."""

    def may_scatter(self, value: int) -> bool:
        """Whether an assignment's `scatter` is about this value."""
        producer = self.graph.values[value].producer
        region = self.regions[self.region_of[producer]]
        return region.solo and region.ops[-1] == producer

    def subject(self, region: Region) -> tuple[str, str]:
        """The source line (or the path, of an argument) and the kind of a region's largest op."""
        graph = self.graph

        def size(op: Op) -> float:
            return max((graph.values[v].bytes for v in op.results), default=0.0)

        heaviest = max((graph.ops[i] for i in region.ops), key=size)
        if not heaviest.results:
            return heaviest.label, heaviest.kind
        value = graph.values[heaviest.results[0]]
        more = f" and {len(region.ops) - 1} more" if len(region.ops) > 1 else ""
        return graph.source(heaviest), f"{heaviest.kind} {value.dtype}{list(value.shape)}{more}"


def find_regions(graph: Graph) -> Regions:
    """Joins the program's ops into regions, in near-linear time."""
    return _Joiner(graph).join()


class _Joiner:
    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        self.atoms = Atoms([op.rule for op in graph.ops])
        self.made = [(0, 0)] * len(graph.values)
        """For each value the op that makes it, and as which of its results."""
        self.consumers: list[list[tuple[int, int]]] = [[] for _ in graph.values]
        for op in graph.ops:
            for index, value in enumerate(op.results):
                self.made[value] = (op.id, index)
            for index, value in enumerate(op.operands):
                if value != NO_VALUE:
                    self.consumers[value].append((op.id, index))
        self.light = [is_light(op) for op in graph.ops]
        self.sums: list[DelayedSum] = []

    def join(self) -> Regions:
        atoms = self.atoms
        for a, b in self.graph.ties:
            atoms.unify(atoms.base[a[0]], atoms.base[b[0]], atoms.pairs(atoms.view(*a), atoms.view(*b)), force=True)
        self.join_sums()
        for op in self.graph.ops:
            if self.light[op.id]:
                for index, value in enumerate(op.operands):
                    if value != NO_VALUE and self.follows(op, value):
                        self.pass_on(value, op.id, index)
        self.join_reductions()
        self.join_namesakes()
        return self.collect()

    def pass_on(self, value: int, op: int, operand: int) -> None:
        """Joins a value as it is made with an operand of an op that reads it."""
        atoms, (maker, result) = self.atoms, self.made[value]
        pairs = atoms.pairs((atoms.of[maker], "result", result), (atoms.of[op], "operand", operand))
        atoms.unify(atoms.base[maker], atoms.base[op], pairs)

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

    def join_reductions(self) -> None:
        """A reduction whose result comes back to its operand's region (mean, max, norm) belongs to it."""
        roots = self.atoms.components().tolist()
        joined: dict[int, int] = {}

        def root(op: int) -> int:
            first: int = roots[op]
            at = first
            while at in joined:
                at = joined[at]
            if at != first:
                joined[first] = at
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
                self.pass_on(value.id, op.id, 0)
                for c, i in readers:
                    self.pass_on(op.results[0], c, i)
                    if root(c) != root(producer.id):
                        joined[root(c)] = root(producer.id)

    def names(self) -> Ints:
        """For each atom which dimension of the program it is: atoms that meet in a value are of one name."""
        atoms, values = self.atoms, self.graph.values
        # Reads by which atoms meet in them: for each the first atoms of the two ops.
        meetings: dict[tuple[tuple[int, int], ...], tuple[list[int], list[int]]] = {}
        for op in self.graph.ops:
            template, base = atoms.of[op.id], atoms.base[op.id]
            for index, value in enumerate(op.operands):
                if value == NO_VALUE or values[value].constant:
                    continue
                maker, result = self.made[value]
                pairs = atoms.pairs((atoms.of[maker], "result", result), (template, "operand", index))
                if pairs:
                    made, read = meetings.setdefault(pairs, ([], []))
                    made.append(atoms.base[maker])
                    read.append(base)
        root = atoms.roots()
        left, right = [root[:0]], [root[:0]]
        for pairs, (made, read) in meetings.items():
            left += [root[np.array(made) + x] for x, _ in pairs]
            right += [root[np.array(read) + y] for _, y in pairs]
        return connected(len(root), np.concatenate(left), np.concatenate(right))

    def join_sums(self) -> None:
        """The contractions of a delayed sum and the ops that add them up are one region, sharded alike."""
        atoms = self.atoms
        name: list[int] = self.names().tolist()
        contracted = Contracted(
            atoms=lambda op: atoms.contracted(op.id), size=lambda a: atoms.sizes[a], name=lambda a: name[a]
        )
        for found in delayed_sums(self.graph, self.consumers, contracted):
            meetings = [*self.inside(found), *found.pairs]
            if all(a >= 0 and atoms.joins(a, b) for a, b in meetings):
                for a, b in meetings:
                    atoms.unify(a, b, ((0, 0),))
                self.sums.append(found)
                for op in found.ops:
                    self.light[op] = False

    def inside(self, found: DelayedSum) -> Iterable[tuple[int, int]]:
        """The atoms of each value that passes from one op of a delayed sum to the next; -1 where they do not agree."""
        atoms = self.atoms
        for op in (self.graph.ops[o] for o in found.ops):
            for index, value in enumerate(op.operands):
                if op.kind != CONTRACTION and value != NO_VALUE:
                    maker, result = self.made[value]
                    made, read = atoms.of[maker].results[result], atoms.of[op.id].operands[index]
                    pairs = atoms.pairs((atoms.of[maker], "result", result), (atoms.of[op.id], "operand", index))
                    if len(pairs) < max(sum(map(len, made)), sum(map(len, read))):
                        yield -1, -1
                    for x, y in pairs:
                        yield atoms.base[maker] + x, atoms.base[op.id] + y

    def join_namesakes(self) -> None:
        """Joins atoms of one region that are the same dimension of the program but never meet in one value.

        Two computations that share only a small table have a batch each: one mesh axis could not split both.
        """
        atoms, name = self.atoms, self.names()
        root = atoms.roots()
        part = np.zeros(len(root), dtype=np.int64)
        part[root[atoms.row]] = atoms.components()[atoms.row_op]
        distinct = np.unique(root[atoms.row])
        alike: dict[tuple[int, int, int], list[int]] = {}
        for atom, *found in zip(*(a.tolist() for a in (distinct, part[distinct], name[distinct])), strict=True):
            alike.setdefault((found[0], found[1], atoms.sizes[atom]), []).append(atom)
        for group in alike.values():
            for other in group[1:]:
                atoms.unify(group[0], other, ((0, 0),))

    def collect(self) -> Regions:
        """Numbers the regions and, within each, its atoms, both in the order of the ops."""
        graph, joined = self.graph, self.atoms
        first_op, region_of = np.unique(joined.components(), return_inverse=True)
        regions = [Region(id=i) for i in range(len(first_op))]
        root = joined.roots()
        # Atoms by region and, within it, by appearance.
        atoms, appears = np.unique(root[joined.row], return_index=True)
        owner = region_of[joined.row_op[appears]]
        order = np.lexsort((appears, owner))
        atoms, owner = atoms[order], owner[order]
        number = np.zeros(len(root), dtype=np.int64)
        number[atoms] = np.arange(len(atoms)) - np.searchsorted(owner, owner)
        local: list[int] = number[root].tolist()
        shared: dict[tuple[int, tuple[int, ...]], OpDims] = {}
        ports: list[OpDims] = []
        home: list[Dims] = [()] * len(graph.values)
        for op, region, template, base in zip(graph.ops, region_of.tolist(), joined.of, joined.base, strict=True):
            names = tuple(local[base : base + len(template.sizes)])
            dims = shared.get((id(template), names))
            if dims is None:
                dims = shared[id(template), names] = template.dims(names)
            ports.append(dims)
            regions[region].ops.append(op.id)
            regions[region].dims.append(dims)
            for value, port in zip(op.results, dims.results, strict=True):
                home[value] = port
        twice = {id(dims): _indexed_twice(dims) for dims in shared.values()}
        bounds = np.searchsorted(owner, np.arange(len(regions) + 1)).tolist()
        for region, start, end in zip(regions, bounds, bounds[1:], strict=False):
            own = atoms[start:end].tolist()
            distinct = {id(dims): dims for dims in region.dims}
            doubled = frozenset[int]().union(*[twice[key] for key in distinct])
            region.merged = frozenset(
                v for dims in distinct.values() for v in dims.operands + dims.results if any(len(dim) > 1 for dim in v)
            )
            region.sizes = tuple(joined.sizes[a] for a in own)
            region.kinds = tuple(joined.kinds[a] | (NEED_REPLICATION if n in doubled else 0) for n, a in enumerate(own))
            region.solo = len(region.ops) == 1 and not self.light[region.ops[0]]
        for found in self.sums:
            region = regions[region_of[found.ops[-1]]]
            delayed = {int(number[root[a]]) for a in found.reduced}
            if tuple(region.ops) == found.ops and delayed:
                region.solo = True
                region.dims = _delayed(region, delayed)
                for op, dims in zip(region.ops, region.dims, strict=True):
                    ports[op] = dims
        made_in = region_of[[v.producer for v in graph.values]].tolist()
        edges = [
            Edge(
                value=value,
                source=made_in[value],
                source_dims=home[value],
                target=region,
                target_dims=dims,
                op=op.id,
                operand=index,
            )
            for op, region, port in zip(graph.ops, region_of.tolist(), ports, strict=True)
            for index, (value, dims) in enumerate(zip(op.operands, port.operands, strict=True))
            if value != NO_VALUE
            and (made_in[value] != region or home[value] != dims)
            and graph.values[value].shape
            and not graph.values[value].constant
        ]
        return Regions(
            graph=graph,
            regions=regions,
            region_of=region_of.tolist(),
            ports=ports,
            home=home,
            edges=edges,
            merged_sums=merged_sums(graph),
            merged_copies=merged_copies(graph),
            same_images=same_images(graph),
        )


def _delayed(region: Region, shared: set[int]) -> list[OpDims]:
    """With the sums over the atoms that all contractions of a delayed sum reduce over left to its last op."""
    pending = tuple(sorted(shared))
    *before, last = region.dims
    return [
        *(
            dataclasses.replace(d, reduced=tuple(a for a in d.reduced if a not in shared), pending=pending)
            for d in before
        ),
        dataclasses.replace(last, reduced=pending),
    ]


def _indexed_twice(dims: OpDims) -> frozenset[int]:
    """Atoms that index two dimensions of one value, or a sum and what is summed: no mesh axis can split both."""
    twice: set[int] = set()
    for value in dims.operands + dims.results:
        flat = [a for dim in value for a in dim]
        if len(flat) != len(set(flat)):
            twice |= {a for a in flat if flat.count(a) > 1}
    twice |= {a for value in dims.results for dim in value for a in dim if a in dims.reduced}
    return frozenset(twice)
