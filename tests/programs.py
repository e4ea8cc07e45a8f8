"""Small programs, one row each: together they exercise what tracing, the search and emission must cope with.

`@program(...)` on a function that makes a step and its arguments adds a row; `tests/test_programs.py` runs all checks
on it. Sizes are tiny, but most divide by eight, so that there is something to split. Long because it is a table.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

Array = jax.Array


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """A step with its arguments."""

    step: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any] = field(default_factory=dict)
    static_argnums: tuple[int, ...] = ()
    donate_argnums: tuple[int, ...] = ()
    carries: int | tuple[int, ...] | None = None
    """The arguments that the first results replace in the next step, if there are to be several."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """A case, made when it is needed, and what the checks need to know of it."""

    name: str
    make: Callable[[], Case]
    warns: str = ""
    """What the FfjaxWarning that planning must give says; none may be given where this is empty."""
    splits: bool = True
    """Whether there is anything to split."""
    draws: bool = True
    """Whether plans drawn at random run, too."""
    meshes: int = 1
    """How many meshes the emitted program is on: two where the step brings one of its own."""


PROGRAMS: dict[str, Row] = {}


def program(
    *, warns: str = "", splits: bool = True, draws: bool = True, meshes: int = 1
) -> Callable[[Callable[[], Case]], Callable[[], Case]]:
    """Adds a row to the table, named for the function that makes its case."""

    def register(make: Callable[[], Case]) -> Callable[[], Case]:
        name = make.__name__
        if name in PROGRAMS:
            raise ValueError(f"program {name!r} is in the table already")
        PROGRAMS[name] = Row(name=name, make=make, warns=warns, splits=splits, draws=draws, meshes=meshes)
        return make

    return register


def values(*shape: int, seed: int = 0, dtype: Any = np.float32) -> Array:
    """Numbers of about unit size; whole ones for integers."""
    rng = np.random.default_rng(seed)
    if np.issubdtype(np.dtype(dtype), np.complexfloating):
        return jnp.asarray(rng.normal(size=shape) + 1j * rng.normal(size=shape), dtype)
    if np.issubdtype(np.dtype(dtype), np.integer):
        return jnp.asarray(rng.integers(0, 8, size=shape), dtype)
    return jnp.asarray(rng.normal(size=shape), dtype)


def weights(*shape: int, seed: int = 1) -> Array:
    return values(*shape, seed=seed) / np.sqrt(shape[-2] if len(shape) > 1 else 1)


def descend(params: Any, loss_fn: Callable[[Any], Array]) -> tuple[Any, Array]:
    loss, grads = jax.value_and_grad(loss_fn)(params)
    return jax.tree.map(lambda p, g: p - 0.1 * g, params, grads), loss


# --- loops ---------------------------------------------------------------------------------------------------


@program()
def scan_over_layers() -> Case:
    """Consts, a carry, stacked inputs and outputs; its gradient scans in reverse."""

    def step(params: dict[str, Array], x: Array) -> tuple[Any, Array]:
        def loss_fn(params: dict[str, Array]) -> Array:
            def layer(h: Array, w: Array) -> tuple[Array, Array]:
                h = jnp.tanh(h @ w + params["bias"])
                return h, h.mean(-1)

            h, means = jax.lax.scan(layer, x, params["layers"])
            return (h**2).mean() + (means**2).sum()

        return descend(params, loss_fn)

    return Case(step=step, args=({"layers": weights(3, 16, 16), "bias": weights(16)}, values(8, 16)), carries=0)


@program()
def scan_in_reverse() -> Case:
    def step(w: Array, xs: Array) -> tuple[Array, Array]:
        def body(h: Array, x: Array) -> tuple[Array, Array]:
            h = 0.5 * h + x @ w
            return h, h * x.sum()

        last, out = jax.lax.scan(body, jnp.ones((8, 16)), xs, reverse=True)
        return last, out

    return Case(step=step, args=(weights(16, 16), values(4, 8, 16)))


@program()
def nested_scan() -> Case:
    def step(w: Array, xs: Array) -> tuple[Array, Array]:
        def loss_fn(w: Array) -> Array:
            def outer(h: Array, rows: Array) -> tuple[Array, Array]:
                def inner(h: Array, row: Array) -> tuple[Array, Array]:
                    h = jnp.sin(h @ w) + row
                    return h, h.sum(0)

                h, sums = jax.lax.scan(inner, h, rows)
                return h, sums

            h, sums = jax.lax.scan(outer, jnp.zeros((8, 16)), xs)
            return (h**2).mean() + (sums**2).mean()

        return descend(w, loss_fn)

    return Case(step=step, args=(weights(16, 16), values(2, 3, 8, 16)))


@program()
def fori_loop_with_a_static_bound() -> Case:
    def step(w: Array, x: Array) -> Array:
        return jax.lax.fori_loop(0, 3, lambda i, h: jnp.tanh(h @ w) + i, x)

    return Case(step=step, args=(weights(16, 16), values(8, 16)))


@program()
def fori_loop_with_a_dynamic_bound() -> Case:
    def step(w: Array, x: Array, n: Array) -> Array:
        return jax.lax.fori_loop(0, n, lambda i, h: jnp.tanh(h @ w) + i, x)

    return Case(step=step, args=(weights(16, 16), values(8, 16), jnp.int32(3)))


@program()
def while_until_small() -> Case:
    """The condition reads an array of the carry, and a closed-over one."""
    limit = np.full(16, 0.5, np.float32)

    def step(w: Array, x: Array) -> tuple[Array, Array]:
        def more(carry: tuple[Array, Array]) -> Array:
            return (jnp.abs(carry[0]).max(0) > limit).any() & (carry[1] < 20)

        def body(carry: tuple[Array, Array]) -> tuple[Array, Array]:
            return 0.5 * jnp.tanh(carry[0] @ w), carry[1] + 1

        return jax.lax.while_loop(more, body, (x, jnp.int32(0)))

    return Case(step=step, args=(weights(16, 16), values(8, 16)))


@program()
def while_carry_swaps_its_roles() -> Case:
    """Two carries change places each trip, so both must be sharded alike; one starts as a constant."""

    def step(w: Array, x: Array) -> tuple[Array, Array]:
        def body(i: Array, carry: tuple[Array, Array]) -> tuple[Array, Array]:
            a, b = carry
            return b @ w, a + i

        return jax.lax.fori_loop(0, 5, body, (x, jnp.zeros_like(x)))

    return Case(step=step, args=(weights(16, 16), values(8, 16)))


@program()
def carry_is_transposed_each_trip() -> Case:
    def step(w: Array, x: Array) -> tuple[Array, Array]:
        def body(h: Array, _: None) -> tuple[Array, Array]:
            h = jnp.tanh(h @ w).T
            return h, h.sum(0)

        return jax.lax.scan(body, x, None, length=4)

    return Case(step=step, args=(weights(16, 16), values(16, 16)))


@program()
def carry_starts_as_zeros_and_ends_as_a_literal() -> Case:
    """Constants as a carry's start, as what a body returns, and as results of the step."""

    def step(x: Array) -> tuple[Array, Array, Array, Array]:
        def body(carry: tuple[Array, Array], row: Array) -> tuple[tuple[Array, Array], Array]:
            return (carry[0] + row, jnp.ones(16)), jnp.zeros(16)

        (total, ones), zeros = jax.lax.scan(body, (jnp.zeros(16), jnp.zeros(16)), x)
        return total, ones, zeros, jnp.full((8, 16), 2.0)

    return Case(step=step, args=(values(8, 16),))


@program()
def carry_untouched_and_passed_through() -> Case:
    def step(x: Array, y: Array) -> tuple[Array, Array, Array]:
        def body(carry: tuple[Array, Array], row: Array) -> tuple[tuple[Array, Array], Array]:
            return (carry[0] @ y, carry[1]), row

        (a, b), rows = jax.lax.scan(body, (x, x), y)
        return a, b, rows

    return Case(step=step, args=(values(8, 16), weights(16, 16)))


@program()
def gradient_accumulation() -> Case:
    def step(params: dict[str, Array], xs: Array) -> tuple[Any, Array]:
        def loss_fn(params: dict[str, Array], x: Array) -> Array:
            return (jnp.tanh(x @ params["up"]) @ params["down"]).var()

        def micro(total: Any, x: Array) -> tuple[Any, Array]:
            loss, grads = jax.value_and_grad(loss_fn)(params, x)
            return jax.tree.map(jnp.add, total, grads), loss

        zeros = jax.tree.map(jnp.zeros_like, params)
        grads, losses = jax.lax.scan(micro, zeros, xs.reshape(4, 8, 16))
        return jax.tree.map(lambda p, g: p - 0.1 * g / 4, params, grads), losses.mean()

    return Case(step=step, args=({"up": weights(16, 32), "down": weights(32, 16)}, values(32, 16)))


# --- branches ------------------------------------------------------------------------------------------------


@program()
def cond_with_different_branches() -> Case:
    def step(w: Array, x: Array, flag: Array) -> tuple[Array, Array]:
        def contract(x: Array) -> tuple[Array, Array]:
            return x @ w, x.sum(1)

        def copy(x: Array) -> tuple[Array, Array]:
            return x[::-1] * 2, x[:, 0]

        return jax.lax.cond(flag, contract, copy, x)

    return Case(step=step, args=(weights(16, 16), values(8, 16), jnp.bool_(True)))


@program()
def cond_whose_branch_is_constant() -> Case:
    def step(w: Array, x: Array, flag: Array) -> Array:
        return jax.lax.cond(flag, lambda: jnp.zeros((8, 16)), lambda: jnp.tanh(x @ w)).sum(0)

    return Case(step=step, args=(weights(16, 16), values(8, 16), jnp.bool_(False)))


@program()
def switch_under_grad() -> Case:
    def step(params: dict[str, Array], x: Array, index: Array) -> tuple[Any, Array]:
        def loss_fn(params: dict[str, Array]) -> Array:
            branches = (
                lambda x: jnp.tanh(x @ params["a"]),
                lambda x: x @ params["b"].T,
                lambda x: jnp.flip(x, 1),
            )
            return (jax.lax.switch(index, branches, x) ** 2).mean()

        return descend(params, loss_fn)

    return Case(step=step, args=({"a": weights(16, 16), "b": weights(16, 16, seed=2)}, values(8, 16), jnp.int32(1)))


@program()
def cond_with_a_literal_in_one_branch() -> Case:
    """A skipped step hands on a zero that no equation makes."""

    def step(state: dict[str, Array], x: Array) -> tuple[Any, Array]:
        loss = (jnp.tanh(x @ state["w"]) ** 2).mean()
        skipped = {"w": state["w"], "good": jnp.int32(0)}
        grown = {"w": state["w"] * 0.9, "good": state["good"] + 1}
        return jax.lax.cond(loss > 0.1, lambda: grown, lambda: {**skipped, "good": jnp.int32(0)}), loss

    return Case(step=step, args=({"w": weights(16, 16), "good": jnp.int32(3)}, values(8, 16)), carries=0)


@program()
def while_loop_of_each_example() -> Case:
    """Under `vmap` the test is one for each example, and examples that are done stay as they are."""

    def step(w: Array, x: Array) -> Array:
        def shrink(h: Array) -> Array:
            return jax.lax.while_loop(lambda c: jnp.abs(c @ w).max() > 0.5, lambda c: c * 0.7, h)

        return jax.vmap(shrink)(x)

    return Case(step=step, args=(weights(16, 16), values(8, 16)))


@program()
def cond_inside_scan_with_captured_arrays() -> Case:
    """Each branch closes over an array of its own, and one over the other's too."""
    left, right = np.arange(256, dtype=np.float32).reshape(16, 16) / 256, np.eye(16, dtype=np.float32)

    def step(x: Array, flags: Array) -> tuple[Array, Array]:
        def body(h: Array, flag: Array) -> tuple[Array, Array]:
            h = jax.lax.cond(flag, lambda h: h @ left, lambda h: h @ right + h @ left, h)
            return h, h.max()

        return jax.lax.scan(body, x, flags)

    return Case(step=step, args=(values(8, 16), jnp.array([True, False, True])))


# --- derivatives ---------------------------------------------------------------------------------------------


def _mlp(params: dict[str, Array], x: Array) -> Array:
    return jnp.tanh(jnp.tanh(x @ params["up"]) @ params["down"])


def _mlp_case(loss_of: Callable[[dict[str, Array], Array], Array]) -> Case:
    def step(params: dict[str, Array], x: Array) -> tuple[Any, Array]:
        return descend(params, lambda p: (loss_of(p, x) ** 2).mean())

    return Case(step=step, args=({"up": weights(16, 32), "down": weights(32, 16)}, values(8, 16)))


@program()
def remat() -> Case:
    return _mlp_case(jax.checkpoint(_mlp))


@program()
def remat_with_a_policy() -> Case:
    return _mlp_case(jax.checkpoint(_mlp, policy=jax.checkpoint_policies.dots_with_no_batch_dims_saveable))


@program()
def remat_without_a_barrier() -> Case:
    return _mlp_case(jax.checkpoint(_mlp, prevent_cse=False))


@program()
def remat_with_a_captured_array() -> Case:
    table = np.linspace(0, 1, 256, dtype=np.float32).reshape(16, 16)
    return _mlp_case(jax.checkpoint(lambda p, x: _mlp(p, x @ table)))


@program()
def remat_inside_scan() -> Case:
    def step(layers: Array, x: Array) -> tuple[Any, Array]:
        @functools.partial(jax.checkpoint, prevent_cse=False)
        def layer(h: Array, w: Array) -> tuple[Array, None]:
            return jnp.tanh(h @ w) + h, None

        return descend(layers, lambda layers: (jax.lax.scan(layer, x, layers)[0] ** 2).mean())

    return Case(step=step, args=(weights(3, 16, 16), values(8, 16)))


@program()
def scan_inside_remat_with_named_saves() -> Case:
    from jax.ad_checkpoint import checkpoint_name

    def step(layers: Array, x: Array) -> tuple[Any, Array]:
        policy = jax.checkpoint_policies.save_only_these_names("pre")

        def layer(h: Array, w: Array) -> tuple[Array, None]:
            return jnp.tanh(checkpoint_name(h @ w, "pre")), None

        body = jax.checkpoint(lambda layers: (jax.lax.scan(layer, x, layers)[0] ** 2).mean(), policy=policy)
        return descend(layers, body)

    return Case(step=step, args=(weights(3, 16, 16), values(8, 16)))


@program()
def custom_vjp() -> Case:
    @jax.custom_vjp
    def clipped(x: Array) -> Array:
        return x * 2

    clipped.defvjp(lambda x: (x * 2, x), lambda x, g: (jnp.clip(g, -0.01, 0.01) * jnp.sign(x),))
    return _mlp_case(lambda p, x: clipped(x @ p["up"]) @ p["down"])


@program()
def custom_jvp() -> Case:
    @jax.custom_jvp
    def softplus(x: Array) -> Array:
        return jnp.logaddexp(x, 0.0)

    @softplus.defjvp
    def _(primals: tuple[Array], tangents: tuple[Array]) -> tuple[Array, Array]:
        return softplus(primals[0]), jax.nn.sigmoid(primals[0]) * tangents[0]

    return _mlp_case(lambda p, x: softplus(x @ p["up"]) @ p["down"])


@program()
def custom_derivatives_not_differentiated() -> Case:
    @jax.custom_vjp
    def double(x: Array) -> Array:
        return x * 2

    double.defvjp(lambda x: (x * 2, None), lambda _, g: (g * 2,))

    def step(w: Array, x: Array) -> Array:
        return double(jax.nn.relu(jax.nn.silu(x @ w)))

    return Case(step=step, args=(weights(16, 16), values(8, 16)))


@program()
def second_derivatives() -> Case:
    def step(w: Array, x: Array) -> tuple[Array, Array]:
        def loss_fn(w: Array) -> Array:
            return jnp.sin(x @ w).mean()

        def along(w: Array) -> Array:
            return jax.jvp(jax.grad(loss_fn), (w,), (jnp.ones_like(w),))[1]

        return along(w), jax.vmap(jax.grad(lambda r: jnp.tanh(r @ w).sum()))(x)

    return Case(step=step, args=(weights(16, 8), values(8, 16)))


# --- calls ---------------------------------------------------------------------------------------------------


@program()
def whole_step_is_a_jit() -> Case:
    return Case(
        step=jax.jit(lambda w, x: descend(w, lambda w: (jnp.tanh(x @ w) ** 2).mean())),
        args=(weights(16, 16), values(8, 16)),
    )


@program()
def nested_jits() -> Case:
    inner = jax.jit(lambda x, w: jnp.where(x > 0, x @ w, 0.0))
    outer = jax.jit(lambda x, w: inner(inner(x, w), w.T) + inner(x, w))
    return Case(
        step=lambda w, x: descend(w, lambda w: (outer(x, w) ** 2).mean()), args=(weights(16, 16), values(8, 16))
    )


@program()
def vmap_with_an_axis_name() -> Case:
    def step(w: Array, x: Array) -> tuple[Any, Array]:
        def per_example(row: Array, w: Array) -> Array:
            h = row @ w
            return h - jax.lax.pmean(h, "batch") + jax.lax.psum(h, "batch") / 100

        def loss_fn(w: Array) -> Array:
            return (jax.vmap(per_example, in_axes=(0, None), axis_name="batch")(x, w) ** 2).mean()

        return descend(w, loss_fn)

    return Case(step=step, args=(weights(16, 16), values(8, 16)))


# --- arrays that the step closes over ------------------------------------------------------------------------


@program()
def closures_at_several_depths() -> Case:
    """Each must become an input, once, however deep it is used: never a constant in the program."""
    table = np.random.default_rng(3).normal(size=(16, 16)).astype(np.float32)
    array = jnp.asarray(table * 2)

    def step(x: Array, flag: Array) -> tuple[Array, Array]:
        def body(h: Array, row: Array) -> tuple[Array, Array]:
            h = jax.jit(lambda h: jnp.tanh(h @ table))(h) + row
            return jax.lax.cond(flag, lambda h: h @ array, lambda h: h @ table, h), h.sum() + array[0, 0]

        def condition(carry: tuple[Array, Array]) -> Array:
            return (carry[1] < 3) & (carry[0] @ table).any()

        h, sums = jax.lax.scan(body, x @ array, table[:4, None, :])
        h, _ = jax.lax.while_loop(condition, lambda c: (c[0] @ array / 9, c[1] + 1), (h, jnp.int32(0)))
        return h, sums

    return Case(step=step, args=(values(8, 16), jnp.bool_(True)))


@program()
def closure_of_a_key_and_a_batch() -> Case:
    """No argument but the state: the batch is closed over, as in full-batch training."""
    x, key = values(8, 16), jax.random.key(7)

    def step(w: Array) -> tuple[Any, Array]:
        noise = jax.random.normal(key, x.shape) / 10
        return descend(w, lambda w: (((x + noise) @ w) ** 2).mean())

    return Case(step=step, args=(weights(16, 16),))


# --- programs that know of devices ---------------------------------------------------------------------------


def _foreign_mesh(sizes: tuple[int, ...], names: tuple[str, ...]) -> Mesh:
    return Mesh(
        np.array(jax.devices()[: int(np.prod(sizes))]).reshape(sizes), names, axis_types=(AxisType.Auto,) * len(sizes)
    )


@program(warns="sharding constraints of its own")
def sharding_constraint_in_the_step() -> Case:
    """A constraint on a mesh of the user's own cannot be kept: the plan decides."""
    mesh = _foreign_mesh((2, 4), ("data", "model"))

    def step(w: Array, x: Array) -> tuple[Any, Array]:
        def loss_fn(w: Array) -> Array:
            h = jax.lax.with_sharding_constraint(x @ w, NamedSharding(mesh, P("data", "model")))
            return (jnp.tanh(h) ** 2).mean()

        return descend(w, loss_fn)

    return Case(step=step, args=(weights(16, 16), values(8, 16)))


@program(warns="shard_map", draws=False, meshes=2)
def shard_map_in_the_step() -> Case:
    mesh = _foreign_mesh((2, 4), ("data", "model"))

    def step(w: Array, x: Array) -> Array:
        def local(x: Array, w: Array) -> Array:
            return jax.lax.psum(x @ w, "model")

        f = jax.shard_map(local, mesh=mesh, in_specs=(P("data", "model"), P("model", None)), out_specs=P("data", None))
        return jnp.tanh(f(x, w))

    return Case(step=step, args=(weights(16, 16), values(8, 16)))


# --- effects -------------------------------------------------------------------------------------------------


@program()
def pure_callback() -> Case:
    def step(w: Array, x: Array) -> Array:
        h = jax.pure_callback(lambda v: np.sort(np.asarray(v), axis=-1), jax.ShapeDtypeStruct(x.shape, x.dtype), x)
        return h @ w

    return Case(step=step, args=(weights(16, 16), values(8, 16)))


@program()
def debug_prints() -> Case:
    """Equal prints must both stay."""

    def step(w: Array, x: Array) -> Array:
        h = x @ w
        jax.debug.print("sum {}", h.sum())
        jax.debug.print("sum {}", h.sum())
        return jnp.tanh(h)

    return Case(step=step, args=(weights(16, 16), values(8, 16)))


@program(warns="come in any order")
def ordered_prints() -> Case:
    """An order that JAX keeps on one device only."""

    def step(w: Array, x: Array) -> Array:
        def body(h: Array, i: Array) -> tuple[Array, Array]:
            jax.debug.print("trip {i}", i=i, ordered=True)
            return jnp.tanh(h @ w), h.mean()

        return jax.lax.scan(body, x, jnp.arange(3))[0]

    return Case(step=step, args=(weights(16, 16), values(8, 16)))


@program()
def references() -> Case:
    """Arrays that are written to in place, inside a loop."""

    def step(w: Array, x: Array) -> Array:
        total = jax.new_ref(jnp.zeros_like(x))

        def body(i: Array, _: None) -> None:
            total[...] = total[...] + jnp.tanh(x @ w) * i

        jax.lax.fori_loop(0, 3, body, None)
        return total[...]

    return Case(step=step, args=(weights(16, 16), values(8, 16)))


@program()
def series_that_run_until_they_converge() -> Case:
    def step(x: Array) -> tuple[Array, Array]:
        return jax.scipy.special.gammainc(2.0, jnp.abs(x)), jax.scipy.special.betainc(1.5, 2.5, jax.nn.sigmoid(x))

    return Case(step=step, args=(values(16, 16),))


@program()
def debug_callback_in_a_loop() -> Case:
    def step(w: Array, x: Array) -> Array:
        def body(h: Array, i: Array) -> tuple[Array, None]:
            jax.debug.callback(lambda *_: None, i, h[0, 0])
            return jnp.tanh(h @ w), None

        return jax.lax.scan(body, x, jnp.arange(3))[0]

    return Case(step=step, args=(weights(16, 16), values(8, 16)))


# --- random numbers ------------------------------------------------------------------------------------------


def _dropout_case(key: Array) -> Case:
    def step(state: dict[str, Array], x: Array) -> tuple[Any, tuple[Array, Array]]:
        key, drop = jax.random.split(state["key"])

        def loss_fn(w: Array) -> tuple[Array, Array]:
            h = jnp.tanh(x @ w)
            kept = jax.random.bernoulli(jax.random.fold_in(drop, 3), 0.9, h.shape)
            return (jnp.where(kept, h / 0.9, 0) ** 2).mean(), kept

        (loss, kept), grads = jax.value_and_grad(loss_fn, has_aux=True)(state["w"])
        return {"w": state["w"] - 0.1 * grads, "key": key}, (loss, kept)

    return Case(step=step, args=({"w": weights(16, 16), "key": key}, values(8, 16)), carries=0)


@program()
def dropout_with_a_typed_key() -> Case:
    return _dropout_case(jax.random.key(0))


@program()
def dropout_with_a_raw_key() -> Case:
    return _dropout_case(jax.random.PRNGKey(0))


@program()
def dropout_with_another_generator() -> Case:
    return _dropout_case(jax.random.key(0, impl="rbg"))


@program()
def keys_split_for_each_example() -> Case:
    def step(key: Array, x: Array) -> tuple[Array, Array, Array]:
        keys = jax.random.split(key, 8)
        noise = jax.vmap(lambda k: jax.random.normal(k, (16,)))(keys)
        order = jax.random.permutation(key, 16)
        return x + noise, keys, x[:, order]

    return Case(step=step, args=(jax.random.key(3), values(8, 16)))


@program()
def random_distributions() -> Case:
    def step(key: Array, x: Array) -> tuple[Array, ...]:
        keys = jax.random.split(key, 6)
        return (
            x * jax.random.uniform(keys[0], x.shape),
            x + jax.random.truncated_normal(keys[1], -1.0, 1.0, x.shape),
            jax.random.categorical(keys[2], x),
            jax.random.randint(keys[3], (8, 16), 0, 10),
            jax.random.gumbel(keys[4], x.shape) + x,
            jax.random.choice(keys[5], 8, (8,)),
        )

    return Case(step=step, args=(jax.random.key(3), values(8, 16)))


# --- ops -----------------------------------------------------------------------------------------------------


@program()
def embedding_and_cross_entropy() -> Case:
    def step(params: dict[str, Array], tokens: Array, labels: Array) -> tuple[Any, Array]:
        def loss_fn(params: dict[str, Array]) -> Array:
            logits = jnp.tanh(params["embed"][tokens]) @ params["head"]
            chosen = jnp.take_along_axis(jax.nn.log_softmax(logits), labels[..., None], axis=-1)
            return -chosen.mean()

        return descend(params, loss_fn)

    tokens = values(8, 4, dtype=np.int32)
    return Case(step=step, args=({"embed": weights(32, 16), "head": weights(16, 32)}, tokens, tokens + 8))


@program()
def gather_and_scatter() -> Case:
    def step(table: Array, rows: Array, updates: Array) -> tuple[Array, ...]:
        added = table.at[rows].add(updates)
        return (
            added,
            table.at[rows[:2]].set(1.0),
            table.at[:, 3].mul(2.0),
            table.at[rows, 0].max(5.0),
            jnp.take(added, rows, axis=1),
            table[rows, rows],
        )

    return Case(step=step, args=(values(16, 16), jnp.arange(8) * 2 % 16, values(8, 16, seed=1)))


@program()
def rows_scattered_onto_a_matrix_as_large() -> Case:
    """As many updates as rows: what is summed over and what indexes the sum are two factors of one size."""

    def step(x: Array, rows: Array) -> Array:
        return jnp.tanh(x).at[jnp.arange(16), rows].add(jnp.sin(x[:, 0]))

    return Case(step=step, args=(values(16, 16), values(16, dtype="int32")))


@program()
def constants_that_several_read() -> Case:
    """Padding of ones: made once, for readers that split it in two ways and for one that needs it whole."""

    def step(w: Array, x: Array) -> tuple[Array, Array]:
        mask = jnp.pad(jnp.ones((8, 16)), ((4, 4), (0, 0)))
        h = (x * mask) @ w
        return jnp.sort(h * mask, axis=1), jnp.sort(h.T * mask, axis=1) + mask[:, ::-1]

    return Case(step=step, args=(weights(16, 16), values(16, 16)))


@program()
def greedy_choice_over_a_split_vocabulary() -> Case:
    """The index of the largest is reduced beside the largest itself: it cannot be scattered."""

    def step(w: Array, x: Array) -> tuple[Array, Array]:
        chosen = (x @ w).argmax(-1)
        return chosen, w.T[chosen] * 2

    return Case(step=step, args=(weights(16, 64), values(16, 16)))


@program()
def segment_sum() -> Case:
    def step(w: Array, x: Array, segments: Array) -> tuple[Any, Array]:
        def loss_fn(w: Array) -> Array:
            sums = jax.ops.segment_sum(x @ w, segments, num_segments=8)
            peaks = jax.ops.segment_max(x @ w, segments, num_segments=8)
            return (sums**2).mean() + jnp.where(jnp.isfinite(peaks), peaks, 0.0).mean()

        return descend(w, loss_fn)

    return Case(step=step, args=(weights(16, 16), values(32, 16), values(32, dtype=np.int32)))


@program()
def slices_and_updates() -> Case:
    def step(x: Array, start: Array) -> tuple[Array, ...]:
        piece = jax.lax.dynamic_slice(x, (start, 0), (4, 16))
        return (
            piece,
            jax.lax.dynamic_update_slice(x, piece * 2, (start, 0)),
            x[2:6],
            x[:, ::2] + x[:, 1::2],
            jnp.pad(x, ((1, 1), (0, 0))),
            jnp.concatenate([x, 2 * x], axis=1),
            jnp.roll(x, 3, axis=0),
            jnp.stack([x, x]),
        )

    return Case(step=step, args=(values(8, 16), jnp.int32(2)))


@program()
def reshapes_that_split_and_merge() -> Case:
    def step(w: Array, x: Array) -> tuple[Any, tuple[Array, ...]]:
        new, loss = descend(w, lambda w: ((x.reshape(32, 16) @ w).reshape(8, 4, 4, 4).swapaxes(1, 2) ** 2).mean())
        return new, (loss, x.reshape(-1), x.reshape(16, 32), x.transpose(2, 0, 1).reshape(64, 8))

    return Case(step=step, args=(weights(16, 16), values(8, 4, 16)))


@program()
def sort_cumsum_and_top_k() -> Case:
    def step(x: Array) -> tuple[Array, ...]:
        best, index = jax.lax.top_k(x, 4)
        return jnp.sort(x), jnp.argsort(x, axis=0), jnp.cumsum(x, axis=1), best, index, x.argmax(1), jnp.median(x, 0)

    return Case(step=step, args=(values(8, 16),))


@program(draws=False)  # XLA:CPU's FFT fails on the memory layout that some gathers leave it
def fft() -> Case:
    def step(x: Array) -> tuple[Array, Array]:
        spectrum = jnp.fft.rfft(x, axis=-1)
        return jnp.fft.irfft(spectrum * 2, n=16), jnp.abs(jnp.fft.fft2(x))

    return Case(step=step, args=(values(8, 16),))


@program()
def convolutions() -> Case:
    def step(params: dict[str, Array], images: Array) -> tuple[Any, Array]:
        def loss_fn(params: dict[str, Array]) -> Array:
            conv = functools.partial(jax.lax.conv_general_dilated, dimension_numbers=("NHWC", "HWIO", "NHWC"))
            h = jax.nn.relu(conv(images, params["a"], (1, 1), "SAME"))
            h = jax.nn.relu(conv(h, params["b"], (2, 2), "SAME"))
            h = conv(h, params["depthwise"], (1, 1), "SAME", feature_group_count=16)
            h = h + conv(h, params["grouped"], (1, 1), "SAME", feature_group_count=4)
            h = jax.lax.reduce_window(h, -jnp.inf, jax.lax.max, (1, 2, 2, 1), (1, 2, 2, 1), "VALID")
            return (h.mean((1, 2)) ** 2).mean()

        return descend(params, loss_fn)

    shapes = {"a": (8, 8), "b": (8, 16), "depthwise": (1, 16), "grouped": (4, 16)}
    params = {name: weights(3, 3, *shape) / 3 for name, shape in shapes.items()}
    return Case(step=step, args=(params, values(8, 8, 8, 8)))


@program()
def norms_and_statistics() -> Case:
    def step(params: dict[str, Array], x: Array) -> tuple[Any, Array]:
        def loss_fn(params: dict[str, Array]) -> Array:
            h = x @ params["w"]
            h = (h - h.mean(0)) * jax.lax.rsqrt(h.var(0) + 1e-5)
            h = params["scale"] * jax.nn.standardize(h, axis=-1)
            return jax.nn.logsumexp(h, axis=-1).mean() + jnp.linalg.norm(h)

        return descend(params, loss_fn)

    return Case(step=step, args=({"w": weights(16, 16), "scale": weights(16)}, values(8, 16)))


@program()
def attention() -> Case:
    def step(params: dict[str, Array], x: Array) -> tuple[Any, Array]:
        def loss_fn(params: dict[str, Array]) -> Array:
            q, k, v = (jnp.einsum("bsd,dhk->bshk", x, params[n]) for n in "qkv")
            mask = jnp.tril(jnp.ones((8, 8), bool))
            scores = jnp.where(mask, jnp.einsum("bqhk,bshk->bhqs", q, k), -jnp.inf)
            return (jnp.einsum("bhqs,bshk,hkd->bqd", jax.nn.softmax(scores), v, params["o"]) ** 2).mean()

        return descend(params, loss_fn)

    params = {n: weights(16, 8, 4, seed=i) / 4 for i, n in enumerate("qkv")} | {"o": weights(8, 4, 16)}
    return Case(step=step, args=(params, values(8, 8, 16)))


@program()
def linear_algebra() -> Case:
    def step(a: Array, b: Array) -> tuple[Array, ...]:
        square = jnp.einsum("bij,bkj->bik", a, a) + 4 * jnp.eye(4)
        return jnp.linalg.cholesky(square), jnp.linalg.solve(square, b), jnp.linalg.inv(square)

    return Case(step=step, args=(values(8, 4, 4), values(8, 4, 4, seed=1)))


# --- dtypes --------------------------------------------------------------------------------------------------


@program()
def solved_by_conjugate_gradients() -> Case:
    """A linear solve brings a loop of its own, also into its gradient."""

    def step(w: Array, x: Array) -> tuple[Any, Array]:
        def loss_fn(w: Array) -> Array:
            solved, _ = jax.scipy.sparse.linalg.cg(lambda v: x.T @ (x @ v) + 4 * v, w, maxiter=5)
            return (jnp.tanh(solved) ** 2).mean()

        return descend(w, loss_fn)

    return Case(step=step, args=(weights(16, 8), values(16, 16)))


@program()
def bfloat16_with_float32_sums() -> Case:
    def step(w: Array, x: Array) -> tuple[Any, Array]:
        def loss_fn(w: Array) -> Array:
            h = jnp.dot(x.astype(jnp.bfloat16), w.astype(jnp.bfloat16), preferred_element_type=jnp.float32)
            return (jnp.tanh(h) ** 2).mean()

        return descend(w, loss_fn)

    return Case(step=step, args=(weights(16, 16), values(8, 16)))


@program()
def int8_dot() -> Case:
    def step(w: Array, x: Array) -> tuple[Array, Array]:
        h = jax.lax.dot(x, w, preferred_element_type=jnp.int32)
        return h, (h >> 2).astype(jnp.int8)

    return Case(step=step, args=(values(16, 16, dtype=np.int8), values(8, 16, dtype=np.int8)))


@program()
def complex_numbers() -> Case:
    def step(w: Array, x: Array) -> tuple[Array, Array]:
        h = x @ w
        return h.conj() * 2, jnp.abs(h).sum()

    return Case(step=step, args=(values(16, 16, dtype=np.complex64), values(8, 16, dtype=np.complex64)))


@program()
def small_and_boolean_types() -> Case:
    def step(x: Array, mask: Array) -> tuple[Array, ...]:
        return (
            x.astype(jnp.float16) * 2,
            x.astype(jnp.uint8) ^ 3,
            jnp.where(mask, x, 0),
            mask.any(0),
            mask.all(1),
            (x > 0).sum(0),
            x.astype(jnp.float8_e4m3fn).astype(jnp.float32),
        )

    return Case(step=step, args=(jnp.abs(values(8, 16)), values(8, 16) > 0))


# --- signatures ----------------------------------------------------------------------------------------------


@program()
def counter_that_starts_as_a_python_int() -> Case:
    def step(state: dict[str, Any], x: Array) -> tuple[Any, Array]:
        w, loss = descend(state["w"], lambda w: ((x @ w) ** 2).mean())
        return {"w": w, "step": state["step"] + 1}, loss / (1.0 + state["step"])

    return Case(step=step, args=({"w": weights(16, 16), "step": 0}, values(8, 16)), carries=0)


@program()
def state_that_settles_after_the_first_step() -> Case:
    def step(state: dict[str, Any], x: Array) -> tuple[Any, Array]:
        w, loss = descend(state["w"], lambda w: ((x @ w) ** 2).mean())
        mean = w if state["mean"] is None else 0.9 * state["mean"] + 0.1 * w
        return {"w": w, "mean": mean}, loss

    return Case(step=step, args=({"w": weights(16, 16), "mean": None}, values(8, 16)), carries=0)


@program()
def part_of_the_state_returned() -> Case:
    def step(state: dict[str, Array], x: Array) -> dict[str, Array]:
        return {"w": state["w"] - 0.1 * (x.T @ (x @ state["w"] - state["bias"]))}

    return Case(step=step, args=({"w": weights(16, 16), "bias": weights(16)}, values(8, 16)))


@program()
def static_donated_and_keyword_arguments() -> Case:
    def step(kind: str, w: Array, x: Array, *, rate: Array, extra: dict[str, Array]) -> tuple[Array, Array]:
        h = (jnp.tanh if kind == "tanh" else jnp.sin)(x @ w) + extra["bias"]
        return w - rate * (x.T @ h), h

    return Case(
        step=step,
        args=("tanh", weights(16, 16), values(8, 16)),
        kwargs={"rate": 0.1, "extra": {"bias": weights(16)}},
        static_argnums=(0,),
        donate_argnums=(1,),
        carries=1,
    )


@program()
def returns_only_a_scalar() -> Case:
    return Case(step=lambda w, x: (jnp.tanh(x @ w) ** 2).mean(), args=(weights(16, 16), values(8, 16)))


@program()
def without_a_batch() -> Case:
    return Case(
        step=lambda params: jax.tree.map(lambda p: p * 0.9, params),
        args=({"a": weights(16, 16), "b": weights(32)},),
    )


class Pair(NamedTuple):
    left: Array
    right: Array


@functools.partial(jax.tree_util.register_dataclass, data_fields=["w", "rest"], meta_fields=["scale"])
@dataclass(frozen=True)
class Params:
    w: Array
    rest: tuple[Array, ...]
    scale: float


@program()
def nested_containers() -> Case:
    def step(state: Params, batch: dict[str, Any]) -> tuple[Params, Pair]:
        def loss_fn(state: Params) -> Array:
            h = batch["pair"].left @ state.w + state.rest[0] - batch["list"][0]
            return state.scale * ((h - batch["pair"].right) ** 2).mean()

        new, loss = descend(state, loss_fn)
        return new, Pair(loss, batch["list"][0] * 2)

    state = Params(w=weights(16, 16), rest=(weights(16), weights(1)), scale=2.0)
    return Case(
        step=step,
        args=(state, {"pair": Pair(values(8, 16), values(8, 16, seed=1)), "list": [values(8, 16)]}),
        carries=0,
    )


@program()
def same_argument_twice_and_results_that_are_arguments() -> Case:
    x = values(8, 16)

    def step(a: Array, b: Array, w: Array) -> tuple[Array, ...]:
        h = a @ w
        return a, h, h, b, w, a + b, jnp.float32(3.0)

    return Case(step=step, args=(x, x, weights(16, 16)))


@program()
def zero_size_arrays() -> Case:
    def step(x: Array, empty: Array) -> tuple[Array, ...]:
        return jnp.concatenate([x, empty]), empty @ jnp.ones((16, 8)), x @ empty.T, empty.sum()

    return Case(step=step, args=(values(8, 16), jnp.zeros((0, 16))))


@program(splits=False)
def scalars_only() -> Case:
    def step(state: tuple[Array, Array], x: Array) -> tuple[Any, Array]:
        return (state[0] + x, state[1] * 2), jnp.sin(x)

    return Case(step=step, args=((jnp.float32(1.0), jnp.int32(2)), jnp.float32(0.5)))


@program(splits=False)
def sizes_that_divide_by_nothing() -> Case:
    return Case(
        step=lambda w, x: descend(w, lambda w: (jnp.tanh(x @ w) ** 2).mean()), args=(weights(5, 7), values(3, 5))
    )


@program()
def unused_arguments() -> Case:
    return Case(step=lambda w, x, unused: x @ w, args=(weights(16, 16), values(8, 16), {"y": values(8, 16)}))


@program()
def sums_of_contractions() -> Case:
    """Gradients of one value through several weights, in a loop and outside, added, negated, scaled and transposed."""

    def step(w: dict[str, Any], x: Array) -> tuple[Any, Array]:
        def loss_fn(w: dict[str, Any]) -> Array:
            def layer(h: Array, w: dict[str, Array]) -> tuple[Array, None]:
                inner = jnp.sin(h)
                query, key, value = (jnp.einsum("btd,dhk->bthk", inner, w[name]) for name in "qkv")
                scores = jax.nn.softmax(jnp.einsum("bqhk,bshk->bhqs", query, key))
                return h + jnp.einsum("bhqs,bshk,hkd->bqd", scores, value, w["o"]), None

            h = jax.lax.scan(layer, x, w["layers"])[0]
            routed, dense = jnp.sin(h), jnp.cos(h)
            gates = jax.nn.softmax(routed @ w["router"])
            queued = jnp.einsum("bte,btc,btd->ebcd", gates, x[..., :4], routed)
            up, gate = dense @ w["up"], -(dense @ w["gate"]) / 2
            return jnp.mean(queued**2) + jnp.mean((up * jnp.tanh(gate) + (dense @ w["more"] - up)) ** 2)

        return descend(w, loss_fn)

    layers = {name: weights(2, 16, 8, 4, seed=i) / 4 for i, name in enumerate("qkv")} | {"o": weights(2, 8, 4, 16) / 4}
    dense = {name: weights(16, 32, seed=i) / 4 for i, name in enumerate(("up", "gate", "more"))}
    return Case(step=step, args=({"layers": layers, "router": weights(16, 8)} | dense, values(8, 8, 16)))
