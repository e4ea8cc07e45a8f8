"""Simulating a plan on the cluster that it was made for."""

from __future__ import annotations

import numpy as np

from ffjax.cost.cluster import Cluster
from ffjax.cost.collectives import CollectiveModel
from ffjax.cost.compilers import compiler_of
from ffjax.cost.kernels import kernels
from ffjax.cost.lifetimes import lifetimes
from ffjax.cost.memory import MemoryModel
from ffjax.cost.simulation.simulator import simulate
from ffjax.cost.simulation.timeline import Timeline
from ffjax.errors import ClusterError, PlanError
from ffjax.plan_record import PlanRecord


def simulate_plan(plan: PlanRecord, cluster: Cluster | None = None) -> Timeline:
    """Simulates a plan that is bound; see `Plan.simulate`."""
    layout = plan.bound
    cluster = cluster_of_plan(plan, cluster)
    regions = layout.regions
    memory = MemoryModel(regions, lifetimes(regions.graph, compiler_of(cluster.device.platform))).under(layout)
    return simulate(layout, kernels(regions), CollectiveModel(plan.mesh, cluster), memory)


def cluster_of_plan(plan: PlanRecord, cluster: Cluster | None = None) -> Cluster:
    """The cluster that a plan was made for, or the given one if it is such a cluster; raises PlanError if not."""
    cluster = cluster or plan.described or _shipped_cluster(plan)
    try:
        model = CollectiveModel(plan.mesh, cluster)
    except ClusterError as error:
        raise PlanError(f"the plan of {plan.program!r} cannot run there: {error}") from error
    if not np.allclose(model.axis_prices, plan.axis_prices, rtol=1e-6):
        raise PlanError(
            f"the plan of {plan.program!r} was made for other links than those of {cluster.name!r} with "
            f"{cluster.device_counts} devices. Remedy: give cluster= the one that it was planned for."
        )
    return cluster


def _shipped_cluster(plan: PlanRecord) -> Cluster:
    """The cluster of a loaded plan: the shipped one of that name, with as many of its hosts as the devices make."""
    if plan.cluster in Cluster.names():
        cluster = Cluster.named(plan.cluster)
        hosts, left = divmod(plan.devices, cluster.devices_per_host)
        if not left:
            return Cluster.named(plan.cluster, hosts=hosts)
        return Cluster.named(plan.cluster, hosts=1, devices_per_host=plan.devices)
    raise PlanError(
        f"the plan of {plan.program!r} was made for the cluster {plan.cluster!r}, which is none of those shipped "
        f"({', '.join(Cluster.names())}). Remedy: cluster=ffjax.Cluster.load(path)."
    )
