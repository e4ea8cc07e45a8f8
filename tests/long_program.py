"""A step of as many equations at the top level as are asked for: small arrays, few kinds of ops, cheap to compile."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

_PER_TURN = 9
"""Equations that one turn adds, forward and backward. It has a product: XLA takes long over chains that it fuses."""


def long_step(equations: int, *, called: bool = False) -> tuple[Any, Any, Any]:
    """A training step, its state and its batch; `called`: the step is one call of a jitted function."""

    def step(weights: list[jax.Array], x: jax.Array) -> tuple[list[jax.Array], jax.Array]:
        def loss_fn(weights: list[jax.Array]) -> jax.Array:
            h = x
            for i in range(equations // _PER_TURN):
                h = jnp.tanh(h @ weights[i % len(weights)])
            return (h**2).mean()

        loss, grads = jax.value_and_grad(loss_fn)(weights)
        return [w - 0.1 * g for w, g in zip(weights, grads, strict=True)], loss

    rng = np.random.default_rng(0)
    state = [jnp.asarray(np.linalg.qr(rng.normal(size=(8, 8)))[0], jnp.float32) for _ in range(8)]
    jitted = jax.jit(step)

    def call(weights: list[jax.Array], x: jax.Array) -> tuple[list[jax.Array], jax.Array]:
        return jitted(weights, x)

    return call if called else step, state, jnp.asarray(rng.normal(size=(16, 8)), jnp.float32)
