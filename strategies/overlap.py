"""What a sum of costs does not see: collectives that run beside kernels.

How much of a collective is hidden depends on all the rest, which a sum cannot say. So the problem is solved with
collectives at a part of their seconds (`Exposed`), for several guesses, and the simulator says which solution is
fastest. The first guesses are the extremes: nothing is hidden, or all that nothing in the step waits for (weights
gathered ahead of their use, gradients reduced while others are computed). The next are what the simulator saw of the
fastest plan so far: the linearisation of the step's time around it, as it were.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from ffjax.cost.simulation.exposure import exposure
from ffjax.cost.simulation.simulator import Simulator
from ffjax.strategies.problem import Problem

LEAST = 0.02
"""The part at which even what is hidden is priced: of two plans that hide all, the one that moves less."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Exposed:
    """For each node's reductions, and for each transfer, the part of their seconds that counts."""

    nodes: tuple[float, ...]
    transfers: tuple[float, ...]


def all_hidden(problem: Problem) -> Exposed:
    """All but what some op of the step waits for."""
    return Exposed(
        nodes=tuple(LEAST if n.late else 1.0 for n in problem.nodes),
        transfers=tuple(LEAST if t.ahead else 1.0 for t in problem.transfers),
    )


def observed(problem: Problem, simulator: Simulator) -> Exposed:
    """As in the plan that was simulated last. What it does not move is taken to be like what is waited for alike."""
    regions = problem.regions
    transfer_of = {member: i for i, t in enumerate(problem.transfers) for member in t.values}
    nodes = [_Share() for _ in problem.nodes]
    transfers = [_Share() for _ in problem.transfers]
    for point, (ticks, exposed) in exposure(simulator).items():
        if point < 0:
            nodes[problem.node_of[regions.region_of[~point]]].add(ticks, exposed)
        else:
            edge = regions.edges[point]
            index = transfer_of.get((edge.value, regions.graph.ops[edge.op].scope))
            if index is not None:
                transfers[index].add(ticks, exposed)
    return Exposed(
        nodes=_filled(nodes, [n.late for n in problem.nodes]),
        transfers=_filled(transfers, [t.ahead for t in problem.transfers]),
    )


def overlapped(problem: Problem, exposed: Exposed) -> Problem:
    """The problem with only so much of the seconds of collectives."""
    return dataclasses.replace(
        problem,
        nodes=[
            n if e == 1.0 else dataclasses.replace(n, reduction_s=n.reduction_s * e)
            for n, e in zip(problem.nodes, exposed.nodes, strict=True)
        ],
        transfers=[
            t if e == 1.0 else dataclasses.replace(t, seconds=t.seconds * e)
            for t, e in zip(problem.transfers, exposed.transfers, strict=True)
        ],
    )


@dataclass(slots=True)
class _Share:
    ticks: float = 0.0
    exposed: float = 0.0

    def add(self, ticks: float, exposed: float) -> None:
        self.ticks += ticks
        self.exposed += exposed

    def part(self, otherwise: float) -> float:
        return max(LEAST, self.exposed / self.ticks) if self.ticks > 0 else otherwise


def _filled(shares: list[_Share], kinds: list[bool]) -> tuple[float, ...]:
    """The part of each; where nothing was seen, that of all of its kind together."""
    kept = {True: _Share(), False: _Share()}
    for share, kind in zip(shares, kinds, strict=True):
        kept[kind].add(share.ticks, share.exposed)
    guess = {kind: share.part(LEAST if kind else 1.0) for kind, share in kept.items()}
    return tuple(s.part(guess[k]) for s, k in zip(shares, kinds, strict=True))
