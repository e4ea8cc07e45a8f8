"""A project's train step, as it would be without ffjax: two layers, a residual, Adam."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import optax

OPTIMIZER = optax.adam(1e-3)


def init(key: jax.Array, width: int = 64, hidden: int = 256) -> dict[str, Any]:
    up, down = jax.random.split(key)
    params = {
        "up": jax.random.normal(up, (width, hidden)) / width**0.5,
        "down": jax.random.normal(down, (hidden, width)) / hidden**0.5,
    }
    return {"params": params, "optimizer": OPTIMIZER.init(params)}


def train_step(state: dict[str, Any], batch: dict[str, jax.Array]) -> tuple[dict[str, Any], jax.Array]:
    def loss_fn(params: dict[str, jax.Array]) -> jax.Array:
        hidden = jax.nn.gelu(batch["x"] @ params["up"])
        return jnp.mean((batch["x"] + hidden @ params["down"] - batch["y"]) ** 2)

    loss, grads = jax.value_and_grad(loss_fn)(state["params"])
    updates, optimizer = OPTIMIZER.update(grads, state["optimizer"])
    return {"params": optax.apply_updates(state["params"], updates), "optimizer": optimizer}, loss
