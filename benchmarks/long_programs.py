"""A step of very many equations at the top level: CPU seconds to plan, compile and run it sharded, on 8 CPU devices.

python benchmarks/long_programs.py [EQUATIONS [called]]      (by default 70000, about 20 minutes)

`called`: the step is one `jit` call of the program, which is that of tests/long_program.py.
"""

from __future__ import annotations

import pathlib
import sys
import time

import jax
from tables import write

import ffjax
from ffjax.testing import assert_same_numerics, fake_devices

sys.path.insert(0, str(pathlib.Path(__file__).parents[1] / "tests"))
from long_program import long_step


def main(equations: int, called: bool) -> None:
    fake_devices(8)
    step, state, batch = long_step(equations, called=called)
    sharded = ffjax.autoshard(step, mesh={"x": 8})
    last = time.process_time()
    rows = list[tuple[str, str]]()

    def done(what: str) -> None:
        nonlocal last
        now = time.process_time()
        rows.append((what, f"{now - last:.1f}"))
        print(*rows[-1], sep=": ", file=sys.stderr, flush=True)
        last = now

    plan = sharded.plan(state, batch)
    done("trace and plan")
    got = jax.block_until_ready(sharded(state, batch))
    done("compile and run the first step, sharded")
    jax.block_until_ready(sharded(state, batch))
    done("another step, sharded")
    assert_same_numerics(got, jax.jit(step)(state, batch))
    done("compile and run the step unsharded, and compare")
    count = len(plan.bound.graph.program.jaxpr.eqns)
    where = "in one `jit` call" if called else "at the top level"
    write(
        "long_programs",
        "A step of very many equations",
        [f"{count} equations {where}; the sharded step has the same numbers as the unsharded one."],
        ("", "CPU s"),
        rows,
    )


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 70_000, "called" in sys.argv)
