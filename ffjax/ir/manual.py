"""`shard_map` regions of the user's own: over which mesh axes they run, and how their specs pin their arrays.

A region's rule has a factor for each of its mesh axes, and a dimension that its specs split is these factors and what
is left of it, major to minor. On a mesh that has the region's axes, each of its size, there is one candidate: every
axis splits its own factor (`ffjax.ir.assignment.by_hand`). On any other the region runs over a mesh of its own and what
surrounds it is whole.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from jax.sharding import PartitionSpec

from ffjax.ir import compat
from ffjax.ir.compat import JaxprEqn
from ffjax.ir.rules import DimFactors, OpShardingRule
from ffjax.ir.spec import Collective, CollectiveKind, MeshShape, Spec

NAME = "shard_map"

COLLECTIVES: dict[str, CollectiveKind] = {
    **dict.fromkeys(("psum", "psum_invariant", "pmax", "pmin", "unreduced_psum"), "all_reduce"),
    **dict.fromkeys(("all_gather", "all_gather_invariant", "all_gather_reduced"), "all_gather"),
    **dict.fromkeys(("reduce_scatter", "unreduced_reduce_scatter"), "reduce_scatter"),
    **dict.fromkeys(("all_to_all", "ragged_all_to_all"), "all_to_all"),
    **dict.fromkeys(("ppermute", "pbroadcast"), "collective_permute"),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Manual:
    """What a `shard_map` equation says of devices. Axes of one device are left out: they split nothing."""

    mesh: MeshShape
    """The mesh that it was written for."""
    axes: MeshShape
    """The axes that are manual in it: all, unless it leaves some to the partitioner (`axis_names=`)."""
    ins: tuple[Spec, ...]
    """For each operand which axes split its dimensions."""
    outs: tuple[Spec, ...]

    def runs_on(self, mesh: MeshShape) -> bool:
        """Whether it runs by its specs on a mesh: if that has its manual axes, each of its size."""
        has = mesh.as_dict()
        return all(has.get(axis) == size for axis, size in self.axes.as_dict().items())


def manual(eqn: JaxprEqn) -> Manual:
    """What a `shard_map` equation says of devices."""
    sizes = compat.mesh_sizes(eqn)
    names = compat.manual_axes(eqn)

    def specs(given: Sequence[PartitionSpec], ranks: Sequence[int]) -> tuple[Spec, ...]:
        return tuple(_spec(spec, rank, sizes) for spec, rank in zip(given, ranks, strict=True))

    return Manual(
        mesh=MeshShape(tuple(sizes), tuple(sizes.values())),
        axes=_shape({a: n for a, n in sizes.items() if n > 1 and a in names}),
        ins=specs(eqn.params["in_specs"], [len(compat.shape_of(v)) for v in eqn.invars]),
        outs=specs(eqn.params["out_specs"], [len(compat.shape_of(v)) for v in eqn.outvars]),
    )


def manual_rule(eqn: JaxprEqn) -> OpShardingRule:
    """The rule of a region: a factor for each manual axis, and one for what is left of each dimension."""
    own = manual(eqn)
    index = {axis: i for i, axis in enumerate(own.axes.axes)}
    sizes = list(own.axes.sizes)

    def dims(shape: tuple[int, ...], spec: Spec) -> DimFactors:
        found = []
        for n, axes in zip(shape, spec, strict=True):
            found.append((*(index[a] for a in axes), len(sizes)))
            sizes.append(n // own.axes.size(axes))
        return tuple(found)

    operands = tuple(dims(compat.shape_of(v), spec) for v, spec in zip(eqn.invars, own.ins, strict=True))
    results = tuple(dims(compat.shape_of(v), spec) for v, spec in zip(eqn.outvars, own.outs, strict=True))
    return OpShardingRule(operands=operands, results=results, sizes=tuple(sizes))


def own_collectives(eqn: JaxprEqn) -> list[tuple[Collective, float]]:
    """The collectives that a region spells out, and how often each runs when the region runs once.

    Loops multiply by their trips where these are known, and each branch of a conditional counts once.
    """
    sizes = {a: n for a, n in compat.mesh_sizes(eqn).items() if n > 1}
    found: dict[Collective, float] = {}
    for inner, trips in body_equations(eqn):
        kind = COLLECTIVES.get(inner.primitive.name)
        named = inner.params.get("axes", inner.params.get("axis_name", ()))
        given = named if isinstance(named, tuple) else (named,)
        axes = tuple(a for a in sizes if a in given)
        if kind is None or not axes:
            continue
        values = inner.invars if kind == "reduce_scatter" else inner.outvars
        for value in values:
            one = Collective(kind, axes, compat.nbytes(compat.shape_of(value), compat.dtype_of(value)))
            found[one] = found.get(one, 0.0) + trips
    return list(found.items())


def body_equations(eqn: JaxprEqn) -> Iterator[tuple[JaxprEqn, float]]:
    """The equations of a region, those in calls, loops and branches too, and how often each runs."""

    def walk(outer: JaxprEqn, trips: float) -> Iterator[tuple[JaxprEqn, float]]:
        for jaxpr in compat.jaxprs_in(outer):
            for inner in jaxpr.eqns:
                yield inner, trips
                yield from walk(
                    inner, trips * float(inner.params["length"]) if inner.primitive.name == "scan" else trips
                )

    return walk(eqn, 1.0)


def loop_trips(eqn: JaxprEqn) -> float:
    """How often the bodies of an equation run when it runs once, where that is known."""
    return float(eqn.params["length"]) if eqn.primitive.name == "scan" else 1.0


def _spec(spec: PartitionSpec, rank: int, sizes: dict[str, int]) -> Spec:
    dims = [() if e is None else (e,) if isinstance(e, str) else tuple(e) for e in spec]
    return tuple(tuple(a for a in dim if sizes[a] > 1) for dim in dims) + ((),) * (rank - len(dims))


def _shape(sizes: dict[str, int]) -> MeshShape:
    return MeshShape(tuple(sizes), tuple(sizes.values()))
