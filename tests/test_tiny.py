"""In under ten seconds: does the whole thing work at all? One small training step, planned, run and checked."""

from __future__ import annotations

from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ffjax
from ffjax.cost.cluster import Cluster
from ffjax.emit.oracle import explicit_collectives
from ffjax.testing import assert_same_numerics

State = dict[str, jax.Array]
MESH = {"x": 4, "y": 2}


def train_step(params: State, x: jax.Array, y: jax.Array) -> tuple[State, jax.Array]:
    """A layer, an activation, a layer, their gradients and plain descent."""

    def loss_fn(params: State) -> jax.Array:
        return jnp.mean((jnp.tanh(x @ params["up"]) @ params["down"] - y) ** 2)

    loss, grads = jax.value_and_grad(loss_fn)(params)
    return jax.tree.map(lambda p, g: p - 0.1 * g, params, grads), loss


def arguments() -> tuple[State, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    up, down, x, y = (rng.normal(size=s).astype(np.float32) / 8 for s in ((64, 256), (256, 64), (32, 64), (32, 64)))
    return {"up": jnp.asarray(up), "down": jnp.asarray(down)}, x, y


@pytest.mark.parametrize("strategy", ["auto", "fsdp"])
def test_plan_run_and_compare(strategy: str) -> None:
    params, x, y = arguments()
    step = ffjax.autoshard(train_step, mesh=MESH, strategy=strategy)
    got, want = params, params
    for _ in range(2):
        got, loss = step(got, x, y)
        want, expected = jax.jit(train_step)(want, x, y)
        assert_same_numerics((got, loss), (want, expected))
    plan = step.plan(params, x, y)
    assert plan.mesh_shape == MESH
    assert plan.explain()
    planned: Counter[object] = Counter()
    for p in plan.bound.collectives():
        planned[p.collective] += p.count
    implied: Counter[object] = Counter()
    for c in explicit_collectives(plan.lower()):
        implied[c.collective] += c.count
    assert planned == implied


def test_a_cluster_that_is_not_there_shards_the_weights() -> None:
    shapes = jax.tree.map(lambda v: jax.ShapeDtypeStruct((2**14, 2**14), v.dtype), arguments()[0])
    batch = jax.ShapeDtypeStruct((2**10, 2**14), jnp.float32)
    plan = ffjax.plan(train_step, shapes, batch, batch, cluster=Cluster.named("h100", hosts=2))
    assert plan.devices == 16
    assert any(plan.spec("params/up"))
    assert plan.estimate.peak_bytes < 2 * 2**28 * 4
