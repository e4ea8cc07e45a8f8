"""Steps as other people write them, one idiom each; `harness.py` says what each must pass."""

from __future__ import annotations

import importlib
import warnings

MODULES = ("optimizers", "linen_steps", "nnx_steps", "other_frameworks", "control_flow", "primitives")


def load() -> None:
    """Fills the table of idioms."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the frameworks themselves
        for module in MODULES:
            importlib.import_module(f"conformance.{module}")
