"""A click predictor after DLRM (arXiv 1906.00091), in plain pytrees with optax, on a synthetic clickstream.

    python examples/recommender.py --steps 100
    python examples/recommender.py --steps 100 --autoshard

An ordinary single-device program. Its embedding tables run from tens of rows to millions, so no one way to
divide them suits all: the only line that knows of other devices is the `autoshard` in `main`.
"""

import argparse
import itertools
import time
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
import optax

FIELDS = ("user", "item", "advertiser", "site", "category", "device", "hour")


@dataclass(frozen=True, kw_only=True)
class Config:
    """Sizes of the model and of its run."""

    rows: tuple[int, ...] = (10_000_000, 2_000_000, 200_000, 50_000, 1_024, 128, 24)  # of each field's table
    width: int = 128  # of every embedding
    dense: int = 16  # real-valued features of an impression
    bottom: tuple[int, ...] = (512, 256)  # hidden layers between the dense features and their embedding
    top: tuple[int, ...] = (1024, 1024, 512)  # hidden layers between the interactions and the click
    batch: int = 65_536
    learning_rate: float = 0.02

    @classmethod
    def tiny(cls) -> "Config":
        return cls(rows=(1_024, 512, 128, 64, 32, 16, 24), width=16, bottom=(32,), top=(64, 32), batch=16)

    @classmethod
    def small(cls) -> "Config":
        return cls(rows=(100_000, 20_000, 2_000, 512, 128, 32, 24), width=32, bottom=(64,), top=(128, 64), batch=1_024)


def init_mlp(key: jax.Array, sizes: tuple[int, ...]) -> list[dict[str, jax.Array]]:
    """One kernel [fan_in, fan_out] and bias [fan_out] for each pair of neighbouring sizes."""
    he = jax.nn.initializers.he_normal()
    pairs = list(itertools.pairwise(sizes))
    keys = jax.random.split(key, len(pairs))
    return [{"kernel": he(k, pair), "bias": jnp.zeros(pair[1])} for k, pair in zip(keys, pairs, strict=True)]


def init_params(config: Config, key: jax.Array):
    bottom_key, top_key, *table_keys = jax.random.split(key, 2 + len(FIELDS))
    tables = {
        field: jax.random.uniform(k, (rows, config.width), minval=-1, maxval=1) / np.sqrt(config.width)
        for field, rows, k in zip(FIELDS, config.rows, table_keys, strict=True)
    }
    features = len(FIELDS) + 1  # each field's embedding, and that of the dense features
    return {
        "tables": tables,
        "bottom": init_mlp(bottom_key, (config.dense, *config.bottom, config.width)),
        "top": init_mlp(top_key, (config.width + features**2, *config.top, 1)),
    }


def mlp(layers: list[dict[str, jax.Array]], x: jax.Array) -> jax.Array:
    """Dense layers with a ReLU between them, none after the last."""
    *hidden, last = layers
    for layer in hidden:
        x = jax.nn.relu(x @ layer["kernel"] + layer["bias"])
    return x @ last["kernel"] + last["bias"]


def predict(params, batch: dict[str, jax.Array]) -> jax.Array:
    """Logits of a click, [batch]."""
    dense = mlp(params["bottom"], batch["dense"])
    embedded = [table[batch[field]] for field, table in params["tables"].items()]
    features = jnp.stack([dense, *embedded], axis=1)
    dots = jnp.einsum("bfw,bgw->bfg", features, features)
    # Each pair once. Zeros in the other half cost less on an accelerator than gathering the pairs would.
    pairs = jnp.where(np.tri(features.shape[1], k=-1, dtype=bool), dots, 0)
    x = jnp.concatenate([dense, pairs.reshape(pairs.shape[0], -1)], axis=1)
    return mlp(params["top"], x).squeeze(-1)


def make_optimizer(config: Config) -> optax.GradientTransformation:
    # Adagrad: rows seen rarely keep a large step.
    return optax.adagrad(config.learning_rate)


def init(config: Config, key: jax.Array):
    params = init_params(config, key)
    return {"params": params, "opt_state": make_optimizer(config).init(params)}


def make_train_step(config: Config):
    """The step of one configuration: (state, batch) -> (state, metrics)."""
    optimizer = make_optimizer(config)

    def train_step(state, batch: dict[str, jax.Array]):
        def loss_fn(params):
            logits = predict(params, batch)
            return optax.sigmoid_binary_cross_entropy(logits, batch["clicked"]).mean(), logits

        (loss, logits), grads = jax.value_and_grad(loss_fn, has_aux=True)(state["params"])
        updates, opt_state = optimizer.update(grads, state["opt_state"], state["params"])
        params = optax.apply_updates(state["params"], updates)
        accuracy = ((logits > 0) == (batch["clicked"] > 0.5)).mean()
        return {"params": params, "opt_state": opt_state}, {"loss": loss, "accuracy": accuracy}

    return train_step


train_step = make_train_step(Config())


def example_args(config: Config):
    """The shapes of the step's arguments, with nothing allocated."""
    batch = {field: jax.ShapeDtypeStruct((config.batch,), jnp.int32) for field in FIELDS}
    batch["dense"] = jax.ShapeDtypeStruct((config.batch, config.dense), jnp.float32)
    batch["clicked"] = jax.ShapeDtypeStruct((config.batch,), jnp.float32)
    return jax.eval_shape(lambda: init(config, jax.random.key(0))), batch


def batches(config: Config, seed: int = 0):
    """Endless impressions whose clicks follow hidden tastes.

    Ids are skewed, as real traffic is: most impressions come from the first few rows of a table. Each id has a
    hidden taste, an angle; a click is likelier where the dense features point one way, where the
    tastes of the fields are high, and where a user's taste agrees with the item's.
    """
    rng = np.random.default_rng(seed)
    weights = np.random.default_rng(0).normal(size=config.dense) / np.sqrt(config.dense)  # the world's, not the seed's
    while True:
        batch = {
            field: (rows * rng.random(config.batch) ** 4).astype(np.int32)
            for field, rows in zip(FIELDS, config.rows, strict=True)
        }
        batch["dense"] = rng.normal(size=(config.batch, config.dense)).astype(np.float32)
        taste = {field: batch[field] * (1.0 + i) for i, field in enumerate(FIELDS)}
        logits = 2 * batch["dense"] @ weights + 2 * np.cos(taste["user"] - taste["item"])
        logits += sum(np.cos(angle) for angle in taste.values())
        batch["clicked"] = (rng.random(config.batch) < 1 / (1 + np.exp(-logits))).astype(np.float32)
        yield batch


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
