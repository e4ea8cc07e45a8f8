"""Pins: shardings that the user fixes. The search plans the rest around them."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Callable, Mapping, Sequence

from jax.sharding import PartitionSpec

from ffjax.errors import PinError
from ffjax.ir.assignment import Assignment, spec_of
from ffjax.ir.regions import Region, Regions
from ffjax.ir.spec import MeshShape, Spec, divides, format_spec
from ffjax.strategies.candidates import Keep, candidates

Pins = Mapping[str, PartitionSpec]

OPEN: tuple[str, ...] = ("unconstrained",)
"""Of a dimension that may be sharded in any way."""

Wish = tuple[str, Spec]
"""What is wanted of an op's first result: the pattern or source line that says so, and the sharding."""

Wanted = Mapping[int, Wish]
"""By op."""


def pinned_specs(regions: Regions, pins: Pins) -> dict[int, Wish]:
    """For each pinned argument's op the pattern that pins it, and the sharding.

    A pattern is a path with `*` for one part and `**` for any number; it may leave out leading parts.

    Raises:
      PinError: for a pattern that matches nothing, or too long a spec, or two pins that contradict each other.
    """
    if not isinstance(pins, Mapping):
        raise PinError(
            f"pins={pins!r} is no mapping. Remedy: give a PartitionSpec for each path, such as "
            "{'params/**/kernel': PartitionSpec(None, 'x')}."
        )
    graph = regions.graph
    found: dict[int, Wish] = {}
    for pattern, spec in pins.items():
        matched = [op for op in graph.arguments if matches(pattern, graph.ops[op].label)]
        if not matched:
            paths = [leaf.path for leaf in graph.program.args]
            near = ", ".join(paths[:6])
            raise PinError(f"the pin {pattern!r} matches no argument. Remedy: use one of the paths, such as {near}.")
        for op in matched:
            rank = len(graph.values[graph.ops[op].results[0]].shape)
            entry = (pattern, _spec(pattern, spec, rank, graph.ops[op].label))
            other = found.get(op)
            if other is not None and other[1] != entry[1]:
                raise PinError(
                    f"the pins {other[0]!r} ({format_spec(other[1])}) and {pattern!r} ({format_spec(entry[1])}) "
                    f"contradict each other for {graph.ops[op].label}. Remedy: make one of them match less."
                )
            found[op] = entry
    return found


def keep_pins(regions: Regions, wanted: Wanted) -> Callable[[MeshShape], Keep | None] | None:
    """For a mesh the candidates that pins leave; on a mesh that lacks a pinned axis none are left."""
    if not wanted:
        return None
    by_region: dict[int, dict[int, Wish]] = {}
    for op, wish in wanted.items():
        by_region.setdefault(regions.region_of[op], {})[op] = wish

    def on(mesh: MeshShape) -> Keep:
        def keep(region: Region, found: Sequence[Assignment]) -> list[Assignment]:
            return fits_beside(regions, found, by_region.get(region.id, {}), mesh)

        return keep

    return on


def fits_beside(regions: Regions, found: Sequence[Assignment], wanted: Wanted, mesh: MeshShape) -> list[Assignment]:
    """The assignments of one region under which some of its ops' results are sharded as wanted."""
    # An axis of one device splits nothing, so that no candidate names it.
    idle = {a for a, size in zip(mesh.axes, mesh.sizes, strict=True) if size == 1}
    wishes = [
        (regions.ports[op].results[0], tuple(d if d is OPEN else tuple(a for a in d if a not in idle) for d in spec))
        for op, (_, spec) in wanted.items()
    ]
    sizes = {op: regions.regions[regions.region_of[op]].sizes for op in wanted}
    return [
        c
        for c in found
        if all(
            (own := spec_of(dims, size, c, mesh)) is not None
            and all(want is OPEN or want == has for want, has in zip(spec, own, strict=True))
            for (dims, spec), size in zip(wishes, sizes.values(), strict=True)
        )
    ]


def pin_marks(regions: Regions, wanted: Wanted) -> dict[int, str]:
    """For each region with pinned ops what they are pinned to: regions that differ in it are decided apart."""
    marks: dict[int, list[str]] = {}
    for op, (_, spec) in sorted(wanted.items()):
        port = regions.ports[op].results[0]
        shown = format_spec(tuple(("?",) if d is OPEN else d for d in spec))
        marks.setdefault(regions.region_of[op], []).append(f"{port} {shown}")
    return {region: "; ".join(sorted(own)) for region, own in marks.items()}


def check_pins(regions: Regions, wanted: Wanted, meshes: Sequence[MeshShape]) -> None:
    """Raises PinError for pins that no mesh can satisfy: unknown axes, indivisible dimensions, arrays that go along."""
    graph = regions.graph
    by_region: dict[int, list[int]] = {}
    for op, (pattern, spec) in wanted.items():
        by_region.setdefault(regions.region_of[op], []).append(op)
        axes = {a for dim in spec for a in dim}
        having = [m for m in meshes if axes <= set(m.axes)]
        if not having:
            raise PinError(
                f"the pin {pattern!r} names mesh axes {sorted(axes)}, which none of the meshes has "
                f"({_listed(meshes)}). Remedy: name axes of one of them, or pass mesh=."
            )
        shape = graph.values[graph.ops[op].results[0]].shape
        if not any(divides(shape, spec, m) for m in having):
            raise PinError(
                f"the pin {pattern!r} shards {graph.ops[op].label} of shape {list(shape)} as {format_spec(spec)}, "
                f"which divides on none of the meshes {_listed(having)}. Remedy: pin another dimension, or pass a "
                "mesh= whose axes divide it."
            )
    for region, ops in by_region.items():
        if not any(_possible(regions, region, wanted, m) for m in meshes):
            first = wanted[ops[0]][0]
            others = [op for op in ops if wanted[op][0] != first]
            shown = (ops[:1] + others)[:4]
            pinned = ", ".join(f"{graph.ops[op].label} as {format_spec(wanted[op][1])}" for op in shown)
            why = (
                "are of one shape all through the program and cannot be sharded differently"
                if others
                else "cannot be sharded so: an op needs a whole dimension, or uses one dimension as two"
            )
            patterns = ", ".join(repr(p) for p in dict.fromkeys(wanted[op][0] for op in ops))
            raise PinError(f"the pins {patterns}: {pinned} {why}. Remedy: pin them alike, or pin one of them only.")


def entries(spec: PartitionSpec) -> Spec:
    """`P(None, "x", ("x", "y"))` as `((), ("x",), ("x", "y"))`."""
    return tuple(() if e is None else (e,) if isinstance(e, str) else e for e in spec)


def _possible(regions: Regions, region: int, wanted: Wanted, mesh: MeshShape) -> bool:
    keep = keep_pins(regions, wanted)
    return keep is not None and bool(candidates(regions, regions.regions[region], mesh, keep(mesh)))


def _listed(meshes: Sequence[MeshShape]) -> str:
    return ", ".join(str(m.as_dict()) for m in meshes)


def matches(pattern: str, path: str) -> bool:
    """Whether a pattern matches a path, whole or from one of its parts on."""
    expression = (
        "/".join(
            ".*"
            if part == "**"
            else fnmatch.translate(part).removeprefix("(?s:").removesuffix(r")\Z").replace(".*", "[^/]*")
            for part in pattern.split("/")
        )
        .replace("/.*/", "/(?:.*/)?")
        .removeprefix(".*/")
    )
    prefix = r"(?:.*/)?"
    return re.fullmatch(prefix + expression, path) is not None


def _spec(pattern: str, spec: PartitionSpec, rank: int, label: str) -> Spec:
    if not isinstance(spec, PartitionSpec):
        raise PinError(f"the pin {pattern!r} is {spec!r}. Remedy: give a jax.sharding.PartitionSpec.")
    if len(spec) > rank:
        raise PinError(
            f"the pin {pattern!r} has {len(spec)} entries, {label} has {rank} dimensions. Remedy: shorten the spec."
        )
    dims = entries(spec)
    if not all(isinstance(e, tuple) and all(isinstance(a, str) for a in e) for e in dims):
        raise PinError(
            f"the pin {pattern!r} is {spec}. Remedy: give for each dimension None, a mesh axis or a tuple of axes."
        )
    axes = [a for e in dims for a in e]
    if len(axes) != len(set(axes)):
        raise PinError(f"the pin {pattern!r} is {spec}, which uses an axis twice. Remedy: use each axis once.")
    return dims + ((),) * (rank - len(dims))
