"""What a layout costs, in figures that a person reads: seconds, bytes and collectives of one step on one device."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from ffjax.cost.collectives import CollectiveModel
from ffjax.cost.kernels import Kernel
from ffjax.cost.memory import Peak
from ffjax.cost.op_times import SOURCES, op_times
from ffjax.cost.region_costs import Splits
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
    sources: dict[str, float] = field(default_factory=dict)
    """Where the seconds are from, each source's share of compute and communication together (`OpTimes`)."""


def estimate(layout: Layout, kernels: Sequence[Kernel], model: CollectiveModel, peak: Peak) -> Estimate:
    """Prices one layout: the search's own costs, for one choice."""
    by_region: dict[int, list[Kernel]] = {}
    for kernel in kernels:
        by_region.setdefault(kernel.region, []).append(kernel)
    compute_s = 0.0
    sources: dict[str, float] = {}
    times = op_times(model.cluster)
    for index, own in by_region.items():
        splits = Splits(layout.regions.regions[index], [layout.assignments[index]], model)
        for source, seconds in times.by_source(own, splits).items():
            compute_s += float(seconds[0])
            sources[source] = sources.get(source, 0.0) + float(seconds[0])
    totals: dict[tuple[CollectiveKind, tuple[str, ...]], list[float]] = {}
    for planned in layout.collectives():
        entry = totals.setdefault((planned.collective.kind, planned.collective.axes), [0.0, 0.0, 0.0])
        entry[0] += planned.count
        entry[1] += planned.count * planned.collective.bytes
        seconds_ = planned.count * model.seconds(planned.collective)
        entry[2] += seconds_
        origin = model.source(planned.collective)
        sources[origin] = sources.get(origin, 0.0) + seconds_
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
        sources=_shares(sources),
    )


def _shares(seconds: dict[str, float]) -> dict[str, float]:
    total = sum(seconds.values())
    return {s: round(seconds[s] / total, 4) for s in SOURCES if seconds.get(s, 0.0) > 0}
