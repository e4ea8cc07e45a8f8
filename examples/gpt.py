"""A byte-level GPT in Flax linen, trained on the source of Python's own standard library.

    python examples/gpt.py --steps 20
    python examples/gpt.py --steps 20 --autoshard

An ordinary single-device program: the only line that knows of other devices is the `autoshard` in `main`.
"""

import argparse
import functools
import sysconfig
import time
from dataclasses import dataclass
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn
from flax.training.train_state import TrainState


@dataclass(frozen=True, kw_only=True)
class Config:
    """Sizes of the model and of its run; the defaults are GPT-2's, over bytes."""

    layers: int = 12
    d_model: int = 768
    heads: int = 12
    mlp_ratio: int = 4
    vocab: int = 256
    seq_len: int = 1024
    batch: int = 64
    dropout: float = 0.0
    tied_head: bool = False
    scan_layers: bool = False
    remat: bool = False
    dtype: str = "float32"  # of the computation; parameters are always float32
    learning_rate: float = 3e-4
    warmup_steps: int = 100
    decay_steps: int = 10_000
    corpus_bytes: int = 4 * 2**20

    @property
    def head_dim(self) -> int:
        return self.d_model // self.heads

    @classmethod
    def tiny(cls) -> "Config":
        return cls(layers=2, d_model=64, heads=8, seq_len=32, batch=8, learning_rate=1e-2, warmup_steps=4)

    @classmethod
    def small(cls) -> "Config":
        return cls(layers=4, d_model=128, heads=8, seq_len=128, batch=16, learning_rate=3e-3, warmup_steps=10)

    @classmethod
    def gpt2(cls) -> "Config":
        return cls()

    @classmethod
    def gpt3_6b7(cls) -> "Config":
        return cls(
            layers=32, d_model=4096, heads=32, seq_len=2048, batch=512, scan_layers=True, remat=True, dtype="bfloat16"
        )


def rotary_table(config: Config) -> np.ndarray:
    """Cosines and sines of the rotary positions, [2, seq_len, head_dim / 2] (RoFormer, section 3.2)."""
    half = config.head_dim // 2
    angles = np.outer(np.arange(config.seq_len), 10_000.0 ** (-np.arange(half) / half))
    return np.stack([np.cos(angles), np.sin(angles)]).astype(np.float32)


def rotate(x: jax.Array, rotary: jax.Array) -> jax.Array:
    """Turns the two halves of each head by the angle of its position; x is [batch, seq, heads, head_dim]."""
    cos, sin = rotary[:, :, None, :]
    a, b = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, a * sin + b * cos], axis=-1).astype(x.dtype)


class Attention(nn.Module):
    """Causal multi-head self-attention."""

    config: Config

    @nn.compact
    def __call__(self, x: jax.Array, rotary: jax.Array) -> jax.Array:
        c = self.config
        project = functools.partial(nn.DenseGeneral, (c.heads, c.head_dim), use_bias=False, dtype=c.dtype)
        q, k, v = project(name="query")(x), project(name="key")(x), project(name="value")(x)
        scores = jnp.einsum("bqhd,bkhd->bhqk", rotate(q, rotary), rotate(k, rotary)) / np.sqrt(c.head_dim)
        causal = jnp.tril(jnp.ones((x.shape[1], x.shape[1]), bool))
        # Softmax in float32: bfloat16 has too few bits for the sum over a long sequence.
        scores = jnp.where(causal, scores.astype(jnp.float32), -jnp.inf)
        weights = nn.softmax(scores).astype(c.dtype)
        mixed = jnp.einsum("bhqk,bkhd->bqhd", weights, v)
        return nn.DenseGeneral(c.d_model, axis=(-2, -1), use_bias=False, dtype=c.dtype, name="out")(mixed)


class Block(nn.Module):
    """Attention and MLP, each with a residual around it and a norm before it."""

    config: Config

    @nn.compact
    def __call__(self, x: jax.Array, rotary: jax.Array) -> tuple[jax.Array, None]:
        c = self.config
        dropout = nn.Dropout(c.dropout, deterministic=c.dropout == 0)
        h = nn.LayerNorm(dtype=c.dtype, name="attention_norm")(x)
        x = x + dropout(Attention(c, name="attention")(h, rotary))
        h = nn.LayerNorm(dtype=c.dtype, name="mlp_norm")(x)
        h = nn.gelu(nn.Dense(c.mlp_ratio * c.d_model, dtype=c.dtype, name="mlp_up")(h))
        x = x + dropout(nn.Dense(c.d_model, dtype=c.dtype, name="mlp_down")(h))
        return x, None  # the pair that nn.scan wants


class GPT(nn.Module):
    """Token ids [batch, seq] to logits [batch, seq, vocab]."""

    config: Config

    @nn.compact
    def __call__(self, tokens: jax.Array, rotary: jax.Array) -> jax.Array:
        c = self.config
        embed = nn.Embed(c.vocab, c.d_model, dtype=c.dtype, name="embed")
        x = embed(tokens)
        # Inside a scan the compiler cannot merge the recomputation with the original, so no barrier is needed.
        block = nn.remat(Block, prevent_cse=not c.scan_layers) if c.remat else Block
        if c.scan_layers:
            layers = nn.scan(
                block,
                variable_axes={"params": 0},
                split_rngs={"params": True, "dropout": True},
                in_axes=nn.broadcast,
                length=c.layers,
            )
            x, _ = layers(c, name="layers")(x, rotary)
        else:
            for i in range(c.layers):
                x, _ = block(c, name=f"layer_{i}")(x, rotary)
        x = nn.LayerNorm(dtype=c.dtype, name="final_norm")(x)
        return embed.attend(x) if c.tied_head else nn.Dense(c.vocab, use_bias=False, dtype=c.dtype, name="head")(x)


class State(TrainState):
    """Flax's train state, and the key from which each step draws its dropout."""

    dropout_key: jax.Array


# Cached because a TrainState carries both as static fields, which jit compares by identity.
@functools.cache
def make_model(config: Config) -> GPT:
    return GPT(config)


@functools.cache
def make_optimizer(config: Config) -> optax.GradientTransformation:
    schedule = optax.warmup_cosine_decay_schedule(0.0, config.learning_rate, config.warmup_steps, config.decay_steps)
    return optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(schedule, b2=0.95, weight_decay=0.1))


def init(config: Config, key: jax.Array) -> State:
    params_key, dropout_key = jax.random.split(key)
    model = make_model(config)
    tokens = jnp.zeros((1, config.seq_len), jnp.int32)
    params = model.init({"params": params_key, "dropout": dropout_key}, tokens, rotary_table(config))["params"]
    return State.create(apply_fn=model.apply, params=params, tx=make_optimizer(config), dropout_key=dropout_key)


def make_train_step(config: Config):
    """The step of one configuration: (state, batch) -> (state, metrics)."""
    rotary = rotary_table(config)

    def train_step(state: State, batch: dict[str, jax.Array]) -> tuple[State, dict[str, jax.Array]]:
        rngs = {"dropout": jax.random.fold_in(state.dropout_key, state.step)} if config.dropout else None

        def loss_fn(params):
            logits = state.apply_fn({"params": params}, batch["inputs"], rotary, rngs=rngs).astype(jnp.float32)
            return optax.softmax_cross_entropy_with_integer_labels(logits, batch["targets"]).mean()

        loss, grads = jax.value_and_grad(loss_fn)(state.params)
        return state.apply_gradients(grads=grads), {"loss": loss, "grad_norm": optax.tree.norm(grads)}

    return train_step


train_step = make_train_step(Config())


def example_args(config: Config) -> tuple[State, dict[str, jax.ShapeDtypeStruct]]:
    """The shapes of the step's arguments, with nothing allocated."""
    tokens = jax.ShapeDtypeStruct((config.batch, config.seq_len), jnp.int32)
    return jax.eval_shape(lambda: init(config, jax.random.key(0))), {"inputs": tokens, "targets": tokens}


def read_corpus(max_bytes: int) -> np.ndarray:
    """The first `max_bytes` of the standard library's modules, in order of name."""
    folder = Path(sysconfig.get_path("stdlib"))
    corpus = bytearray()
    for path in sorted(folder.glob("*.py")):
        corpus += path.read_bytes()
        if len(corpus) >= max_bytes:
            break
    if not corpus:
        raise FileNotFoundError(f"no *.py under {str(folder)!r}; use a Python that ships its library as source")
    return np.frombuffer(bytes(corpus[:max_bytes]), np.uint8)


def batches(config: Config, seed: int = 0):
    """Endless random windows of the corpus; the targets are the inputs one byte later."""
    corpus = read_corpus(config.corpus_bytes)
    rng = np.random.default_rng(seed)
    while True:
        starts = rng.integers(len(corpus) - config.seq_len, size=(config.batch, 1))
        windows = corpus[starts + np.arange(config.seq_len + 1)].astype(np.int32)
        yield {"inputs": windows[:, :-1], "targets": windows[:, 1:]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", choices=["tiny", "small", "gpt2", "gpt3_6b7"], default="small")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--autoshard", action="store_true", help="run on every visible device, as ffjax finds best")
    args = parser.parse_args()

    config = getattr(Config, args.config)()
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
