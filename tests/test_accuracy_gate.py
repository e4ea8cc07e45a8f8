"""Predicted steps and collectives against recorded figures of XLA:GPU: what was reached may not be lost.

Nothing is compiled or searched here. Record again (`benchmarks/verify.py --record tests/data/verified.json`) where the
programs or the plans' families change, and tighten what is accepted where predictions get better.
"""

from __future__ import annotations

import functools
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy.stats import spearmanr

from ffjax.cost.cluster import Cluster
from ffjax.cost.collectives import CollectiveModel
from ffjax.cost.kernels import Kernel, kernels
from ffjax.cost.simulation.simulator import Simulator
from ffjax.ir.graph import build_graph
from ffjax.ir.regions import Regions, find_regions
from ffjax.ir.spec import MeshShape
from ffjax.planning.tracing import trace_step
from ffjax.strategies.families import family_keys

sys.path.insert(0, str(Path(__file__).parent))
from plan_lines import layout_of
from verified_cases import build

RECORDED = Path(__file__).parent / "data" / "verified.json"
WITHIN_10, WITHIN_25, RANK, BYTES_WITHIN_5 = 0.6, 0.98, 0.99, 1.0


@functools.cache
def program(model: str) -> tuple[Regions, list[Kernel], list[str]]:
    step, args, donated = build(model)
    regions = find_regions(build_graph(trace_step(step, args, {}, donate_argnums=donated)))
    return regions, kernels(regions), family_keys(regions)


@functools.cache
def simulator(model: str, hosts: int, mesh: tuple[tuple[str, int], ...]) -> Simulator:
    regions, own, _ = program(model)
    shape = MeshShape(tuple(axis for axis, _ in mesh), tuple(size for _, size in mesh))
    return Simulator(regions, own, CollectiveModel(shape, Cluster.named("h100", hosts=hosts)))


def predicted(case: dict[str, Any]) -> tuple[float, float]:
    """The seconds of a step, and the bytes of all its collectives."""
    regions, _, keys = program(case["model"])
    ours = simulator(case["model"], case["hosts"], tuple(case["mesh"].items()))
    layout = layout_of(case["plan"], regions, keys, case["mesh"], ours.model.axis_prices)
    size = sum(p.count * p.collective.bytes for p in layout.collectives())
    return ours.run(layout.assignments).step_s, size


@pytest.mark.recorded
def test_recorded_steps_and_collectives() -> None:
    cases = json.loads(RECORDED.read_text(encoding="utf-8"))["cases"]
    assert len(cases) > 60
    found = [predicted(case) for case in cases]
    steps = np.array([ours / case["step_s"] for (ours, _), case in zip(found, cases, strict=True)])
    bytes_ = np.array([(b + 1) / (case["collective_bytes"] + 1) for (_, b), case in zip(found, cases, strict=True)])
    rank = spearmanr([ours for ours, _ in found], [case["step_s"] for case in cases])[0]
    within = [float(np.mean(abs(steps - 1) <= share)) for share in (0.1, 0.25)]
    said = (
        f"steps: {within[0]:.3f} within 10%, {within[1]:.3f} within 25%, median {np.median(steps):.3f}, "
        f"rank {rank:.3f}; bytes: {np.mean(abs(bytes_ - 1) <= 0.05):.3f} within 5%"
    )
    assert within[0] >= WITHIN_10, said
    assert within[1] >= WITHIN_25, said
    assert rank >= RANK, said
    assert np.mean(abs(bytes_ - 1) <= 0.05) >= BYTES_WITHIN_5, said
