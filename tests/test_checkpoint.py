"""What is saved under one plan is restored under another, and onto one device, bit for bit."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint
import pytest
from flax import nnx
from flax.training.train_state import TrainState

import ffjax
from ffjax import checkpoint
from ffjax.errors import FfjaxError, PlanError

sys.path.insert(0, str(Path(__file__).parent))
from states import PLANS, bits


class KeyedState(TrainState):
    """A train state that draws its own dropout."""

    key: jax.Array
    ema: Any


class Mlp(nn.Module):
    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        h = nn.relu(nn.Dense(64)(x))
        h = nn.Dropout(0.1, deterministic=False)(h)
        return nn.Dense(16, param_dtype=jnp.bfloat16)(h)


def init(key: jax.Array) -> KeyedState:
    params = Mlp().init({"params": key, "dropout": key}, jnp.zeros((1, 16)))["params"]
    tx = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-2, mu_dtype=jnp.bfloat16))
    return KeyedState.create(apply_fn=Mlp().apply, params=params, tx=tx, key=key, ema=params)


def step(state: KeyedState, x: jax.Array) -> tuple[KeyedState, jax.Array]:
    dropout, key = jax.random.split(state.key)

    def loss_fn(params: Any) -> jax.Array:
        return (state.apply_fn({"params": params}, x, rngs={"dropout": dropout}) ** 2).mean()

    loss, grads = jax.value_and_grad(loss_fn)(state.params)
    new = state.apply_gradients(grads=grads, key=key)
    ema = jax.tree.map(lambda e, p: (0.9 * e + 0.1 * p).astype(e.dtype), state.ema, new.params)
    return new.replace(ema=ema), loss


X = np.random.default_rng(0).normal(size=(8, 16)).astype(np.float32)


def planned(name: str) -> Any:
    sharded = ffjax.autoshard(step, donate_argnums=0, **PLANS[name])
    sharded.plan(jax.eval_shape(init, jax.random.key(0)), X)
    return sharded


def test_three_plans_and_one_device(tmp_path: Path) -> None:
    state, _ = planned("fsdp")(jax.jit(init)(jax.random.key(0)), X)
    wanted = bits(state)
    for turn, name in enumerate(("fsdp", "both", "data_parallel", "four devices")):
        sharded = planned(name)
        target = sharded.abstract_state(state)
        if turn:
            state = checkpoint.restore(tmp_path / str(turn - 1), target)
            assert isinstance(state, KeyedState)
        assert bits(state) == wanted
        for array, described in zip(jax.tree.leaves(state), jax.tree.leaves(target), strict=True):
            assert array.sharding == described.sharding
        plan = sharded.plan(state, X)
        checkpoint.save(tmp_path / str(turn), state, plan=plan)
        assert checkpoint.saved_plan(tmp_path / str(turn)) == plan
    alone = checkpoint.restore(tmp_path / "2", checkpoint.on_device(state, jax.devices()[3]))
    assert bits(alone) == wanted
    assert all(leaf.devices() == {jax.devices()[3]} for leaf in jax.tree.leaves(alone))
    planned("both")(state, X)  # goes on training


def test_the_saved_plan_is_enough_to_restore(tmp_path: Path) -> None:
    sharded = planned("both")
    state = sharded.init(init, jax.random.key(0))
    checkpoint.save(tmp_path / "1", state, plan=sharded.plan(state, X))
    shapes = jax.eval_shape(init, jax.random.key(0))
    again = checkpoint.restore(tmp_path / "1", checkpoint.saved_plan(tmp_path / "1").abstract_state(shapes))
    assert [v.sharding for v in jax.tree.leaves(again)] == [v.sharding for v in jax.tree.leaves(state)]
    assert bits(again) == bits(state)


def test_nnx_objects(tmp_path: Path) -> None:
    def make() -> tuple[nnx.Module, nnx.Optimizer]:
        rngs = nnx.Rngs(0, dropout=1)
        model = nnx.Sequential(nnx.Linear(16, 32, rngs=rngs), nnx.Dropout(0.5, rngs=rngs), nnx.BatchNorm(32, rngs=rngs))
        return model, nnx.Optimizer(model, optax.adam(1e-2), wrt=nnx.Param)

    def train(model: Any, optimizer: Any, x: jax.Array) -> jax.Array:
        loss, grads = nnx.value_and_grad(lambda m: ((m(x) - 1) ** 2).mean())(model)
        optimizer.update(model, grads)
        return loss

    old = ffjax.autoshard(train, **PLANS["fsdp"])
    model, optimizer = make()
    old(model, optimizer, X)
    checkpoint.save(tmp_path / "1", (model, optimizer))
    new = ffjax.autoshard(train, **PLANS["both"])
    other, fresh = make()
    new.plan(other, fresh, X)
    target = new.abstract_state((other, fresh))
    restored = checkpoint.restore(tmp_path / "1", target)
    nnx.update(other, restored[0])
    nnx.update(fresh, restored[1])
    assert bits(nnx.state((other, fresh))) == bits(nnx.state((model, optimizer)))
    assert other.layers[0].kernel[...].sharding == target[0]["layers"][0]["kernel"].sharding
    np.testing.assert_allclose(new(other, fresh, X), old(model, optimizer, X), rtol=1e-5)


def test_pieces_on_their_way_are_limited(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    state = {"small": jnp.ones(8), "large": jnp.arange(2.0**16)}
    checkpoint.save(tmp_path / "1", state)
    limits: list[float] = []

    class Limited(orbax.checkpoint.StandardCheckpointer):  # type: ignore[misc]
        def __init__(self, **options: Any) -> None:
            limits.append(options["restore_concurrent_gb"] * 1e9)
            super().__init__(**options)

    monkeypatch.setattr(orbax.checkpoint, "StandardCheckpointer", Limited)
    for host_memory in ("1GiB", 1024):
        restored = checkpoint.restore(tmp_path / "1", checkpoint.on_device(state), host_memory=host_memory)
        assert bits(restored) == bits(state)
    large = 4 * 2**16
    assert limits[0] == pytest.approx(2**30)
    assert large < limits[1] <= 2 * large + 1  # less would not do
    with pytest.raises(FfjaxError, match=r"'lots'.*70GiB"):
        checkpoint.restore(tmp_path / "1", checkpoint.on_device(state), host_memory="lots")


def test_what_was_not_saved_is_named(tmp_path: Path) -> None:
    state = {"w": jnp.ones((4, 4)), "key": jax.random.key(0)}
    checkpoint.save(tmp_path / "1", state)
    with pytest.raises(FfjaxError, match=r"has a state already. Remedy: save into a new folder"):
        checkpoint.save(tmp_path / "1", state)
    with pytest.raises(FfjaxError, match=r"it has no v; it has key; w is float32\[4, 4\] there, not bfloat16\[4, 4\]"):
        checkpoint.restore(tmp_path / "1", checkpoint.on_device({"w": jnp.ones((4, 4), jnp.bfloat16), "v": 1}))
    with pytest.raises(FfjaxError, match="has no saved state"):
        checkpoint.restore(tmp_path / "2", checkpoint.on_device(state))
    with pytest.raises(PlanError, match="cannot read the plan"):
        checkpoint.saved_plan(tmp_path / "1")
    assert bits(checkpoint.restore(tmp_path / "1", checkpoint.on_device(state))) == bits(state)
