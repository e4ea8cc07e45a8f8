"""Each op sharding rule against XLA's partitioner: the golden text, and every factor split on devices.

A factor is proved by running its equation with that factor split in two and nothing else: the compiled
program may only communicate as the factor's kind says, and must compute what the whole one does.
"""

from __future__ import annotations

import itertools
import math
import pathlib
import re
import sys
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend import core
from jax.interpreters import mlir
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import ffjax
from ffjax.emit.pieces import bind_on_pieces, image_cuts, with_edges
from ffjax.errors import FfjaxWarning, RuleError
from ffjax.ir import compat, equation_rules
from ffjax.ir.compat import JaxprEqn, Literal
from ffjax.ir.equation_rules import rules_for
from ffjax.ir.extra_rules import register_rule, runs_on_pieces
from ffjax.ir.inline import inline
from ffjax.ir.rules import DimFactors, OpShardingRule

sys.path.insert(0, str(pathlib.Path(__file__).parent))
from rule_cases import CASES, Case

RECORDED = (0, 10)
"""The release of JAX whose rules the golden file has."""
GOLDEN = pathlib.Path(__file__).parent / "golden" / "rules.txt"
ALLOWED = {
    "pass-through": frozenset(),
    "reduction": frozenset({"all-reduce"}),
    "permutation": frozenset({"collective-permute"}),
}
_COLLECTIVE = re.compile(
    r" (all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute|collective-broadcast)(?:-start)?\("
)


@pytest.fixture(scope="module")
def golden() -> dict[str, str]:
    lines = GOLDEN.read_text().splitlines() if GOLDEN.exists() else []
    return dict(line.split(": ", 1) for line in lines if line)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name.replace(" ", "_"))
def test_rule(case: Case, golden: dict[str, str]) -> None:
    eqn, operands = equation(case)
    (rule,) = rules_for([eqn])
    if (
        jax.__version_info__[:2] == RECORDED
    ):  # what Shardy knows differs a little between releases; what is proved does not
        assert golden.get(case.name) == str(rule), f"paste into tests/golden/rules.txt:\n{case.name}: {rule}"
        assert set(case.communicates) <= {letter(rule, f) for f in range(len(rule.sizes))}
    for factor in range(len(rule.sizes)):
        prove(case, eqn, operands, rule, factor)


def test_every_golden_line_has_a_case(golden: dict[str, str]) -> None:
    assert sorted(golden) == sorted(case.name for case in CASES)


def equation(case: Case) -> tuple[JaxprEqn, list[jax.Array]]:
    """The case's equation with concrete operands: the equations before it are run."""
    rng = np.random.default_rng(0)
    args = [arg.value(rng) for arg in case.args]
    jaxpr, consts = inline(jax.make_jaxpr(case.fn)(*args))
    env = dict(zip(jaxpr.invars, [*consts, *args], strict=True))
    for eqn in jaxpr.eqns:
        operands = [v.val if isinstance(v, Literal) else env[v] for v in eqn.invars]
        if eqn.primitive.name == case.primitive:
            return eqn, operands
        env.update(zip(eqn.outvars, compat.bind(eqn, operands), strict=True))
    raise AssertionError(f"{case.name} traces to {[e.primitive.name for e in jaxpr.eqns]}")


def letter(rule: OpShardingRule, factor: int) -> str:
    """The factor's name in the rule's text."""
    sizes = re.search(r"\{([^}]*)\}", str(rule))
    assert sizes is not None
    return sizes[1].split(", ")[factor].split("=")[0]


def kind(rule: OpShardingRule, factor: int) -> str:
    if factor in rule.need_replication:
        return "need-replication"
    if factor in rule.reduction:
        return "reduction"
    return "permutation" if factor in rule.permutation else "pass-through"


def splits(rule: OpShardingRule, factor: int) -> dict[int, int] | None:
    """How many ways each factor is split: the one to prove in two, those major to it wholly.

    A dimension is split from its major end. None: a factor in the way cannot be split.
    """
    ways = {factor: 2}
    pending = [factor]
    while pending:
        this = pending.pop()
        for dim in itertools.chain.from_iterable(rule.operands + rule.results):
            for major in dim[: dim.index(this)] if this in dim else ():
                if kind(rule, major) == "need-replication":
                    return None
                if ways.get(major) != rule.sizes[major]:
                    ways[major] = rule.sizes[major]
                    pending.append(major)
    return ways


def prove(case: Case, eqn: JaxprEqn, operands: list[jax.Array], rule: OpShardingRule, factor: int) -> None:
    """Runs the equation with the factor split and looks at what XLA did."""
    ways = None if kind(rule, factor) == "need-replication" else splits(rule, factor)
    if ways is None:
        return
    where = f"{case.name}: {rule}, factor {letter(rule, factor)}"
    assert rule.sizes[factor] % 2 == 0, f"{where} is odd: choose another shape for the row"
    devices = math.prod(ways.values())
    assert devices <= 8, f"{where} needs {devices} devices: choose smaller major factors for the row"
    # One more axis, which splits nothing: XLA must not mistake all devices for those that share a sum.
    idle = 2 if devices <= 4 else 1
    grid = np.array(jax.devices()[: devices * idle]).reshape(*ways.values(), idle)
    mesh = Mesh(grid, [*(f"f{f}" for f in ways), "idle"])

    def sharding(value: DimFactors) -> NamedSharding:
        axes = [tuple(f"f{f}" for f in dim if f in ways and f not in reduced) for dim in value]
        return NamedSharding(mesh, PartitionSpec(*(a or None for a in axes)))

    reduced: set[int] = set()
    inputs = [sharding(v) for v in rule.operands]
    reduced = set(rule.reduction)
    outputs = [sharding(v) for v in rule.results]
    expected = compat.bind(eqn, operands)
    summed = tuple(f"f{f}" for f in ways if f in reduced)

    def run(*args: jax.Array) -> list[jax.Array]:
        cuts = image_cuts(eqn, [s.spec for s in inputs], mesh)
        if not runs_on_pieces(eqn) and not cuts:
            return compat.bind(eqn, args)
        if cuts:
            image = cuts[0].halo.operand
            edged = with_edges(eqn, args[image], mesh, inputs[image].spec)
            args = (*args[:image], edged, *args[image + 1 :])
        return bind_on_pieces(eqn, args, mesh, [s.spec for s in inputs], [s.spec for s in outputs], summed)

    split = jax.jit(run, in_shardings=inputs, out_shardings=outputs)
    compiled = split.lower(*operands).compile()
    allowed = frozenset().union(*(ALLOWED[kind(rule, f)] for f in ways))
    allowed |= case.communicates.get(letter(rule, factor), frozenset())
    found = set(_COLLECTIVE.findall(compiled.as_text()))
    assert found <= allowed, f"{where}: XLA emits {sorted(found)}\n{compiled.as_text()}"
    if kind(rule, factor) == "reduction":
        assert found, f"{where}: XLA emits no collective"
    placed = [jax.device_put(x, s) for x, s in zip(operands, inputs, strict=True)]
    for whole, pieces, value in zip(expected, compiled(*placed), rule.results, strict=True):
        for d, dim in enumerate(value):
            n = math.prod(ways.get(f, 1) for f in dim if f not in rule.reduction)
            assert pieces.sharding.shard_shape(pieces.shape)[d] * n == whole.shape[d], f"{where}: pieces of the result"
        np.testing.assert_allclose(data(pieces), data(whole), rtol=case.tolerance, atol=case.tolerance, err_msg=where)


def data(x: jax.Array) -> np.ndarray:
    """The numbers of an array, of random keys too."""
    return np.asarray(jax.random.key_data(x) if jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key) else x)


def primitive(name: str, *, lowers: bool = False) -> core.Primitive:
    """A primitive of a user's own, elementwise in fact."""
    new = core.Primitive(name)
    new.def_abstract_eval(lambda x: x)
    if lowers:
        mlir.register_lowering(new, mlir.lower_fun(jnp.sin, multiple_results=False))
    return new


def equations(fn: Callable[..., object], *shapes: tuple[int, ...]) -> list[JaxprEqn]:
    return list(jax.make_jaxpr(fn)(*(jax.ShapeDtypeStruct(s, jnp.float32) for s in shapes)).jaxpr.eqns)


def test_own_primitive_needs_no_rule_if_it_lowers() -> None:
    eqns = equations(primitive("own_lowers", lowers=True).bind, (4, 6))
    assert [str(r) for r in rules_for(eqns)] == ["([i, j])->([i, j]) {i=4, j=6}"]


def test_unknown_primitive_runs_whole_with_one_warning_that_names_it_and_its_line() -> None:
    unknown = primitive("own_unknown")
    eqns = equations(lambda x, y: (unknown.bind(x) + 1, unknown.bind(y)), (4, 6), (8,))
    for _ in range(2):  # a second plan in the same process is told too
        with pytest.warns(FfjaxWarning, match=r"'own_unknown' at .*test_rules.py:\d+ has no sharding rule") as told:
            rules = rules_for(eqns)
        assert len(told) == 1
        assert [str(r) for r in rules] == [
            "([k, l])->([i, j]) {i=4, j=6, k=4, l=6} need_replication={i, j, k, l}",
            "([i, j], [])->([i, j]) {i=4, j=6}",
            "([j])->([i]) {i=8, j=8} need_replication={i, j}",
        ]


def test_registered_rule_is_used_and_checked() -> None:
    eqns = equations(primitive("own_rule").bind, (4, 6))
    register_rule("own_rule")(lambda eqn: "([i, j])->([i, j]) {i=4, j=6}")
    assert [str(r) for r in rules_for(eqns)] == ["([i, j])->([i, j]) {i=4, j=6}"]
    with pytest.raises(RuleError, match="override=True"):
        register_rule("own_rule")(lambda eqn: "")
    register_rule("own_rule", override=True)(lambda eqn: "([i])->([i]) {i=4}")
    with pytest.raises(RuleError, match="one entry for each input"):
        rules_for(eqns)


def test_own_primitive_runs_on_pieces() -> None:
    own = core.Primitive("own_kernel")
    own.def_abstract_eval(lambda x: jax.core.ShapedArray(x.shape[1:], x.dtype))
    own.def_impl(lambda x: x.sum(0) if x.shape[0] == 4 else pytest.fail(f"ran on {x.shape}"))
    mlir.register_lowering(own, mlir.lower_fun(lambda x: jnp.sum(x, 0), multiple_results=False))
    register_rule("own_kernel", on_pieces=True)(lambda eqn: "([i, j])->([j]) {j=6, i=32} reduction={i}")
    rows = {"*": PartitionSpec("x")}
    plan = ffjax.plan(own.bind, jax.ShapeDtypeStruct((32, 6), jnp.float32), mesh={"x": 8}, pins=rows)
    lowered = plan.lower(jax.devices())
    assert "manual_computation" in lowered.as_text()
    assert [c.kind for c in plan.estimate.collectives] == ["all_reduce"]
    x = np.arange(32 * 6, dtype=np.float32).reshape(32, 6)
    np.testing.assert_allclose(lowered.compile()(x)[0], x.sum(0))


def test_primitive_that_lowers_by_a_traced_function_is_that_function() -> None:
    def newton(x: jax.Array) -> jax.Array:
        return jax.lax.while_loop(lambda c: c[0] < 3, lambda c: (c[0] + 1, c[1] - jnp.tanh(c[1])), (0, x))[1]

    own = core.Primitive("own_newton")
    own.def_abstract_eval(lambda x: x)
    own.def_impl(lambda x: pytest.fail("only its lowering says what runs"))
    mlir.register_lowering(own, mlir.lower_fun(newton, multiple_results=False))
    jaxpr, _ = inline(jax.make_jaxpr(lambda x: own.bind(jnp.cumsum(x)))(jnp.ones((16, 8))))
    names = [eqn.primitive.name for eqn in jaxpr.eqns]
    assert "while" in names
    assert "own_newton" not in names
    assert "cumsum" in names, "JAX's own primitives stay"
    register_rule("own_newton")(lambda eqn: "([i])->([i]) {i=128}")
    jaxpr, _ = inline(jax.make_jaxpr(own.bind)(jnp.ones(128)))
    assert [eqn.primitive.name for eqn in jaxpr.eqns] == ["own_newton"], "a registered rule is the user's word"


def test_arrays_without_elements_cost_nothing_whole() -> None:
    eqns = equations(lambda x: jax.lax.reshape(x, (1, 0, 8)), (0, 8))
    (rule,) = rules_for(eqns)  # without a warning
    assert rule.need_replication


def test_what_is_known_is_not_lowered_again(monkeypatch: pytest.MonkeyPatch) -> None:
    def program(x: jax.Array, w: jax.Array) -> jax.Array:
        return jnp.tanh(x @ w) * 1.25

    before = rules_for(equations(program, (12, 34), (34, 56)))
    monkeypatch.setattr(equation_rules, "_lower", lambda eqns: pytest.fail("lowered again"))
    assert rules_for(equations(program, (12, 34), (34, 56))) == before


def test_one_equation_that_does_not_lower_costs_the_others_nothing() -> None:
    unknown = primitive("own_unknown_among_others")
    eqns = equations(lambda x, w: (jnp.tanh(x), unknown.bind(x), x @ w), (14, 10), (10, 22))
    with pytest.warns(FfjaxWarning, match="own_unknown_among_others"):
        rules = rules_for(eqns)
    assert str(rules[0]) == "([i, j])->([i, j]) {i=14, j=10}"
    assert str(rules[2]) == "([i, k], [k, j])->([i, j]) {i=14, j=22, k=10} reduction={k}"


def test_wide_types() -> None:
    with jax.enable_x64(True):
        eqns = list(jax.make_jaxpr(lambda x: x + 1)(jax.ShapeDtypeStruct((4,), jnp.float64)).jaxpr.eqns)
    assert [str(r) for r in rules_for(eqns)] == ["([i], [])->([i]) {i=4}"]
