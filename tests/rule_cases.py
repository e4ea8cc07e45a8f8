"""One row per primitive and form: what `tests/test_rules.py` reads the rule of and proves on devices.

Every factor is even, and the factors that precede another in one dimension are at most 4, so that
each can be split over 8 devices.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jax.extend import random as extend_random


@dataclass(frozen=True, slots=True, kw_only=True)
class Arg:
    """An argument: a shape and how its values are made."""

    shape: tuple[int, ...]
    dtype: str = "float32"
    low: float = -2.0
    high: float = 2.0
    make: Callable[[np.random.Generator], object] | None = None

    def value(self, rng: np.random.Generator) -> object:
        """Values between low and high, integers without the high end."""
        if self.make is not None:
            return self.make(rng)
        if np.issubdtype(np.dtype(self.dtype), np.integer):
            return jnp.asarray(rng.integers(int(self.low), int(self.high), self.shape), self.dtype)
        if self.dtype == "bool":
            return jnp.asarray(rng.integers(0, 2, self.shape), bool)
        return jnp.asarray(rng.uniform(self.low, self.high, self.shape), self.dtype)


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One row.

    Attributes:
      name: what the golden line starts with.
      fn, args: a function whose trace has the equation, and arguments to trace and run it with.
      primitive: the equation's; the name up to the first space if not given.
      communicates: collectives that XLA's partitioner emits for a factor, by the factor's letter, where the
        kind says otherwise; each with its reason in a comment.
      tolerance: relative and absolute, of a split run against a whole one.
    """

    name: str
    fn: Callable[..., object]
    args: tuple[Arg, ...]
    primitive: str
    communicates: dict[str, frozenset[str]]
    tolerance: float


CASES: list[Case] = []


def row(
    name: str,
    fn: Callable[..., object],
    *args: Arg,
    primitive: str = "",
    communicates: dict[str, set[str]] | None = None,
    tolerance: float = 1e-5,
) -> None:
    CASES.append(
        Case(
            name=name,
            fn=fn,
            args=args,
            primitive=primitive or name.split()[0],
            communicates={f: frozenset(kinds) for f, kinds in (communicates or {}).items()},
            tolerance=tolerance,
        )
    )


def f32(*shape: int, low: float = -2.0, high: float = 2.0) -> Arg:
    return Arg(shape=shape, low=low, high=high)


def i32(*shape: int, low: int = 0, high: int = 4) -> Arg:
    return Arg(shape=shape, dtype="int32", low=low, high=high)


def u32(*shape: int) -> Arg:
    return Arg(shape=shape, dtype="uint32", low=0, high=2**31)


def boolean(*shape: int) -> Arg:
    return Arg(shape=shape, dtype="bool")


def complex64(*shape: int) -> Arg:
    return Arg(
        shape=shape,
        make=lambda rng: jnp.asarray(rng.normal(size=shape) + 1j * rng.normal(size=shape), "complex64"),
    )


def keys(*shape: int) -> Arg:
    return Arg(shape=shape, make=lambda rng: jax.random.split(jax.random.key(7), shape) if shape else jax.random.key(7))


def positive_definite(*batch: int, n: int) -> Arg:
    def make(rng: np.random.Generator) -> jax.Array:
        a = rng.normal(size=(*batch, n, n))
        return jnp.asarray(a @ np.swapaxes(a, -1, -2) + n * np.eye(n), "float32")

    return Arg(shape=(*batch, n, n), make=make)


def symmetric(*batch: int, n: int) -> Arg:
    def make(rng: np.random.Generator) -> jax.Array:
        a = rng.normal(size=(*batch, n, n))
        return jnp.asarray(a + np.swapaxes(a, -1, -2), "float32")

    return Arg(shape=(*batch, n, n), make=make)


# --- elementwise -------------------------------------------------------------------------------------------

for op in (
    lax.abs, lax.neg, lax.sign, lax.floor, lax.ceil, lax.round, lax.is_finite, lax.exp, lax.exp2, lax.expm1,
    lax.logistic, lax.tanh, lax.sin, lax.cos, lax.tan, lax.sinh, lax.cosh, lax.asinh, lax.atan, lax.cbrt, lax.square,
    lax.erf, lax.erfc, lax.stop_gradient,
    lax.bessel_i0e, lax.bessel_i1e,
):  # fmt: skip
    row(op.__name__, op, f32(4, 6))
row("copy", jnp.copy, f32(4, 6))
for op in (lax.log, lax.log1p, lax.sqrt, lax.rsqrt, lax.lgamma, lax.digamma):
    row(op.__name__, op, f32(4, 6, low=0.5))
for op in (lax.erf_inv, lax.asin, lax.acos, lax.atanh):
    row(op.__name__, op, f32(4, 6, low=-0.9, high=0.9))
row("acosh", lax.acosh, f32(4, 6, low=1.1, high=3))
row("integer_pow", lambda x: x**3, f32(4, 6))
for op in (lax.add, lax.sub, lax.mul, lax.max, lax.min, lax.atan2, lax.nextafter, lax.complex):
    row(op.__name__, op, f32(4, 6), f32(4, 6))
for op in (lax.div, lax.rem, lax.pow):
    row(op.__name__, op, f32(4, 6, low=1), f32(4, 6, low=1))
for op in (lax.eq, lax.ne, lax.ge, lax.gt, lax.le, lax.lt):
    row(op.__name__, op, i32(4, 6), i32(4, 6))
row("add scalar", lambda x: x + 2.0, f32(4, 6), primitive="add")
row("mul unit dimension", lax.mul_p.bind, f32(4, 6), f32(4, 1), primitive="mul")
row("add_any", jax.grad(lambda x: (jnp.sin(x) * jnp.cos(x)).sum()), f32(4, 6))
for name, op in (("and", lax.bitwise_and), ("or", lax.bitwise_or), ("xor", lax.bitwise_xor)):
    row(name, op, i32(4, 6), i32(4, 6))
row("not", lax.bitwise_not, i32(4, 6))
row("population_count", lax.population_count, i32(4, 6))
row("clz", lax.clz, i32(4, 6))
for op in (lax.shift_left, lax.shift_right_logical, lax.shift_right_arithmetic):
    row(op.__name__, op, i32(4, 6), i32(4, 6))
for op in (lax.real, lax.imag, lax.conj):
    row(op.__name__, op, complex64(4, 6))
row("select_n", lax.select_n, boolean(4, 6), f32(4, 6), f32(4, 6))
row("select_n scalar", lax.select_n, boolean(), f32(4, 6), f32(4, 6), primitive="select_n")
row("select_n 3", lax.select_n, i32(4, 6, high=3), f32(4, 6), f32(4, 6), f32(4, 6))
row("clamp", lax.clamp, f32(4, 6, high=0), f32(4, 6), f32(4, 6, low=0))
row("clamp scalar", lambda x: lax.clamp(-1.0, x, 1.0), f32(4, 6))
row("convert_element_type", lambda x: x.astype("int32"), f32(4, 6))
row("bitcast_convert_type", lambda x: lax.bitcast_convert_type(x, jnp.int32), f32(4, 6))
row("bitcast_convert_type narrower", lambda x: lax.bitcast_convert_type(x, jnp.int16), f32(4, 6))
row("bitcast_convert_type wider", lambda x: lax.bitcast_convert_type(x, jnp.int32), Arg(shape=(4, 2), dtype="int16"))
row("reduce_precision", lambda x: lax.reduce_precision(x, 8, 7), f32(4, 6))
row("optimization_barrier", lambda x, y: lax.optimization_barrier((x, y)), f32(4, 6), f32(4))
row("name", lambda x: checkpoint_name(x, "x"), f32(4, 6))
# Their loops end when every element has converged: one predicate is all-reduced per iteration.
loop = {"i": {"all-reduce"}, "j": {"all-reduce"}}
positive = f32(4, 6, low=0.5)
row("igamma", lax.igamma, positive, positive, communicates=loop)
row("igammac", lax.igammac, positive, positive, communicates=loop)
row("igamma_grad_a", lax.igamma_grad_a_p.bind, positive, positive, communicates=loop)
row("regularized_incomplete_beta", lax.betainc, *[f32(4, 6, low=0.5, high=0.9)] * 3, communicates=loop)
row("zeta", lax.zeta, f32(4, 6, low=1.5, high=3), f32(4, 6, low=0.5))
row("polygamma", lax.polygamma, f32(4, 6, low=1, high=3), f32(4, 6, low=0.5))

# --- shapes ------------------------------------------------------------------------------------------------

row("broadcast_in_dim", lambda x: lax.broadcast_in_dim(x, (4, 6, 8), (1,)), f32(6))
row("broadcast_in_dim scalar", lambda x: lax.broadcast_in_dim(x, (4, 6), ()), f32())
row("broadcast_in_dim unit", lambda x: lax.broadcast_in_dim(x, (4, 6), (0, 1)), f32(4, 1))
row("reshape merge", lambda x: lax.reshape(x, (8, 8)), f32(4, 2, 8))
row("reshape split", lambda x: lax.reshape(x, (4, 2, 8)), f32(8, 8))
row("reshape split 3", lambda x: lax.reshape(x, (2, 2, 2, 4)), f32(8, 4))
row("reshape irregular", lambda x: lax.reshape(x, (6, 4, 2)), f32(4, 6, 2))
row("reshape unit", lambda x: lax.reshape(x, (4, 1, 6)), f32(4, 6))
row("transpose", lambda x: lax.transpose(x, (2, 0, 1)), f32(4, 6, 8))
row("squeeze", lambda x: lax.squeeze(x, (1,)), f32(4, 1, 6))
row("slice", lambda x: lax.slice(x, (0, 2), (4, 6)), f32(4, 8))
row("slice strided", lambda x: lax.slice(x, (0, 0), (4, 8), (1, 2)), f32(4, 8))
row("concatenate", lambda x, y: lax.concatenate([x, y], 0), f32(4, 6), f32(8, 6))
row("concatenate equal", lambda x, y: lax.concatenate([x, y], 0), f32(4, 6), f32(4, 6))
row("split", lambda x: lax.split(x, (4, 4), axis=1), f32(4, 8))
row("stack", lambda x, y: lax.stack_p.bind(x, y, axis=1), f32(4, 6), f32(4, 6))
row("unstack", lambda x: lax.unstack_p.bind(x, axis=1), f32(4, 2, 6))
row("tile", lambda x: lax.tile(x, (2, 1)), f32(4, 6))
row("pad", lambda x: lax.pad(x, 0.0, ((0, 0, 0), (1, 1, 0))), f32(4, 6))
row("pad interior", lambda x: lax.pad(x, 0.0, ((0, 0, 0), (0, 1, 1))), f32(4, 6))
row("pad negative", lambda x: lax.pad(x, 0.0, ((0, 0, 0), (-1, -1, 0))), f32(4, 6))
row("rev", lambda x: lax.rev(x, (1,)), f32(4, 6))
row("iota", lambda: lax.broadcasted_iota("int32", (4, 6), 1))

# --- dots and convolutions ---------------------------------------------------------------------------------

for batch, contracting in ((0, 0), (0, 1), (0, 2), (0, 3), (1, 1), (2, 2), (3, 1), (4, 0), (5, 3)):
    b, c = "abcde"[:batch], "xyz"[:contracting]
    left, right = "m" + b + c, c + "n" + b
    dims = (
        (tuple(left.index(d) for d in c), tuple(right.index(d) for d in c)),
        (tuple(left.index(d) for d in b), tuple(right.index(d) for d in b)),
    )
    row(
        f"dot_general {batch} batch {contracting} contracting",
        lambda x, y, dims=dims: lax.dot_general(x, y, dims),
        f32(*(4 if d == "m" else 2 for d in left)),
        f32(*(6 if d == "n" else 2 for d in right)),
    )


def conv(**options: object) -> Callable[..., jax.Array]:
    def fn(x: jax.Array, w: jax.Array) -> jax.Array:
        spatial = "DHW"[3 - (x.ndim - 2) :]
        numbers = ("N" + spatial + "C", spatial + "IO", "N" + spatial + "C")
        settings = {"window_strides": (1,) * (x.ndim - 2), "padding": "SAME", **options}
        return lax.conv_general_dilated(x, w, dimension_numbers=numbers, **settings)

    return fn


def conv_gradient(fn: Callable[..., jax.Array], wrt: int) -> Callable[..., jax.Array]:
    """The gradient's convolution alone: the forward one is dead code there."""
    return jax.grad(lambda *xw: fn(*xw).sum(), wrt)


same = conv()
row("conv_general_dilated 1d", same, f32(4, 16, 2), f32(3, 2, 6))
row("conv_general_dilated 2d", same, f32(4, 16, 8, 2), f32(3, 3, 2, 6))
row("conv_general_dilated 3d", same, f32(4, 8, 8, 8, 2), f32(3, 3, 3, 2, 6))
row("conv_general_dilated 1x1", same, f32(4, 16, 8, 2), f32(1, 1, 2, 6))
row("conv_general_dilated strided", conv(window_strides=(2, 2)), f32(4, 16, 8, 2), f32(3, 3, 2, 6))
row("conv_general_dilated patches", conv(window_strides=(4, 4)), f32(4, 16, 8, 2), f32(4, 4, 2, 6))
row("conv_general_dilated valid", conv(padding="VALID"), f32(4, 18, 10, 2), f32(3, 3, 2, 6))
row(
    "conv_general_dilated lhs dilation",
    conv(lhs_dilation=(2, 2), padding=((1, 2), (1, 2))),
    f32(4, 8, 8, 2),
    f32(4, 4, 2, 6),
)
row("conv_general_dilated rhs dilation", conv(rhs_dilation=(2, 2)), f32(4, 16, 8, 2), f32(3, 3, 2, 6))
row("conv_general_dilated grouped", conv(feature_group_count=2), f32(4, 16, 8, 4), f32(3, 3, 2, 8))
row("conv_general_dilated depthwise", conv(feature_group_count=4), f32(4, 16, 8, 4), f32(3, 3, 1, 4))
row("conv_general_dilated depthwise x2", conv(feature_group_count=4), f32(4, 16, 8, 4), f32(3, 3, 1, 8))
row("conv_general_dilated batch groups", conv(batch_group_count=2), f32(4, 16, 8, 2), f32(3, 3, 2, 8))
strided = conv(window_strides=(2, 2))
depthwise = conv(feature_group_count=4)
halo = {"collective-permute"}
row("conv_general_dilated input gradient", conv_gradient(same, 0), f32(4, 16, 8, 2), f32(3, 3, 2, 6))
# A window over pieces needs their neighbours' edges.
row("conv_general_dilated kernel gradient", conv_gradient(same, 1), f32(4, 16, 8, 2), f32(3, 3, 2, 6),
    communicates={"n": halo, "o": halo})  # fmt: skip
row("conv_general_dilated strided input gradient", conv_gradient(strided, 0), f32(4, 16, 8, 2), f32(3, 3, 2, 6))
row("conv_general_dilated strided kernel gradient", conv_gradient(strided, 1), f32(4, 16, 8, 2), f32(3, 3, 2, 6),
    communicates={"n": halo, "p": halo})  # fmt: skip
row("conv_general_dilated patches kernel gradient", conv_gradient(conv(window_strides=(4, 4)), 1), f32(4, 16, 8, 2),
    f32(4, 4, 2, 6))  # fmt: skip
row("conv_general_dilated grouped kernel gradient", conv_gradient(conv(feature_group_count=2), 1), f32(4, 16, 8, 4),
    f32(3, 3, 2, 8), communicates={"o": halo, "p": halo})  # fmt: skip
row("conv_general_dilated depthwise input gradient", conv_gradient(depthwise, 0), f32(4, 16, 8, 4), f32(3, 3, 1, 4))
row("conv_general_dilated depthwise kernel gradient", conv_gradient(depthwise, 1), f32(4, 16, 8, 4), f32(3, 3, 1, 4),
    communicates={"m": halo, "n": halo}, tolerance=1e-4)  # fmt: skip


row("conv_general_dilated depthwise x2 input gradient", conv_gradient(depthwise, 0), f32(4, 16, 8, 4), f32(3, 3, 1, 8))
row("conv_general_dilated depthwise x2 kernel gradient", conv_gradient(depthwise, 1), f32(4, 16, 8, 4), f32(3, 3, 1, 8),
    communicates={"n": halo, "o": halo}, tolerance=1e-4)  # fmt: skip


def ragged(lhs: tuple[int, ...], rhs: tuple[int, ...], dims: object) -> tuple[Callable[..., jax.Array], Arg, Arg, Arg]:
    sizes = Arg(shape=(4,), make=lambda rng: jnp.asarray([2, 0, 4, 2], "int32"))
    return (lambda x, w, g: lax.ragged_dot_general(x, w, g, dims)), f32(*lhs), f32(*rhs), sizes


row("ragged_dot_general", lax.ragged_dot, f32(8, 6), f32(4, 6, 10), ragged((), (), None)[3])
row(
    "ragged_dot_general contracting",
    *ragged((8, 6), (8, 10), lax.RaggedDotDimensionNumbers((((0,), (0,)), ((), ())), [0], [])),
)

# --- reductions --------------------------------------------------------------------------------------------

for name, op in (("sum", jnp.sum), ("max", jnp.max), ("min", jnp.min), ("prod", jnp.prod)):
    row(f"reduce_{name}", lambda x, op=op: op(x, axis=1), f32(4, 6))
for name, op in (("and", jnp.all), ("or", jnp.any)):
    row(f"reduce_{name}", lambda x, op=op: op(x, axis=1), boolean(4, 6))
row("reduce_xor", lambda x: lax.reduce_xor_p.bind(x, axes=(1,)), i32(4, 6))
row("reduce_and bits", lambda x: lax.reduce_and_p.bind(x, axes=(1,)), i32(4, 6))
row("reduce_sum all", jnp.sum, f32(4, 6))
row("reduce", lambda x: lax.reduce(x, np.float32(0), lambda a, b: a + b + a * b, (1,)), f32(4, 6))
# Partial results of several operands are gathered, one of each per device, and reduced again.
partial = {"j": {"all-gather"}}
row("reduce pair", lambda x, y: lax.reduce(
    (x, y), (np.float32(0), np.float32(0)), lambda a, b: (a[0] + b[0], a[1] * b[1]), (1,)), f32(4, 6), f32(4, 6),
    communicates=partial)  # fmt: skip
row("argmax", lambda x: lax.argmax(x, 1, "int32"), f32(4, 6), communicates=partial)
row("argmin", lambda x: lax.argmin(x, 1, "int32"), f32(4, 6), communicates=partial)
for op in (lax.cumsum, lax.cummax, lax.cummin, lax.cumprod, lax.cumlogsumexp):
    row(op.__name__, lambda x, op=op: op(x, axis=1), f32(4, 8))
window = ((1, 2, 2), (1, 2, 2))
row("reduce_window_sum", lambda x: lax.reduce_window(x, 0.0, lax.add, *window, "VALID"), f32(4, 16, 8))
row("reduce_window_max", lambda x: lax.reduce_window(x, -jnp.inf, lax.max, *window, "VALID"), f32(4, 16, 8))
row("reduce_window_min", lambda x: lax.reduce_window(x, jnp.inf, lax.min, *window, "VALID"), f32(4, 16, 8))
row(
    "reduce_window_max overlapping",
    lambda x: lax.reduce_window(x, -jnp.inf, lax.max, (1, 3, 1), (1, 1, 1), "SAME"),
    f32(4, 16, 8),
)
row("reduce_window_max strided", lambda x: lax.reduce_window(x, -jnp.inf, lax.max, (1, 3, 1), (1, 2, 1), "SAME"),
    f32(4, 16, 8))  # fmt: skip
row("reduce_window_min integers", lambda x: lax.reduce_window(x, 2**31 - 1, lax.min, (1, 3, 1), (1, 1, 1), "SAME"),
    Arg(shape=(4, 16, 8), dtype="int32"))  # fmt: skip
row("reduce_window", lambda x: lax.reduce_window(
    x, np.float32(0), lambda a, b: a + b + a * b, (1, 2, 2), (1, 2, 2), "VALID"), f32(4, 16, 8))  # fmt: skip
row(
    "select_and_scatter_add",
    jax.grad(lambda x: lax.reduce_window(x, -jnp.inf, lax.max, *window, "VALID").sum()),
    f32(4, 16, 8),
)
row("select_and_scatter_add overlapping", jax.grad(lambda x: (
    lax.reduce_window(x, -jnp.inf, lax.max, (1, 3, 3), (1, 2, 1), "SAME") * jnp.arange(1.0, 9.0)).sum()),
    f32(4, 16, 8))  # fmt: skip
row("select_and_scatter_add smallest", jax.grad(lambda x: (
    lax.reduce_window(x, jnp.inf, lax.min, (1, 2, 1), (1, 4, 1), "VALID") * jnp.arange(1.0, 9.0)).sum()),
    f32(4, 16, 8))  # fmt: skip
row(
    "select_and_gather_add",
    lambda x, t: jax.jvp(lambda x: lax.reduce_window(x, -jnp.inf, lax.max, *window, "VALID"), (x,), (t,)),
    f32(4, 16, 8),
    f32(4, 16, 8),
)
row("sort", lambda x: lax.sort(x, dimension=1), f32(4, 6))
row("sort pair", lambda x, y: lax.sort((x, y), dimension=0, num_keys=1), f32(4, 6), f32(4, 6))
row("top_k", lambda x: lax.top_k(x, 2), f32(4, 6))
row("approx_top_k", lambda x: lax.approx_max_k(x, 2), f32(4, 8))
row("fft", jnp.fft.fft, complex64(4, 6, 8))
row("fft 2d", jnp.fft.fft2, complex64(4, 6, 8))
row("fft real", jnp.fft.rfft, f32(4, 6, 8))
row("fft inverse real", lambda x: jnp.fft.irfft(x, n=8), complex64(4, 6, 5))

# --- indexing ----------------------------------------------------------------------------------------------

clip = {"mode": "clip"}
row("gather embedding", lambda t, i: jnp.take(t, i, axis=0), f32(8, 6), i32(4, 2, high=8))
row("gather embedding clipped", lambda t, i: jnp.take(t, i, axis=0, **clip), f32(8, 6), i32(4, 2, high=8))
row("gather columns", lambda t, i: jnp.take(t, i, axis=1, **clip), f32(8, 6), i32(4, high=6))
row("gather batched", lambda t, i: jnp.take_along_axis(t, i, axis=1), f32(4, 8, 6), i32(4, 2, 6, high=8))
row("gather label", lambda t, i: jnp.take_along_axis(t, i[:, None], axis=-1)[:, 0], f32(4, 8), i32(4, high=8))
row("gather vmap", jax.vmap(lambda t, i: t[i]), f32(4, 8, 6), i32(4, 2, high=8))
row("gather points", lambda t, i, j: t[i, j], f32(8, 6), i32(4, high=8), i32(4, high=6))
row("gather windows", lambda t, i: jax.vmap(lambda i: lax.dynamic_slice(t, (i, 0), (2, 6)))(i), f32(8, 6), i32(4))
row("scatter", lambda t, i, u: t.at[i].set(u, unique_indices=True), f32(8, 6),
    Arg(shape=(4,), make=lambda rng: jnp.asarray([5, 0, 3, 6], "int32")), f32(4, 6))  # fmt: skip
row("scatter-add embedding", jax.grad(lambda t, i: (jnp.take(t, i, axis=0) ** 2).sum()), f32(8, 6), i32(4, 2, high=8))
row("scatter-add segment sum", lambda u, i: jax.ops.segment_sum(u, i, 8), f32(4, 6), i32(4, high=8))
row("scatter-add batched", jax.grad(lambda t, i: (jnp.take_along_axis(t, i, axis=1) ** 2).sum()), f32(4, 8, 6),
    i32(4, 2, 6, high=8))  # fmt: skip
row("scatter-add label", jax.grad(lambda t, i: (jnp.take_along_axis(t, i[:, None], axis=-1) ** 2).sum()), f32(4, 8),
    i32(4, high=8))  # fmt: skip
row("scatter-max", lambda t, i, u: t.at[i].max(u), f32(8, 6), i32(4, high=8), f32(4, 6))
row("scatter-min", lambda t, i, u: t.at[i].min(u), f32(8, 6), i32(4, high=8), f32(4, 6))
row("scatter-mul", lambda t, i, u: t.at[i].multiply(u), f32(8, 6), i32(4, high=8), f32(4, 6))
row("scatter-sub", lambda t, i, u: t.at[i].subtract(u), f32(8, 6), i32(4, high=8), f32(4, 6))
row("dynamic_slice", lambda x, i: lax.dynamic_slice(x, (i, 0), (4, 6)), f32(8, 6), i32())
row("dynamic_slice row", lambda x, i: lax.dynamic_index_in_dim(x, i, 0, keepdims=False), f32(8, 6), i32())
row("dynamic_update_slice", lambda x, u, i: lax.dynamic_update_slice(x, u, (i, 0)), f32(8, 6), f32(4, 6), i32())
row("dynamic_update_slice row", lambda x, u, i: lax.dynamic_update_slice(x, u, (i, 0)), f32(8, 6), f32(1, 6), i32())

# --- linear algebra ----------------------------------------------------------------------------------------

square = f32(4, 6, 6)
row("cholesky", lambda a: lax.linalg.cholesky(a, symmetrize_input=False), positive_definite(4, n=6))
row("lu", lax.linalg.lu, square, tolerance=1e-4)
pivots = Arg(
    shape=(4, 6), make=lambda rng: jnp.asarray(np.arange(6) + rng.integers(0, 6 - np.arange(6), (4, 6)), "int32")
)
row("lu_pivots_to_permutation", lambda p: lax.linalg.lu_pivots_to_permutation(p, 6), pivots)
row("qr", lambda a: lax.linalg.qr(a, full_matrices=False), square, tolerance=1e-4)
row("geqrf", lambda a: jnp.linalg.qr(a, mode="raw"), square, tolerance=1e-4)
row("householder_product", lax.linalg.householder_product, square, f32(4, 6), tolerance=1e-4)
row("eigh", lambda a: lax.linalg.eigh(a, symmetrize_input=False), symmetric(4, n=6), tolerance=1e-4)
row("eig", lax.linalg.eig, square, tolerance=1e-4)
row("svd", lambda a: lax.linalg.svd(a, full_matrices=False), square, tolerance=1e-4)
row("schur", lax.linalg.schur, square, tolerance=1e-4)
row("hessenberg", lax.linalg.hessenberg, square, tolerance=1e-4)
row("tridiagonal", lax.linalg.tridiagonal, symmetric(4, n=6), tolerance=1e-4)
row("tridiagonal_solve", lax.linalg.tridiagonal_solve, f32(4, 6, low=0, high=1), f32(4, 6, low=3, high=4),
    f32(4, 6, low=0, high=1), f32(4, 6, 2), tolerance=1e-4)  # fmt: skip
row("triangular_solve", lambda a, b: lax.linalg.triangular_solve(a, b, left_side=True, lower=True),
    positive_definite(4, n=6), f32(4, 6, 2), tolerance=1e-4)  # fmt: skip
row("triangular_solve right", lambda a, b: lax.linalg.triangular_solve(a, b, left_side=False, lower=True),
    positive_definite(4, n=6), f32(4, 2, 6), tolerance=1e-4)  # fmt: skip

# --- random ------------------------------------------------------------------------------------------------

row("random_bits", lambda k: jax.random.bits(k, (4, 6)), keys())
row("random_bits batch of keys", jax.vmap(lambda k: jax.random.bits(k, (4, 6))), keys(2))
row("random_bits narrow", lambda k: jax.random.bits(k, (4, 6), "uint8"), keys())
row("random_split", lambda k: jax.random.split(k, 4), keys())
row("random_split batch of keys", jax.vmap(lambda k: jax.random.split(k, 4)), keys(2))
row("random_fold_in", jax.random.fold_in, keys(), u32())
row("random_fold_in batch", jax.vmap(jax.random.fold_in), keys(4), u32(4))
row("random_seed", jax.vmap(jax.random.key), i32(4))
row("random_wrap", jax.random.wrap_key_data, u32(4, 2))
row("random_unwrap", jax.random.key_data, keys(4))
row("random_clone", jax.random.clone, keys(4))
row("random_gamma", lambda k, a: jax.random.gamma(k, a, (4, 6)), keys(), f32(4, 6, low=1), tolerance=1e-4)
row("reshape keys", lambda k: k.reshape(4, 2), keys(8))
row("threefry2x32", extend_random.threefry2x32_p.bind, *[u32(4, 6)] * 4)

# --- what stays whole --------------------------------------------------------------------------------------

out = jax.ShapeDtypeStruct((4, 6), jnp.float32)
row("pure_callback", lambda x: jax.pure_callback(np.sin, out, x), f32(4, 6))
row("debug_callback", lambda x: jax.debug.callback(lambda x: None, x), f32(4, 6))
