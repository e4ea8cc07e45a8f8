"""Families: regions that are alike in themselves and in their neighbourhood get one decision.

Two regions are alike in themselves when their ops, factors, sizes and loop trips are the same, op by op. Weisfeiler-
Leman refinement over the edges then tells apart what plays different parts (a query and an output projection of the
same shape). A few rounds suffice: more would tell layer 3 from layer 4 by counting its distance to the first.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence

from ffjax.ir.regions import Edge, Region, Regions

ROUNDS = 6


def family_keys(regions: Regions, marks: Mapping[int, str] | None = None, rounds: int = ROUNDS) -> list[str]:
    """For each region the key of its family: equal keys, equal decisions. Stable across processes.

    `marks` tell regions apart that are alike but for what the user wants of them (a pin).
    """
    colors = [_digest(_local(regions, r)) for r in regions.regions]
    for region, mark in (marks or {}).items():
        colors[region] = _digest((colors[region], mark))
    incoming: list[list[Edge]] = [[] for _ in regions.regions]
    outgoing: list[list[Edge]] = [[] for _ in regions.regions]
    for edge in regions.edges:
        if edge.source != edge.target:
            incoming[edge.target].append(edge)
            outgoing[edge.source].append(edge)
    classes = len(set(colors))
    for _ in range(rounds):
        colors = [
            _digest(
                (
                    colors[r.id],
                    # Where an edge leaves or enters is told by its dimensions; by how often, only for few edges: a
                    # trunk that all layers hang on is the same trunk in a deeper network.
                    sorted({(e.target_dims, e.source_dims, colors[e.source]) for e in incoming[r.id]}),
                    sorted({(e.source_dims, e.target_dims, colors[e.target]) for e in outgoing[r.id]}),
                )
            )
            for r in regions.regions
        ]
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


def _local(regions: Regions, region: Region) -> tuple[object, ...]:
    graph = regions.graph
    ops = []
    for op, dims in zip(region.ops, region.dims, strict=True):
        node = graph.ops[op]
        dtypes = tuple(graph.values[v].dtype for v in node.results)
        tied = node.kind in ("argument", "result")
        ops.append((node.kind, tied, dims.operands, dims.results, dims.reduced, dtypes, graph.scopes[node.scope].trips))
    return (region.sizes, region.kinds, tuple(ops))


def _digest(content: object) -> str:
    return hashlib.blake2b(repr(content).encode(), digest_size=12).hexdigest()
