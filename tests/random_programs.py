"""Small programs drawn at random: a few ops over square arrays, each of which reads two values made before.

Hypothesis draws and shrinks the picks; tests choose from which kinds of op.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from hypothesis import strategies as st
from jax import lax

Array = jax.Array
Pick = tuple[str, int, int]
"""A kind of op, and which of the values made before it reads, modulo how many there are."""


def _loop(x: Array, y: Array) -> Array:
    return lax.fori_loop(0, 3, lambda _, h: jnp.tanh(h @ y), x)


def _until_small(x: Array, y: Array) -> Array:
    return lax.while_loop(lambda h: jnp.abs(h).max() > 1, lambda h: h * 0.5, x + y)


def _cond(x: Array, y: Array) -> Array:
    return lax.cond(x[0, 0] > 0, lambda u, v: u @ v, lambda u, v: u - v, x, y)


def _embed(x: Array, y: Array) -> Array:
    return y[jnp.argmax(x, axis=1) % y.shape[0]]


def _gradient(x: Array, y: Array) -> Array:
    return jax.grad(lambda u: (jnp.tanh(u @ y) ** 2).mean())(x)


OPS: dict[str, Callable[[Array, Array], Array]] = {
    "dot": lambda x, y: x @ y,
    "dot of transposed": lambda x, y: x.T @ y,
    "elementwise": lambda x, y: jnp.tanh(x) + y,
    "transposed": lambda x, y: x.T - y,
    "scaled by a sum": lambda x, y: jnp.sum(x, axis=0, keepdims=True) * y,
    "centred": lambda x, y: x - jnp.sum(y, axis=0),
    "cumsum": lambda x, y: jnp.cumsum(x, axis=0),
    "scan": lambda x, y: lax.scan(lambda c, r: (c + r, c * r), x[0], y)[1],
    "scan of dots": lambda x, y: lax.scan(lambda c, r: (c + r @ y, c * r), x[0], y)[1],
    "fori": _loop,
    "while": _until_small,
    "cond": _cond,
    "remat": jax.checkpoint(lambda x, y: jnp.tanh(x @ y) @ y),
    "gradient": _gradient,
    "softmax": lambda x, y: jax.nn.softmax(x, axis=1) * y,
    "sort": lambda x, y: jnp.sort(x, axis=0) - y,
    "embed": _embed,
    "scatter": lambda x, y: x.at[jnp.argmax(y, axis=0)].add(y),
    "reshape": lambda x, y: (x.reshape(4, -1).swapaxes(0, 1).reshape(x.shape)) + y,
    "concatenate": lambda x, y: jnp.concatenate([x[::2], y[1::2]], axis=0),
    "update": lambda x, y: lax.dynamic_update_slice(x, y[:1], (jnp.argmax(y[0]), 0)),
    "roll": lambda x, y: jnp.roll(x, 3, axis=1) * 0.5 + y,
    "top": lambda x, y: lax.top_k(x, x.shape[1] // 2)[0].repeat(2, axis=1) - y,
}


def drawn_picks(kinds: Sequence[str], most: int) -> st.SearchStrategy[list[Pick]]:
    """Programs of at most so many ops; a kind that is given twice comes twice as often."""
    return st.lists(st.tuples(st.sampled_from(kinds), st.integers(0, 9), st.integers(0, 9)), min_size=1, max_size=most)


def random_step(picks: Sequence[Pick], results: int | None = 2) -> Callable[..., tuple[Array, ...]]:
    """The program of some picks; it returns the last of its values, or, for None, all that it made."""

    def step(*args: Array) -> tuple[Array, ...]:
        values = list(args)
        for kind, a, b in picks:
            values.append(OPS[kind](values[a % len(values)], values[b % len(values)]))
        return tuple(values[len(args) :] if results is None else values[-results:])

    return step
