"""What XLA keeps in one kernel and what it moves besides: orders, passes, stacks of loops, operands of dots."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
import pytest

from ffjax.cost.dimension_order import dimension_orders
from ffjax.cost.fusion import find_fusions
from ffjax.cost.kernels import Kernel, kernels
from ffjax.ir.graph import Graph, build_graph
from ffjax.ir.regions import find_regions
from ffjax.planning.tracing import trace_step


def graph_of(f: Callable[..., object], *shapes: tuple[int, ...]) -> Graph:
    return build_graph(trace_step(f, tuple(jax.ShapeDtypeStruct(s, jnp.float32) for s in shapes), {}))


def order_of(graph: Graph, kind: str) -> tuple[int, ...] | None:
    """Of the result of the only op of a kind."""
    (op,) = (o for o in graph.ops if o.kind == kind)
    return dimension_orders(graph)[op.results[0]]


def bytes_moved(f: Callable[..., object], *shapes: tuple[int, ...]) -> float:
    """By kernels that are no matmul."""
    made = kernels(find_regions(graph_of(f, *shapes)))
    return sum(k.trips * size for k in made if not k.matmul for _, size in k.traffic)


def grouped(q: jax.Array, k: jax.Array) -> jax.Array:
    """Scores of queries [b, q, groups, heads of a group, d] and keys [b, k, groups, d]."""
    return jnp.exp(jnp.einsum("bqgrd,bkgd->bgrqk", q, k))


def test_a_dot_orders_what_follows_it() -> None:
    """JAX writes grouped scores as keys times queries and transposes: keys come before queries in memory."""
    graph = graph_of(grouped, (4, 8, 2, 3, 16), (4, 8, 2, 16))
    assert order_of(graph, "transpose") == order_of(graph, "exp") == (0, 1, 4, 3, 2)


@pytest.mark.parametrize(
    ("shape", "order"),
    [((2, 3, 20), (2, 0, 1)), ((6, 1, 4, 5), (1, 2, 3, 0)), ((4, 30), (0, 1))],
)
def test_a_reshape_keeps_the_order_where_it_moves_nothing(shape: tuple[int, ...], order: tuple[int, ...]) -> None:
    graph = graph_of(lambda a, b: (a @ b).T.reshape(shape), (20, 7), (7, 6))
    assert order_of(graph, "reshape") == order


def test_a_softmax_over_rows_is_one_pass_and_three_over_others() -> None:
    rows, others = (
        bytes_moved(lambda a, b, axis=axis: jax.nn.softmax(a @ b, axis) @ b.T, (512, 64), (64, 512)) / (4 * 512 * 512)
        for axis in (1, 0)
    )
    assert rows == pytest.approx(
        2.125, rel=0.01
    )  # with what the last dot transposes, an eighth: the scores are read, the weights are written
    assert others == pytest.approx(4.125, rel=0.01)  # read for the maximum, for the sum, and for the weights


def test_what_is_read_in_another_order_is_in_memory() -> None:
    """Two dots whose results are added up: transposed to the first one's order, the second is copied."""

    def kept(f: Callable[[jax.Array, jax.Array], object]) -> bool:
        graph = graph_of(f, (32, 64), (64, 32))
        (op,) = (o for o in graph.ops if o.kind == "tanh")
        return find_fusions(graph).in_memory[op.results[0]]

    assert kept(lambda a, b: a @ b + jnp.tanh((a @ b).T))
    assert not kept(lambda a, b: a @ b + jnp.tanh(a @ b))


def test_a_dots_operand_that_is_no_matrix_is_transposed_once() -> None:
    def copies(einsum: str) -> list[Kernel]:
        def f(x: jax.Array, w: jax.Array, y: jax.Array) -> tuple[jax.Array, jax.Array]:
            q = (x @ w).reshape(4, 16, 2, 8)
            return jnp.einsum(einsum, q, y), jnp.einsum(einsum, q, 2 * y)

        graph = graph_of(f, (4, 16, 5), (5, 16), (4, 16, 2, 8))
        return [k for k in kernels(find_regions(graph)) if not k.matmul and graph.ops[k.op].kind == "dot_general"]

    assert len(copies("bqhd,bkhd->bhqk")) == 1  # heads lie between batch and queries
    assert not copies("bqhd,bkhd->bqk")


def test_loops_copy_what_they_stack_and_slice() -> None:
    """A trip's part of [10, 64, 64] that a dot makes or reads is copied; the stack is filled before."""
    part, trips = 4 * 64 * 64, 10

    def f(x: jax.Array, ws: jax.Array) -> tuple[jax.Array, jax.Array]:
        def body(x: jax.Array, w: jax.Array) -> tuple[jax.Array, jax.Array]:
            y = x @ w
            return y, y

        return jax.lax.scan(body, x, ws)

    assert bytes_moved(f, (64, 64), (trips, 64, 64)) == trips * part * (2 + 3)


def test_what_is_sliced_twice_is_kept() -> None:
    def f(a: jax.Array, b: jax.Array) -> jax.Array:
        c = a * b
        return c[::2] + c[1::2]

    graph = graph_of(f, (64, 8), (64, 8))
    (op,) = (o for o in graph.ops if o.kind == "mul")
    assert find_fusions(graph).in_memory[op.results[0]]


def test_indices_are_computed_where_they_are_used() -> None:
    def step(table: jax.Array, rows: jax.Array, updates: jax.Array) -> tuple[jax.Array, jax.Array]:
        return table[rows], table.at[rows].add(updates)

    table, rows = jax.ShapeDtypeStruct((512, 64), jnp.float32), jax.ShapeDtypeStruct((128,), jnp.int32)
    updates = jax.ShapeDtypeStruct((128, 64), jnp.float32)
    made = kernels(find_regions(build_graph(trace_step(step, (table, rows, updates), {}))))
    # Negative rows are counted from the end: that is arithmetic on the rows, but no kernel.
    assert sum(k.launches for k in made) == 2
