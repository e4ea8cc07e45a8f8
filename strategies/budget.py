"""What a solution takes of memory, and what is in memory at one instant as a function of the candidates.

A bound at all instants would be as long as the program. Only a few instants ever bind: those at which solutions peak.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ffjax.cost.lifetimes import Lifetimes
from ffjax.cost.memory import MemoryModel, Peak, possible_sums
from ffjax.cost.merged_remat import MERGED
from ffjax.ir.assignment import UNUSED, spec_of
from ffjax.ir.halo import exchanges, halos
from ffjax.ir.layout import Layout
from ffjax.ir.regions import Dims, Edge
from ffjax.ir.spec import shard_count
from ffjax.strategies.methods.base import Solution
from ffjax.strategies.problem import Problem, assignments

_NEAR = 0.8
"""Up to this share of the budget any schedule fits: those of layouts differ from the program's by less."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Instant:
    """A moment of the step: bytes in memory per candidate and per copy made for a consumer."""

    node_bytes: Mapping[int, NDArray[np.float64]]
    copy_bytes: Mapping[int, NDArray[np.float64]]
    """By transfer: the bytes of its copy in each column."""
    fixed_bytes: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Fit:
    """A solution, the memory that it takes, and whether that is within the budget."""

    solution: Solution
    layout: Layout
    peak: Peak
    fits: bool
    s_per_byte: float = 0.0
    """What a byte cost where this was found: by so much the objective falls with each further byte of budget."""
    free: Fit | None = None
    """The fastest solution if bytes cost nothing; None where that is this one."""
    bound_within: Callable[[], float] | None = None
    """Works out a bound on the seconds of all that fits, where bytes cost something."""


def layout_of(problem: Problem, choice: Sequence[int]) -> Layout:
    return Layout(
        regions=problem.regions,
        mesh=problem.mesh,
        assignments=assignments(problem, choice),
        axis_prices=problem.model.axis_prices,
    )


def fit_of(problem: Problem, solution: Solution, budget_bytes: float, memory: MemoryModel) -> Fit:
    layout = layout_of(problem, solution.choice)
    most = memory.peak(layout)
    return Fit(solution=solution, layout=layout, peak=most, fits=most.bytes <= budget_bytes)


def scheduled_peak(layout: Layout, budget_bytes: float, memory: MemoryModel) -> Peak:
    """The peak of a layout, under its own schedule where that may decide whether it fits."""
    most = memory.peak(layout)
    return memory.under(layout).peak(layout) if budget_bytes * _NEAR < most.bytes else most


def instant(problem: Problem, times: Lifetimes, at: int, surely: NDArray[np.int64] | None = None) -> Instant:
    """What is in memory at one instant, as a function of the candidates: never less than `MemoryModel` says.

    More where a value is read elsewhere only as a copy: here it stays until that is read for the last time, and the
    copy is there from its first reader to its last. With `surely`, until when each value is in memory in any case
    (`MemoryModel.last_at_home`), only what is there whatever the candidates is counted: never more than `MemoryModel`
    says.
    """
    regions, graph = problem.regions, problem.regions.graph
    taken = times.bytes()
    by_dims: dict[tuple[int, Dims, bool], float] = {}
    fixed = 0.0

    def hold(value: int, size: float) -> None:
        nonlocal fixed
        entry = graph.values[value]
        if entry.shape:
            node = problem.node_of[regions.region_of[entry.producer]]
            key = (node, regions.home[value], regions.may_scatter(value))
            by_dims[key] = by_dims.get(key, 0.0) + size
        else:
            fixed += size

    last = times.last if surely is None else np.minimum(surely, times.last)
    for value in np.flatnonzero((times.first <= at) & (at <= last)).tolist():
        hold(value, float(taken[value]))
    if times.compiler.results_apart and surely is None:  # temporaries may lie in them
        for value in times.new_results[at < times.first[times.new_results]].tolist():
            hold(value, float(taken[value]))
    for value, since, until, larger in times.copied:
        if since <= at <= until:
            hold(value, float(taken[value]) * larger)
    node_bytes: dict[int, NDArray[np.float64]] = {}
    for (node, dims, scatters), size in by_dims.items():
        share = size / _home_splits(problem, node, dims, scatters=scatters)
        _add(node_bytes, node, share)
    _add_sums(problem, times, taken, at, node_bytes)
    _add_edges(problem, times, taken, at, node_bytes)
    reads = _reads(problem, times)
    now = [e for e in regions.edges if times.graph.ops[e.op].kind != MERGED and _needed(times, e)[0] == at]
    gathered = {(e.value, graph.ops[e.op].scope) for e in now}
    copy_bytes: dict[int, NDArray[np.float64]] = {}
    for index, transfer in enumerate(problem.transfers):
        alive = [m for m in transfer.values if m in reads and _is_read(reads[m], at, every=surely is not None)]
        if alive:
            shards = np.array([shard_count(c, problem.mesh) for c in transfer.columns], dtype=float)
            size = float(taken[[value for value, _ in alive]].sum())
            if times.compiler.copies_gathered and surely is None:
                size += float(taken[[member[0] for member in alive if member in gathered]].sum())
            copy_bytes[index] = size / shards
    return Instant(node_bytes=node_bytes, copy_bytes=copy_bytes, fixed_bytes=fixed)


def _reads(problem: Problem, times: Lifetimes) -> dict[tuple[int, int], dict[tuple[int, Dims], tuple[int, int]]]:
    """For each value and scope that it is read in from when to when each kind of reader needs its copy."""
    graph = problem.regions.graph
    reads: dict[tuple[int, int], dict[tuple[int, Dims], tuple[int, int]]] = {}
    for edge in problem.regions.edges:
        if times.graph.ops[edge.op].kind == MERGED:
            continue
        ports = reads.setdefault((edge.value, graph.ops[edge.op].scope), {})
        port = problem.node_of[edge.target], edge.target_dims
        when, until = _needed(times, edge)
        first, last = ports.get(port, (when, until))
        ports[port] = min(first, when), max(last, until)
    return reads


def _needed(times: Lifetimes, edge: Edge) -> tuple[int, int]:
    """From when to when a reader needs its copy of a value."""
    when = int(times.when[edge.op])
    return min(when, times.copies.get((edge.value, edge.op), (when, when))[0]), int(times.until[edge.op])


def _is_read(ports: Mapping[tuple[int, Dims], tuple[int, int]], at: int, *, every: bool) -> bool:
    """Whether a copy for all readers is there at an instant; with `every`, one for any of them alone."""
    if every:
        return all(first <= at <= last for first, last in ports.values())
    return min(first for first, _ in ports.values()) <= at <= max(last for _, last in ports.values())


def _add(node_bytes: dict[int, NDArray[np.float64]], node: int, sizes: NDArray[np.float64]) -> None:
    node_bytes[node] = node_bytes[node] + sizes if node in node_bytes else sizes


def _add_sums(
    problem: Problem,
    times: Lifetimes,
    taken: NDArray[np.float64],
    at: int,
    node_bytes: dict[int, NDArray[np.float64]],
) -> None:
    """Adds the partial sums that are being reduced under the candidates that leave some."""
    regions = problem.regions
    for value in possible_sums(regions):
        there = {
            scattered: sum(since <= at <= until for since, until in times.partial_sums(value, scattered=scattered))
            for scattered in (False, True)
        }
        if not any(there.values()):
            continue
        region = regions.regions[regions.region_of[regions.graph.values[value].producer]]
        node = problem.node_of[region.id]
        entry, reduced = problem.nodes[node], region.dims[-1].reduced
        held = np.zeros(len(entry.candidates))
        for index, candidate in enumerate(entry.candidates):
            if any(a in reduced for a in candidate.atoms):
                held[index] = there[any(d != UNUSED for d in candidate.scatter)]
        if held.any():
            _add(node_bytes, node, held * taken[value] / entry.splits.of_dims(regions.home[value]))


def _add_edges(
    problem: Problem,
    times: Lifetimes,
    taken: NDArray[np.float64],
    at: int,
    node_bytes: dict[int, NDArray[np.float64]],
) -> None:
    """Adds the images that lie beside their neighbours' edges under the candidates that cut them."""
    regions, mesh = problem.regions, problem.mesh
    for op in (regions.graph.ops[i] for i in np.flatnonzero(times.when == at)):
        if not (found := halos(op.eqn)):
            continue
        region = regions.regions[regions.region_of[op.id]]
        node = problem.node_of[region.id]
        image = regions.ports[op.id].operands[found[0].operand]
        sizes = np.zeros(len(problem.nodes[node].candidates))
        for index, candidate in enumerate(problem.nodes[node].candidates):
            spec = spec_of(image, region.sizes, candidate, mesh)
            if spec is not None and exchanges(op.eqn, spec, mesh, 1.0):
                sizes[index] = taken[op.operands[found[0].operand]] / shard_count(spec, mesh)
        _add(node_bytes, node, sizes)


def _home_splits(problem: Problem, node: int, dims: Dims, *, scatters: bool) -> NDArray[np.float64]:
    """For each candidate into how many pieces a value is split where it is made."""
    entry = problem.nodes[node]
    pieces = entry.splits.of_dims(dims).copy()
    for index, candidate in enumerate(entry.candidates if scatters else ()):
        for axis, dim in enumerate(candidate.scatter):
            if dim != UNUSED:
                pieces[index] *= problem.mesh.sizes[axis]
    return pieces
