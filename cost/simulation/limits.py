"""What holds a step back: how busy its streams are, and what faster links would change.

A link's worth is the step's time simulated again with more of its bandwidth, the plan held as it is: a lower bound of
what it would bring, since a search could then choose otherwise.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

from ffjax.cost.collectives import CollectiveModel
from ffjax.cost.simulation.simulator import Simulator
from ffjax.cost.simulation.timeline import COMPUTE
from ffjax.ir.assignment import Assignment

SLIGHTLY, TWICE = 1.1, 2.0
"""Times a link's bandwidth."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StreamUse:
    """Seconds of a step in which a stream is busy, and in which, while it is, no kernel runs."""

    stream: str
    busy_s: float
    exposed_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class FasterLink:
    """By how many seconds a step is shorter where one link level has 10% more bandwidth, and twice as much."""

    link: str
    saved_by_tenth_s: float
    saved_by_twice_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class MoreMemory:
    """What more memory would change, where there is too little for the fastest plan known."""

    saved_s_per_gib: float
    """Of a step, by GiB more on each device: the slope to that plan, or the price on memory that found this one.

    A price is of the sum of costs that was minimised.
    """
    peak_bytes: float
    step_s: float
    """Of a faster plan that does not fit."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """`links`: those that the plan uses. `memory`: None where more would change nothing that is known."""

    streams: tuple[StreamUse, ...]
    links: tuple[FasterLink, ...]
    memory: MoreMemory | None = None

    @property
    def bottleneck(self) -> str:
        """The compute stream; or, where kernels wait longer than they run, the link whose bandwidth saves most."""
        kernels_s = sum(s.busy_s for s in self.streams if s.stream == COMPUTE)
        # A collective occupies all links that it crosses, so being busy does not tell them apart.
        if not self.links or max(s.exposed_s for s in self.streams) <= kernels_s:
            return COMPUTE
        return max(self.links, key=lambda link: link.saved_by_twice_s).link


def limits_of(simulator: Simulator, assignments: Sequence[Assignment], memory: MoreMemory | None = None) -> Limits:
    """Simulates a plan: once as it is, and for each link that it uses with more of its bandwidth."""
    step_s = simulator.go_on(assignments).step_s
    timeline = simulator.timeline()
    streams = tuple(
        StreamUse(stream=s, busy_s=float(timeline.busy_s(s)), exposed_s=float(timeline.exposed_s(s)))
        for s in timeline.streams
    )
    cluster = simulator.model.cluster

    def saved_s(index: int, factor: float) -> float:
        links = list(cluster.links)
        links[index] = dataclasses.replace(links[index], bytes_per_s=links[index].bytes_per_s * factor)
        model = CollectiveModel(simulator.model.mesh, cluster, tuple(links))
        # The plan is held: so are the ways by which it reshards.
        faster = simulator.on(model, simulator.axis_prices)
        return step_s - faster.run(assignments).step_s

    used = {s.stream for s in streams if s.busy_s > 0}
    return Limits(
        streams=streams,
        links=tuple(
            FasterLink(link=link.name, saved_by_tenth_s=saved_s(i, SLIGHTLY), saved_by_twice_s=saved_s(i, TWICE))
            for i, link in enumerate(cluster.links)
            if link.name in used
        ),
        memory=memory,
    )
