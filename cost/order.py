"""The order in which the compiler runs the ops: as written, or each as late as its readers allow.

XLA:GPU's latency-hiding scheduler (`xla/service/latency_hiding_scheduler.cc`) works from the end of a program to its
start. An op that only just became possible would stall, so where something else waits that goes first; of what waits,
what makes most other ops possible, then what is written last. Reductions are further results of the kernels that make
what they reduce, the optimizer's updates wait for all sums over devices, which are few and large. Hence gradients of
weights, which nothing on the way back waits for, run long after the activations that they read are made, and those stay
in memory until then. XLA:CPU keeps nearly to the order of the program. The bodies of loops and branches are scheduled
by themselves, each where its loop stands. Which collectives there are depends on the sharding and is not looked at:
where many are on the way back (tensor parallelism), gradients of weights run earlier than this says, while those are
waited for.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ffjax.ir.graph import NO_VALUE, Graph, Op
from ffjax.ir.op_kinds import is_light, is_reduction


def as_written(graph: Graph) -> NDArray[np.int64]:
    """For each op when it runs: in the order of the program."""
    return np.arange(len(graph.ops), dtype=np.int64)


def from_the_end(graph: Graph, in_memory: Sequence[bool]) -> NDArray[np.int64]:
    """For each op when it runs under the latency-hiding scheduler.

    Args:
      graph: the program.
      in_memory: for each value whether a kernel leaves it there; an op that makes no such value runs in its readers'.
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
        not op.results
        or (not _crosses_remat(graph, op) and any(in_memory[v] or not graph.values[v].shape for v in op.results))
        for op in graph.ops
    ]
    order = _schedule(graph, kernel, inside, _Span(0, len(graph.ops) - 1, (0,)))
    when = np.empty(len(graph.ops), dtype=np.int64)
    when[order] = np.arange(len(graph.ops))
    return when


def _crosses_remat(graph: Graph, op: Op) -> bool:
    inside = graph.values[op.results[0]].scope if op.kind == "enter" else op.scope
    return op.kind in ("enter", "exit") and graph.scopes[inside].kind == "remat"


_PICKS_IN_A_STALL = 3
"""How many ops that wait go before one that only just became possible. The scheduler lets one go first; but an op here
is about three kernels there, with the layout changes around it and the second half of a split reduction. Calibrated."""


@dataclass(frozen=True, slots=True)
class _Span:
    """The ops of one body, first and last included: they are consecutive."""

    first: int
    last: int
    scopes: tuple[int, ...]


def _schedule(
    graph: Graph, kernel: Sequence[bool], inside: dict[tuple[int, int], list[_Span]], span: _Span
) -> list[int]:
    """The ops of one body in the order in which they run. A loop inside it is one step; what enters comes first."""
    # Arguments are there from the start, and so is what enters a body.
    border = set(graph.arguments if span.scopes == (0,) else (op for s in span.scopes for op in graph.scopes[s].enter))
    steps: list[list[int]] = []
    step_of: dict[int, int] = {}
    at = span.first
    while at <= span.last:
        bodies = [body for s in span.scopes for body in inside.get((s, at), ())]
        ops = [op for body in bodies for op in _schedule(graph, kernel, inside, body)] or [at]
        for op in ops:
            step_of[op] = len(steps)
        steps.append(ops)
        at += len(ops)
    entering = {step_of[op] for op in border}
    outside = entering | {-1}
    makers: list[tuple[int, ...]] = []
    values = graph.values
    for index, ops in enumerate(steps):
        read = dict.fromkeys(
            [step_of.get(values[v].producer, -1) for op in ops for v in graph.ops[op].operands if v != NO_VALUE]
        )
        makers.append(tuple([m for m in read if m not in outside and m != index]))
    single = [graph.ops[ops[0]] if len(ops) == 1 else None for ops in steps]
    reduces = [op is not None and is_reduction(op) for op in single]
    runs = [i not in entering and (op is None or (kernel[op.id] and not reduces[i])) for i, op in enumerate(single)]
    # What is fused runs in the kernels that read it: those wait for what it reads.
    nothing = frozenset[int]()
    reads: list[frozenset[int]] = []
    own: list[frozenset[int]] = []  # what a step adds to those that read it
    for index, made in enumerate(makers):
        reads.append(own[made[0]] if len(made) == 1 else nothing.union(*[own[m] for m in made]))
        own.append(frozenset((index,)) if runs[index] else reads[index])
    order = _from_the_end(
        [of if run else nothing for of, run in zip(reads, runs, strict=True)], runs, _tail(single, makers)
    )
    full = _with_fused(order, makers, runs, [of if r else nothing for of, r in zip(reads, reduces, strict=True)])
    unread = sorted(set(range(len(steps))) - entering - set(full))
    return [op for step in [*sorted(entering), *full, *unread] for op in steps[step]]


def _tail(single: Sequence[Op | None], makers: Sequence[tuple[int, ...]]) -> list[bool]:
    """For each step whether after it, too, all is elementwise: the optimizer's updates.

    What they read has been summed over devices in few large collectives; all of them wait for those.
    """
    late = [True] * len(single)
    for index in range(len(single) - 1, -1, -1):
        op = single[index]
        late[index] = late[index] and op is not None and (not op.results or is_light(op))
        if not late[index]:
            for maker in makers[index]:
                late[maker] = False
    return late


def _from_the_end(reads: Sequence[frozenset[int]], runs: Sequence[bool], late: Sequence[bool]) -> list[int]:
    """The kernels in order. `reads`: for each the kernels whose results it reads; `late` ones run after all others."""
    waiting = [0] * len(reads)
    last_reader = [0] * len(reads)  # the sum of the readers that have not run: with one left, that one
    for reader, made in enumerate(reads):
        for maker in made:
            waiting[maker] += 1
            last_reader[maker] += reader
    frees = [sum(waiting[m] == 1 for m in made) for made in reads]

    def entry(k: int) -> tuple[bool, int, int]:
        return (not late[k], -frees[k], -k)

    queue = [entry(k) for k, runs_ in enumerate(runs) if runs_ and not waiting[k]]
    heapq.heapify(queue)
    done = [False] * len(reads)
    fresh: list[int] = []
    picks = 0
    backwards: list[int] = []
    while queue or fresh:
        if not queue:
            queue, fresh = [entry(k) for k in fresh], []
            heapq.heapify(queue)
        _, score, negative = heapq.heappop(queue)
        taken = -negative
        if done[taken] or -score != frees[taken]:
            continue
        done[taken] = True
        backwards.append(taken)
        picks += 1
        if picks >= _PICKS_IN_A_STALL:
            for k in fresh:
                heapq.heappush(queue, entry(k))
            fresh = []
            picks = 0
        for maker in reads[taken]:
            waiting[maker] -= 1
            last_reader[maker] -= taken
            if waiting[maker] == 0 and late[maker]:
                heapq.heappush(queue, entry(maker))
            elif waiting[maker] == 0:
                fresh.append(maker)
            elif waiting[maker] == 1:
                reader = last_reader[maker]
                frees[reader] += 1
                if not waiting[reader]:
                    heapq.heappush(queue, entry(reader))
    return backwards[::-1]


def _with_fused(
    order: Sequence[int], makers: Sequence[tuple[int, ...]], runs: Sequence[bool], eager: Sequence[frozenset[int]]
) -> list[int]:
    """The kernels with each fused step right before the first kernel that reads it.

    `eager` ones run as soon as the kernels that they depend on have: a reduction is another result of those.
    """
    placed = [False] * len(makers)
    full: list[int] = []

    def place(step: int) -> None:
        stack = [step]
        inside: list[int] = []
        while stack:
            step = stack.pop()
            if not placed[step]:
                placed[step] = True
                inside.append(step)
                stack.extend(m for m in makers[step] if not runs[m])
        full.extend(sorted(inside))

    missing = [len(after) for after in eager]
    waiting: dict[int, list[int]] = {}
    for step, after in enumerate(eager):
        for kernel in after:
            waiting.setdefault(kernel, []).append(step)
    for kernel in order:
        place(kernel)
        for step in waiting.get(kernel, ()):
            missing[step] -= 1
            if not missing[step]:
                place(step)
    return full


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
