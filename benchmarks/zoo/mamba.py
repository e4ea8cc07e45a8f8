"""Mamba-2.8B, selective state spaces (arXiv 2312.00752), its recurrence by `jax.lax.associative_scan`."""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from flax import linen as nn

from zoo.layers import Dense, cross_entropy, repeat
from zoo.model import Batch, ints


@dataclass(frozen=True, kw_only=True)
class Config:
    layers: int = 64
    d_model: int = 2560
    d_inner: int = 5120
    state: int = 16
    rank: int = 160
    """Of the map to the step sizes."""
    kernel: int = 4
    vocab: int = 50288  # padded from 50,280 as there
    seq_len: int = 2048
    scanned: bool = True
    remat: bool = True
    dtype: str = "bfloat16"


MAMBA_2_8B = Config()
TINY = Config(layers=2, d_model=16, d_inner=32, state=4, rank=4, vocab=64, seq_len=16, dtype="float32")


class Mixer(nn.Module):
    config: Config

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        c = self.config
        x, z = (Dense(c.d_inner, dtype=c.dtype, name=name)(x) for name in ("in", "gate"))
        causal = [(c.kernel - 1, 0)]
        x = nn.Conv(c.d_inner, (c.kernel,), padding=causal, feature_group_count=c.d_inner, dtype=c.dtype)(x)
        x = nn.silu(x)
        low, write, read = (
            Dense(n, dtype=c.dtype, name=name)(x) for name, n in (("rank", c.rank), ("B", c.state), ("C", c.state))
        )
        dt = jax.nn.softplus(nn.Dense(c.d_inner, dtype=c.dtype, name="dt")(low).astype(jnp.float32))
        rates = self.param(
            "A_log", lambda _: jnp.log(jnp.broadcast_to(1.0 + jnp.arange(c.state), (c.d_inner, c.state)))
        )
        skip = self.param("D", nn.initializers.ones, (c.d_inner,))
        # h[t] = decay[t] h[t-1] + drive[t], all times at once; [batch, seq, d_inner, state].
        decay = jnp.exp(dt[..., None] * -jnp.exp(rates))
        drive = (dt * x)[..., None] * write[..., None, :]

        def compose(
            first: tuple[jax.Array, jax.Array], second: tuple[jax.Array, jax.Array]
        ) -> tuple[jax.Array, jax.Array]:
            return first[0] * second[0], second[0] * first[1] + second[1]

        _, h = jax.lax.associative_scan(compose, (decay, drive), axis=1)
        y = jnp.einsum("bsdn,bsn->bsd", h, read.astype(jnp.float32)) + skip * x
        return Dense(c.d_model, dtype=c.dtype, name="out")(y.astype(c.dtype) * nn.silu(z))


class Block(nn.Module):
    config: Config

    @nn.compact
    def __call__(self, x: jax.Array) -> tuple[jax.Array, None]:
        c = self.config
        return x + Mixer(c, name="mixer")(nn.RMSNorm(dtype=c.dtype, name="norm")(x)), None


class Mamba(nn.Module):
    config: Config

    @nn.compact
    def __call__(self, tokens: jax.Array, targets: jax.Array) -> jax.Array:
        c = self.config
        embed = nn.Embed(c.vocab, c.d_model, dtype=c.dtype, name="embed")
        x, _ = repeat(Block, c.layers, embed(tokens), name="layers", scanned=c.scanned, remat=c.remat, config=c)
        return cross_entropy(embed.attend(nn.RMSNorm(dtype=c.dtype, name="final_norm")(x)), targets)


def make(c: Config, batch: int) -> tuple[nn.Module, Batch, dict[str, int]]:
    tokens = ints(batch, c.seq_len)
    return Mamba(c), {"tokens": tokens, "targets": tokens}, {"tokens": c.vocab, "targets": c.vocab}
