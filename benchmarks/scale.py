"""How the seconds of a search grow with a program: depth, scanned and unrolled, and very long jaxprs.

    python benchmarks/scale.py [--layers 12,48,96] [--hosts 8,128] [--lengths 25000,50000,100000]
        [--kinds chain,jitted,scanned] [--output FILE]

All seconds are of CPU (`time.process_time`), so that a machine that others use, too, says the same. First table: a GPT
of so many layers on so many hosts of 8 H100s, the whole search by phase, apart from tracing. Second table: synthetic
programs of so many equations, by stage: `chain` alternates matmuls and elementwise equations, `jitted` is the same
inside one jit, `scanned` the same as the body of one scan. Near-linear time is a ratio of about 1 in the last column:
microseconds per equation, relative to the shortest program of the kind.
"""

from __future__ import annotations

import argparse
import dataclasses
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

import ffjax
from ffjax.cost.collectives import CollectiveModel
from ffjax.cost.compilers import compiler_of
from ffjax.cost.estimate import estimate
from ffjax.cost.kernels import by_family, kernels
from ffjax.cost.lifetimes import lifetimes
from ffjax.cost.memory import MemoryModel
from ffjax.cost.simulation.simulator import Simulator
from ffjax.cost.simulation.task_graph import build_task_graph
from ffjax.examples import gpt
from ffjax.ir.dims import named_dims
from ffjax.ir.graph import build_graph
from ffjax.ir.inline import walk
from ffjax.ir.regions import find_regions
from ffjax.ir.trace import Program
from ffjax.planning.options import SearchOptions
from ffjax.planning.planner import plan_program
from ffjax.planning.tracing import trace_step
from ffjax.strategies.budget import layout_of
from ffjax.strategies.families import family_keys
from ffjax.strategies.problem import build_problem

WIDTH = 256
PERIOD = 8
"""In synthetic programs one equation in so many is a matmul."""


class Clock:
    """CPU seconds of stages, by name, in order."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    def __call__(self, name: str, do: Callable[[], Any]) -> Any:
        began = time.process_time()
        found = do()
        self.seconds[name] = self.seconds.get(name, 0.0) + time.process_time() - began
        return found


def equations(program: Program) -> int:
    count = 0

    def visit(_: object) -> None:
        nonlocal count
        count += 1

    walk(program.jaxpr, visit)
    return count


def transformer(layers: int, *, scanned: bool, hosts: int) -> Program:
    """The train step of a GPT as wide as GPT-3, in bfloat16."""
    config = dataclasses.replace(
        gpt.Config.gpt2(),
        layers=layers,
        scan_layers=scanned,
        remat=scanned,
        d_model=12288,
        heads=96,
        seq_len=2048,
        batch=16 * hosts,
        vocab=51200,
        dtype="bfloat16",
    )
    return trace_step(gpt.make_train_step(config), gpt.example_args(config), {}, donate_argnums=0)


def _equations(x: jax.Array, w: jax.Array, count: int) -> jax.Array:
    for i in range(count):
        x = x @ w if i % PERIOD == 0 else jnp.tanh(x) if i % 2 else x + w
    return x


def synthetic(kind: str, length: int) -> Program:
    """A program of about `length` equations: `chain`, `jitted` or `scanned`."""

    def chain(x: jax.Array, w: jax.Array) -> jax.Array:
        return _equations(x, w, length)

    def jitted(x: jax.Array, w: jax.Array) -> jax.Array:
        return jax.jit(chain)(x, w)

    def scanned(x: jax.Array, w: jax.Array) -> jax.Array:
        return jax.lax.scan(lambda c, _: (chain(c, w), None), x, length=4)[0]

    kinds: dict[str, Callable[..., jax.Array]] = {"chain": chain, "jitted": jitted, "scanned": scanned}
    array = jax.ShapeDtypeStruct((WIDTH, WIDTH), jnp.float32)
    return trace_step(kinds[kind], (array, array), {})


def analysed(program: Program, cluster: ffjax.Cluster) -> dict[str, float]:
    """CPU seconds of everything that is as long as the program: all analyses, and one plan that is priced."""
    clock = Clock()
    graph = clock("graph", lambda: build_graph(program))
    regions = clock("regions", lambda: find_regions(graph))
    keys = clock("families", lambda: family_keys(regions))
    own = clock("kernels", lambda: kernels(regions))
    families = clock("kernels", lambda: by_family(own, keys))
    clock("dims", lambda: named_dims(regions))
    times = clock("lifetimes", lambda: lifetimes(graph, compiler_of(cluster.device.platform)))
    memory = clock("memory", lambda: MemoryModel(regions, times, keys))
    tasks = clock("tasks", lambda: build_task_graph(regions, own))
    model = CollectiveModel(cluster.mesh_shapes(max_axes=1)[0], cluster)
    problem = clock("problem", lambda: build_problem(regions, keys, families, model))
    layout = layout_of(problem, [len(n.candidates) - 1 for n in problem.nodes])
    peak = clock("peak", lambda: memory.peak(layout))
    simulator = clock("simulator", lambda: Simulator(regions, own, model, tasks=tasks))
    simulated = clock("simulate", lambda: simulator.run(layout.assignments))
    clock("estimate", lambda: estimate(layout, own, model, peak, simulated))
    return clock.seconds


def search_table(layers: Sequence[int], hosts: Sequence[int]) -> list[str]:
    lines = [
        "| layers | program | devices | equations | CPU s apart from tracing | µs per equation | of the least depth |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for devices in hosts:
        cluster = ffjax.Cluster.named("h100", hosts=devices)
        for scanned in (True, False):
            least = 0.0
            for depth in layers:
                program = transformer(depth, scanned=scanned, hosts=devices)
                began = time.process_time()
                plan_program(program, SearchOptions(cluster=cluster, memory="2000GiB"))
                seconds, count = time.process_time() - began, equations(program)
                least = least or seconds
                lines.append(
                    f"| {depth} | {'scanned' if scanned else 'unrolled'} | {cluster.devices} | {count:,} | "
                    f"{seconds:.1f} | {1e6 * seconds / count:.0f} | {seconds / least:.2f} |"
                )
                print(lines[-1], flush=True)
    return lines


def synthetic_table(kinds: Sequence[str], lengths: Sequence[int]) -> list[str]:
    cluster = ffjax.Cluster.named("h100")
    stages: list[str] = []
    lines: list[str] = []
    for kind in kinds:
        least = 0.0
        for length in lengths:
            program = synthetic(kind, length)
            seconds, count = analysed(program, cluster), equations(program)
            if not stages:
                stages = list(seconds)
                lines.append(f"| program | equations | {' | '.join(stages)} | all | µs per equation | ratio |")
                lines.append("| --- " * (len(stages) + 5) + "|")
            each = 1e6 * sum(seconds.values()) / count
            least = least or each
            cells = " | ".join(f"{seconds[s]:.2f}" for s in stages)
            lines.append(
                f"| {kind} | {count:,} | {cells} | {sum(seconds.values()):.1f} | {each:.0f} | {each / least:.2f} |"
            )
            print(lines[-1], flush=True)
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description="CPU seconds of the search as programs grow.")
    parser.add_argument("--layers", default="12,48,96")
    parser.add_argument("--hosts", default="8,128")
    parser.add_argument("--lengths", default="25000,50000,100000")
    parser.add_argument("--kinds", default="chain,jitted,scanned")
    parser.add_argument("--output", default="")
    options = parser.parse_args()
    given = options.layers, options.hosts, options.lengths
    layers, hosts, lengths = ([int(n) for n in text.split(",") if n] for text in given)
    analysed(transformer(2, scanned=False, hosts=1), ffjax.Cluster.named("h100"))  # imports, and rules that are kept
    lines = ["# Scale", "", "CPU seconds of the search apart from tracing (`benchmarks/scale.py`).", ""]
    lines += [*search_table(layers, hosts), ""] if layers and hosts else []
    lines += ["CPU seconds of analyses and of one plan that is priced, of synthetic programs:", ""]
    lines += synthetic_table(options.kinds.split(","), lengths)
    if options.output:
        with open(options.output, "w", encoding="utf-8") as file:
            file.write("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
