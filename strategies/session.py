"""What all solves of one search share: the program's analyses, a problem and a simulator for each mesh."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from ffjax.cost.cluster import Cluster
from ffjax.cost.collectives import CollectiveModel
from ffjax.cost.compilers import compiler_of
from ffjax.cost.fusion import find_fusions
from ffjax.cost.kernels import by_family, kernels
from ffjax.cost.lifetimes import Lifetimes, lifetimes
from ffjax.cost.memory import MemoryModel, Peak
from ffjax.cost.simulation.simulator import Simulated, Simulator
from ffjax.cost.simulation.task_graph import build_task_graph
from ffjax.ir.assignment import Assignment
from ffjax.ir.dims import named_dims
from ffjax.ir.layout import Layout
from ffjax.ir.regions import Regions
from ffjax.ir.spec import MeshShape, parts_of
from ffjax.strategies.base import Role, Strategy
from ffjax.strategies.budget import Fit, layout_of, near, scheduled_peak
from ffjax.strategies.candidates import Keep
from ffjax.strategies.families import family_keys, members
from ffjax.strategies.methods.refinement import Refinement
from ffjax.strategies.methods.solver import Solver
from ffjax.strategies.overlap import Exposed, all_hidden, observed, overlapped
from ffjax.strategies.priced_memory import solve_within
from ffjax.strategies.problem import Problem, build_problem, choice_of, total_seconds, wiring_of
from ffjax.strategies.roles import Roles
from ffjax.strategies.usage import Usage

OBSERVED = 3
"""How often at most it is solved again with collectives as exposed as they are in the best plan there."""

SCHEDULED = 32
"""Of how many plans refinement looks at the own schedule, which takes long, where that may decide whether they fit."""

AUTO = "auto"

MOST_FINER = 15_000
"""Candidates, about, up to which a mesh of three axes is tried."""
WORTH = 2e-3
"""By what share of the step a third axis must be faster: each is one more thing to understand, and to compile right."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """The best plan of one strategy on one mesh."""

    strategy: str
    mesh: MeshShape
    step_s: float
    """Its seconds if nothing overlapped: a sum of costs."""
    objective_s: float
    bound_s: float
    """What was minimised, and what no choice in the same space can be below: the sum, or a part of what can overlap.

    A refined plan has those of the solve that it came from.
    """
    peak: Peak
    fits: bool
    algorithm: str
    seconds: float
    problem: Problem
    choice: tuple[int, ...]
    layout: Layout
    simulated: Simulated | None = None
    """With overlap; None where it was not simulated."""
    s_per_byte: float = 0.0
    free: Fit | None = None
    """What memory cost in the solve that found this, and the solution at no cost; see `Fit`."""
    bound_within: Callable[[], float] | None = None

    @property
    def gap(self) -> float:
        """By what share of itself the objective may be above the optimum."""
        return (self.objective_s - self.bound_s) / self.objective_s if self.objective_s > 0 else 0.0

    @property
    def predicted_s(self) -> float:
        """The step's seconds, with overlap where that is known."""
        return self.step_s if self.simulated is None else self.simulated.step_s


class Session:
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
        fusions = find_fusions(regions.graph)
        self.kernels = kernels(regions, fusions)
        self.by_family = by_family(self.kernels, self.keys)
        self.wiring = wiring_of(regions, self.keys)
        self.usage = Usage(regions, named_dims(regions))
        self.times: Lifetimes = lifetimes(regions.graph, compiler_of(cluster.device.platform), fusions=fusions)
        self.memory = MemoryModel(regions, self.times, self.keys)
        self._families = list(members(self.keys).values())
        self._problems: dict[MeshShape, Problem] = {}
        self._simulators: dict[MeshShape, Simulator] = {}
        self._simulated: dict[tuple[MeshShape, tuple[Assignment, ...]], Simulated] = {}

    def restricted(self, strategy: Strategy, mesh: MeshShape, roles: Sequence[Role], *, alone: bool) -> list[Found]:
        """The best plan of a named strategy on one mesh, if it has any there."""
        began = time.perf_counter()
        problem = Roles(self.usage, mesh, roles).within(self.problem(mesh))
        if problem is None:
            return []
        found = self._solved(strategy.name, problem, (), None, Solver(), thorough=alone, began=began)
        return [] if found is None else [found]

    def free(self, mesh: MeshShape, named_: Sequence[Found], known: Sequence[Sequence[Assignment]] = ()) -> list[Found]:
        """Plans of the whole space on one mesh, the first never worse than the named ones there if nothing overlaps.

        `known` are more plans there, an assignment for each region.
        """
        began = time.perf_counter()
        problem = self.problem(mesh)
        starts = [
            c for a in (*(f.layout.assignments for f in named_), *known) if (c := choice_of(problem, a)) is not None
        ]
        solver, found = Solver(), list[Found]()

        def solve(exposed: Exposed | None) -> Found | None:
            nonlocal began
            one = self._solved(AUTO, problem, starts, exposed, solver, thorough=exposed is None, began=began)
            began = time.perf_counter()
            if one is None or one.choice in [f.choice for f in found]:
                return None
            found.append(one)
            return one

        solve(None)
        if not self.cluster.async_collectives or not any(f.fits for f in found):
            return found
        solve(all_hidden(problem))
        for _ in range(OBSERVED):
            best = min((f for f in [*named_, *found] if f.fits), key=lambda f: f.predicted_s)
            self.simulator(mesh).go_on(best.layout.assignments)
            one = solve(observed(problem, self.simulator(mesh)))
            if one is None or one.predicted_s >= best.predicted_s:
                break
        return found

    def finer(self, mesh: MeshShape, base: Found) -> list[Found]:
        """Plans on a mesh that cuts one axis of another plan's into two, if they are worth a third axis.

        None where there would be too many candidates: a search stays within seconds.
        """
        expected = sum(
            len(n.candidates) ** (len(mesh.axes) / len(base.mesh.axes)) for n in self.problem(base.mesh).nodes
        )
        pieces = parts_of(base.mesh, mesh)
        if expected > MOST_FINER or pieces is None:
            return []
        cut = {a: a.cut(pieces) for a in set(base.layout.assignments)}
        found = self.free(mesh, (), [[cut[a] for a in base.layout.assignments]])
        fastest = min((f.predicted_s for f in found if f.fits), default=math.inf)
        return found if fastest < (1 - WORTH) * base.predicted_s else []

    def refined(self, found: Sequence[Found]) -> list[Found]:
        """The fastest plan that fits, if the simulator finds a better one near it."""
        began = time.perf_counter()
        start = min((f for f in found if f.fits), key=lambda f: f.predicted_s, default=None)
        if start is None:
            return []
        problem = self.problem(start.mesh)
        choice = choice_of(problem, start.layout.assignments)
        free = start if start.strategy == AUTO else next((f for f in found if f.problem is problem), None)
        if choice is None or free is None:
            return []
        method = Refinement(self.simulator(start.mesh), self._fits(problem))
        solution = method.solve(problem, [choice])
        if solution is None or solution.choice == choice:
            return []
        layout = layout_of(problem, solution.choice)
        return [
            dataclasses.replace(
                free,
                step_s=total_seconds(problem, solution.choice),
                peak=self.memory.peak(layout),
                fits=True,
                algorithm=f"{free.algorithm}, {method.name}",
                seconds=time.perf_counter() - began,
                choice=solution.choice,
                layout=layout,
                simulated=self.simulated(layout),
            )
        ]

    def _fits(self, problem: Problem) -> Callable[[Sequence[int]], bool]:
        """Whether choices fit, under their own schedules as well; after so many of those none does any more."""
        scheduled = 0

        def fits(choice: Sequence[int]) -> bool:
            nonlocal scheduled
            layout = layout_of(problem, choice)
            most = self.memory.peak(layout)
            if not near(most, self.budget_bytes):
                return most.bytes <= self.budget_bytes
            scheduled += 1
            return (
                scheduled <= SCHEDULED
                and max(most.bytes, scheduled_peak(layout, self.budget_bytes, self.memory).bytes) <= self.budget_bytes
            )

        return fits

    def problem(self, mesh: MeshShape) -> Problem:
        """The whole space on a mesh, but for what pins leave out."""
        if mesh not in self._problems:
            pins = self.keep(mesh) if self.keep is not None else None
            model = CollectiveModel(mesh, self.cluster)
            self._problems[mesh] = build_problem(self.regions, self.keys, self.by_family, model, pins, self.wiring)
        return self._problems[mesh]

    def _solved(
        self,
        name: str,
        problem: Problem,
        starts: Sequence[Sequence[int]],
        exposed: Exposed | None,
        solver: Solver,
        *,
        thorough: bool,
        began: float,
    ) -> Found | None:
        objective = problem if exposed is None else overlapped(problem, exposed)
        fit = solve_within(
            objective,
            self.budget_bytes,
            self.memory,
            solver,
            starts,
            thorough=thorough,
            mixed=thorough or name == AUTO,
        )
        if fit is None:
            return None
        choice = fit.solution.choice
        objective_s = total_seconds(objective, choice)
        return Found(
            strategy=name,
            mesh=problem.mesh,
            step_s=total_seconds(problem, choice),
            objective_s=objective_s,
            bound_s=min(fit.solution.bound_s, objective_s),
            peak=fit.peak,
            fits=fit.fits,
            algorithm=fit.solution.status,
            seconds=time.perf_counter() - began,
            problem=problem,
            choice=choice,
            layout=fit.layout,
            s_per_byte=fit.s_per_byte,
            free=fit.free,
            bound_within=fit.bound_within,
            simulated=self.simulated(fit.layout) if fit.fits and self.cluster.async_collectives else None,
        )

    def simulated(self, layout: Layout) -> Simulated:
        """What a plan takes. Several solves find the same one: it is simulated once."""
        key = layout.mesh, tuple([layout.assignments[own[0]] for own in self._families])
        if key not in self._simulated:
            self._simulated[key] = self.simulator(layout.mesh).go_on(layout.assignments)
        return self._simulated[key]

    def simulator(self, mesh: MeshShape) -> Simulator:
        """The simulator of a mesh, which holds the plan that it simulated last."""
        if mesh not in self._simulators:
            model = CollectiveModel(mesh, self.cluster)
            other = next(iter(self._simulators.values()), None)
            if other is None:
                tasks = build_task_graph(self.regions, self.kernels, self.keys)
                self._simulators[mesh] = Simulator(self.regions, self.kernels, model, tasks=tasks)
            else:
                self._simulators[mesh] = other.on(model)
        return self._simulators[mesh]
