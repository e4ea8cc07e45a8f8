"""Timelines: their sums, and what they are saved as."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from click.testing import CliRunner

import ffjax
from ffjax.cli import main
from ffjax.cost.cluster import Cluster
from ffjax.cost.simulation.timeline import COMPUTE, Interval, Timeline
from ffjax.errors import ClusterError, FfjaxError, PlanError
from ffjax.plan import Plan

LINK = "NVLink 4"


def task(name: str, start_s: float, end_s: float, *, stream: str = COMPUTE, critical: bool = False) -> Interval:
    return Interval(name=name, stream=stream, start_s=start_s, end_s=end_s, source="a.py:7", critical=critical)


def by_hand() -> Timeline:
    """A product, a gather that it hides half of, a product; then four trips of a loop."""
    loop = Interval(name="mul", stream=COMPUTE, start_s=6, end_s=7, critical=True, repeats=4)
    block = Interval(name="3 more trips", stream=COMPUTE, start_s=7, end_s=10, trips=3, critical=True, repeats=0)
    return Timeline(
        streams=(COMPUTE, LINK),
        intervals=(
            task("<dot>", 0, 2),
            task("gather", 0, 4, stream=LINK, critical=True),
            task("<dot>", 4, 6, critical=True),
            loop,
            block,
        ),
        step_s=10,
        compute_s=8,
        comm_s=4,
        exposed_comm_s=2,
        memory=((0, 2**30), (4, 3 * 2**30), (6, 2**29)),
    )


def test_sums() -> None:
    timeline = by_hand()
    assert (timeline.busy_s(COMPUTE), timeline.busy_s(LINK)) == (8, 4)
    assert (timeline.exposed_s(COMPUTE), timeline.exposed_s(LINK)) == (0, 2)
    path = [(e.name, e.count, e.seconds) for e in timeline.critical_path()]
    assert path == [("gather", 1, 4), ("mul", 4, 4), ("<dot>", 1, 2)]


def test_trace_events(tmp_path: Path) -> None:
    by_hand().save(tmp_path / "trace.json")
    content = json.loads((tmp_path / "trace.json").read_text())
    events = content["traceEvents"]
    names = {e["tid"]: e["args"]["name"] for e in events if e["name"] == "thread_name"}
    assert list(names.values()) == [COMPUTE, LINK]
    tasks = [(e["name"], names[e["tid"]], e["ts"], e["dur"]) for e in events if e["ph"] == "X"]
    assert tasks[1] == ("gather", LINK, 0, 4e6)
    assert tasks[-1] == ("3 more trips", COMPUTE, 7e6, 3e6)
    assert [(e["ts"], e["args"]["bytes"]) for e in events if e["ph"] == "C"][1] == (4e6, 3 * 2**30)
    assert content["otherData"]["step_s"] == 10


def test_report(tmp_path: Path) -> None:
    by_hand().save(tmp_path / "report.html")
    text = (tmp_path / "report.html").read_text()
    assert "<dot>" not in text
    assert "&lt;dot&gt;" in text
    assert not re.search(r"<script|https?://|<link|<img", text), "needs nothing beside itself"
    streams = text[text.index('aria-label="streams') : text.index("</svg>")]
    assert streams.count("<rect") == 5
    assert re.findall(r'class="(\w+)" x="([\d.]+)"', streams) == [
        ("task", "0.00"),
        ("critical", "480.00"),
        ("critical", "720.00"),
        ("loop", "840.00"),
        ("critical", "0.00"),
    ]
    assert "Memory, up to 3 GiB" in text
    assert 'class="memory"' in text
    assert "<td>40.0%</td>" in text


def test_an_empty_step_has_a_report(tmp_path: Path) -> None:
    empty = Timeline(streams=(COMPUTE,), intervals=(), step_s=0, compute_s=0, comm_s=0, exposed_comm_s=0)
    empty.save(tmp_path / "report.html")
    assert "not known" in (tmp_path / "report.html").read_text()


def test_what_cannot_be_saved(tmp_path: Path) -> None:
    with pytest.raises(FfjaxError, match=r"'step.txt': a timeline is saved as .json or .html. Remedy"):
        by_hand().save("step.txt")
    with pytest.raises(FfjaxError, match=r"cannot write .*Remedy: a path in a folder that is there"):
        by_hand().save(tmp_path / "missing" / "trace.json")


# -- of plans


def small_plan(cluster: Cluster) -> Plan:
    def step(w: jax.Array, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        loss, grad = jax.value_and_grad(lambda w: ((x @ w) ** 2).mean())(w)
        return w - 0.1 * grad, loss

    shapes = jax.ShapeDtypeStruct((256, 256), jnp.float32), jax.ShapeDtypeStruct((4096, 256), jnp.float32)
    return ffjax.plan(step, *shapes, cluster=cluster, strategy="data_parallel", donate_argnums=0)


def loaded(plan: Plan) -> Plan:
    """As read from a file, and bound again: the cluster is known by name alone."""
    return Plan.from_json(plan.to_json())


def rebound(plan: Plan) -> Plan:
    return dataclasses.replace(loaded(plan), layout=plan.layout)


def test_a_plan_is_simulated() -> None:
    plan = small_plan(Cluster.named("h100"))
    timeline = plan.simulate()
    assert timeline.step_s <= plan.estimate.step_s
    assert timeline.compute_s == pytest.approx(plan.estimate.compute_s)
    assert timeline.comm_s == pytest.approx(plan.estimate.comm_s)
    assert max(size for _, size in timeline.memory) == plan.estimate.peak_bytes
    assert rebound(plan).simulate() == timeline


def test_a_loaded_plan_finds_hosts_of_a_shipped_cluster() -> None:
    plan = small_plan(Cluster.named("h100", hosts=2))
    assert rebound(plan).simulate() == plan.simulate()
    few = small_plan(Cluster.named("h100", devices_per_host=4))
    assert rebound(few).simulate() == few.simulate()


def test_plans_that_cannot_be_simulated() -> None:
    plan = small_plan(Cluster.named("h100"))
    with pytest.raises(PlanError, match=r"not bound to a program. Remedy: plan.bind"):
        loaded(plan).simulate()
    mine = dataclasses.replace(rebound(plan), cluster="mine")
    with pytest.raises(PlanError, match=r"the cluster 'mine', which is none of those shipped .*Remedy: cluster=ffjax"):
        mine.simulate()
    assert mine.simulate(Cluster.named("h100")) == plan.simulate()
    with pytest.raises(PlanError, match=r"cannot run there: mesh 8 has 8 devices but cluster 'h100' has 16"):
        plan.simulate(Cluster.named("h100", hosts=2))
    two = dataclasses.replace(plan, axis_prices=(7.0,))
    with pytest.raises(PlanError, match=r"made for other links than those of 'h100' with 1 x 8 devices. Remedy"):
        two.simulate()


def test_the_command(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(
        "import jax, jax.numpy as jnp\n"
        "def step(w, x):\n    return w - (x.T @ x)\n"
        "def example_args():\n"
        "    return jax.ShapeDtypeStruct((256, 256), jnp.float32), jax.ShapeDtypeStruct((4096, 256), jnp.float32)\n"
    )
    out = tmp_path / "trace.json"
    asked = ["simulate", f"{tmp_path / 'mine.py'}:step", "--cluster", "h100", "--strategy", "data_parallel"]
    done = CliRunner().invoke(main, [*asked, "--out", str(out)])
    assert done.exit_code == 0, done.output
    for part in ("step on 8 devices of 'h100'", "exposed communication", LINK, "on the critical path", "dot_general"):
        assert part in done.output
    assert json.loads(out.read_text())["traceEvents"]
    wrong = CliRunner().invoke(main, [*asked, "--out", str(tmp_path / "trace.txt")])
    assert wrong.exit_code == 2
    assert "saved as .json or .html" in wrong.output


# -- clusters


def test_links_have_names_of_their_own() -> None:
    cluster = Cluster.named("h100")
    for name in (cluster.links[1].name, COMPUTE):
        links = (dataclasses.replace(cluster.links[0], name=name), cluster.links[1])
        with pytest.raises(ClusterError, match="give each a name of its own"):
            dataclasses.replace(cluster, links=links)


def test_whether_collectives_are_asynchronous_is_read_and_checked(tmp_path: Path) -> None:
    text = (Path(ffjax.__file__).parent.parent / "cost" / "clusters" / "v100.toml").read_text()
    text = re.sub(r"target_config.*\n", "", text)
    for line, wanted in (("async_collectives = false\n", False), ("", True)):
        file = tmp_path / "mine.toml"
        file.write_text(text.replace("async_collectives = true\n", line))
        assert Cluster.load(file).async_collectives is wanted
    file.write_text(text.replace("async_collectives = true", 'async_collectives = "no"'))
    with pytest.raises(ClusterError, match="async_collectives = 'no' is not true or false"):
        Cluster.load(file)
