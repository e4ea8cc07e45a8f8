"""Seconds of each region under each of its candidates: kernels at their local shapes, and reductions.

    node(r, c) = sum over kernels k of r:  trips * seconds at the local shape (`ffjax.cost.op_times`)
               + sum over ops o of r that reduce over split atoms:  trips * collective(all_reduce | reduce_scatter)
               + where o slides a window over an image that is cut: trips * (edges permuted + the image copied)

A kernel's work is spread over every atom that it iterates over, reduced ones included.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from ffjax.cost.collectives import CollectiveModel
from ffjax.cost.kernels import Kernel
from ffjax.cost.op_times import op_times
from ffjax.cost.roofline import op_seconds
from ffjax.ir.assignment import UNUSED, Assignment, spec_of
from ffjax.ir.halo import exchanges, halos
from ffjax.ir.layout import own_collectives
from ffjax.ir.regions import Dims, Region, Regions
from ffjax.ir.spec import shard_count

Floats = NDArray[np.float64]


class Splits:
    """How finely each candidate splits each atom of a region, with products cached."""

    def __init__(self, region: Region, candidates: Sequence[Assignment], model: CollectiveModel) -> None:
        self.counts = np.ones((len(candidates), len(region.sizes) + 1))
        atoms = np.array([c.atoms for c in candidates], dtype=np.int64).reshape(len(candidates), len(model.mesh.sizes))
        rows = np.arange(len(candidates))
        for axis, size in enumerate(model.mesh.sizes):
            # Unused axes write to the spare last column, which nobody reads.
            np.multiply.at(self.counts, (rows, atoms[:, axis]), float(size))
        self._cache: dict[tuple[int, ...], Floats] = {}
        self._distinct: dict[tuple[int, ...], tuple[Floats, NDArray[np.intp]]] = {}

    def take(self, candidates: Sequence[int]) -> Splits:
        """Those of some of the candidates."""
        taken = Splits.__new__(Splits)
        taken.counts, taken._cache, taken._distinct = self.counts[np.array(candidates, np.intp)], {}, {}
        return taken

    def of(self, atoms: Sequence[int]) -> Floats:
        """For each candidate into how many pieces these atoms are split together."""
        key = tuple(sorted(set(atoms)))
        found = self._cache.get(key)
        if found is None:
            found = self._cache[key] = np.prod(self.counts[:, list(key)], axis=1) if key else np.ones(len(self.counts))
        return found

    def distinct(self, atoms: tuple[int, ...]) -> tuple[Floats, NDArray[np.intp]]:
        """The different ways in which candidates split these atoms, one row each, and for each candidate its row."""
        found = self._distinct.get(atoms)
        if found is None:
            rows, which = np.unique(self.counts[:, list(atoms)], axis=0, return_inverse=True)
            found = self._distinct[atoms] = (rows, which.reshape(-1))
        return found

    def of_dims(self, dims: Dims) -> Floats:
        return self.of([a for dim in dims for a in dim])


def compute_seconds(kernels: Sequence[Kernel], splits: Splits, model: CollectiveModel) -> Floats:
    """For each candidate the seconds of a region's kernels in one step."""
    return op_times(model.cluster).seconds(kernels, splits)


class Sums(NamedTuple):
    """Sums of one region over the same atoms, of results that are split alike: how many in a step, of how many bytes.

    Bytes are those of all results together, unsharded.
    """

    reduced: tuple[int, ...]
    kept: tuple[int, ...]
    merged: bool
    runs: float
    bytes: float


def sums_of(regions: Regions, region: Region) -> list[Sums]:
    """What a region reduces in one step, whatever its sharding."""
    reducing = [(op, d) for op, d in zip(region.ops, region.dims, strict=True) if d.reduced]
    graph = regions.graph
    groups: dict[tuple[tuple[int, ...], tuple[int, ...], bool], list[float]] = {}
    for op, dims in reducing:
        trips = graph.scopes[graph.ops[op].scope].trips
        for value, result in zip(graph.ops[op].results, dims.results, strict=True):
            key = (dims.reduced, tuple(sorted({a for dim in result for a in dim})), regions.merged_sums[value])
            entry = groups.setdefault(key, [0.0, 0.0])
            entry[0] += trips
            entry[1] += trips * graph.values[value].bytes
    return [Sums(*key, count, size) for key, (count, size) in groups.items()]


def reduction_seconds(
    sums: Sequence[Sums], candidates: Sequence[Assignment], splits: Splits, model: CollectiveModel
) -> Floats:
    """For each candidate the seconds of the collectives that its partial sums need in one step."""
    total = np.zeros(len(candidates))
    for reduced, kept, merged, runs, size in sums:
        local = size / splits.of(kept)
        for index, candidate in enumerate(candidates):
            axes = tuple(n for n, a in zip(model.mesh.axes, candidate.atoms, strict=True) if a in reduced)
            if axes:
                to = zip(candidate.atoms, candidate.scatter, strict=True)
                scatter = any(d != UNUSED for a, d in to if a in reduced)
                alpha, beta = model.coefficients("reduce_scatter" if scatter else "all_reduce", axes)
                share = model.share_of_one(local[index] / runs) if merged else 1.0
                total[index] += runs * alpha * share + beta * local[index]
    return total


def halo_seconds(
    regions: Regions, region: Region, candidates: Sequence[Assignment], model: CollectiveModel
) -> tuple[Floats, Floats]:
    """For each candidate the seconds in which pieces of an image get their neighbours' edges: to copy, to permute.

    An image is copied to lie beside what its neighbours send.
    """
    copied, permuted = np.zeros(len(candidates)), np.zeros(len(candidates))
    op = regions.graph.ops[region.ops[0]]
    found = halos(op.eqn) if region.solo else ()
    if not found:
        return copied, permuted
    value = regions.graph.values[op.operands[found[0].operand]]
    trips = regions.graph.scopes[op.scope].trips
    device = model.cluster.device
    for index, candidate in enumerate(candidates):
        spec = spec_of(region.dims[0].operands[found[0].operand], region.sizes, candidate, model.mesh)
        if spec is None:
            continue
        local = value.bytes / shard_count(spec, model.mesh)
        sent = exchanges(op.eqn, spec, model.mesh, local)
        if sent:
            copied[index] = trips * (op_seconds(0.0, 2 * local, "float32", device, matmul=False) + device.kernel_s)
            permuted[index] = trips * sum(model.seconds(one) for one in sent)
    return copied, permuted


def own_seconds(regions: Regions, region: Region, model: CollectiveModel) -> float:
    """The seconds of the collectives that a region spells out, in one step; 0 for others than the user's regions."""
    if not region.solo:
        return 0.0
    op = regions.graph.ops[region.ops[0]]
    trips = regions.graph.scopes[op.scope].trips
    return trips * sum(often * model.seconds(one) for one, often in own_collectives(op, model.mesh))
