"""Arrays that a compiler has in memory in another form as well: copied, padded, broadcast.

Each is a value, the first and the last instant at which its other form is in memory, and how much larger that is.
"""

from __future__ import annotations

from collections.abc import Sequence

from ffjax.cost.compilers import Compiler
from ffjax.ir.graph import NO_VALUE, Graph
from ffjax.ir.op_kinds import is_reduction


def other_forms(
    graph: Graph, compiler: Compiler, maps: Sequence[bool], when: Sequence[int]
) -> list[tuple[int, int, int, float]]:
    """What the compiler copies, pads or broadcasts.

    Args:
      graph: the program.
      compiler: what compiles it.
      maps: for each op whether it only maps elements.
      when: for each op the instant at which it runs.
    """
    found = []
    if compiler.copies_updated:
        found += _copied_arguments(graph, maps, when)
    if compiler.pads_convolutions:
        found += _padded(graph, when)
    if compiler.broadcasts_for_sums:
        found += _broadcast(graph, maps, when)
    return found


def replacing_ties(graph: Graph) -> list[tuple[int, int]]:
    """The ties whose argument is donated: the result takes over its buffer."""
    return [(a, r) for a, r in graph.program.ties if graph.program.donated[a]]


def _copied_arguments(graph: Graph, maps: Sequence[bool], when: Sequence[int]) -> list[tuple[int, int, int, float]]:
    """Donated arguments whose update transposes: it cannot write over what it reads, so a copy is read instead."""
    found = []
    offset = len(graph.program.closures)
    for argument, result in replacing_ties(graph):
        value = graph.ops[graph.arguments[argument + offset]].results[0]
        updated = graph.ops[graph.outputs[result]].operands[0]
        if updated == NO_VALUE or not _transposes(graph, maps, updated):
            continue
        reads = [op.id for op in graph.ops if value in op.operands and op.kind != "result"]
        if reads:
            found.append((value, min(when[op] for op in reads), max(when[op] for op in reads), 1.0))
    return found


def _transposes(graph: Graph, maps: Sequence[bool], value: int) -> bool:
    """Whether a value is computed, element by element, from a transposed batched dot: others are folded."""
    size = graph.values[value].bytes
    stack, seen = [value], {value}
    while stack:
        op = graph.ops[graph.values[stack.pop()].producer]
        if op.kind == "transpose":
            made = graph.ops[graph.values[op.operands[0]].producer]
            if made.kind == "dot_general" and made.eqn is not None and made.eqn.params["dimension_numbers"][1][0]:
                return True
        if maps[op.id]:
            more = {v for v in op.operands if v != NO_VALUE and graph.values[v].bytes == size} - seen
            seen |= more
            stack += more
    return False


def _padded(graph: Graph, when: Sequence[int]) -> list[tuple[int, int, int, float]]:
    """Images that convolutions read with more padding on one side: the libraries take those padded."""
    spans: dict[int, tuple[int, int, float]] = {}
    for op in graph.ops:
        if op.kind != "conv_general_dilated" or op.eqn is None:
            continue
        padding, dilation = op.eqn.params["padding"], op.eqn.params["lhs_dilation"]
        if all(low == high for low, high in padding) or any(d > 1 for d in dilation):
            continue
        value = op.operands[0]
        spatial = [graph.values[value].shape[d] for d in op.eqn.params["dimension_numbers"].lhs_spec[2:]]
        larger = 1.0
        for size, (low, high) in zip(spatial, padding, strict=True):
            larger *= 1 + max(0, low, high) / size
        first, last, most = spans.get(value, (when[op.id], when[op.id], larger))
        spans[value] = (min(first, when[op.id]), max(last, when[op.id]), max(most, larger))
    return [(value, first, last, larger) for value, (first, last, larger) in spans.items()]


def _broadcast(graph: Graph, maps: Sequence[bool], when: Sequence[int]) -> list[tuple[int, int, int, float]]:
    """What is broadcast to be multiplied and added up: the library that does both takes whole arrays.

    All who broadcast it alike read that one.
    """
    readers: list[list[int]] = [[] for _ in graph.values]
    for op in graph.ops:
        for value in op.operands:
            if value != NO_VALUE:
                readers[value].append(op.id)
    spans: dict[tuple[int, tuple[int, ...]], tuple[int, int, int]] = {}
    for op in graph.ops:
        if not maps[op.id] or len(op.results) != 1 or len(op.operands) != 2 or len(readers[op.results[0]]) != 1:
            continue
        reader = graph.ops[readers[op.results[0]][0]]
        shape = graph.values[op.results[0]].shape
        for value in op.operands:
            small = value != NO_VALUE and graph.values[value].shape != shape and not graph.values[value].constant
            if small and is_reduction(reader):
                made = when[graph.values[value].producer] + 1
                _, first, last = spans.get((value, shape), (0, made, made))
                spans[value, shape] = (op.results[0], first, max(last, when[reader.id]))
    return [(value, first, last, 1.0) for value, first, last in spans.values()]
