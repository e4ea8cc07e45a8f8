"""What each op costs to run: its arithmetic, and the bytes that cross the borders of fusions.

XLA fuses chains of elementwise ops, broadcasts and layout changes into the kernel that reads or writes memory, so
bytes are counted where a value really is in memory:

    a value is materialised  if what makes it is no fusible op, or if something other than a fusible op reads it
    a kernel                 = one op that does work, or one materialised result of fusible ops
    its bytes                = operands and results of an op that does work; one read per region and materialised value,
                               one write per materialised result, of fusible ops
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass

from ffjax.ir import compat
from ffjax.ir.graph import NO_VALUE, Graph, Op
from ffjax.ir.regions import Dims, Regions, is_light, is_reduction

_BORDERS = frozenset({"argument", "result", "enter", "exit"})
_FREE = frozenset(
    [
        "stop_gradient",
        "name",
        "optimization_barrier",
        "copy_p",
        "sharding_constraint",
        "reshard",
        "random_wrap",
        "random_unwrap",
    ]
)
_LAYOUT = frozenset({"transpose", "reshape", "squeeze", "expand_dims", "bitcast_convert_type"})
MATMULS = frozenset({"dot_general", "conv_general_dilated", "ragged_dot_general", "ragged_dot"})


@dataclass(frozen=True, slots=True, kw_only=True)
class Kernel:
    """One launch per trip: `reads` and `writes` are (dimensions in the region's atoms, bytes of the whole value)."""

    op: int
    region: int
    trips: float
    flops: float
    matmul: bool
    dtype: str
    launches: int
    traffic: tuple[tuple[Dims, float], ...]
    iteration: tuple[int, ...]
    """The region's atoms that the op's work is spread over."""


def kernels(regions: Regions) -> list[Kernel]:
    """The kernels of a program, in the order of its ops."""
    graph = regions.graph
    in_memory = materialised(graph)
    made: list[Kernel] = []
    read: set[tuple[int, int, Dims]] = set()
    for region in regions.regions:
        for op_id, dims in zip(region.ops, region.dims, strict=True):
            op = graph.ops[op_id]
            if op.kind in _BORDERS or op.kind in _FREE:
                continue
            trips = graph.scopes[op.scope].trips
            iteration = tuple(dict.fromkeys(a for v in dims.operands + dims.results for dim in v for a in dim))
            if not fusible(op):
                traffic = _work_traffic(graph, op, dims.operands, dims.results)
                flops = op_flops(op, graph)
            else:
                if all(graph.values[v].constant for v in op.results):
                    continue
                fresh = []
                for value, port in zip(op.operands, dims.operands, strict=True):
                    if value != NO_VALUE and in_memory[value] and (region.id, value, port) not in read:
                        read.add((region.id, value, port))
                        fresh.append((port, graph.values[value].bytes))
                writes = [
                    (port, graph.values[value].bytes)
                    for value, port in zip(op.results, dims.results, strict=True)
                    if in_memory[value]
                ]
                traffic = tuple(fresh + writes)
                flops = float(
                    max((math.prod(graph.values[v].shape) for v in op.results + op.operands if v >= 0), default=0)
                )
                if not traffic:
                    continue
            made.append(
                Kernel(
                    op=op_id,
                    region=region.id,
                    trips=trips,
                    flops=flops,
                    matmul=op.kind in MATMULS,
                    dtype=_operand_dtype(graph, op),
                    launches=1 if not fusible(op) or any(in_memory[v] for v in op.results) else 0,
                    traffic=traffic,
                    iteration=iteration,
                )
            )
    return sorted(made, key=lambda k: k.op)


def by_family(kernels: Sequence[Kernel], keys: Sequence[str]) -> dict[str, list[Kernel]]:
    """The kernels of each family of regions, those that are alike as one with all their trips.

    Members of a family number their atoms alike, so a family's kernels are priced in any member's atoms.
    """
    alike: dict[tuple[object, ...], tuple[Kernel, float]] = {}
    for k in kernels:
        key = (keys[k.region], k.flops, k.matmul, k.dtype, k.launches, k.traffic, k.iteration)
        first, trips = alike.get(key, (k, 0.0))
        alike[key] = (first, trips + k.trips)
    families: dict[str, list[Kernel]] = {}
    for first, trips in alike.values():
        families.setdefault(keys[first.region], []).append(dataclasses.replace(first, trips=trips))
    return families


def fusible(op: Op) -> bool:
    """Whether XLA puts the op inside a fusion with its neighbours."""
    return op.kind not in _BORDERS and (is_light(op) or is_reduction(op) or op.kind in _LAYOUT or op.kind in _FREE)


def fusible_ops(graph: Graph) -> list[bool]:
    """For each op whether XLA puts it inside a fusion. Equal equations share a rule, so few are looked at."""
    known: dict[tuple[str, int], bool] = {}
    found = []
    for op in graph.ops:
        key = (op.kind, id(op.rule))
        if key not in known:
            known[key] = fusible(op)
        found.append(known[key])
    return found


def materialised(graph: Graph, fused: Sequence[bool] | None = None) -> list[bool]:
    """For each value whether it is in memory rather than inside a fusion. `fused`: `fusible_ops`, if they are known."""
    fused = fusible_ops(graph) if fused is None else fused
    in_memory = [False] * len(graph.values)
    for op in graph.ops:
        inside = fused[op.id] and not is_reduction(op)
        for value in op.results:
            in_memory[value] |= not inside
    for op in reversed(graph.ops):
        if fused[op.id]:
            if op.kind in _LAYOUT | _FREE and any(in_memory[v] for v in op.results):
                # A layout change is part of the kernel that reads it: what it reads is in memory in its stead.
                for value in op.operands:
                    if value != NO_VALUE:
                        in_memory[value] = True
                for value in op.results:
                    in_memory[value] = False
            continue
        for value in op.operands:
            if value != NO_VALUE and not graph.values[value].constant:
                in_memory[value] = True
    return in_memory


def op_flops(op: Op, graph: Graph) -> float:
    """Floating-point operations of one op at its full shape: two per multiply-add, else one per element."""
    result = graph.values[op.results[0]] if op.results else None
    if op.kind == "dot_general":
        return 2.0 * math.prod(op.rule.sizes)
    if op.kind == "conv_general_dilated" and op.eqn is not None and result is not None:
        kernel = compat.shape_of(op.eqn.invars[1])
        features: int = kernel[op.eqn.params["dimension_numbers"].rhs_spec[0]]
        return 2.0 * math.prod(result.shape) * math.prod(kernel) / features
    if op.kind in ("ragged_dot_general", "ragged_dot") and op.eqn is not None and result is not None:
        return 2.0 * math.prod(compat.shape_of(op.eqn.invars[0])) * compat.shape_of(op.eqn.invars[1])[-1]
    return float(max((math.prod(graph.values[v].shape) for v in op.results + op.operands if v != NO_VALUE), default=0))


def _work_traffic(
    graph: Graph, op: Op, operands: tuple[Dims, ...], results: tuple[Dims, ...]
) -> tuple[tuple[Dims, float], ...]:
    """What an op that does work reads and writes; indexing ops touch only the rows that they name."""
    sides = list(zip(op.operands, operands, strict=True)), list(zip(op.results, results, strict=True))
    reads, writes = ([(d, graph.values[v].bytes) for v, d in side if v != NO_VALUE] for side in sides)
    if op.kind in ("gather", "dynamic_slice"):
        return (*reads[1:], *writes, *writes)
    if op.kind.startswith("scatter"):
        updates = reads[-1:]
        return (*reads[1:], *updates, *updates)
    if op.kind == "dynamic_update_slice":
        return (*reads[1:2], *reads[1:2])
    return (*reads, *writes)


def _operand_dtype(graph: Graph, op: Op) -> str:
    return next((graph.values[v].dtype for v in op.operands if v != NO_VALUE), "float32")
