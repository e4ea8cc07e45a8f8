"""The kernels of the user's own `shard_map` regions, on each device.

A body's arrays are one device's pieces already, so no plan divides them. Counted from its equations: arithmetic, and
bytes where elementwise chains begin and end; within one body these are taken for one kernel.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

from ffjax.ir import compat
from ffjax.ir.compat import Jaxpr, JaxprEqn, Literal, Var
from ffjax.ir.manual import COLLECTIVES, loop_trips
from ffjax.ir.op_kinds import PRODUCTS, WORK


class BodyTask(NamedTuple):
    """One kernel of a body: `trips` in one run of the region."""

    flops: float
    bytes: float
    matmul: bool
    dtype: str
    trips: float


def body_tasks(eqn: JaxprEqn) -> list[BodyTask]:
    """The kernels of a `shard_map` region, on the pieces of one device."""
    return [task for body in compat.jaxprs_in(eqn) for task in _tasks(body, 1.0)]


def _tasks(jaxpr: Jaxpr, trips: float) -> Iterator[BodyTask]:
    outside = {v for v in jaxpr.outvars if isinstance(v, Var)}
    fused: list[JaxprEqn] = []
    for eqn in jaxpr.eqns:
        inner = list(compat.jaxprs_in(eqn)) if eqn.primitive.name not in WORK else []
        for body in inner:
            yield from _tasks(body, trips * loop_trips(eqn))
        if not inner and eqn.primitive.name not in WORK | COLLECTIVES.keys():
            fused.append(eqn)
            continue
        outside.update(v for v in eqn.invars if isinstance(v, Var))
        if eqn.primitive.name in WORK:
            moved = sum(_bytes(v) for v in (*eqn.invars, *eqn.outvars))
            yield BodyTask(_flops(eqn), moved, eqn.primitive.name in PRODUCTS, _dtype(eqn), trips)
    made = {v for eqn in fused for v in eqn.outvars}
    read = {v for eqn in fused for v in eqn.invars if isinstance(v, Var)} - made
    if crossing := [*read, *(made & outside)]:
        elements = sum(math.prod(compat.shape_of(v)) for v in made)
        yield BodyTask(float(elements), sum(map(_bytes, crossing)), False, "float32", trips)


def _bytes(atom: Var | Literal) -> float:
    dtype = compat.dtype_of(atom)
    return 0.0 if dtype is None else compat.nbytes(compat.shape_of(atom), dtype)


def _dtype(eqn: JaxprEqn) -> str:
    return next((str(compat.dtype_of(v)) for v in eqn.invars), "float32")


def _flops(eqn: JaxprEqn) -> float:
    result = float(math.prod(compat.shape_of(eqn.outvars[0]))) if eqn.outvars else 0.0
    if eqn.primitive.name == "dot_general":
        (contracted, _), _ = eqn.params["dimension_numbers"]
        shape = compat.shape_of(eqn.invars[0])
        return 2.0 * result * float(math.prod(shape[d] for d in contracted))
    if eqn.primitive.name == "conv_general_dilated":
        kernel = compat.shape_of(eqn.invars[1])
        features: int = kernel[eqn.params["dimension_numbers"].rhs_spec[0]]
        return 2.0 * result * math.prod(kernel) / features
    return result
