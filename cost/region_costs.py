"""Seconds of each region under each of its candidates: kernels at their local shapes, and reductions.

    node(r, c) = sum over kernels k of r:  trips * (roofline(flops / splits, local bytes) + launches * kernel_s)
               + sum over ops o of r that reduce over split atoms:  trips * collective(all_reduce | reduce_scatter)

A kernel's work is spread over every atom that it iterates over, reduced ones included.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from ffjax.cost.collectives import CollectiveModel
from ffjax.cost.kernels import Kernel
from ffjax.cost.roofline import op_seconds
from ffjax.ir.assignment import UNUSED, Assignment
from ffjax.ir.regions import Dims, Region, Regions

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

    def of(self, atoms: Sequence[int]) -> Floats:
        """For each candidate into how many pieces these atoms are split together."""
        key = tuple(sorted(set(atoms)))
        found = self._cache.get(key)
        if found is None:
            found = self._cache[key] = np.prod(self.counts[:, list(key)], axis=1) if key else np.ones(len(self.counts))
        return found

    def of_dims(self, dims: Dims) -> Floats:
        return self.of([a for dim in dims for a in dim])


def compute_seconds(kernels: Sequence[Kernel], splits: Splits, model: CollectiveModel) -> Floats:
    """For each candidate the seconds of a region's kernels in one step."""
    device = model.cluster.device
    total = np.zeros(len(splits.counts))
    # Elementwise kernels of one region differ in little else than bytes: add up what is split alike.
    work: dict[tuple[int, ...], list[float]] = {}
    streams: dict[tuple[int, ...], dict[tuple[int, ...], float]] = {}
    for kernel in kernels:
        if kernel.matmul:
            traffic = np.zeros(len(total))
            for port, whole in kernel.traffic:
                traffic += whole / splits.of_dims(port)
            flops = kernel.flops / splits.of(kernel.iteration)
            seconds = op_seconds(flops, traffic, kernel.dtype, device, matmul=True) + device.kernel_s
            total += kernel.trips * seconds
            continue
        spread = tuple(sorted(kernel.iteration))
        entry = work.setdefault(spread, [0.0, 0.0])
        entry[0] += kernel.trips * kernel.flops
        entry[1] += kernel.trips * kernel.launches
        alike = streams.setdefault(spread, {})
        for dims, size in kernel.traffic:
            key = tuple(sorted({a for dim in dims for a in dim}))
            alike[key] = alike.get(key, 0.0) + kernel.trips * size
    for spread, (arithmetic, launches) in work.items():
        traffic = np.zeros(len(total))
        for atoms, size in streams[spread].items():
            traffic += size / splits.of(atoms)
        total += op_seconds(arithmetic / splits.of(spread), traffic, "float32", device, matmul=False)
        total += launches * device.kernel_s
    return total


def reduction_seconds(
    regions: Regions, region: Region, candidates: Sequence[Assignment], splits: Splits, model: CollectiveModel
) -> Floats:
    """For each candidate the seconds of the collectives that its partial sums need in one step."""
    total = np.zeros(len(candidates))
    reducing = [(op, d) for op, d in zip(region.ops, region.dims, strict=True) if d.reduced]
    if not reducing:
        return total
    graph = regions.graph
    # What reduces over the same atoms and is split alike costs alike: add up bytes and counts first.
    groups: dict[tuple[tuple[int, ...], tuple[int, ...]], list[float]] = {}
    for op, dims in reducing:
        trips = graph.scopes[graph.ops[op].scope].trips
        for value, result in zip(graph.ops[op].results, dims.results, strict=True):
            key = (dims.reduced, tuple(sorted({a for dim in result for a in dim})))
            entry = groups.setdefault(key, [0.0, 0.0])
            entry[0] += trips
            entry[1] += trips * graph.values[value].bytes
    for (reduced, kept), (count, size) in groups.items():
        local = size / splits.of(kept)
        for index, candidate in enumerate(candidates):
            axes = tuple(n for n, a in zip(model.mesh.axes, candidate.atoms, strict=True) if a in reduced)
            if axes:
                scatter = any(d != UNUSED for d in candidate.scatter)
                alpha, beta = model.coefficients("reduce_scatter" if scatter else "all_reduce", axes)
                total[index] += count * alpha + beta * local[index]
    return total
