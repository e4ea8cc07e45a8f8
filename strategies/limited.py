"""Limits on bytes at some instants, as terms of the search problem: to be priced, counted, or kept as constraints."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ffjax.strategies.instants import Instants
from ffjax.strategies.methods.ilp import Limit
from ffjax.strategies.problem import Problem

Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True, kw_only=True)
class Terms:
    """The bytes of one instant: of each node's candidates, and of each transfer's cells."""

    nodes: Mapping[int, Floats]
    transfers: Mapping[int, Floats]
    fixed_bytes: float

    def of(self, problem: Problem, choice: Sequence[int]) -> float:
        """The bytes of a choice of the problem that the terms are of."""
        total = self.fixed_bytes + sum(float(sizes[choice[node]]) for node, sizes in self.nodes.items())
        for index, sizes in self.transfers.items():
            transfer = problem.transfers[index]
            row = sizes[transfer.row_of[choice[transfer.source]]]
            total += sum(float(row[j]) for j in {int(c.column_of[choice[c.node]]) for c in transfer.consumers})
        return total


@dataclass(frozen=True, slots=True, kw_only=True)
class Limited:
    """A problem with terms for bytes at instants. What only some consumers of a transfer need is one more transfer."""

    problem: Problem
    terms: tuple[Terms, ...]

    def priced(self, prices: Sequence[float]) -> Problem:
        """The problem in which the bytes of each instant cost so many seconds each."""
        nodes = [n.compute_s for n in self.problem.nodes]
        moves = [t.seconds for t in self.problem.transfers]
        for entry, price in zip(self.terms, prices, strict=True):
            for node, sizes in entry.nodes.items():
                nodes[node] = nodes[node] + price * sizes
            for index, sizes in entry.transfers.items():
                moves[index] = moves[index] + price * sizes
        return dataclasses.replace(
            self.problem,
            nodes=[dataclasses.replace(n, compute_s=c) for n, c in zip(self.problem.nodes, nodes, strict=True)],
            transfers=[dataclasses.replace(t, seconds=s) for t, s in zip(self.problem.transfers, moves, strict=True)],
        )

    def bytes(self, choice: Sequence[int]) -> Floats:
        """What a choice takes at each instant."""
        return np.array([entry.of(self.problem, choice) for entry in self.terms])

    def limits(self, budget_bytes: float) -> list[Limit]:
        """That at no instant there is more than the budget."""
        return [Limit(nodes=t.nodes, transfers=t.transfers, most=budget_bytes - t.fixed_bytes) for t in self.terms]


def limited(problem: Problem, instants: Instants, ats: Sequence[int], *, surely: bool = False) -> Limited:
    """A problem with terms for the bytes at some instants; `instants` are of a problem with the same transfers.

    With `surely` they are never more than those of `MemoryModel`, else never less.
    """
    transfers = list(problem.transfers)
    added: dict[tuple[int, tuple[int, ...]], int] = {}
    terms = []
    within = instants.within(problem)
    for entry in (within.at(at, surely=surely) for at in ats):
        cells: dict[int, Floats] = {}
        for read in entry.reads:
            index, whole = read.transfer, problem.transfers[read.transfer]
            if len(read.consumers) < len(whole.consumers):
                key = (read.transfer, read.consumers)
                if key not in added:
                    added[key] = len(transfers)
                    transfers.append(
                        dataclasses.replace(
                            whole,
                            consumers=[whole.consumers[k] for k in read.consumers],
                            seconds=np.zeros_like(whole.seconds),
                            values=[],
                        )
                    )
                index = added[key]
            cells[index] = cells[index] + read.bytes if index in cells else read.bytes
        terms.append(Terms(nodes=entry.node_bytes, transfers=cells, fixed_bytes=entry.fixed_bytes))
    return Limited(problem=dataclasses.replace(problem, transfers=transfers), terms=tuple(terms))
