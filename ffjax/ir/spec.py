"""Shardings as plain data: mesh shapes, specs, and the collectives that they imply.

Nothing here knows JAX: a spec is a tuple with one entry for each dimension, each the mesh axes that
split it, major to minor. `()` for a dimension means that it is not split.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal, TypeAlias

Spec: TypeAlias = tuple[tuple[str, ...], ...]

CollectiveKind = Literal["all_gather", "all_reduce", "reduce_scatter", "all_to_all", "collective_permute"]
COLLECTIVE_KINDS: tuple[CollectiveKind, ...] = (
    "all_gather",
    "all_reduce",
    "reduce_scatter",
    "all_to_all",
    "collective_permute",
)


@dataclass(frozen=True, slots=True)
class MeshShape:
    """The names and sizes of a mesh's axes, in the order in which devices are numbered."""

    axes: tuple[str, ...]
    sizes: tuple[int, ...]

    def __post_init__(self) -> None:
        if len(self.axes) != len(self.sizes) or len(set(self.axes)) != len(self.axes):
            raise ValueError(f"mesh axes {self.axes} and sizes {self.sizes} do not match")

    @property
    def devices(self) -> int:
        return math.prod(self.sizes)

    def size(self, axes: str | Iterable[str]) -> int:
        """The number of devices along one axis, or along several together."""
        if isinstance(axes, str):
            return self.sizes[self.axes.index(axes)]
        return math.prod(self.sizes[self.axes.index(a)] for a in axes)

    def as_dict(self) -> dict[str, int]:
        return dict(zip(self.axes, self.sizes, strict=True))

    def __str__(self) -> str:
        return "x".join(map(str, self.sizes)) if self.sizes else "1"


@dataclass(frozen=True, slots=True)
class Collective:
    """One collective that each device takes part in.

    `bytes` is what one device holds of the larger side: the result of an all-gather, the operand of
    a reduce-scatter, either side of the others. `axes` are mesh axes, in mesh order.
    """

    kind: CollectiveKind
    axes: tuple[str, ...]
    bytes: float


@dataclass(frozen=True, slots=True, kw_only=True)
class CountedCollective:
    """A collective, how many times one run of the program does it, and the line that asks for it.

    `user` marks the ones that the program itself spells out, inside `shard_map`; `op_name` is the path of names by
    which JAX calls the op, where it is known.
    """

    collective: Collective
    count: float
    source: str
    user: bool = False
    op_name: str = ""

    @property
    def total_bytes(self) -> float:
        return self.count * self.collective.bytes


def summarize(collectives: Iterable[CountedCollective]) -> dict[CollectiveKind, tuple[float, float]]:
    """For each kind: how many run, and their bytes together.

    >>> one = Collective(kind="all_gather", axes=("x",), bytes=64.0)
    >>> summarize([CountedCollective(collective=one, count=3.0, source="")])
    {'all_gather': (3.0, 192.0)}
    """
    totals: dict[CollectiveKind, tuple[float, float]] = {}
    for c in collectives:
        count, size = totals.get(c.collective.kind, (0.0, 0.0))
        totals[c.collective.kind] = (count + c.count, size + c.total_bytes)
    return totals


def replicated(rank: int) -> Spec:
    return ((),) * rank


def spec_axes(spec: Spec) -> tuple[str, ...]:
    """All mesh axes that a spec uses, in order of dimensions."""
    return tuple(a for dim in spec for a in dim)


def shard_count(spec: Spec, mesh: MeshShape) -> int:
    return mesh.size(spec_axes(spec))


def local_shape(shape: tuple[int, ...], spec: Spec, mesh: MeshShape) -> tuple[int, ...]:
    """The shape of one device's piece; dimensions that do not divide are rounded up."""
    return tuple(-(-n // mesh.size(dim)) for n, dim in zip(shape, spec, strict=True))


def divides(shape: tuple[int, ...], spec: Spec, mesh: MeshShape) -> bool:
    return all(n % mesh.size(dim) == 0 for n, dim in zip(shape, spec, strict=True))


def format_spec(spec: Spec) -> str:
    """`((), ("x", "y"))` as `(-, x*y)`."""
    return "(" + ", ".join("*".join(dim) if dim else "-" for dim in spec) + ")"


def parts_of(mesh: MeshShape, finer: MeshShape) -> tuple[int, ...] | None:
    """For each axis of a mesh how many axes of a finer one, in order, it is the product of; None if it is no such mesh.

    >>> parts_of(MeshShape(("x", "y"), (8, 8)), MeshShape(("x", "y", "z"), (8, 4, 2)))
    (1, 2)
    """
    rest = list(finer.sizes)
    parts = []
    for size in mesh.sizes:
        product, count = 1, 0
        while product < size and rest:
            product, count = product * rest.pop(0), count + 1
        if product != size or not count:
            return None
        parts.append(count)
    return None if rest else tuple(parts)
