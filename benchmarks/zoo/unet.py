"""The U-Net of Stable Diffusion 1 (arXiv 2112.10752): learns to predict the noise added to latent pictures."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from zoo.layers import Dense, attend
from zoo.model import Batch, floats, ints


@dataclass(frozen=True, kw_only=True)
class Config:
    channels: int = 320
    factors: tuple[int, ...] = (1, 2, 4, 4)
    """Of each level; all but the last attend."""
    blocks: int = 2
    heads: int = 8
    context: tuple[int, int] = (77, 768)
    image: int = 64
    latent: int = 4
    norm_groups: int = 32
    remat: bool = False
    dtype: str = "bfloat16"


STABLE_DIFFUSION = Config()
TINY = Config(channels=16, factors=(1, 2), blocks=1, context=(7, 16), image=16, norm_groups=8, dtype="float32")


def group_norm(c: Config, x: jax.Array) -> jax.Array:
    return nn.GroupNorm(c.norm_groups, dtype=c.dtype)(x)


class Residual(nn.Module):
    config: Config
    features: int

    @nn.compact
    def __call__(self, x: jax.Array, time: jax.Array) -> jax.Array:
        c = self.config
        h = nn.Conv(self.features, (3, 3), dtype=c.dtype)(nn.silu(group_norm(c, x)))
        h = h + nn.Dense(self.features, dtype=c.dtype)(nn.silu(time))[:, None, None]
        h = nn.Conv(self.features, (3, 3), dtype=c.dtype)(nn.silu(group_norm(c, h)))
        if x.shape[-1] != self.features:
            x = nn.Conv(self.features, (1, 1), dtype=c.dtype)(x)
        return x + h


class Attention(nn.Module):
    config: Config

    @nn.compact
    def __call__(self, x: jax.Array, context: jax.Array) -> jax.Array:
        c, d = self.config, x.shape[-1]
        q = Dense((c.heads, 1, d // c.heads), dtype=c.dtype)(x)
        k, v = (Dense((c.heads, d // c.heads), dtype=c.dtype)(context) for _ in range(2))
        return Dense(d, axis=(-3, -2, -1), use_bias=True, dtype=c.dtype)(attend(q, k, v))


class SpatialTransformer(nn.Module):
    config: Config

    @nn.compact
    def __call__(self, x: jax.Array, context: jax.Array) -> jax.Array:
        c, (b, h, w, d) = self.config, x.shape
        t = nn.Conv(d, (1, 1), dtype=c.dtype)(group_norm(c, x)).reshape(b, h * w, d)
        y = nn.LayerNorm(dtype=c.dtype)(t)
        t = t + Attention(c)(y, y)
        t = t + Attention(c)(nn.LayerNorm(dtype=c.dtype)(t), context)
        up, gate = jnp.split(nn.Dense(8 * d, dtype=c.dtype)(nn.LayerNorm(dtype=c.dtype)(t)), 2, axis=-1)
        t = t + nn.Dense(d, dtype=c.dtype)(up * nn.gelu(gate))
        return x + nn.Conv(d, (1, 1), dtype=c.dtype)(t.reshape(b, h, w, d))


class UNet(nn.Module):
    config: Config

    @nn.compact
    def __call__(self, latents: jax.Array, context: jax.Array, seed: jax.Array) -> jax.Array:
        c = self.config
        noise_key, time_key = jax.random.split(jax.random.key(seed))
        steps = jax.random.randint(time_key, latents.shape[:1], 0, 1000)
        noise = jax.random.normal(noise_key, latents.shape)
        kept = jnp.cumprod(1 - jnp.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2)[steps][:, None, None, None]
        found = self.denoise(jnp.sqrt(kept) * latents + jnp.sqrt(1 - kept) * noise, context.astype(c.dtype), steps)
        return ((found.astype(jnp.float32) - noise) ** 2).mean()

    def denoise(self, x: jax.Array, context: jax.Array, steps: jax.Array) -> jax.Array:
        c = self.config
        residual, transformer = (nn.remat(k) if c.remat else k for k in (Residual, SpatialTransformer))
        half = c.channels // 2
        angles = steps[:, None] * np.exp(-math.log(10000) * np.arange(half) / half).astype(np.float32)
        time = jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=-1)
        for _ in range(2):
            time = nn.Dense(4 * c.channels, dtype=c.dtype)(nn.silu(time) if _ else time)

        def level(x: jax.Array, features: int, attends: bool) -> jax.Array:
            x = residual(c, features)(x, time)
            return transformer(c)(x, context) if attends else x

        last = len(c.factors) - 1
        x = nn.Conv(c.channels, (3, 3), dtype=c.dtype)(x)
        skips: list[Any] = [x]
        for i, factor in enumerate(c.factors):
            for _ in range(c.blocks):
                x = level(x, factor * c.channels, i < last)
                skips.append(x)
            if i < last:
                x = nn.Conv(x.shape[-1], (3, 3), 2, padding=1, dtype=c.dtype)(x)
                skips.append(x)
        x = residual(c, x.shape[-1])(transformer(c)(residual(c, x.shape[-1])(x, time), context), time)
        for i, factor in reversed(list(enumerate(c.factors))):
            for _ in range(c.blocks + 1):
                x = level(jnp.concatenate([x, skips.pop()], axis=-1), factor * c.channels, i < last)
            if i:
                x = jnp.repeat(jnp.repeat(x, 2, axis=1), 2, axis=2)
                x = nn.Conv(x.shape[-1], (3, 3), dtype=c.dtype)(x)
        return nn.Conv(c.latent, (3, 3), dtype=c.dtype)(nn.silu(group_norm(c, x)))


def make(c: Config, batch: int) -> tuple[nn.Module, Batch, dict[str, int]]:
    latents = floats(batch, c.image, c.image, c.latent)
    return UNet(c), {"latents": latents, "context": floats(batch, *c.context), "seed": ints()}, {"seed": 1000}
