"""One body of a program, a loop's or the whole, as the latency-hiding scheduler has it: kernels and collectives.

Each step of a body (an op, or a loop inside it) has a number; so have, behind those, what is no op of the program: the
start and the end of each collective, the second pass of each reduction that takes two, and the zeros that each scatter
adds to. Elementwise ops that read each other are one kernel; other fused ones run in the kernels that read them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from ffjax.cost.fusion import is_outer_product
from ffjax.cost.latency_hiding import LOOP, Node
from ffjax.cost.moves import Move
from ffjax.ir.graph import NO_VALUE, Graph, Op
from ffjax.ir.op_kinds import is_light, is_reduction

_NOTHING = frozenset[int]()


class Body:
    """The steps of a body.

    Args:
      graph: the program.
      kernel: for each op whether it leaves something in memory.
      moves: the collectives.
      steps: for each step its ops, and what else its loops hold (negative).
      entering: the steps whose results are there from the start.
      joins: whether kernels that read each other are joined, and reductions with what they reduce.
    """

    def __init__(
        self,
        graph: Graph,
        kernel: Sequence[bool],
        moves: Moves,
        steps: Sequence[list[int]],
        entering: set[int],
        *,
        joins: bool,
    ) -> None:
        self.joins = joins
        self.graph = graph
        self.moves = moves
        self.steps = steps
        self.outside = entering | {-1}
        self.count = len(steps)
        self.second = self.count + 2 * len(moves.all)
        """Where second passes are numbered from."""
        self.fill = self.second + self.count
        """Where zeros are numbered from."""
        total = self.fill + self.count
        self.step_of = {op: i for i, items in enumerate(steps) for op in items if op >= 0}
        self.single = [graph.ops[items[0]] if len(items) == 1 else None for items in steps]
        self.light = [op is not None and (is_light(op) or is_outer_product(op)) for op in self.single]
        self.reduces = [joins and op is not None and is_reduction(op) for op in self.single]
        self.passes_twice = [
            reduces and op is not None and not _in_rows(graph, op)
            for reduces, op in zip(self.reduces, self.single, strict=True)
        ]
        self.runs = [
            i not in entering and (op is None or (kernel[op.id] and not self.reduces[i]))
            for i, op in enumerate(self.single)
        ]
        self.wanted: dict[int, float] = {}
        """The moves that something here waits for, and about where the first does."""
        self.makers: list[tuple[int, ...]] = [()] * total
        self.reads: list[frozenset[int]] = [_NOTHING] * total
        """What each waits for that is a node of the schedule."""
        self.begins = [float(i) for i in range(total)]
        """Where in the program each is."""
        self._own: list[frozenset[int] | None] = [None] * total
        for index in range(self.count):
            if index not in entering:
                self._find_makers(index)
        for index in range(self.count):
            self._find_reads(index)

    def start(self, move: int) -> int:
        return self.count + 2 * move

    def order(self, schedule: Callable[[Sequence[Node]], list[int]]) -> list[int]:
        """What runs, in order: ops; ~(2 * move) for its start, one less for its end; ~(2 * moves + op) for zeros."""
        kernels = self._kernels()
        reducing = _NOTHING.union(*(self.reads[i] for i in range(self.count) if self.reduces[i]))
        heads = list(kernels)
        for move in self.wanted:
            if self._own[self.start(move) + 1] is not None:
                heads += (self.start(move), self.start(move) + 1)
        heads += [self.second + i for i in range(self.count) if self.passes_twice[i] and self._own[i] is not None]
        heads += [self.fill + i for i in kernels if self._fills(i)]
        one_of = {k: head for head, members in kernels.items() for k in members}
        numbered = {head: n for n, head in enumerate(heads)}
        nodes = []
        for head in heads:
            members = kernels.get(head, [head])
            read = {one_of.get(m, m) for k in members for m in self.reads[k]} - {head}
            if self.fill + head in numbered:
                read.add(self.fill + head)
            nodes.append(self._node(head, members, frozenset(numbered[m] for m in read), reducing, numbered))
        placed = [k for n in schedule(nodes) for k in kernels.get(heads[n], [heads[n]])]
        return self._with_fused([k for k in placed if not self.second <= k < self.fill])

    def _find_makers(self, index: int) -> None:
        """The steps that make what a step reads, or the ends of their collectives."""
        made: dict[int, None] = {}
        for op in (item for item in self.steps[index] if item >= 0):
            for value in self.graph.ops[op].operands:
                if value != NO_VALUE and self._step(value) not in (index, -1):
                    copied = self.moves.copies.get((value, op))
                    made[self._source(value) if copied is None else self._end(copied, index)] = None
        for move in {(m - self.count) // 2 for m in made if m >= self.count}:
            self.wanted[move] = min(self.wanted.get(move, index), index - 0.5)
        self.makers[index] = tuple(m for m in made if m not in self.outside)

    def _step(self, value: int) -> int:
        return self.step_of.get(self.graph.values[value].producer, -1)

    def _source(self, value: int) -> int:
        """The step that makes a value, or the end of the sum that does."""
        step, summed = self._step(value), self.moves.sums.get(value)
        return step if summed is None or step in self.outside else self._end(summed, step)

    def _end(self, move: int, needed: int) -> int:
        if move not in self.wanted:
            self.wanted[move] = float(needed)
            entry = self.moves.all[move]
            made = (self._source(v) if entry.readers else self._step(v) for v in entry.values)
            self.makers[self.start(move)] = tuple(m for m in dict.fromkeys(made) if m not in self.outside)
        return self.start(move) + 1

    def _find_reads(self, index: int) -> None:
        """Finds what a step waits for; before that, what its makers do: of merged collectives some come later."""
        ahead, opened = [index], set[int]()
        while ahead:
            step = ahead[-1]
            if self._own[step] is None:
                makers = self.makers[step - 1 if step >= self.count else step]
                missing = [m for m in makers if self._own[m] is None]
                if not missing:
                    self._own[step] = self._adds(step)
                elif step in opened:
                    raise ValueError("the collectives of a schedule wait for each other in a cycle")
                else:
                    opened.add(step)
                    ahead += missing
                    continue
            ahead.pop()

    def _adds(self, index: int) -> frozenset[int]:
        """What a step adds to those that read it: itself, or what it reads where it is fused."""
        if index >= self.count:  # the end of a collective
            reads = self.reads[index - 1] = self._union(self.makers[index - 1])
            self.begins[index - 1] = self.begins[index] = max((self.begins[m] for m in reads), default=-1.0) + 0.5
            self.reads[index] = frozenset((index - 1,))
            found = frozenset((index,))
        else:
            reads = self.reads[index] = self._union(self.makers[index])
            found = frozenset((index,)) if self.runs[index] else reads
            if self.passes_twice[index]:
                later = self.second + index
                self.reads[later], self.begins[later] = reads, index + 0.5
                found = frozenset((later,))
        return found

    def _union(self, makers: Sequence[int]) -> frozenset[int]:
        added = [own for m in makers if (own := self._own[m]) is not None]
        return added[0] if len(added) == 1 else _NOTHING.union(*added)

    def _kernels(self) -> dict[int, list[int]]:
        """The steps that run, by the first of those that are one kernel: elementwise ones of a shape that read it."""
        if not self.joins:
            return {k: [k] for k in range(self.count) if self.runs[k]}
        kernels: dict[int, list[int]] = {}
        head_of: dict[int, int] = {}

        def waits_for(index: int, head: int) -> bool:
            stack, seen = [index], {index}
            while stack:
                for maker in self.reads[stack.pop()]:
                    if head_of.get(maker) == head:
                        return True
                    if self.begins[maker] > self.begins[head] and maker not in seen:
                        seen.add(maker)
                        stack.append(maker)
            return False

        for k in range(self.count):
            if not self.runs[k]:
                continue
            head = max((head_of[m] for m in self.reads[k] if m in head_of), default=-1)
            alike = head >= 0 and self.light[k] and self.light[head] and self._shape(head) == self._shape(k)
            if alike and not any(head_of.get(m) != head and waits_for(m, head) for m in self.reads[k]):
                head_of[k] = head
                kernels[head].append(k)
            else:
                head_of[k] = k
                kernels[k] = [k]
        return kernels

    def _fills(self, step: int) -> bool:
        """Whether a step scatters into a constant, which some kernel has to write before."""
        op = self.single[step]
        if op is None or not op.kind.startswith("scatter"):
            return False
        return op.operands[0] == NO_VALUE or self.graph.values[op.operands[0]].constant

    def _shape(self, step: int) -> tuple[int, ...] | None:
        op = self.single[step]
        return self.graph.values[op.results[0]].shape if op is not None and op.results else None

    def _node(
        self, head: int, members: list[int], reads: frozenset[int], reducing: frozenset[int], numbered: dict[int, int]
    ) -> Node:
        if head >= self.fill:
            return Node(self.begins[head - self.fill] - 0.5, reads, LOOP)
        if head >= self.second:
            return Node(self.begins[head], reads, 1.0)
        if head >= self.count:
            move, end = divmod(head - self.count, 2)
            at = self.wanted[move] if self.moves.all[move].readers else self.begins[head]
            return Node(at + 0.1 * end, reads, 1.0, start=numbered[head - 1] if end else -1)
        op = self.single[head]
        loop = self.light[head] and reducing.isdisjoint(members)
        library = op is not None and op.kind == "conv_general_dilated"
        alone = any(item < 0 for item in self.steps[head])
        return Node(float(members[-1]), reads, LOOP if loop or library else 1.0, alone=alone)

    def _with_fused(self, order: Sequence[int]) -> list[int]:
        """What runs with each fused step right before the first kernel that reads it.

        A reduction runs as soon as the kernels that it depends on have: it is another result of those.
        """
        placed: set[int] = set()
        full: list[int] = []

        def place(step: int) -> None:
            stack, inside = [step], []
            while stack:
                step = stack.pop()
                if step not in placed:
                    placed.add(step)
                    inside.append(step)
                    stack.extend(m for m in self.makers[step] if m < self.count and not self.runs[m])
            full.extend(sorted(inside))

        missing = [len([m for m in self.reads[i] if m < self.second]) if r else 0 for i, r in enumerate(self.reduces)]
        waiting: dict[int, list[int]] = {}
        for step in range(self.count):
            for maker in self.reads[step] if self.reduces[step] else ():
                waiting.setdefault(maker, []).append(step)
        for kernel in order:
            place(kernel)
            for step in waiting.get(kernel, ()):
                missing[step] -= 1
                if not missing[step]:
                    place(step)
        entering = self.outside - {-1}
        unread = sorted(set(range(self.count)) - entering - placed)
        result: list[int] = []
        for step in [*sorted(entering), *full, *unread]:
            if step < self.count:
                result += self.steps[step]
            elif step < self.second:
                result.append(~(step - self.count))
            else:
                result.append(~(2 * len(self.moves.all) + self.steps[step - self.fill][0]))
        return result


class Moves:
    """Collectives, and which of them brings a value to its readers."""

    def __init__(self, moves: Sequence[Move]) -> None:
        self.all = moves
        self.sums = {v: i for i, move in enumerate(moves) if not move.readers for v in move.values}
        self.copies = {read: i for i, move in enumerate(moves) for read in move.readers}


def _in_rows(graph: Graph, op: Op) -> bool:
    """Whether a reduction runs over the last dimensions alone: one pass is enough."""
    if op.eqn is None or "axes" not in op.eqn.params:
        return True
    rank, axes = len(graph.values[op.operands[0]].shape), op.eqn.params["axes"]
    return sorted(axes) == list(range(rank - len(axes), rank)) and len(axes) < rank
