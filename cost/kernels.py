"""What each op costs to run: its arithmetic, and the bytes that cross the borders of fusions (`ffjax.cost.fusion`).

    a kernel    one op that does work, or one result of fused ops that is in memory
    its bytes   operands and results of an op that does work; for fused ops one read of a value in memory by each
                pass, and one write of each result in memory
    beside it   what loops and dots move (`ffjax.cost.moved_kernels`)

A later pass (the backward one, of a softmax) reads again what is in memory, and makes again from it what is not.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

from ffjax.cost.fusion import BORDERS, FREE, Fusions, find_fusions
from ffjax.cost.manual import body_tasks
from ffjax.cost.moved_kernels import Move, moves
from ffjax.cost.work import ELEMENTWISE, Work, work_of
from ffjax.ir import compat
from ffjax.ir.compat import JaxprEqn
from ffjax.ir.graph import NO_VALUE, Graph, Op
from ffjax.ir.manual import NAME as SHARD_MAP
from ffjax.ir.regions import Dims, OpDims, Region, Regions

Key = TypeVar("Key", bound=Hashable)

_FLOPS_PER_ELEMENT = {
    **dict.fromkeys(("div", "sqrt", "rsqrt", "cbrt", "rem"), 4.0),
    **dict.fromkeys(("exp", "exp2", "expm1", "log", "log1p", "tanh", "logistic", "sin", "cos", "tan"), 16.0),
    **dict.fromkeys(("erf", "erf_inv", "erfc", "pow", "atan2", "lgamma", "digamma", "sinh", "cosh", "asinh"), 32.0),
}
"""Of functions that are series or iterations of multiply-adds, about; all others are one operation."""
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
    work: Work = field(default_factory=Work)
    """What it does at which sizes, where that is more than its counts."""


@dataclass(frozen=True, slots=True)
class _Task:
    """What ops that are alike, and alike in their dimensions, do."""

    flops: float
    dtype: str
    iteration: tuple[int, ...]
    work: Work
    traffic: tuple[tuple[Dims, float], ...]
    """Of an op that is not fused."""


def kernels(regions: Regions, fusions: Fusions | None = None) -> list[Kernel]:
    """The kernels of a program, in the order of its ops; an op may run several. `fusions`: if they are known."""
    graph = regions.graph
    fusions = find_fusions(graph) if fusions is None else fusions
    made: list[Kernel] = []
    tasks: dict[tuple[int, int], _Task] = {}
    read: set[tuple[int, int]] = set()
    for region in regions.regions:
        for op_id, dims in zip(region.ops, region.dims, strict=True):
            op = graph.ops[op_id]
            if op.kind in BORDERS or op.kind in FREE:
                continue
            if op.kind == SHARD_MAP and op.eqn is not None:
                made += _by_hand(regions, op, op.eqn)
                continue
            inside = fusions.fused[op_id]
            if inside and all(graph.values[v].constant for v in op.results):
                continue
            task = tasks.get((op.alike, id(dims)))
            if task is None:
                task = tasks[op.alike, id(dims)] = _task(graph, op, dims, fused=inside)
            traffic = task.traffic
            if inside:
                fresh = _reads(regions, region, op_id, fusions, read)
                writes = [
                    (port, graph.values[value].bytes)
                    for value, port in zip(op.results, dims.results, strict=True)
                    if fusions.in_memory[value]
                ]
                traffic = _merged([*fresh, *writes])
                if not traffic and op.kind not in _FLOPS_PER_ELEMENT:
                    continue
            made.append(
                Kernel(
                    op=op_id,
                    region=region.id,
                    trips=graph.scopes[op.scope].trips,
                    flops=task.flops,
                    matmul=op.kind in MATMULS and not inside,
                    dtype=task.dtype,
                    launches=1 if not inside or any(fusions.in_memory[v] for v in op.results) else 0,
                    traffic=traffic,
                    iteration=task.iteration,
                    work=task.work,
                )
            )
    runs = {k.op for k in made}
    made += [_moving(regions, move) for move in moves(graph, fusions) if move.port[0] in runs]
    return sorted(made, key=lambda k: k.op)


def _by_hand(regions: Regions, op: Op, eqn: JaxprEqn) -> list[Kernel]:
    """Those of a region of the user's, whose arrays are pieces already."""
    return [
        Kernel(
            op=op.id,
            region=regions.region_of[op.id],
            trips=task.trips * regions.graph.scopes[op.scope].trips,
            flops=task.flops,
            matmul=task.matmul,
            dtype=task.dtype,
            launches=1,
            traffic=(((), task.bytes),),
            iteration=(),
        )
        for task in body_tasks(eqn)
    ]


def _moving(regions: Regions, move: Move) -> Kernel:
    op_id, side, index = move.port
    op, ports = regions.graph.ops[op_id], regions.ports[op_id]
    values, dims = (op.operands, ports.operands) if side == "operand" else (op.results, ports.results)
    value, port = regions.graph.values[values[index]], dims[index]
    return Kernel(
        op=op_id,
        region=regions.region_of[op_id],
        trips=regions.graph.scopes[op.scope].trips,
        flops=0.0,
        matmul=False,
        dtype=value.dtype,
        launches=move.launches,
        traffic=((port, move.passes * value.bytes),),
        iteration=tuple(dict.fromkeys(a for dim in port for a in dim)),
        work=Work(kind=ELEMENTWISE),
    )


def _task(graph: Graph, op: Op, dims: OpDims, *, fused: bool) -> _Task:
    return _Task(
        flops=op_flops(op, graph),
        dtype=_operand_dtype(graph, op),
        iteration=tuple(dict.fromkeys(a for v in dims.operands + dims.results for dim in v for a in dim)),
        work=work_of(graph, op, dims, fused=fused),
        traffic=() if fused else _work_traffic(graph, op, dims.operands, dims.results),
    )


def _reads(
    regions: Regions, region: Region, op_id: int, fusions: Fusions, read: set[tuple[int, int]]
) -> list[tuple[Dims, float]]:
    """What a fused op is the first of its pass to read from memory: of what it slices, its part. `read` is added to."""
    graph, in_memory, passes = regions.graph, fusions.in_memory, fusions.passes
    reader, now = graph.ops[op_id], passes[op_id]
    part = graph.values[reader.results[0]].bytes if reader.kind == "slice" else math.inf
    fresh: list[tuple[Dims, float]] = []
    ahead = list(zip(reader.operands, regions.ports[op_id].operands, strict=True))
    while ahead:
        value, port = ahead.pop()
        if value == NO_VALUE or graph.values[value].constant or (value, now) in read:
            continue
        producer = graph.ops[graph.values[value].producer]
        if not in_memory[value] and passes[producer.id] == now:
            continue  # made in this pass
        read.add((value, now))
        if in_memory[value] or regions.region_of[producer.id] != region.id:
            fresh.append((port, min(part, graph.values[value].bytes)))
        else:
            ahead += zip(producer.operands, regions.ports[producer.id].operands, strict=True)
    return fresh


def _merged(traffic: Sequence[tuple[Dims, float]]) -> tuple[tuple[Dims, float], ...]:
    """What is split alike as one: a fused chain may read many values, in few shardings."""
    sizes: dict[Dims, float] = {}
    for dims, size in traffic:
        sizes[dims] = sizes.get(dims, 0.0) + size
    return tuple(sizes.items())


def by_family(kernels: Sequence[Kernel], keys: Sequence[Key]) -> dict[Key, list[Kernel]]:
    """The kernels of each family of regions, those that are alike as one with all their trips.

    Members of a family number their atoms alike, so a family's kernels are priced in any member's atoms.
    """
    alike: dict[tuple[object, ...], tuple[Kernel, float]] = {}
    for k in kernels:
        key = (keys[k.region], k.flops, k.matmul, k.dtype, k.launches, k.traffic, k.iteration, k.work)
        first, trips = alike.get(key, (k, 0.0))
        alike[key] = (first, trips + k.trips)
    families: dict[Key, list[Kernel]] = {}
    for first, trips in alike.values():
        families.setdefault(keys[first.region], []).append(dataclasses.replace(first, trips=trips))
    return families


def op_flops(op: Op, graph: Graph) -> float:
    """Floating-point operations of one op at its full shape: two per multiply-add, else those of its elements."""
    result = graph.values[op.results[0]] if op.results else None
    if op.kind == "dot_general":
        return 2.0 * math.prod(op.rule.sizes)
    if op.kind == "conv_general_dilated" and op.eqn is not None and result is not None:
        kernel = compat.shape_of(op.eqn.invars[1])
        features: int = kernel[op.eqn.params["dimension_numbers"].rhs_spec[0]]
        # What falls between the elements of a dilated operand (a strided convolution's gradient) is no work.
        holes: int = math.prod(op.eqn.params["lhs_dilation"])
        return 2.0 * math.prod(result.shape) * math.prod(kernel) / features / holes
    if op.kind in ("ragged_dot_general", "ragged_dot") and op.eqn is not None and result is not None:
        return 2.0 * math.prod(compat.shape_of(op.eqn.invars[0])) * compat.shape_of(op.eqn.invars[1])[-1]
    elements = max((math.prod(graph.values[v].shape) for v in op.results + op.operands if v != NO_VALUE), default=0)
    return _FLOPS_PER_ELEMENT.get(op.kind, 1.0) * elements


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
