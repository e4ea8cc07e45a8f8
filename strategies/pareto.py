"""The Pareto front of time against memory: the plans of which no other is both faster and smaller.

A search leaves plans of many strategies on many meshes; the fastest is one end of the front. The others come of prices
on memory (`priced_memory`): the dearer bytes are, the less a solution takes. What lies between two neighbouring prices
is in the rectangle that their solutions' steps and peaks span, so the largest rectangle that no known plan dominates is
halved next (Aneja, Nair, "Bicriteria transportation problem", Management Science 25, 1979). The problems are those that
the search has built; where collectives overlap, each is solved as if none did and as the simulator saw its best plan.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

from ffjax.strategies.budget import Fit, fit_of
from ffjax.strategies.methods.solver import Solver
from ffjax.strategies.overlap import observed, overlapped
from ffjax.strategies.priced_memory import BYTES_ALONE, CHEAPEST, DEAREST, Priced
from ffjax.strategies.problem import Problem, choice_of, total_seconds
from ffjax.strategies.search import Progress, SearchResult
from ffjax.strategies.session import AUTO, Found

SOLVES = 24
"""How often at most a rectangle is halved, on all meshes together."""
_PRICES = (DEAREST, 1.0)
"""Tried on all meshes."""
_NEAR = 1.1
"""Prices whose ratio is less are not told apart."""
_ALIKE = 1e-3
"""Of its step, by how much a larger plan must be faster to be worth listing beside a smaller one."""


def pareto_front(result: SearchResult, solves: int = SOLVES, progress: Progress | None = None) -> tuple[Found, ...]:
    """The front, the smallest plan first; its last plan within the budget is never slower than the search's.

    Args:
      result: of a search. Plans that do not fit its budget are listed too, with `fits` False.
      solves: see `SOLVES`.
      progress: is told what is being done.
    """
    if progress:
        progress("prices on memory", 0.0)
    known = _simulated(result, (result.best, *result.found))
    lines = [line for base, problem in _problems(result, known) for line in _lines(result, base, problem, known)]
    for line in lines:
        for price in _PRICES:
            line.at(price)
    for done in range(solves):
        points = known + [f for line in lines for _, f in line.points]
        gaps = [gap for line in lines for gap in line.gaps(points)]
        if not gaps:
            break
        if progress:
            progress("prices on memory", done / solves)
        _, line, price = max(gaps, key=lambda g: g[0])
        line.at(price)
    if lines:
        min(lines, key=lambda line: line.priced.least.peak.bytes).shrink()
    front = non_dominated(known + [f for line in lines for _, f in line.points])
    return non_dominated([_under_own_schedule(result, f) for f in front])


def _under_own_schedule(result: SearchResult, found: Found) -> Found:
    """With the peak that its own collectives' schedule has: what it takes as a budget."""
    peak = result.session.memory.under(found.layout).peak(found.layout)
    return dataclasses.replace(found, peak=peak, fits=peak.bytes <= result.session.budget_bytes)


def non_dominated(found: Sequence[Found]) -> tuple[Found, ...]:
    """Those of which no other is both faster and smaller, the smallest first; all but the fastest worth their bytes."""
    front: list[Found] = []
    fastest = min((f.predicted_s for f in found), default=0.0)
    fastest_fitting = min((f.predicted_s for f in found if f.fits), default=0.0)
    for f in sorted(found, key=lambda f: (f.peak.bytes, f.predicted_s)):
        ends = f.predicted_s in (fastest, fastest_fitting)
        if not front or f.predicted_s < front[-1].predicted_s * (1.0 if ends else 1 - _ALIKE):
            front.append(f)
    return tuple(front)


class _Line:
    """One problem under a price on memory: the prices that were tried, ascending, and what they gave."""

    def __init__(self, result: SearchResult, base: Found, problem: Problem, priced: Priced) -> None:
        self.result, self.base, self.problem, self.priced = result, base, problem, priced
        self.points: list[tuple[float, Found]] = []
        self.add(0.0, priced.free)

    def at(self, price: float) -> None:
        fit = self.priced.at(price)
        if fit is not None:
            self.add(price, fit)

    def shrink(self) -> None:
        """Adds the least that is found, from the start: instants at which cheaper solutions peak only mislead."""
        before = self.priced
        anew = Priced(before.problem, before.budget_bytes, before.memory, before.free)
        anew.at(DEAREST)
        anew.shrink()
        self.add(BYTES_ALONE, anew.least)

    def add(self, price: float, fit: Fit) -> None:
        choice = fit.solution.choice
        same = next((f for _, f in self.points if f.choice == choice), None)
        found = (
            same
            or _simulated(
                self.result,
                [
                    dataclasses.replace(
                        self.base,
                        step_s=total_seconds(self.problem, choice),
                        objective_s=total_seconds(self.priced.problem, choice),
                        bound_s=self.priced.free.solution.bound_s,
                        peak=fit.peak,
                        fits=fit.peak.bytes <= self.result.session.budget_bytes,
                        algorithm=f"{fit.solution.status}, price on memory" if price else fit.solution.status,
                        problem=self.problem,
                        choice=choice,
                        layout=fit.layout,
                        simulated=None,
                        s_per_byte=fit.s_per_byte,
                        free=fit.free,
                    )
                ],
            )[0]
        )
        self.points = sorted([*self.points, (price, found)], key=lambda p: p[0])

    def gaps(self, known: Sequence[Found]) -> list[tuple[float, _Line, float]]:
        """Between neighbouring prices: the area of their rectangle, and the price to try next."""
        gaps = []
        for (low, cheap), (high, dear) in zip(self.points, self.points[1:], strict=False):
            step_s = min(cheap.predicted_s, dear.predicted_s)
            size = min(cheap.peak.bytes, dear.peak.bytes)
            area = abs(cheap.predicted_s - dear.predicted_s) * abs(cheap.peak.bytes - dear.peak.bytes)
            apart = high > _NEAR * max(low, CHEAPEST)
            if area and apart and not any(f.predicted_s <= step_s and f.peak.bytes <= size for f in known):
                gaps.append((area, self, math.sqrt(max(low, CHEAPEST) * high)))
        return gaps


def _problems(result: SearchResult, known: Sequence[Found]) -> list[tuple[Found, Problem]]:
    """The problems that were solved in the free search, and that of the smallest plan's mesh; or the one strategy's."""
    free = [f for f in known if f.strategy == AUTO]
    if not free:
        return [(f, f.problem) for f in {f.mesh: f for f in known}.values()]
    meshes = {f.mesh: f for f in free}
    smallest = min(known, key=lambda f: f.peak.bytes)
    meshes.setdefault(smallest.mesh, dataclasses.replace(smallest, strategy=AUTO))
    return [(f, result.session.problem(mesh)) for mesh, f in meshes.items()]


def _lines(result: SearchResult, base: Found, problem: Problem, known: Sequence[Found]) -> list[_Line]:
    """A mesh's problem as if nothing overlapped, and as the simulator saw the fastest plan there."""
    session = result.session
    here = sorted((f for f in known if f.mesh == base.mesh), key=lambda f: f.predicted_s)
    starts = [c for f in here if (c := choice_of(problem, f.layout.assignments)) is not None]
    objectives = [problem]
    if session.cluster.async_collectives:
        simulator = session.simulator(base.mesh)
        simulator.go_on(here[0].layout.assignments)
        objectives.append(overlapped(problem, observed(problem, simulator)))
    lines = []
    for objective in objectives:
        solver = Solver()
        solution = solver.solve(objective, starts, prove=False)
        if solution is not None:
            # No budget is little enough: so the instants at which solutions peak are learnt from all of them.
            free = fit_of(objective, solution, 0.0, session.memory)
            priced = Priced(objective, 1.0, session.memory, free)
            lines.append(_Line(result, base, problem, priced))
    return lines


def _simulated(result: SearchResult, found: Sequence[Found]) -> list[Found]:
    """All with their overlap, which searches know only of plans that fit; without those that others dominate anyway."""
    if not result.session.cluster.async_collectives:
        return list(found)
    smallest = math.inf
    kept = []
    # Before they are simulated, plans are compared by their sums.
    for f in sorted(found, key=lambda f: (f.step_s, f.peak.bytes)):
        if f.simulated is not None:
            kept.append(f)
        elif f.peak.bytes < smallest:
            kept.append(dataclasses.replace(f, simulated=result.session.simulated(f.layout)))
        smallest = min(smallest, f.peak.bytes)
    return kept
