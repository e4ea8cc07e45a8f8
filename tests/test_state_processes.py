"""States and batches of two processes with two devices each: no process ever has the whole."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

WORKER = """
import sys
import jax, jax.numpy as jnp, numpy as np
jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 2)
jax.config.update("jax_cpu_collectives_implementation", "gloo")
jax.distributed.initialize(sys.argv[1], num_processes=2, process_id=int(sys.argv[2]))
import ffjax
from ffjax import checkpoint
from ffjax.errors import PlanError
from ffjax.placing import process_shape

def step(state, batch):
    loss, grads = jax.value_and_grad(lambda w: ((jnp.tanh(batch @ w)) ** 2).mean())(state["w"])
    return {"w": state["w"] - 0.1 * grads, "key": jax.random.split(state["key"])[0], "n": state["n"] + 1}, loss

def init(seed):
    key = jax.random.key(seed)
    return {"w": jax.random.normal(key, (16, 8)), "key": key, "n": jnp.int32(0)}

rank = jax.process_index()
rows = np.random.default_rng(0).normal(size=(8, 16)).astype(np.float32)
fsdp = ffjax.autoshard(step, strategy="fsdp", mesh={"x": 4}, donate_argnums=0)
both = ffjax.autoshard(step, strategy="fsdp+tensor_parallel", mesh={"x": 2, "y": 2}, donate_argnums=0)
for s in (fsdp, both):
    s.plan(jax.eval_shape(init, 0), rows)
wanted = init(0)
wanted = {"w": np.asarray(wanted["w"]), "key": np.asarray(jax.random.key_data(wanted["key"])), "n": np.int32(0)}

def check(state, sharded):
    for name, value in wanted.items():
        array = state[name]
        array = jax.random.key_data(array) if name == "key" else array
        for shard in array.addressable_shards:
            np.testing.assert_array_equal(np.asarray(shard.data), value[shard.index])
    assert state["w"].sharding == sharded.abstract_state(jax.eval_shape(init, 0))["w"].sharding

state = fsdp.init(init, 0)
check(state, fsdp)
assert not state["w"].is_fully_addressable
check(fsdp.place_state(wanted | {"key": jax.random.key(0)}), fsdp)
moved = both.place_state(state)
check(moved, both)

whole = fsdp.place_batch(rows)
half = fsdp.place_batch(rows[4 * rank : 4 * rank + 4])
assert process_shape(rows.shape, whole.sharding) == (4, 16)
for a, b in zip(whole.addressable_shards, half.addressable_shards):
    np.testing.assert_array_equal(np.asarray(a.data), np.asarray(b.data))
try:
    fsdp.place_batch(rows[:3])
    raise SystemExit("three rows were taken")
except PlanError as error:
    assert "or [4, 16], the rows of this process" in str(error), error
one, loss = fsdp(state, half)
two, other = both(moved, both.place_batch(rows))
assert abs(float(loss) - float(other)) < 1e-6

checkpoint.save(sys.argv[3], one, plan=fsdp.plan(one, rows))
restored = checkpoint.restore(sys.argv[3], both.abstract_state(one))
for shard in restored["w"].addressable_shards:
    assert shard.data.shape == both.abstract_state(one)["w"].sharding.shard_shape((16, 8))
print("loss", float(both(restored, both.place_batch(rows))[1]), float(fsdp(one, half)[1]))
"""


def test_two_processes(tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    flags = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", WORKER, address, str(rank), str(tmp_path / "saved")],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=flags,
        )
        for rank in range(2)
    ]
    done = [process.communicate(timeout=120) for process in processes]
    for process, (_, errors) in zip(processes, done, strict=True):
        assert process.returncode == 0, errors[-3000:]
    losses = [[float(v) for v in out.split("loss")[1].split()] for out, _ in done]
    assert losses[0] == losses[1]
    assert abs(losses[0][0] - losses[0][1]) < 1e-6
