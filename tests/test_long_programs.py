"""Steps of a thousand equations at the top level, or in one `jit` call, run sharded.

`benchmarks/long_programs.py` is for 70,000.
"""

from __future__ import annotations

import pathlib
import sys

import jax
import pytest

import ffjax
from ffjax.testing import assert_same_numerics

sys.path.insert(0, str(pathlib.Path(__file__).parent))
from long_program import long_step


@pytest.mark.parametrize("called", [False, True], ids=["as_it_is", "one_call"])
def test_a_long_step_runs_sharded(called: bool) -> None:
    step, state, batch = long_step(1_200, called=called)
    sharded = ffjax.autoshard(step, mesh={"x": 8}, strategy="data_parallel")
    plan = sharded.plan(state, batch)
    assert len(plan.bound.graph.program.jaxpr.eqns) > 1_000
    assert plan.args[-1].spec == (("x",), ())  # the batch
    assert_same_numerics(sharded(state, batch), jax.jit(step)(state, batch))
