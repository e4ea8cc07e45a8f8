"""Ops one by one: each step has a loss over some of them, and results of other dtypes beside it."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jax.experimental import pallas as pl
from jax.extend import core
from jax.interpreters import mlir
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from programs import Array, Case, _foreign_mesh, descend, values, weights

from conformance.harness import idiom


@idiom()
def sorts_and_scans() -> Case:
    def step(w: Array, x: Array) -> tuple[Any, ...]:
        def loss(w: Array) -> Array:
            h = x @ w
            total = jnp.sort(h, axis=-1)[:, ::2].sum() + lax.cumsum(h, axis=1).mean() + lax.cumlogsumexp(h).mean()
            total += lax.cummax(h, axis=1).mean() + lax.cumprod(jnp.tanh(h), axis=0, reverse=True).mean()
            top, index = lax.top_k(h, 3)
            return total / 16 + (top * index).mean()

        new, value = descend(w, loss)
        ranked = jnp.lexsort((x[:, 0], x[:, 1] > 0))
        return (
            new,
            value,
            ranked,
            jnp.argsort(x, axis=0, descending=True),
            jnp.median(x, axis=1),
            jnp.unique((x > 0).astype(jnp.int32), size=2),
        )

    return Case(step=step, args=(weights(16, 16), values(16, 16)), carries=0)


@idiom()
def quantiles_histograms_and_searches() -> Case:
    def step(x: Array) -> tuple[Array, ...]:
        edges = jnp.linspace(-3, 3, 9)
        return (
            jnp.quantile(x, jnp.array([0.1, 0.9]), axis=0),
            jnp.histogram(x, edges)[0],
            jnp.searchsorted(edges, x),
            jnp.digitize(x, edges),
            jnp.bincount(jnp.clip(x[:, 0] + 3, 0, 7).astype(jnp.int32), length=8),
            jnp.nonzero(x[:, 0] > 0, size=8, fill_value=-1)[0],
            jnp.percentile(x, 50),
        )

    return Case(step=step, args=(values(16, 16),))


@idiom()
def convolutions_of_all_kinds() -> Case:
    def step(params: Any, x: Array) -> tuple[Any, Array]:
        def conv(x: Array, w: Array, **options: Any) -> Array:
            return lax.conv_general_dilated(
                x, w, options.pop("strides", (1, 1)), options.pop("padding", "SAME"),
                dimension_numbers=("NHWC", "HWIO", "NHWC"), **options,
            )  # fmt: skip

        def loss(params: Any) -> Array:
            h = conv(x, params["plain"], strides=(2, 2))
            h = jax.nn.relu(conv(h, params["dilated"], rhs_dilation=(2, 2)))
            h = conv(h, params["depthwise"], feature_group_count=8)
            h = jax.nn.relu(conv(h, params["grouped"], feature_group_count=2))
            h = lax.conv_transpose(h, params["transposed"], (2, 2), "SAME")
            h = conv(h, params["up"], lhs_dilation=(2, 2), padding=((2, 1), (1, 2)))
            h = lax.reduce_window(h, -jnp.inf, lax.max, (1, 3, 3, 1), (1, 2, 2, 1), "SAME")
            h = lax.reduce_window(h, 0.0, lax.add, (1, 2, 2, 1), (1, 2, 2, 1), "VALID")
            return (h**2).mean()

        return descend(params, loss)

    kernels = {
        "plain": values(3, 3, 4, 8), "dilated": values(3, 3, 8, 8), "depthwise": values(3, 3, 1, 8),
        "grouped": values(3, 3, 4, 8), "transposed": values(3, 3, 8, 8), "up": values(3, 3, 8, 4),
    }  # fmt: skip
    return Case(step=step, args=(jax.tree.map(lambda k: k / 6, kernels), values(8, 16, 16, 4)), carries=0)


@idiom()
def convolutions_in_one_and_three_dimensions() -> Case:
    def step(params: Any, series: Array, volume: Array) -> tuple[Any, Array]:
        def loss(params: Any) -> Array:
            a = lax.conv_general_dilated(series, params[0], (1,), ((2, 0),), dimension_numbers=("NWC", "WIO", "NWC"))
            b = lax.conv(volume, params[1], (1, 1, 1), "SAME")
            patches = lax.conv_general_dilated_patches(volume[:, :, 0], (2, 2), (2, 2), "VALID")
            return (a**2).mean() + (b**2).mean() + patches.mean() * params[1].mean()

        return descend(params, loss)

    params = (values(3, 8, 16) / 5, values(4, 2, 3, 3, 3) / 7)
    return Case(step=step, args=(params, values(8, 16, 8), values(8, 2, 4, 8, 8)), carries=0)


@idiom()
def resized_and_augmented_images() -> Case:
    def step(x: Array, key: Array) -> tuple[Array, ...]:
        keys = jax.random.split(key, x.shape[0])

        def one(key: Array, image: Array) -> Array:
            padded = jnp.pad(image, ((2, 2), (2, 2), (0, 0)), mode="reflect")
            corner = jax.random.randint(key, (2,), 0, 5)
            image = lax.dynamic_slice(padded, (*corner, 0), image.shape)
            return jnp.where(jax.random.bernoulli(key), image[:, ::-1], image)

        cropped = jax.vmap(one)(keys, x)
        large = jax.image.resize(cropped, (8, 16, 16, 3), "bilinear")
        return cropped, large, jnp.roll(jnp.rot90(x, axes=(1, 2)), 3, axis=1)

    return Case(step=step, args=(values(8, 8, 8, 3), jax.random.key(0)))


@idiom()
def attention_and_einsum() -> Case:
    def step(params: Any, x: Array, lengths: Array) -> tuple[Any, Array]:
        def loss(params: Any) -> Array:
            q = jnp.einsum("btd,dhk->bthk", x, params["q"])
            k, v = jnp.einsum("btd,sdgk->sbtgk", x, params["kv"])
            h = jax.nn.dot_product_attention(q, k, v, is_causal=True)  # grouped queries
            mask = (jnp.arange(16) < lengths[:, None])[:, None, None]
            h += jax.nn.dot_product_attention(q, k, v, mask=mask, local_window_size=(4, 4))
            out = jnp.einsum("bthk,hkd->btd", h, params["o"])
            return (out**2 * jax.nn.one_hot(lengths, 16)[:, :, None]).mean()

        return descend(params, loss)

    params = {"q": weights(16, 4, 8) / 2, "kv": weights(2, 16, 2, 8) / 2, "o": weights(4, 8, 16) / 2}
    return Case(step=step, args=(params, values(8, 16, 16), jnp.arange(8) + 3), carries=0)


@idiom()
def linear_algebra_with_gradients() -> Case:
    def step(w: Array, x: Array) -> tuple[Any, ...]:
        def loss(w: Array) -> Array:
            a = jnp.einsum("bij,bkj->bik", x * w, x * w) + 4 * jnp.eye(8)
            low = jnp.linalg.cholesky(a)
            solved = jax.scipy.linalg.solve_triangular(low, x, lower=True)
            q, r = jnp.linalg.qr(x + 3 * jnp.eye(8))
            total = (solved**2).mean() + jnp.linalg.slogdet(a)[1].mean() + jnp.linalg.solve(a, x).mean()
            total += (jnp.abs(r) * w).mean() + (jnp.linalg.eigh(a)[0] ** 2).mean() / 100
            return total + jnp.linalg.svd(a, compute_uv=False).mean() + jnp.linalg.inv(a).mean() + jnp.trace(q[0])

        new, value = descend(w, loss)
        return (
            new,
            value,
            jnp.linalg.norm(x, axis=(1, 2)),
            jax.scipy.linalg.expm(x / 8),
            jnp.linalg.matrix_power(x / 8, 3),
        )

    return Case(step=step, args=(jnp.ones((8, 8)), values(8, 8, 8)), carries=0)


@idiom()
def kalman_filter() -> Case:
    def step(params: Any, observed: Array) -> tuple[Any, Array]:
        def loss(params: Any) -> Array:
            def one(carry: Any, y: Array) -> Any:
                mean, cov = carry
                mean, cov = params["f"] @ mean, params["f"] @ cov @ params["f"].T + 0.1 * jnp.eye(4)
                s = params["h"] @ cov @ params["h"].T + 0.5 * jnp.eye(2)
                gain = jax.scipy.linalg.solve(s, params["h"] @ cov, assume_a="pos").T
                error = y - params["h"] @ mean
                likelihood = jax.scipy.stats.multivariate_normal.logpdf(error, jnp.zeros(2), s)
                return (mean + gain @ error, cov - gain @ params["h"] @ cov), likelihood

            filtered = jax.vmap(lambda ys: lax.scan(one, (jnp.zeros(4), jnp.eye(4)), ys)[1])
            return -filtered(observed).mean()

        return descend(params, loss)

    params = {"f": jnp.eye(4) * 0.9, "h": jnp.ones((2, 4)) / 3 + jnp.eye(2, 4)}
    return Case(step=step, args=(params, values(16, 6, 2)), carries=0)


@idiom()
def spectral_convolution() -> Case:
    """A Fourier neural operator's layer: real transforms, complex weights as two arrays."""

    def step(params: Any, x: Array) -> tuple[Any, Array]:
        def loss(params: Any) -> Array:
            modes = jnp.fft.rfft2(x, axes=(1, 2))[:, :4, :4]
            mixed = jnp.einsum("bxyi,xyio->bxyo", modes, params["re"] + 1j * params["im"])
            full = jnp.zeros((x.shape[0], 8, 5, 16), jnp.complex64).at[:, :4, :4].set(mixed)
            back = jnp.fft.irfft2(full, s=(8, 8), axes=(1, 2))
            return (jax.nn.gelu(back + x @ params["w"]) ** 2).mean() + jnp.abs(jnp.fft.fft(x, axis=1)).mean()

        return descend(params, loss)

    params = {"re": values(4, 4, 8, 16) / 8, "im": values(4, 4, 8, 16, seed=1) / 8, "w": weights(8, 16)}
    return Case(step=step, args=(params, values(8, 8, 8, 8)), carries=0)


@idiom()
def distributions() -> Case:
    def step(key: Array, raw: Array, w: Array) -> tuple[Any, ...]:
        keys = jax.random.split(key, 16)
        drawn = [
            jax.random.normal(keys[0], (16, 8)),
            jax.random.truncated_normal(keys[1], -1, 1, (16, 8)),
            jax.random.categorical(keys[2], w, axis=-1),
            jax.random.gumbel(keys[3], (16, 8), jnp.bfloat16),
            jax.random.bernoulli(keys[4], 0.3, (16, 8)),
            jax.random.randint(keys[5], (16, 8), 0, 100),
            jax.random.permutation(keys[6], 16),
            jax.random.choice(keys[7], 16, (8,), replace=False),
            jax.random.exponential(keys[8], (16, 8)),
            jax.random.gamma(keys[9], 2.0, (16,)),
            jax.random.beta(keys[10], 2.0, 3.0, (16,)),
            jax.random.dirichlet(keys[11], jnp.ones(8), (16,)),
            jax.random.poisson(keys[12], 3.0, (16,)),
            jax.random.multivariate_normal(keys[13], jnp.zeros(4), jnp.eye(4), (16,)),
            jax.random.orthogonal(keys[14], 8),
            jax.random.uniform(raw, (16, 8)),
        ]
        return drawn, jax.random.split(raw)[0], jax.random.key_data(keys[15])

    return Case(step=step, args=(jax.random.key(0), jax.random.PRNGKey(4), values(16, 8)))


@idiom()
def integers_and_booleans() -> Case:
    def step(ids: Array, mask: Array) -> tuple[Array, ...]:
        packed = jnp.packbits(mask, axis=1)
        return (
            packed,
            jnp.unpackbits(packed, axis=1),
            (ids << 2) ^ (ids >> 1),
            lax.population_count(ids),
            lax.clz(ids),
            jnp.bitwise_count(ids) % 3 == 0,
            mask.any(0) & ~mask.all(1)[0],
            ids // 3,
            lax.bitcast_convert_type(ids, jnp.float32).astype(jnp.uint8),
            jnp.cumsum(mask, axis=1) * mask,
            jnp.argmax(mask, axis=1),
            ids.astype(jnp.int8).sum(dtype=jnp.int8),
        )

    return Case(step=step, args=(values(16, 8, dtype="int32"), values(16, 16) > 0))


@idiom(compare_as="float16")  # what rounds to another eighth bit after a sum in another order moves all that follows
def eight_bit_dots() -> Case:
    """Quantization-aware training: int8 and fp8 with scales, gradients straight through."""

    def quantized(x: Array) -> tuple[Array, Array]:
        scale = jnp.abs(x).max() / 127
        return jnp.round(x / scale).astype(jnp.int8), scale

    @jax.custom_vjp
    def dot(x: Array, w: Array) -> Array:
        (a, s), (b, t) = quantized(x), quantized(w)
        return lax.dot(a, b, preferred_element_type=jnp.int32).astype(jnp.float32) * s * t

    def backward(saved: Any, g: Array) -> Any:
        x, w = saved
        return g @ w.T, x.T @ g

    dot.defvjp(lambda x, w: (dot(x, w), (x, w)), backward)

    def fp8(x: Array) -> Array:
        return x + lax.stop_gradient(x.astype(jnp.float8_e4m3fn).astype(x.dtype) - x)

    def step(state: Any, x: Array) -> tuple[Any, Array]:
        def loss(params: Any) -> Array:
            h = jax.nn.relu(dot(x, params["a"]))
            h = fp8(h / state["amax"]) @ fp8(params["b"]) * state["amax"]
            w8 = state["frozen"].astype(jnp.bfloat16)
            return ((h.astype(jnp.bfloat16) @ w8).astype(jnp.float32) ** 2).mean() / 1000

        params, value = descend(state["params"], loss)
        amax = jnp.maximum(state["amax"] * 0.9, jnp.abs(x).max())
        return {**state, "params": params, "amax": amax}, value

    state = {
        "params": {"a": weights(16, 32), "b": weights(32, 16)},
        "frozen": weights(16, 16).astype(jnp.float8_e5m2),
        "amax": jnp.float32(1.0),
    }
    # A sum's rounding moves an element to the next of 256 steps.
    return Case(step=step, args=(state, values(16, 16)))


@idiom()
def ragged_batches() -> Case:
    """Masked means, packed segments, and groups of rows of different lengths."""

    def step(params: Any, x: Array, lengths: Array, segments: Array) -> tuple[Any, Array, Array]:
        def loss(params: Any) -> Array:
            h = jnp.tanh(x @ params["w"])
            mask = jnp.arange(x.shape[1]) < lengths[:, None]
            masked = (h * mask[..., None]).sum(1) / jnp.maximum(mask.sum(1, keepdims=True), 1)
            flat = h.reshape(-1, h.shape[-1])
            summed = jax.ops.segment_sum(flat, segments, num_segments=8, indices_are_sorted=True)
            largest = jax.ops.segment_max(flat, segments, num_segments=8)
            same = segments[:, None] == segments[None]
            weights = jax.nn.softmax(jnp.where(same, flat @ flat.T, -1e9))
            rows = lax.ragged_dot(flat, params["experts"], jnp.bincount(segments, length=8).astype(jnp.int32))
            return (masked**2).mean() + summed.var() + largest.mean() + (weights @ flat).mean() + (rows**2).mean()

        new, value = descend(params, loss)
        return new, value, jax.ops.segment_sum(jnp.ones_like(segments), segments, 8)

    params = {"w": weights(16, 16), "experts": weights(8, 16, 16)}
    segments = jnp.sort(values(128, dtype="int32"))
    return Case(step=step, args=(params, values(8, 16, 16), jnp.arange(8) * 2 + 1, segments), carries=0)


@idiom()
def gathers_and_scatters_of_all_kinds() -> Case:
    def step(table: Array, ids: Array, x: Array) -> tuple[Any, ...]:
        def loss(table: Array) -> Array:
            rows = jnp.take(table, ids, axis=0, mode="clip")
            picked = jnp.take_along_axis(rows, ids[..., None] % 16, axis=-1)
            grid = table[ids[:, :1], jnp.arange(8)[None]]
            return (rows**2).mean() + picked.sum() + jnp.sin(grid).mean() + table[::2, 1:5].sum() + table[-1].mean()

        new, value = descend(table, loss)
        return (
            new,
            value,
            x.at[ids[:, 0]].add(1.0),
            x.at[:, 3].mul(2.0),
            x.at[ids[:, 1], ids[:, 2]].max(0.5),
            x.at[jnp.arange(8), ids[:, 0]].set(0.0, mode="drop"),
            x.at[2:6, ::3].min(0.1),
            jnp.where(x > 0)[0].shape[0] if False else jnp.diag(x),
            x.at[ids[:, 0]].get(mode="fill", fill_value=-1),
        )

    return Case(step=step, args=(values(16, 16), values(8, 4, dtype="int32"), values(8, 16)), carries=0)


@idiom()
def padding_slicing_and_stacking() -> Case:
    def step(w: Array, x: Array) -> tuple[Any, ...]:
        def loss(w: Array) -> Array:
            h = jnp.concatenate([x @ w, x[:, :4], jnp.zeros((16, 4))], axis=1)
            h = jnp.stack(jnp.split(h, 4, axis=1), axis=2).swapaxes(0, 1)
            h = lax.pad(h, 0.0, ((1, -1, 0), (0, 0, 0), (0, 0, 1)))
            h = jnp.tile(h, (1, 1, 2)).reshape(6, 16, 14).transpose(1, 0, 2)[:, ::-1]
            h = jnp.repeat(h, 2, axis=0)[1::2] + jnp.flip(h, 0)
            return (h**2).mean()

        new, value = descend(w, loss)
        return new, value, jnp.tril(x), jnp.triu_indices(4)[0], jnp.kron(x[:2, :2], x[:4, :4]), x.reshape(-1)[3:11]

    return Case(step=step, args=(weights(16, 16), values(16, 16)), carries=0)


@idiom()
def callbacks() -> Case:
    seen: list[float] = []

    def step(w: Array, x: Array) -> tuple[Any, Array, Array]:
        new, value = descend(w, lambda w: (jnp.tanh(x @ w) ** 2).mean())
        jax.debug.print("loss {v}", v=value)
        jax.debug.callback(lambda v: seen.append(float(v)), value)
        counted = jax.pure_callback(
            lambda a: np.asarray((a > 0).sum(1), np.int32), jax.ShapeDtypeStruct((16,), np.int32), x
        )
        told = jax.experimental.io_callback(
            lambda a: np.float32(a * 2), jax.ShapeDtypeStruct((), np.float32), value, ordered=True
        )
        return new, counted, told

    return Case(step=step, args=(weights(16, 16), values(16, 16)), carries=0)


@idiom()
def rematerialization_policies() -> Case:
    policies = jax.checkpoint_policies
    named = policies.save_only_these_names("hidden")

    def step(params: list[Array], x: Array) -> tuple[Any, Array]:
        def layer(h: Array, w: Array) -> Array:
            h = checkpoint_name(h @ w, "hidden")
            return jnp.tanh(h) * jax.nn.sigmoid(h)

        def loss(params: list[Array]) -> Array:
            h = x
            kinds = (policies.dots_saveable, named, policies.dots_with_no_batch_dims_saveable, None)
            for w, policy in zip(params, kinds, strict=True):
                h = jax.checkpoint(layer, policy=policy)(h, w)
            h = jax.lax.optimization_barrier(h)
            offloaded = policies.save_and_offload_only_these_names(
                names_which_can_be_saved=["hidden"],
                names_which_can_be_offloaded=[],
                offload_src="device",
                offload_dst="pinned_host",
            )
            return (jax.checkpoint(layer, policy=offloaded)(h, params[0]) ** 2).mean()

        return descend(params, loss)

    return Case(step=step, args=([weights(16, 16, seed=i) for i in range(4)], values(16, 16)), carries=0)


@idiom()
def custom_derivatives() -> Case:
    @jax.custom_jvp
    def softclip(x: Array) -> Array:
        return jnp.clip(x, -1, 1)

    @softclip.defjvp
    def _(primals: Any, tangents: Any) -> Any:
        (x,), (t,) = primals, tangents
        return softclip(x), t * jnp.where(jnp.abs(x) < 1, 1.0, 0.1)

    @jax.custom_vjp
    def reversed_gradient(x: Array, scale: Array) -> Array:
        return x

    reversed_gradient.defvjp(lambda x, s: (x, s), lambda s, g: (-s * g, jnp.zeros_like(s)))

    @jax.custom_batching.custom_vmap
    def doubled(x: Array) -> Array:
        return x * 2

    @doubled.def_vmap
    def _(size: int, batched: Any, x: Array) -> Any:
        return jnp.concatenate([x, x], -1).reshape(size, 2, -1).sum(1), True

    def step(w: Array, x: Array) -> tuple[Any, Array, Array]:
        def loss(w: Array) -> Array:
            h = reversed_gradient(softclip(x @ w), jnp.float32(0.5))
            solved = jax.lax.custom_linear_solve(
                lambda v: 3 * v + 0.1 * jnp.roll(v, 1, 0), h, lambda mv, b: b / 3, lambda mv, b: b / 3
            )
            return (solved**2).mean() + jax.scipy.special.logsumexp(h) + jax.nn.gelu(h).mean()

        new, value = descend(w, loss)
        return new, value, jax.vmap(doubled)(x)

    return Case(step=step, args=(weights(16, 16), values(16, 16)), carries=0)


@idiom()
def primitives_of_a_library() -> Case:
    """A loop inside a primitive of one's own, beside a batched scan over shared decays: its last halves are empty."""
    solve = core.Primitive("conformance_solve")

    def newton(x: Array) -> Array:
        return lax.while_loop(lambda c: c[0] < 4, lambda c: (c[0] + 1, c[1] - 0.5 * (c[1] ** 3 - x)), (0, x))[1]

    def decayed(row: Array) -> Array:
        decay = jnp.linspace(0.1, 0.9, 16)
        return lax.associative_scan(lambda a, b: (a[0] * b[0], b[0] * a[1] + b[1]), (decay, row))[1]

    solve.def_abstract_eval(lambda x: x)
    mlir.register_lowering(solve, mlir.lower_fun(newton, multiple_results=False))

    def step(w: Array, x: Array) -> tuple[Array, Array]:
        def loss(w: Array) -> Array:
            h = jnp.tanh(x @ w)
            root = h + lax.stop_gradient(solve.bind(lax.stop_gradient(h)) - h)
            return (jax.vmap(decayed)(root) ** 2).mean()

        return descend(w, loss)

    return Case(step=step, args=(weights(16, 16), values(16, 16)), carries=0)


@idiom()
def physics_informed() -> Case:
    """Second derivatives by `jvp` of `grad`, hessians, jacobians."""

    def step(params: Any, points: Array) -> tuple[Any, Array]:
        def u(params: Any, p: Array) -> Array:
            return (jnp.tanh(jnp.tanh(p @ params["a"]) @ params["b"]) @ params["c"])[0]

        def loss(params: Any) -> Array:
            f = functools.partial(u, params)
            laplacian = jax.vmap(lambda p: jnp.trace(jax.hessian(f)(p)))(points)
            along = jax.vmap(lambda p: jax.jvp(jax.grad(f), (p,), (jnp.array([1.0, 0.0]),))[1][0])(points)
            jacobian = jax.vmap(jax.jacfwd(lambda p: jnp.tanh(p @ params["a"])))(points)
            return ((laplacian - 1) ** 2).mean() + (along**2).mean() + (jacobian**2).mean()

        return descend(params, loss)

    params = {"a": weights(2, 16), "b": weights(16, 16), "c": weights(16, 1)}
    return Case(step=step, args=(params, values(16, 2)), carries=0)


@idiom(warns="'pallas_call'")
def pallas_kernel() -> Case:
    """Interpreted: without a rule of its own it runs whole."""

    def kernel(x_ref: Any, y_ref: Any, o_ref: Any) -> None:
        o_ref[...] = jnp.tanh(x_ref[...]) * y_ref[...]

    def multiplied(x: Array, y: Array) -> Array:
        shape = jax.ShapeDtypeStruct(x.shape, x.dtype)
        spec = pl.BlockSpec((8, 16), lambda i: (i, 0))
        return pl.pallas_call(
            kernel, out_shape=shape, grid=(2,), in_specs=[spec, spec], out_specs=spec, interpret=True
        )(x, y)

    def step(w: Array, x: Array) -> tuple[Array, Array]:
        h = multiplied(x @ w, x)
        return h, jnp.tanh(h @ w)

    return Case(step=step, args=(weights(16, 16), values(16, 16)))


@idiom(warns="sharding constraints of its own")
def constraints_on_a_mesh_of_its_own() -> Case:
    mesh = _foreign_mesh((2, 4), ("data", "model"))

    def step(params: Any, x: Array) -> tuple[Any, Array]:
        def loss(params: Any) -> Array:
            h = lax.with_sharding_constraint(x @ params["up"], NamedSharding(mesh, P("data", "model")))
            return (
                lax.with_sharding_constraint(jax.nn.relu(h) @ params["down"], NamedSharding(mesh, P("data"))) ** 2
            ).mean()

        return descend(params, loss)

    return Case(step=step, args=({"up": weights(16, 32), "down": weights(32, 16)}, values(16, 16)), carries=0)


@idiom()
def odd_pytrees() -> Case:
    """None leaves, Python numbers, empty containers, zero-size arrays, results that are constants or arguments."""

    def step(state: dict[str, Any], x: Array, options: Any) -> tuple[Any, Array, Any]:
        scale = 1.0 if options["scale"] is None else options["scale"]
        grads = jax.grad(lambda w: ((x @ w) ** 2).mean() * scale)(state["w"])
        new = {**state, "w": state["w"] - state["rate"] * grads, "count": state["count"] + 1}
        return new, jnp.zeros((0, 4)), {"constant": 3, "same": x, "empty": (), "none": None, "text": state["flag"]}

    state = {
        "w": weights(16, 16), "rate": 0.1, "count": 0, "flag": True, "empty": {}, "none": None,
        "zero": jnp.zeros((0, 16)), "numpy": np.float32(2), "key": jax.random.key(0),
    }  # fmt: skip
    return Case(step=step, args=(state, values(16, 16), {"scale": None}), carries=0)


@idiom()
def static_and_donated_arguments() -> Case:
    def step(config: tuple[int, str], state: Any, x: Array, *, train: bool) -> tuple[Any, Any]:
        layers, kind = config
        activation = {"relu": jax.nn.relu, "tanh": jnp.tanh}[kind]

        def loss(state: Any) -> Array:
            h = x
            for _ in range(layers):
                h = activation(h @ state)
            return (h**2).mean() * train

        new, value = descend(state, loss)
        return value, new

    return Case(
        step=step,
        args=((2, "tanh"), weights(16, 16), values(16, 16)),
        kwargs={"train": True},
        static_argnums=(0,),
        donate_argnums=(1,),
    )


@idiom()
def ctc_and_detection_losses() -> Case:
    import optax

    def step(w: Array, x: Array, labels: Array, boxes: Array) -> tuple[Any, Array, Array]:
        def loss(w: Array) -> Array:
            logits = x @ w
            paddings = jnp.zeros(logits.shape[:2])
            ctc = optax.ctc_loss(logits, paddings, labels, (labels == 0).astype(jnp.float32)).mean()
            return ctc + optax.sigmoid_focal_loss(logits[:, 0], jax.nn.one_hot(labels[:, 0], 8)).mean()

        def suppressed(boxes: Array, scores: Array) -> Array:
            """Greedy non-maximum suppression of 1-D intervals."""
            low = jnp.maximum(boxes[:, None, 0], boxes[None, :, 0])
            high = jnp.minimum(boxes[:, None, 1], boxes[None, :, 1])
            overlap = jnp.maximum(high - low, 0)

            def one(_: Array, carry: Any) -> Any:
                scores, keep = carry
                best = scores.argmax()
                keep = keep.at[best].set(scores[best] > 0)
                return jnp.where(overlap[best] > 0.5, -1.0, scores), keep

            return lax.fori_loop(0, 4, one, (scores, jnp.zeros(len(scores), bool)))[1]

        new, value = descend(w, loss)
        scores = jax.nn.sigmoid(x[:, :, 0])
        return new, value, jax.vmap(suppressed)(boxes, scores)

    boxes = jnp.sort(values(8, 12, 2), axis=-1)
    return Case(step=step, args=(weights(16, 8), values(8, 12, 16), values(8, 4, dtype="int32"), boxes), carries=0)


@idiom()
def narrow_types() -> Case:
    def step(x: Array, y: Array) -> tuple[Array, ...]:
        small = x.astype(jnp.float8_e4m3fn)
        wide = lax.dot_general(
            small, y.astype(jnp.float8_e5m2), (((1,), (0,)), ((), ())), preferred_element_type=jnp.float32
        )
        four = jnp.clip(x, -7, 7).astype(jnp.int4)
        return small, wide, four, four.astype(jnp.float32) @ y, x.astype(jnp.float16).sum(0), jnp.frexp(x)[1]

    return Case(step=step, args=(values(16, 16), values(16, 16, seed=1)))


@idiom()
def sparse_products() -> Case:
    """They lower to a gather, a product and a scatter, of which the gather sums up rows that are no result."""
    from jax.experimental import sparse

    matrix = sparse.BCOO.fromdense(jnp.where(values(16, 16) > 0.5, values(16, 16), 0.0))

    def step(w: Array, matrix: sparse.BCOO, x: Array) -> tuple[Array, Array]:
        return descend(w, lambda w: ((matrix @ (x @ w)) ** 2).mean())

    return Case(step=step, args=(weights(8, 4), matrix, values(16, 8)), carries=0)


@idiom()
def target_network_that_starts_as_the_network() -> Case:
    """The same arrays twice in a donated state, which is a named tuple and the whole result."""

    class Networks(NamedTuple):
        online: Any
        target: Any

    def step(nets: Networks, x: Array) -> Networks:
        def loss(w: Any) -> Array:
            return (
                (jnp.tanh(x @ w[0]) @ w[1] - jax.lax.stop_gradient(jnp.tanh(x @ nets.target[0])[:, :8])) ** 2
            ).mean()

        online = jax.tree.map(lambda w, g: w - 0.1 * g, nets.online, jax.grad(loss)(nets.online))
        return Networks(online, jax.tree.map(lambda t, w: 0.9 * t + 0.1 * w, nets.target, online))

    shared = [weights(16, 32), weights(32, 8)]
    return Case(step=step, args=(Networks(shared, shared), values(16, 16)), carries=0, donate_argnums=(0,))
