"""In which order the compiler lays out the dimensions of each value, major to minor.

A transposition moves no bytes: what reads it reads in the order that is there, and that order is set by what does work.
A `dot_general` writes its batch dimensions, then the free ones of its first operand, then those of its second. So
`einsum("bqgd,bkgd->bgqk")`, which JAX writes as a dot of keys and queries and a transposition, may leave the queries
minor, and a softmax over keys then reduces over a dimension that does not lie in rows. XLA's layout assignment hands
orders on from there along elementwise ops; where two that differ meet, one is copied into the other.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TypeAlias

from ffjax.ir.graph import NO_VALUE, Graph, Op
from ffjax.ir.op_kinds import WORK, is_reduction

Order: TypeAlias = tuple[int, ...]

_FREE = frozenset({"argument", "enter", "iota", "broadcast_in_dim"})
"""What these make is laid out as its readers want it."""
LAYOUT = frozenset({"transpose", "reshape", "squeeze", "expand_dims", "bitcast_convert_type"})
"""Ops that change names of dimensions and move no bytes, but for a reshape across dimensions that lie apart."""


def dimension_orders(graph: Graph) -> list[Order | None]:
    """For each value its dimensions, major to minor; None where its readers decide."""
    found: list[Order | None] = [None] * len(graph.values)
    for op in graph.ops:
        order = _order(graph, op, found)
        for value in op.results:
            rank = len(graph.values[value].shape)
            found[value] = order if order is None or len(order) == rank else tuple(range(rank))
    return found


def lies_in_rows(shape: Sequence[int], order: Order | None, axes: Sequence[int]) -> bool:
    """Whether what is summed over some axes, though not over all, is the minor part of a value.

    >>> lies_in_rows((8, 4, 16), None, (2,)), lies_in_rows((8, 4, 16), (0, 2, 1), (2,))
    (True, False)
    """
    present = [d for d in (range(len(shape)) if order is None else order) if shape[d] > 1]
    summed = [d for d in present if d in axes]
    return summed == present[len(present) - len(summed) :] and len(summed) < len(present)


def read_in_other_order(graph: Graph, found: Sequence[Order | None]) -> list[int]:
    """The values that an elementwise op needs in another order than theirs: its first operand's is its own."""
    values = []
    for op in graph.ops:
        if op.eqn is None or op.kind in WORK or len(op.operands) < 2:
            continue
        full = [v for v in op.operands if v != NO_VALUE and found[v] is not None]
        shape = graph.values[op.results[0]].shape if op.results else ()
        alike = [v for v in full if graph.values[v].shape == shape]
        values += [v for v in alike[1:] if _differ(shape, found[alike[0]], found[v])]
    return values


def _differ(shape: Sequence[int], one: Order | None, other: Order | None) -> bool:
    return [d for d in one or () if shape[d] > 1] != [d for d in other or () if shape[d] > 1]


def _order(graph: Graph, op: Op, found: Sequence[Order | None]) -> Order | None:
    """The order of an op's results."""
    if not op.results or op.kind in _FREE:
        return None
    shape = graph.values[op.results[0]].shape
    if op.eqn is None or op.kind in WORK:
        return tuple(range(len(shape)))
    first = next(((v, o) for v in op.operands if v != NO_VALUE and (o := found[v]) is not None), None)
    if first is None:
        return None
    operand, order = graph.values[first[0]].shape, first[1]
    if op.kind == "transpose":
        permutation = list(op.eqn.params["permutation"])
        return tuple(permutation.index(d) for d in order)
    if is_reduction(op):
        kept = [d for d in range(len(operand)) if d not in op.eqn.params.get("axes", ())]
        return tuple(kept.index(d) for d in order if d in kept) if len(kept) == len(shape) else None
    if op.kind in LAYOUT:
        return _reshaped(order, operand, shape)
    return order if len(operand) == len(shape) else tuple(range(len(shape)))


def _reshaped(order: Order, old: Sequence[int], new: Sequence[int]) -> Order:
    """The order in which a reshape leaves its result if it moves no byte; as written if it must move some."""
    groups = _groups(old, new)
    placed = [next((g for g in groups if d in g[0]), None) for d in order if old[d] > 1]
    # A group of dimensions is merged in place only if they lie side by side, in order.
    runs = [g for i, g in enumerate(placed) if g is not None and (i == 0 or placed[i - 1] is not g)]
    in_order = all([d for d in order if d in olds] == sorted(olds) for olds, _ in groups)
    if len(runs) != len(groups) or not in_order:
        return tuple(range(len(new)))
    dims = [d for _, news in runs for d in news]
    return (*(d for d in range(len(new)) if d not in dims), *dims)


def _groups(old: Sequence[int], new: Sequence[int]) -> list[tuple[list[int], list[int]]]:
    """The dimensions, those of size one apart, that a reshape turns into each other, in the fewest at a time.

    >>> _groups((6, 1, 4), (2, 3, 4))
    [([0], [0, 1]), ([2], [2])]
    """
    olds, news = ([d for d in range(len(shape)) if shape[d] > 1] for shape in (old, new))
    groups: list[tuple[list[int], list[int]]] = []
    while olds and news:
        left, right = [olds.pop(0)], [news.pop(0)]
        while (sizes := tuple(math.prod(s[d] for d in ds) for s, ds in ((old, left), (new, right))))[0] != sizes[1]:
            (left if sizes[0] < sizes[1] else right).append((olds if sizes[0] < sizes[1] else news).pop(0))
        groups.append((left, right))
    return groups


def is_matrix(shape: Sequence[int], order: Order | None, batch: Sequence[int], contracted: Sequence[int]) -> bool:
    """Whether an operand of a dot can be read as matrices: batch dimensions major, the others in two runs.

    >>> is_matrix((4, 128, 8, 64), None, (0, 2), (3,)), is_matrix((4, 8, 128, 64), None, (0, 1), (3,))
    (False, True)
    """
    present = [d for d in (range(len(shape)) if order is None else order) if shape[d] > 1]
    kinds = ["batch" if d in batch else "contracted" if d in contracted else "free" for d in present]
    runs = [kind for i, kind in enumerate(kinds) if i == 0 or kinds[i - 1] != kind]
    return len(runs) == len(set(runs)) and "batch" not in runs[1:]
