"""What a plan meant to communicate beside what the compiler made of it.

Collectives are compared by kind and mesh axes, in bytes of a step: compilers merge collectives into one and move them
out of loops, which changes counts but not bytes, so that counts are for information. What was planned as a
reduce-scatter and is compiled as an all-reduce of as many bytes over the same axes is an exchange, not a surplus of the
one and a lack of the other. A full rematerialization is an array that is gathered whole although all who read it need
a part of it only.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from ffjax.cost.hlo.collectives import collectives_of
from ffjax.cost.hlo.rematerialization import Rematerialization, logged_rematerializations, rematerialized
from ffjax.cost.hlo.source import HloSource, read_module
from ffjax.ir.layout import Layout
from ffjax.ir.spec import Collective, CollectiveKind, CountedCollective, MeshShape

_Key = tuple[CollectiveKind, tuple[str, ...]]


class Planned(Protocol):
    """A `PlannedCollective` or a `CountedCollective`."""

    @property
    def collective(self) -> Collective: ...
    @property
    def count(self) -> float: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """One kind of collective over the same mesh axes: bytes and counts of one step.

    `unplanned` are compiled ones of sizes that the plan has not, largest first, where the compiler communicates more
    than was planned; `missing` are planned ones that it has not, where it communicates less.
    """

    kind: CollectiveKind
    axes: tuple[str, ...]
    planned_bytes: float
    compiled_bytes: float
    planned_count: float
    compiled_count: float
    unplanned: tuple[CountedCollective, ...] = ()
    missing: tuple[CountedCollective, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Exchange:
    """Bytes of one kind that the compiler communicates by another kind, over the same mesh axes."""

    planned: CollectiveKind
    compiled: CollectiveKind
    axes: tuple[str, ...]
    bytes: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """All of it. `agrees` is whether nothing was unplanned, missing, exchanged or rematerialized."""

    comparisons: tuple[Comparison, ...]
    exchanged: tuple[Exchange, ...]
    rematerialized: tuple[Rematerialization, ...]

    @property
    def agrees(self) -> bool:
        differ = any(c.unplanned or c.missing for c in self.comparisons)
        return not (differ or self.exchanged or self.rematerialized)

    def __str__(self) -> str:
        lines = [f"{'collective':<32}{'planned':>14}{'compiled':>14}{'ratio':>8}{'count':>14}"]
        for c in self.comparisons:
            ratio = f"{c.compiled_bytes / c.planned_bytes:.3f}" if c.planned_bytes else "-"
            counts = f"{c.planned_count:g} / {c.compiled_count:g}"
            name = f"{c.kind} over {'*'.join(c.axes) or 'no mesh axes'}"
            lines.append(f"{name:<32}{c.planned_bytes:>14.4g}{c.compiled_bytes:>14.4g}{ratio:>8}{counts:>14}")
        lines += [
            f"exchanged: {e.bytes:.4g} bytes over {'*'.join(e.axes)}, planned as {e.planned}, compiled as {e.compiled}"
            for e in self.exchanged
        ]
        lines += [f"unplanned: {_described(one)}" for c in self.comparisons for one in c.unplanned]
        lines += [f"missing: {_described(one)}" for c in self.comparisons for one in c.missing]
        lines += [
            f"rematerialized: {r.bytes:.4g} bytes are gathered whole and read in part, at {r.source or r.name}"
            + (f" ({r.op_name})" if r.op_name and r.op_name != r.source else "")
            for r in self.rematerialized
        ]
        return "\n".join(lines)


def unplanned(
    planned: Iterable[Planned],
    source: HloSource,
    mesh: MeshShape,
    *,
    reduce_scatter: bool = True,
    tolerance: float = 0.05,
    log: str = "",
) -> Report:
    """Compares a plan's collectives with those of the program that was compiled from it.

    Args:
      planned: what the plan implies: `layout.collectives()`, or `planned_collectives(layout)`, which knows sources.
      source: the compiled program, its HLO text, a serialized proto, or a `Module`.
      mesh: the plan's mesh.
      reduce_scatter: whether the compiler forms reduce-scatters (`Cluster.reduce_scatter`); where not, a planned one is
        expected as an all-reduce.
      tolerance: the share of the planned bytes by which a kind may differ and still agree.
      log: what the compiler wrote to stderr: its own warnings of full rematerialization are added.
    """
    module = read_module(source)
    expected = [
        CountedCollective(
            collective=p.collective if reduce_scatter else _as_all_reduce(p.collective),
            count=p.count,
            source=str(getattr(p, "source", "")),
        )
        for p in planned
    ]
    compiled = collectives_of(module, mesh)
    parts = collectives_of(module, mesh, split=True)
    keys = list(dict.fromkeys(_key(c, mesh) for c in [*expected, *compiled]))
    ours, theirs, theirs_split = (
        {key: [c for c in each if _key(c, mesh) == key] for key in keys} for each in (expected, compiled, parts)
    )
    exchanged = _exchanges(
        {key: _bytes(own) for key, own in ours.items()}, {key: _bytes(own) for key, own in theirs.items()}, tolerance
    )
    comparisons = [_compare(key, ours[key], theirs[key], theirs_split[key], exchanged, tolerance) for key in keys]
    sizes = {c.collective.bytes for c in expected if c.collective.kind == "all_gather"}
    return Report(
        comparisons=tuple(sorted(comparisons, key=lambda c: -max(c.planned_bytes, c.compiled_bytes))),
        exchanged=exchanged,
        rematerialized=(*rematerialized(module, sizes), *logged_rematerializations(log)),
    )


def planned_collectives(layout: Layout) -> list[CountedCollective]:
    """A layout's collectives with the source lines of the ops that imply them."""
    graph = layout.graph
    return [
        CountedCollective(collective=p.collective, count=p.count, source=graph.source(graph.ops[p.op]))
        for p in layout.collectives()
    ]


def _as_all_reduce(collective: Collective) -> Collective:
    if collective.kind != "reduce_scatter":
        return collective
    return Collective("all_reduce", collective.axes, collective.bytes)


def _key(counted: CountedCollective, mesh: MeshShape) -> _Key:
    axes = counted.collective.axes
    return counted.collective.kind, tuple(a for a in mesh.axes if a in axes and mesh.size(a) > 1)


def _bytes(some: Iterable[CountedCollective]) -> float:
    return sum(c.total_bytes for c in some)


def _exchanges(planned: Mapping[_Key, float], compiled: Mapping[_Key, float], tolerance: float) -> tuple[Exchange, ...]:
    """All-reduces in place of reduce-scatters, and the other way round."""
    found = []
    kinds: tuple[CollectiveKind, CollectiveKind] = ("reduce_scatter", "all_reduce")
    for axes in dict.fromkeys(axes for _, axes in planned):
        for lost, gained in (kinds, kinds[::-1]):
            lack = planned.get((lost, axes), 0.0) - compiled.get((lost, axes), 0.0)
            surplus = compiled.get((gained, axes), 0.0) - planned.get((gained, axes), 0.0)
            if min(lack, surplus) > tolerance * min(planned.get((lost, axes), 0.0), compiled.get((gained, axes), 0.0)):
                found.append(Exchange(planned=lost, compiled=gained, axes=axes, bytes=min(lack, surplus)))
    return tuple(found)


def _compare(
    key: _Key,
    planned: Sequence[CountedCollective],
    compiled: Sequence[CountedCollective],
    parts: Sequence[CountedCollective],
    exchanged: Sequence[Exchange],
    tolerance: float,
) -> Comparison:
    gained = sum(e.bytes for e in exchanged if (e.compiled, e.axes) == key)
    lost = sum(e.bytes for e in exchanged if (e.planned, e.axes) == key)
    surplus = _bytes(compiled) - gained - (_bytes(planned) - lost)
    slack = tolerance * max(_bytes(planned), gained)
    return Comparison(
        kind=key[0],
        axes=key[1],
        planned_bytes=_bytes(planned),
        compiled_bytes=_bytes(compiled),
        planned_count=sum(c.count for c in planned),
        compiled_count=sum(c.count for c in compiled),
        unplanned=_without_equals(parts, planned) if surplus > slack else (),
        missing=_without_equals(planned, parts) if -surplus > slack else (),
    )


def _without_equals(
    some: Sequence[CountedCollective], others: Sequence[CountedCollective]
) -> tuple[CountedCollective, ...]:
    """Those of `some` that find no equally large one among `others`, largest first."""
    left: dict[float, float] = {}
    for other in others:
        left[other.collective.bytes] = left.get(other.collective.bytes, 0.0) + other.count
    found = []
    for one in sorted(some, key=lambda c: -c.total_bytes):
        if left.get(one.collective.bytes, 0.0) >= one.count:
            left[one.collective.bytes] -= one.count
        else:
            found.append(one)
    return tuple(found)


def _described(one: CountedCollective) -> str:
    c = one.collective
    where = f" at {one.source}" if one.source else ""
    name = f" ({one.op_name})" if one.op_name and one.op_name != one.source else ""
    return f"{one.count:g} x {c.kind} over {'*'.join(c.axes) or 'no mesh axes'}, {c.bytes:.4g} bytes{where}{name}"
