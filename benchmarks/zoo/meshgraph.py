"""MeshGraphNets (arXiv 2010.03409): messages along the edges of a simulation mesh, by gathers and segment sums.

The batch is one graph, the disjoint union of several meshes.
"""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from flax import linen as nn

from zoo.layers import repeat
from zoo.model import Batch, floats, ints


@dataclass(frozen=True, kw_only=True)
class Config:
    layers: int = 15
    width: int = 128
    node_features: int = 11
    edge_features: int = 3
    outputs: int = 2
    nodes: int = 2048
    """Of one mesh; the paper's of a cylinder in a flow has 1,885 on average."""
    edges: int = 12288
    scanned: bool = True
    remat: bool = False
    dtype: str = "bfloat16"


CYLINDER_FLOW = Config()
TINY = Config(layers=2, width=16, nodes=8, edges=24, dtype="float32")


class MLP(nn.Module):
    """Two hidden layers, and a norm except on the way out."""

    config: Config
    outputs: int = 0

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        c = self.config
        for _ in range(2):
            x = nn.relu(nn.Dense(c.width, dtype=c.dtype)(x))
        x = nn.Dense(self.outputs or c.width, dtype=c.dtype)(x)
        return x if self.outputs else nn.LayerNorm(dtype=c.dtype)(x)


class Messages(nn.Module):
    config: Config

    @nn.compact
    def __call__(
        self, graph: tuple[jax.Array, jax.Array], senders: jax.Array, receivers: jax.Array
    ) -> tuple[tuple[jax.Array, jax.Array], None]:
        nodes, edges = graph
        edges = edges + MLP(self.config, name="edge")(
            jnp.concatenate([edges, nodes[senders], nodes[receivers]], axis=-1)
        )
        received = jax.ops.segment_sum(edges, receivers, num_segments=nodes.shape[0])
        nodes = nodes + MLP(self.config, name="node")(jnp.concatenate([nodes, received], axis=-1))
        return (nodes, edges), None


class MeshGraphNet(nn.Module):
    config: Config

    @nn.compact
    def __call__(
        self, nodes: jax.Array, edges: jax.Array, senders: jax.Array, receivers: jax.Array, targets: jax.Array
    ) -> jax.Array:
        c = self.config
        graph = (MLP(c, name="node_encoder")(nodes), MLP(c, name="edge_encoder")(edges))
        (nodes, _), _ = repeat(
            Messages, c.layers, graph, senders, receivers, name="layers", scanned=c.scanned, remat=c.remat, config=c
        )
        found = MLP(c, c.outputs, name="decoder")(nodes)
        return ((found.astype(jnp.float32) - targets) ** 2).mean()


def make(c: Config, batch: int) -> tuple[nn.Module, Batch, dict[str, int]]:
    n, e = batch * c.nodes, batch * c.edges
    shapes = {
        "nodes": floats(n, c.node_features),
        "edges": floats(e, c.edge_features),
        "senders": ints(e),
        "receivers": ints(e),
        "targets": floats(n, c.outputs),
    }
    return MeshGraphNet(c), shapes, {"senders": n, "receivers": n}
