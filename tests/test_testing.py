from __future__ import annotations

import dataclasses
import functools
import subprocess
import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

import ffjax
from ffjax.cost.cluster import Cluster
from ffjax.errors import FfjaxError
from ffjax.ir.spec import MeshShape
from ffjax.testing import (
    assert_collectives,
    assert_fits,
    assert_plan_matches,
    assert_same_numerics,
    fake_devices,
    plan_text,
)


def run_python(code: str, **env: str) -> str:
    """Device counts are fixed once for each process, so these need a process of their own."""
    return subprocess.run(
        [sys.executable, "-c", code], env={"PATH": "", **env}, capture_output=True, text=True, check=True
    ).stdout.strip()


def test_fake_devices_are_counted_once() -> None:
    assert len(fake_devices(8)) == 8
    assert len(fake_devices(3)) == 3
    with pytest.raises(FfjaxError, match=r"fake_devices\(9\).* 8 CPU device.*XLA_FLAGS"):
        fake_devices(9)
    with pytest.raises(FfjaxError, match=r"fake_devices\(0\)"):
        fake_devices(0)


def test_fake_devices_in_a_fresh_process() -> None:
    assert run_python("import ffjax.testing as t; print(len(t.fake_devices(5)))") == "5"


def test_fake_devices_keeps_what_xla_flags_gave() -> None:
    code = "import jax, ffjax.testing as t; jax.devices(); print(len(t.fake_devices(4)))"
    assert run_python(code, JAX_PLATFORMS="cpu", XLA_FLAGS="--xla_force_host_platform_device_count=6") == "4"


TREE = {"w": jnp.arange(6.0).reshape(2, 3), "step": jnp.int32(7), "key": jax.random.key(0), "nested": [jnp.ones(4)]}


def with_leaf(name: str, value: object) -> dict[str, object]:
    return {**TREE, name: value}


def test_same_numerics_passes_on_equal_and_nearly_equal() -> None:
    assert_same_numerics(TREE, TREE)
    assert_same_numerics(with_leaf("w", TREE["w"] * (1 + 1e-5)), TREE)
    assert_same_numerics(with_leaf("step", 7), TREE)
    assert_same_numerics({}, {})
    assert_same_numerics(jnp.zeros((0, 3)), jnp.zeros((0, 3)))
    assert_same_numerics(jnp.array([jnp.nan, jnp.inf, 1.0]), jnp.array([jnp.nan, jnp.inf, 1.0]))


@pytest.mark.parametrize(
    ("actual", "message"),
    [
        (with_leaf("w", TREE["w"].at[1, 2].set(6.0)), r"\['w'\]: float32\[2,3\], 1 of 6 elements, worst at \[1, 2\]"),
        (with_leaf("w", TREE["w"].at[0, 1].set(jnp.nan)), r"worst at \[0, 1\]: actual nan, expected 1.0"),
        (with_leaf("w", TREE["w"].at[0, 1].set(jnp.inf)), r"actual inf, expected 1.0"),
        (with_leaf("w", TREE["w"].T), r"is float32\[3,2\], expected float32\[2,3\]"),
        (with_leaf("w", TREE["w"].astype(jnp.bfloat16)), r"is bfloat16\[2,3\], expected float32\[2,3\]"),
        (with_leaf("step", jnp.int32(8)), r"\['step'\]: int32\[\].*actual 8, expected 7 \(must be equal\)"),
        (with_leaf("key", jax.random.key(1)), r"\['key'\]: uint32\[2\]"),
        (with_leaf("nested", []), r"\['nested'\]\[0\]: missing"),
        (with_leaf("nested", [jnp.ones(4), 1]), r"\['nested'\]\[1\]: not expected"),
        ({}, r"4 of 4 leaves"),
    ],
)
def test_same_numerics_names_what_differs(actual: object, message: str) -> None:
    with pytest.raises(AssertionError, match=message) as error:
        assert_same_numerics(actual, TREE, name="new state")
    assert str(error.value).startswith("new state: ")


@pytest.mark.parametrize(
    ("dtype", "passes", "fails"),
    [
        ("float32", 5e-5, 5e-4),
        ("bfloat16", 1e-2, 6e-2),
        ("float16", 2e-3, 1e-2),
        ("float8_e4m3fn", 0.125, 0.75),
        ("complex64", 5e-5, 5e-4),
    ],
)
def test_tolerance_follows_dtype(dtype: str, passes: float, fails: float) -> None:
    ones = np.ones(4)
    assert_same_numerics(jnp.asarray(ones + passes, dtype), jnp.asarray(ones, dtype))
    with pytest.raises(AssertionError, match=dtype):
        assert_same_numerics(jnp.asarray(ones + fails, dtype), jnp.asarray(ones, dtype))


def test_float64_is_held_to_its_own_tolerance() -> None:
    assert_same_numerics(np.ones(4) + 1e-10, np.ones(4))
    with pytest.raises(AssertionError, match="float64"):
        assert_same_numerics(np.ones(4) + 1e-8, np.ones(4))


def test_small_elements_may_err_like_the_largest_but_small_leaves_may_not() -> None:
    assert_same_numerics(np.array([100.0, 2e-4], np.float32), np.array([100.0, 1e-4], np.float32))
    with pytest.raises(AssertionError, match=r"\[0\]"):
        assert_same_numerics(
            [np.array([2e-4], np.float32), np.array([100.0], np.float32)],
            [np.array([1e-4], np.float32), np.array([100.0], np.float32)],
        )


def test_own_tolerances_replace_the_defaults() -> None:
    assert_same_numerics(np.ones(2) + 0.5, np.ones(2), atol=1.0)
    with pytest.raises(AssertionError, match="rtol 0, atol 0"):
        assert_same_numerics(np.array([1.0 + 1e-6], np.float32), np.array([1.0], np.float32), rtol=0.0, atol=0.0)


def test_long_reports_are_cut() -> None:
    with pytest.raises(AssertionError, match="25 of 25 leaves differ") as error:
        assert_same_numerics([1.0] * 25, [2.0] * 25)
    assert str(error.value).endswith("and 15 more")


@dataclass(frozen=True)
class Mean:
    """A program whose one collective is known: the mean over an array split along a mesh's first axis."""

    mesh_shape: MeshShape

    def lower(self) -> jax.stages.Lowered:
        mesh = jax.make_mesh(
            self.mesh_shape.sizes,
            self.mesh_shape.axes,
            axis_types=(jax.sharding.AxisType.Auto,) * len(self.mesh_shape.axes),
        )
        split = NamedSharding(mesh, PartitionSpec(self.mesh_shape.axes[0]))
        whole = NamedSharding(mesh, PartitionSpec())
        mean = jax.jit(partial(jnp.mean, axis=0), in_shardings=split, out_shardings=whole)
        return mean.lower(jax.ShapeDtypeStruct((64, 1024), jnp.float32))


def test_collectives_of_a_lowered_and_of_a_compiled_program(mesh_shape: MeshShape) -> None:
    lowered = Mean(mesh_shape).lower()
    assert_collectives(lowered, {"all_reduce": 4096})
    assert_collectives(lowered.compile(), {"all_reduce": 4000})


def test_collectives_that_differ_are_reported() -> None:
    lowered = Mean(MeshShape(("x",), (8,))).lower()
    with pytest.raises(AssertionError, match=r"all_reduce: 4,096 bytes, expected 2,000 within 10%"):
        assert_collectives(lowered, {"all_reduce": 2000})
    with pytest.raises(AssertionError, match=r"all_gather: 0 bytes, expected 4,096"):
        assert_collectives(lowered, {"all_gather": 4096, "all_reduce": 4096})
    with pytest.raises(AssertionError, match=r"expected 0 "):
        assert_collectives(lowered, {})
    with pytest.raises(FfjaxError, match=r"no such collective: .*allreduce"):
        assert_collectives(lowered, {"allreduce": 4096})  # type: ignore[dict-item]


def test_collectives_by_kind_alone() -> None:
    lowered = Mean(MeshShape(("x",), (8,))).lower()
    assert_collectives(lowered, ["all_reduce"])
    assert_collectives(lowered, {"all_reduce"})
    with pytest.raises(AssertionError, match=r"all_gather: none, expected some"):
        assert_collectives(lowered, ["all_gather", "all_reduce"])
    with pytest.raises(AssertionError, match=r"all_reduce: 4,096 bytes, expected 0 .*\n  it has: {'all_reduce': 4096"):
        assert_collectives(lowered, [])


def train_step(params: dict[str, jax.Array], x: jax.Array) -> tuple[dict[str, jax.Array], jax.Array]:
    loss, grads = jax.value_and_grad(lambda p: jnp.mean(jnp.tanh(x @ p["layer1"]) @ p["layer2"]))(params)
    return jax.tree.map(lambda p, g: p - g, params, grads), loss


def shapes(width: int = 1024) -> tuple[Any, ...]:
    square = jax.ShapeDtypeStruct((width, width), jnp.float32)
    return {"layer1": square, "layer2": square}, jax.ShapeDtypeStruct((4096, width), jnp.float32)


@functools.cache
def planned(strategy: str) -> ffjax.Plan:
    pins = {"params/*": PartitionSpec("x")} if strategy == "fsdp" else None  # or rows and columns are a tie
    h100s = Cluster.named("h100", hosts=1)
    return ffjax.plan(train_step, *shapes(), cluster=h100s, mesh={"x": 8}, strategy=strategy, pins=pins)


def test_collectives_of_a_plan() -> None:
    weights = 2 * 4 * 1024**2
    assert_collectives(planned("data_parallel"), {"all_reduce": weights})
    with pytest.raises(AssertionError, match=r"reduce_scatter: 8,388,608 bytes, expected 0"):
        assert_collectives(planned("fsdp"), {"all_reduce": weights})


def test_fits_says_what_it_needs() -> None:
    plan = planned("data_parallel")
    assert assert_fits(plan) is plan
    assert assert_fits(plan, memory="1GiB", cluster=Cluster.named("h100", hosts=1)) is plan
    needs = (
        r"train_step on 8 devices of 'h100' needs .*MiB per device, .*MiB more than 4.00MiB.\nAt its peak.*params/la"
    )
    with pytest.raises(AssertionError, match=f"(?s){needs}"):
        assert_fits(plan, memory="4MiB")


def test_fits_searches_what_fits() -> None:
    h100s = Cluster.named("h100", hosts=1)
    least = planned("fsdp").estimate.peak_bytes
    assert least < planned("data_parallel").estimate.peak_bytes
    found = assert_fits(train_step, *shapes(), cluster=h100s, memory=least)
    assert found.estimate.peak_bytes <= least
    with pytest.raises(AssertionError, match="no plan fits 1.00KiB per device on 8 devices"):
        assert_fits(train_step, *shapes(), cluster=h100s, memory="1KiB")


def test_fits_takes_sharded_steps_and_compiles() -> None:
    step = ffjax.autoshard(train_step, strategy="fsdp")
    plan = assert_fits(step, *shapes(64), memory="10MiB", compiled=True)
    assert plan.strategy == "fsdp"
    small = dataclasses.replace(plan, estimate=dataclasses.replace(plan.estimate, peak_bytes=1.0))
    with pytest.raises(AssertionError, match="as compiled needs .* per device"):
        assert_fits(small, memory="1KiB", compiled=True)


def test_fits_refuses_what_it_would_not_look_at() -> None:
    step, plan = ffjax.autoshard(train_step), planned("fsdp")
    with pytest.raises(FfjaxError, match="a step under autoshard, which has its own.*Remedy: give the function"):
        assert_fits(step, *shapes(), cluster=Cluster.named("h100"))
    with pytest.raises(FfjaxError, match="a plan and arguments.*Remedy: give the plan alone"):
        assert_fits(plan, *shapes())
    with pytest.raises(FfjaxError, match="8 devices of 'h100' and a cluster of 8 of 'a100'.*Remedy: give the step"):
        assert_fits(plan, cluster=Cluster.named("a100", hosts=1))


def test_plan_text_is_what_a_reviewer_reads() -> None:
    expected = """\
program train_step
cluster h100, 8 devices
mesh x=8

arguments
  params/layer* (2 x)  float32[1024,1024]  (x, -)
  x                    float32[4096,1024]  (x, -)

results
  0/layer* (2 x)  float32[1024,1024]  (x, -)
  1               float32[]           ()

collectives of one step, per device
"""
    compared = "\n".join(line for line in plan_text(planned("fsdp")).splitlines() if not line.startswith("#"))
    assert compared.startswith(expected)


def test_layers_that_differ_are_told_apart() -> None:
    plan = planned("fsdp")
    odd = dataclasses.replace(plan.args[0], spec=((), ("x",)))
    assert "  params/layer1  float32[1024,1024]  (-, x)\n  params/layer2  float32[1024,1024]  (x, -)\n" in plan_text(
        dataclasses.replace(plan, args=(odd, *plan.args[1:]))
    )


def test_golden_plan_round_trip(tmp_path: Path) -> None:
    plan, golden = planned("fsdp"), tmp_path / "plans" / "step.plan"
    with pytest.raises(AssertionError, match=r"(?s)no golden plan .*step.plan' yet.*--ffjax-update-plans.*mesh x=8"):
        assert_plan_matches(plan, golden, update=False)
    assert_plan_matches(plan, golden, update=True)
    assert_plan_matches(plan, golden, update=False)
    assert_plan_matches(ffjax.Plan.from_json(plan.to_json()), golden, update=False)
    # Predictions are not compared.
    faster = dataclasses.replace(plan, estimate=dataclasses.replace(plan.estimate, step_s=1e-9))
    assert_plan_matches(faster, golden, update=False)
    with pytest.raises(AssertionError) as error:
        assert_plan_matches(planned("data_parallel"), golden, update=False)
    lines = str(error.value).splitlines()
    assert lines[0] == f"the plan of train_step is not that of {str(golden)!r}:"
    assert "-  params/layer* (2 x)  float32[1024,1024]  (x, -)" in lines
    assert "+  params/layer* (2 x)  float32[1024,1024]  (-, -)" in lines
    assert [line.partition(":")[0] for line in lines[-3:-1]] == ["was predicted", "now predicted"]
    assert lines[-1] == "If the plan is meant to change: pytest --ffjax-update-plans, and commit the file."
