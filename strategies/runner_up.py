"""For each decision the best alternative to it, all other decisions kept."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ffjax.strategies.methods.moves import Moves
from ffjax.strategies.problem import Problem


@dataclass(frozen=True, slots=True, kw_only=True)
class RunnerUp:
    """The second best candidate of a node, and what it would add to the step (of all its members)."""

    candidate: int
    extra_s: float


def runners_up(problem: Problem, choice: Sequence[int]) -> list[RunnerUp | None]:
    """For each node its runner-up, or None where there is no other candidate."""
    moves = Moves(problem, choice)
    found: list[RunnerUp | None] = []
    for node, chosen in enumerate(choice):
        rest = moves.extra(node).copy()
        if len(rest) == 1:
            found.append(None)
            continue
        rest[chosen] = np.inf
        best = int(np.argmin(rest))
        found.append(RunnerUp(candidate=best, extra_s=float(rest[best])))
    return found
