"""Which values are in memory, rather than inside a fusion, under one compiler.

`ffjax.cost.fusion` says what any compiler has to keep; compilers differ in what else they store rather
than compute again, and in what they compute as they read it.
"""

from __future__ import annotations

from collections.abc import Sequence

from ffjax.cost.compilers import Compiler
from ffjax.cost.fusion import Fusions, find_fusions, fusible_ops
from ffjax.ir.graph import NO_VALUE, Graph, Op
from ffjax.ir.op_kinds import is_reduction

_EXPENSIVE = frozenset(["tanh", "log", "log1p", "expm1", "erf", "erfc", "erf_inv", "logistic", "pow", "sin", "cos"])
_CHEAP_PROLOGUE = 2
"""A dot takes in an elementwise operand of at most so many arrays: one large one and a bias."""
_FEW = 8
"""Of kernels that read a value: more make no difference."""
_REPEATED = frozenset(
    ["abs", "add", "add_any", "and", "ceil", "clamp", "convert_element_type", "copy", "floor", "max", "min", "mul"]
).union(["neg", "not", "or", "round", "select_n", "sign", "sub", "xor"])
"""What XLA computes again in each kernel that reads it (`InstructionFusion::IsExpensive`), if it reads one array."""
_BROADCASTS = frozenset(["broadcast_in_dim", "iota"])
_COMPARISONS = frozenset(["gt", "ge", "lt", "le", "eq", "ne"])
"""Masks are computed again from what they mask."""


def mapping_ops(graph: Graph) -> list[bool]:
    """For each op whether it only maps elements, so that kernels that read its results can do it as well."""
    return [fused and not is_reduction(op) for fused, op in zip(fusible_ops(graph), graph.ops, strict=True)]


def fused_gathers(graph: Graph, maps: Sequence[bool]) -> list[bool]:
    """`maps`, and the gathers that one elementwise kernel or reduction reads alone: those gather as they read."""
    readers: list[list[int]] = [[] for _ in graph.values]
    for op in graph.ops:
        for value in op.operands:
            if value != NO_VALUE:
                readers[value].append(op.id)
    found = list(maps)
    for op in reversed(graph.ops):
        if op.kind == "gather" and len(readers[op.results[0]]) == 1:
            reader = graph.ops[readers[op.results[0]][0]]
            found[op.id] = found[reader.id] or is_reduction(reader)
    return found


def buffered(graph: Graph, compiler: Compiler, maps: Sequence[bool], fusions: Fusions | None = None) -> list[bool]:
    """For each value whether it is in memory: what `find_fusions` says, as far as this compiler fuses so.

    Args:
      graph: the program.
      compiler: what compiles it.
      maps: `mapping_ops` of the program.
      fusions: `find_fusions` of the program, if they are known.
    """
    in_memory = list((find_fusions(graph) if fusions is None else fusions).in_memory)
    readers: list[list[int]] = [[] for _ in graph.values]
    for op in graph.ops:
        for value in op.operands:
            if value != NO_VALUE:
                readers[value].append(op.id)
    for op in graph.ops:
        if op.kind == "gather" and maps[op.id]:
            in_memory[op.results[0]] = False
    if compiler.copies_transposed:
        for op in graph.ops:
            if op.kind == "transpose":
                in_memory[op.results[0]] = True
    if compiler.keeps_shared:
        _keep_shared(graph, in_memory, readers, maps)
    if compiler.fuses_into_dots:
        _fuse_into_dots(graph, in_memory, readers, maps)
    if compiler.keeps_expensive:
        _keep_expensive(graph, in_memory, readers, maps)
    return in_memory


def _keep_shared(graph: Graph, in_memory: list[bool], readers: list[list[int]], maps: Sequence[bool]) -> None:
    """Puts into memory what more than one kernel reads, unless each computes it for itself.

    That is done if it costs little and reads one array: then a kernel reads no more than it would have.
    """
    kernels: list[set[int]] = [set() for _ in graph.values]  # those that a value is read in
    for op in reversed(graph.ops):
        if not op.results or not (maps[op.id] or is_reduction(op)):
            continue
        repeated = op.kind in _REPEATED and _arrays_read(graph, op) <= 1
        for value in op.results:
            reading = kernels[value]
            for reader in readers[value]:
                if graph.ops[reader].kind in _COMPARISONS:
                    continue
                inside = [v for v in graph.ops[reader].results if not in_memory[v]]
                reading |= kernels[inside[0]] if maps[reader] and inside else {reader}
            if len(reading) > 1 and not graph.values[value].constant and not repeated:
                in_memory[value] = True


def _arrays_read(graph: Graph, op: Op) -> int:
    """How many operands are arrays of the result's rank, rather than broadcast."""
    rank = len(graph.values[op.results[0]].shape)
    read = [graph.values[v] for v in op.operands if v != NO_VALUE and not graph.values[v].constant]
    return sum(len(v.shape) >= rank and graph.ops[v.producer].kind not in _BROADCASTS for v in read)


def _fuse_into_dots(graph: Graph, in_memory: list[bool], readers: list[list[int]], maps: Sequence[bool]) -> None:
    """Takes out of memory what dots compute from one array as they read it (a rectifier, a mask, a conversion)."""
    sources: list[frozenset[int] | None] = [None] * len(graph.values)
    for op in graph.ops:
        if not maps[op.id] or op.kind in _EXPENSIVE or op.kind == "exp":
            continue
        made_of: frozenset[int] | None = frozenset()
        for operand in op.operands:
            if operand == NO_VALUE or graph.values[operand].constant:
                continue
            inner = frozenset([operand]) if in_memory[operand] else sources[operand]
            made_of = None if inner is None or made_of is None else made_of | inner
        if not made_of or len(made_of) > _CHEAP_PROLOGUE:
            continue
        for value in op.results:
            sources[value] = made_of
            if in_memory[value]:
                kinds = {graph.ops[r].kind for r in readers[value] if not (maps[r] or is_reduction(graph.ops[r]))}
                in_memory[value] = kinds != {"dot_general"}


def _keep_expensive(graph: Graph, in_memory: list[bool], readers: list[list[int]], maps: Sequence[bool]) -> None:
    """Puts into memory a transcendental that several kernels read, one of them next to a reduction.

    A kernel that only maps elements computes it again; one that also reduces (a bias's gradient) gets no more to do.
    """
    # For each value the kernels that read it.
    kernels: list[set[int]] = [set() for _ in graph.values]
    for op in reversed(graph.ops):
        own = {op.id}
        fused = maps[op.id] and not any(in_memory[v] for v in op.results)
        if not fused:
            reading = own
        elif len(op.results) == 1:
            reading = kernels[op.results[0]]
        else:
            reading = set[int]().union(*[kernels[v] for v in op.results])
        if op.kind in _EXPENSIVE and len(reading) > 1 and any(_reduces(graph, k, readers) for k in reading):
            for value in op.results:
                in_memory[value] = True
            reading = own
        if len(reading) <= _FEW:
            for value in op.operands:
                if value != NO_VALUE:
                    kernels[value].update(reading)


def _reduces(graph: Graph, kernel: int, readers: list[list[int]]) -> bool:
    op = graph.ops[kernel]
    return is_reduction(op) or any(is_reduction(graph.ops[r]) for v in op.results for r in readers[v])
