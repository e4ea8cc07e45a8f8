"""A step of very many equations at the top level: CPU seconds to plan, compile and run it sharded, on 8 CPU devices.

python benchmarks/long_programs.py [EQUATIONS [called]]      (by default 70000)

`called`: the step is one `jit` call of the program, which is that of tests/long_program.py. Prints what it measures.
"""

from __future__ import annotations

import pathlib
import sys
import time

import jax

import ffjax
from ffjax.testing import assert_same_numerics, fake_devices

sys.path.insert(0, str(pathlib.Path(__file__).parents[1] / "tests"))
from long_program import long_step


def main(equations: int, called: bool) -> None:
    fake_devices(8)
    step, state, batch = long_step(equations, called=called)
    sharded = ffjax.autoshard(step, mesh={"x": 8})
    last = time.process_time()

    def done(what: str) -> None:
        nonlocal last
        now = time.process_time()
        print(f"{what}: {now - last:.1f} CPU s", flush=True)
        last = now

    plan = sharded.plan(state, batch)
    print(len(plan.bound.graph.program.jaxpr.eqns), "equations", flush=True)
    done("trace and plan")
    got = jax.block_until_ready(sharded(state, batch))
    done("compile and run the first step, sharded")
    jax.block_until_ready(sharded(state, batch))
    done("another step")
    assert_same_numerics(got, jax.jit(step)(state, batch))
    done("compile and run unsharded, and compare: the same numbers")


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 70_000, "called" in sys.argv)
