"""`shard_map` regions of the user's own: run by their specs on their own mesh, planned around."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh
from jax.sharding import PartitionSpec as P
from programs import Array, Case, descend, values, weights

from conformance.harness import idiom


def over(**axes: int) -> Mesh:
    devices = np.array(jax.devices()[:8]).reshape(tuple(axes.values()))
    return Mesh(devices, tuple(axes), axis_types=(AxisType.Auto,) * len(axes))


def case(loss_fn: Any) -> Case:
    def step(w: Array, x: Array) -> tuple[Any, Array]:
        return descend(w, lambda w: loss_fn(w, x))

    return Case(step=step, args=(weights(16, 16), values(8, 16)), carries=0)


@idiom(mesh={"data": 8})
def data_parallel_loss_by_hand() -> Case:
    """The loss of each device's examples, and its mean over devices; the gradient's sum is the transpose of that."""

    def local(x: Array, w: Array) -> Array:
        return jax.lax.pmean((jnp.tanh(x @ w) ** 2).mean(), "data")

    mapped = jax.shard_map(local, mesh=over(data=8), in_specs=(P("data"), P()), out_specs=P())
    return case(lambda w, x: mapped(jnp.sin(x @ w), w))


@idiom(mesh={"data": 8})
def ring_by_hand() -> Case:
    """Pieces that go round all devices in a loop."""

    def local(x: Array, w: Array) -> Array:
        def turn(carried: tuple[Array, Array], _: None) -> tuple[tuple[Array, Array], None]:
            piece, total = carried
            moved = jax.lax.ppermute(piece, "data", [(i, (i + 1) % 8) for i in range(8)])
            return (moved, total + jnp.tanh(piece @ w)), None

        return jax.lax.scan(turn, (x, jnp.zeros_like(x)), None, length=8)[0][1]

    mapped = jax.shard_map(local, mesh=over(data=8), in_specs=(P("data"), P()), out_specs=P("data"))
    return case(lambda w, x: (mapped(x, w) ** 2).mean())


@idiom(mesh={"data": 2, "model": 4})
def tensor_parallel_by_hand() -> Case:
    """Two mesh axes, a sum over one of them, and a dimension that both split, the minor one first."""

    def local(x: Array, up: Array, down: Array) -> Array:
        return jax.lax.psum(jnp.tanh(x @ up) @ down, "model")

    def shifted(w: Array) -> Array:
        return w * (1 + jax.lax.axis_index(("model", "data")))

    mesh = over(data=2, model=4)
    specs = P("data"), P(None, "model"), P("model")
    mapped = jax.shard_map(local, mesh=mesh, in_specs=specs, out_specs=P("data"))
    turned = jax.shard_map(shifted, mesh=mesh, in_specs=P(("model", "data")), out_specs=P(("model", "data")))
    return case(lambda w, x: (mapped(x, turned(w), w) ** 2).mean())


@idiom(mesh={"data": 2, "model": 4})
def partly_automatic_by_hand() -> Case:
    """A region that leaves one axis to the partitioner, with a constraint over it inside."""

    def local(x: Array, w: Array) -> Array:
        hidden = jax.lax.with_sharding_constraint(x @ w, P(None, "model"))
        return jax.lax.pmean((jnp.tanh(hidden) ** 2).mean(), "data")

    mesh = over(data=2, model=4)
    mapped = jax.shard_map(local, mesh=mesh, in_specs=(P("data"), P()), out_specs=P(), axis_names={"data"})
    return case(lambda w, x: mapped(x, w))


@idiom(mesh={"data": 8})
def in_a_loop_by_hand() -> Case:
    """A region in a scan's body, in a `jax.checkpoint`: gathered, sent round, scattered."""

    def local(x: Array, w: Array) -> Array:
        every = jax.lax.all_gather(x, "data", axis=0, tiled=True)
        return jax.lax.psum_scatter(every @ w / 8, "data", scatter_dimension=0, tiled=True)

    mapped = jax.shard_map(local, mesh=over(data=8), in_specs=(P("data"), P()), out_specs=P("data"))

    def loss(w: Array, x: Array) -> Array:
        def layer(h: Array, _: None) -> tuple[Array, None]:
            return h + jnp.tanh(mapped(h, w)), None

        return (jax.lax.scan(jax.checkpoint(layer), x, None, length=3)[0] ** 2).mean()

    return case(loss)
