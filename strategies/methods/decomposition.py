"""Decomposition at bottlenecks: dynamic programming over boundary shardings, for what is too large to solve as a whole.

Dual ascent leaves each node few candidates. Nodes with one are no boundary: what only they connect falls apart, and
each part is solved by itself. Its nodes are decided one after another, in an order that keeps the boundary small (the
decided nodes that an undecided one shares a transfer with). Of all ways that reach the same shardings on the boundary
only the best goes on, so that where the boundary is a bottleneck few are left (Unity, OSDI 2022, section 6, splits
there; alike parts, which it solves once, are one family here already).

    below(way) = what is decided costs + the least that the dual says of the rest, given the boundary

bounds whatever a way can become. A way that is no better than a known choice is dropped, and so are all but the most
promising; the least `below` of those bounds what was not looked at:

    bound = min(the best choice, the least below(way) that was dropped)
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ffjax.strategies.methods.base import Solution
from ffjax.strategies.methods.dual_ascent import Alone, Ascent, Pair
from ffjax.strategies.problem import Problem, Transfer, restrict

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

GAP = 1e-3
"""The share of the optimum within which a solution counts as proved."""
_WAYS = 256
"""Kept after each decision."""
_MOST_KEYS = 2**62
"""Shardings of a boundary that one whole number tells apart."""
_SWEEPS = 30
"""Of the ascent, each time."""


class Decomposition:
    """Dynamic programming over boundary shardings. `ways`: how many are kept; with no limit the answer is exact."""

    name = "decomposition"

    def __init__(self, *, ways: int = _WAYS, gap: float = GAP) -> None:
        self.ways = ways
        self.gap = gap

    def solve(self, problem: Problem, starts: Sequence[Sequence[int]] = ()) -> Solution | None:
        """What the ascent leaves in doubt is decided by dynamic programming; see `Method`."""
        began = time.perf_counter()
        if any(not node.candidates for node in problem.nodes):
            return None
        ascent = Ascent(problem)
        for choice in starts:
            ascent.offer(choice)
        ascent.climb(self.gap, _SWEEPS)
        bound_s = settle(ascent, self.gap, self.ways)
        if ascent.best is None:
            return None
        return Solution(
            choice=ascent.best,
            objective_s=ascent.best_s,
            bound_s=min(bound_s, ascent.best_s),
            status=self.name,
            seconds=time.perf_counter() - began,
        )


def settle(ascent: Ascent, gap: float, ways: int = _WAYS) -> float:
    """Decides what an ascent leaves in doubt: offers it the best choice, and returns the bound that remains."""
    enough_s = ascent.best_s * (1 - gap)
    if ascent.bound_s >= enough_s:
        return ascent.bound_s
    kept = ascent.survivors(enough_s)
    if not all(kept):
        return enough_s
    left = Ascent(restrict(ascent.problem, kept))
    if ascent.best is not None and all(c in own for c, own in zip(ascent.best, kept, strict=True)):
        left.offer([own.index(c) for c, own in zip(ascent.best, kept, strict=True)])
    left.climb(gap, _SWEEPS)
    dropped_s = left.bound_s
    if left.best_s - left.bound_s > gap * left.best_s:
        choice, dropped_s = _Frontier(left, ways, min(enough_s, left.best_s * (1 - gap))).decide()
        if choice is not None:
            left.offer(choice)
    if left.best is not None:
        ascent.offer([own[c] for own, c in zip(kept, left.best, strict=True)])
    return max(ascent.bound_s, min(enough_s, dropped_s))


class _Frontier:
    """The ways to decide an ascent's problem node by node. `limit_s`: what is no better is not looked for."""

    def __init__(self, ascent: Ascent, ways: int, limit_s: float) -> None:
        self.problem = ascent.problem
        self.most, self.limit_s = ways, limit_s
        self.theta = ascent.theta
        nodes = range(len(self.theta))
        self.pairs: list[list[Pair]] = [[] for _ in nodes]
        self.neighbours: list[set[int]] = [set() for _ in nodes]
        self.shared: list[list[_Shared]] = [[] for _ in nodes]
        of_transfer: dict[int, _Shared] = {}
        for index, transfer in enumerate(self.problem.transfers):
            members = {transfer.source, *(c.node for c in transfer.consumers)}
            for node in members:
                self.neighbours[node] |= members - {node}
            if len(transfer.consumers) > 1:
                of_transfer[index] = _Shared(transfer, ascent.finite(transfer.seconds), members, [], [])
                for node in members:
                    self.shared[node].append(of_transfer[index])
        for pair in ascent.pairs:
            self.pairs[pair.source].append(pair)
            self.pairs[pair.target].append(pair)
            if pair.transfer in of_transfer:
                of_transfer[pair.transfer].pairs.append(pair)
        for alone in ascent.alone:
            if alone.transfer in of_transfer:
                of_transfer[alone.transfer].alone.append(alone)
        self.undecided = [len(near) for near in self.neighbours]
        self.chosen = np.full((1, len(nodes)), -1, np.int64)
        least_s = sum(float(t.min()) for t in self.theta) + sum(float(p.slack.min()) for p in ascent.pairs)
        self.below_s = np.array([least_s])
        self.dropped_s = limit_s
        self.decided: set[int] = set()

    def decide(self) -> tuple[tuple[int, ...] | None, float]:
        """The best choice below the limit, if one is found, and the bound that remains."""
        pending = set(range(len(self.theta)))
        boundary: set[int] = set()
        while pending and len(self.below_s):
            open_nodes = {n for b in boundary for n in self.neighbours[b]} & pending or pending
            node = min(open_nodes, key=lambda n: (self._boundary_after(n), n))
            pending.remove(node)
            below = self._extended(node)
            boundary = {n for n in (*boundary, node) if self.undecided[n]}
            self._merge(node, below, boundary)
        if not len(self.below_s):
            return None, self.dropped_s
        best = int(np.argmin(self.below_s))
        return tuple(self.chosen[best].tolist()), min(self.dropped_s, float(self.below_s[best]))

    def _boundary_after(self, node: int) -> float:
        """By how much deciding a node lets the boundary grow, as a logarithm of its shardings."""
        grows = math.log(len(self.theta[node])) if self.undecided[node] else 0.0
        done = [n for n in self.neighbours[node] & self.decided if self.undecided[n] == 1]
        return grows - sum(math.log(len(self.theta[n])) for n in done)

    def _extended(self, node: int) -> Floats:
        """Every way with every candidate of a node: what that can become at least."""
        theta = self.theta[node]
        below: Floats = self.below_s[:, None] + (theta - theta.min())
        for pair in self.pairs[node]:
            makes = pair.source == node
            other, slack = (pair.target, pair.slack) if makes else (pair.source, pair.slack.T)
            own_of, other_of = (pair.row_of, pair.column_of) if makes else (pair.column_of, pair.row_of)
            if other in self.decided:
                given = slack[:, other_of[self.chosen[:, other]]]
                below += (given - given.min(axis=0))[own_of].T
            else:
                below += (slack.min(axis=1) - slack.min())[own_of]
        self.decided.add(node)
        for near in self.neighbours[node]:
            self.undecided[near] -= 1
        return below

    def _merge(self, node: int, below: Floats, boundary: set[int]) -> None:
        """Of the ways that agree on the boundary the best goes on; of those the most promising."""
        way, candidate = np.nonzero(below < self.limit_s)

        def chosen(of: int) -> Ints:
            return candidate if of == node else self.chosen[way, of]

        total = below[way, candidate]
        for shared in self.shared[node]:
            if shared.members <= self.decided:
                total = total + shared.unseen(chosen)
        order = np.argsort(total, kind="stable")
        order = order[: np.searchsorted(total[order], self.limit_s)]
        way, candidate, total = way[order], candidate[order], total[order]
        key, keys = np.zeros(len(way), np.int64), 1
        for near in boundary:
            if keys > _MOST_KEYS // len(self.theta[near]):
                _, key = np.unique(key, return_inverse=True)
                keys = len(key)
            key = key * len(self.theta[near]) + chosen(near)
            keys *= len(self.theta[near])
        _, first = np.unique(key, return_index=True)
        first.sort()
        if len(first) > self.most:
            self.dropped_s = min(self.dropped_s, float(total[first[self.most]]))
            first = first[: self.most]
        self.chosen, self.below_s = self.chosen[way[first]], total[first]
        self.chosen[:, node] = candidate[first]


@dataclass(slots=True)
class _Shared:
    """A transfer with several readers, of whose seconds the dual gives each a share."""

    transfer: Transfer
    seconds: Floats
    members: set[int]
    pairs: list[Pair]
    alone: list[Alone]

    def unseen(self, chosen: Callable[[int], Ints]) -> Floats:
        """For each way what the transfer costs more than the shares that its readers pay; `chosen` is of a node."""
        rows = self.transfer.row_of[chosen(self.transfer.source)]
        columns = [c.column_of[chosen(c.node)] for c in self.transfer.consumers]
        total = np.zeros(len(rows))
        for index, column in enumerate(columns):
            again = np.any([column == earlier for earlier in columns[:index]], axis=0)
            total += np.where(again, 0.0, self.seconds[rows, column])
        for pair in self.pairs:
            total -= pair.share[rows, pair.column_of[chosen(pair.target)]]
        for alone in self.alone:
            candidate = chosen(alone.node)
            total -= (self.seconds * alone.portion)[alone.row_of[candidate], alone.column_of[candidate]]
        return total
