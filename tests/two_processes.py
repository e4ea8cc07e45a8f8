"""What tests/test_two_processes.py launches, twice: in two processes with two devices each, alike in both.

two_processes.py first FOLDER     states and batches; trains to the end, saving the state half way
two_processes.py again FOLDER     goes on from what was saved; then process 1 raises while process 0 is in a step
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ffjax
from ffjax import checkpoint, sharded
from ffjax.errors import PlanError
from ffjax.examples.launch import train
from ffjax.placing import process_shape

HALF, END = 2, 4
"""Steps before the state is saved, and in all."""
BATCH = 64
DAMAGE = "the data of step 4 is damaged"


def rows(step: int) -> dict[str, np.ndarray]:
    return train.rows(step, np.arange(BATCH))


def right(state: Any, batch: Any) -> jax.Array:
    """The share of the rows whose class is found."""
    x = batch["x"]
    for kernel in state["kernels"]:
        x = jax.nn.relu(x @ kernel)
    return (x.argmax(axis=1) == batch["y"]).mean()


def planned(folder: Path) -> tuple[Any, Any, Any]:
    """The train step and the evaluation, planned, with a cache of this process's own; and the state's shapes."""
    cache = folder / f"plans {jax.process_index()}"
    step = ffjax.autoshard(train.train_step, cache=cache, donate_argnums=0)
    evaluate = ffjax.autoshard(right, cache=cache)
    shapes = jax.eval_shape(train.init, jax.random.key(0))
    step.plan(shapes, rows(0))
    evaluate.plan(shapes, rows(0))
    return step, evaluate, shapes


def run(step: Any, evaluate: Any, state: Any, first: int, end: int) -> Any:
    """The state after some steps, whose losses are printed."""
    for i in range(first, end):
        batch = step.place_batch(rows(i))
        share = float(evaluate(state, batch))
        state, loss = step(state, batch)
        print(f"loss {i} {float(loss)!r} {share!r}", flush=True)
    return state


def first(folder: Path) -> None:
    states(folder)
    step, evaluate, shapes = planned(folder)
    state = run(step, evaluate, step.init(train.init, jax.random.key(0)), 0, HALF)
    checkpoint.save(folder / "saved", state, plan=step.plan(shapes, rows(0)))
    run(step, evaluate, state, HALF, END)


def again(folder: Path) -> None:
    def no_search(*args: Any, **kwargs: Any) -> Any:
        raise AssertionError("a plan is searched again")

    sharded.plan_program = no_search
    step, evaluate, shapes = planned(folder)
    state = checkpoint.restore(folder / "saved", step.abstract_state(shapes))
    state = run(step, evaluate, state, HALF, END)
    if jax.process_index() == 1:
        raise ValueError(DAMAGE)
    run(step, evaluate, state, END, END + 1)


def states(folder: Path) -> None:
    """No process ever has the whole of a state or of a batch."""

    def step(state: Any, batch: Any) -> Any:
        loss, grads = jax.value_and_grad(lambda w: ((jnp.tanh(batch @ w)) ** 2).mean())(state["w"])
        return {"w": state["w"] - 0.1 * grads, "key": jax.random.split(state["key"])[0], "n": state["n"] + 1}, loss

    def init(seed: Any) -> Any:
        key = jax.random.key(seed)
        return {"w": jax.random.normal(key, (16, 8)), "key": key, "n": jnp.int32(0)}

    rank = jax.process_index()
    x = np.random.default_rng(0).normal(size=(8, 16)).astype(np.float32)
    fsdp = ffjax.autoshard(step, strategy="fsdp", mesh={"x": 4}, donate_argnums=0)
    both = ffjax.autoshard(step, strategy="fsdp+tensor_parallel", mesh={"x": 2, "y": 2}, donate_argnums=0)
    for s in (fsdp, both):
        s.plan(jax.eval_shape(init, 0), x)
    made = init(0)
    wanted = {"w": np.asarray(made["w"]), "key": np.asarray(jax.random.key_data(made["key"])), "n": np.int32(0)}

    def check(state: Any, sharded: Any) -> None:
        for name, value in wanted.items():
            array = jax.random.key_data(state[name]) if name == "key" else state[name]
            for shard in array.addressable_shards:
                np.testing.assert_array_equal(np.asarray(shard.data), value[shard.index])
        assert state["w"].sharding == sharded.abstract_state(jax.eval_shape(init, 0))["w"].sharding

    state = fsdp.init(init, 0)
    check(state, fsdp)
    assert not state["w"].is_fully_addressable
    check(fsdp.place_state(wanted | {"key": jax.random.key(0)}), fsdp)
    moved = both.place_state(state)
    check(moved, both)

    whole = fsdp.place_batch(x)
    half = fsdp.place_batch(x[4 * rank : 4 * rank + 4])
    assert process_shape(x.shape, whole.sharding) == (4, 16)
    for a, b in zip(whole.addressable_shards, half.addressable_shards, strict=True):
        np.testing.assert_array_equal(np.asarray(a.data), np.asarray(b.data))
    with pytest.raises(PlanError, match=r"or \[4, 16\], the rows of this process"):
        fsdp.place_batch(x[:3])
    one, loss = fsdp(state, half)
    _, other = both(moved, both.place_batch(x))
    assert abs(float(loss) - float(other)) < 1e-6

    checkpoint.save(folder / "states", one, plan=fsdp.plan(one, x))
    restored = checkpoint.restore(folder / "states", both.abstract_state(one))
    for shard in restored["w"].addressable_shards:
        assert shard.data.shape == both.abstract_state(one)["w"].sharding.shard_shape((16, 8))
    ahead = float(both(restored, both.place_batch(x))[1]), float(fsdp(one, half)[1])
    assert abs(ahead[0] - ahead[1]) < 1e-6
    print("states are right", flush=True)


if __name__ == "__main__":
    {"first": first, "again": again}[sys.argv[1]](Path(sys.argv[2]))
