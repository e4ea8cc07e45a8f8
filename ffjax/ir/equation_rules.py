"""The op sharding rule of each equation of a jaxpr.

Our own rules come first, for the primitives that Shardy has none for (`ffjax.ir.extra_rules`). All other
distinct equations are lowered together, in one module, Shardy annotates it once, and each equation's ops
are composed into its one rule. Equations with sub-programs of their own (loops, branches, calls) are
not for this module: whoever walks the program handles them.
"""

from __future__ import annotations

import contextlib
import math
import warnings
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import jax
import numpy as np
from jax.extend.core import JaxprEqn
from jax.extend.mlir import ir

from ffjax.errors import FfjaxWarning
from ffjax.ir import compat
from ffjax.ir.compose import NEED_REPLICATION, OPAQUE, Composition, Dims
from ffjax.ir.extra_rules import adjust, extra_rule, whole
from ffjax.ir.rules import OpShardingRule
from ffjax.ir.shardy import RuleReader

Key = Hashable

_WIDE = [np.dtype(name) for name in ("int64", "uint64", "float64", "complex128")]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Found:
    rule: OpShardingRule
    unknown: str = ""
    """Why the equation runs whole, if that is not by a rule's choice."""


# What Shardy says is a pure function of the key, so it is kept for the life of the process: a second plan of
# the same program, or of one with the same layers, lowers nothing.
_KNOWN: dict[Key, _Found] = {}


def rules_for(eqns: Sequence[JaxprEqn]) -> list[OpShardingRule]:
    """One rule per equation: an operand per input (literals too, scalars as `()`), a result per output.

    An equation that cannot be lowered, or lowers to something without a rule, gets a rule under which it
    runs whole, and one `FfjaxWarning` per primitive names it and its source line.
    """
    keys = [_key(eqn) for eqn in eqns]
    distinct = dict(zip(reversed(keys), reversed(eqns), strict=True))
    rules = {key: rule for key, eqn in distinct.items() if (rule := extra_rule(eqn)) is not None}
    lowered = [key for key in distinct if key not in rules]
    new = [key for key in lowered if key not in _KNOWN]
    _KNOWN.update(zip(new, _lowered_rules([distinct[key] for key in new]), strict=True))
    warned: set[str] = set()
    for key in lowered:
        eqn, found = distinct[key], _KNOWN[key]
        rules[key] = found.rule
        name = eqn.primitive.name
        if found.unknown and name not in warned:
            warned.add(name)
            warnings.warn(
                f"primitive {name!r} at {compat.source_line(eqn)} has no sharding rule ({found.unknown}), so it runs "
                f"whole on every device; give it one with ffjax.ir.extra_rules.register_rule({name!r})",
                FfjaxWarning,
                stacklevel=2,
            )
    return [rules[key] for key in keys]


def alike(eqns: Sequence[JaxprEqn]) -> list[int]:
    """A number for each equation; equal ones have the same primitive, parameters, and shapes and dtypes of operands."""
    numbers: dict[Key, int] = {}
    return [numbers.setdefault(_key(eqn), len(numbers)) for eqn in eqns]


def _key(eqn: JaxprEqn) -> Key:
    avals = tuple([(compat.shape_of(v), compat.dtype_of(v)) for v in eqn.invars])
    params = tuple(eqn.params.items())
    try:
        hash(params)
    except TypeError:
        # Equal text of such parameters does not prove them equal; the equation itself, kept alive, does.
        return (eqn.primitive.name, avals, _Same(eqn))
    return (eqn.primitive.name, avals, params)


class _Same:
    """A hashable stand-in for an equation: equal only to itself."""

    __slots__ = ("eqn",)

    def __init__(self, eqn: JaxprEqn) -> None:
        self.eqn = eqn

    def __hash__(self) -> int:
        return id(self.eqn)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Same) and other.eqn is self.eqn


def _lowered_rules(eqns: Sequence[JaxprEqn]) -> list[_Found]:
    """The rules of equations as Shardy has them. Halves the batch until what does not lower stands alone."""
    if not eqns:
        return []
    try:
        module = _lower(eqns)
    except Exception as error:  # whatever a primitive's own code raises: the plan gets slower, nothing crashes
        if len(eqns) > 1:
            half = len(eqns) // 2
            return _lowered_rules(eqns[:half]) + _lowered_rules(eqns[half:])
        why = str(error).strip().split("\n")[0][:200]
        return [_Found(rule=whole(eqns[0]), unknown=f"lowering it alone raised {type(error).__name__}: {why}")]
    reader = RuleReader(module)
    composition = Composition()
    results = reader.compose(composition)
    for i, value in enumerate(results):
        if value is None:  # the equation's result is a constant
            results[i] = ("constant", i)
            composition.declare(results[i], reader.functions["main"].result_shapes[i])
    composition.settle()
    values, factors, sums = composition.values, composition.factors, composition.sums()
    sources = iter(range(len(reader.functions["main"].arguments)))
    targets = iter(results)
    found = []
    for eqn in eqns:
        operands = [_logical(values["main", next(sources)], v) for v in eqn.invars]
        outputs = [_logical(values[next(targets)], v) for v in eqn.outvars]
        leaves = factors.leaves(atom for dims in (*operands, *outputs) for dim in dims for atom in dim)
        sizes = {math.prod(compat.shape_of(v)) for v in eqn.outvars}
        for leaf in leaves:
            # Partial sums of an inner array are added up there, and what that moves is not what the result would.
            if not sums.get(leaf, sizes) <= sizes:
                factors.mark(leaf, NEED_REPLICATION)
        if any(factors.kind(leaf) & OPAQUE for leaf in leaves):
            found.append(_Found(rule=whole(eqn), unknown="it lowers to an op that Shardy has none for"))
        else:
            found.append(_Found(rule=adjust(eqn, factors.read(operands, outputs))))
    return found


def _logical(dims: Dims, var: compat.Var | compat.Literal) -> Dims:
    """Without the trailing dimensions that a random key has on the device only."""
    return dims[: len(compat.shape_of(var))]


def _lower(eqns: Sequence[JaxprEqn]) -> ir.Module:
    """All equations in one function, each on arguments of its own."""
    avals = [jax.ShapeDtypeStruct(compat.shape_of(v), compat.dtype_of(v)) for eqn in eqns for v in eqn.invars]

    def body(*args: jax.Array) -> list[jax.Array]:
        results: list[jax.Array] = []
        start = 0
        for eqn in eqns:
            operands = args[start : start + len(eqn.invars)]
            start += len(eqn.invars)
            results += compat.bind(eqn, operands)
        return results

    wide = any(a.dtype in _WIDE for a in avals)
    with jax.enable_x64(True) if wide else contextlib.nullcontext():
        lowered = jax.jit(body, keep_unused=True).trace(*avals).lower(lowering_platforms=("cpu",))
        module: ir.Module = lowered.compiler_ir("stablehlo")
        return module
