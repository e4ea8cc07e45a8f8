"""HLO text as data: what each form of the text says, and what is said of text that is none."""

from __future__ import annotations

from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from ffjax.cost.hlo.collectives import reached, trip_count
from ffjax.cost.hlo.groups import parse_groups
from ffjax.cost.hlo.module import Module, parse_module
from ffjax.cost.hlo.shapes import Array, numpy_dtype, parse_shape, shape_bytes
from ffjax.cost.hlo.source import read_module
from ffjax.errors import FfjaxError, HloError

GPU_SCAN = Path(__file__).parent / "data" / "gpu_scan.hlo"
"""A scan over four layers whose weights are gathered in its body, for eight H100, as XLA:GPU schedules it."""


@pytest.fixture(scope="module")
def gpu_scan() -> Module:
    return parse_module(GPU_SCAN.read_text())


@pytest.fixture(scope="module")
def compiled() -> jax.stages.Compiled:
    def step(x: jax.Array, w: jax.Array) -> jax.Array:
        def layer(h: jax.Array, wi: jax.Array) -> tuple[jax.Array, None]:
            return jax.lax.cond(h[0, 0] > 0, lambda a, b: jnp.sin(a @ b), lambda a, b: jnp.cos(a), h, wi), None

        return jnp.sort(jax.lax.scan(layer, x, w)[0])

    return jax.jit(step).lower(jnp.ones((8, 8)), jnp.ones((5, 8, 8))).compile()


def test_module(gpu_scan: Module) -> None:
    assert (gpu_scan.name, gpu_scan.devices, gpu_scan.scheduled) == ("jit_step", 8, True)
    assert gpu_scan.aliases == {(): 0}
    entry = gpu_scan.computations[gpu_scan.entry]
    assert entry.root.name == "wrapped_subtract"
    assert {i: p.name for i, p in entry.parameters().items()} == {0: "param.4", 1: "param.5"}


def test_instruction(gpu_scan: Module) -> None:
    body = gpu_scan.computations["region_0.1_spmd"]
    gather = body.instructions["all-gather-start"]
    assert gather.opcode == "all-gather-start"
    assert gather.shape == (Array("bf16", (128, 1024)), Array("bf16", (1024, 1024)))
    assert gather.operands == ("bitcast.17",)
    assert gather.numbers("dimensions") == (0,)
    assert gather.attributes["replica_groups"] == "mesh['axis_0'=1,'axis_1'=8,'axis_2'=1] {'axis_1'}"
    assert gather.source == "model.py:9"
    assert gather.op_name.endswith("squeeze")
    assert gather.backend_config["collective_backend_config"]["is_sync"] is False  # type: ignore[index, call-overload]
    dot = gpu_scan.computations["gemm_fusion_dot.4_computation"].root
    assert (dot.opcode, dot.is_root, dot.numbers("lhs_contracting_dims")) == ("dot", True, (2,))


def test_loops(gpu_scan: Module) -> None:
    entry = gpu_scan.computations[gpu_scan.entry]
    loops = [i for i in entry if i.opcode == "while"]
    assert [loop.called for loop in loops] == [
        ("region_1.2_spmd", "region_0.1_spmd"),
        ("region_3.4_spmd", "region_2.3_spmd"),
    ]
    assert [trip_count(loop, gpu_scan) for loop in loops] == [4.0, 4.0]
    counts = {computation.name: count for computation, count in reached(gpu_scan)}
    assert counts["main.5_spmd"] == 1.0
    assert counts["region_2.3_spmd"] == counts["fused_reduce.1"] == 4.0


def test_all_that_is_named_is_there(gpu_scan: Module, compiled: jax.stages.Compiled) -> None:
    for module in (gpu_scan, read_module(compiled)):
        for computation in module.computations.values():
            for instruction in computation:
                assert set(instruction.called) <= module.computations.keys()
                assert set(instruction.operands) <= computation.instructions.keys()


def test_every_source_of_a_module(compiled: jax.stages.Compiled) -> None:
    text = compiled.as_text()
    assert text is not None
    module = read_module(compiled)
    assert read_module(module) is module
    assert read_module(text) == module
    proto = compiled.runtime_executable().hlo_modules()[0].as_serialized_hlo_module_proto()  # type: ignore[union-attr]
    from_proto = read_module(proto)
    assert from_proto.computations.keys() == module.computations.keys()
    for name, computation in module.computations.items():
        for ours, theirs in zip(from_proto.computations[name], computation, strict=True):
            assert (ours.name, ours.opcode, ours.shape, ours.operands) == (
                theirs.name,
                theirs.opcode,
                theirs.shape,
                theirs.operands,
            )
            assert ours.backend_config == theirs.backend_config  # in any order
            assert ours.source == theirs.source
    opcodes = {i.opcode for computation in module.computations.values() for i in computation}
    assert {"while", "conditional", "dot", "sort"} <= opcodes
    sources = {i.source.split(":")[0] for computation in module.computations.values() for i in computation}
    assert str(Path(__file__)) in sources


OLDER = """HloModule older, replica_count=2, num_partitions=4

%body {
  %b.0 = (f32[2]{0}, /*index=1*/(s8[4]{0}, pred[])) parameter(0)
}

ENTRY main {
  a = f32[2,3]{1,0:T(8,128)} parameter(0)
  b = f32[3,4]{1,0} parameter(1), metadata={op_type="x" op_name="w" source_file="old.py" source_line=7}
  c = f32[2,4]{1,0} custom-call(f32[2,3]{1,0} %a, f32[3,4]{1,0} %b), custom_call_target="f(\\"a, b\\")", \
backend_config="{\\"known_trip_count\\":{\\"n\\":\\"3\\"}}", metadata={source_file="old.py"}
  d = token[] after-all()
  e = f32[<=8]{0} constant({1, 2, /*index=2*/3})
  ROOT f = f32[2,4]{1,0} copy(c), replica_groups=mesh['a'=2,'b'=4], device_ids=([4,2]T(1,0)) {'a'}, frontend=x
}
"""


def test_older_and_rarer_forms() -> None:
    module = parse_module(OLDER)
    assert (module.devices, module.scheduled, module.entry) == (8, False, "main")
    main = module.computations["main"].instructions
    assert main["c"].operands == ("a", "b")
    assert main["c"].backend_config == {"known_trip_count": {"n": "3"}}
    assert main["c"].attributes["custom_call_target"] == '"f(\\"a, b\\")"'
    assert [main[name].source for name in "abc"] == ["", "old.py:7", "old.py"]
    assert main["e"].literal == "{1, 2, 3}"
    assert main["f"].attributes == {
        "replica_groups": "mesh['a'=2,'b'=4], device_ids=([4,2]T(1,0)) {'a'}",
        "frontend": "x",
    }
    assert shape_bytes(module.computations["body"].root.shape) == 2 * 4 + 4 + 1
    assert [shape_bytes(main[name].shape) for name in "de"] == [0.0, 32.0]


@pytest.mark.parametrize("text", ["", "f32", "(f32[2]", "f32[2] f32[3]", "f32[2])("])
def test_no_shape(text: str) -> None:
    with pytest.raises(ValueError, match="no HLO shape"):
        parse_shape(text)


def test_numpy_dtypes_are_those_of_the_cluster_files() -> None:
    names = ["bf16", "f16", "f32", "f64", "s8", "f8e4m3fn", "f8e5m2"]
    expected = ["bfloat16", "float16", "float32", "float64", "int8", "float8_e4m3fn", "float8_e5m2"]
    assert [numpy_dtype(name) for name in names] == expected
    assert [numpy_dtype(name) for name in ("token", "c64", "u4")] == ["token", "complex64", "uint4"]


BODY = "HloModule m\n\nENTRY %main (p: f32[4]) -> f32[4] {\n"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "no line of it starts with HloModule: pass compiled.as_text"),
        ("hello", "'hello'; no line of it starts with HloModule"),
        ("module @jit_f {\n}", "it is an MLIR module; compile it first"),
        ("{ lambda ; a:f32[4]. let", "it is a jaxpr; compile it first"),
        ("HloModule m\n", "no ENTRY computation in HLO text that starts 'HloModule m"),
        (BODY, "ends inside the computation 'main'; it was cut off"),
        (BODY + "}\n", "line 4: the computation 'main' is empty"),
        (BODY + "  what is this\n}\n", "line 4 is no instruction: 'what is this'"),
        (BODY + "  %a = f32[4]{0}\n}\n", "line 4 has no opcode"),
        (BODY + "  %a = negate(%b)\n}\n", "line 4 has no opcode"),
        (BODY + "  %a = what negate(%b)\n}\n", "line 4: 'what ' is no HLO shape"),
    ],
)
def test_what_is_no_hlo(text: str, message: str) -> None:
    with pytest.raises(HloError, match=message) as raised:
        parse_module(text)
    assert isinstance(raised.value, FfjaxError)
    assert isinstance(raised.value, ValueError)


def test_what_has_no_module() -> None:
    lowered = jax.jit(jnp.sin).lower(1.0)
    with pytest.raises(HloError, match=r"Lowered has no compiled module; pass compiled = lowered\.compile\(\)"):
        read_module(lowered)  # type: ignore[arg-type]
    with pytest.raises(HloError, match="these 7 bytes are no serialized HloModuleProto"):
        read_module(b"garbage")


def test_groups_in_an_unknown_form() -> None:
    with pytest.raises(ValueError, match=r"replica_groups=someday\(8\) is in no known form"):
        parse_groups("someday(8)", 8)
