"""States and batches go where a plan wants them, from anywhere, bit for bit, and nothing is whole on the way."""

from __future__ import annotations

import pathlib
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import ffjax
from ffjax import placing
from ffjax.errors import PlanError

sys.path.insert(0, str(pathlib.Path(__file__).parent))
from states import PLANS, bits

Tree = dict[str, Any]


def step(state: Tree, batch: Tree) -> tuple[Tree, jax.Array]:
    """Two layers with momentum in bfloat16, a random key and a counter."""

    def loss_fn(params: Tree) -> jax.Array:
        h = jnp.tanh(batch["x"] @ params["up"])
        return ((h @ params["down"] - batch["y"]) ** 2).mean()

    loss, grads = jax.value_and_grad(loss_fn)(state["params"])
    momentum = jax.tree.map(lambda m, g: (0.9 * m + g).astype(m.dtype), state["momentum"], grads)
    params = jax.tree.map(lambda p, m: p - 0.1 * m, state["params"], momentum)
    key, _ = jax.random.split(state["key"])
    return {"params": params, "momentum": momentum, "key": key, "count": state["count"] + 1}, loss


def init(seed: int) -> Tree:
    up, down = jax.random.split(jax.random.key(seed))
    params = {"up": jax.random.normal(up, (16, 32)), "down": jax.random.normal(down, (32, 16))}
    momentum = jax.tree.map(lambda p: p.astype(jnp.bfloat16) / 3, params)
    return {"params": params, "momentum": momentum, "key": jax.random.key(seed + 1), "count": jnp.int32(7)}


def batch(rows: int = 8) -> Tree:
    draw = np.random.default_rng(0)
    return {"x": draw.normal(size=(rows, 16)).astype(np.float32), "y": np.ones((rows, 16), np.float32)}


def planned(name: str) -> Any:
    sharded = ffjax.autoshard(step, donate_argnums=0, **PLANS[name])
    sharded.plan(jax.eval_shape(init, 0), batch())
    return sharded


def shardings(tree: Any) -> list[Any]:
    return [leaf.sharding for leaf in jax.tree.leaves(tree)]


@pytest.fixture
def fetched(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Sizes of all arrays that are brought to the host whole."""
    sizes: list[int] = []
    array = type(jnp.ones(1))
    value = array._value.fget  # type: ignore[attr-defined]
    monkeypatch.setattr(array, "_value", property(lambda self: sizes.append(self.size) or value(self)))
    return sizes


@pytest.mark.parametrize(("source", "target"), [("fsdp", "both"), ("both", "four devices"), ("four devices", "fsdp")])
def test_a_live_state_moves_from_plan_to_plan(source: str, target: str, fetched: list[int]) -> None:
    old, new = planned(source), planned(target)
    state = old.init(init, 0)
    wanted = bits(state)
    fetched.clear()
    moved = new.place_state(state)
    assert max(fetched, default=0) < 16 * 32
    assert bits(moved) == wanted
    assert shardings(moved) == shardings(new.abstract_state(state)) == shardings(new.init(init, 0))
    new(moved, new.place_batch(batch()))  # donated: what it was moved from stays
    assert bits(state) == wanted


def test_a_donated_state_is_given_up() -> None:
    state = planned("fsdp").init(init, 0)
    moved = planned("both").place_state(state, donate=True)
    assert bits(moved) == bits(init(0))
    assert state["params"]["up"].is_deleted()


def test_the_step_itself_moves_pieces_only(fetched: list[int]) -> None:
    state = planned("fsdp").init(init, 0)
    new = planned("both")
    new(state, batch())
    assert max(fetched, default=0) < 16 * 32


def test_to_one_device_and_back() -> None:
    plan = ffjax.plan(step, init(0), batch(), cluster=ffjax.Cluster.local(jax.devices()[:1]))
    state = planned("both").init(init, 0)
    alone = plan.place_state(state, devices=jax.devices()[5:6])
    assert alone["params"]["up"].devices() == {jax.devices()[5]}
    assert bits(planned("fsdp").place_state(alone)) == bits(state)


def test_a_loaded_plan_needs_no_program() -> None:
    plan = planned("both").plan(init(0), batch())
    loaded = ffjax.Plan.from_json(plan.to_json())
    moved = loaded.place_state(init(0))
    assert shardings(moved) == shardings(plan.abstract_state(init(0)))
    assert loaded.abstract_state(init(0))["momentum"]["up"].dtype == jnp.bfloat16


def test_parts_of_a_state() -> None:
    sharded = planned("fsdp")
    whole = sharded.place_state(init(0))
    part = sharded.place_state(init(0)["momentum"])
    assert shardings(part) == shardings(whole["momentum"])
    pair = sharded.place_state((init(0)["momentum"], init(0)["params"]))
    assert shardings(pair) == shardings((whole["momentum"], whole["params"]))
    named = sharded.place_state({"a": jnp.int32(1)}["a"], argument="state/count")
    assert named.sharding == whole["count"].sharding


def test_a_state_of_another_shape_is_refused() -> None:
    sharded = planned("fsdp")
    with pytest.raises(PlanError, match=r"the state \(1 arrays: array float32\[5\]\) is no argument of step"):
        sharded.place_state(jnp.ones(5))
    with pytest.raises(PlanError, match=r"'other' is no argument of step. Remedy: one of state, batch"):
        sharded.place_state(jnp.ones(5), argument="other")
    with pytest.raises(PlanError, match=r"step.place_state has no plan yet"):
        ffjax.autoshard(step).place_state(init(0))


def test_batches_are_placed_and_read_ahead() -> None:
    sharded = planned("both")
    read: list[int] = []

    def loader() -> Any:
        for i in range(4):
            read.append(i)
            yield batch()

    batches = sharded.place_batches(loader(), ahead=3)
    first = next(batches)
    assert read == [0, 1, 2]
    assert first["x"].sharding.spec == sharded.plan(init(0), batch()).spec("batch/x")
    assert bits(first) == bits(batch())
    assert len(list(batches)) == 3
    with pytest.raises(PlanError, match="ahead=0"):
        sharded.place_batches([], ahead=0)


def test_batches_that_are_not_the_plans_are_refused() -> None:
    sharded = planned("fsdp")
    with pytest.raises(
        PlanError, match=r"batch/x of the batch is float32\[6, 16\], but the plan of step is for float32"
    ):
        sharded.place_batch(batch(6))
    with pytest.raises(PlanError, match=r"batch/x of the batch is int32\[8, 16\]"):
        sharded.place_batch({**batch(), "x": np.zeros((8, 16), np.int64)})
    with pytest.raises(PlanError, match=r"the batch has 'x', but batch of step has 'x', 'y'"):
        sharded.place_batch({"x": batch()["x"]})


def test_several_arguments_beside_the_state() -> None:
    def own(w: jax.Array, x: jax.Array, key: jax.Array) -> tuple[jax.Array, jax.Array]:
        return w - 0.1 * (x @ w).mean() * jax.random.normal(key), x.sum()

    sharded = ffjax.autoshard(own, mesh={"x": 8}, strategy="data_parallel", donate_argnums=0)
    w, x, key = np.ones((16, 4), np.float32), np.ones((8, 16)), jax.random.key(0)
    sharded.plan(w, x.astype(np.float32), key)
    placed, _ = sharded.place_batch((x, key))  # of 64 bits, as NumPy makes them
    assert (placed.dtype, placed.sharding.spec) == (jnp.float32, P("x", None))
    assert sharded.place_batch(x, arguments="x").sharding == placed.sharding
    with pytest.raises(PlanError, match=r"takes 2 arguments besides its state \(x, key\), but the batch is ndarray"):
        sharded.place_batch(x)


def test_nnx_objects() -> None:
    def train(model: nnx.Linear, x: jax.Array) -> jax.Array:
        loss, grads = nnx.value_and_grad(lambda m: (m(x) ** 2).mean())(model)
        nnx.update(model, jax.tree.map(lambda p, g: p - 0.1 * g, nnx.state(model), grads))
        return loss

    sharded = ffjax.autoshard(train, mesh={"x": 8}, strategy="fsdp")
    model, other = nnx.Linear(16, 32, rngs=nnx.Rngs(0)), nnx.Linear(16, 32, rngs=nnx.Rngs(0))
    sharded.plan(model, batch()["x"])
    assert sharded.place_state(model) is model
    assert model.kernel[...].sharding.spec == sharded.plan(model, batch()["x"]).spec("modules/model/kernel")
    assert sharded.abstract_state(other)["kernel"].sharding == model.kernel[...].sharding
    made = sharded.init(lambda: nnx.Linear(16, 32, rngs=nnx.Rngs(0)))
    assert made.kernel[...].sharding == model.kernel[...].sharding
    assert bits(nnx.state(made)) == bits(nnx.state(other))


def test_any_sharding_to_any_other() -> None:
    """Meshes of other shapes, orders and numbers of devices; what is empty; keys."""

    def over(names: str, sizes: tuple[int, ...], devices: Any, *spec: Any) -> NamedSharding:
        grid = np.array(devices[: int(np.prod(sizes))]).reshape(sizes)
        return NamedSharding(Mesh(grid, tuple(names), axis_types=(AxisType.Auto,) * len(sizes)), P(*spec))

    here = jax.devices()
    ways = [
        over("z", (8,), here, None, "z"),
        over("xy", (4, 2), here[::-1], "y", "x"),
        over("q", (3,), here[4:7], "q"),
        over("o", (1,), here[6:]),
    ]
    value = np.arange(24 * 16, dtype=np.float32).reshape(24, 16)
    array: Any = value
    for sharding in [*ways, *ways[::-2], *ways]:
        array = placing.place(array, sharding)
        assert array.sharding == sharding
        np.testing.assert_array_equal(np.asarray(array), value)
    keys = jax.random.split(jax.random.key(0), 24)
    for sharding in (over("x", (8,), here, "x"), over("xy", (4, 2), here, "x")):
        placed = placing.place(keys, sharding)
        assert placed.sharding == sharding
        assert bits(placed) == bits(keys)
    assert placing.place(jax.device_put(np.zeros((0, 16)), ways[3]), ways[0]).shape == (0, 16)
