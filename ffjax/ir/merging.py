"""Which collectives a compiler can merge: those that nothing waits for, and those that wait for nothing.

Gradients are summed for the optimizer alone, weights can be gathered at any time before they are used, and what the
optimizer has updated at any time after: such collectives are independent of each other, and XLA:GPU makes one of many
small ones. The sum of an activation is waited for by the next op that does work, and stands alone.
"""

from __future__ import annotations

from ffjax.ir.graph import NO_VALUE, Graph
from ffjax.ir.halo import beyond, halos
from ffjax.ir.op_kinds import is_light, is_reduction


def merged_sums(graph: Graph) -> list[bool]:
    """For each value whether no op that does work waits for it in the same step."""
    carried = _carried(graph, "operand")
    waited = [False] * len(graph.values)
    for op in reversed(graph.ops):
        passes_on = op.kind in ("enter", "exit") or is_light(op) or is_reduction(op)
        waits = (not passes_on and op.kind != "result") or op.id in carried or any(waited[v] for v in op.results)
        if waits:
            for value in op.operands:
                if value != NO_VALUE:
                    waited[value] = True
    return [not w for w in waited]


def merged_copies(graph: Graph) -> list[bool]:
    """For each value whether it is there from the start (light ops make it of arguments), or nothing waits for it."""
    unread = merged_sums(graph)
    carried = _carried(graph, "result")
    ready = [False] * len(graph.values)
    for op in graph.ops:
        light = op.kind == "enter" or (op.kind != "exit" and is_light(op))
        is_ready = op.kind == "argument" or (
            light and op.id not in carried and all(v == NO_VALUE or ready[v] for v in op.operands)
        )
        for value in op.results:
            ready[value] = is_ready or graph.values[value].constant
    return [a or b for a, b in zip(ready, unread, strict=True)]


def same_images(graph: Graph) -> dict[int, tuple[int, ...]]:
    """For each op that slides a window over an image those before it, in its scope, that do over the same one.

    A convolution and its kernel's gradient are such, or a pooling and its gradient. Where both need the same edges, and
    have the same beyond the image's end, those are fetched once.
    """
    before: dict[tuple[int, int, str], tuple[int, ...]] = {}
    found = {}
    for op in graph.ops:
        if op.eqn is not None and (windows := halos(op.eqn)):
            key = op.operands[windows[0].operand], op.scope, beyond(op.eqn)
            found[op.id] = before.get(key, ())
            before[key] = (*found[op.id], op.id)
    return found


def _carried(graph: Graph, side: str) -> set[int]:
    """The `exit` or `enter` ops of loop carries."""
    return {op for pair in graph.ties for op, own, _ in pair if own == side and graph.ops[op].kind in ("enter", "exit")}
