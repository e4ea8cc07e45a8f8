"""Streams: kernels run one after another on one, the collectives of each link on another.

A collective is issued at a place of the program. It begins when the kernels before that place have ended, what it reads
is there, and all its links are free; links serve in the order of issue. A kernel waits for the collectives whose
results it reads. Synchronous collectives hold up the kernels behind them. What is inside a loop or a branch begins when
all before it has ended, and ends with the last of its own: XLA overlaps nothing across their borders.

A kernel that nothing soon needs (`Later`) runs while others would wait for a collective, once what it reads is there;
if it never comes to that, it runs where the program puts it (`Rest`).

Everything here is relative to the moment at which kernels have got, so playing a part of a program is a function of its
events and of what is still under way when it begins.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import NamedTuple, TypeAlias

from ffjax.cost.simulation.task_costs import Hop
from ffjax.cost.simulation.task_graph import Point

COMPUTE_STREAM = -1
MOST_LATER = 16
"""Kernels that can be run while others wait, the latest ones: so what a part of a program leaves behind is bounded."""


class Run(NamedTuple):
    """Kernels, one after another."""

    ticks: int
    ops: tuple[int, ...]


class Issue(NamedTuple):
    """Collectives, each reading what the one before it made. When the last has ended, so has each of `points`."""

    hops: tuple[Hop, ...]
    points: tuple[Point, ...]
    after: tuple[Point, ...]
    """What the first one waits for, if it is under way."""


class Wait(NamedTuple):
    """Kernels go on when these have ended."""

    points: tuple[Point, ...]


class Inside(NamedTuple):
    """All trips of a loop, or a conditional."""

    ticks: int
    compute_ticks: int
    comm_ticks: int
    position: int


class Later(NamedTuple):
    """A kernel that may run from here on, once `points` have ended."""

    op: int
    ticks: int
    points: tuple[Point, ...]


class Rest(NamedTuple):
    """Such kernels, as far as they have not run."""

    kernels: tuple[Later, ...]


Event: TypeAlias = Run | Issue | Wait | Inside | Later | Rest


class State(NamedTuple):
    """What is under way: for how much longer each link is busy, each collective that is not done, and what can run."""

    links: tuple[int, ...]
    pending: dict[Point, int]
    later: tuple[Later, ...] = ()


class Entry(NamedTuple):
    """One task that was played."""

    stream: int
    start: int
    end: int
    ops: tuple[int, ...]
    """Kernels that ran; none for a collective."""
    points: tuple[Point, ...] = ()
    hop: Hop | None = None
    inside: Inside | None = None


def idle(links: int) -> State:
    """Nothing is under way."""
    return State((0,) * links, {})


def play(
    events: Sequence[Event],
    state: State,
    *,
    overlap: bool,
    ran: Collection[int] = (),
    log: list[Entry] | None = None,
    base: int = 0,
) -> tuple[int, State, tuple[int, ...]]:
    """Runs events from a state: how far that takes the compute stream, the state then, and what of `Later` has run.

    `overlap`: whether collectives are asynchronous. `ran`: what of `Later` ran before. What is played is added to
    `log`, from `base` on.
    """
    now = 0
    free = list(state.links)
    ends = dict(state.pending)
    later = list(state.later)
    found: list[int] = []

    def run(kernel: Later) -> None:
        nonlocal now
        if log is not None:
            log.append(Entry(COMPUTE_STREAM, base + now, base + now + kernel.ticks, (kernel.op,)))
        now += kernel.ticks

    def wait(until: int) -> None:
        nonlocal now
        while now < until and later:
            kernel = next((k for k in later if all(ends.get(p, 0) <= now for p in k.points)), None)
            if kernel is None:
                break
            later.remove(kernel)
            found.append(kernel.op)
            run(kernel)
        now = max(now, until)

    for event in events:
        if type(event) is Run:
            if log is not None:
                log.append(Entry(COMPUTE_STREAM, base + now, base + now + event.ticks, event.ops))
            now += event.ticks
        elif type(event) is Issue:
            at = now
            for point in event.after:
                at = max(at, ends.get(point, 0))
            for hop in event.hops:
                for link in hop.links:
                    at = max(at, free[link])
                began, at = at, at + hop.ticks
                for link in hop.links:
                    free[link] = at
                    if log is not None:
                        log.append(Entry(link, base + began, base + at, (), event.points, hop))
            for point in event.points:
                ends[point] = at
            if not overlap:
                now = at
        elif type(event) is Wait:
            wait(max([ends.get(point, 0) for point in event.points]))
        elif type(event) is Inside:
            wait(max(free))
            if log is not None:
                log.append(Entry(COMPUTE_STREAM, base + now, base + now + event.ticks, (), inside=event))
            now += event.ticks
        elif type(event) is Later:
            later = [*later[-MOST_LATER + 1 :], event]
        elif type(event) is Rest:
            for kernel in event.kernels:
                if kernel.op not in ran and kernel.op not in found:
                    now = max([now, *[ends.get(point, 0) for point in kernel.points]])
                    run(kernel)
            later.clear()
    links = tuple([max(0, f - now) for f in free])
    pending = {p: end - now for p, end in ends.items() if end > now}
    return now, State(links, pending, tuple(later)), tuple(found)
