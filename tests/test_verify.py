"""Plans compiled: what is compared, and how finalists are settled."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ffjax
from ffjax.cost.cluster import Cluster
from ffjax.cost.hlo.compare import Report
from ffjax.errors import BudgetError, ClusterError, PlanError
from ffjax.planning import finalists
from ffjax.verifying import Verification, devices_for

CPU = Cluster.named("cpu")


def step(params: dict[str, jax.Array], batch: jax.Array) -> dict[str, jax.Array]:
    def loss(params: dict[str, jax.Array]) -> jax.Array:
        return ((jnp.tanh(batch @ params["up"]) @ params["down"]) ** 2).mean()

    return jax.tree.map(lambda p, g: p - 0.1 * g, params, jax.grad(loss)(params))


def arguments(batch: int = 64) -> tuple[Any, Any]:
    shape = jax.ShapeDtypeStruct
    params = {"up": shape((256, 512), np.float32), "down": shape((512, 256), np.float32)}
    return params, shape((batch, 256), np.float32)


@pytest.mark.parametrize("strategy", ["data_parallel", "fsdp", "tensor_parallel"])
def test_what_was_planned_is_what_was_compiled(strategy: str) -> None:
    plan = ffjax.plan(step, *arguments(), cluster=CPU, mesh={"x": 8}, strategy=strategy, donate_argnums=0)
    checked = plan.verify()
    assert checked.collectives.comparisons
    assert checked.collectives.agrees, str(checked)
    assert checked.planned_peak_bytes == plan.estimate.peak_bytes
    assert 0.5 < checked.compiled_peak_bytes / plan.estimate.peak_bytes < 2
    assert checked.compiled_step_s > 0
    assert checked.fits
    assert "all_reduce over x" in str(checked)
    assert "fits into 16 GiB" in str(checked)


def test_a_decorated_step_settles_its_plan_too() -> None:
    sharded = ffjax.autoshard(step, mesh={"x": 8}, verify="finalists", donate_argnums=0)
    plan = sharded.plan(*arguments())
    assert plan.search.finalists
    assert all(f.fits for f in plan.search.finalists)
    assert plan.search.finalists[0].compiled_step_s == min(f.compiled_step_s for f in plan.search.finalists)


def test_devices_to_compile_for() -> None:
    assert devices_for(CPU) == tuple(jax.devices()[:8])
    with pytest.raises(ClusterError, match=r"no 16 devices of 'cpu' to compile for.*fake_devices\(16\)"):
        devices_for(Cluster.named("cpu", hosts=2))


def test_an_unknown_way_to_verify() -> None:
    with pytest.raises(PlanError, match="verify='always'.*'finalists'"):
        ffjax.plan(step, *arguments(), cluster=CPU, verify="always")


Compiled = Callable[[ffjax.Plan], tuple[float, float]]
"""The seconds and the peak bytes of a plan as compiled."""


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> Callable[[Compiled], None]:
    """Takes the compiler's place."""

    def replace(figures: Compiled) -> None:
        def verified(plan: ffjax.Plan, cluster: Cluster, devices: object) -> Verification:
            step_s, peak_bytes = figures(plan)
            return Verification(
                strategy=plan.strategy,
                mesh=str(plan.mesh),
                device="none",
                collectives=Report(comparisons=(), exchanged=(), rematerialized=()),
                planned_peak_bytes=plan.estimate.peak_bytes,
                compiled_peak_bytes=peak_bytes,
                budget_bytes=plan.budget_bytes,
                planned_step_s=plan.estimate.step_s,
                compiled_step_s=step_s,
                compile_s=0.0,
            )

        monkeypatch.setattr(finalists, "verify", verified)

    return replace


def settled(batch: int = 64, **options: Any) -> ffjax.Plan:
    return ffjax.plan(step, *arguments(batch), cluster=CPU, donate_argnums=0, verify="finalists", **options)


def test_the_fastest_as_compiled_wins(compiled: Callable[[Compiled], None]) -> None:
    compiled(lambda plan: (1 / plan.estimate.step_s, plan.estimate.peak_bytes))
    plan = settled()
    seen = plan.search.finalists
    assert len(seen) == finalists.MOST_FINALISTS
    assert plan.estimate.step_s == max(f.step_s for f in seen)
    assert [f.compiled_step_s for f in seen] == sorted(f.compiled_step_s for f in seen)
    assert "compiled before deciding" in plan.explain()
    assert ffjax.Plan.from_json(plan.to_json()) == plan
    assert plan.search.seconds["compile finalists"] >= 0


def test_what_does_not_fit_once_compiled_is_out(compiled: Callable[[Compiled], None]) -> None:
    fastest = ffjax.plan(step, *arguments(), cluster=CPU, donate_argnums=0).estimate
    compiled(lambda plan: (plan.estimate.step_s, 1e15 if plan.estimate.step_s == fastest.step_s else 1.0))
    plan = settled()
    assert plan.estimate.step_s > fastest.step_s
    fits = [f.fits for f in plan.search.finalists]
    assert fits[0]
    assert not all(fits)


def test_where_none_fits_less_memory_is_asked_for(compiled: Callable[[Compiled], None]) -> None:
    """As if the compiler needed half as much again as predicted."""
    compiled(lambda plan: (plan.estimate.step_s, 1.5 * plan.estimate.peak_bytes))
    free = settled(batch=4096).estimate.peak_bytes
    plan = settled(batch=4096, memory=1.2 * free)
    assert plan.estimate.peak_bytes * 1.5 <= 1.2 * free


def test_where_nothing_fits_once_compiled(compiled: Callable[[Compiled], None]) -> None:
    compiled(lambda plan: (1.0, plan.budget_bytes + 2**30))
    with pytest.raises(BudgetError, match=r"once compiled: the smallest, on .* needs .*Remedy: memory='"):
        settled(memory="1GiB")
