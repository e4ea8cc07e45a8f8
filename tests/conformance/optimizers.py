"""Optax: one MLP under every optimizer and wrapper."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import optax
from programs import Array, Case, values, weights

from conformance.harness import idiom


def mlp(params: dict[str, Any], x: Array) -> Array:
    for layer in params["layers"]:
        x = jnp.tanh(x @ layer["kernel"] + layer["bias"])
    return x @ params["head"]


def mlp_params() -> dict[str, Any]:
    layers = [{"kernel": weights(16, 32, seed=1), "bias": values(32, seed=2) / 8}]
    layers += [{"kernel": weights(32, 32, seed=3), "bias": values(32, seed=4) / 8}]
    return {"layers": layers, "head": weights(32, 8, seed=5)}


def batch() -> dict[str, Array]:
    return {"x": values(16, 16, seed=6), "y": values(16, seed=7, dtype="int32")}


def loss_fn(params: dict[str, Any], batch: dict[str, Array]) -> Array:
    return optax.softmax_cross_entropy_with_integer_labels(mlp(params, batch["x"]), batch["y"]).mean()


def optimized(tx: Any, **extra: Any) -> Case:
    """Parameters and the optimizer's state as two arguments and results."""

    def step(params: Any, opt_state: Any, batch: Any) -> tuple[Any, Any, Array]:
        loss, grads = jax.value_and_grad(loss_fn)(params, batch)
        updates, opt_state = tx.update(grads, opt_state, params, **extra)
        return optax.apply_updates(params, updates), opt_state, loss

    params = mlp_params()
    return Case(step=step, args=(params, tx.init(params), batch()), carries=(0, 1))


# Adam and its kin divide a gradient by its own size: an epsilon above the gradients' rounding keeps that in bounds.
EPS = 1e-4


@idiom()
def adamw() -> Case:
    return optimized(optax.adamw(1e-2, eps=EPS))


@idiom()
def adamw_with_donation() -> Case:
    case = optimized(optax.adamw(1e-2, eps=EPS))
    return Case(step=case.step, args=case.args, carries=case.carries, donate_argnums=(0, 1))


@idiom()
def adafactor() -> Case:
    return optimized(optax.adafactor(1e-2, min_dim_size_to_factor=8))


@idiom()
def lion() -> Case:
    return optimized(optax.lion(1e-3))


@idiom()
def muon() -> Case:
    return optimized(optax.contrib.muon(1e-2, eps=EPS))


@idiom()
def sgd_with_momentum() -> Case:
    return optimized(optax.sgd(1e-2, momentum=0.9, nesterov=True))


@idiom()
def clipped_by_global_norm_with_a_schedule() -> Case:
    schedule = optax.warmup_cosine_decay_schedule(0.0, 1e-2, 2, 10)
    return optimized(optax.chain(optax.clip_by_global_norm(0.1), optax.adamw(schedule, eps=EPS)))


@idiom()
def multi_steps() -> Case:
    return optimized(optax.MultiSteps(optax.adam(1e-2, eps=EPS), every_k_schedule=2))


@idiom()
def masked_weight_decay() -> Case:
    def mask(params: Any) -> Any:
        return jax.tree.map(lambda p: p.ndim > 1, params)

    return optimized(optax.chain(optax.sgd(1e-2), optax.masked(optax.add_decayed_weights(1e-3), mask)))


@idiom()
def multi_transform() -> Case:
    def labels(params: Any) -> Any:
        return {"layers": jax.tree.map(lambda _: "sgd", params["layers"]), "head": "adam"}

    return optimized(optax.multi_transform({"sgd": optax.sgd(1e-2), "adam": optax.adam(1e-2, eps=EPS)}, labels))


@idiom()
def frozen_parameters() -> Case:
    """`set_to_zero` leaves arguments that no equation changes."""

    def labels(params: Any) -> Any:
        return {"layers": jax.tree.map(lambda _: "frozen", params["layers"]), "head": "trained"}

    return optimized(optax.multi_transform({"frozen": optax.set_to_zero(), "trained": optax.adam(1e-2)}, labels))


@idiom()
def moving_average_of_parameters() -> Case:
    tx = optax.chain(optax.sgd(1e-2), optax.ema(0.9))

    def step(state: Any, batch: Any) -> tuple[Any, Array]:
        loss, grads = jax.value_and_grad(loss_fn)(state["params"], batch)
        updates, opt_state = tx.update(grads, state["opt"], state["params"])
        params = optax.apply_updates(state["params"], updates)
        average = optax.incremental_update(params, state["ema"], 0.1)
        return {"params": params, "opt": opt_state, "ema": average, "step": state["step"] + 1}, loss

    params = mlp_params()
    state = {"params": params, "opt": tx.init(params), "ema": params, "step": 0}
    return Case(step=step, args=(state, batch()), carries=0)


@idiom()
def injected_hyperparameters() -> Case:
    tx = optax.inject_hyperparams(optax.adam)(learning_rate=optax.linear_schedule(0.0, 1e-2, 5), eps=EPS)
    return optimized(tx)


@idiom()
def skipped_if_not_finite() -> Case:
    return optimized(optax.apply_if_finite(optax.sgd(1e-2), max_consecutive_errors=2))


@idiom()
def lookahead() -> Case:
    tx = optax.lookahead(optax.sgd(1e-2), sync_period=2, slow_step_size=0.5)

    def step(params: Any, opt_state: Any, batch: Any) -> tuple[Any, Any, Array]:
        loss, grads = jax.value_and_grad(loss_fn)(params.fast, batch)
        updates, opt_state = tx.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state, loss

    params = optax.LookaheadParams.init_synced(mlp_params())
    return Case(step=step, args=(params, tx.init(params), batch()), carries=(0, 1))


@idiom()
def sharpness_aware() -> Case:
    """Two gradients in a step, the second where the first one leads."""
    tx = optax.sgd(1e-2)

    def step(params: Any, opt_state: Any, batch: Any) -> tuple[Any, Any, Array]:
        grads = jax.grad(loss_fn)(params, batch)
        norm = optax.global_norm(grads)
        there = jax.tree.map(lambda p, g: p + 0.05 * g / (norm + 1e-12), params, grads)
        loss, grads = jax.value_and_grad(loss_fn)(there, batch)
        updates, opt_state = tx.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state, loss

    params = mlp_params()
    return Case(step=step, args=(params, tx.init(params), batch()), carries=(0, 1))


@idiom()
def gradients_of_each_example() -> Case:
    """Differentially private SGD: `vmap(grad)`, clipped one by one, with noise."""
    tx = optax.contrib.differentially_private_aggregate(1.0, 0.1, 0)

    def step(params: Any, opt_state: Any, batch: Any) -> tuple[Any, Any]:
        def one(params: Any, x: Array, y: Array) -> Array:
            return loss_fn(params, {"x": x[None], "y": y[None]})

        grads = jax.vmap(jax.grad(one), in_axes=(None, 0, 0))(params, batch["x"], batch["y"])
        updates, opt_state = tx.update(grads, opt_state, params)
        return jax.tree.map(lambda p, u: p - 0.1 * u, params, updates), opt_state

    params = mlp_params()
    return Case(step=step, args=(params, tx.init(params), batch()), carries=(0, 1))


@idiom(compare_as="float16")  # a line search decides by small differences of losses
def lbfgs_with_a_line_search() -> Case:
    tx = optax.lbfgs(memory_size=3, linesearch=optax.scale_by_zoom_linesearch(max_linesearch_steps=4))

    def step(params: Any, opt_state: Any, batch: Any) -> tuple[Any, Any, Array]:
        def value_fn(p: Any) -> Array:
            return loss_fn(p, batch)

        loss, grads = optax.value_and_grad_from_state(value_fn)(params, state=opt_state)
        updates, opt_state = tx.update(grads, opt_state, params, value=loss, grad=grads, value_fn=value_fn)
        return optax.apply_updates(params, updates), opt_state, loss

    params = mlp_params()
    return Case(step=step, args=(params, tx.init(params), batch()), carries=(0, 1))


@idiom()
def schedule_free() -> Case:
    tx = optax.contrib.schedule_free_sgd(1e-2)
    return optimized(tx)


@idiom()
def adversarial_training() -> Case:
    def step(params: Any, batch: Any) -> tuple[Any, Array]:
        def ascend(_: Any, delta: Array) -> Array:
            grad = jax.grad(lambda d: loss_fn(params, {"x": batch["x"] + d, "y": batch["y"]}))(delta)
            return jnp.clip(delta + 0.1 * grad / (jnp.abs(grad).max() + 1e-6), -0.3, 0.3)

        delta = jax.lax.fori_loop(0, 3, ascend, jnp.zeros_like(batch["x"]))
        attacked = {"x": batch["x"] + jax.lax.stop_gradient(delta), "y": batch["y"]}
        loss, grads = jax.value_and_grad(loss_fn)(params, attacked)
        return optax.apply_updates(params, jax.tree.map(lambda g: -0.1 * g, grads)), loss

    return Case(step=step, args=(mlp_params(), batch()), carries=0)


@idiom()
def other_optimizers() -> Case:
    """Several at once: each has its own state."""
    tx = optax.chain(
        optax.scale_by_rms(eps=1e-3),
        optax.scale_by_trust_ratio(),
        optax.add_noise(0.01, 0.55, jax.random.key(3)),
        optax.centralize(),
        optax.scale_by_learning_rate(optax.piecewise_constant_schedule(1e-2, {2: 0.1})),
    )
    return optimized(tx)
