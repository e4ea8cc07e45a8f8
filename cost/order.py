"""The order in which the compiler runs the ops: as written, or as XLA:GPU's latency-hiding scheduler has it.

That works from the end of a program to its start (`ffjax.cost.latency_hiding`), on kernels and collectives
(`ffjax.cost.body`). XLA:CPU keeps nearly to the order of the program. The bodies of loops and branches are scheduled by
themselves, each where its loop stands. Without the collectives of a layout the schedule is one where none holds up
another.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ffjax.cost.body import Body, Moves
from ffjax.cost.breadth_first import breadth_first
from ffjax.cost.latency_hiding import schedule
from ffjax.cost.moves import Move
from ffjax.ir.graph import Graph, Op


def as_written(graph: Graph) -> NDArray[np.int64]:
    """For each op when it runs: in the order of the program."""
    return np.arange(len(graph.ops), dtype=np.int64)


def scheduled(
    graph: Graph, in_memory: Sequence[bool], moves: Sequence[Move] = (), *, from_the_end: bool
) -> tuple[NDArray[np.int64], NDArray[np.int64], dict[int, int]]:
    """For each op when it runs under a compiler's scheduler, and from when to when each collective is under way.

    Args:
      graph: the program.
      in_memory: for each value whether a kernel leaves it there; an op that makes no such value runs in its readers'.
      moves: the collectives; those of values that no kernel waits for take no time.
      from_the_end: whether XLA:GPU's latency-hiding scheduler is meant, or XLA:CPU's, which goes breadth first.

    Returns:
      The instants of the ops, [ops]; of the collectives, [moves, 2]: how many ops run before the start and the end;
      for scatters into zeros when those are written.
    """
    inside: dict[tuple[int, int], list[_Span]] = {}
    spans = scope_spans(graph)
    for scopes in graph.scopes_of.values():
        kind = graph.scopes[scopes[0]].kind
        bodies = [_Span(*spans[s], (s,)) for s in scopes if spans[s][1] >= 0 and kind != "remat"]
        if bodies and kind.startswith("while"):  # what enters its test and its body comes before both
            bodies = [_Span(min(b.first for b in bodies), max(b.last for b in bodies), tuple(scopes))]
        outer = graph.scopes[scopes[0]].parent
        while graph.scopes[outer].kind == "remat":  # what is recomputed becomes part of what it stands in
            outer = graph.scopes[outer].parent
        if bodies:
            inside[outer, bodies[0].first] = bodies
    kernel = [
        not _crosses_remat(graph, op) and any(in_memory[v] or not graph.values[v].shape for v in op.results)
        for op in graph.ops
    ]
    when = np.full(len(graph.ops), -1, dtype=np.int64)
    under_way = np.full((len(moves), 2), -1, dtype=np.int64)
    filled: dict[int, int] = {}
    at = 0
    for item in _body(graph, kernel, Moves(moves), inside, _Span(0, len(graph.ops) - 1, (0,)), from_the_end):
        if item >= 0:
            when[item] = at
            at += 1
        elif ~item < 2 * len(moves):
            under_way[divmod(~item, 2)] = at
        else:
            filled[~item - 2 * len(moves)] = at
    return when, under_way, filled


def _crosses_remat(graph: Graph, op: Op) -> bool:
    inside = graph.values[op.results[0]].scope if op.kind == "enter" else op.scope
    return op.kind in ("enter", "exit") and graph.scopes[inside].kind == "remat"


@dataclass(frozen=True, slots=True)
class _Span:
    """The ops of one body, first and last included: they are consecutive."""

    first: int
    last: int
    scopes: tuple[int, ...]


def _body(
    graph: Graph,
    kernel: Sequence[bool],
    moves: Moves,
    inside: dict[tuple[int, int], list[_Span]],
    span: _Span,
    from_the_end: bool,
) -> list[int]:
    """One body in the order in which it runs, as `Body.order` has it. A loop inside it is one step."""
    steps: list[list[int]] = []
    step_of: dict[int, int] = {}
    at = span.first
    begin = {position for scope, position in inside if scope in span.scopes}
    while at <= span.last:
        if at not in begin:
            step_of[at] = len(steps)
            steps.append([at])
            at += 1
            continue
        bodies = [body for s in span.scopes for body in inside.get((s, at), ())]
        items = [item for body in bodies for item in _body(graph, kernel, moves, inside, body, from_the_end)]
        ops = [item for item in items if item >= 0]
        step_of.update(dict.fromkeys(ops, len(steps)))
        steps.append(items)
        at += len(ops)
    # Arguments are there from the start, and so is what enters a body.
    border = graph.arguments if span.scopes == (0,) else [op for s in span.scopes for op in graph.scopes[s].enter]
    body = Body(graph, kernel, moves, steps, {step_of[op] for op in border}, joins=from_the_end)
    return body.order(schedule if from_the_end else breadth_first)


def scope_spans(graph: Graph) -> list[tuple[int, int]]:
    """The first and the last op of each body, what enters and leaves included; the last is -1 in an empty one."""
    spans = [(len(graph.ops), -1)] * len(graph.scopes)
    for scope in graph.scopes:
        for border in scope.enter + scope.exit:
            spans[scope.id] = (min(spans[scope.id][0], border), max(spans[scope.id][1], border))
    for op in graph.ops:
        spans[op.scope] = (min(spans[op.scope][0], op.id), max(spans[op.scope][1], op.id))
    for scope in reversed(graph.scopes[1:]):
        outer = spans[scope.parent]
        spans[scope.parent] = (min(outer[0], spans[scope.id][0]), max(outer[1], spans[scope.id][1]))
    return spans
