"""Dual ascent: a lower bound on the search problem, choices that come near it, and which candidates are not optimal.

The linear relaxation of the problem splits into a small problem per node and one per reader of a transfer, which agree
through messages. Any messages give a bound:

    sum over nodes min_c theta[n][c]  +  sum over pairs min_{r,j} slack[p][r, j]   <=   the optimum

Passing along the nodes in order and back, each node takes what its pairs can spare and spreads it over those to come
(sequential reweighted message passing: Kolmogorov, IEEE TPAMI 37, 2015); the bound never falls. A resharding that
several readers share is paid once: its seconds are divided among them, and what one cannot use goes to the others.
Messages stay valid when costs change, so the next problem of the same shape starts where the last one ended.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ffjax.strategies.problem import Problem, Totals, Transfer, forbidden_seconds

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

MOST_SWEEPS = 60
"""Passes there and back."""
_PATIENCE = 4
_STALLED = 0.05
"""So many passes that together close less than this share of the gap end the ascent."""
_EPSILON = 1e-15


class _Groups:
    """The least over the candidates that share an index (a row or a column of a transfer)."""

    __slots__ = ("_order", "_starts")

    def __init__(self, index: Ints, count: int) -> None:
        self._order = np.argsort(index, kind="stable")
        self._starts = np.searchsorted(index[self._order], np.arange(count))

    def least(self, values: Floats) -> Floats:
        return np.minimum.reduceat(values[self._order], self._starts)


@dataclass(slots=True, eq=False)
class Pair:
    """One reader of one transfer. `slack` is its share of the seconds and all messages; rows are what is made."""

    transfer: int
    source: int
    target: int
    row_of: Ints
    column_of: Ints
    columns: Ints
    """Those of the transfer's columns that this reader can need."""
    rows: _Groups
    cols: _Groups
    portion: Floats
    """Of a resharding's seconds, at first."""
    share: Floats
    slack: Floats


@dataclass(slots=True, eq=False)
class Alone:
    """Seconds of a transfer that depend on one node alone: it reads what it makes, or the other has no choice."""

    transfer: int
    node: int
    row_of: Ints
    column_of: Ints
    portion: Floats


class Ascent:
    """The dual of a problem, and of those that differ from it in costs alone.

    Attributes:
      theta: for each node what its candidates cost, messages and what depends on it alone included.
      pairs, alone: readers of transfers; theta and the pairs' slack of a choice add up to no more than its seconds.
      best: the best choice that was met, a candidate index for each node, or None.
      best_s: its seconds.
      bound_s: proved to be no more than the optimum.
    """

    def __init__(self, problem: Problem) -> None:
        self.problem = problem
        self._totals = Totals(problem)
        self.best: tuple[int, ...] | None = None
        self.best_s = np.inf
        self.bound_s = -np.inf
        # What must not be is dearer than all that may be: infinities would leave no slack to pass on.
        self._forbidden_s = forbidden_seconds(problem)
        self.theta = [n.cost_s.copy() for n in problem.nodes]
        self.pairs: list[Pair] = []
        self.alone: list[Alone] = []
        self._shared: list[tuple[int, list[Pair]]] = []
        at: list[list[Pair]] = [[] for _ in problem.nodes]
        for index, transfer in enumerate(problem.transfers):
            pairs = self._add(index, transfer)
            for pair in pairs:
                at[pair.source].append(pair)
                at[pair.target].append(pair)
            self.pairs += pairs
            if len(pairs) > 1:
                self._shared.append((index, pairs))
        nodes = range(len(problem.nodes))
        self._before = [[p for p in at[n] if min(p.source, p.target) < n] for n in nodes]
        self._after = [[p for p in at[n] if max(p.source, p.target) > n] for n in nodes]

    def _add(self, index: int, transfer: Transfer) -> list[Pair]:
        """The readers of a transfer, those that are its source apart."""
        seconds = self.finite(transfer.seconds)
        others = [c for c in transfer.consumers if c.node != transfer.source]
        rest = np.ones(seconds.shape)
        for consumer in transfer.consumers:
            if consumer.node == transfer.source:
                portion = np.zeros(seconds.shape)
                portion[transfer.row_of, consumer.column_of] = 1 / len(transfer.consumers)
                rest -= portion
                self._add_alone(index, transfer.source, transfer.row_of, consumer.column_of, seconds, portion)
        needed = [np.unique(c.column_of) for c in others]
        wanted = np.zeros(seconds.shape[1])
        for columns in needed:
            wanted[columns] += 1
        pairs = []
        for consumer, columns in zip(others, needed, strict=True):
            column_of = np.searchsorted(columns, consumer.column_of)
            portion = rest[:, columns] / wanted[columns]
            if len(others) == 1 and len(seconds) == 1:
                zeros = np.zeros_like(consumer.column_of)
                self._add_alone(index, consumer.node, zeros, consumer.column_of, seconds, rest)
                continue
            if len(others) == 1 and len(columns) == 1:
                column = np.full_like(transfer.row_of, columns[0])
                self._add_alone(index, transfer.source, transfer.row_of, column, seconds, rest)
                continue
            share = seconds[:, columns] * portion
            pairs.append(
                Pair(
                    transfer=index,
                    source=transfer.source,
                    target=consumer.node,
                    row_of=transfer.row_of,
                    column_of=column_of,
                    columns=columns,
                    rows=_Groups(transfer.row_of, len(seconds)),
                    cols=_Groups(column_of, len(columns)),
                    portion=portion,
                    share=share,
                    slack=share.copy(),
                )
            )
        return pairs

    def _add_alone(
        self, transfer: int, node: int, row_of: Ints, column_of: Ints, seconds: Floats, portion: Floats
    ) -> None:
        self.alone.append(Alone(transfer, node, row_of, column_of, portion))
        self.theta[node] += (seconds * portion)[row_of, column_of]

    def reprice(self, problem: Problem) -> None:
        """Goes on with other costs: the same nodes, candidates and transfers."""
        for node, (old, new) in enumerate(zip(self.problem.nodes, problem.nodes, strict=True)):
            self.theta[node] += new.cost_s - old.cost_s
        before = [self.finite(t.seconds) for t in self.problem.transfers]
        after = [self.finite(t.seconds) for t in problem.transfers]
        for alone in self.alone:
            change = (after[alone.transfer] - before[alone.transfer]) * alone.portion
            self.theta[alone.node] += change[alone.row_of, alone.column_of]
        for pair in self.pairs:
            old_s, new_s = before[pair.transfer][:, pair.columns], after[pair.transfer][:, pair.columns]
            kept = pair.share * (new_s / np.where(old_s > 0, old_s, 1.0))
            share = np.where(old_s > 0, kept, new_s * pair.portion)
            pair.slack += share - pair.share
            pair.share = share
        self.problem, self._totals = problem, Totals(problem)
        self.best_s = np.inf if self.best is None else self._totals.of(self.best)
        self.bound_s = self._bound()

    def offer(self, choice: Sequence[int]) -> None:
        """A choice to start from; it is kept if it is the best so far."""
        seconds = self._totals.of(choice)
        if seconds < self.best_s:
            self.best, self.best_s = tuple(choice), seconds

    def climb(self, gap: float, sweeps: int = MOST_SWEEPS) -> None:
        """Raises the bound and looks for better choices, until the gap (a share) is closed or nothing moves."""
        history: list[float] = []
        for _ in range(sweeps):
            for forward in (True, False):
                self.offer(self._pass(forward))
            self._share_again()
            self.bound_s = max(self._bound(), self.bound_s if history else -np.inf)
            open_s = self.best_s - self.bound_s
            if np.isfinite(open_s) and open_s <= gap * abs(self.best_s):
                return
            history.append(open_s if np.isfinite(open_s) else -self.bound_s)
            if len(history) > _PATIENCE and history[-1] > (1 - _STALLED) * history[-1 - _PATIENCE]:
                return

    def survivors(self, below_s: float) -> list[list[int]]:
        """For each node the candidates that some choice of less than `below_s` may take; all others none takes."""
        return [np.flatnonzero(least < below_s).tolist() for least in self.least_with()]

    def least_with(self) -> list[Floats]:
        """For each node and candidate what no choice that takes it can be below."""
        found = []
        base = self._bound()
        for node, theta in enumerate(self.theta):
            least = base + theta - theta.min()
            for pair in self._before[node] + self._after[node]:
                low = pair.slack.min()
                if pair.source == node:
                    least = least + (pair.slack.min(axis=1) - low)[pair.row_of]
                else:
                    least = least + (pair.slack.min(axis=0) - low)[pair.column_of]
            found.append(least)
        return found

    def _pass(self, forward: bool) -> list[int]:
        """One pass over the nodes; returns the choice that it meets on its way."""
        choice = [0] * len(self.theta)
        nodes = range(len(self.theta))
        for node in nodes if forward else reversed(nodes):
            done, coming = self._before[node], self._after[node]
            if not forward:
                done, coming = coming, done
            theta = self.theta[node]
            cost = np.zeros(len(theta))
            for pair in done:
                if pair.source == node:
                    spare = np.minimum.reduce(pair.slack, axis=1)
                    pair.slack -= spare[:, None]
                    theta += spare[pair.row_of]
                    cost += pair.slack[:, pair.column_of[choice[pair.target]]][pair.row_of]
                else:
                    spare = np.minimum.reduce(pair.slack, axis=0)
                    pair.slack -= spare
                    theta += spare[pair.column_of]
                    cost += pair.slack[pair.row_of[choice[pair.source]]][pair.column_of]
            choice[node] = int((theta + cost).argmin())
            if not coming:
                continue
            part = theta / max(len(done), len(coming))
            for pair in coming:
                if pair.source == node:
                    message = pair.rows.least(part)
                    pair.slack += message[:, None]
                    theta -= message[pair.row_of]
                else:
                    message = pair.cols.least(part)
                    pair.slack += message
                    theta -= message[pair.column_of]
        return choice

    def _share_again(self) -> None:
        """Readers of one transfer give up what of their shares they cannot use; those that lack get it."""
        for index, pairs in self._shared:
            shape = self.problem.transfers[index].seconds.shape
            spare_of = []
            spare, short, readers = np.zeros(shape), np.zeros(shape), np.zeros(shape)
            for pair in pairs:
                mine = np.minimum(pair.share, pair.slack - np.minimum.reduce(pair.slack, axis=None))
                spare_of.append(mine)
                spare[:, pair.columns] += mine
                short[:, pair.columns] += mine <= _EPSILON
                readers[:, pair.columns] += 1
            for pair, mine in zip(pairs, spare_of, strict=True):
                total, lacking = spare[:, pair.columns], short[:, pair.columns]
                given = np.where(mine <= _EPSILON, total / np.maximum(lacking, 1), 0.0)
                change = np.where(lacking > 0, given, total / readers[:, pair.columns]) - mine
                pair.share = pair.share + change
                pair.slack += change

    def _bound(self) -> float:
        nodes = sum(float(np.minimum.reduce(t)) for t in self.theta)
        return nodes + sum(float(np.minimum.reduce(p.slack, axis=None)) for p in self.pairs)

    def finite(self, seconds: Floats) -> Floats:
        return np.where(np.isfinite(seconds), seconds, self._forbidden_s)
