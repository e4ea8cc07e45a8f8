"""Chains of moves: XLA compiles each to the collective that it names, for any pair of specs."""

from __future__ import annotations

import itertools
import math
import random

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from ffjax.cost.hlo.collectives import collectives_of
from ffjax.ir.reshard import reshard_steps
from ffjax.ir.reshard_chain import reshard_chain
from ffjax.ir.spec import MeshShape, Spec, divides, format_spec, local_shape

# Pairs compiled for each mesh and rank. A wider run found no difference: all 452 pairs of 4x2 at ranks 2 and 3,
# and 500 random ones of 2x2x2 at each.
COMPILED = 12


def all_specs(mesh: MeshShape, rank: int) -> list[Spec]:
    found: set[Spec] = set()
    for n in range(len(mesh.axes) + 1):
        for order in itertools.permutations(mesh.axes, n):
            for places in itertools.combinations_with_replacement(range(rank), n):
                found.add(tuple(tuple(a for a, p in zip(order, places, strict=True) if p == d) for d in range(rank)))
    return sorted(found)


@pytest.mark.parametrize("rank", [2, 3])
def test_compiles_to_exactly_what_it_names(mesh_shape: MeshShape, rank: int) -> None:
    shape = (32, 64, 128)[:rank]
    specs = all_specs(mesh_shape, rank)
    pairs = [(a, b) for a, b in itertools.product(specs, specs) if a != b]
    for source, target in random.Random(0).sample(pairs, min(COMPILED, len(pairs))):
        assert compiled(source, target, mesh_shape, shape) == planned(source, target, mesh_shape, shape), (
            f"{format_spec(source)} -> {format_spec(target)}"
        )


def planned(source: Spec, target: Spec, mesh: MeshShape, shape: tuple[int, ...]) -> list[tuple[str, float]]:
    piece = 4 * math.prod(local_shape(shape, source, mesh))
    steps = [hop.step for hop in reshard_chain(source, target, mesh, shape)]
    return sorted((step[0], step[2] * piece) for step in steps if step is not None)


def compiled(source: Spec, target: Spec, mesh: MeshShape, shape: tuple[int, ...]) -> list[tuple[str, float]]:
    devices = np.array(jax.devices()[: mesh.devices]).reshape(mesh.sizes)
    real = Mesh(devices, mesh.axes, axis_types=(AxisType.Auto,) * len(mesh.axes))

    def sharding(spec: Spec) -> NamedSharding:
        return NamedSharding(real, P(*(dim or None for dim in spec)))

    def f(x: jax.Array) -> jax.Array:
        x = jax.lax.with_sharding_constraint(jnp.sin(x), sharding(source))
        for hop in reshard_chain(source, target, mesh, shape):
            x = jax.lax.with_sharding_constraint(x, sharding(hop.spec))
        return jax.lax.with_sharding_constraint(jnp.cos(x), sharding(target))

    argument = jax.ShapeDtypeStruct(shape, jnp.float32, sharding=sharding(source))
    found = collectives_of(jax.jit(f).lower(argument).compile(), mesh)
    return sorted((c.collective.kind, c.collective.bytes) for c in found)


def test_a_plain_move_is_one_hop_and_costs_what_shardy_says(mesh_shape: MeshShape) -> None:
    for source, target in itertools.product(all_specs(mesh_shape, 2), repeat=2):
        hops = reshard_chain(source, target, mesh_shape)
        assert (hops[-1].spec if hops else source) == target
        if len(hops) == 1:
            assert reshard_steps(source, target, mesh_shape) == tuple(h.step for h in hops if h.step is not None)


def test_no_hop_splits_a_dimension_unevenly() -> None:
    mesh, shape = MeshShape(("x", "y", "z"), (2, 2, 2)), (2, 8)
    specs = [s for s in all_specs(mesh, 2) if divides(shape, s, mesh)]
    for source, target in itertools.product(specs, specs):
        assert all(divides(shape, hop.spec, mesh) for hop in reshard_chain(source, target, mesh, shape))


def test_a_dimension_that_is_split_unevenly_already_can_be_gathered() -> None:
    mesh = MeshShape(("x", "y"), (4, 2))
    chain = reshard_chain((("x",), ()), ((), ("y",)), mesh, (6, 8))
    assert chain[-1].spec == ((), ("y",))


def test_a_dear_axis_is_kept_out_of_the_large_collective() -> None:
    mesh = MeshShape(("x", "y"), (2, 2))
    source, target = (("x",), ("y",)), ((), ())

    def first(prices: tuple[float, float]) -> tuple[str, ...]:
        step = reshard_chain(source, target, mesh, None, prices)[0].step
        assert step is not None
        return step[1]

    assert first((10.0, 1.0)) == ("x",)
    assert first((1.0, 10.0)) == ("y",)


def test_ranks_must_agree() -> None:
    with pytest.raises(ValueError, match="ranks differ"):
        reshard_chain((("x",),), (("x",), ()), MeshShape(("x",), (8,)))
