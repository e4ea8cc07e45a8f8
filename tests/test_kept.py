"""A step that comes with shardings keeps them, in its arguments and in its own constraints, unless asked otherwise."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import ffjax
from ffjax.emit.oracle import explicit_collectives
from ffjax.errors import FfjaxWarning, PlanError, TraceError
from ffjax.ir.spec import Collective
from ffjax.testing import assert_same_numerics

Tree = dict[str, Any]
GRID = np.array(jax.devices()).reshape(4, 2)
MESH = Mesh(GRID, ("data", "model"), axis_types=(AxisType.Auto,) * 2)
EXPLICIT = Mesh(GRID, ("data", "model"), axis_types=(AxisType.Explicit,) * 2)


def over(*spec: Any, mesh: Mesh = MESH) -> NamedSharding:
    return NamedSharding(mesh, P(*spec))


def step(params: Tree, x: jax.Array) -> tuple[Tree, jax.Array]:
    def loss_fn(params: Tree) -> jax.Array:
        return ((jax.nn.relu(x @ params["up"]) @ params["down"]) ** 2).mean()

    loss, grads = jax.value_and_grad(loss_fn)(params)
    return jax.tree.map(lambda p, g: p - 0.1 * g, params, grads), loss


def params() -> Tree:
    up, down = jax.random.split(jax.random.key(0))
    return {"up": jax.random.normal(up, (16, 32)) / 4, "down": jax.random.normal(down, (32, 16)) / 4}


def x() -> jax.Array:
    return jax.random.normal(jax.random.key(1), (8, 16))


BY_HAND = {"up": over(None, "model"), "down": over("model", None)}


def sharded_params() -> Tree:
    return {name: jax.device_put(value, BY_HAND[name]) for name, value in params().items()}


def collectives(plan: ffjax.Plan) -> set[Collective]:
    emitted = {c.collective for c in explicit_collectives(plan.lower(jax.devices()))}
    assert emitted == {c.collective for c in plan.bound.collectives()}
    return emitted


def test_arguments_stay_as_they_are() -> None:
    """Tensor and data parallelism by hand: the plan is what the user has made, on the user's mesh."""
    given = (sharded_params(), jax.device_put(x(), over("data")))
    sharded = ffjax.autoshard(step)
    plan = sharded.plan(*given)
    assert plan.mesh_shape == {"data": 4, "model": 2}
    assert plan.kept == {"params/up": ((), ("model",)), "params/down": (("model",), ()), "x": (("data",), ())}
    new, loss = sharded(*given)
    for name, array in new.items():
        assert array.sharding.is_equivalent_to(BY_HAND[name], 2)
    assert_same_numerics((new, loss), jax.jit(step)(params(), x()))


def test_plain_data_parallelism_stays() -> None:
    replicated = jax.device_put(params(), over())
    plan = ffjax.plan(step, replicated, jax.device_put(x(), over(("data", "model"))))
    assert {plan.spec(f"params/{name}") for name in params()} == {P(None, None)}
    assert plan.spec("x") == P(("data", "model"), None)
    collectives(plan)


def test_shapes_carry_shardings_too() -> None:
    shapes = {n: jax.ShapeDtypeStruct(v.shape, v.dtype, sharding=BY_HAND[n]) for n, v in params().items()}
    plan = ffjax.plan(step, shapes, x())
    assert plan.spec("params/up") == P(None, "model")


@pytest.mark.parametrize("asked", [{"keep_shardings": False}, {"strategy": "fsdp"}, {"mesh": {"z": 8}}], ids=str)
def test_another_plan_for_the_asking(asked: dict[str, Any]) -> None:
    sharded = ffjax.autoshard(step, **asked)
    given = (sharded_params(), x())
    assert sharded.plan(*given).kept == {}
    assert_same_numerics(sharded(*given), jax.jit(step)(params(), x()))


def test_a_pin_goes_first() -> None:
    plan = ffjax.plan(step, sharded_params(), x(), pins={"params/up": P("data", None)})
    assert (plan.spec("params/up"), plan.spec("params/down")) == (P("data", None), P("model", None))


def test_a_state_of_another_plan_is_kept_by_the_next_step() -> None:
    """An evaluation step takes the state as training left it."""
    train = ffjax.autoshard(step, strategy="fsdp", mesh={"x": 8})
    state, _ = train(params(), x())
    evaluate = ffjax.autoshard(lambda params, x: (x @ params["up"] @ params["down"]).sum())
    evaluate(state, x())
    assert evaluate.plan(state, x()).spec("params/up") == train.plan(params(), x()).spec("params/up")


def test_two_meshes_are_one_too_many() -> None:
    other = jax.device_put(x(), over("z", mesh=Mesh(np.array(jax.devices()), ("z",))))
    with pytest.raises(
        PlanError, match=r"sharded over different meshes: params/down over .* x over \{'z': 8\}. Remedy"
    ):
        ffjax.plan(step, sharded_params(), other)
    ffjax.plan(step, sharded_params(), other, keep_shardings=False)


def test_what_cannot_be_kept_is_named() -> None:
    """One elementwise op of arrays that are split differently: the first is kept."""
    a, b = jax.device_put(np.ones((8, 8)), over("data")), jax.device_put(np.ones((8, 8)), over(None, "data"))
    with pytest.warns(FfjaxWarning, match=r"<lambda> comes with shardings that cannot be kept: b as .*None, 'data'"):
        plan = ffjax.plan(lambda a, b: a * b, a, b)
    assert plan.spec("a") == P("data", None)


def constrained(params: Tree, x: jax.Array) -> tuple[Tree, jax.Array]:
    """Constraints in a loop and in the backward pass, one of them partly open."""

    def loss_fn(params: Tree) -> jax.Array:
        def layer(h: jax.Array, _: None) -> tuple[jax.Array, None]:
            inner = jax.lax.with_sharding_constraint(h @ params["up"], over("data", "model"))
            h = jnp.tanh(inner) @ params["down"]
            return jax.lax.with_sharding_constraint(h, over("data", P.UNCONSTRAINED)), None

        return (jax.lax.scan(layer, x, None, length=2)[0] ** 2).mean()

    loss, grads = jax.value_and_grad(loss_fn)(params)
    return jax.tree.map(lambda p, g: p - 0.1 * g, params, grads), loss


def test_constraints_in_the_step_hold() -> None:
    sharded = ffjax.autoshard(constrained)
    plan = sharded.plan(params(), x())
    assert plan.mesh_shape == {"data": 4, "model": 2}
    graph, layout = plan.bound.graph, plan.bound
    held = [layout.home(op.results[0]) for op in graph.ops if op.kind == "sharding_constraint"]
    assert (("data",), ("model",)) in held
    assert all(spec[0] == ("data",) for spec in held)
    collectives(plan)
    assert_same_numerics(sharded(params(), x()), jax.jit(constrained)(params(), x()))
    again = ffjax.Plan.from_json(plan.to_json()).bind(constrained, params(), x())
    assert again.lower().as_text() == plan.lower().as_text()


def jitted_inside(params: Tree, x: jax.Array) -> tuple[Tree, jax.Array]:
    return jax.jit(step, in_shardings=(BY_HAND, over("data")), out_shardings=(BY_HAND, over()))(params, x)


def under_a_mesh(params: Tree, x: jax.Array) -> tuple[Tree, jax.Array]:
    return step(params, jax.lax.with_sharding_constraint(x, P("data")))


@pytest.mark.parametrize("fn", [jitted_inside, under_a_mesh])
def test_shardings_of_a_jit_and_of_a_mesh_that_is_set(fn: Callable[..., Any]) -> None:
    sharded, given = ffjax.autoshard(fn), (params(), x())
    with jax.set_mesh(MESH):
        got = sharded(*given)
        plan = sharded.plan(*given)
    assert plan.spec("x") == P("data", None)
    if fn is jitted_inside:
        assert (plan.spec("params/up"), plan.spec("params/down")) == (P(None, "model"), P("model", None))
    assert_same_numerics(got, jax.jit(step)(params(), x()))


def test_constraints_on_another_mesh_are_left_out() -> None:
    with pytest.warns(FfjaxWarning, match="sharding constraints of its own .*test_kept.py"):
        plan = ffjax.plan(constrained, params(), x(), mesh={"x": 8})
    assert not plan.keeps_constraints
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ffjax.plan(constrained, params(), x(), keep_shardings=False)


def test_explicit_meshes() -> None:
    given = {n: jax.device_put(v, over(*BY_HAND[n].spec, mesh=EXPLICIT)) for n, v in params().items()}
    sharded = ffjax.autoshard(step)
    batch = x()
    with jax.set_mesh(EXPLICIT):
        new, loss = sharded(given, batch)
        assert sharded.plan(given, batch).spec("params/up") == P(None, "model")
        with pytest.raises(TraceError, match=r"<lambda> cannot be traced without the explicit axes of the mesh"):
            ffjax.plan(lambda x: jax.sharding.reshard(x, P("data")), batch)
    assert_same_numerics((new, loss), jax.jit(step)(params(), x()))


def test_devices_keep_their_order() -> None:
    turned = Mesh(GRID[::-1], ("data", "model"), axis_types=(AxisType.Auto,) * 2)
    given = {n: jax.device_put(v, over(*BY_HAND[n].spec, mesh=turned)) for n, v in params().items()}
    new, _ = ffjax.autoshard(step)(given, x())
    assert new["up"].sharding.is_equivalent_to(given["up"].sharding, 2)
