"""Large problems: exact solves in neighbourhoods of good solutions, until none improves.

The neighbourhood of a choice has, for each node, the candidates that differ from it on one mesh axis. All nodes move at
once, so a change that only pays when many regions make it together is found (very large neighbourhood search: Ahuja,
Ergun, Orlin, Punnen, Discrete Applied Mathematics 123, 2002).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ffjax.ir.assignment import Assignment
from ffjax.strategies.ilp import Instant, Solution, solve
from ffjax.strategies.problem import Problem
from ffjax.strategies.prune import restrict

MOST_ROUNDS = 6


def solve_near(
    problem: Problem, starts: Sequence[Sequence[Assignment]], instants: Sequence[Instant] = ()
) -> Solution | None:
    """The best choice that such moves reach from the starts (each an assignment for every region)."""
    first = [node.regions[0] for node in problem.nodes]
    centres = [{start[region] for start in starts} for region in first]
    best: Solution | None = None
    for _ in range(MOST_ROUNDS):
        kept = [_near(node.candidates, centre) for node, centre in zip(problem.nodes, centres, strict=True)]
        small = restrict(problem, kept)
        solution = solve(small, instants=_only(instants, problem, kept, small))
        if solution is None:
            return best
        choice = tuple(keep[c] for keep, c in zip(kept, solution.choice, strict=True))
        improved = best is None or solution.objective_s < best.objective_s * (1 - 1e-4)
        if improved:
            best = Solution(
                choice=choice,
                objective_s=solution.objective_s,
                bound_s=0.0,
                status="neighbourhoods",
                seconds=solution.seconds + (best.seconds if best else 0.0),
            )
        if not improved:
            break
        centres = [{node.candidates[c]} for node, c in zip(problem.nodes, choice, strict=True)]
    return best


def _near(candidates: Sequence[Assignment], centres: set[Assignment]) -> list[int]:
    """Those that differ from a centre on at most one axis; all if no centre is among them."""
    table = np.array([[*c.atoms, *c.scatter] for c in candidates])
    axes = table.shape[1] // 2
    near = np.zeros(len(candidates), dtype=bool)
    for centre in centres:
        row = np.array([*centre.atoms, *centre.scatter])
        differs = (table[:, :axes] != row[:axes]) | (table[:, axes:] != row[axes:])
        near |= differs.sum(axis=1) <= 1
    return np.flatnonzero(near).tolist() if near.any() else list(range(len(candidates)))


def _only(
    instants: Sequence[Instant], problem: Problem, kept: Sequence[Sequence[int]], small: Problem
) -> list[Instant]:
    """The instants in terms of the candidates that were kept."""
    out = []
    for instant in instants:
        copies = {}
        for index, sizes in instant.copy_bytes.items():
            where = {spec: i for i, spec in enumerate(problem.transfers[index].columns)}
            copies[index] = sizes[[where[spec] for spec in small.transfers[index].columns]]
        nodes = {n: sizes[list(kept[n])] for n, sizes in instant.node_bytes.items()}
        out.append(
            Instant(
                node_bytes=nodes,
                copy_bytes=copies,
                fixed_bytes=instant.fixed_bytes,
                budget_bytes=instant.budget_bytes,
            )
        )
    return out
