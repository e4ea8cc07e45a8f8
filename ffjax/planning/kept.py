"""Shardings that a step comes with, and that its plan keeps: nothing of them changes unless it is asked for.

A step carries a sharding in an argument that lies over several devices (or a shape with such a `NamedSharding`), and in
constraints of its own (`with_sharding_constraint`, or the shardings of a `jit` inside). The search keeps them, on their
mesh, if it is free to: with `strategy="auto"`, on as many devices, and without a `mesh=` that is another one. Pins go
first. What cannot be kept (a dimension that does not divide, arrays that must go together) is planned, with a warning.
"""

from __future__ import annotations

import dataclasses
import warnings
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field

import jax
from jax.sharding import Mesh, NamedSharding

from ffjax.emit.emit import partition_spec
from ffjax.errors import FfjaxWarning, PlanError
from ffjax.ir import compat
from ffjax.ir.assignment import Assignment
from ffjax.ir.compat import ClosedJaxpr
from ffjax.ir.inline import inline
from ffjax.ir.regions import Regions
from ffjax.ir.spec import MeshShape, Spec
from ffjax.ir.trace import Program, constraints_in
from ffjax.plan_record import PlanRecord
from ffjax.planning.by_hand import mesh_by_hand
from ffjax.planning.options import SearchOptions
from ffjax.planning.pins import OPEN, Wanted, Wish, entries, fits_beside
from ffjax.strategies.candidates import candidates
from ffjax.strategies.session import AUTO


@dataclass(frozen=True, slots=True, kw_only=True)
class Kept:
    """What a plan keeps of the shardings that its step comes with."""

    mesh: MeshShape | None = None
    args: Mapping[str, Spec] = field(default_factory=dict)
    """By path of the argument's leaf."""

    def keeps(self, sharding: NamedSharding) -> bool:
        """Whether a constraint of the program's is kept: if it is over the same mesh."""
        return self.mesh is not None and mesh_shape(sharding) == self.mesh


def mesh_shape(sharding: NamedSharding) -> MeshShape:
    """The mesh of a sharding: names and sizes of its axes."""
    return MeshShape(tuple(map(str, sharding.mesh.axis_names)), tuple(sharding.mesh.axis_sizes))


def what_stays(program: Program, options: SearchOptions, devices: int) -> Kept:
    """What is kept of a program's shardings by a search with these options, on so many devices.

    Raises:
      PlanError: where arguments lie over different meshes, so that no plan can keep them all.
    """
    if not options.keep_shardings or options.strategy != AUTO:
        return Kept()
    carried = {leaf.path: s for leaf, s in zip(program.args, program.carried, strict=True) if s is not None}
    meshes = list(dict.fromkeys(m for m in map(mesh_shape, carried.values()) if m.devices == devices))
    if options.mesh is not None:
        mesh = MeshShape(tuple(options.mesh), tuple(options.mesh.values()))
    elif len(meshes) > 1:
        first, other = (next(p for p, s in carried.items() if mesh_shape(s) == m) for m in meshes[:2])
        raise PlanError(
            f"arguments of {program.name} are sharded over different meshes: {first} over {meshes[0].as_dict()}, "
            f"{other} over {meshes[1].as_dict()}. Remedy: put them on one mesh, or plan all "
            "anew with keep_shardings=False or a mesh=."
        )
    else:
        by_hand = mesh_by_hand(program, devices)
        own = [m for m in map(mesh_shape, program.constraints) if m.devices == devices]
        if not meshes and not own:
            return Kept()
        mesh = (meshes or ([by_hand] if by_hand is not None else own))[0]
    args = {path: _padded(s, rank) for path, s, rank in _ranked(program) if mesh_shape(s) == mesh}
    return Kept(mesh=mesh, args=args)


def with_kept(program: Program, kept: Kept, *, say: bool = True) -> Program:
    """The program with just those of its constraints that are kept; `say`: warns of the others."""
    if all(kept.keeps(s) for s in program.constraints):
        return program
    with warnings.catch_warnings():
        if not say:
            warnings.simplefilter("ignore", FfjaxWarning)
        jaxpr, _ = inline(ClosedJaxpr(program.jaxpr, ()), kept.keeps)
    return dataclasses.replace(program, jaxpr=jaxpr, constraints=constraints_in(jaxpr))


def as_planned(program: Program, plan: PlanRecord) -> Program:
    """The program that a plan was made for: with the constraints that it keeps."""
    return with_kept(program, Kept(mesh=plan.mesh) if plan.keeps_constraints else Kept(), say=False)


def wanted_by(regions: Regions, args: Mapping[str, Spec], mesh: MeshShape, pinned: Wanted) -> tuple[Wanted, list[str]]:
    """What the plan on a mesh shall keep, by op, beside what is pinned; and what of it cannot be kept.

    Ops of one region are sharded together, so what is asked first of them wins.
    """
    graph = regions.graph
    asked: dict[int, Wish] = {}
    for op in graph.arguments:
        if (spec := args.get(graph.ops[op].label)) is not None and op not in pinned:
            asked[op] = (graph.ops[op].label, spec)
    # An argument that nothing but a constraint reads (`in_shardings`) comes as the constraint has it.
    readers = Counter(value for own in graph.ops for value in own.operands)
    results = {graph.ops[op].results[0]: op for op in graph.arguments}
    only_read = {value: op for value, op in results.items() if readers[value] == 1}
    for op, own in enumerate(graph.ops):
        if own.eqn is not None and (sharding := compat.constraint_of(own.eqn)) is not None:
            spec = _padded(sharding, len(graph.values[own.results[0]].shape))
            still_open = compat.unconstrained_dims(own.eqn)
            wish = (graph.source(own), tuple(OPEN if d in still_open else dim for d, dim in enumerate(spec)))
            asked[op] = wish
            if (argument := only_read.get(own.operands[0])) is not None and argument not in pinned:
                asked.setdefault(argument, wish)
    kept, left = dict(pinned), []
    found: dict[int, list[Assignment]] = {}
    for op, wish in asked.items():
        region = regions.region_of[op]
        if region not in found:
            of_region = {o: w for o, w in pinned.items() if regions.region_of[o] == region}
            found[region] = fits_beside(regions, candidates(regions, regions.regions[region], mesh), of_region, mesh)
        fitting = fits_beside(regions, found[region], {op: wish}, mesh)
        if fitting:
            found[region], kept[op] = fitting, wish
        else:
            shown = partition_spec(tuple(d if d is not OPEN else () for d in wish[1]))
            left.append(f"{wish[0]} as {shown}")
    return kept, left


def _ranked(program: Program) -> list[tuple[str, NamedSharding, int]]:
    leaves = zip(program.args, program.carried, strict=True)
    return [(leaf.path, s, len(leaf.shape)) for leaf, s in leaves if s is not None]


def _padded(sharding: NamedSharding, rank: int) -> Spec:
    dims = entries(sharding.spec)
    return tuple(d if isinstance(d, tuple) else () for d in dims) + ((),) * (rank - len(dims))


def devices_of(program: Program, mesh: MeshShape) -> list[jax.Device] | None:
    """The devices of the mesh that arguments came with, in its order; None where none did."""
    for sharding in program.carried:
        if sharding is not None and mesh_shape(sharding) == mesh and isinstance(sharding.mesh, Mesh):
            return list(sharding.mesh.devices.flat)
    return None
