"""Residual networks of bottleneck blocks: Alpa's Wide-ResNet (arXiv 2201.12023) and ResNeXt-50 (arXiv 1611.05431)."""

from __future__ import annotations

from dataclasses import dataclass

import jax
from flax import linen as nn

from zoo.layers import ConvNorm, cross_entropy
from zoo.model import Batch, floats, ints

STAGES = {50: (3, 4, 6, 3), 101: (3, 4, 23, 3), 8: (1, 1)}


@dataclass(frozen=True, kw_only=True)
class Config:
    """A block is 1x1 to `inner[0]`, 3x3 to `inner[1]`, 1x1 to `out` times the stage's channels."""

    layers: int = 50
    channels: int
    """Of the first stage; each later one has twice as many."""
    inner: tuple[float, float]
    out: int = 4
    groups: int = 1
    """Of the 3x3 convolutions."""
    image: int = 224
    classes: int = 1000
    dtype: str = "float32"


# Alpa's Wide-ResNets widen what the 3x3 convolutions make; their sizes are from its table of models.
WIDE_RESNET_2B = Config(channels=448, inner=(1, 2))
WIDE_RESNET_13B = Config(layers=101, channels=320, inner=(1, 16))
RESNEXT_50 = Config(channels=64, inner=(2, 2), groups=32, dtype="bfloat16")
TINY_WIDE = Config(layers=8, channels=8, inner=(1, 2), image=16, classes=16)
TINY_NEXT = Config(layers=8, channels=8, inner=(2, 2), groups=4, image=16, classes=16)


class Block(nn.Module):
    config: Config
    channels: int
    stride: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        c = self.config
        first, second = (int(self.channels * factor) for factor in c.inner)
        h = ConvNorm(first, dtype=c.dtype)(x)
        h = ConvNorm(second, (3, 3), self.stride, groups=c.groups, dtype=c.dtype)(h)
        h = ConvNorm(c.out * self.channels, relu=False, dtype=c.dtype)(h)
        if x.shape != h.shape:
            x = ConvNorm(h.shape[-1], stride=self.stride, relu=False, dtype=c.dtype, name="shortcut")(x)
        return nn.relu(x + h)


class ResNet(nn.Module):
    config: Config

    @nn.compact
    def __call__(self, images: jax.Array, labels: jax.Array) -> jax.Array:
        c = self.config
        x = ConvNorm(c.channels, (7, 7), 2, dtype=c.dtype)(images)
        x = nn.max_pool(x, (3, 3), (2, 2), "SAME")
        for stage, blocks in enumerate(STAGES[c.layers]):
            for i in range(blocks):
                x = Block(c, c.channels * 2**stage, 2 if stage and not i else 1)(x)
        return cross_entropy(nn.Dense(c.classes, dtype=c.dtype, name="head")(x.mean((1, 2))), labels)


def make(c: Config, batch: int) -> tuple[nn.Module, Batch, dict[str, int]]:
    shapes = {"images": floats(batch, c.image, c.image, 3), "labels": ints(batch)}
    return ResNet(c), shapes, {"labels": c.classes}
