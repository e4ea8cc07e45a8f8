"""The kinds of ops that analyses tell apart: those that do work, reductions, and those that follow their neighbours."""

from __future__ import annotations

import functools

from jax.lax import GatherScatterMode

from ffjax.ir.graph import Op

WORK = frozenset(
    [
        "dot_general",
        "conv_general_dilated",
        "ragged_dot_general",
        "ragged_dot",
        "gather",
        "scatter",
        "scatter-add",
        "scatter_add",
        "scatter-mul",
        "scatter_mul",
        "scatter-min",
        "scatter_min",
        "scatter-max",
        "scatter_max",
        "scatter-sub",
        "scatter_sub",
        "sort",
        "top_k",
        "approx_top_k",
        "fft",
        "cumsum",
        "cumprod",
        "cummax",
        "cummin",
        "cumlogsumexp",
        "reduce_window",
        "reduce_window_sum",
        "reduce_window_max",
        "reduce_window_min",
        "select_and_scatter_add",
        "select_and_gather_add",
        "select_and_scatter",
        "dynamic_slice",
        "dynamic_update_slice",
        "shard_map",
        "cholesky",
        "lu",
        "qr",
        "eigh",
        "svd",
        "triangular_solve",
        "householder_product",
        "pallas_call",
        "ffi_call",
        "custom_call",
        "sharding_constraint",
        "reshard",
        "mesh_cast",
    ]
)
"""Ops that are never joined with their neighbours, because resharding next to them can pay."""

BORDERS = frozenset({"argument", "result", "enter", "exit"})
"""Not ops of the program: where values enter and leave it and its bodies."""
PRODUCTS = frozenset({"dot_general", "conv_general_dilated", "ragged_dot_general", "ragged_dot"})


def is_reduction(op: Op) -> bool:
    return _reduces(op.kind)


@functools.cache
def _reduces(kind: str) -> bool:
    return kind in ("argmax", "argmin", "reduce") or (
        kind.startswith("reduce_") and kind not in ("reduce_precision", "reduce_window")
    )


def is_light(op: Op) -> bool:
    """Whether an op follows its neighbours' sharding for free."""
    return op.rule.is_plain and op.kind not in WORK and not _reduces(op.kind)


def ends_in_its_sum(op: Op) -> bool:
    """Whether an op's partial sums are its result as it lowers, so that they can be scattered where they are summed.

    A gather that fills what is out of bounds masks its result after the all-reduce; argmax and argmin reduce values
    beside the indices, which nobody slices.
    """
    if op.kind in ("argmax", "argmin"):
        return False
    mode = None if op.eqn is None else op.eqn.params.get("mode")
    return op.kind != "gather" or mode != GatherScatterMode.FILL_OR_DROP
