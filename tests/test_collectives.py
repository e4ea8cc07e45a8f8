"""Planned collectives are the emitted ones: exactly as Shardy sees the program, and as XLA compiles it."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterable
from typing import Any

import jax
import pytest

import ffjax
from ffjax.cost.hlo.collectives import collectives_of
from ffjax.emit.oracle import explicit_collectives
from ffjax.examples import convnet, gpt, moe, recommender

TINY = gpt.Config.tiny()
MODELS: dict[str, tuple[Any, Any]] = {
    "gpt": (gpt, TINY),
    "gpt_scanned": (gpt, dataclasses.replace(TINY, scan_layers=True, remat=True)),
    "convnet": (convnet, convnet.Config.tiny()),
    "recommender": (recommender, recommender.Config.tiny()),
    "moe": (moe, moe.Config.tiny()),
}
STRATEGIES = ("data_parallel", "fsdp", "tensor_parallel", "fsdp+tensor_parallel")
WITH = [
    ("gpt_scanned", "zero1", {"x": 8}),
    ("convnet", "zero2", {"x": 4, "y": 2}),
    ("gpt", "zero2", {"x": 4, "y": 2}),
    ("recommender", "hsdp", {"x": 4, "y": 2}),
    ("gpt", "tensor_parallel+sequence", {"x": 8}),
    ("gpt_scanned", "fsdp+tensor_parallel+sequence", {"x": 4, "y": 2}),
    ("moe", "expert_parallel", {"x": 4, "y": 2}),
    ("convnet", "spatial", {"x": 4, "y": 2}),
]
CASES = [
    pytest.param(model, strategy, mesh, id=f"{model}-{strategy}-{'x'.join(map(str, mesh.values()))}")
    for model in MODELS
    for strategy in STRATEGIES
    for mesh in ({"x": 8}, {"x": 4, "y": 2})
    if len(mesh) > 1 or strategy != "fsdp+tensor_parallel"
] + [pytest.param(*case, id=f"{case[0]}-{case[1]}-{'x'.join(map(str, case[2].values()))}") for case in WITH]


def planned(model: str, strategy: str, mesh: dict[str, int]) -> ffjax.Plan:
    module, config = MODELS[model]
    cluster = ffjax.Cluster.named("cpu")
    return ffjax.plan(
        module.make_train_step(config), *module.example_args(config), cluster=cluster, mesh=mesh, strategy=strategy
    )


def counted(collectives: Iterable[Any]) -> Counter[tuple[str, tuple[str, ...], float]]:
    found: Counter[tuple[str, tuple[str, ...], float]] = Counter()
    for entry in collectives:
        found[entry.collective.kind, tuple(entry.collective.axes), entry.collective.bytes] += entry.count
    return found


@pytest.mark.parametrize(("model", "strategy", "mesh"), CASES)
def test_planned_collectives_are_shardys(model: str, strategy: str, mesh: dict[str, int]) -> None:
    plan = planned(model, strategy, mesh)
    assert counted(plan.bound.collectives()) == counted(explicit_collectives(plan.lower()))


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("model", ["gpt_scanned", "convnet"])
def test_planned_bytes_are_the_compilers(model: str, strategy: str) -> None:
    plan = planned(model, strategy, {"x": 4, "y": 2})
    sizes: list[Counter[str]] = []
    for collectives in (plan.bound.collectives(), collectives_of(plan.lower(jax.devices()).compile(), plan.mesh)):
        bytes_of: Counter[str] = Counter()
        for entry in collectives:
            # XLA:CPU forms no reduce-scatter: it all-reduces and slices.
            kind = entry.collective.kind
            bytes_of["all_reduce" if kind == "reduce_scatter" else kind] += entry.count * entry.collective.bytes
        sizes.append(bytes_of)
    ours, theirs = sizes
    assert ours.keys() == theirs.keys()
    assert {k: pytest.approx(v, rel=0.1) for k, v in ours.items()} == theirs
