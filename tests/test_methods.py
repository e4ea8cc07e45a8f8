"""One table of all search methods, and what holds for each of them."""

from __future__ import annotations

import dataclasses
import functools
import importlib
import math
from collections.abc import Callable, Sequence

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ffjax.cost.cluster import Cluster
from ffjax.cost.collectives import CollectiveModel
from ffjax.cost.kernels import kernels
from ffjax.cost.simulation.simulator import Simulator
from ffjax.ir.spec import MeshShape
from ffjax.strategies.methods import (
    MCMC,
    METHODS,
    Decomposition,
    Exact,
    Method,
    NamedDimensions,
    Refinement,
    Solver,
)
from ffjax.strategies.methods.moves import Moves
from ffjax.strategies.problem import Problem, Totals, assignments, restrict, total_seconds
from tests.random_programs import Pick
from tests.small_problems import choices, meshes, problem_of, programs, quick, random_problem, regions_of, small_problem

Seconds = Callable[[Sequence[int]], float]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
    """A method: how it is made, what it minimises, and how near to the optimum it promises to come."""

    name: str
    make: Callable[[Problem], Method]
    objective: Callable[[Problem], Seconds]
    gap: float = math.inf
    most_choices: int = 3_000


def summed(problem: Problem) -> Seconds:
    return Totals(problem).of


def simulator_of(problem: Problem) -> Simulator:
    cluster = dataclasses.replace(problem.model.cluster, async_collectives=True)
    return Simulator(problem.regions, kernels(problem.regions), CollectiveModel(problem.mesh, cluster))


def simulated(problem: Problem) -> Seconds:
    simulator = simulator_of(problem)
    return lambda choice: simulator.run(assignments(problem, choice)).step_s


TABLE = [
    Row(name="exact", make=lambda p: Exact(), objective=summed, gap=2e-4),
    Row(name="default", make=lambda p: Solver(), objective=summed, gap=2e-3),
    Row(name="decomposition", make=lambda p: Decomposition(), objective=summed, gap=2e-3),
    Row(name="decomposition, one way", make=lambda p: Decomposition(ways=1), objective=summed),
    Row(name="named dimensions", make=lambda p: NamedDimensions(), objective=summed),
    Row(name="mcmc", make=lambda p: MCMC(proposals=200), objective=summed),
    Row(
        name="refinement",
        make=lambda p: Refinement(simulator_of(p), proposals=20),
        objective=simulated,
        most_choices=100,
    ),
]

rows = pytest.mark.parametrize("row", TABLE, ids=[r.name for r in TABLE])


@rows
@quick
@given(picks=programs, mesh=meshes, seed=st.integers(0, 99))
def test_a_method_does_what_all_methods_do(row: Row, picks: list[Pick], mesh: MeshShape, seed: int) -> None:
    problem = small_problem(picks, mesh, row.most_choices)
    seconds = row.objective(problem)
    best = min(seconds(choice) for choice in choices(problem))
    rng = np.random.default_rng(seed)
    starts = [tuple(int(rng.integers(len(n.candidates))) for n in problem.nodes) for _ in range(2)]

    for given_ in ([], starts):
        found, again = (row.make(problem).solve(problem, given_) for _ in range(2))
        assert found is not None
        assert again is not None
        assert found.choice == again.choice
        assert len(found.choice) == len(problem.nodes)
        assert all(0 <= c < len(n.candidates) for c, n in zip(found.choice, problem.nodes, strict=True))
        assert found.objective_s == pytest.approx(seconds(found.choice), rel=1e-9)
        assert best * (1 - 1e-9) <= found.objective_s <= best * (1 + row.gap)
        assert found.bound_s <= best * (1 + 1e-6)
        assert all(found.objective_s <= seconds(choice) * (1 + 1e-9) for choice in given_)


@rows
def test_a_method_finds_nothing_where_nothing_is_possible(row: Row) -> None:
    problem = random_problem([("dot", 0, 1)], MeshShape(("x",), (4,)))
    every = [range(len(n.candidates)) for n in problem.nodes]
    assert row.make(problem).solve(restrict(problem, [[], *every[1:]])) is None
    infinite = [dataclasses.replace(t, seconds=np.full_like(t.seconds, np.inf)) for t in problem.transfers]
    assert row.make(problem).solve(dataclasses.replace(problem, transfers=infinite)) is None


def test_every_method_is_in_the_table() -> None:
    problem = random_problem([("dot", 0, 1)], MeshShape(("x",), (4,)))
    assert {type(row.make(problem)) for row in TABLE} == {*METHODS, Refinement}


@quick
@given(picks=programs, mesh=meshes, seed=st.integers(0, 99))
def test_moves_say_what_a_change_adds(picks: list[Pick], mesh: MeshShape, seed: int) -> None:
    """Also after others moved; and from where a descent ends no move gains."""
    problem = small_problem(picks, mesh)
    rng = np.random.default_rng(seed)
    choice = [int(rng.integers(len(n.candidates))) for n in problem.nodes]
    moves = Moves(problem, choice)
    for _ in range(5):
        node = int(rng.integers(len(choice)))
        before = total_seconds(problem, choice)
        extra = moves.extra(node)
        for candidate in range(len(extra)):
            changed = [*choice[:node], candidate, *choice[node + 1 :]]
            assert extra[candidate] == pytest.approx(total_seconds(problem, changed) - before, rel=1e-6, abs=1e-15)
        choice[node] = int(rng.integers(len(extra)))
        moves.move(node, choice[node])
    moves.descend()
    assert all(moves.extra(n).min() >= -1e-9 * total_seconds(problem, moves.choice) for n in range(len(choice)))


@functools.cache
def example(name: str, mesh: MeshShape) -> Problem:
    module = importlib.import_module(f"ffjax.examples.{name}")
    config = module.Config.tiny()
    regions = regions_of(module.make_train_step(config), *module.example_args(config))
    return problem_of(regions, mesh, Cluster.named("h100", hosts=2, devices_per_host=4))


TWO = MeshShape(("x", "y"), (2, 4))


@pytest.mark.parametrize("name", ["gpt", "recommender"])
def test_named_dimensions_come_near_the_optimum(name: str) -> None:
    """A few lists of dimensions say most of what a plan says op by op."""
    problem = example(name, TWO)
    best, found = Solver().solve(problem), NamedDimensions().solve(problem)
    assert best is not None
    assert found is not None
    assert found.objective_s <= 1.1 * best.objective_s


def test_more_ways_prove_more() -> None:
    problem = example("recommender", TWO)
    best = Exact().solve(problem)
    assert best is not None
    for ways in (1, 64):
        found = Decomposition(ways=ways, gap=0.0).solve(problem)
        assert found is not None
        assert found.bound_s <= best.objective_s * (1 + 1e-6)
        assert found.objective_s >= best.bound_s * (1 - 1e-6)
    assert found.objective_s <= best.objective_s * (1 + 1e-4)


def test_refinement_keeps_no_plan_that_does_not_fit() -> None:
    problem = example("gpt", TWO)
    start = (0,) * len(problem.nodes)
    asked: list[Sequence[int]] = []

    def fits(choice: Sequence[int]) -> bool:
        asked.append(choice)
        return False

    found = Refinement(simulator_of(problem), fits, proposals=20).solve(problem, [start])
    free = Refinement(simulator_of(problem), proposals=20).solve(problem, [start])
    assert found is not None
    assert free is not None
    assert asked
    assert found.choice == start
    assert free.objective_s < found.objective_s


def test_several_regions_that_change_at_once_are_simulated_as_from_the_beginning() -> None:
    problem = example("gpt", TWO)
    start = Solver().solve(problem)
    assert start is not None
    simulator, rng = simulator_of(problem), np.random.default_rng(0)
    choice = list(start.choice)
    simulator.run(assignments(problem, choice))
    for _ in range(5):
        changed = rng.choice(len(choice), size=4, replace=False).tolist()
        for node in changed:
            choice[node] = int(rng.integers(len(problem.nodes[node].candidates)))
        changes = {r: problem.nodes[n].candidates[choice[n]] for n in changed for r in problem.nodes[n].regions}
        assert simulator.update(changes) == simulator_of(problem).run(assignments(problem, choice))
