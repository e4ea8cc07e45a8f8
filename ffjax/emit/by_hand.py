"""The user's own `shard_map` regions in an emitted program: over the plan's mesh, where it has their axes.

Axes that the user left to the partitioner are manual too: what enters and leaves a region is whole along them, so each
device along them does the same. Only where a region has sharding constraints inside are they left to it.
"""

from __future__ import annotations

from collections.abc import Sequence

import jax
import numpy as np
from jax.sharding import AbstractMesh, AxisType, Mesh

from ffjax.ir import compat
from ffjax.ir.compat import JaxprEqn
from ffjax.ir.manual import manual
from ffjax.ir.spec import MeshShape


def bind_by_hand(eqn: JaxprEqn, operands: Sequence[jax.Array], mesh: Mesh | AbstractMesh) -> list[jax.Array]:
    """The results of a `shard_map` equation on the devices of a mesh."""
    over = _mesh_for(eqn, mesh)

    def local(*pieces: jax.Array) -> tuple[jax.Array, ...]:
        return tuple(compat.run_here(eqn.params["jaxpr"], pieces))

    mapped = jax.shard_map(
        local,
        mesh=over,
        in_specs=tuple(eqn.params["in_specs"]),
        out_specs=tuple(eqn.params["out_specs"]),
        axis_names=frozenset(over.axis_names),
        check_vma=eqn.params["check_vma"],
    )
    return list(mapped(*operands))


def _mesh_for(eqn: JaxprEqn, mesh: Mesh | AbstractMesh) -> Mesh | AbstractMesh:
    """The plan's mesh, with the region's axes of one device; where it lacks axes the region's own, over its devices."""
    shape = MeshShape(tuple(mesh.axis_names), tuple(mesh.axis_sizes))
    sizes = compat.mesh_sizes(eqn)
    if manual(eqn).runs_on(shape):
        missing = [axis for axis in compat.manual_axes(eqn) if axis not in shape.axes]
        sizes = {**shape.as_dict(), **dict.fromkeys(sorted(missing), 1)}
        if not missing:
            return mesh
    types = (AxisType.Auto,) * len(sizes)
    if isinstance(mesh, AbstractMesh):
        return AbstractMesh(tuple(sizes.values()), tuple(sizes), axis_types=types)
    return Mesh(np.reshape(mesh.devices, tuple(sizes.values())), tuple(sizes), axis_types=types)
