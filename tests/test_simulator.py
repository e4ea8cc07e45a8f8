"""The execution simulator: by hand on small programs, and from changes as from scratch on random ones."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ffjax.cost.cluster import Cluster
from ffjax.cost.collectives import CollectiveModel
from ffjax.cost.estimate import estimate
from ffjax.cost.kernels import kernels
from ffjax.cost.lifetimes import lifetimes
from ffjax.cost.memory import MemoryModel, peak
from ffjax.cost.simulation.schedule import AHEAD
from ffjax.cost.simulation.simulator import Simulator, simulate
from ffjax.cost.simulation.streams import COMPUTE_STREAM
from ffjax.cost.simulation.task_graph import START
from ffjax.cost.simulation.timeline import COMPUTE, Interval, Timeline
from ffjax.ir.assignment import UNUSED, Assignment
from ffjax.ir.graph import build_graph
from ffjax.ir.layout import Layout
from ffjax.ir.regions import Regions, find_regions
from ffjax.ir.spec import MeshShape
from ffjax.planning.tracing import trace_step
from ffjax.strategies.candidates import candidates
from ffjax.strategies.families import family_keys, members
from tests import programs as table
from tests.random_programs import Pick, drawn_picks, random_step

F32 = jnp.float32
EIGHT = MeshShape(("x",), (8,))
GPU, CPU = Cluster.named("h100"), Cluster.named("cpu")
SYNC = dataclasses.replace(GPU, async_collectives=False)


def array(*shape: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, F32)


def regions_of(step: Callable[..., Any], *args: Any) -> Regions:
    return find_regions(build_graph(trace_step(step, args, {})))


def whole(mesh: MeshShape) -> Assignment:
    return Assignment((UNUSED,) * len(mesh.axes), (UNUSED,) * len(mesh.axes))


def layout_of(regions: Regions, split: Callable[[Any, str], int | None], mesh: MeshShape = EIGHT) -> Layout:
    """A layout of one axis: `split` gives for each region, and the kind of its first op, the atom that is split."""
    chosen = []
    for region in regions.regions:
        atom = split(region, regions.graph.ops[region.ops[0]].kind)
        chosen.append(whole(mesh) if atom is None else Assignment((atom,), (UNUSED,)))
    return Layout(regions=regions, mesh=mesh, assignments=chosen, axis_prices=(1.0,))


def on(layout: Layout, cluster: Cluster) -> Timeline:
    return simulate(layout, kernels(layout.regions), CollectiveModel(layout.mesh, cluster))


def only(timeline: Timeline, part: str) -> Interval:
    (found,) = (i for i in timeline.intervals if part in i.name)
    return found


# -- by hand


def two_products(rows: int, columns: int = 1024) -> Layout:
    """`tanh(x @ a) @ b`, split over rows; `b` is stored in pieces, so it is gathered."""
    regions = regions_of(
        lambda x, a, b: jnp.tanh(x @ a) @ b, array(rows, 1024), array(1024, 1024), array(1024, columns)
    )
    weight = regions.region_of[regions.graph.arguments[2]]

    def split(region: Any, kind: str) -> int | None:
        if kind == "argument":
            # x by rows, b by its first dimension, a not at all.
            return None if regions.graph.arguments[1] in region.ops else 0
        return 0

    assert regions.regions[weight].sizes == (1024, columns)
    return layout_of(regions, split)


def test_a_gather_hides_behind_a_product() -> None:
    timeline = on(two_products(rows=1 << 20), GPU)
    gather = only(timeline, "all_gather")
    first, second = (i for i in timeline.intervals if i.name == "dot_general")
    assert (gather.start_s, gather.stream) == (0, "NVLink 4")
    assert gather.end_s < first.end_s
    assert first.end_s <= second.start_s
    assert timeline.exposed_comm_s == 0
    assert timeline.step_s == timeline.compute_s
    assert [i.critical for i in (gather, first, second)] == [False, True, True]


def test_a_gather_that_is_longer_than_the_product_before_it_is_waited_for() -> None:
    timeline = on(two_products(rows=1024, columns=65536), GPU)
    gather = only(timeline, "all_gather")
    first, second = (i for i in timeline.intervals if i.name == "dot_general")
    before = first.seconds + only(timeline, "tanh").seconds
    assert second.start_s == gather.end_s
    assert timeline.exposed_comm_s == pytest.approx(gather.seconds - before)
    assert timeline.step_s == pytest.approx(gather.seconds + second.seconds)
    assert [i.critical for i in (gather, first, second)] == [True, False, True]


def test_synchronous_collectives_hold_up_kernels() -> None:
    layout = two_products(rows=1 << 20)
    beside, alone = on(layout, GPU), on(layout, SYNC)
    gather = only(alone, "all_gather")
    assert alone.exposed_comm_s == pytest.approx(gather.seconds) == pytest.approx(alone.comm_s)
    assert alone.step_s == pytest.approx(beside.step_s + gather.seconds)
    assert not [i for i in alone.intervals if i.stream == COMPUTE and gather.start_s < i.end_s <= gather.end_s]


def test_platforms_have_asynchronous_collectives_or_not() -> None:
    assert [Cluster.named(n).async_collectives for n in ("h100", "v100", "cpu")] == [True, True, False]


def test_sums_run_beside_what_does_not_need_them() -> None:
    """The product over the rows is summed while the second is computed, and waited for by what reads it."""

    def step(x: jax.Array, y: jax.Array) -> jax.Array:
        return (x.T @ x) @ (y @ y)

    regions = regions_of(step, array(1 << 17, 1024), array(1024, 1024))
    product = next(op.id for op in regions.graph.ops if op.kind == "dot_general")
    rows = regions.regions[regions.region_of[product]]
    timeline = on(layout_of(regions, lambda r, _: rows.dims[0].reduced[0] if r is rows else None), GPU)
    summed = only(timeline, "all_reduce")
    first, second, third = (i for i in timeline.intervals if i.name == "dot_general")
    assert summed.start_s == first.end_s == second.start_s
    assert third.start_s == max(summed.end_s, second.end_s)


def scanned(trips: int) -> Layout:
    def step(w: jax.Array, x: jax.Array) -> jax.Array:
        return jax.lax.scan(lambda h, _: (jnp.tanh(h @ w), None), x, None, length=trips)[0]

    regions = regions_of(step, array(1024, 1024), array(8192, 1024))
    dot = next(op.id for op in regions.graph.ops if op.kind == "dot_general")
    product = regions.regions[regions.region_of[dot]]
    # The contraction is split: every trip sums.
    return layout_of(regions, lambda r, _: product.dims[0].reduced[0] if r is product else None)


@pytest.mark.parametrize("trips", [1, 2, 7])
def test_a_loop_is_simulated_once_and_counts_its_trips(trips: int) -> None:
    one, many = on(scanned(1), GPU), on(scanned(trips), GPU)
    assert many.step_s == pytest.approx(trips * one.step_s)
    assert many.exposed_comm_s == pytest.approx(trips * only(many, "all_reduce").seconds)
    assert many.busy_s(COMPUTE) == pytest.approx(many.compute_s) == pytest.approx(trips * one.compute_s)
    assert many.busy_s("NVLink 4") == pytest.approx(many.comm_s) == pytest.approx(trips * one.comm_s)
    blocks = [i for i in many.intervals if not i.repeats]
    assert [(b.trips, b.start_s) for b in blocks] == ([(trips - 1, pytest.approx(one.step_s))] if trips > 1 else [])
    assert all(i.repeats == trips for i in many.intervals if i.repeats)


def test_of_branches_the_costliest_counts() -> None:
    def step(w: jax.Array, x: jax.Array) -> jax.Array:
        return jax.lax.cond(x[0, 0] > 0, lambda x: x @ w @ w @ w, lambda x: x @ w, x)

    regions = regions_of(step, array(1024, 1024), array(8192, 1024))
    layout = layout_of(regions, lambda r, k: None)
    timeline = on(layout, GPU)
    assert [i.name for i in timeline.intervals].count("dot_general") == 3
    counted = estimate(layout, kernels(regions), CollectiveModel(EIGHT, GPU), peak(layout))
    product = next(i for i in timeline.intervals if i.name == "dot_general")
    assert counted.step_s == pytest.approx(timeline.step_s + product.seconds, rel=1e-6)


def gathers(axes: Sequence[str]) -> Layout:
    """Products of replicated rows with weights that are stored in pieces along one mesh axis each."""

    def step(x: jax.Array, *weights: jax.Array) -> tuple[jax.Array, ...]:
        return tuple(x @ w for w in weights)

    mesh = MeshShape(("x", "y"), (2, 8))
    regions = regions_of(step, array(8192, 4096), *[array(4096, 4096)] * len(axes))
    chosen = [whole(mesh)] * len(regions.regions)
    for op, axis in zip(regions.graph.arguments[1:], axes, strict=True):
        chosen[regions.region_of[op]] = Assignment(tuple(0 if a == axis else UNUSED for a in mesh.axes), (UNUSED,) * 2)
    return Layout(regions=regions, mesh=mesh, assignments=chosen, axis_prices=(1.0, 1.0))


def test_collectives_contend_for_a_link_and_not_across_links() -> None:
    cluster = Cluster.named("h100", hosts=2)
    same, across = on(gathers("yy"), cluster), on(gathers("xy"), cluster)
    one, two = (i for i in same.intervals if "all_gather" in i.name)
    assert one.stream == two.stream == "NVLink 4"
    assert two.start_s == one.end_s
    one, two = (i for i in across.intervals if "all_gather" in i.name)
    assert {one.stream, two.stream} == {link.name for link in cluster.links}
    assert one.start_s == two.start_s == 0


def test_a_group_on_both_links_occupies_both() -> None:
    cluster = Cluster.named("h100", hosts=2)
    layout = gathers("x")
    both = [Assignment((0, 0), (UNUSED,) * 2) if a.atoms == (0, UNUSED) else a for a in layout.assignments]
    timeline = on(dataclasses.replace(layout, assignments=both, _specs={}), cluster)
    one, two = (i for i in timeline.intervals if "all_gather" in i.name)
    assert {one.stream, two.stream} == {link.name for link in cluster.links}
    assert (one.start_s, one.end_s) == (two.start_s, two.end_s)
    assert sum(e.seconds for e in timeline.critical_path()) == pytest.approx(timeline.step_s)
    assert timeline.comm_s == pytest.approx(one.seconds)


def test_weights_are_not_gathered_without_end() -> None:
    """Two at most are gathered and not yet used, however long the program."""
    timeline = on(gathers("y" * 8), Cluster.named("h100", hosts=2))
    gathered = [i for i in timeline.intervals if "all_gather" in i.name]
    products = [i for i in timeline.intervals if i.name == "dot_general"]
    assert len(gathered) == len(products) == 8
    for gather, earlier in zip(gathered[2:], products, strict=False):
        assert gather.start_s >= earlier.start_s
    assert gathered[1].start_s == gathered[0].end_s


def test_a_cast_weight_is_cast_early_so_that_it_can_be_gathered_early() -> None:
    def step(x: jax.Array, a: jax.Array, b: jax.Array) -> tuple[jax.Array, jax.Array]:
        y = x @ a
        return y @ b.astype(jnp.bfloat16), b.sum()

    wide = jax.ShapeDtypeStruct((8192, 4096), jnp.bfloat16)
    regions = regions_of(step, wide, jax.ShapeDtypeStruct((4096, 4096), jnp.bfloat16), array(4096, 4096))
    pieces = {
        regions.region_of[op.id]
        for op in regions.graph.ops
        if op.kind == "convert_element_type" or op.id == regions.graph.arguments[2]
    }
    timeline = on(layout_of(regions, lambda r, _: 0 if r.id in pieces else None), GPU)
    gather = only(timeline, "all_gather over x of convert_element_type")
    first = next(i for i in timeline.intervals if i.name == "dot_general")
    cast = next(i for i in timeline.intervals if i.name == "convert_element_type")
    assert cast.end_s == gather.start_s == first.start_s


def test_memory_over_time_reaches_the_peak() -> None:
    layout = two_products(rows=1 << 16)
    model = CollectiveModel(EIGHT, GPU)
    memory = MemoryModel(layout.regions, lifetimes(layout.graph))
    timeline = simulate(layout, kernels(layout.regions), model, memory)
    assert max(size for _, size in timeline.memory) == memory.peak(layout).bytes
    times = [t for t, _ in timeline.memory]
    assert times == sorted(times)
    assert 0 == times[0] <= times[-1] <= timeline.step_s


def test_one_assignment_for_each_region() -> None:
    regions = two_products(rows=1024).regions
    simulator = Simulator(regions, kernels(regions), CollectiveModel(EIGHT, GPU))
    with pytest.raises(ValueError, match="2 assignments for .* regions; give one for each"):
        simulator.run([whole(EIGHT)] * 2)
    with pytest.raises(ValueError, match=r"call run\(assignments\) first"):
        simulator.change(0, whole(EIGHT))


# -- on random programs


LOOPS = ("dot", "dot", "elementwise", "dot of transposed", "centred", "scan of dots", "fori")
MESHES = st.sampled_from([MeshShape(("x",), (4,)), MeshShape(("x", "y"), (2, 2))])
PICKS = drawn_picks(LOOPS, 12)
BRANCHED = drawn_picks((*LOOPS, "cond"), 9)
quick = settings(max_examples=25, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])


def random_simulator(picks: Sequence[Pick], mesh: MeshShape, cluster: Cluster) -> Simulator:
    regions = regions_of(random_step(picks), array(256, 256), array(256, 256), array(256, 256))
    hosts = len(mesh.axes)
    cluster = dataclasses.replace(cluster, hosts=hosts, devices_per_host=mesh.devices // hosts)
    return Simulator(regions, kernels(regions), CollectiveModel(mesh, cluster))


def draw(simulator: Simulator, rng: np.random.Generator) -> list[Assignment]:
    """One candidate for each family."""
    regions, mesh = simulator.regions, simulator.model.mesh
    keys = family_keys(regions)
    chosen = {}
    for key, family in members(keys).items():
        found = candidates(regions, regions.regions[family[0]], mesh)
        chosen[key] = found[int(rng.integers(len(found)))]
    return [chosen[key] for key in keys]


@quick
@given(picks=PICKS, mesh=MESHES, seed=st.integers(0, 99))
def test_where_nothing_overlaps_a_step_is_what_the_estimate_says(picks: list[Pick], mesh: MeshShape, seed: int) -> None:
    simulator = random_simulator(picks, mesh, SYNC)
    overlapping = random_simulator(picks, mesh, GPU)
    rng = np.random.default_rng(seed)
    for _ in range(3):
        found = simulator.run(draw(simulator, rng))
        layout = simulator.layout
        priced = estimate(layout, kernels(layout.regions), simulator.model, peak(layout))
        assert found.step_s == pytest.approx(priced.step_s, rel=1e-9)
        assert found.compute_s == pytest.approx(priced.compute_s, rel=1e-9)
        assert found.comm_s == found.exposed_comm_s == pytest.approx(priced.comm_s, rel=1e-9)
        beside = overlapping.run(layout.assignments)
        assert max(found.compute_s, beside.exposed_comm_s) <= beside.step_s <= found.step_s
        assert (beside.compute_s, beside.comm_s) == (found.compute_s, found.comm_s)


@quick
@given(picks=BRANCHED, mesh=MESHES, seed=st.integers(0, 99), overlap=st.booleans())
def test_changes_give_what_simulating_all_gives(picks: list[Pick], mesh: MeshShape, seed: int, overlap: bool) -> None:
    """Regions and families, one after another, and back; figures and every interval."""
    cluster = GPU if overlap else SYNC
    simulator, fresh = (random_simulator(picks, mesh, cluster) for _ in range(2))
    regions, rng = simulator.regions, np.random.default_rng(seed)
    families = list(members(family_keys(regions)).values())
    simulator.run(draw(simulator, rng))
    for _ in range(8):
        family = families[int(rng.integers(len(families)))]
        found = candidates(regions, regions.regions[family[0]], mesh)
        chosen = found[int(rng.integers(len(found)))]
        who: int | list[int] = family if rng.integers(2) else family[int(rng.integers(len(family)))]
        changed = simulator.change(who, chosen)
        assert changed == fresh.run(simulator.assignments)
        assert simulator.timeline() == fresh.timeline()


@quick
@given(picks=BRANCHED, mesh=MESHES, seed=st.integers(0, 99), overlap=st.booleans())
def test_going_on_gives_what_simulating_all_gives(picks: list[Pick], mesh: MeshShape, seed: int, overlap: bool) -> None:
    """From any plan to the same, to one that is near, and to one that is not."""
    cluster = GPU if overlap else SYNC
    simulator, fresh = (random_simulator(picks, mesh, cluster) for _ in range(2))
    keys, rng = family_keys(simulator.regions), np.random.default_rng(seed)
    plans = [draw(simulator, rng) for _ in range(2)]
    near = {key for key in dict.fromkeys(keys) if rng.random() < 0.2}
    plans.append([a if key in near else b for key, a, b in zip(keys, *plans, strict=True)])
    for plan in (plans[0], plans[1], plans[2], plans[2], plans[1], plans[0]):
        assert simulator.go_on(plan) == fresh.run(plan)
        assert simulator.assignments == plan
        assert simulator.timeline() == fresh.timeline()


@quick
@given(picks=BRANCHED, mesh=MESHES, seed=st.integers(0, 99))
def test_streams_do_one_thing_at_a_time_and_figures_add_up(picks: list[Pick], mesh: MeshShape, seed: int) -> None:
    simulator = random_simulator(picks, mesh, GPU)
    simulator.run(draw(simulator, np.random.default_rng(seed)))
    timeline = simulator.timeline()
    for stream in timeline.streams:
        own = [i for i in timeline.intervals if i.stream == stream]
        assert all(a.end_s <= b.start_s for a, b in itertools.pairwise(own))
    assert timeline.busy_s(COMPUTE) == pytest.approx(timeline.compute_s)
    assert sum(e.seconds for e in timeline.critical_path()) == pytest.approx(timeline.step_s)
    links = [timeline.exposed_s(s) for s in timeline.streams[1:]]
    assert max(links) <= timeline.exposed_comm_s + 1e-15 <= sum(links) + 2e-15
    assert all(0 <= i.start_s < i.end_s <= timeline.step_s for i in timeline.intervals)
    # Every kernel runs, once.
    for scope, block in simulator.tasks.blocks.items():
        log, _ = simulator.log(scope)
        ran = sorted(op for entry in log if entry.stream == COMPUTE_STREAM for op in entry.ops)
        assert ran == sorted(op for ops in block.runs.values() for op in ops)


@quick
@given(picks=PICKS, mesh=MESHES, seed=st.integers(0, 99))
def test_copies_that_wait_for_their_reader_hold_little(picks: list[Pick], mesh: MeshShape, seed: int) -> None:
    simulator = random_simulator(picks, mesh, GPU)
    simulator.run(draw(simulator, np.random.default_rng(seed)))
    layout = simulator.layout
    for scope, schedule in simulator.schedules.items():
        places, edges = schedule.places(), simulator.regions.edges
        size = {p: layout.local_bytes(edges[p].value, layout.operand(edges[p].op, edges[p].operand)) for p in places}
        early = [read for read in simulator.tasks.reads if read.block == scope and read.early == START]
        weights = [size[p] for read in early for p in read.ports if p in size]
        for place in sorted(set(places.values())):
            waiting = [p for p, at in places.items() if at <= place < 3 * edges[p].op]
            held = sum(size[p] for p in waiting)
            assert len(waiting) <= 1 or held <= AHEAD * max(weights, default=0.0) * (1 + 1e-9)


@pytest.mark.parametrize("name", list(table.PROGRAMS))
def test_programs_of_the_table(name: str) -> None:
    """Loops in loops, branches, rematerialisation, custom derivatives: from changes as from scratch."""
    row = table.PROGRAMS[name]
    if row.warns:
        pytest.skip("planning it warns")
    case = row.make()
    program = trace_step(case.step, case.args, case.kwargs, static_argnums=case.static_argnums)
    regions = find_regions(build_graph(program))
    model = CollectiveModel(EIGHT, GPU)
    simulator, fresh = (Simulator(regions, kernels(regions), model) for _ in range(2))
    rng = np.random.default_rng(0)
    simulator.run([whole(EIGHT)] * len(regions.regions))
    for family in list(members(family_keys(regions)).values())[:12]:
        found = candidates(regions, regions.regions[family[0]], EIGHT)
        simulator.change(family, found[int(rng.integers(len(found)))])
    result = simulator.change(0, simulator.assignments[0])
    assert result == fresh.run(simulator.assignments)
    priced = estimate(simulator.layout, kernels(regions), model, peak(simulator.layout))
    branches = any(scope.kind == "cond" for scope in regions.graph.scopes)
    assert result.step_s <= priced.step_s * (1 + 1e-9)
    assert branches or result.compute_s == pytest.approx(priced.compute_s, rel=1e-9)
