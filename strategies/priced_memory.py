"""Fitting into memory by its price: bytes cost seconds, dearer and dearer until the plan fits.

    minimise    seconds + price * sum over instants i    w_i * live bytes at i

has the structure of the search problem, copies made for readers included, and solves as fast; with a bound on the worst
instant as a constraint a large problem does not. The instant at which a solution really peaks gains weight for the next
round: fictitious play of the plan against the instants (Brown 1951; Robinson, Annals of Mathematics 54, 1951). The
price is found by bisection; where none fits, only bytes are minimised, and the least peak says what budget would do.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections import Counter
from collections.abc import Sequence

import numpy as np

from ffjax.cost.lifetimes import Lifetimes
from ffjax.cost.memory import MemoryModel
from ffjax.strategies.budget import Fit, Instant, fit_of, instant, scheduled_peak
from ffjax.strategies.methods.solver import Solver
from ffjax.strategies.problem import Problem, total_seconds

CHEAPEST, DEAREST = 0.01, 30.0
"""Prices of all memory, in steps, between which the bisection looks."""
_HALVINGS = {True: 5, False: 3}
"""Of the range of prices: where thorough, and where not."""
_ROUNDS, _PATIENCE = 10, 2
"""Of minimising bytes alone: at most so many, and so many without a lower peak end it."""
BYTES_ALONE = 1e3
"""The price at which memory alone is minimised, but for ties."""
_BOUND_PRICES = (0.1, 0.3, 0.6, 1.0, 1.5)
"""Times the price that was found, at which a bound within the budget is looked for."""
_PRICED_GAP, _PRICED_SWEEPS, _BOUND_SWEEPS = 1e-3, 12, 30
"""How well priced problems are solved: a price is a guess itself."""


def solve_within(
    problem: Problem,
    budget_bytes: float,
    memory: MemoryModel,
    times: Lifetimes,
    solver: Solver,
    starts: Sequence[Sequence[int]] = (),
    *,
    thorough: bool = True,
) -> Fit | None:
    """The fastest solution that fits, or one of nearly least peak memory (`fits` is False); None if there is none.

    Memory is priced under the program's schedule; if `thorough`, what nearly fills the budget fits under its own, too.

    Args:
      problem: on one mesh.
      budget_bytes: what one device may hold.
      memory, times: of the program.
      solver: of problems of this shape.
      starts: choices that are known.
      thorough: the gap is closed, and where nothing fits, how little would do is looked for.
    """
    solution = solver.solve(problem, starts, prove=thorough)
    if solution is None:
        return None
    found = fit_of(problem, solution, budget_bytes, memory)
    if not found.fits:
        found = _solve_priced(Priced(problem, budget_bytes, memory, times, solver, found), thorough)
    if not found.fits or not thorough:
        return found
    own = scheduled_peak(found.layout, budget_bytes, memory)
    if own.bytes <= budget_bytes:
        return dataclasses.replace(found, peak=own)
    # Its own collectives keep more alive than the program's schedule knows: let that take so much less.
    target = budget_bytes * found.peak.bytes / own.bytes
    less = _solve_priced(Priced(problem, target, memory, times, solver, found), thorough)
    own = scheduled_peak(less.layout, budget_bytes, memory)
    solution = dataclasses.replace(less.solution, bound_s=found.solution.bound_s)
    return dataclasses.replace(
        less, solution=solution, peak=own, fits=own.bytes <= budget_bytes, bound_within=found.bound_within
    )


class Priced:
    """A problem in which bytes cost seconds, solved at one price after another.

    Args:
      problem: on one mesh.
      budget_bytes: what one device may hold: what fits.
      memory, times: of the program.
      solver: of problems of this shape.
      free: the fastest solution, at no price.
    """

    def __init__(
        self, problem: Problem, budget_bytes: float, memory: MemoryModel, times: Lifetimes, solver: Solver, free: Fit
    ) -> None:
        self.problem, self.budget_bytes = problem, budget_bytes
        self.memory, self.times, self.solver = memory, times, solver
        self.free = self.least = free
        self._s_per_byte = max(total_seconds(problem, free.solution.choice), 1e-12) / free.peak.bytes
        self._instants: dict[int, Instant] = {}
        self._played: Counter[int] = Counter()
        self._play(free.peak.instant)

    def at(self, price: float) -> Fit | None:
        """The solution where the bytes of `free` cost `price` times its step."""
        weights = [
            (self._instants[at], n / self._played.total() * price * self._s_per_byte) for at, n in self._played.items()
        ]
        solution = self.solver.solve(priced(self.problem, weights), gap=_PRICED_GAP, sweeps=_PRICED_SWEEPS, prove=False)
        if solution is None:
            return None
        # What is proved of seconds and bytes together says nothing of seconds alone: instants count more than is live.
        solution = dataclasses.replace(solution, bound_s=self.free.solution.bound_s)
        found = dataclasses.replace(
            fit_of(self.problem, solution, self.budget_bytes, self.memory),
            s_per_byte=price * self._s_per_byte,
            free=self.free,
            bound_within=functools.partial(self.bound_s, price * self._s_per_byte),
        )
        if found.peak.bytes < self.least.peak.bytes:
            self.least = found
        if not found.fits:
            self._play(found.peak.instant)
        return found

    def bound_s(self, s_per_byte: float) -> float:
        """What no choice within the budget can be below, by Lagrange's relaxation of the budget.

            min over choices (seconds + sum over instants w_i * bytes at i) - budget * sum w_i   <=   seconds that fit

        for any weights w >= 0, if no more bytes are counted at an instant than are live (`budget.instant`, `surely`).
        The weights are the instants at which solutions peaked, at prices around the one that was found.
        """
        best = self.free.solution.bound_s
        sure = {at: instant(self.problem, self.times, at, self.memory.last_at_home) for at in self._played}
        for factor in _BOUND_PRICES:
            price = factor * s_per_byte
            weights = [(sure[at], n / self._played.total() * price) for at, n in self._played.items()]
            found = self.solver.solve(priced(self.problem, weights), gap=_PRICED_GAP, sweeps=_BOUND_SWEEPS, prove=False)
            if found is not None:
                fixed = sum(w * entry.fixed_bytes for entry, w in weights)
                best = max(best, found.bound_s + fixed - price * self.budget_bytes)
        return best

    def shrink(self, rounds: int = _ROUNDS) -> None:
        """Looks for a smaller `least`, until one fits or none is found any more."""
        stale = 0
        for _ in range(rounds):
            before = self.least
            if self.at(BYTES_ALONE) is None or self.least.fits:
                break
            stale = stale + 1 if self.least is before else 0
            if stale > _PATIENCE:
                break

    def _play(self, at: int) -> None:
        self._played[at] += 1
        if at not in self._instants:
            self._instants[at] = instant(self.problem, self.times, at)


def _solve_priced(prices: Priced, thorough: bool) -> Fit:
    """Where the fastest solution does not fit. What is found to need least fits when that is the budget."""
    fitting: list[Fit] = []
    dearest = prices.at(DEAREST)
    if dearest is not None and (dearest.fits or thorough):
        low, high = math.log(CHEAPEST), math.log(DEAREST)
        for _ in range(_HALVINGS[thorough]):
            middle = (low + high) / 2
            found = prices.at(math.exp(middle))
            if found is not None and found.fits:
                fitting.append(found)
                high = middle
            else:
                low = middle
        if dearest.fits:
            fitting.append(dearest)
    if fitting:
        return min(fitting, key=lambda f: total_seconds(prices.problem, f.solution.choice))
    prices.shrink(_ROUNDS if thorough else 1)
    return prices.least


def priced(problem: Problem, weights: Sequence[tuple[Instant, float]]) -> Problem:
    """The problem with what is live at some instants added to its costs, at so many seconds a byte."""
    nodes = [n.compute_s.copy() for n in problem.nodes]
    moves = [t.seconds.copy() for t in problem.transfers]
    moving = [np.array([[r != c for c in t.columns] for r in t.rows]) for t in problem.transfers]
    for entry, price in weights:
        for node, sizes in entry.node_bytes.items():
            nodes[node] += price * sizes
        for index, sizes in entry.copy_bytes.items():
            moves[index] += price * sizes[None, :] * moving[index]
    return dataclasses.replace(
        problem,
        nodes=[dataclasses.replace(n, compute_s=c) for n, c in zip(problem.nodes, nodes, strict=True)],
        transfers=[dataclasses.replace(t, seconds=s) for t, s in zip(problem.transfers, moves, strict=True)],
    )
