"""HLO text: what CPU compiles, and what a GPU backend prints."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from ffjax.cost.hlo.collectives import collectives_of, peak_bytes
from ffjax.cost.hlo.shapes import dtype_bits
from ffjax.ir.device_groups import axes_of_groups, axes_of_pairs
from ffjax.ir.spec import Collective, CountedCollective, MeshShape, summarize

SHAPE = MeshShape(("x", "y"), (4, 2))


@pytest.fixture(scope="module")
def mesh() -> Mesh:
    return Mesh(np.array(jax.devices()[:8]).reshape(4, 2), ("x", "y"), axis_types=(AxisType.Auto,) * 2)


def arg(mesh: Mesh, shape: tuple[int, ...], *dims: object) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, jnp.float32, sharding=NamedSharding(mesh, P(*dims)))


def pairs(found: list[CountedCollective]) -> list[tuple[Collective, float]]:
    return [(c.collective, c.count) for c in found]


# -- compiled on CPU


def test_sharded_contraction(mesh: Mesh) -> None:
    f = jax.jit(lambda x, w: x @ w, out_shardings=NamedSharding(mesh, P()))
    compiled = f.lower(arg(mesh, (8, 16), None, "x"), arg(mesh, (16, 32), "x")).compile()
    found = collectives_of(compiled, SHAPE)
    assert pairs(found) == [(Collective("all_reduce", ("x",), 8 * 32 * 4), 1.0)]
    assert found[0].source.split(":")[0].endswith("test_hlo.py")
    assert [c.collective.axes for c in collectives_of(compiled)] == [()]


@pytest.mark.parametrize(
    ("before", "after", "expected"),
    [
        (("x", None), (), Collective("all_gather", ("x",), 16 * 32 * 4)),
        (("y", None), (), Collective("all_gather", ("y",), 16 * 32 * 4)),
        ((("x", "y"), None), (), Collective("all_gather", ("x", "y"), 16 * 32 * 4)),
        (("x", None), (None, "x"), Collective("all_to_all", ("x",), 16 * 32 * 4 / 4)),
        ((("x", "y"), None), (("y", "x"), None), Collective("collective_permute", ("x", "y"), 16 * 32 * 4 / 8)),
    ],
)
def test_reshards(mesh: Mesh, before: tuple[object, ...], after: tuple[object, ...], expected: Collective) -> None:
    f = jax.jit(jnp.sin, out_shardings=NamedSharding(mesh, P(*after)))
    found = collectives_of(f.lower(arg(mesh, (16, 32), *before)).compile(), SHAPE)
    assert pairs(found) == [(expected, 1.0)]


def test_inside_a_scan(mesh: Mesh) -> None:
    def f(x: jax.Array, w: jax.Array) -> jax.Array:
        def body(h: jax.Array, wi: jax.Array) -> tuple[jax.Array, None]:
            # Constrained to ("y",) at once, XLA would halve the all-reduce and permute after it.
            h = jax.lax.with_sharding_constraint(h @ wi, NamedSharding(mesh, P()))
            return jax.lax.with_sharding_constraint(h, NamedSharding(mesh, P(None, "y"))), None

        return jax.lax.scan(body, x, w)[0]

    args = arg(mesh, (16, 16), None, "y"), arg(mesh, (3, 16, 16), None, "y", None)
    found = collectives_of(jax.jit(f).lower(*args).compile(), SHAPE)
    assert pairs(found) == [(Collective("all_reduce", ("y",), 16 * 16 * 4), 3.0)]


def test_peak_bytes_counts_what_is_donated_once(mesh: Mesh) -> None:
    kept = jax.jit(lambda x: x + 1).lower(arg(mesh, (64, 64), "x")).compile()
    donated = jax.jit(lambda x: x + 1, donate_argnums=0).lower(arg(mesh, (64, 64), "x")).compile()
    piece = 64 * 64 * 4 // 4
    assert peak_bytes(kept) >= 2 * piece
    assert peak_bytes(kept) - peak_bytes(donated) == piece


# -- text as a GPU backend schedules it

GPU = """HloModule jit_step, is_scheduled=true, num_partitions=8

FileNames
1 "model.py"

FunctionNames
1 "step"

FileLocations
1 {file_name_id=1 function_name_id=1 line=42 end_line=42 column=4 end_column=9}

StackFrames
1 {file_location_id=1 parent_frame_id=1}


%add (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %sum = f32[] add(%a, %b)
}

%async_computation (p: bf16[8,16]) -> bf16[2,16] {
  %p = bf16[8,16]{1,0} parameter(0)
  ROOT %rs.1 = bf16[2,16]{1,0} reduce-scatter(%p), replica_groups={{0,2,4,6},{1,3,5,7}}, dimensions={0}, to_apply=%add
}

%body (t: (s32[], f32[8])) -> (s32[], f32[8]) {
  %t = (s32[], f32[8]{0}) parameter(0)
  %g = f32[8]{0} get-tuple-element(%t), index=1
  %ar = f32[8]{0} all-reduce(%g), replica_groups={}, to_apply=%add
  ROOT %out = (s32[], f32[8]{0}) tuple(%g, %ar)
}

%condition (t.1: (s32[], f32[8])) -> pred[] {
  %t.1 = (s32[], f32[8]{0}) parameter(0)
  %i = s32[] get-tuple-element(%t.1), index=0
  %limit = s32[] constant(7)
  ROOT %less = pred[] compare(%i, %limit), direction=LT
}

ENTRY %main (p0: bf16[8,16], p1: f32[8]) -> f32[8] {
  %p0 = bf16[8,16]{1,0} parameter(0)
  %p1 = f32[8]{0} parameter(1)
  %ar-start = (f32[8]{0}, /*index=1*/bf16[8,16]{1,0:T(8,128)(2,1)}) all-reduce-start(%p1, %p0), channel_id=1, \
replica_groups=[2,4]<=[4,2]T(1,0), use_global_device_ids=true, to_apply=%add, metadata={op_name="jit(step)/dot" \
stack_frame_id=1}, backend_config={"collective_backend_config":{"is_sync":false}}
  %ar-done = (f32[8]{0}, bf16[8,16]{1,0}) all-reduce-done(%ar-start)
  %ag-start = (bf16[8,16]{1,0}, bf16[16,16]{1,0}) all-gather-start(%p0), channel_id=2, \
replica_groups=mesh['axis_0'=4,'axis_1'=2] {'axis_1'}, dimensions={0}, metadata={op_name="jit(step)/gather"}
  %ag-done = bf16[16,16]{1,0} all-gather-done(%ag-start)
  %ag2-start = ((bf16[8,16]{1,0}, f32[8]{0}), (bf16[16,16]{1,0}, f32[16]{0})) all-gather-start(%p0, %p1), \
replica_groups=[4,2]<=[8], dimensions={0}
  %ag2-done = (bf16[16,16]{1,0}, f32[16]{0}) all-gather-done(%ag2-start)
  %rs = bf16[2,16]{1,0} reduce-scatter(%p0), replica_groups={{0,2,4,6},{1,3,5,7}}, dimensions={0}, to_apply=%add
  %rs-start = ((bf16[8,16]{1,0}), bf16[2,16]{1,0}) reduce-scatter-start(%p0), \
replica_groups={{0,2,4,6},{1,3,5,7}}, dimensions={0}, to_apply=%add
  %rs-done = bf16[2,16]{1,0} reduce-scatter-done(%rs-start)
  %as = ((bf16[8,16]{1,0}), bf16[2,16]{1,0}, u32[]) async-start(%p0), calls=%async_computation
  %as-done = bf16[2,16]{1,0} async-done(%as)
  %a2a = (bf16[4,16]{1,0}, bf16[4,16]{1,0}) all-to-all(%s0, %s1), replica_groups={{0,1},{2,3},{4,5},{6,7}}
  %cp-start = (bf16[8,16]{1,0}, bf16[8,16]{1,0}, u32[], u32[]) collective-permute-start(%p0), channel_id=4, \
source_target_pairs={{0,2},{2,4},{4,6},{6,0},{1,3},{3,5},{5,7},{7,1}}
  %cp-done = bf16[8,16]{1,0} collective-permute-done(%cp-start)
  %w1 = (s32[], f32[8]{0}) while(%init), condition=%condition, body=%body, \
backend_config={"known_trip_count":{"n":"3"},"known_induction_variable":{"tuple_index":"0"}}
  %w2 = (s32[], f32[8]{0}) while(%init), condition=%condition, body=%body
  ROOT %result = f32[8]{0} get-tuple-element(%w2), index=1
}
"""


def test_gpu_text() -> None:
    found = collectives_of(GPU, SHAPE)
    piece = 8 * 16 * 2
    scatter = (Collective("reduce_scatter", ("x",), piece), 1.0)
    assert pairs(found) == [
        (Collective("all_reduce", ("x",), 32 + piece), 1.0),
        (Collective("all_gather", ("y",), 2 * piece), 1.0),
        (Collective("all_gather", ("y",), 2 * piece + 64), 1.0),
        scatter,
        scatter,
        (Collective("all_to_all", ("y",), piece), 1.0),
        (Collective("collective_permute", ("x",), piece), 1.0),
        scatter,
        (Collective("all_reduce", ("x", "y"), 32), 3.0),
        (Collective("all_reduce", ("x", "y"), 32), 7.0),
    ]
    assert [c.source for c in found[:3]] == ["model.py:42", "jit(step)/gather", ""]
    assert summarize(found)["reduce_scatter"] == (3.0, 3.0 * piece)


@pytest.mark.parametrize(
    ("printed", "axes"),
    [
        ("{{0,1},{2,3},{4,5},{6,7}}", ("y",)),
        ("{{0,1,2,3,4,5,6,7}}", ("x", "y")),
        ("{}", ("x", "y")),
        ("{{0,3},{1,2},{4,7},{5,6}}", ()),
        ("[4,2]<=[8]", ("y",)),
        ("[2,4]<=[4,2]T(1,0)", ("x",)),
        ("[1,8]<=[8]", ("x", "y")),
        ("mesh['axis_0'=4,'axis_1'=2] {'axis_0'}", ("x",)),
        ("mesh['axis_0'=4,'axis_1'=2] {'axis_0','axis_1'}", ("x", "y")),
        ("mesh['axis_0'=8] {'axis_0':(1)4}", ("x",)),
        ("mesh['axis_0'=8] {'axis_0':(4)2}", ("y",)),
        ("mesh[a=2,b=4], device_ids=([4,2]T(1,0)) {a}", ("y",)),
        ("mesh['a'=2,'b'=4], device_ids=(0,2,4,6,1,3,5,7) {'b'}", ("x",)),
    ],
)
def test_groups_in_every_printed_form(printed: str, axes: tuple[str, ...]) -> None:
    text = f"""HloModule m, num_partitions=8

ENTRY %main (p: f32[4]) -> f32[4] {{
  %p = f32[4]{{0}} parameter(0)
  ROOT %ar = f32[4]{{0}} all-reduce(%p), replica_groups={printed}, to_apply=%add
}}
"""
    assert [c.collective.axes for c in collectives_of(text, SHAPE)] == [axes]


def test_axes_of_one_device_do_not_count() -> None:
    mesh = MeshShape(("x", "one", "y"), (4, 1, 2))
    assert axes_of_groups([(0, 1), (2, 3), (4, 5), (6, 7)], mesh) == ("y",)
    assert axes_of_pairs([(0, 2), (2, 0)], mesh) == ("x",)


@pytest.mark.parametrize(
    ("name", "bits"),
    [("pred", 8), ("s4", 4), ("u2", 2), ("bf16", 16), ("f8e4m3fn", 8), ("f32", 32), ("c64", 64), ("token", 0)],
)
def test_dtype_bits(name: str, bits: int) -> None:
    assert dtype_bits(name) == bits


def test_text_without_an_entry_is_refused() -> None:
    with pytest.raises(ValueError, match="no ENTRY"):
        collectives_of("HloModule m\n")
