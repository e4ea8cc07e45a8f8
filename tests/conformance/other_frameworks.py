"""Haiku, Equinox and transformers' Flax models: to ffjax they are functions of plain pytrees."""

from __future__ import annotations

import functools
import warnings
from typing import Any

import equinox as eqx
import haiku as hk
import jax
import jax.numpy as jnp
import optax
from programs import Array, Case, values

from conformance.harness import idiom
from conformance.linen_steps import tokens
from conformance.optimizers import EPS

# --- Haiku ---------------------------------------------------------------------------------------------------


@idiom()
def haiku_transformer() -> Case:
    """`hk.transform` with dropout: a key in, parameters as nested dictionaries."""

    def forward(ids: Array, train: bool) -> Array:
        x = hk.Embed(32, 16)(ids) + hk.get_parameter("positions", (ids.shape[1], 16), init=jnp.zeros)
        mask = jnp.tril(jnp.ones((1, 1, ids.shape[1], ids.shape[1])))
        for _ in range(2):
            h = hk.LayerNorm(-1, True, True)(x)
            h = hk.MultiHeadAttention(4, 4, w_init=hk.initializers.VarianceScaling(1.0))(h, h, h, mask=mask)
            x = x + (hk.dropout(hk.next_rng_key(), 0.1, h) if train else h)
            h = hk.nets.MLP([32, 16], activation=jax.nn.gelu)(hk.LayerNorm(-1, True, True)(x))
            x = x + h
        return hk.Linear(32)(x)

    model = hk.transform(forward)
    tx = optax.sgd(0.1)

    def step(state: Any, ids: Array) -> tuple[Any, Array]:
        key, own = jax.random.split(state["key"])

        def loss_fn(params: Any) -> Array:
            logits = model.apply(params, own, ids[:, :-1], True)
            return optax.softmax_cross_entropy_with_integer_labels(logits, ids[:, 1:]).mean()

        loss, grads = jax.value_and_grad(loss_fn)(state["params"])
        updates, opt_state = tx.update(grads, state["opt"])
        return {"params": optax.apply_updates(state["params"], updates), "opt": opt_state, "key": key}, loss

    ids = tokens(8, 17)
    params = jax.jit(model.init, static_argnums=2)(jax.random.PRNGKey(0), ids[:, :-1], False)
    state = {"params": params, "opt": tx.init(params), "key": jax.random.PRNGKey(1)}
    return Case(step=step, args=(state, ids), carries=0)


# The gradient of a bias before a norm is nothing but rounding.
@idiom(compare_as="float16")
def haiku_with_state() -> Case:
    """Batch norm and moving averages, with a target network, as in BYOL."""

    def forward(x: Array, train: bool) -> Array:
        x = jax.nn.relu(hk.Conv2D(8, 3)(x))
        x = hk.BatchNorm(True, True, 0.9)(x, train)
        return hk.Linear(16)(x.mean((1, 2)))

    model = hk.without_apply_rng(hk.transform_with_state(forward))
    tx = optax.sgd(0.1)

    def step(online: Any, target: Any, state: Any, opt: Any, x: Array) -> tuple[Any, ...]:
        flipped = x[:, :, ::-1]

        def loss_fn(params: Any) -> tuple[Array, Any]:
            ours, new = model.apply(params, state, x, True)
            theirs, _ = model.apply(target, state, flipped, True)
            ours, theirs = (v / (jnp.linalg.norm(v, axis=-1, keepdims=True) + 1e-6) for v in (ours, theirs))
            return 2 - 2 * (ours * jax.lax.stop_gradient(theirs)).sum(-1).mean(), new

        (loss, new), grads = jax.value_and_grad(loss_fn, has_aux=True)(online)
        updates, opt = tx.update(grads, opt)
        online = optax.apply_updates(online, updates)
        return online, optax.incremental_update(online, target, 0.1), new, opt, loss

    x = values(16, 8, 8, 3)
    params, state = jax.jit(model.init, static_argnums=2)(jax.random.PRNGKey(0), x, True)
    return Case(step=step, args=(params, params, state, tx.init(params), x), carries=(0, 1, 2, 3))


@idiom()
def haiku_recurrent() -> Case:
    def forward(ids: Array) -> Array:
        core = hk.DeepRNN([hk.LSTM(16), jax.nn.relu, hk.LSTM(16)])
        x = jnp.swapaxes(hk.Embed(32, 16)(ids), 0, 1)
        out, _ = hk.dynamic_unroll(core, x, core.initial_state(ids.shape[0]))
        return hk.BatchApply(hk.Linear(32))(out)

    model = hk.without_apply_rng(hk.transform(forward))

    def step(params: Any, ids: Array) -> tuple[Any, Array]:
        def loss_fn(params: Any) -> Array:
            logits = model.apply(params, ids[:, :-1])
            return optax.softmax_cross_entropy_with_integer_labels(logits, ids[:, 1:].T).mean()

        loss, grads = jax.value_and_grad(loss_fn)(params)
        return jax.tree.map(lambda p, g: p - 0.1 * g, params, grads), loss

    ids = tokens(8, 9)
    return Case(step=step, args=(jax.jit(model.init)(jax.random.PRNGKey(0), ids[:, :-1]), ids), carries=0)


@idiom()
def haiku_vae() -> Case:
    def forward(x: Array) -> Array:
        h = jax.nn.relu(hk.Linear(32)(x))
        mean, log_variance = hk.Linear(8)(h), hk.Linear(8)(h)
        z = mean + jnp.exp(0.5 * log_variance) * jax.random.normal(hk.next_rng_key(), mean.shape)
        logits = hk.nets.MLP([32, x.shape[-1]])(z)
        rest = 0.5 * (jnp.exp(log_variance) + mean**2 - 1 - log_variance).sum(-1)
        likelihood = (x * jax.nn.log_sigmoid(logits) + (1 - x) * jax.nn.log_sigmoid(-logits)).sum(-1)
        return (rest - likelihood).mean()

    model = hk.transform(forward)

    def step(params: Any, key: Array, x: Array) -> tuple[Any, Array, Array]:
        key, own = jax.random.split(key)
        loss, grads = jax.value_and_grad(model.apply)(params, own, x)
        return jax.tree.map(lambda p, g: p - 0.01 * g, params, grads), key, loss

    x = (values(16, 32) > 0).astype(jnp.float32)
    params = jax.jit(model.init)(jax.random.PRNGKey(0), x)
    return Case(step=step, args=(params, jax.random.PRNGKey(2), x), carries=(0, 1))


# --- Equinox -------------------------------------------------------------------------------------------------


def equinox_case(model: Any, loss_fn: Any, *batch: Any, tx: Any = None) -> Case:
    """The model's arrays are the argument, its functions stay outside, as `eqx.filter_jit` does it."""
    tx = optax.adam(1e-2, eps=EPS) if tx is None else tx
    arrays, static = eqx.partition(model, eqx.is_array)

    def step(arrays: Any, opt_state: Any, *batch: Any) -> tuple[Any, Any, Array]:
        model = eqx.combine(arrays, static)
        loss, grads = eqx.filter_value_and_grad(loss_fn)(model, *batch)
        updates, opt_state = tx.update(grads, opt_state, eqx.filter(model, eqx.is_inexact_array))
        return eqx.filter(eqx.apply_updates(model, updates), eqx.is_array), opt_state, loss

    opt_state = tx.init(eqx.filter(model, eqx.is_inexact_array))
    return Case(step=step, args=(arrays, opt_state, *batch), carries=(0, 1))


@idiom()
def equinox_cnn() -> Case:
    """The batch is a `vmap` over a module of single examples."""
    keys = jax.random.split(jax.random.key(0), 3)
    model = eqx.nn.Sequential(
        [
            eqx.nn.Conv2d(1, 8, kernel_size=4, key=keys[0]),
            eqx.nn.MaxPool2d(kernel_size=2),
            eqx.nn.Lambda(jax.nn.relu),
            eqx.nn.Lambda(jnp.ravel),
            eqx.nn.Linear(8 * 12 * 12, 16, key=keys[1]),
            eqx.nn.Lambda(jax.nn.sigmoid),
            eqx.nn.Linear(16, 8, key=keys[2]),
            eqx.nn.Lambda(jax.nn.log_softmax),
        ]
    )

    def loss_fn(model: Any, x: Array, y: Array) -> Array:
        predicted = jax.vmap(model)(x)
        return -jnp.take_along_axis(predicted, y[:, None], axis=1).mean()

    return equinox_case(model, loss_fn, values(16, 1, 16, 16), tokens(16, vocabulary=8))


@idiom()
def equinox_rnn() -> Case:
    class Model(eqx.Module):
        cell: eqx.nn.GRUCell
        linear: eqx.nn.Linear
        bias: Array

        def __call__(self, x: Array) -> Array:
            def one(h: Array, v: Array) -> tuple[Array, None]:
                return self.cell(v, h), None

            out, _ = jax.lax.scan(one, jnp.zeros(self.cell.hidden_size), x)
            return jax.nn.sigmoid(self.linear(out) + self.bias)

    keys = jax.random.split(jax.random.key(0), 2)
    model = Model(eqx.nn.GRUCell(8, 16, key=keys[0]), eqx.nn.Linear(16, 1, key=keys[1]), jnp.zeros(1))

    def loss_fn(model: Any, x: Array, y: Array) -> Array:
        predicted = jax.vmap(model)(x)[:, 0]
        return -(y * jnp.log(predicted) + (1 - y) * jnp.log(1 - predicted)).mean()

    return equinox_case(model, loss_fn, values(16, 10, 8), (values(16) > 0).astype(jnp.float32))


@idiom()
def equinox_batch_norm_state() -> Case:
    """`eqx.nn.State` goes in and out, an axis name joins the batch."""
    keys = jax.random.split(jax.random.key(0), 2)

    class Model(eqx.Module):
        first: eqx.nn.Linear
        norm: eqx.nn.BatchNorm
        second: eqx.nn.Linear

        def __call__(self, x: Array, state: Any) -> tuple[Array, Any]:
            x, state = self.norm(self.first(x), state)
            return self.second(jax.nn.relu(x)), state

    def make() -> Model:
        return Model(
            eqx.nn.Linear(16, 32, key=keys[0]),
            eqx.nn.BatchNorm(32, axis_name="batch", mode="batch"),
            eqx.nn.Linear(32, 8, key=keys[1]),
        )

    model, state = eqx.nn.make_with_state(make)()
    params, static = eqx.partition(model, eqx.is_inexact_array)
    state_arrays, state_static = eqx.partition(state, eqx.is_array)

    def step(params: Any, state: Any, x: Array, y: Array) -> tuple[Any, Any, Array]:
        def loss_fn(params: Any) -> tuple[Array, Any]:
            model = eqx.combine(params, static)
            live = eqx.combine(state, state_static)
            batched = jax.vmap(model, axis_name="batch", in_axes=(0, None), out_axes=(0, None))
            logits, live = batched(x, live)
            loss = optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()
            return loss, eqx.filter(live, eqx.is_array)

        (loss, new), grads = jax.value_and_grad(loss_fn, has_aux=True)(params)
        return jax.tree.map(lambda p, g: p - 0.1 * g, params, grads), new, loss

    return Case(step=step, args=(params, state_arrays, values(16, 16), tokens(16, vocabulary=8)), carries=(0, 1))


@idiom()
def equinox_score_diffusion() -> Case:
    """A mixer as a score network, times and noise of each example from its own key."""

    class Mixer(eqx.Module):
        patches: eqx.nn.MLP
        hidden: eqx.nn.MLP
        norm: eqx.nn.LayerNorm

        def __call__(self, t: Array, y: Array) -> Array:
            y = y + jnp.sin(t)
            y = y + jax.vmap(self.patches)(y.T).T
            return y + jax.vmap(self.hidden)(self.norm(y))

    keys = jax.random.split(jax.random.key(0), 2)
    model = Mixer(
        eqx.nn.MLP(8, 8, 16, depth=1, key=keys[0]),
        eqx.nn.MLP(16, 16, 16, depth=1, key=keys[1]),
        eqx.nn.LayerNorm((8, 16)),
    )

    def single(model: Any, x: Array, t: Array, key: Array) -> Array:
        mean, std = x * jnp.exp(-0.5 * t), jnp.sqrt(jnp.maximum(1 - jnp.exp(-t), 1e-5))
        noise = jax.random.normal(key, x.shape)
        return ((1 - jnp.exp(-t)) * (model(t, mean + std * noise) + noise / std) ** 2).mean()

    def loss_fn(model: Any, x: Array, key: Array) -> Array:
        key, time_key = jax.random.split(key)
        n = x.shape[0]
        t = jax.random.uniform(time_key, (n,), maxval=10.0 / n) + (10.0 / n) * jnp.arange(n)
        return jax.vmap(functools.partial(single, model))(x, t, jax.random.split(key, n)).mean()

    return equinox_case(model, loss_fn, values(16, 8, 16), jax.random.key(3))


@idiom()
def equinox_neural_ode() -> Case:
    """Runge-Kutta steps by scan, whose reverse is checkpointed."""
    field = eqx.nn.MLP(8, 8, 16, depth=2, activation=jax.nn.softplus, key=jax.random.key(0))

    def loss_fn(field: Any, y0: Array, target: Array) -> Array:
        def integrate(y: Array) -> Array:
            @jax.checkpoint
            def one(y: Array, _: None) -> tuple[Array, Array]:
                k1 = field(y)
                k2 = field(y + 0.05 * k1)
                k3 = field(y + 0.05 * k2)
                k4 = field(y + 0.1 * k3)
                y = y + 0.1 / 6 * (k1 + 2 * k2 + 2 * k3 + k4)
                return y, y

            return jax.lax.scan(one, y, None, length=5)[1]

        return ((jax.vmap(integrate)(y0) - target) ** 2).mean()

    return equinox_case(field, loss_fn, values(16, 8), values(16, 5, 8))


@idiom()
def equinox_bounded_while_loop() -> Case:
    """Equinox's own differentiable loops bring primitives of their own."""
    model = eqx.nn.Linear(16, 16, key=jax.random.key(0))

    def loss_fn(model: Any, x: Array) -> Array:
        def one(carry: tuple[Array, Array]) -> tuple[Array, Array]:
            i, h = carry
            return i + 1, jnp.tanh(jax.vmap(model)(h))

        _, h = eqx.internal.while_loop(
            lambda c: c[0] < 4, one, (jnp.int32(0), x), max_steps=4, kind="checkpointed", checkpoints=2
        )
        return (h**2).mean()

    return equinox_case(model, loss_fn, values(16, 16), tx=optax.sgd(0.1))


# --- transformers --------------------------------------------------------------------------------------------


def hugging_face(make: Any, batch: dict[str, Array], loss_of: Any) -> Case:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that its Flax models are deprecated
        model = make()
    tx = optax.sgd(0.1, momentum=0.9)

    def step(params: Any, opt_state: Any, key: Array, batch: Any) -> tuple[Any, Any, Array, Array]:
        key, own = jax.random.split(key)

        def loss_fn(params: Any) -> Array:
            labels = batch["labels"]
            inputs = {k: v for k, v in batch.items() if k != "labels"}
            return loss_of(model(**inputs, params=params, dropout_rng=own, train=True), labels)

        loss, grads = jax.value_and_grad(loss_fn)(params)
        updates, opt_state = tx.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state, key, loss

    params = model.params
    return Case(step=step, args=(params, tx.init(params), jax.random.PRNGKey(0), batch), carries=(0, 1, 2))


def next_tokens(out: Any, labels: Array) -> Array:
    return optax.softmax_cross_entropy_with_integer_labels(out.logits[:, :-1], labels[:, 1:]).mean()


@idiom()
def transformers_gpt2() -> Case:
    from transformers import FlaxGPT2LMHeadModel, GPT2Config

    config = GPT2Config(vocab_size=64, n_positions=16, n_embd=16, n_layer=2, n_head=4)
    ids = tokens(8, 16, vocabulary=64)
    batch = {"input_ids": ids, "attention_mask": jnp.ones_like(ids), "labels": ids}
    return hugging_face(lambda: FlaxGPT2LMHeadModel(config, input_shape=(1, 8)), batch, next_tokens)


@idiom()
def transformers_bert() -> Case:
    from transformers import BertConfig, FlaxBertForSequenceClassification

    config = BertConfig(
        vocab_size=64,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=32,
        max_position_embeddings=16,
        num_labels=4,
    )
    ids = tokens(8, 16, vocabulary=64)
    lengths = tokens(8, vocabulary=16) + 1
    batch = {
        "input_ids": ids,
        "attention_mask": (jnp.arange(16) < lengths[:, None]).astype(jnp.int32),
        "token_type_ids": jnp.zeros_like(ids),
        "labels": tokens(8, vocabulary=4),
    }

    def loss_of(out: Any, labels: Array) -> Array:
        return optax.softmax_cross_entropy_with_integer_labels(out.logits, labels).mean()

    return hugging_face(lambda: FlaxBertForSequenceClassification(config, input_shape=(1, 8)), batch, loss_of)


@idiom()
def transformers_vit() -> Case:
    from transformers import FlaxViTForImageClassification, ViTConfig

    config = ViTConfig(
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=32,
        image_size=16,
        patch_size=4,
        num_labels=8,
    )

    def loss_of(out: Any, labels: Array) -> Array:
        return optax.softmax_cross_entropy_with_integer_labels(out.logits, labels).mean()

    batch = {"pixel_values": values(8, 3, 16, 16), "labels": tokens(8, vocabulary=8)}
    return hugging_face(lambda: FlaxViTForImageClassification(config, input_shape=(1, 16, 16, 3)), batch, loss_of)
