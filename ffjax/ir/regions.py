"""Regions: ops that share factors and are therefore sharded together. The nodes of the search.

Elementwise ops, broadcasts, transposes and the reductions of a normalisation or a softmax follow one
another's sharding for free, so their factors are joined along the values between them. What does the
work (contractions, convolutions, gathers, sorts, reshapes that merge dimensions) stays alone: between
it and its neighbours a value may be resharded.

Joining never makes one factor index two dimensions of one value, and never joins a factor that can be
split with one that cannot: there the edge stays, and resharding across it is priced like any other.
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from ffjax.ir.compose import NEED_REPLICATION, PERMUTATION, kinds_of
from ffjax.ir.graph import NO_VALUE, Graph, Op
from ffjax.ir.merging import merged_copies, merged_sums
from ffjax.ir.op_kinds import is_light, is_reduction
from ffjax.ir.rules import OpShardingRule

Ints = NDArray[np.int64]

Dims = tuple[tuple[int, ...], ...]
"""For each dimension of a value the atoms that index it, major to minor, numbered within one region."""


@dataclass(slots=True, kw_only=True)
class OpDims:
    """The dimensions of an op's operands and results, in atoms of its region."""

    operands: tuple[Dims, ...]
    results: tuple[Dims, ...]
    reduced: tuple[int, ...]
    """Atoms over which the op reduces: where they are split, its results are partial sums."""


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
    """One op that does work: its partial results may be reduce-scattered."""
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


def find_regions(graph: Graph) -> Regions:
    """Joins the program's ops into regions, in near-linear time."""
    return _Joiner(graph).join()


@dataclass(frozen=True, slots=True, eq=False)
class _Template:
    """A rule with its factors of size 1 dropped: what all ops of this rule have in common.

    Dimensions of operands and results as the rule's own atoms, numbered from 0; then all of them in one row, and beside
    each of that row the slot (operands first, then results) that it is of.
    """

    operands: tuple[Dims, ...]
    results: tuple[Dims, ...]
    sizes: list[int]
    kinds: list[int]
    reduced: tuple[int, ...]
    flat: Ints
    slot: Ints

    @classmethod
    def of(cls, rule: OpShardingRule) -> _Template:
        kept = [f for f, size in enumerate(rule.sizes) if size > 1]
        number = {f: i for i, f in enumerate(kept)}
        kinds = kinds_of(rule)
        sides = [tuple(tuple(tuple(number[f] for f in d if f in number) for d in v) for v in rule.operands)]
        sides.append(tuple(tuple(tuple(number[f] for f in d if f in number) for d in v) for v in rule.results))
        row = [(a, slot) for slot, dims in enumerate(sides[0] + sides[1]) for dim in dims for a in dim]
        return cls(
            operands=sides[0],
            results=sides[1],
            sizes=[rule.sizes[f] for f in kept],
            kinds=[kinds[f] for f in kept],
            reduced=tuple(
                dict.fromkeys(number[f] for v in rule.operands for d in v for f in d if f in rule.reduction & set(kept))
            ),
            flat=np.array([a for a, _ in row], dtype=np.int64),
            slot=np.array([slot for _, slot in row], dtype=np.int64),
        )

    def port(self, side: str, index: int) -> Dims:
        return self.operands[index] if side == "operand" else self.results[index]

    def dims(self, names: tuple[int, ...]) -> OpDims:
        """The dimensions of an op whose atoms have these names."""

        def named(value: Dims) -> Dims:
            return tuple(tuple(names[a] for a in dim) for dim in value)

        return OpDims(
            operands=tuple(map(named, self.operands)),
            results=tuple(map(named, self.results)),
            reduced=tuple(dict.fromkeys(names[a] for a in self.reduced)),
        )


_View = tuple[_Template, str, int]
"""One side of an op, and which operand or result it is."""


class _Joiner:
    """Ops bring atoms of their own, one for each factor; joining is a union-find over these.

    Atoms are never split here: ties are between views of one shape that are each one factor per dimension, and all
    other joins leave dimensions alone that are divided differently.
    """

    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        known: dict[int, _Template] = {}
        self.of: list[_Template] = []
        self.base: list[int] = []
        """For each op its first atom."""
        self.sizes: list[int] = []
        self.kinds: list[int] = []
        for op in graph.ops:
            template = known.get(id(op.rule))
            if template is None:
                template = known[id(op.rule)] = _Template.of(op.rule)
            self.of.append(template)
            self.base.append(len(self.sizes))
            self.sizes += template.sizes
            self.kinds += template.kinds
        self.parent = list(range(len(self.sizes)))
        # Every atom in every dimension in which it is, in the order of ops, as parallel rows.
        counts = np.array([len(t.flat) for t in self.of], dtype=np.int64)
        slots = np.array([len(t.operands) + len(t.results) for t in self.of], dtype=np.int64)
        nothing = [np.zeros(0, dtype=np.int64)]
        self.row = np.concatenate(nothing + [t.flat for t in self.of]) + np.repeat(
            np.array(self.base, dtype=np.int64), counts
        )
        self.row_op = np.repeat(np.arange(len(graph.ops), dtype=np.int64), counts)
        first_slot = np.cumsum(slots) - slots
        row_slot = np.concatenate(nothing + [t.slot for t in self.of]) + np.repeat(first_slot, counts)
        # By atom: which values it indexes, so that a join that would index one twice is seen.
        self.where: list[set[int]] = [set() for _ in self.sizes]
        for atom, slot in zip(self.row.tolist(), row_slot.tolist(), strict=True):
            self.where[atom].add(slot)
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
        self.known: dict[Hashable, tuple[tuple[int, int], ...]] = {}

    def join(self) -> Regions:
        graph = self.graph
        for (op_a, side_a, i), (op_b, side_b, j) in graph.ties:
            pairs = self.pairs((self.of[op_a], side_a, i), (self.of[op_b], side_b, j))
            self.unify(self.base[op_a], self.base[op_b], pairs, force=True)
        for op in graph.ops:
            if self.light[op.id]:
                for index, value in enumerate(op.operands):
                    if value != NO_VALUE and self.follows(op, value):
                        self.pass_on(value, op.id, index)
        self.join_reductions()
        self.join_namesakes()
        return self.collect()

    def pass_on(self, value: int, op: int, operand: int) -> None:
        """Joins a value as it is made with an operand of an op that reads it."""
        maker, result = self.made[value]
        pairs = self.pairs((self.of[maker], "result", result), (self.of[op], "operand", operand))
        self.unify(self.base[maker], self.base[op], pairs)

    def pairs(self, a: _View, b: _View) -> tuple[tuple[int, int], ...]:
        """Which atoms of two views of one value are the same, in dimensions that both divide alike."""
        key = id(a[0]), a[1:], id(b[0]), b[1:]
        found = self.known.get(key)
        if found is None:
            found = self.known[key] = tuple(
                pair
                for left, right in zip(a[0].port(*a[1:]), b[0].port(*b[1:]), strict=True)
                if [a[0].sizes[x] for x in left] == [b[0].sizes[y] for y in right]
                for pair in zip(left, right, strict=True)
            )
        return found

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
        roots = self.components().tolist()
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

    def join_namesakes(self) -> None:
        """Joins atoms of one region that are the same dimension of the program but never meet in one value.

        Two computations that share only a small table have a batch each: one mesh axis could not split both.
        """
        root = self.roots()
        sizes = np.array(self.sizes, dtype=np.int64)
        # Reads by which atoms meet in them: for each the first atoms of the two ops.
        meetings: dict[tuple[tuple[int, int], ...], tuple[list[int], list[int]]] = {}
        for op in self.graph.ops:
            template, base = self.of[op.id], self.base[op.id]
            for index, value in enumerate(op.operands):
                if value == NO_VALUE or self.graph.values[value].constant:
                    continue
                maker, result = self.made[value]
                pairs = self.pairs((self.of[maker], "result", result), (template, "operand", index))
                if pairs:
                    made, read = meetings.setdefault(pairs, ([], []))
                    made.append(self.base[maker])
                    read.append(base)
        nothing = np.zeros(0, dtype=np.int64)
        left = np.concatenate([nothing, *(np.array(made) + x for pairs, (made, _) in meetings.items() for x, _ in pairs)])
        right = np.concatenate([nothing, *(np.array(read) + y for pairs, (_, read) in meetings.items() for _, y in pairs)])
        names = _connected(len(sizes), root[left], root[right])
        part = np.zeros(len(sizes), dtype=np.int64)
        part[root[self.row]] = self.components()[self.row_op]
        alike: dict[tuple[int, int, int], list[int]] = {}
        atoms = np.unique(root[self.row])
        for atom, *key in zip(atoms.tolist(), part[atoms].tolist(), names[atoms].tolist(), sizes[atoms].tolist()):
            alike.setdefault(tuple(key), []).append(atom)
        for group in alike.values():
            for other in group[1:]:
                self.unify(group[0], other, ((0, 0),))

    def roots(self) -> Ints:
        """For each atom the one that stands for all that it is joined with."""
        root = np.array(self.parent, dtype=np.int64)
        while not np.array_equal(further := root[root], root):
            root = further
        return root

    def components(self) -> Ints:
        """For each op the first op of its region: ops that share an atom are in one."""
        ops = len(self.graph.ops)
        return _connected(ops + len(self.sizes), self.row_op, self.roots()[self.row] + ops)[:ops]

    def find(self, atom: int) -> int:
        parent = self.parent
        while parent[atom] != atom:
            parent[atom] = parent[parent[atom]]
            atom = parent[atom]
        return atom

    def unify(self, a: int, b: int, pairs: tuple[tuple[int, int], ...], *, force: bool = False) -> None:
        """Joins pairs of atoms, counted from `a` and from `b`, wherever that is sound."""
        find, kinds, where = self.find, self.kinds, self.where
        for left, right in pairs:
            one, two = find(a + left), find(b + right)
            if one == two:
                continue
            # The oldest stands for all, so that results do not depend on the order of joins.
            x, y = (one, two) if one < two else (two, one)
            splittable = (kinds[x] ^ kinds[y]) & (NEED_REPLICATION | PERMUTATION) == 0
            small, large = where[x], where[y]
            if len(small) > len(large):
                small, large = large, small
            if force or (splittable and small.isdisjoint(large)):
                self.parent[y] = x
                kinds[x] |= kinds[y]
                large |= small
                where[x] = where[y] = large

    def collect(self) -> Regions:
        """Numbers the regions and, within each, its atoms, both in the order of the ops."""
        graph = self.graph
        first_op, region_of = np.unique(self.components(), return_inverse=True)
        regions = [Region(id=i) for i in range(len(first_op))]
        root = self.roots()
        # Atoms by region and, within it, by appearance.
        atoms, appears = np.unique(root[self.row], return_index=True)
        owner = region_of[self.row_op[appears]]
        order = np.lexsort((appears, owner))
        atoms, owner = atoms[order], owner[order]
        number = np.zeros(len(root), dtype=np.int64)
        number[atoms] = np.arange(len(atoms)) - np.searchsorted(owner, owner)
        local: list[int] = number[root].tolist()
        shared: dict[tuple[int, tuple[int, ...]], OpDims] = {}
        ports: list[OpDims] = []
        home: list[Dims] = [()] * len(graph.values)
        for op, region, template, base in zip(graph.ops, region_of.tolist(), self.of, self.base, strict=True):
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
            region.sizes = tuple(self.sizes[a] for a in own)
            region.kinds = tuple(
                self.kinds[a] | (NEED_REPLICATION if n in doubled else 0) for n, a in enumerate(own)
            )
            region.solo = len(region.ops) == 1 and not self.light[region.ops[0]]
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
        )


def _connected(count: int, left: Ints, right: Ints) -> Ints:
    """For each of `count` things the first of those that these pairs connect it with."""
    pairs = coo_array((np.ones(len(left), dtype=np.int8), (left, right)), shape=(count, count))
    label = connected_components(pairs, directed=False)[1]
    return np.unique(label, return_index=True)[1][label]


def _indexed_twice(dims: OpDims) -> frozenset[int]:
    """Atoms that index two dimensions of one value, which no mesh axis can split."""
    twice: set[int] = set()
    for value in dims.operands + dims.results:
        flat = [a for dim in value for a in dim]
        if len(flat) != len(set(flat)):
            twice |= {a for a in flat if flat.count(a) > 1}
    return frozenset(twice)
