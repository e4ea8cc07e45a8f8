"""What a host holds while a state is saved and restored by Orbax: two processes, of four CPU devices each.

python benchmarks/checkpoint_memory.py

Appends to results/checkpoint.md. Each process is taken for a host; the memory of its CPU devices is in it.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
from pathlib import Path

ARRAYS, ROWS, COLUMNS = 16, 2048, 4096
"""512 MiB of float32."""
RESULTS = Path(__file__).parent / "results" / "checkpoint.md"
TITLE = "## What a host holds"
NOTES = (
    "`python benchmarks/checkpoint_memory.py`: two processes of four CPU devices each, a state of {whole} MiB in "
    "{arrays} arrays, sharded by fsdp over 8 devices, saved, and restored under fsdp+tensor_parallel on 4x2. `own` is "
    "what the devices of a process have of it; `peak` is by how much the process grows at most meanwhile (resident "
    "bytes, the kernel's high-water mark): when saving beside the state, when restoring with it. A host that held the "
    "whole would grow by {whole} MiB and more when saving, by {both} when restoring."
)


def resident_mib(field: str) -> float:
    text = Path("/proc/self/status").read_text()
    return int(re.search(rf"{field}:\s+(\d+)", text)[1]) / 1024


def fresh_mark() -> None:
    """The high-water mark starts again from what is resident now."""
    Path("/proc/self/clear_refs").write_text("5")


def worker(folder: str) -> None:
    """One process of the run; prints its lines."""
    import jax
    import jax.numpy as jnp

    import ffjax
    from ffjax import checkpoint

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

    shapes, batch = jax.eval_shape(init, jax.random.key(0)), jax.ShapeDtypeStruct((64, ROWS), jnp.float32)
    before = ffjax.autoshard(step, strategy="fsdp", mesh={"x": 8})
    after = ffjax.autoshard(step, strategy="fsdp+tensor_parallel", mesh={"x": 4, "y": 2})
    before.plan(shapes, batch)
    after.plan(shapes, batch)

    def own(state) -> float:
        return sum(s.data.nbytes for a in state for s in a.addressable_shards) / 2**20

    def line(what: str, state) -> None:
        print(f"ROW|{what}|{jax.process_index()}|{own(state):.0f}|{resident_mib('VmHWM') - since:.0f}", flush=True)

    state = before.init(init, jax.random.key(0))
    jax.block_until_ready(state)
    sums = [float(jnp.sum(a)) for a in state]
    fresh_mark()
    since = resident_mib("VmRSS")
    checkpoint.save(f"{folder}/state", state)
    line("save", state)
    del state
    fresh_mark()
    since = resident_mib("VmRSS")
    state = checkpoint.restore(f"{folder}/state", after.abstract_state(shapes))
    jax.block_until_ready(state)
    line("restore", state)
    assert [round(float(jnp.sum(a)), 0) for a in state] == [round(s, 0) for s in sums]


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        command = [
            sys.executable,
            "-m",
            "ffjax.cli",
            "launch",
            "--processes",
            "2",
            "--devices-per-process",
            "4",
            "--cpu",
        ]
        run = subprocess.run([*command, __file__, folder], check=True, capture_output=True, text=True, timeout=300)
    print(run.stdout, run.stderr)
    rows = sorted(re.findall(r"ROW\|(\w+)\|(\d)\|(\d+)\|(\d+)", run.stdout), key=lambda r: (r[0] != "save", r))
    whole = ARRAYS * ROWS * COLUMNS * 4 // 2**20
    text = RESULTS.read_text().split(TITLE)[0].rstrip()
    lines = [TITLE, "", NOTES.format(whole=whole, arrays=ARRAYS, both=whole * 3 // 2), ""]
    lines += ["| | process | own, MiB | peak, MiB |", "|---|---|---|---|"]
    lines += [f"| {what} | {process} | {own} | {peak} |" for what, process, own, peak in rows]
    RESULTS.write_text(text + "\n\n" + "\n".join(lines) + "\n")


if __name__ == "__main__":
    worker(sys.argv[1]) if len(sys.argv) > 1 else main()
