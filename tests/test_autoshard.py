"""`autoshard` behaves like `jax.jit`: arguments of every kind, no second trace, no copies, nothing moved twice."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import ffjax
from ffjax import sharded as sharded_module
from ffjax.errors import PlanError
from ffjax.testing import assert_fits, assert_same_numerics

Tree = dict[str, Any]
MESH = {"x": 4, "y": 2}


def step(state: Tree, batch: jax.Array) -> tuple[Tree, jax.Array]:
    """A layer, its gradient, momentum and a counter."""

    def loss_fn(w: jax.Array) -> jax.Array:
        return (jnp.tanh(batch @ w) ** 2).mean()

    loss, grad = jax.value_and_grad(loss_fn)(state["w"])
    momentum = 0.9 * state["m"] + grad
    return {"w": state["w"] - 0.1 * momentum, "m": momentum, "step": state["step"] + 1}, loss


def state(seed: int = 0) -> Tree:
    w = np.random.default_rng(seed).normal(size=(32, 64)).astype(np.float32) / 8
    return {"w": w, "m": np.zeros_like(w), "step": 0}


def batch(seed: int = 1) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(16, 32)).astype(np.float32)


class Counted:
    """A function, and how often it was traced or searched for."""

    def __init__(self, fn: Callable[..., Any]) -> None:
        self.calls = 0
        self._fn = fn
        functools.update_wrapper(self, fn)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self.calls += 1
        return self._fn(*args, **kwargs)


@pytest.fixture
def searches(monkeypatch: pytest.MonkeyPatch) -> Counted:
    counted = Counted(sharded_module.plan_program)
    monkeypatch.setattr(sharded_module, "plan_program", counted)
    return counted


def test_a_python_counter_is_traced_once(searches: Counted) -> None:
    traced = Counted(step)
    sharded = ffjax.autoshard(traced, mesh=MESH)
    got, want = state(), state()
    for i in range(4):
        got, loss = sharded(got, batch(i))
        want, expected = jax.jit(step)(want, batch(i))
        assert_same_numerics((got, loss), (want, expected))
    assert (traced.calls, searches.calls) == (1, 1)
    assert compilations(sharded) == 1
    assert int(got["step"]) == 4


def compilations(sharded: Any) -> int:
    """How often the sharded program was traced and compiled, over all signatures."""
    return sum(entry.runner.run._cache_size() for entry in sharded._entries.values() if entry.runner)


def test_shapes_first_arrays_later_are_searched_once(searches: Counted) -> None:
    sharded = ffjax.autoshard(step, mesh=MESH)
    shapes = jax.tree.map(lambda v: jax.ShapeDtypeStruct(np.shape(v), jnp.result_type(v)), state())
    plan = sharded.plan(shapes, jax.ShapeDtypeStruct((16, 32), jnp.float32))
    sharded(state(), batch())
    assert searches.calls == 1
    assert sharded.plan(state(), batch()).mesh_shape == plan.mesh_shape


def test_a_strong_type_is_not_taken_for_a_weak_one() -> None:
    def scale(x: jax.Array, by: Any) -> jax.Array:
        return x * by

    sharded = ffjax.autoshard(scale, mesh=MESH)
    x = jnp.ones(8, jnp.bfloat16)
    assert sharded(x, 2.0).dtype == jax.jit(scale)(x, 2.0).dtype == jnp.bfloat16
    assert sharded(x, np.float32(2.0)).dtype == jax.jit(scale)(x, np.float32(2.0)).dtype == jnp.float32


def test_the_state_settles_after_the_first_step() -> None:
    sharded = ffjax.autoshard(step, mesh=MESH, strategy="fsdp")
    first, _ = sharded(state(), batch())
    second, _ = sharded(first, batch())
    for a, b in zip(jax.tree.leaves(first), jax.tree.leaves(second), strict=True):
        assert a.sharding.is_equivalent_to(b.sharding, a.ndim)
        assert (a.dtype, a.shape, a.aval.weak_type) == (b.dtype, b.shape, b.aval.weak_type)


def test_settled_arguments_are_passed_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    sharded = ffjax.autoshard(step, mesh=MESH, strategy="fsdp")
    first, _ = sharded(state(), batch())
    placed_batch = jax.device_put(batch(), first_runner(sharded).shardings[0])
    moved: list[Any] = []
    device_put = jax.device_put
    monkeypatch.setattr(jax, "device_put", lambda x, *a, **k: moved.append(x) or device_put(x, *a, **k))
    second, _ = sharded(first, placed_batch)
    assert moved == []
    sharded(second, batch())
    assert len(moved) == 1  # the new batch
    runner = first_runner(sharded)
    leaves = jax.tree.leaves((second, placed_batch))
    assert all(a is b for a, b in zip(runner.place(leaves), leaves, strict=True))


def first_runner(sharded: Any) -> Any:
    return next(iter(sharded._entries.values())).runner


PLACEMENTS: dict[str, Callable[[Tree], Tree]] = {
    "numpy": lambda tree: tree,
    "one device": lambda tree: jax.tree.map(jnp.asarray, tree),
    "another device": lambda tree: jax.tree.map(lambda v: jax.device_put(v, jax.devices()[5]), tree),
    "replicated": lambda tree: jax.device_put(tree, NamedSharding(jax.make_mesh((8,), ("a",)), P())),
    "sharded by another plan": ffjax.autoshard(
        lambda t: jax.tree.map(lambda v: v * 1, t), mesh={"z": 8}, strategy="fsdp"
    ),
    "sharded by hand": lambda tree: {
        **tree,
        "w": jax.device_put(tree["w"], NamedSharding(jax.make_mesh((2, 4), ("b", "a")), P("a", "b"))),
    },
}


@pytest.mark.parametrize("name", PLACEMENTS)
@pytest.mark.filterwarnings("ignore:The default axis_types")
def test_state_from_anywhere(name: str) -> None:
    sharded = ffjax.autoshard(step, mesh=MESH, strategy="fsdp")
    want = jax.jit(step)(state(), batch())
    got = sharded(PLACEMENTS[name](state()), batch())
    assert_same_numerics(got, want)
    settled, _ = sharded(state(), batch())
    assert got[0]["w"].sharding == settled["w"].sharding
    assert compilations(sharded) == 1


def test_part_of_the_state_may_come_back() -> None:
    def partial_step(params: Tree, frozen: Tree, x: jax.Array) -> tuple[Tree, jax.Array]:
        out = x @ params["w"] @ frozen["w"]
        return {"w": params["w"] * 0.9}, out.sum()

    sharded = ffjax.autoshard(partial_step, mesh=MESH)
    params, frozen = {"w": jnp.ones((32, 16)), "unused": jnp.ones(8)}, {"w": jnp.ones((16, 8))}
    new, total = sharded(params, frozen, batch())
    assert_same_numerics((new, total), jax.jit(partial_step)(params, frozen, batch()))
    assert new["w"].sharding.spec == sharded.plan(params, frozen, batch()).spec("params/w")


def test_static_arguments() -> None:
    def powers(x: jax.Array, n: int, name: str) -> list[jax.Array]:
        return [x**i if name == "pow" else x * i for i in range(n)]

    sharded = ffjax.autoshard(powers, mesh=MESH, static_argnums=(1, -1))
    for n, name in ((2, "pow"), (3, "pow"), (3, "mul"), (2, "pow")):
        got = sharded(batch(), n, name)
        assert len(got) == n
        assert_same_numerics(got, powers(batch(), n, name))
    assert len(sharded._entries) == 3


def powers_of(x: jax.Array, n: int, *, name: str = "pow") -> list[jax.Array]:
    return [x**i if name == "pow" else x * i for i in range(n)]


@pytest.mark.parametrize(
    "options",
    [
        {"static_argnames": ("n", "name")},
        {"static_argnums": 1, "static_argnames": ("n", "name")},
        {"static_argnames": iter(["name", "n"])},
    ],
    ids=["names", "both", "iterator"],
)
def test_static_arguments_by_name(options: dict[str, Any]) -> None:
    sharded = ffjax.autoshard(powers_of, mesh=MESH, **options)
    calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = [((2,), {}), ((), {"n": 2}), ((3,), {"name": "mul"})]
    for args, kwargs in [*calls, *calls]:
        assert_same_numerics(sharded(batch(), *args, **kwargs), powers_of(batch(), *args, **kwargs))
    assert len(sharded._entries) == len(calls)


def test_numbers_say_which_keywords_are_static_and_donated() -> None:
    def scale(state: jax.Array, n: int) -> jax.Array:
        return state * n if n > 1 else state

    sharded = ffjax.autoshard(scale, mesh=MESH, static_argnums=1, donate_argnums=0)
    placed = sharded(state=jnp.ones(8), n=2)
    again = sharded(n=3, state=placed)
    assert placed.is_deleted()
    np.testing.assert_array_equal(again, np.full(8, 6.0))


def test_names_say_which_numbers_are_donated() -> None:
    sharded = ffjax.autoshard(step, mesh=MESH, strategy="fsdp", donate_argnames="state")
    first, _ = sharded(state(), batch())
    sharded(first, batch())
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(first))


def test_names_of_a_step_of_modules() -> None:
    def train(model: nnx.Linear, x: jax.Array, *, times: int) -> jax.Array:
        for _ in range(times):
            model.kernel[...] *= 2
        return model(x).sum()

    model, alone = (nnx.Linear(32, 8, rngs=nnx.Rngs(0)) for _ in range(2))
    sharded = ffjax.autoshard(train, mesh=MESH, static_argnames="times", donate_argnames="model")
    for times in (2, 1):
        got = sharded(x=batch(), model=model, times=times)
        assert_same_numerics(got, train(alone, batch(), times=times))
    assert_same_numerics(model.kernel[...], alone.kernel[...])


def test_static_values_that_are_equal_but_of_another_type() -> None:
    sharded = ffjax.autoshard(lambda x, n: x * n, mesh=MESH, static_argnames="n")
    assert [sharded(np.arange(8), n).dtype for n in (1, 1.0, True)] == [jnp.int32, jnp.float32, jnp.int32]


def test_a_plan_of_a_step_with_static_names_is_bound_to_it(tmp_path: Path) -> None:
    options: dict[str, Any] = {"n": 3, "name": "mul", "static_argnames": ("n", "name")}
    (fastest, *_) = ffjax.pareto(powers_of, batch(), mesh=MESH, **options).points
    fastest.plan.save(tmp_path / "plan.json")
    loaded = ffjax.Plan.load(tmp_path / "plan.json")
    assert len(loaded.bind(powers_of, batch(), **options).results) == 3
    with pytest.raises(PlanError):
        loaded.bind(powers_of, batch(), **{**options, "n": 2})
    assert_fits(powers_of, batch(), memory="1MiB", mesh=MESH, **options)


def test_donated_state_is_gone_after_the_step() -> None:
    sharded = ffjax.autoshard(step, mesh=MESH, strategy="fsdp", donate_argnums=0)
    first, _ = sharded(state(), batch())
    placed_batch = jnp.asarray(batch())
    pointers = {s.data.unsafe_buffer_pointer() for v in (first["w"], first["m"]) for s in v.addressable_shards}
    second, _ = sharded(first, placed_batch)
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(first))
    assert not placed_batch.is_deleted()
    again = {s.data.unsafe_buffer_pointer() for v in (second["w"], second["m"]) for s in v.addressable_shards}
    assert len(pointers & again) >= len(pointers) // 2
    assert_same_numerics(second, jax.jit(step)(jax.jit(step)(state(), batch())[0], batch())[0])


def test_an_array_that_comes_twice_can_be_donated() -> None:
    """A target network that starts as the network itself; donating one buffer twice used to end the process."""

    def follow(nets: dict[str, jax.Array], x: jax.Array) -> dict[str, jax.Array]:
        online = nets["online"] - 0.1 * x.T @ (x @ nets["online"])
        return {"online": online, "target": 0.9 * nets["target"] + 0.1 * online}

    weights, x = jnp.ones((32, 8)), batch()
    expected = follow({"online": weights, "target": weights}, x)
    for strategy in ("data_parallel", "fsdp"):
        sharded = ffjax.autoshard(follow, mesh=MESH, strategy=strategy, donate_argnums=0)
        shared = jnp.ones((32, 8))
        assert_same_numerics(sharded({"online": shared, "target": shared}, x), expected)


def test_state_that_is_not_donated_stays() -> None:
    sharded = ffjax.autoshard(step, mesh=MESH)
    first, _ = sharded(state(), batch())
    sharded(first, batch())
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(first))


def test_keyword_arguments_in_any_order(searches: Counted) -> None:
    def affine(x: jax.Array, *, scale: Any, shift: Any) -> jax.Array:
        return x * scale + shift

    sharded = ffjax.autoshard(affine, mesh=MESH)
    one = sharded(batch(), scale=2.0, shift=jnp.ones(32))
    two = sharded(batch(), shift=jnp.ones(32), scale=2.0)
    assert_same_numerics(one, batch() * 2 + 1)
    assert_same_numerics(one, two)
    assert searches.calls == 1
    assert sharded.plan(batch(), scale=2.0, shift=jnp.ones(32)).spec("shift") is not None


def test_positional_and_by_name_are_both_fine() -> None:
    sharded = ffjax.autoshard(step, mesh=MESH)
    assert_same_numerics(sharded(state(), batch=batch()), sharded(state(), batch()))
    assert_same_numerics(sharded(state=state(), batch=batch()), sharded(state(), batch()))


@ffjax.autoshard
def decorated(x: jax.Array) -> jax.Array:
    """Doubles."""
    return x * 2


@ffjax.autoshard(mesh=MESH, strategy="data_parallel")
def decorated_with_options(x: jax.Array) -> jax.Array:
    return x * 3


class Model:
    def __init__(self, by: float) -> None:
        self.by = by

    def scaled(self, x: jax.Array) -> jax.Array:
        return x * self.by

    def __call__(self, x: jax.Array) -> jax.Array:
        return x * self.by

    @functools.partial(ffjax.autoshard, static_argnums=0)
    def decorated(self, x: jax.Array) -> jax.Array:
        return x * self.by


def wrapped(fn: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(fn)
    def call(*args: Any, **kwargs: Any) -> Any:
        return fn(*args, **kwargs)

    return call


def scaled(x: jax.Array, by: float = 2.0) -> jax.Array:
    return x * by


CALLABLES: dict[str, tuple[Callable[..., Any], float, str]] = {
    "decorated": (decorated, 2, "decorated"),
    "decorated with options": (decorated_with_options, 3, "decorated_with_options"),
    "bound method": (ffjax.autoshard(Model(4).scaled), 4, "scaled"),
    "callable object": (ffjax.autoshard(Model(5)), 5, "Model"),
    "decorated method": (Model(6).decorated, 6, "decorated"),
    "lambda": (ffjax.autoshard(lambda x: x * 7), 7, "<lambda>"),
    "partial": (ffjax.autoshard(functools.partial(scaled, by=8)), 8, "scaled"),
    "wrapped": (ffjax.autoshard(wrapped(scaled)), 2, "scaled"),
    "jitted": (ffjax.autoshard(jax.jit(scaled)), 2, "scaled"),
    "sharded already": (ffjax.autoshard(jax.jit(wrapped(scaled))), 2, "scaled"),
}


@pytest.mark.parametrize("name", CALLABLES)
def test_whatever_can_be_called(name: str) -> None:
    fn, by, called = CALLABLES[name]
    for _ in range(2):
        assert_same_numerics(fn(batch()), batch() * np.float32(by))
    if name == "decorated method":
        assert Model.decorated.plan(Model(6), batch()).program == called
    else:
        assert fn.plan(batch()).program == called  # type: ignore[attr-defined]


def test_the_wrapper_keeps_name_and_documentation() -> None:
    assert decorated.__name__ == "decorated"
    assert decorated.__doc__ == "Doubles."
    assert decorated.__wrapped__(2) == 4


def test_methods_of_two_objects_do_not_mix() -> None:
    assert_same_numerics(Model(2).decorated(batch()), batch() * 2)
    assert_same_numerics(Model(3).decorated(batch()), batch() * 3)


def test_some_devices_only() -> None:
    devices = jax.devices()[2:6]
    sharded = ffjax.autoshard(step, devices=devices)
    new, _ = sharded(state(), batch())
    assert new["w"].sharding.device_set == set(devices)
    assert sharded.plan(state(), batch()).devices == 4


def test_a_second_structure_gets_its_own_plan() -> None:
    sharded = ffjax.autoshard(lambda tree: jax.tree.map(lambda v: v + 1, tree), mesh=MESH)
    assert_same_numerics(sharded({"a": jnp.zeros(8)}), {"a": jnp.ones(8)})
    assert_same_numerics(sharded([jnp.zeros(8), jnp.zeros(4)]), [jnp.ones(8), jnp.ones(4)])
    assert_same_numerics(sharded({"a": jnp.zeros(8), "b": None}), {"a": jnp.ones(8), "b": None})
    assert len(sharded._entries) == 3


def test_lower_is_for_the_devices_that_it_runs_on() -> None:
    sharded = ffjax.autoshard(step, mesh=MESH)
    compiled = sharded.lower(state(), batch()).compile()
    (placed, _) = compiled.input_shardings
    assert all(len(s.device_set) == 8 for s in placed)


def test_closed_over_arrays_are_placed_once() -> None:
    table = jnp.arange(32.0)
    sharded = ffjax.autoshard(lambda x: x + table, mesh=MESH)
    assert_same_numerics(sharded(batch()), batch() + np.arange(32, dtype=np.float32))
    runner = first_runner(sharded)
    before = [c.unsafe_buffer_pointer() if len(c.devices()) == 1 else id(c) for c in runner.closures]
    sharded(batch())
    assert [c.unsafe_buffer_pointer() if len(c.devices()) == 1 else id(c) for c in runner.closures] == before


def test_a_step_under_autoshard_is_planned_as_the_function_that_it_is() -> None:
    decorated = ffjax.autoshard(step, mesh=MESH)
    decorated(state(), batch())
    assert ffjax.plan(decorated, state(), batch(), mesh=MESH).to_json().count('"decisions"') == 1
    again = ffjax.autoshard(decorated, mesh=MESH, strategy="fsdp")
    assert_same_numerics(again(state(), batch()), jax.jit(step)(state(), batch()))
    assert again.plan(state(), batch()).strategy == "fsdp"


def test_inside_a_transformation_it_says_what_to_transform() -> None:
    decorated = ffjax.autoshard(step, mesh=MESH)
    for _ in range(2):  # before and after it has a plan
        with pytest.raises(ffjax.errors.TraceError, match="inside jax.jit.*Remedy: transform the function"):
            jax.jit(decorated)(state(), batch())
        decorated(state(), batch())


def test_a_plan_of_the_cache_is_searched_again_where_a_strategy_was_added(tmp_path: Path) -> None:
    def plans() -> int:
        ffjax.autoshard(step, cache=tmp_path).plan(state(), batch())
        return len(list(tmp_path.iterdir()))

    assert plans() == plans() == 1
    ffjax.strategies.register(ffjax.strategies.Strategy(name="of_no_use", roles=lambda mesh: None))
    try:
        assert plans() == 2
    finally:
        ffjax.strategies.unregister("of_no_use")
