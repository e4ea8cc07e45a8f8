"""Fits a cluster's figures to measured steps.

What a step does on one device (flops, bytes, launches, collectives) is known exactly; how fast a device does it is
not. Given whole steps and their measured seconds, the rates are those with the least relative error:

    minimise over rates    sum over steps of    rho(log(predicted seconds / measured seconds))

with rho the soft L1 loss, so that one odd step does not bend all. A profile of single ops says more about ops; steps
say what ops, launches and collectives cost together, contention included.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ffjax.cost.cluster import Cluster
from ffjax.cost.collectives import CollectiveModel
from ffjax.cost.kernels import Kernel
from ffjax.errors import ClusterError
from ffjax.ir.assignment import UNUSED
from ffjax.ir.layout import Layout
from ffjax.ir.spec import Collective, MeshShape

Floats = NDArray[np.float64]

_SCALES = ("matmul", "vector", "memory", "kernel", "bandwidth", "latency")
"""What is fitted: a factor on each of the cluster's own figures; the last two on those of all its links."""
_FARTHEST = 7.0
"""How far a figure may move, as the logarithm of its factor."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """What one device does in a step: per kernel its trips, launches, flops, bytes; and the collectives."""

    mesh: MeshShape
    trips: Floats
    launches: Floats
    flops: Floats
    bytes: Floats
    matmul: NDArray[np.bool_]
    dtypes: tuple[str, ...]
    collectives: tuple[tuple[Collective, float], ...]
    """Each with its count in a step."""


def work(layout: Layout, kernels: Sequence[Kernel]) -> Work:
    """What a layout has one device do."""
    sizes = layout.mesh.sizes

    def pieces(region: int, atoms: Sequence[int]) -> float:
        split = layout.assignments[region].atoms
        return float(np.prod([n for n, a in zip(sizes, split, strict=True) if a != UNUSED and a in atoms]))

    return Work(
        mesh=layout.mesh,
        trips=np.array([k.trips for k in kernels]),
        launches=np.array([float(k.launches) for k in kernels]),
        flops=np.array([k.flops / pieces(k.region, k.iteration) for k in kernels]),
        bytes=np.array(
            [sum(b / pieces(k.region, [a for d in dims for a in d]) for dims, b in k.traffic) for k in kernels]
        ),
        matmul=np.array([k.matmul for k in kernels], dtype=bool),
        dtypes=tuple(k.dtype for k in kernels),
        collectives=tuple((p.collective, p.count) for p in layout.collectives()),
    )


def seconds_of(done: Work, cluster: Cluster) -> float:
    """Predicted seconds of a step on a cluster, nothing overlapping."""
    device = cluster.device
    peaks = {dtype: device.peak_flops_per_s(dtype) * device.matmul_efficiency for dtype in set(done.dtypes)}
    rates = np.array([peaks[dtype] for dtype in done.dtypes])
    rates = np.where(done.matmul, rates, device.vector_flops_per_s)
    streaming = done.bytes / (device.memory_bytes_per_s * device.memory_efficiency)
    each = np.maximum(done.flops / rates, streaming) + done.launches * device.kernel_s
    model = CollectiveModel(done.mesh, cluster)
    return float(done.trips @ each) + sum(count * model.seconds(one) for one, count in done.collectives)


def fit(steps: Sequence[tuple[Work, float]], cluster: Cluster) -> Cluster:
    """The cluster with the figures that explain measured steps best.

    Args:
      steps: what each does, and its measured seconds; more of them, and more different ones, than figures to fit.
      cluster: where they were measured, with figures to start from.

    Raises:
      ClusterError: for fewer steps than there are figures.
    """
    from scipy.optimize import least_squares

    if len(steps) <= len(_SCALES):
        raise ClusterError(
            f"{len(steps)} measured steps cannot fit {len(_SCALES)} figures ({', '.join(_SCALES)}); measure more plans"
        )
    measured = np.log([seconds for _, seconds in steps])

    def errors(scales: Floats) -> Floats:
        scaled = _scaled(cluster, scales)
        return np.log([seconds_of(done, scaled) for done, _ in steps]) - measured

    found = least_squares(errors, np.zeros(len(_SCALES)), loss="soft_l1", f_scale=0.1, bounds=(-_FARTHEST, _FARTHEST))
    return _scaled(cluster, found.x)


def _scaled(cluster: Cluster, logs: Floats) -> Cluster:
    by = dict(zip(_SCALES, np.exp(logs).tolist(), strict=True))
    device = dataclasses.replace(
        cluster.device,
        flops_per_s={dtype: rate * by["matmul"] for dtype, rate in cluster.device.flops_per_s.items()},
        vector_flops_per_s=cluster.device.vector_flops_per_s * by["vector"],
        memory_bytes_per_s=cluster.device.memory_bytes_per_s * by["memory"],
        kernel_s=cluster.device.kernel_s * by["kernel"],
    )
    links = tuple(
        dataclasses.replace(
            link, bytes_per_s=link.bytes_per_s * by["bandwidth"], latency_s=link.latency_s * by["latency"]
        )
        for link in cluster.links
    )
    return dataclasses.replace(cluster, device=device, links=links)
