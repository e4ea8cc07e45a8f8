"""Every example under every strategy and mesh: the same numbers as the unsharded step after three steps.

By default each (example, strategy) runs on one mesh, in rotation, so that all strategies meet all meshes; `--full`
runs the whole matrix. Adam divides a gradient by its own size: the rounding of one that is nearly zero becomes a step
of full size, in whatever order its sum was taken. The mixture of experts has such gradients (experts that few tokens
choose), so it runs here with an epsilon above their rounding; the others run as they are.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import optax
import pytest

import ffjax
from ffjax.examples import convnet, gpt, moe, recommender
from ffjax.testing import assert_same_numerics

STEPS = 3
MESHES = ({"x": 8}, {"x": 4, "y": 2}, {"x": 2, "y": 2, "z": 2})
STRATEGIES = ("auto", "data_parallel", "fsdp", "tensor_parallel", "fsdp+tensor_parallel")
WITH = {
    "zero1": ("gpt_scanned", "convnet", "gpt", "recommender", "moe"),
    "zero2": ("convnet", "gpt_scanned", "gpt", "recommender", "moe"),
    "hsdp": ("recommender", "gpt", "gpt_scanned", "convnet", "moe"),
    "tensor_parallel+sequence": ("gpt", "gpt_scanned", "moe"),
    "fsdp+tensor_parallel+sequence": ("gpt_scanned", "gpt", "moe"),
    "expert_parallel": ("moe",),
    "spatial": ("convnet",),
}
"""Further strategies, and the examples that they have a use for; by default the first."""
OF_TWO_AXES = ("fsdp+tensor_parallel", "hsdp", "fsdp+tensor_parallel+sequence")
EXAMPLES: dict[str, tuple[Any, Any]] = {
    "gpt": (gpt, gpt.Config.tiny()),
    "gpt_scanned": (gpt, dataclasses.replace(gpt.Config.tiny(), scan_layers=True, remat=True)),
    "convnet": (convnet, convnet.Config.tiny()),
    "recommender": (recommender, recommender.Config.tiny()),
    "moe": (moe, moe.Config.tiny()),
}


def _cases() -> list[Any]:
    pairs = [(e + s, x, y, True) for e, x in enumerate(EXAMPLES) for s, y in enumerate(STRATEGIES)]
    pairs += [
        (s, example, strategy, example == examples[0])
        for s, (strategy, examples) in enumerate(WITH.items())
        for example in examples
    ]
    cases = []
    for place, example, strategy, usual in pairs:
        meshes = [m for m in MESHES if len(m) > 1 or strategy not in OF_TWO_AXES]
        for m, mesh in enumerate(meshes):
            marks = () if usual and m == place % len(meshes) else (pytest.mark.full,)
            name = f"{example}-{strategy}-{'x'.join(map(str, mesh.values()))}"
            cases.append(pytest.param(example, strategy, mesh, id=name, marks=marks))
    return cases


@pytest.fixture(autouse=True)
def steady_moe(monkeypatch: pytest.MonkeyPatch) -> None:
    make = functools.cache(lambda config: optax.adamw(config.learning_rate, eps=1e-3, weight_decay=0.01))
    monkeypatch.setattr(moe, "make_optimizer", make)


def run(step: Any, module: Any, config: Any) -> Any:
    """The state and the metrics after each step."""
    state, batches, metrics = module.init(config, jax.random.key(0)), module.batches(config), []
    for _ in range(STEPS):
        if module is convnet:
            metrics.append(step(*state, next(batches)))
        else:
            state, found = step(state, next(batches))
            metrics.append(found)
    if module is convnet:
        from flax import nnx

        return nnx.to_pure_dict(nnx.split(state)[1]), metrics
    return state, metrics


@functools.cache
def unsharded(example: str) -> Any:
    module, config = EXAMPLES[example]
    step = module.make_train_step(config)
    if module is convnet:
        from flax import nnx

        return run(nnx.jit(step), module, config)
    return run(jax.jit(step), module, config)


@pytest.mark.parametrize(("example", "strategy", "mesh"), _cases())
def test_same_numbers(example: str, strategy: str, mesh: dict[str, int]) -> None:
    module, config = EXAMPLES[example]
    step = ffjax.autoshard(module.make_train_step(config), mesh=mesh, strategy=strategy)
    assert_same_numerics(run(step, module, config), unsharded(example), name=f"{example}, {strategy}, {mesh}")
