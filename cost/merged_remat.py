"""The program as a compiler sees it that merges recomputation with the original.

A remat region stands behind a barrier so that it runs again in the backward pass. XLA:CPU drops the barrier before it
eliminates common subexpressions: outside of loops nothing is computed twice, and nothing is saved. But no collective
equals another one (each has a channel), so what is computed again from one that is repeated is kept as well.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Hashable, Sequence

from ffjax.cost.moves import Move
from ffjax.ir.graph import NO_VALUE, Graph, Op

MERGED = "merged"
"""The kind of an op that does not run: another one makes the same."""


def has_remat(graph: Graph) -> bool:
    """Whether anything is computed again."""
    return any(scope.kind == "remat" for scope in graph.scopes)


def merge_remat(graph: Graph, moves: Sequence[Move] = ()) -> tuple[Graph, list[Move]]:
    """The same ops and values; those that repeat others are of kind `MERGED`, and who read them reads the first.

    Args:
      graph: the program.
      moves: the collectives of a layout.

    Returns:
      The program, and the collectives of what it still reads.
    """
    if not has_remat(graph):
        return graph, list(moves)
    moved = {op for move in moves for _, op in move.readers}
    moved |= {graph.values[v].producer for move in moves if not move.readers for v in move.values}
    first = list(range(len(graph.values)))
    known: dict[Hashable, tuple[int, ...]] = {}
    ops = []
    for op in graph.ops:
        operands = tuple(v if v == NO_VALUE else first[v] for v in op.operands)
        key = None if op.id in moved else _key(graph, op, operands)
        twin = None if key is None else known.setdefault(key, op.results)
        if _crosses_remat(graph, op) and op.id not in moved:
            twin = operands
        if twin is None or twin == op.results or NO_VALUE in twin:
            ops.append(dataclasses.replace(op, operands=operands))
            continue
        for value, original in zip(op.results, twin, strict=True):
            first[value] = original
        ops.append(dataclasses.replace(op, kind=MERGED, operands=()))
    merged = []
    for move in moves:
        readers = tuple((first[v], op) for v, op in move.readers)
        merged.append(dataclasses.replace(move, values=tuple(first[v] for v in move.values), readers=readers))
    return dataclasses.replace(graph, ops=ops), merged


def _crosses_remat(graph: Graph, op: Op) -> bool:
    if op.kind not in ("enter", "exit") or not op.results:
        return False
    return graph.scopes[graph.values[op.results[0]].scope if op.kind == "enter" else op.scope].kind == "remat"


def _key(graph: Graph, op: Op, operands: tuple[int, ...]) -> Hashable | None:
    """What equal ops share; None for those that cannot be told to be equal."""
    if op.eqn is None or op.eqn.effects:
        return None
    home = op.scope
    while graph.scopes[home].kind == "remat":
        home = graph.scopes[home].parent
    literals = tuple(str(a) for a, v in zip(op.eqn.invars, operands, strict=True) if v == NO_VALUE)
    key = (home, op.kind, operands, literals, tuple(sorted(op.eqn.params.items())))
    try:
        hash(key)
    except TypeError:
        return None
    return key
