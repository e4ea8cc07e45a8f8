"""Delta simulation against full simulation: random changes to plans of a 48-layer GPT. Needs no devices.

python benchmarks/simulator.py
"""

from __future__ import annotations

import dataclasses
import gc
import random
import statistics
import time
from collections.abc import Callable, Sequence

from tables import write

import ffjax
from ffjax.cost.collectives import CollectiveModel
from ffjax.cost.kernels import kernels
from ffjax.cost.simulation.simulator import Simulated, Simulator
from ffjax.examples import gpt
from ffjax.strategies.candidates import candidates
from ffjax.strategies.families import family_keys, members

CHANGES = 100
CASES = (("fsdp", {"x": 8}), ("fsdp+tensor_parallel", {"x": 4, "y": 2}))


def timed(work: Callable[[], Simulated]) -> tuple[float, Simulated]:
    # Time of the processor: the machine may be shared.
    began = time.process_time()
    found = work()
    return time.process_time() - began, found


def changes(simulator: Simulator, fresh: Simulator, groups: Sequence[Sequence[int]]) -> tuple[str, str, str, str]:
    """Random changes one after another: median times of each simulated both ways, and the quartiles of their ratio."""
    rng = random.Random(0)
    regions, mesh = simulator.regions, simulator.model.mesh
    delta, full = [], []
    while len(delta) < CHANGES:
        group = rng.choice(groups)
        found = candidates(regions, regions.regions[group[0]], mesh)
        choice = rng.choice(found)
        if all(simulator.assignments[r] == choice for r in group):
            continue
        delta_s, changed = timed(lambda group=group, choice=choice: simulator.change(group, choice))
        full_s, anew = timed(lambda: fresh.run(simulator.assignments))
        assert changed == anew
        delta.append(delta_s)
        full.append(full_s)
    ratios = statistics.quantiles([f / d for f, d in zip(full, delta, strict=True)], n=4)
    return (
        f"{statistics.median(full) * 1e3:.1f}",
        f"{statistics.median(delta) * 1e3:.2f}",
        f"{sum(full) / sum(delta):.1f}",
        " / ".join(f"{r:.1f}" for r in ratios),
    )


def main() -> None:
    config = dataclasses.replace(gpt.Config.gpt2(), layers=48)
    cluster = ffjax.Cluster.named("h100")
    rows = []
    for strategy, mesh in CASES:
        plan = ffjax.plan(
            gpt.make_train_step(config),
            *gpt.example_args(config),
            cluster=cluster,
            mesh=mesh,
            strategy=strategy,
            donate_argnums=0,
        )
        layout = plan.bound
        program, model = kernels(layout.regions), CollectiveModel(layout.mesh, cluster)
        began = time.process_time()
        simulator = Simulator(layout.regions, program, model)
        set_up_s = time.process_time() - began
        fresh = Simulator(layout.regions, program, model)
        families = list(members(family_keys(layout.regions)).values())
        split = [f for f in families if len(candidates(layout.regions, layout.regions.regions[f[0]], layout.mesh)) > 1]
        gc.collect()
        gc.freeze()  # the program is large: a pass of the collector over it would be timed with whatever runs then
        for what, groups in (("a region", [[r] for f in split for r in f]), ("a family", split)):
            simulator.run(layout.assignments)
            fresh.run(layout.assignments)
            # Costs are kept by case: let both simulators price what they will meet before anything is timed.
            changes(simulator, fresh, groups)
            simulator.run(layout.assignments)
            rows.append((strategy, layout.mesh, what, *changes(simulator, fresh, groups), f"{set_up_s:.2f}"))
    tasks = len(program)
    write(
        "simulator",
        "Simulation: delta against full, a GPT of 48 layers, unrolled",
        [
            f"GPT-2 width, {len(layout.graph.ops)} ops, {tasks} kernels, {len(layout.regions.regions)} regions in "
            f"{len(families)} families; 8 H100s, asynchronous collectives. {CHANGES} random changes in sequence, each "
            "simulated from the change and from scratch with equal results. Medians in milliseconds of processor "
            "time, costs of tasks known; ratio of the sums, and quartiles of the changes' own ratios; set-up in "
            "seconds, once for a program and mesh.",
        ],
        ("strategy", "mesh", "change of", "full", "delta", "ratio", "quartiles", "set-up"),
        rows,
    )


if __name__ == "__main__":
    main()
