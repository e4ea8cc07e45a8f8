"""Kernels that only move bytes and that no equation stands for: what loops stack and slice, what dots need as matrices.

    a loop's stacked result     is filled with zeros before the loop; each trip's part is written by what makes it, if
                                that maps elements and nobody else reads it, else copied in by a kernel of its own
    a loop's stacked operand    each trip's part is sliced by the fusions that read it; for all other readers it is
                                copied out by a kernel of its own
    an operand of a dot         that work has laid out otherwise than as matrices is transposed, once for all dots

Each is counted with an op that runs as often as it does: what makes a stacked result, what reads a part or an operand.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from ffjax.cost.dimension_order import LAYOUT, is_matrix
from ffjax.cost.fusion import Fusions
from ffjax.ir.graph import NO_VALUE, Graph, Op, Port


class Move(NamedTuple):
    """Kernels at an op: in each of its trips they pass so often over the value of one of its ports."""

    port: Port
    passes: int
    launches: int


def moves(graph: Graph, fusions: Fusions) -> Iterator[Move]:
    """All of a program."""
    fused, in_order = fusions.fused, fusions.in_order
    readers: list[list[int]] = [[] for _ in graph.values]
    for op in graph.ops:
        for value in op.operands:
            if value != NO_VALUE:
                readers[value].append(op.id)
    transposed: set[tuple[int, tuple[int, ...]]] = set()
    for op in graph.ops:
        if op.kind == "exit" and _is_stacked(op):
            made = graph.ops[graph.values[op.operands[0]].producer]
            if made.eqn is not None:
                copied = not fused[made.id] or len(readers[op.operands[0]]) > 1
                yield Move((made.id, "result", made.results.index(op.operands[0])), 3 if copied else 1, int(copied))
        elif op.kind == "enter" and _is_stacked(op):
            reader = next((r for r in readers[op.results[0]] if not fused[r] and graph.ops[r].eqn is not None), None)
            if reader is not None:
                yield Move((reader, "operand", graph.ops[reader].operands.index(op.results[0])), 2, 1)
        elif op.kind == "dot_general" and not fused[op.id]:
            for index, (batch, contracted) in enumerate(_dot_dimensions(op)):
                value = op.operands[index]
                if value == NO_VALUE or (value, batch) in transposed or not _is_work(graph, value, fused):
                    continue
                if not is_matrix(graph.values[value].shape, in_order[value], batch, contracted):
                    transposed.add((value, batch))
                    yield Move((op.id, "operand", index), 2, 1)


def _is_stacked(op: Op) -> bool:
    """Whether a border is that of one trip's part of an array that a loop walks along."""
    return bool(op.results) and op.operands != (NO_VALUE,) and bool(op.rule.need_replication)


def _dot_dimensions(op: Op) -> tuple[tuple[tuple[int, ...], tuple[int, ...]], ...]:
    """For each operand of a dot its batch dimensions, and those that it contracts."""
    assert op.eqn is not None  # a dot is an equation
    contracted, batch = op.eqn.params["dimension_numbers"]
    return tuple((tuple(b), tuple(k)) for b, k in zip(batch, contracted, strict=True))


def _is_work(graph: Graph, value: int, fused: Sequence[bool]) -> bool:
    """Whether a value lies in memory as an op that does work has made it."""
    op = graph.ops[graph.values[value].producer]
    while op.kind in LAYOUT:
        op = graph.ops[graph.values[op.operands[0]].producer]
    return op.eqn is not None and not fused[op.id]
