"""Sharded against unsharded steps: every example under every strategy on every mesh of eight devices.

python benchmarks/numerics.py
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import numpy as np
import optax
from tables import write

import ffjax
from ffjax.errors import PlanError
from ffjax.examples import convnet, gpt, moe, recommender
from ffjax.strategies import all_strategies
from ffjax.testing import assert_same_numerics, fake_devices

STEPS = 3
MESHES = ({"x": 8}, {"x": 4, "y": 2}, {"x": 2, "y": 2, "z": 2})
STRATEGIES = ("auto", *(strategy.name for strategy in all_strategies()))
EXAMPLES = {
    "gpt, unrolled": (gpt, gpt.Config.tiny()),
    "gpt, scanned, remat": (gpt, dataclasses.replace(gpt.Config.tiny(), scan_layers=True, remat=True)),
    "convnet": (convnet, convnet.Config.tiny()),
    "recommender": (recommender, recommender.Config.tiny()),
    "moe": (moe, moe.Config.tiny()),
}
NOTES = (
    "Errors are of the worst leaf, as a share of its largest element: of the losses of three steps, and of the "
    "state after them (parameters, optimizer, statistics, keys). `same` is `assert_same_numerics` on all of it.",
    "Adam divides a gradient by its own size, so the rounding of a gradient that is nearly zero becomes a step of full "
    "size. The mixture of experts has such gradients; `moe` therefore runs with an epsilon of 1e-3.",
)


def run(step, module, config):
    """The losses of three steps and the state after them."""
    state, batches, losses = module.init(config, jax.random.key(0)), module.batches(config), []
    for _ in range(STEPS):
        if module is convnet:
            metrics = step(*state, next(batches))
        else:
            state, metrics = step(state, next(batches))
        losses.append(metrics["loss"])
    if module is convnet:
        from flax import nnx

        state = nnx.to_pure_dict(nnx.split(state)[1])
    return losses, state


def worst(actual, expected) -> float:
    """The largest error of any leaf, as a share of the leaf's largest element."""
    errors = [0.0]
    for got, want in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        if jax.numpy.issubdtype(want.dtype, jax.numpy.inexact):
            ours, theirs = np.asarray(got, np.float64), np.asarray(want, np.float64)
            errors.append(float(np.abs(ours - theirs).max() / max(np.abs(theirs).max(), 1e-30)))
    return max(errors)


def main() -> None:
    fake_devices(8)
    moe.make_optimizer = functools.cache(lambda config: optax.adamw(config.learning_rate, eps=1e-3, weight_decay=0.01))
    rows = []
    for name, (module, config) in EXAMPLES.items():
        step = module.make_train_step(config)
        if module is convnet:
            from flax import nnx

            expected = run(nnx.jit(step), module, config)
        else:
            expected = run(jax.jit(step), module, config)
        for mesh in MESHES:
            for strategy in STRATEGIES:
                try:
                    got = run(ffjax.autoshard(step, mesh=mesh, strategy=strategy), module, config)
                except PlanError:
                    continue  # it has no use for this program or this mesh
                try:
                    assert_same_numerics(got, expected)
                    same = "yes"
                except AssertionError as error:
                    same = str(error).split("\n", 1)[0]
                errors = [f"{worst(a, b):.1e}" for a, b in zip(got, expected, strict=True)]
                rows.append([name, "x".join(map(str, mesh.values())), strategy, *errors, same])
    header = ["example", "mesh", "strategy", "loss error", "state error", "same"]
    write("numerics", "The same numbers, sharded and not", NOTES, header, rows)


if __name__ == "__main__":
    main()
