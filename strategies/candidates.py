"""The candidates of a region: every way to give each mesh axis one of its factors, or none.

An axis may split any atom that can be split and that it divides; several axes may split one atom. An axis that
splits a reduced atom leaves partial sums, which are all-reduced, or, where the region is one op, scattered along
one dimension of its result that divides.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence

from ffjax.ir.assignment import UNUSED, Assignment, by_hand, scattered, spec_of
from ffjax.ir.compose import PERMUTATION
from ffjax.ir.halo import Halo, halos
from ffjax.ir.manual import NAME as SHARD_MAP
from ffjax.ir.op_kinds import ends_in_its_sum
from ffjax.ir.regions import Dims, Region, Regions
from ffjax.ir.spec import MeshShape, divides

MOST_ATOMS = {0: 1, 1: 32, 2: 9, 3: 6}
"""How many atoms of a region are considered, the heaviest first, by number of mesh axes."""

Keep = Callable[[Region, Sequence[Assignment]], list[Assignment]]
"""Which of a region's candidates a user's pins leave."""


def candidates(regions: Regions, region: Region, mesh: MeshShape, keep: Keep | None = None) -> list[Assignment]:
    """All assignments of a region that `keep` leaves; the one that uses no axis first.

    A `shard_map` region of the user's has one, by its own specs.
    """
    if (fixed := _by_hand(regions, region, mesh)) is not None:
        return [fixed] if keep is None else keep(region, [fixed])
    atoms = considered(regions, region, len(mesh.sizes))
    single, reduced, result, shape = _sums(regions, region)
    options: list[list[tuple[int, int]]] = []
    for size in mesh.sizes:
        own = [(UNUSED, UNUSED)]
        for atom in atoms:
            if region.sizes[atom] % size == 0 and size > 1:
                own.append((atom, UNUSED))
                if atom in reduced and single:
                    own += [(atom, dim) for dim, n in enumerate(shape) if n % size == 0]
        options.append(own)
    images = _images(regions, region)
    found = []
    for choice in itertools.product(*options):
        assignment = Assignment(tuple(a for a, _ in choice), tuple(d for _, d in choice))
        if (
            _written(region, assignment, mesh)
            and _reached(images, assignment, mesh)
            and _valid(region, assignment, mesh, reduced, result, shape)
        ):
            found.append(assignment)
    return keep(region, found) if keep is not None else found


def considered(regions: Regions, region: Region, axes: int) -> list[int]:
    """The atoms that can be split, those that index most bytes first if there are too many."""
    images = _images(regions, region)
    atoms = [
        a
        for a in range(len(region.sizes))
        if region.can_split(a) and (a in images or not region.kinds[a] & PERMUTATION)
    ]
    limit = MOST_ATOMS.get(axes, 4)
    if len(atoms) <= limit:
        return atoms
    graph = regions.graph
    weight = dict.fromkeys(atoms, 0.0)
    for op, dims in zip(region.ops, region.dims, strict=True):
        values = graph.ops[op].operands + graph.ops[op].results
        for value, port in zip(values, dims.operands + dims.results, strict=True):
            if value >= 0:
                for atom in {a for dim in port for a in dim}:
                    if atom in weight:
                        weight[atom] += graph.values[value].bytes * graph.scopes[graph.values[value].scope].trips
    return sorted(sorted(atoms, key=lambda a: -weight[a])[:limit])


def is_candidate(regions: Regions, region: Region, assignment: Assignment, mesh: MeshShape) -> bool:
    """Whether an assignment is one that a region can have; for those that come from outside."""
    if (fixed := _by_hand(regions, region, mesh)) is not None:
        return assignment == fixed
    atoms = set(assignment.atoms) - {UNUSED}
    if not all(0 <= a < len(region.sizes) and region.can_split(a) for a in atoms):
        return False
    images = _images(regions, region)
    if any(region.kinds[a] & PERMUTATION and a not in images for a in atoms):
        return False
    if not _reached(images, assignment, mesh):
        return False
    single, reduced, result, shape = _sums(regions, region)
    for atom, dim in zip(assignment.atoms, assignment.scatter, strict=True):
        if dim != UNUSED and not (single and atom in reduced and 0 <= dim < len(shape)):
            return False
    return _written(region, assignment, mesh) and _valid(region, assignment, mesh, reduced, result, shape)


def is_by_hand(regions: Regions, region: Region) -> bool:
    """Whether a region is a `shard_map` of the user's: no strategy decides about it."""
    return region.solo and regions.graph.ops[region.ops[0]].kind == SHARD_MAP


def _by_hand(regions: Regions, region: Region, mesh: MeshShape) -> Assignment | None:
    return by_hand(regions.graph.ops[region.ops[0]], region.dims[0], mesh) if region.solo else None


def _sums(regions: Regions, region: Region) -> tuple[bool, set[int], Dims, tuple[int, ...]]:
    """Whether partial sums may be scattered, over which atoms they are, and the result's dimensions and shape."""
    graph = regions.graph
    last, dims = graph.ops[region.ops[-1]], region.dims[-1]
    reduced = set(dims.reduced) if region.solo else set()
    if not (region.solo and len(last.results) == 1 and ends_in_its_sum(last)):
        return False, reduced, (), ()
    return True, reduced, dims.results[0], graph.values[last.results[0]].shape


def _images(regions: Regions, region: Region) -> dict[int, Halo]:
    """The atoms of an image along which a window can run on pieces."""
    if not region.solo:
        return {}
    image = region.dims[0].operands
    found = halos(regions.graph.ops[region.ops[0]].eqn)
    return {image[h.operand][h.dim][0]: h for h in found if image[h.operand][h.dim]}


def _reached(images: Mapping[int, Halo], assignment: Assignment, mesh: MeshShape) -> bool:
    """Whether pieces of an image need nothing from beyond their neighbours."""
    return all(h.fits(mesh.size(assignment.axes(atom, mesh))) for atom, h in images.items())


def _written(region: Region, assignment: Assignment, mesh: MeshShape) -> bool:
    return all(spec_of(dims, region.sizes, assignment, mesh) is not None for dims in region.merged)


def _valid(
    region: Region,
    assignment: Assignment,
    mesh: MeshShape,
    reduced: set[int],
    result: Dims,
    shape: tuple[int, ...],
) -> bool:
    for atom in set(assignment.atoms) - {UNUSED}:
        if region.sizes[atom] % math.prod(s for s, a in zip(mesh.sizes, assignment.atoms, strict=True) if a == atom):
            return False
    if not region.solo:
        return True
    partial = [d for a, d in zip(assignment.atoms, assignment.scatter, strict=True) if a in reduced]
    if all(d == UNUSED for d in partial):
        return True
    # One collective per op, along one dimension: XLA forms no other reduce-scatter.
    if len(set(partial)) > 1:
        return False
    spec = spec_of(result, region.sizes, assignment, mesh)
    return spec is not None and divides(shape, scattered(spec, assignment, mesh), mesh)
