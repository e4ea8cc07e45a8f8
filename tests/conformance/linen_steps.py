"""Flax linen modules and train states."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from flax import struct
from flax.training import train_state
from programs import Array, Case, values

from conformance.harness import idiom
from conformance.optimizers import EPS


def trained(model: nn.Module, x: Array, y: Array, tx: Any = None, **options: Any) -> Case:
    """A `TrainState` of a module without other collections."""

    def step(state: train_state.TrainState, x: Array, y: Array) -> tuple[Any, Array]:
        def loss_fn(params: Any) -> Array:
            logits = state.apply_fn({"params": params}, x)
            return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()

        loss, grads = jax.value_and_grad(loss_fn)(state.params)
        return state.apply_gradients(grads=grads), loss

    params = jax.jit(model.init)(jax.random.key(0), x)["params"]
    tx = optax.sgd(0.1, momentum=0.9) if tx is None else tx
    state = train_state.TrainState.create(apply_fn=model.apply, params=params, tx=tx)
    return Case(step=step, args=(state, x, y), carries=0, **options)


def tokens(*shape: int, vocabulary: int = 32, seed: int = 0) -> Array:
    return jax.random.randint(jax.random.key(seed), shape, 0, vocabulary)


class Block(nn.Module):
    features: int
    heads: int = 4

    @nn.compact
    def __call__(self, x: Array, mask: Array | None = None) -> Array:
        h = nn.LayerNorm()(x)
        x = x + nn.MultiHeadDotProductAttention(self.heads, use_bias=False)(h, h, mask=mask)
        h = nn.gelu(nn.Dense(2 * self.features)(nn.LayerNorm()(x)))
        return x + nn.Dense(self.features)(h)


class ScannedTransformer(nn.Module):
    """`nn.scan` over `nn.remat` blocks, with a head tied to the embedding."""

    layers: int = 3

    @nn.compact
    def __call__(self, ids: Array) -> Array:
        embed = nn.Embed(32, 16)
        x = embed(ids) + self.param("positions", nn.initializers.normal(0.02), (ids.shape[1], 16))
        mask = nn.make_causal_mask(ids)

        class Body(nn.Module):
            @nn.compact
            def __call__(self, x: Array, _: None) -> tuple[Array, None]:
                return Block(16)(x, mask), None

        scanned = nn.scan(
            nn.remat(Body, prevent_cse=False),
            variable_axes={"params": 0},
            split_rngs={"params": True},
            length=self.layers,
        )
        x, _ = scanned()(x, None)
        return embed.attend(nn.LayerNorm()(x))


@idiom()
def linen_scan_of_remat() -> Case:
    return trained(ScannedTransformer(), tokens(8, 16), tokens(8, 16, seed=1))


@idiom()
def linen_vmap_ensemble() -> Case:
    class Ensemble(nn.Module):
        @nn.compact
        def __call__(self, x: Array) -> Array:
            members = nn.vmap(nn.Dense, variable_axes={"params": 0}, split_rngs={"params": True}, axis_size=4)
            in_axes = nn.vmap(
                nn.Dense, in_axes=0, variable_axes={"params": 0}, split_rngs={"params": True}, axis_size=4
            )
            h = nn.vmap(nn.Dense, in_axes=None, variable_axes={"params": 0}, split_rngs={"params": True}, axis_size=4)
            del members
            return in_axes(8)(nn.relu(h(16)(x))).mean(0)

    return trained(Ensemble(), values(16, 8), tokens(16, vocabulary=8))


class ResNet(nn.Module):
    """Convolutions and batch statistics."""

    @nn.compact
    def __call__(self, x: Array, train: bool) -> Array:
        def norm(h: Array) -> Array:
            return nn.BatchNorm(use_running_average=not train, momentum=0.9)(h)

        x = nn.relu(norm(nn.Conv(8, (3, 3), use_bias=False)(x)))
        h = nn.relu(norm(nn.Conv(16, (3, 3), strides=(2, 2), use_bias=False)(x)))
        h = norm(nn.Conv(16, (3, 3), use_bias=False)(h))
        x = nn.relu(h + norm(nn.Conv(16, (1, 1), strides=(2, 2), use_bias=False)(x)))
        x = nn.max_pool(x, (2, 2), strides=(2, 2))
        return nn.Dense(8)(x.mean((1, 2)))


class StatsState(train_state.TrainState):
    batch_stats: Any


@idiom()
def linen_batch_stats() -> Case:
    model = ResNet()

    def step(state: StatsState, batch: dict[str, Array]) -> tuple[Any, dict[str, Array]]:
        def loss_fn(params: Any) -> tuple[Array, Any]:
            variables = {"params": params, "batch_stats": state.batch_stats}
            logits, new = state.apply_fn(variables, batch["image"], True, mutable=["batch_stats"])
            loss = optax.softmax_cross_entropy(logits, jax.nn.one_hot(batch["label"], 8)).mean()
            decay = sum(jnp.sum(p**2) for p in jax.tree.leaves(params) if p.ndim > 1)
            return loss + 1e-4 * decay, (new, logits)

        (loss, (new, logits)), grads = jax.value_and_grad(loss_fn, has_aux=True)(state.params)
        state = state.apply_gradients(grads=grads, batch_stats=new["batch_stats"])
        return state, {"loss": loss, "accuracy": (logits.argmax(-1) == batch["label"]).mean()}

    image = values(16, 16, 16, 3)
    variables = jax.jit(model.init, static_argnums=2)(jax.random.key(0), image, True)
    tx = optax.sgd(0.1, momentum=0.9)
    state = StatsState.create(apply_fn=model.apply, tx=tx, **variables)
    return Case(step=step, args=(state, {"image": image, "label": tokens(16, vocabulary=8)}), carries=0)


@idiom()
def linen_evaluation() -> Case:
    model = ResNet()

    def step(variables: Any, image: Array, label: Array) -> dict[str, Array]:
        logits = model.apply(variables, image, False)
        top = jax.lax.top_k(logits, 3)[1]
        return {"accuracy": (logits.argmax(-1) == label).mean(), "top3": (top == label[:, None]).any(-1).mean()}

    image = values(16, 16, 16, 3)
    variables = jax.jit(model.init, static_argnums=2)(jax.random.key(0), image, True)
    return Case(step=step, args=(variables, image, tokens(16, vocabulary=8)))


class KeyState(train_state.TrainState):
    key: Array
    average: Any = struct.field(pytree_node=True, default=None)


@idiom()
def linen_dropout() -> Case:
    """A key in the state, folded with the step; a moving average beside the parameters."""

    class Model(nn.Module):
        @nn.compact
        def __call__(self, x: Array, train: bool) -> Array:
            h = nn.Dropout(0.3, deterministic=not train)(nn.relu(nn.Dense(32)(x)))
            return nn.Dense(8)(nn.Dropout(0.1, deterministic=not train)(h))

    model = Model()

    def step(state: KeyState, x: Array, y: Array) -> tuple[Any, Array]:
        key = jax.random.fold_in(state.key, state.step)

        def loss_fn(params: Any) -> Array:
            logits = state.apply_fn({"params": params}, x, True, rngs={"dropout": key})
            return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()

        loss, grads = jax.value_and_grad(loss_fn)(state.params)
        state = state.apply_gradients(grads=grads)
        return state.replace(average=optax.incremental_update(state.params, state.average, 0.1)), loss

    x = values(16, 16)
    params = jax.jit(model.init, static_argnums=2)(jax.random.key(0), x, False)["params"]
    state = KeyState.create(
        apply_fn=model.apply, params=params, tx=optax.adam(1e-2, eps=EPS), key=jax.random.key(7), average=params
    )
    return Case(step=step, args=(state, x, tokens(16, vocabulary=8)), carries=0, donate_argnums=(0,))


@idiom()
def linen_lstm() -> Case:
    class Tagger(nn.Module):
        @nn.compact
        def __call__(self, ids: Array) -> Array:
            x = nn.Embed(32, 16)(ids)
            x = nn.Bidirectional(nn.RNN(nn.LSTMCell(16)), nn.RNN(nn.GRUCell(16)))(x)
            return nn.Dense(8)(x)

    return trained(Tagger(), tokens(8, 12), tokens(8, 12, vocabulary=8))


@idiom()
def linen_cache_generation() -> Case:
    """Greedy decoding of one token after another with linen's own cache."""

    class Decoder(nn.Module):
        @nn.compact
        def __call__(self, ids: Array) -> Array:
            x = nn.Embed(32, 16)(ids)
            x = x + nn.MultiHeadDotProductAttention(4, decode=True)(x)
            return nn.Dense(32)(x)

    model = Decoder()

    def step(params: Any, cache: Any, first: Array) -> tuple[Array, Any]:
        def one(carry: Any, _: None) -> tuple[Any, Array]:
            cache, token = carry
            logits, new = model.apply({"params": params, "cache": cache}, token, mutable=["cache"])
            token = logits[:, -1:].argmax(-1)
            return (new["cache"], token), token[:, 0]

        (cache, _), made = jax.lax.scan(one, (cache, first), None, length=6)
        return made.T, cache

    variables = jax.jit(model.init)(jax.random.key(0), tokens(8, 16))
    return Case(step=step, args=(variables["params"], variables["cache"], tokens(8, 1)))


@idiom()
def linen_partitioned_metadata() -> Case:
    """Boxed parameters, with axis names for a mesh that is not there."""

    class Model(nn.Module):
        @nn.compact
        def __call__(self, x: Array) -> Array:
            init = nn.with_partitioning(nn.initializers.lecun_normal(), ("embed", "mlp"))
            x = nn.relu(nn.Dense(32, kernel_init=init)(x))
            x = nn.with_logical_constraint(x, ("batch", "mlp"))
            return nn.Dense(8)(x)

    return trained(Model(), values(16, 16), tokens(16, vocabulary=8))


@idiom()
def linen_weight_norm_and_spectral_norm() -> Case:
    class Model(nn.Module):
        @nn.compact
        def __call__(self, x: Array) -> Array:
            x = nn.relu(nn.WeightNorm(nn.Dense(32))(x))
            x = nn.GroupNorm(num_groups=4)(x)
            return nn.WeightNorm(nn.Dense(8))(nn.RMSNorm()(x))

    return trained(Model(), values(16, 16), tokens(16, vocabulary=8))


@idiom(compare_as="bfloat16")
def linen_mixed_precision() -> Case:
    class Model(nn.Module):
        @nn.compact
        def __call__(self, x: Array) -> Array:
            x = nn.gelu(nn.Dense(32, dtype=jnp.bfloat16)(x))
            return nn.Dense(8, dtype=jnp.bfloat16)(nn.LayerNorm(dtype=jnp.bfloat16)(x)).astype(jnp.float32)

    return trained(Model(), values(16, 16), tokens(16, vocabulary=8), optax.sgd(1e-2))


@idiom()
def linen_transposed_convolutions() -> Case:
    """A convolutional autoencoder."""

    class Model(nn.Module):
        @nn.compact
        def __call__(self, x: Array) -> Array:
            x = nn.relu(nn.Conv(16, (4, 4), strides=(2, 2))(x))
            x = nn.relu(nn.Conv(16, (3, 3), feature_group_count=16)(x))
            x = nn.avg_pool(x, (2, 2), strides=(2, 2))
            x = nn.relu(nn.ConvTranspose(16, (3, 3), strides=(2, 2))(x))
            x = nn.Conv(16, (3, 3), kernel_dilation=(2, 2))(x)
            return nn.ConvTranspose(3, (4, 4), strides=(2, 2))(x)

    model = Model()

    def step(state: train_state.TrainState, x: Array) -> tuple[Any, Array]:
        loss, grads = jax.value_and_grad(lambda p: ((state.apply_fn({"params": p}, x) - x) ** 2).mean())(state.params)
        return state.apply_gradients(grads=grads), loss

    x = values(8, 16, 16, 3)
    params = jax.jit(model.init)(jax.random.key(0), x)["params"]
    state = train_state.TrainState.create(apply_fn=model.apply, params=params, tx=optax.sgd(1e-2))
    return Case(step=step, args=(state, x), carries=0)
