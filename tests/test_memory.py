"""Peak memory: by hand on small programs, against a plain recount on random ones, and against the compiler's figure."""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from jax.sharding import PartitionSpec as P

import ffjax
from ffjax.cost.cluster import Cluster
from ffjax.cost.collectives import CollectiveModel
from ffjax.cost.compilers import TO_THE_LETTER, XLA_CPU, XLA_GPU, Compiler
from ffjax.cost.hlo.collectives import peak_bytes
from ffjax.cost.kernels import by_family, kernels
from ffjax.cost.lifetimes import Lifetimes, lifetimes
from ffjax.cost.memory import MemoryModel, is_slice, peak, possible_sums
from ffjax.cost.result_buffers import in_result_buffers
from ffjax.ir.assignment import UNUSED, Assignment
from ffjax.ir.graph import NO_VALUE, build_graph
from ffjax.ir.layout import Layout
from ffjax.ir.regions import Regions, find_regions
from ffjax.ir.spec import MeshShape, Spec, shard_count
from ffjax.planning.tracing import trace_step
from ffjax.strategies.budget import layout_of
from ffjax.strategies.families import family_keys
from ffjax.strategies.instants import Instants
from ffjax.strategies.limited import limited
from ffjax.strategies.problem import Problem, build_problem
from tests.random_programs import Pick, drawn_picks, random_step

KIB = 1024.0
ONE = MeshShape(("x",), (1,))
SPLIT = {"w": P("x"), "x": P("x")}


def kib(rows: int, columns: int = 256) -> jax.ShapeDtypeStruct:
    """A float32 array of `rows` KiB."""
    return jax.ShapeDtypeStruct((rows, columns), jnp.float32)


def regions_of(step: Callable[..., Any], *args: Any, donate: tuple[int, ...] = ()) -> Regions:
    return find_regions(build_graph(trace_step(step, args, {}, donate_argnums=donate)))


def peak_kib(step: Callable[..., Any], *args: Any, donate: tuple[int, ...] = ()) -> float:
    """On one device, where nothing is split."""
    regions = regions_of(step, *args, donate=donate)
    whole = [Assignment((UNUSED,), (UNUSED,))] * len(regions.regions)
    return peak(Layout(regions=regions, mesh=ONE, assignments=whole, axis_prices=(1.0,))).bytes / KIB


def test_arguments_and_results() -> None:
    assert peak_kib(lambda x: x + 1, kib(256)) == 512
    assert peak_kib(lambda x: (x + 1, x * 2), kib(256)) == 768


def test_what_is_fused_is_not_in_memory() -> None:
    assert peak_kib(lambda x: jnp.tanh(x * 2 + 1) ** 2, kib(256)) == 512


def test_a_value_lives_until_it_was_last_read() -> None:
    def chain(x: jax.Array, w: jax.Array) -> jax.Array:
        a = x @ w
        b = a @ w
        return b @ w

    # At the second product: x, w, a and b; a is gone at the third.
    assert peak_kib(chain, kib(64), kib(256)) == 256 + 3 * 64

    def kept(x: jax.Array, w: jax.Array) -> jax.Array:
        a = x @ w
        b = a @ w
        return b @ w @ w @ a.T

    assert peak_kib(kept, kib(256), kib(256)) == 5 * 256


def test_a_donated_argument_gives_its_place_to_the_result() -> None:
    def step(state: jax.Array, x: jax.Array) -> jax.Array:
        return state - x @ x

    kept, donated = (peak_kib(step, kib(256), kib(256), donate=d) for d in ((), (0,)))
    assert (kept, donated) == (1024, 768)


def test_a_donated_argument_that_nothing_replaces_is_free_after_its_use() -> None:
    def step(x: jax.Array, w: jax.Array) -> jax.Array:
        return ((x @ w) @ w)[:8]

    assert peak_kib(step, kib(512), kib(256), donate=(0,)) < peak_kib(step, kib(512), kib(256)) - 256


def scanned(remat: bool = False) -> Callable[..., Any]:
    def loss(ws: jax.Array, x: jax.Array) -> jax.Array:
        def layer(h: jax.Array, w: jax.Array) -> tuple[jax.Array, None]:
            return jnp.tanh(jnp.tanh(h @ w) @ w), None

        body = jax.checkpoint(layer, prevent_cse=False) if remat else layer  # type: ignore[var-annotated]
        return jax.lax.scan(body, x, ws)[0].sum()

    return jax.grad(loss)


def test_a_loop_keeps_what_its_backward_pass_needs() -> None:
    ws, x = jax.ShapeDtypeStruct((8, 256, 256), jnp.float32), kib(512)
    plain, remat = peak_kib(scanned(), ws, x), peak_kib(scanned(remat=True), ws, x)
    # The weights, their gradients, and for each of 8 layers one or two activations of 512 KiB.
    assert plain >= 2 * 8 * 256 + 8 * 2 * 512
    assert 2 * 8 * 256 + 8 * 512 <= remat <= plain - 7 * 512


def test_what_a_loop_gathers_outside_lives_as_long_as_the_loop() -> None:
    """A copy for a body is there in every trip, not only when the loop is entered."""

    def step(w: jax.Array, x: jax.Array) -> jax.Array:
        return jax.lax.fori_loop(0, 4, lambda _, h: jnp.tanh(h @ w), x)

    plan = ffjax.plan(step, kib(256), kib(4096), mesh={"x": 8}, pins=SPLIT)
    assert any(what.startswith("copy of w") and size == 256 * KIB for what, size in plan.estimate.largest)
    assert plan.estimate.peak_bytes >= (256 + 256 / 8 + 3 * 4096 / 8) * KIB


def test_partial_sums_are_there_before_they_are_scattered() -> None:
    def step(w: jax.Array, x: jax.Array) -> jax.Array:
        return w - 0.1 * (x.T @ x)

    plan = ffjax.plan(step, kib(256), kib(4096), mesh={"x": 8}, pins=SPLIT, donate_argnums=0)
    # The state, the batch, and a gradient that is summed over the batch before it is scattered.
    assert plan.estimate.peak_bytes >= (256 / 8 + 4096 / 8 + 256 + 256 / 8) * KIB


def recount(layout: Layout, times: Lifetimes) -> float:
    """Peak memory value by value and op by op, as the module's text defines it."""
    graph, mesh, taken, compiler = times.graph, layout.mesh, times.bytes(), times.compiler
    end = len(graph.ops)
    held: list[tuple[float, int, int]] = []

    def hold(value: int, spec: Spec, first: int, last: int, times_: float = 1) -> None:
        held.append((times_ * taken[value] / shard_count(spec, mesh), first, max(last, first - 1)))

    last = [min(f, u) if u < end else end for f, u in zip(times.first.tolist(), times.last.tolist(), strict=True)]
    reads: dict[tuple[int, Spec, int], list[int]] = {}
    for op in graph.ops:
        for index, value in enumerate(op.operands):
            if value == NO_VALUE:
                continue
            when, until = int(times.when[op.id]), int(times.until[op.id])
            read = layout.graph.ops[op.id].operands[index]  # another value than the compiler's, if that merges some
            spec = layout.operand(op.id, index)
            free = graph.values[value].constant or not graph.values[value].shape
            if (free or spec == layout.home(read) or read != value) and times.first[value] <= times.last[value]:
                last[value] = max(last[value], until)
            if not free and spec != layout.home(read):
                start, done = times.copies.get((read, op.id), (when, when))
                known = reads.setdefault((read, spec, op.scope), [start, until, done])
                known[:] = [min(known[0], start), max(known[1], until), min(known[2], done)]
    for (value, spec, _), (_, _, done) in reads.items():
        if not is_slice(layout.home(value), spec):
            last[value] = max(last[value], done)
    for (value, spec, _), (needed, until, _) in reads.items():
        home, first = layout.home(value), needed
        if is_slice(home, spec) and times.first[value] <= times.last[value]:
            first = min(needed, last[value] + 1)
        elif not is_slice(home, spec) and compiler.copies_gathered and _inside(home, spec):
            hold(value, spec, first, first)
        hold(value, spec, first, until)
    for value in possible_sums(layout.regions):
        if layout.partial_axes(graph.values[value].producer):
            scattered = layout.partial(value) != layout.home(value)
            for since, until in times.partial_sums(value, scattered=scattered):
                hold(value, layout.partial(value), since, until)
    for value, since, until, larger in times.copied:
        hold(value, layout.home(value), since, until, larger)
    temporaries, rooms = len(held), []
    own = set(times.new_results.tolist()) | {graph.ops[op].results[0] for op in graph.arguments}
    for mine in (False, True):
        for value in graph.values:
            if times.first[value.id] <= times.last[value.id] and (value.id in own) == mine:
                hold(value.id, layout.home(value.id), int(times.first[value.id]), last[value.id])
        temporaries = temporaries if mine else len(held)
    if compiler.results_apart:
        for value in times.new_results.tolist():
            hold(value, layout.home(value), 0, int(times.first[value]) - 1)
            rooms.append((held[-1][0], int(times.first[value])))
    room, made = np.array(rooms, dtype=float).reshape(-1, 2).T
    size, begin, done = np.array(held[:temporaries], dtype=float).reshape(-1, 3).T
    placed = in_result_buffers(room, made.astype(int), size, begin.astype(int), done.astype(int))
    live = np.zeros(end + 1)
    for index, (bytes_, first, until) in enumerate(held):
        if index >= temporaries or not placed[index]:
            live[first : until + 1] += bytes_
    return float(live.max())


def test_temporaries_use_the_buffers_of_results() -> None:
    """The largest first, each in the smallest that is free all the time that it is needed; never two at a time."""

    def placed(*temporaries: tuple[float, int, int], results: list[tuple[float, int]]) -> list[bool]:
        room, made = np.array(results).T
        size, first, last = np.array(temporaries).T
        return in_result_buffers(room, made.astype(int), size, first.astype(int), last.astype(int)).tolist()

    assert placed((8, 0, 3), (8, 4, 5), results=[(8, 9)]) == [True, True]
    assert placed((8, 0, 3), (8, 3, 5), results=[(8, 9)]) == [True, False]
    assert placed((8, 0, 3), (4, 0, 3), results=[(8, 9), (4, 9)]) == [True, True]
    assert placed((6, 0, 3), (7, 0, 3), results=[(8, 9)]) == [False, True]
    assert placed((9, 0, 3), results=[(8, 9)]) == [False]
    assert placed((8, 5, 9), (8, 5, 8), results=[(8, 9)]) == [False, True]
    assert placed((1e-9, 0, 1), results=[(8, 9)]) == [False]


def _inside(home: Spec, spec: Spec) -> bool:
    return any(t[: len(s)] != s for s, t in zip(home[1:], spec[1:], strict=True))


KINDS = ("dot", "elementwise", "dot of transposed", "scan", "cond", "remat")


def problem_of(regions: Regions, mesh: MeshShape) -> Problem:
    keys = family_keys(regions)
    model = CollectiveModel(mesh, Cluster.named("cpu", devices_per_host=mesh.devices))
    return build_problem(regions, keys, by_family(kernels(regions), keys), model)


@settings(max_examples=40, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
@given(
    picks=drawn_picks(KINDS, 7),
    mesh=st.sampled_from([MeshShape(("x",), (4,)), MeshShape(("x", "y"), (2, 2))]),
    compiler=st.sampled_from([TO_THE_LETTER, XLA_CPU, XLA_GPU]),
    seed=st.integers(0, 99),
)
def test_peaks_and_instants_agree_with_a_recount(
    picks: list[Pick], mesh: MeshShape, compiler: Compiler, seed: int
) -> None:
    regions = regions_of(random_step(picks), kib(64, 64), kib(64, 64), donate=(0,))
    problem = problem_of(regions, mesh)
    whole = MemoryModel(regions, lifetimes(regions.graph, compiler), family_keys(regions))
    rng = np.random.default_rng(seed)
    for _ in range(5):
        choice = [int(rng.integers(len(n.candidates))) for n in problem.nodes]
        layout = layout_of(problem, choice)
        assert peak(layout, whole.times).bytes == pytest.approx(whole.peak(layout).bytes)
        memory = whole.under(layout)
        times = memory.times
        found = memory.peak(layout)
        assert found.bytes == pytest.approx(recount(layout, times))
        assert found.bytes >= sum(size for _, size in found.live) * (1 - 1e-9)
        # The solver's view of that instant: never less, so that what it fits into a budget does fit.
        instants = Instants(problem, memory)
        assert limited(problem, instants, [found.instant]).bytes(choice)[0] >= found.bytes * (1 - 1e-9)
        # What is surely there: never more, so that what it proves is so. At any instant.
        ats = (found.instant, int(rng.integers(len(regions.graph.ops))))
        for at, surely in zip(ats, limited(problem, instants, ats, surely=True).bytes(choice), strict=True):
            assert surely <= found.over_time[times.op_at[at] if at < len(times.when) else -1] * (1 + 1e-9)


COMPILED: dict[str, tuple[str, dict[str, Any], str, bool]] = {
    "gpt": ("gpt", {}, "data_parallel", True),
    "gpt, scanned, remat, kept": ("gpt", {"scan_layers": True, "remat": True}, "fsdp", False),
    "recommender": ("recommender", {}, "tensor_parallel", True),
    "moe": ("moe", {}, "auto", True),
}


@pytest.mark.parametrize("name", COMPILED)
def test_near_the_compilers_figure(name: str) -> None:
    """Within a quarter even of small shapes, as the CPU compiles them; `test_memory_gate.py` has large ones."""
    example, options, strategy, donated = COMPILED[name]
    module = importlib.import_module(f"ffjax.examples.{example}")
    config = dataclasses.replace(module.Config.tiny(), **options)
    step, args = module.make_train_step(config), module.example_args(config)
    plan = ffjax.plan(step, *args, mesh={"x": 8}, strategy=strategy, donate_argnums=0 if donated else ())
    quickly: dict[str, bool | str] = {"xla_llvm_disable_expensive_passes": True}
    compiled = peak_bytes(plan.lower(jax.devices()).compile(compiler_options=quickly))
    ratio = plan.estimate.peak_bytes / compiled
    assert 1 / 1.25 <= ratio <= 1.25, f"model {plan.estimate.peak_bytes:,.0f}, compiler {compiled:,.0f}: {ratio:.2f}"
