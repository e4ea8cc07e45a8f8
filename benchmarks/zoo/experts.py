"""Mixtures of experts: Mixtral 8x7B (arXiv 2401.04088) and DeepSeekMoE 16B (arXiv 2401.06066).

Experts have a capacity for each sequence; what is above it skips them. Mixtral's few experts are reached by the dense
dispatch of GShard (arXiv 2006.16668), an einsum with a mask; DeepSeek's many by index, a scatter and two gathers.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from flax import linen as nn

from zoo.decoder import Attention, GatedMLP
from zoo.layers import Dense, cross_entropy, repeat
from zoo.model import Batch, ints


@dataclass(frozen=True, kw_only=True)
class Config:
    layers: int
    d_model: int
    heads: int
    kv_heads: int
    vocab: int
    experts: int
    top_k: int
    d_expert: int
    dense_layers: int = 0
    """Layers at the start with one plain MLP of width `d_dense`."""
    d_dense: int = 0
    d_shared: int = 0
    """Width of the experts that every token passes; zero for none."""
    by_index: bool = False
    capacity_factor: float = 1.25
    seq_len: int = 4096
    head_dim: int = 128
    modern: bool = True
    scanned: bool = True
    remat: bool = True
    dtype: str = "bfloat16"

    @property
    def capacity(self) -> int:
        """Tokens that an expert takes from one sequence, in whole eighths as kernels like them."""
        return 8 * math.ceil(self.top_k * self.seq_len * self.capacity_factor / self.experts / 8)


MIXTRAL_8X7B = Config(layers=32, d_model=4096, heads=32, kv_heads=8, vocab=32000, experts=8, top_k=2, d_expert=14336)
DEEPSEEK_16B = Config(
    layers=28,
    d_model=2048,
    heads=16,
    kv_heads=16,
    vocab=102400,
    experts=64,
    top_k=6,
    d_expert=1408,
    dense_layers=1,
    d_dense=10944,
    d_shared=2 * 1408,
    by_index=True,
)
_TINY = {"d_model": 32, "heads": 8, "vocab": 64, "experts": 8, "seq_len": 16, "head_dim": 4, "dtype": "float32"}
TINY_MIXTRAL = Config(**_TINY, layers=2, kv_heads=4, top_k=2, d_expert=64)
TINY_DEEPSEEK = Config(
    **_TINY, layers=3, kv_heads=8, top_k=3, d_expert=16, dense_layers=1, d_dense=64, d_shared=32, by_index=True
)


def route(gates: jax.Array, top_k: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The choices of each token, their weights, and their places in the experts' queues.

    Args:
      gates: probabilities, [batch, seq, experts].

    Returns:
      Three arrays [batch, seq, top_k]. A queue is in order of position, a token's better choices ahead.
    """
    weights, chosen = jax.lax.top_k(gates, top_k)
    one_hot = jax.nn.one_hot(chosen, gates.shape[-1], dtype=jnp.int32)
    of_token = one_hot.sum(2)
    before = jnp.cumsum(of_token, axis=1) - of_token
    places = jnp.einsum("bske,bse->bsk", one_hot, before)
    return chosen, weights / weights.sum(-1, keepdims=True), places


class Experts(nn.Module):
    """All experts' gated MLPs over their queues, [batch, experts, capacity, d_model]."""

    config: Config

    @nn.compact
    def __call__(self, queues: jax.Array) -> jax.Array:
        c = self.config

        def weight(name: str, rows: int, columns: int) -> jax.Array:
            init = nn.initializers.lecun_normal(batch_axis=0)
            return self.param(name, init, (c.experts, rows, columns)).astype(c.dtype)

        gate = jnp.einsum("becd,edf->becf", queues, weight("gate", c.d_model, c.d_expert))
        up = jnp.einsum("becd,edf->becf", queues, weight("up", c.d_model, c.d_expert))
        return jnp.einsum("becf,efd->becd", nn.silu(gate) * up, weight("down", c.d_expert, c.d_model))


class Mixture(nn.Module):
    """[batch, seq, d_model] to the same, and the load-balance loss: 1 where the experts share the tokens evenly."""

    config: Config

    @nn.compact
    def __call__(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        c = self.config
        gates = jax.nn.softmax(Dense(c.experts, name="router")(x.astype(jnp.float32)))
        chosen, weights, places = route(gates, c.top_k)
        experts = Experts(c, name="experts")
        if c.by_index:
            mixed = self.by_index(experts, x, chosen, weights, places)
        else:
            # A place past the capacity is out of one_hot's range, hence all zeros.
            at = jax.nn.one_hot(places, c.capacity, dtype=jnp.float32)
            to = jax.nn.one_hot(chosen, c.experts, dtype=jnp.float32)
            combine = jnp.einsum("bsk,bske,bskc->bsec", weights, to, at).astype(x.dtype)
            answers = experts(jnp.einsum("bsec,bsd->becd", (combine > 0).astype(x.dtype), x))
            mixed = jnp.einsum("bsec,becd->bsd", combine, answers)
        share = jax.nn.one_hot(chosen, c.experts).sum(2).mean(axis=1) / c.top_k
        return mixed, c.experts * (gates.mean(axis=1) * share).sum(-1).mean()

    def by_index(
        self, experts: Experts, x: jax.Array, chosen: jax.Array, weights: jax.Array, places: jax.Array
    ) -> jax.Array:
        c = self.config
        size = c.experts * c.capacity
        slots = jnp.where(places < c.capacity, chosen * c.capacity + places, size)  # `size`: nowhere

        def queued(x: jax.Array, slots: jax.Array) -> jax.Array:
            tokens = jnp.broadcast_to(jnp.arange(c.seq_len)[:, None], slots.shape)
            token_of = jnp.full(size, c.seq_len).at[slots.reshape(-1)].set(tokens.reshape(-1), mode="drop")
            return x.at[token_of].get(mode="fill", fill_value=0)

        queues = jax.vmap(queued)(x, slots).reshape(-1, c.experts, c.capacity, c.d_model)
        answers = experts(queues).reshape(-1, size, c.d_model)
        picked = jax.vmap(lambda a, s: a.at[s].get(mode="fill", fill_value=0))(answers, slots)
        return jnp.einsum("bskd,bsk->bsd", picked, weights.astype(x.dtype))


class Block(nn.Module):
    config: Config
    dense: bool

    @nn.compact
    def __call__(self, x: jax.Array) -> tuple[jax.Array, jax.Array | None]:
        c = self.config
        x = x + Attention(c, name="attention")(nn.RMSNorm(dtype=c.dtype, name="attention_norm")(x))
        h = nn.RMSNorm(dtype=c.dtype, name="mlp_norm")(x)
        if self.dense:
            return x + GatedMLP(c.d_dense, c.dtype, name="mlp")(h), None
        mixed, balance = Mixture(c, name="mixture")(h)
        if c.d_shared:
            mixed += GatedMLP(c.d_shared, c.dtype, name="shared")(h)
        return x + mixed, balance


class MixtureDecoder(nn.Module):
    """Tokens and the tokens that follow, [batch, seq], to the loss."""

    config: Config

    @nn.compact
    def __call__(self, tokens: jax.Array, targets: jax.Array) -> jax.Array:
        c = self.config
        x = nn.Embed(c.vocab, c.d_model, dtype=c.dtype, name="embed")(tokens)
        if c.dense_layers:
            x, _ = repeat(Block, c.dense_layers, x, name="dense", scanned=False, remat=c.remat, config=c, dense=True)
        count = c.layers - c.dense_layers
        x, balance = repeat(Block, count, x, name="layers", scanned=c.scanned, remat=c.remat, config=c, dense=False)
        logits = Dense(c.vocab, dtype=c.dtype, name="head")(nn.RMSNorm(dtype=c.dtype, name="final_norm")(x))
        return cross_entropy(logits, targets) + 0.01 * balance / count


def make(c: Config, batch: int) -> tuple[nn.Module, Batch, dict[str, int]]:
    tokens = ints(batch, c.seq_len)
    return MixtureDecoder(c), {"tokens": tokens, "targets": tokens}, {"tokens": c.vocab, "targets": c.vocab}
