"""Named dimensions: factors joined along every edge of the program, whatever ops they cross.

This is coarser than regions: a batch, a sequence, a width as a user thinks of them. It tells which factors of
which regions are the batch, and it names factors in explanations (TOAST, arXiv 2508.15010,
searches over exactly these).
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from ffjax.ir.compose import Factors
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
    """The dimension that most of the step's data has in front.

    Data are the arguments that the step does not replace. In front is the first dimension that can be split: a
    leading one that a scan walks over (time, microbatches) cannot.
    """
    graph = regions.graph
    tied = {arg for arg, _ in graph.program.ties}
    closures = len(graph.program.closures)
    votes: Counter[frozenset[int]] = Counter()
    for index, op in enumerate(graph.arguments[closures:]):
        region = regions.regions[regions.region_of[op]]
        dims = regions.ports[op].results[0]
        if index in tied or not dims:
            continue
        front = next((d for d in dims if d and all(region.can_split(a) for a in d)), None)
        if front is not None:
            votes[of[region.id][front[0]]] += 1
    return max(votes, key=lambda dim: (votes[dim], -min(dim)), default=frozenset())
