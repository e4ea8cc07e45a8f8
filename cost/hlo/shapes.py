"""Shapes as HLO prints them: `f32[8,16]{1,0:T(8,128)}`, or a tuple of shapes in parentheses."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TypeAlias


@dataclass(frozen=True, slots=True)
class Array:
    """One array, or a token, which has no bytes. Layouts are left out: no cost here depends on them."""

    dtype: str
    dims: tuple[int, ...]

    @property
    def elements(self) -> int:
        return math.prod(self.dims)

    @property
    def bytes(self) -> float:
        return self.elements * dtype_bits(self.dtype) / 8


Shape: TypeAlias = "Array | tuple[Shape, ...]"

_TOKENS = re.compile(r"([a-z]\w*)\[([\d,<=?\s]*)\](?:\{[^{}]*\})?|(token|opaque)\b(?:\[\])?|([()])")


def parse_shape(text: str) -> Shape:
    """Reads a shape; raises ValueError where there is none.

    >>> parse_shape("(f32[8]{0}, (s4[2,3], pred[]))")
    (Array(dtype='f32', dims=(8,)), (Array(dtype='s4', dims=(2, 3)), Array(dtype='pred', dims=())))
    """
    stack: list[list[Shape]] = [[]]
    for dtype, dims, bare, bracket in _TOKENS.findall(text):
        if bracket == "(":
            stack.append([])
        elif bracket == ")":
            done = tuple(stack.pop())
            if not stack:
                break
            stack[-1].append(done)
        else:
            # A bounded dynamic dimension, `<=8`, takes the memory of its bound.
            sizes = re.sub(r"[<=?\s]", "", dims)
            stack[-1].append(Array(bare or dtype, tuple(int(n) for n in sizes.split(",") if n)))
    if len(stack) != 1 or len(stack[0]) != 1:
        raise ValueError(f"{text[:80]!r} is no HLO shape, such as f32[8,16]{{1,0}} or (f32[8], s32[])")
    return stack[0][0]


def arrays(shape: Shape) -> Iterator[Array]:
    """The arrays of a shape, those of tuples in order."""
    if isinstance(shape, Array):
        yield shape
    else:
        for part in shape:
            yield from arrays(part)


def shape_bytes(shape: Shape) -> float:
    return sum(array.bytes for array in arrays(shape))


def shape_elements(shape: Shape) -> int:
    return sum(array.elements for array in arrays(shape))


def dtype_bits(name: str) -> int:
    """The bits of one element of an HLO type: `bf16`, `f8e4m3fn`, `s4`, `pred`, `c64`; 0 for tokens."""
    if name == "pred":
        return 8
    match = re.match(r"(?:bf|f|s|u|c)(\d+)", name)
    return int(match[1]) if match else 0


_LONG = {"f": "float", "s": "int", "u": "uint", "c": "complex"}


def numpy_dtype(name: str) -> str:
    """The name that numpy and `Device.flops_per_s` have for an HLO type.

    >>> numpy_dtype("bf16"), numpy_dtype("s8"), numpy_dtype("f8e4m3fn"), numpy_dtype("pred")
    ('bfloat16', 'int8', 'float8_e4m3fn', 'bool')
    """
    if name == "pred":
        return "bool"
    match = re.fullmatch(r"(bf|f|s|u|c)(\d+)(\w*)", name)
    if match is None:
        return name
    kind = "bfloat" if match[1] == "bf" else _LONG[match[1]]
    return f"{kind}{match[2]}" + (f"_{match[3]}" if match[3] else "")
