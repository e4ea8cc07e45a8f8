"""A simulated plan as a timeline: every task by name and source line, the critical path, memory over time.

The critical path is found backwards from the end: each task on it begins when the one before it ends, and on ties
the kernel is taken. Times are whole ticks, so that "when" is exact.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import TYPE_CHECKING, NamedTuple

from ffjax.cost.memory import MemoryModel
from ffjax.cost.simulation.streams import COMPUTE_STREAM, Entry
from ffjax.cost.simulation.task_costs import TICKS_PER_S
from ffjax.cost.simulation.timeline import COMPUTE, Interval, Timeline

if TYPE_CHECKING:
    from ffjax.cost.simulation.simulator import Simulator


class _Task(NamedTuple):
    """One task of the whole step: ticks from the step's beginning."""

    entry: Entry
    start: int
    end: int
    repeats: int
    critical: bool
    trips: int = 1


def timeline_of(simulator: Simulator, memory: MemoryModel | None = None) -> Timeline:
    """The timeline of what a simulator simulated last."""
    tasks = sorted(_tasks(simulator, 0, 0, 1, True), key=lambda t: (t.start, t.end, t.entry.stream))
    names = _Names(simulator)
    ticks, compute, comm = simulator.totals
    return Timeline(
        streams=names.streams,
        intervals=tuple(names.interval(t) for t in tasks),
        step_s=ticks / TICKS_PER_S,
        compute_s=compute / TICKS_PER_S,
        comm_s=comm / TICKS_PER_S,
        exposed_comm_s=(ticks - compute) / TICKS_PER_S,
        memory=() if memory is None else _memory(simulator, memory, tasks),
    )


def _tasks(simulator: Simulator, scope: int, base: int, repeats: int, critical: bool) -> Iterator[_Task]:
    """The tasks of one run of a block that begins at `base`; inner blocks follow in their places."""
    log, end = simulator.log(scope)
    log = [single for entry in log for single in _kernel_by_kernel(simulator, entry) if single.end > single.start]
    path = _critical(log, end) if critical else set()
    for index, entry in enumerate(log):
        start, stop, flag = base + entry.start, base + entry.end, index in path
        if entry.inside is None:
            yield _Task(entry, start, stop, repeats, flag)
            continue
        inner = simulator.tasks.blocks[scope].inner[entry.inside.position]
        once = entry.inside.ticks // inner.trips
        yield from _tasks(simulator, simulator.costliest(inner.bodies), start, repeats * inner.trips, flag)
        if inner.trips > 1:
            yield _Task(entry, start + once, stop, 0, flag, inner.trips - 1)


def _kernel_by_kernel(simulator: Simulator, entry: Entry) -> Iterator[Entry]:
    at = entry.start
    if not entry.ops:
        yield entry
    for op in entry.ops:
        yield entry._replace(start=at, end=at + simulator.ticks[op], ops=(op,))
        at += simulator.ticks[op]


def _critical(log: list[Entry], end: int) -> set[int]:
    """The entries of a chain from a block's beginning to its end."""
    ending: dict[int, list[int]] = {}
    for index, entry in enumerate(log):
        ending.setdefault(entry.end, []).append(index)
    path: set[int] = set()
    while end > 0:
        last = min(ending[end], key=lambda i: log[i].stream)
        # All links of a collective are shown as critical.
        path.update(i for i in ending[end] if log[i].start == log[last].start and log[i].points == log[last].points)
        end = log[last].start
    return path


class _Names:
    """What a user calls tasks."""

    def __init__(self, simulator: Simulator) -> None:
        self.simulator, self.graph = simulator, simulator.regions.graph
        links = simulator.model.cluster.links
        self.streams = (COMPUTE, *(link.name for link in links))
        self.source = functools.cache(lambda op: self.graph.source(self.graph.ops[op]))

    def interval(self, task: _Task) -> Interval:
        op, name = self.name(task)
        return Interval(
            name=name,
            stream=self.streams[0 if task.entry.stream == COMPUTE_STREAM else task.entry.stream + 1],
            start_s=task.start / TICKS_PER_S,
            end_s=task.end / TICKS_PER_S,
            source=self.source(op),
            trips=float(task.trips),
            critical=task.critical,
            repeats=float(task.repeats),
        )

    def name(self, task: _Task) -> tuple[int, str]:
        entry, graph = task.entry, self.graph
        if entry.inside is not None:
            return entry.inside.position, f"{task.trips} more trip{'s' * (task.trips > 1)} of the loop"
        if entry.hop is None:
            return entry.ops[0], graph.ops[entry.ops[0]].kind
        point, collective = entry.points[0], entry.hop.collective
        axes = "*".join(collective.axes)
        if point < 0:
            return ~point, f"{collective.kind} over {axes} of {graph.ops[~point].kind}"
        edge = self.simulator.regions.edges[point]
        producer = graph.ops[graph.values[edge.value].producer]
        what = producer.label if producer.kind == "argument" else producer.kind
        return edge.op, f"{collective.kind} over {axes} of {what}"


def _memory(simulator: Simulator, memory: MemoryModel, tasks: list[_Task]) -> tuple[tuple[float, float], ...]:
    """What is live when each op has its turn: an op without a kernel has it with the one before."""
    starts: dict[int, int] = {}
    for task in tasks:
        for op in task.entry.ops:
            starts.setdefault(op, task.start)
    live = memory.peak(simulator.layout).over_time
    found: list[tuple[float, float]] = []
    at = 0
    for op in range(len(simulator.regions.graph.ops)):
        at = max(at, starts.get(op, 0))
        point = (at / TICKS_PER_S, float(live[op]))
        if not found or point[1] != found[-1][1]:
            found.append(point)
    return tuple(found)
