"""Predicted against measured step times on CPU fake devices, calibrated on some models and judged on others.

python benchmarks/accuracy.py
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from scipy.stats import spearmanr
from tables import write

import ffjax
from ffjax.cost.fit import Work, fit, seconds_of, work
from ffjax.examples import convnet, gpt, moe, recommender
from ffjax.planner import plan_program, trace_step
from ffjax.testing import fake_devices

ROUNDS = 7
MESHES = ({"x": 8}, {"x": 4, "y": 2}, {"x": 2, "y": 4})
STRATEGIES = ("auto", "data_parallel", "fsdp", "tensor_parallel", "fsdp+tensor_parallel")
SMALL = gpt.Config.small()
CALIBRATION = {
    "gpt, wide": (gpt, dataclasses.replace(SMALL, layers=1, d_model=256, seq_len=64)),
    "gpt, long": (gpt, dataclasses.replace(SMALL, layers=2, d_model=64, seq_len=256, heads=8)),
    "convnet, shallow": (convnet, dataclasses.replace(convnet.Config.small(), blocks=1)),
    "recommender, narrow": (recommender, dataclasses.replace(recommender.Config.small(), width=16, batch=512)),
}
HELD_OUT = {
    "gpt": (gpt, dataclasses.replace(SMALL, layers=2)),
    "gpt, scanned, remat": (gpt, dataclasses.replace(SMALL, layers=2, scan_layers=True, remat=True)),
    "convnet": (convnet, convnet.Config.small()),
    "recommender": (recommender, recommender.Config.small()),
    "moe": (moe, moe.Config.small()),
}


@dataclasses.dataclass(slots=True, kw_only=True)
class Case:
    model: str
    mesh: str
    strategy: str
    work: Work
    run: Callable[[], Any]
    times: list[float] = dataclasses.field(default_factory=list)

    @property
    def seconds(self) -> float:
        return float(np.median(self.times))


def cases(name: str, module: Any, config: Any) -> list[Case]:
    """Every strategy on every mesh, those that come to the same plan once."""
    step, args = module.make_train_step(config), module.example_args(config)
    program = trace_step(step, args, {})
    found: list[Case] = []
    seen: set[tuple[str, ...]] = set()
    for mesh in MESHES:
        for strategy in STRATEGIES:
            try:
                plan = plan_program(program, cluster=ffjax.Cluster.local(), mesh=mesh, strategy=strategy)
            except ffjax.errors.FfjaxError:
                continue  # no use for this mesh
            key = (str(plan.mesh), *(str(d.split) + str(d.scatter) for d in plan.decisions))
            if key in seen:
                continue
            seen.add(key)
            found.append(_case(name, strategy, plan))
    return found


def _case(name: str, strategy: str, plan: ffjax.Plan) -> Case:
    from ffjax.cost.kernels import kernels
    from ffjax.emit.emit import in_shardings
    from ffjax.emit.run import device_mesh

    layout = plan.bound
    compiled = plan.lower(jax.devices()).compile()
    shardings = in_shardings(layout, device_mesh(layout.mesh, jax.devices()))
    avals = [v.aval for v in layout.graph.program.jaxpr.invars]
    placed = [jax.device_put(_filled(a), s) for a, s in zip(avals, shardings, strict=True)]

    def run() -> Any:
        return jax.block_until_ready(compiled(*placed))

    run()
    return Case(model=name, mesh=str(plan.mesh), strategy=strategy, work=work(layout, kernels(layout.regions)), run=run)


def _filled(aval: Any) -> Any:
    if jax.dtypes.issubdtype(aval.dtype, jax.dtypes.prng_key):
        return jax.random.split(jax.random.key(0), aval.shape) if aval.shape else jax.random.key(0)
    if jax.dtypes.issubdtype(aval.dtype, np.inexact):
        return np.full(aval.shape, 0.01, aval.dtype)
    return np.zeros(aval.shape, aval.dtype)


def main() -> None:
    fake_devices(8)
    sets = {
        kind: [c for name, (module, config) in models.items() for c in cases(name, module, config)]
        for kind, models in (("calibration", CALIBRATION), ("held out", HELD_OUT))
    }
    everything = [c for some in sets.values() for c in some]
    for _ in range(ROUNDS):
        for case in everything:
            began = time.perf_counter()
            case.run()
            case.times.append(time.perf_counter() - began)
    shipped = ffjax.Cluster.local()
    fitted = fit([(c.work, c.seconds) for c in sets["calibration"]], shipped)
    rows, summary = [], []
    for kind, some in sets.items():
        for source, cluster in (("shipped figures", shipped), ("calibrated", fitted)):
            ratios = np.array([seconds_of(c.work, cluster) / c.seconds for c in some])
            errors = np.abs(ratios - 1)
            ranks = [
                spearmanr([seconds_of(c.work, cluster) for c in own], [c.seconds for c in own])[0]
                for name in dict.fromkeys(c.model for c in some)
                if len(own := [c for c in some if c.model == name]) > 2
            ]
            overall = spearmanr([seconds_of(c.work, cluster) for c in some], [c.seconds for c in some])[0]
            summary.append(
                f"{kind}, {source}: {len(some)} plans, median error {np.median(errors):.0%}, 90th percentile "
                f"{np.quantile(errors, 0.9):.0%}, rank correlation {overall:.2f}, of one model's plans "
                f"{np.median(ranks):.2f} (median over models)."
            )
    noise = np.median([np.subtract(*np.quantile(c.times, [0.75, 0.25])) / c.seconds for c in everything])
    summary.append(f"Between the quartiles of one plan's runs: {noise:.0%} of its median.")
    for c in sets["held out"]:
        predicted = seconds_of(c.work, fitted)
        rows.append(
            (
                c.model,
                c.mesh,
                c.strategy,
                f"{c.seconds * 1e3:.1f}",
                f"{predicted * 1e3:.1f}",
                f"{predicted / c.seconds:.2f}",
            )
        )
    write(
        "accuracy",
        "Predicted and measured step times",
        summary,
        ("model", "mesh", "strategy", "measured ms", "predicted ms", "ratio"),
        rows,
    )


if __name__ == "__main__":
    main()
