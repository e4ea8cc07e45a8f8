"""What a user gives, checked: each error quotes it and says what to give instead."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping

from ffjax.cost.cluster import Cluster
from ffjax.errors import BudgetError, ClusterError, FfjaxWarning
from ffjax.ir.compat import AS_WRITTEN
from ffjax.ir.regions import Regions
from ffjax.ir.spec import MeshShape
from ffjax.strategies.search import SearchResult
from ffjax.units import amount


def cluster_of(cluster: Cluster | None) -> Cluster:
    """The cluster, by default the local one; raises ClusterError for what is none."""
    if cluster is None:
        return Cluster.local()
    if not isinstance(cluster, Cluster):
        raise ClusterError(
            f"cluster={cluster!r} is no Cluster. Remedy: ffjax.Cluster.named('h100', hosts=8), or Cluster.load(path)."
        )
    return cluster


def mesh_of(mesh: Mapping[str, int], cluster: Cluster) -> MeshShape:
    """A user's mesh over all devices of the cluster; raises ClusterError where it cannot be."""
    if not isinstance(mesh, Mapping):
        raise ClusterError(f"mesh={mesh!r} is no mapping. Remedy: names and sizes, such as {{'x': {cluster.devices}}}.")
    for axis, size in mesh.items():
        if not isinstance(axis, str) or isinstance(size, bool) or not isinstance(size, int) or size < 1:
            raise ClusterError(
                f"mesh={dict(mesh)}: axis {axis!r} of size {size!r}. Remedy: a name, and a whole number of at least 1."
            )
    shape = MeshShape(tuple(mesh), tuple(mesh.values()))
    if shape.devices > cluster.devices:
        raise ClusterError(
            f"the mesh {dict(mesh)} needs {shape.devices} devices, the cluster {cluster.name!r} has {cluster.devices}. "
            "Remedy: make the mesh smaller or the cluster larger (hosts=, devices_per_host=)."
        )
    if shape.devices < cluster.devices:
        raise ClusterError(
            f"the mesh {dict(mesh)} uses {shape.devices} of the {cluster.devices} devices of {cluster.name!r}. Remedy: "
            "make it use all, or describe a smaller cluster (hosts=, devices_per_host=)."
        )
    return shape


def warn_if_batch_is_whole(regions: Regions, result: SearchResult, stacklevel: int = 4) -> None:
    """Warns once where no axis of any mesh that was searched divides the batch, so that it cannot be split."""
    axes = {a: n for a, n in result.best.mesh.as_dict().items() if n > 1}
    searched = {n for found in result.found for n in found.mesh.sizes if n > 1}
    names = result.session.usage.dims
    graph = regions.graph
    batch = [
        (graph.ops[op].label, position, graph.values[graph.ops[op].results[0]].shape[position])
        for op in graph.arguments
        for position, dim in enumerate(regions.ports[op].results[0])
        if any(names.is_batch(regions.region_of[op], atom) for atom in dim)
    ]
    if not axes or not batch or any(size % n == 0 for *_, size in batch for n in searched):
        return
    label, position, size = batch[0]
    common = min(axes.values())
    warnings.warn(
        f"the batch is not split: dimension {position} of {label} has size {size}, which no axis of the mesh {axes} "
        f"divides. Remedy: a batch of {math.ceil(size / common) * common}, or a mesh with an axis that divides {size}.",
        FfjaxWarning,
        stacklevel=stacklevel,
    )


def over_budget(result: SearchResult, budget_bytes: float, cluster: Cluster, *, retrace: bool = False) -> BudgetError:
    """What conflicts where nothing fits, and the nearest budget found that would do.

    `retrace`: whether other policies of the program's `jax.checkpoint` regions are left to try.
    """
    best = result.best
    remat = f", remat {policy!r}" if (policy := best.layout.graph.program.remat) != AS_WRITTEN else ""
    largest = "\n".join(f"  {amount(size):>10}  {what}" for what, size in best.peak.live[:6])
    return BudgetError(
        f"no plan fits {amount(budget_bytes)} per device on {cluster.devices} devices. The smallest found "
        f"({best.strategy} on {best.mesh}{remat}) needs {amount(best.peak.bytes)}; at its peak the largest arrays "
        f"alive are:\n{largest}\nRemedy: memory={amount(best.peak.bytes)!r} or more, more devices, donated state "
        "(donate_argnums), a smaller batch, or "
        + ("remat='search', which tries other policies of the step's jax.checkpoint." if retrace else "jax.checkpoint.")
    )
