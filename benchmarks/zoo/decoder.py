"""Decoder-only transformers: GPT-3 (arXiv 2005.14165) and Llama 3 (arXiv 2407.21783)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
from flax import linen as nn

from zoo.layers import Dense, attend, cross_entropy, repeat, rotate
from zoo.model import Batch, ints


@dataclass(frozen=True, kw_only=True)
class Config:
    layers: int
    d_model: int
    heads: int
    kv_heads: int
    d_ff: int
    vocab: int
    seq_len: int
    modern: bool
    """Rotary positions, RMS norms, gated MLPs, no biases and an own head, where GPT-3 has the classic choices."""
    head_dim: int = 128
    scanned: bool = True
    remat: bool = True
    dtype: str = "bfloat16"


# The vocabulary is padded from 50,257 as Megatron does for 8-way tensor parallelism.
GPT3_175B = Config(layers=96, d_model=12288, heads=96, kv_heads=96, d_ff=49152, vocab=51200, seq_len=2048, modern=False)
# Pretrained on 8,192 tokens; at half of that, as plain attention keeps the scores of all pairs.
LLAMA3_8B = Config(layers=32, d_model=4096, heads=32, kv_heads=8, d_ff=14336, vocab=128256, seq_len=4096, modern=True)
LLAMA3_70B = Config(layers=80, d_model=8192, heads=64, kv_heads=8, d_ff=28672, vocab=128256, seq_len=4096, modern=True)
_TINY = {"layers": 2, "d_model": 32, "heads": 8, "d_ff": 64, "vocab": 64, "seq_len": 16, "head_dim": 4}
TINY_GPT = Config(**_TINY, kv_heads=8, modern=False, dtype="float32")
TINY_LLAMA = Config(**_TINY, kv_heads=4, modern=True, dtype="float32")


def norm(c: Any, name: str) -> nn.Module:
    return nn.RMSNorm(dtype=c.dtype, name=name) if c.modern else nn.LayerNorm(dtype=c.dtype, name=name)


class Attention(nn.Module):
    """Causal self-attention; heads of a group share a key and a value."""

    config: Any

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        c = self.config
        fields = {"dtype": c.dtype, "use_bias": not c.modern}
        q = Dense((c.kv_heads, c.heads // c.kv_heads, c.head_dim), name="query", **fields)(x)
        k, v = (Dense((c.kv_heads, c.head_dim), name=name, **fields)(x) for name in ("key", "value"))
        if c.modern:
            q, k = rotate(q), rotate(k)
        return Dense(c.d_model, axis=(-3, -2, -1), name="out", **fields)(attend(q, k, v, causal=True))


class GatedMLP(nn.Module):
    width: int
    dtype: str

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        gate, up = (Dense(self.width, dtype=self.dtype, name=name)(x) for name in ("gate", "up"))
        return Dense(x.shape[-1], dtype=self.dtype, name="down")(nn.silu(gate) * up)


class Block(nn.Module):
    config: Config

    @nn.compact
    def __call__(self, x: jax.Array) -> tuple[jax.Array, None]:
        c = self.config
        x = x + Attention(c, name="attention")(norm(c, "attention_norm")(x))
        h = norm(c, "mlp_norm")(x)
        if c.modern:
            return x + GatedMLP(c.d_ff, c.dtype, name="mlp")(h), None
        h = nn.gelu(nn.Dense(c.d_ff, dtype=c.dtype, name="up")(h))
        return x + nn.Dense(c.d_model, dtype=c.dtype, name="down")(h), None


class Decoder(nn.Module):
    """Tokens and the tokens that follow, [batch, seq], to the loss."""

    config: Config

    @nn.compact
    def __call__(self, tokens: jax.Array, targets: jax.Array) -> jax.Array:
        c = self.config
        embed = nn.Embed(c.vocab, c.d_model, dtype=c.dtype, name="embed")
        x = embed(tokens)
        if not c.modern:
            x = x + self.param("positions", nn.initializers.normal(0.02), (c.seq_len, c.d_model)).astype(c.dtype)
        x, _ = repeat(Block, c.layers, x, name="layers", scanned=c.scanned, remat=c.remat, config=c)
        x = norm(c, "final_norm")(x)
        logits = Dense(c.vocab, dtype=c.dtype, name="head")(x) if c.modern else embed.attend(x)
        return cross_entropy(logits, targets)


def make(c: Config, batch: int) -> tuple[nn.Module, Batch, dict[str, int]]:
    tokens = ints(batch, c.seq_len)
    return Decoder(c), {"tokens": tokens, "targets": tokens}, {"tokens": c.vocab, "targets": c.vocab}
