"""What it adds to change one decision, all others kept; and the steepest descent that follows from it.

    seconds(node)[c] = cost[node][c] + sum over transfers that node makes or reads of the reshardings that c adds

Only a node's own transfers are looked at, and what is known of a node stays true until one of its neighbours moves.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence

import numpy as np
from numpy.typing import NDArray

from ffjax.strategies.problem import Problem, forbidden_seconds

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]


class Moves:
    """A choice, and the moves from it. `choice[n]` is the candidate of node n.

    Attributes:
      neighbours: for each node those with which it shares a transfer.
    """

    def __init__(self, problem: Problem, choice: Sequence[int]) -> None:
        self.problem = problem
        self.choice = list(choice)
        most = forbidden_seconds(problem)
        self._seconds = [np.where(np.isfinite(t.seconds), t.seconds, most) for t in problem.transfers]
        self._cost = [n.cost_s for n in problem.nodes]
        self._known: dict[int, Floats] = {}
        touching: list[dict[int, None]] = [{} for _ in problem.nodes]
        near: list[set[int]] = [set() for _ in problem.nodes]
        for index, transfer in enumerate(problem.transfers):
            members = {transfer.source, *(c.node for c in transfer.consumers)}
            for node in members:
                touching[node][index] = None
                near[node] |= members
        self._touching = [list(t) for t in touching]
        self.neighbours = [sorted(near[n] - {n}) for n in range(len(problem.nodes))]

    def seconds(self, node: int) -> Floats:
        """For each candidate of a node what depends on it, up to a constant."""
        found = self._known.get(node)
        if found is None:
            found = self._known[node] = self._priced(node)
        return found

    def extra(self, node: int) -> Floats:
        """For each candidate of a node what taking it would add to the total."""
        seconds = self.seconds(node)
        return seconds - float(seconds[self.choice[node]])

    def move(self, node: int, candidate: int) -> None:
        """Takes another candidate of a node."""
        if candidate != self.choice[node]:
            self.choice[node] = candidate
            for other in self.neighbours[node]:
                self._known.pop(other, None)

    def descend(self, fixed: Collection[int] = (), begin: Iterable[int] | None = None) -> None:
        """Gives nodes their best candidate in turn, until none gains: all but `fixed` ones, from `begin` outwards."""
        pending = dict.fromkeys(range(len(self.choice)) if begin is None else begin)
        while pending:
            node = next(iter(pending))
            del pending[node]
            extra = self.extra(node)
            best = int(np.argmin(extra))
            if node not in fixed and extra[best] < -_LEAST_GAIN * abs(float(self.seconds(node)[best])):
                self.move(node, best)
                pending.update(dict.fromkeys(self.neighbours[node]))

    def _priced(self, node: int) -> Floats:
        total = self._cost[node].copy()
        for index in self._touching[node]:
            transfer, seconds = self.problem.transfers[index], self._seconds[index]
            own: list[Ints] = []
            others: set[int] = set()
            for consumer in transfer.consumers:
                if consumer.node == node:
                    own.append(consumer.column_of)
                else:
                    others.add(int(consumer.column_of[self.choice[consumer.node]]))
            if transfer.source == node:
                total += seconds[:, sorted(others)].sum(axis=1)[transfer.row_of]
            row = transfer.row_of if transfer.source == node else transfer.row_of[self.choice[transfer.source]]
            for position, column_of in enumerate(own):
                price = seconds[row, column_of]
                # A sharding that another reader needs anyway is free.
                paid = np.isin(column_of, list(others))
                for earlier in own[:position]:
                    paid |= earlier == column_of
                total += np.where(paid, 0.0, price)
        return total


_LEAST_GAIN = 1e-12
"""As a share of a node's seconds: less is rounding."""
