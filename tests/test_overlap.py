"""What the simulator says of overlap, and what the search makes of it."""

from __future__ import annotations

import functools
import importlib

import numpy as np
import pytest

from ffjax.cost.cluster import Cluster
from ffjax.cost.collectives import CollectiveModel
from ffjax.cost.kernels import by_family, kernels
from ffjax.cost.simulation.exposure import exposure
from ffjax.cost.simulation.simulator import Simulator
from ffjax.cost.simulation.task_costs import TICKS_PER_S
from ffjax.ir.graph import build_graph
from ffjax.ir.regions import Regions, find_regions
from ffjax.ir.spec import MeshShape
from ffjax.planning.tracing import trace_step
from ffjax.strategies.families import family_keys
from ffjax.strategies.methods.solver import Solver
from ffjax.strategies.overlap import LEAST, all_hidden, observed, overlapped
from ffjax.strategies.problem import Problem, assignments, build_problem, total_seconds

MESH = MeshShape(("x", "y"), (4, 2))
ONE_HOST = Cluster.named("h100")


@functools.cache
def program(name: str) -> Regions:
    module = importlib.import_module(f"ffjax.examples.{name}")
    config = module.Config.tiny()
    step = trace_step(module.make_train_step(config), module.example_args(config), {}, donate_argnums=0)
    return find_regions(build_graph(step))


def problem_of(regions: Regions, cluster: Cluster) -> Problem:
    keys = family_keys(regions)
    return build_problem(regions, keys, by_family(kernels(regions), keys), CollectiveModel(MESH, cluster))


def random_choice(problem: Problem, seed: int) -> list[int]:
    rng = np.random.default_rng(seed)
    return [int(rng.integers(len(n.candidates))) for n in problem.nodes]


@pytest.mark.parametrize("name", ["gpt", "moe"])
@pytest.mark.parametrize("seed", [0, 1])
def test_exposed_is_what_kernels_wait_for(name: str, seed: int) -> None:
    """With one link, kernels stand still only while a collective runs."""
    regions = program(name)
    problem = problem_of(regions, ONE_HOST)
    simulator = Simulator(regions, kernels(regions), problem.model)
    simulated = simulator.run(assignments(problem, random_choice(problem, seed)))
    found = exposure(simulator)
    assert all(0 <= exposed <= ticks * (1 + 1e-12) for ticks, exposed in found.values())
    assert sum(exposed for _, exposed in found.values()) == pytest.approx(simulated.exposed_comm_s * TICKS_PER_S)
    assert sum(ticks for ticks, _ in found.values()) == pytest.approx(simulated.comm_s * TICKS_PER_S)
    assert 0 < simulated.exposed_comm_s < simulated.comm_s


def test_where_collectives_are_synchronous_all_is_exposed() -> None:
    cluster = Cluster.named("cpu", devices_per_host=8)
    regions = program("gpt")
    problem = problem_of(regions, cluster)
    simulator = Simulator(regions, kernels(regions), problem.model)
    simulator.run(assignments(problem, random_choice(problem, 2)))
    assert exposure(simulator)
    assert all(exposed == ticks for ticks, exposed in exposure(simulator).values())


def test_a_problem_seen_from_a_plan_prices_it_nearer_to_the_simulator() -> None:
    regions = program("gpt")
    problem = problem_of(regions, ONE_HOST)
    found = Solver().solve(overlapped(problem, all_hidden(problem)))
    assert found is not None
    simulator = Simulator(regions, kernels(regions), problem.model)
    simulated = simulator.run(assignments(problem, found.choice))
    exposed = observed(problem, simulator)
    assert all(LEAST <= e <= 1.0 for e in (*exposed.nodes, *exposed.transfers))
    whole_s = total_seconds(problem, found.choice)
    seen_s = total_seconds(overlapped(problem, exposed), found.choice)
    assert abs(seen_s - simulated.step_s) < abs(whole_s - simulated.step_s)
