"""Pins: shardings that the user fixes. The search plans the rest around them."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Callable, Mapping, Sequence

from jax.sharding import PartitionSpec

from ffjax.errors import PinError
from ffjax.ir.assignment import Assignment, spec_of
from ffjax.ir.regions import Region, Regions
from ffjax.ir.spec import MeshShape, Spec, format_spec
from ffjax.strategies.candidates import Keep

Pins = Mapping[str, PartitionSpec]


def pinned_specs(regions: Regions, pins: Pins) -> dict[int, tuple[str, Spec]]:
    """For each pinned argument's op the pattern that pins it, and the sharding.

    A pattern is a path with `*` for one part and `**` for any number; it may leave out leading parts.

    Raises:
      PinError: for a pattern that matches nothing, or too long a spec, or two pins that contradict each other.
    """
    graph = regions.graph
    found: dict[int, tuple[str, Spec]] = {}
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


def keep_pins(regions: Regions, pins: Pins) -> Callable[[MeshShape], Keep | None] | None:
    """For a mesh the candidates that pins leave; on a mesh that lacks a pinned axis none are left."""
    if not pins:
        return None
    wanted = pinned_specs(regions, pins)
    by_region: dict[int, list[int]] = {}
    for op in wanted:
        by_region.setdefault(regions.region_of[op], []).append(op)

    def on(mesh: MeshShape) -> Keep:
        def keep(region: Region, found: Sequence[Assignment]) -> list[Assignment]:
            pinned = by_region.get(region.id, ())
            return [
                c
                for c in found
                if all(spec_of(regions.ports[op].results[0], region.sizes, c, mesh) == wanted[op][1] for op in pinned)
            ]

        return keep

    return on


def check_pins(regions: Regions, pins: Pins, meshes: Sequence[MeshShape]) -> None:
    """Raises PinError if no mesh has the axes that the pins name, or the pinned arrays divide on none."""
    wanted = pinned_specs(regions, pins)
    graph = regions.graph
    for op, (pattern, spec) in wanted.items():
        axes = {a for dim in spec for a in dim}
        having = [m for m in meshes if axes <= set(m.axes)]
        if not having:
            raise PinError(
                f"the pin {pattern!r} names mesh axes {sorted(axes)}, which none of the meshes has "
                f"({', '.join(str(m.as_dict()) for m in meshes)}). Remedy: name axes of one of them, or pass mesh=."
            )
        shape = graph.values[graph.ops[op].results[0]].shape
        if not any(all(n % m.size(dim) == 0 for n, dim in zip(shape, spec, strict=True)) for m in having):
            raise PinError(
                f"the pin {pattern!r} shards {graph.ops[op].label} of shape {list(shape)} as {format_spec(spec)}, "
                f"which divides on none of the meshes {', '.join(str(m.as_dict()) for m in having)}. Remedy: pin "
                "another dimension, or pass a mesh= whose axes divide it."
            )


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
    if len(spec) > rank:
        raise PinError(
            f"the pin {pattern!r} has {len(spec)} entries, {label} has {rank} dimensions. Remedy: shorten the spec."
        )
    entries = [() if e is None else (e,) if isinstance(e, str) else tuple(e) for e in spec]
    return tuple(entries) + ((),) * (rank - len(entries))
