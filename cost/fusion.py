"""Which ops XLA puts into one kernel, and which values are in memory between kernels.

    fused          elementwise ops, broadcasts, layout changes and reductions: they join what reads them
    in memory      what no fused op makes, or something other than one reads, but not as indices; reductions; what is
                   read in another order of dimensions than its own; arithmetic that several ops read at other indices
                   than their own
    a pass         fused ops none of which waits for an op that does work, or for a sum over other than rows, that
                   another of them feeds

A softmax over what lies in rows is one pass (XLA:GPU's Triton fusions), over anything else three.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ffjax.cost.dimension_order import LAYOUT, Order, dimension_orders, lies_in_rows, read_in_other_order
from ffjax.ir import compat
from ffjax.ir.graph import NO_VALUE, Graph, Op
from ffjax.ir.op_kinds import is_light, is_reduction

BORDERS = frozenset({"argument", "result", "enter", "exit"})
FREE = frozenset(
    [
        "stop_gradient",
        "name",
        "optimization_barrier",
        "copy_p",
        "sharding_constraint",
        "reshard",
        "random_wrap",
        "random_unwrap",
    ]
)
"""Ops that run nothing."""
_INDICES = {
    "gather": slice(1, 2),
    "scatter": slice(1, 2),
    "dynamic_slice": slice(1, None),
    "dynamic_update_slice": slice(2, None),
}
"""The operands that say where: such an op computes them itself from what they are made of."""
_INDEXING = frozenset({"slice", "pad", "concatenate", "split", "rev"})


@dataclass(frozen=True, slots=True, kw_only=True)
class Fusions:
    """A program's: for each op whether it is fused and its pass, for each value whether it is in memory, in what order.

    A pass is counted by the kernels, one after the other, that it waits for.
    """

    fused: list[bool]
    passes: list[int]
    in_memory: list[bool]
    in_order: list[Order | None]


def find_fusions(graph: Graph) -> Fusions:
    """The fusions of a program."""
    fused, in_order = fusible_ops(graph), dimension_orders(graph)
    kept = [*read_in_other_order(graph, in_order), *_indexed_twice(graph, fused)]
    return Fusions(
        fused=fused,
        passes=_passes(graph, fused, in_order),
        in_memory=materialised(graph, fused, kept),
        in_order=in_order,
    )


def fusible(op: Op) -> bool:
    """Whether XLA puts the op inside a fusion with its neighbours."""
    follows = is_light(op) or is_reduction(op) or op.kind in LAYOUT or op.kind in FREE or is_outer_product(op)
    return op.kind not in BORDERS and follows


def is_outer_product(op: Op) -> bool:
    """Whether an op is a product that adds nothing up: XLA multiplies broadcasts, elementwise, in its place."""
    return op.kind == "dot_general" and not op.rule.reduction


def fusible_ops(graph: Graph) -> list[bool]:
    """For each op whether XLA puts it inside a fusion. Equal equations share a rule, so few are looked at."""
    known: dict[tuple[str, int], bool] = {}
    found = []
    for op in graph.ops:
        key = (op.kind, id(op.rule))
        if key not in known:
            known[key] = fusible(op)
        found.append(known[key])
    return found


def materialised(graph: Graph, fused: Sequence[bool] | None = None, kept: Sequence[int] = ()) -> list[bool]:
    """For each value whether it is in memory rather than inside a fusion.

    Args:
      graph: the program.
      fused: `fusible_ops`, if they are known.
      kept: values that are in memory in any case.
    """
    fused = fusible_ops(graph) if fused is None else fused
    in_memory = [False] * len(graph.values)
    for op in graph.ops:
        inside = fused[op.id] and not is_reduction(op)
        for value in op.results:
            in_memory[value] |= not inside
    for value in kept:
        in_memory[value] = True
    for op in reversed(graph.ops):
        if fused[op.id]:
            if op.kind in LAYOUT | FREE and any(in_memory[v] for v in op.results):
                # A layout change is part of the kernel that reads it: what it reads is in memory in its stead.
                for value in op.operands:
                    if value != NO_VALUE:
                        in_memory[value] = True
                for value in op.results:
                    in_memory[value] = False
            continue
        indices = _INDICES.get(op.kind.partition("-")[0], slice(0))
        computed = set(op.operands[indices]) - set(op.operands[: indices.start])
        for value in op.operands:
            if value != NO_VALUE and not graph.values[value].constant and value not in computed:
                in_memory[value] = True
    return in_memory


def _indexed_twice(graph: Graph, fused: Sequence[bool]) -> list[int]:
    """Results of arithmetic that several ops read at other indices: kept, not computed again for each."""
    indexing = [0] * len(graph.values)
    for op in graph.ops:
        if op.kind in _INDEXING:
            for value in op.operands:
                if value != NO_VALUE:
                    indexing[value] += 1
    return [
        value
        for op in graph.ops
        for value in op.results
        if indexing[value] > 1 and fused[op.id] and not graph.values[value].constant and _is_arithmetic(graph, op)
    ]


def _is_arithmetic(graph: Graph, op: Op) -> bool:
    """Whether an op makes its result of more than one array."""
    arrays = {v for v in op.operands if v != NO_VALUE and not graph.values[v].constant}
    return len(arrays) > 1 and op.kind not in _INDEXING


def _passes(graph: Graph, fused: Sequence[bool], in_order: Sequence[Order | None]) -> list[int]:
    """For each op how many other kernels, one after the other, it waits for."""
    passes = [0] * len(graph.ops)
    after = [0] * len(graph.values)
    """The same of what reads a value."""
    for op in graph.ops:
        before = 0
        for value in op.operands:
            if value != NO_VALUE and not graph.values[value].constant and after[value] > before:
                before = after[value]
        passes[op.id] = before
        before += _ends_a_pass(op, in_order, fused=fused[op.id])
        for value in op.results:
            after[value] = before
    return passes


def _ends_a_pass(op: Op, in_order: Sequence[Order | None], *, fused: bool) -> bool:
    """Whether what reads an op's results is another kernel. Sums along rows are kept in one with what reads them."""
    if not is_reduction(op):
        return not fused
    if op.eqn is None or "axes" not in op.eqn.params or op.operands[0] == NO_VALUE:
        return True
    return not lies_in_rows(compat.shape_of(op.eqn.invars[0]), in_order[op.operands[0]], op.eqn.params["axes"])
