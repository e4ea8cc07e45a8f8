"""Loops, branches, precision and the shapes of whole programs."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from programs import Array, Case, descend, values, weights

from conformance.harness import idiom
from conformance.optimizers import batch, loss_fn, mlp_params


@idiom(compare_as="float16")
def loss_scaling_with_a_cond() -> Case:
    """float16 gradients, scaled; a step whose gradients are not finite is skipped and halves the scale."""

    def step(state: Any, batch: Any) -> tuple[Any, Array]:
        def scaled(params: Any) -> Array:
            half = jax.tree.map(lambda p: p.astype(jnp.float16), params)
            return loss_fn(half, batch).astype(jnp.float32) * state["scale"]

        loss, grads = jax.value_and_grad(scaled)(state["params"])
        grads = jax.tree.map(lambda g: g / state["scale"], grads)
        finite = jnp.all(jnp.array([jnp.isfinite(g).all() for g in jax.tree.leaves(grads)]))

        def apply(state: Any) -> Any:
            params = jax.tree.map(lambda p, g: p - 0.1 * g, state["params"], grads)
            grown = state["good"] >= 1
            scale = jnp.where(grown, state["scale"] * 2, state["scale"])
            return {"params": params, "scale": scale, "good": jnp.where(grown, 0, state["good"] + 1)}

        def skip(state: Any) -> Any:
            return {**state, "scale": state["scale"] / 2, "good": jnp.int32(0)}

        return jax.lax.cond(finite, apply, skip, state), loss / state["scale"]

    state = {"params": mlp_params(), "scale": jnp.float32(2.0**14), "good": jnp.int32(0)}
    half = {k: v.astype(jnp.float16) if v.dtype == jnp.float32 else v for k, v in batch().items()}
    return Case(step=step, args=(state, half), carries=0)


@idiom()
def accumulated_gradients() -> Case:
    """Microbatches by scan; a global norm over the mean."""

    def step(params: Any, data: Any) -> tuple[Any, Array]:
        def micro(total: Any, part: Any) -> tuple[Any, Array]:
            loss, grads = jax.value_and_grad(loss_fn)(params, part)
            return jax.tree.map(jnp.add, total, grads), loss

        parts = jax.tree.map(lambda a: a.reshape(4, -1, *a.shape[1:]), data)
        grads, losses = jax.lax.scan(micro, jax.tree.map(jnp.zeros_like, params), parts)
        norm = optax.global_norm(grads)
        scale = jnp.minimum(1.0, 1.0 / norm)
        return jax.tree.map(lambda p, g: p - 0.1 * scale * g / 4, params, grads), losses.mean()

    data = {"x": values(64, 16), "y": values(64, dtype="int32")}
    return Case(step=step, args=(mlp_params(), data), carries=0)


@idiom(compare_as="bfloat16")
def lora() -> Case:
    def step(adapters: Any, base: Any, x: Array, y: Array) -> tuple[Any, Array]:
        def loss(adapters: Any) -> Array:
            h = x
            for w, (a, b) in zip(base, adapters, strict=True):
                h = jnp.tanh(h @ w.astype(jnp.float32) + (h @ a) @ b * 0.5)
            return ((h - y) ** 2).mean()

        return descend(adapters, loss)

    base = [weights(16, 16, seed=i).astype(jnp.bfloat16) for i in range(3)]
    adapters = [(weights(16, 4, seed=i), jnp.zeros((4, 16))) for i in range(3)]
    return Case(step=step, args=(adapters, base, values(16, 16), values(16, 16, seed=2)), carries=0)


@idiom()
def lstm_over_time() -> Case:
    def step(params: Any, x: Array) -> tuple[Any, Array]:
        def loss(params: Any) -> Array:
            def cell(carry: tuple[Array, Array], v: Array) -> tuple[Any, Array]:
                h, c = carry
                i, f, g, o = jnp.split(v @ params["w"] + h @ params["u"] + params["b"], 4, axis=-1)
                c = jax.nn.sigmoid(f + 1) * c + jax.nn.sigmoid(i) * jnp.tanh(g)
                h = jax.nn.sigmoid(o) * jnp.tanh(c)
                return (h, c), h

            zeros = jnp.zeros((x.shape[0], 16))
            _, out = jax.lax.scan(cell, (zeros, zeros), jnp.swapaxes(x, 0, 1), unroll=2)
            return (out**2).mean()

        return descend(params, loss)

    params = {"w": weights(8, 64), "u": weights(16, 64), "b": jnp.zeros(64)}
    return Case(step=step, args=(params, values(16, 10, 8)), carries=0)


@idiom()
def state_space_by_associative_scan() -> Case:
    def step(params: Any, x: Array) -> tuple[Any, Array]:
        def loss(params: Any) -> Array:
            u = x @ params["in"]
            decay = jax.nn.sigmoid(x @ params["decay"])

            def combine(a: Any, b: Any) -> Any:
                return a[0] * b[0], b[0] * a[1] + b[1]

            _, h = jax.lax.associative_scan(combine, (decay, (1 - decay) * u), axis=1)
            return ((h @ params["out"] - x) ** 2).mean()

        return descend(params, loss)

    params = {"in": weights(8, 16), "decay": weights(8, 16, seed=2), "out": weights(16, 8)}
    return Case(step=step, args=(params, values(8, 16, 8)), carries=0)


@idiom()
def linear_recurrence_in_complex_numbers() -> Case:
    """An LRU: the state is complex, parameters are not."""

    def step(params: Any, x: Array) -> tuple[Any, Array]:
        def loss(params: Any) -> Array:
            decay = jnp.exp(-jnp.exp(params["nu"]) + 1j * jnp.exp(params["theta"]))
            u = x @ (params["re"] + 1j * params["im"])

            def combine(a: Any, b: Any) -> Any:
                return a[0] * b[0], b[0] * a[1] + b[1]

            _, h = jax.lax.associative_scan(combine, (jnp.broadcast_to(decay, u.shape), u), axis=1)
            return (jnp.abs(h @ params["out"].astype(jnp.complex64)) ** 2).mean() + h.real.mean()

        return descend(params, loss)

    params = {
        "nu": values(16) / 4 - 1,
        "theta": values(16, seed=3) / 4,
        "re": weights(8, 16),
        "im": weights(8, 16, seed=2),
        "out": weights(16, 8),
    }
    return Case(step=step, args=(params, values(8, 8, 8)), carries=0)


@idiom()
def while_loop_to_a_fixed_point() -> Case:
    """A deep equilibrium model: its gradient is a second loop, through a custom_vjp."""

    @functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
    def fixed_point(f: Any, params: Any, x: Array) -> Array:
        def go_on(carry: Any) -> Array:
            last, z, i = carry
            return (jnp.abs(z - last).max() > 1e-3) & (i < 20)

        def advance(carry: Any) -> Any:
            _, z, i = carry
            return z, f(params, x, z), i + 1

        start = jnp.zeros_like(x)
        return jax.lax.while_loop(go_on, advance, (start, f(params, x, start), 0))[1]

    def forward(f: Any, params: Any, x: Array) -> Any:
        z = fixed_point(f, params, x)
        return z, (params, x, z)

    def backward(f: Any, saved: Any, cotangent: Array) -> Any:
        params, x, z = saved
        _, vjp_z = jax.vjp(lambda z: f(params, x, z), z)
        _, vjp = jax.vjp(lambda p, x: f(p, x, z), params, x)
        solved = fixed_point(lambda g, c, u: vjp_z(u)[0] + c, None, cotangent) if False else cotangent
        for _ in range(5):
            solved = vjp_z(solved)[0] + cotangent
        return vjp(solved)

    fixed_point.defvjp(forward, backward)

    def step(params: Any, x: Array) -> tuple[Any, Array]:
        def loss(params: Any) -> Array:
            z = fixed_point(lambda p, x, z: jnp.tanh(0.3 * z @ p["w"] + x @ p["u"]), params, x)
            return (z**2).mean()

        return descend(params, loss)

    return Case(step=step, args=({"w": weights(16, 16), "u": weights(16, 16, seed=2)}, values(16, 16)), carries=0)


@idiom()
def generation_with_a_cache() -> Case:
    """Prefill, then a while loop that samples one token, writes its keys and values in place, and may end early."""

    def step(params: Any, prompt: Array, key: Array) -> tuple[Array, Array, Array]:
        n, length, total, width = prompt.shape[0], prompt.shape[1], 16, 16

        def attend(q: Array, k: Array, v: Array, until: Array) -> Array:
            scores = jnp.einsum("bqd,bkd->bqk", q, k) / 4
            scores = jnp.where(jnp.arange(total)[None, None] < until, scores, -1e9)
            return jnp.einsum("bqk,bkd->bqd", jax.nn.softmax(scores), v)

        x = params["embed"][prompt]
        cache_k = jax.lax.dynamic_update_slice(jnp.zeros((n, total, width)), x @ params["k"], (0, 0, 0))
        cache_v = jax.lax.dynamic_update_slice(jnp.zeros((n, total, width)), x @ params["v"], (0, 0, 0))
        tokens = jnp.zeros((n, total), jnp.int32).at[:, :length].set(prompt)

        def go_on(carry: Any) -> Array:
            return (carry[0] < total) & ~carry[-1].all()

        def one(carry: Any) -> Any:
            i, tokens, k, v, key, done = carry
            last = jax.lax.dynamic_slice_in_dim(tokens, i - 1, 1, axis=1)
            x = params["embed"][last]
            k = jax.lax.dynamic_update_slice(k, x @ params["k"], (0, i - 1, 0))
            v = jax.lax.dynamic_update_slice(v, x @ params["v"], (0, i - 1, 0))
            logits = (attend(x @ params["q"], k, v, i) + x)[:, 0] @ params["embed"].T
            key, own = jax.random.split(key)
            top, index = jax.lax.top_k(logits, 5)
            drawn = jax.random.categorical(own, top)
            token = jnp.take_along_axis(index, drawn[:, None], axis=1)[:, 0]
            token = jnp.where(done, 0, token)
            tokens = jax.lax.dynamic_update_slice(tokens, token[:, None].astype(jnp.int32), (0, i))
            return i + 1, tokens, k, v, key, done | (token == 3)

        start = (jnp.int32(length), tokens, cache_k, cache_v, key, jnp.zeros(n, bool))
        _, tokens, cache_k, _, _, done = jax.lax.while_loop(go_on, one, start)
        return tokens, done, cache_k

    params = {"embed": values(32, 16), **{k: weights(16, 16, seed=i) for i, k in enumerate("qkv")}}
    return Case(step=step, args=(params, values(8, 4, dtype="int32"), jax.random.key(0)))


@idiom()
def beam_search() -> Case:
    def step(table: Array, first: Array) -> tuple[Array, Array]:
        beams, n = 4, first.shape[0]

        def one(carry: Any, _: None) -> Any:
            scores, sequences, last = carry
            logits = jax.nn.log_softmax(table[last])
            total = (scores[..., None] + logits).reshape(n, -1)
            scores, flat = jax.lax.top_k(total, beams)
            beam, token = flat // table.shape[1], flat % table.shape[1]
            sequences = jnp.take_along_axis(sequences, beam[..., None], axis=1)
            sequences = jnp.concatenate([sequences[..., 1:], token[..., None]], axis=-1)
            return (scores, sequences, token), None

        scores = jnp.tile(jnp.array([0.0] + [-1e9] * (beams - 1)), (n, 1))
        start = (scores, jnp.zeros((n, beams, 5), jnp.int32), jnp.tile(first[:, None], (1, beams)))
        (scores, sequences, _), _ = jax.lax.scan(one, start, None, length=5)
        return scores, sequences

    return Case(step=step, args=(values(16, 16), values(8, dtype="int32")))


@idiom()
def switch_by_a_traced_index() -> Case:
    def step(params: Any, x: Array, which: Array) -> tuple[Any, Array]:
        def loss(params: Any) -> Array:
            branches = [
                lambda h: jnp.tanh(h @ params["a"]).mean(),
                lambda h: jax.lax.scan(lambda c, w: (jnp.sin(c @ w), None), h, params["stack"])[0].sum() / 8,
                lambda h: (jax.lax.sort(h, dimension=0) * jnp.arange(h.shape[0])[:, None]).mean(),
            ]
            return sum(jax.lax.switch(which[i], branches, x) for i in range(2))

        return descend(params, loss)

    params = {"a": weights(16, 16), "stack": weights(3, 16, 16)}
    return Case(step=step, args=(params, values(16, 16), jnp.array([0, 1])), carries=0)


@idiom()
def cond_in_a_scan_in_a_remat_in_a_grad() -> Case:
    def step(params: Array, x: Array) -> tuple[Any, Array]:
        @jax.checkpoint
        def forward(params: Array, x: Array) -> Array:
            def layer(h: Array, wi: Any) -> tuple[Array, Array]:
                w, i = wi
                h = jax.lax.cond(i % 2 == 0, lambda h: jax.nn.relu(h @ w), lambda h: h + jnp.tanh(h @ w.T), h)
                return h, h.mean()

            h, means = jax.lax.scan(layer, x, (params, jnp.arange(4)))
            return (h**2).mean() + means.sum()

        return descend(params, lambda p: forward(p, x))

    return Case(step=step, args=(weights(4, 16, 16), values(16, 16)), carries=0)


@idiom()
def gradient_through_a_vmapped_scan_in_a_jit() -> Case:
    def step(w: Array, x: Array) -> tuple[Any, Array]:
        @jax.jit
        def one(w: Array, v: Array) -> Array:
            def body(c: Array, _: None) -> tuple[Array, None]:
                return jax.jit(jnp.tanh)(w @ c), None

            return jax.lax.scan(body, v, None, length=3)[0].sum()

        return descend(w, lambda w: jax.jit(jax.vmap(one, in_axes=(None, 0)))(w, x).mean())

    return Case(step=jax.jit(step), args=(weights(16, 16), values(16, 16)), carries=0)


@idiom()
def vmapped_cond_and_while() -> Case:
    """Batched predicates: a select in place of a cond, a masked body in place of a while."""

    def step(w: Array, x: Array) -> tuple[Array, Array]:
        def one(v: Array) -> tuple[Array, Array]:
            h = jax.lax.cond(v[0] > 0, lambda: jnp.sin(v @ w), lambda: v * 2)

            def until_small(h: Array) -> Array:
                return jax.lax.while_loop(lambda c: jnp.abs(c).max() > 1, lambda c: c * 0.7, h)

            return until_small(h), h.sum()

        return jax.vmap(one)(x)

    return Case(step=step, args=(weights(16, 16), values(16, 16)))


@idiom()
def model_agnostic_meta_learning() -> Case:
    """A gradient step inside the loss, over a `vmap` of tasks."""

    def step(params: Any, support: Any, query: Any) -> tuple[Any, Array]:
        def task(params: Any, support: Any, query: Any) -> Array:
            def inner(params: Any, _: None) -> tuple[Any, None]:
                grads = jax.grad(loss_fn)(params, support)
                return jax.tree.map(lambda p, g: p - 0.1 * g, params, grads), None

            return loss_fn(jax.lax.scan(inner, params, None, length=2)[0], query)

        def meta(params: Any) -> Array:
            return jax.vmap(task, in_axes=(None, 0, 0))(params, support, query).mean()

        return descend(params, meta)

    def tasks(seed: int) -> Any:
        return {"x": values(8, 4, 16, seed=seed), "y": values(8, 4, seed=seed, dtype="int32")}

    return Case(step=step, args=(mlp_params(), tasks(1), tasks(2)), carries=0)


@idiom()
def whole_epoch_in_one_scan() -> Case:
    """Shuffled by a permutation; the state is the carry."""

    def step(params: Any, data: Any, key: Array) -> tuple[Any, Array]:
        order = jax.random.permutation(key, 32).reshape(4, 8)

        def one(params: Any, rows: Array) -> tuple[Any, Array]:
            part = jax.tree.map(lambda a: a[rows], data)
            return descend(params, lambda p: loss_fn(p, part))

        return jax.lax.scan(one, params, order)

    data = {"x": values(32, 16), "y": values(32, dtype="int32")}
    return Case(step=step, args=(mlp_params(), data, jax.random.key(1)), carries=0)


@idiom()
def unrolled_program_of_a_thousand_equations() -> Case:
    def step(w: Array, x: Array) -> tuple[Any, Array]:
        def loss(w: Array) -> Array:
            h = x
            for i in range(60):
                h = jnp.tanh(h @ w) * (1 + i / 100) + h * 0.1
            return (h**2).mean()

        return descend(w, loss)

    return Case(step=step, args=(weights(16, 16) / 4, values(16, 16)), carries=0)


@idiom()
def loops_that_hold_what_is_not_related() -> Case:
    """A sum enters a loop, and what leaves it and does not depend on that is summed: the two sums cannot be one."""

    def step(x: Array, y: Array) -> tuple[Array, Array, Array]:
        def body(_: Array, carry: tuple[Array, Array]) -> tuple[Array, Array]:
            return carry[0] / 2, jnp.sin(carry[1])

        total, rest = jax.lax.fori_loop(0, 3, body, (x.sum(), y))
        mean, rest = jax.lax.cond(rest[0, 0] > 0, lambda a, b: (a + 1, b), lambda a, b: (a - 1, b * 2), total, rest)
        return mean, rest.sum(), y.max()

    return Case(step=step, args=(values(16, 8), values(16, 8, seed=2)))


@idiom()
def carried_tuple_rotates() -> Case:
    """A delay line: each trip shifts the carry's elements by one."""

    def step(x: Array, taps: Array) -> tuple[Any, Array]:
        def one(line: Any, v: Array) -> tuple[Any, Array]:
            line = (v, *line[:-1])
            return line, sum(t * h for t, h in zip(taps, line, strict=True))

        zero = jnp.zeros(x.shape[1:])
        line, out = jax.lax.scan(one, (zero, zero, zero), x)
        return out, jnp.stack(line)

    return Case(step=step, args=(values(12, 16, 8), np.array([0.5, 0.3, 0.2], np.float32)))


@idiom()
def fori_loop_that_writes_rows() -> Case:
    def step(w: Array, x: Array) -> Array:
        def one(i: Array, out: Array) -> Array:
            return out.at[i].set(jnp.tanh(x[i] @ w) + out[i - 1])

        return jax.lax.fori_loop(1, x.shape[0], one, jnp.zeros_like(x))

    return Case(step=step, args=(weights(16, 16), values(8, 16)))


@idiom(x64=True)
def double_precision() -> Case:
    def step(params: Any, x: Array) -> tuple[Any, Array]:
        return descend(params, lambda p: (jnp.tanh(x @ p["w"]).sum(0) ** 2).mean() + jnp.arange(16.0) @ p["b"])

    params = {"w": jnp.asarray(np.random.default_rng(0).normal(size=(16, 16))), "b": jnp.ones(16)}
    return Case(step=step, args=(params, jnp.asarray(np.random.default_rng(1).normal(size=(16, 16)))), carries=0)


@idiom(x64=True)
def mixed_widths_with_x64() -> Case:
    """Python numbers and default dtypes are 64 bits wide here."""

    def step(state: Any, x: Array) -> tuple[Any, Array]:
        index = jnp.argsort(x.sum(1))
        count = state["count"] + jnp.arange(4).sum()
        y = x.astype(jnp.float64)[index].cumsum(0) / count
        return {"count": count, "mean": y.mean(0).astype(jnp.float32)}, jax.random.uniform(jax.random.key(count))

    return Case(step=step, args=({"count": 1, "mean": jnp.zeros(16, jnp.float32)}, values(16, 16)), carries=0)
