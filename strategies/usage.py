"""What state, regions and dimensions are for, as named strategies tell them apart: by what ops compute with them.

weights     dimensions of state arrays, other than the batch
sequence    what a contraction of activations with weights passes through from the activations, beside the batch
products    regions of dot_generals that have a dimension of weights: what tensor parallelism splits
experts     what such a contraction has in the activations, the weights and the result alike
images      what a convolution or a pooling window slides over
forward     regions from which activations are computed: parameters and what is made of them; the rest of what has
            no batch is the update: gradients, and the optimizer's state
"""

from __future__ import annotations

from collections.abc import Iterable

from ffjax.ir.dims import NamedDims
from ffjax.ir.graph import NO_VALUE, Op
from ffjax.ir.halo import halos
from ffjax.ir.regions import Dims, Region, Regions


class Usage:
    """Of one program. Sets of regions are of their ids, sets of dimensions are named ones (`NamedDims.of`)."""

    def __init__(self, regions: Regions, dims: NamedDims) -> None:
        self.regions = regions
        self.dims = dims
        graph = regions.graph
        offset = len(graph.program.closures)
        tied = {graph.arguments[offset + arg] for arg, _ in graph.program.ties}
        self.state = {regions.region_of[op] for op in tied}
        self.with_batch = {
            r.id for r in regions.regions if any(dims.is_batch(r.id, atom) for atom in range(len(r.sizes)))
        }
        self.weights = self.named((op, regions.ports[op].results[0]) for op in tied) - dims.batch
        self.read_by_batch = self._read_by_batch()
        self.forward = self.read_by_batch - self.with_batch
        self.images = self.named(
            (op.id, (regions.ports[op.id].operands[halo.operand][halo.dim][:1],))
            for op in graph.ops
            for halo in halos(op.eqn)
        )
        self.sequence: set[int] = set()
        self.experts: set[int] = set()
        self.products: set[int] = set()
        for op in graph.ops:
            if op.kind == "dot_general":
                self._contraction(op)
        self.sequence -= dims.batch | self.images
        self.experts -= dims.batch

    def named(self, ports: Iterable[tuple[int, Dims]]) -> set[int]:
        """The named dimensions of values as ops have them."""
        of, region_of = self.dims.of, self.regions.region_of
        return {name for op, port in ports for dim in port for atom in dim for name in of[region_of[op]][atom]}

    def is_for(self, region: int, atom: int, names: set[int]) -> bool:
        return not names.isdisjoint(self.dims.of[region][atom])

    def has(self, region: int, names: set[int]) -> bool:
        return any(self.is_for(region, atom, names) for atom in range(len(self.dims.of[region])))

    def is_gradient(self, region: Region) -> bool:
        """Whether a region is one op that sums over the batch for the update alone."""
        return (
            region.solo
            and region.id not in self.read_by_batch
            and any(self.dims.is_batch(region.id, atom) for atom in region.dims[0].reduced)
        )

    def _read_by_batch(self) -> set[int]:
        """The regions of which a value reaches, in the order of the program, something that has the batch."""
        graph, region_of = self.regions.graph, self.regions.region_of
        reaches = [False] * len(graph.values)
        found = set()
        for op in reversed(graph.ops):
            read = any(reaches[v] for v in op.results)
            if read:
                found.add(region_of[op.id])
            if read or region_of[op.id] in self.with_batch:
                for value in op.operands:
                    if value != NO_VALUE:
                        reaches[value] = True
        return found

    def _contraction(self, op: Op) -> None:
        """Of activations with weights: what it passes through, and what it does apart for each of its weights."""
        ports = self.regions.ports[op.id]
        left, right = (self.named([(op.id, port)]) for port in ports.operands)
        result = self.named([(op.id, ports.results[0])])
        if (left | right) & self.weights:
            self.products.add(self.regions.region_of[op.id])
        for activations, weights in ((left, right), (right, left)):
            if activations & self.dims.batch and not weights & self.dims.batch and weights & self.weights:
                self.sequence |= (activations & result) - weights
                self.experts |= activations & result & weights & self.weights
