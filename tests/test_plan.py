"""Plans as data: text and back, fingerprints, binding, reviewing, pins, the cache, and the state that they place."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
import threading
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

import ffjax
from ffjax import sharded as sharded_module
from ffjax.cost.cluster import Cluster
from ffjax.emit.emit import in_shardings
from ffjax.emit.run import device_mesh
from ffjax.errors import ClusterError, FfjaxWarning
from ffjax.plan import Plan

Tree = dict[str, Any]
MESH = {"x": 4, "y": 2}
LAYERS = 3

SOURCE = """
import jax, jax.numpy as jnp

def step(state, batch):
    def loss_fn(params):
        x = batch["x"]
        for i in range(len(params)):
            x = jnp.tanh(x @ params[f"layer_{i}"]["kernel"] + params[f"layer_{i}"]["bias"])
        return ((x - batch["y"]) ** 2).mean()

    loss, grads = jax.value_and_grad(loss_fn)(state["params"])
    params = jax.tree.map(lambda p, g: p - 0.1 * g, state["params"], grads)
    return {"params": params, "step": state["step"] + 1}, loss
"""


def step_of(source: str = SOURCE) -> Callable[..., Any]:
    module = types.ModuleType("steps")
    exec(compile(source, "steps.py", "exec"), module.__dict__)
    return module.step  # type: ignore[no-any-return]


step = step_of()


def init(key: jax.Array, width: int = 64) -> Tree:
    keys = jax.random.split(key, LAYERS)
    layers = {
        f"layer_{i}": {"kernel": jax.random.normal(k, (width, width)) / 8, "bias": jnp.zeros(width)}
        for i, k in enumerate(keys)
    }
    return {"params": layers, "step": jnp.zeros((), jnp.int32)}


def arguments(width: int = 64, batch: int = 16, dtype: Any = jnp.float32) -> tuple[Tree, Tree]:
    state = jax.tree.map(
        lambda v: jax.ShapeDtypeStruct(v.shape, dtype if v.dtype == jnp.float32 else v.dtype),
        jax.eval_shape(lambda: init(jax.random.key(0), width)),
    )
    data = jax.ShapeDtypeStruct((batch, width), dtype)
    return state, {"x": data, "y": data}


def planned(**options: Any) -> Plan:
    return ffjax.plan(step, *arguments(), **{"mesh": MESH, **options})


def decisions(plan: Plan) -> str:
    """All of a plan's text but for the times that the search took."""
    content = json.loads(plan.to_json())
    del content["search"]["seconds"]
    return json.dumps(content)


def test_text_and_back(tmp_path: Path) -> None:
    for options in ({}, {"pins": {"**/kernel": P(None, "x")}}, {"strategy": "fsdp"}):
        plan = planned(**options)
        plan.save(tmp_path / "deep" / "plan.json")
        loaded = Plan.load(tmp_path / "deep" / "plan.json")
        assert loaded == plan
        assert loaded.layout is None
        assert loaded.to_json() == plan.to_json() == (tmp_path / "deep" / "plan.json").read_text(encoding="utf-8")
        assert loaded.spec("state/params/layer_0/kernel") == plan.spec("state/params/layer_0/kernel")
        assert loaded.in_specs["batch/x"] == plan.in_specs[0][1]["x"]


def test_text_is_plain_json() -> None:
    def refuse(constant: str) -> float:
        raise AssertionError(f"{constant} is no JSON")

    json.loads(planned().to_json(), parse_constant=refuse)


def test_planning_twice_gives_one_text() -> None:
    for options in ({}, {"mesh": None}, {"mesh": {"x": 8}, "strategy": "fsdp"}):
        assert decisions(planned(**options)) == decisions(planned(**options))


def test_one_text_in_every_process(tmp_path: Path) -> None:
    """Whatever the hash seed: nothing depends on the order of a set."""
    script = (
        "import sys, ffjax, jax, importlib.util\n"
        "from ffjax.testing import fake_devices\n"
        "fake_devices(8)\n"
        "spec = importlib.util.spec_from_file_location('plans', sys.argv[1])\n"
        "plans = importlib.util.module_from_spec(spec)\n"
        "spec.loader.exec_module(plans)\n"
        "print(plans.decisions(plans.planned()))\n"
    )
    texts = {decisions(planned())}
    for seed in ("1", "2"):
        made = subprocess.run(
            [sys.executable, "-c", script, __file__],
            capture_output=True,
            text=True,
            check=False,
            env={**os.environ, "PYTHONHASHSEED": seed},
        )
        assert made.returncode == 0, made.stderr
        texts.add(made.stdout.strip())
    assert len(texts) == 1


def test_the_fingerprint_tells_programs_apart() -> None:
    def fingerprint(step: Callable[..., Any] = step, **sizes: Any) -> str:
        return ffjax.plan(step, *arguments(**sizes), mesh=MESH).fingerprint

    same = fingerprint()
    moved = step_of("# a comment\n\n\n" + SOURCE.replace("    loss, grads", "\n    # and another\n    loss, grads"))
    assert fingerprint(moved) == same
    renamed = step_of(SOURCE.replace("loss_fn", "objective"))
    assert fingerprint(renamed) == same
    others = [
        fingerprint(batch=32),
        fingerprint(width=128),
        fingerprint(dtype=jnp.bfloat16),
        fingerprint(step_of(SOURCE.replace("jnp.tanh", "jnp.sin"))),
        fingerprint(step_of(SOURCE.replace(").mean()", ").max()"))),
        fingerprint(step_of(SOURCE.replace('return {"params": params,', 'return {"weights": params,'))),
    ]
    assert len({same, *others}) == len(others) + 1


def test_the_same_plan_whatever_the_lines() -> None:
    moved = ffjax.plan(step_of("\n\n\n" + SOURCE), *arguments(), mesh=MESH)
    loaded = Plan.from_json(planned().to_json())
    assert loaded.bind(step_of("\n\n\n" + SOURCE), *arguments()).lower().as_text() == moved.lower().as_text()


@pytest.mark.parametrize("strategy", ["auto", "fsdp", "tensor_parallel"])
def test_a_loaded_plan_emits_the_same_program(strategy: str, tmp_path: Path) -> None:
    plan = ffjax.plan(step, *arguments(), mesh=MESH, strategy=strategy, donate_argnums=0)
    plan.save(tmp_path / "plan.json")
    bound = Plan.load(tmp_path / "plan.json").bind(step, *arguments(), donate_argnums=0)
    assert bound == plan
    assert bound.lower().as_text() == plan.lower().as_text()
    assert bound.in_specs == plan.in_specs
    assert bound.out_specs == plan.out_specs


def test_a_plan_from_a_file_runs(tmp_path: Path) -> None:
    planned(strategy="fsdp").save(tmp_path / "plan.json")
    state, batch = init(jax.random.key(0)), {"x": jnp.ones((16, 64)), "y": jnp.ones((16, 64))}
    sharded = ffjax.autoshard(step, plan=tmp_path / "plan.json")
    new, loss = sharded(state, batch)
    assert float(loss) == pytest.approx(float(jax.jit(step)(state, batch)[1]), rel=1e-5)
    kernel = new["params"]["layer_0"]["kernel"]
    assert kernel.sharding.spec == planned(strategy="fsdp").spec("state/params/layer_0/kernel")


def test_explain_is_a_page_that_says_why() -> None:
    for options in ({}, {"cluster": Cluster.named("h100", hosts=2), "mesh": None}):
        plan = planned(**options)
        text = plan.explain()
        lines = text.splitlines()
        assert len(lines) <= 72
        assert max(map(len, lines)) <= 240
        assert lines[0].startswith(f"step on {plan.devices} devices of {plan.cluster!r}, mesh {plan.mesh_shape}")
        headings = [line for line in lines[1:] if line and not line.startswith(" ")]
        assert headings == [
            "what the step waits for, per device, and what more of it would save (this plan, simulated again)",
            "collectives of one step, per device",
            "arguments",
            "what costs most, and the runner-up: what it would add to the step (all members of a family together)",
            "largest arrays alive at the peak",
            "the strategies, each on its best mesh",
        ]
        assert "params/layer_*/kernel" in text
        for word in ("peak", "bound", "else", "data_parallel", "fsdp", "auto"):
            assert word in text
        assert len(plan.explain(details=True)) > len(text)


def test_a_runner_up_that_would_cost_less_is_shown_so() -> None:
    plan = planned()
    hot = max((d for d in plan.decisions if d.runner_up), key=lambda d: d.seconds)
    less = dataclasses.replace(hot, runner_up_extra_s=-230e-6)
    shown = dataclasses.replace(plan, decisions=tuple(less if d is hot else d for d in plan.decisions)).explain()
    assert f"else {hot.runner_up}: -230 us" in shown
    assert "+-" not in shown
    assert "(-: less as a sum of costs" in shown
    assert "(-: less" not in plan.explain()


def test_diff_is_empty_for_equals_and_names_what_changed() -> None:
    plan = planned()
    assert plan.diff(plan) == ""
    assert plan.diff(Plan.from_json(plan.to_json())) == ""
    assert plan.diff(planned()) == ""
    pinned = planned(pins={"layer_1/kernel": P(None, ("x", "y"))})
    lines = plan.diff(pinned).splitlines()
    assert "+ state/params/layer_1/kernel: float32[64,64] (-, x*y)".replace(",64]", ", 64]") in lines
    assert any(line.startswith("+ step: ") for line in lines)
    assert any(line.startswith("+ mesh: {'x': 8}") for line in plan.diff(planned(mesh={"x": 8})).splitlines())


def test_diff_pairs_decisions_of_one_line() -> None:
    """A pin changes the keys of what is around it, though not what is decided there."""
    plan = planned()
    pinned = planned(pins={"batch/x": plan.spec("batch/x")})
    assert {d.key for d in plan.decisions} != {d.key for d in pinned.decisions}
    assert plan.diff(pinned) == ""
    moved = dataclasses.replace(pinned, decisions=pinned.decisions[1:])
    assert [line[:1] for line in plan.diff(moved).splitlines()] == ["-", "+"]
    assert "absent" in plan.diff(moved)


def test_pins_fix_what_they_name_and_the_rest_is_searched() -> None:
    plan = planned(pins={"params/**/kernel": P(None, "x")})
    free = planned()
    for i in range(LAYERS):
        assert plan.spec(f"state/params/layer_{i}/kernel") == P(None, "x")
    assert plan.estimate.step_s >= free.estimate.step_s * (1 - 1e-9)
    assert plan.pins == {"params/**/kernel": ((), ("x",))}


@pytest.mark.parametrize("layer", range(LAYERS))
def test_a_pin_on_one_of_many_alike(layer: int) -> None:
    """Layers that are alike have one decision; a pin sets the one that it names apart, whichever it is."""
    plan = planned(pins={f"layer_{layer}/kernel": P(None, "y")})
    assert plan.spec(f"state/params/layer_{layer}/kernel") == P(None, "y")
    rest = {plan.spec(f"state/params/layer_{i}/kernel") for i in range(LAYERS) if i != layer}
    assert rest == {planned().spec("state/params/layer_1/kernel")}
    loaded = Plan.from_json(plan.to_json()).bind(step, *arguments())
    assert loaded.lower().as_text() == plan.lower().as_text()


def count_searches(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    calls: list[str] = []
    search = sharded_module.plan_program

    def counting(program: Any, *options: Any, **others: Any) -> Plan:
        calls.append(program.name)
        return search(program, *options, **others)

    monkeypatch.setattr(sharded_module, "plan_program", counting)
    return calls


def test_a_cached_plan_is_not_searched_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = count_searches(monkeypatch)
    first = ffjax.autoshard(step, mesh=MESH, cache=tmp_path).plan(*arguments())
    assert len(calls) == 1
    again = ffjax.autoshard(step, mesh=MESH, cache=tmp_path)
    assert again.plan(*arguments()) == first
    assert len(calls) == 1
    assert again.plan(*arguments()).lower().as_text() == first.lower().as_text()
    for options in ({"mesh": {"x": 8}}, {"mesh": MESH, "strategy": "fsdp"}, {"mesh": MESH, "pins": {"batch/x": P()}}):
        ffjax.autoshard(step, cache=tmp_path, **options).plan(*arguments())
    ffjax.autoshard(step, mesh=MESH, cache=tmp_path).plan(*arguments(batch=32))
    assert len(calls) == 5
    assert len(list(tmp_path.iterdir())) == 5


def test_a_damaged_cache_is_searched_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = count_searches(monkeypatch)
    first = ffjax.autoshard(step, mesh=MESH, cache=tmp_path).plan(*arguments())
    (file,) = tmp_path.iterdir()
    file.write_text(file.read_text(encoding="utf-8")[:1000], encoding="utf-8")
    with pytest.warns(FfjaxWarning, match="cached plan cannot be used and is replaced") as warned:
        again = ffjax.autoshard(step, mesh=MESH, cache=tmp_path).plan(*arguments())
    assert warned[0].filename == __file__
    assert len(calls) == 2
    assert decisions(again) == decisions(first) == decisions(Plan.load(file))


def test_a_cache_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("", encoding="utf-8")
    with pytest.warns(FfjaxWarning, match=r"cache=.*file.*a folder that can be written"):
        assert ffjax.autoshard(step, mesh=MESH, cache=tmp_path / "file").plan(*arguments())


def test_writers_and_readers_at_once(tmp_path: Path) -> None:
    plan, path = planned(), tmp_path / "plan.json"
    plan.save(path)
    failures: list[BaseException] = []

    def write() -> None:
        try:
            for _ in range(20):
                plan.save(path)
        except BaseException as error:  # a thread's failure must reach the test
            failures.append(error)

    def read() -> None:
        try:
            for _ in range(20):
                assert Plan.load(path) == plan
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=f) for f in (write, write, read, read)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    assert [p.name for p in tmp_path.iterdir()] == ["plan.json"]


def shards(array: jax.Array) -> set[tuple[int, ...]]:
    return {shard.data.shape for shard in array.addressable_shards}


def test_init_makes_a_state_that_no_device_holds_whole() -> None:
    sharded = ffjax.autoshard(step, mesh=MESH, strategy="fsdp")
    plan = sharded.plan(*arguments())
    made = sharded.init(init, jax.random.key(0))
    for i in range(LAYERS):
        kernel = made["params"][f"layer_{i}"]["kernel"]
        assert kernel.sharding.spec == plan.spec(f"state/params/layer_{i}/kernel")
        assert [np.prod(shape) for shape in shards(kernel)] == [64 * 64 / 8]
    np.testing.assert_array_equal(
        made["params"]["layer_1"]["kernel"], init(jax.random.key(0))["params"]["layer_1"]["kernel"]
    )


def test_the_compiled_init_has_no_whole_state() -> None:
    """Not even for a moment: the program that makes the state has pieces of it only."""
    sharded = ffjax.autoshard(step, mesh=MESH, strategy="fsdp")
    plan = sharded.plan(*arguments())
    placed = in_shardings(plan.bound, device_mesh(plan.mesh, jax.devices()))
    tree = jax.tree.structure(arguments()[0])
    compiled = jax.jit(init, out_shardings=jax.tree.unflatten(tree, placed[: tree.num_leaves]))
    memory = compiled.lower(jax.random.key(0)).compile().memory_analysis()
    whole = LAYERS * (64 * 64 + 64) * 4
    assert memory.output_size_in_bytes < whole / 4
    assert memory.temp_size_in_bytes < whole / 2


def test_init_of_nnx_modules() -> None:
    nnx = pytest.importorskip("flax.nnx")
    optax = pytest.importorskip("optax")

    def make() -> Any:
        model = nnx.Linear(64, 64, rngs=nnx.Rngs(0))
        return model, nnx.Optimizer(model, optax.sgd(0.1, momentum=0.9), wrt=nnx.Param)

    def train_step(model: Any, optimizer: Any, x: jax.Array) -> jax.Array:
        loss, grads = nnx.value_and_grad(lambda m: (m(x) ** 2).mean())(model)
        optimizer.update(model, grads)
        return loss

    sharded = ffjax.autoshard(train_step, mesh=MESH, strategy="fsdp")
    sharded.plan(*nnx.eval_shape(make), jax.ShapeDtypeStruct((16, 64), jnp.float32))
    model, optimizer = sharded.init(make)
    assert [np.prod(shape) for shape in shards(model.kernel[...])] == [64 * 64 / 8]
    loss = sharded(model, optimizer, jnp.ones((16, 64)))
    assert [np.prod(shape) for shape in shards(model.kernel[...])] == [64 * 64 / 8]
    reference = make()
    assert float(loss) == pytest.approx(float(nnx.jit(train_step)(*reference, jnp.ones((16, 64)))), rel=1e-5)
    np.testing.assert_allclose(model.kernel[...], reference[0].kernel[...], rtol=1e-5, atol=1e-6)


def test_lowering_for_devices_for_none_and_for_too_few() -> None:
    plan = planned()
    assert "sdy.mesh" in plan.lower().as_text()
    assert len(plan.lower(jax.devices()).compile().input_shardings[0][0].device_set) == 8
    large = planned(cluster=Cluster.named("h100", hosts=8), mesh=None)
    assert large.devices == 64
    assert "sdy.mesh" in large.lower().as_text()
    with pytest.raises(ClusterError, match="needs 64 devices"):
        large.lower(jax.devices())


def test_a_plan_is_replaced_not_changed() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        planned().devices = 4  # type: ignore[misc]
