"""Every program of the table: same numerics as unsharded, and the collectives that were planned are those emitted.

The found plan is checked on two meshes, one named strategy on one. Then plans drawn at random, which no search would
find, but which must be right all the same. `pytest --full` checks all strategies and more draws.
"""

from __future__ import annotations

import copy
import functools
import pathlib
import re
import sys
import warnings
from contextlib import nullcontext
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

import ffjax
from ffjax.emit.oracle import explicit_collectives
from ffjax.emit.run import device_mesh, jitted
from ffjax.errors import FfjaxWarning
from ffjax.ir.assignment import UNUSED, Assignment
from ffjax.ir.graph import build_graph
from ffjax.ir.layout import Layout
from ffjax.ir.regions import Regions, find_regions
from ffjax.ir.spec import MeshShape
from ffjax.planning.tracing import trace_step
from ffjax.sharded import Sharded
from ffjax.testing import assert_same_numerics

sys.path.insert(0, str(pathlib.Path(__file__).parent))
from programs import PROGRAMS, Case, Row, values, weights
from running import bytes_by_kind, counted, drawn_layout, eager_cluster, results_of, run_layout

ROWS = list(PROGRAMS)
MESHES = [MeshShape(("x",), (8,)), MeshShape(("x", "y"), (4, 2))]
NAMED = ["data_parallel", "fsdp", "tensor_parallel"]
MOST_CONSTANT = 64
"""Elements: a larger constant is an array that should have been an argument."""
EVERYTHING = [(row, strategy, mesh) for row in ROWS for strategy in NAMED for mesh in MESHES]
ROTATION = {
    (row, NAMED[i % 3], MESHES[i // 3 % 2]) for i, row in enumerate(ROWS)
}  # a named strategy on a mesh for each row, all six in turn


@functools.cache
def expected(name: str) -> list[Any]:
    """The results of one or three unsharded steps."""
    case = PROGRAMS[name].make()
    return results_of(jax.jit(case.step, static_argnums=case.static_argnums), case)


def callbacks(lowered: jax.stages.Lowered) -> int:
    return len(re.findall(r"custom_call @xla_\w*callback", lowered.as_text()))


def big_constants(text: str) -> list[str]:
    """Constants of a module that are neither small nor one value everywhere."""
    found = re.findall(r'dense<(?:"0x|\[)[^>]*> : tensor<([0-9x]+)x[a-z]', text)
    return [shape for shape in found if np.prod([int(n) for n in shape.split("x")]) > MOST_CONSTANT]


def sharded(row: Row, case: Case, strategy: str, mesh: MeshShape) -> Sharded:
    return ffjax.autoshard(
        case.step,
        cluster=eager_cluster(),
        strategy=strategy,
        mesh=mesh.as_dict(),
        static_argnums=case.static_argnums,
        donate_argnums=case.donate_argnums,
    )


def check(row: Row, strategy: str, mesh: MeshShape) -> None:
    case = row.make()
    step = sharded(row, case, strategy, mesh)
    with warnings.catch_warnings(), pytest.warns(FfjaxWarning, match=row.warns) if row.warns else nullcontext():
        warnings.filterwarnings("ignore", "the batch is not split", FfjaxWarning)
        plan = step.plan(*case.args, **case.kwargs)
    lowered = plan.lower(jax.devices())
    text = lowered.as_text()
    assert big_constants(text) == []
    assert len(re.findall(r"sdy\.mesh @mesh", text)) <= row.meshes
    if row.meshes == 1:
        assert counted(plan.bound.collectives()) == counted(explicit_collectives(lowered))
    unsharded = jax.jit(case.step, static_argnums=case.static_argnums).lower(*case.args, **case.kwargs)
    assert callbacks(lowered) == callbacks(unsharded)
    if strategy == "auto":
        specs = [plan.bound.operand(op.id, i) for op in plan.bound.graph.ops for i in range(len(op.operands))]
        assert row.splits == any(any(spec) for spec in specs)
    with warnings.catch_warnings():  # of a second signature: a state that settles
        warnings.simplefilter("ignore", FfjaxWarning)
        assert_same_numerics(results_of(step, case), expected(row.name))


@pytest.mark.parametrize("mesh", MESHES, ids=str)
@pytest.mark.parametrize("name", ROWS)
def test_found_plan(name: str, mesh: MeshShape) -> None:
    check(PROGRAMS[name], "auto", mesh)


@pytest.mark.parametrize(
    ("name", "strategy", "mesh"),
    [pytest.param(*e, marks=() if e in ROTATION else pytest.mark.full) for e in EVERYTHING],
    ids=str,
)
def test_named_strategy(name: str, strategy: str, mesh: MeshShape) -> None:
    check(PROGRAMS[name], strategy, mesh)


@functools.cache
def analysed(name: str) -> tuple[Case, Regions]:
    case = PROGRAMS[name].make()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FfjaxWarning)
        program = trace_step(case.step, case.args, dict(case.kwargs), static_argnums=case.static_argnums)
        return case, find_regions(build_graph(program))


def drawn(name: str, mesh: MeshShape, seed: int) -> Layout:
    return drawn_layout(analysed(name)[1], mesh, seed)


DRAWS = [*MESHES, MeshShape(("x", "y", "z"), (2, 2, 2))]


@pytest.mark.parametrize(
    ("name", "mesh", "seed"),
    [
        pytest.param(name, mesh, seed, marks=() if seed == 0 and j == i % 3 else pytest.mark.full)
        for i, name in enumerate(ROWS)
        for j, mesh in enumerate(DRAWS)
        for seed in range(3)
        if PROGRAMS[name].draws
    ],
    ids=str,
)
def test_random_plan(name: str, mesh: MeshShape, seed: int) -> None:
    case, regions = analysed(name)
    program = regions.graph.program
    layout = drawn(name, mesh, seed)
    dynamic = [a for i, a in enumerate(case.args) if i not in case.static_argnums]
    lowered, results = run_layout(layout, [*program.closures, *jax.tree.leaves((dynamic, case.kwargs))])
    got = jax.tree.unflatten(program.out_tree, results)
    assert_same_numerics(got, expected(name)[0])
    # Plans that a search would not find leave some work to the partitioner: it scatters a sum all of whose readers want
    # a piece, joins two all-to-alls in a row, and goes nowhere and back for free. It must never move more than planned.
    assert not bytes_by_kind(explicit_collectives(lowered)) - bytes_by_kind(layout.collectives())


# --- one by one ----------------------------------------------------------------------------------------------


def test_sharded_random_bits_are_the_same_bits() -> None:
    def step(key: jax.Array, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        return jax.random.bits(key, x.shape), jax.random.bits(jax.random.fold_in(key, 1), (16,)) + x[0].astype(
            jnp.uint32
        )

    args = (jax.random.key(5), jnp.ones((8, 16)))
    for spec in (P("x"), P(None, "x"), P("x", "y"), P(("x", "y"))):
        found = ffjax.autoshard(
            step, cluster=eager_cluster(), mesh={"x": 4, "y": 2}, pins={"x": spec} if spec else None
        )
        assert_same_numerics(found(*args), step(*args))


def test_a_scatter_into_one_column_of_a_piece() -> None:
    """XLA made devices that do not hold the column overwrite one of theirs, where the piece was cut just before."""

    def step(x: jax.Array, column: jax.Array) -> jax.Array:
        return jnp.sin(x).at[:, column].set(1.0)

    args = (values(16, 16), jnp.int32(3))
    regions = find_regions(build_graph(trace_step(step, args, {})))
    mesh = MESHES[0]
    scatter = next(op.id for op in regions.graph.ops if op.kind == "scatter")
    first = regions.region_of[scatter]
    column = regions.ports[scatter].operands[0][1][0]
    nothing = Assignment((UNUSED,), (UNUSED,))
    assignments = [Assignment((column,), (UNUSED,)) if r.id == first else nothing for r in regions.regions]
    layout = Layout(regions=regions, mesh=mesh, assignments=assignments, axis_prices=(1.0,))
    assert layout.operand(scatter, 0) == ((), ("x",))
    got = jitted(layout, device_mesh(mesh, jax.devices()))(*args)
    assert_same_numerics(got[0], step(*args))


def test_callbacks_run_as_often_as_unsharded() -> None:
    seen: list[float] = []

    def step(w: jax.Array, x: jax.Array) -> jax.Array:
        def body(h: jax.Array, i: jax.Array) -> tuple[jax.Array, None]:
            jax.debug.callback(lambda v: seen.append(float(v)), h.sum())
            return jnp.tanh(h @ w), None

        return jax.lax.scan(body, x, jnp.arange(3))[0]

    args = (weights(16, 16), values(8, 16))
    jax.jit(step)(*args).block_until_ready()
    jax.effects_barrier()
    unsharded, seen[:] = list(seen), []
    ffjax.autoshard(step, cluster=eager_cluster(), mesh={"x": 8})(*args).block_until_ready()
    jax.effects_barrier()
    assert len(unsharded) == 3
    np.testing.assert_allclose(sorted(seen), sorted(unsharded), rtol=1e-5)


def test_an_array_that_is_closed_over_in_several_places_is_one_argument() -> None:
    _, regions = analysed("closures_at_several_depths")
    shapes = [np.shape(c) for c in regions.graph.program.closures]
    assert shapes == [(16, 16)] * 2 or len(shapes) == 3  # two arrays, and perhaps a slice of one taken while tracing
    assert len({id(c) for c in regions.graph.program.closures}) == len(shapes)


def test_microbatches_of_a_split_batch() -> None:
    """Gradient accumulation: the batch is reshaped to walk over microbatches, each still split over devices."""
    case = PROGRAMS["gradient_accumulation"].make()
    plan = sharded(PROGRAMS["gradient_accumulation"], case, "data_parallel", MESHES[0]).plan(*case.args)
    dots = [op for op in plan.bound.graph.ops if op.kind == "dot_general"]
    assert all(any(plan.bound.operand(op.id, i) != ((), ()) for i in range(2)) for op in dots)


def test_a_second_signature_is_planned_once() -> None:
    case = PROGRAMS["state_that_settles_after_the_first_step"].make()
    step = sharded(PROGRAMS["state_that_settles_after_the_first_step"], case, "auto", MESHES[0])
    results_of(step, case)
    assert len(step._entries) == 2
    case = PROGRAMS["counter_that_starts_as_a_python_int"].make()
    step = sharded(PROGRAMS["counter_that_starts_as_a_python_int"], case, "auto", MESHES[0])
    results_of(step, case)
    assert len(step._entries) == 1


def test_donated_arrays_are_gone_and_others_are_not() -> None:
    case = PROGRAMS["static_donated_and_keyword_arguments"].make()
    step = sharded(PROGRAMS["static_donated_and_keyword_arguments"], case, "fsdp", MESHES[0])
    first = step(*case.args, **case.kwargs)[0]
    step(case.args[0], first, case.args[2], **case.kwargs)
    assert first.is_deleted()
    assert not case.args[2].is_deleted()


def test_numpy_arguments_stay_as_they_are() -> None:
    x = np.ones((8, 16), np.float32)
    before = copy.copy(x)
    ffjax.autoshard(lambda v: v * 2, mesh={"x": 8}, donate_argnums=0)(x)
    np.testing.assert_array_equal(x, before)
