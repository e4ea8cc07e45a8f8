"""`shard_map` regions of the user's own: the plan's mesh, their collectives, and what is said where they cannot run."""

from __future__ import annotations

import warnings
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh
from jax.sharding import PartitionSpec as P

import ffjax
from ffjax.cost.cluster import Cluster
from ffjax.errors import FfjaxWarning, PlanError, PlanMismatch
from ffjax.ir.spec import format_spec
from ffjax.testing import assert_same_numerics

W, X = np.sin(np.arange(256.0, dtype=np.float32)).reshape(16, 16), np.ones((8, 16), np.float32)


def mesh(**axes: int) -> Mesh:
    devices = np.array(jax.devices()[: int(np.prod(list(axes.values())))]).reshape(tuple(axes.values()))
    return Mesh(devices, tuple(axes), axis_types=(AxisType.Auto,) * len(axes))


def step_over(of: Mesh | None = None, axes: str = "data") -> Any:
    """A step with a region for each device's examples; `of=None`: over the mesh that is set."""

    def step(w: Any, x: Any) -> Any:
        def local(x: Any, w: Any) -> Any:
            return jax.lax.psum(jnp.tanh(x @ w).sum(), axes)

        def loss(w: Any) -> Any:
            mapped = jax.shard_map(local, mesh=of, in_specs=(P(axes), P()), out_specs=P())
            return mapped(jnp.sin(x), w)

        value, grads = jax.value_and_grad(loss)(w)
        return w - 0.01 * grads, value

    return step


def plan_on(devices: int, step: Any, **options: Any) -> ffjax.Plan:
    return ffjax.plan(step, W, X, cluster=Cluster.named("h100", devices_per_host=devices), **options)


def test_a_plan_is_on_the_regions_mesh_and_counts_its_collectives_as_the_users() -> None:
    plan = plan_on(8, step_over(mesh(data=8)))
    assert plan.mesh_shape == {"data": 8}
    assert {p.path: format_spec(p.spec) for p in plan.args}["x"] == "(data, -)"
    own = {(c.kind, c.axes): (c.count, c.bytes) for c in plan.estimate.collectives if c.user}
    assert own == {("all_reduce", ("data",)): (2, 4 + 16 * 16 * 4)}  # the loss, and the gradient of the weights
    assert "the step's own" in plan.explain()
    assert ffjax.Plan.from_json(plan.to_json()).estimate == plan.estimate


def test_a_region_pins_its_operands_and_edges_to_it_are_priced() -> None:
    step = step_over(mesh(data=8))
    pinned = plan_on(8, step, pins={"x": P(None, "data")})
    moved = [c for c in pinned.bound.collectives() if not c.user]
    assert {c.collective.kind for c in moved} == {"all_to_all"}  # from columns to the rows that the region reads
    assert pinned.estimate.step_s > plan_on(8, step).estimate.step_s


def test_the_mesh_that_is_set_is_the_regions() -> None:
    with jax.set_mesh(mesh(data=8)):
        sharded = ffjax.autoshard(step_over(), cluster=Cluster.named("h100"))
        plan = sharded.plan(W, X)
        assert plan.mesh_shape == {"data": 8}
        got = sharded(W, X)
        assert_same_numerics(jax.device_get(got), jax.device_get(jax.jit(step_over())(W, X)))


def test_a_region_of_fewer_devices_runs_beside_another_axis_and_says_so() -> None:
    step = step_over(mesh(data=4))
    with pytest.warns(FfjaxWarning, match=r"fewer than the plan's 8 devices: .*test_by_hand\.py:\d+ over {'data': 4}"):
        plan = plan_on(8, step)
    assert plan.mesh_shape == {"x": 2, "data": 4}
    sharded = ffjax.autoshard(step, plan=plan)
    assert_same_numerics(jax.device_get(sharded(W, X)), jax.device_get(jax.jit(step)(W, X)))


def test_a_mesh_that_has_the_axes_among_others_will_do() -> None:
    step = step_over(mesh(data=2, model=4), axes="data")
    plan = plan_on(8, step, mesh={"model": 4, "data": 2})
    assert plan.mesh_shape == {"model": 4, "data": 2}
    assert sum(c.user for c in plan.bound.collectives()) == 2


def test_a_region_whose_axes_the_mesh_lacks_runs_over_its_own_and_is_named_with_its_line() -> None:
    step = step_over(mesh(data=8))
    with pytest.warns(
        FfjaxWarning, match=r"mesh lacks, which is {'p': 8}: .*test_by_hand\.py:\d+ over {'data': 8}"
    ) as told:
        plan = plan_on(8, step, mesh={"p": 8})
    assert len([w for w in told if issubclass(w.category, FfjaxWarning)]) == 1
    assert not any(c.user for c in plan.bound.collectives())
    sharded = ffjax.autoshard(step, plan=plan)
    assert_same_numerics(jax.device_get(sharded(W, X)), jax.device_get(jax.jit(step)(W, X)))


def test_a_plan_for_another_number_of_devices_is_an_error_that_names_the_region() -> None:
    with pytest.raises(PlanError, match=r"test_by_hand\.py:\d+ over {'data': 8}, for 8 devices; the plan is for 4"):
        plan_on(4, step_over(mesh(data=8)))


def test_a_plan_of_another_mesh_does_not_bind() -> None:
    plan = plan_on(4, step_over(mesh(data=4)))
    with pytest.raises(PlanMismatch):
        plan.bind(step_over(mesh(data=8)), W, X)


def test_a_region_over_one_device_runs_on_any_mesh() -> None:
    step = step_over(mesh(data=1))
    with warnings.catch_warnings():
        warnings.simplefilter("error", FfjaxWarning)
        sharded = ffjax.autoshard(step, cluster=Cluster.named("h100"), mesh={"p": 8})
        got = sharded(W, X)
    assert_same_numerics(jax.device_get(got), jax.device_get(jax.jit(step)(W, X)))
