"""Assignments: which factor each mesh axis splits. One candidate of one region, and what follows from it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ffjax.ir import manual
from ffjax.ir.graph import Op
from ffjax.ir.regions import Dims, OpDims
from ffjax.ir.spec import MeshShape, Spec

UNUSED = -1


@dataclass(frozen=True, slots=True)
class Assignment:
    """For each mesh axis the atom that it splits, and where partial sums over it are scattered.

    `atoms[i]` is `UNUSED` where the region does not use axis i. `scatter[i]` is a dimension of the op's result
    when axis i splits a reduced atom whose partial sums end up split along that dimension (a reduce-scatter),
    else `UNUSED` (an all-reduce, or nothing to reduce).
    """

    atoms: tuple[int, ...]
    scatter: tuple[int, ...]

    def cut(self, pieces: Sequence[int]) -> Assignment:
        """The same sharding on a mesh that has, in place of each axis, so many that it is the product of.

        >>> Assignment((4, UNUSED), (0, UNUSED)).cut((2, 1))
        Assignment(atoms=(4, 4, -1), scatter=(0, 0, -1))
        """
        return Assignment(
            tuple(a for a, n in zip(self.atoms, pieces, strict=True) for _ in range(n)),
            tuple(d for d, n in zip(self.scatter, pieces, strict=True) for _ in range(n)),
        )

    def axes(self, atom: int, mesh: MeshShape) -> tuple[str, ...]:
        return tuple(name for name, a in zip(mesh.axes, self.atoms, strict=True) if a == atom)

    def partial_axes(self, op: OpDims, mesh: MeshShape) -> tuple[str, ...]:
        """The axes over which an op's results are partial sums."""
        return tuple(name for name, a in zip(mesh.axes, self.atoms, strict=True) if a in op.reduced)


def by_hand(op: Op, dims: OpDims, mesh: MeshShape) -> Assignment | None:
    """The one assignment of a `shard_map` region of the user's; None for other ops.

    Its specs decide where the mesh has its axes; elsewhere what surrounds it is whole.
    """
    if op.eqn is None or op.kind != manual.NAME:
        return None
    own = manual.manual(op.eqn)
    nothing = (UNUSED,) * len(mesh.axes)
    if not own.runs_on(mesh):
        return Assignment(nothing, nothing)
    split: dict[str, int] = {}
    for spec, port in zip((*own.ins, *own.outs), (*dims.operands, *dims.results), strict=True):
        for axes, dim in zip(spec, port, strict=True):
            split.update(zip(axes, dim, strict=False))  # what is left of the dimension comes last
    return Assignment(tuple(split.get(axis, UNUSED) for axis in mesh.axes), nothing)


def spec_of(dims: Dims, sizes: Sequence[int], assignment: Assignment, mesh: MeshShape) -> Spec | None:
    """The sharding of a value, or None if no PartitionSpec says it.

    In a dimension of several factors a minor one can be split only where the major ones are split wholly.
    """
    by_atom: dict[int, tuple[str, ...]] = {}
    for name, atom in zip(mesh.axes, assignment.atoms, strict=True):
        by_atom[atom] = (*by_atom.get(atom, ()), name)
    spec = []
    for dim in dims:
        if len(dim) == 1:
            spec.append(by_atom.get(dim[0], ()))
            continue
        axes: tuple[str, ...] = ()
        whole = True
        for atom in dim:
            here = by_atom.get(atom, ())
            if here and not whole:
                return None
            whole = whole and mesh.size(here) == sizes[atom]
            axes += here
        spec.append(axes)
    return tuple(spec)


def scattered(spec: Spec, assignment: Assignment, mesh: MeshShape) -> Spec:
    """The sharding of a result after its partial sums are scattered; unchanged where none are."""
    if all(d == UNUSED for d in assignment.scatter):
        return spec
    return tuple(
        dim + tuple(name for name, d in zip(mesh.axes, assignment.scatter, strict=True) if d == index)
        for index, dim in enumerate(spec)
    )
