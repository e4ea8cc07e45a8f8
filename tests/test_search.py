"""The search finds what trying everything finds, and its shortcuts lose nothing."""

from __future__ import annotations

import functools
import importlib
import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from ffjax.cost.cluster import Cluster
from ffjax.cost.collectives import CollectiveModel
from ffjax.cost.kernels import by_family, kernels
from ffjax.cost.lifetimes import lifetimes
from ffjax.cost.memory import MemoryModel
from ffjax.ir.graph import build_graph
from ffjax.ir.regions import Regions, find_regions
from ffjax.ir.spec import MeshShape
from ffjax.planner import trace_step
from ffjax.strategies.budget import MOST_ROUNDS, layout_of, solve_within
from ffjax.strategies.families import family_keys
from ffjax.strategies.ilp import Instant, Solution, solve
from ffjax.strategies.neighbourhood import solve_near
from ffjax.strategies.priced_memory import solve_priced
from ffjax.strategies.problem import Problem, assignments, build_problem, total_seconds
from ffjax.strategies.prune import prune
from ffjax.strategies.search import AUTO, search

MOST_CHOICES = 3_000
"""Choices that are tried one by one."""

quick = settings(
    max_examples=20,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.filter_too_much, HealthCheck.too_slow],
)


def random_step(picks: Sequence[tuple[int, int, int]]) -> Callable[..., Any]:
    """A program of a few ops over square arrays: each pick is an op and the two values that it reads."""

    def step(*args: jax.Array) -> tuple[jax.Array, ...]:
        values = list(args)
        for op, a, b in picks:
            x, y = values[a % len(values)], values[b % len(values)]
            match op:
                case 0 | 1:
                    values.append(x @ y)
                case 2:
                    values.append(jnp.tanh(x) + y)
                case 3:
                    values.append(jnp.sum(x, axis=0, keepdims=True) * y)
                case 4:
                    values.append(x.T - y)
                case _:
                    values.append(jnp.cumsum(x, axis=0))
        return tuple(values[len(args) :])

    return step


def slow_links() -> Cluster:
    """Where communication and computation of small arrays weigh about the same."""
    return Cluster.named("cpu", devices_per_host=4)


def problem_of(regions: Regions, mesh: MeshShape, cluster: Cluster) -> Problem:
    keys = family_keys(regions)
    return build_problem(regions, keys, by_family(kernels(regions), keys), CollectiveModel(mesh, cluster))


def regions_of(step: Callable[..., Any], *args: Any, **options: Any) -> Regions:
    return find_regions(build_graph(trace_step(step, args, {}, **options)))


def choices(problem: Problem) -> itertools.product[tuple[int, ...]]:
    return itertools.product(*(range(len(n.candidates)) for n in problem.nodes))


programs = st.lists(st.tuples(st.integers(0, 5), st.integers(0, 9), st.integers(0, 9)), min_size=1, max_size=6)
meshes = st.sampled_from([MeshShape(("x",), (4,)), MeshShape(("x", "y"), (2, 2))])


def small_problem(picks: Sequence[tuple[int, int, int]], mesh: MeshShape, size: int = 512) -> Problem:
    shapes = [jax.ShapeDtypeStruct((size, size), jnp.float32)] * 2
    problem = problem_of(regions_of(random_step(picks), *shapes), mesh, slow_links())
    assume(1 < math.prod(len(n.candidates) for n in problem.nodes) <= MOST_CHOICES)
    return problem


@quick
@given(picks=programs, mesh=meshes)
def test_the_solver_finds_what_trying_everything_finds(picks: list[tuple[int, int, int]], mesh: MeshShape) -> None:
    problem = small_problem(picks, mesh)
    best = min(total_seconds(problem, choice) for choice in choices(problem))
    found = solve(problem)
    assert found is not None
    assert total_seconds(problem, found.choice) == pytest.approx(best, rel=2e-4)
    assert found.objective_s == pytest.approx(best, rel=2e-4)
    assert found.bound_s <= best * (1 + 1e-6)


@quick
@given(picks=programs, mesh=meshes)
def test_pruning_keeps_the_optimum(picks: list[tuple[int, int, int]], mesh: MeshShape) -> None:
    problem = small_problem(picks, mesh)
    small, kept = prune(problem)
    best = min(total_seconds(problem, choice) for choice in choices(problem))
    assert min(total_seconds(small, choice) for choice in choices(small)) == pytest.approx(best, rel=1e-9)
    for choice in itertools.islice(choices(small), 20):
        whole = tuple(keep[c] for keep, c in zip(kept, choice, strict=True))
        assert total_seconds(small, choice) == pytest.approx(total_seconds(problem, whole), rel=1e-9)


@quick
@given(picks=programs, mesh=meshes, seed=st.integers(0, 99))
def test_neighbourhoods_are_never_worse_than_their_starts(
    picks: list[tuple[int, int, int]], mesh: MeshShape, seed: int
) -> None:
    problem = small_problem(picks, mesh)
    rng = np.random.default_rng(seed)
    starts = [[int(rng.integers(len(n.candidates))) for n in problem.nodes] for _ in range(2)]
    found = solve_near(problem, [assignments(problem, choice) for choice in starts])
    assert found is not None
    best = total_seconds(problem, found.choice)
    assert all(best <= total_seconds(problem, choice) * (1 + 2e-4) for choice in starts)
    assert found.objective_s == pytest.approx(best, rel=1e-6)


@quick
@given(picks=programs, mesh=meshes, share=st.floats(0.0, 1.0))
def test_a_budget_is_kept_and_found_where_there_is_one(
    picks: list[tuple[int, int, int]], mesh: MeshShape, share: float
) -> None:
    """Against trying everything: what fits is found, and what is found fits."""
    problem = small_problem(picks, mesh)
    memory = MemoryModel(problem.regions, lifetimes(problem.regions.graph), family_keys(problem.regions))
    tried = [(memory.peak(layout_of(problem, c)).bytes, total_seconds(problem, c)) for c in choices(problem)]
    least, most = min(b for b, _ in tried), max(b for b, _ in tried)
    budget = least + share * (most - least)
    best = min(s for b, s in tried if b <= budget)

    def exact(p: Problem, instants: Sequence[Instant]) -> Solution | None:
        return solve(p, instants=instants)

    fit = solve_within(problem, budget, memory, exact, MOST_ROUNDS)
    assert fit is not None
    if not fit.fits:
        fit = solve_priced(problem, budget, memory, exact, fit)
    if fit.fits:
        assert fit.peak.bytes <= budget
        assert best * (1 - 2e-4) <= total_seconds(problem, fit.solution.choice)
    else:
        # Bytes are priced by a few instants: the least that is found is near the least that there is.
        assert fit.peak.bytes <= least * 1.25
        assert budget < fit.peak.bytes


EXAMPLES = ["gpt", "convnet", "recommender", "moe"]


@functools.cache
def example(name: str) -> Regions:
    module = importlib.import_module(f"ffjax.examples.{name}")
    config = module.Config.tiny()
    return regions_of(module.make_train_step(config), *module.example_args(config))


CLUSTERS = {
    "cpu": (Cluster.named("cpu", devices_per_host=8), [MeshShape(("x",), (8,)), MeshShape(("x", "y"), (4, 2))]),
    "h100": (
        Cluster.named("h100", hosts=2, devices_per_host=4),
        [MeshShape(("x",), (8,)), MeshShape(("x", "y"), (2, 4))],
    ),
}


@pytest.mark.parametrize("cluster", CLUSTERS)
@pytest.mark.parametrize("name", EXAMPLES)
def test_no_named_strategy_beats_the_free_search(name: str, cluster: str) -> None:
    described, tried = CLUSTERS[cluster]
    result = search(example(name), described, budget_bytes=described.device.memory_bytes, meshes=tried[:1])
    assert result.best.fits
    for found in result.found:
        if found.simulated is not None or not described.async_collectives:
            assert result.best.predicted_s <= found.predicted_s * (1 + 1e-9)
        free = next(f for f in result.found if f.strategy == AUTO and f.mesh == found.mesh)
        assert free.step_s <= found.step_s * (1 + 2e-4), f"{found.strategy} on {found.mesh}"
        assert free.bound_s <= found.step_s * (1 + 1e-9)
        assert found.step_s == pytest.approx(total_seconds(found.problem, found.choice))
    assert {f.strategy for f in result.found} >= {AUTO, "data_parallel", "fsdp", "tensor_parallel"}


def test_on_one_device_there_is_nothing_to_gain() -> None:
    alone = Cluster.named("cpu", devices_per_host=1)
    result = search(example("recommender"), alone, budget_bytes=alone.device.memory_bytes)
    assert result.best.bound_s == pytest.approx(result.best.step_s)
