"""The search problem as data: nodes with candidates and costs, transfers with resharding costs.

    minimise   sum over nodes n        cost[n][c_n]
             + sum over transfers t    sum over distinct targets T of t's consumers  seconds_t[spec(source), T]

A node is a family of regions. A transfer is one value that is made in one sharding and read in others: each sharding
that some consumer in the same scope needs is made once, however many need it. Costs count all members and all trips.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ffjax.cost.collectives import CollectiveModel
from ffjax.cost.kernels import Kernel
from ffjax.cost.region_costs import (
    Splits,
    Sums,
    compute_seconds,
    halo_seconds,
    own_seconds,
    reduction_seconds,
    sums_of,
)
from ffjax.ir.assignment import Assignment, scattered, spec_of
from ffjax.ir.regions import Dims, Region, Regions
from ffjax.ir.reshard_chain import reshard_chain
from ffjax.ir.spec import MeshShape, Spec, shard_count
from ffjax.strategies.candidates import Keep, candidates
from ffjax.strategies.families import members

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]


@dataclass(slots=True, kw_only=True)
class Node:
    """A family: its members' regions, and what each candidate costs for all of them together."""

    key: str
    regions: list[int]
    candidates: list[Assignment]
    compute_s: Floats
    reduction_s: Floats
    splits: Splits
    late: bool
    """Whether no op that does work waits for what it reduces (`ffjax.ir.merging.merged_sums`)."""

    @property
    def cost_s(self) -> Floats:
        return self.compute_s + self.reduction_s


@dataclass(slots=True, kw_only=True)
class Consumer:
    """Who reads a transfer: a node, and for each of its candidates the index of the sharding that it needs."""

    node: int
    column_of: Ints


@dataclass(slots=True, kw_only=True)
class Transfer:
    """Values made alike and read alike. `seconds[row, column]`: from a made to a needed sharding, all members."""

    source: int
    row_of: Ints
    """For each candidate of the source the index of the sharding that it makes."""
    consumers: list[Consumer]
    rows: list[Spec]
    columns: list[Spec]
    seconds: Floats
    bytes: float
    """Of one whole value."""
    values: list[tuple[int, int]]
    """(value, scope) of each member."""
    ahead: bool
    """Whether the values are there from the start of the step (`ffjax.ir.merging.merged_copies`)."""


@dataclass(slots=True, kw_only=True)
class Problem:
    mesh: MeshShape
    model: CollectiveModel
    regions: Regions
    nodes: list[Node]
    node_of: list[int]
    """For each region its node."""
    transfers: list[Transfer] = field(default_factory=list)


class ReshardCosts:
    """Seconds of resharding on one mesh; the way of each pair is worked out once."""

    def __init__(self, model: CollectiveModel) -> None:
        self.model = model
        self._known: dict[tuple[Spec, Spec], list[tuple[float, float, float]]] = {}

    def steps(self, source: Spec, target: Spec) -> list[tuple[float, float, float]]:
        """The collectives of a way: of each alpha, beta, and its bytes as a share of the whole value's."""
        if source == target:
            return []
        found = self._known.get((source, target))
        if found is None:
            found = self._known[source, target] = []
            shards = shard_count(source, self.model.mesh)
            for hop in reshard_chain(source, target, self.model.mesh, None, self.model.axis_prices):
                if hop.step is not None:
                    kind, axes, multiplier = hop.step
                    found.append((*self.model.coefficients(kind, axes), multiplier / shards))
        return found

    def matrix(
        self, rows: Sequence[Spec], columns: Sequence[Spec], count: float, size: float, *, merged: bool
    ) -> Floats:
        """`count` reshardings of values of `size` bytes, from each row to each column."""
        out = np.zeros((len(rows), len(columns)))
        for i, source in enumerate(rows):
            for j, target in enumerate(columns):
                for alpha, beta, part in self.steps(source, target):
                    share = self.model.share_of_one(size * part) if merged else 1.0
                    out[i, j] += count * (alpha * share + beta * size * part)
        return out


@dataclass(frozen=True, slots=True, kw_only=True)
class Wiring:
    """What of a problem is the same on all meshes. As long as the program: worked out once, not for each problem."""

    families: dict[str, list[int]]
    node_of: list[int]
    """For each region the place of its family."""
    sums: list[list[Sums]]
    """For each family what one of its regions reduces."""
    late: list[bool]
    """As in `Node`."""
    transfers: dict[_Alike, list[tuple[int, int]]]
    """What is read elsewhere: the (value, scope) of all that are alike."""


def wiring_of(regions: Regions, keys: Sequence[str]) -> Wiring:
    """How the families of a program are connected. `keys` are the families'."""
    graph = regions.graph
    families = members(keys)
    node_of = [0] * len(regions.regions)
    for node, family in enumerate(families.values()):
        for region in family:
            node_of[region] = node
    firsts = [regions.regions[family[0]] for family in families.values()]
    readers: dict[tuple[int, int], set[tuple[int, Dims]]] = {}
    for edge in regions.edges:
        scope = graph.ops[edge.op].scope
        readers.setdefault((edge.value, scope), set()).add((node_of[edge.target], edge.target_dims))
    # A value read twice in one way is one transfer; members of families that are alike add up.
    groups: dict[_Alike, list[tuple[int, int]]] = {}
    for (value, scope), ports in readers.items():
        region = regions.region_of[graph.values[value].producer]
        alike = _Alike(
            node=node_of[region],
            dims=regions.home[value],
            bytes=graph.values[value].bytes,
            trips=graph.scopes[scope].trips,
            ports=tuple(sorted(ports)),
            merged=regions.merged_copies[value],
        )
        groups.setdefault(alike, []).append((value, scope))
    return Wiring(
        families=families,
        node_of=node_of,
        sums=[sums_of(regions, first) for first in firsts],
        late=[all(regions.merged_sums[v] for v in graph.ops[first.ops[0]].results) for first in firsts],
        transfers=groups,
    )


def build_problem(
    regions: Regions,
    keys: Sequence[str],
    kernels: Mapping[str, Sequence[Kernel]],
    model: CollectiveModel,
    keep: Keep | None = None,
    wiring: Wiring | None = None,
) -> Problem:
    """Puts the program on one mesh.

    `keys` are the families'; `keep` restricts candidates; `wiring` is `wiring_of` them, if it is known.
    """
    mesh = model.mesh
    wiring = wiring_of(regions, keys) if wiring is None else wiring
    nodes: list[Node] = []
    for (key, family), sums, late in zip(wiring.families.items(), wiring.sums, wiring.late, strict=True):
        first = regions.regions[family[0]]
        found = candidates(regions, first, mesh, keep)
        splits = Splits(first, found, model)
        count = len(family)
        copied_s, permuted_s = halo_seconds(regions, first, found, model)
        nodes.append(
            Node(
                key=key,
                regions=family,
                candidates=found,
                compute_s=compute_seconds(kernels.get(key, ()), splits, model) + count * copied_s,
                reduction_s=count
                * (reduction_seconds(sums, found, splits, model) + permuted_s + own_seconds(regions, first, model)),
                splits=splits,
                late=late,
            )
        )
    problem = Problem(mesh=mesh, model=model, regions=regions, nodes=nodes, node_of=wiring.node_of)
    problem.transfers = _transfers(problem, wiring.transfers)
    return problem


def source_spec(regions: Regions, region: Region, dims: Dims, candidate: Assignment, mesh: MeshShape) -> Spec:
    """The sharding in which a region leaves a value: after its reductions and scatters."""
    spec = spec_of(dims, region.sizes, candidate, mesh)
    if spec is None:
        raise ValueError(f"candidate {candidate} of region {region.id} cannot be written as a PartitionSpec")
    return scattered(spec, candidate, mesh) if region.solo and dims == region.dims[-1].results[0] else spec


class _Alike(NamedTuple):
    """What values of one transfer share: where they are made, their size and trips, and who reads them how."""

    node: int
    dims: Dims
    bytes: float
    trips: float
    ports: tuple[tuple[int, Dims], ...]
    merged: bool


def _transfers(problem: Problem, groups: Mapping[_Alike, list[tuple[int, int]]]) -> list[Transfer]:
    regions, mesh = problem.regions, problem.mesh
    costs = ReshardCosts(problem.model)
    specs: dict[tuple[int, Dims, bool], tuple[list[Spec], Ints]] = {}

    def views(node: int, dims: Dims, *, made: bool) -> tuple[list[Spec], Ints]:
        key = (node, dims, made)
        if key not in specs:
            first = regions.regions[problem.nodes[node].regions[0]]
            listed: dict[Spec, int] = {}
            index = []
            for candidate in problem.nodes[node].candidates:
                if made:
                    spec = source_spec(regions, first, dims, candidate, mesh)
                else:
                    plain = spec_of(dims, first.sizes, candidate, mesh)
                    assert plain is not None  # candidates are checked against every port
                    spec = plain
                index.append(listed.setdefault(spec, len(listed)))
            specs[key] = (list(listed), np.array(index, np.intp))
        return specs[key]

    transfers = []
    for alike, group in groups.items():
        rows, row_of = views(alike.node, alike.dims, made=True)
        needs = [(n, *views(n, d, made=False)) for n, d in alike.ports]
        columns = list(dict.fromkeys(spec for _, listed, _ in needs for spec in listed))
        where = {spec: i for i, spec in enumerate(columns)}
        consumers = [
            Consumer(node=n, column_of=np.array([where[s] for s in listed], np.intp)[index])
            for n, listed, index in needs
        ]
        transfers.append(
            Transfer(
                source=alike.node,
                row_of=row_of,
                consumers=consumers,
                rows=rows,
                columns=columns,
                seconds=costs.matrix(rows, columns, len(group) * alike.trips, alike.bytes, merged=alike.merged),
                bytes=alike.bytes,
                values=group,
                ahead=alike.merged,
            )
        )
    return transfers


def assignments(problem: Problem, choice: Sequence[int]) -> list[Assignment]:
    """For each region the candidate that a choice gives its family."""
    return [problem.nodes[n].candidates[choice[n]] for n in problem.node_of]


def choice_of(problem: Problem, assigned: Sequence[Assignment]) -> tuple[int, ...] | None:
    """The choice that gives each family what its first region has; None where that is no candidate."""
    choice = []
    for node in problem.nodes:
        wanted = assigned[node.regions[0]]
        if wanted not in node.candidates:
            return None
        choice.append(node.candidates.index(wanted))
    return tuple(choice)


def total_seconds(problem: Problem, choice: Sequence[int]) -> float:
    """The objective of one choice of candidates, a candidate index for each node. For many of them, see `Totals`."""
    return Totals(problem).of(choice)


class Totals:
    """The objective of a problem, one choice after another."""

    def __init__(self, problem: Problem) -> None:
        single = [t for t in problem.transfers if len(t.consumers) == 1]
        readers = [t.consumers[0] for t in single]
        self._shared = [t for t in problem.transfers if len(t.consumers) > 1]
        self._costs, self._cost_at = _joined([n.cost_s for n in problem.nodes])
        self._sources = np.array([t.source for t in single], np.intp)
        self._readers = np.array([c.node for c in readers], np.intp)
        self._rows, self._row_at = _joined([t.row_of for t in single])
        self._columns, self._column_at = _joined([c.column_of for c in readers])
        self._seconds, self._second_at = _joined([t.seconds.ravel() for t in single])
        self._widths = np.array([t.seconds.shape[1] for t in single], np.intp)

    def of(self, choice: Sequence[int]) -> float:
        """Seconds of a candidate index for each node."""
        chosen = np.asarray(choice, np.intp)
        total = self._costs[self._cost_at + chosen].sum()
        if len(self._sources):
            rows = self._rows[self._row_at + chosen[self._sources]]
            columns = self._columns[self._column_at + chosen[self._readers]]
            total += self._seconds[self._second_at + rows * self._widths + columns].sum()
        for transfer in self._shared:
            row = transfer.seconds[transfer.row_of[choice[transfer.source]]]
            total += sum(row[c] for c in {c.column_of[choice[c.node]] for c in transfer.consumers})
        return float(total)


def _joined(arrays: Sequence[NDArray[Any]]) -> tuple[NDArray[Any], Ints]:
    """Arrays one behind another, and where each begins."""
    ends = np.cumsum([len(a) for a in arrays], dtype=np.intp)
    joined = np.concatenate(arrays) if arrays else np.zeros(0)
    return joined, np.concatenate([np.zeros(1, np.intp), ends[:-1]]) if arrays else np.zeros(0, np.intp)


def forbidden_seconds(problem: Problem) -> float:
    """What stands for infinite seconds where infinities would spoil sums: dearer than all that is allowed."""
    costs = [n.cost_s for n in problem.nodes] + [t.seconds[np.isfinite(t.seconds)] for t in problem.transfers]
    return 10 * sum(float(c.max(initial=0.0)) for c in costs)


def restrict(problem: Problem, kept: Sequence[Sequence[int]]) -> Problem:
    """The problem with only some candidates of each node."""
    nodes = []
    for node, keep in zip(problem.nodes, kept, strict=True):
        index = np.array(keep, np.intp)
        nodes.append(
            dataclasses.replace(
                node,
                candidates=[node.candidates[i] for i in keep],
                compute_s=node.compute_s[index],
                reduction_s=node.reduction_s[index],
                splits=node.splits.take(keep),
            )
        )
    transfers = []
    for transfer in problem.transfers:
        row_of = transfer.row_of[list(kept[transfer.source])]
        columns_of = [c.column_of[list(kept[c.node])] for c in transfer.consumers]
        rows, row_index = _used(row_of, len(transfer.rows))
        columns, inverse = _used(np.concatenate(columns_of), len(transfer.columns))
        ends = np.cumsum([len(c) for c in columns_of])[:-1]
        transfers.append(
            dataclasses.replace(
                transfer,
                row_of=row_index,
                rows=[transfer.rows[i] for i in rows],
                columns=[transfer.columns[i] for i in columns],
                seconds=transfer.seconds[np.ix_(rows, columns)],
                consumers=[
                    Consumer(node=c.node, column_of=part)
                    for c, part in zip(transfer.consumers, np.split(inverse, ends), strict=True)
                ],
            )
        )
    return dataclasses.replace(problem, nodes=nodes, transfers=transfers)


def _used(index: Ints, count: int) -> tuple[Ints, Ints]:
    """Which of the numbers below `count` occur, ascending, and for each of `index` its place among them."""
    occurs = np.zeros(count, bool)
    occurs[index] = True
    return np.flatnonzero(occurs), (np.cumsum(occurs) - 1)[index]
