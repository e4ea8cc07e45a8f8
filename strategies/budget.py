"""Solving within a memory budget, by adding the instants at which a solution would exceed it.

A linear program over all instants would be as long as the program. Only a few instants ever bind: solve, find the op at
which most is live, bound memory there, and solve again.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ffjax.cost.lifetimes import Lifetimes
from ffjax.cost.memory import MemoryModel, Peak
from ffjax.ir.assignment import UNUSED
from ffjax.ir.layout import Layout
from ffjax.ir.regions import Dims
from ffjax.ir.spec import shard_count
from ffjax.strategies.ilp import Instant, Solution
from ffjax.strategies.problem import Problem, assignments

MOST_ROUNDS = 8
_MARGIN = 0.98
"""The share of the budget that a new instant may use, so that nearly equal instants next to it fit too."""

Solver = Callable[[Problem, Sequence[Instant]], Solution | None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Fit:
    """A solution, the memory that it takes, and whether that is within the budget."""

    solution: Solution
    layout: Layout
    peak: Peak
    fits: bool


def layout_of(problem: Problem, choice: Sequence[int]) -> Layout:
    return Layout(
        regions=problem.regions,
        mesh=problem.mesh,
        assignments=assignments(problem, choice),
        axis_prices=problem.model.axis_prices,
    )


def solve_within(
    problem: Problem,
    budget_bytes: float,
    memory: MemoryModel,
    times: Lifetimes,
    solver: Solver,
    rounds: int = MOST_ROUNDS,
) -> Fit | None:
    """The fastest solution that fits, or the fastest of all (`fits` is False); None if there is no solution at all."""
    instants: list[Instant] = []
    fastest: Fit | None = None
    for _ in range(rounds):
        solution = solver(problem, instants)
        if solution is None:
            return fastest
        found = fit_of(problem, solution, budget_bytes, memory)
        if found.fits:
            return found
        fastest = fastest or found
        instants.append(instant(problem, times, found.peak.instant, budget_bytes * _MARGIN))
    return fastest


def fit_of(problem: Problem, solution: Solution, budget_bytes: float, memory: MemoryModel) -> Fit:
    layout = layout_of(problem, solution.choice)
    most = memory.peak(layout)
    return Fit(solution=solution, layout=layout, peak=most, fits=most.bytes <= budget_bytes)


def instant(problem: Problem, times: Lifetimes, at: int, budget_bytes: float) -> Instant:
    """What is in memory at one instant, as a function of the candidates."""
    regions, graph = problem.regions, problem.regions.graph
    by_dims: dict[tuple[int, Dims], float] = {}
    fixed = 0.0
    for value in np.flatnonzero((times.first <= at) & (at <= times.last)).tolist():
        entry = graph.values[value]
        if not entry.shape:
            fixed += entry.bytes
            continue
        key = (problem.node_of[regions.region_of[entry.producer]], regions.home[value])
        by_dims[key] = by_dims.get(key, 0.0) + entry.bytes
    node_bytes: dict[int, NDArray[np.float64]] = {}
    for (node, dims), size in by_dims.items():
        share = size / _home_splits(problem, node, dims)
        node_bytes[node] = node_bytes[node] + share if node in node_bytes else share
    _add_sums(problem, int(times.op_at[min(at, len(graph.ops) - 1)]), node_bytes)
    reads: dict[tuple[int, int], tuple[int, int]] = {}
    for edge in regions.edges:
        key_ = (edge.value, graph.ops[edge.op].scope)
        when, until = int(times.when[edge.op]), int(times.until[edge.op])
        first, last = reads.get(key_, (when, until))
        reads[key_] = (min(first, when), max(last, until))
    copy_bytes: dict[int, NDArray[np.float64]] = {}
    for index, transfer in enumerate(problem.transfers):
        alive = sum(1 for member in transfer.values if reads[member][0] <= at <= reads[member][1])
        if alive:
            shards = np.array([shard_count(c, problem.mesh) for c in transfer.columns], dtype=float)
            copy_bytes[index] = alive * transfer.bytes / shards
    return Instant(node_bytes=node_bytes, copy_bytes=copy_bytes, fixed_bytes=fixed, budget_bytes=budget_bytes)


def _add_sums(problem: Problem, op_id: int, node_bytes: dict[int, NDArray[np.float64]]) -> None:
    """Adds the partial sums that an op makes under the candidates that scatter them."""
    regions, graph = problem.regions, problem.regions.graph
    op, region = graph.ops[op_id], regions.regions[regions.region_of[op_id]]
    if not region.solo or len(op.results) != 1 or not region.dims[0].reduced:
        return
    node = problem.node_of[region.id]
    entry = problem.nodes[node]
    scatters = np.array([any(d != UNUSED for d in c.scatter) for c in entry.candidates])
    sizes = scatters * graph.values[op.results[0]].bytes / entry.splits.of_dims(regions.home[op.results[0]])
    node_bytes[node] = node_bytes[node] + sizes if node in node_bytes else sizes


def _home_splits(problem: Problem, node: int, dims: Dims) -> NDArray[np.float64]:
    """For each candidate into how many pieces a value is split where it is made."""
    entry = problem.nodes[node]
    pieces = entry.splits.of_dims(dims).copy()
    for index, candidate in enumerate(entry.candidates):
        for axis, dim in enumerate(candidate.scatter):
            if dim != UNUSED:
                pieces[index] *= problem.mesh.sizes[axis]
    return pieces
