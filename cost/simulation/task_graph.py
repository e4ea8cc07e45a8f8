"""What a program's tasks wait for, whatever the plan: worked out once, before any simulation.

A *block* is what runs from top to bottom: the step itself, the body of a loop, a branch. Its steps are kernels, and
inner blocks. Under some plan a *read* of a value may take a copy in another sharding, and an op that reduces may leave
partial sums to be summed: these are the collectives. What is fused or free has no kernel and passes on what it waits
for: `wait_at` is for each collective the first step that needs it, which suffices, as steps run one after another.

Steps are in the order of the program but for elementwise kernels, which would hold up others there, and which the
compiler is free to move: one that reads sums is *deferred* to the first step that needs its result (a gradient that
is transposed is waited for by the optimizer, not by the rest of the backward pass), and one that makes a value to be
copied from what the block begins with may be moved ahead with the copy (`Read.prepared`). Gradients of weights run
right before the first step that needs one of them (`late_kernels`).

Positions are `3 * op + phase`: before an op waits (0), while its kernel runs (1), after it (2); `START` is before all.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from ffjax.cost.fusion import fusible
from ffjax.cost.kernels import Kernel
from ffjax.cost.simulation.late_kernels import late_kernels
from ffjax.ir.graph import NO_VALUE, Graph, Op
from ffjax.ir.halo import halos
from ffjax.ir.manual import NAME as SHARD_MAP
from ffjax.ir.regions import Regions

START = -1
BEFORE, DURING, AFTER = 0, 1, 2
SEGMENT = 32
"""Steps that are played together: simulating again takes up where a segment begins."""
MOST_PREPARED = 8
"""Kernels that may be moved ahead together with one copy."""

MOST_CARRIED = 64
"""Collectives and deferred kernels that a value may come from; an op that reads more is a step, as a norm of all is."""

Point = int
"""Something to wait for: a port (an index into `Regions.edges`), or `~op` for the sums of an op."""


@dataclass(slots=True, kw_only=True)
class Inner:
    """A loop's body, or the branches of a conditional, as a step of the block around it."""

    position: int
    """Its first op."""
    bodies: tuple[int, ...]
    trips: int
    """For each time that the block around it runs."""


class Step(NamedTuple):
    """An op where kernels run, or the position of an inner block (`inside`)."""

    op: int
    deferred: tuple[int, ...]
    """The kernels that are deferred to it."""
    own: bool
    """Whether it has a kernel of its own."""
    inside: bool


@dataclass(slots=True, kw_only=True)
class Block:
    """`segments`: its steps, in order, in parts that are played together. `ports`: where copies may be read."""

    scope: int
    first: int
    last: int = 0
    segments: list[list[Step]] = field(default_factory=list)
    runs: dict[int, tuple[int, ...]] = field(default_factory=dict)
    """For each step that is no inner block the ops whose kernels run there: those deferred to it, then its own."""
    inner: dict[int, Inner] = field(default_factory=dict)
    ports: list[int] = field(default_factory=list)
    late: tuple[int, ...] = ()
    """Kernels that run before the step `late_at` rather than at their own, in the order in which they are needed."""
    late_at: int = START


@dataclass(slots=True, kw_only=True)
class Read:
    """All reads of one value in one scope across borders of regions: `ports`, in the order of ops."""

    value: int
    block: int
    ports: tuple[int, ...]
    regions: tuple[int, ...]
    """That of the value, then those of the ports."""
    upstream: tuple[Point, ...]
    early: int
    """The first position at which a copy can be made, if nothing in `chain` takes a copy."""
    late: int
    """The same if something does."""
    prepared: tuple[int, ...] = ()
    """Kernels that make the value from what is there when the block begins: they can be moved ahead with a copy."""
    chain: tuple[int, ...] = ()


@dataclass(slots=True, kw_only=True)
class Sum:
    """An op that reduces, or slides a window: what its collectives wait for beside its own kernel.

    Edges of images are taken to move right after the window that needs them, which takes as long as before it.
    """

    op: int
    block: int
    regions: tuple[int, ...]
    """That of the op, then those of all who read its results, or slide windows over the same image before it."""
    readers: tuple[tuple[int, int, int], ...]
    """(which of its results, op, operand)"""
    upstream: tuple[Point, ...]


@dataclass(slots=True, kw_only=True)
class TaskGraph:
    """The blocks by scope, outer ones first; reads and sums in the order of ops."""

    blocks: dict[int, Block]
    reads: list[Read]
    sums: list[Sum]
    wait_at: dict[Point, int]
    late_waits: dict[Point, list[int]]
    """The late kernels that need it before they run, whether others do or not."""
    step_of: dict[int, int]
    """For each op with a kernel the step at which it runs."""
    block_of: list[int]
    """For each scope the block that it is part of: a rematerialised body is part of the block around it."""
    families: Sequence[Hashable] | None = None
    """For each region what it shares with those that have its assignment in all plans that are asked about."""
    kinds: Kinds | None = None
    """Of tasks that cost alike on any mesh; filled in when they are first priced."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Kinds:
    """Numbers that regions (by their kernels), reads and sums share whose costs are the same under like assignments.

    `read_regions` and `sum_regions` pick from a list with an entry per region those of a read or a sum. Groups are of
    one kind whose regions are of one family each: what costs the same in all plans, and is looked at once in each.
    """

    kernels: list[int]
    reads: list[int]
    sums: list[int]
    read_regions: list[Callable[[Sequence[int]], Hashable]]
    sum_regions: list[Callable[[Sequence[int]], Hashable]]
    distinct: dict[int, tuple[list[Kernel], list[int]]] = field(default_factory=dict)
    """For a number of `kernels` the distinct ones, and for each kernel which of them it is."""
    region_groups: list[list[int]]
    read_groups: list[list[int]]
    sum_groups: list[list[int]]
    touched: list[Touched]
    """For each region."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Touched:
    """The groups of regions, reads and sums that the assignment of one family decides on; regions of one share it."""

    regions: list[int] = field(default_factory=list)
    reads: list[int] = field(default_factory=list)
    sums: list[int] = field(default_factory=list)


@dataclass(slots=True, kw_only=True)
class _Lead:
    """How a value comes from what a block begins with: kernels, and ports that they read through."""

    prepared: tuple[int, ...] = ()
    chain: tuple[int, ...] = ()


def build_task_graph(
    regions: Regions, kernels: Sequence[Kernel], families: Sequence[Hashable] | None = None
) -> TaskGraph:
    """Finds blocks, reads, sums, and who waits for them, in one pass over the ops. `families`: as in `TaskGraph`."""
    graph = regions.graph
    block_of: list[int] = []
    for scope in graph.scopes:
        block_of.append(block_of[scope.parent] if scope.kind == "remat" else scope.id)
    blocks = _blocks(graph, block_of)
    port_of = {(edge.op, edge.operand): port for port, edge in enumerate(regions.edges)}
    for port, edge in enumerate(regions.edges):
        blocks[block_of[graph.ops[edge.op].scope]].ports.append(port)
    tasks = _Walk(regions, blocks, block_of, port_of, {k.op for k in kernels}).run()
    tasks.families = families
    return tasks


def _blocks(graph: Graph, block_of: list[int]) -> dict[int, Block]:
    blocks = {0: Block(scope=0, first=0)}
    for op in graph.ops:
        scope = block_of[op.scope]
        blocks.setdefault(scope, Block(scope=scope, first=op.id)).last = op.id
    for scopes in graph.scopes_of.values():
        groups = [tuple(scopes)] if graph.scopes[scopes[0]].kind == "cond" else [(s,) for s in scopes]
        for bodies in groups:
            there = tuple(b for b in bodies if b in blocks)
            if not there or block_of[bodies[0]] != bodies[0]:
                continue
            outer = graph.scopes[graph.scopes[bodies[0]].parent]
            inner = Inner(
                position=min(blocks[b].first for b in there),
                bodies=there,
                trips=round(graph.scopes[bodies[0]].trips / outer.trips) if outer.trips else 0,
            )
            around = blocks[block_of[outer.id]]
            around.inner[inner.position] = inner
    return dict(sorted(blocks.items()))


def _segments(block: Block) -> list[list[Step]]:
    steps = []
    for op in sorted({*block.runs, *block.inner}):
        kernels = block.runs.get(op, ())
        own = op in kernels[-1:]
        steps.append(Step(op, kernels[:-1] if own else kernels, own, op in block.inner))
    return [steps[i : i + SEGMENT] for i in range(0, len(steps), SEGMENT)] or [[]]


class _Walk:
    """One pass over the ops, in order."""

    def __init__(
        self,
        regions: Regions,
        blocks: dict[int, Block],
        block_of: list[int],
        port_of: dict[tuple[int, int], int],
        kernel_ops: set[int],
    ) -> None:
        self.regions, self.graph = regions, regions.graph
        self.blocks, self.block_of = blocks, block_of
        self.port_of, self.kernel_ops = port_of, kernel_ops
        self.carried: list[tuple[Point, ...]] = [()] * len(self.graph.values)
        self.owed: list[tuple[int, ...]] = [()] * len(self.graph.values)
        """For each value the deferred kernels that it comes from, whether they have run by now or not."""
        self.step_of: dict[int, int] = {}
        self.leads: dict[int, _Lead] = {}
        self.late = late_kernels(self.graph, kernel_ops)
        self.from_late: list[bool] = [False] * len(self.graph.values)
        """For each value whether it comes from a late kernel of its block."""
        self.late_waits: dict[Point, list[int]] = {}
        self.wait_at: dict[Point, int] = {}
        self.taken: set[int] = set()

    def run(self) -> TaskGraph:
        sums = []
        readers: dict[int, list[tuple[int, int]]] = {}
        for op in self.graph.ops:
            for index, value in enumerate(op.operands):
                if value != NO_VALUE:
                    readers.setdefault(value, []).append((op.id, index))
        for op in self.graph.ops:
            waits, owed = self.steps(op)
            if self.regions.ports[op.id].reduced or halos(op.eqn) or op.kind == SHARD_MAP:
                reads = tuple((i, *r) for i, v in enumerate(op.results) for r in readers.get(v, ()))
                of = (op.id, *(reader for _, reader, _ in reads), *self.regions.same_images.get(op.id, ()))
                sums.append(
                    Sum(
                        op=op.id,
                        block=self.block_of[op.scope],
                        regions=tuple(self.regions.region_of[o] for o in of),
                        readers=reads,
                        upstream=waits,
                    )
                )
                waits = (*waits, ~op.id)
            lead = self.lead(op)
            late = op.id in self.late or any(v != NO_VALUE and self.from_late[v] for v in op.operands)
            for value in op.results:
                self.from_late[value] = late and op.kind not in ("enter", "exit")
                self.carried[value], self.owed[value] = waits, owed
                if lead is not None:
                    self.leads[value] = lead
        for kernel in sorted(self.kernel_ops):
            block = self.blocks[self.block_of[self.graph.ops[kernel].scope]]
            step = self.step_of.setdefault(kernel, block.last)  # what nobody reads runs at the end
            block.runs[step] = (*block.runs.get(step, ()), kernel)
        for block in self.blocks.values():
            block.segments = _segments(block)
        self.place_late()
        return TaskGraph(
            blocks=self.blocks,
            reads=self.reads(),
            sums=sums,
            wait_at=self.wait_at,
            late_waits=self.late_waits,
            step_of=self.step_of,
            block_of=self.block_of,
        )

    def steps(self, op: Op) -> tuple[tuple[Point, ...], tuple[int, ...]]:
        """Makes an op a step if it is one; what its results wait for, and the deferred kernels that they come from."""
        block, ports = self.block_of[op.scope], self.regions.ports[op.id]
        waits, owed, first = dict[Point, None](), dict[int, None](), False
        for index, value in enumerate(op.operands):
            if value == NO_VALUE:
                continue
            before: tuple[int, ...] = ()
            if self.block_of[self.graph.ops[self.graph.values[value].producer].scope] == block:
                waits.update(dict.fromkeys(self.carried[value]))
                before = tuple(k for k in self.owed[value] if k not in self.step_of)
                owed.update(dict.fromkeys(before))
            if (port := self.port_of.get((op.id, index))) is not None:
                waits[port] = None
                # What may be copied here must have been made.
                first = first or bool(before)
        points = tuple(p for p in waits if p not in self.wait_at)
        if len(points) + len(owed) <= MOST_CARRIED:
            first = first or bool(ports.reduced) or self.leaves(op)
            if op.id in self.kernel_ops:
                if fusible(op) and not first and (owed or any(p < 0 for p in points)):
                    return points, (*owed, op.id)
            elif not (owed and first):
                return points, tuple(owed)
        self.blocks[block].runs[op.id] = ()
        if op.id in self.late:
            own = [p for p in points if not owed or (p >= 0 and self.regions.edges[p].op == op.id)]
            points = tuple(p for p in points if p not in own)
            for point in own:
                self.late_waits.setdefault(point, []).append(op.id)
        for kernel in (*owed, op.id) if op.id in self.kernel_ops else owed:
            self.step_of[kernel] = op.id
        self.wait_at.update(dict.fromkeys(points, op.id))
        return (), ()

    def place_late(self) -> None:
        """Finds where the late kernels of each block run."""
        needed: dict[int, list[tuple[int, int]]] = {}
        for op in self.late:
            if (first := self.wait_at.get(~op)) is not None:
                needed.setdefault(self.block_of[self.graph.ops[op].scope], []).append((first, op))
        for scope, kernels in needed.items():
            block = self.blocks[scope]
            block.late_at = min(kernels)[0]
            block.late = tuple(op for _, op in sorted(kernels) if op < block.late_at)

    def leaves(self, op: Op) -> bool:
        """Whether an op takes its operand out of a block: into a loop, out of a body, or out of the step."""
        scopes = {self.block_of[self.graph.values[v].scope] for v in op.results}
        return op.kind in ("enter", "exit", "result") and scopes != {self.block_of[op.scope]}

    def outside(self, value: int, block: int) -> bool:
        """Whether a value is there when a block begins."""
        producer = self.graph.ops[self.graph.values[value].producer]
        return producer.kind == "argument" or producer.id < self.blocks[block].first

    def lead(self, op: Op) -> _Lead | None:
        """How an op's results come from what its block begins with, if only fused ops lie between."""
        if not (fusible(op) or op.kind in ("enter", "exit")) or self.regions.ports[op.id].reduced or self.leaves(op):
            return None
        prepared, chain = dict[int, None](), dict[int, None]()
        for index, value in enumerate(op.operands):
            if value == NO_VALUE:
                continue
            if (port := self.port_of.get((op.id, index))) is not None:
                chain[port] = None
            if not self.outside(value, self.block_of[op.scope]):
                before = self.leads.get(value)
                if before is None:
                    return None
                prepared.update(dict.fromkeys(before.prepared))
                chain.update(dict.fromkeys(before.chain))
        if op.id in self.kernel_ops:
            prepared[op.id] = None
        if max(len(prepared), len(chain)) > MOST_PREPARED:
            return None
        return _Lead(prepared=tuple(prepared), chain=tuple(chain))

    def reads(self) -> list[Read]:
        ports: dict[tuple[int, int], list[int]] = {}
        for port, edge in enumerate(self.regions.edges):
            ports.setdefault((edge.value, self.graph.ops[edge.op].scope), []).append(port)
        return [self.read(value, self.block_of[scope], tuple(own)) for (value, scope), own in ports.items()]

    def read(self, value: int, block: int, ports: tuple[int, ...]) -> Read:
        edges = self.regions.edges
        producer = self.graph.ops[self.graph.values[value].producer]
        read = Read(
            value=value,
            block=block,
            ports=ports,
            regions=(edges[ports[0]].source, *(edges[p].target for p in ports)),
            upstream=self.carried[value] if self.block_of[producer.scope] == block else (),
            early=START,
            late=3 * max([producer.id, *(self.step_of[k] for k in self.owed[value])]) + AFTER,
        )
        if self.from_late[value] and self.blocks[block].late:
            read.late = max(read.late, 3 * self.blocks[block].late_at + BEFORE)
        if self.outside(value, block):
            read.late, read.upstream = START, ()
        elif (lead := self.leads.get(value)) is None:
            read.early = read.late
        elif self.taken.isdisjoint(lead.prepared):
            self.taken.update(lead.prepared)
            read.prepared, read.chain = lead.prepared, lead.chain
        else:
            # Another value's copy may move these kernels: this one comes after them wherever they are.
            read.early, read.chain = 3 * max(lead.prepared) + AFTER, lead.chain
        return read
