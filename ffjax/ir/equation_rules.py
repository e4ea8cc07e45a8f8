"""The op sharding rule of each equation of a jaxpr.

Our own rules come first, for the primitives that Shardy has none for (`ffjax.ir.extra_rules`). All other
distinct equations are lowered together, in one module, Shardy annotates it once, and each equation's ops
are composed into its one rule. Equations with sub-programs of their own (loops, branches, calls) are
not for this module: whoever walks the program handles them.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Hashable, Sequence

import jax
import numpy as np
from jax.extend.core import JaxprEqn
from jax.extend.mlir import ir

from ffjax.errors import FfjaxWarning
from ffjax.ir import compat
from ffjax.ir.compose import OPAQUE, Composition, Dims
from ffjax.ir.extra_rules import adjust, extra_rule, whole
from ffjax.ir.rules import OpShardingRule
from ffjax.ir.shardy import RuleReader

Key = Hashable

_WIDE = [np.dtype(name) for name in ("int64", "uint64", "float64", "complex128")]

# Rules are pure functions of their key, so they are kept for the life of the process: a second plan of the
# same program, or of one with the same layers, lowers nothing.
_KNOWN: dict[Key, OpShardingRule] = {}


def rules_for(eqns: Sequence[JaxprEqn]) -> list[OpShardingRule]:
    """One rule per equation: an operand per input (literals too, scalars as `()`), a result per output.

    An equation that cannot be lowered, or lowers to something without a rule, gets a rule under which it
    runs whole, and one `FfjaxWarning` per primitive names it and its source line.
    """
    keys = [_key(eqn) for eqn in eqns]
    new: dict[Key, JaxprEqn] = {}
    for key, eqn in zip(keys, eqns, strict=True):
        if key not in _KNOWN:
            new.setdefault(key, eqn)
    lowered: dict[Key, JaxprEqn] = {}
    for key, eqn in new.items():
        rule = extra_rule(eqn)
        if rule is None:
            lowered[key] = eqn
        else:
            _KNOWN[key] = rule
    unknown: dict[str, tuple[JaxprEqn, str]] = {}
    found = _lowered_rules(list(lowered.values()), unknown)
    for (key, eqn), rule in zip(lowered.items(), found, strict=True):
        _KNOWN[key] = adjust(eqn, rule)
    for name, (eqn, why) in unknown.items():
        warnings.warn(
            f"primitive {name!r} at {compat.source_line(eqn)} has no sharding rule ({why}), so it runs replicated on "
            f"every device; give it one with ffjax.ir.extra_rules.register_rule({name!r})",
            FfjaxWarning,
            stacklevel=2,
        )
    return [_KNOWN[key] for key in keys]


def _key(eqn: JaxprEqn) -> Key:
    avals = tuple((compat.shape_of(v), str(compat.dtype_of(v))) for v in eqn.invars)
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


def _lowered_rules(eqns: Sequence[JaxprEqn], unknown: dict[str, tuple[JaxprEqn, str]]) -> list[OpShardingRule]:
    """The rules of equations as Shardy has them. Halves the batch until what does not lower stands alone."""
    if not eqns:
        return []
    try:
        module = _lower(eqns)
    except Exception as error:  # whatever a primitive's own code raises: the plan gets slower, nothing crashes
        if len(eqns) > 1:
            half = len(eqns) // 2
            return _lowered_rules(eqns[:half], unknown) + _lowered_rules(eqns[half:], unknown)
        (eqn,) = eqns
        why = str(error).strip().split("\n")[0][:200]
        unknown.setdefault(eqn.primitive.name, (eqn, f"lowering it alone raised {type(error).__name__}: {why}"))
        return [whole(eqn)]
    reader = RuleReader(module)
    composition = Composition()
    results = reader.compose(composition)
    for i, value in enumerate(results):
        if value is None:  # the equation's result is a constant
            results[i] = ("constant", i)
            composition.declare(results[i], reader.functions["main"].result_shapes[i])
    composition.settle()
    rules, next_in, next_out = [], 0, 0
    for eqn in eqns:
        operands = [
            _logical(composition.values["main", next_in + i], compat.shape_of(v)) for i, v in enumerate(eqn.invars)
        ]
        outputs = [
            _logical(composition.values[results[next_out + i]], compat.shape_of(v)) for i, v in enumerate(eqn.outvars)
        ]
        next_in += len(eqn.invars)
        next_out += len(eqn.outvars)
        leaves = composition.factors.leaves(atom for dims in (*operands, *outputs) for dim in dims for atom in dim)
        if any(composition.factors.kind(leaf) & OPAQUE for leaf in leaves):
            unknown.setdefault(eqn.primitive.name, (eqn, "it lowers to an op that Shardy has no rule for"))
        rules.append(composition.factors.read(operands, outputs))
    return rules


def _logical(dims: Dims, shape: tuple[int, ...]) -> Dims:
    """Without the trailing dimensions that a random key has on the device only."""
    return dims[: len(shape)]


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
