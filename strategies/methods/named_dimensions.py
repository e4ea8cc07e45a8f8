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
from ffjax.strategies.problem import Problem, Totals

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
        space, totals = _Space(problem), Totals(problem)
        empty: State = ((),) * len(problem.mesh.axes)
        choice = space.choice(empty)
        beam = [(totals.of(choice), empty, choice)]
        best = beam[0]
        seen = {choice}
        while beam:
            found = []
            for _, state, before in beam:
                for dim, after in space.grown(state):
                    choice = space.choice(after, before, dim)
                    if choice not in seen:
                        seen.add(choice)
                        found.append((totals.of(choice), after, choice))
            found.sort(key=lambda f: f[0])
            beam = [f for f in found[: self.width] if f[0] < best[0] or not math.isfinite(best[0])]
            best = min([best, *beam], key=lambda f: f[0])
        known = [(totals.of(c), tuple(c)) for c in starts]
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
        """For each node, axis and candidate the named dimensions of what the axis splits."""
        self._nodes_of: dict[int, list[int]] = {}
        for index, node in enumerate(problem.nodes):
            first = regions.regions[node.regions[0]]
            of = named.of[first.id]
            axes = range(len(problem.mesh.axes))
            self._dims.append(
                [[frozenset() if c.atoms[a] == UNUSED else of[c.atoms[a]] for c in node.candidates] for a in axes]
            )
            size = len(node.regions) * sum(
                regions.graph.values[v].bytes for op in first.ops for v in regions.graph.ops[op].results
            )
            for dim in frozenset().union(*(d for axis in self._dims[-1] for d in axis)):
                weight[dim] = weight.get(dim, 0.0) + size
                self._nodes_of.setdefault(dim, []).append(index)
        self.dims = sorted(weight, key=lambda d: (-weight[d], d))[:_MOST_DIMS]
        self._own = [frozenset().union(*(d for axis in dims for d in axis)) for dims in self._dims]
        self._order = [np.argsort(n.cost_s, kind="stable") for n in problem.nodes]
        self._best: dict[tuple[int, State], int] = {}

    def grown(self, state: State) -> Iterator[tuple[int, State]]:
        """States with one more named dimension on one axis, before or after those that are there."""
        for axis, listed in enumerate(state):
            for dim in self.dims:
                if dim not in listed:
                    for after in dict.fromkeys(((*listed, dim), (dim, *listed))):
                        yield dim, (*state[:axis], after, *state[axis + 1 :])

    def choice(self, state: State, before: Sequence[int] | None = None, dim: int | None = None) -> tuple[int, ...]:
        """For each node the candidate that serves a state best; `before` is for a state without `dim`."""
        if before is None or dim is None:
            return tuple(self._served(node, state) for node in range(len(self._order)))
        found = list(before)
        for node in self._nodes_of[dim]:
            found[node] = self._served(node, state)
        return tuple(found)

    def _served(self, node: int, state: State) -> int:
        own = self._own[node]  # other dimensions make no difference
        seen = tuple(tuple(d for d in listed if d in own) for listed in state)
        found = self._best.get((node, seen))
        if found is None:
            order = self._order[node]
            ranks = np.stack([self._rank(node, axis, listed) for axis, listed in enumerate(seen)])
            # What comes first in its axis's list is served first; on a tie the axes in order, then the cost.
            keys = np.concatenate([np.sort(ranks, axis=0), ranks])[:, order]
            found = self._best[node, seen] = int(order[np.lexsort(keys[::-1])[0]])
        return found

    def _rank(self, node: int, axis: int, listed: tuple[int, ...]) -> NDArray[np.int64]:
        """For each candidate the place in an axis's list of what the axis splits; splitting nothing comes after all.

        Splitting what is not listed is worst, so that it is done only where nothing else is a candidate.
        """
        place = {dim: i for i, dim in enumerate(listed)}
        nothing, unlisted = len(self.dims), len(self.dims) + 1
        return np.array(
            [
                min((place[d] for d in dims if d in place), default=unlisted) if dims else nothing
                for dims in self._dims[node][axis]
            ],
            np.int64,
        )
