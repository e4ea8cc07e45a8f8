"""What a model of the zoo is: a train step, the shapes of its arguments, and how to make small real ones."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn

Batch = dict[str, jax.ShapeDtypeStruct]


@dataclass(frozen=True, slots=True, kw_only=True)
class Model:
    """A train step `(state, batch) -> (state, metrics)` and what it takes; nothing is allocated."""

    step: Callable[[Any, Any], tuple[Any, Any]]
    init: Callable[[jax.Array], Any]
    """From a random key to the state, a mapping with the weights under `"params"`."""
    batch: Batch
    limits: Mapping[str, int]
    """For each integer input the values below which it lies."""

    @property
    def args(self) -> tuple[Any, Batch]:
        """The shapes of the step's arguments."""
        return jax.eval_shape(self.init, jax.random.key(0)), self.batch

    @property
    def parameters(self) -> int:
        """How many weights are trained."""
        return sum(leaf.size for leaf in jax.tree.leaves(self.args[0]["params"]))

    def example(self, seed: int = 0) -> tuple[Any, dict[str, jax.Array]]:
        """Real arguments: made in this process's memory, so only for tiny models."""
        rng = np.random.default_rng(seed)

        def values(name: str, like: jax.ShapeDtypeStruct) -> jax.Array:
            if jnp.issubdtype(like.dtype, jnp.integer):
                return jnp.asarray(rng.integers(self.limits[name], size=like.shape), like.dtype)
            return jnp.asarray(rng.normal(size=like.shape), like.dtype)

        batch = {name: values(name, like) for name, like in self.batch.items()}
        return jax.jit(self.init)(jax.random.key(seed)), batch


def trained(
    module: nn.Module, batch: Batch, optimizer: optax.GradientTransformation, limits: Mapping[str, int]
) -> Model:
    """The model that trains a module whose call takes the batch by name and returns the loss, a scalar."""

    def init(key: jax.Array) -> dict[str, Any]:
        inputs = {name: jnp.zeros(like.shape, like.dtype) for name, like in batch.items()}
        variables = dict(module.init(key, **inputs))
        params = variables.pop("params")
        return {"params": params, "averages": variables, "optimizer": optimizer.init(params)}

    def train_step(state: dict[str, Any], batch: dict[str, jax.Array]) -> tuple[dict[str, Any], jax.Array]:
        def loss_fn(params: Any) -> tuple[jax.Array, Any]:
            variables = {"params": params, **state["averages"]}
            return module.apply(variables, **batch, mutable=list(state["averages"]))

        (loss, averages), grads = jax.value_and_grad(loss_fn, has_aux=True)(state["params"])
        updates, moments = optimizer.update(grads, state["optimizer"], state["params"])
        params = optax.apply_updates(state["params"], updates)
        return {"params": params, "averages": averages, "optimizer": moments}, loss

    return Model(step=train_step, init=init, batch=batch, limits=limits)


def ints(*shape: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, jnp.int32)


def floats(*shape: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, jnp.float32)
