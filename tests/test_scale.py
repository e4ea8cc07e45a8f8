"""Work grows with a program no faster than the program does: counted in lines of this package, not in seconds."""

from __future__ import annotations

import sys
from types import FrameType
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from ffjax.cost.cluster import Cluster
from ffjax.cost.collectives import CollectiveModel
from ffjax.cost.compilers import compiler_of
from ffjax.cost.estimate import estimate
from ffjax.cost.kernels import by_family, kernels
from ffjax.cost.lifetimes import lifetimes
from ffjax.cost.memory import MemoryModel
from ffjax.cost.simulation.simulator import Simulator
from ffjax.ir.dims import named_dims
from ffjax.ir.graph import build_graph
from ffjax.ir.regions import find_regions
from ffjax.ir.trace import Program
from ffjax.planning.fingerprint import fingerprint
from ffjax.planning.tracing import trace_step
from ffjax.strategies.budget import layout_of
from ffjax.strategies.families import family_keys
from ffjax.strategies.problem import build_problem

SHORT, TIMES = 160, 4
LIMIT = 1.15
"""Of a logarithm here and there."""


def program(kind: str, length: int) -> Program:
    """About `length` equations: layers of a matmul and elementwise ones, with a skip over every other layer."""
    array = jax.ShapeDtypeStruct((64, 64), jnp.float32)
    weights = [array] * (length // 8)

    def chain(x: jax.Array, weights: list[jax.Array]) -> jax.Array:
        skipped = x
        for index, w in enumerate(weights):
            skipped, x = x, (x @ w if index % 2 else x @ w + skipped)
            for _ in range(3):
                x = jnp.tanh(x) * 2.0
        return x

    def jitted(x: jax.Array, weights: list[jax.Array]) -> jax.Array:
        return jax.jit(chain)(x, weights)

    def scanned(x: jax.Array, weights: list[jax.Array]) -> jax.Array:
        return jax.lax.scan(lambda c, _: (chain(c, weights), None), x, length=3)[0]

    def trained(weights: list[jax.Array], x: jax.Array) -> list[jax.Array]:
        grads = jax.grad(lambda weights: chain(x, weights).sum())(weights)
        return [w - g for w, g in zip(weights, grads, strict=True)]

    if kind == "trained":
        return trace_step(trained, (weights, array), {})
    return trace_step({"chain": chain, "jitted": jitted, "scanned": scanned}[kind], (array, weights), {})


def analyse(step: Program) -> None:
    """Everything that is as long as the program: all analyses, and one plan that is priced."""
    cluster = Cluster.named("h100")
    regions = find_regions(build_graph(step))
    keys, own = family_keys(regions), kernels(regions)
    named_dims(regions)
    memory = MemoryModel(regions, lifetimes(regions.graph, compiler_of(cluster.device.platform)), keys)
    model = CollectiveModel(cluster.mesh_shapes(max_axes=1)[0], cluster)
    problem = build_problem(regions, keys, by_family(own, keys), model)
    layout = layout_of(problem, [len(n.candidates) - 1 for n in problem.nodes])
    simulated = Simulator(regions, own, model).run(layout.assignments)
    estimate(layout, own, model, memory.peak(layout), simulated)
    fingerprint(regions, keys)


def lines_run(step: Program) -> int:
    count = 0

    def line(frame: FrameType, event: str, arg: object) -> Any:
        nonlocal count
        count += event == "line"
        return line

    def call(frame: FrameType, event: str, arg: object) -> Any:
        return line if frame.f_globals.get("__name__", "").startswith("ffjax.") else None

    before = sys.gettrace()
    sys.settrace(call)
    try:
        analyse(step)
    finally:
        sys.settrace(before)
    return count


@pytest.mark.parametrize("kind", ["chain", "jitted", "scanned", "trained"])
def test_work_is_linear_in_equations(kind: str) -> None:
    analyse(program(kind, SHORT))  # what is kept for the life of the process
    short, long = lines_run(program(kind, SHORT)), lines_run(program(kind, TIMES * SHORT))
    assert long < LIMIT * TIMES * short


def test_depth_adds_nothing_to_a_problem() -> None:
    cluster = Cluster.named("h100")
    model = CollectiveModel(cluster.mesh_shapes(max_axes=1)[0], cluster)
    sizes = []
    for length in (SHORT, 2 * SHORT):
        regions = find_regions(build_graph(program("trained", length)))
        keys = family_keys(regions)
        problem = build_problem(regions, keys, by_family(kernels(regions), keys), model)
        sizes.append((len(problem.nodes), len(problem.transfers)))
    assert sizes[0] == sizes[1]


def test_ops_that_are_alike_share_a_number_and_a_rule() -> None:
    def step(x: jax.Array, y: jax.Array) -> jax.Array:
        return jnp.tanh(x * 2.0) + jnp.tanh(y * 2.0) + y * x[0]

    array = jax.ShapeDtypeStruct((8, 4), jnp.float32)
    ops = [op for op in build_graph(trace_step(step, (array, array), {})).ops if op.eqn is not None]
    tanhs = [op for op in ops if op.kind == "tanh"]
    assert tanhs[0].alike == tanhs[1].alike
    assert tanhs[0].rule is tanhs[1].rule
    scaled = [op for op in ops if op.kind == "mul"]
    assert scaled[0].alike == scaled[1].alike != scaled[2].alike
    assert len({op.alike for op in ops}) == len({(op.kind, op.alike) for op in ops})
