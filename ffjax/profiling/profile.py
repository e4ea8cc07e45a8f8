"""`ffjax profile`: what to measure, and what becomes of it.

First the ops at the local shapes that a program's plans have (the best of every strategy on every mesh, or one saved
plan's), those that take longest before the rest, then the generic grid. One device is enough to measure the local
shapes of a plan for many.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import jax

from ffjax.cost.cluster import Cluster
from ffjax.cost.kernels import Kernel, kernels
from ffjax.cost.op_times import OpTimes
from ffjax.cost.profiles.profile import Profile, jax_version
from ffjax.cost.work import STREAMS
from ffjax.errors import ProfileError
from ffjax.ir import compat
from ffjax.ir.compat import JaxprEqn
from ffjax.ir.graph import build_graph
from ffjax.ir.layout import Layout
from ffjax.ir.regions import find_regions
from ffjax.ir.spec import local_shape
from ffjax.ir.trace import Program
from ffjax.profiling.measure import Case, Measured, Operand, Progress, analyse, measure
from ffjax.strategies.search import search


@dataclass(frozen=True, slots=True, kw_only=True)
class Profiled:
    """What was measured or analysed, and what of it failed or was left out."""

    profile: Profile
    measured: Measured


def layouts_of(program: Program, cluster: Cluster, progress: Progress | None = None) -> list[Layout]:
    """The plans whose local shapes matter: the best of every strategy on every mesh of a cluster."""
    regions = find_regions(build_graph(program))
    found = search(regions, cluster, budget_bytes=float(cluster.device.memory_bytes), progress=progress)
    return [f.layout for f in found.found]


def needs(layouts: Sequence[Layout], cluster: Cluster) -> list[Case]:
    """The ops of some plans at their local shapes, each once, those that are priced highest first."""
    times = OpTimes(cluster.device)
    weight: dict[tuple[object, ...], float] = {}
    cases: dict[tuple[object, ...], Case] = {}
    for layout in layouts:
        for kernel in kernels(layout.regions):
            case = _local_case(kernel, layout, times)
            if case is not None:
                key = case.identity
                weight[key] = max(weight.get(key, 0.0), kernel.trips * case.guess_s)
                cases.setdefault(key, case)
    return sorted(cases.values(), key=lambda c: -weight[c.identity])


def profile(
    cases: Sequence[Case],
    cluster: Cluster,
    devices: Sequence[jax.Device],
    *,
    seconds: float = math.inf,
    timed: bool = True,
    analysed: bool = False,
    name: str = "measured",
    progress: Progress | None = None,
) -> Profiled:
    """Times cases on devices, or asks XLA's cost analysis of them (on this process's backend), or both.

    Raises ProfileError where the devices to time on are of another kind than the cluster's.
    """
    if timed and devices[0].device_kind != cluster.device.kind:
        raise ProfileError(
            f"the devices here are {devices[0].device_kind!r}, those of {cluster.name!r} {cluster.device.kind!r}. "
            "Remedy: measure where such devices are; --analyse asks the compiler alone and needs none."
        )
    local = cluster.with_hosts(len(devices)) if timed else cluster
    measured = Measured(samples=(), failed=(), left_out=())
    if timed:
        measured = measure(cases, devices, seconds=seconds, progress=progress)
    return Profiled(
        profile=Profile(
            name=name,
            device_kind=local.machine_kind,
            jax=jax_version(),
            samples=measured.samples,
            analyses=analyse([c for c in cases if c.group == 1], progress) if analysed else (),
        ),
        measured=measured,
    )


def _local_case(kernel: Kernel, layout: Layout, times: OpTimes) -> Case | None:
    """One op at the shape of one device's piece; None for what streams (the grid has that) or is no plain op."""
    op = layout.graph.ops[kernel.op]
    eqn = op.eqn
    if kernel.work.kind in (*STREAMS, "") or eqn is None or eqn.effects:
        return None
    if any(compat.dtype_of(v) is None or compat.is_extended(compat.dtype_of(v)) for v in (*eqn.invars, *eqn.outvars)):
        return None
    region, assignment, mesh = layout.regions.region_of[op.id], layout.assignments, layout.mesh

    def split(atoms: Sequence[int]) -> int:
        return math.prod(mesh.size(assignment[region].axes(a, mesh)) for a in set(atoms))

    flops = kernel.flops / split(kernel.iteration)
    size = sum(whole / split([a for dim in dims for a in dim]) for dims, whole in kernel.traffic)
    shapes = [local_shape(compat.shape_of(v), layout.operand(op.id, i), mesh) for i, v in enumerate(eqn.invars)]
    high = max(shapes[0], default=1) if shapes else 1
    dtypes = [str(compat.dtype_of(v)) for v in eqn.invars]
    return Case(
        kind=kernel.work.kind,
        params=kernel.work.params,
        dtype=kernel.work.dtype,
        sizes=tuple(whole / split(atoms) for whole, atoms in kernel.work.sizes),
        flops=flops,
        bytes=size,
        function=_Bound(eqn, shapes),
        operands=tuple(Operand(shape=s, dtype=d, high=high) for s, d in zip(shapes, dtypes, strict=True)),
        in_place=kernel.work.kind.startswith("scatter"),
        guess_s=times.base_s(flops, size, kernel),
    )


@dataclass(frozen=True)
class _Bound:
    """An equation's primitive on operands of one device's shapes."""

    eqn: JaxprEqn
    shapes: Sequence[tuple[int, ...]]

    def __call__(self, *operands: jax.Array) -> object:
        params = dict(self.eqn.params)
        if self.eqn.primitive.name == "gather":
            # A slice that spans a dimension spans the device's piece of it.
            whole = compat.shape_of(self.eqn.invars[0])
            params["slice_sizes"] = tuple(
                piece if size == full else size
                for size, full, piece in zip(params["slice_sizes"], whole, self.shapes[0], strict=True)
            )
        out = compat.bind(self.eqn, list(operands), params)
        return out if self.eqn.primitive.multiple_results else out[0]
