"""The meshes of `shard_map` regions in a step: which one the plan takes, and what cannot run as its specs say.

A region runs by its specs on a mesh that has its axes, each of its size. So the plan is searched on the mesh of the
step's regions: as it is on as many devices, with one more axis in front on a multiple of them.
"""

from __future__ import annotations

import warnings
from collections import Counter

from ffjax.errors import FfjaxWarning, PlanError
from ffjax.ir import compat
from ffjax.ir.compat import JaxprEqn
from ffjax.ir.inline import walk
from ffjax.ir.manual import NAME, Manual, manual
from ffjax.ir.spec import MeshShape
from ffjax.ir.trace import Program

_MORE = ("x", "y", "z", "w")
"""Names for an axis beside those of a region."""


def regions_by_hand(program: Program) -> list[tuple[JaxprEqn, Manual]]:
    """The `shard_map` regions of a program, loops and branches included; without those over a single device."""
    found: list[JaxprEqn] = []
    walk(program.jaxpr, lambda eqn: found.append(eqn) if eqn.primitive.name == NAME else None)
    return [(eqn, own) for eqn, own in ((e, manual(e)) for e in found) if own.axes.axes]


def mesh_by_hand(program: Program, devices: int) -> MeshShape | None:
    """The mesh on so many devices on which most of a program's regions run by their specs; None if none does."""
    regions = [own for _, own in regions_by_hand(program)]
    meshes = dict.fromkeys(own.mesh for own in regions if own.mesh.devices == devices)
    meshes.update(dict.fromkeys(_widened(own.axes, devices) for own in regions if devices % own.axes.devices == 0))
    runs = Counter({mesh: sum(own.runs_on(mesh) for own in regions) for mesh in meshes})
    return max(meshes, key=lambda mesh: runs[mesh], default=None)


def check_by_hand(program: Program, mesh: MeshShape | None, devices: int) -> None:
    """Says which regions cannot run by their specs on the plan's mesh (None: on none that would be tried), and why.

    Warns once of those that run over a mesh of their own, whole to the plan, and of those that leave devices idle.

    Raises:
      PlanError: for a region that cannot run on so many devices at all.
    """
    whole: dict[str, None] = {}  # each line once: a gradient has a region of its own there
    repeated: dict[str, None] = {}
    for eqn, own in regions_by_hand(program):
        where = f"{compat.source_line(eqn)} over {own.axes.as_dict()}"
        if mesh is not None and own.runs_on(mesh):
            if own.mesh.devices < devices:
                repeated[where] = None
        elif own.mesh.devices == devices:
            whole[where] = None
        else:
            raise PlanError(
                f"{program.name} has a shard_map region at {where}, for {own.mesh.devices} devices; the plan is for "
                f"{devices}{'' if mesh is None else f', mesh {mesh.as_dict()}'}. Remedy: make its mesh of the devices "
                "that the plan is for, or plan for as many as it has, with a mesh= that has its axes."
            )
    if whole:
        has = "" if mesh is None else f", which is {mesh.as_dict()}"
        _warn(
            f"{program.name} has shard_map regions whose axes the plan's mesh lacks{has}: {'; '.join(whole)}. They run "
            "over their own mesh, and what surrounds them is gathered. Remedy: a mesh= that has their axes."
        )
    if repeated:
        _warn(
            f"{program.name} has shard_map regions for fewer than the plan's {devices} devices: {'; '.join(repeated)}. "
            "The others repeat them. Remedy: make their mesh of all devices."
        )


def _widened(axes: MeshShape, devices: int) -> MeshShape:
    """These axes behind one more, so that there are as many devices."""
    if axes.devices == devices:
        return axes
    name = next(n for n in _MORE if n not in axes.axes)
    return MeshShape((name, *axes.axes), (devices // axes.devices, *axes.sizes))


def _warn(what: str) -> None:
    warnings.warn(what, FfjaxWarning, stacklevel=7)
