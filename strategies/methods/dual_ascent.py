"""Dual ascent: a lower bound on the search problem, choices that come near it, and which candidates are not optimal.

The linear relaxation of the problem splits into a small problem per node and one per reader of a transfer, which agree
through messages. Any messages give a bound:

    sum over nodes min_c theta[n][c]  +  sum over pairs min_{r,j} slack[p][r, j]   <=   the optimum

Passing along the nodes in order and back (`passes`), each node takes what its pairs can spare and spreads it over those
to come (sequential reweighted message passing: Kolmogorov, IEEE TPAMI 37, 2015); the bound never falls. A resharding
that several readers share is paid once: its seconds are divided among them, and what one cannot use goes to the others.
Messages stay valid when costs change, so the next problem of the same shape starts where the last one ended.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ffjax.strategies.methods.passes import Passes, Side
from ffjax.strategies.problem import Problem, Totals, Transfer, forbidden_seconds

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

MOST_SWEEPS = 120
"""Passes there and back."""
_PATIENCE = 10
_STALLED = 0.05
"""So many passes that together close less than this share of the gap end the ascent."""
_EPSILON = 1e-15


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
        sizes = [len(n.candidates) for n in problem.nodes]
        self._theta = np.concatenate([np.zeros(0), *(n.cost_s for n in problem.nodes)])
        self._starts = np.cumsum([0, *sizes])[:-1]
        self.theta = [self._theta[a : a + n] for a, n in zip(self._starts.tolist(), sizes, strict=True)]
        self.alone: list[Alone] = []
        by_transfer = [self._add(index, transfer) for index, transfer in enumerate(problem.transfers)]
        shared = [pair for pairs in by_transfer if len(pairs) > 1 for pair in pairs]
        self.pairs = shared + [pair for pairs in by_transfer if len(pairs) == 1 for pair in pairs]
        # All tables in one array, those of transfers with several readers first.
        self._slack = np.concatenate([np.zeros(0), *(p.slack.ravel() for p in self.pairs)])
        self._tables = np.cumsum([0, *(p.slack.size for p in self.pairs)])
        sides: list[Side] = []
        for pair, start in zip(self.pairs, self._tables.tolist(), strict=False):
            rows, columns = pair.slack.shape
            pair.slack = self._slack[start : start + rows * columns].reshape(rows, columns)
            of_rows, of_columns = (rows, columns), (columns, 1)
            for node, far, index_of, own, other in (
                (pair.source, pair.target, pair.row_of, of_rows, of_columns),
                (pair.target, pair.source, pair.column_of, of_columns, of_rows),
            ):
                sides.append(
                    Side(
                        node=node,
                        far=far,
                        index_of=index_of,
                        start=start,
                        count=own[0],
                        stride=own[1],
                        far_count=other[0],
                        far_stride=other[1],
                    )
                )
        self._passes = Passes(self._theta, sizes, self._slack, sides)
        self._sharing = _Sharing(problem, shared) if shared else None

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
                    portion=portion,
                    share=share,
                    slack=share,
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
            pair.share[...] = share
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
                self.take_turns(forward=forward)
            if self._sharing is not None:
                self._sharing.again(self._slack)
            self.bound_s = max(self._bound(), self.bound_s if history else -np.inf)
            open_s = self.best_s - self.bound_s
            if np.isfinite(open_s) and open_s <= gap * abs(self.best_s):
                return
            history.append(open_s if np.isfinite(open_s) else -self.bound_s)
            if len(history) > _PATIENCE and history[-1] > (1 - _STALLED) * history[-1 - _PATIENCE]:
                return

    def take_turns(self, *, forward: bool) -> None:
        """One pass over the nodes; what it meets on its way is offered."""
        self.offer(self._passes.run(forward=forward))

    def survivors(self, below_s: float) -> list[list[int]]:
        """For each node the candidates that some choice of less than `below_s` may take; all others none takes."""
        return [np.flatnonzero(least < below_s).tolist() for least in self.least_with()]

    def least_with(self) -> list[Floats]:
        """For each node and candidate what no choice that takes it can be below."""
        base = self._bound()
        found = [base + theta - theta.min() for theta in self.theta]
        for pair in self.pairs:
            low = pair.slack.min()
            found[pair.source] += (pair.slack.min(axis=1) - low)[pair.row_of]
            found[pair.target] += (pair.slack.min(axis=0) - low)[pair.column_of]
        return found

    def _bound(self) -> float:
        bound_s = float(np.minimum.reduceat(self._theta, self._starts).sum()) if len(self._theta) else 0.0
        if len(self._slack):
            bound_s += float(np.minimum.reduceat(self._slack, self._tables[:-1]).sum())
        return bound_s

    def finite(self, seconds: Floats) -> Floats:
        return np.where(np.isfinite(seconds), seconds, self._forbidden_s)


class _Sharing:
    """How the seconds of transfers are divided among several readers. `pairs`: theirs, whose slack comes first."""

    def __init__(self, problem: Problem, pairs: Sequence[Pair]) -> None:
        sizes = [p.share.size for p in pairs]
        self._starts = np.cumsum([0, *sizes])[:-1]
        self._pair_of = np.repeat(np.arange(len(pairs)), sizes)
        self._share = np.concatenate([p.share.ravel() for p in pairs])
        for pair, start, size in zip(pairs, self._starts.tolist(), sizes, strict=True):
            pair.share = self._share[start : start + size].reshape(pair.share.shape)
        # The cell of a transfer that each cell of a pair is a share of.
        first, cells = dict[int, int](), []
        self._count = 0
        for pair in pairs:
            rows, columns = problem.transfers[pair.transfer].seconds.shape
            if pair.transfer not in first:
                first[pair.transfer] = self._count
                self._count += rows * columns
            cells.append((first[pair.transfer] + np.arange(rows)[:, None] * columns + pair.columns).ravel())
        self._cell = np.concatenate(cells)
        self._readers = np.bincount(self._cell, minlength=self._count)[self._cell]

    def again(self, slack: Floats) -> None:
        """Readers of one transfer give up what of their shares they cannot use; those that lack get it."""
        own = slack[: len(self._share)]
        mine = np.minimum(self._share, own - np.minimum.reduceat(own, self._starts)[self._pair_of])
        lacks = mine <= _EPSILON
        total = np.bincount(self._cell, mine, self._count)[self._cell]
        lacking = np.bincount(self._cell, lacks, self._count)[self._cell]
        given = np.where(lacks, total / np.maximum(lacking, 1), 0.0)
        change = np.where(lacking > 0, given, total / self._readers) - mine
        self._share += change
        own += change
