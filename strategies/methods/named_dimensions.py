"""Search over named dimensions: which dimensions of the program (batch, heads, vocabulary, ...) each mesh axis splits.

A state lists for each mesh axis named dimensions in order of precedence. In every region the axis splits the first of
them that the region has; where two of its factors are of that dimension, or two axes conflict, the candidate that
serves the most important listing wins, then the cheaper one. So (batch) is data parallelism, (batch, embed) is FSDP,
since what has no batch are weights, and (heads, mlp, vocab) tensor parallelism; TOAST searches the same space, and
its conflicts are resolved by the order here (arXiv 2508.15010, sections 3 and 4).

A beam of states is grown by the best insertions until none gains. Nothing is proved.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from ffjax.ir.assignment import UNUSED
from ffjax.ir.dims import named_dims
from ffjax.strategies.methods.base import Solution
from ffjax.strategies.problem import Problem, total_seconds

State = tuple[tuple[int, ...], ...]
"""For each mesh axis its named dimensions in order of precedence."""

_WIDTH = 3
_MOST_DIMS = 24
"""Of the named dimensions those that index most bytes are tried."""


class NamedDimensions:
    """Beam search. `width`: how many states are kept."""

    name = "named dimensions"

    def __init__(self, *, width: int = _WIDTH) -> None:
        self.width = width

    def solve(self, problem: Problem, starts: Sequence[Sequence[int]] = ()) -> Solution | None:
        """From the state that splits nothing; see `Method`."""
        began = time.perf_counter()
        if any(not node.candidates for node in problem.nodes):
            return None
        space = _Space(problem)
        empty: State = ((),) * len(problem.mesh.axes)
        choice = space.choice(empty)
        beam = [(total_seconds(problem, choice), empty, choice)]
        best = beam[0]
        seen = {choice}
        while beam:
            found = []
            for _, state, _ in beam:
                for after in space.grown(state):
                    choice = space.choice(after)
                    if choice not in seen:
                        seen.add(choice)
                        found.append((total_seconds(problem, choice), after, choice))
            found.sort(key=lambda f: f[0])
            beam = [f for f in found[: self.width] if f[0] < best[0] or not math.isfinite(best[0])]
            if beam:
                best = min(best, beam[0], key=lambda f: f[0])
        known = [(total_seconds(problem, c), tuple(c)) for c in starts]
        seconds, choice = min([*known, (best[0], best[2])], key=lambda f: f[0])
        if not math.isfinite(seconds):
            return None
        return Solution(
            choice=choice,
            objective_s=seconds,
            bound_s=-math.inf,
            status=self.name,
            seconds=time.perf_counter() - began,
        )


class _Space:
    """The named dimensions of a problem's nodes, and what a state chooses."""

    def __init__(self, problem: Problem) -> None:
        self.problem = problem
        named = named_dims(problem.regions)
        regions = problem.regions
        weight: dict[int, float] = {}
        self._dims: list[list[list[frozenset[int]]]] = []
        """For each node, candidate and axis the named dimensions of what the axis splits."""
        for node in problem.nodes:
            first = regions.regions[node.regions[0]]
            of = named.of[first.id]
            self._dims.append([[frozenset() if a == UNUSED else of[a] for a in c.atoms] for c in node.candidates])
            size = len(node.regions) * sum(
                regions.graph.values[v].bytes for op in first.ops for v in regions.graph.ops[op].results
            )
            for dim in frozenset().union(*(d for c in self._dims[-1] for d in c)):
                weight[dim] = weight.get(dim, 0.0) + size
        self.dims = sorted(weight, key=lambda d: (-weight[d], d))[:_MOST_DIMS]
        self._order = [np.argsort(n.cost_s, kind="stable") for n in problem.nodes]
        self._ranks: dict[tuple[int, int, tuple[int, ...]], NDArray[np.int64]] = {}

    def grown(self, state: State) -> Iterator[State]:
        """States with one more named dimension on one axis, before or after those that are there."""
        for axis, listed in enumerate(state):
            for dim in self.dims:
                if dim not in listed:
                    for after in dict.fromkeys(((*listed, dim), (dim, *listed))):
                        yield (*state[:axis], after, *state[axis + 1 :])

    def choice(self, state: State) -> tuple[int, ...]:
        """For each node the candidate that serves a state best."""
        found = []
        for node, order in enumerate(self._order):
            ranks = np.stack([self._rank(node, axis, listed) for axis, listed in enumerate(state)])
            # Served first is whatever comes first in its axis's list; on a tie the axes in order, then the cost.
            keys = np.concatenate([np.sort(ranks, axis=0), ranks])[:, order]
            found.append(int(order[np.lexsort(keys[::-1])[0]]))
        return tuple(found)

    def _rank(self, node: int, axis: int, listed: tuple[int, ...]) -> NDArray[np.int64]:
        """For each candidate the place in an axis's list of what the axis splits; splitting nothing comes after all.

        Splitting what is not listed is worst, so that it is done only where nothing else is a candidate.
        """
        key = (node, axis, listed)
        found = self._ranks.get(key)
        if found is None:
            place = {dim: i for i, dim in enumerate(listed)}
            unlisted = len(self.dims) + 1
            found = self._ranks[key] = np.array(
                [
                    min((place[d] for d in dims[axis] if d in place), default=unlisted) if dims[axis] else len(self.dims)
                    for dims in self._dims[node]
                ],
                np.int64,
            )
        return found
