"""Ops that run on each device's pieces inside `shard_map`: those that the partitioner cannot split, or would sum up.

So do windows over images that are cut: each device fetches the edges that it needs of its neighbours' pieces
(`ffjax.ir.halo`). The partitioner can do that too, for one convolution over one axis; it adds up a kernel's gradient
over all devices whatever else is split, and sends several times what is needed for a pooling's gradient.

Partial sums leave it side by side, in a new leading dimension that is split over the axes of the sum, and are added
up outside: to the partitioner that is an ordinary reduction, all-reduced or reduce-scattered as any other. Those that
are to wait for their reduction keep that dimension, and ops that are linear in them run on it as on any other.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AbstractMesh, Mesh, PartitionSpec

from ffjax.ir import compat
from ffjax.ir.compat import JaxprEqn
from ffjax.ir.extra_rules import Params, piece_params
from ffjax.ir.halo import Cut, beyond, halos, split_halos
from ffjax.ir.spec import MeshShape


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

    An image that is cut where a window slides over it comes `with_edges`. With `pending` axes results have one
    dimension more, in front: the terms of the sum over these, side by side.
    """
    apart = [axes for axes in (summed, pending) if axes]
    cut = image_cuts(eqn, in_specs, mesh)

    def local(*pieces: jax.Array) -> tuple[jax.Array, ...]:
        pieces, params = _padded(eqn, pieces, cut)
        results = compat.bind(eqn, pieces, params)
        if cut and cut[0].halo.returned:
            results = [_given_back(x, cut) for x in results]
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


def image_cuts(eqn: JaxprEqn, in_specs: Sequence[PartitionSpec], mesh: Mesh | AbstractMesh) -> list[Cut]:
    """The dimensions of an equation's image that are cut where a window slides over it."""
    found = halos(eqn)
    if not found:
        return []
    spec = in_specs[found[0].operand]
    axes = tuple(() if dim is None else (dim,) if isinstance(dim, str) else tuple(dim) for dim in spec)
    rank = len(compat.shape_of(eqn.invars[found[0].operand]))
    return split_halos(
        eqn, axes + ((),) * (rank - len(axes)), MeshShape(tuple(mesh.axis_names), tuple(mesh.axis_sizes))
    )


def with_edges(eqn: JaxprEqn, image: jax.Array, mesh: Mesh | AbstractMesh, spec: PartitionSpec) -> jax.Array:
    """The image over which an equation slides its window, each piece with the edges that it needs of its neighbours.

    The pieces lie side by side, so that what two of them have is there twice: to be read by `bind_on_pieces` only.
    """
    cut = image_cuts(eqn, [spec] * len(eqn.invars), mesh)

    def local(piece: jax.Array) -> jax.Array:
        for halo, axes, count in cut:
            piece = _extended(piece, halo.dim, halo.widths(count), axes, count, _beyond(eqn, piece.dtype))
        return piece

    return jax.shard_map(local, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False)(image)


def _padded(eqn: JaxprEqn, pieces: tuple[jax.Array, ...], cut: Sequence[Cut]) -> tuple[tuple[jax.Array, ...], Params]:
    """Pieces, and the equation's parameters for them: with the padding that is left beside an image's edges."""
    shapes = [list(x.shape) for x in pieces]
    for halo, _, count in cut:
        shapes[halo.operand][halo.dim] -= sum(halo.widths(count))
    params = piece_params(eqn, [tuple(shape) for shape in shapes])
    if not cut:
        return pieces, params
    operand = cut[0].halo.operand
    image = pieces[operand]
    padding = [tuple(p) for p in cast("Sequence[tuple[int, int]]", params["padding"])]
    for halo, _, count in cut:
        low, high = halo.padding(count)
        if halo.returned:
            low, high = max(0, low), max(0, high)  # what no window reads at the end is a result all the same
        elif eqn.primitive.name != "conv_general_dilated":
            # Only a convolution takes padding of less than nothing.
            size = image.shape[halo.dim]
            image = jax.lax.slice_in_dim(image, max(0, -low), size - max(0, -high), axis=halo.dim)
            low, high = max(0, low), max(0, high)
        padding[halo.window] = (low, high)
    return (*pieces[:operand], image, *pieces[operand + 1 :]), {**params, "padding": tuple(padding)}


def _extended(
    image: jax.Array, dim: int, widths: tuple[int, int], axes: tuple[str, ...], count: int, outside: jax.Array
) -> jax.Array:
    """A piece between the edges of its neighbours; at the ends of the image, of what is beyond it."""
    before, behind = widths
    size = image.shape[dim]
    name = axes[0] if len(axes) == 1 else axes
    place = jax.lax.axis_index(name)
    parts = [image]
    if before:
        edge = jax.lax.slice_in_dim(image, size - before, size, axis=dim)
        edge = jax.lax.ppermute(edge, name, [(i, i + 1) for i in range(count - 1)])
        parts.insert(0, jnp.where(place == 0, outside, edge))
    if behind:
        edge = jax.lax.slice_in_dim(image, 0, behind, axis=dim)
        edge = jax.lax.ppermute(edge, name, [(i + 1, i) for i in range(count - 1)])
        parts.append(jnp.where(place == count - 1, outside, edge))
    return jax.lax.concatenate(parts, dim)


def _given_back(result: jax.Array, cut: Sequence[Cut]) -> jax.Array:
    """A piece of a result, with what its neighbours have of it; what it has of theirs is sent to them."""
    for halo, axes, count in reversed(cut):
        before, behind = halo.widths(count)
        name, dim = axes[0] if len(axes) == 1 else axes, halo.dim
        size = result.shape[dim] - before - behind
        own = jax.lax.slice_in_dim(result, before, before + size, axis=dim)
        if before:
            edge = jax.lax.slice_in_dim(result, 0, before, axis=dim)
            edge = jax.lax.ppermute(edge, name, [(i + 1, i) for i in range(count - 1)])
            own = own + _placed(edge, dim, size - before, 0)
        if behind:
            edge = jax.lax.slice_in_dim(result, before + size, before + size + behind, axis=dim)
            edge = jax.lax.ppermute(edge, name, [(i, i + 1) for i in range(count - 1)])
            own = own + _placed(edge, dim, 0, size - behind)
        result = own
    return result


def _placed(edge: jax.Array, dim: int, before: int, behind: int) -> jax.Array:
    """An edge at its place among zeros."""
    room = [(before, behind, 0) if d == dim else (0, 0, 0) for d in range(edge.ndim)]
    return jax.lax.pad(edge, jnp.zeros((), edge.dtype), room)


def _beyond(eqn: JaxprEqn, dtype: np.dtype) -> jax.Array:
    match beyond(eqn):
        case "zero":
            return jnp.zeros((), dtype)
        case "lowest":
            return jnp.array(-jnp.inf if jnp.issubdtype(dtype, jnp.inexact) else jnp.iinfo(dtype).min, dtype)
        case "highest":
            return jnp.array(jnp.inf if jnp.issubdtype(dtype, jnp.inexact) else jnp.iinfo(dtype).max, dtype)
