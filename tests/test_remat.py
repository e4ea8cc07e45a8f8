"""What checkpointed blocks keep, as a decision: each policy is a program of its own, and the right one is taken."""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from ffjax.cost.kernels import kernels
from ffjax.cost.memory import peak
from ffjax.examples import gpt
from ffjax.ir.assignment import UNUSED, Assignment
from ffjax.ir.compat import AS_WRITTEN, CHECKPOINT_POLICIES
from ffjax.ir.graph import build_graph
from ffjax.ir.layout import Layout
from ffjax.ir.regions import find_regions
from ffjax.ir.spec import MeshShape
from ffjax.ir.trace import Program
from ffjax.planning.fingerprint import program_fingerprint
from ffjax.planning.tracing import trace_step

POLICIES = tuple(CHECKPOINT_POLICIES)

Params = dict[str, jax.Array]
Case = tuple[Callable[..., Any], tuple[Any, ...]]


def layer(w: jax.Array, x: jax.Array) -> jax.Array:
    """Two products, one of them over a batch of heads."""
    h = jnp.tanh(x @ w)
    mixed = jax.nn.softmax(jnp.einsum("bsd,btd->bst", h, h)) @ h
    return x + mixed @ w.T


def step_of(block: Callable[..., jax.Array], *, scanned: bool = False) -> Callable[..., Any]:
    def loss_fn(ws: jax.Array, x: jax.Array) -> jax.Array:
        if scanned:
            x, _ = jax.lax.scan(lambda x, w: (block(w, x), None), x, ws)
        else:
            for w in ws:
                x = block(w, x)
        return (x**2).mean()

    def train_step(ws: jax.Array, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        loss, grads = jax.value_and_grad(loss_fn)(ws, x)
        return ws - 0.1 * grads, loss

    return train_step


def arguments(layers: int = 3, batch: int = 8, length: int = 16, width: int = 32) -> tuple[Any, Any]:
    rng = np.random.default_rng(0)
    ws, x = (rng.normal(size=s).astype(np.float32) / 4 for s in ((layers, width, width), (batch, length, width)))
    return ws, x


def gpt_case(scan_layers: bool) -> Case:
    config = dataclasses.replace(gpt.Config.tiny(), remat=True, scan_layers=scan_layers)
    return gpt.make_train_step(config), gpt.example_args(config)


class Tower(nnx.Module):
    def __init__(self, rngs: nnx.Rngs) -> None:
        self.layers = nnx.List([nnx.Linear(32, 32, rngs=rngs) for _ in range(3)])

    def __call__(self, x: jax.Array) -> jax.Array:
        for linear in self.layers:
            x = nnx.remat(lambda linear, x: linear(jnp.tanh(linear(x))))(linear, x)
        return x


def nnx_step(model: Tower, x: jax.Array) -> jax.Array:
    loss, grads = nnx.value_and_grad(lambda model: (model(x) ** 2).mean())(model)
    nnx.update(model, jax.tree.map(lambda p, g: p - 0.1 * g, nnx.state(model), grads))
    return loss


def policy_case() -> Case:
    block = jax.checkpoint(layer, policy=jax.checkpoint_policies.dots_with_no_batch_dims_saveable)
    return step_of(block, scanned=True), arguments()


CASES: dict[str, Callable[[], Case]] = {
    "gpt": lambda: gpt_case(False),
    "gpt scanned": lambda: gpt_case(True),
    "nnx": lambda: (nnx_step, (Tower(nnx.Rngs(0)), jnp.ones((64, 32)))),
    "policy": policy_case,
}


def cost(program: Program) -> tuple[float, float]:
    """Operations of matrix products, and the peak in bytes, on one device."""
    regions = find_regions(build_graph(program))
    whole = [Assignment((UNUSED,), (UNUSED,))] * len(regions.regions)
    layout = Layout(regions=regions, mesh=MeshShape(("x",), (1,)), assignments=whole, axis_prices=(1.0,))
    return sum(k.flops * k.launches for k in kernels(regions) if k.matmul), peak(layout).bytes


@pytest.mark.parametrize("name", CASES)
def test_what_is_kept_need_not_be_computed_again(name: str) -> None:
    step, args = CASES[name]()
    programs = {p: trace_step(step, args, {}, donate_argnums=0, remat=p) for p in (AS_WRITTEN, *POLICIES)}
    costs = {p: cost(program) for p, program in programs.items()}
    off, dots, unbatched, nothing = (costs[p] for p in POLICIES)
    assert off[0] <= dots[0] <= unbatched[0] <= nothing[0]
    assert off[0] < nothing[0]
    assert off[1] >= dots[1] >= unbatched[1] >= nothing[1]
    assert off[1] > nothing[1]
    written = "dots_with_no_batch_dims_saveable" if name == "policy" else "nothing_saveable"
    assert costs[AS_WRITTEN] == costs[written]


@pytest.mark.parametrize("scanned", [False, True])
def test_off_is_the_program_without_regions(scanned: bool) -> None:
    off = trace_step(step_of(jax.checkpoint(layer), scanned=scanned), arguments(), {}, remat="off")
    plain = trace_step(step_of(layer, scanned=scanned), arguments(), {})
    assert not off.checkpoints
    assert program_fingerprint(off) == program_fingerprint(plain)


def test_no_trace_is_used_again_under_another_policy() -> None:
    """JAX keeps the traces of jitted functions and of their derivatives; the caller's own are what they were."""
    block = jax.jit(jax.checkpoint(layer))
    step = step_of(block)
    args = arguments()

    def traced(policy: str) -> str:
        return program_fingerprint(trace_step(step, args, {}, remat=policy))

    def own() -> str:
        return str(jax.make_jaxpr(jax.grad(lambda w, x: block(w, x).sum()))(args[0][0], args[1]))

    before = own()
    first = {policy: traced(policy) for policy in (AS_WRITTEN, *POLICIES)}
    assert own() == before
    assert {policy: traced(policy) for policy in reversed(first)} == first
    assert len(set(first.values())) == len(POLICIES)  # nothing_saveable is what was written
    assert own() == before


def test_other_threads_trace_as_written() -> None:
    found: list[str] = []

    def elsewhere() -> None:
        grad = jax.grad(jax.checkpoint(lambda x: jnp.sin(jnp.sin(x))))
        found.append(str(jax.make_jaxpr(grad)(1.0)))

    def step(x: jax.Array) -> jax.Array:
        thread = threading.Thread(target=elsewhere)
        thread.start()
        thread.join()
        return x

    trace_step(step, (jnp.ones(3),), {}, remat="off")
    assert "remat" in found[0] or "checkpoint" in found[0]
