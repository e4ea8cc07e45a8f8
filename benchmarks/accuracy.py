"""Predicted against measured step times on CPU fake devices, calibrated on some models and judged on others.

python benchmarks/accuracy.py
"""

from __future__ import annotations

import dataclasses
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from scipy.optimize import nnls
from scipy.stats import spearmanr
from tables import write

import ffjax
from ffjax.cost.cluster import Cluster
from ffjax.cost.collectives import CollectiveModel
from ffjax.cost.estimate import Estimate, estimate
from ffjax.cost.kernels import Kernel, kernels
from ffjax.cost.memory import Peak
from ffjax.cost.profiles.fit import Work, fit, seconds_of, work
from ffjax.emit.emit import in_shardings
from ffjax.emit.run import device_mesh
from ffjax.examples import convnet, gpt, moe, recommender
from ffjax.ir.layout import Layout
from ffjax.planning.options import SearchOptions
from ffjax.planning.planner import plan_program
from ffjax.planning.tracing import trace_step
from ffjax.profiling.grid import grid
from ffjax.profiling.profile import needs, profile
from ffjax.testing import fake_devices

ROUNDS = 9
PROFILE_S = 240.0
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
    """One plan: what it does, how to run it, and the seconds of its runs."""

    model: str
    strategy: str
    layout: Layout
    kernels: Sequence[Kernel]
    work: Work
    run: Callable[[], Any]
    times: list[float] = dataclasses.field(default_factory=list)

    @property
    def seconds(self) -> float:
        return float(np.median(self.times))

    def priced(self, cluster: Cluster) -> Estimate:
        nothing = Peak(bytes=0.0, instant=0, op=0, live=())
        return estimate(self.layout, self.kernels, CollectiveModel(self.layout.mesh, cluster), nothing)


def cases(name: str, module: Any, config: Any) -> list[Case]:
    """Every strategy on every mesh, those that come to the same plan once."""
    step, args = module.make_train_step(config), module.example_args(config)
    program = trace_step(step, args, {})
    found: list[Case] = []
    seen: set[tuple[str, ...]] = set()
    for mesh in MESHES:
        for strategy in STRATEGIES:
            try:
                options = SearchOptions(cluster=Cluster.named("cpu"), mesh=mesh, strategy=strategy)
                plan = plan_program(program, options)
            except ffjax.errors.PlanError:
                continue  # no use for this mesh
            key = (str(plan.mesh), *(str(d.split) + str(d.scatter) for d in plan.decisions))
            if key not in seen:
                seen.add(key)
                found.append(_case(name, strategy, plan))
                print(f"{name}, {plan.mesh}, {strategy}", file=sys.stderr, flush=True)
    return found


def _case(name: str, strategy: str, plan: ffjax.Plan) -> Case:
    layout = plan.bound
    own, run = kernels(layout.regions), place(plan, jax.devices())
    return Case(model=name, strategy=strategy, layout=layout, kernels=own, work=work(layout, own), run=run)


def place(plan: ffjax.Plan, devices: Sequence[jax.Device]) -> Callable[[], Any]:
    """The plan compiled, warm, with its arguments in place: each call runs a step and waits for it."""
    layout = plan.bound
    compiled = plan.lower(devices).compile()
    shardings = in_shardings(layout, device_mesh(layout.mesh, devices))
    avals = [v.aval for v in layout.graph.program.jaxpr.invars]
    placed = [jax.device_put(_filled(a), s) for a, s in zip(avals, shardings, strict=True)]

    def run() -> Any:
        return jax.block_until_ready(compiled(*placed))

    run()
    return run


def _filled(aval: Any) -> Any:
    if jax.dtypes.issubdtype(aval.dtype, jax.dtypes.prng_key):
        return jax.random.split(jax.random.key(0), aval.shape) if aval.shape else jax.random.key(0)
    if jax.dtypes.issubdtype(aval.dtype, np.inexact):
        return np.full(aval.shape, 0.01, aval.dtype)
    return np.zeros(aval.shape, aval.dtype)


def profiled_and_fitted(some: Sequence[Case], cluster: Cluster) -> Callable[[Case], float]:
    """Measured ops, with what a step adds to them: factors on compute and on collectives, seconds for each launch."""

    def features(case: Case) -> list[float]:
        found = case.priced(cluster)
        return [found.compute_s, found.comm_s, float(case.work.trips @ case.work.launches)]

    rows = np.array([features(c) for c in some]) / np.array([[c.seconds] for c in some])
    factors, _ = nnls(rows, np.ones(len(some)))
    return lambda case: float(np.dot(features(case), factors))


def judge(some: Sequence[Case], predicted: Callable[[Case], float]) -> tuple[str, ...]:
    """Plans, median and 90th percentile of the relative error, rank correlation of all and of one model's plans."""
    ours, theirs = np.array([predicted(c) for c in some]), np.array([c.seconds for c in some])
    errors = np.abs(ours / theirs - 1)
    within = []
    for model in dict.fromkeys(c.model for c in some):
        own = [i for i, c in enumerate(some) if c.model == model]
        if len(own) > 2:
            within.append(spearmanr(ours[own], theirs[own])[0])
    return (
        str(len(some)),
        f"{np.median(errors):.0%}",
        f"{np.quantile(errors, 0.9):.0%}",
        f"{spearmanr(ours, theirs)[0]:.2f}",
        f"{np.median(within):.2f}",
    )


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
    shipped = Cluster.named("cpu")
    calibration = sets["calibration"]
    fitted = fit([(c.work, c.seconds) for c in calibration], shipped)
    collectives = [c for c in grid(shipped, ()) if c.group > 1]
    wanted = collectives + needs([c.layout for c in everything], shipped)
    measured = profile(wanted, shipped, jax.devices(), seconds=PROFILE_S)
    profiled = shipped.with_profile(measured.profile)
    sources: dict[str, Callable[[Case], float]] = {
        "shipped figures": lambda c: seconds_of(c.work, shipped),
        "figures fitted to the calibration steps": lambda c: seconds_of(c.work, fitted),
        "profile of ops and collectives": lambda c: c.priced(profiled).step_s,
        "profile, with what a step adds fitted": profiled_and_fitted(calibration, profiled),
    }
    spread = [np.subtract(*np.quantile(c.times, [0.75, 0.25])) / c.seconds for c in everything]
    left = len(measured.measured.left_out)
    write(
        "accuracy",
        "Predicted and measured step times on eight fake CPU devices",
        [
            "Plans of every strategy and mesh, each compiled once, all run in turn; the median of "
            f"{ROUNDS} runs. The quartiles of a plan's runs lie {np.median(spread):.0%} of its median apart (median "
            "over plans): how steady this machine is.",
            "Errors are relative. The last column is the rank correlation among the plans of one model (median over "
            f"models): what the search needs. The profile has {len(measured.profile.samples)} samples in "
            f"{PROFILE_S:.0f} s ({left} ops left out).",
        ],
        ("set", "prices", "plans", "median error", "90%", "rank, all", "rank, one model"),
        [(kind, name, *judge(some, source)) for kind, some in sets.items() for name, source in sources.items()],
    )
    write(
        "accuracy_plans",
        "Predicted and measured step times, plan by plan",
        ["Held-out plans, in ms."],
        ("model", "mesh", "strategy", "measured", *(name.split(" of")[0] for name in sources)),
        [
            (
                c.model,
                c.layout.mesh,
                c.strategy,
                f"{c.seconds * 1e3:.1f}",
                *(f"{s(c) * 1e3:.1f}" for s in sources.values()),
            )
            for c in sets["held out"]
        ],
    )


if __name__ == "__main__":
    main()
