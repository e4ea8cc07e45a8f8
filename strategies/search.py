"""The search: all named strategies and the free space, on all meshes that make sense, within a memory budget.

1. Every named strategy that has a use for a mesh is solved on every mesh; restricted problems are small.
2. On the meshes where they did best the free problem is solved: exactly (`ilp.solve`), or, where it is too large for
   that, in neighbourhoods of the best named solutions (`neighbourhood`).
3. Where that does not fit, memory is given a price (`priced_memory`), which also finds what budget would do.
4. The answer is the fastest that fits. The free space contains every strategy, so it is never worse than the best of
   them under the same costs; where only neighbourhoods were searched, the strategies themselves still compete.
5. A sum of costs sees no overlap. Where collectives run beside kernels the fastest few are simulated, and the fastest
   of those in the simulator is the answer.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from ffjax.cost.cluster import Cluster
from ffjax.cost.collectives import CollectiveModel
from ffjax.cost.compilers import compiler_of
from ffjax.cost.kernels import Kernel, by_family, kernels
from ffjax.cost.lifetimes import lifetimes
from ffjax.cost.memory import MemoryModel, Peak
from ffjax.cost.simulation.simulator import Simulated, Simulator
from ffjax.cost.simulation.task_graph import build_task_graph
from ffjax.ir.dims import named_dims
from ffjax.ir.layout import Layout
from ffjax.ir.regions import Regions
from ffjax.ir.spec import MeshShape
from ffjax.strategies.base import Role, Strategy, all_strategies, named
from ffjax.strategies.budget import MOST_ROUNDS, Fit, Solver, solve_within
from ffjax.strategies.candidates import Keep
from ffjax.strategies.families import family_keys
from ffjax.strategies.ilp import Instant, Solution, solve
from ffjax.strategies.neighbourhood import solve_near
from ffjax.strategies.priced_memory import solve_priced
from ffjax.strategies.problem import Problem, build_problem, total_seconds
from ffjax.strategies.prune import prune
from ffjax.strategies.roles import Roles

EXACT_CELLS = 150_000
"""Resharding variables up to which the free problem is solved exactly."""
LEAN_CELLS = 2_000
"""The same where memory is short: with bytes as a constraint or, many times over, in the objective."""
MOST_AXES = 2
"""Of the meshes that are tried when none is given."""
FREE_MESHES = 2
"""On how many meshes, beside the one with a single axis, the free problem is solved."""

SIMULATED = 6
"""How many plans are simulated before the fastest is taken, beside the best of each strategy."""

AUTO = "auto"


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """The best plan of one strategy on one mesh."""

    strategy: str
    mesh: MeshShape
    step_s: float
    bound_s: float
    peak: Peak
    fits: bool
    exact: bool
    seconds: float
    problem: Problem
    choice: tuple[int, ...]
    layout: Layout
    simulated: Simulated | None = None
    """With overlap; None where it was not simulated."""

    @property
    def predicted_s(self) -> float:
        """The step's seconds, with overlap where that is known."""
        return self.step_s if self.simulated is None else self.simulated.step_s


@dataclass(frozen=True, slots=True, kw_only=True)
class SearchResult:
    """`best` is the fastest that fits, or, where nothing does, the one that needs least memory."""

    best: Found
    found: tuple[Found, ...]
    seconds: dict[str, float]
    keys: tuple[str, ...]
    """The family of each region."""
    kernels: tuple[Kernel, ...]


Progress = Callable[[str, float], None]
"""Told what is being solved, and the share of the work that is done."""


def search(
    regions: Regions,
    cluster: Cluster,
    *,
    budget_bytes: float,
    strategy: str = AUTO,
    meshes: Sequence[MeshShape] | None = None,
    keep: Callable[[MeshShape], Keep | None] | None = None,
    marks: Mapping[int, str] | None = None,
    progress: Progress | None = None,
) -> SearchResult:
    """Finds the fastest plan that fits.

    Args:
      regions: the program.
      cluster: where it runs.
      budget_bytes: what one device may hold.
      strategy: `"auto"`, or a named strategy that alone is searched.
      meshes: those to consider; by default the cluster's.
      keep: for a mesh, which candidates pins leave.
      marks: for each pinned region what it is pinned to: those pinned otherwise are decided apart.
      progress: is told what is being done.

    Raises:
      ValueError: for an unknown strategy, or one that has no use for any of the meshes.
    """
    began = time.perf_counter()
    search_ = _Search(regions, cluster, budget_bytes, keep, marks)
    analysed = time.perf_counter()
    strategies = all_strategies() if strategy == AUTO else (named(strategy),)
    if meshes is None:
        meshes = cluster.mesh_shapes(max_axes=MOST_AXES)
        tried = {s.name: _natural(s, meshes) for s in strategies}
    else:
        tried = {s.name: list(meshes) for s in strategies}
    pairs = [
        (s, m, roles) for m in meshes for s in strategies if m in tried[s.name] and (roles := s.roles(m)) is not None
    ]
    if not pairs and strategy != AUTO:
        raise ValueError(
            f"strategy {strategy!r} has no use for the meshes {', '.join(map(str, meshes))}; give it one with more axes"
        )
    found: list[Found] = []
    for done, (entry, mesh, roles) in enumerate(pairs):
        if progress:
            progress(f"{entry.name} on {mesh}", 0.5 * done / len(pairs))
        result = search_.restricted(entry, mesh, roles, alone=strategy != AUTO)
        if result is not None:
            found.append(result)
    restricted = time.perf_counter()
    if strategy == AUTO:
        chosen = _promising(found, meshes)
        for done, mesh in enumerate(chosen):
            if progress:
                progress(f"free search on {mesh}", 0.5 + 0.5 * done / len(chosen))
            result = search_.free(mesh, [f for f in found if f.mesh == mesh])
            if result is not None:
                found.append(result)
    if not found:
        raise ValueError(f"no candidate is left for strategy {strategy!r} on any mesh; loosen the pins")
    finished = time.perf_counter()
    fitting = [f for f in found if f.fits]
    if fitting and cluster.async_collectives:
        if progress:
            progress("simulates the fastest", 1.0)
        simulated = search_.simulated(fitting)
        found = [simulated.get(id(f), f) for f in found]
        best = min(simulated.values(), key=lambda f: f.predicted_s)
    else:
        best = min(fitting, key=lambda f: f.step_s) if fitting else min(found, key=lambda f: f.peak.bytes)
    # Of the best the peak is that of its own schedule; for all that would take long.
    scheduled = dataclasses.replace(best, peak=search_.memory.under(best.layout).peak(best.layout))
    found = [scheduled if f is best else f for f in found]
    seconds = {
        "analyse": analysed - began,
        "named strategies": restricted - analysed,
        "free search": finished - restricted,
        "simulate": time.perf_counter() - finished,
    }
    return SearchResult(
        best=scheduled,
        found=tuple(found),
        seconds=seconds,
        keys=tuple(search_.keys),
        kernels=tuple(search_.kernels),
    )


def _natural(strategy: Strategy, meshes: Sequence[MeshShape]) -> list[MeshShape]:
    """Where an expert would try a strategy: all meshes if its axes differ in role, else the simplest of each rank."""
    if any(len(set(roles)) > 1 for m in meshes if (roles := strategy.roles(m)) is not None):
        return list(meshes)
    return list({len(m.axes): m for m in reversed(meshes)}.values())


def _promising(found: Sequence[Found], meshes: Sequence[MeshShape]) -> list[MeshShape]:
    """The meshes on which a named strategy did best, and every mesh of one axis."""

    def score(mesh: MeshShape) -> tuple[bool, float]:
        here = [f for f in found if f.mesh == mesh]
        return min(((not f.fits, f.step_s) for f in here), default=(True, float("inf")))

    ranked = sorted(meshes, key=score)
    single = [m for m in meshes if len(m.axes) == 1]
    return list(dict.fromkeys([m for m in ranked if len(m.axes) > 1][:FREE_MESHES] + single))


class _Search:
    """What all solves of one search share."""

    def __init__(
        self,
        regions: Regions,
        cluster: Cluster,
        budget_bytes: float,
        keep: Callable[[MeshShape], Keep | None] | None,
        marks: Mapping[int, str] | None,
    ) -> None:
        self.regions = regions
        self.cluster = cluster
        self.budget_bytes = budget_bytes
        self.keep = keep
        self.keys = family_keys(regions, marks)
        self.kernels = kernels(regions)
        self.by_family = by_family(self.kernels, self.keys)
        self.dims = named_dims(regions)
        times = lifetimes(regions.graph, compiler_of(cluster.device.platform))
        self.memory = MemoryModel(regions, times, self.keys)

    def restricted(self, strategy: Strategy, mesh: MeshShape, roles: Sequence[Role], *, alone: bool) -> Found | None:
        """The best plan of a named strategy on one mesh; one that stands alone is made to fit if it can."""
        began = time.perf_counter()
        rules = Roles(self.regions, self.dims, mesh, roles)
        pins = self.keep(mesh) if self.keep is not None else None
        keep = _both(rules.keep(), pins)
        model = CollectiveModel(mesh, self.cluster)
        problem = build_problem(self.regions, self.keys, self.by_family, model, rules.allow(), keep)
        if any(not node.candidates for node in problem.nodes):
            return None
        allowed = rules.forbid(problem)
        fit = solve_within(allowed, self.budget_bytes, self.memory, _solve)
        if alone and fit is not None and not fit.fits:
            fit = self._priced(allowed, _solve, fit)
        return self._found(strategy.name, problem, fit, exact=True, began=began)

    def free(self, mesh: MeshShape, starts: Sequence[Found]) -> Found | None:
        """The best plan of the whole space on one mesh."""
        began = time.perf_counter()
        pins = self.keep(mesh) if self.keep is not None else None
        model = CollectiveModel(mesh, self.cluster)
        problem = build_problem(self.regions, self.keys, self.by_family, model, None, pins)
        if any(not node.candidates for node in problem.nodes):
            return None
        cells = sum(t.seconds.size * len(t.consumers) for t in problem.transfers)
        exact = cells <= EXACT_CELLS or not starts

        def near(p: Problem, instants: Sequence[Instant]) -> Solution | None:
            return solve_near(p, [s.layout.assignments for s in starts], instants)

        solver = _solve if exact else near
        pruned, _ = prune(problem)
        lean = cells <= LEAN_CELLS or not starts
        rounds = MOST_ROUNDS if lean else 1
        fit = solve_within(pruned, self.budget_bytes, self.memory, solver, rounds)
        if fit is not None and not fit.fits:
            # Pruning looks at time alone: what it dropped may be what fits.
            where = [{c: i for i, c in enumerate(node.candidates)} for node in problem.nodes]
            kept = [node.candidates[c] for node, c in zip(pruned.nodes, fit.solution.choice, strict=True)]
            choice = tuple(index[c] for index, c in zip(where, kept, strict=True))
            fit = dataclasses.replace(fit, solution=dataclasses.replace(fit.solution, choice=choice))
            pruned, fit = problem, self._priced(problem, _solve if lean else near, fit)
        return self._found(AUTO, pruned, fit, exact=exact, began=began)

    def simulated(self, fitting: Sequence[Found]) -> dict[int, Found]:
        """The fastest few, and of each strategy the fastest, as the simulator has them; equal ones once.

        Each by the identity of what it was.
        """
        distinct: dict[tuple[str, str], Found] = {}
        first: dict[str, Found] = {}
        for f in sorted(fitting, key=lambda f: f.step_s):
            one = distinct.setdefault((f"{f.step_s:.6g}", f"{f.peak.bytes:.6g}"), f)
            first.setdefault(f.strategy, one)
        chosen = {id(f): f for f in [*list(distinct.values())[:SIMULATED], *first.values()]}
        tasks = build_task_graph(self.regions, self.kernels)
        simulators: dict[MeshShape, Simulator] = {}
        result: dict[int, Found] = {}
        for f in chosen.values():
            if f.mesh not in simulators:
                model = CollectiveModel(f.mesh, self.cluster)
                simulators[f.mesh] = Simulator(self.regions, self.kernels, model, tasks=tasks)
            ran = simulators[f.mesh].run(f.layout.assignments)
            result[id(f)] = dataclasses.replace(f, simulated=ran)
        return result

    def _priced(self, problem: Problem, solver: Solver, fit: Fit) -> Fit:
        return solve_priced(problem, self.budget_bytes, self.memory, solver, fit)

    def _found(self, name: str, problem: Problem, fit: Fit | None, *, exact: bool, began: float) -> Found | None:
        if fit is None:
            return None
        step_s = total_seconds(problem, fit.solution.choice)
        bound_s = fit.solution.bound_s if exact else sum(float(n.cost_s.min()) for n in problem.nodes)
        return Found(
            strategy=name,
            mesh=problem.mesh,
            step_s=step_s,
            bound_s=min(bound_s, step_s),
            peak=fit.peak,
            fits=fit.fits,
            exact=exact,
            seconds=time.perf_counter() - began,
            problem=problem,
            choice=fit.solution.choice,
            layout=fit.layout,
        )


def _solve(problem: Problem, instants: Sequence[Instant]) -> Solution | None:
    return solve(problem, instants=instants)


def _both(first: Keep | None, second: Keep | None) -> Keep | None:
    if first is None or second is None:
        return first or second
    # A pin is stronger than a strategy: the strategy chooses among what the pin leaves.
    return lambda region, found: first(region, second(region, found)) if second(region, found) else []
