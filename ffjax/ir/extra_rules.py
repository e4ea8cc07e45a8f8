"""Sharding rules for the primitives that Shardy has none for, and corrections where XLA does otherwise.

`register_rule` is also the way to give a rule to a primitive of your own.
"""

from __future__ import annotations

from collections.abc import Callable

from jax.extend.core import JaxprEqn

from ffjax.errors import RuleError
from ffjax.ir.compose import fit, replicated
from ffjax.ir.rules import OpShardingRule

Rule = Callable[[JaxprEqn], OpShardingRule | str]
Adjustment = Callable[[JaxprEqn, OpShardingRule], OpShardingRule]

_RULES: dict[str, Rule] = {}
_ADJUSTMENTS: dict[str, Adjustment] = {}


def register_rule(primitive: str, *, override: bool = False) -> Callable[[Rule], Rule]:
    """Gives a primitive a sharding rule, by name; the rule replaces whatever Shardy would say.

    The function takes the equation and returns an `OpShardingRule` or its text.

    Raises:
      RuleError: when the primitive has one already and `override` is not set.
    """

    def register(rule: Rule) -> Rule:
        if primitive in _RULES and not override:
            raise RuleError(f"primitive {primitive!r} has a sharding rule already; pass override=True to replace it")
        _RULES[primitive] = rule
        return rule

    return register


def extra_rule(eqn: JaxprEqn) -> OpShardingRule | None:
    """The registered rule of an equation, if its primitive has one."""
    rule = _RULES.get(eqn.primitive.name)
    if rule is None:
        return None
    found = rule(eqn)
    if isinstance(found, str):
        found = OpShardingRule.parse(found)
    return fit(found, *shapes(eqn))


def adjust(eqn: JaxprEqn, rule: OpShardingRule) -> OpShardingRule:
    """Shardy's rule, corrected where XLA's partitioner is known to do otherwise."""
    adjustment = _ADJUSTMENTS.get(eqn.primitive.name)
    return rule if adjustment is None else adjustment(eqn, rule)


def shapes(eqn: JaxprEqn) -> tuple[list[tuple[int, ...]], list[tuple[int, ...]]]:
    """The shapes of an equation's inputs and outputs."""
    return [tuple(v.aval.shape) for v in eqn.invars], [tuple(v.aval.shape) for v in eqn.outvars]
