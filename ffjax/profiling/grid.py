"""The generic grid of `ffjax profile`: ops and collectives over the sizes that programs have.

Every class is ordered so that any beginning of it covers its range, and classes take turns: measuring can stop at any
time.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence

import jax
import jax.numpy as jnp
from jax import lax

from ffjax.cost.cluster import Cluster
from ffjax.cost.collectives import described_coefficients
from ffjax.cost.meshes import AxisGroup, axis_group
from ffjax.cost.roofline import op_seconds
from ffjax.cost.work import CONVOLUTION, ELEMENTWISE, MATMUL, REDUCTION, convolution_params
from ffjax.ir.spec import COLLECTIVE_KINDS, CollectiveKind, MeshShape
from ffjax.profiling.measure import INNER, OUTER, Case, Operand, spread_out

_LONGEST_S = 0.05  # of one run, as it is guessed: longer ones tell nothing that shorter ones do not
_MEMORY_SHARE = 0.1

_DTYPES = {"cpu": ("float32",), "gpu": ("bfloat16", "float32"), "tpu": ("bfloat16", "float32")}
_SIDES = {
    "cpu": (16, 64, 256, 1024, 4096),
    "gpu": (64, 256, 1024, 4096, 16384),
    "tpu": (128, 512, 2048, 8192),
}


def grid(cluster: Cluster, only: Sequence[str] = ()) -> list[Case]:
    """The cases for a cluster's devices; collectives where it has several. `only`: kinds of work, by name."""
    classes: dict[str, Iterator[Case]] = {
        MATMUL: _matmuls(cluster),
        "attention": _attention(cluster),
        CONVOLUTION: _convolutions(cluster),
        ELEMENTWISE: _streams(cluster, ELEMENTWISE),
        REDUCTION: _streams(cluster, REDUCTION),
        "gather": _indexed(cluster, "gather"),
        "scatter-add": _indexed(cluster, "scatter-add"),
        **{kind: collective_cases(cluster, kind) for kind in COLLECTIVE_KINDS},
    }
    kept = [list(cases) for name, cases in classes.items() if not only or name in only]
    ordered = [[cases[i] for i in spread_out(len(cases))] for cases in kept]
    turns = itertools.chain.from_iterable(itertools.zip_longest(*ordered))
    return [case for case in turns if case is not None and _is_sane(case, cluster)]


def kinds() -> tuple[str, ...]:
    """What `only` may name."""
    return (MATMUL, "attention", CONVOLUTION, ELEMENTWISE, REDUCTION, "gather", "scatter-add", *COLLECTIVE_KINDS)


def _is_sane(case: Case, cluster: Cluster) -> bool:
    # Fake devices share the memory of one machine, and a loop holds its operands and results twice.
    return case.guess_s < _LONGEST_S and case.bytes < cluster.device.memory_bytes * _MEMORY_SHARE / 2


def guess(cluster: Cluster, flops: float, size: float, dtype: str, *, matmul: bool) -> float:
    device = cluster.device
    return op_seconds(flops, size, dtype, device, matmul=matmul) + device.kernel_s


def matmul_case(cluster: Cluster, dtype: str, b: int, m: int, n: int, k: int) -> Case:
    """`b` products of m x k and k x n."""
    width = jnp.dtype(dtype).itemsize
    flops, size = 2.0 * b * m * n * k, float(width * b * (m * k + k * n + m * n))
    return Case(
        kind=MATMUL,
        dtype=dtype,
        sizes=(float(b), float(m), float(n), float(k)),
        flops=flops,
        bytes=size,
        function=lambda x, y: x @ y,
        operands=(
            Operand(shape=(b, m, k) if b > 1 else (m, k), dtype=dtype),
            Operand(shape=(b, k, n) if b > 1 else (k, n), dtype=dtype),
        ),
        guess_s=guess(cluster, flops, size, dtype, matmul=True),
    )


def _matmuls(cluster: Cluster) -> Iterator[Case]:
    platform = cluster.device.platform
    for dtype, m, n, k in itertools.product(_DTYPES[platform], *(_SIDES[platform],) * 3):
        yield matmul_case(cluster, dtype, 1, m, n, k)


def _attention(cluster: Cluster) -> Iterator[Case]:
    """Scores (sequence x sequence over the head's width) and their product with the values."""
    platform = cluster.device.platform
    for dtype, b, length, width in itertools.product(_DTYPES[platform], (8, 64, 512), (128, 512, 2048), (64, 128)):
        yield matmul_case(cluster, dtype, b, length, length, width)
        if length != width:
            yield matmul_case(cluster, dtype, b, length, width, length)


def _convolutions(cluster: Cluster) -> Iterator[Case]:
    dtypes = _DTYPES[cluster.device.platform]
    features = ((3, 64), (64, 64), (256, 256), (64, 256), (512, 512))
    for dtype, batch, (f_in, f_out), side, window in itertools.product(dtypes, (8, 64), features, (8, 32), (1, 3)):
        yield _convolution(cluster, dtype, batch, f_in, f_out, side, window)


def _convolution(cluster: Cluster, dtype: str, batch: int, f_in: int, f_out: int, side: int, window: int) -> Case:
    width = jnp.dtype(dtype).itemsize
    image, kernel = (batch, side, side, f_in), (window, window, f_in, f_out)
    out = batch * side * side * f_out
    flops = 2.0 * out * window * window * f_in
    size = float(width * (math.prod(image) + math.prod(kernel) + out))
    return Case(
        kind=CONVOLUTION,
        params=convolution_params({"window_strides": (1, 1), "lhs_dilation": (1, 1), "rhs_dilation": (1, 1)}),
        dtype=dtype,
        sizes=tuple(map(float, (batch, f_in, f_out, side, side, window, window))),
        flops=flops,
        bytes=size,
        function=lambda x, w: lax.conv_general_dilated(
            x, w, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
        ),
        operands=(Operand(shape=image, dtype=dtype), Operand(shape=kernel, dtype=dtype)),
        guess_s=guess(cluster, flops, size, dtype, matmul=True),
    )


def _streams(cluster: Cluster, kind: str) -> Iterator[Case]:
    largest = 24 if cluster.device.platform == "cpu" else 30
    for exponent in range(12, largest + 1, 2):
        count = 1 << exponent
        rows = (count // 256, 256)
        size = 4.0 * (3 * count if kind == ELEMENTWISE else count + rows[0])
        yield Case(
            kind=kind,
            sizes=(size,),
            flops=float(count),
            bytes=size,
            function=(lambda x, y: x + y) if kind == ELEMENTWISE else (lambda x: x.sum(axis=1)),
            operands=(Operand(shape=rows, dtype="float32"),) * (2 if kind == ELEMENTWISE else 1),
            guess_s=guess(cluster, float(count), size, "float32", matmul=False),
        )


def _indexed(cluster: Cluster, kind: str) -> Iterator[Case]:
    dtypes = _DTYPES[cluster.device.platform]
    for dtype, table, width, rows in itertools.product(dtypes, (1024, 65536), (32, 256, 2048), (1024, 16384)):
        moved = float(jnp.dtype(dtype).itemsize * rows * width)
        size = 4.0 * rows + (2 if kind == "gather" else 3) * moved
        operands = [
            Operand(shape=(table, width), dtype=dtype),
            Operand(shape=(rows,), dtype="int32", high=table),
            Operand(shape=(rows, width), dtype=dtype),
        ]
        yield Case(
            kind=kind,
            dtype=dtype,
            sizes=(float(rows), float(width), float(table)),
            flops=float(max(rows, table) * width),
            bytes=size,
            function=_gather if kind == "gather" else _scatter_add,
            operands=tuple(operands[:2] if kind == "gather" else operands),
            in_place=kind != "gather",
            guess_s=guess(cluster, 0.0, size, dtype, matmul=False),
        )


def _gather(table: jax.Array, rows: jax.Array) -> jax.Array:
    return table.at[rows].get(mode="promise_in_bounds")


def _scatter_add(table: jax.Array, rows: jax.Array, updates: jax.Array) -> jax.Array:
    return table.at[rows].add(updates, mode="promise_in_bounds")


# ---- collectives


def collective_cases(cluster: Cluster, kind: CollectiveKind) -> Iterator[Case]:
    """One kind over every size of group along a mesh axis, inside a host and across."""
    largest = 24 if cluster.device.platform == "cpu" else 28
    n = cluster.devices
    for group in (g for g in range(2, n + 1) if n % g == 0):
        where = axis_group(MeshShape((OUTER, INNER), (n // group, group)), (INNER,), cluster.devices_per_host)
        for exponent in range(12, largest + 1, 4):
            yield _collective(cluster, kind, where, 1 << exponent)


def _collective(cluster: Cluster, kind: CollectiveKind, where: AxisGroup, size: int) -> Case:
    group = where.devices
    alpha, beta = described_coefficients(kind, where, cluster)
    elements = max(size // 4 // group, 1) * group
    held = elements // group if kind == "all_gather" else elements
    return Case(
        kind=kind,
        sizes=(float(group), float(where.hosts), float(where.devices_per_host), 4.0 * elements),
        flops=0.0,
        bytes=4.0 * elements,
        function=_COLLECTIVES[kind](group),
        operands=(Operand(shape=(held,), dtype="float32"),),
        group=group,
        guess_s=alpha + beta * size,
    )


_COLLECTIVES: dict[CollectiveKind, Callable[[int], Callable[[jax.Array], jax.Array]]] = {
    "all_reduce": lambda n: lambda x: lax.psum(x, INNER),
    "all_gather": lambda n: lambda x: lax.all_gather(x, INNER, tiled=True),
    "reduce_scatter": lambda n: lambda x: lax.psum_scatter(x, INNER, tiled=True),
    "all_to_all": lambda n: lambda x: lax.all_to_all(x, INNER, 0, 0, tiled=True),
    "collective_permute": lambda n: lambda x: lax.ppermute(x, INNER, [(i, (i + 1) % n) for i in range(n)]),
}
