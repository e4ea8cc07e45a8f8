"""What is in memory at one instant, as a function of the candidates: bounds on what `MemoryModel` says of a layout.

    bytes(at) = fixed + sum over nodes n    node_bytes[n][c_n]
                      + sum over reads r    over distinct shardings j of r's readers    bytes_r[made, j]

has the form of the search problem itself. A limit at all instants would be as long as the program; only a few ever
bind, those at which solutions peak. A value that is in memory as it is made whoever reads it is its node's; of others
that, and copies, depend on who still reads them how, and are counted for pairs of what is made and what is read.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ffjax.cost.lifetimes import Lifetimes
from ffjax.cost.memory import MemoryModel, is_slice
from ffjax.cost.merged_remat import MERGED
from ffjax.ir.assignment import UNUSED, spec_of
from ffjax.ir.halo import exchanges, halos
from ffjax.ir.regions import Dims
from ffjax.ir.spec import shard_count
from ffjax.strategies.problem import Problem, Transfer

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

_NEVER = -1


@dataclass(frozen=True, slots=True, kw_only=True)
class Read:
    """What values of a transfer take for some of its consumers: `bytes[row, column]`, each column counted once."""

    transfer: int
    consumers: tuple[int, ...]
    """Places among the transfer's."""
    bytes: Floats


@dataclass(frozen=True, slots=True, kw_only=True)
class Instant:
    """A moment of the step: bytes in memory per candidate and for who reads what is made."""

    node_bytes: Mapping[int, Floats]
    reads: tuple[Read, ...]
    fixed_bytes: float


class _Times:
    """For values of one transfer and each consumer of it: when it needs a copy, has it, and is done with it."""

    def __init__(self, values: list[int], table: Ints, counts: list[bool]) -> None:
        self.values = values
        self.first: list[list[int]] = table[..., 0].tolist()
        self.gathered: list[list[int]] = table[..., 1].tolist()
        self.last: list[list[int]] = table[..., 2].tolist()
        self.counts = counts
        """Whether the values' own memory is counted here: they may be read in several scopes."""
        self.begins = np.where(table[..., 2] >= 0, table[..., 0], np.iinfo(np.int64).max).min(axis=1)
        """For each value when the first of all needs it."""
        self.ends = table[..., 2].max(axis=1)
        """When the last of all is done with it."""


class Instants:
    """The instants of a problem's program. Problems that differ in mesh and candidates have instants of one form."""

    def __init__(self, problem: Problem, memory: MemoryModel) -> None:
        self.problem, self.memory = problem, memory
        self._times = functools.cache(lambda: _reading_times(problem, memory.times))

    def within(self, problem: Problem) -> Instants:
        """Those of a problem with other candidates or another mesh, and transfers that begin alike."""
        other = Instants.__new__(Instants)
        other.problem, other.memory, other._times = problem, self.memory, self._times
        return other

    def at(self, at: int, *, surely: bool = False) -> Instant:
        """What is in memory at an instant: never less than `MemoryModel` says, or, if `surely`, never more."""
        problem, times = self.problem, self.memory.times
        regions, graph = problem.regions, problem.regions.graph
        taken = self.memory.bytes
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

        in_memory = (times.first <= times.last) & (times.first <= at)
        whoever = in_memory & (at <= self.memory.last_at_home)
        for value in np.flatnonzero(whoever).tolist():
            hold(value, float(taken[value]))
        if times.compiler.results_apart and not surely:  # temporaries may lie in them
            for value in times.new_results[at < times.first[times.new_results]].tolist():
                hold(value, float(taken[value]))
        for value, since, until, larger in times.copied:
            if since <= at <= until:
                hold(value, float(taken[value]) * larger)
        node_bytes: dict[int, Floats] = {}
        for (node, dims, scatters), size in by_dims.items():
            _add(node_bytes, node, size / _home_splits(problem, node, dims, scatters=scatters))
        _add_sums(problem, self.memory, at, node_bytes)
        _add_edges(problem, times, taken, at, node_bytes)
        depends = in_memory & ~whoever
        reads: list[Read] = []
        for index, entry in enumerate(self._times()):
            alive = np.flatnonzero((entry.ends >= at) & ((entry.begins <= at) | depends[entry.values]))
            if len(alive):
                reads += self._reads(index, entry, at, alive.tolist(), depends, surely=surely)
        return Instant(node_bytes=node_bytes, reads=tuple(reads), fixed_bytes=fixed)

    def _reads(
        self, index: int, entry: _Times, at: int, alive: list[int], depends: NDArray[np.bool_], *, surely: bool
    ) -> list[Read]:
        """What those of a transfer's values take that someone still reads, and that or a copy of which may be there."""
        sizes: dict[tuple[tuple[int, ...], str], float] = {}
        doubles = self.memory.times.compiler.copies_gathered
        for member in alive:
            value, first = entry.values[member], entry.first[member]
            who = [k for k, last in enumerate(entry.last[member]) if last >= at]
            now = [k for k in who if first[k] <= at]
            own = bool(depends[value])
            if surely:
                own &= entry.counts[member]
                if now:
                    who, kind = now, "own or copy" if own else "copy"
                elif own:
                    # One of them: if they read alike, it is there but once.
                    who, kind = who[:1], "own or less"
                else:
                    continue
            else:
                any_begun = bool(entry.begins[member] <= at)
                if not own:
                    if not any_begun:
                        continue
                    kind = "copy"
                elif any(entry.gathered[member][k] >= at for k in now):
                    kind = "own and copy"
                elif not any_begun:
                    kind = "own"
                else:
                    kind = "own or more" if len(now) < len(who) else "own or copy"
                if doubles and any(first[k] == at for k in who):
                    kind += ", twice"
            key = tuple(who), kind
            sizes[key] = sizes.get(key, 0.0) + float(self.memory.bytes[value])
        if not sizes:
            return []
        pieces = _Pieces(self.problem, self.problem.transfers[index])
        return [Read(transfer=index, consumers=who, bytes=pieces.of(kind) * s) for (who, kind), s in sizes.items()]


class _Pieces:
    """For each pair of what is made and what is read the share of a value that one device holds."""

    def __init__(self, problem: Problem, transfer: Transfer) -> None:
        mesh, rows, columns = problem.mesh, transfer.rows, transfer.columns
        shape = (len(rows), len(columns))
        self.own = np.broadcast_to(np.array([[1 / shard_count(r, mesh)] for r in rows]), shape)
        self.copy = np.broadcast_to(np.array([[1 / shard_count(c, mesh) for c in columns]]), shape)
        self.same = np.array([[r == c for c in columns] for r in rows])
        self.slices = np.array([[is_slice(r, c) for c in columns] for r in rows])

    def of(self, kind: str) -> Floats:
        """What is in memory for a reader: what is made, a copy, both, or the larger or the smaller of the two.

        What is read as it is made has no copy, and what is a slice of that does not need it.
        """
        kind, _, twice = kind.partition(", ")
        own, copy = self.own, self.copy
        moved = {
            "copy": copy,
            "own": own,
            "own or copy": copy,
            "own and copy": own + copy,
            "own or more": np.maximum(own, copy),
            "own or less": np.minimum(own, copy),
        }[kind]
        if twice:
            moved = moved + copy
        sliced = np.minimum(own, copy) if kind == "own or less" else copy
        found: Floats = np.where(self.same, 0.0 if kind == "copy" else own, np.where(self.slices, sliced, moved))
        return found


def _reading_times(problem: Problem, times: Lifetimes) -> list[_Times]:
    graph = problem.regions.graph
    reads: dict[tuple[int, int], dict[tuple[int, Dims], list[int]]] = {}
    for edge in problem.regions.edges:
        ports = reads.setdefault((edge.value, graph.ops[edge.op].scope), {})
        port = ports.setdefault((problem.node_of[edge.target], edge.target_dims), [len(times.when), _NEVER, _NEVER])
        if times.graph.ops[edge.op].kind == MERGED:
            continue
        when = int(times.when[edge.op])
        start, done = times.copies.get((edge.value, edge.op), (when, when))
        port[0] = min(port[0], start)
        port[1] = max(port[1], done)
        port[2] = max(port[2], int(times.until[edge.op]))
    counted: set[int] = set()
    found = []
    for transfer in problem.transfers:
        table = np.array([[p for _, p in sorted(reads[m].items())] for m in transfer.values], dtype=np.int64)
        values = [value for value, _ in transfer.values]
        counts = [value not in counted for value in values]
        counted.update(values)
        found.append(_Times(values, table, counts))
    return found


def _add(node_bytes: dict[int, Floats], node: int, sizes: Floats) -> None:
    node_bytes[node] = node_bytes[node] + sizes if node in node_bytes else sizes


def _add_sums(
    problem: Problem,
    memory: MemoryModel,
    at: int,
    node_bytes: dict[int, Floats],
) -> None:
    """Adds the partial sums that are being reduced under the candidates that leave some."""
    regions, times, taken = problem.regions, memory.times, memory.bytes
    for value in memory.all_sums:
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
    taken: Floats,
    at: int,
    node_bytes: dict[int, Floats],
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


def _home_splits(problem: Problem, node: int, dims: Dims, *, scatters: bool) -> Floats:
    """For each candidate into how many pieces a value is split where it is made."""
    entry = problem.nodes[node]
    pieces = entry.splits.of_dims(dims).copy()
    for index, candidate in enumerate(entry.candidates if scatters else ()):
        for axis, dim in enumerate(candidate.scatter):
            if dim != UNUSED:
                pieces[index] *= problem.mesh.sizes[axis]
    return pieces
