"""Gradients of weights: which kernels they are, and when they run."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ffjax
from ffjax.cost.cluster import Cluster
from ffjax.cost.collectives import CollectiveModel
from ffjax.cost.fusion import fusible
from ffjax.cost.kernels import kernels
from ffjax.cost.simulation.late_kernels import late_kernels
from ffjax.cost.simulation.simulator import Simulator
from ffjax.cost.simulation.streams import MOST_LATER, Entry, Event, Issue, Later, Rest, Run, State, Wait, idle, play
from ffjax.cost.simulation.task_costs import Hop
from ffjax.cost.simulation.timeline import Timeline
from ffjax.ir.graph import Graph, build_graph
from ffjax.ir.regions import find_regions
from ffjax.ir.spec import Collective, MeshShape
from ffjax.planning.tracing import trace_step
from ffjax.strategies.candidates import candidates

LAYERS, WIDTH = 3, 4096


def late_in(step: Callable[..., Any], *shapes: tuple[int, ...]) -> tuple[Graph, list[int]]:
    arrays = tuple(jax.ShapeDtypeStruct(s, jnp.float32) for s in shapes)
    regions = find_regions(build_graph(trace_step(step, arrays, {})))
    return regions.graph, sorted(late_kernels(regions.graph, {k.op for k in kernels(regions)}))


def loss(weights: tuple[jax.Array, ...], x: jax.Array) -> jax.Array:
    for w in weights:
        x = jnp.tanh(x @ w)
    return jnp.square(x).sum()


def train(a: jax.Array, b: jax.Array, x: jax.Array) -> tuple[jax.Array, ...]:
    grads = jax.grad(loss)((a, b), x)
    scale = jnp.sqrt(sum(jnp.square(g).sum() for g in grads))
    return a - grads[0] / scale, b - grads[1] / scale


def test_products_that_only_the_optimizer_reads_are_late() -> None:
    graph, late = late_in(train, (64, 32), (32, 16), (8, 64))
    assert [graph.values[graph.ops[op].results[0]].shape for op in late] == [(16, 32), (32, 64)]


def test_an_optimizer_that_multiplies_waits_for_its_gradients() -> None:
    def step(a: jax.Array, x: jax.Array) -> jax.Array:
        grad = jax.grad(lambda a: loss((a,), x))(a)
        return a - grad @ grad.T @ a

    graph, late = late_in(step, (32, 32), (8, 32))
    assert [graph.ops[op].kind for op in late] == ["dot_general"]
    assert late[0] == max(op.id for op in graph.ops if op.kind == "dot_general")


def test_in_a_loop_what_the_next_trip_multiplies_is_not_late() -> None:
    def step(weights: jax.Array, x: jax.Array) -> jax.Array:
        def all_layers(weights: jax.Array) -> jax.Array:
            return jnp.square(jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, weights)[0]).sum()

        return weights - jax.grad(all_layers)(weights)

    graph, late = late_in(step, (4, 32, 32), (8, 32))
    assert len(late) == 1  # of a layer's three products
    assert graph.values[graph.ops[late[0]].results[0]].shape == (32, 32)


def test_gradients_that_a_loop_adds_up_are_late() -> None:
    def step(a: jax.Array, batches: jax.Array) -> jax.Array:
        def one(total: jax.Array, x: jax.Array) -> tuple[jax.Array, None]:
            return total + jax.grad(lambda a: loss((a,), x))(a), None

        return a - jax.lax.scan(one, jnp.zeros_like(a), batches)[0]

    graph, late = late_in(step, (32, 16), (4, 8, 32))
    assert [graph.values[graph.ops[op].results[0]].shape for op in late] == [(16, 32)]


# -- streams, in ticks


def sum_of(ticks: int) -> Issue:
    return Issue((Hop(ticks, (0,), Collective("all_reduce", ("x",), 1.0)),), (~1,), ())


@pytest.mark.parametrize(
    ("ticks", "elapsed", "ran"),
    [(3, 5, (7,)), (5, 5, (7,)), (9, 9, (7,))],  # fits into the wait, fills it, runs over it
)
def test_a_late_kernel_runs_while_others_wait(ticks: int, elapsed: int, ran: tuple[int, ...]) -> None:
    kernel = Later(7, ticks, ())
    events: list[Event] = [kernel, sum_of(5), Wait((~1,)), Rest((kernel,))]
    log: list[Entry] = []
    assert play(events, idle(1), overlap=True, log=log) == (elapsed, State((0,), {}), ran)
    assert [(e.start, e.end) for e in log if e.ops] == [(0, ticks)]


def test_a_late_kernel_that_never_found_a_wait_runs_where_it_is_put() -> None:
    kernel = Later(7, 3, ())
    events: list[Event] = [kernel, sum_of(5), Run(6, (2,)), Wait((~1,)), Rest((kernel,))]
    assert play(events, idle(1), overlap=True) == (9, State((0,), {}), ())
    assert play(events, idle(1), overlap=True, ran={7})[0] == 6


def test_a_late_kernel_waits_for_what_it_reads() -> None:
    kernel = Later(7, 3, (~1,))
    events: list[Event] = [sum_of(5), kernel, Wait((~1,)), Rest((kernel,))]
    assert play(events, idle(1), overlap=True) == (8, State((0,), {}), ())


def test_of_many_late_kernels_the_last_ones_can_run_early() -> None:
    own = [Later(op, 1, ()) for op in range(MOST_LATER + 3)]
    _, state, _ = play(own, idle(1), overlap=True)
    assert state.later == tuple(own[3:])
    _, _, ran = play([sum_of(2), Wait((~1,))], state, overlap=True)
    assert ran == (3, 4)


# -- plans


weights = tuple(jax.ShapeDtypeStruct((WIDTH, WIDTH), jnp.bfloat16) for _ in range(LAYERS))
x = jax.ShapeDtypeStruct((8192, WIDTH), jnp.bfloat16)


def step(weights: tuple[jax.Array, ...], x: jax.Array) -> tuple[jax.Array, ...]:
    return tuple(w - g for w, g in zip(weights, jax.grad(loss)(weights, x), strict=True))


def timeline(strategy: str) -> Timeline:
    plan = ffjax.plan(
        step, weights, x, cluster=Cluster.named("h100"), mesh={"x": 8}, strategy=strategy, donate_argnums=0
    )
    return plan.simulate()


def test_summed_gradients_follow_the_way_back_and_the_last_sum_is_exposed() -> None:
    found = timeline("fsdp")
    products = [i for i in found.intervals if i.name == "dot_general"]
    sums = [i for i in found.intervals if i.name.startswith("reduce_scatter") and i.name.endswith("dot_general")]
    assert len(products) == 3 * LAYERS - 1
    assert len(sums) == LAYERS
    for gradient, summed in zip(products[-LAYERS:], sums, strict=True):
        assert summed.start_s >= gradient.end_s
    last = sums[-1]
    assert not any(p.start_s < last.end_s and last.start_s < p.end_s for p in products)


def test_copies_for_late_kernels_and_of_what_they_leave_wait_for_them() -> None:
    """Whatever the plan: what is copied for late kernels alone, not before those that run earlier have."""
    graph = build_graph(trace_step(step, (weights, x), {}))
    regions = find_regions(graph)
    mesh = MeshShape(("x", "y"), (2, 4))
    simulator = Simulator(regions, kernels(regions), CollectiveModel(mesh, Cluster.named("h100")))
    block = simulator.tasks.blocks[0]
    before = [op for at, ops in block.runs.items() for op in ops if at < block.late_at and op not in block.late]
    rng = np.random.default_rng(0)
    seen = {"for": 0, "of": 0}
    for _ in range(20):
        found = [candidates(regions, region, mesh) for region in regions.regions]
        simulator.run([own[int(rng.integers(len(own)))] for own in found])
        log, _ = simulator.log(0)
        ends = {op: e.end for e in log for op in e.ops} | {p: e.end for e in log for p in e.points if p < 0}
        # A copy may be made of another one, of the same value.
        made = {p for e in log for p in e.points if p >= 0} | simulator.schedules[0].places().keys()
        read = [regions.edges[p] for p in made]
        others = {edge.value for edge in read if edge.op not in block.late}
        for entry in log:
            copied = [regions.edges[p] for p in entry.points if p >= 0]
            if copied and copied[0].value not in others:
                seen["for"] += 1
                assert entry.start >= max(ends[op] for op in before)
            for maker in {product(graph, edge.value) for edge in copied} & set(block.late):
                seen["of"] += 1
                assert entry.start >= max(ends[maker], ends.get(~maker, 0))
    assert min(seen.values()) > 20, seen


def product(graph: Graph, value: int) -> int:
    """The op that a value is made by, if only fused ops lie between."""
    op = graph.ops[graph.values[value].producer]
    while fusible(op) and len(op.operands) == 1:
        op = graph.ops[graph.values[op.operands[0]].producer]
    return op.id
