"""What a layout costs, in figures that a person reads: seconds, bytes and collectives of one step on one device."""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field

from ffjax.cost.collectives import CollectiveModel
from ffjax.cost.kernels import Kernel, by_family
from ffjax.cost.memory import Peak
from ffjax.cost.op_times import SOURCES, op_times
from ffjax.cost.region_costs import Splits, halo_seconds
from ffjax.cost.simulation.simulator import Simulated
from ffjax.cost.simulation.timeline import Timeline
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
    user: bool = field(default=False, metadata={"optional": True})
    """Whether the program itself spells them out, inside `shard_map`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimate:
    """Predicted figures of one step on one device."""

    step_s: float
    """Compute plus exposed communication."""
    compute_s: float
    """Of all kernels."""
    comm_s: float
    """Of all collectives, overlapped or not."""
    exposed_comm_s: float
    """Communication that no kernel hides, as the simulator finds it; all of `comm_s` where it was not asked."""
    peak_bytes: float
    collectives: tuple[CollectiveTotal, ...]
    largest: tuple[tuple[str, float], ...] = ()
    """The largest arrays that are live at the peak, and their bytes."""
    sources: dict[str, float] = field(default_factory=dict)
    """Where the seconds are from, each source's share of compute and communication together (`OpTimes`)."""


def estimate(
    layout: Layout,
    kernels: Sequence[Kernel],
    model: CollectiveModel,
    peak: Peak,
    simulated: Simulated | Timeline | None = None,
    families: Sequence[Hashable] | None = None,
) -> Estimate:
    """Prices one layout: the search's own costs, for one choice.

    With what the simulator says of that layout, its seconds are taken: overlap, and of a conditional's branches only
    the costliest. Without, nothing is taken to overlap and all branches count. `families`: for each region what it
    shares with those that are alike and have its assignment.
    """
    names = range(len(layout.regions.regions)) if families is None else families
    members = Counter(names)
    compute_s = 0.0
    sources: dict[str, float] = {}
    times = op_times(model.cluster)
    for name, own in by_family(kernels, names).items():
        index = own[0].region
        splits = Splits(layout.regions.regions[index], [layout.assignments[index]], model)
        copied_s = halo_seconds(layout.regions, layout.regions.regions[index], [layout.assignments[index]], model)[0]
        for source, seconds in (*times.by_source(own, splits).items(), ("counted", members[name] * copied_s)):
            compute_s += float(seconds[0])
            sources[source] = sources.get(source, 0.0) + float(seconds[0])
    totals: dict[tuple[CollectiveKind, tuple[str, ...], bool], list[float]] = {}
    for planned in layout.collectives():
        entry = totals.setdefault((planned.collective.kind, planned.collective.axes, planned.user), [0.0, 0.0, 0.0])
        entry[0] += planned.count
        entry[1] += planned.count * planned.collective.bytes
        seconds_ = planned.count * model.seconds(planned.collective, merged=planned.merged)
        entry[2] += seconds_
        origin = model.source(planned.collective)
        sources[origin] = sources.get(origin, 0.0) + seconds_
    comm_s = float(sum(entry[2] for entry in totals.values()))
    return Estimate(
        step_s=compute_s + comm_s if simulated is None else simulated.step_s,
        compute_s=compute_s if simulated is None else simulated.compute_s,
        comm_s=comm_s if simulated is None else simulated.comm_s,
        exposed_comm_s=comm_s if simulated is None else simulated.exposed_comm_s,
        peak_bytes=peak.bytes,
        collectives=tuple(
            CollectiveTotal(kind=kind, axes=axes, count=count, bytes=size, seconds=seconds, user=user)
            for (kind, axes, user), (count, size, seconds) in sorted(totals.items(), key=lambda e: -e[1][2])
        ),
        largest=peak.live,
        sources=_shares(sources),
    )


def _shares(seconds: dict[str, float]) -> dict[str, float]:
    total = sum(seconds.values())
    return {s: round(seconds[s] / total, 4) for s in SOURCES if seconds.get(s, 0.0) > 0}
