"""Named dimensions: factors joined along every edge of the program, whatever ops they cross.

This is coarser than regions: a batch, a sequence, a width as a user thinks of them. It tells which factors of
which regions are the batch, and it names factors in explanations (TOAST, arXiv 2508.15010,
searches over exactly these).
"""

from __future__ import annotations

from collections import Counter, defaultdict
from dataclasses import dataclass

from ffjax.ir.compose import Factors
from ffjax.ir.op_kinds import BORDERS, PRODUCTS
from ffjax.ir.regions import Regions


@dataclass(slots=True, kw_only=True)
class NamedDims:
    """`of[region][atom]` are the named dimensions of a region's atom; `batch` are those of the batch."""

    of: list[tuple[frozenset[int], ...]]
    sizes: dict[int, int]
    batch: frozenset[int]

    def is_batch(self, region: int, atom: int) -> bool:
        return bool(self.of[region][atom] & self.batch)


def named_dims(regions: Regions) -> NamedDims:
    """Joins all atoms along all edges; then finds the batch."""
    factors = Factors()
    atoms = [[factors.new(size) for size in region.sizes] for region in regions.regions]
    for edge in regions.edges:
        for left, right in zip(edge.source_dims, edge.target_dims, strict=True):
            if left and right:
                factors.unify([atoms[edge.source][a] for a in left], [atoms[edge.target][a] for a in right])
    of = [tuple(frozenset(factors.leaves((a,))) for a in region) for region in atoms]
    sizes = {leaf: factors.size(leaf) for region in of for dims in region for leaf in dims}
    return NamedDims(of=of, sizes=sizes, batch=_batch(regions, of))


def _batch(regions: Regions, of: list[tuple[frozenset[int], ...]]) -> frozenset[int]:
    """The dimension that the step's data has in front; several where examples are counted in several ways.

    Data are the arguments that the step does not replace. In front is the first dimension that an op can split: a
    leading one that a scan walks over (time, microbatches) cannot be, nor the words of a random key. Weights are among
    such arguments where the step only reads them (evaluation, generation, adapters): the batch takes part in more
    products than any of their dimensions, the arrays of one argument agree on it, and fewer products sum over it. Where
    the data is replaced, too (tokens and their caches), the batch takes part in more products than what is left, and
    none sums over it. Nodes and edges of graphs, images and boxes of ragged lists: what else is in front in the
    argument of the batch, takes part in products, and is never in one array with it, counts examples, too.
    """
    graph = regions.graph
    tied = {arg for arg, _ in graph.program.ties}
    uses = _Uses(regions, of)
    votes: dict[str, Counter[frozenset[int]]] = {}
    state: set[frozenset[int]] = set()
    for index, op in enumerate(graph.arguments[len(graph.program.closures) :]):
        names = of[regions.region_of[op]]
        shape = graph.values[graph.ops[op].results[0]].shape
        dims = zip(regions.ports[op].results[0], shape, strict=True)
        first = next((d for d, size in dims if size == 1 or all(names[atom] <= uses.split for atom in d)), ())
        front = names[first[0]] if first else frozenset[int]()
        if index in tied:
            state.add(front)
        elif shape:
            votes.setdefault(graph.program.args[index].root, Counter())[front] += 1
    shares: defaultdict[frozenset[int], float] = defaultdict(float)
    for own in votes.values():
        for dim in own.keys() - {frozenset()}:
            shares[dim] += own[dim] / own.total()

    def rank(dim: frozenset[int]) -> tuple[float, ...]:
        return uses.products(dim), shares[dim], -uses.sums(dim), -min(dim)

    found = max(list(shares), key=rank, default=frozenset[int]())
    inside = max((dim for dim in state if dim and not uses.sums(dim)), key=rank, default=frozenset[int]())
    if uses.products(inside) > uses.products(found):
        return inside
    others = [dim for own in votes.values() if found in own for dim in own.keys() - {found} if uses.products(dim)]
    beside = _beside(regions, of, found) if others else frozenset[int]()
    return found.union(*(dim for dim in others if dim.isdisjoint(beside)))


def _beside(regions: Regions, of: list[tuple[frozenset[int], ...]], dim: frozenset[int]) -> set[int]:
    """The named dimensions of the values that have this one, among them itself."""
    found = set[int]()
    for region in regions.regions:
        names = of[region.id]
        if not any(dim & own for own in names):
            continue
        for dims in region.dims:
            for value in (*dims.operands, *dims.results):
                inside = {name for atoms in value for atom in atoms for name in names[atom]}
                if not dim.isdisjoint(inside):
                    found |= inside
    return found


class _Uses:
    """What ops do with named dimensions: which can be split, which products have, and which they sum over."""

    def __init__(self, regions: Regions, of: list[tuple[frozenset[int], ...]]) -> None:
        self.split: set[int] = set()
        self._products: Counter[int] = Counter()
        self._sums: Counter[int] = Counter()
        for region in regions.regions:
            names = of[region.id]
            inside: set[int] = set()
            for op, dims in zip(region.ops, region.dims, strict=True):
                kind = regions.graph.ops[op].kind
                if kind in BORDERS:
                    continue
                results = {atom for value in dims.results for dim in value for atom in dim}
                reduced = {*dims.reduced, *dims.pending}
                inside |= results.union(reduced, *(dim for value in dims.operands for dim in value))
                if kind in PRODUCTS:
                    self._products.update({name for atom in results | reduced for name in names[atom]})
                    self._sums.update({name for atom in reduced for name in names[atom]})
            self.split.update(name for atom in inside if region.can_split(atom) for name in names[atom])

    def products(self, dim: frozenset[int]) -> int:
        """How many products a dimension, or a factor of it, takes part in."""
        return max((self._products[name] for name in dim), default=0)

    def sums(self, dim: frozenset[int]) -> int:
        """How many of them sum over it."""
        return max((self._sums[name] for name in dim), default=0)
