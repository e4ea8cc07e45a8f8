"""What the compilers' schedules, fusions and merging decide about memory, on programs small enough to see it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ffjax.cost.buffers import buffered, mapping_ops
from ffjax.cost.compilers import TO_THE_LETTER, XLA_CPU, XLA_GPU, Compiler, compiler_of
from ffjax.cost.lifetimes import Lifetimes, lifetimes
from ffjax.cost.merged_remat import MERGED, merge_remat
from ffjax.cost.order import as_written, scheduled
from ffjax.ir.graph import NO_VALUE, Graph, build_graph
from ffjax.planning.tracing import trace_step

ROW = jax.ShapeDtypeStruct((64, 64), jnp.float32)


def graph_of(step: Callable[..., Any], *args: Any, donate: tuple[int, ...] = ()) -> Graph:
    return build_graph(trace_step(step, args, {}, donate_argnums=donate))


def loss(ws: list[jax.Array], x: jax.Array) -> jax.Array:
    for w in ws:
        x = jnp.tanh(x @ w)
    return x.sum()


def train(ws: list[jax.Array], x: jax.Array) -> list[jax.Array]:
    return [w - 0.1 * g for w, g in zip(ws, jax.grad(loss)(ws, x), strict=True)]


def scanned(ws: jax.Array, x: jax.Array) -> jax.Array:
    def total(ws: jax.Array) -> jax.Array:
        return jax.lax.scan(lambda h, w: (jnp.tanh(h @ w), None), x, ws)[0].sum()

    return ws - jax.grad(total)(ws)


def branches(x: jax.Array, y: jax.Array) -> jax.Array:
    z = jax.lax.cond(x[0, 0] > 0, lambda: x @ y, lambda: jax.lax.fori_loop(0, 3, lambda _, h: h @ y, x))
    return jax.lax.while_loop(lambda h: h[0, 0] < 1, lambda h: h @ h + z, y)


def recomputed(ws: list[jax.Array], x: jax.Array) -> list[jax.Array]:
    def total(ws: list[jax.Array]) -> jax.Array:
        h = x
        for w in ws:
            h = jax.checkpoint(lambda h, w: jnp.tanh(h @ w) @ w)(h, w)
        return h.sum()

    return jax.grad(total)(ws)


PROGRAMS = {
    "unrolled": (train, [ROW] * 4, ROW),
    "scanned": (scanned, jax.ShapeDtypeStruct((4, 64, 64), jnp.float32), ROW),
    "branches": (branches, ROW, ROW),
    "recomputed": (recomputed, [ROW] * 2, ROW),
}


@pytest.mark.parametrize("compiler", [TO_THE_LETTER, XLA_CPU, XLA_GPU], ids=["letter", "cpu", "gpu"])
@pytest.mark.parametrize("name", PROGRAMS)
def test_a_schedule_is_an_order_of_the_program(name: str, compiler: Compiler) -> None:
    step, *args = PROGRAMS[name]
    times = lifetimes(graph_of(step, *args), compiler)
    graph = times.graph
    assert sorted(times.when.tolist()) == list(range(len(graph.ops)))
    assert times.when[times.op_at].tolist() == list(range(len(graph.ops)))
    for op in graph.ops:
        assert times.until[op.id] >= times.when[op.id]
        for value in op.operands:
            if value != NO_VALUE:
                assert times.when[graph.values[value].producer] < times.when[op.id]


def test_the_body_of_a_loop_stays_together() -> None:
    step, *args = PROGRAMS["scanned"]
    graph = graph_of(step, *args)
    when, _, _ = scheduled(graph, buffered(graph, XLA_GPU, mapping_ops(graph)), from_the_end=True)
    for scope in graph.scopes[1:]:
        inside = [int(when[op.id]) for op in graph.ops if op.scope == scope.id]
        inside += [int(when[op]) for op in scope.enter + scope.exit]
        assert max(inside) - min(inside) + 1 == len(set(inside))


def weight_gradients(graph: Graph) -> list[int]:
    """The products of which no operand is a weight: the last first, as the backward pass has them."""
    weights = {graph.ops[op].results[0] for op in graph.arguments[:-1]}
    return [op.id for op in graph.ops if op.kind == "dot_general" and weights.isdisjoint(op.operands)]


def test_gradients_of_weights_run_late_on_gpus() -> None:
    """The first gradient of the backward pass waits for the last; to the letter it runs before the next product."""
    graph = graph_of(train, [ROW] * 4, ROW, donate=(0,))
    written = as_written(graph)
    late, _, _ = scheduled(graph, buffered(graph, XLA_GPU, mapping_ops(graph)), from_the_end=True)
    assert len(weight_gradients(graph)) == 4
    first = weight_gradients(graph)[0]
    products = [op.id for op in graph.ops if op.kind == "dot_general" and op.id > first]
    assert sum(written[p] < written[first] for p in products) == 0
    assert sum(late[p] < late[first] for p in products) >= 2
    updates = [int(late[op.id]) for op in graph.ops if op.kind == "result"]
    assert min(updates) > max(int(late[p]) for p in products)


def test_late_gradients_keep_activations() -> None:
    graph = graph_of(train, [ROW] * 8, ROW, donate=(0,))

    def most(times: Lifetimes) -> float:
        alive = times.first <= times.last
        live = np.zeros(len(graph.ops) + 2)
        np.add.at(live, times.first[alive], times.bytes()[alive])
        np.add.at(live, times.last[alive] + 1, -times.bytes()[alive])
        return float(np.cumsum(live).max())

    assert most(lifetimes(graph, XLA_GPU)) > most(lifetimes(graph)) + 2 * 64 * 64 * 4


def kept(step: Callable[..., Any], kind: str, compiler: Compiler) -> bool:
    graph = graph_of(step, ROW, ROW)
    in_memory = buffered(graph, compiler, mapping_ops(graph))
    return any(in_memory[v] for op in graph.ops if op.kind == kind for v in op.results)


def test_what_each_compiler_keeps() -> None:
    def rectified(x: jax.Array, w: jax.Array) -> jax.Array:
        return jnp.maximum(x @ w, 0.0) @ w

    assert kept(rectified, "max", TO_THE_LETTER)
    assert kept(rectified, "max", XLA_CPU)
    assert not kept(rectified, "max", XLA_GPU)  # the second product computes it as it reads

    def gated(x: jax.Array, w: jax.Array) -> tuple[jax.Array, jax.Array]:
        t = jnp.tanh(x @ w)
        return t * x, (t + x).sum()

    assert not kept(gated, "tanh", TO_THE_LETTER)
    assert kept(gated, "tanh", XLA_CPU)
    assert kept(gated, "tanh", XLA_GPU)

    def turned(x: jax.Array, w: jax.Array) -> jax.Array:
        return jnp.sin(x).T @ w

    assert kept(turned, "transpose", XLA_CPU)
    assert not kept(turned, "transpose", XLA_GPU)


def test_recomputation_outside_of_loops_is_merged_on_cpus() -> None:
    graph = graph_of(recomputed, [ROW] * 2, ROW)
    merged, _ = merge_remat(graph)
    gone = [graph.ops[op.id].kind for op in merged.ops if op.kind == MERGED]
    assert (
        gone.count("dot_general") == gone.count("tanh") == 1
    )  # of the first layer: the last one's backward pass is next
    assert all(op.kind != MERGED or not op.operands for op in merged.ops)
    kept, once = (lifetimes(graph, c) for c in (TO_THE_LETTER, Compiler(merges_remat=True)))
    assert (kept.first <= kept.last).sum() > (once.first <= once.last).sum()
    plain = graph_of(train, [ROW] * 4, ROW)
    assert merge_remat(plain)[0] is plain


def test_a_loops_recomputation_is_not_merged() -> None:
    def total(ws: jax.Array, x: jax.Array) -> jax.Array:
        layer = jax.checkpoint(lambda h, w: (jnp.tanh(jnp.tanh(h @ w) @ w), None), prevent_cse=False)
        return jax.lax.scan(layer, x, ws)[0].sum()

    graph = graph_of(jax.grad(total), jax.ShapeDtypeStruct((4, 64, 64), jnp.float32), ROW)
    assert merge_remat(graph)[0] is graph


def test_an_unknown_platform_is_taken_to_the_letter() -> None:
    assert compiler_of("tpu") is TO_THE_LETTER
    assert compiler_of("gpu") is XLA_GPU
