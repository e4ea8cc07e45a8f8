"""For each decision the best alternative to it, all other decisions kept."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ffjax.strategies.problem import Problem


@dataclass(frozen=True, slots=True, kw_only=True)
class RunnerUp:
    """The second best candidate of a node, and what it would add to the step (of all its members)."""

    candidate: int
    extra_s: float


def runners_up(problem: Problem, choice: Sequence[int]) -> list[RunnerUp | None]:
    """For each node its runner-up, or None where there is no other candidate."""
    total = [node.cost_s.copy() for node in problem.nodes]
    for transfer in problem.transfers:
        row = int(transfer.row_of[choice[transfer.source]])
        targets = [int(c.column_of[choice[c.node]]) for c in transfer.consumers]
        total[transfer.source] += transfer.seconds[:, list(set(targets))].sum(axis=1)[transfer.row_of]
        for index, consumer in enumerate(transfer.consumers):
            others = set(targets[:index] + targets[index + 1 :])
            # A sharding that another consumer needs anyway is free.
            price = transfer.seconds[row].copy()
            price[list(others)] = 0.0
            if consumer.node != transfer.source:
                total[consumer.node] += price[consumer.column_of]
    found: list[RunnerUp | None] = []
    for seconds, chosen in zip(total, choice, strict=True):
        if len(seconds) == 1:
            found.append(None)
            continue
        rest = seconds.copy()
        rest[chosen] = np.inf
        best = int(np.argmin(rest))
        found.append(RunnerUp(candidate=best, extra_s=float(rest[best] - seconds[chosen])))
    return found
