"""The GPU scheduler on small graphs whose order follows from its rules, and which collectives it is given."""

from __future__ import annotations

import importlib
import itertools
import pathlib
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import PartitionSpec as P

import ffjax
from ffjax.cost.compilers import XLA_CPU, XLA_GPU, Compiler
from ffjax.cost.latency_hiding import LOOP, Node, schedule
from ffjax.cost.lifetimes import lifetimes
from ffjax.cost.moves import moves_of

sys.path.insert(0, str(pathlib.Path(__file__).parent))
from running import eager_cluster


def node(position: int, *reads: int, cost: float = 1.0, start: int = -1, alone: bool = False) -> Node:
    return Node(float(position), frozenset(reads), cost, start, alone)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(picks=st.lists(st.tuples(st.integers(0, 3), st.integers(0, 9), st.integers(0, 9)), min_size=1, max_size=25))
def test_makers_run_before_readers(picks: list[tuple[int, int, int]]) -> None:
    nodes: list[Node] = []
    for kind, a, b in picks:
        starts = {n.start for n in nodes}
        known = [i for i in range(len(nodes)) if i not in starts]  # only its end reads a start
        read = {known[m % len(known)] for m in (a, b)} if known else set()
        nodes.append(node(len(nodes), *read, cost=LOOP if kind == 1 else 1.0, alone=kind == 3))
        if kind == 2:
            nodes.append(node(len(nodes), len(nodes) - 1, start=len(nodes) - 1))
    order = schedule(nodes)
    assert sorted(order) == list(range(len(nodes)))
    place = {index: at for at, index in enumerate(order)}
    assert all(place[m] < place[i] for i, n in enumerate(nodes) for m in n.reads)
    under_way = [(place[n.start], place[i]) for i, n in enumerate(nodes) if n.start >= 0]
    assert all(a[1] < b[0] or b[1] < a[0] for a, b in itertools.combinations(under_way, 2)), "one at a time"
    loops = [place[i] for i, n in enumerate(nodes) if n.alone]
    assert not any(start < at < end for start, end in under_way for at in loops)


def test_a_collective_hides_behind_what_nothing_waits_for() -> None:
    """A chain 0, 1 .. 2, 3 around a collective, and a gradient 4 that only reads the chain's first result."""
    nodes = [node(0), node(1, 0), node(2, 1, start=1), node(3, 2), node(4, 0, cost=LOOP)]
    order = schedule(nodes)
    assert order.index(1) < order.index(4) < order.index(2)


def test_a_cycle_is_an_error() -> None:
    with pytest.raises(ValueError, match="cycle"):
        schedule([node(0, 1), node(1, 0)])


def test_gradients_are_merged_up_to_a_size_in_the_order_of_results() -> None:
    module = importlib.import_module("ffjax.examples.gpt")
    config = module.Config.tiny()
    step, args = module.make_train_step(config), module.example_args(config)
    plan = ffjax.plan(step, *args, mesh={"x": 8}, strategy="data_parallel", donate_argnums=0)
    layout, graph = plan.bound, plan.bound.graph
    merged = layout.regions.merged_sums
    groups = [m.values for m in moves_of(layout, XLA_GPU) if not m.readers and merged[m.values[0]]]
    assert max(len(g) for g in groups) > 4
    alone = [m.values for m in moves_of(layout, Compiler()) if not m.readers]
    assert all(sum(graph.values[v].bytes for v in values) == 0 or len(values) == 1 for values in alone)
    assert {v for g in groups for v in g} == {v for g in alone for v in g if merged[v]}
    times = lifetimes(graph, XLA_GPU, moves_of(layout, XLA_GPU))
    for values in groups:
        made = [int(times.when[graph.values[v].producer]) for v in values]
        start, end = times.sums[values[0]]
        assert max(made) < start <= end
        assert all(times.sums[v] == (start, end) for v in values)
    assert np.array_equal(np.sort(times.when), np.arange(len(graph.ops)))


@pytest.mark.parametrize("compiler", [XLA_CPU, XLA_GPU], ids=["cpu", "gpu"])
def test_what_leaves_a_loop_waits_for_all_that_enters_it(compiler: Compiler) -> None:
    """One sum enters the loop; the other is of what leaves it, which does not depend on the first: they stay two."""

    def step(x: jax.Array, y: jax.Array) -> tuple[jax.Array, jax.Array]:
        total, rest = jax.lax.fori_loop(0, 3, lambda _, c: (c[0] / 2, jnp.sin(c[1])), (x.sum(), y))
        return total, rest.sum()

    x = jnp.ones((16, 8))
    layout = ffjax.plan(step, x, x, cluster=eager_cluster(), mesh={"x": 8}, pins={"x": P("x"), "y": P("x")}).bound
    summed = [move.values for move in moves_of(layout, compiler) if not move.readers]
    assert len(summed) == 2, summed
    lifetimes(layout.graph, compiler, moves_of(layout, compiler))
