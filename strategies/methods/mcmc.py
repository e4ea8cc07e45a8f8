"""Markov chain Monte Carlo over families: FlexFlow's method, here over the sum of costs.

A proposal gives one node another candidate, both drawn evenly, and is taken with probability min(1, exp(-extra / T))
(Metropolis; Jia, Zaharia, Aiken, "Beyond Data and Model Parallelism for Deep Neural Networks", MLSys 2019, section
6.2). The temperature T falls geometrically. What the chain ends in is descended from. Nothing is proved.
"""

from __future__ import annotations

import math
import random
import time
from collections.abc import Sequence

import numpy as np

from ffjax.strategies.methods.base import Solution
from ffjax.strategies.methods.moves import Moves
from ffjax.strategies.problem import Problem, Totals

_PER_CANDIDATE, _MOST = 20, 100_000
"""Proposals."""
_HOT, _COLD = 1e-2, 1e-6
"""Temperatures at the beginning and at the end, as shares of what the chain starts from."""


class MCMC:
    """Simulated annealing. `proposals`: by default some for each candidate, up to a limit."""

    name = "mcmc"

    def __init__(self, *, proposals: int | None = None, seed: int = 0) -> None:
        self.proposals = proposals
        self.seed = seed

    def solve(self, problem: Problem, starts: Sequence[Sequence[int]] = ()) -> Solution | None:
        """From the best start, or else from every node's own cheapest candidate; see `Method`."""
        began = time.perf_counter()
        if any(not node.candidates for node in problem.nodes):
            return None
        total = Totals(problem).of
        cheapest = tuple(int(np.argmin(n.cost_s)) for n in problem.nodes)
        best = min((*map(tuple, starts), cheapest), key=total)
        moves = Moves(problem, best)
        open_nodes = [n for n, node in enumerate(problem.nodes) if len(node.candidates) > 1]
        if open_nodes:
            self._anneal(moves, open_nodes)
        moves.descend()
        found = min((best, tuple(moves.choice)), key=total)
        seconds = total(found)
        if not math.isfinite(seconds):
            return None
        return Solution(
            choice=found,
            objective_s=seconds,
            bound_s=-math.inf,
            status=self.name,
            seconds=time.perf_counter() - began,
        )

    def _anneal(self, moves: Moves, nodes: Sequence[int]) -> None:
        rng = random.Random(self.seed)
        sizes = [len(moves.problem.nodes[n].candidates) for n in nodes]
        proposals = min(_PER_CANDIDATE * sum(sizes), _MOST) if self.proposals is None else self.proposals
        scale = sum(float(moves.seconds(n)[moves.choice[n]]) for n in nodes) / 2
        cooling = (_COLD / _HOT) ** (1 / max(proposals, 1))
        temperature = _HOT * scale
        above, least, best = 0.0, 0.0, list(moves.choice)
        for _ in range(proposals):
            which = rng.randrange(len(nodes))
            node, candidate = nodes[which], rng.randrange(sizes[which])
            seconds = moves.seconds(node)
            extra = float(seconds[candidate] - seconds[moves.choice[node]])
            if extra <= 0 or rng.random() < math.exp(-extra / temperature):
                moves.move(node, candidate)
                above += extra
                if above < least:
                    least, best = above, list(moves.choice)
            temperature *= cooling
        for node, candidate in enumerate(best):
            moves.move(node, candidate)
