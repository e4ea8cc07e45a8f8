"""Figures fitted to whole steps."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ffjax
from ffjax.cost.cluster import Cluster
from ffjax.cost.kernels import kernels
from ffjax.cost.profiles.fit import Work, fit, seconds_of, work
from ffjax.errors import ClusterError

CPU = Cluster.named("cpu")


def step(params: dict[str, jax.Array], batch: jax.Array) -> dict[str, jax.Array]:
    def loss(params: dict[str, jax.Array]) -> jax.Array:
        return ((jnp.tanh(batch @ params["up"]) @ params["down"]) ** 2).mean()

    return jax.tree.map(lambda p, g: p - 0.1 * g, params, jax.grad(loss)(params))


@pytest.fixture(scope="module")
def works() -> list[Work]:
    """Of plans that differ in what they do most: large and small, much and little communication."""
    found = []
    for width, batch in ((64, 8), (64, 8192), (512, 64), (1024, 1024)):
        params = {
            "up": jax.ShapeDtypeStruct((width, width), np.float32),
            "down": jax.ShapeDtypeStruct((width, width), np.float32),
        }
        for strategy in ("data_parallel", "fsdp", "tensor_parallel"):
            plan = ffjax.plan(
                step, params, jax.ShapeDtypeStruct((batch, width), np.float32),
                cluster=CPU, mesh={"x": 8}, strategy=strategy,
            )  # fmt: skip
            found.append((plan, work(plan.bound, kernels(plan.bound.regions))))
    for plan, done in found:
        assert seconds_of(done, CPU) == pytest.approx(plan.estimate.step_s, rel=0.05)
    return [done for _, done in found]


def slower() -> Cluster:
    """Another machine: slow at all, and at each thing by another factor."""
    device = dataclasses.replace(
        CPU.device,
        flops_per_s={k: v / 9 for k, v in CPU.device.flops_per_s.items()},
        vector_flops_per_s=CPU.device.vector_flops_per_s / 3,
        memory_bytes_per_s=CPU.device.memory_bytes_per_s / 5,
        kernel_s=CPU.device.kernel_s * 20,
    )
    links = tuple(dataclasses.replace(k, bytes_per_s=k.bytes_per_s / 4, latency_s=k.latency_s * 7) for k in CPU.links)
    return dataclasses.replace(CPU, device=device, links=links)


def test_steps_of_another_machine_are_explained(works: list[Work]) -> None:
    there = slower()
    fitted = fit([(done, seconds_of(done, there)) for done in works], CPU)
    for done in works:
        assert seconds_of(done, CPU) < 0.5 * seconds_of(done, there)
        assert seconds_of(done, fitted) == pytest.approx(seconds_of(done, there), rel=0.05)


def test_one_odd_step_does_not_bend_the_rest(works: list[Work]) -> None:
    there = slower()
    measured = [(done, seconds_of(done, there) * (30 if i == 5 else 1)) for i, done in enumerate(works)]
    fitted = fit(measured, CPU)
    errors = [abs(seconds_of(done, fitted) / seconds_of(done, there) - 1) for i, done in enumerate(works) if i != 5]
    assert np.median(errors) < 0.1


def test_too_few_steps(works: list[Work]) -> None:
    with pytest.raises(ClusterError, match="3 measured steps cannot fit 6 figures.*measure more plans"):
        fit([(done, 1.0) for done in works[:3]], CPU)
