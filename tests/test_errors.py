"""Bad input: each error names what was wrong and what to do about it."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec as P

import ffjax
from ffjax.errors import BudgetError, ClusterError, FfjaxError, PinError, PlanError, PlanMismatch, TraceError

CPU = ffjax.Cluster.named("cpu")


def step(state: dict[str, jax.Array], batch: jax.Array) -> tuple[dict[str, jax.Array], jax.Array]:
    def loss_fn(state: dict[str, jax.Array]) -> jax.Array:
        return (jnp.tanh(batch @ state["up"]) @ state["down"]).var()

    loss, grads = jax.value_and_grad(loss_fn)(state)
    return jax.tree.map(lambda p, g: p - 0.1 * g, state, grads), loss


def state(width: int = 32) -> dict[str, jax.Array]:
    return {"up": jnp.ones((16, width)), "down": jnp.ones((width, 8))}


def batch(size: int = 16) -> jax.Array:
    return jnp.ones((size, 16))


def plan(**options: Any) -> ffjax.Plan:
    return ffjax.plan(step, state(), batch(), **{"cluster": CPU, **options})


def test_more_devices_than_there_are() -> None:
    sharded = ffjax.autoshard(step, cluster=ffjax.Cluster.named("h100", hosts=8))
    with pytest.raises(ClusterError, match=r"64 devices.*there are 8.*Remedy"):
        sharded(state(), batch(64))


@pytest.mark.parametrize(("mesh", "said"), [({"x": 16}, "needs 16 devices"), ({"x": 2}, "uses 2 of the 8")])
def test_mesh_of_another_size(mesh: dict[str, int], said: str) -> None:
    with pytest.raises(ClusterError, match=rf"{said}.*Remedy"):
        plan(mesh=mesh)


def test_budget_that_nothing_fits_names_one_that_does() -> None:
    with pytest.raises(BudgetError, match=r"(?s)no plan fits.*largest arrays.*Remedy") as caught:
        plan(memory=300)
    named = re.search(r"memory='([^']+)'", str(caught.value).replace('"', "'"))
    assert named is not None, str(caught.value)
    assert plan(memory=named[1]).estimate.peak_bytes > 300


def test_plan_for_other_arguments() -> None:
    sharded = ffjax.autoshard(step, plan=plan())
    with pytest.raises(PlanMismatch, match=r"state/up|state/down|batch.*Remedy"):
        sharded(state(64), batch())


def test_plan_for_another_program(tmp_path: Path) -> None:
    def other(state: dict[str, jax.Array], batch: jax.Array) -> tuple[dict[str, jax.Array], jax.Array]:
        new, loss = step(state, batch)
        return jax.tree.map(jnp.sin, new), loss

    plan().save(tmp_path / "plan.json")
    with pytest.raises(PlanMismatch, match=r"made for 'step'.*Remedy"):
        ffjax.autoshard(other, plan=tmp_path / "plan.json")(state(), batch())


@pytest.mark.parametrize("damage", ["", "{", '{"format": 0}', '{"format": 1}', "[1, 2]"])
def test_damaged_plan(tmp_path: Path, damage: str) -> None:
    file = tmp_path / "plan.json"
    file.write_text(damage)
    with pytest.raises(PlanError, match=r"plan\.json.*Remedy"):
        ffjax.Plan.load(file)


def test_plan_that_names_an_unknown_factor(tmp_path: Path) -> None:
    found = plan(strategy="data_parallel")
    content = json.loads(found.to_json())
    split = next(d for d in content["decisions"] if d["split"])
    split["split"] = dict.fromkeys(split["split"], "nonsense")
    (tmp_path / "plan.json").write_text(json.dumps(content))
    with pytest.raises(PlanError):
        ffjax.Plan.load(tmp_path / "plan.json").bind(step, state(), batch())


def test_missing_plan(tmp_path: Path) -> None:
    with pytest.raises(PlanError, match=r"none\.json.*Remedy"):
        ffjax.Plan.load(tmp_path / "none.json")


@pytest.mark.parametrize(
    ("pins", "said"),
    [
        ({"params/**/kernel": P("x")}, "matches no argument"),
        ({"state/up": P("x"), "**/up": P(None, "x")}, "contradict"),
        ({"state/up": P("model")}, "names mesh axes"),
        ({"state/up": P(None, None, "x")}, "has 3 entries"),
    ],
)
def test_pins(pins: dict[str, P], said: str) -> None:
    with pytest.raises(PinError, match=rf"{said}.*Remedy"):
        plan(pins=pins)


def test_pin_that_does_not_divide() -> None:
    with pytest.raises(PinError, match=r"divides on none.*Remedy"):
        ffjax.plan(step, state(width=34), batch(), cluster=CPU, mesh={"x": 8}, pins={"state/up": P(None, "x")})


def test_step_that_is_not_traceable() -> None:
    def branches(x: jax.Array) -> jax.Array:
        return x if x.sum() > 0 else -x

    with pytest.raises(TraceError, match=r"(?s)branches cannot be traced.*Remedy"):
        ffjax.plan(branches, jnp.ones(8), cluster=CPU)


def test_argument_that_is_no_array() -> None:
    with pytest.raises(TraceError, match=r"config.*str.*static_argnums"):
        ffjax.plan(lambda x, config: x, jnp.ones(8), "adam", cluster=CPU)


@pytest.mark.parametrize(
    "options", [{"strategy": "magic"}, {"memory": "lots"}, {"donate_argnums": 5}, {"static_argnums": -4}]
)
def test_options(options: dict[str, Any]) -> None:
    with pytest.raises(FfjaxError, match=re.escape(str(next(iter(options.values()))))):
        plan(**options)


def test_loaded_plan_must_be_bound_to_be_lowered(tmp_path: Path) -> None:
    plan().save(tmp_path / "plan.json")
    with pytest.raises(PlanError, match=r"not bound.*Remedy"):
        ffjax.Plan.load(tmp_path / "plan.json").lower()


def test_init_before_a_plan() -> None:
    with pytest.raises(PlanError, match=r"no plan yet.*Remedy"):
        ffjax.autoshard(step).init(state)


def test_changed_shapes_are_planned_again() -> None:
    sharded = ffjax.autoshard(step)
    assert sharded(state(), batch())[1].shape == sharded(state(64), batch(32))[1].shape
    assert sharded.plan(state(), batch()).fingerprint != sharded.plan(state(64), batch(32)).fingerprint


def test_python_side_effects_happen_once_as_under_jit() -> None:
    seen: list[int] = []

    def noisy(x: jax.Array) -> jax.Array:
        seen.append(1)
        return x * 2

    sharded = ffjax.autoshard(noisy)
    sharded(jnp.ones(8)), sharded(jnp.ones(8))
    assert seen == [1]
