"""Exact pruning: candidates that can be exchanged for another of their node without ever costing more.

Exchanging c for c' at node n changes the objective by at most

    cost(c') - cost(c) + sum over transfers that n makes    k * max_j (s[row c', j] - s[row c, j])   (k readers, if > 0)
                       + sum over transfers that n reads    max_r (s[r, col c'] - s[r, col c])       (sole reader)
                                                            max_r  s[r, col c']                      (one of several)

whatever the other nodes do. Where that is not positive, c can go: some optimal choice does without it.
"""

from __future__ import annotations

import dataclasses

import numpy as np

from ffjax.cost.region_costs import Splits
from ffjax.strategies.problem import Consumer, Node, Problem, Transfer


def prune(problem: Problem) -> tuple[Problem, list[list[int]]]:
    """The problem without exchangeable candidates, and for each node which of its candidates were kept."""
    made: list[list[Transfer]] = [[] for _ in problem.nodes]
    read: list[list[tuple[Transfer, Consumer]]] = [[] for _ in problem.nodes]
    for transfer in problem.transfers:
        made[transfer.source].append(transfer)
        for consumer in transfer.consumers:
            read[consumer.node].append((transfer, consumer))
    kept = [_survivors(n, made[i], read[i]) for i, n in enumerate(problem.nodes)]
    return restrict(problem, kept), kept


def _survivors(node: Node, made: list[Transfer], read: list[tuple[Transfer, Consumer]]) -> list[int]:
    count = len(node.candidates)
    if count == 1:
        return [0]
    # change[c, d]: the most that it costs to take d in place of c.
    change = node.cost_s[None, :] - node.cost_s[:, None]
    for transfer in made:
        worst = np.max(transfer.seconds[None, :, :] - transfer.seconds[:, None, :], axis=2)
        worst = np.where(worst > 0, worst * len(transfer.consumers), worst if len(transfer.consumers) == 1 else 0.0)
        change += worst[np.ix_(transfer.row_of, transfer.row_of)]
    for transfer, consumer in read:
        columns = transfer.seconds.T
        if len(transfer.consumers) == 1:
            worst = np.max(columns[None, :, :] - columns[:, None, :], axis=2)
        else:
            worst = np.broadcast_to(np.max(columns, axis=1)[None, :], (len(columns), len(columns))).copy()
            np.fill_diagonal(worst, 0.0)
        change += worst[np.ix_(consumer.column_of, consumer.column_of)]
    better = change <= 1e-15
    np.fill_diagonal(better, False)
    alive = np.ones(count, dtype=bool)
    for c in range(count):
        # The one that replaces it must itself stay, or two equal ones would remove each other.
        if np.any(better[c] & alive):
            alive[c] = False
    return np.flatnonzero(alive).tolist()


def restrict(problem: Problem, kept: list[list[int]]) -> Problem:
    """The problem with only some candidates of each node."""
    nodes = []
    for node, keep in zip(problem.nodes, kept, strict=True):
        index = np.array(keep)
        splits = Splits.__new__(Splits)
        splits.counts, splits._cache = node.splits.counts[index], {}
        nodes.append(
            dataclasses.replace(
                node,
                candidates=[node.candidates[i] for i in keep],
                compute_s=node.compute_s[index],
                reduction_s=node.reduction_s[index],
                splits=splits,
            )
        )
    transfers = []
    for transfer in problem.transfers:
        row_of = transfer.row_of[kept[transfer.source]]
        columns_of = [c.column_of[kept[c.node]] for c in transfer.consumers]
        rows, row_index = np.unique(row_of, return_inverse=True)
        columns, inverse = np.unique(np.concatenate(columns_of), return_inverse=True)
        ends = np.cumsum([len(c) for c in columns_of])[:-1]
        transfers.append(
            dataclasses.replace(
                transfer,
                row_of=row_index,
                rows=[transfer.rows[i] for i in rows],
                columns=[transfer.columns[i] for i in columns],
                seconds=transfer.seconds[np.ix_(rows, columns)],
                consumers=[
                    Consumer(node=c.node, column_of=part)
                    for c, part in zip(transfer.consumers, np.split(inverse, ends), strict=True)
                ],
            )
        )
    return dataclasses.replace(problem, nodes=nodes, transfers=transfers)
