"""How much of each collective of a simulated plan is exposed: how long kernels stand still while it runs."""

from __future__ import annotations

import bisect
from typing import TYPE_CHECKING

from ffjax.cost.simulation.streams import COMPUTE_STREAM
from ffjax.cost.simulation.task_graph import Point

if TYPE_CHECKING:
    from ffjax.cost.simulation.simulator import Simulator


def exposure(simulator: Simulator) -> dict[Point, tuple[float, float]]:
    """For each copy or sum of the plan that was simulated last: its ticks in a step, and those that are exposed.

    A collective that several readers share is listed for the first.
    """
    found: dict[Point, tuple[float, float]] = {}
    _add(simulator, 0, 1.0, found)
    return found


def _add(simulator: Simulator, scope: int, repeats: float, found: dict[Point, tuple[float, float]]) -> None:
    log, _ = simulator.log(scope)
    kernels = [(e.start, e.end) for e in log if e.stream == COMPUTE_STREAM and e.end > e.start]
    starts = [start for start, _ in kernels]
    # Ticks of kernels before each of them: what lies between two times is a difference.
    before = [0]
    for start, end in kernels:
        before.append(before[-1] + end - start)

    def busy(until: int) -> int:
        at = bisect.bisect_right(starts, until) - 1
        return 0 if at < 0 else before[at] + min(until, kernels[at][1]) - kernels[at][0]

    for entry in log:
        if entry.inside is not None:
            inner = simulator.tasks.blocks[scope].inner[entry.inside.position]
            _add(simulator, simulator.costliest(inner.bodies), repeats * inner.trips, found)
        elif entry.hop is not None:
            ticks = entry.end - entry.start
            covered = busy(entry.end) - busy(entry.start)
            total, exposed = found.get(entry.points[0], (0.0, 0.0))
            found[entry.points[0]] = total + repeats * ticks, exposed + repeats * (ticks - covered)
