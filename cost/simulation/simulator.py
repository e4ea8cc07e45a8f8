"""The execution simulator: when everything in a step happens, on one device, under a plan.

A compute stream and one stream for each link level; tasks in the order of the program (`task_graph`); collectives
issued as early as `schedule` lets them; streams that work as `streams` says. Overlap is what comes of it:

    step_s = compute_s + exposed_comm_s,    exposed_comm_s = seconds in which kernels wait for collectives

A loop's body is simulated once and stands for all trips; of a conditional's branches the costliest counts. Where
nothing can overlap, `step_s` is that of `estimate`, but for what it counts of the other branches.

When assignments change, only what the change reaches is simulated again (the delta simulation of FlexFlow: Jia,
Zaharia, Aiken, "Beyond Data and Model Parallelism for Deep Neural Networks", MLSys 2019, section 5.3): costs of the
regions that changed and of what they read and feed; schedules of their blocks; and segments from the first that differs
on, as long as what is under way at a segment's border differs from what it was. Times are whole numbers relative to
that border, so the answer is exactly that of simulating everything.
"""

from __future__ import annotations

import bisect
import copy
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from ffjax.cost.collectives import CollectiveModel
from ffjax.cost.kernels import Kernel
from ffjax.cost.memory import MemoryModel
from ffjax.cost.simulation.schedule import Schedule
from ffjax.cost.simulation.streams import Entry, Event, Inside, Issue, Rest, Run, State, idle, play
from ffjax.cost.simulation.task_costs import TICKS_PER_S, Copy, Hop, TaskCosts
from ffjax.cost.simulation.task_graph import Read, TaskGraph, build_task_graph
from ffjax.cost.simulation.timeline import Timeline
from ffjax.ir.assignment import Assignment
from ffjax.ir.layout import Layout
from ffjax.ir.regions import Regions


@dataclass(frozen=True, slots=True, kw_only=True)
class Simulated:
    """What a step takes. `step_s` is `compute_s` plus `exposed_comm_s`; `comm_s` is all communication."""

    step_s: float
    compute_s: float
    comm_s: float
    exposed_comm_s: float


@dataclass(slots=True, kw_only=True)
class _Played:
    """How a block went: for each segment its events, the state that it found, and what it took."""

    events: list[list[Event]]
    states: list[State]
    """One more than segments: the last is what the block leaves under way, and waits for."""
    elapsed: list[int]
    compute: list[int]
    comm: list[int]
    later: list[tuple[int, ...]]
    """The late kernels that ran while others waited."""
    totals: tuple[int, int, int] = field(default=(0, 0, 0))
    """Ticks of the block, of its kernels, of its collectives."""


class Simulator:
    """One program on one mesh, under one plan after another.

    Args:
      regions, kernels: the program (`ffjax.cost.kernels.kernels`).
      model: the mesh, the cluster and its collectives. Collectives are asynchronous where
        `Cluster.async_collectives` says so.
      axis_prices: as in `Layout`; by default the model's.
      tasks: of the same program (`build_task_graph`), if they are known: they are the same on every mesh. Where they
        have `families`, regions of one have one assignment in all plans.
    """

    def __init__(
        self,
        regions: Regions,
        kernels: Sequence[Kernel],
        model: CollectiveModel,
        axis_prices: tuple[float, ...] | None = None,
        tasks: TaskGraph | None = None,
    ) -> None:
        self.regions, self.model = regions, model
        self.overlap = model.cluster.async_collectives
        self.axis_prices = model.axis_prices if axis_prices is None else axis_prices
        self.tasks = build_task_graph(regions, kernels) if tasks is None else tasks
        self._costs = TaskCosts(regions, kernels, model, self.tasks)
        kernel_ops = [list(dict.fromkeys(k.op for k in own)) for own in self._costs.own]
        self._kernel_ops = [
            list(zip(*(kernel_ops[region] for region in alike), strict=True))
            for alike in self._costs.kinds.region_groups
        ]
        """For each group of regions the ops that run kernels, those together that take alike."""
        reads: dict[int, list[Read]] = {scope: [] for scope in self.tasks.blocks}
        for read in self.tasks.reads:
            reads[read.block].append(read)
        op_of = [edge.op for edge in regions.edges]
        self.schedules = {s: Schedule(b, reads[s], op_of, self.tasks) for s, b in self.tasks.blocks.items()}
        self._around = {
            body: (block.scope, inner.position)
            for block in self.tasks.blocks.values()
            for inner in block.inner.values()
            for body in inner.bodies
        }
        self.assignments: list[Assignment] = []

    def on(self, model: CollectiveModel, axis_prices: tuple[float, ...] | None = None) -> Simulator:
        """A simulator of the same program on another mesh or other links; it shares what no plan changes."""
        other = copy.copy(self)
        other.model, other.overlap = model, model.cluster.async_collectives
        other.axis_prices = model.axis_prices if axis_prices is None else axis_prices
        other._costs = self._costs.on(model)
        other.schedules = {scope: schedule.empty() for scope, schedule in self.schedules.items()}
        other.assignments = []
        return other

    def run(self, assignments: Sequence[Assignment]) -> Simulated:
        """Simulates a plan from the beginning: one assignment for each region."""
        if len(assignments) != len(self.regions.regions):
            raise ValueError(
                f"{len(assignments)} assignments for {len(self.regions.regions)} regions; give one for each"
            )
        self.assignments = list(assignments)
        self._numbers = self._costs.numbers(assignments)
        self._ticks = [0] * len(self.regions.graph.ops)
        self._priced: list[tuple[int, ...]] = [()] * len(self._kernel_ops)
        """For each group of regions what its kernels take, as long as they were priced."""
        self._copies: list[tuple[Copy, ...]] = [()] * len(self._costs.kinds.read_groups)
        self._sums: list[tuple[Hop, ...]] = [()] * len(self._costs.kinds.sum_groups)
        start = idle(len(self.model.cluster.links))
        self._played = {}
        for scope, schedule in self.schedules.items():
            schedule.clear()
            count = len(schedule.segments)
            self._played[scope] = _Played(
                events=[[] for _ in range(count)],
                states=[start] * (count + 1),
                elapsed=[0] * count,
                compute=[0] * count,
                comm=[0] * count,
                later=[()] * count,
            )
        kinds = self._costs.kinds
        everything = kinds.region_groups, kinds.read_groups, kinds.sum_groups
        return self._update(*(range(len(all_)) for all_ in everything), anew=True)

    def go_on(self, assignments: Sequence[Assignment]) -> Simulated:
        """Simulates a plan as `run` does, but from the one that was simulated last where they have most in common."""
        before = self.assignments
        if not before or len(before) != len(assignments):
            return self.run(assignments)
        pairs = enumerate(zip(before, assignments, strict=True))
        changes = {r: new for r, (old, new) in pairs if old is not new and old != new}
        return self.update(changes) if 2 * len(changes) < len(assignments) else self.run(assignments)

    def change(self, regions: int | Sequence[int], assignment: Assignment) -> Simulated:
        """Gives a region, or all of a family, another assignment, and simulates what that reaches."""
        return self.update(dict.fromkeys([regions] if isinstance(regions, int) else regions, assignment))

    def update(self, changes: Mapping[int, Assignment]) -> Simulated:
        """Gives several regions other assignments at once, and simulates what that reaches."""
        if not self.assignments:
            raise ValueError("there is no plan to change yet; call run(assignments) first")
        for region, assignment in changes.items():
            self.assignments[region], self._numbers[region] = assignment, self._costs.number(assignment)
        # Regions of a family share what they touch.
        touched = {id(t): t for r in changes for t in (self._costs.kinds.touched[r],)}.values()
        regions = dict.fromkeys(g for t in touched for g in t.regions)
        reads = dict.fromkeys(g for t in touched for g in t.reads)
        sums = dict.fromkeys(g for t in touched for g in t.sums)
        return self._update(regions, reads, sums)

    @property
    def layout(self) -> Layout:
        """The plan that was simulated last."""
        return Layout(
            regions=self.regions, mesh=self.model.mesh, assignments=self.assignments, axis_prices=self.axis_prices
        )

    def timeline(self, memory: MemoryModel | None = None) -> Timeline:
        """All tasks of the plan that was simulated last, and what is in memory if a `MemoryModel` is given."""
        from ffjax.cost.simulation.intervals import timeline_of

        return timeline_of(self, memory)

    @property
    def totals(self) -> tuple[int, int, int]:
        """Ticks of the step, of its kernels, of its collectives."""
        return self._played[0].totals

    @property
    def ticks(self) -> Sequence[int]:
        """For each op those of its kernel."""
        return self._ticks

    def log(self, scope: int) -> tuple[list[Entry], int]:
        """The tasks of one block and the ticks that it takes."""
        played, log = self._played[scope], list[Entry]()
        ran = {op for ops in played.later for op in ops}
        starts = _starts(played.elapsed)
        for events, state, at, own in zip(played.events, played.states, starts, played.later, strict=False):
            play(events, state, overlap=self.overlap, ran=ran.difference(own), log=log, base=at)
        return log, played.totals[0]

    # -- what changed

    def _update(
        self, regions: Iterable[int], reads: Iterable[int], sums: Iterable[int], *, anew: bool = False
    ) -> Simulated:
        layout, numbers, costs, kinds = self.layout, self._numbers, self._costs, self._costs.kinds
        block_of, graph_ops, all_ticks = self.tasks.block_of, self.regions.graph.ops, self._ticks
        for group in regions:
            first, ops = kinds.region_groups[group][0], self._kernel_ops[group]
            if not ops:
                continue
            priced = costs.kernel_ticks(first, self.assignments[first], numbers[first])
            for same, before, ticks in zip(ops, self._priced[group] or [0] * len(ops), priced, strict=True):
                if ticks != before:
                    for op in same:
                        all_ticks[op] = ticks
                        if not anew:
                            self.schedules[block_of[graph_ops[op].scope]].touch(op)
            self._priced[group] = priced
        for group in sums:
            alike = kinds.sum_groups[group]
            hops = costs.sums(alike[0], self.tasks.sums[alike[0]], numbers, layout)
            if hops != self._sums[group]:
                self._sums[group] = hops
                for entry in (self.tasks.sums[index] for index in alike):
                    self.schedules[entry.block].set_sum(entry, hops)
        rearranged: dict[int, None] = {}
        for group in reads:
            alike = kinds.read_groups[group]
            copies = costs.copies(alike[0], self.tasks.reads[alike[0]], numbers, layout)
            if copies != self._copies[group]:
                for read in (self.tasks.reads[index] for index in alike):
                    self.schedules[read.block].set_copies(read, self._copies[group], copies)
                    rearranged[read.block] = None
                self._copies[group] = copies
        for scope in rearranged:
            self.schedules[scope].arrange(overlap=self.overlap)
        # Inner blocks come after those around them.
        for scope in reversed(self.schedules):
            self._play(scope)
        ticks, compute, comm = self.totals
        return Simulated(
            step_s=ticks / TICKS_PER_S,
            compute_s=compute / TICKS_PER_S,
            comm_s=comm / TICKS_PER_S,
            exposed_comm_s=(ticks - compute) / TICKS_PER_S,
        )

    def _play(self, scope: int) -> None:
        """Plays the segments of a block whose events or beginnings are others than before."""
        schedule, played = self.schedules[scope], self._played[scope]
        if not schedule.dirty:
            return
        pending = sorted(schedule.dirty, reverse=True)
        segment, state = pending[-1], played.states[pending[-1]]
        while True:
            if pending and pending[-1] == segment:
                pending.pop()
                self._prepare(scope, segment)
            elif state == played.states[segment]:
                # From here on all is as it was, up to the next segment whose events changed.
                if not pending:
                    break
                segment = pending[-1]
                state = played.states[segment]
                continue
            played.states[segment] = state
            if segment == len(schedule.segments):
                break
            late = schedule.late_segment
            ran = {op for ops in played.later[:late] for op in ops} if segment == late else ()
            played.elapsed[segment], state, later = play(played.events[segment], state, overlap=self.overlap, ran=ran)
            if later != played.later[segment]:
                played.later[segment] = later
                if segment < late and late not in pending:
                    bisect.insort(pending, late, key=lambda s: -s)
            segment += 1
        schedule.dirty.clear()
        totals = (sum(played.elapsed) + max(played.states[-1].links), sum(played.compute), sum(played.comm))
        if totals != played.totals:
            played.totals = totals
            if scope in self._around:
                outer, position = self._around[scope]
                self.schedules[outer].dirty.add(self.schedules[outer].segment_of(3 * position))

    def _prepare(self, scope: int, segment: int) -> None:
        schedule, played = self.schedules[scope], self._played[scope]
        inside = (
            {s.op: self._inside(scope, s.op) for s in schedule.segments[segment] if s.inside} if schedule.inner else {}
        )
        events = played.events[segment] = schedule.events(segment, self._ticks, inside)
        compute = comm = 0
        for event in events:
            if type(event) is Run:
                compute += event.ticks
            elif type(event) is Issue:
                comm += sum([hop.ticks for hop in event.hops])
            elif type(event) is Rest:
                compute += sum([kernel.ticks for kernel in event.kernels])
            elif type(event) is Inside:
                compute, comm = compute + event.compute_ticks, comm + event.comm_ticks
        played.compute[segment], played.comm[segment] = compute, comm

    def _inside(self, scope: int, position: int) -> Inside:
        """An inner block as one event: all trips of a loop, or the costliest of some branches."""
        inner = self.schedules[scope].inner[position]
        body = self.costliest(inner.bodies)
        ticks, compute, comm = (inner.trips * t for t in self._played[body].totals)
        return Inside(ticks, compute, comm, position)

    def costliest(self, bodies: Sequence[int]) -> int:
        return max(bodies, key=lambda b: self._played[b].totals)


def _starts(elapsed: Sequence[int]) -> list[int]:
    starts = [0]
    for ticks in elapsed:
        starts.append(starts[-1] + ticks)
    return starts


def simulate(
    layout: Layout,
    kernels: Sequence[Kernel],
    model: CollectiveModel,
    memory: MemoryModel | None = None,
    tasks: TaskGraph | None = None,
) -> Timeline:
    """Simulates one layout from the beginning. For many layouts of a program on one mesh, make a `Simulator`.

    `memory`: for what is live when; `tasks`: see `Simulator`.
    """
    simulator = Simulator(layout.regions, kernels, model, layout.axis_prices, tasks)
    simulator.run(layout.assignments)
    return simulator.timeline(memory)
