"""A mixture-of-experts transformer after GShard (arXiv 2006.16668), in plain pytrees with optax.

    python examples/moe.py --steps 50
    python examples/moe.py --steps 50 --autoshard

It learns to continue sequences of many synthetic languages, which gives its experts something to be expert in.
An ordinary single-device program: the only line that knows of other devices is the `autoshard` in `main`.
"""

import argparse
import math
import time
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
import optax


@dataclass(frozen=True, kw_only=True)
class Config:
    """Sizes of the model, of its run and of the task."""

    layers: int = 12
    d_model: int = 1024
    heads: int = 16
    experts: int = 64
    d_expert: int = 4096  # hidden width of each expert's MLP
    capacity_factor: float = 1.25
    balance_weight: float = 0.01
    vocab: int = 8_192
    seq_len: int = 1024
    batch: int = 64
    learning_rate: float = 3e-4
    languages: int = 16

    @property
    def capacity(self) -> int:
        """Tokens that an expert takes from one sequence: its even share of two choices a token, and some slack."""
        return math.ceil(2 * self.seq_len * self.capacity_factor / self.experts)

    @classmethod
    def tiny(cls) -> "Config":
        return cls(
            layers=2,
            d_model=32,
            heads=8,
            experts=8,
            d_expert=64,
            capacity_factor=1.0,
            vocab=64,
            seq_len=32,
            batch=8,
            learning_rate=1e-2,
            languages=2,
        )

    @classmethod
    def small(cls) -> "Config":
        return cls(
            layers=2,
            d_model=128,
            heads=8,
            experts=8,
            d_expert=256,
            vocab=256,
            seq_len=64,
            batch=32,
            learning_rate=3e-3,
            languages=4,
        )


def init_layer(config: Config, key: jax.Array):
    d, h, e, f = config.d_model, config.heads, config.experts, config.d_expert
    keys = iter(jax.random.split(key, 7))

    def weight(*shape: int, fan_in: int) -> jax.Array:
        return jax.random.normal(next(keys), shape) / np.sqrt(fan_in)

    attention = {name: weight(d, h, d // h, fan_in=d) for name in ("query", "key", "value")}
    experts = {"up": weight(e, d, f, fan_in=d), "down": weight(e, f, d, fan_in=f)}
    return {
        "attention_norm": jnp.ones(d),
        "attention": attention | {"out": weight(h, d // h, d, fan_in=d)},
        "expert_norm": jnp.ones(d),
        "router": weight(d, e, fan_in=d),
        "experts": experts,
    }


def init_params(config: Config, key: jax.Array):
    embed_key, head_key, *layer_keys = jax.random.split(key, 2 + config.layers)
    return {
        "embed": jax.random.normal(embed_key, (config.vocab, config.d_model)),
        "layers": [init_layer(config, k) for k in layer_keys],
        "final_norm": jnp.ones(config.d_model),
        "head": jax.random.normal(head_key, (config.d_model, config.vocab)) / np.sqrt(config.d_model),
    }


def layer_norm(scale: jax.Array, x: jax.Array) -> jax.Array:
    return scale * jax.nn.standardize(x, axis=-1, epsilon=1e-6)


def attend(params, x: jax.Array) -> jax.Array:
    """Causal multi-head self-attention over x [batch, seq, d_model]."""
    q, k, v = (jnp.einsum("bsd,dhk->bshk", x, params[name]) for name in ("query", "key", "value"))
    scores = jnp.einsum("bqhk,bshk->bhqs", q, k) / np.sqrt(q.shape[-1])
    causal = jnp.tril(jnp.ones(scores.shape[-2:], bool))
    weights = jax.nn.softmax(jnp.where(causal, scores, -jnp.inf))
    return jnp.einsum("bhqs,bshk,hkd->bqd", weights, v, params["out"])


def route(gates: jax.Array, capacity: int) -> tuple[jax.Array, jax.Array]:
    """Gives each token a place in the queues of its two best experts (GShard, algorithm 1).

    Args:
        gates: probability of each expert for each token, [batch, seq, experts].
        capacity: places in an expert's queue, for each sequence.

    Returns:
        The weight of each token's place, [batch, seq, experts, capacity], zero where it has none; and the load-balance
        loss, 1 where the experts share the tokens evenly.
    """
    experts = gates.shape[-1]
    weights, choices = jax.lax.top_k(gates, 2)
    weights = weights / weights.sum(-1, keepdims=True)
    first, second = (jax.nn.one_hot(choices[..., i], experts) for i in range(2))
    # A queue is filled in order of position, and with every first choice ahead of all the second ones.
    ahead_of_first = jnp.cumsum(first, axis=1) - first
    ahead_of_second = jnp.cumsum(second, axis=1) - second + first.sum(axis=1, keepdims=True)

    combine = jnp.zeros((*gates.shape, capacity))
    for i, (chosen, ahead) in enumerate([(first, ahead_of_first), (second, ahead_of_second)]):
        # A place past the capacity is out of one_hot's range, hence all zeros: the token is dropped.
        place = jax.nn.one_hot((ahead * chosen).sum(-1).astype(jnp.int32), capacity)
        combine += jnp.einsum("bs,bse,bsc->bsec", weights[..., i], chosen, place)
    balance = experts * (gates.mean(axis=1) * first.mean(axis=1)).sum(-1).mean()
    return combine, balance


def mix_experts(config: Config, params, x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Each token through its experts: [batch, seq, d_model] to the same, and the load-balance loss."""
    gates = jax.nn.softmax(jnp.einsum("bsd,de->bse", x, params["router"]))
    combine, balance = route(gates, config.capacity)
    dispatch = (combine > 0).astype(x.dtype)
    queued = jnp.einsum("bsec,bsd->ebcd", dispatch, x)
    hidden = jax.nn.gelu(jnp.einsum("ebcd,edf->ebcf", queued, params["experts"]["up"]))
    answers = jnp.einsum("ebcf,efd->ebcd", hidden, params["experts"]["down"])
    return jnp.einsum("bsec,ebcd->bsd", combine, answers), balance


def predict(config: Config, params, tokens: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Token ids [batch, seq] to logits [batch, seq, vocab], and the mean load-balance loss of the layers."""
    x = params["embed"][tokens]
    balances = []
    for layer in params["layers"]:
        x = x + attend(layer["attention"], layer_norm(layer["attention_norm"], x))
        mixed, balance = mix_experts(config, layer, layer_norm(layer["expert_norm"], x))
        x = x + mixed
        balances.append(balance)
    return layer_norm(params["final_norm"], x) @ params["head"], sum(balances) / len(balances)


def make_optimizer(config: Config) -> optax.GradientTransformation:
    return optax.adamw(config.learning_rate, weight_decay=0.01)


def init(config: Config, key: jax.Array):
    params = init_params(config, key)
    return {"params": params, "opt_state": make_optimizer(config).init(params)}


def make_train_step(config: Config):
    """The step of one configuration: (state, batch) -> (state, metrics)."""
    optimizer = make_optimizer(config)

    def train_step(state, batch: dict[str, jax.Array]):
        def loss_fn(params):
            logits, balance = predict(config, params, batch["inputs"])
            cross_entropy = optax.softmax_cross_entropy_with_integer_labels(logits, batch["targets"]).mean()
            return cross_entropy + config.balance_weight * balance, balance

        (loss, balance), grads = jax.value_and_grad(loss_fn, has_aux=True)(state["params"])
        updates, opt_state = optimizer.update(grads, state["opt_state"], state["params"])
        params = optax.apply_updates(state["params"], updates)
        return {"params": params, "opt_state": opt_state}, {"loss": loss, "balance": balance}

    return train_step


train_step = make_train_step(Config())


def example_args(config: Config):
    """The shapes of the step's arguments, with nothing allocated."""
    tokens = jax.ShapeDtypeStruct((config.batch, config.seq_len), jnp.int32)
    return jax.eval_shape(lambda: init(config, jax.random.key(0))), {"inputs": tokens, "targets": tokens}


def batches(config: Config, seed: int = 0):
    """Endless sentences, each in one of the languages; a language allows two successors to each token."""
    successors = np.random.default_rng(0).integers(config.vocab, size=(config.languages, config.vocab, 2))
    rng = np.random.default_rng(seed)
    while True:
        language = rng.integers(config.languages, size=config.batch)
        tokens = np.empty((config.batch, config.seq_len + 1), np.int32)
        tokens[:, 0] = rng.integers(config.vocab, size=config.batch)
        for t in range(config.seq_len):
            tokens[:, t + 1] = successors[language, tokens[:, t], rng.integers(2, size=config.batch)]
        yield {"inputs": tokens[:, :-1], "targets": tokens[:, 1:]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", choices=["tiny", "small", "full"], default="small")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--autoshard", action="store_true", help="run on every visible device, as ffjax finds best")
    args = parser.parse_args()

    config = Config() if args.config == "full" else getattr(Config, args.config)()
    train_step = make_train_step(config)
    if args.autoshard:
        import ffjax

        step = ffjax.autoshard(train_step, donate_argnums=0)
    else:
        step = jax.jit(train_step, donate_argnums=0)

    state = init(config, jax.random.key(args.seed))
    start = time.perf_counter()
    for i, batch in zip(range(1, args.steps + 1), batches(config, args.seed), strict=False):
        state, metrics = step(state, batch)
        if i == 1 or i % 10 == 0 or i == args.steps:
            print(f"step {i:5d}  loss {metrics['loss']:.4f}  {time.perf_counter() - start:.1f} s")


if __name__ == "__main__":
    main()
