"""What checkpointed blocks keep, as a decision: each policy is a program of its own, and the right one is taken."""

from __future__ import annotations

import dataclasses
import sys
import threading
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
from ffjax import cli, planner
from ffjax.cost.cluster import Cluster
from ffjax.cost.kernels import kernels
from ffjax.errors import BudgetError, PlanError, PlanMismatch
from ffjax.examples import gpt
from ffjax.fingerprint import program_fingerprint
from ffjax.ir.assignment import UNUSED, Assignment
from ffjax.ir.compat import AS_WRITTEN, CHECKPOINT_POLICIES
from ffjax.ir.graph import build_graph
from ffjax.ir.layout import Layout
from ffjax.ir.regions import find_regions
from ffjax.ir.spec import MeshShape
from ffjax.ir.trace import Program
from ffjax.planner import trace_step
from ffjax.testing import assert_same_numerics

sys.path.insert(0, str(Path(__file__).parent))
from test_memory import peak

POLICIES = tuple(CHECKPOINT_POLICIES)
H100 = Cluster.named("h100", hosts=1)
MESH = {"x": 8}

Params = dict[str, jax.Array]
Case = tuple[Callable[..., Any], tuple[Any, ...]]


def layer(w: jax.Array, x: jax.Array) -> jax.Array:
    """Two products, one of them over a batch of heads."""
    h = jnp.tanh(x @ w)
    mixed = jax.nn.softmax(jnp.einsum("bsd,btd->bst", h, h)) @ h
    return x + mixed @ w.T


def step_of(block: Callable[..., jax.Array], *, scanned: bool = False) -> Callable[..., Any]:
    def loss_fn(ws: jax.Array, x: jax.Array) -> jax.Array:
        if scanned:
            x, _ = jax.lax.scan(lambda x, w: (block(w, x), None), x, ws)
        else:
            for w in ws:
                x = block(w, x)
        return (x**2).mean()

    def train_step(ws: jax.Array, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        loss, grads = jax.value_and_grad(loss_fn)(ws, x)
        return ws - 0.1 * grads, loss

    return train_step


def arguments(layers: int = 3, batch: int = 8, length: int = 16, width: int = 32) -> tuple[Any, Any]:
    rng = np.random.default_rng(0)
    return tuple(rng.normal(size=s).astype(np.float32) / 4 for s in ((layers, width, width), (batch, length, width)))


def shapes(layers: int = 4, batch: int = 64, length: int = 512, width: int = 2048) -> tuple[Any, Any]:
    return tuple(jax.ShapeDtypeStruct(s, jnp.float32) for s in ((layers, width, width), (batch, length, width)))


def gpt_case(scan_layers: bool) -> Case:
    config = dataclasses.replace(gpt.Config.tiny(), remat=True, scan_layers=scan_layers)
    return gpt.make_train_step(config), gpt.example_args(config)


class Tower(nnx.Module):
    def __init__(self, rngs: nnx.Rngs) -> None:
        self.layers = nnx.List([nnx.Linear(32, 32, rngs=rngs) for _ in range(3)])

    def __call__(self, x: jax.Array) -> jax.Array:
        for linear in self.layers:
            x = nnx.remat(lambda linear, x: linear(jnp.tanh(linear(x))))(linear, x)
        return x


def nnx_step(model: Tower, x: jax.Array) -> jax.Array:
    loss, grads = nnx.value_and_grad(lambda model: (model(x) ** 2).mean())(model)
    nnx.update(model, jax.tree.map(lambda p, g: p - 0.1 * g, nnx.state(model), grads))
    return loss


def policy_case() -> Case:
    block = jax.checkpoint(layer, policy=jax.checkpoint_policies.dots_with_no_batch_dims_saveable)
    return step_of(block, scanned=True), arguments()


CASES: dict[str, Callable[[], Case]] = {
    "gpt": lambda: gpt_case(False),
    "gpt scanned": lambda: gpt_case(True),
    "nnx": lambda: (nnx_step, (Tower(nnx.Rngs(0)), jnp.ones((64, 32)))),
    "policy": policy_case,
}


def cost(program: Program) -> tuple[float, float]:
    """Operations of matrix products, and the peak in bytes, on one device."""
    regions = find_regions(build_graph(program))
    whole = [Assignment((UNUSED,), (UNUSED,))] * len(regions.regions)
    layout = Layout(regions=regions, mesh=MeshShape(("x",), (1,)), assignments=whole, axis_prices=(1.0,))
    return sum(k.flops * k.launches for k in kernels(regions) if k.matmul), peak(layout).bytes


@pytest.mark.parametrize("name", CASES)
def test_what_is_kept_need_not_be_computed_again(name: str) -> None:
    step, args = CASES[name]()
    programs = {p: trace_step(step, args, {}, donate_argnums=0, remat=p) for p in (AS_WRITTEN, *POLICIES)}
    costs = {p: cost(program) for p, program in programs.items()}
    off, dots, unbatched, nothing = (costs[p] for p in POLICIES)
    assert off[0] <= dots[0] <= unbatched[0] <= nothing[0]
    assert off[0] < nothing[0]
    assert off[1] >= dots[1] >= unbatched[1] >= nothing[1]
    assert off[1] > nothing[1]
    written = "dots_with_no_batch_dims_saveable" if name == "policy" else "nothing_saveable"
    assert costs[AS_WRITTEN] == costs[written]
    prints = {p: program_fingerprint(program) for p, program in programs.items()}
    assert prints[AS_WRITTEN] == prints[written]


@pytest.mark.parametrize("scanned", [False, True])
def test_off_is_the_program_without_regions(scanned: bool) -> None:
    off = trace_step(step_of(jax.checkpoint(layer), scanned=scanned), arguments(), {}, remat="off")
    plain = trace_step(step_of(layer, scanned=scanned), arguments(), {})
    assert not off.checkpoints
    assert program_fingerprint(off) == program_fingerprint(plain)


def test_no_trace_is_used_again_under_another_policy() -> None:
    """JAX keeps the traces of jitted functions and of their derivatives; the caller's own are what they were."""
    block = jax.jit(jax.checkpoint(layer))
    step = step_of(block)
    args = arguments()

    def traced(policy: str) -> str:
        return program_fingerprint(trace_step(step, args, {}, remat=policy))

    def own() -> str:
        return str(jax.make_jaxpr(jax.grad(lambda w, x: block(w, x).sum()))(args[0][0], args[1]))

    before = own()
    first = {policy: traced(policy) for policy in (AS_WRITTEN, *POLICIES)}
    assert own() == before
    assert {policy: traced(policy) for policy in reversed(first)} == first
    assert len(set(first.values())) == len(POLICIES)  # nothing_saveable is what was written
    assert own() == before


def test_other_threads_trace_as_written() -> None:
    found: list[str] = []

    def elsewhere() -> None:
        grad = jax.grad(jax.checkpoint(lambda x: jnp.sin(jnp.sin(x))))
        found.append(str(jax.make_jaxpr(grad)(1.0)))

    def step(x: jax.Array) -> jax.Array:
        thread = threading.Thread(target=elsewhere)
        thread.start()
        thread.join()
        return x

    trace_step(step, (jnp.ones(3),), {}, remat="off")
    assert "remat" in found[0] or "checkpoint" in found[0]


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("scanned", [False, True])
def test_numerics(policy: str, scanned: bool) -> None:
    step = step_of(jax.checkpoint(layer, prevent_cse=not scanned), scanned=scanned)
    args = arguments()
    sharded = ffjax.autoshard(step, mesh=MESH, strategy="fsdp", remat=policy)
    assert_same_numerics(sharded(*args), jax.jit(step)(*args))
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


def test_a_saved_plan_is_traced_as_it_was(tmp_path: Path) -> None:
    plan = searched()
    plan.save(tmp_path / "plan.json")
    loaded = ffjax.Plan.load(tmp_path / "plan.json")
    assert loaded == plan
    step = step_of(jax.checkpoint(layer), scanned=True)
    assert loaded.bind(step, *shapes(), donate_argnums=0).bound.graph.program.remat == plan.remat
    with pytest.raises(PlanMismatch, match=f"remat='{plan.remat}'"):
        planner.bind_program(loaded, trace_step(step, shapes(), {}, donate_argnums=0))
    assert "remat" in loaded.explain()


def test_a_plan_from_before_is_as_written() -> None:
    plan = searched(remat=AS_WRITTEN)
    text = plan.to_json().replace(',\n "remat": "as written"', "").replace(',\n  "remat": []', "")
    assert '"remat"' not in text
    assert ffjax.Plan.from_json(text) == plan


def test_steps_run_by_their_plan_and_from_the_cache(tmp_path: Path) -> None:
    step = step_of(jax.checkpoint(layer))
    args = arguments()
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
