"""Translation by LSTMs as FlexFlow has it (arXiv 1807.05358, table 3): four recurrent layers, attention, softmax."""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from flax import linen as nn

from zoo.layers import Dense, cross_entropy
from zoo.model import Batch, ints


@dataclass(frozen=True, kw_only=True)
class Config:
    layers: int = 2
    """Of the encoder, and as many of the decoder."""
    hidden: int = 1024
    vocab: int = 32768
    seq_len: int = 40
    """Time steps, of the source and of the target."""
    scanned: bool = True
    """Whether time is a scan, or unrolled as in the paper."""
    dtype: str = "bfloat16"


FLEXFLOW_NMT = Config()
TINY = Config(layers=1, hidden=16, vocab=64, seq_len=6, dtype="float32")


class LSTM(nn.Module):
    """[batch, time, features] to [batch, time, hidden]."""

    config: Config

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        c = self.config
        gates = nn.Dense(4 * c.hidden, dtype=c.dtype, name="input")(x)
        kernel = self.param("recurrent", nn.initializers.orthogonal(), (c.hidden, 4 * c.hidden)).astype(c.dtype)

        def cell(carry: tuple[jax.Array, jax.Array], gates: jax.Array) -> tuple[tuple[jax.Array, jax.Array], jax.Array]:
            h, memory = carry
            i, f, g, o = jnp.split(gates + h @ kernel, 4, axis=-1)
            memory = nn.sigmoid(f + 1) * memory + nn.sigmoid(i) * jnp.tanh(g)
            h = nn.sigmoid(o) * jnp.tanh(memory)
            return (h, memory), h

        start = jnp.zeros((x.shape[0], c.hidden), c.dtype)
        times = jnp.moveaxis(gates, 1, 0)
        _, out = jax.lax.scan(cell, (start, start), times, unroll=1 if c.scanned else c.seq_len)
        return jnp.moveaxis(out, 0, 1)


class Translator(nn.Module):
    config: Config

    @nn.compact
    def __call__(self, source: jax.Array, inputs: jax.Array, targets: jax.Array) -> jax.Array:
        c = self.config
        encoded = nn.Embed(c.vocab, c.hidden, dtype=c.dtype, name="source_embed")(source)
        x = nn.Embed(c.vocab, c.hidden, dtype=c.dtype, name="target_embed")(inputs)
        for _ in range(c.layers):
            encoded = LSTM(c)(encoded)
        for _ in range(c.layers):
            x = LSTM(c)(x)
        scores = jnp.einsum("bqd,bkd->bqk", Dense(c.hidden, dtype=c.dtype, name="query")(x), encoded)
        weights = jax.nn.softmax(scores.astype(jnp.float32)).astype(c.dtype)
        context = jnp.einsum("bqk,bkd->bqd", weights, encoded)
        x = jnp.tanh(Dense(c.hidden, dtype=c.dtype, name="mix")(jnp.concatenate([context, x], axis=-1)))
        return cross_entropy(nn.Dense(c.vocab, dtype=c.dtype, name="softmax")(x), targets)


def make(c: Config, batch: int) -> tuple[nn.Module, Batch, dict[str, int]]:
    names = ("source", "inputs", "targets")
    return Translator(c), dict.fromkeys(names, ints(batch, c.seq_len)), dict.fromkeys(names, c.vocab)
