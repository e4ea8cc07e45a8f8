"""Steps as other people write them, one idiom each; `harness.py` says what each must pass."""

from __future__ import annotations

import importlib
import importlib.util
import warnings

MODULES = ("optimizers", "linen_steps", "nnx_steps", "other_frameworks", "control_flow", "by_hand", "primitives")
FRAMEWORKS = ("haiku", "equinox", "transformers")
"""What `other_frameworks` needs: the extra `frameworks`."""


def missing() -> list[str]:
    """The frameworks that are not installed."""
    return [name for name in FRAMEWORKS if importlib.util.find_spec(name) is None]


def load() -> None:
    """Fills the table of idioms; without those of other frameworks where one is missing."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the frameworks themselves
        for module in MODULES:
            if module != "other_frameworks" or not missing():
                importlib.import_module(f"conformance.{module}")
