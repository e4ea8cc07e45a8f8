"""Seconds of one HLO instruction: a roofline over its arithmetic and the bytes that cross its border.

    seconds = max(matmul flops / matmul rate, other flops / vector rate, bytes / memory rate) + kernel_s

An instruction that is not known is costed by its bytes and reported by name.
"""

from __future__ import annotations

from dataclasses import dataclass

from ffjax.cost.hardware import Device
from ffjax.cost.hlo.flops import MOVES, library_call, matmul_flops, other_flops
from ffjax.cost.hlo.module import Computation, Instruction, Module
from ffjax.cost.hlo.shapes import arrays, numpy_dtype, shape_elements
from ffjax.cost.hlo.traffic import needed, traffic
from ffjax.cost.roofline import op_seconds

_FREE = (
    "add-dependency after-all bitcast constant domain get-dimension-size get-tuple-element opt-barrier parameter "
    "partition-id replica-id tuple"
)
_ELEMENTWISE = (
    "abs acos acosh add and asin asinh atan2 atanh cbrt ceil clamp compare complex convert cosh cosine "
    "count-leading-zeros divide erf exponential exponential-minus-one floor imag is-finite log log-plus-one logistic "
    "map maximum minimum multiply negate not or popcnt power real reduce-precision remainder rng rng-bit-generator "
    "rng-get-and-update-state round-nearest-afz round-nearest-even rsqrt select set-dimension-size shift-left "
    "shift-right-arithmetic shift-right-logical sign sine sinh sqrt stochastic-convert subtract tan tanh xor"
)
_OTHERS = (
    "cholesky convolution dot fft fusion ragged-dot reduce reduce-window scatter select-and-scatter sort topk "
    "triangular-solve"
)
FREE = frozenset(_FREE.split())
"""What runs no kernel."""
KNOWN = frozenset((_ELEMENTWISE + " " + _OTHERS).split()) | MOVES | FREE
_FREE_TARGETS = ("Sharding", "SPMDFullToShardShape", "SPMDShardToFullShape", "AllocateBuffer", "LayoutConstraint")
_STREAMING_TARGETS = ("TopK", "__gpu$TopK", "__cub$", "__onednn$softmax", "__onednn$layernorm", "__cudnn$norm")
"""Targets that do little arithmetic: their bytes are what they cost."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """What one run of an instruction does on one device. `dtype` is that of the largest matmul's operands."""

    matmul_flops: float = 0.0
    other_flops: float = 0.0
    bytes: float = 0.0
    dtype: str = "float32"
    unknown: str = ""
    """How to call it in a report, where nothing is known but its bytes."""

    def seconds(self, device: Device) -> float:
        """With its launch."""
        matmul_s = op_seconds(self.matmul_flops, self.bytes, self.dtype, device, matmul=True)
        return max(matmul_s, self.other_flops / device.vector_flops_per_s) + device.kernel_s


def work_of(instruction: Instruction, computation: Computation, module: Module) -> Work | None:
    """The work of an instruction that runs no other computations but a fusion's; None for one that is free."""
    if is_free(instruction):
        return None
    operands = computation.operands(instruction)
    moved = traffic(instruction, computation, module)
    if instruction.opcode == "fusion":
        matmuls, others = 0.0, 0.0
        largest, dtype = 0.0, "float32"
        for inner, share, inside in _fused(instruction, module):
            own = inside.operands(inner)
            if flops := matmul_flops(inner, own):
                matmuls += flops
                if flops > largest:
                    largest, dtype = flops, _operand_dtype(inner, own)
            else:
                others += share * other_flops(inner, own)
        return Work(matmul_flops=matmuls, other_flops=others, bytes=moved, dtype=dtype)
    return Work(
        matmul_flops=matmul_flops(instruction, operands),
        other_flops=other_flops(instruction, operands),
        bytes=moved,
        dtype=_operand_dtype(instruction, operands),
        unknown=_unknown(instruction),
    )


def is_free(instruction: Instruction) -> bool:
    if instruction.opcode == "custom-call":
        return _target(instruction).startswith(_FREE_TARGETS)
    return instruction.opcode in FREE or instruction.opcode.endswith(("-done", "-update"))


def _fused(fusion: Instruction, module: Module) -> list[tuple[Instruction, float, Computation]]:
    """The instructions inside a fusion, in those nested in it too, and the share of each that is computed."""
    found: list[tuple[Instruction, float, Computation]] = []
    for computation in module.called(fusion):
        need = needed(computation)
        for inner in computation:
            if inner.opcode == "fusion":
                found += _fused(inner, module)
            else:
                share = need.get(inner.name, 0.0) / max(shape_elements(inner.shape), 1)
                found.append((inner, share, computation))
    return found


def _operand_dtype(instruction: Instruction, operands: list[Instruction]) -> str:
    shape = operands[0].shape if operands else instruction.shape
    return numpy_dtype(next((array.dtype for array in arrays(shape)), "f32"))


def _target(instruction: Instruction) -> str:
    return instruction.attributes.get("custom_call_target", "").strip('"')


def _unknown(instruction: Instruction) -> str:
    if instruction.opcode != "custom-call":
        return "" if instruction.opcode in KNOWN else instruction.opcode
    target = _target(instruction)
    known = library_call(instruction) is not None or target.startswith(_STREAMING_TARGETS)
    return "" if known else f"custom-call to {target!r}"
