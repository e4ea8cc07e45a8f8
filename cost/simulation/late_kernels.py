"""Products that nothing soon waits for: gradients of weights, which the optimizer reads, or the end of a loop's body.

XLA:GPU runs them after the way back, right before what first reads one of them, each followed by its own sum: so the
sum of the last has nothing to hide behind. One without a sum runs earlier where kernels would wait for a collective.
"""

from __future__ import annotations

from collections.abc import Container

from ffjax.cost.fusion import FREE, fusible
from ffjax.ir.graph import NO_VALUE, Graph
from ffjax.ir.op_kinds import PRODUCTS, WORK


def late_kernels(graph: Graph, kernel_ops: Container[int]) -> set[int]:
    """The products with a kernel whose results reach no other op that does work, in no trip of a loop."""
    leads = [False] * len(graph.values)
    """For each value whether such an op follows."""
    carries = [
        (graph.ops[ours].results[index], graph.ops[theirs].operands[0])
        for (ours, side, index), (theirs, _, _) in graph.ties
        if side == "result" and graph.ops[ours].kind == "enter"
    ]
    changed = True
    while changed:
        for op in reversed(graph.ops):
            if (op.kind in WORK and op.kind not in FREE) or any(leads[v] for v in op.results):
                for value in op.operands:
                    if value != NO_VALUE:
                        leads[value] = True
        changed = False
        for entering, leaving in carries:
            if leads[entering] and leaving != NO_VALUE and not leads[leaving]:
                leads[leaving] = changed = True
    return {
        op.id
        for op in graph.ops
        if op.kind in PRODUCTS and op.id in kernel_ops and not fusible(op) and not any(leads[v] for v in op.results)
    }
