"""DLRM (arXiv 1906.00091) on the tables of MLPerf's Criteo Terabyte benchmark: from 3 rows to 40 million.

Trained with SGD as there. Only the rows that were looked up are updated: a dense gradient would be as large as the
tables.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from zoo.model import Model, floats, ints

# Distinct values of each categorical feature, at most 40 million (the benchmark's reference).
# fmt: off
CRITEO_ROWS = (
    39884406, 39043, 17289, 7420, 20263, 3, 7120, 1543, 63, 38532951, 2953546, 403346, 10, 2208, 11938, 155, 4, 976,
    14, 39979771, 25641295, 39664984, 585935, 12972, 108, 36,
)
# fmt: on


@dataclass(frozen=True, kw_only=True)
class Config:
    rows: tuple[int, ...] = CRITEO_ROWS
    width: int = 128
    """Of an embedding."""
    dense: int = 13
    """Features that are numbers."""
    bottom: tuple[int, ...] = (512, 256, 128)
    top: tuple[int, ...] = (1024, 1024, 512, 256, 1)
    dtype: str = "bfloat16"


MLPERF = Config()
TINY = Config(rows=(1000, 64, 3, 256), width=16, dense=5, bottom=(32, 16), top=(32, 1), dtype="float32")


def mlp(layers: Sequence[dict[str, jax.Array]], x: jax.Array) -> jax.Array:
    for i, layer in enumerate(layers):
        x = x @ layer["kernel"].astype(x.dtype) + layer["bias"].astype(x.dtype)
        x = jax.nn.relu(x) if i < len(layers) - 1 else x
    return x


def init_mlp(key: jax.Array, sizes: Sequence[int]) -> list[dict[str, jax.Array]]:
    keys = jax.random.split(key, len(sizes))
    pairs = list(zip(keys[1:], sizes[:-1], sizes[1:], strict=True))
    return [{"kernel": jax.random.normal(k, (a, b)) / np.sqrt(a), "bias": jnp.zeros(b)} for k, a, b in pairs]


def model(c: Config, batch: int, learning_rate: float = 0.1) -> Model:
    features = len(c.rows) + 1
    pairs = np.tril_indices(features, -1)

    def init(key: jax.Array) -> dict[str, Any]:
        bottom, top, *keys = jax.random.split(key, 2 + len(c.rows))
        tables = [
            jax.random.uniform(k, (n, c.width), minval=-1) / np.sqrt(n) for k, n in zip(keys, c.rows, strict=True)
        ]
        mlps = {
            "bottom": init_mlp(bottom, (c.dense, *c.bottom)),
            "top": init_mlp(top, (c.width + len(pairs[0]), *c.top)),
        }
        return {"params": {"mlps": mlps, "tables": tables}}

    def loss_fn(mlps: dict[str, Any], rows: Sequence[jax.Array], batch: dict[str, jax.Array]) -> jax.Array:
        dense = jax.nn.relu(mlp(mlps["bottom"], batch["dense"].astype(c.dtype)))
        vectors = jnp.stack([dense, *(r.astype(c.dtype) for r in rows)], axis=1)
        products = jnp.einsum("bnd,bmd->bnm", vectors, vectors)[:, pairs[0], pairs[1]]
        logits = mlp(mlps["top"], jnp.concatenate([dense, products], axis=1))[:, 0]
        return optax.sigmoid_binary_cross_entropy(logits.astype(jnp.float32), batch["clicks"]).mean()

    def train_step(state: dict[str, Any], batch: dict[str, jax.Array]) -> tuple[dict[str, Any], jax.Array]:
        mlps, tables = state["params"]["mlps"], state["params"]["tables"]
        ids = [batch[f"ids_{i}"] for i in range(len(tables))]
        rows = [table[i] for table, i in zip(tables, ids, strict=True)]
        loss, (of_mlps, of_rows) = jax.value_and_grad(loss_fn, argnums=(0, 1))(mlps, rows, batch)
        mlps = jax.tree.map(lambda p, g: p - learning_rate * g, mlps, of_mlps)
        tables = [t.at[i].add(-learning_rate * g) for t, i, g in zip(tables, ids, of_rows, strict=True)]
        return {"params": {"mlps": mlps, "tables": tables}}, loss

    shapes = {"dense": floats(batch, c.dense), "clicks": floats(batch)}
    shapes |= {f"ids_{i}": ints(batch) for i in range(len(c.rows))}
    return Model(step=train_step, init=init, batch=shapes, limits={f"ids_{i}": n for i, n in enumerate(c.rows)})
