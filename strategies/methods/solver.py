"""The default solver: dual ascent, then decomposition, then an integer linear program, each of what the last left.

The ascent closes the gap of most problems by itself. What is left are the candidates that could still be part of a
better choice than the best one known. Dynamic programming over them settles most of the rest, and where it cannot, it
still raises the bound; a program that is small enough settles what then remains.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

from ffjax.strategies.methods.base import Solution
from ffjax.strategies.methods.decomposition import GAP, settle
from ffjax.strategies.methods.dual_ascent import MOST_SWEEPS, Ascent
from ffjax.strategies.methods.ilp import solve
from ffjax.strategies.problem import Problem, restrict

_EXACT_CELLS = 60_000
"""Resharding variables up to which what is left in doubt is solved as an integer linear program."""
_MOST_NODES = 100
"""Of its branch-and-bound tree: most need one. A limit on seconds would make plans depend on the machine's load."""


class Solver:
    """Solves problems of one shape (nodes, candidates, transfers), each from where the last one ended."""

    name = "default"

    def __init__(self) -> None:
        self._ascent: Ascent | None = None

    def solve(
        self,
        problem: Problem,
        starts: Sequence[Sequence[int]] = (),
        *,
        gap: float = GAP,
        sweeps: int = MOST_SWEEPS,
        prove: bool = True,
    ) -> Solution | None:
        """The best choice, proved to be within `gap` of the optimum where that could be done; None if none is possible.

        Args:
          problem: of the shape of those before it.
          starts: choices that are known; the solution is never worse.
          gap: what is good enough, as a share of the optimum.
          sweeps: of the ascent, at most.
          prove: whether what the ascent leaves in doubt is settled.
        """
        began = time.perf_counter()
        if any(not node.candidates for node in problem.nodes):
            return None
        if self._ascent is None:
            self._ascent = Ascent(problem)
        else:
            self._ascent.reprice(problem)
        ascent = self._ascent
        for choice in starts:
            ascent.offer(choice)
        ascent.climb(gap, sweeps)
        bound_s, status = ascent.bound_s, "dual ascent"
        if prove and (ascent.best is None or ascent.best_s - bound_s > gap * ascent.best_s):
            bound_s, status = settle(ascent, gap), "decomposition"
        if ascent.best is None or (prove and ascent.best_s - bound_s > gap * ascent.best_s):
            enough_s = ascent.best_s * (1 - gap)
            kept = ascent.survivors(enough_s)
            if not all(kept):
                bound_s = enough_s
            else:
                left = restrict(problem, kept)
                if sum(t.seconds.size * len(t.consumers) for t in left.transfers) <= _EXACT_CELLS:
                    status = "integer linear program"
                    found = solve(left, gap=gap / 2, most_nodes=_MOST_NODES)
                    if found is not None:
                        ascent.offer([own[c] for own, c in zip(kept, found.choice, strict=True)])
                        bound_s = max(bound_s, min(found.bound_s, enough_s))
        if ascent.best is None:
            return None
        return Solution(
            choice=ascent.best,
            objective_s=ascent.best_s,
            bound_s=min(bound_s, ascent.best_s),
            status=status,
            seconds=time.perf_counter() - began,
        )
