"""Refinement over the simulator: Markov chain Monte Carlo from a known plan, with delta simulation (FlexFlow's method).

What a sum of costs cannot see, which collectives hide behind which kernels, the simulator does. A proposal gives one
node another candidate and lets the nodes around it follow: each takes its best response under the sum, until none
gains, so that what has to change together is one proposal. Nodes are drawn by the seconds that hang on them, their
candidates by what the dual says that the sum would lose (reduced costs). A proposal is taken with probability
min(1, exp(-extra / T)) for the extra simulated seconds (Metropolis), and is the new best if it also fits into memory.
"""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable, Sequence

from ffjax.cost.simulation.simulator import Simulator
from ffjax.strategies.methods.base import Solution
from ffjax.strategies.methods.dual_ascent import Ascent
from ffjax.strategies.methods.moves import Moves
from ffjax.strategies.problem import Problem, assignments

_LEAST, _MOST = 16, 400
_OPS = 800_000
"""Proposals: so many ops are simulated in all, within limits. A longer program takes longer to simulate."""
_DOUBTFUL = 0.02
"""Candidates that would cost the sum a share of the step as large as this are drawn 1/e times as often as the best."""
_DRAWS = 50
"""In which nothing new is found end the chain."""
_TEMPERATURE = 1e-3
"""As a share of the step."""
_SWEEPS = 8
"""Of the ascent whose reduced costs are used."""

Fits = Callable[[Sequence[int]], bool]


class Refinement:
    """Minimises the simulated step. Deterministic for a seed; bounded by proposals.

    Args:
      simulator: of the problem's program on its mesh.
      fits: whether a choice fits into memory; None where all do.
      proposals: how many plans are simulated; by default fewer for longer programs.
    """

    name = "refinement"

    def __init__(
        self,
        simulator: Simulator,
        fits: Fits | None = None,
        *,
        proposals: int | None = None,
        seed: int = 0,
    ) -> None:
        self.simulator = simulator
        self.fits = fits
        ops = len(simulator.regions.graph.ops)
        self.proposals = max(_LEAST, min(_MOST, _OPS // ops)) if proposals is None else proposals
        self.seed = seed

    def solve(self, problem: Problem, starts: Sequence[Sequence[int]] = ()) -> Solution | None:
        """From the best of `starts`, which fit, or else from what dual ascent finds; `objective_s` is simulated."""
        began = time.perf_counter()
        if any(not node.candidates for node in problem.nodes):
            return None
        ascent = Ascent(problem)
        ascent.climb(0.0, _SWEEPS)
        known = [tuple(c) for c in starts]
        if not known and ascent.best is not None:
            known.append(ascent.best)
        if not known:
            return None
        chain = _Chain(problem, self.simulator)
        seconds, best = min((chain.simulate(c), c) for c in known)
        now_s, now = seconds, best
        rng = random.Random(self.seed)
        draw = _Draw(ascent, now, rng)
        for _ in range(self.proposals):
            proposed = draw.proposal(now)
            if proposed is None:
                break
            proposed_s = chain.simulate(proposed)
            extra = proposed_s - now_s
            if extra > 0 and rng.random() >= math.exp(-extra / (_TEMPERATURE * seconds)):
                continue
            if proposed_s < seconds:
                if self.fits is not None and not self.fits(proposed):
                    continue
                seconds, best = proposed_s, proposed
            now_s, now = proposed_s, proposed
        return Solution(
            choice=best,
            objective_s=seconds,
            bound_s=-math.inf,
            status=self.name,
            seconds=time.perf_counter() - began,
        )


class _Chain:
    """The simulator, and the choice that it holds."""

    def __init__(self, problem: Problem, simulator: Simulator) -> None:
        self.problem, self.simulator = problem, simulator
        self._held: tuple[int, ...] | None = None

    def simulate(self, choice: tuple[int, ...]) -> float:
        """The step's seconds; only what differs from the last choice is simulated."""
        if self._held is None:
            simulated = self.simulator.go_on(assignments(self.problem, choice))
        else:
            simulated = self.simulator.update(
                {
                    region: node.candidates[new]
                    for node, old, new in zip(self.problem.nodes, self._held, choice, strict=True)
                    if old != new
                    for region in node.regions
                }
            )
        self._held = choice
        return simulated.step_s


class _Draw:
    """Draws proposals, none twice."""

    def __init__(self, ascent: Ascent, choice: Sequence[int], rng: random.Random) -> None:
        self.moves = Moves(ascent.problem, choice)
        self.rng = rng
        self._seen = {tuple(choice)}
        worth = [float(self.moves.seconds(n)[c]) for n, c in enumerate(choice)]
        scale = _DOUBTFUL * max(sum(worth) / 2, 1e-12)
        self._options: list[tuple[int, int]] = []
        self._weights: list[float] = []
        for node, least in enumerate(ascent.least_with()):
            for candidate, extra in enumerate(least - least.min()):
                weight = worth[node] * math.exp(-extra / scale) if len(least) > 1 else 0.0
                if weight > 0:
                    self._options.append((node, candidate))
                    self._weights.append(weight)

    def proposal(self, now: tuple[int, ...]) -> tuple[int, ...] | None:
        """A choice that was not proposed before, near `now`; None if none is found in a few draws."""
        for _ in range(_DRAWS if self._options else 0):
            ((node, candidate),) = self.rng.choices(self._options, self._weights)
            if now[node] == candidate:
                continue
            for other, kept in enumerate(now):
                self.moves.move(other, kept)
            self.moves.move(node, candidate)
            self.moves.descend(fixed={node}, begin=self.moves.neighbours[node])
            proposed = tuple(self.moves.choice)
            if proposed not in self._seen:
                self._seen.add(proposed)
                return proposed
        return None
