"""Fitting into memory by its price: bytes cost seconds, dearer and dearer until the plan fits.

    minimise    seconds + price * sum over instants i    w_i * live bytes at i

has the structure of the search problem, copies made for readers included, and solves as fast; with a bound on the worst
instant as a constraint a large problem does not. The instant at which a solution really peaks gains weight for the next
round: fictitious play of the plan against the instants (Brown 1951; Robinson, Annals of Mathematics 54, 1951). The
price is found by bisection; where none fits, only bytes are minimised, and the least peak says what budget would do.
"""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Sequence

import numpy as np

from ffjax.cost.lifetimes import Lifetimes
from ffjax.cost.memory import MemoryModel
from ffjax.strategies.budget import Fit, fit_of, instant, scheduled_peak
from ffjax.strategies.methods.ilp import Instant
from ffjax.strategies.methods.solver import Solver
from ffjax.strategies.problem import Problem, total_seconds

_CHEAPEST, _DEAREST = 0.01, 30.0
"""Prices of all memory, in steps, between which the bisection looks."""
_HALVINGS = 5
_ROUNDS, _PATIENCE = 10, 2
"""Of minimising bytes alone: at most so many, and so many without a lower peak end it."""
_TIE_BREAK = 1e-3
"""Weight of a step's time against all memory where memory is minimised."""
_PRICED_GAP, _PRICED_SWEEPS = 1e-3, 12
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
        found = _solve_priced(problem, budget_bytes, memory, times, solver, found, thorough)
    if not found.fits or not thorough:
        return found
    own = scheduled_peak(found.layout, budget_bytes, memory)
    if own.bytes <= budget_bytes:
        return dataclasses.replace(found, peak=own)
    # Its own collectives keep more alive than the program's schedule knows: let that take so much less.
    target = budget_bytes * found.peak.bytes / own.bytes
    less = _solve_priced(problem, target, memory, times, solver, found, thorough)
    own = scheduled_peak(less.layout, budget_bytes, memory)
    solution = dataclasses.replace(less.solution, bound_s=found.solution.bound_s)
    return dataclasses.replace(less, solution=solution, peak=own, fits=own.bytes <= budget_bytes)


def _solve_priced(
    problem: Problem,
    budget_bytes: float,
    memory: MemoryModel,
    times: Lifetimes,
    solver: Solver,
    free: Fit,
    thorough: bool,
) -> Fit:
    """Where the fastest solution, `free`, does not fit. What is found to need least fits when that is the budget."""
    step_s = max(total_seconds(problem, free.solution.choice), 1e-12)
    instants = {free.peak.instant: instant(problem, times, free.peak.instant, budget_bytes)}
    played = Counter({free.peak.instant: 1})
    least = free
    bound_s = free.solution.bound_s

    def solve_at(price: float) -> Fit | None:
        nonlocal least, bound_s
        weights = [(instants[at], n / played.total() * price * step_s / free.peak.bytes) for at, n in played.items()]
        solution = solver.solve(priced(problem, weights), gap=_PRICED_GAP, sweeps=_PRICED_SWEEPS, prove=False)
        if solution is None:
            return None
        # Lagrange: whatever fits pays no more for its bytes than for the whole budget.
        allowed_s = sum(price * (budget_bytes - entry.fixed_bytes) for entry, price in weights)
        bound_s = max(bound_s, solution.bound_s - allowed_s)
        found = fit_of(problem, solution, budget_bytes, memory)
        if found.peak.bytes < least.peak.bytes:
            least = found
        if not found.fits:
            played[found.peak.instant] += 1
            if found.peak.instant not in instants:
                instants[found.peak.instant] = instant(problem, times, found.peak.instant, budget_bytes)
        return found

    fitting: list[Fit] = []
    dearest = solve_at(_DEAREST)
    if dearest is not None and (dearest.fits or thorough):
        low, high = math.log(_CHEAPEST), math.log(_DEAREST)
        for _ in range(_HALVINGS):
            middle = (low + high) / 2
            found = solve_at(math.exp(middle))
            if found is not None and found.fits:
                fitting.append(found)
                high = middle
            else:
                low = middle
        if dearest.fits:
            fitting.append(dearest)
    if fitting:
        best = min(fitting, key=lambda f: total_seconds(problem, f.solution.choice))
        return dataclasses.replace(best, solution=dataclasses.replace(best.solution, bound_s=bound_s))
    stale = 0
    for _ in range(_ROUNDS if thorough else 1):
        before = least
        if solve_at(1 / _TIE_BREAK) is None or least.fits:
            break
        stale = stale + 1 if least is before else 0
        if stale > _PATIENCE:
            break
    return least


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
