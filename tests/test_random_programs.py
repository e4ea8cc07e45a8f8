"""Random small programs under random plans: the same numbers, and never more communication than was planned.

`pytest --full` draws more of them.
"""

from __future__ import annotations

import jax
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ffjax.emit.oracle import explicit_collectives
from ffjax.ir.graph import build_graph
from ffjax.ir.regions import find_regions
from ffjax.ir.spec import MeshShape
from ffjax.planning.tracing import trace_step
from ffjax.testing import assert_same_numerics
from tests.programs import values
from tests.random_programs import OPS, Pick, drawn_picks, random_step
from tests.running import bytes_by_kind, drawn_layout, run_layout

MESHES = [MeshShape(("x",), (8,)), MeshShape(("x", "y"), (4, 2)), MeshShape(("x", "y", "z"), (2, 2, 2))]
SIZE = 16


def check(picks: list[Pick], mesh: MeshShape, seed: int) -> None:
    step = random_step(picks)
    args = (values(SIZE, SIZE) / 4, values(SIZE, SIZE, seed=1) / 4)
    regions = find_regions(build_graph(trace_step(step, args, {})))
    layout = drawn_layout(regions, mesh, seed)
    lowered, got = run_layout(layout, args)
    assert_same_numerics(tuple(got), jax.jit(step)(*args), rtol=1e-3)
    assert not bytes_by_kind(explicit_collectives(lowered)) - bytes_by_kind(layout.collectives())


def some(examples: int) -> settings:
    return settings(
        max_examples=examples, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow]
    )


DRAWN = given(picks=drawn_picks(tuple(OPS), 5), mesh=st.sampled_from(MESHES), seed=st.integers(0, 99))


@some(10)
@DRAWN
def test_numbers_and_collectives(picks: list[Pick], mesh: MeshShape, seed: int) -> None:
    check(picks, mesh, seed)


@pytest.mark.full
@some(300)
@DRAWN
def test_many(picks: list[Pick], mesh: MeshShape, seed: int) -> None:
    check(picks, mesh, seed)
