"""Predicted collectives against Shardy's and the compiled ones, per strategy, kind and mesh.

python benchmarks/collectives.py
"""

from __future__ import annotations

import dataclasses
import sys
from collections import Counter
from collections.abc import Iterable

import jax
from tables import write

import ffjax
from ffjax.cost.hlo.collectives import collectives_of
from ffjax.emit.oracle import explicit_collectives
from ffjax.errors import PlanError
from ffjax.examples import convnet, gpt, moe
from ffjax.strategies import all_strategies
from ffjax.testing import fake_devices

MESHES = ({"x": 8}, {"x": 4, "y": 2}, {"x": 2, "y": 2, "z": 2})
STRATEGIES = ("auto", *(strategy.name for strategy in all_strategies()))
GPT = dataclasses.replace(gpt.Config.small(), layers=2)
MODELS = {
    "gpt, unrolled": (gpt, GPT),
    "gpt, scanned, remat": (gpt, dataclasses.replace(GPT, scan_layers=True, remat=True)),
    "convnet": (convnet, convnet.Config.small()),
    "moe": (moe, moe.Config.small()),
}


def totals(collectives: Iterable[object]) -> dict[str, tuple[float, float]]:
    """For each kind the count and the bytes of a step."""
    counts: Counter[str] = Counter()
    sizes: Counter[str] = Counter()
    for entry in collectives:
        counts[entry.collective.kind] += entry.count
        sizes[entry.collective.kind] += entry.count * entry.collective.bytes
    return {kind: (counts[kind], sizes[kind]) for kind in counts}


def scattered_as_reduced(found: dict[str, tuple[float, float]]) -> dict[str, float]:
    """Bytes by kind, as XLA:CPU has them: it forms no reduce-scatter, but all-reduces and slices."""
    merged: Counter[str] = Counter()
    for kind, (_, size) in found.items():
        merged["all_reduce" if kind == "reduce_scatter" else kind] += size
    return dict(merged)


def main() -> None:
    fake_devices(8)
    wanted = [m for m in MESHES if len(sys.argv) == 1 or "x".join(map(str, m.values())) in sys.argv[1:]]
    rows = []
    for name, (module, config) in MODELS.items():
        step, args = module.make_train_step(config), module.example_args(config)
        for mesh in wanted:
            for strategy in STRATEGIES:
                try:
                    plan = ffjax.plan(step, *args, cluster=ffjax.Cluster.named("cpu"), mesh=mesh, strategy=strategy)
                except PlanError:
                    continue  # it has no use for this program or this mesh
                planned = totals(plan.layout.collectives())
                shardy = totals(explicit_collectives(plan.lower()))
                compiled = scattered_as_reduced(totals(collectives_of(plan.lower(jax.devices()).compile(), plan.mesh)))
                expected = scattered_as_reduced(planned)
                for kind in sorted({*expected, *compiled}):
                    ours, theirs = expected.get(kind, 0.0), compiled.get(kind, 0.0)
                    ratio = f"{theirs / ours:.3f}" if ours else "unplanned"
                    rows.append(
                        (name, plan.mesh, strategy, kind, f"{ours:.0f}", f"{theirs:.0f}", ratio, planned == shardy)
                    )
    write(
        "collectives",
        "Collectives of one step: planned, Shardy's, compiled",
        [
            "Bytes per device, as `ffjax.ir.spec.Collective` counts them. `Shardy` says whether the emitted program's "
            "explicit collectives equal the planned ones exactly, reduce-scatters included. Edges of images that a "
            "convolution and its kernel's gradient both need are planned twice, and made one by XLA. XLA:CPU forms no "
            "reduce-scatter, so those are compared as all-reduces.",
        ],
        ("model", "mesh", "strategy", "kind", "planned", "compiled", "compiled / planned", "Shardy"),
        rows,
    )


if __name__ == "__main__":
    main()
