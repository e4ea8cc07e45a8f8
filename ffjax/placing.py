"""Arrays where a sharding wants them: from the host, from one device, from any other sharding.

No copy that is whole is made on the way. JAX moves an array to other devices, or to other pieces, through the host's
memory, whole; here each device is sent the pieces that it lacks by the devices that have them.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from ffjax.errors import PlanError, TraceError
from ffjax.ir.compat import is_extended

Box = tuple[tuple[int, int], ...]
"""For each dimension where a piece starts and ends."""


def place(array: Any, sharding: NamedSharding, *, alias: bool = True) -> jax.Array:
    """An array as the sharding has it; the array itself if it is there.

    One that is there by another name (of a mesh, of an axis) takes the sharding's, or `jax.jit` would compile for each.

    Args:
      array: on the host (every process has all of it), or a `jax.Array`.
      alias: whether pieces that are there already may be shared with `array`, which then goes when they are donated.

    Raises:
      PlanError: where pieces would have to go to another process that has no part in the array's devices.
      TraceError: for a tracer.
    """
    if isinstance(array, jax.core.Tracer):
        raise TraceError(
            f"a step under ffjax.autoshard was called with a traced {array.aval}, inside jax.jit or another "
            "transformation. Remedy: transform the function that autoshard was given; autoshard compiles it by itself."
        )
    if isinstance(array, jax.Array):
        return array if array.sharding == sharding else move(array, sharding, alias=alias)
    if sharding.is_fully_addressable or np.ndim(array) == 0:
        placed: jax.Array = jax.device_put(array, sharding)
        return placed
    whole = np.asarray(array)
    dtype = jax.dtypes.canonicalize_dtype(whole.dtype)
    return jax.make_array_from_callback(whole.shape, sharding, lambda index: whole[index].astype(dtype, copy=False))


def apart(leaves: Sequence[Any]) -> Sequence[Any]:
    """The leaves, with a copy of each array that comes again: a process that donates one buffer twice crashes.

    A target network that starts as the network itself is such a case.
    """
    if len({id(leaf) for leaf in leaves}) == len(leaves):
        return leaves
    seen: set[int] = set()
    found = []
    for leaf in leaves:
        found.append(leaf.copy() if isinstance(leaf, jax.Array) and id(leaf) in seen else leaf)
        seen.add(id(leaf))
    return found


def move(array: jax.Array, sharding: NamedSharding, *, alias: bool = True) -> jax.Array:
    """A `jax.Array` in another sharding, over the same devices or others; see `place`."""
    if is_extended(array.dtype):
        # A typed PRNG key: its words are an array with one dimension more.
        words = NamedSharding(sharding.mesh, PartitionSpec(*_entries(sharding.spec, array.ndim), None))
        moved = place(jax.random.key_data(array), words, alias=alias)
        key: jax.Array = jax.jit(_wrap, static_argnums=1, out_shardings=sharding)(moved, jax.random.key_impl(array))
        return key
    if array.weak_type:  # of a Python number: assembled from pieces it would be taken for another type
        number: jax.Array = jax.device_put(array, sharding, may_alias=None if alias else False)
        return number
    if array.is_fully_addressable and sharding.is_fully_addressable:
        return _from_pieces(array, sharding, alias)
    if array.is_fully_addressable:
        return place(np.asarray(array), sharding)  # of one process: it is on its own devices, whole
    if array.sharding.device_set == sharding.device_set:
        resharded: jax.Array = jax.jit(_identity, out_shardings=sharding)(array)
        return resharded
    raise PlanError(
        f"an array of shape {list(array.shape)} is on {len(array.sharding.device_set)} devices of several processes "
        f"and cannot go to {len(sharding.device_set)} others. Remedy: save and restore it there (ffjax.checkpoint)."
    )


def process_shape(shape: Sequence[int], sharding: NamedSharding) -> tuple[int, ...]:
    """The shape of what this process's devices hold of an array together: what its data loader has to read."""
    boxes = [_box(index, shape) for index in sharding.addressable_devices_indices_map(tuple(shape)).values()]
    return tuple(sum(stop - start for start, stop in {box[d] for box in boxes}) for d in range(len(shape)))


def _from_pieces(array: jax.Array, sharding: NamedSharding, alias: bool) -> jax.Array:
    """Assembles each device's piece of the result from pieces of the array."""
    held: dict[Box, dict[jax.Device, jax.Array]] = {}
    for shard in array.addressable_shards:
        held.setdefault(_box(shard.index, array.shape), {})[shard.device] = shard.data
    made = []
    for turn, (device, index) in enumerate(sharding.addressable_devices_indices_map(array.shape).items()):
        wanted = _box(index, array.shape)
        piece: jax.Array | None = None
        for box, copies in held.items():
            common = tuple((max(a, c), min(b, d)) for (a, b), (c, d) in zip(box, wanted, strict=True))
            if any(start >= stop for start, stop in common) and array.size:
                continue
            # Those who have a copy take turns in sending it.
            data = copies[device] if device in copies else list(copies.values())[turn % len(copies)]
            if common != box:
                offset = [start - begin for (start, _), (begin, _) in zip(common, box, strict=True)]
                data = _slice(data, offset, tuple(stop - start for start, stop in common))
            elif not alias and data.devices() == {device}:
                data = jax.device_put(data, device, may_alias=False)
            data = jax.device_put(data, device)
            if common == wanted:
                piece = data
                break
            if piece is None:
                piece = jnp.zeros([stop - start for start, stop in wanted], array.dtype, device=device)
            offset = [start - begin for (start, _), (begin, _) in zip(common, wanted, strict=True)]
            piece = _update(piece, data, offset)
        assert piece is not None  # the pieces of an array cover it
        made.append(piece)
    return jax.make_array_from_single_device_arrays(array.shape, sharding, made)


def _box(index: tuple[slice, ...] | None, shape: Sequence[int]) -> Box:
    assert index is not None  # only of devices of other processes
    return tuple(s.indices(n)[:2] for s, n in zip(index, shape, strict=True))


def _entries(spec: PartitionSpec, rank: int) -> tuple[Any, ...]:
    return (*spec, *[None] * (rank - len(spec)))


@functools.partial(jax.jit, static_argnums=2)
def _slice(array: jax.Array, start: Sequence[int], sizes: tuple[int, ...]) -> jax.Array:
    return jax.lax.dynamic_slice(array, start, sizes)


@functools.partial(jax.jit, donate_argnums=0)
def _update(array: jax.Array, piece: jax.Array, start: Sequence[int]) -> jax.Array:
    return jax.lax.dynamic_update_slice(array, piece, start)


def _identity(array: jax.Array) -> jax.Array:
    return array


def _wrap(words: jax.Array, impl: Any) -> jax.Array:
    key: jax.Array = jax.random.wrap_key_data(words, impl=impl)
    return key
