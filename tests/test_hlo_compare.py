"""Planned beside compiled collectives: what agrees, and each way in which they can differ."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import ffjax
from ffjax.cost.hlo.collectives import collectives_of
from ffjax.cost.hlo.compare import Exchange, planned_collectives, unplanned
from ffjax.cost.hlo.rematerialization import Rematerialization, logged_rematerializations
from ffjax.examples import gpt
from ffjax.ir.spec import Collective, CollectiveKind, CountedCollective, MeshShape

MESH = MeshShape(("x", "y"), (4, 2))
X, Y, BOTH = "{{0,2,4,6},{1,3,5,7}}", "{{0,1},{2,3},{4,5},{6,7}}", "{{0,1,2,3,4,5,6,7}}"


def counted(kind: CollectiveKind, axes: tuple[str, ...], size: float, count: float = 1.0) -> CountedCollective:
    return CountedCollective(collective=Collective(kind, axes, size), count=count, source="plan.py:1")


def text_of(body: str) -> str:
    return f"""HloModule m, is_scheduled=true, num_partitions=8

%add (x: f32[], y: f32[]) -> f32[] {{
  %x = f32[] parameter(0)
  %y = f32[] parameter(1)
  ROOT %sum = f32[] add(%x, %y)
}}

%part (whole: f32[32,4], i: s32[]) -> f32[4,4] {{
  %whole = f32[32,4]{{1,0}} parameter(0)
  %i = s32[] parameter(1)
  %n = f32[32,4]{{1,0}} negate(%whole)
  ROOT %ds = f32[4,4]{{1,0}} dynamic-slice(%n, %i, %i), dynamic_slice_sizes={{4,4}}
}}

%joined (a: f32[16], b: f32[48]) -> f32[64] {{
  %a = f32[16]{{0}} parameter(0)
  %b = f32[48]{{0}} parameter(1)
  ROOT %cat = f32[64]{{0}} concatenate(%a, %b), dimensions={{0}}
}}

ENTRY %main (p: f32[8,4]) -> f32[8,4] {{
  %p = f32[8,4]{{1,0}} parameter(0)
  %at = s32[] parameter(1)
  %small = f32[16]{{0}} negate(%p), metadata={{op_name="jit(step)/small" source_file="model.py" source_line=3}}
  %large = f32[48]{{0}} negate(%p), metadata={{op_name="jit(step)/large" source_file="model.py" source_line=4}}
{body}
}}
"""


def test_a_plan_that_is_compiled_as_it_was_made() -> None:
    config = dataclasses.replace(gpt.Config.tiny(), scan_layers=True, remat=True)
    cluster = ffjax.Cluster.named("cpu")
    plan = ffjax.plan(
        gpt.make_train_step(config),
        *gpt.example_args(config),
        cluster=cluster,
        mesh={"x": 4, "y": 2},
        strategy="fsdp",
    )
    compiled = plan.lower(jax.devices()).compile()
    planned = planned_collectives(plan.bound)
    assert any(c.collective.kind == "reduce_scatter" for c in planned)
    assert all(c.source for c in planned)
    report = unplanned(planned, compiled, plan.mesh, reduce_scatter=cluster.reduce_scatter)
    assert report.agrees, str(report)
    assert {c.kind for c in report.comparisons} == {"all_gather", "all_reduce"}
    # Without all gathers over x in the plan, those are what was not planned.
    fewer = [c for c in planned if (c.collective.kind, c.collective.axes) != ("all_gather", ("x",))]
    surplus = [c for c in unplanned(fewer, compiled, plan.mesh, reduce_scatter=False).comparisons if c.unplanned]
    assert [(c.kind, c.axes) for c in surplus] == [("all_gather", ("x",))]
    assert sum(c.total_bytes for c in surplus[0].unplanned) == surplus[0].compiled_bytes
    # And where the compiler were to form reduce-scatters, all-reduces would stand in their place.
    exchanged = unplanned(planned, compiled, plan.mesh).exchanged
    assert {(e.planned, e.compiled) for e in exchanged} == {("reduce_scatter", "all_reduce")}


def test_merged_collectives_are_those_that_were_planned() -> None:
    text = text_of(f"""
  %cat.1 = f32[64]{{0}} fusion(%small, %large), kind=kLoop, calls=%joined
  %ar = f32[64]{{0}} all-reduce(%cat.1), replica_groups={BOTH}, to_apply=%add
  %ag = ((f32[16]{{0}}, f32[48]{{0}}), (f32[32]{{0}}, f32[96]{{0}})) all-gather-start(%small, %large), \
replica_groups={Y}, dimensions={{0}}
""")
    planned = [
        counted("all_reduce", ("x", "y"), 64),
        counted("all_reduce", ("x", "y"), 192),
        counted("all_gather", ("y",), 128),
        counted("all_gather", ("y",), 384),
    ]
    report = unplanned(planned, text, MESH)
    assert report.agrees
    assert [(c.planned_count, c.compiled_count) for c in report.comparisons] == [(2, 1), (2, 1)]
    split = collectives_of(text, MESH, split=True)
    assert [(c.collective.bytes, c.source) for c in split] == [
        (64, "model.py:3"),
        (192, "model.py:4"),
        (128, "model.py:3"),
        (384, "model.py:4"),
    ]
    # Of one that was merged only the part that nobody planned is reported, with its own source line.
    report = unplanned(planned[1:], text, MESH)
    (surplus,) = [one for c in report.comparisons for one in c.unplanned]
    assert (surplus.collective, surplus.source) == (Collective("all_reduce", ("x", "y"), 64), "model.py:3")
    assert "unplanned: 1 x all_reduce over x*y, 64 bytes at model.py:3 (jit(step)/small)" in str(report)


def test_what_is_missing() -> None:
    text = text_of(f"  %ar = f32[16]{{0}} all-reduce(%small), replica_groups={X}, to_apply=%add")
    planned = [
        counted("all_reduce", ("x",), 64),
        counted("all_reduce", ("x",), 192),
        counted("all_to_all", ("y",), 8, 3),
    ]
    report = unplanned(planned, text, MESH)
    assert not report.agrees
    assert [c.missing for c in report.comparisons] == [(planned[1],), (planned[2],)]
    assert "missing: 3 x all_to_all over y, 8 bytes at plan.py:1" in str(report)
    assert unplanned(planned, text, MESH, tolerance=1.0).agrees


def test_reduce_scatters_that_are_compiled_as_all_reduces() -> None:
    text = text_of(f"  %ar = f32[48]{{0}} all-reduce(%large), replica_groups={BOTH}, to_apply=%add")
    planned = [counted("reduce_scatter", ("y", "x"), 192)]  # the order of axes says nothing
    report = unplanned(planned, text, MESH)
    assert report.exchanged == (Exchange(planned="reduce_scatter", compiled="all_reduce", axes=("x", "y"), bytes=192),)
    assert not any(c.unplanned or c.missing for c in report.comparisons)
    assert not report.agrees
    assert "exchanged: 192 bytes over x*y, planned as reduce_scatter, compiled as all_reduce" in str(report)
    assert unplanned(planned, text, MESH, reduce_scatter=False).agrees


GATHER = f"all-gather(%p), replica_groups={X}, dimensions={{0}}, "
GATHER += 'metadata={op_name="jit(step)/gather" source_file="model.py" source_line=5}'


@pytest.mark.parametrize(
    ("readers", "rematerialized"),
    [
        ("  %r = f32[4,4]{1,0} fusion(%ag, %at), kind=kLoop, calls=%part", True),
        ("  %b = f32[128]{0} bitcast(%ag)\n  %r = f32[8]{0} dynamic-slice(%b, %at), dynamic_slice_sizes={8}", True),
        ("  %r = f32[32,4]{1,0} negate(%ag)", False),
        ("  %r = f32[4,4]{1,0} fusion(%ag, %at), kind=kLoop, calls=%part\n  %q = f32[32,4]{1,0} negate(%ag)", False),
        ("", False),
    ],
)
def test_full_rematerialization(readers: str, rematerialized: bool) -> None:
    text = text_of(f"  %ag = f32[32,4]{{1,0}} {GATHER}\n{readers}")
    report = unplanned([], text, MESH)
    expected = Rematerialization(name="ag", bytes=512, source="model.py:5", op_name="jit(step)/gather")
    assert report.rematerialized == ((expected,) if rematerialized else ())
    line = "rematerialized: 512 bytes are gathered whole and read in part, at model.py:5 (jit(step)/gather)"
    assert (line in str(report)) == rematerialized
    # What the plan gathers, it means to.
    assert not unplanned([counted("all_gather", ("x",), 512)], text, MESH).rematerialized


def test_planned_gathers_that_the_compiler_merges_are_no_rematerialization() -> None:
    text = text_of(f"""
  %ag = ((f32[8,4]{{1,0}}, f32[48]{{0}}), (f32[32,4]{{1,0}}, f32[192]{{0}})) all-gather-start(%p, %large), \
replica_groups={X}, dimensions={{0}}
  %done = (f32[32,4]{{1,0}}, f32[192]{{0}}) all-gather-done(%ag)
  %whole = f32[32,4]{{1,0}} get-tuple-element(%done), index=0
  %r = f32[4,4]{{1,0}} fusion(%whole, %at), kind=kLoop, calls=%part
""")
    planned = [counted("all_gather", ("x",), 512), counted("all_gather", ("x",), 768)]
    assert unplanned(planned, text, MESH).agrees
    assert [r.bytes for r in unplanned(planned[:1], text, MESH).rematerialized] == [512 + 768]


def test_a_resharding_that_xla_can_do_only_whole() -> None:
    mesh = Mesh(np.array(jax.devices()[:8]).reshape(4, 2), ("x", "y"), axis_types=(AxisType.Auto,) * 2)
    x = jax.ShapeDtypeStruct((24, 16), jnp.float32, sharding=NamedSharding(mesh, P("x", None)))

    def step(x: jax.Array) -> jax.Array:
        y = jax.lax.with_sharding_constraint(jnp.sin(x), NamedSharding(mesh, P()))  # gathers
        return jax.lax.with_sharding_constraint(y, NamedSharding(mesh, P("y", "x")))  # slices

    report = unplanned([], jax.jit(step).lower(x).compile(), MESH)
    (found,) = report.rematerialized
    assert found.bytes == 24 * 16 * 4
    assert found.source.split(":")[0].endswith("test_hlo_compare.py")


LOG = """
W spmd_partitioner.cc:601] [SPMD] Involuntary full rematerialization. The compiler cannot go from sharding \
{devices=[1,2,4]<=[8]} to {devices=[8,1]<=[8]} efficiently for HLO operation %add.2 = f32[8,8]{1,0} add(%a, %b), \
metadata={op_name="jit(f)/add" source_file="model.py" source_line=12}. As the last resort, SPMD will replicate it.
an unrelated line
"""


def test_warnings_of_the_compiler() -> None:
    expected = Rematerialization(name="add.2", bytes=0.0, source="model.py:12", op_name="jit(f)/add")
    assert logged_rematerializations(LOG + LOG) == [expected]
    report = unplanned([], text_of(""), MESH, log=LOG)
    assert report.rematerialized == (expected,)
    assert not report.agrees
