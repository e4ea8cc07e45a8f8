"""Layers that several models of the zoo share."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn

Dense = functools.partial(nn.DenseGeneral, use_bias=False)


def repeat(
    block: type[nn.Module], count: int, x: Any, *shared: Any, name: str, scanned: bool, remat: bool, **fields: Any
) -> tuple[Any, jax.Array]:
    """`count` blocks one after the other: one scan, or unrolled; with or without rematerialization of each.

    A block takes `(x, *shared)` and returns the next `x` and a scalar, or None; returned are the last `x` and the sum
    of those scalars.
    """
    # Inside a scan the compiler cannot merge the recomputation with the original, so no barrier is needed.
    kind = nn.remat(block, prevent_cse=not scanned) if remat else block
    if scanned:
        layers = nn.scan(
            kind, variable_axes={"params": 0}, split_rngs={"params": True}, in_axes=nn.broadcast, length=count
        )
        x, extras = layers(**fields, name=name)(x, *shared)
        return x, jnp.zeros(()) if extras is None else extras.sum()
    total = jnp.zeros(())
    for i in range(count):
        x, extra = kind(**fields, name=f"{name}_{i}")(x, *shared)
        total = total if extra is None else total + extra
    return x, total


def rotate(x: jax.Array) -> jax.Array:
    """Turns each pair of a head's halves by the angle of its position (RoFormer); x is [batch, seq, ..., head_dim]."""
    half = x.shape[-1] // 2
    angles = np.outer(np.arange(x.shape[1]), 500_000.0 ** (-np.arange(half) / half))
    angles = angles.reshape(x.shape[1], *[1] * (x.ndim - 3), half)
    cos, sin = jnp.asarray(np.cos(angles), jnp.float32), jnp.asarray(np.sin(angles), jnp.float32)
    a, b = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, a * sin + b * cos], axis=-1).astype(x.dtype)


def attend(
    q: jax.Array, k: jax.Array, v: jax.Array, *, causal: bool = False, bias: jax.Array | None = None, scale: float = 0.0
) -> jax.Array:
    """Attention, its softmax in float32.

    Args:
      q: [batch, queries, groups, heads of a group, head_dim].
      k, v: [batch, keys, groups, head_dim]: one for the heads of a group.
      causal: whether a query sees only the keys up to its own position.
      bias: added to the scores, [groups, heads of a group, queries, keys].
      scale: of the scores; by default one over the root of head_dim.
    """
    scores = jnp.einsum("bqgrd,bkgd->bgrqk", q, k).astype(jnp.float32) * (scale or q.shape[-1] ** -0.5)
    if bias is not None:
        scores += bias
    if causal:
        rows, columns = (jax.lax.broadcasted_iota(jnp.int32, scores.shape[-2:], axis) for axis in (0, 1))
        scores = jnp.where(columns <= rows, scores, -1e30)
    return jnp.einsum("bgrqk,bkgd->bqgrd", jax.nn.softmax(scores).astype(v.dtype), v)


def cross_entropy(logits: jax.Array, targets: jax.Array) -> jax.Array:
    """The mean over all but the last dimension of logits, in float32."""
    return optax.softmax_cross_entropy_with_integer_labels(logits.astype(jnp.float32), targets).mean()


class ConvNorm(nn.Module):
    """A convolution without bias, a batch norm over the batch's own statistics, and a ReLU."""

    features: int
    kernel: tuple[int, int] = (1, 1)
    stride: int = 1
    padding: str = "SAME"
    groups: int = 1
    relu: bool = True
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = nn.Conv(
            self.features,
            self.kernel,
            self.stride,
            padding=self.padding,
            feature_group_count=self.groups,
            use_bias=False,
            dtype=self.dtype,
        )(x)
        x = nn.BatchNorm(use_running_average=False, momentum=0.9, dtype=self.dtype)(x)
        return nn.relu(x) if self.relu else x
