"""The front of time against memory, what it is saved as, and what plans know of faster links and more memory."""

from __future__ import annotations

import csv
import dataclasses
import functools
import importlib
import itertools
import json
import re
import xml.dom.minidom
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

import ffjax
from ffjax import plots
from ffjax.cost.cluster import Cluster
from ffjax.cost.collectives import CollectiveModel
from ffjax.cost.simulation.limits import FasterLink, Limits, MoreMemory, StreamUse
from ffjax.errors import BudgetError, FfjaxError, PlanError
from ffjax.ir.spec import MeshShape
from ffjax.pareto import Front
from ffjax.plan import Plan
from ffjax.planning.options import SearchOptions
from ffjax.planning.planner import ProgramSearch
from ffjax.planning.tracing import trace_step
from ffjax.strategies.pareto import non_dominated, pareto_front
from ffjax.strategies.search import SearchResult
from ffjax.strategies.session import Found

H100S = Cluster.named("h100", devices_per_host=4)


def step(params: dict[str, jax.Array], batch: jax.Array) -> tuple[dict[str, jax.Array], jax.Array]:
    def loss(p: dict[str, jax.Array]) -> jax.Array:
        return jnp.mean((jnp.tanh(batch @ p["up"]) @ p["down"] - batch) ** 2)

    value, grads = jax.value_and_grad(loss)(params)
    return jax.tree.map(lambda p, g: p - 0.1 * g, params, grads), value


def arguments(width: int = 1024) -> tuple[dict[str, jax.ShapeDtypeStruct], jax.ShapeDtypeStruct]:
    def f32(*shape: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, jnp.float32)

    return {"up": f32(width, 4 * width), "down": f32(4 * width, width)}, f32(4096, width)


@functools.cache
def front() -> Front:
    return ffjax.pareto(step, *arguments(), cluster=H100S, donate_argnums=0)


@functools.cache
def searched(name: str, memory: str | None = None) -> tuple[ProgramSearch, SearchResult, tuple[Found, ...]]:
    module = importlib.import_module(f"ffjax.examples.{name}")
    config = module.Config.tiny()
    program = trace_step(module.make_train_step(config), module.example_args(config), {}, donate_argnums=0)
    asked = ProgramSearch(program, SearchOptions(cluster=H100S, memory=memory))
    result = asked.search(asked.budget_bytes)
    return asked, result, pareto_front(result, solves=8)


@pytest.mark.parametrize("name", ["gpt", "moe"])
def test_the_front_is_sorted_undominated_and_ends_where_the_search_does(name: str) -> None:
    asked, result, found = searched(name)
    assert len(found) > 1
    for smaller, larger in itertools.pairwise(found):
        assert smaller.peak.bytes < larger.peak.bytes
        assert smaller.predicted_s > larger.predicted_s
    # Of what the search found nothing dominates a point.
    for point in found:
        assert not any(
            f.simulated is not None and f.predicted_s < point.predicted_s and f.peak.bytes < point.peak.bytes
            for f in result.found
        )
    assert all(f.fits for f in found)
    assert found[-1].predicted_s <= result.best.predicted_s
    assert found[0].peak.bytes <= min(f.peak.bytes for f in result.found)
    for f in found:
        simulated = result.session.simulated(f.layout)
        assert simulated.step_s == pytest.approx(f.predicted_s, rel=1e-12)
        assert asked.plan(result, f).estimate.peak_bytes == f.peak.bytes
        memory = result.session.memory
        # That of the search's answer is under its own schedule.
        assert f.peak.bytes in (memory.peak(f.layout).bytes, memory.under(f.layout).peak(f.layout).bytes)


@pytest.mark.parametrize("name", ["gpt", "moe"])
def test_where_nothing_fits_the_front_begins_at_what_would(name: str) -> None:
    _, result, found = searched(name, memory="1KiB")
    assert not result.best.fits
    assert not any(f.fits for f in found)
    assert found[0].peak.bytes <= result.best.peak.bytes
    # A search of which all fits gets nearly as low.
    assert searched(name)[2][0].peak.bytes <= 1.1 * result.best.peak.bytes


def test_a_point_as_budget_finds_a_plan_that_is_no_slower_by_much() -> None:
    for point in front().points[1:]:
        plan = ffjax.plan(step, *arguments(), cluster=H100S, donate_argnums=0, memory=point.peak_bytes)
        assert plan.estimate.peak_bytes <= point.peak_bytes
        assert plan.estimate.step_s <= 1.02 * point.step_s


def test_points_are_plans_that_can_be_saved_and_bound(tmp_path: Path) -> None:
    front().save(tmp_path / "front")
    saved = sorted((tmp_path / "front").glob("[0-9]*.json"))
    assert len(saved) == len(front().points)
    for file, point in zip(saved, front().points, strict=True):
        plan = Plan.load(file)
        assert plan == point.plan
        assert plan.bind(step, *arguments(), donate_argnums=0).simulate().step_s == pytest.approx(point.step_s)
    assert front().best == front().points[-1].plan


def test_what_a_front_is_saved_as(tmp_path: Path) -> None:
    for name in ("front.html", "front.csv", "front.json"):
        front().save(tmp_path / name)
    rows = list(csv.DictReader((tmp_path / "front.csv").read_text().splitlines()))
    figures = json.loads((tmp_path / "front.json").read_text())["points"]
    assert [float(r["step_s"]) for r in rows] == [f["step_s"] for f in figures] == [p.step_s for p in front().points]
    assert [float(r["peak_bytes"]) for r in rows] == [f["peak_bytes"] for f in figures]
    page = (tmp_path / "front.html").read_text()
    (plot,) = re.findall(r"<svg.*?</svg>", page, re.DOTALL)
    drawn = xml.dom.minidom.parseString(plot)
    assert len(drawn.getElementsByTagName("circle")) == len(front().points)
    assert "http" not in page
    for row in front().rows():
        assert row[0] in str(front())
    with pytest.raises(FfjaxError, match=r"front.png.*Remedy: front.html"):
        front().save("front.png")
    with pytest.raises(FfjaxError, match="cannot write"):
        front().save(tmp_path / "nowhere" / "front.csv")


def test_the_price_of_memory_is_the_slope_to_the_next_point() -> None:
    here, larger = front().points[:2]
    slope = (here.step_s - larger.step_s) / (larger.peak_bytes - here.peak_bytes) * 2**30
    assert front().saved_s_per_gib(0) == pytest.approx(slope)
    assert here.plan.limits is not None
    assert here.plan.limits.memory == MoreMemory(
        saved_s_per_gib=slope, peak_bytes=larger.peak_bytes, step_s=larger.step_s
    )
    assert front().saved_s_per_gib(len(front().points) - 1) is None
    last = front().points[-1].plan.limits
    assert last is not None
    assert last.memory is None


def test_points_that_buy_nothing_are_dropped_but_the_fastest_stays() -> None:
    _, result, _ = searched("gpt")

    def found(size: float, seconds: float) -> Found:
        one = result.best
        assert one.simulated is not None
        return dataclasses.replace(
            one,
            peak=dataclasses.replace(one.peak, bytes=size),
            simulated=dataclasses.replace(one.simulated, step_s=seconds),
        )

    plans = [found(5, 1.0), found(4, 1.0001), found(3, 1.9999), found(2, 2.0), found(6, 1.5)]
    assert [f.peak.bytes for f in non_dominated(plans)] == [2, 4, 5]


def test_a_binding_budget_has_a_price() -> None:
    free = ffjax.plan(step, *arguments(), cluster=H100S, donate_argnums=0)
    assert free.limits is not None
    assert free.limits.memory is None
    assert "more would change nothing" in free.explain()
    budget = front().points[0].peak_bytes
    tight = ffjax.plan(step, *arguments(), cluster=H100S, donate_argnums=0, memory=budget)
    assert tight.limits is not None
    more = tight.limits.memory
    assert more is not None
    assert more.saved_s_per_gib > 0
    assert more.peak_bytes > budget
    assert free.estimate.step_s * (1 - 1e-9) <= more.step_s < tight.estimate.step_s
    assert "binds: at the margin a GiB more" in tight.explain()


def test_faster_links_save_what_simulating_on_them_saves() -> None:
    slow = Cluster.named("v100", hosts=2, devices_per_host=2)
    plan = ffjax.plan(step, *arguments(), cluster=slow, strategy="data_parallel", mesh={"x": 4})
    assert plan.limits is not None
    network = slow.links[1]
    saved = {link.link: link for link in plan.limits.links}[network.name]
    faster = dataclasses.replace(
        slow, links=(slow.links[0], dataclasses.replace(network, bytes_per_s=2 * network.bytes_per_s))
    )
    assert plan.estimate.step_s - plan.simulate(faster).step_s == pytest.approx(saved.saved_by_twice_s, rel=1e-6)
    assert 0 < saved.saved_by_tenth_s < saved.saved_by_twice_s
    # The network is what this waits for; NVLink is crossed, but the ring is as slow as its slowest link.
    assert plan.limits.bottleneck == network.name
    assert f"{network.name} " in plan.explain()
    assert "<- bottleneck" in plan.explain()


def test_measured_lines_are_scaled_as_the_formulas_are() -> None:
    cluster = Cluster.named("h100")
    mesh = MeshShape(("x",), (8,))
    links = tuple(dataclasses.replace(link, bytes_per_s=2 * link.bytes_per_s) for link in cluster.links)
    alpha_s, beta = CollectiveModel(mesh, cluster).coefficients("all_gather", ("x",))
    assert CollectiveModel(mesh, cluster, links).coefficients("all_gather", ("x",)) == pytest.approx(
        (alpha_s, beta / 2)
    )
    assert CollectiveModel(MeshShape(("x", "y"), (8, 1)), cluster, links).coefficients("all_gather", ("y",)) == (0, 0)


def test_plans_of_older_files_have_no_limits() -> None:
    plan = front().points[0].plan
    content = json.loads(plan.to_json())
    del content["limits"]
    older = Plan.from_json(json.dumps(content))
    assert older.limits is None
    assert "waits for" not in older.explain()
    assert set(older.explain().splitlines()) < set(plan.explain().splitlines())
    del content["budget_bytes"]
    with pytest.raises(PlanError, match="lacks the field 'budget_bytes'"):
        Plan.from_json(json.dumps(content))


def test_the_bottleneck_is_compute_unless_kernels_wait_longer_than_they_run() -> None:
    def limits(busy_s: float, exposed_s: float) -> Limits:
        streams = (
            StreamUse(stream="compute", busy_s=busy_s, exposed_s=0.0),
            StreamUse(stream="net", busy_s=9.0, exposed_s=exposed_s),
        )
        return Limits(streams=streams, links=(FasterLink(link="net", saved_by_tenth_s=0.0, saved_by_twice_s=0.0),))

    assert limits(2.0, 1.0).bottleneck == "compute"
    assert limits(2.0, 3.0).bottleneck == "net"


def test_plots_of_nothing_and_of_one_point() -> None:
    assert plots.points([], x="", y="", x_text=str, y_text=str) == "<p>none</p>"
    assert plots.bars([], text=str, name="") == "<p>none</p>"
    one = plots.points([(0.0, 0.0, "<only>", False)], x="x", y="y", x_text=str, y_text=str, limit=5.0)
    assert "&lt;only&gt;" in one
    assert "limit" not in one
    xml.dom.minidom.parseString(one)


def test_pareto_never_stops_on_a_budget() -> None:
    with pytest.raises(BudgetError):
        ffjax.plan(step, *arguments(), cluster=H100S, memory="1KiB", strategy="fsdp")
    tight = ffjax.pareto(step, *arguments(), cluster=H100S, memory="1KiB", strategy="fsdp")
    assert tight.best is None
    assert {p.strategy for p in tight.points} == {"fsdp"}
    assert "does not fit" in str(tight)
