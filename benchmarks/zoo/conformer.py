"""Conformer-CTC Large: speech recognition (arXiv 2005.08100), of the sizes of NVIDIA NeMo's model of that name."""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn

from zoo.layers import Dense, repeat
from zoo.model import Batch, floats, ints


@dataclass(frozen=True, kw_only=True)
class Config:
    layers: int = 18
    d_model: int = 512
    heads: int = 8
    kernel: int = 31
    mels: int = 80
    frames: int = 1600
    """Of 10 ms each; four become one."""
    labels: int = 64
    """Of a transcript."""
    vocab: int = 129
    """With the blank."""
    scanned: bool = True
    remat: bool = True
    dtype: str = "bfloat16"


CONFORMER_L = Config()
TINY = Config(layers=2, d_model=32, kernel=5, mels=8, frames=32, labels=3, vocab=16, dtype="float32")


class RelativeAttention(nn.Module):
    """Self-attention with sinusoidal relative positions (Transformer-XL, arXiv 1901.02860)."""

    config: Config

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        c, length = self.config, x.shape[1]
        heads = (c.heads, c.d_model // c.heads)
        fields = {"use_bias": True, "dtype": c.dtype}
        q, k, v = (Dense(heads, name=name, **fields)(x) for name in ("query", "key", "value"))
        half = c.d_model // 2
        angles = np.outer(np.arange(length - 1, -length, -1), 10_000.0 ** (-np.arange(half) / half))
        sinusoids = jnp.asarray(np.concatenate([np.sin(angles), np.cos(angles)], axis=-1), c.dtype)
        positions = Dense(heads, dtype=c.dtype, name="position")(sinusoids)
        of_content, of_position = (
            self.param(name, nn.initializers.normal(0.02), heads).astype(c.dtype) for name in ("u", "v")
        )
        scores = jnp.einsum("bqhd,bkhd->bhqk", q + of_content, k)
        relative = jnp.einsum("bqhd,phd->bhqp", q + of_position, positions)
        # Row q holds the distances length - 1 to 1 - length: shifted by q, those to keys 0, 1, ...
        b, h, _, p = relative.shape
        shifted = jnp.pad(relative, ((0, 0), (0, 0), (0, 0), (1, 0))).reshape(b, h, p + 1, length)[:, :, 1:]
        scores += shifted.reshape(b, h, length, p)[..., :length]
        weights = jax.nn.softmax(scores.astype(jnp.float32) * heads[1] ** -0.5).astype(c.dtype)
        mixed = jnp.einsum("bhqk,bkhd->bqhd", weights, v)
        return Dense(c.d_model, axis=(-2, -1), name="out", **fields)(mixed)


class Block(nn.Module):
    """Half an MLP, attention, convolution, half an MLP, norm."""

    config: Config

    def mlp(self, x: jax.Array) -> jax.Array:
        c = self.config
        h = nn.silu(nn.Dense(4 * c.d_model, dtype=c.dtype)(nn.LayerNorm(dtype=c.dtype)(x)))
        return x + nn.Dense(c.d_model, dtype=c.dtype)(h) / 2

    @nn.compact
    def __call__(self, x: jax.Array) -> tuple[jax.Array, None]:
        c = self.config
        x = self.mlp(x)
        x = x + RelativeAttention(c, name="attention")(nn.LayerNorm(dtype=c.dtype)(x))
        h = nn.glu(nn.Dense(2 * c.d_model, dtype=c.dtype)(nn.LayerNorm(dtype=c.dtype)(x)))
        h = nn.Conv(c.d_model, (c.kernel,), feature_group_count=c.d_model, dtype=c.dtype)(h)
        # Layer norm for batch norm, which a remat of the layer would update twice.
        h = nn.silu(nn.LayerNorm(dtype=c.dtype)(h))
        x = x + nn.Dense(c.d_model, dtype=c.dtype)(h)
        return nn.LayerNorm(dtype=c.dtype)(self.mlp(x)), None


class Conformer(nn.Module):
    config: Config

    @nn.compact
    def __call__(self, frames: jax.Array, labels: jax.Array) -> jax.Array:
        c = self.config
        x = frames[..., None]
        for _ in range(2):
            x = nn.relu(nn.Conv(c.d_model, (3, 3), 2, dtype=c.dtype)(x))
        x = nn.Dense(c.d_model, dtype=c.dtype, name="subsampled")(x.reshape(*x.shape[:2], -1))
        x, _ = repeat(Block, c.layers, x, name="layers", scanned=c.scanned, remat=c.remat, config=c)
        logits = nn.Dense(c.vocab, dtype=c.dtype, name="head")(x).astype(jnp.float32)
        frame_padding, label_padding = jnp.zeros(logits.shape[:2]), jnp.zeros(labels.shape)
        return optax.ctc_loss(logits, frame_padding, labels, label_padding).mean()


def make(c: Config, batch: int) -> tuple[nn.Module, Batch, dict[str, int]]:
    shapes = {"frames": floats(batch, c.frames, c.mels), "labels": ints(batch, c.labels)}
    return Conformer(c), shapes, {"labels": c.vocab}
