"""What a kernel does, in the sizes that its time depends on: the key under which profiles hold measurements.

    matmul        (batch, m, n, k)                                   of the local shapes, however they are laid out
    convolution   (batch, features in, features out, out spatial..., window...)
    gather, scatter-*   (rows, elements of a row, rows of the table)
    elementwise, reduction   ()     what streams through memory: the bytes that cross the fusion's borders
    any other op  the dimensions of its operands

A size is a number and the atoms of the region that divide it, so one `Work` stands for every sharding of the op.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from ffjax.ir import compat
from ffjax.ir.graph import NO_VALUE, Graph, Op
from ffjax.ir.op_kinds import is_reduction
from ffjax.ir.regions import Dims, OpDims

MATMUL, CONVOLUTION, ELEMENTWISE, REDUCTION = "matmul", "convolution", "elementwise", "reduction"
STREAMS = frozenset({ELEMENTWISE, REDUCTION})

# Work that is nothing but a copy: its time is that of its bytes.
_COPIES = frozenset(
    ["dynamic_slice", "dynamic_update_slice", "slice", "concatenate", "split", "pad", "rev", "iota", "copy"]
).union(["broadcast_in_dim", "reshape", "transpose", "squeeze", "expand_dims", "convert_element_type", "select_n"])
_CONVOLUTION_PARAMS = ("window_strides", "lhs_dilation", "rhs_dilation", "feature_group_count", "batch_group_count")


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """`sizes[i]` is (the whole size, the atoms of the region that split it). Without a `kind` it has only counts."""

    kind: str = ""
    params: str = ""
    dtype: str = ""
    sizes: tuple[tuple[float, tuple[int, ...]], ...] = ()

    @property
    def key(self) -> tuple[str, str, str]:
        return (self.kind, self.params, self.dtype)


def work_of(graph: Graph, op: Op, dims: OpDims, *, fused: bool) -> Work:
    """The work of one op; `fused` is that of a chain of elementwise ops which ends in this one."""
    if fused or op.kind in _COPIES or op.eqn is None:
        return Work(kind=REDUCTION if is_reduction(op) else ELEMENTWISE)
    operands = [compat.shape_of(v) for v in op.eqn.invars]
    dtype = next((graph.values[v].dtype for v in op.operands if v != NO_VALUE), "float32")
    if op.kind == "dot_general":
        return Work(kind=MATMUL, dtype=dtype, sizes=_matmul(op, operands, dims))
    if op.kind == "conv_general_dilated":
        params = convolution_params(op.eqn.params)
        return Work(kind=CONVOLUTION, params=params, dtype=dtype, sizes=_convolution(graph, op, operands, dims))
    if op.kind == "gather" or op.kind.startswith("scatter"):
        rows_of = dims.results[0] if op.kind == "gather" else dims.operands[2]
        moved = graph.values[op.results[0]].shape if op.kind == "gather" else operands[2]
        kind = op.kind.replace("_", "-")
        return Work(kind=kind, dtype=dtype, sizes=_indexed(operands[0], operands[1], moved, dims, rows_of))
    sizes = [
        _size(shape, port, (index,))
        for shape, port in zip(operands, dims.operands, strict=True)
        for index in range(len(shape))
    ]
    return Work(kind=op.kind, params=_params(op), dtype=dtype, sizes=tuple(sizes))


def convolution_params(params: Mapping[str, object]) -> str:
    """The geometry of a convolution that is not in its sizes; groups are 1 where they are not given.

    >>> convolution_params({"window_strides": (2, 2), "lhs_dilation": (1, 1), "rhs_dilation": (1, 1)})
    'window_strides=(2,2) lhs_dilation=(1,1) rhs_dilation=(1,1) feature_group_count=1 batch_group_count=1'
    """
    return " ".join(f"{name}={_text(params.get(name, 1))}" for name in _CONVOLUTION_PARAMS)


def _matmul(op: Op, shapes: Sequence[tuple[int, ...]], dims: OpDims) -> tuple[tuple[float, tuple[int, ...]], ...]:
    assert op.eqn is not None  # a dot is an equation
    (left_k, right_k), (left_b, right_b) = op.eqn.params["dimension_numbers"]
    m = [i for i in range(len(shapes[0])) if i not in (*left_k, *left_b)]
    n = [i for i in range(len(shapes[1])) if i not in (*right_k, *right_b)]
    left, right = dims.operands[0], dims.operands[1]
    return (
        _size(shapes[0], left, left_b),
        _size(shapes[0], left, m),
        _size(shapes[1], right, n),
        _size(shapes[0], left, left_k),
    )


def _convolution(
    graph: Graph, op: Op, shapes: Sequence[tuple[int, ...]], dims: OpDims
) -> tuple[tuple[float, tuple[int, ...]], ...]:
    assert op.eqn is not None  # a convolution is an equation
    numbers = op.eqn.params["dimension_numbers"]
    out = graph.values[op.results[0]].shape
    features_out, features_in, *window = numbers.rhs_spec
    return (
        _size(out, dims.results[0], numbers.out_spec[:1]),
        _size(shapes[1], dims.operands[1], (features_in,)),
        _size(shapes[1], dims.operands[1], (features_out,)),
        *(_size(out, dims.results[0], (i,)) for i in numbers.out_spec[2:]),
        *(_size(shapes[1], dims.operands[1], (i,)) for i in window),
    )


def _indexed(
    table: tuple[int, ...], indices: tuple[int, ...], moved: tuple[int, ...], dims: OpDims, moved_dims: Dims
) -> tuple[tuple[float, tuple[int, ...]], ...]:
    """(rows, elements of a row, rows of the table); `moved` is what is read from or written to the table."""
    row_atoms = _atoms(dims.operands[1][:-1])
    moved_atoms = _atoms(moved_dims)
    rows = max(math.prod(indices[:-1]), 1)
    row = max(math.prod(moved) / rows, 1.0)
    return (
        (float(rows), tuple(row_atoms)),
        (row, tuple(a for a in moved_atoms if a not in row_atoms)),
        (max(math.prod(table) / row, 1.0), tuple(a for a in _atoms(dims.operands[0]) if a not in moved_atoms)),
    )


def _size(shape: Sequence[int], port: Dims, which: Iterable[int]) -> tuple[float, tuple[int, ...]]:
    picked = list(which)
    return float(math.prod(shape[i] for i in picked)), tuple(_atoms([port[i] for i in picked]))


def _atoms(dims: Iterable[tuple[int, ...]]) -> list[int]:
    return list(dict.fromkeys(a for dim in dims for a in dim))


def _params(op: Op) -> str:
    """The plain parameters of an op, those apart that are sizes of its result."""
    assert op.eqn is not None  # only equations have parameters
    left_out = ("sharding", "out_sharding", "shape", "slice_sizes")
    plain = {k: v for k, v in op.eqn.params.items() if k not in left_out and _is_plain(v)}
    return " ".join(f"{k}={_text(v)}" for k, v in sorted(plain.items()))


def _is_plain(value: object) -> bool:
    return isinstance(value, int | float | str) or (
        isinstance(value, tuple | list) and all(_is_plain(v) for v in value)
    )


def _text(value: object) -> str:
    return str(value).replace(" ", "")
