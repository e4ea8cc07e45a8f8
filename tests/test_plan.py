"""Plans as data: they survive a round trip, are found again, and say what they are."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
import warnings
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

import ffjax
from ffjax.errors import FfjaxWarning
from ffjax.examples import convnet, gpt
from ffjax.testing import assert_same_numerics

CPU = ffjax.Cluster.named("cpu")
CONFIG = gpt.Config.tiny()


@pytest.fixture(scope="module")
def fsdp() -> ffjax.Plan:
    return ffjax.plan(
        gpt.make_train_step(CONFIG), *gpt.example_args(CONFIG), cluster=CPU, strategy="fsdp", mesh={"x": 8}
    )


def test_round_trip(fsdp: ffjax.Plan, tmp_path: Path) -> None:
    fsdp.save(tmp_path / "plan.json")
    loaded = ffjax.Plan.load(tmp_path / "plan.json")
    assert loaded == fsdp
    assert loaded.to_json() == fsdp.to_json()
    bound = loaded.bind(gpt.make_train_step(CONFIG), *gpt.example_args(CONFIG))
    assert bound.lower().as_text() == fsdp.lower().as_text()
    assert jax.tree.leaves(bound.in_specs) == jax.tree.leaves(fsdp.in_specs)


def test_specs_have_the_shape_of_the_arguments(fsdp: ffjax.Plan) -> None:
    (state, batch), _ = fsdp.in_specs
    assert batch == {"inputs": P("x", None), "targets": P("x", None)}
    assert state.params["embed"]["embedding"] in (P("x", None), P(None, "x"))
    assert fsdp.mesh_shape == {"x": 8}
    assert fsdp.out_specs[0].params["embed"]["embedding"] == state.params["embed"]["embedding"]


def test_fingerprint_is_stable_across_processes(fsdp: ffjax.Plan) -> None:
    code = (
        "import ffjax; from ffjax.examples import gpt; c = gpt.Config.tiny();"
        "print(ffjax.plan(gpt.make_train_step(c), *gpt.example_args(c), cluster=ffjax.Cluster.named('cpu'),"
        "strategy='data_parallel').fingerprint)"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == fsdp.fingerprint


def test_plan_does_not_grow_with_depth() -> None:
    lengths = []
    for layers in (4, 8):
        config = dataclasses.replace(CONFIG, layers=layers)
        plan = ffjax.plan(
            gpt.make_train_step(config), *gpt.example_args(config), cluster=CPU, strategy="data_parallel", mesh={"x": 8}
        )
        lengths.append(len(plan.decisions))
    assert lengths[0] == lengths[1]


def test_explain_and_diff(fsdp: ffjax.Plan) -> None:
    text = fsdp.explain()
    assert len(text.splitlines()) < 90
    for said in ("collectives of one step", "all_gather", "params/embed/embedding", "runner-up", "peak"):
        assert said in text
    assert fsdp.diff(fsdp) == ""
    other = ffjax.plan(
        gpt.make_train_step(CONFIG), *gpt.example_args(CONFIG), cluster=CPU, strategy="data_parallel", mesh={"x": 8}
    )
    assert "- state/params/embed/embedding: float32[256, 64]" in fsdp.diff(other)


def test_pins_are_planned_around() -> None:
    plan = ffjax.plan(
        gpt.make_train_step(CONFIG),
        *gpt.example_args(CONFIG),
        cluster=CPU,
        mesh={"x": 8},
        pins={"params/layer_*/mlp_up/kernel": P(None, "x"), "params/head/kernel": P("x")},
    )
    assert plan.spec("state/params/layer_0/mlp_up/kernel") == P(None, "x")
    assert plan.spec("state/params/head/kernel") == P("x", None)


def step(state: dict[str, jax.Array], batch: jax.Array) -> tuple[dict[str, jax.Array], jax.Array]:
    loss, grads = jax.value_and_grad(lambda s: (jnp.tanh(batch @ s["w"]) ** 2).mean())(state)
    return jax.tree.map(lambda p, g: p - 0.1 * g, state, grads), loss


def test_cache_is_searched_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    args = ({"w": jnp.ones((16, 32))}, jnp.ones((16, 16)))
    first = ffjax.autoshard(step, cache=tmp_path)
    wanted = first(*args)
    with monkeypatch.context() as patch:
        patch.setattr(sys.modules["ffjax.autoshard"], "plan_program", lambda *a, **k: pytest.fail("searched again"))
        second = ffjax.autoshard(step, cache=tmp_path)
        assert_same_numerics(second(*args), wanted)
    (file,) = tmp_path.glob("*.json")
    file.write_text("{")
    with pytest.warns(FfjaxWarning, match="searched again"):
        assert_same_numerics(ffjax.autoshard(step, cache=tmp_path)(*args), wanted)


def test_init_makes_no_device_hold_the_state() -> None:
    init, train = lambda key: gpt.init(CONFIG, key), gpt.make_train_step(CONFIG)
    key = jax.random.key(0)
    sharded = ffjax.autoshard(train, strategy="fsdp", mesh={"x": 8}, donate_argnums=0)
    batch = next(gpt.batches(CONFIG))
    sharded.plan(jax.eval_shape(init, key), batch)
    state = sharded.init(init, key)
    kernel = state.params["layer_0"]["mlp_up"]["kernel"]
    assert {s.data.size for s in kernel.addressable_shards} == {kernel.size // 8}
    new, metrics = sharded(state, batch)
    assert kernel.is_deleted()
    wanted, wanted_metrics = jax.jit(train)(gpt.init(CONFIG, key), batch)
    assert_same_numerics((new.params, metrics), (wanted.params, wanted_metrics))


def test_init_of_nnx_modules() -> None:
    from flax import nnx

    config, key = convnet.Config.tiny(), jax.random.key(0)
    sharded = ffjax.autoshard(convnet.train_step, strategy="fsdp", mesh={"x": 8})
    sharded.plan(*convnet.example_args(config))
    model, optimizer = sharded.init(lambda key: convnet.init(config, key), key)
    assert isinstance(model, convnet.ConvNet)
    assert isinstance(optimizer, nnx.Optimizer)
    kernel = model.stem.kernel[...]
    assert {s.data.size for s in kernel.addressable_shards} == {kernel.size // 8}
    sharded(model, optimizer, next(convnet.batches(config)))


def test_second_call_traces_and_moves_nothing() -> None:
    traces: list[int] = []

    def counted(state: dict[str, jax.Array], batch: jax.Array) -> tuple[dict[str, jax.Array], jax.Array]:
        traces.append(1)
        return step(state, batch)

    sharded = ffjax.autoshard(counted)
    state, batch = {"w": jnp.ones((16, 32))}, np.ones((16, 16), np.float32)
    state, _ = sharded(state, batch)
    placement = state["w"].sharding
    state, _ = sharded(state, batch)
    assert traces == [1]
    assert state["w"].sharding == placement


def test_state_that_settles_after_the_first_step() -> None:
    """The counter starts as a Python int, the momentum as nothing, and only a part of the state comes back."""

    def train(state: dict[str, object], batch: jax.Array) -> tuple[dict[str, object], jax.Array]:
        new, loss = step({"w": state["w"]}, batch)
        momentum = new["w"] if state["momentum"] is None else 0.9 * state["momentum"] + new["w"]
        return {"w": new["w"], "momentum": momentum, "count": state["count"] + 1}, loss

    def run(fn: object) -> object:
        state: dict[str, object] = {"w": jnp.ones((16, 32)), "momentum": None, "count": 0, "frozen": jnp.ones(8)}
        for _ in range(3):
            new, loss = fn(state, jnp.ones((16, 16)))
            state |= new
        return state, loss

    assert_same_numerics(run(ffjax.autoshard(train)), run(jax.jit(train)))


def test_static_and_keyword_arguments() -> None:
    def scaled(state: jax.Array, factor: int, batch: jax.Array, *, shift: jax.Array) -> jax.Array:
        return (batch @ state) * factor + shift if factor > 1 else batch @ state

    sharded = ffjax.autoshard(scaled, static_argnums=1)
    args = (jnp.ones((8, 8)), 3, jnp.ones((16, 8)))
    assert_same_numerics(sharded(*args, shift=jnp.ones(8)), scaled(*args, shift=jnp.ones(8)))


def test_batch_that_no_axis_divides_is_said() -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        ffjax.plan(step, {"w": jnp.ones((16, 32))}, jnp.ones((7, 16)), cluster=CPU)
    said = [str(w.message) for w in caught if issubclass(w.category, FfjaxWarning)]
    assert len(said) == 1
    assert "size 7" in said[0]


def test_named_strategies_never_beat_the_search() -> None:
    """On every example and two clusters, under the same costs."""
    from ffjax.examples import moe, recommender

    for module in (gpt, recommender, moe):
        config = module.Config.tiny()
        for cluster in (CPU, ffjax.Cluster.named("h100")):
            plan = ffjax.plan(
                module.make_train_step(config), *module.example_args(config), cluster=cluster, mesh={"x": 8}
            )
            best = {c.strategy: c.step_s for c in plan.search.competitors}
            assert min(best.values()) >= best["auto"] * (1 - 1e-4)


def test_optimizer_state_follows_its_parameters(fsdp: ffjax.Plan) -> None:
    """Donated or not, what replaces an argument is sharded like it."""
    for leaf in fsdp.results:
        if leaf.path.startswith("0/"):
            assert fsdp.spec("state/" + leaf.path[2:]) == fsdp.spec(leaf.path)
