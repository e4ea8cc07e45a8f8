"""When each value of a program is in memory, whatever its sharding.

A value lives from the op that makes it to the last op that reads it, directly or through fused values that are never
in memory themselves. Crossing into a loop: what a body only reads stays alive for the whole loop and is not copied, a
stacked result is allocated when its loop starts, a carry takes over its initial value's place. Arguments live for the
whole step unless they are donated; a result that replaces a donated argument takes over its buffer. The order of the
ops, and what is fused, are the compiler's (`ffjax.cost.compilers`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from ffjax.cost.buffers import buffered, fused_gathers, mapping_ops
from ffjax.cost.compilers import TO_THE_LETTER, Compiler
from ffjax.cost.fusion import Fusions
from ffjax.cost.merged_remat import has_remat, merge_remat
from ffjax.cost.moves import Move
from ffjax.cost.order import as_written, scheduled, scope_spans
from ffjax.cost.other_forms import other_forms, replacing_ties
from ffjax.ir.graph import NO_VALUE, Graph
from ffjax.ir.op_kinds import is_reduction


@dataclass(frozen=True, slots=True, kw_only=True)
class Fused:
    """For each op whether it only maps elements, and for each value whether a kernel leaves it in memory."""

    maps: list[bool]
    in_memory: list[bool]


@dataclass(frozen=True, slots=True, kw_only=True)
class Lifetimes:
    """When things happen: instants are numbered from 0, one for each op.

    For each op `when` it runs, and `until` when it has really read its operands: a fused one reads them in the op that
    it is fused into, a body all through its loop. For each value the `first` and the `last` instant at which it is in
    memory; `first > last` if it never is.
    """

    graph: Graph
    """The program as the compiler sees it: the same ops and values, some of which it may merge with others."""
    compiler: Compiler
    fused: Fused
    when: NDArray[np.int64]
    until: NDArray[np.int64]
    first: NDArray[np.int64]
    last: NDArray[np.int64]
    new_results: NDArray[np.int64]
    """Values that become results in buffers of their own."""
    sums: dict[int, tuple[int, int]] = field(default_factory=dict)
    """For values whose partial sums are reduced when that starts and ends: how many ops have run by then."""
    scattered: frozenset[int] = frozenset()
    """Values whose partial sums are reduce-scattered, because that is planned or because all who read them slice."""
    copies: dict[tuple[int, int], tuple[int, int]] = field(default_factory=dict)
    """For what is read resharded, by value and reader, when that starts and ends."""

    filled: dict[int, int] = field(default_factory=dict)
    """For results of scatters since when their memory is taken: zeros are written ahead."""
    copied: list[tuple[int, int, int, float]] = field(default_factory=list)
    """Values that are also in memory in another form, the first and last instant of that, and how much larger it is."""

    def bytes(self) -> NDArray[np.float64]:
        """For each value, unsharded, what it takes in memory: temporaries leave gaps between them."""
        taken = np.array([v.bytes for v in self.graph.values], dtype=np.float64) * (1 + self.compiler.fragmentation)
        if self.compiler.widens_halves:
            taken[[v.dtype in ("bfloat16", "float16") for v in self.graph.values]] *= 2
        for op in self.graph.arguments:
            value = self.graph.ops[op].results[0]
            taken[value] = self.graph.values[value].bytes
        return taken

    def partial_sums(self, value: int, *, scattered: bool) -> list[tuple[int, int]]:
        """From when to when a value's partial sums are in memory beside the value, and what else their sum takes."""
        made = int(self.when[self.graph.values[value].producer])
        start, end = self.sums.get(value, (made + 1, made + 1))
        while_summed = (max(made, start - 1), max(made, end - 1))
        if scattered:
            since = min(made, self.filled.get(value, made))
            whole = [while_summed] if self.compiler.slices_reductions else []
            return [(since, while_summed[1]), *whole]
        if not self.compiler.reduces_out_of_place:
            return []
        if value in self.scattered:
            return [(min(made + 1, self.filled.get(value, made + 1)), end - 1)]
        return [while_summed]

    @property
    def op_at(self) -> NDArray[np.int64]:
        """For each instant the op that runs."""
        return np.argsort(self.when)


def lifetimes(
    graph: Graph,
    compiler: Compiler = TO_THE_LETTER,
    moves: Sequence[Move] = (),
    fused: Fused | None = None,
    fusions: Fusions | None = None,
) -> Lifetimes:
    """When each value is in memory under a compiler's schedule.

    Args:
      graph: the program.
      compiler: what compiles it.
      moves: the collectives of a layout, if the schedule is to be that layout's.
      fused: what is fused, if that is known.
      fusions: what any compiler fuses (`find_fusions`), if only that is known.
    """
    end = len(graph.ops)
    planned, whole = moves, graph
    if compiler.merges_remat:
        graph, moves = merge_remat(graph, moves)
    if fused is None or (compiler.merges_remat and has_remat(graph)):
        maps = mapping_ops(graph)
        if compiler.fuses_gathers:
            maps = fused_gathers(graph, maps)
        fused = Fused(maps=maps, in_memory=buffered(graph, compiler, maps, fusions if graph is whole else None))
    maps, in_memory = fused.maps, fused.in_memory
    if compiler.runs_late or compiler.runs_early:
        runs, under_way, filled = scheduled(graph, in_memory, moves, from_the_end=compiler.runs_late)
    else:
        runs, under_way, filled = as_written(graph), np.zeros((0, 2), dtype=np.int64), {}
    sums: dict[int, tuple[int, int]] = {}
    copies: dict[tuple[int, int], tuple[int, int]] = {}
    scattered: set[int] = set()
    for asked, move, (start, done) in zip(planned, moves, under_way.tolist(), strict=False):
        if done >= 0 and move.readers:
            copies.update(dict.fromkeys(asked.readers + move.readers, (start, done)))
        elif done >= 0:
            sums.update(dict.fromkeys(move.values, (start, done)))
            scattered.update(move.values if move.scatters else ())
    spans = scope_spans(graph)
    loop_end = [int(runs[first : last + 1].max(initial=-1)) for first, last in spans]
    loop_start = [int(runs[first : last + 1].min(initial=end)) for first, last in spans]
    carries = _carries(graph)
    when: list[int] = runs.tolist()
    first = [when[v.producer] for v in graph.values]
    last = first.copy()
    first_read = [end] * len(graph.values)
    stays = [False] * len(graph.values)
    untils = when.copy()
    replacing = {graph.outputs[r] for _, r in replacing_ties(graph)}
    # Backwards, so that what a fused value reads inherits the ops that read the fused value.
    for op in reversed(graph.ops):
        until = when[op.id]
        if maps[op.id]:
            until = max([until, *(last[v] for v in op.results if not in_memory[v])])
        if op.kind == "enter" and op.id not in carries:
            # What a body only reads is the outer array itself, for as long as the loop runs.
            inner = graph.values[op.results[0]].scope
            until = max(until, last[op.results[0]]) if graph.scopes[inner].kind == "remat" else loop_end[inner]
        if op.kind == "result" and op.id not in replacing:
            until = end
        untils[op.id] = until
        for value in op.operands:
            if value != NO_VALUE:
                # Who reads a copy needs the original no longer than it takes to make that.
                last[value] = max(last[value], min(until, copies.get((value, op.id), (0, until))[1]))
                first_read[value] = min(first_read[value], when[op.id])
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
    new_results = [
        value
        for value in dict.fromkeys(graph.ops[op].operands[0] for op in graph.outputs if op not in replacing)
        if value != NO_VALUE and graph.ops[graph.values[value].producer].kind != "argument"
    ]
    taken_over = {graph.ops[op].operands[0] for op in replacing}
    taken_over -= {graph.ops[op].results[0] for op in graph.arguments}  # what is handed on is copied
    for op in graph.ops:
        for value in op.results:
            inner = graph.values[value].scope
            if op.kind == "exit" and op.rule.need_replication:
                first[value] = loop_start[graph.ops[op.id].scope]  # a stacked result is there from the loop's start
            if op.kind == "enter" and op.id not in carries:
                last[value] = first[value] - 1
            elif op.kind == "enter" and inner:
                last[value] = max(last[value], first[value])
            if not in_memory[value] and not stays[value]:
                last[value] = first[value] - 1
            if value in taken_over and value != NO_VALUE:
                last[value] = first[value] - 1
    if compiler.writes_over:
        for value, at in _written_over(graph, in_memory, maps, first, last):
            first[value] = at
    for op_id, at in filled.items():
        value = graph.ops[op_id].results[0]
        if value not in scattered:
            first[value] = min(first[value], at)
    return Lifetimes(
        graph=graph,
        compiler=compiler,
        fused=fused,
        when=runs,
        until=np.array(untils, dtype=np.int64),
        first=np.array(first, dtype=np.int64),
        last=np.array(last, dtype=np.int64),
        new_results=np.array(new_results, dtype=np.int64),
        sums=sums,
        scattered=frozenset(scattered),
        filled={graph.ops[op].results[0]: at for op, at in filled.items()},
        copied=other_forms(graph, compiler, maps, when),
        copies=copies,
    )


def _written_over(
    graph: Graph, in_memory: Sequence[bool], maps: Sequence[bool], first: Sequence[int], last: Sequence[int]
) -> list[tuple[int, int]]:
    """Values that are made in memory that is there already, and from when on they take more of it.

    An elementwise kernel writes over an operand of its size that it is the last to read, unless it reduces as well. A
    scatter adds to zeros, which are written ahead.
    """
    reduced = [False] * len(graph.values)
    for op in reversed(graph.ops):
        inside = is_reduction(op) or (maps[op.id] and any(reduced[v] and not in_memory[v] for v in op.results))
        for value in op.operands:
            if value != NO_VALUE and inside:
                reduced[value] = True
    found = []
    sources: list[frozenset[int]] = [frozenset()] * len(graph.values)  # what a fused value is made of
    for op in graph.ops:
        if not maps[op.id]:
            continue
        read = [frozenset((v,)) if in_memory[v] else sources[v] for v in op.operands if v != NO_VALUE]
        made_of = frozenset[int]().union(*read)
        for value in op.results:
            if not in_memory[value]:
                sources[value] = made_of if len(made_of) <= 8 else frozenset()
                continue
            at, size = first[value], graph.values[value].bytes
            if reduced[value] or last[value] <= at:
                continue
            if any(last[v] == at and first[v] < at and graph.values[v].bytes == size for v in made_of):
                found.append((value, at + 1))
    return found


def _carries(graph: Graph) -> set[int]:
    """The `enter` ops that bring in a carry's first value, rather than a constant or a stacked array."""
    return {op for pair in graph.ties for op, side, _ in pair if side == "result"}


def _donated(graph: Graph) -> list[bool]:
    return [False] * len(graph.program.closures) + list(graph.program.donated)


def _replaced(graph: Graph) -> set[int]:
    offset = len(graph.program.closures)
    return {a + offset for a, _ in replacing_ties(graph)}
