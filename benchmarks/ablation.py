"""Search methods side by side: how near to the optimum each comes, and how long it takes. Needs no devices.

python benchmarks/ablation.py
"""

from __future__ import annotations

import dataclasses
import importlib
import sys
import time

from tables import write

from ffjax.cost.cluster import Cluster
from ffjax.cost.collectives import CollectiveModel
from ffjax.cost.kernels import by_family, kernels
from ffjax.examples import convnet, gpt, moe, recommender
from ffjax.ir.graph import build_graph
from ffjax.ir.regions import Regions, find_regions
from ffjax.ir.spec import MeshShape
from ffjax.planning.tracing import trace_step
from ffjax.strategies.families import family_keys
from ffjax.strategies.methods import METHODS, Decomposition, Exact, NamedDimensions, Solution, Solver
from ffjax.strategies.problem import Problem, build_problem
from ffjax.strategies.search import search

GPT = dataclasses.replace(gpt.Config.gpt2(), layers=12)
MODELS = {
    "gpt, 12 layers scanned": ("gpt", dataclasses.replace(GPT, scan_layers=True, remat=True)),
    "gpt, 12 layers unrolled": ("gpt", dataclasses.replace(GPT, scan_layers=False, remat=False)),
    "convnet": ("convnet", convnet.Config()),
    "recommender": ("recommender", recommender.Config()),
    "moe, 12 layers": ("moe", moe.Config()),
}
MESHES = {8: [(4, 2)], 64: [(8, 8), (8, 4, 2)], 1024: [(128, 8)]}
"""By H100s, eight to a host."""
MOST_CELLS = 150_000
"""Resharding variables up to which the integer program alone is tried; its time limit is 60 s."""


def regions_of(example: str, config: object, devices: int) -> Regions:
    """At the example's own batch, or two samples for each device if that is more."""
    module = importlib.import_module(f"ffjax.examples.{example}")
    config = dataclasses.replace(config, batch=max(config.batch, 2 * devices))
    program = trace_step(module.make_train_step(config), module.example_args(config), {}, donate_argnums=0)
    return find_regions(build_graph(program))


def solved(problem: Problem) -> dict[str, tuple[Solution | None, float]]:
    """What each method finds, and its seconds of processor time."""
    cells = sum(t.seconds.size * len(t.consumers) for t in problem.transfers)
    found = {}
    for make in METHODS:
        method = make()
        if make is Exact and cells > MOST_CELLS:
            found[method.name] = (None, 0.0)
            continue
        began = time.process_time()
        solution = method.solve(problem)
        found[method.name] = (solution, time.process_time() - began)
    return found


def ablation() -> None:
    names = [m.name for m in (Exact(), Solver(), Decomposition(), NamedDimensions())] + ["mcmc"]
    rows = []
    for model, (example, config) in MODELS.items():
        for devices, meshes in MESHES.items():
            regions = regions_of(example, config, devices)
            keys = family_keys(regions)
            priced = by_family(kernels(regions), keys)
            for sizes in meshes:
                mesh = MeshShape(("x", "y", "z")[: len(sizes)], sizes)
                cluster = Cluster.named("h100", hosts=devices // 8)
                began = time.process_time()
                problem = build_problem(regions, keys, priced, CollectiveModel(mesh, cluster))
                build = time.process_time() - began
                found = solved(problem)
                solutions = [s for s, _ in found.values() if s is not None]
                best, bound = min(s.objective_s for s in solutions), max(s.bound_s for s in solutions)
                row = [model, devices, "x".join(map(str, sizes)), len(problem.nodes)]
                row += [sum(len(n.candidates) for n in problem.nodes), f"{build:.1f}", f"{bound / best:.4f}"]
                for name in names:
                    solution, spent = found[name]
                    row.append("too large" if solution is None else f"{solution.objective_s / best:.4f}: {spent:.2f}")
                rows.append(row)
                print(row, file=sys.stderr, flush=True)
    write(
        "ablation",
        "Search methods: quality and time",
        [
            "Each method alone, without starts, on the sum of costs: objective over the best that any method found, "
            "and seconds of processor time. Bound: the best proved bound over the same. Build: seconds to make the "
            f"problem. The integer program is tried alone up to {MOST_CELLS} resharding variables, 60 s at most.",
        ],
        ("model", "H100s", "mesh", "nodes", "candidates", "build", "bound", *names),
        rows,
    )


def refinement() -> None:
    rows = []
    large = dataclasses.replace(
        gpt.Config.gpt2(),
        layers=96,
        d_model=12288,
        heads=96,
        seq_len=2048,
        vocab=51200,
        dtype="bfloat16",
        scan_layers=True,
        remat=True,
    )
    for model, (example, config) in {**MODELS, "gpt, 96 layers of 12288, scanned": ("gpt", large)}.items():
        for devices in (8, 64) if config is not large else (1024,):
            regions = regions_of(example, config, devices)
            cluster = Cluster.named("h100", hosts=devices // 8)
            began = time.process_time()
            result = search(regions, cluster, budget_bytes=cluster.device.memory_bytes)
            spent = time.process_time() - began
            share = result.seconds["refine"] / sum(result.seconds.values())
            before = [f for f in result.found if f.fits and not f.algorithm.endswith("refinement")]
            if not before:
                continue
            step = min(f.predicted_s for f in before)
            rows.append(
                (
                    model,
                    devices,
                    str(result.best.mesh),
                    f"{step * 1e3:.3f}",
                    f"{result.best.predicted_s * 1e3:.3f}",
                    f"{1 - result.best.predicted_s / step:.2%}",
                    f"{spent:.1f}",
                    f"{share:.0%}",
                )
            )
            print(rows[-1], file=sys.stderr, flush=True)
    write(
        "refinement",
        "Refinement over the simulator",
        [
            "The fastest plan of the portfolio, simulated, and what refinement makes of it: milliseconds of a step. "
            "Search: seconds of processor time, tracing apart; of these the share of refinement.",
        ],
        ("model", "H100s", "mesh", "portfolio", "refined", "gain", "search", "refinement"),
        rows,
    )


if __name__ == "__main__":
    ablation()
    refinement()
