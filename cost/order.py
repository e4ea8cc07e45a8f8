"""The order in which the compiler runs the ops: as written, or each as late as its readers allow.

XLA:GPU's latency-hiding scheduler works from the end of a program to its start and takes what has been waiting longest,
so that whatever only results read (gradients of weights, their sums over devices, the optimizer's updates) runs after
the whole backward pass, while the activations that it reads stay in memory. XLA:CPU keeps nearly to the order of the
program. The bodies of loops and branches are scheduled by themselves, each where its loop stands.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ffjax.ir.graph import NO_VALUE, Graph


def as_written(graph: Graph) -> NDArray[np.int64]:
    """For each op when it runs: in the order of the program."""
    return np.arange(len(graph.ops), dtype=np.int64)


def as_late_as_possible(graph: Graph) -> NDArray[np.int64]:
    """For each op when it runs: backwards from the end, first come, first served."""
    spans = scope_spans(graph)
    inside: dict[int, dict[int, list[_Span]]] = {}
    for scopes in graph.scopes_of.values():
        bodies = [_Span(*spans[s], s) for s in scopes if spans[s][1] >= 0]
        if bodies:
            inside.setdefault(graph.scopes[scopes[0]].parent, {})[bodies[0].first] = bodies
    order = _backwards(graph, inside, _Span(0, len(graph.ops) - 1, 0))
    when = np.empty(len(graph.ops), dtype=np.int64)
    when[order] = np.arange(len(graph.ops))
    return when


@dataclass(frozen=True, slots=True)
class _Span:
    """The ops of one body, first and last included: they are consecutive."""

    first: int
    last: int
    scope: int


def _backwards(graph: Graph, inside: dict[int, dict[int, list[_Span]]], span: _Span) -> list[int]:
    """The ops of one body in the order in which they run. A loop inside it is one step; what enters comes first."""
    steps: list[list[int]] = []
    step_of: dict[int, int] = {}
    at = span.first
    while at <= span.last:
        bodies = inside.get(span.scope, {}).get(at, [])
        ops = [op for body in bodies for op in _backwards(graph, inside, body)] or [at]
        step_of.update(dict.fromkeys(ops, len(steps)))
        steps.append(ops)
        at += len(ops)
    entering = set() if not span.scope else {step_of[op] for op in graph.scopes[span.scope].enter}
    makers: list[set[int]] = []
    waiting = [0] * len(steps)
    for index, ops in enumerate(steps):
        read = {graph.values[v].producer for op in ops for v in graph.ops[op].operands if v != NO_VALUE}
        makers.append({step_of[op] for op in read if op in step_of} - entering - {index})
        for maker in makers[-1]:
            waiting[maker] += 1
    ready = deque(i for i in reversed(range(len(steps))) if not waiting[i] and i not in entering)
    backwards: list[int] = []
    while ready:
        step = ready.popleft()
        backwards.append(step)
        for maker in sorted(makers[step], reverse=True):
            waiting[maker] -= 1
            if not waiting[maker]:
                ready.append(maker)
    return [op for step in [*sorted(entering), *reversed(backwards)] for op in steps[step]]


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
