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

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ffjax.cost.latency_hiding import Node, schedule
from ffjax.cost.moves import Move
from ffjax.ir.graph import NO_VALUE, Graph, Op
from ffjax.ir.op_kinds import is_light, is_reduction


def as_written(graph: Graph) -> NDArray[np.int64]:
    """For each op when it runs: in the order of the program."""
    return np.arange(len(graph.ops), dtype=np.int64)


def from_the_end(
    graph: Graph, in_memory: Sequence[bool], moves: Sequence[Move] = ()
) -> tuple[NDArray[np.int64], NDArray[np.int64], dict[int, int]]:
    """For each op when it runs under the latency-hiding scheduler, and from when to when each collective is under way.

    Args:
      graph: the program.
      in_memory: for each value whether a kernel leaves it there; an op that makes no such value runs in its readers'.
      moves: the collectives; those of values that no kernel waits for take no time.

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
    sums = {v: i for i, move in enumerate(moves) if not move.readers for v in move.values}
    copies = {(v, op): i for i, move in enumerate(moves) for v, op in move.readers}
    body = _Bodies(graph=graph, kernel=kernel, inside=inside, moves=moves, sums=sums, copies=copies)
    when = np.full(len(graph.ops), -1, dtype=np.int64)
    under_way = np.full((len(moves), 2), -1, dtype=np.int64)
    filled: dict[int, int] = {}
    at = 0
    for item in body.schedule(_Span(0, len(graph.ops) - 1, (0,))):
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


def _fills(graph: Graph, op: Op) -> bool:
    """Whether an op scatters into a constant, which some kernel has to write before."""
    return op.kind.startswith("scatter") and (op.operands[0] == NO_VALUE or graph.values[op.operands[0]].constant)


def _in_rows(graph: Graph, op: Op) -> bool:
    """Whether a reduction runs over the last dimensions alone: one pass is enough."""
    if op.eqn is None or "axes" not in op.eqn.params:
        return True
    rank, axes = len(graph.values[op.operands[0]].shape), op.eqn.params["axes"]
    return sorted(axes) == list(range(rank - len(axes), rank)) and len(axes) < rank


@dataclass(frozen=True, slots=True, kw_only=True)
class _Bodies:
    """The program and its collectives: `sums` by value, `copies` by value and the op that reads it."""

    graph: Graph
    kernel: Sequence[bool]
    inside: dict[tuple[int, int], list[_Span]]
    moves: Sequence[Move]
    sums: dict[int, int]
    copies: dict[tuple[int, int], int]

    def schedule(self, span: _Span) -> list[int]:
        """The ops of one body in the order in which they run, and ~(2 * move) where it starts, one less where it ends.

        A loop inside it is one step; what enters comes first.
        """
        graph = self.graph
        # Arguments are there from the start, and so is what enters a body.
        border = set(
            graph.arguments if span.scopes == (0,) else (op for s in span.scopes for op in graph.scopes[s].enter)
        )
        steps: list[list[int]] = []
        step_of: dict[int, int] = {}
        at = span.first
        while at <= span.last:
            bodies = next((self.inside[s, at] for s in span.scopes if (s, at) in self.inside), [])
            items = [item for body in bodies for item in self.schedule(body)] or [at]
            ops = [item for item in items if item >= 0]
            step_of.update(dict.fromkeys(ops, len(steps)))
            steps.append(items)
            at += len(ops)
        entering = {step_of[op] for op in border}
        outside = entering | {-1}
        count = len(steps)
        first = {op: i for i, items in enumerate(steps) for op in items if op >= 0}
        waits: dict[int, list[int]] = {}  # the moves that this body waits for: what they read
        positions: dict[int, float] = {}
        makers: list[tuple[int, ...]] = []

        def source(value: int, reader: int) -> int:
            """The step that makes what is read, or the end of its collective."""
            made = first.get(graph.values[value].producer, -1)
            copied, summed = self.copies.get((value, reader)), self.sums.get(value)
            if summed is not None and made not in outside:
                wait(summed)
                made = count + 2 * summed + 1
            if copied is not None and made != -1:
                wait(copied)
                made = count + 2 * copied + 1
            return made

        def wait(move: int) -> None:
            if move in waits:
                return
            waits[move] = []
            made = []
            for value in self.moves[move].values:
                step = first.get(graph.values[value].producer, -1)
                if self.moves[move].readers and value in self.sums and step not in outside:
                    wait(self.sums[value])
                    step = count + 2 * self.sums[value] + 1
                made.append(step)
            waits[move] = [m for m in dict.fromkeys(made) if m not in outside]

        for index, items in enumerate(steps):
            ops = [item for item in items if item >= 0]
            read = dict.fromkeys(
                source(v, op)
                for op in ops
                for v in graph.ops[op].operands
                if v != NO_VALUE and first.get(graph.values[v].producer, -1) != index and index not in entering
            )
            makers.append(tuple(m for m in read if m not in outside))
            for m in read:
                if m >= count:
                    positions.setdefault((m - count) // 2, index - 0.5)
        single = [graph.ops[items[0]] if len(items) == 1 else None for items in steps]
        reduces = [op is not None and is_reduction(op) for op in single]
        runs = [
            i not in entering and (op is None or (self.kernel[op.id] and not reduces[i])) for i, op in enumerate(single)
        ]
        # What is fused runs in the kernels that read it: those wait for what it reads.
        two = [op is not None and reduces[i] and not _in_rows(graph, op) for i, op in enumerate(single)]
        total = 2 * count + 2 * len(self.moves)
        reads: list[frozenset[int]] = [frozenset()] * total
        own: list[frozenset[int] | None] = [None] * total  # what a step adds to those that read it

        def same_size(a: int, b: int) -> bool:
            one, other = single[a], single[b]
            if one is None or other is None or not one.results or not other.results:
                return False
            return graph.values[one.results[0]].shape == graph.values[other.results[0]].shape

        def add(index: int) -> frozenset[int]:
            found = own[index]
            if found is None and index >= count:
                reads[index - 1] = frozenset[int]().union(*(add(m) for m in waits[(index - count) // 2]))
                reads[index] = frozenset((index - 1,))
                found = own[index] = frozenset((index,))
            elif found is None:
                made = makers[index]
                reads[index] = add(made[0]) if len(made) == 1 else frozenset[int]().union(*(add(m) for m in made))
                found = own[index] = frozenset((index,)) if runs[index] else reads[index]
                if two[index]:
                    later = count + 2 * len(self.moves) + index
                    reads[later] = found
                    found = own[index] = frozenset((later,))
            return found

        for index in range(count):
            add(index)
        used = [move for move in waits if own[count + 2 * move + 1] is not None]
        second = {  # the second halves of reductions that do not end in one pass
            count + 2 * len(self.moves) + i: i for i in range(count) if two[i] and own[i] is not None
        }
        light = [op is not None and is_light(op) for op in single]
        group = list(range(total))
        begins = [float(i) for i in range(total)]
        for k, i in second.items():
            begins[k] = i + 0.5
        for move in sorted(
            used,
            key=lambda move: max(
                (begins[m] for m in reads[count + 2 * move] if m < count or m >= total - count), default=-1.0
            ),
        ):
            made_at = max((max((begins[m] for m in reads[count + 2 * move]), default=-1.0), -1.0)) + 0.5
            begins[count + 2 * move] = begins[count + 2 * move + 1] = made_at
        fills = {  # the zeros that scatters add to
            total + i: op.id for i, op in enumerate(single) if op is not None and runs[i] and _fills(graph, op)
        }
        reads += [frozenset()] * count
        group += range(total, total + count)
        begins += [float(i) for i in range(count)]
        for k in fills:
            reads[k - total] |= {k}
        members: dict[int, list[int]] = {}
        reducing = set().union(
            *(reads[i] for i in range(count) if reduces[i] and not two[i]), *(reads[k] for k in second)
        )

        def waits_for(index: int, head: int) -> bool:
            """Whether a kernel or a collective waits for some kernel that is one with `head`."""
            stack, seen = [index], {index}
            while stack:
                at = stack.pop()
                for m in reads[at]:
                    if group[m] == head:
                        return True
                    if begins[m] > begins[head] and m not in seen:
                        seen.add(m)
                        stack.append(m)
            return False

        for k in range(count):
            if not runs[k]:
                continue
            joined = max((group[m] for m in reads[k] if m < count), key=lambda m: begins[m], default=-1)
            fits = joined >= 0 and light[k] and light[joined] and same_size(joined, k)
            if fits and not any(group[m] != joined and waits_for(m, joined) for m in reads[k]):
                group[k] = joined
                members[joined].append(k)
            else:
                members[k] = [k]
        heads = [*members, *(count + 2 * m + e for m in used for e in (0, 1)), *second, *fills]
        numbered = {k: n for n, k in enumerate(heads)}
        nodes = []
        for k in heads:
            own_members = members.get(k, [k])
            needed = frozenset(numbered[group[m]] for i in own_members for m in reads[i] if m >= count or group[m] != k)
            if k < count:
                op = single[k]
                loop = op is not None and (
                    op.kind == "conv_general_dilated" or (light[k] and not reducing & {*own_members})
                )
                alone = any(item < 0 for item in steps[k])
                nodes.append(Node(float(own_members[-1]), needed, 1000.0 if loop else 1.0, alone=alone))
            elif k in fills:
                nodes.append(Node(begins[k] - 0.5, needed, 1000.0))
            elif k in second:
                nodes.append(Node(begins[k], needed, 1.0))
            else:
                move, end = divmod(k - count, 2)
                position = positions.get(move, begins[k]) if self.moves[move].readers else begins[k]
                nodes.append(Node(position + 0.1 * end, needed, 1.0, numbered[k - 1] if end else -1))
        order = [k for n in schedule(nodes) for k in members.get(heads[n], [heads[n]]) if k not in second]
        extended = [*makers, *(() for _ in range(2 * len(self.moves) + 2 * count))]
        for move, made in waits.items():
            extended[count + 2 * move] = tuple(m for m in made if m < count)
        running = [*runs, *(True for _ in range(2 * len(self.moves) + 2 * count))]
        late = [
            frozenset(m for m in reads[i] if m < total - count) if r else frozenset[int]()
            for i, r in enumerate(reduces)
        ] + [frozenset()] * 0
        full = _with_fused(order, extended, running, late)
        unread = sorted(set(range(count)) - entering - set(full))
        result = [item for step in [*sorted(entering)] for item in steps[step]]
        for step in [*full, *unread]:
            result += (
                steps[step]
                if step < count
                else [~(step - count) if step < total else ~(2 * len(self.moves) + fills[step])]
            )
        return result


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
