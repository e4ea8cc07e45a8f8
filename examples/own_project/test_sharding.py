"""How the project tests that its step is sharded as it should be: on a laptop, in seconds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import sharded_optimizer
from jax.sharding import PartitionSpec
from train import init, train_step

import ffjax
from ffjax.testing import assert_collectives, assert_fits, assert_plan_matches, assert_same_numerics

CLUSTER = ffjax.Cluster.named("h100", hosts=2)  # where we train: 16 GPUs, none of them needed here


def small() -> tuple[Any, Any]:
    """Arrays that train on fake devices."""
    rng = np.random.default_rng(0)
    return init(jax.random.key(0)), {name: rng.normal(size=(32, 64)).astype(np.float32) for name in "xy"}


def full() -> tuple[Any, Any]:
    """The shapes that we train: nothing is allocated."""
    row = jax.ShapeDtypeStruct((2**16, 8192), jnp.float32)
    return jax.eval_shape(lambda: init(jax.random.key(0), 8192, 32768)), {"x": row, "y": row}


@pytest.mark.parametrize("strategy", ["auto", "fsdp", "zero1+tensor_parallel"])
def test_it_computes_what_one_device_does(strategy: str) -> None:
    (state, batch), mesh = small(), {"x": 2, "y": 4}
    step = ffjax.autoshard(train_step, strategy=strategy, mesh=mesh)
    expected = state
    for _ in range(3):
        state, loss = step(state, batch)
        expected, expected_loss = jax.jit(train_step)(expected, batch)
    assert_same_numerics((state, loss), (expected, expected_loss))


def test_data_parallelism_communicates_gradients_and_the_loss() -> None:
    state, batch = small()
    step = ffjax.autoshard(train_step, strategy="data_parallel")
    gradients = sum(leaf.nbytes for leaf in jax.tree.leaves(state["params"]))
    assert_collectives(step.plan(state, batch), {"all_reduce": gradients + 4})  # as planned
    assert_collectives(step.lower(state, batch), {"all_reduce": gradients + 4})  # as compiled


def test_it_fits() -> None:
    assert_fits(train_step, *full(), cluster=CLUSTER, memory="20GiB", donate_argnums=0)


def test_the_plan_is_the_reviewed_one() -> None:
    rows = {"params/*": PartitionSpec("x", None)}  # what we want our way; the search plans the rest
    plan = ffjax.plan(train_step, *full(), cluster=CLUSTER, donate_argnums=0, mesh={"x": 16}, pins=rows)
    assert_plan_matches(plan, Path(__file__).with_name("train_step.plan"))


def test_our_strategy_competes() -> None:
    plan = ffjax.plan(train_step, *full(), cluster=CLUSTER, donate_argnums=0)
    named = {c.strategy: c for c in plan.search.competitors}
    assert sharded_optimizer.STRATEGY.name in named
    assert plan.estimate.step_s <= min(c.step_s for c in named.values() if c.fits)
