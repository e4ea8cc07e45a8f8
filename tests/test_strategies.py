"""Each named strategy means what experts mean by it, and is a point of the space that the free search covers."""

from __future__ import annotations

import functools
import importlib
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import pytest

import ffjax
from ffjax.cost.cluster import Cluster
from ffjax.cost.collectives import CollectiveModel
from ffjax.cost.kernels import by_family, kernels
from ffjax.errors import FfjaxWarning, PlanError
from ffjax.ir.dims import named_dims
from ffjax.ir.graph import build_graph
from ffjax.ir.regions import Regions, find_regions
from ffjax.ir.spec import MeshShape, Spec, spec_axes
from ffjax.planning.tracing import trace_step
from ffjax.strategies import base
from ffjax.strategies.base import Role, Strategy, all_strategies, named, register, unregister
from ffjax.strategies.families import family_keys
from ffjax.strategies.problem import build_problem, total_seconds
from ffjax.strategies.roles import lacking
from ffjax.strategies.search import search
from ffjax.strategies.usage import Usage

H100S = Cluster.named("h100", hosts=2, devices_per_host=4)
ONE, TWO = {"x": 8}, {"x": 2, "y": 4}


def example(name: str, size: str = "small") -> tuple[Any, Any, tuple[Any, ...]]:
    module = importlib.import_module(f"ffjax.examples.{name}")
    config = getattr(module.Config, size)()
    return config, module.make_train_step(config), module.example_args(config)


@functools.cache
def plan(name: str, strategy: str, axes: int) -> ffjax.Plan:
    _, step, args = example(name)
    return ffjax.plan(step, *args, cluster=H100S, mesh=ONE if axes == 1 else TWO, strategy=strategy)


@functools.cache
def regions(name: str) -> Regions:
    _, step, args = example(name, "tiny")
    return find_regions(build_graph(trace_step(step, args, {})))


def state(found: ffjax.Plan, *words: str) -> dict[str, tuple[tuple[int, ...], Spec]]:
    """The arrays of state whose path has one of these words: shape and sharding."""
    return {a.path: (a.shape, a.spec) for a in found.args if any(w in a.path for w in words)}


def moved(found: ffjax.Plan, kind: str) -> float:
    """Bytes of all collectives of a kind, a step."""
    return sum(c.bytes for c in found.estimate.collectives if c.kind == kind)


def parameter_bytes(found: ffjax.Plan) -> float:
    sizes = [4.0 * functools.reduce(int.__mul__, shape, 1) for shape, _ in state(found, "params/").values()]
    return sum(sizes)


@pytest.mark.parametrize("strategy", ["zero1", "zero2"])
def test_zero_shards_what_only_the_optimizer_uses(strategy: str) -> None:
    found = plan("gpt", strategy, 1)
    parameters, moments = state(found, "params/"), state(found, "/mu/", "/nu/")
    assert len(moments) == 2 * len(parameters) > 0
    assert all(not spec_axes(spec) for _, spec in parameters.values())
    assert all(spec_axes(spec) == ("x",) for _, spec in moments.values())
    # Each device updates a piece of the parameters, which all of them then gather.
    assert moved(found, "all_gather") == parameter_bytes(found)
    assert moved(found, "all_to_all") == 0
    # Nothing waits for those gathers in this step, so that the compiler makes few of them.
    assert found.layout is not None
    assert all(c.merged for c in found.layout.collectives() if c.collective.kind == "all_gather")


def test_zero2_scatters_every_gradient_as_it_is_summed() -> None:
    found = plan("gpt", "zero2", 1)
    assert moved(found, "reduce_scatter") == parameter_bytes(found)
    assert moved(found, "all_reduce") < 1024  # the loss


def test_zero1_leaves_gradients_whole() -> None:
    """By plan: where only a slice of an all-reduced gradient is read, the compiler may still scatter it."""
    found = plan("gpt", "zero1", 1)
    assert found.layout is not None
    assert all(scatter == -1 for a in found.layout.assignments for scatter in a.scatter)
    assert plan("gpt", "zero2", 1).estimate.peak_bytes <= found.estimate.peak_bytes


def test_hsdp_shards_inside_hosts_and_replicates_across() -> None:
    found = plan("gpt", "hsdp", 2)
    assert {spec_axes(spec) for _, spec in state(found, "params/", "/mu/", "/nu/").values()} == {("y",)}
    batch = state(found, "tokens", "batch")
    assert batch
    assert all(spec[0] == ("x", "y") for _, spec in batch.values())
    gathered = {c.axes: c.bytes for c in found.estimate.collectives if c.kind == "all_gather"}
    assert gathered.pop(("y",)) >= parameter_bytes(found)
    # Across hosts only pieces of gradients are: a sum over both axes is scattered over both, then gathered.
    assert sum(gathered.values()) <= parameter_bytes(found) / 4


def test_sequence_parallelism_scatters_and_gathers_where_tensor_parallelism_reduces() -> None:
    found = plan("gpt", "tensor_parallel+sequence", 1)
    config = example("gpt")[0]
    stream = 4.0 * config.batch * config.seq_len * config.d_model
    # Each layer gathers twice and scatters twice on the way forward, and as often on the way back.
    assert moved(found, "reduce_scatter") >= 4 * config.layers * stream
    assert moved(found, "all_gather") >= 4 * config.layers * stream
    activations = [c for c in found.estimate.collectives if c.kind == "all_reduce" and c.bytes / c.count >= stream]
    assert not activations
    products = {path: spec for path, (shape, spec) in state(found, "params/").items() if len(shape) > 1}
    assert sum(bool(spec_axes(spec)) for spec in products.values()) >= 4 * config.layers
    # No device holds a whole activation between products: that is the point of it.
    assert found.estimate.peak_bytes < 0.5 * plan("gpt", "tensor_parallel", 1).estimate.peak_bytes


def test_expert_parallelism_sends_tokens_to_their_experts() -> None:
    for axes, axis in ((1, "x"), (2, "y")):
        found = plan("moe", "expert_parallel", axes)
        experts = state(found, "/experts/")
        assert experts
        assert all(axis in spec[0] for _, spec in experts.values())
        assert moved(found, "all_to_all") > 0
        batch = state(found, "tokens", "batch")
        assert all(set(spec_axes(spec)) == set(found.mesh.axes) for _, spec in batch.values())


WITHOUT = {
    "no experts": ("gpt", "expert_parallel", 1, "each of several experts"),
    "no sequence": ("recommender", "tensor_parallel+sequence", 1, "beside the batch"),
    "one axis": ("gpt", "hsdp", 1, "more axes"),
    "one axis for two roles": ("gpt", "fsdp+tensor_parallel+sequence", 1, "more axes"),
}


@pytest.mark.parametrize("case", WITHOUT)
def test_a_strategy_without_a_use_says_so(case: str) -> None:
    name, strategy, axes, words = WITHOUT[case]
    with pytest.raises(PlanError, match=words):
        plan(name, strategy, axes)


@pytest.mark.parametrize("name", ["moe", "convnet"])
def test_every_strategy_is_a_point_of_the_free_space(name: str) -> None:
    """Its assignment is among the candidates of the free problem, at the cost that it has by itself."""
    program = regions(name)
    keys = family_keys(program)
    mesh = MeshShape(("x", "y"), (2, 4))
    free = build_problem(program, keys, by_family(kernels(program), keys), CollectiveModel(mesh, H100S))
    where = [{c: i for i, c in enumerate(node.candidates)} for node in free.nodes]
    usage = Usage(program, named_dims(program))
    for strategy in all_strategies():
        roles = strategy.on(mesh)
        if roles is None or lacking(usage, roles):
            continue
        result = search(program, H100S, budget_bytes=1e15, strategy=strategy.name, meshes=[mesh])
        assigned = result.best.layout.assignments
        choice = [index[assigned[node.regions[0]]] for index, node in zip(where, free.nodes, strict=True)]
        assert total_seconds(free, choice) == pytest.approx(result.best.step_s, rel=1e-9), strategy.name


def test_the_search_is_never_worse_than_any_strategy() -> None:
    """On one mesh of two axes, all of them competing, by the simulator where collectives overlap with kernels."""
    result = search(regions("moe"), H100S, budget_bytes=80e9, meshes=[MeshShape(("x", "y"), (2, 4))])
    assert {f.strategy for f in result.found} > {"data_parallel", "zero1", "zero2", "fsdp", "hsdp"}
    assert all(f.simulated is not None for f in result.found)
    assert all(result.best.predicted_s <= f.predicted_s for f in result.found)
    free = next(f for f in result.found if f.strategy == "auto")
    assert all(free.step_s <= f.step_s * (1 + 2e-4) for f in result.found)


# -- strategies of one's own


@pytest.fixture
def registry(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, Strategy]]:
    """One that forgets what a test adds, and has not looked for installed strategies."""
    monkeypatch.setattr(base, "_REGISTRY", dict(base._REGISTRY))
    base._import_installed.cache_clear()
    yield base._REGISTRY
    base._import_installed.cache_clear()


def momentum_step(state: dict[str, Any], x: jax.Array) -> dict[str, Any]:
    grads = jax.grad(lambda w: jnp.sum(jax.nn.relu(x @ w["up"]) @ w["down"]))(state["params"])
    mu = jax.tree.map(lambda m, g: 0.9 * m + g, state["mu"], grads)
    return {"params": jax.tree.map(jnp.subtract, state["params"], mu), "mu": mu}


def test_an_own_strategy_competes_and_can_be_asked_for(registry: dict[str, Strategy]) -> None:
    def roles(mesh: MeshShape) -> tuple[Role, ...] | None:
        return (Role.ZERO1, Role.TENSOR) if len(mesh.axes) == 2 else None

    def planned(strategy: str) -> ffjax.Plan:
        x = jax.ShapeDtypeStruct((4096, 8192), jnp.float32)
        params = {
            "up": jax.ShapeDtypeStruct((8192, 32768), x.dtype),
            "down": jax.ShapeDtypeStruct((32768, 8192), x.dtype),
        }
        return ffjax.plan(
            momentum_step, {"params": params, "mu": params}, x, cluster=H100S, mesh=TWO, strategy=strategy
        )

    own = "zero1+tensor_parallel"
    register(Strategy(name=own, roles=roles))
    assert own in {c.strategy for c in planned("auto").search.competitors}
    alone = planned(own)
    assert {frozenset(spec_axes(spec)) for _, spec in state(alone, "mu/").values()} == {frozenset("xy")}
    assert {spec_axes(spec) for _, spec in state(alone, "params/").values()} == {("y",)}
    unregister(own)
    with pytest.raises(PlanError, match=re.escape(f"unknown strategy {own!r}")):
        planned(own)


@pytest.mark.parametrize("name", ["fsdp", "auto"])
def test_a_name_is_taken_once(name: str, registry: dict[str, Strategy]) -> None:
    with pytest.raises(ValueError, match=f"'{name}' is registered already; choose another name"):
        register(Strategy(name=name, roles=lambda mesh: None))


@pytest.mark.parametrize("roles", [(Role.DATA,), (Role.DATA, "tensor")])
def test_roles_that_do_not_fit_the_mesh(roles: Any, registry: dict[str, Strategy]) -> None:
    register(Strategy(name="odd", roles=lambda mesh: roles))
    _, step, args = example("gpt", "tiny")
    with pytest.raises(PlanError, match=r"strategy 'odd' gives the roles .* for the mesh {'x': 2, 'y': 4}"):
        ffjax.plan(step, *args, cluster=H100S, mesh=TWO, strategy="odd")


def test_strategies_of_installed_packages(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, registry: dict[str, Strategy]
) -> None:
    info = tmp_path / "theirs-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: theirs\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(
        "[ffjax.strategies]\nbroken = theirs_missing\ntaken = theirs_taken\ntheirs = theirs_strategy\n"
    )
    head = "from ffjax.strategies import Role, Strategy, register\n"
    for module, name in {"theirs_strategy": "theirs", "theirs_taken": "fsdp"}.items():
        text = f"register(Strategy(name={name!r}, roles=lambda mesh: (Role.DATA,) * len(mesh.axes)))\n"
        (tmp_path / f"{module}.py").write_text(head + text)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.warns(FfjaxWarning) as told:
        assert "theirs" in {s.name for s in all_strategies()}
    assert [str(w.message).partition(" does not")[0] for w in told] == [
        "the strategy 'broken' of the package 'theirs'",
        "the strategy 'taken' of the package 'theirs'",
    ]
    assert named("theirs").on(MeshShape(("x",), (8,))) == (Role.DATA,)  # told once
