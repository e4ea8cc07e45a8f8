"""Plans whose policy for checkpointed blocks was decided with them: budgets, what is saved, what runs."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click.testing
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import ffjax
from ffjax import cli
from ffjax.cost.cluster import Cluster
from ffjax.errors import BudgetError, PlanError, PlanMismatch
from ffjax.ir.compat import AS_WRITTEN
from ffjax.plan_record import Finalist
from ffjax.planning import planner
from ffjax.planning.tracing import trace_step
from ffjax.testing import assert_same_numerics
from tests.test_remat import POLICIES, Tower, arguments, layer, nnx_step, step_of

H100 = Cluster.named("h100", hosts=1)
MESH = {"x": 8}


def shapes(layers: int = 4, batch: int = 64, length: int = 512, width: int = 2048) -> tuple[Any, Any]:
    ws, x = (jax.ShapeDtypeStruct(s, jnp.float32) for s in ((layers, width, width), (batch, length, width)))
    return ws, x


@pytest.mark.parametrize("scanned", [False, True])
def test_numerics(scanned: bool) -> None:
    step = step_of(jax.checkpoint(layer, prevent_cse=not scanned), scanned=scanned)
    args = arguments(layers=2, width=16)
    want = jax.jit(step)(*args)
    for policy in POLICIES:
        sharded = ffjax.autoshard(step, mesh=MESH, strategy="fsdp", remat=policy)
        assert_same_numerics(sharded(*args), want)
        assert sharded.plan(*args).remat == policy


def test_numerics_of_nnx() -> None:
    x = np.random.default_rng(1).normal(size=(64, 32)).astype(np.float32)
    losses = []
    for step in (nnx.jit(nnx_step), ffjax.autoshard(nnx_step, mesh=MESH, strategy="data_parallel", remat="search")):
        model = Tower(nnx.Rngs(0))
        losses.append([step(model, x) for _ in range(3)])
    assert_same_numerics(losses[1], losses[0])


def searched(memory: str | None = None, remat: str = "search", **options: Any) -> ffjax.Plan:
    step = step_of(jax.checkpoint(layer), scanned=True)
    options = {"mesh": MESH, "strategy": "fsdp", "cluster": H100, "donate_argnums": 0} | options
    return ffjax.plan(step, *shapes(), memory=memory, remat=remat, **options)


def test_the_budget_decides() -> None:
    loose = searched()
    variants = {v.policy: v for v in loose.search.remat}
    assert set(variants) == {AS_WRITTEN, *POLICIES[:3]}  # nothing_saveable is what was written
    assert loose.remat == min(variants, key=lambda p: variants[p].step_s) != AS_WRITTEN
    tight = searched(f"{1.01 * variants[AS_WRITTEN].peak_bytes:.0f}B")
    assert tight.remat == AS_WRITTEN
    assert [v.policy for v in tight.search.remat if v.fits] == [AS_WRITTEN]
    assert tight.estimate.step_s > loose.estimate.step_s
    assert "off" in tight.explain()
    assert "does not fit" in tight.explain()
    assert "- remat: " in loose.diff(tight)


def test_a_step_that_keeps_too_much_as_written() -> None:
    step = step_of(jax.checkpoint(layer, policy=jax.checkpoint_policies.everything_saveable), scanned=True)
    options: dict[str, Any] = {"mesh": MESH, "strategy": "fsdp", "cluster": H100, "donate_argnums": 0}
    least = searched().search.remat
    memory = f"{1.05 * min(v.peak_bytes for v in least):.0f}B"
    with pytest.raises(BudgetError, match="remat='search'"):
        ffjax.plan(step, *shapes(), memory=memory, **options)
    assert ffjax.plan(step, *shapes(), memory=memory, remat="search", **options).remat == "nothing_saveable"
    with pytest.raises(BudgetError, match="nothing_saveable") as caught:
        ffjax.plan(step, *shapes(), memory="1MiB", remat="search", **options)
    assert "remat='search'" not in str(caught.value)


def test_the_compiler_settles_between_policies(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if the compiler turned the order around, and found no room for one of them."""

    def settle(result: Any, cluster: Any, budget: Any, search: Any, report: Any, *rest: Any) -> ffjax.Plan:
        plan: ffjax.Plan = report(result, result.best)
        if plan.remat == AS_WRITTEN:
            raise BudgetError("as compiled")
        figures = plan.estimate
        seen = Finalist(
            strategy=plan.strategy,
            mesh=str(plan.mesh),
            step_s=figures.step_s,
            compiled_step_s=1 / figures.step_s,
            peak_bytes=figures.peak_bytes,
            compiled_peak_bytes=figures.peak_bytes,
            fits=True,
        )
        return dataclasses.replace(plan, search=dataclasses.replace(plan.search, finalists=(seen,)))

    monkeypatch.setattr(planner, "settle", settle)
    plan = searched(verify="finalists")
    slowest = max((v for v in plan.search.remat if v.policy != AS_WRITTEN), key=lambda v: v.step_s)
    assert plan.remat == slowest.policy


def test_a_saved_plan_is_traced_as_it_was(tmp_path: Path) -> None:
    plan = searched()
    plan.save(tmp_path / "plan.json")
    loaded = ffjax.Plan.load(tmp_path / "plan.json")
    assert loaded == plan
    step = step_of(jax.checkpoint(layer), scanned=True)
    assert loaded.bind(step, *shapes(), donate_argnums=0).bound.graph.program.remat == plan.remat
    with pytest.raises(PlanMismatch, match=f"remat='{plan.remat}'"):
        loaded.bind_program(trace_step(step, shapes(), {}, donate_argnums=0))
    assert "remat" in loaded.explain()


def test_a_plan_from_before_is_as_written() -> None:
    plan = searched(remat=AS_WRITTEN)
    text = plan.to_json().replace(',\n "remat": "as written"', "").replace(',\n  "remat": []', "")
    assert '"remat"' not in text
    assert ffjax.Plan.from_json(text) == plan


def test_steps_run_by_their_plan_and_from_the_cache(tmp_path: Path) -> None:
    step = step_of(jax.checkpoint(layer))
    args = arguments(layers=1, width=16)
    options: dict[str, Any] = {"mesh": MESH, "strategy": "fsdp"}
    found = ffjax.autoshard(step, remat="search", cache=tmp_path, **options)
    assert_same_numerics(found(*args), jax.jit(step)(*args))
    plan = found.plan(*args)
    (file,) = tmp_path.iterdir()
    assert ffjax.Plan.load(file) == plan
    again = ffjax.autoshard(step, remat="search", cache=tmp_path, **options)
    assert again.plan(*args) == plan
    assert again.plan(jnp.asarray(args[0]), *args[1:]) == plan
    fixed = ffjax.autoshard(step, plan=plan)
    assert_same_numerics(fixed(*args), jax.jit(step)(*args))
    with pytest.raises(PlanError, match="remat='search'"):
        ffjax.autoshard(step, plan=plan, remat="search")


@pytest.mark.parametrize(("block", "searches"), [(layer, 1), (jax.checkpoint(layer), 4)])
def test_one_search_for_each_distinct_program(
    block: Callable[..., jax.Array], searches: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[tuple[str, float]] = []
    calls: list[object] = []
    search = planner.search
    monkeypatch.setattr(planner, "search", lambda *a, **k: (calls.append(a), search(*a, **k))[1])
    plan = ffjax.plan(
        step_of(block),
        *arguments(),
        mesh=MESH,
        strategy="fsdp",
        cluster=H100,
        remat="search",
        progress=lambda what, share: told.append((what, share)),
    )
    assert len(calls) == searches
    assert len(plan.search.remat) == (searches if searches > 1 else 0)
    assert [s for _, s in told] == sorted(s for _, s in told)


def test_pins_hold_under_every_policy() -> None:
    plan = searched(strategy="auto", pins={"ws": jax.sharding.PartitionSpec(None, None, "x")})
    assert plan.spec("ws") == jax.sharding.PartitionSpec(None, None, "x")
    assert len(plan.search.remat) == 4


def test_a_policy_that_there_is_not() -> None:
    for call in (searched, lambda remat: ffjax.autoshard(layer, remat=remat)):
        with pytest.raises(PlanError, match="remat='dots' is none of .*'dots_saveable'"):
            call(remat="dots")


def test_command_line(tmp_path: Path) -> None:
    (tmp_path / "remat_target.py").write_text(
        "import jax, jax.numpy as jnp\n"
        "def step(w, x):\n"
        "    f = jax.checkpoint(lambda w, x: jnp.tanh(x @ w) @ w)\n"
        "    return w - jax.grad(lambda w: f(w, f(w, x)).sum())(w)\n"
        "def example_args():\n"
        "    return jax.ShapeDtypeStruct((64, 64), 'float32'), jax.ShapeDtypeStruct((128, 64), 'float32')\n"
    )
    target, out = f"{tmp_path / 'remat_target.py'}:step", str(tmp_path / "plan.json")
    run = click.testing.CliRunner().invoke
    common = [target, "--cluster", "h100", "--hosts", "1", "--mesh", "x=8"]
    result = run(cli.main, ["plan", *common, "--remat", "search", "--strategy", "data_parallel", "--out", out])
    assert result.exit_code == 0, result.output
    assert "the best plan under each policy" in result.output
    assert ffjax.Plan.load(out).search.remat
    result = run(cli.main, ["compare", *common, "--remat", "off"])
    assert result.exit_code == 0, result.output
    assert "data_parallel" in result.output
