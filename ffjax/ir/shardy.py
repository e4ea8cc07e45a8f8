"""Reading Shardy: the op sharding rules that the partitioner itself uses, for any StableHLO module.

Shardy annotates each op that it has a rule for (`sdy-populate-op-sharding-rules`). Some ops have none:
constants and iota (nothing comes in, so any piece of the result can be made in place), chlo's elementwise
ops (the partitioner only sees them decomposed into elementwise StableHLO), barriers, and calls, which are
walked into. What remains, loops above all, is opaque here: every dimension needs replication.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from jax.extend.mlir import ir, passmanager
from jax.extend.mlir.dialects import sdy

from ffjax.ir.compose import NEED_REPLICATION, OPAQUE, Composition, fit, replicated
from ffjax.ir.rules import DimFactors, OpShardingRule

_POPULATE = "builtin.module(func.func(sdy-populate-op-sharding-rules))"
_ATTRIBUTE = "sdy.sharding_rule"
_CALLS = {"func.call": "callee", "call": "callee", "stablehlo.composite": "decomposition"}
_RETURNS = ("func.return", "return")

# chlo ops that are not elementwise; all its others are, with operands and results of one shape.
_NOT_ELEMENTWISE = frozenset(
    {"chlo.ragged_dot", "chlo.scan", "chlo.top_k", "chlo.constant", "chlo.constant_like", "chlo.dynamic_reshape"}
)

# The ops whose result has dimensions that no operand has, any piece of which can be made in place. Elsewhere such
# a factor (of an irregular reshape, of a custom call) only says that Shardy does not know where it comes from.
_CREATES = frozenset({"stablehlo.broadcast_in_dim", "stablehlo.iota"})

Shape = tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Op:
    """One op of a function: its rule, or the callee that stands in its place, or its name if it is opaque.

    Values are numbered within the function; an operand of None is a constant.
    """

    operands: tuple[int | None, ...]
    results: tuple[int, ...]
    rule: OpShardingRule | None = None
    callee: str = ""
    opaque: str = ""


@dataclass(slots=True, kw_only=True)
class Function:
    """A function as a list of ops with their rules; argument `i` is value `i`."""

    arguments: tuple[Shape, ...]
    shapes: list[Shape]
    ops: list[Op] = field(default_factory=list)
    results: tuple[int | None, ...] = ()
    result_shapes: tuple[Shape, ...] = ()


class RuleReader:
    """The functions of a StableHLO module with the rule of each op; annotates the module in place."""

    def __init__(self, module: ir.Module) -> None:
        self._rules: dict[tuple[ir.Attribute, tuple[Shape, ...], bool], OpShardingRule] = {}
        self._types: dict[ir.Type, Shape] = {}
        with module.context:
            passmanager.PassManager.parse(_POPULATE).run(module.operation)
            self.functions = {
                ir.StringAttr(op.attributes["sym_name"]).value: self._function(op)
                for op in module.body.operations
                if op.operation.name == "func.func"
            }

    def compose(self, into: Composition, name: str = "main", arguments: Sequence[object] | None = None) -> list[object]:
        """Joins a function's ops into a composition; returns its results' value ids (None: a constant).

        Without `arguments` the function's own are declared, as `(name, index)`.
        """
        function = self.functions[name]
        call = object()
        ids: dict[int, object] = {}
        for i, shape in enumerate(function.arguments):
            if arguments is None:
                ids[i] = (name, i)
                into.declare(ids[i], shape)
            else:
                ids[i] = arguments[i]
        for op in function.ops:
            operands = [None if v is None else ids[v] for v in op.operands]
            if op.callee:
                ids.update(zip(op.results, self.compose(into, op.callee, operands), strict=True))
                continue
            results = [(call, v) for v in op.results]
            ids.update(zip(op.results, results, strict=True))
            if op.rule is not None:
                into.add(op.rule, operands, results, elements=math.prod(function.shapes[op.results[0]]))
                continue
            for result, v in zip(results, op.results, strict=True):
                into.declare(result, function.shapes[v], NEED_REPLICATION | OPAQUE)
            for operand in operands:
                for dim in into.values[operand] if operand is not None else ():
                    for atom in dim:
                        into.factors.mark(atom, NEED_REPLICATION | OPAQUE)
        return [None if v is None else ids[v] for v in function.results]

    def _function(self, func: ir.OpView) -> Function:
        block = func.regions[0].blocks[0]
        arguments = tuple(self._shape(a.type) for a in block.arguments)
        function = Function(arguments=arguments, shapes=list(arguments))
        numbers: dict[object, int | None] = {a: i for i, a in enumerate(block.arguments)}
        for view in block.operations:
            op = view.operation
            name = op.name
            if name in _RETURNS:
                function.results = tuple(numbers[v] for v in op.operands)
                function.result_shapes = tuple(self._shape(v.type) for v in op.operands)
                continue
            if name in ("stablehlo.constant", "chlo.constant"):
                numbers[op.results[0]] = None
                continue
            operands = tuple(numbers[v] for v in op.operands)
            results: list[int] = []
            for value in op.results:
                numbers[value] = len(function.shapes)
                results.append(len(function.shapes))
                function.shapes.append(self._shape(value.type))
            attributes = op.attributes
            if name in _CALLS:
                callee = ir.FlatSymbolRefAttr(attributes[_CALLS[name]]).value
                function.ops.append(Op(operands=operands, results=tuple(results), callee=callee))
                continue
            shapes = [self._shape(v.type) for v in op.operands], [function.shapes[r] for r in results]
            rule: OpShardingRule | None
            if _ATTRIBUTE in attributes:
                rule = self._read(attributes[_ATTRIBUTE], *shapes, creates=name in _CREATES)
            else:
                rule = _rule_without_shardy(name, *shapes)
            opaque = "" if rule is not None else name
            function.ops.append(Op(operands=operands, results=tuple(results), rule=rule, opaque=opaque))
        return function

    def _shape(self, kind: ir.Type) -> Shape:
        known = self._types.get(kind)
        if known is None:
            known = tuple(kind.shape) if isinstance(kind, ir.RankedTensorType) else ()
            self._types[kind] = known
        return known

    def _read(
        self, attribute: ir.Attribute, operands: Sequence[Shape], results: Sequence[Shape], *, creates: bool
    ) -> OpShardingRule:
        key = (attribute, (*operands, *results), creates)
        rule = self._rules.get(key)
        if rule is None:
            raw = read_rule(attribute)
            if not creates:
                taken = {f for value in raw.operands for dim in value for f in dim}
                new = {f for value in raw.results for dim in value for f in dim} - taken
                raw = replace(raw, need_replication=raw.need_replication | new)
            rule = self._rules[key] = fit(raw, operands, results)
        return rule


def read_rule(attribute: ir.Attribute) -> OpShardingRule:
    """A `#sdy.op_sharding_rule` attribute as data."""
    rule = sdy.OpShardingRuleAttr(attribute)

    def value(mapping: ir.Attribute) -> DimFactors:
        dims = sdy.TensorMappingAttr(mapping).dim_mappings
        return tuple(tuple(sdy.DimMappingAttr(dim).factor_indices) for dim in dims)

    results = tuple(value(m) for m in rule.result_mappings)
    permuted = frozenset(rule.permutation_factors)
    kept = permuted & {f for result in results for dim in result for f in dim}  # a window's is not, since jax 0.11
    return OpShardingRule(
        operands=tuple(value(m) for m in rule.operand_mappings),
        results=results,
        sizes=tuple(rule.factor_sizes),
        reduction=frozenset(rule.reduction_factors),
        need_replication=frozenset(rule.need_replication_factors) | (permuted - kept),
        permutation=kept,
    )


def _rule_without_shardy(name: str, operands: Sequence[Shape], results: Sequence[Shape]) -> OpShardingRule | None:
    """The rule of an op that Shardy has none for, or None where it is opaque."""
    if name == "stablehlo.iota":
        return each(results, [])
    if name in ("stablehlo.optimization_barrier", "sdy.sharding_constraint"):
        return each(results, operands)
    if name == "chlo.top_k":
        return last_replicated(operands, results)
    if name.startswith("chlo.") and name not in _NOT_ELEMENTWISE:
        return elementwise(operands, results)
    scalars = all(not shape for shape in (*operands, *results))
    if scalars or all(0 in shape for shape in results):  # an array without elements costs nothing whole
        return replicated(operands, results)
    return None


def each(results: Sequence[Shape], operands: Sequence[Shape]) -> OpShardingRule:
    """Operand `i` is result `i`; or, without operands, any piece of any result can be made in place."""
    values: list[DimFactors] = []
    sizes: list[int] = []
    for shape in results:
        values.append(tuple((len(sizes) + d,) for d in range(len(shape))))
        sizes += shape
    inputs = tuple(values) if operands else ()
    return fit(OpShardingRule(operands=inputs, results=tuple(values), sizes=tuple(sizes)), operands, results)


def elementwise(operands: Sequence[Shape], results: Sequence[Shape]) -> OpShardingRule | None:
    """Every operand and result has one shape, up to dimensions of size 1, or is a scalar; None if that is not so."""
    shape = results[0]
    dims = tuple((d,) for d in range(len(shape)))
    if any(s != shape for s in results) or any(len(s) not in (0, len(shape)) for s in operands):
        return None
    if any(n not in (1, m) for s in operands for n, m in zip(s, shape, strict=False)):
        return None
    rule = OpShardingRule(
        operands=tuple(dims[: len(s)] for s in operands), results=tuple(dims[: len(s)] for s in results), sizes=shape
    )
    return fit(rule, operands, results)


def last_replicated(
    operands: Sequence[Shape], results: Sequence[Shape], *, last: int = 1, batch: int | None = None
) -> OpShardingRule:
    """Leading dimensions are a shared batch, the others need replication.

    Args:
      operands, results: the shapes; values with fewer dimensions than the batch get only its first ones.
      last: how many dimensions of the first operand are no batch; ignored when `batch` is given.
      batch: how many leading dimensions are the batch.
    """
    first = operands[0]
    batch = len(first) - last if batch is None else batch
    sizes = list(first[:batch])
    need: list[int] = []

    def value(shape: Shape) -> DimFactors:
        dims: list[tuple[int, ...]] = []
        for d, n in enumerate(shape):
            if d < batch and n == first[d]:
                dims.append((d,))
            else:
                need.append(len(sizes))
                sizes.append(n)
                dims.append((need[-1],))
        return tuple(dims)

    inputs, outputs = tuple(value(s) for s in operands), tuple(value(s) for s in results)
    rule = OpShardingRule(operands=inputs, results=outputs, sizes=tuple(sizes), need_replication=frozenset(need))
    return fit(rule, operands, results)
