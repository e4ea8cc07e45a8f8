"""Lowering and jitting an emitted step, for real devices or for a mesh that is not there."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import numpy as np
from jax.sharding import AbstractMesh, AxisType, Mesh

from ffjax.emit.emit import emit, in_shardings, out_shardings
from ffjax.errors import ClusterError
from ffjax.ir import compat
from ffjax.ir.layout import Layout
from ffjax.ir.spec import MeshShape


def device_mesh(shape: MeshShape, devices: Sequence[jax.Device]) -> Mesh:
    """A mesh over the first devices, in their order; raises ClusterError if there are too few."""
    if len(devices) < shape.devices:
        raise ClusterError(
            f"the plan needs {shape.devices} devices (mesh {shape.as_dict()}), but there are {len(devices)}. Remedy: "
            f"run where there are {shape.devices}, plan for fewer, or use ffjax.testing.fake_devices({shape.devices})."
        )
    grid = np.array(devices[: shape.devices], dtype=object).reshape(shape.sizes)
    return Mesh(grid, shape.axes, axis_types=(AxisType.Auto,) * len(shape.axes))


def abstract_mesh(shape: MeshShape) -> AbstractMesh:
    return AbstractMesh(shape.sizes, shape.axes, axis_types=(AxisType.Auto,) * len(shape.axes))


def jitted(layout: Layout, mesh: Mesh | AbstractMesh, *, donate: bool = True) -> jax.stages.Wrapped:
    """The sharded step under `jax.jit`: closures, then the leaves of the arguments, to the leaves of the results."""
    program = layout.graph.program
    offset = len(program.closures)
    donated = tuple(offset + i for i, d in enumerate(program.donated) if d) if donate else ()
    return jax.jit(
        emit(layout, mesh),
        in_shardings=in_shardings(layout, mesh),
        out_shardings=out_shardings(layout, mesh),
        donate_argnums=donated,
        keep_unused=True,
    )


def lower(layout: Layout, devices: Sequence[jax.Device] | None = None) -> jax.stages.Lowered:
    """Lowers the sharded step for some devices, or, without any, for no particular ones."""
    avals = [compat.struct_of(v) for v in layout.graph.program.jaxpr.invars]
    with compat.no_mesh():
        if devices is not None:
            on_devices: jax.stages.Lowered = jitted(layout, device_mesh(layout.mesh, devices)).trace(*avals).lower()
            return on_devices
        traced = jitted(layout, abstract_mesh(layout.mesh)).trace(*avals)
        anywhere: jax.stages.Lowered = traced.lower(lowering_platforms=(jax.default_backend(),))
        return anywhere
