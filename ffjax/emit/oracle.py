"""Which collectives the partitioner will insert into a program, without compiling anything.

Shardy's own passes complete the program's shardings, make every resharding explicit and turn it into
collectives; this module runs them on a copy and counts what comes out, loops multiplied out. It is the one
place that touches these passes for a whole program.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeAlias, cast

import jax
import numpy as np
from jax.extend.mlir import ir, passmanager
from jax.extend.mlir.dialects import sdy
from jax.interpreters import mlir as jax_mlir

from ffjax.ir.device_groups import axes_of_groups, axes_of_pairs
from ffjax.ir.reshard import Part, moved_axes
from ffjax.ir.spec import Collective, CollectiveKind, CountedCollective, MeshShape

PROPAGATE = (
    "builtin.module(sdy-propagation-pipeline,"
    "func.func(sdy-insert-explicit-reshards{enable-full-version=true},sdy-reshard-to-collectives),"
    "canonicalize,cse)"
)

_SDY: dict[str, CollectiveKind] = {
    "sdy.all_gather": "all_gather",
    "sdy.all_reduce": "all_reduce",
    "sdy.reduce_scatter": "reduce_scatter",
    "sdy.all_to_all": "all_to_all",
    "sdy.collective_permute": "collective_permute",
}
_STABLEHLO: dict[str, CollectiveKind] = {
    "stablehlo.all_gather": "all_gather",
    "stablehlo.all_reduce": "all_reduce",
    "stablehlo.reduce_scatter": "reduce_scatter",
    "stablehlo.all_to_all": "all_to_all",
    "stablehlo.collective_permute": "collective_permute",
}
_RESHARDS = _SDY.keys() | {"sdy.all_slice"}
_AXES_ATTRIBUTE = {
    "sdy.all_gather": "gathering_axes",
    "sdy.all_reduce": "reduction_axes",
    "sdy.reduce_scatter": "reduce_scatter_axes",
    "sdy.all_to_all": "params",
}
_MESH = re.compile(r"<@(\w+)")
_ALL_TO_ALL = re.compile(r"\{([^}]*)\}: *\d+ *-> *\d+")
"""The axes of one of an all-to-all's pairs of dimensions."""
_AXIS_NAME = re.compile(r'name = "([^"]+)"')
_AXIS = re.compile(r'"([^"]+)"(?::\((\d+)\)(\d+))?')

Layout: TypeAlias = list[list[Part]]
Value: TypeAlias = "ir.Value[ir.Type]"


def explicit_collectives(lowered: jax.stages.Lowered | str) -> list[CountedCollective]:
    """The collectives that Shardy's partitioner implies for a lowered program.

    Args:
      lowered: a lowered program, over real devices or an abstract mesh, or the text of its StableHLO. It is
        left as it is.

    Loops multiply by their trip count where their condition compares a counter with a constant (as `scan` and
    `fori_loop` do), else count once; a function counts at each place that calls it; each branch counts once.
    The program's own collectives, in `shard_map`, are marked `user`.
    """
    if isinstance(lowered, str):
        with jax_mlir.make_ir_context() as context:
            module = ir.Module.parse(lowered, context=context).operation
    else:
        module = cast(ir.Module, lowered.compiler_ir("stablehlo")).operation.clone().operation
    _unplace(module)
    run_passes(module, PROPAGATE)
    return collectives_in(module)


def _unplace(module: ir.Operation) -> None:
    """Drops the shardings that put an op on a single device (a host callback's): the passes know no way from there."""
    with module.context:
        single = {
            _symbol(op.attributes["sym_name"])
            for op in _ops(module)
            if op.name == "sdy.mesh" and not sdy.MeshAttr(op.attributes["mesh"]).axes
        }

        def visit(op: ir.Operation) -> ir.WalkResult:
            if "sdy.sharding" in op.attributes and single & set(_MESH.findall(str(op.attributes["sdy.sharding"]))):
                del op.attributes["sdy.sharding"]
            return ir.WalkResult.ADVANCE

        if single:
            module.walk(visit)


def run_passes(module: ir.Operation, pipeline: str) -> None:
    """Runs a pass pipeline on a module, in place."""
    with module.context:
        passmanager.PassManager.parse(pipeline).run(module)


def collectives_in(module: ir.Operation) -> list[CountedCollective]:
    """The collectives of a module that Shardy's export passes have already made explicit, from its `main`."""
    with module.context, ir.Location.unknown():
        reader = _Reader()
        functions = {}
        for op in _ops(module):
            if op.name == "sdy.mesh":
                reader.meshes[_symbol(op.attributes["sym_name"])] = _mesh_shape(op.attributes["mesh"])
            elif op.name == "func.func":
                functions[_symbol(op.attributes["sym_name"])] = op
        reader.functions = functions
        reader.region_ops(functions["main"], 1.0)
        return reader.found


@dataclass(slots=True)
class _Reader:
    meshes: dict[str, MeshShape] = field(default_factory=dict)
    functions: Mapping[str, ir.Operation] = field(default_factory=dict)
    found: list[CountedCollective] = field(default_factory=list)

    def region_ops(self, parent: ir.Operation, count: float) -> None:
        for region in parent.regions:
            for block in region.blocks:
                ops = [op.operation for op in block.operations]
                dead = _dead_reshards(ops)
                seen: set[tuple[object, ...]] = set()
                for i, op in enumerate(ops):
                    if i in dead:
                        continue
                    if op.name in _RESHARDS:
                        # The compiler merges equal reshardings of one value; Shardy does not.
                        key = (op.name, op.operands[0], tuple(str(op.attributes[a]) for a in sorted(op.attributes)))
                        if key in seen:
                            continue
                        seen.add(key)
                    self.op(op, count)

    def op(self, op: ir.Operation, count: float) -> None:
        if op.name in _SDY:
            for one in self.resharding(op):
                self.add(one, op, count, user=False)
        elif op.name in _STABLEHLO:
            self.add(self.user_collective(op), op, count, user=True)
        elif op.name == "func.call":
            self.region_ops(self.functions[_symbol(op.attributes["callee"])], count)
        elif op.name == "stablehlo.while":
            self.region_ops(op, count * trip_count(op))
        elif op.name not in ("stablehlo.reduce", "stablehlo.scatter", "stablehlo.sort"):
            self.region_ops(op, count)

    def add(self, one: Collective, op: ir.Operation, count: float, *, user: bool) -> None:
        self.found.append(CountedCollective(collective=one, count=count, source=_source(op), user=user))

    def resharding(self, op: ir.Operation) -> list[Collective]:
        """What the compiler makes of one: an all-to-all for each pair of dimensions, where Shardy fuses several."""
        sharding = sdy.TensorShardingAttr(op.attributes["out_sharding"])
        mesh = self.mesh_of(sharding)
        layout = self.layout(sharding, mesh)
        size = _local_bytes(op.results[0], layout)
        kind = _SDY[op.name]
        if op.name == "sdy.collective_permute":
            moved = [moved_axes(self.layout_of(op.operands[0], mesh), layout)]
        else:
            text = str(op.attributes[_AXES_ATTRIBUTE[op.name]])
            each = _ALL_TO_ALL.findall(text) if op.name == "sdy.all_to_all" else [text]
            moved = [{name for name, _, _ in _AXIS.findall(one)} for one in each]
            if op.name == "sdy.reduce_scatter":
                scattered = [_parts(dim, mesh) for dim in re.findall(r"\{([^}]*)\}", text)]
                size *= math.prod(p.size for dim in scattered for p in dim)
                if sum(bool(dim) for dim in scattered) > 1:
                    # The compiler forms none that slices several dimensions: an all-reduce and slices remain.
                    kind = "all_reduce"
        return [Collective(kind, tuple(a for a in mesh.axes if a in names), size) for names in moved]

    def user_collective(self, op: ir.Operation) -> Collective:
        kind = _STABLEHLO[op.name]
        values = op.operands if kind == "reduce_scatter" else op.results
        size = sum(_local_bytes(v, self.layout_of(v, None)) for v in values)
        mesh = next((m for m in self.meshes.values() if m.axes), None)
        if mesh is None:
            return Collective(kind, (), size)
        if kind == "collective_permute":
            pairs = np.array(ir.DenseIntElementsAttr(op.attributes["source_target_pairs"])).tolist()
            return Collective(kind, axes_of_pairs(pairs, mesh), size)
        groups = op.attributes["replica_groups"]
        if not isinstance(groups, ir.DenseIntElementsAttr):  # named axes, since jax 0.11
            return Collective(kind, tuple(_AXIS_NAME.findall(str(groups))), size)
        return Collective(kind, axes_of_groups(np.array(groups).tolist(), mesh), size)

    # -- shardings of values

    def mesh_of(self, sharding: sdy.TensorShardingAttr) -> MeshShape:
        ref = str(sharding.mesh_or_ref)
        return self.meshes[ref[1:].strip('"')] if ref.startswith("@") else _mesh_shape(sharding.mesh_or_ref)

    def layout(self, sharding: sdy.TensorShardingAttr, mesh: MeshShape) -> Layout:
        dims = [sdy.DimensionShardingAttr(d) for d in sharding.dimension_shardings]
        return [[p for axis in dim.axes for p in _parts(str(axis), mesh)] for dim in dims]

    def layout_of(self, value: Value, mesh: MeshShape | None) -> Layout:
        """How a value is split, from whatever defines it; not at all if nothing says so."""
        rank = len(ir.RankedTensorType(value.type).shape)
        attribute = _sharding_of(value)
        if attribute is None:
            return [[] for _ in range(rank)]
        sharding = sdy.TensorShardingAttr(attribute)
        layout = self.layout(sharding, mesh or self.mesh_of(sharding))
        return layout if len(layout) == rank else [[] for _ in range(rank)]


def trip_count(loop: ir.Operation) -> float:
    """How often a `stablehlo.while` runs: the constants that its counter starts from, stops at and steps by.

    1 where the condition is anything else than `counter < constant`.
    """
    condition, body = (loop.regions[i].blocks[0] for i in (0, 1))
    test = condition.operations[len(condition.operations) - 1].operands[0].owner
    test = test.operation if hasattr(test, "operation") else test
    if isinstance(test, ir.Block) or test.name != "stablehlo.compare":
        return 1.0
    counter = _block_argument(test.operands[0])
    if "LT" not in str(test.attributes["comparison_direction"]) or counter is None:
        return 1.0
    index = counter.arg_number
    yielded = body.operations[len(body.operations) - 1].operands
    start, stop = _constant(loop.operands[index]), _constant(test.operands[1])
    bound = _block_argument(test.operands[1])
    if stop is None and bound is not None:
        limit = bound.arg_number
        if yielded[limit] == body.arguments[limit]:
            stop = _constant(loop.operands[limit])
    add = yielded[index].owner
    step = None
    if not isinstance(add, ir.Block) and add.operation.name == "stablehlo.add":
        step = _constant(add.operation.operands[1])
    if start is None or stop is None or not step or step < 0:
        return 1.0
    return float(max(0, -(-(stop - start) // step)))


def _constant(value: Value) -> int | None:
    owner = value.owner
    if isinstance(owner, ir.Block) or owner.operation.name not in ("stablehlo.constant", "sdy.constant"):
        return None
    dense = owner.operation.attributes["value"]
    return int(np.array(dense).reshape(-1)[0]) if isinstance(dense, ir.DenseIntElementsAttr) else None


def _dead_reshards(ops: Sequence[ir.Operation]) -> set[int]:
    """The reshardings whose results nothing uses: Shardy leaves them, the compiler drops them."""
    index = {op: i for i, op in enumerate(ops)}
    dead: set[int] = set()
    for i in range(len(ops) - 1, -1, -1):
        if ops[i].name in _RESHARDS and all(
            index.get(use.owner.operation, -1) in dead for use in ops[i].results[0].uses
        ):
            dead.add(i)
    return dead


def _block_argument(value: Value) -> ir.BlockArgument[ir.Type] | None:
    """The value as an argument of a block, if it is one; before jax 0.10 its class does not say so."""
    return ir.BlockArgument(value) if isinstance(value.owner, ir.Block) else None


def _sharding_of(value: Value) -> ir.Attribute | None:
    argument = _block_argument(value)
    if argument is not None:
        parent, number = argument.owner.owner.operation, argument.arg_number
        if parent.name == "func.func":
            if "arg_attrs" not in parent.attributes:
                return None
            attributes = ir.DictAttr(ir.ArrayAttr(parent.attributes["arg_attrs"])[number])
            return attributes["sdy.sharding"] if "sdy.sharding" in attributes else None  # noqa: SIM401
        if parent.name == "sdy.manual_computation":
            return None  # what is split by hand is already in the type
        return _per_value(parent, "sdy.sharding", number)
    owner = cast(ir.OpView, value.owner).operation
    if "out_sharding" in owner.attributes:
        return owner.attributes["out_sharding"]
    name = "out_shardings" if owner.name == "sdy.manual_computation" else "sdy.sharding"
    return _per_value(owner, name, ir.OpResult(value).result_number)


def _per_value(op: ir.Operation, name: str, number: int) -> ir.Attribute | None:
    if name not in op.attributes:
        return None
    shardings = sdy.TensorShardingPerValueAttr(op.attributes[name]).shardings
    return shardings[number] if number < len(shardings) else None


def _local_bytes(value: Value, layout: Layout) -> float:
    tensor = ir.RankedTensorType(value.type)
    pieces = [math.prod(p.size for p in parts) for parts in layout]
    elements = math.prod(-(-n // k) for n, k in zip(tensor.shape, pieces, strict=True))
    return elements * _bits(str(tensor.element_type)) / 8


def _bits(element: str) -> int:
    if element == "i1":
        return 8
    if match := re.match(r"complex<[a-z]*(\d+)>", element):
        return 2 * int(match[1])
    match = re.match(r"[a-z]+(\d+)", element)
    return int(match[1]) if match else 0


def _parts(text: str, mesh: MeshShape) -> list[Part]:
    """The axes and parts of axes, `"x"` or `"x":(2)4`, in the text of an attribute."""
    return [Part(n, int(before or 1), int(size or mesh.size(n))) for n, before, size in _AXIS.findall(text)]


def _mesh_shape(attribute: ir.Attribute) -> MeshShape:
    axes = [sdy.MeshAxisAttr(a) for a in sdy.MeshAttr(attribute).axes]
    return MeshShape(tuple(a.name for a in axes), tuple(a.size for a in axes))


def _ops(parent: ir.Operation) -> Iterable[ir.Operation]:
    return (op.operation for op in parent.regions[0].blocks[0].operations)


def _symbol(attribute: ir.Attribute) -> str:
    return str(attribute).strip('@"')


def _source(op: ir.Operation) -> str:
    """`file:line` of the innermost frame of an op's location, else its name, else nothing."""
    text = str(op.location)
    if match := re.search(r'"([^"]*)":(\d+):\d+', text):
        return f"{match[1]}:{match[2]}"
    match = re.search(r'loc\("([^"]*)"', text)
    return match[1] if match else ""
