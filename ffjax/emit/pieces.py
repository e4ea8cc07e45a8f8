"""Ops that run on each device's pieces inside `shard_map`: those that the partitioner cannot split, or would sum up.

Partial sums leave it side by side, in a new leading dimension that is split over the axes of the sum, and are added
up outside: to the partitioner that is an ordinary reduction, all-reduced or reduce-scattered as any other. Those that
are to wait for their reduction keep that dimension, and ops that are linear in them run on it as on any other.
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
    pending: tuple[str, ...] = (),
) -> list[jax.Array]:
    """The results of an equation, each the sum over the mesh axes `summed` of what the devices make of their pieces.

    With `pending` axes they have one dimension more, in front: the terms of the sum over these, side by side.
    """
    apart = [axes for axes in (summed, pending) if axes]

    def local(*pieces: jax.Array) -> tuple[jax.Array, ...]:
        params = piece_params(eqn, [x.shape for x in pieces])
        results = compat.bind(eqn, pieces, params)
        return tuple(jax.lax.expand_dims(x, range(len(apart))) for x in results)

    specs = tuple(PartitionSpec(*apart, *spec) for spec in out_specs)
    made = jax.shard_map(local, mesh=mesh, in_specs=tuple(in_specs), out_specs=specs, check_vma=False)(*operands)
    return [add_up(x) for x in made] if summed else list(made)


def add_up(terms: jax.Array) -> jax.Array:
    """The sum over the leading dimension. Not `jnp.sum`, which adds in a wider type: that would be communicated."""
    return jax.lax.reduce_sum(terms, (0,))


def bind_beside(eqn: JaxprEqn, operands: Sequence[jax.Array]) -> jax.Array:
    """A linear equation's result on terms of sums side by side, in a leading dimension of their own."""
    params = dict(eqn.params)
    if eqn.primitive.name == "transpose":
        params["permutation"] = (0, *(d + 1 for d in params["permutation"]))
    return compat.bind(eqn, operands, params)[0]
