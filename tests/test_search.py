"""The search finds what trying everything finds, and its shortcuts lose nothing."""

from __future__ import annotations

import functools
import importlib
import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ffjax.cost.cluster import Cluster
from ffjax.cost.collectives import CollectiveModel
from ffjax.cost.compilers import compiler_of
from ffjax.cost.lifetimes import lifetimes
from ffjax.cost.memory import MemoryModel
from ffjax.ir.regions import Regions
from ffjax.ir.spec import MeshShape
from ffjax.strategies import session
from ffjax.strategies.budget import layout_of
from ffjax.strategies.families import family_keys
from ffjax.strategies.instants import Instants
from ffjax.strategies.limited import limited
from ffjax.strategies.methods import ilp
from ffjax.strategies.methods.dual_ascent import Ascent
from ffjax.strategies.methods.solver import Solver
from ffjax.strategies.overlap import all_hidden, overlapped
from ffjax.strategies.priced_memory import highest, solve_within
from ffjax.strategies.problem import assignments, choice_of, restrict, total_seconds
from ffjax.strategies.search import search
from ffjax.strategies.session import AUTO
from tests.random_programs import Pick
from tests.small_problems import choices, meshes, programs, quick, regions_of, small_problem


@quick
@given(picks=programs, mesh=meshes)
def test_the_solver_finds_what_trying_everything_finds(picks: list[Pick], mesh: MeshShape) -> None:
    """Also from where it ended on the same problem with other costs."""
    solver = Solver()
    whole = small_problem(picks, mesh)
    for problem in (whole, overlapped(whole, all_hidden(whole)), whole):
        best = min(total_seconds(problem, choice) for choice in choices(problem))
        found = solver.solve(problem, gap=1e-6)
        assert found is not None
        assert found.objective_s == pytest.approx(total_seconds(problem, found.choice), rel=1e-9)
        assert best * (1 - 1e-9) <= found.objective_s <= best * (1 + 1e-5) + 1e-12
        assert found.bound_s <= best * (1 + 1e-6)


@quick
@given(picks=programs, mesh=meshes, sweeps=st.integers(1, 4))
def test_the_ascent_bounds_every_choice_and_drops_none_that_is_good(
    picks: list[Pick], mesh: MeshShape, sweeps: int
) -> None:
    problem = small_problem(picks, mesh)
    ascent = Ascent(problem)
    ascent.climb(0.0, sweeps)
    tried = {choice: total_seconds(problem, choice) for choice in choices(problem)}
    best = min(tried.values())
    assert ascent.best is not None
    assert ascent.bound_s <= best * (1 + 1e-9)
    below = 1.05 * best
    kept = [set(k) for k in ascent.survivors(below)]
    for choice, seconds in tried.items():
        if seconds < below * (1 - 1e-9):
            assert all(c in k for c, k in zip(choice, kept, strict=True))


@quick
@given(picks=programs, mesh=meshes)
def test_turns_together_do_what_turns_one_by_one_do(picks: list[Pick], mesh: MeshShape) -> None:
    ascent = Ascent(small_problem(picks, mesh))
    theta, slack = [t.copy() for t in ascent.theta], [p.slack.copy() for p in ascent.pairs]
    for forward in (True, False, True):
        ascent.take_turns(forward=forward)
        nodes = range(len(theta))
        for node in nodes if forward else reversed(nodes):
            near = [(i, p) for i, p in enumerate(ascent.pairs) if node in (p.source, p.target)]
            done = [(i, p) for i, p in near if (p.source + p.target - node < node) == forward]
            coming = [(i, p) for i, p in near if (p.source + p.target - node > node) == forward]
            for i, p in done:
                spare = slack[i].min(axis=1 if p.source == node else 0)
                slack[i] -= spare[:, None] if p.source == node else spare
                theta[node] += spare[p.row_of if p.source == node else p.column_of]
            part = theta[node] / max(len(done), len(coming), 1)
            for i, p in coming:
                index = p.row_of if p.source == node else p.column_of
                message = np.array([part[index == n].min() for n in range(index.max() + 1)])
                slack[i] += message[:, None] if p.source == node else message
                theta[node] -= message[index]
        for ours, theirs in zip([*ascent.theta, *(p.slack for p in ascent.pairs)], [*theta, *slack], strict=True):
            assert ours == pytest.approx(theirs, rel=1e-9, abs=1e-12)


@quick
@given(picks=programs, mesh=meshes, seed=st.integers(0, 99))
def test_a_restricted_problem_prices_choices_alike(picks: list[Pick], mesh: MeshShape, seed: int) -> None:
    problem = small_problem(picks, mesh)
    rng = np.random.default_rng(seed)
    kept = [sorted(set(rng.integers(len(n.candidates), size=3).tolist())) for n in problem.nodes]
    small = restrict(problem, kept)
    for choice in itertools.islice(choices(small), 20):
        whole = tuple(keep[c] for keep, c in zip(kept, choice, strict=True))
        assert total_seconds(small, choice) == pytest.approx(total_seconds(problem, whole), rel=1e-9)
        assert choice_of(problem, assignments(problem, whole)) == whole


@quick
@given(picks=programs, mesh=meshes, share=st.floats(0.0, 1.0))
def test_what_fits_does_so_under_its_own_schedule(picks: list[Pick], mesh: MeshShape, share: float) -> None:
    """On GPUs a layout's collectives decide the order of the step, and so the peak."""
    problem = small_problem(picks, mesh)
    regions = problem.regions
    memory = MemoryModel(regions, lifetimes(regions.graph, compiler_of("gpu")), family_keys(regions))
    layouts = [layout_of(problem, c) for c in choices(problem)]
    peaks = [memory.under(layout).peak(layout).bytes for layout in layouts]
    budget = min(peaks) + share * (max(peaks) - min(peaks))
    fit = solve_within(problem, budget, memory, Solver())
    ample = solve_within(problem, max(peaks) * 2, memory, Solver())
    assert fit is not None
    assert ample is not None
    assert ample.fits
    if fit.fits:
        assert memory.under(fit.layout).peak(fit.layout).bytes <= budget


@quick
@given(picks=programs, mesh=meshes, share=st.floats(0.05, 1.0), seed=st.integers(0, 99))
def test_limits_are_kept_by_the_best_that_keeps_them(
    picks: list[Pick], mesh: MeshShape, share: float, seed: int
) -> None:
    """The integer program with limits on bytes at two instants, against trying everything."""
    problem = small_problem(picks, mesh)
    memory = MemoryModel(problem.regions, lifetimes(problem.regions.graph), family_keys(problem.regions))
    ats = np.random.default_rng(seed).integers(len(problem.regions.graph.ops), size=2).tolist()
    within = limited(problem, Instants(problem, memory), ats)
    tried = [(within.bytes(c), c) for c in choices(problem)]
    worst = [float(taken.max()) for taken, _ in tried]
    budget = min(worst) + share * (max(worst) - min(worst))
    found = ilp.solve(within.problem, limits=within.limits(budget * (1 + 1e-9)), gap=0.0)
    assert found is not None
    assert float(within.bytes(found.choice).max()) <= budget * (1 + 1e-6)
    best = min(total_seconds(problem, c) for taken, c in tried if taken.max() <= budget)
    assert total_seconds(problem, found.choice) <= best * (1 + 1e-4)
    # Bytes at a price are what the limits count.
    prices = np.array([1e-9, 3e-9])
    bytes_that_vary = within.bytes(found.choice) - np.array([t.fixed_bytes for t in within.terms])
    priced = total_seconds(within.priced(prices.tolist()), found.choice)
    assert priced == pytest.approx(total_seconds(problem, found.choice) + float(prices @ bytes_that_vary))


def test_where_the_lowest_line_is_highest() -> None:
    seconds, over = np.array([1.0, 3.0]), np.array([[2.0], [-2.0]])
    prices, height, shares = highest(seconds, over, 10.0)
    assert prices == pytest.approx([0.5])
    assert height == pytest.approx(2.0)
    assert shares == pytest.approx([0.5, 0.5])
    # No price is high enough where everything is over.
    assert highest(seconds, abs(over), 10.0)[0] == pytest.approx([10.0])


@quick
@given(picks=programs, mesh=meshes, share=st.floats(0.0, 1.0))
def test_a_budget_is_kept_and_found_where_there_is_one(picks: list[Pick], mesh: MeshShape, share: float) -> None:
    """Against trying everything: what fits is found, and what is found fits."""
    problem = small_problem(picks, mesh)
    memory = MemoryModel(problem.regions, lifetimes(problem.regions.graph), family_keys(problem.regions))
    tried = [(memory.peak(layout_of(problem, c)).bytes, total_seconds(problem, c)) for c in choices(problem)]
    least, most = min(b for b, _ in tried), max(b for b, _ in tried)
    budget = least + share * (most - least)
    best = min(s for b, s in tried if b <= budget)

    fit = solve_within(problem, budget, memory, Solver())
    assert fit is not None
    if fit.bound_within is not None:
        assert fit.bound_within() <= best * (1 + 1e-9)
    if fit.fits:
        assert fit.peak.bytes <= budget
        assert best * (1 - 2e-4) <= total_seconds(problem, fit.solution.choice)
        assert total_seconds(problem, fit.solution.choice) <= best * 1.01
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
        assert free.step_s <= found.step_s * (1 + 1e-9), f"{found.strategy} on {found.mesh}"
        assert free.bound_s <= found.step_s * (1 + 1e-9)
        assert found.step_s == pytest.approx(total_seconds(found.problem, found.choice))
    assert {f.strategy for f in result.found} >= {AUTO, "data_parallel", "fsdp", "tensor_parallel"}


def test_on_one_device_there_is_nothing_to_gain() -> None:
    alone = Cluster.named("cpu", devices_per_host=1)
    result = search(example("recommender"), alone, budget_bytes=alone.device.memory_bytes)
    assert result.best.bound_s == pytest.approx(result.best.step_s)


def test_a_third_axis_is_tried_where_links_are_of_two_levels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(session, "WORTH", -math.inf)  # whatever it is worth
    two_levels = CLUSTERS["h100"][0]
    result = search(example("recommender"), two_levels, budget_bytes=two_levels.device.memory_bytes)
    flat = [f for f in result.found if len(f.mesh.axes) == 2]
    cut = [f for f in result.found if len(f.mesh.axes) == 3]
    assert {str(f.mesh) for f in cut} == {"2x2x2"}
    base = min(flat, key=lambda f: f.predicted_s)
    # It starts from that plan, which is one of its own.
    assert min(f.step_s for f in cut) <= base.step_s * (1 + 1e-9)
    assert min(f.predicted_s for f in result.found) == result.best.predicted_s


def test_a_third_axis_is_left_out_where_it_is_worth_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(session, "WORTH", 1.0)
    two_levels = CLUSTERS["h100"][0]
    result = search(example("recommender"), two_levels, budget_bytes=two_levels.device.memory_bytes)
    assert max(len(f.mesh.axes) for f in result.found) == 2


def test_hosts_of_different_sizes_share_a_plan() -> None:
    uneven = Cluster.named("h100").with_hosts(4, 2)
    result = search(example("recommender"), uneven, budget_bytes=uneven.device.memory_bytes)
    assert result.best.fits
    assert result.best.mesh.devices == 6
    # Through the smaller host's network no more passes than its devices can send.
    alike = Cluster.named("h100", hosts=3, devices_per_host=2)
    gathers = [CollectiveModel(MeshShape(("x",), (6,)), c).coefficients("all_gather", ("x",)) for c in (uneven, alike)]
    assert gathers[0][1] == gathers[1][1]
