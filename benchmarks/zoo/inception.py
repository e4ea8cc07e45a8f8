"""Inception-v3 (arXiv 1512.00567) without its auxiliary head."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from flax import linen as nn

from zoo.layers import ConvNorm, cross_entropy
from zoo.model import Batch, floats, ints

# A convolution: channels, kernel height and width, and, where it is not 1, the stride (those pad nothing).
Conv = tuple[int, ...]
# A chain is convolutions one after the other; a fork ends in two beside each other.
Chain = Sequence[Conv]


@dataclass(frozen=True, kw_only=True)
class Config:
    width: float = 1.0
    """Share of the published channels."""
    image: int = 299
    classes: int = 1000
    dtype: str = "bfloat16"


INCEPTION_V3 = Config()
TINY = Config(width=1 / 16, image=75, classes=16, dtype="float32")


class Inception(nn.Module):
    config: Config

    def conv(self, x: jax.Array, conv: Conv, padding: str = "SAME") -> jax.Array:
        channels, height, width, *stride = conv
        if stride:
            padding = "VALID"
        features = max(4, round(channels * self.config.width))
        return ConvNorm(features, (height, width), *stride, padding=padding, dtype=self.config.dtype)(x)

    def chain(self, x: jax.Array, chain: Chain) -> jax.Array:
        for conv in chain:
            x = self.conv(x, conv)
        return x

    def beside(self, x: jax.Array, chains: Sequence[Chain], pooled: int) -> jax.Array:
        """Chains beside each other and a pooled one, joined."""
        averaged = nn.avg_pool(x, (3, 3), padding="SAME")
        return jnp.concatenate([*(self.chain(x, c) for c in chains), self.conv(averaged, (pooled, 1, 1))], axis=-1)

    def reduced(self, x: jax.Array, chains: Sequence[Chain]) -> jax.Array:
        """Chains that halve the picture beside a pool that does."""
        return jnp.concatenate([*(self.chain(x, c) for c in chains), nn.max_pool(x, (3, 3), (2, 2))], axis=-1)

    @nn.compact
    def __call__(self, images: jax.Array, labels: jax.Array) -> jax.Array:
        x = self.conv(images, (32, 3, 3, 2))
        x = self.conv(self.conv(x, (32, 3, 3), "VALID"), (64, 3, 3))
        x = nn.max_pool(x, (3, 3), (2, 2))
        x = self.conv(self.conv(x, (80, 1, 1)), (192, 3, 3), "VALID")
        x = nn.max_pool(x, (3, 3), (2, 2))
        for pooled in (32, 64, 64):
            x = self.beside(x, [[(64, 1, 1)], [(48, 1, 1), (64, 5, 5)], [(64, 1, 1), (96, 3, 3), (96, 3, 3)]], pooled)
        x = self.reduced(x, [[(384, 3, 3, 2)], [(64, 1, 1), (96, 3, 3), (96, 3, 3, 2)]])
        for c in (128, 160, 160, 192):
            seven = [(c, 1, 1), (c, 1, 7), (192, 7, 1)]
            twice = [(c, 1, 1), (c, 7, 1), (c, 1, 7), (c, 7, 1), (192, 1, 7)]
            x = self.beside(x, [[(192, 1, 1)], seven, twice], 192)
        x = self.reduced(x, [[(192, 1, 1), (320, 3, 3, 2)], [(192, 1, 1), (192, 1, 7), (192, 7, 1), (192, 3, 3, 2)]])
        for _ in range(2):
            forks = [self.chain(x, [(384, 1, 1)]), self.chain(x, [(448, 1, 1), (384, 3, 3)])]
            parts = [self.conv(x, (320, 1, 1))]
            parts += [self.conv(fork, conv) for fork in forks for conv in ((384, 1, 3), (384, 3, 1))]
            parts.append(self.conv(nn.avg_pool(x, (3, 3), padding="SAME"), (192, 1, 1)))
            x = jnp.concatenate(parts, axis=-1)
        c = self.config
        return cross_entropy(nn.Dense(c.classes, dtype=c.dtype, name="head")(x.mean((1, 2))), labels)


def make(c: Config, batch: int) -> tuple[nn.Module, Batch, dict[str, int]]:
    shapes = {"images": floats(batch, c.image, c.image, 3), "labels": ints(batch)}
    return Inception(c), shapes, {"labels": c.classes}
