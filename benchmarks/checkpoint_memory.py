"""What a host holds while a state is saved and restored by Orbax: sharded, in two processes, and onto one device.

python benchmarks/checkpoint_memory.py

Each process is taken for a host; the memory of its CPU devices is in it.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp
import orbax.checkpoint  # noqa: F401  # before the memory is looked at, not at the first use
from tables import write

import ffjax
from ffjax import checkpoint

ARRAYS, ROWS, COLUMNS = 16, 2048, 4096
"""512 MiB of float32."""
WHOLE = ARRAYS * ROWS * COLUMNS * 4 // 2**20
HOST_MEMORY = "128MiB"
NOTES = (
    f"A state of {WHOLE} MiB in {ARRAYS} arrays, sharded by fsdp over the 8 CPU devices of two processes, is saved, "
    "restored there under fsdp+tensor_parallel on 4x2, and then by a process alone onto its one device: with "
    f"`host_memory={HOST_MEMORY!r}`, and, where it says so, with the default, which is more than this state.",
    "`own` is what the devices of a process have of it. `peak` is by how much the process grows at most meanwhile "
    "(resident bytes, the kernel's high-water mark). CPU devices are memory of the host's, so when restoring `own` is "
    "in the peak; when saving it was there before. `beyond` is the rest: what the host holds on the way. A host that "
    f"had the whole on the way would be {WHOLE} MiB beyond.",
)


def init(key):
    return [jax.random.normal(k, (ROWS, COLUMNS)) for k in jax.random.split(key, ARRAYS)]


def step(state, x):
    def loss(state):
        h = x
        for w in state:
            h = jnp.tanh(h @ w @ w.T)
        return (h**2).mean()

    value, grads = jax.value_and_grad(loss)(state)
    return [w - 0.1 * g for w, g in zip(state, grads, strict=True)], value


class Grown:
    """By how much this process grows: resident MiB at most, over those at the start."""

    def __enter__(self):
        Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts again
        self.before = self._mib("VmRSS")
        return self

    def __exit__(self, *_):
        self.peak = self._mib("VmHWM") - self.before

    def _mib(self, field: str) -> float:
        return int(re.search(rf"{field}:\s+(\d+)", Path("/proc/self/status").read_text())[1]) / 1024


def tell(what: str, state, grown: Grown, came: bool = True) -> None:
    """Prints a row: `came`, whether the state came to the devices meanwhile."""
    own = sum(s.data.nbytes for a in state for s in a.addressable_shards) / 2**20
    beyond = grown.peak - own * came
    print(f"ROW|{what}|{jax.process_index()}|{own:.0f}|{grown.peak:.0f}|{beyond:.0f}", flush=True)


def sharded(folder: str) -> None:
    """One of the processes that save the state, and restore it under another plan."""
    shapes, batch = jax.eval_shape(init, jax.random.key(0)), jax.ShapeDtypeStruct((64, ROWS), jnp.float32)
    before = ffjax.autoshard(step, strategy="fsdp", mesh={"x": 8})
    after = ffjax.autoshard(step, strategy="fsdp+tensor_parallel", mesh={"x": 4, "y": 2})
    before.plan(shapes, batch)
    after.plan(shapes, batch)
    state = jax.block_until_ready(before.init(init, jax.random.key(0)))
    sums = [float(jnp.sum(a)) for a in state]
    with Grown() as grown:
        checkpoint.save(f"{folder}/state", state)
    tell("save", state, grown, came=False)
    del state
    with Grown() as grown:
        state = checkpoint.restore(f"{folder}/state", after.abstract_state(shapes), host_memory=HOST_MEMORY)
        jax.block_until_ready(state)
    tell("restore, another plan", state, grown)
    assert [round(float(jnp.sum(a)), 0) for a in state] == [round(s, 0) for s in sums]


def alone(folder: str, *host_memory: str) -> None:
    """A process that restores the state onto its one device; by default without `host_memory`."""
    options = {"host_memory": host_memory[0]} if host_memory else {}
    target = checkpoint.on_device(jax.eval_shape(init, jax.random.key(0)))
    with Grown() as grown:
        state = jax.block_until_ready(checkpoint.restore(f"{folder}/state", target, **options))
    tell("restore, one device" + (" by default" if not host_memory else ""), state, grown)


def main() -> None:
    launch = [sys.executable, "-m", "ffjax.cli", "launch", "--cpu", "--processes"]
    output = ""
    with tempfile.TemporaryDirectory() as folder:
        runs = [["2", "--devices-per-process", "4", __file__, "sharded", folder]]
        runs += [["1", __file__, "alone", folder, *limit] for limit in ([HOST_MEMORY], [])]
        for options in runs:
            run = subprocess.run([*launch, *options], check=False, capture_output=True, text=True, timeout=300)
            assert run.returncode == 0, run.stdout + run.stderr
            output += run.stdout
    rows = re.findall(r"ROW\|([^|]+)\|(\d)\|(\d+)\|(\d+)\|(-?\d+)", output)
    order = list(dict.fromkeys(row[0] for row in rows))
    rows.sort(key=lambda row: (order.index(row[0]), row[1]))
    write(
        "checkpoint_memory", "What a host holds", NOTES, ["", "process", "own, MiB", "peak, MiB", "beyond, MiB"], rows
    )


if __name__ == "__main__":
    {"sharded": sharded, "alone": alone}[sys.argv[1]](*sys.argv[2:]) if len(sys.argv) > 1 else main()
