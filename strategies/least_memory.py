"""The least memory that will do, and the fastest plan near it: bytes are priced like seconds.

    minimise    sum over instants i    w_i * live bytes at i      (+ time, as heavy as `time_weight` says)

has the structure of the search problem, copies made for readers included, and solves as fast; a bound on the worst
instant, as a constraint, does not. The instant at which a solution really peaks gains weight for the next round:
fictitious play of the plan against the instants (Brown 1951; Robinson, Annals of Mathematics 54, 1951).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import numpy as np

from ffjax.cost.memory import Lifetimes, MemoryModel, Peak
from ffjax.strategies.budget import Fit, Solver, fit_of, instant
from ffjax.strategies.ilp import Instant
from ffjax.strategies.problem import Problem, total_seconds
from ffjax.strategies.prune import prune

ROUNDS = 10
_TIE_BREAK = 1e-3
"""Weight of a step's time against its memory when memory is minimised."""
_STEEPEST, _FLATTEST = 30.0, 0.03
"""Between these weights of memory against time lies what makes a plan fit."""
_HALVINGS = 6


def solve_least(
    problem: Problem,
    budget_bytes: float,
    memory: MemoryModel,
    times: Lifetimes,
    solver: Solver,
    near: Peak,
    step_s: float,
) -> Fit | None:
    """A solution of nearly least peak memory or, if that fits, a nearly fastest one that does.

    Args:
      problem: with all candidates that may save memory.
      budget_bytes: what one device may hold.
      memory, times: of the program.
      solver: solves a problem; it is given no instants.
      near: where a good solution peaks: the first instant that is priced.
      step_s: what a step takes, about.
    """
    played: dict[int, tuple[Instant, int]] = {}

    def solve_weighted(price_s: float) -> Fit | None:
        """The best solution where `near.bytes` at the instants, weighted as often as played, cost `price_s`."""
        total = sum(count for _, count in played.values())
        weights = [(entry, count / total * price_s / near.bytes) for entry, count in played.values()]
        small, kept = prune(priced(problem, weights))
        found = solver(small, ())
        if found is None:
            return None
        choice = tuple(own[c] for own, c in zip(kept, found.choice, strict=True))
        return fit_of(problem, dataclasses.replace(found, choice=choice, bound_s=0.0), budget_bytes, memory)

    least: Fit | None = None
    worst = near.op
    for _ in range(ROUNDS):
        entry, count = played.get(worst, (None, 0))
        played[worst] = (entry or instant(problem, times, worst, budget_bytes), count + 1)
        found = solve_weighted(step_s / _TIE_BREAK)
        if found is None:
            return least
        if least is None or found.peak.bytes < least.peak.bytes:
            least = found
        worst = found.peak.op
    if least is None or not least.fits:
        return least
    low, high = math.log(_FLATTEST), math.log(_STEEPEST)
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        found = solve_weighted(step_s * math.exp(middle))
        if found is not None and found.fits:
            high = middle
            least = min(least, found, key=lambda f: total_seconds(problem, f.solution.choice))
        else:
            low = middle
    return least


def priced(problem: Problem, weights: Sequence[tuple[Instant, float]]) -> Problem:
    """The problem with what is live at some instants added to its costs, at so many seconds a byte."""
    nodes = [n.compute_s.copy() for n in problem.nodes]
    moves = [t.seconds.copy() for t in problem.transfers]
    different = [np.array([[r != c for c in t.columns] for r in t.rows]) for t in problem.transfers]
    for entry, price in weights:
        for node, sizes in entry.node_bytes.items():
            nodes[node] += price * sizes
        for index, sizes in entry.copy_bytes.items():
            moves[index] += price * sizes[None, :] * different[index]
    return dataclasses.replace(
        problem,
        nodes=[dataclasses.replace(n, compute_s=c) for n, c in zip(problem.nodes, nodes, strict=True)],
        transfers=[dataclasses.replace(t, seconds=s) for t, s in zip(problem.transfers, moves, strict=True)],
    )
