"""Flax NNX: steps that mutate modules, and functional ones on split state."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from programs import Array, Case, values

from conformance.harness import idiom
from conformance.linen_steps import tokens
from conformance.optimizers import EPS


class Block(nnx.Module):
    def __init__(self, features: int, rngs: nnx.Rngs, rate: float = 0.1) -> None:
        wide = {"param_dtype": jnp.result_type(float), "rngs": rngs}
        self.norm = nnx.LayerNorm(features, **wide)
        self.up = nnx.Linear(features, 2 * features, **wide)
        self.dropout = nnx.Dropout(rate, rngs=rngs)
        self.down = nnx.Linear(2 * features, features, **wide)

    def __call__(self, x: Array) -> Array:
        return x + self.down(self.dropout(nnx.gelu(self.up(self.norm(x)))))


class Classifier(nnx.Module):
    """In doubles where a row has them: of what a batch norm takes out of gradients, floats leave but rounding."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        wide = {"param_dtype": jnp.result_type(float), "rngs": rngs}
        self.conv = nnx.Conv(3, 16, (3, 3), use_bias=False, **wide)
        self.norm = nnx.BatchNorm(16, **wide)
        self.block = Block(16, rngs)
        self.head = nnx.Linear(16, 8, **wide)

    def __call__(self, x: Array) -> Array:
        x = nnx.relu(self.norm(self.conv(x)))
        return self.head(self.block(x.mean((1, 2))))


def images() -> dict[str, Array]:
    return {"image": values(16, 8, 8, 3, dtype=jnp.result_type(float)), "label": tokens(16, vocabulary=8)}


def loss_fn(model: Any, batch: dict[str, Array]) -> tuple[Array, Array]:
    logits = model(batch["image"])
    return optax.softmax_cross_entropy_with_integer_labels(logits, batch["label"]).mean(), logits


@idiom(x64=True)
def nnx_train_step_with_metrics() -> Case:
    def step(model: Any, optimizer: Any, metrics: Any, batch: Any) -> None:
        (loss, logits), grads = nnx.value_and_grad(loss_fn, has_aux=True)(model, batch)
        metrics.update(loss=loss, logits=logits, labels=batch["label"])
        optimizer.update(model, grads)

    model = Classifier(nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, optax.sgd(0.1, momentum=0.9), wrt=nnx.Param)
    metrics = nnx.MultiMetric(accuracy=nnx.metrics.Accuracy(), loss=nnx.metrics.Average("loss"))
    return Case(step=step, args=(model, optimizer, metrics, images()))


@idiom()
def nnx_frozen_by_a_filter() -> Case:
    only_head = nnx.All(nnx.Param, nnx.PathContains("head"))

    def step(model: Any, optimizer: Any, batch: Any) -> Array:
        wrt = nnx.DiffState(0, only_head)
        (loss, _), grads = nnx.value_and_grad(loss_fn, argnums=wrt, has_aux=True)(model, batch)
        optimizer.update(model, grads)
        return loss

    model = Classifier(nnx.Rngs(0))
    return Case(step=step, args=(model, nnx.Optimizer(model, optax.sgd(0.1), wrt=only_head), images()))


@idiom(x64=True)
def nnx_functional_state() -> Case:
    """`nnx.split` and `nnx.merge` by the user: a step of plain pytrees."""
    model = Classifier(nnx.Rngs(0))
    graph, params, rest = nnx.split(model, nnx.Param, ...)
    tx = optax.adam(1e-2, eps=EPS)

    def step(params: Any, rest: Any, opt_state: Any, batch: Any) -> tuple[Any, Any, Any, Array]:
        def pure_loss(params: Any) -> tuple[Array, Any]:
            model = nnx.merge(graph, params, rest, copy=True)
            loss, _ = loss_fn(model, batch)
            return loss, nnx.state(model, nnx.Not(nnx.Param))

        (loss, new), grads = jax.value_and_grad(pure_loss, has_aux=True)(params)
        updates, opt_state = tx.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), new, opt_state, loss

    return Case(step=step, args=(params, rest, tx.init(params), images()), carries=(0, 1, 2))


class Scanned(nnx.Module):
    def __init__(self, rngs: nnx.Rngs) -> None:
        @nnx.split_rngs(splits=3)
        @nnx.vmap(in_axes=(0,), out_axes=0)
        def make(rngs: nnx.Rngs) -> Block:
            return Block(16, rngs, rate=0.0)

        self.blocks = make(rngs)
        self.head = nnx.Linear(16, 8, rngs=rngs)

    def __call__(self, x: Array) -> Array:
        @nnx.scan(in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
        @nnx.remat
        def forward(x: Array, block: Block) -> Array:
            return block(x)

        return self.head(forward(x, self.blocks))


@idiom()
def nnx_scan_of_remat() -> Case:
    def step(model: Any, optimizer: Any, x: Array, y: Array) -> Array:
        def loss(model: Any) -> Array:
            return optax.softmax_cross_entropy_with_integer_labels(model(x), y).mean()

        value, grads = nnx.value_and_grad(loss)(model)
        optimizer.update(model, grads)
        return value

    model = Scanned(nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, optax.sgd(0.1), wrt=nnx.Param)
    return Case(step=step, args=(model, optimizer, values(16, 16), tokens(16, vocabulary=8)))


@idiom()
def nnx_evaluation() -> Case:
    def step(model: Any, metrics: Any, batch: Any) -> None:
        loss, logits = loss_fn(model, batch)
        metrics.update(loss=loss, logits=logits, labels=batch["label"])

    model = Classifier(nnx.Rngs(0))
    model.eval()
    metrics = nnx.MultiMetric(accuracy=nnx.metrics.Accuracy(), loss=nnx.metrics.Average("loss"))
    return Case(step=step, args=(model, metrics, images()))


@idiom()
def nnx_two_networks() -> Case:
    """A GAN: two models, two optimizers, one key stream."""

    class Net(nnx.Module):
        def __init__(self, inputs: int, outputs: int, rngs: nnx.Rngs) -> None:
            self.up, self.out = nnx.Linear(inputs, 32, rngs=rngs), nnx.Linear(32, outputs, rngs=rngs)

        def __call__(self, x: Array) -> Array:
            return self.out(nnx.leaky_relu(self.up(x), 0.2))

    def step(generator: Any, critic: Any, g_opt: Any, c_opt: Any, rngs: Any, real: Array) -> dict[str, Array]:
        noise = jax.random.normal(rngs.noise(), (real.shape[0], 8))

        def critic_loss(critic: Any) -> Array:
            fake = jax.lax.stop_gradient(generator(noise))
            return (jax.nn.softplus(-critic(real)) + jax.nn.softplus(critic(fake))).mean()

        def generator_loss(generator: Any) -> Array:
            return jax.nn.softplus(-critic(generator(noise))).mean()

        c_loss, grads = nnx.value_and_grad(critic_loss)(critic)
        c_opt.update(critic, grads)
        g_loss, grads = nnx.value_and_grad(generator_loss)(generator)
        g_opt.update(generator, grads)
        return {"critic": c_loss, "generator": g_loss}

    generator, critic = Net(8, 16, nnx.Rngs(0)), Net(16, 1, nnx.Rngs(1))
    tx = optax.adam(1e-2, eps=EPS)
    optimizers = [nnx.Optimizer(m, tx, wrt=nnx.Param) for m in (generator, critic)]
    return Case(step=step, args=(generator, critic, *optimizers, nnx.Rngs(noise=3), values(16, 16)))


@idiom()
def nnx_lora() -> Case:
    """Adapters are trained, the base weights are not."""

    class Model(nnx.Module):
        def __init__(self, rngs: nnx.Rngs) -> None:
            self.first = nnx.LoRALinear(16, 32, lora_rank=4, rngs=rngs)
            self.second = nnx.LoRALinear(32, 8, lora_rank=4, rngs=rngs)

        def __call__(self, x: Array) -> Array:
            return self.second(nnx.relu(self.first(x)))

    def step(model: Any, optimizer: Any, x: Array, y: Array) -> Array:
        def loss(model: Any) -> Array:
            return optax.softmax_cross_entropy_with_integer_labels(model(x), y).mean()

        value, grads = nnx.value_and_grad(loss, argnums=nnx.DiffState(0, nnx.LoRAParam))(model)
        optimizer.update(model, grads)
        return value

    model = Model(nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, optax.adam(1e-2, eps=EPS), wrt=nnx.LoRAParam)
    return Case(step=step, args=(model, optimizer, values(16, 16), tokens(16, vocabulary=8)))


@idiom()
def nnx_recurrent() -> Case:
    class Model(nnx.Module):
        def __init__(self, rngs: nnx.Rngs) -> None:
            self.embed = nnx.Embed(32, 16, rngs=rngs)
            self.rnn = nnx.RNN(nnx.GRUCell(16, 16, rngs=rngs))
            self.head = nnx.Linear(16, 32, rngs=rngs)

        def __call__(self, ids: Array) -> Array:
            return self.head(self.rnn(self.embed(ids)))

    def step(model: Any, optimizer: Any, ids: Array) -> Array:
        def loss(model: Any) -> Array:
            return optax.softmax_cross_entropy_with_integer_labels(model(ids[:, :-1]), ids[:, 1:]).mean()

        value, grads = nnx.value_and_grad(loss)(model)
        optimizer.update(model, grads)
        return value

    model = Model(nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, optax.adam(1e-2, eps=EPS), wrt=nnx.Param)
    return Case(step=step, args=(model, optimizer, tokens(8, 13)))


@idiom()
def nnx_generation() -> Case:
    """A cache that the module mutates, one token at a time."""

    class Decoder(nnx.Module):
        def __init__(self, rngs: nnx.Rngs) -> None:
            self.embed = nnx.Embed(32, 16, rngs=rngs)
            self.attention = nnx.MultiHeadAttention(4, 16, decode=True, rngs=rngs)

        def __call__(self, ids: Array) -> Array:
            x = self.embed(ids)
            return self.embed.attend(x + self.attention(x))

    def step(model: Any, token: Array) -> Array:
        return model(token)[:, -1:].argmax(-1)

    model = Decoder(nnx.Rngs(0))
    model.attention.init_cache((8, 16, 16))
    return Case(step=step, args=(model, tokens(8, 1)), carries=None)


@idiom()
def nnx_weight_sharing_and_python_fields() -> Case:
    class Model(nnx.Module):
        def __init__(self, rngs: nnx.Rngs) -> None:
            self.inner = nnx.Linear(16, 16, rngs=rngs)
            self.again = self.inner
            self.calls = nnx.Variable(jnp.int32(0))
            self.scale = 2.0

        def __call__(self, x: Array) -> Array:
            self.calls[...] += 1
            return self.again(jnp.tanh(self.inner(x))) * self.scale

    def step(model: Any, optimizer: Any, x: Array) -> Array:
        value, grads = nnx.value_and_grad(lambda m: (m(x) ** 2).mean())(model)
        optimizer.update(model, grads)
        return value

    model = Model(nnx.Rngs(0))
    return Case(step=step, args=(model, nnx.Optimizer(model, optax.sgd(0.1), wrt=nnx.Param), values(16, 16)))
