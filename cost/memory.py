"""Peak memory of one device: the bytes that are live at each op, under a layout.

    live(t) = sum over materialised values alive at t of their local bytes
            + sum over reshardings alive at t of the copy's local bytes

A value lives from the op that makes it to the last op that reads it, directly or through fused values that are never
in memory themselves. Crossing into a loop: what a body only reads stays alive for the whole loop and is not copied, a
stacked result is allocated when its loop starts, a carry takes over its initial value's place. Arguments live for the
whole step unless they are donated; a result that replaces a donated argument takes over its buffer.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ffjax.cost.kernels import fusible, materialised
from ffjax.ir.graph import NO_VALUE, Graph
from ffjax.ir.layout import Layout
from ffjax.ir.regions import is_reduction
from ffjax.ir.spec import Spec


@dataclass(frozen=True, slots=True, kw_only=True)
class Lifetimes:
    """For each value the first and the last op at which it is in memory; `first > last` if it never is."""

    first: NDArray[np.int64]
    last: NDArray[np.int64]


@dataclass(frozen=True, slots=True, kw_only=True)
class Peak:
    """The op at which most is live, and what is."""

    bytes: float
    op: int
    live: tuple[tuple[str, float], ...]
    """The largest arrays alive there: what they are, and their local bytes."""


def lifetimes(graph: Graph) -> Lifetimes:
    """When each value is in memory, whatever its sharding."""
    end = len(graph.ops)
    span = _scope_spans(graph)
    carries = _carries(graph)
    in_memory = materialised(graph)
    first = np.array([v.producer for v in graph.values], dtype=np.int64)
    last = first.copy()
    stays = [False] * len(graph.values)
    # Backwards, so that what a fused value reads inherits the ops that read the fused value.
    for op in reversed(graph.ops):
        until = op.id
        if fusible(op) and not is_reduction(op):
            until = max([op.id, *(int(last[v]) for v in op.results if not in_memory[v])])
        if op.kind == "enter":
            inner = graph.values[op.results[0]].scope
            # What a body only reads is the outer array itself, for as long as the loop runs.
            until = op.id if op.id in carries else span[inner][1]
        for value in op.operands:
            if value != NO_VALUE:
                last[value] = max(last[value], until)
    donated = _donated(graph)
    replaced = _replaced(graph)
    for position, op_id in enumerate(graph.arguments):
        value = graph.ops[op_id].results[0]
        first[value] = 0
        if not donated[position] or position in replaced:
            last[value] = end
    for op_id in graph.outputs:
        value = graph.ops[op_id].operands[0]
        if value != NO_VALUE:
            last[value] = end
            stays[value] = True
    taken_over = {graph.ops[graph.outputs[r]].operands[0] for a, r in _replacing(graph)}
    for op in graph.ops:
        for value in op.results:
            inner = graph.values[value].scope
            if op.kind == "exit" and op.rule.need_replication:
                first[value] = span[graph.ops[op.id].scope][0]  # a stacked result is there from the loop's start
            if op.kind == "enter" and op.id not in carries:
                last[value] = first[value] - 1
            elif op.kind == "enter" and inner:
                last[value] = max(last[value], first[value])
            if not in_memory[value] and not stays[value]:
                last[value] = first[value] - 1
            if value in taken_over and value != NO_VALUE:
                last[value] = first[value] - 1
    return Lifetimes(first=first, last=last)


def peak(layout: Layout, times: Lifetimes | None = None) -> Peak:
    """The most bytes that are live on one device at once, and where."""
    graph = layout.graph
    times = lifetimes(graph) if times is None else times
    entries = live_entries(layout, times)
    deltas = np.zeros(len(graph.ops) + 2)
    for first, last, size, _ in entries:
        deltas[first] += size
        deltas[last + 1] -= size
    live = np.cumsum(deltas)
    at = int(np.argmax(live[: len(graph.ops) + 1]))
    alive = sorted(((label(), size) for first, last, size, label in entries if first <= at <= last), key=lambda e: -e[1])
    return Peak(bytes=float(live[at]), op=min(at, len(graph.ops) - 1), live=tuple(alive[:12]))


def live_entries(layout: Layout, times: Lifetimes) -> list[tuple[int, int, float, Callable[[], str]]]:
    """`(first op, last op, local bytes, what it is)` of everything that is in memory at some time."""
    graph = layout.graph
    entries: list[tuple[int, int, float, Callable[[], str]]] = []
    for value in graph.values:
        first, last = int(times.first[value.id]), int(times.last[value.id])
        if first <= last and value.bytes:
            entries.append((first, last, layout.local_bytes(value.id), lambda v=value.id: describe(graph, v)))  # type: ignore[misc]
    readers: dict[tuple[int, Spec, int], int] = {}
    for op in graph.ops:
        for index, value in enumerate(op.operands):
            if value != NO_VALUE and graph.values[value].shape and not graph.values[value].constant:
                spec = layout.operand(op.id, index)
                if spec != layout.home(value):
                    readers[value, spec, op.scope] = op.id
    for value, spec, scope, op_id in layout.copies():
        last = readers[value, spec, scope]
        size = layout.local_bytes(value, spec)
        entries.append((op_id, last, size, lambda v=value: f"copy of {describe(graph, v)}"))  # type: ignore[misc]
    return entries


def describe(graph: Graph, value: int) -> str:
    """A value as a user knows it: its path, or its shape and the line that makes it."""
    entry = graph.values[value]
    producer = graph.ops[entry.producer]
    text = f"{entry.dtype}[{','.join(map(str, entry.shape))}]"
    if producer.label:
        return f"{producer.label}: {text}"
    return f"{producer.kind} {text} at {graph.source(producer)}"


def _scope_spans(graph: Graph) -> list[tuple[int, int]]:
    """The first and the last op of each body, what enters and leaves included."""
    spans = [(len(graph.ops), -1)] * len(graph.scopes)
    for scope in graph.scopes:
        for op in scope.enter + scope.exit:
            spans[scope.id] = (min(spans[scope.id][0], op), max(spans[scope.id][1], op))
    for op in graph.ops:
        spans[op.scope] = (min(spans[op.scope][0], op.id), max(spans[op.scope][1], op.id))
    return spans


def _carries(graph: Graph) -> set[int]:
    """The `enter` ops that bring in a carry's first value, rather than a constant or a stacked array."""
    return {op for pair in graph.ties for op, side, _ in pair if side == "result"}


def _donated(graph: Graph) -> list[bool]:
    return [False] * len(graph.program.closures) + list(graph.program.donated)


def _replacing(graph: Graph) -> list[tuple[int, int]]:
    """The ties whose argument is donated: the result takes over its buffer."""
    return [(a, r) for a, r in graph.program.ties if graph.program.donated[a]]


def _replaced(graph: Graph) -> set[int]:
    offset = len(graph.program.closures)
    return {a + offset for a, _ in _replacing(graph)}
