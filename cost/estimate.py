"""What a layout costs, in figures that a person reads: seconds, bytes and collectives of one step on one device."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ffjax.cost.collectives import CollectiveModel
from ffjax.cost.kernels import Kernel
from ffjax.cost.memory import Peak
from ffjax.cost.region_costs import Splits, compute_seconds
from ffjax.ir.layout import Layout
from ffjax.ir.spec import CollectiveKind


@dataclass(frozen=True, slots=True, kw_only=True)
class CollectiveTotal:
    """All collectives of one kind over the same mesh axes. `bytes` as `ffjax.ir.spec.Collective` counts them."""

    kind: CollectiveKind
    axes: tuple[str, ...]
    count: float
    bytes: float
    seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimate:
    """Predicted figures of one step on one device.

    `step_s` is compute plus exposed communication. Nothing is taken to overlap: `exposed_comm_s` is all of `comm_s`.
    """

    step_s: float
    compute_s: float
    comm_s: float
    exposed_comm_s: float
    peak_bytes: float
    collectives: tuple[CollectiveTotal, ...]
    largest: tuple[tuple[str, float], ...] = ()
    """The largest arrays that are live at the peak, and their bytes."""


def estimate(layout: Layout, kernels: Sequence[Kernel], model: CollectiveModel, peak: Peak) -> Estimate:
    """Prices one layout: the search's own costs, for one choice."""
    by_region: dict[int, list[Kernel]] = {}
    for kernel in kernels:
        by_region.setdefault(kernel.region, []).append(kernel)
    compute_s = 0.0
    for index, own in by_region.items():
        splits = Splits(layout.regions.regions[index], [layout.assignments[index]], model)
        compute_s += float(compute_seconds(own, splits, model)[0])
    totals: dict[tuple[CollectiveKind, tuple[str, ...]], list[float]] = {}
    for planned in layout.collectives():
        entry = totals.setdefault((planned.collective.kind, planned.collective.axes), [0.0, 0.0, 0.0])
        entry[0] += planned.count
        entry[1] += planned.count * planned.collective.bytes
        entry[2] += planned.count * model.seconds(planned.collective)
    comm_s = float(sum(entry[2] for entry in totals.values()))
    return Estimate(
        step_s=compute_s + comm_s,
        compute_s=compute_s,
        comm_s=comm_s,
        exposed_comm_s=comm_s,
        peak_bytes=peak.bytes,
        collectives=tuple(
            CollectiveTotal(kind=kind, axes=axes, count=count, bytes=size, seconds=seconds)
            for (kind, axes), (count, size, seconds) in sorted(totals.items(), key=lambda e: -e[1][2])
        ),
        largest=peak.live,
    )
