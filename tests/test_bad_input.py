"""Each bad input gets an error that names it and says what to do instead; none is silently taken for something else."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

import ffjax
from ffjax.cost.cluster import Cluster
from ffjax.cost.hardware import parse_bytes
from ffjax.errors import (
    BudgetError,
    ClusterError,
    FfjaxError,
    FfjaxWarning,
    PinError,
    PlanError,
    PlanMismatch,
    TraceError,
)
from ffjax.plan import Plan

Tree = dict[str, Any]
MESH = {"x": 8}


def step(state: Tree, batch: Tree) -> tuple[Tree, jax.Array]:
    """Two layers, their gradients, plain descent and a counter."""

    def loss_fn(params: Tree) -> jax.Array:
        hidden = jnp.tanh(batch["x"] @ params["up"] + params["bias"])
        return ((hidden @ params["down"] - batch["y"]) ** 2).mean()

    loss, grads = jax.value_and_grad(loss_fn)(state["params"])
    params = jax.tree.map(lambda p, g: p - 0.1 * g, state["params"], grads)
    return {"params": params, "step": state["step"] + 1}, loss


def arguments(batch: int = 16, width: int = 64) -> tuple[Tree, Tree]:
    shapes = {"up": (32, width), "bias": (width,), "down": (width, 8)}
    params = {name: np.full(shape, 0.01, np.float32) for name, shape in shapes.items()}
    return {"params": params, "step": 0}, {"x": np.ones((batch, 32), np.float32), "y": np.ones((batch, 8), np.float32)}


def planned(**options: Any) -> Plan:
    return ffjax.plan(step, *arguments(), **options)


def sixteen() -> Cluster:
    return Cluster.named("cpu", devices_per_host=16)


Call = Callable[[], object]
OPTIONS: dict[str, tuple[Call, type[FfjaxError], str]] = {
    "memory that is no amount": (lambda: planned(memory="lots"), ClusterError, "'lots'.*70GiB"),
    "memory of nothing": (lambda: planned(memory=0), ClusterError, "0 is no amount"),
    "memory of another type": (lambda: planned(memory=["70GiB"]), ClusterError, r"\['70GiB'\] is no amount"),
    "strategy that is unknown": (lambda: planned(strategy="zero3"), PlanError, "'zero3'.*known: auto.*fsdp"),
    "strategy that needs two axes": (
        lambda: planned(strategy="fsdp+tensor_parallel", mesh=MESH),
        PlanError,
        r"'fsdp\+tensor_parallel'.*more axes",
    ),
    "cluster by its name": (lambda: planned(cluster="h100"), ClusterError, r"'h100' is no Cluster.*Cluster.named\("),
    "cluster of no hosts": (lambda: Cluster.named("h100", hosts=0), ClusterError, "hosts = 0.*hosts=8"),
    "cluster of no devices": (lambda: Cluster.named("h100", devices_per_host=0), ClusterError, "devices_per_host = 0"),
    "cluster without a name": (lambda: Cluster.named(""), ClusterError, "unknown cluster ''.*known: a100"),
    "mesh larger than the cluster": (lambda: planned(mesh={"x": 16}), ClusterError, "needs 16 devices.*has 8.*smaller"),
    "mesh smaller than the cluster": (lambda: planned(mesh={"x": 4}), ClusterError, "uses 4 of the 8.*use all"),
    "mesh of no axes": (lambda: planned(mesh={}), ClusterError, "uses 1 of the 8"),
    "mesh of a negative size": (lambda: planned(mesh={"x": -8}), ClusterError, "'x' of size -8.*at least 1"),
    "mesh of words": (lambda: planned(mesh={"x": "eight"}), ClusterError, "'x' of size 'eight'"),
    "mesh that is a number": (lambda: planned(mesh=8), ClusterError, r"mesh=8 is no mapping.*\{'x': 8\}"),
    "static_argnums past the end": (lambda: planned(static_argnums=5), PlanError, "static_argnums=5.*it takes 2"),
    "static_argnames that there are not": (
        lambda: ffjax.autoshard(step, static_argnames=("batch", "n")),
        PlanError,
        "step: static_argnames=.*no argument 'n'.*one of batch, state",
    ),
    "static_argnames of what has no name": (
        lambda: ffjax.pareto(lambda state, /: state, *arguments()[:1], static_argnames="state"),
        PlanError,
        "'state' cannot be passed by keyword.*its number",
    ),
    "static_argnames that is a number": (lambda: planned(static_argnames=1), PlanError, "1.*is no name"),
    "static and donated": (
        lambda: planned(static_argnames="batch", donate_argnums=1),
        PlanError,
        "argument batch of step is static and donated",
    ),
    "donate_argnums past the end": (lambda: planned(donate_argnums=(0, -3)), PlanError, "no argument -3"),
    "donate_argnums that is a name": (lambda: planned(donate_argnums="state"), PlanError, "'s' is no number"),
    "more devices than there are": (
        lambda: ffjax.autoshard(step, cluster=sixteen())(*arguments()),
        ClusterError,
        "on 16 devices, but there are 8.*fake_devices",
    ),
    "lowering for too few devices": (
        lambda: planned(cluster=sixteen()).lower(jax.devices()),
        ClusterError,
        "needs 16 devices.*there are 8.*plan for fewer",
    ),
    "a static argument that cannot be hashed": (
        lambda: ffjax.autoshard(step, static_argnums=0)(*arguments()),
        PlanError,
        "argument 0 of step is static, but dict cannot be hashed.*frozen dataclass",
    ),
    "no function": (lambda: ffjax.autoshard(3), TraceError, "3, which cannot be called"),  # type: ignore[call-overload]
    "a plan and options that it makes idle": (
        lambda: ffjax.autoshard(step, plan=planned(), pins={"params/up": P("x")}),
        PlanError,
        "plan= and pins=.*drop pins=",
    ),
    "init before there is a plan": (
        lambda: ffjax.autoshard(step).init(lambda: arguments()[0]),
        PlanError,
        r"step.init has no plan yet.*step.plan\(state, batch\) first.*jax.eval_shape",
    ),
    "a state placed before there is a plan": (
        lambda: ffjax.autoshard(step).place_state(arguments()[0]),
        PlanError,
        r"step.place_state has no plan yet.*call step.plan\(state, batch\) first, with arrays or shapes.*or run a step",
    ),
}


@pytest.mark.parametrize("name", OPTIONS)
def test_options_that_cannot_be(name: str) -> None:
    call, error, says = OPTIONS[name]
    with pytest.raises(error, match=re.compile(says, re.DOTALL)):
        call()


PINS: dict[str, tuple[Any, str]] = {
    "matches nothing": ({"encoder/*": P("x")}, "'encoder/.*matches no argument.*such as state/params/bias"),
    "empty pattern": ({"": P("x")}, "'' matches no argument"),
    "contradict each other": (
        {"params/up": P("x"), "**/up": P(None, "x")},
        r"'params/up' \(\(x, -\)\) and '\*\*/up' \(\(-, x\)\) contradict.*state/params/up",
    ),
    "unknown axis": ({"params/up": P("z")}, r"mesh axes \['z'\].*\{'x': 8\}.*mesh="),
    "too long a spec": ({"params/bias": P("x", None)}, "2 entries, state/params/bias has 1 dimensions.*shorten"),
    "scalar": ({"step": P("x")}, "1 entries, state/step has 0 dimensions"),
    "does not divide": (
        {"batch/x": P(None, "x")},
        r"batch/x of shape \[16, 20\] as \(-, x\).*divides on none.*another",
    ),
    "one axis twice": ({"params/up": P("x", "x")}, "uses an axis twice"),
    "no PartitionSpec": ({"params/up": "x"}, "'params/up' is 'x'.*PartitionSpec"),
    "numbers for axes": ({"params/up": P(3)}, r"P\(3,?\).*None, a mesh axis"),
    "no mapping": (["params/up"], "no mapping.*PartitionSpec for each path"),
}


@pytest.mark.parametrize("name", PINS)
def test_pins_that_cannot_be(name: str) -> None:
    pins, says = PINS[name]
    state, batch = arguments()
    if name == "does not divide":
        state["params"]["up"] = state["params"]["up"][:20]
        batch["x"] = batch["x"][:, :20]
    with pytest.raises(PinError, match=says):
        ffjax.plan(step, state, batch, mesh=MESH, pins=pins)


def test_pins_on_arrays_that_are_always_sharded_alike() -> None:
    def add(a: jax.Array, b: jax.Array) -> jax.Array:
        return jnp.sin(a) + jnp.cos(b)

    arrays = np.ones((8, 8), np.float32), np.ones((8, 8), np.float32)
    with pytest.raises(PinError, match=r"'a', 'b': a as \(x, -\), b as \(-, x\).*cannot be sharded differently.*alike"):
        ffjax.plan(add, *arrays, mesh=MESH, pins={"a": P("x"), "b": P(None, "x")})


def test_a_pin_that_a_named_strategy_excludes() -> None:
    with pytest.raises(PinError, match=r"strategy 'data_parallel'.*loosen the pins"):
        planned(mesh=MESH, strategy="data_parallel", pins={"params/up": P(None, "x")})


def _branches(state: Tree, batch: Tree) -> object:
    return state if batch["x"].sum() > 0 else batch


def _leaves_a_tracer(found: list[Any]) -> Callable[[Tree, Tree], object]:
    def leave(state: Tree, batch: Tree) -> Tree:
        found.append(batch["x"].sum())
        return state

    ffjax.plan(leave, *arguments())
    return lambda state, batch: found[0] + 1


UNTRACEABLE: dict[str, tuple[Callable[..., object], str]] = {
    "if on a value": (
        _branches,
        r"_branches.*TracerBool.*test_bad_input.py:\d+ \(return state if.*'batch/x'.*lax.cond",
    ),
    "numpy": (lambda state, batch: np.asarray(batch["x"]), "TracerArray.*'batch/x'.*jnp for np"),
    "float": (lambda state, batch: float(batch["y"].sum()), "Concretization.*'batch/y'"),
    "range": (lambda state, batch: [0 for _ in range(state["step"])], "TracerInteger.*'state/step'.*static_argnums"),
    "a mean over devices": (
        lambda state, batch: jax.lax.pmean(batch["x"], "batch"),
        "unbound axis name: batch.*without psum and pmean",
    ),
    "a leaked value": (_leaves_a_tracer([]), "another traced function left behind.*return such values"),
    "a result that is no array": (lambda state, batch: "done", "type <class 'str'>"),
    "wrong number of arguments": (lambda state: state, "takes 1 positional argument but 2"),
    "shapes that do not match": (lambda state, batch: batch["x"] @ batch["x"], r"\(32,\) and \(16,\)"),
}


@pytest.mark.parametrize("name", UNTRACEABLE)
def test_steps_that_cannot_be_traced(name: str) -> None:
    fn, says = UNTRACEABLE[name]
    with pytest.raises(TraceError, match=re.compile(says, re.DOTALL)) as error:
        ffjax.plan(fn, *arguments())
    assert "ir/trace.py" not in str(error.value) or name == "a result that is no array"


@pytest.mark.parametrize("value", ["hello", object(), {1, 2}], ids=["text", "object", "set"])
def test_arguments_that_are_no_arrays(value: object) -> None:
    for call in (ffjax.plan, ffjax.autoshard(step)):
        args = (step, value, arguments()[1]) if call is ffjax.plan else (value, arguments()[1])
        with pytest.raises(TraceError, match=r"argument state.* is \w+, which is no array.*static_argnums"):
            call(*args)  # type: ignore[operator]


def test_errors_of_the_step_itself_pass_through() -> None:
    with pytest.raises(KeyError, match="missing"):
        ffjax.plan(lambda state, batch: batch["missing"], *arguments())


def test_a_batch_that_no_axis_divides_warns_once() -> None:
    with pytest.warns(FfjaxWarning) as warned:
        plan = ffjax.plan(step, *arguments(batch=7), mesh=MESH)
    assert [str(w.message) for w in warned] == [
        "the batch is not split: dimension 0 of batch/x has size 7, which no axis of the mesh {'x': 8} divides. "
        "Remedy: a batch of 8, or a mesh with an axis that divides 7."
    ]
    assert plan.spec("batch/x") == P(None, None)


def test_a_batch_that_one_axis_divides_does_not_warn() -> None:
    ffjax.plan(step, *arguments(batch=6), mesh={"x": 4, "y": 2})


def test_a_batch_of_which_an_odd_part_is_read_does_not_warn() -> None:
    """What is not split is the part; the batch itself could be."""

    def part(w: jax.Array, x: jax.Array) -> jax.Array:
        return w - 0.1 * jax.grad(lambda w: jax.lax.cumlogsumexp(x @ w).sum())(w)

    for strategy in ("auto", "data_parallel"):
        ffjax.plan(part, jnp.ones((16, 16)), jnp.ones((16, 16)), mesh=MESH, strategy=strategy)


@pytest.mark.parametrize("strategy", ["auto", "fsdp"])
def test_a_budget_that_nothing_fits(strategy: str) -> None:
    """The error says what conflicts, and planning with exactly the budget that it names succeeds."""
    args = arguments(width=512)
    with pytest.raises(BudgetError, match=r"(?s)no plan fits 1000B per device on 8 devices.*state/params/up") as error:
        ffjax.plan(step, *args, memory=1000, strategy=strategy)
    named = re.search(r"memory='(.*?)'", str(error.value))
    assert named is not None
    plan = ffjax.plan(step, *args, memory=named[1], strategy=strategy)
    assert plan.estimate.peak_bytes <= parse_bytes(named[1])
    # The least that there can be: the whole state and batch, split over all devices.
    whole = sum(np.prod(p.shape) * 4 for p in plan.args)
    assert parse_bytes(named[1]) < 3.5 * whole / 8 if strategy == "auto" else whole
    with pytest.raises(BudgetError):
        ffjax.plan(step, *args, memory=parse_bytes(named[1]) * 0.8, strategy=strategy)


def test_a_changed_shape_is_searched_anew_or_refused() -> None:
    searched = ffjax.autoshard(step, mesh=MESH)
    assert float(searched(*arguments(batch=16))[1]) == pytest.approx(float(jax.jit(step)(*arguments(batch=16))[1]))
    assert float(searched(*arguments(batch=32))[1]) == pytest.approx(float(jax.jit(step)(*arguments(batch=32))[1]))
    assert searched.plan(*arguments(batch=32)).args[-1].shape == (32, 8)
    fixed = ffjax.autoshard(step, plan=searched.plan(*arguments(batch=16)))
    fixed(*arguments(batch=16))
    with pytest.raises(
        PlanMismatch, match=r"batch/x: float32\[16, 32\], but the argument is batch/x: float32\[32, 32\]"
    ):
        fixed(*arguments(batch=32))


def test_a_plan_for_another_program() -> None:
    def other(state: Tree, batch: Tree) -> tuple[Tree, jax.Array]:
        new, loss = step(state, batch)
        return new, loss * loss

    with pytest.raises(PlanMismatch, match=r"made for 'step'.*not for this 'other'.*search a new plan"):
        planned(mesh=MESH).bind(other, *arguments())


def test_a_plan_for_more_devices_than_there_are() -> None:
    with pytest.raises(ClusterError, match="on 16 devices, but there are 8"):
        ffjax.autoshard(step, plan=planned(cluster=sixteen()))(*arguments())


def _set(*path: str | int) -> Callable[[Any, object], None]:
    def put(content: Any, value: object) -> None:
        for part in path[:-1]:
            content = content[part]
        content[path[-1]] = value

    return put


DAMAGE: dict[str, tuple[Callable[[Any, object], None], object, str]] = {
    "another format": (_set("format"), 99, "format 99, this ffjax reads 1.*search it again"),
    "a number as text": (_set("devices"), "eight", "devices is 'eight', expected int"),
    "a list as a number": (_set("args"), 3, "args is '3', expected list"),
    "an entry of a wrong type": (_set("args", 0, "path"), 3, r"args\[0\].path is '3', expected str"),
    "an unknown field": (_set("colour"), "red", "unknown field 'colour'"),
    "a mesh of other devices": (_set("mesh"), {"x": 4}, "does not have the 8 devices"),
    "a mesh of words": (_set("mesh"), {"x": "eight"}, "mesh.x is 'eight', expected int"),
    "an axis that does not exist": (_set("args", 1, "spec"), [["q"], []], "state/params/down names the axis 'q'"),
    "too long a spec": (_set("args", 0, "spec"), [[], []], "state/params/bias has 1 dimensions"),
    "a decision on no axis": (_set("decisions", 0, "split"), {"q": "i"}, "decision for argument.* names the axis 'q'"),
    "a decision on no factor": (
        _set("decisions", 0, "split"),
        {"x": "zz"},
        "splits 'zz', which is none of its factors",
    ),
    "prices of other axes": (_set("axis_prices"), [1.0, 2.0], "axis_prices has 2 entries"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_damaged_plans(name: str, tmp_path: Path) -> None:
    damage, value, says = DAMAGE[name]
    content = json.loads(planned(mesh=MESH).to_json())
    damage(content, value)
    path = tmp_path / "plan.json"
    path.write_text(json.dumps(content), encoding="utf-8")
    with pytest.raises(PlanError, match=says) as error:
        Plan.load(path)
    assert str(path) in str(error.value)
    assert "Remedy" in str(error.value)


@pytest.mark.parametrize("text", ["", "[]", "null", "{}", "nonsense", '{"format": 1', '{"format": 1}'])
def test_text_that_is_no_plan(text: str, tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(PlanError, match=r"plan.json.*Remedy"):
        Plan.load(path)


def test_a_plan_that_is_cut_short_anywhere(tmp_path: Path) -> None:
    text = planned(mesh=MESH).to_json()
    path = tmp_path / "plan.json"
    for share in range(10):
        path.write_text(text[: len(text) * share // 10], encoding="utf-8")
        with pytest.raises(PlanError, match=r"plan.json"):
            Plan.load(path)


def test_a_plan_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(PlanError, match=r"nowhere.json.*check the path"):
        Plan.load(tmp_path / "nowhere.json")


def test_arguments_that_do_not_go_with_the_decisions() -> None:
    content = json.loads(planned(mesh=MESH, strategy="fsdp").to_json())
    content["args"][2]["spec"] = [[], []]
    with pytest.raises(PlanError, match=r"state/params/up is \(-, -\), but by its decisions it is.*pins="):
        Plan.from_json(json.dumps(content)).bind(step, *arguments())


def test_a_decision_that_is_missing_or_impossible() -> None:
    plan = planned(mesh=MESH)
    content = json.loads(plan.to_json())
    del content["decisions"][0]
    with pytest.raises(PlanError, match="no decision for argument"):
        Plan.from_json(json.dumps(content)).bind(step, *arguments())
    content = json.loads(planned(mesh={"x": 4, "y": 2}).to_json())
    named = next(d for d in content["decisions"] if 8 in d["factors"].values())
    factor = next(f for f, size in named["factors"].items() if size == 8)
    content["mesh"], named["split"] = {"x": 2, "y": 4}, {"x": factor, "y": factor}
    named["scatter"] = {"x": 7}
    with pytest.raises(PlanError, match="an impossible decision for"):
        Plan.from_json(json.dumps(content)).bind(step, *arguments())


def test_a_plan_that_is_not_bound_says_how_to_bind_it() -> None:
    loaded = Plan.from_json(planned(mesh=MESH).to_json())
    with pytest.raises(PlanError, match=r"not bound to a program.*plan.bind"):
        loaded.lower()


def test_side_effects_happen_once_and_callbacks_every_time(capfd: pytest.CaptureFixture[str]) -> None:
    calls: list[int] = []

    def noisy(state: jax.Array) -> jax.Array:
        calls.append(1)
        jax.debug.print("now {}", state[0])
        return state + 1

    sharded = ffjax.autoshard(noisy, mesh=MESH)
    state = jnp.zeros(8)
    for _ in range(3):
        state = sharded(state)
    jax.effects_barrier()
    assert calls == [1]
    assert [line for line in capfd.readouterr().out.splitlines() if line.startswith("now")] == [
        "now 0.0",
        "now 1.0",
        "now 2.0",
    ]
