"""The partitioner's collectives, read without compiling: loops, calls, branches, `shard_map`."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AbstractMesh, AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from ffjax.emit.oracle import explicit_collectives
from ffjax.ir.spec import Collective, CountedCollective, summarize

MESH = AbstractMesh((4, 2), ("x", "y"), axis_types=(AxisType.Auto,) * 2)


def constrain(value: jax.Array, *dims: object) -> jax.Array:
    return jax.lax.with_sharding_constraint(value, NamedSharding(MESH, P(*dims)))


def arg(shape: tuple[int, ...], *dims: object, dtype: jnp.dtype | type = jnp.float32) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(MESH, P(*dims)))


def lower(f: Callable[..., object], *args: jax.ShapeDtypeStruct) -> jax.stages.Lowered:
    return jax.jit(f).trace(*args).lower(lowering_platforms=("cpu",))


def of(f: Callable[..., object], *args: jax.ShapeDtypeStruct) -> list[tuple[Collective, float]]:
    return [(c.collective, c.count) for c in explicit_collectives(lower(f, *args))]


def test_split_reduction_is_an_all_reduce() -> None:
    found = of(lambda x, w: constrain(x @ w, None, None), arg((8, 16), None, "x"), arg((16, 32), "x"))
    assert found == [(Collective("all_reduce", ("x",), 8 * 32 * 4), 1.0)]


def test_all_reduce_then_slice_is_a_reduce_scatter_of_the_whole_operand() -> None:
    def f(x: jax.Array, w: jax.Array) -> jax.Array:
        return constrain(constrain(x @ w, None, None), "x", None)

    found = of(f, arg((8, 16), None, "x"), arg((16, 32), "x"))
    assert found == [(Collective("reduce_scatter", ("x",), 8 * 32 * 4), 1.0)]


@pytest.mark.parametrize(
    ("before", "after", "expected"),
    [
        (("x", None), (None, None), Collective("all_gather", ("x",), 8 * 16 * 2)),
        (("x", None), (None, "x"), Collective("all_to_all", ("x",), 8 * 16 * 2 / 4)),
        ((("x", "y"), None), (("y", "x"), None), Collective("collective_permute", ("x", "y"), 8 * 16 * 2 / 8)),
    ],
)
def test_reshards(before: tuple[object, ...], after: tuple[object, ...], expected: Collective) -> None:
    found = of(lambda x: jnp.sin(constrain(x, *after)), arg((8, 16), *before, dtype=jnp.bfloat16))
    assert found == [(expected, 1.0)]


def test_a_dimension_that_does_not_divide_is_rounded_up() -> None:
    found = of(lambda x: jnp.sin(constrain(x, None, "x")), arg((8, 10), "x", None))
    # A result of the program cannot be split unevenly: hence the gather.
    assert [c for c, _ in found] == [
        Collective("all_to_all", ("x",), 8 * 3 * 4),
        Collective("all_gather", ("x",), 8 * 10 * 4),
    ]


def test_scan_multiplies_by_its_trip_count_through_the_function_that_is_its_body() -> None:
    def f(x: jax.Array, w: jax.Array) -> jax.Array:
        def body(h: jax.Array, wi: jax.Array) -> tuple[jax.Array, None]:
            return constrain(constrain(h @ wi, "x", None), "x", None), None

        return jax.lax.scan(body, x, w)[0]

    found = of(f, arg((16, 16), "x", None), arg((3, 16, 16), None, "y", None))
    assert found
    assert {count for _, count in found} == {3.0}


def test_nested_loops_multiply_and_start_where_they_start() -> None:
    def inner(h: jax.Array) -> jax.Array:
        return jax.lax.fori_loop(2, 7, lambda _, v: constrain(constrain(v, None, "x"), "x", None), h)

    found = of(lambda x: jax.lax.fori_loop(0, 3, lambda _, v: inner(v), x), arg((16, 16), "x", None))
    # The inner loop carries the other sharding than the outer one: two reshards of the outer loop's, too.
    assert sorted(count for _, count in found) == [3.0, 3.0, 15.0, 15.0]


def test_a_loop_without_a_known_end_counts_once() -> None:
    def f(x: jax.Array) -> jax.Array:
        return jax.lax.while_loop(
            lambda v: v[0, 0] < 3.0, lambda v: constrain(jnp.sin(constrain(v, None, "x")), "x", None), x
        )

    found = of(f, arg((16, 16), "x", None))
    assert found
    assert {count for _, count in found} == {1.0}


def test_a_function_counts_at_each_call() -> None:
    @jax.jit
    def helper(a: jax.Array) -> jax.Array:
        return constrain(jnp.sin(constrain(a, None, "x")), "x", None)

    found = of(lambda x: helper(helper(x)) + helper(jnp.cos(x)), arg((16, 16), "x", None))
    assert found == [(Collective("all_to_all", ("x",), 16 * 16 * 4 / 4), 1.0)] * 6


def test_each_branch_counts_once() -> None:
    def f(x: jax.Array, flag: jax.Array) -> jax.Array:
        there = lambda v: constrain(jnp.sin(constrain(v, None, "x")), "x", None)  # noqa: E731
        return jax.lax.cond(flag, there, lambda v: constrain(v * 2, "x", None), x)

    found = of(f, arg((16, 16), "x", None), arg((), dtype=jnp.bool_))
    assert [c.kind for c, _ in found] == ["all_to_all", "all_to_all"]


def test_reshards_that_nothing_reads_and_repeated_ones_do_not_count() -> None:
    def f(x: jax.Array) -> tuple[jax.Array, jax.Array]:
        a = jnp.sin(constrain(x, None, "x"))
        b = jnp.cos(constrain(x, None, "x"))
        constrain(x, "y", None)
        return a, b

    assert of(f, arg((16, 16), "x", None)) == [(Collective("all_to_all", ("x",), 256.0), 1.0)]


def test_the_programs_own_collectives_are_flagged() -> None:
    def inside(u: jax.Array) -> jax.Array:
        total = jax.lax.psum(u, "y")
        moved = jax.lax.ppermute(total, "x", [(i, (i + 1) % 4) for i in range(4)])
        return moved + jax.lax.all_gather(u, "x", axis=0, tiled=True).sum()

    f = jax.shard_map(inside, mesh=MESH, in_specs=P("x", "y"), out_specs=P("x", None), check_vma=False)
    found = explicit_collectives(lower(f, arg((16, 16), "x", "y")))
    assert all(c.user for c in found)
    assert [c.collective for c in found] == [
        Collective("all_reduce", ("y",), 4 * 8 * 4),
        Collective("collective_permute", ("x",), 4 * 8 * 4),
        Collective("all_gather", ("x",), 16 * 8 * 4),
    ]


def test_source_is_the_users_line() -> None:
    found = explicit_collectives(lower(lambda x: jnp.sin(constrain(x, None, "x")), arg((16, 16), "x", None)))
    assert found[0].source.split(":")[0].endswith("test_oracle.py")


def test_lowered_is_left_as_it_was_and_text_does_as_well() -> None:
    lowered = lower(lambda x: jnp.sin(constrain(x, None, "x")), arg((16, 16), "x", None))
    before = lowered.as_text()
    found = explicit_collectives(lowered)
    assert lowered.as_text() == before
    from_text = explicit_collectives(before)
    assert [(c.collective, c.count) for c in from_text] == [(c.collective, c.count) for c in found]


def test_summarize() -> None:
    one = Collective("all_gather", ("x",), 8.0)
    counted = [CountedCollective(collective=one, count=n, source="") for n in (2.0, 3.0)]
    assert summarize(counted) == {"all_gather": (5.0, 40.0)}
