"""When collectives are issued: as early as what they read is there, but copies not without end.

Sums are issued after the kernel that they sum. Late kernels run before the step `Block.late_at`, each with its sum, if
it has one; those without may run while others wait, from their own place on. Copies that only late kernels read are
issued right before all of these, and copies of what they leave right after: XLA:GPU's scheduler works from the end, and
starts a collective no earlier than it takes to hide it behind what runs right before its reader. Any other copy may be
made ahead of the op that first reads it, back to where its value is made, or to the block's start if it is made of
nothing but what the block begins with (a parameter, cast or not: the cast is moved along). It then takes memory while
it waits, so

    at every place of a block, copies that are issued and not yet read hold at most `AHEAD` times the bytes of the
    largest one that can be made at the block's start (a weight); a larger one waits until all before it are read.

XLA's latency-hiding scheduler has a limit on bytes, too, and by default one collective in flight; PyTorch's FSDP lets
two gathers be under way (`limit_all_gathers`). Synchronous collectives gain nothing: they are issued where they are
read. The rule needs places only, no times, so that a schedule changes no further than sizes do.
"""

from __future__ import annotations

import bisect
from collections.abc import Mapping, Sequence
from copy import copy as shallow

import numpy as np

from ffjax.cost.simulation.streams import Event, Inside, Issue, Later, Rest, Run, Wait
from ffjax.cost.simulation.task_costs import Copy, Hop
from ffjax.cost.simulation.task_graph import AFTER, BEFORE, DURING, START, Block, Point, Read, Sum, TaskGraph

AHEAD = 2.0
_NOWHERE = START - 1
_END = 2**62
"""Behind every place of a program."""


class Schedule:
    """The collectives of one block under a plan, and the events of each of its segments.

    `dirty`: the segments whose events may have changed since it was emptied.
    """

    def __init__(self, block: Block, reads: Sequence[Read], op_of: Sequence[int], tasks: TaskGraph) -> None:
        self._op_of, self._step_of = op_of, tasks.step_of
        self.segments = block.segments
        self.inner = block.inner
        self._later, self._later_at = dict.fromkeys(block.late), block.late_at
        self._bounds = [START, *(s[0].op for s in self.segments[1:])]
        self._wait_at, self._late_waits = tasks.wait_at, tasks.late_waits
        self.late_segment = self.segment_of(3 * block.late_at) if block.late else len(block.segments)
        """The segment before which all late kernels have run, or in which they do."""
        # By port of the block, in the order of ops.
        self._index = {port: i for i, port in enumerate(block.ports)}
        count = len(block.ports)
        self._ports = block.ports
        self._read_at = np.array([3 * op_of[p] + BEFORE for p in block.ports], dtype=np.int64)
        self._early, self._late = np.zeros(count, np.int64), np.zeros(count, np.int64)
        self._blocks: dict[int, list[int]] = {}
        self._of_late: set[int] = set()
        """Ports that read what late kernels leave: copied as soon as all of these have run."""
        for read in reads:
            own = [self._index[p] for p in read.ports]
            self._early[own], self._late[own] = read.early, read.late
            if block.late and read.late == 3 * block.late_at + BEFORE:
                # What reads a late result may stand anywhere behind its product, which has not run there.
                self._of_late.update(read.ports)
                self._read_at[own] = np.maximum(self._read_at[own], read.late)
            for port in read.chain:
                self._blocks.setdefault(port, []).extend(own)
        self.clear()

    def empty(self) -> Schedule:
        """The same block without collectives: what no plan changes is shared."""
        other = shallow(self)
        other.clear()
        return other

    def clear(self) -> None:
        """No collectives at all: everything that a plan decides begins anew."""
        count = len(self._ports)
        self._blocked = np.zeros(count, np.int64)
        self._bytes, self._active = np.zeros(count), np.zeros(count, bool)
        self._for_late = np.zeros(count, bool)
        self._place = np.full(count, _NOWHERE, np.int64)
        self._copies: dict[int, tuple[Issue, tuple[int, ...]]] = {}
        self._issued: list[dict[Point, tuple[int, Issue]]] = [{} for _ in self.segments]
        self._late_sums: dict[int, Issue] = {}
        self._waits: dict[int, dict[Point, None]] = {}
        self._moved: dict[int, int] = {}
        self.dirty = set(range(len(self.segments)))

    def segment_of(self, position: int) -> int:
        return bisect.bisect_right(self._bounds, position // 3) - 1

    # -- what there is to issue

    def set_sum(self, entry: Sum, hops: Sequence[Hop]) -> None:
        """Sums an op's partial results by these collectives, in place of what did before."""
        point, position = ~entry.op, 3 * entry.op + AFTER
        issued = self._issued[self.segment_of(position)]
        late = entry.op in self._later
        before = self._late_sums.pop(entry.op, None) if late else issued.pop(point, None)
        if before is not None:
            self._unwait(point, (point,))
        if hops:
            # The results' collectives are on the same links, so one after another.
            issue = Issue(tuple(hops), (point,), entry.upstream)
            if late:
                self._late_sums[entry.op] = issue
            else:
                issued[point] = position, issue
            self._wait(point, (point,))
        self._changed(entry.op)

    def set_copies(self, read: Read, before: Sequence[Copy], after: Sequence[Copy]) -> None:
        """Makes the copies of a read, in place of those made before. `arrange` then says when."""
        for copy in before:
            lead = read.ports[copy.readers[0]]
            self._unplace(lead)
            issue, _ = self._copies.pop(lead)
            self._unwait(lead, issue.points)
            self._activate(lead, issue.points, 0.0, -1)
        for_late = self._read_late(read, after)
        leads = [read.ports[c.readers[0]] for c in after]
        for index, (lead, copy) in enumerate(zip(leads, after, strict=True)):
            points = tuple(read.ports[r] for r in copy.readers)
            begins = read.upstream if copy.base < 0 else (*read.upstream, leads[copy.base])
            # Kernels move with the first copy, which is issued before the others.
            self._copies[lead] = Issue(copy.hops, points, begins), read.prepared if index == 0 else ()
            self._wait(lead, points)
            self._activate(lead, points, copy.bytes, 1)
            self._for_late[self._index[lead]] = for_late[index]

    def _read_late(self, read: Read, copies: Sequence[Copy]) -> list[bool]:
        """For each copy whether only late kernels read it, and what is made of it."""
        if not self._later:
            return [False] * len(copies)
        found = [all(self._op_of[read.ports[r]] in self._later for r in copy.readers) for copy in copies]
        for copy, late in zip(reversed(copies), reversed(found), strict=True):
            # A copy comes after the one that it is made of, so that all that are made of one are known here.
            if copy.base >= 0 and not late:
                found[copy.base] = False
        return found

    def _activate(self, lead: int, points: Sequence[int], size: float, step: int) -> None:
        self._bytes[self._index[lead]] = size
        self._active[self._index[lead]] = step > 0
        for port in points:
            for index in self._blocks.get(port, ()):
                self._blocked[index] += step

    def _waiting(self, points: Sequence[Point]) -> list[int]:
        """The ops that wait for one of some points: the first step that does, and the late kernels."""
        first, late = _END, list[int]()
        for point in points:
            first = min(first, self._wait_at.get(point, _END))
            late += self._late_waits.get(point, ())
        return late if first == _END else [first, *late]

    def _wait(self, point: Point, points: Sequence[Point]) -> None:
        for op in self._waiting(points):
            self._waits.setdefault(op, {})[point] = None
            self._changed(op)

    def _unwait(self, point: Point, points: Sequence[Point]) -> None:
        for op in self._waiting(points):
            self._waits[op].pop(point, None)
            self._changed(op)

    def _changed(self, op: int) -> None:
        """Has the segments played again that have to do with an op at its own place."""
        if len(self.dirty) == len(self.segments):
            return  # a plan that is simulated from the beginning
        self.dirty.add(self.segment_of(3 * op))
        if op in self._later:
            self.dirty.add(self.late_segment)

    # -- where copies are issued

    def arrange(self, *, overlap: bool) -> None:
        """Finds the places of all copies, and moves those whose place is another than before."""
        active = np.flatnonzero(self._active)
        places = self._read_at[active]
        if overlap and len(active):
            begins = np.where(self._blocked[active] > 0, self._late[active], self._early[active])
            weights = self._bytes[active][begins == START]
            budget = AHEAD * float(weights.max()) if len(weights) else 0.0
            late = self._for_late[active]
            held = np.concatenate([[0.0], np.cumsum(np.where(self._for_late, 0.0, self._bytes))])
            # The copies from `oldest` on fit beside this one: it is issued when the one before them is read.
            oldest = np.searchsorted(held, np.minimum(held[active + 1] - budget, held[active]), side="left")
            limit = np.where(oldest > 0, self._read_at[oldest - 1] + DURING, START)
            places = np.where(late, 3 * self._later_at - 1, np.minimum(np.maximum(begins, limit), places))
        for index in np.flatnonzero(places != self._place[active]).tolist():
            lead = self._ports[active[index]]
            self._unplace(lead)
            self._put(lead, int(places[index]))

    def places(self) -> dict[int, int]:
        """For each copy, by the first port that reads it, its place."""
        return {self._ports[i]: int(self._place[i]) for i in np.flatnonzero(self._active).tolist()}

    def _put(self, lead: int, place: int) -> None:
        issue, prepared = self._copies[lead]
        segment = self.segment_of(place)
        self._place[self._index[lead]] = place
        self._issued[segment][lead] = place, issue
        self.dirty.add(segment)
        self._move(prepared, place, ahead=True)

    def _unplace(self, lead: int) -> None:
        place = int(self._place[self._index[lead]])
        if place == _NOWHERE:
            return
        segment = self.segment_of(place)
        del self._issued[segment][lead]
        self._place[self._index[lead]] = _NOWHERE
        self.dirty.add(segment)
        self._move(self._copies[lead][1], place, ahead=False)

    def _move(self, prepared: Sequence[int], place: int, *, ahead: bool) -> None:
        for op in prepared:
            if 3 * op > place:
                if ahead:
                    self._moved[op] = place
                else:
                    del self._moved[op]
                self.dirty.add(self.segment_of(3 * op))

    def touch(self, op: int) -> None:
        """Another time for an op's kernel: what plays it is to be played again."""
        if op in self._later:
            self._changed(op)
        else:
            self.dirty.add(self.segment_of(self._moved.get(op, 3 * self._step_of[op])))

    # -- events

    def events(self, segment: int, ticks: Sequence[int], inside: Mapping[int, Inside]) -> list[Event]:
        """What happens in one segment. `ticks`: of each op's kernel; `inside`: inner blocks by position."""
        issues = sorted((place, point) for point, (place, _) in self._issued[segment].items())
        found: list[Event] = []
        ops: list[int] = []
        at, upcoming = 0, issues[0][0] if issues else _END

        def flush() -> None:
            if ops:
                found.append(Run(sum(map(ticks.__getitem__, ops)), tuple(ops)))
                ops.clear()

        def issue(until: int) -> None:
            nonlocal at, upcoming
            while upcoming <= until:
                place, point = issues[at]
                at += 1
                upcoming = issues[at][0] if at < len(issues) else _END
                if point >= 0:
                    ops.extend(op for op in self._copies[point][1] if 3 * op > place)
                flush()
                found.append(self._issued[segment][point][1])

        def rest() -> None:
            kernels: list[Later] = []
            for op in self._later:
                later = Later(op, ticks[op], tuple(waits_at.get(op, ())))
                summed = self._late_sums.get(op)
                if summed is None:
                    kernels.append(later)
                    continue
                if later.points:
                    found.append(Wait(later.points))
                found.extend((Run(later.ticks, (op,)), summed))
            if kernels:
                found.append(Rest(tuple(kernels)))

        moved, waits_at, late = self._moved, self._waits, self._later
        for op, deferred, own, holds in self.segments[segment]:
            waits = waits_at.get(op)
            if late and op == self._later_at:
                issue(3 * op - 1)
                flush()
                rest()
                for made in [i for i in issues[at:] if i[0] == 3 * op + BEFORE and i[1] in self._of_late]:
                    issues.remove(made)
                    found.append(self._issued[segment][made[1]][1])
                upcoming = issues[at][0] if at < len(issues) else _END
            if not waits and not holds and upcoming > 3 * op + DURING and op not in late:
                ops += deferred
                if own and op not in moved:
                    ops.append(op)
                continue
            if deferred:
                # What is copied for this op may be made by these.
                if waits and (theirs := tuple(p for p in waits if p < 0 or self._op_of[p] != op)):
                    flush()
                    found.append(Wait(theirs))
                ops.extend(deferred)
            issue(3 * op + BEFORE)
            if op in late:
                if op not in self._late_sums:
                    flush()
                    found.append(Later(op, ticks[op], tuple(waits or ())))
                continue
            if waits:
                flush()
                found.append(Wait(tuple(waits)))
            issue(3 * op + DURING)
            if holds:
                flush()
                found.append(inside[op])
            elif own and op not in moved:
                ops.append(op)
        issue(_END - 1)
        flush()
        return found
