"""A train script in which one process does something wrong: what `benchmarks/faults.py` and the tests launch.

ffjax launch --processes 2 --cpu benchmarks/faulty.py FAULT
"""

import os
import signal
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

import ffjax

sys.path.insert(0, str(Path(__file__).parents[1] / "examples" / "launch"))
import train

STEPS = 1000


def main() -> None:
    fault = sys.argv[1]
    wrong = jax.process_index() == int(sys.argv[2] if len(sys.argv) > 2 else jax.process_count() - 1)
    options = {"strategy": "data_parallel"}
    batch = {"x": np.ones((16, train.FEATURES), np.float32), "y": np.zeros(16, np.int32)}
    train_step = train.train_step
    if fault == "memory":
        options["memory"] = "1KiB"
    if fault == "search" and jax.process_index() == 0:
        options["progress"] = lambda what, share: 1 / 0
    if fault == "options" and wrong:
        options["strategy"] = "fsdp"
    if fault == "shapes" and wrong:
        batch = {name: leaf[:8] for name, leaf in batch.items()}
    if fault == "code" and wrong:

        def train_step(state, batch):
            state, loss = train.train_step(state, batch)
            return state, 2.0 * loss

    if fault == "callback":
        batches = iter(range(STEPS))

        def look(x):
            """Runs in process 0."""
            if next(batches) == 3:
                raise ValueError("the data of step 3 is damaged")

        def train_step(state, batch):
            jax.debug.callback(look, batch["x"][0, 0])
            return train.train_step(state, batch)

    step = ffjax.autoshard(train_step, **options)
    if fault == "order" and wrong:
        time.sleep(3600)
    plan = step.plan(jax.eval_shape(train.init, jax.random.key(0)), batch)
    state = step.init(train.init, jax.random.key(0))
    for i in range(STEPS):
        if wrong and i == 3:
            if fault == "exception":
                raise ValueError("the data of step 3 is damaged")
            if fault == "exit":
                sys.exit(5)
            if fault == "killed":
                os.kill(os.getpid(), signal.SIGKILL)
        state, loss = step(state, batch)
        assert jnp.isfinite(loss)
        print(f"step {i + 1} on {plan.devices} devices", flush=True)
        time.sleep(0.1)


if __name__ == "__main__":
    main()
