"""T5-11B, an encoder and a decoder with relative positions (arXiv 1910.10683), trained with Adafactor."""

from __future__ import annotations

import math
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from zoo.layers import Dense, attend, cross_entropy, repeat
from zoo.model import Batch, ints


@dataclass(frozen=True, kw_only=True)
class Config:
    layers: int = 24
    """Of the encoder, and as many of the decoder."""
    d_model: int = 1024
    heads: int = 128
    head_dim: int = 128
    d_ff: int = 65536
    vocab: int = 32128
    seq_len: int = 512
    """Of the inputs, and of the targets."""
    buckets: int = 32
    scanned: bool = True
    remat: bool = True
    dtype: str = "bfloat16"


T5_11B = Config()
TINY = Config(layers=2, d_model=32, heads=8, head_dim=4, d_ff=64, vocab=64, seq_len=16, buckets=8, dtype="float32")


def buckets(length: int, count: int, *, causal: bool) -> np.ndarray:
    """The bucket of each (query, key), [length, length]: exact near by, logarithmic up to 128 (section 2.1)."""
    distance = np.arange(length)[None] - np.arange(length)[:, None]
    half = count if causal else count // 2
    side = np.zeros_like(distance) if causal else half * (distance > 0)
    distance = np.maximum(-distance, 0) if causal else np.abs(distance)
    near = half // 2
    far = near + np.log(np.maximum(distance, 1) / near) / math.log(128 / near) * (half - near)
    return (side + np.where(distance < near, distance, np.minimum(far.astype(int), half - 1))).astype(np.int32)


class Attention(nn.Module):
    config: Config

    @nn.compact
    def __call__(self, x: jax.Array, keys: jax.Array, bias: jax.Array | None, causal: bool) -> jax.Array:
        c = self.config
        q = Dense((c.heads, 1, c.head_dim), dtype=c.dtype, name="query")(x)
        k, v = (Dense((c.heads, c.head_dim), dtype=c.dtype, name=name)(keys) for name in ("key", "value"))
        mixed = attend(q, k, v, bias=bias, causal=causal, scale=1.0)  # T5 scales the initial weights instead
        return Dense(c.d_model, axis=(-3, -2, -1), dtype=c.dtype, name="out")(mixed)


class Block(nn.Module):
    """Of the encoder; with what the encoder made, of the decoder."""

    config: Config

    @nn.compact
    def __call__(self, x: jax.Array, bias: jax.Array, encoded: jax.Array | None = None) -> tuple[jax.Array, None]:
        c = self.config
        h = nn.RMSNorm(dtype=c.dtype, name="attention_norm")(x)
        x = x + Attention(c, name="attention")(h, h, bias, encoded is not None)
        if encoded is not None:
            h = nn.RMSNorm(dtype=c.dtype, name="cross_norm")(x)
            x = x + Attention(c, name="cross")(h, encoded, None, False)
        h = nn.RMSNorm(dtype=c.dtype, name="mlp_norm")(x)
        h = nn.relu(Dense(c.d_ff, dtype=c.dtype, name="up")(h))
        return x + Dense(c.d_model, dtype=c.dtype, name="down")(h), None


class T5(nn.Module):
    config: Config

    @nn.compact
    def __call__(self, inputs: jax.Array, decoder_inputs: jax.Array, targets: jax.Array) -> jax.Array:
        c = self.config
        embed = nn.Embed(c.vocab, c.d_model, dtype=c.dtype, name="embed")

        def bias(name: str, causal: bool) -> jax.Array:
            table = self.param(name, nn.initializers.normal(0.05), (c.buckets, c.heads))
            found = table[buckets(c.seq_len, c.buckets, causal=causal)]
            return jnp.moveaxis(found, -1, 0)[:, None]

        shared = {"scanned": c.scanned, "remat": c.remat, "config": c}
        encoded, _ = repeat(Block, c.layers, embed(inputs), bias("encoder_bias", False), name="encoder", **shared)
        encoded = nn.RMSNorm(dtype=c.dtype, name="encoder_norm")(encoded)
        x, _ = repeat(
            Block, c.layers, embed(decoder_inputs), bias("decoder_bias", True), encoded, name="decoder", **shared
        )
        x = nn.RMSNorm(dtype=c.dtype, name="decoder_norm")(x)
        return cross_entropy(embed.attend(x * c.d_model**-0.5), targets)


def make(c: Config, batch: int) -> tuple[nn.Module, Batch, dict[str, int]]:
    names = ("inputs", "decoder_inputs", "targets")
    return T5(c), dict.fromkeys(names, ints(batch, c.seq_len)), dict.fromkeys(names, c.vocab)
