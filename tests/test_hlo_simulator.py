"""Costs of HLO instructions and streams of a module, in round numbers that can be worked out by hand."""

from __future__ import annotations

import dataclasses
import warnings
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from ffjax.cost.cluster import Cluster
from ffjax.cost.hardware import Device, Link
from ffjax.cost.hlo.collectives import reached
from ffjax.cost.hlo.costs import Work, work_of
from ffjax.cost.hlo.module import Module, parse_module
from ffjax.cost.hlo.simulator import simulate_hlo
from ffjax.cost.hlo.source import read_module
from ffjax.cost.simulation.timeline import COMPUTE, Timeline
from ffjax.errors import ClusterError, FfjaxWarning, HloError
from ffjax.ir.spec import MeshShape

GPU_SCAN = Path(__file__).parent / "data" / "gpu_scan.hlo"

# One byte a second from memory, ten flops, a hundred in matmuls; a byte of an all-gather over two devices takes half a
# second inside a host, and five across.
DEVICE = Device(
    kind="toy",
    platform="gpu",
    flops_per_s={"float32": 100.0, "bfloat16": 200.0},
    vector_flops_per_s=10.0,
    memory_bytes=1000,
    memory_bytes_per_s=1.0,
    matmul_efficiency=1.0,
    memory_efficiency=1.0,
    kernel_s=0.0,
)
LINKS = (Link(name="near", bytes_per_s=1.0, latency_s=0.0), Link(name="far", bytes_per_s=0.1, latency_s=0.0))
TOY = Cluster(name="toy", hosts=2, devices_per_host=2, device=DEVICE, links=LINKS, reduce_scatter=True)
NEAR, FAR = "{{0,1},{2,3}}", "{{0,2},{1,3}}"

INNER = """
%fused (a: f32[4,8], b: f32[8,2]) -> f32[4,2] {
  %a = f32[4,8]{1,0} parameter(0)
  %b = f32[8,2]{1,0} parameter(1)
  %d = f32[4,2]{1,0} dot(%a, %b), lhs_contracting_dims={1}, rhs_contracting_dims={0}
  ROOT %t = f32[4,2]{1,0} tanh(%d)
}

%sliced (a: f32[8,8], i: s32[]) -> f32[1,8] {
  %a.1 = f32[8,8]{1,0} parameter(0)
  %i = s32[] parameter(1)
  %n = f32[8,8]{1,0} negate(%a.1)
  ROOT %s = f32[1,8]{1,0} dynamic-slice(%n, %i, %i), dynamic_slice_sizes={1,8}
}

%updated (a: f32[8,8], u: f32[1,8], i: s32[]) -> f32[8,8] {
  %a.2 = f32[8,8]{1,0} parameter(0)
  %u = f32[1,8]{1,0} parameter(1)
  %i.1 = s32[] parameter(2)
  ROOT %w = f32[8,8]{1,0} dynamic-update-slice(%a.2, %u, %i.1, %i.1)
}

%copied (a: f32[8,8], u: f32[1,8], i: s32[]) -> f32[8,8] {
  %a.3 = f32[8,8]{1,0} parameter(0)
  %u.1 = f32[1,8]{1,0} parameter(1)
  %i.2 = s32[] parameter(2)
  %n.1 = f32[8,8]{1,0} negate(%a.3)
  ROOT %w.1 = f32[8,8]{1,0} dynamic-update-slice(%n.1, %u.1, %i.2, %i.2)
}

%nested (a: f32[4,8], b: f32[8,2]) -> f32[4,2] {
  %a.4 = f32[4,8]{1,0} parameter(0)
  %b.4 = f32[8,2]{1,0} parameter(1)
  ROOT %f = f32[4,2]{1,0} fusion(%a.4, %b.4), kind=kCustom, calls=%fused
}

%rows (a: f32[8,8]) -> (f32[8], f32[8,8]) {
  %a.5 = f32[8,8]{1,0} parameter(0)
  %z = f32[] constant(0)
  %r = f32[8]{0} reduce(%a.5, %z), dimensions={1}, to_apply=%add
  %e = f32[8,8]{1,0} exponential(%a.5)
  ROOT %tu = (f32[8]{0}, f32[8,8]{1,0}) tuple(%r, %e)
}

%add (x: f32[], y: f32[]) -> f32[] {
  %x = f32[] parameter(0)
  %y = f32[] parameter(1)
  ROOT %sum = f32[] add(%x, %y)
}
"""
ARGUMENTS = """
  %m = f32[4,8]{1,0} parameter(0)
  %k = f32[8,2]{1,0} parameter(1)
  %sq = f32[8,8]{1,0} parameter(2)
  %row = f32[1,8]{1,0} parameter(3)
  %at = s32[] parameter(4)
  %image = f32[2,8,8,3]{3,2,1,0} parameter(5)
  %taps = f32[3,3,3,4]{3,2,1,0} parameter(6)
  %grad = f32[2,4,4,4]{3,2,1,0} parameter(7)
  %h = bf16[4,8]{1,0} parameter(8)
  %q = bf16[2,16,4,8]{3,2,1,0} parameter(9)
  %v = f32[4]{0} parameter(10)
  %w0 = f32[4]{0} parameter(11)
"""


def module_of(body: str, inner: str = INNER, devices: int = 4, scheduled: bool = True) -> Module:
    flag = ", is_scheduled=true" if scheduled else ""
    header = f"HloModule toy{flag}, num_partitions={devices}\n"
    return parse_module(f"{header}{inner}\nENTRY %main (p: f32[1]) -> f32[1] {{{ARGUMENTS}{body}\n}}\n")


def last_work(body: str) -> Work | None:
    module = module_of(body)
    entry = module.computations[module.entry]
    return work_of(list(entry)[-1], entry, module)


CONV = "window={size=3x3 stride=2x2 pad=0_1x0_1}, dim_labels=b01f_01io->b01f"
SIZES = '"dot_dimension_numbers":{"lhs_contracting_dimensions":["1"]}'
SCORES = '"intermediate_tensor_shape":{"dimensions":["2","4","16","16"]}'


@pytest.mark.parametrize(
    ("line", "matmul_flops", "other_flops", "moved"),
    [
        ("dot(%m, %k), lhs_contracting_dims={1}, rhs_contracting_dims={0}", 2 * 4 * 2 * 8, 0, 4 * (32 + 16 + 8)),
        ("fusion(%m, %k), kind=kCustom, calls=%fused", 2 * 4 * 2 * 8, 8, 4 * (32 + 16 + 8)),
        ("fusion(%m, %k), kind=kCustom, calls=%nested", 2 * 4 * 2 * 8, 8, 4 * (32 + 16 + 8)),
    ],
)
def test_dots(line: str, matmul_flops: float, other_flops: float, moved: float) -> None:
    work = last_work(f"  ROOT %y = f32[4,2]{{1,0}} {line}")
    assert work == Work(matmul_flops=matmul_flops, other_flops=other_flops, bytes=moved)


@pytest.mark.parametrize(
    ("line", "flops"),
    [
        # 2 images, 4 x 4 places, 3 x 3 taps, 3 -> 4 features: forward, and by each of its gradients.
        (f"f32[2,4,4,4]{{3,2,1,0}} convolution(%image, %taps), {CONV}", 2 * 2 * 16 * 9 * 3 * 4),
        (
            "f32[2,8,8,3]{3,2,1,0} convolution(%grad, %taps), "
            "window={size=3x3 pad=2_1x2_1 lhs_dilate=2x2}, dim_labels=b01f_01oi->b01f",
            2 * 2 * 12**2 * 3 * 4,  # of 8 places and 3 taps in each direction, half fall between elements
        ),
        (
            "f32[3,3,3,4]{3,2,1,0} convolution(%image, %grad), "
            "window={size=4x4 pad=0_1x0_1 rhs_dilate=2x2}, dim_labels=f01b_i01o->01bf",
            2 * 2 * 16 * 9 * 3 * 4,
        ),
        *(
            (
                f'({result}, u8[64]{{0}}) custom-call({operands}), {CONV}, custom_call_target="__cudnn$conv{target}"',
                2 * 2 * 16 * 9 * 3 * 4,
            )
            for target, operands, result in (
                ("Forward", "%image, %taps", "f32[2,4,4,4]{3,2,1,0}"),
                ("BackwardInput", "%grad, %taps", "f32[2,8,8,3]{3,2,1,0}"),
                ("BackwardFilter", "%image, %grad", "f32[3,3,3,4]{3,2,1,0}"),
            )
        ),
        (
            '(bf16[4,4]{1,0}, s8[512]{0}) custom-call(%h, %h), custom_call_target="__cublas$lt$matmul", '
            f'backend_config={{"gemm_backend_config":{{{SIZES}}}}}',
            2 * 4 * 4 * 8,
        ),
        ('f32[4,2]{1,0} custom-call(%m, %k), custom_call_target="__onednn$matmul"', 2 * 4 * 2 * 8),
        (
            '(bf16[2,16,4,8]{3,2,1,0}, u8[0]{0}) custom-call(%q, %q, %q), custom_call_target="__cudnn$fmhaSoftmax", '
            f'backend_config={{"cudnn_fmha_backend_config":{{{SCORES},"mask_type":"NO_MASK"}}}}',
            2 * 2 * (2 * 4 * 16 * 16) * 8,
        ),
        (
            "(bf16[2,16,4,8]{3,2,1,0}, u8[0]{0}) custom-call(%q, %q, %q), "
            'custom_call_target="__cudnn$fmhaSoftmaxBackward", '
            f'backend_config={{"cudnn_fmha_backend_config":{{{SCORES},"mask_type":"CAUSAL"}}}}',
            5 * 2 * (2 * 4 * 16 * 16) * 8 / 2,
        ),
    ],
)
def test_flops_of_convolutions_and_library_calls(line: str, flops: float) -> None:
    work = last_work(f"  ROOT %y = {line}")
    assert work is not None
    assert (work.matmul_flops, work.other_flops, work.unknown) == (flops, 0.0, "")
    assert work.dtype == ("bfloat16" if "bf16" in line else "float32")


@pytest.mark.parametrize(
    ("line", "flops", "moved"),
    [
        ("f32[8,8]{1,0} copy(%sq)", 0, 2 * 256),
        ("f32[8,8]{1,0} add(%sq, %sq)", 64, 2 * 256),  # the same memory twice is read once
        ("f32[1,8]{1,0} dynamic-slice(%sq, %at, %at), dynamic_slice_sizes={1,8}", 0, 2 * 32 + 4),
        ("f32[8,8]{1,0} dynamic-update-slice(%sq, %row, %at, %at)", 0, 2 * 32 + 4),
        ("f32[1,8]{1,0} fusion(%sq, %at), kind=kLoop, calls=%sliced", 8, 2 * 32 + 4),
        ("f32[8,8]{1,0} fusion(%sq, %row, %at), kind=kLoop, calls=%updated", 0, 2 * 32 + 4),
        ("f32[8,8]{1,0} fusion(%sq, %row, %at), kind=kLoop, calls=%copied", 56, (256 - 32) + 32 + 4 + 256),
        ("(f32[8]{0}, f32[8,8]{1,0}) fusion(%sq), kind=kInput, calls=%rows", 64 + 64, 256 + 32 + 256),
        ("f32[8]{0} reduce(%sq, %at), dimensions={1}, to_apply=%add", 64, 256 + 32 + 4),
        ("f32[8,8]{1,0} broadcast(%at), dimensions={}", 0, 256 + 4),
        ("(f32[8,8]{1,0}, f32[8,8]{1,0}, u32[]) copy-start(%sq)", 0, 2 * 256),
        ('(f32[1,4]{1,0}, s32[1,4]{1,0}) custom-call(%row), custom_call_target="TopK"', 8, 32 + 32),
        ("f32[8,8]{1,0} sort(%sq), dimensions={1}, to_apply=%add", 64 * 3, 2 * 256),
    ],
)
def test_bytes_at_the_border(line: str, flops: float, moved: float) -> None:
    work = last_work(f"  ROOT %y = {line}")
    assert work is not None
    assert (work.matmul_flops, work.other_flops, work.bytes, work.unknown) == (0.0, flops, moved, "")


@pytest.mark.parametrize(
    "line",
    [
        "f32[64]{0} bitcast(%sq)",
        "(f32[8,8]{1,0}) tuple(%sq)",
        "u32[] partition-id()",
        "f32[8,8]{1,0} copy-done(%sq)",
        'f32[8,8]{1,0} custom-call(%sq), custom_call_target="Sharding"',
    ],
)
def test_free(line: str) -> None:
    assert last_work(f"  ROOT %y = {line}") is None


def test_seconds_are_a_roofline() -> None:
    assert Work(matmul_flops=1000, bytes=4).seconds(DEVICE) == 10
    assert Work(matmul_flops=1000, bytes=4, dtype="bfloat16").seconds(DEVICE) == 5
    assert Work(matmul_flops=1000, other_flops=200, bytes=4).seconds(DEVICE) == 20
    assert Work(matmul_flops=1000, bytes=40).seconds(DEVICE) == 40
    assert Work(bytes=4).seconds(dataclasses.replace(DEVICE, kernel_s=3.0)) == 7


# -- streams: a kernel over f32[4] takes 32 s, an all-gather of f32[8] 16 s near and 160 s far


def spans(timeline: Timeline) -> dict[str, tuple[str, float, float, bool]]:
    return {i.name: (i.stream, i.start_s, i.end_s, i.critical) for i in timeline.intervals}


def gather(name: str, operand: str, groups: str) -> str:
    line = f"(f32[4]{{0}}, f32[8]{{0}}) all-gather-start(%{operand}), replica_groups={groups}, dimensions={{0}}"
    return f"  %{name} = {line}\n"


def test_collective_beside_compute() -> None:
    body = gather("ag", "v", NEAR) + "  %a = f32[4]{0} negate(%v)\n  %g = f32[8]{0} all-gather-done(%ag)\n"
    timeline = simulate_hlo(module_of(body), TOY, MeshShape(("x", "y"), (2, 2)))
    assert spans(timeline) == {"ag over y": ("near", 0, 16, False), "a": (COMPUTE, 0, 32, True)}
    assert timeline.streams == (COMPUTE, "near", "far")
    assert (timeline.step_s, timeline.compute_s, timeline.comm_s, timeline.exposed_comm_s) == (32, 32, 16, 0)


def test_collective_that_compute_waits_for() -> None:
    body = gather("ag", "v", FAR) + "  %a = f32[4]{0} negate(%v)\n  %g = f32[8]{0} all-gather-done(%ag)\n"
    body += "  %b = f32[4]{0} negate(%a)"
    timeline = simulate_hlo(module_of(body), TOY)
    assert spans(timeline) == {
        "ag": ("far", 0, 160, True),
        "a": (COMPUTE, 0, 32, False),
        "b": (COMPUTE, 160, 192, True),
    }
    assert (timeline.step_s, timeline.compute_s, timeline.comm_s, timeline.exposed_comm_s) == (192, 64, 160, 128)


def test_one_link_is_shared_and_two_are_not() -> None:
    done = "  %g = f32[8]{0} all-gather-done(%first)\n  %g2 = f32[8]{0} all-gather-done(%second)\n"
    shared = simulate_hlo(module_of(gather("first", "v", NEAR) + gather("second", "w0", NEAR) + done), TOY)
    assert spans(shared) == {"first": ("near", 0, 16, True), "second": ("near", 16, 32, True)}
    apart = simulate_hlo(module_of(gather("first", "v", NEAR) + gather("second", "w0", FAR) + done), TOY)
    assert spans(apart) == {"first": ("near", 0, 16, False), "second": ("far", 0, 160, True)}


@pytest.mark.parametrize(
    ("line", "name", "seconds"),
    [
        (f"f32[8]{{0}} all-gather(%v), replica_groups={NEAR}, dimensions={{0}}", "near", 16),
        (f"f32[4]{{0}} all-reduce(%v), replica_groups={FAR}, to_apply=%add", "far", 160),
        (f"f32[2]{{0}} reduce-scatter(%v), replica_groups={NEAR}, dimensions={{0}}, to_apply=%add", "near", 8),
        ("f32[4]{0} collective-permute(%v), source_target_pairs={{0,1},{1,0},{2,2}}", "near", 16),
        ("f32[4]{0} collective-permute(%v), source_target_pairs={{0,1},{1,2}}", "far", 160),
        ("f32[16]{0} all-gather(%v), replica_groups={}, dimensions={0}", "far", 0.75 * 64 / (2 * 0.1)),
        ("f32[4]{0} all-reduce(%v), replica_groups={{0},{1},{2},{3}}, to_apply=%add", "", 0),
        ("f32[4]{0} collective-permute(%v), source_target_pairs={{0,0},{1,1}}", "", 0),
    ],
)
def test_collectives_without_a_start_are_waited_for(line: str, name: str, seconds: float) -> None:
    timeline = simulate_hlo(
        module_of(f"  %a = f32[4]{{0}} negate(%v)\n  %c = {line}\n  %b = f32[4]{{0}} negate(%a)"), TOY
    )
    found = spans(timeline)
    assert found.pop("a")[1:3] == (0, 32)
    assert found.pop("b")[1:3] == pytest.approx((32 + seconds, 64 + seconds))
    assert timeline.exposed_comm_s == pytest.approx(seconds)
    assert [(s, end - start) for s, start, end, _ in found.values()] == (
        [(name, pytest.approx(seconds))] if name else []
    )


def test_async_wrappers() -> None:
    inner = """
%wrapped (p: f32[4]) -> f32[2] {
  %p = f32[4]{0} parameter(0)
  ROOT %rs = f32[2]{0} reduce-scatter(%p), replica_groups={{0,1},{2,3}}, dimensions={0}, to_apply=%add
}

%kernels (p: f32[4]) -> f32[4] {
  %p.1 = f32[4]{0} parameter(0)
  ROOT %n = f32[4]{0} negate(%p.1)
}

%add (x: f32[], y: f32[]) -> f32[] {
  ROOT %x = f32[] parameter(0)
}
"""
    body = """
  %start = ((f32[4]{0}), f32[2]{0}, u32[]) async-start(%v), calls=%wrapped
  %local = ((f32[4]{0}), f32[4]{0}, u32[]) async-start(%v), calls=%kernels
  %stop = f32[4]{0} async-done(%local)
  %done = f32[2]{0} async-done(%start)
"""
    timeline = simulate_hlo(module_of(body, inner), TOY)
    assert spans(timeline) == {"start": ("near", 0, 8, False), "n": (COMPUTE, 0, 32, True)}


# -- loops and branches

LOOP = """
%body (t: (s32[], f32[4])) -> (s32[], f32[4]) {
  %t = (s32[], f32[4]{0}) parameter(0)
  %v.1 = f32[4]{0} get-tuple-element(%t), index=1
  %ag.1 = (f32[4]{0}, f32[8]{0}) all-gather-start(%v.1), replica_groups={{0,2},{1,3}}, dimensions={0}
  %b.1 = f32[4]{0} negate(%v.1)
  %g.1 = f32[8]{0} all-gather-done(%ag.1)
  ROOT %o = (s32[], f32[4]{0}) tuple(%b.1, %b.1)
}

%condition (t: (s32[], f32[4])) -> pred[] {
  %t.1 = (s32[], f32[4]{0}) parameter(0)
  %i = s32[] get-tuple-element(%t.1), index=0
  %limit = s32[] LIMIT
  ROOT %less = pred[] compare(%i, %limit), direction=LT
}
"""


def looped(trips: int, told: str = "note", before: str = "", after: str = "") -> Module:
    """A loop whose trips the compiler's note tells, or a constant in its condition, or nothing."""
    note = f', backend_config={{"known_trip_count":{{"n":"{trips}"}}}}' if told == "note" else ""
    limit = f"constant({trips})" if told == "constant" else "parameter(1)"
    line = f"  %l = (s32[], f32[4]{{0}}) while(%in), condition=%condition, body=%body{note}\n"
    return module_of(before + line + after, LOOP.replace("LIMIT", limit))


@pytest.mark.parametrize("told", ["note", "constant"])
@pytest.mark.parametrize("trips", [1, 5])
def test_a_loop_runs_all_its_trips(trips: int, told: str) -> None:
    timeline = simulate_hlo(looped(trips, told), TOY)
    assert timeline.step_s == trips * 160
    assert (timeline.compute_s, timeline.comm_s, timeline.exposed_comm_s) == (trips * 32, trips * 160, trips * 128)
    blocks = {i.stream: (i.start_s, i.end_s, i.trips, i.critical) for i in timeline.intervals if i.trips > 1}
    assert blocks == ({} if trips == 1 else {COMPUTE: (160, 800, 4, False), "far": (160, 800, 4, True)})
    assert sum(i.trips for i in timeline.intervals if i.stream == "far") == trips


def test_a_loop_of_no_trips_takes_no_time() -> None:
    assert simulate_hlo(looped(0), TOY).step_s == 0


def test_a_collective_around_a_loop_delays_its_trips() -> None:
    start, done = gather("ag", "v", FAR), "  %g = f32[8]{0} all-gather-done(%ag)\n"
    timeline = simulate_hlo(looped(5, before=start, after=done), TOY)
    # The first trip's gather waits for the one from outside; the other trips find the link free.
    assert timeline.step_s == 160 + 5 * 160
    assert [i.start_s for i in timeline.intervals if i.name == "b.1"] == [0, 320]
    assert (timeline.compute_s, timeline.comm_s) == (5 * 32, 6 * 160)


def test_loops_in_loops() -> None:
    nest = (
        LOOP.replace("LIMIT", "parameter(1)")
        + """
%outer (t: (s32[], f32[4])) -> (s32[], f32[4]) {
  %t.2 = (s32[], f32[4]{0}) parameter(0)
  ROOT %l.2 = (s32[], f32[4]{0}) while(%t.2), condition=%condition, body=%body, \
backend_config={"known_trip_count":{"n":"3"}}
}
"""
    )
    line = "  %l = (s32[], f32[4]{0}) while(%in), condition=%condition, body=%outer, "
    timeline = simulate_hlo(module_of(line + 'backend_config={"known_trip_count":{"n":"4"}}', nest), TOY)
    assert (timeline.step_s, timeline.compute_s, timeline.comm_s) == (12 * 160, 12 * 32, 12 * 160)


def test_a_loop_of_unknown_length_runs_once_and_says_so() -> None:
    with pytest.warns(FfjaxWarning, match="run once, for nothing tells their trip count: l "):
        assert simulate_hlo(looped(3, told="nothing"), TOY).step_s == 160


@pytest.mark.parametrize(
    "line",
    [
        "conditional(%at, %v, %v), branch_computations={%short, %long}",
        "conditional(%at, %v, %v), true_computation=%long, false_computation=%short",
    ],
)
def test_the_slowest_branch_counts(line: str) -> None:
    branches = """
%short (p: f32[4]) -> f32[4] {
  ROOT %p = f32[4]{0} parameter(0)
}

%long (p: f32[4]) -> f32[4] {
  %p.1 = f32[4]{0} parameter(0)
  %n.1 = f32[4]{0} negate(%p.1)
  ROOT %n.2 = f32[4]{0} negate(%n.1)
}
"""
    timeline = simulate_hlo(module_of(f"  %y = f32[4]{{0}} {line}", branches), TOY)
    assert spans(timeline) == {"n.1": (COMPUTE, 0, 32, True), "n.2": (COMPUTE, 32, 64, True)}
    called = simulate_hlo(module_of("  %y = f32[4]{0} call(%v), to_apply=%long", branches), TOY)
    assert called.step_s == 64


# -- what is not known


def test_an_unknown_op_is_costed_by_its_bytes_and_named() -> None:
    body = """
  %a = f32[4]{0} entangle(%v), metadata={source_file="model.py" source_line=3}
  %b = f32[4]{0} entangle(%a)
  %c = f32[4]{0} custom-call(%b), custom_call_target="my_kernel"
"""
    with pytest.warns(FfjaxWarning) as caught:
        timeline = simulate_hlo(module_of(body), TOY)
    assert timeline.compute_s == 3 * 32
    assert [str(w.message) for w in caught] == [
        "HLO module 'toy': costed by bytes alone, for their arithmetic is not known: "
        "entangle (first at model.py:3), custom-call to 'my_kernel' (first at c)"
    ]


def test_a_module_without_a_schedule() -> None:
    with pytest.warns(FfjaxWarning, match="'toy': it has no schedule, so that it runs in the order of its text"):
        assert simulate_hlo(module_of("  %a = f32[4]{0} negate(%v)", scheduled=False), TOY).step_s == 32


def test_a_cluster_that_is_too_small() -> None:
    with pytest.raises(ClusterError, match=r"'toy' runs on 9 devices, the cluster 'toy' has 4; .*hosts=5\)"):
        simulate_hlo(module_of("", devices=9), TOY)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("f32[4]{0} all-reduce(%v), replica_groups=someday(4)", "all-reduce 'y': replica_groups=someday"),
        ("f32[4,2]{1,0} dot(%pair, %k), lhs_contracting_dims={1}", "dot 'y' has no array as operand 0"),
        ("f32[4]{0} convolution(%image, %taps)", "convolution 'y' has no dim_labels"),
        ('f32[4]{0} custom-call(%q), custom_call_target="__cudnn$fmhaSoftmax"', "'y' has no cudnn_fmha_backend_config"),
    ],
)
def test_damaged_instructions(line: str, message: str) -> None:
    with pytest.raises(HloError, match=message):
        simulate_hlo(module_of(f"  %pair = (f32[4]{{0}}, f32[4]{{0}}) tuple(%v, %v)\n  %y = {line}"), TOY)


# -- compiled programs


def matmul_flops(module: Module) -> float:
    """Of a whole run, loops multiplied out; each dot counted where it is, in a fusion or not."""
    return sum(
        count * work.matmul_flops
        for computation, count in reached(module)
        for instruction in computation
        if instruction.opcode != "fusion"
        if (work := work_of(instruction, computation, module)) is not None
    )


def test_gpu_module() -> None:
    module = parse_module(GPU_SCAN.read_text())
    assert matmul_flops(module) == 4 * 3 * 2 * 256 * 1024 * 1024  # layers, forward and two gradients
    cluster = Cluster.named("h100")
    timeline = simulate_hlo(module, cluster, MeshShape(("x",), (8,)))
    weights = 1024 * 1024 * 2
    beta = 7 / 8 / cluster.links[0].effective_bytes_per_s
    alpha = 7 * cluster.links[0].latency_s + cluster.device.kernel_s
    assert timeline.comm_s == pytest.approx(2 * 4 * (alpha + beta * weights))
    assert timeline.step_s == pytest.approx(timeline.compute_s + timeline.exposed_comm_s)
    assert 0 < timeline.exposed_comm_s < timeline.comm_s  # some of it is hidden behind the matmuls
    names = {i.name for i in timeline.intervals if i.stream == "NVLink 4"}
    assert names == {
        "all-gather-start over x",
        "reduce-scatter-start over x",
        "while.26, 3 more",
        "while.27, 3 more",
    }
    sources = {i.source for i in timeline.intervals}
    assert {"model.py:8", "model.py:9"} <= sources


@pytest.mark.parametrize("layers", [3, 6])
def test_cpu_scan(layers: int) -> None:
    def step(x: jax.Array, w: jax.Array) -> jax.Array:
        return jax.lax.scan(lambda h, wi: (jnp.tanh(h @ wi), None), x, w)[0].sum()

    args = jnp.ones((64, 128)), jnp.ones((layers, 128, 128))
    module = read_module(jax.jit(jax.grad(step, argnums=1)).lower(*args).compile())
    # Of the first layer's input no gradient is wanted, but a scan computes it like the others.
    assert matmul_flops(module) == layers * 3 * 2 * 64 * 128 * 128
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        timeline = simulate_hlo(module, Cluster.named("cpu"))
    assert timeline.step_s == timeline.compute_s > matmul_flops(module) / 50e9
    assert timeline.comm_s == timeline.exposed_comm_s == 0
