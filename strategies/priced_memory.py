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

from ffjax.cost.memory import MemoryModel
from ffjax.strategies.budget import Fit, Solver, fit_of, instant
from ffjax.strategies.ilp import Instant
from ffjax.strategies.problem import Problem, total_seconds

_CHEAPEST, _DEAREST = 0.01, 30.0
"""Prices of all memory, in steps, between which the bisection looks."""
_HALVINGS = 6
_ROUNDS, _PATIENCE = 10, 2
"""Of minimising bytes alone: at most so many, and so many without a lower peak end it."""
_TIE_BREAK = 1e-3
"""Weight of a step's time against all memory where memory is minimised."""


def solve_priced(problem: Problem, budget_bytes: float, memory: MemoryModel, solver: Solver, free: Fit) -> Fit:
    """A fast solution that fits; where none is found, one of nearly least peak memory (`fits` is False).

    What is found to need least fits when it is asked for again with what it needs as the budget.

    Args:
      problem: with all candidates that may save memory.
      budget_bytes: what one device may hold.
      memory: of the program.
      solver: solves a problem; it is given no instants.
      free: the solution of the same problem whose memory costs nothing.
    """
    step_s = max(total_seconds(problem, free.solution.choice), 1e-12)
    # Solutions have schedules of their own: the op that runs names the instant.
    instants = {free.peak.op: instant(problem, free.times, free.peak.instant, budget_bytes)}
    played = Counter({free.peak.op: 1})
    least = free

    def solve_at(price: float) -> Fit | None:
        nonlocal least
        weights = [(instants[at], n / played.total() * price * step_s / free.peak.bytes) for at, n in played.items()]
        solution = solver(priced(problem, weights), ())
        if solution is None:
            return None
        # What is proved of seconds and bytes together says nothing of seconds alone.
        found = fit_of(problem, dataclasses.replace(solution, bound_s=free.solution.bound_s), budget_bytes, memory)
        if found.peak.bytes < least.peak.bytes:
            least = found
        if not found.fits:
            played[found.peak.op] += 1
            if found.peak.op not in instants:
                instants[found.peak.op] = instant(problem, found.times, found.peak.instant, budget_bytes)
        return found

    low, high = math.log(_CHEAPEST), math.log(_DEAREST)
    fitting: list[Fit] = []
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        found = solve_at(math.exp(middle))
        if found is not None and found.fits:
            fitting.append(found)
            high = middle
        else:
            low = middle
    if fitting:
        return min(fitting, key=lambda f: total_seconds(problem, f.solution.choice))
    stale = 0
    for _ in range(_ROUNDS):
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
