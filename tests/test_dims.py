"""Which dimension is the batch, in steps of all kinds."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import pytest

from ffjax.ir.dims import named_dims
from ffjax.ir.graph import build_graph
from ffjax.ir.regions import find_regions
from ffjax.ir.trace import trace

Layers = list[jax.Array]
LAYERS = [jnp.ones((12, 20)), jnp.ones((20, 20)), jnp.ones((20, 20)), jnp.ones((20, 6))]
X, Y, KEY = jnp.ones((16, 12)), jnp.ones((16, 6)), jnp.zeros(2, jnp.uint32)


def forward(layers: Layers, x: jax.Array) -> jax.Array:
    for w in layers:
        x = jnp.tanh(x @ w)
    return x


def train(layers: Layers, x: jax.Array, y: jax.Array) -> Layers:
    grads = jax.grad(lambda layers: ((forward(layers, x) - y) ** 2).mean())(layers)
    return [w - g for w, g in zip(layers, grads, strict=True)]


def gradients(state: dict[str, Layers], batch: tuple[jax.Array, jax.Array]) -> Layers:
    """Does not replace its parameters: `state` is an argument like the data."""
    return jax.grad(lambda layers: ((forward(layers, batch[0]) - batch[1]) ** 2).mean())(state["layers"])


def evaluate(layers: Layers, x: jax.Array, y: jax.Array) -> jax.Array:
    return (jnp.argmax(forward(layers, x), axis=1) == jnp.argmax(y, axis=1)).mean()


def generate(layers: Layers, state: dict[str, jax.Array]) -> dict[str, jax.Array]:
    """Replaces its data, and nothing else."""
    cache = jnp.concatenate([state["cache"][:, 1:], state["x"][:, None]], axis=1)
    scores = jax.nn.softmax(jnp.einsum("bd,btd->bt", forward(layers[:3], state["x"]) @ layers[3] @ layers[3].T, cache))
    return {"cache": cache, "x": jnp.einsum("bt,btd->bd", scores, cache)}


def sample(layers: Layers, key: jax.Array) -> jax.Array:
    return forward(layers, jax.random.normal(key, (16, 12)))


def delayed(x: jax.Array, taps: jax.Array) -> jax.Array:
    return x[:, 1:] * taps[0] + x[:, :-1] * taps[1]


@pytest.mark.parametrize(
    ("step", "args", "size"),
    [
        (train, (LAYERS, X, Y), 16),
        (gradients, ({"layers": LAYERS}, (X, Y)), 16),
        (evaluate, (LAYERS, X, Y), 16),
        (generate, ([jnp.ones((20, 20))] * 4, {"cache": jnp.ones((16, 8, 20)), "x": jnp.ones((16, 20))}), 16),
        (delayed, (X, jnp.ones(2)), 16),
        (train, (LAYERS, X[:1], Y[:1]), None),
    ],
    ids=["training", "gradients", "evaluation", "generation", "taps", "a batch of one"],
)
def test_the_batch_is_found(step: Callable[..., object], args: tuple[object, ...], size: int | None) -> None:
    assert _batch(step, args) == (set() if size is None else {size})


def messages(layers: Layers, batch: dict[str, jax.Array]) -> Layers:
    """Trains on a graph of 40 edges between 16 nodes; `places` are of the 12 features, which stand beside nodes."""

    def loss(layers: Layers) -> jax.Array:
        edges = jnp.tanh(batch["nodes"][batch["senders"]] @ layers[0])
        nodes = jax.ops.segment_sum(edges @ layers[1], batch["receivers"], num_segments=16)
        return jnp.sum((nodes + (batch["nodes"] * batch["places"]) @ layers[0]) @ layers[2])

    return jax.tree.map(jnp.subtract, layers, jax.grad(loss)(layers))


def test_nodes_and_edges_of_a_graph_are_both_counted_by_the_batch() -> None:
    ends = jnp.zeros(40, jnp.int32)
    batch = {"nodes": X, "senders": ends, "receivers": ends, "places": jnp.ones(12)}
    assert _batch(messages, (LAYERS, batch)) == {16, 40}


def test_the_words_of_a_key_are_no_batch() -> None:
    assert 2 not in _batch(sample, (LAYERS, KEY))


def _batch(step: Callable[..., object], args: tuple[object, ...]) -> set[int]:
    names = named_dims(find_regions(build_graph(trace(step, args))))
    return {names.sizes[name] for name in names.batch}


class State(NamedTuple):
    """As Haiku's examples have it: returned bare, it is a tuple of elements and one argument at once."""

    params: Layers
    count: jax.Array


def test_a_state_that_is_a_tuple_or_a_list_itself_is_replaced_whole() -> None:
    def step(state: State, x: jax.Array, y: jax.Array) -> State:
        return State(params=train(state.params, x, y), count=state.count + 1)

    assert trace(train, (LAYERS, X, Y)).ties == tuple((i, i) for i in range(len(LAYERS)))
    assert trace(step, (State(LAYERS, jnp.int32(0)), X, Y)).ties == tuple((i, i) for i in range(len(LAYERS) + 1))


def test_elements_of_a_result_replace_arguments_of_their_own() -> None:
    ties = trace(lambda a, b, x: (b, a, x.sum()), ({"v": X}, {"w": Y}, X)).ties
    assert ties == ((0, 1), (1, 0))
