"""Families: regions that are alike in themselves and in their neighbourhood get one decision.

Two regions are alike in themselves when their ops, factors, sizes and loop trips are the same, op by op. Weisfeiler-
Leman refinement over the edges then tells apart what plays different parts (a query and an output projection of the
same shape). A few rounds suffice: more would tell layer 3 from layer 4 by counting its distance to the first.
"""

from __future__ import annotations

import hashlib
from collections.abc import Hashable, Mapping, Sequence

from ffjax.ir import compat, manual
from ffjax.ir.graph import Op
from ffjax.ir.regions import Dims, Regions

ROUNDS = 6


def family_keys(regions: Regions, marks: Mapping[int, str] | None = None, rounds: int = ROUNDS) -> list[str]:
    """For each region the key of its family: equal keys, equal decisions. Stable across processes.

    `marks` tell regions apart that are alike but for what the user wants of them (a pin).
    """
    colors = _local_colors(regions)
    for region, mark in (marks or {}).items():
        colors[region] = _digest((colors[region], mark))
    # Where an edge leaves or enters is told by its dimensions; by how often, only for few edges: a trunk that all
    # layers hang on is the same trunk in a deeper network. So edges between the same ends alike are one.
    ends: dict[tuple[Dims, Dims], int] = {}
    between = {
        (e.source, e.target, ends.setdefault((e.source_dims, e.target_dims), len(ends)))
        for e in regions.edges
        if e.source != e.target
    }
    incoming: list[list[tuple[int, int]]] = [[] for _ in regions.regions]
    outgoing: list[list[tuple[int, int]]] = [[] for _ in regions.regions]
    for source, target, end in between:
        incoming[target].append((end, source))
        outgoing[source].append((end, target))
    dims = list(ends)
    classes = len(set(colors))
    for _ in range(rounds):
        known: dict[Hashable, str] = {}
        before, colors = colors, []
        for own, into, out in zip(before, incoming, outgoing, strict=True):
            entering = frozenset([(end, before[r]) for end, r in into])
            leaving = frozenset([(end, before[r]) for end, r in out])
            key = own, entering, leaving
            if key not in known:
                known[key] = _digest(
                    (
                        own,
                        sorted((dims[end][1], dims[end][0], color) for end, color in entering),
                        sorted((*dims[end], color) for end, color in leaving),
                    )
                )
            colors.append(known[key])
        if len(set(colors)) == classes:
            break
        classes = len(set(colors))
    return colors


def members(keys: Sequence[str]) -> dict[str, list[int]]:
    """The regions of each family, in order."""
    families: dict[str, list[int]] = {}
    for region, key in enumerate(keys):
        families.setdefault(key, []).append(region)
    return families


def _local_colors(regions: Regions) -> list[str]:
    """For each region a digest of what it is in itself."""
    graph = regions.graph
    trips = [scope.trips for scope in graph.scopes]
    dtypes = [value.dtype for value in graph.values]
    # Regions of alike ops share most of their dimensions as objects, by which they are told apart faster.
    known: dict[Hashable, str] = {}
    colors = []
    for region in regions.regions:
        ops = [
            (_kind(node), id(dims), tuple([dtypes[v] for v in node.results]), trips[node.scope])
            for op, dims in zip(region.ops, region.dims, strict=True)
            for node in (graph.ops[op],)
        ]
        key = region.sizes, region.kinds, tuple(ops)
        if key not in known:
            content = tuple(
                (kind, kind in ("argument", "result"), dims.operands, dims.results, dims.reduced, made, often)
                for (kind, _, made, often), dims in zip(ops, region.dims, strict=True)
            )
            known[key] = _digest((region.sizes, region.kinds, content))
        colors.append(known[key])
    return colors


def _kind(op: Op) -> str:
    """What an op does; of a `shard_map` region its axes and what it communicates and makes, whatever its lines."""
    if op.eqn is None or op.kind != manual.NAME:
        return op.kind
    own = manual.manual(op.eqn)
    work = [(e.primitive.name, *map(compat.shape_of, e.outvars), often) for e, often in manual.body_equations(op.eqn)]
    return f"{op.kind} {_digest((own.axes, own.ins, own.outs, manual.own_collectives(op.eqn), work))}"


def _digest(content: object) -> str:
    return hashlib.blake2b(repr(content).encode(), digest_size=12).hexdigest()
