"""Sharding rules for the primitives that Shardy has none for, and corrections where XLA does otherwise.

`register_rule` is also the way to give a rule to a primitive of your own. The corrections only ever
take freedom away: a factor that XLA's partitioner is seen to replicate, whatever Shardy's rule says,
needs replication, so that a plan's costs are those of the program that runs. Some ops the partitioner
cannot split at all though each piece is the same op again: they run on pieces, inside `shard_map`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace

from jax.extend.core import JaxprEqn

from ffjax.errors import RuleError
from ffjax.ir.compat import dtype_of, shape_of, threefry_is_partitionable
from ffjax.ir.compose import fit, replicated
from ffjax.ir.halo import with_halos
from ffjax.ir.manual import NAME, manual_rule
from ffjax.ir.rules import OpShardingRule
from ffjax.ir.shardy import Shape, each, elementwise, last_replicated

Rule = Callable[[JaxprEqn], OpShardingRule | str]
Adjustment = Callable[[JaxprEqn, OpShardingRule], OpShardingRule]

Params = dict[str, object]
PieceParams = Callable[[JaxprEqn, Sequence[Shape]], Params]

_RULES: dict[str, Rule] = {}
_ADJUSTMENTS: dict[str, Adjustment] = {}
_ON_PIECES: dict[str, PieceParams] = {}


def register_rule(primitive: str, *, override: bool = False, on_pieces: bool = False) -> Callable[[Rule], Rule]:
    """Gives a primitive a sharding rule, by name; the rule replaces whatever Shardy would say.

    The function takes the equation and returns an `OpShardingRule` or its text, with one operand for
    each of the equation's inputs (scalars and literals too) and one result for each of its outputs.

    Args:
      primitive: its name in a jaxpr.
      override: replace the rule that it has.
      on_pieces: run it inside `shard_map`, with the same parameters on each device's pieces, and add up what the
        rule's reduction factors leave apart. For what XLA's partitioner cannot split: custom calls, kernels.

    Raises:
      RuleError: when the primitive has one already and `override` is not set.

    >>> @register_rule("my_row_norm")
    ... def rule(eqn):
    ...     rows, columns = eqn.invars[0].aval.shape
    ...     return f"([i, j])->([i, j]) {{i={rows}, j={columns}}} need_replication={{j}}"
    """

    def register(rule: Rule) -> Rule:
        if primitive in _RULES and not override:
            raise RuleError(f"primitive {primitive!r} has a sharding rule already; pass override=True to replace it")
        _RULES[primitive] = rule
        _ON_PIECES.pop(primitive, None)
        if on_pieces:
            _ON_PIECES[primitive] = _same_params
        return rule

    return register


def runs_on_pieces(eqn: JaxprEqn) -> bool:
    """Whether an equation runs inside `shard_map` where it is split, as the partitioner cannot split it."""
    name = eqn.primitive.name
    return name in _ON_PIECES and (name != "conv_general_dilated" or _groups(eqn) > 1)


def piece_params(eqn: JaxprEqn, pieces: Sequence[Shape]) -> Params:
    """The parameters with which an equation runs on pieces of its inputs, of these shapes."""
    return _ON_PIECES.get(eqn.primitive.name, _same_params)(eqn, pieces)


def _same_params(eqn: JaxprEqn, pieces: Sequence[Shape]) -> Params:
    return dict(eqn.params)


def register_adjustment(primitive: str) -> Callable[[Adjustment], Adjustment]:
    """Corrects Shardy's rule of a primitive: the function takes the equation and that rule.

    Raises:
      RuleError: when the primitive has one already.
    """

    def register(adjustment: Adjustment) -> Adjustment:
        if primitive in _ADJUSTMENTS:
            raise RuleError(f"primitive {primitive!r} has an adjustment already")
        _ADJUSTMENTS[primitive] = adjustment
        return adjustment

    return register


def has_own_rule(eqn: JaxprEqn) -> bool:
    """Whether a rule is registered for an equation's primitive, so that it stays one equation."""
    return eqn.primitive.name in _RULES


def extra_rule(eqn: JaxprEqn) -> OpShardingRule | None:
    """The registered rule of an equation, if its primitive has one.

    Raises:
      RuleError: when the rule does not fit the equation's inputs and outputs.
    """
    if eqn.primitive.name == NAME:
        return manual_rule(eqn)
    rule = _RULES.get(eqn.primitive.name)
    if rule is None:
        return None
    found = rule(eqn)
    try:
        return fit(OpShardingRule.parse(found) if isinstance(found, str) else found, *shapes(eqn))
    except ValueError as error:
        raise RuleError(
            f"the sharding rule registered for {eqn.primitive.name!r}, {str(found)!r}, does not fit its inputs and "
            f"outputs {shapes(eqn)}; write one entry for each input and output, and one for each of its dimensions"
        ) from error


def adjust(eqn: JaxprEqn, rule: OpShardingRule) -> OpShardingRule:
    """Shardy's rule, corrected where XLA's partitioner is known to do otherwise."""
    adjustment = _ADJUSTMENTS.get(eqn.primitive.name)
    return with_halos(eqn, rule if adjustment is None else adjustment(eqn, rule))


def shapes(eqn: JaxprEqn) -> tuple[list[Shape], list[Shape]]:
    """The shapes of an equation's inputs and outputs; what is no array has none."""
    return [shape_of(v) for v in eqn.invars], [shape_of(v) for v in eqn.outvars]


def whole(eqn: JaxprEqn) -> OpShardingRule:
    """The rule under which an equation runs whole on every device."""
    return replicated(*shapes(eqn))


def demote(rule: OpShardingRule, factors: Iterable[int]) -> OpShardingRule:
    """The rule with these factors needing replication."""
    lost = frozenset(factors)
    return replace(
        rule,
        reduction=rule.reduction - lost,
        permutation=rule.permutation - lost,
        need_replication=rule.need_replication | lost,
    )


# --- rules ---------------------------------------------------------------------------------------------------


def _elementwise(eqn: JaxprEqn) -> OpShardingRule:
    return elementwise(*shapes(eqn)) or whole(eqn)


# Each lowers to a loop, which Shardy takes for a black box. These loop until all elements have converged: on pieces,
# or every trip would ask all devices.
for _name in ("igamma", "igammac", "igamma_grad_a", "regularized_incomplete_beta"):
    register_rule(_name, on_pieces=True)(_elementwise)

for _name in (
    "threefry2x32",
    "threefry4x32",
    "philox2x32",
    "philox4x32",
    "random_fold_in",
):
    register_rule(_name)(_elementwise)


def _each(eqn: JaxprEqn) -> OpShardingRule:
    inputs, outputs = shapes(eqn)
    return each(outputs, inputs)


for _name in ("device_put", "sharding_constraint", "reshard", "layout_constraint", "optimization_barrier"):
    register_rule(_name)(_each)

# Their results depend on where they run, or they have effects: once, on everything.
for _name in (
    "pure_callback",
    "io_callback",
    "debug_callback",
    "debug_print",
    "rng_bit_generator",
    "rng_uniform",
    "random_gamma",
):
    register_rule(_name)(whole)


def _matrix_batch(eqn: JaxprEqn) -> OpShardingRule:
    """Leading dimensions are a batch of matrices."""
    return last_replicated(*shapes(eqn), last=2)


register_rule("lu")(_matrix_batch)


@register_rule("lu_pivots_to_permutation")
def _vector_batch(eqn: JaxprEqn) -> OpShardingRule:
    return last_replicated(*shapes(eqn), last=1)


@register_rule("random_wrap")
@register_rule("random_unwrap")
def _key_data(eqn: JaxprEqn) -> OpShardingRule:
    """The dimensions that keys have as words on the device stay together."""
    inputs, outputs = shapes(eqn)
    return last_replicated(inputs, outputs, batch=min(len(inputs[0]), len(outputs[0])))


@register_rule("random_bits")
@register_rule("random_split")
def _random(eqn: JaxprEqn) -> OpShardingRule:
    """Each bit is a function of the key and its own index, so any piece of the result is made in place.

    That is threefry's partitionable form (JAX's default); other generators draw one sequence.
    """
    inputs, outputs = shapes(eqn)
    if "fry" not in str(dtype_of(eqn.invars[0])) or not threefry_is_partitionable():
        return whole(eqn)
    batch = len(inputs[0])
    sizes = outputs[0]
    dims = tuple((d,) for d in range(len(sizes)))
    return OpShardingRule(operands=(dims[:batch],), results=(dims,), sizes=sizes)


@register_rule("iota_2x32_shape")
def _iota_2x32(eqn: JaxprEqn) -> OpShardingRule:
    _, outputs = shapes(eqn)
    dims = tuple((d,) for d in range(len(outputs[0])))
    return OpShardingRule(operands=(), results=(dims, dims), sizes=outputs[0])


# --- corrections ---------------------------------------------------------------------------------------------


def _cumulative(eqn: JaxprEqn, rule: OpShardingRule) -> OpShardingRule:
    """Shardy takes the window for a halo, but it is the whole axis: XLA gathers it."""
    return demote(rule, rule.operands[0][eqn.params["axis"]])


for _name in ("cumsum", "cumprod", "cummax", "cummin", "cumlogsumexp"):
    register_adjustment(_name)(_cumulative)


@register_adjustment("reduce")
def _reduce(eqn: JaxprEqn, rule: OpShardingRule) -> OpShardingRule:
    """XLA cannot all-reduce with a function of the user's; partial results of several operands it gathers."""
    return demote(rule, rule.reduction) if len(eqn.outvars) == 1 else rule


@register_adjustment("reduce_xor")
@register_adjustment("reduce_and")
@register_adjustment("reduce_or")
def _reduce_bits(eqn: JaxprEqn, rule: OpShardingRule) -> OpShardingRule:
    """XLA can all-reduce predicates with and/or, but no other bits."""
    logical = str(dtype_of(eqn.invars[0])) == "bool" and eqn.primitive.name != "reduce_xor"
    return rule if logical else demote(rule, rule.reduction)


# XLA's partitioner gathers every dimension of these, those of the batch too.
_ON_PIECES["fft"] = _ON_PIECES["top_k"] = _same_params


@register_adjustment("fft")
def _fft(eqn: JaxprEqn, rule: OpShardingRule) -> OpShardingRule:
    return demote(rule, _factors_beyond(rule, len(shape_of(eqn.invars[0])) - len(eqn.params["fft_lengths"])))


@register_adjustment("top_k")
def _top_k(eqn: JaxprEqn, rule: OpShardingRule) -> OpShardingRule:
    axis = eqn.params.get("axis", -1)
    kept = {f for d, dim in enumerate(rule.operands[0]) for f in dim if d != axis % len(rule.operands[0])}
    return demote(rule, set(range(len(rule.sizes))) - kept)


def _factors_beyond(rule: OpShardingRule, batch: int) -> set[int]:
    """All factors but those of the first operand's batch dimensions."""
    return set(range(len(rule.sizes))) - {f for dim in rule.operands[0][:batch] for f in dim}


def _groups(eqn: JaxprEqn) -> int:
    groups: int = eqn.params["feature_group_count"] * eqn.params["batch_group_count"]
    return groups


def _grouped_pieces(eqn: JaxprEqn, pieces: Sequence[Shape]) -> Params:
    """A piece of a grouped convolution has the groups that lie in it."""
    numbers = eqn.params["dimension_numbers"]
    params = dict(eqn.params)
    for name, dim in (("feature_group_count", numbers.lhs_spec[1]), ("batch_group_count", numbers.lhs_spec[0])):
        params[name] = max(1, params[name] * pieces[0][dim] // shape_of(eqn.invars[0])[dim])
    return params


_ON_PIECES["conv_general_dilated"] = _grouped_pieces


@register_adjustment("conv_general_dilated")
def _convolution(eqn: JaxprEqn, rule: OpShardingRule) -> OpShardingRule:
    """Factors that Shardy splits and XLA's partitioner cannot.

    It gathers everything for grouped convolutions and gets some depthwise ones wrong: they run on pieces. In all others
    it cannot split the window in the place of the patches, which Shardy allows past one patch per device. A kernel's
    gradient it sums over all devices, whatever it is split over, where patches are split. What pieces of an image can
    do with their neighbours' edges, `ffjax.ir.halo` adds to this.
    """
    numbers = eqn.params["dimension_numbers"]
    image, kernel, result = rule.operands[0], rule.operands[1], rule.results[0]
    if _groups(eqn) > 1:
        grouped = image[numbers.lhs_spec[1 if eqn.params["feature_group_count"] > 1 else 0]]
        if not grouped or rule.sizes[grouped[0]] != _groups(eqn):
            return demote(rule, range(len(rule.sizes)))
        specs = (image, numbers.lhs_spec), (kernel, numbers.rhs_spec), (result, numbers.out_spec)
        return demote(rule, {f for value, spec in specs for d in spec[2:] for f in value[d]})
    patches_summed = {f for d in numbers.lhs_spec[2:] for f in image[d]}
    lost = set(rule.reduction & patches_summed)
    spatial = zip(numbers.lhs_spec[2:], numbers.rhs_spec[2:], numbers.out_spec[2:], strict=True)
    for (d, k, o), dilation in zip(spatial, eqn.params["rhs_dilation"], strict=True):
        # The gradient of a strided kernel has its patches where a forward convolution has its window.
        patches = kernel[k] if dilation > 1 else result[o]
        if len(image[d]) > 1:
            lost.update(image[d][1:] if image[d][0] in patches else image[d])
    return demote(rule, lost)


@register_adjustment("dynamic_update_slice")
def _update(eqn: JaxprEqn, rule: OpShardingRule) -> OpShardingRule:
    """XLA updates a single row in place; for several it gathers the dimension that they are written along."""
    operand, update = (shape_of(v) for v in eqn.invars[:2])
    partial = [d for d, (n, m) in enumerate(zip(operand, update, strict=True)) if 1 < m < n]
    return demote(rule, (f for d in partial for f in rule.operands[0][d]))
