"""Delayed sums: where they are found, what they save, and that they reduce what they must."""

from __future__ import annotations

import functools
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

import ffjax
from ffjax.cost.hlo.collectives import collectives_of
from ffjax.emit.oracle import explicit_collectives
from ffjax.emit.run import device_mesh, jitted, lower
from ffjax.ir.assignment import UNUSED, Assignment
from ffjax.ir.graph import build_graph
from ffjax.ir.layout import Layout
from ffjax.ir.regions import Region, Regions, find_regions
from ffjax.ir.spec import MeshShape
from ffjax.planning.tracing import trace_step
from ffjax.strategies.candidates import candidates
from ffjax.testing import assert_same_numerics, fake_devices

sys.path.insert(0, str(Path(__file__).parent))
from programs import values

MESH = MeshShape(("x", "y"), (4, 2))
Array = jax.Array
Arrays = dict[str, Array]

H, W = values(8, 16), {name: values(16, 32, seed=i) for i, name in enumerate("abc")}
HALF = jnp.bfloat16


def half(x: Array, w: Array) -> Array:
    return (x.astype(HALF) @ w.astype(HALF)).astype(jnp.float32)


STEPS: dict[str, tuple[Callable[[Array, Arrays], object], list[str]]] = {
    "two": (lambda h, w: jnp.tanh(h) @ w["a"] + h @ w["b"], ["dot_general", "dot_general", "add"]),
    "three": (
        lambda h, w: jnp.tanh(h) @ w["a"] + h @ w["b"] - jnp.cos(h) @ w["c"],
        ["dot_general", "dot_general", "add", "dot_general", "sub"],
    ),
    "through linear ops": (
        lambda h, w: jnp.tanh((-(jnp.tanh(h) @ w["a"])).T / 2 - w["b"].T @ jnp.cos(h).T).T,
        ["dot_general", "neg", "transpose", "div", "dot_general", "sub"],
    ),
    "three widened": (
        lambda h, w: half(jnp.tanh(h), w["a"]) + half(h, w["b"]) + half(jnp.cos(h), w["c"]),
        [*["dot_general", "convert_element_type"] * 2, "add", "dot_general", "convert_element_type", "add"],
    ),
    "a term that others read": (lambda h, w: [s := jnp.tanh(h) @ w["a"], jnp.cos(s + h @ w["b"])], []),
    "a term that is whole": (lambda h, w: jnp.tanh(h) @ w["a"] + w["b"][:8], []),
    "other dimensions": (lambda h, w: h @ w["a"] + w["b"][:8] @ (w["c"].T @ w["b"]), []),
    "rounded before they are added": (
        lambda h, w: (jnp.tanh(h) @ w["a"]).astype(HALF) + (h @ w["b"]).astype(HALF),
        [],
    ),
    "a product": (lambda h, w: (jnp.tanh(h) @ w["a"]) * (h @ w["b"]), []),
}


def regions_of(step: Callable[..., object], *args: object) -> Regions:
    return find_regions(build_graph(trace_step(step, args, {})))


def delayed(regions: Regions) -> list[Region]:
    return [r for r in regions.regions if any(dims.pending for dims in r.dims)]


@pytest.mark.parametrize("name", STEPS)
def test_found(name: str) -> None:
    step, ops = STEPS[name]
    regions = regions_of(step, H, W)
    assert [[regions.graph.ops[o].kind for o in r.ops] for r in delayed(regions)] == [ops] * bool(ops)
    for region in delayed(regions):
        assert region.solo
        assert not any(dims.reduced for dims in region.dims[:-1])
        assert region.dims[-1].reduced
        assert not region.dims[-1].pending
        assert not [e for e in regions.edges if e.source == e.target]


def moved(found: object) -> Counter[tuple[object, ...]]:
    total: Counter[tuple[object, ...]] = Counter()
    for entry in found:  # type: ignore[attr-defined]
        total[entry.collective] += entry.count
    return total


def layout_of(regions: Regions, region: Region, assignment: Assignment) -> Layout:
    """Only one region is split."""
    whole = Assignment((UNUSED,) * 2, (UNUSED,) * 2)
    chosen = [assignment if r is region else whole for r in regions.regions]
    return Layout(regions=regions, mesh=MESH, assignments=chosen, axis_prices=(1.0, 1.0))


def check(step: Callable[..., object], args: tuple[object, ...], layout: Layout, expected: object) -> None:
    assert moved(explicit_collectives(lower(layout))) == moved(layout.collectives())
    program = layout.graph.program
    run = jitted(layout, device_mesh(MESH, jax.devices()), donate=False)
    assert_same_numerics(jax.tree.unflatten(program.out_tree, run(*program.closures, *jax.tree.leaves(args))), expected)


def test_under_every_assignment() -> None:
    fake_devices(8)
    step, _ = STEPS["through linear ops"]
    regions = regions_of(step, H, W)
    (region,) = delayed(regions)
    (reduced,) = region.dims[-1].reduced
    found = candidates(regions, region, MESH)
    assert any(set(c.scatter) != {UNUSED} for c in found)
    expected = jax.jit(step)(H, W)
    for assignment in found:
        layout = layout_of(regions, region, assignment)
        sums = [c for c in layout.collectives() if "reduce" in c.collective.kind]
        assert len(sums) == (reduced in assignment.atoms)
        if sums:
            check(step, (H, W), layout, expected)


def test_what_only_one_term_reduces_over_is_reduced_at_once() -> None:
    """A router's gradient sums over experts, that of what it dispatches over experts and their places."""
    fake_devices(8)

    def step(gates: Array, places: Array, queued: Array, router: Array) -> Array:
        kept = gates[..., None] * places[:, None]
        return jnp.einsum("tec,ecd->td", kept, queued) - jnp.tanh(gates) @ router

    args = values(16, 8), values(16, 4), values(8, 4, 32), values(8, 32)
    regions = regions_of(step, *args)
    (region,) = delayed(regions)
    (own,) = (dims.reduced[0] for dims in region.dims[:-1] if dims.reduced)
    (shared,) = region.dims[-1].reduced
    assert (region.sizes[own], region.sizes[shared]) == (4, 8)
    for atoms in ((own, shared), (shared, own)):
        layout = layout_of(regions, region, Assignment(atoms, (UNUSED, UNUSED)))
        axes = [c.collective.axes for c in layout.collectives() if c.collective.kind == "all_reduce"]
        assert sorted(axes) == [("x",), ("y",)]
        check(step, args, layout, jax.jit(step)(*args))


@functools.cache
def attention_plan(strategy: str) -> ffjax.Plan:
    def step(w: Arrays, x: Array) -> tuple[Arrays, Array]:
        def loss(w: Arrays) -> Array:
            inner = jnp.sin(x @ w["in"])
            query, key, value = (jnp.einsum("btd,dhk->bthk", inner, w[name]) for name in "qkv")
            scores = jax.nn.softmax(jnp.einsum("bqhk,bshk->bhqs", query, key))
            return jnp.mean(jnp.einsum("bhqs,bshk,hkd->bqd", scores, value, w["o"]) ** 2)

        value, grads = jax.value_and_grad(loss)(w)
        return jax.tree.map(lambda a, g: a - 0.1 * g, w, grads), value

    w = {name: values(64, 8, 16, seed=i) / 8 for i, name in enumerate("qkv")}
    w |= {"o": values(8, 16, 64) / 8, "in": values(64, 64) / 8}
    return ffjax.plan(step, w, values(16, 32, 64), cluster=ffjax.Cluster.named("cpu"), mesh={"x": 8}, strategy=strategy)


def test_tensor_parallel_attention_reduces_twice() -> None:
    """What comes out, and what goes back through query, key and value, as experts write it."""
    fake_devices(8)
    plan = attention_plan("tensor_parallel")
    one = 16 * 32 * 64 * 4
    planned = [c.collective.bytes for c in plan.layout.collectives() if "reduce" in c.collective.kind]
    assert [size for size in planned if size >= one] == [one, one]
    compiled = plan.lower(jax.devices()).compile()
    found = sum(c.count * c.collective.bytes for c in collectives_of(compiled, plan.mesh))
    assert found == sum(c.count * c.collective.bytes for c in plan.layout.collectives())
