"""Arithmetic of one HLO instruction, from its shapes: what XLA's own cost analysis leaves out is counted too.

dot          2 * elements of the result * contracted sizes of the left operand
convolution  2 * elements of the result * input features of a group * taps, where taps of a dilated dimension that
             fall on zeros between its elements do no work, while those that fall on padding do
custom call  by its target: matmuls, convolutions and attention of cuBLAS, cuDNN and oneDNN
others       one for each element that is made (or read, by reductions)
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence

import numpy as np

from ffjax.cost.hlo.module import Instruction, Json
from ffjax.cost.hlo.shapes import Array, arrays, shape_elements
from ffjax.errors import HloError

Operands = Sequence[Instruction]


def matmul_flops(instruction: Instruction, operands: Operands) -> float:
    """Operations of dots, convolutions and library calls that do such; 0.0 for all other instructions."""
    match instruction.opcode:
        case "dot":
            contracted = instruction.numbers("lhs_contracting_dims")
            return 2.0 * shape_elements(instruction.shape) * _sizes(instruction, operands, contracted)
        case "ragged-dot":
            return 2.0 * _array(instruction, operands, 0).elements * _array(instruction, operands, 1).dims[-1]
        case "convolution":
            return _convolution(instruction, operands)
        case "custom-call":
            count = library_call(instruction)
            return count(instruction, operands) if count else 0.0
    return 0.0


def other_flops(instruction: Instruction, operands: Operands) -> float:
    """Operations outside the matrix units."""
    if instruction.opcode in MOVES or matmul_flops(instruction, operands):
        return 0.0
    made = float(shape_elements(instruction.shape))
    read = float(max((shape_elements(o.shape) for o in operands), default=0))
    match instruction.opcode:
        case "reduce" | "scatter" | "select-and-scatter" | "custom-call":
            return max(made, read)
        case "reduce-window":
            return made * math.prod(_window(instruction, "size", 1, ()))
        case "sort" | "topk":
            dims = next((array.dims for array in arrays(instruction.shape)), ())
            along = max(
                (dims[d] for d in instruction.numbers("dimensions") if d < len(dims)), default=max(dims, default=1)
            )
            return read * max(math.log2(max(along, 1)), 1.0)
        case "fft":
            return 5 * made * sum(math.log2(max(n, 1)) for n in instruction.numbers("fft_length"))
        case "cholesky" | "triangular-solve":
            return made * next(operand for operand in arrays(operands[0].shape)).dims[-1]
    return made


_MOVES = (
    "bitcast bitcast-convert broadcast concatenate constant copy copy-start dynamic-slice dynamic-update-slice gather "
    "get-tuple-element iota pad parameter reshape reverse slice transpose tuple"
)
MOVES = frozenset(_MOVES.split())
"""What only moves or names data."""


def _array(instruction: Instruction, operands: Operands, index: int) -> Array:
    if index < len(operands) and isinstance(shape := operands[index].shape, Array):
        return shape
    raise HloError(
        f"{instruction.opcode} {instruction.name!r} has no array as operand {index}; pass the whole text of its module"
    )


def _sizes(instruction: Instruction, operands: Operands, dims: Sequence[int]) -> int:
    shape = _array(instruction, operands, 0).dims
    return math.prod(shape[d] for d in dims)


# -- convolutions


def _convolution(instruction: Instruction, operands: Operands) -> float:
    kernel = _array(instruction, operands, 1).dims
    result = next(arrays(instruction.shape)).dims
    labels = re.fullmatch(r"(\w+)_(\w+)->(\w+)", instruction.attributes.get("dim_labels", ""))
    if labels is None:
        raise HloError(f"convolution {instruction.name!r} has no dim_labels; pass the text as printed")
    spatial = sorted(c for c in labels[2] if c.isdigit())
    taps = _window(instruction, "size", 1, spatial)
    strides = _window(instruction, "stride", 1, spatial)
    base, dilation = (_window(instruction, key, 1, spatial) for key in ("lhs_dilate", "rhs_dilate"))
    low = _window(instruction, "pad", 0, spatial)
    pairs = 1.0
    for i, label in enumerate(spatial):
        out = result[labels[3].index(label)]
        at = np.arange(out)[:, None] * strides[i] + np.arange(taps[i])[None, :] * dilation[i] - low[i]
        pairs *= float((at % base[i] == 0).sum())
    features = result[labels[3].index("f")] * result[labels[3].index("b")]
    return 2.0 * features * kernel[labels[2].index("i")] * pairs


def _window(instruction: Instruction, key: str, default: int, spatial: Sequence[str]) -> list[int]:
    """One number for each dimension of a window; of paddings, `1_2x0_0`, the one in front."""
    found = re.search(rf"\b{key}=(\S+?)[\s}}]", instruction.attributes.get("window", ""))
    if found is None:
        return [default] * len(spatial)
    return [int(part.split("_")[0]) for part in found[1].split("x")]


# -- library calls


def _blas(instruction: Instruction, operands: Operands) -> float:
    match instruction.backend_config:
        case {"gemm_backend_config": {"dot_dimension_numbers": {"lhs_contracting_dimensions": list(dims)}}}:
            contracted = _sizes(instruction, operands, [int(str(d)) for d in dims])
        case _:
            contracted = _array(instruction, operands, 0).dims[-1]
    return 2.0 * next(arrays(instruction.shape)).elements * contracted


def _cudnn_convolution(instruction: Instruction, operands: Operands) -> float:
    """Its window is that of the forward convolution, whichever of the three arrays it computes."""
    result = next(arrays(instruction.shape))
    target = instruction.attributes["custom_call_target"]
    if "BackwardFilter" in target:
        kernel, output = result, _array(instruction, operands, 1)
    elif "BackwardInput" in target:
        kernel, output = _array(instruction, operands, 1), _array(instruction, operands, 0)
    else:
        kernel, output = _array(instruction, operands, 1), result
    labels = re.fullmatch(r"\w+_(\w+)->\w+", instruction.attributes.get("dim_labels", ""))
    features = kernel.dims[labels[1].index("o")] if labels else kernel.dims[0]
    return 2.0 * output.elements * kernel.elements / features


def _attention(instruction: Instruction, operands: Operands) -> float:
    """Two matmuls forward; five backward, for flash attention computes the scores again. Causal masks skip half."""
    matmuls = 5 if "Backward" in instruction.attributes["custom_call_target"] else 2
    query = _array(instruction, operands, 0).dims
    config: Json = instruction.backend_config.get("cudnn_fmha_backend_config")
    match config:
        case {"intermediate_tensor_shape": {"dimensions": list(dims)}, **rest}:
            scores = math.prod(int(str(d)) for d in dims)
            share = 0.5 if str(rest.get("mask_type", "")).endswith("CAUSAL") else 1.0
            return 2.0 * matmuls * scores * query[-1] * share
    raise HloError(f"attention call {instruction.name!r} has no cudnn_fmha_backend_config; pass the text as printed")


def _onednn_matmul(instruction: Instruction, operands: Operands) -> float:
    return 2.0 * next(arrays(instruction.shape)).elements * _array(instruction, operands, 0).dims[-1]


_LIBRARY: tuple[tuple[str, Callable[[Instruction, Operands], float]], ...] = (
    ("__cublas$", _blas),
    ("__cudnn$conv", _cudnn_convolution),
    ("__cudnn$fmha", _attention),
    ("__onednn$matmul", _onednn_matmul),
    ("__onednn$convolution", _convolution),
)


def library_call(instruction: Instruction) -> Callable[[Instruction, Operands], float] | None:
    """What counts the operations of a library's matmul, convolution or attention; None for other calls."""
    target = instruction.attributes.get("custom_call_target", "").strip('"')
    return next((count for prefix, count in _LIBRARY if target.startswith(prefix)), None)
