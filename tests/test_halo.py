"""Images cut over mesh axes: which edges are exchanged, what that costs, and that the numbers are the same."""

from __future__ import annotations

import functools
from collections import Counter
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import ffjax
from ffjax.cost.cluster import Cluster
from ffjax.cost.hlo.collectives import collectives_of
from ffjax.emit.oracle import explicit_collectives
from ffjax.ir.graph import build_graph
from ffjax.ir.halo import exchanges, halos
from ffjax.ir.regions import find_regions
from ffjax.ir.spec import MeshShape
from ffjax.planning.tracing import trace_step
from ffjax.strategies.search import search
from ffjax.testing import assert_same_numerics

MESH = MeshShape(("x", "y"), (2, 4))
SIDE = 32


def convolution(x: jax.Array, w: jax.Array, stride: int, padding: str = "SAME") -> jax.Array:
    return lax.conv_general_dilated(x, w, (stride, stride), padding, dimension_numbers=("NHWC", "HWIO", "NHWC"))


def step(params: dict[str, jax.Array], batch: dict[str, jax.Array]) -> tuple[dict[str, jax.Array], jax.Array]:
    """A small residual net: a stem, overlapping pooling, a block that halves the image, a dense head."""

    def loss(params: dict[str, jax.Array]) -> jax.Array:
        h = jax.nn.relu(convolution(batch["image"], params["stem"], 1))
        h = lax.reduce_window(h, -jnp.inf, lax.max, (1, 3, 3, 1), (1, 2, 2, 1), "SAME")
        shortcut = convolution(h, params["shortcut"], 2)
        h = convolution(jax.nn.relu(convolution(h, params["first"], 2)), params["second"], 1)
        logits = jax.nn.relu(h + shortcut).mean((1, 2)) @ params["head"]
        return jnp.mean((logits - batch["target"]) ** 2)

    value, grads = jax.value_and_grad(loss)(params)
    return jax.tree.map(lambda p, g: p - 0.1 * g, params, grads), value


def arguments(batch: int = 8) -> tuple[Any, Any]:
    rng = np.random.default_rng(0)

    def array(*shape: int) -> jax.Array:
        return jnp.asarray(rng.normal(size=shape), jnp.float32) * 0.3

    params = {
        "stem": array(5, 5, 3, 8),
        "shortcut": array(1, 1, 8, 16),
        "first": array(3, 3, 8, 16),
        "second": array(3, 3, 16, 16),
        "head": array(16, 4),
    }
    return params, {"image": array(batch, SIDE, SIDE, 3), "target": array(batch, 4)}


@functools.cache
def planned(axes: int) -> ffjax.Plan:
    mesh = {"x": 8} if axes == 1 else {"x": 2, "y": 4}
    return ffjax.plan(step, *arguments(), cluster=Cluster.named("cpu"), mesh=mesh, strategy="spatial")


WIDTHS = {
    "5x5": (5, 1, (2, 2)),
    "3x3 strided": (3, 2, (0, 1)),
    "1x1 strided": (1, 2, (0, 0)),
    "patches": (4, 4, (0, 0)),
    "even": (4, 1, (1, 2)),
}


@pytest.mark.parametrize("case", WIDTHS)
def test_a_window_needs_what_it_reaches_over(case: str) -> None:
    width, stride, expected = WIDTHS[case]
    x, w = (jax.ShapeDtypeStruct(s, jnp.float32) for s in ((2, 32, 16, 4), (width, width, 4, 8)))
    (eqn,) = jax.make_jaxpr(lambda x, w: convolution(x, w, stride))(x, w).jaxpr.eqns
    assert [h.widths(4) for h in halos(eqn)] == [expected, expected]
    assert all(h.fits(4) for h in halos(eqn))


def test_an_image_that_is_not_cut_as_its_result_is_not_split() -> None:
    x, w = (jax.ShapeDtypeStruct(s, jnp.float32) for s in ((2, 32, 32, 4), (3, 3, 4, 8)))
    (eqn,) = jax.make_jaxpr(lambda x, w: convolution(x, w, 1, "VALID"))(x, w).jaxpr.eqns
    assert halos(eqn) == ()


def test_pieces_too_small_for_their_neighbours_edges_are_no_candidates() -> None:
    x, w = (jax.ShapeDtypeStruct(s, jnp.float32) for s in ((2, 16, 16, 4), (7, 7, 4, 8)))
    (eqn,) = jax.make_jaxpr(lambda x, w: convolution(x, w, 1))(x, w).jaxpr.eqns
    assert [halos(eqn)[0].fits(n) for n in (2, 4, 8, 16, 3)] == [True, True, False, False, False]


def test_corners_come_with_the_second_dimension() -> None:
    x, w = (jax.ShapeDtypeStruct(s, jnp.float32) for s in ((2, 32, 16, 4), (3, 3, 4, 8)))
    (eqn,) = jax.make_jaxpr(lambda x, w: convolution(x, w, 1))(x, w).jaxpr.eqns
    piece = 4.0 * 2 * (32 // 2) * (16 // 4) * 4
    found = exchanges(eqn, ((), ("x",), ("y",), ()), MESH, piece)
    assert [(c.axes, c.bytes) for c in found] == [
        (("x",), piece / 16),
        (("x",), piece / 16),
        (("y",), piece * 18 / 16 / 4),
        (("y",), piece * 18 / 16 / 4),
    ]


@pytest.mark.parametrize("axes", [1, 2])
def test_spatial_parallelism_means_images_in_pieces(axes: int) -> None:
    plan = planned(axes)
    specs = {a.path: a.spec for a in plan.args}
    image = next(spec for path, spec in specs.items() if path.endswith("image"))
    assert image == ((), ("x",), (), ()) or image == ((), (), ("x",), ()) if axes == 1 else image[0] == ("x",)
    assert {a for dim in image for a in dim} == set(plan.mesh.axes)
    kinds = {c.kind for c in plan.estimate.collectives}
    assert kinds == {"collective_permute", "all_reduce"}  # edges, gradients: no image is ever gathered
    moved = sum(c.bytes for c in plan.estimate.collectives if c.kind == "collective_permute")
    assert 0 < moved < 4.0 * 8 * SIDE * SIDE * 8


@pytest.mark.parametrize("axes", [1, 2])
def test_planned_edges_are_the_emitted_ones(axes: int) -> None:
    plan = planned(axes)
    assert plan.layout is not None
    sides = []
    for found in (plan.layout.collectives(), explicit_collectives(plan.lower())):
        counts: Counter[Any] = Counter()
        for c in found:
            counts[c.collective.kind, c.collective.axes, c.collective.bytes] += c.count
        sides.append(counts)
    assert sides[0] == sides[1]
    compiled = collectives_of(plan.lower(jax.devices()).compile(), plan.mesh)
    # A convolution and its kernel's gradient need the same edges, which are fetched once.
    ours, theirs = (
        Counter(c.collective for c in found for _ in range(round(c.count)) if c.collective.kind == "collective_permute")
        for found in (plan.layout.collectives(), compiled)
    )
    assert ours == theirs


@pytest.mark.parametrize("mesh", [{"x": 8}, {"x": 2, "y": 4}, {"x": 2, "y": 2, "z": 2}])
def test_same_numbers_as_unsharded(mesh: dict[str, int]) -> None:
    sharded = ffjax.autoshard(step, mesh=mesh, strategy="spatial")
    assert_same_numerics(sharded(*arguments()), jax.jit(step)(*arguments()))


def test_the_search_splits_images_where_the_batch_is_too_small() -> None:
    """Four images on eight devices: the free search is never worse than spatial parallelism, which beats the batch."""
    cluster = Cluster.named("h100", hosts=1, devices_per_host=8)
    args = jax.eval_shape(lambda: arguments(batch=4))
    big = {**args[1], "image": jax.ShapeDtypeStruct((4, 4096, 4096, 3), jnp.float32)}
    wide = find_regions(build_graph(trace_step(step, (args[0], big), {})))
    result = search(wide, cluster, budget_bytes=80e9, meshes=[MeshShape(("x", "y"), (2, 4))])
    best = {name: min(f.predicted_s for f in result.found if f.strategy == name) for name in ("spatial", "auto")}
    others = [f.predicted_s for f in result.found if f.strategy in ("data_parallel", "fsdp", "tensor_parallel")]
    assert result.best.predicted_s <= min(best.values())
    assert best["spatial"] < 0.9 * min(others)


def test_memory_has_images_beside_their_neighbours_edges() -> None:
    x, w = (jax.ShapeDtypeStruct(s, jnp.float32) for s in ((8, 256, 256, 4), (3, 3, 4, 4)))

    def both(x: jax.Array, y: jax.Array, w: jax.Array) -> jax.Array:
        return (convolution(x, w, 1) + convolution(y, w, 1)).sum()  # no result in whose memory a copy could lie

    plan = ffjax.plan(both, x, x, w, cluster=Cluster.named("cpu"), mesh={"x": 8}, strategy="spatial")
    held = {what: size for what, size in plan.estimate.largest if what.startswith("copy with edges of ")}
    assert list(held.values()) == [4.0 * 8 * 256 * 256 * 4 / 8]


def test_without_images_spatial_parallelism_says_so() -> None:
    with pytest.raises(ffjax.errors.PlanError, match="convolutions or pooling"):
        ffjax.plan(lambda x, w: x @ w, jnp.ones((8, 8)), jnp.ones((8, 8)), mesh={"x": 8}, strategy="spatial")
