"""The programs of the verify benchmark and of the gate on what it recorded."""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Callable

GPT: dict[str, object] = {"layers": 2, "dtype": "bfloat16"}
MODELS: dict[str, tuple[str, dict[str, object], int | tuple[int, ...]]] = {
    "gpt, unrolled": ("gpt", GPT, 0),
    "gpt, scanned, remat": ("gpt", GPT | {"layers": 12, "scan_layers": True, "remat": True}, 0),
    "convnet": ("convnet", {}, (0, 1)),
    "recommender": ("recommender", {}, 0),
    "moe": ("moe", {}, 0),
}
"""For each an example, how its full configuration is changed, and which arguments are donated."""
CLUSTERS: tuple[tuple[int, dict[str, int]], ...] = ((1, {"x": 8}), (1, {"x": 4, "y": 2}), (2, {"x": 2, "y": 8}))
"""Hosts of eight H100s, and the mesh."""


def build(name: str) -> tuple[Callable[..., object], tuple[object, ...], int | tuple[int, ...]]:
    """The step of a model, its arguments' shapes, and which of them are donated."""
    example, changes, donated = MODELS[name]
    module = importlib.import_module(f"ffjax.examples.{example}")
    config = dataclasses.replace(module.Config(), **changes)
    return module.make_train_step(config), module.example_args(config), donated
