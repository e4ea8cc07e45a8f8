"""Runs a scheduled HLO module on a cluster: a compute stream, and a stream for each level of links.

    compute stream   kernels one after the other, in the order of the schedule; `costs` prices each
    link's stream    collectives, each on the slowest link that its groups cross; `collectives` prices each
    start ... done   an asynchronous collective starts when the compute stream has come to its start and its link is
                     free; the compute stream waits at its done. Other collectives are waited for at once.
    while            the trips that begin with every link idle are alike: the first is simulated, the others are it
                     again; unless a collective from outside is still under way, then one after the other
    conditional      its slowest branch

Overlap is what comes out of this. The compute stream waits for nothing but collectives, so that the communication
that is exposed is the whole step less the compute.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from ffjax.cost.cluster import Cluster
from ffjax.cost.collectives import priced
from ffjax.cost.hlo.collectives import HloCollective, collective_of, source_of, trip_count
from ffjax.cost.hlo.costs import work_of
from ffjax.cost.hlo.memory import live_bytes
from ffjax.cost.hlo.module import Computation, Instruction, Module
from ffjax.cost.hlo.source import HloSource, read_module
from ffjax.cost.meshes import AxisGroup, groups_on_hosts
from ffjax.cost.simulation.timeline import COMPUTE, Interval, Timeline
from ffjax.errors import ClusterError, FfjaxWarning
from ffjax.ir.spec import MeshShape

_NOTHING = -1


def simulate_hlo(source: HloSource, cluster: Cluster, mesh: MeshShape | None = None) -> Timeline:
    """The timeline of one run of a compiled program on each device of a cluster.

    Args:
      source: a compiled program, its HLO text, a serialized proto, or a `Module`.
      cluster: its devices and links; device ids are counted host by host.
      mesh: where given, the names of collectives have the mesh axes that they run over.

    Raises HloError for what is no HLO, and ClusterError for a cluster with fewer devices than the program has. Warns
    (FfjaxWarning) of instructions that are costed by their bytes alone, of loops of unknown trip count, which are run
    once, and of a module without a schedule, which is run in the order of its text.
    """
    module = read_module(source)
    if module.devices > cluster.devices:
        raise ClusterError(
            f"the module {module.name!r} runs on {module.devices} devices, the cluster {cluster.name!r} has "
            f"{cluster.devices}; give it more hosts, such as Cluster.named({cluster.name!r}, "
            f"hosts={-(-module.devices // cluster.devices_per_host)})"
        )
    run = _Run(module=module, cluster=cluster, mesh=mesh)
    entry = module.computations[module.entry]
    live = live_bytes(module)
    memory: dict[float, float] = {}
    for instruction in entry:
        memory[run.now_s] = live[instruction.name]  # of those at one moment the last, which takes the time
        run.step(instruction, entry)
    run.report()
    return run.timeline(tuple(memory.items()))


@dataclass(slots=True, kw_only=True)
class _Task:
    """An interval in the making. `after`: the task whose end is its start; `like`: the tasks that a block repeats."""

    name: str
    stream: str
    start_s: float
    end_s: float
    source: str
    after: int
    trips: float = 1.0
    like: range = range(0)


@dataclass(slots=True, kw_only=True)
class _Run:
    """Where the streams stand. `now_s` is how far the compute stream has come, `last` the task that it waited for."""

    module: Module
    cluster: Cluster
    mesh: MeshShape | None
    now_s: float = 0.0
    compute_s: float = 0.0
    comm_s: float = 0.0
    last: int = _NOTHING
    tasks: list[_Task] = field(default_factory=list)
    link_free_s: dict[str, float] = field(default_factory=dict)
    link_last: dict[str, int] = field(default_factory=dict)
    pending: dict[str, int] = field(default_factory=dict)
    """By name of its start: the task of a collective that is under way."""
    known_s: dict[str, float] = field(default_factory=dict)
    """By name of an instruction: its seconds, so that trips of a loop are priced once."""
    unknown: dict[str, str] = field(default_factory=dict)
    """What is costed by its bytes alone, and where it first occurs."""
    uncounted: dict[str, str] = field(default_factory=dict)
    """Loops of unknown trip count, and where they are."""

    def computation(self, computation: Computation) -> None:
        for instruction in computation:
            self.step(instruction, computation)

    def step(self, instruction: Instruction, computation: Computation) -> None:
        """One instruction, in the order of the schedule."""
        opcode = instruction.opcode
        started = next((name for name in instruction.operands if name in self.pending), None)
        if opcode.endswith("-done") and started is not None:
            self.wait(self.pending.pop(started))
        elif (collective := collective_of(instruction, self.module.devices)) is not None:
            task = self.collective(instruction, collective, source_of(instruction, computation))
            if opcode.endswith("-start"):
                self.pending[instruction.name] = task
            else:
                self.wait(task)
        elif opcode == "while":
            self.loop(instruction)
        elif opcode == "conditional":
            self.branch(self.module.called(instruction))
        elif opcode == "call":
            for called in self.module.called(instruction):
                self.computation(called)
        elif opcode == "async-start":
            self.wrapped(instruction)
        else:
            self.kernel(instruction, computation)

    def kernel(self, instruction: Instruction, computation: Computation) -> None:
        seconds = self.known_s.get(instruction.name)
        if seconds is None:
            work = work_of(instruction, computation, self.module)
            seconds = 0.0 if work is None else work.seconds(self.cluster.device)
            self.known_s[instruction.name] = seconds
            if work is not None and work.unknown:
                self.unknown.setdefault(work.unknown, instruction.source or instruction.name)
        if seconds:
            self.compute_s += seconds
            self.last = self.add(instruction.name, COMPUTE, self.now_s, seconds, instruction.source, self.last)
            self.now_s += seconds

    def collective(self, instruction: Instruction, collective: HloCollective, source: str) -> int:
        """Puts a collective on its link; its task, or none for groups of one device."""
        group = _group(collective, self.cluster.host_sizes or self.cluster.devices_per_host)
        if group.devices == 1:
            return _NOTHING
        alpha_s, beta_s_per_byte, _ = priced(collective.kind, group, self.cluster)
        seconds = alpha_s + beta_s_per_byte * collective.bytes
        link = self.cluster.links[-1 if group.crosses_hosts else 0].name
        axes = "*".join(collective.axes(self.mesh))
        name = f"{instruction.name} over {axes}" if axes else instruction.name
        free_s = self.link_free_s.get(link, 0.0)
        after = self.link_last[link] if free_s > self.now_s else self.last
        task = self.add(name, link, max(free_s, self.now_s), seconds, source, after)
        self.link_free_s[link], self.link_last[link] = self.tasks[task].end_s, task
        self.comm_s += seconds
        return task

    def wrapped(self, start: Instruction) -> None:
        """`async-start`: a collective goes on by itself, anything else holds the compute stream."""
        for called in self.module.called(start):
            for instruction in called:
                collective = collective_of(instruction, self.module.devices)
                if collective is not None:
                    self.pending[start.name] = self.collective(start, collective, source_of(instruction, called))
                else:
                    self.step(instruction, called)

    def loop(self, loop: Instruction) -> None:
        body = self.module.computations[loop.attributes["body"].lstrip("%")]
        trips = trip_count(loop, self.module)
        if trips is None:
            self.uncounted.setdefault(loop.name, loop.source or loop.op_name)
            trips = 1.0
        while trips > 0:
            idle = all(free_s <= self.now_s for free_s in self.link_free_s.values())
            before = copy.copy(self)
            first = len(self.tasks)
            self.computation(body)
            trips -= 1
            if idle and trips > 0:
                self.repeat(loop, before, range(first, len(self.tasks)), trips)
                return

    def repeat(self, loop: Instruction, before: _Run, trip: range, trips: float) -> None:
        """The trips of a loop after one that they are like, as one block on each stream that it kept busy."""
        spent_s = trips * (self.now_s - before.now_s)
        self.compute_s += trips * (self.compute_s - before.compute_s)
        self.comm_s += trips * (self.comm_s - before.comm_s)
        last = self.last
        for stream in dict.fromkeys(self.tasks[i].stream for i in trip):
            block = self.add(f"{loop.name}, {trips:g} more", stream, self.now_s, spent_s, loop.source, last)
            self.tasks[block].trips, self.tasks[block].like = trips, trip
            if stream == self.tasks[last].stream:  # the one that a trip ends with
                self.last = block
        self.now_s += spent_s

    def branch(self, branches: list[Computation]) -> None:
        ends = []
        for branch in branches:
            trial = self.copy()
            trial.computation(branch)
            ends.append(trial.now_s)
        if ends:
            self.computation(branches[int(np.argmax(ends))])

    def copy(self) -> _Run:
        """A run that goes on from here by itself; what has been learnt of instructions is shared."""
        twin = copy.copy(self)
        twin.tasks, twin.pending = list(self.tasks), dict(self.pending)
        twin.link_free_s, twin.link_last = dict(self.link_free_s), dict(self.link_last)
        return twin

    def add(self, name: str, stream: str, start_s: float, seconds: float, source: str, after: int) -> int:
        end_s = start_s + seconds
        self.tasks.append(_Task(name=name, stream=stream, start_s=start_s, end_s=end_s, source=source, after=after))
        return len(self.tasks) - 1

    def wait(self, task: int) -> None:
        if task != _NOTHING and self.tasks[task].end_s > self.now_s:
            self.now_s, self.last = self.tasks[task].end_s, task

    def report(self) -> None:
        """Warns of what the result does not rest on firmly."""
        problems = []
        if not self.module.scheduled:
            problems.append(
                "it has no schedule, so that it runs in the order of its text: compile it, or dump it after scheduling"
            )
        if self.unknown:
            names = ", ".join(f"{name} (first at {where})" for name, where in self.unknown.items())
            problems.append(f"costed by bytes alone, for their arithmetic is not known: {names}")
        if self.uncounted:
            names = ", ".join(f"{name} (at {where})" for name, where in self.uncounted.items())
            problems.append(f"run once, for nothing tells their trip count: {names}; use lax.scan or a fixed fori_loop")
        for problem in problems:
            warnings.warn(f"HLO module {self.module.name!r}: {problem}", FfjaxWarning, stacklevel=3)

    def timeline(self, memory: tuple[tuple[float, float], ...]) -> Timeline:
        critical = set()
        task = self.last
        while task != _NOTHING:
            critical.add(task)
            task = self.tasks[task].after
        for i, block in enumerate(self.tasks):
            if any(j in critical and self.tasks[j].stream == block.stream for j in block.like):
                critical.add(i)
        links = self.cluster.links if self.cluster.hosts > 1 else self.cluster.links[:1]
        return Timeline(
            streams=(COMPUTE, *(link.name for link in links)),
            intervals=tuple(
                Interval(
                    name=t.name,
                    stream=t.stream,
                    start_s=t.start_s,
                    end_s=t.end_s,
                    source=t.source,
                    trips=t.trips,
                    critical=i in critical,
                )
                for i, t in enumerate(self.tasks)
            ),
            step_s=self.now_s,
            compute_s=self.compute_s,
            comm_s=self.comm_s,
            exposed_comm_s=self.now_s - self.compute_s,
            memory=memory,
        )


def _group(collective: HloCollective, devices_per_host: int | Sequence[int]) -> AxisGroup:
    """How a collective's groups lie on hosts. Of a permute the worst pair counts."""
    if collective.paired:
        rows = np.array([pair for pair in collective.groups if pair[0] != pair[1]] or [(0,)])
    else:
        most = max(len(group) for group in collective.groups)
        rows = np.array([group for group in collective.groups if len(group) == most])
    return groups_on_hosts(rows, devices_per_host)
