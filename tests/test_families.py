"""Families: what is alike is decided once however deep the network, what plays another part is decided apart."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from ffjax.examples import gpt
from ffjax.ir.graph import build_graph
from ffjax.ir.regions import Regions, find_regions
from ffjax.planning.tracing import trace_step
from ffjax.strategies.families import family_keys, members


def regions_of(step: Callable[..., Any], *args: Any) -> Regions:
    return find_regions(build_graph(trace_step(step, args, {})))


def network(layers: int, **options: Any) -> Regions:
    config = dataclasses.replace(gpt.Config.tiny(), layers=layers, **options)
    return regions_of(gpt.make_train_step(config), *gpt.example_args(config))


@pytest.fixture(scope="module")
def four() -> Regions:
    return network(4)


def of_argument(regions: Regions, path: str) -> int:
    """The region of an argument, by its path."""
    graph = regions.graph
    return next(regions.region_of[op] for op in graph.arguments if graph.ops[op].label == path)


def kernel(layer: int, name: str) -> str:
    return f"state/params/layer_{layer}/{name}/kernel"


def test_depth_adds_no_families(four: Regions) -> None:
    eight = network(8)
    shallow, deep = (members(family_keys(r)) for r in (four, eight))
    assert len(deep) == len(shallow)
    assert len(eight.regions) > 1.5 * len(four.regions)
    assert max(map(len, deep.values())) > max(map(len, shallow.values()))


def test_a_scanned_network_is_the_same_at_any_depth() -> None:
    four_, eight = (network(n, scan_layers=True) for n in (4, 8))
    assert len(four_.regions) == len(eight.regions)
    assert len(set(family_keys(four_))) == len(set(family_keys(eight)))


def test_layers_share_families_and_parts_do_not(four: Regions) -> None:
    keys = family_keys(four)

    def key(layer: int, name: str) -> str:
        return keys[of_argument(four, kernel(layer, name))]

    parts = ("attention/query", "attention/value", "attention/out", "mlp_up", "mlp_down")
    for part in parts:
        assert key(1, part) == key(2, part), part
    assert len({key(1, part) for part in parts}) == len(parts)


def test_the_products_of_q_and_out_are_decided_apart(four: Regions) -> None:
    keys, graph = family_keys(four), four.graph

    def readers(path: str) -> set[str]:
        argument = next(op for op in graph.arguments if graph.ops[op].label == path)
        value = graph.ops[argument].results[0]
        return {keys[four.region_of[op.id]] for op in graph.ops if op.kind == "dot_general" and value in op.operands}

    q, out = readers(kernel(1, "attention/query")), readers(kernel(1, "attention/out"))
    assert q
    assert out
    assert q.isdisjoint(out)


def test_members_have_the_same_factors(four: Regions) -> None:
    for family in members(family_keys(four)).values():
        first = four.regions[family[0]]
        for index in family[1:]:
            other = four.regions[index]
            assert (other.sizes, other.kinds, other.solo) == (first.sizes, first.kinds, first.solo)
            assert list(other.dims) == list(first.dims)
            kinds = [[four.graph.ops[o].kind for o in region.ops] for region in (first, other)]
            assert kinds[0] == kinds[1]


def test_marks_set_one_of_many_apart(four: Regions) -> None:
    plain = family_keys(four)
    one = of_argument(four, kernel(2, "mlp_up"))
    marked = family_keys(four, {one: "(x, -)"})
    assert members(plain)[plain[one]] != [one]
    assert members(marked)[marked[one]] == [one]
    family = members(plain)[plain[one]]
    assert set(family_keys(four, dict.fromkeys(family, "(x, -)"))).isdisjoint({plain[one]})
    assert len(members(family_keys(four, dict.fromkeys(family, "(x, -)")))) == len(members(plain))


def test_what_differs_in_shape_dtype_or_op_is_another_family() -> None:
    def step(a: jax.Array, b: jax.Array, c: jax.Array, d: jax.Array) -> tuple[jax.Array, ...]:
        return a @ a, b @ b, c @ c, jnp.cumsum(d, axis=0)

    def shape(size: int, dtype: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((size, size), dtype)

    args = shape(8, jnp.float32), shape(16, jnp.float32), shape(8, jnp.bfloat16), shape(8, jnp.float32)
    regions = regions_of(step, *args)
    keys = family_keys(regions)
    work = [keys[regions.region_of[op.id]] for op in regions.graph.ops if op.kind in ("dot_general", "cumsum")]
    assert len(work) == len(set(work)) == 4


def test_keys_are_stable_across_processes_and_hash_seeds() -> None:
    script = (
        "import jax, jax.numpy as jnp\n"
        "from ffjax.ir.graph import build_graph\n"
        "from ffjax.ir.regions import find_regions\n"
        "from ffjax.planning.tracing import trace_step\n"
        "from ffjax.strategies.families import family_keys\n"
        "w = jax.ShapeDtypeStruct((16, 16), jnp.float32)\n"
        "f = jax.grad(lambda p, x: jnp.tanh(jnp.tanh(x @ p['a']) @ p['b']).sum())\n"
        "print(family_keys(find_regions(build_graph(trace_step(f, ({'a': w, 'b': w}, w), {})))))\n"
    )
    texts = set()
    for seed in ("0", "1", "2"):
        made = subprocess.run(
            [sys.executable, "-c", script],
            capture_output=True,
            text=True,
            check=False,
            env={**os.environ, "PYTHONHASHSEED": seed, "JAX_PLATFORMS": "cpu"},
        )
        assert made.returncode == 0, made.stderr
        texts.add(made.stdout)
    assert len(texts) == 1
