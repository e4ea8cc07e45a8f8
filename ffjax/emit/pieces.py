"""Ops that the partitioner cannot split, run on each device's pieces inside `shard_map`.

Partial sums leave it side by side, in a new leading dimension that is split over the axes of the sum, and are added
up outside: to the partitioner that is an ordinary reduction, all-reduced or reduce-scattered as any other.
"""

from __future__ import annotations

from collections.abc import Sequence

import jax
from jax.sharding import AbstractMesh, Mesh, PartitionSpec

from ffjax.ir import compat
from ffjax.ir.compat import JaxprEqn
from ffjax.ir.extra_rules import piece_params


def bind_on_pieces(
    eqn: JaxprEqn,
    operands: Sequence[jax.Array],
    mesh: Mesh | AbstractMesh,
    in_specs: Sequence[PartitionSpec],
    out_specs: Sequence[PartitionSpec],
    summed: tuple[str, ...],
) -> list[jax.Array]:
    """The results of an equation, each the sum over the mesh axes `summed` of what the devices make of their pieces."""

    def local(*pieces: jax.Array) -> tuple[jax.Array, ...]:
        params = piece_params(eqn, [x.shape for x in pieces])
        results = compat.bind(eqn, pieces, params)
        return tuple(x[None] for x in results) if summed else tuple(results)

    specs = tuple(PartitionSpec(summed, *spec) if summed else spec for spec in out_specs)
    apart = jax.shard_map(local, mesh=mesh, in_specs=tuple(in_specs), out_specs=specs, check_vma=False)(*operands)
    # Not `jnp.sum`, which adds up in a wider type: that is what would be communicated.
    return [jax.lax.reduce_sum(x, (0,)) for x in apart] if summed else list(apart)
