"""ViT-H/14, a transformer over the patches of an image (arXiv 2010.11929)."""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from flax import linen as nn

from zoo.layers import Dense, attend, cross_entropy, repeat
from zoo.model import Batch, floats, ints


@dataclass(frozen=True, kw_only=True)
class Config:
    layers: int = 32
    d_model: int = 1280
    heads: int = 16
    d_ff: int = 5120
    image: int = 224
    patch: int = 14
    classes: int = 1000
    scanned: bool = True
    remat: bool = True
    dtype: str = "bfloat16"


VIT_H14 = Config()
TINY = Config(layers=2, d_model=32, heads=8, d_ff=64, image=16, patch=4, classes=16, dtype="float32")


class Block(nn.Module):
    config: Config

    @nn.compact
    def __call__(self, x: jax.Array) -> tuple[jax.Array, None]:
        c = self.config
        h = nn.LayerNorm(dtype=c.dtype)(x)
        head = c.d_model // c.heads
        q = Dense((c.heads, 1, head), use_bias=True, dtype=c.dtype, name="query")(h)
        k, v = (Dense((c.heads, head), use_bias=True, dtype=c.dtype, name=name)(h) for name in ("key", "value"))
        x = x + Dense(c.d_model, axis=(-3, -2, -1), use_bias=True, dtype=c.dtype, name="out")(attend(q, k, v))
        h = nn.LayerNorm(dtype=c.dtype)(x)
        h = nn.gelu(nn.Dense(c.d_ff, dtype=c.dtype)(h))
        return x + nn.Dense(c.d_model, dtype=c.dtype)(h), None


class ViT(nn.Module):
    config: Config

    @nn.compact
    def __call__(self, images: jax.Array, labels: jax.Array) -> jax.Array:
        c = self.config
        patch = (c.patch, c.patch)
        x = nn.Conv(c.d_model, patch, patch, padding="VALID", dtype=c.dtype, name="patches")(images)
        x = x.reshape(x.shape[0], -1, c.d_model)
        token = self.param("class_token", nn.initializers.zeros, (c.d_model,)).astype(c.dtype)
        x = jnp.concatenate([jnp.broadcast_to(token, (x.shape[0], 1, c.d_model)), x], axis=1)
        x = x + self.param("positions", nn.initializers.normal(0.02), x.shape[1:]).astype(c.dtype)
        x, _ = repeat(Block, c.layers, x, name="layers", scanned=c.scanned, remat=c.remat, config=c)
        x = nn.LayerNorm(dtype=c.dtype)(x[:, 0])
        return cross_entropy(nn.Dense(c.classes, dtype=c.dtype, name="head")(x), labels)


def make(c: Config, batch: int) -> tuple[nn.Module, Batch, dict[str, int]]:
    shapes = {"images": floats(batch, c.image, c.image, 3), "labels": ints(batch)}
    return ViT(c), shapes, {"labels": c.classes}
