"""What a step under `autoshard` was given, as one value."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass

import jax

from ffjax.arguments import ArgumentOptions
from ffjax.errors import PlanError
from ffjax.plan import Plan
from ffjax.planning.fingerprint import digest
from ffjax.planning.options import SearchOptions


@dataclass(frozen=True, slots=True, kw_only=True)
class StepOptions:
    """The options of `ffjax.autoshard`; see there."""

    search: SearchOptions
    plan: Plan | None
    cache: str | os.PathLike[str] | None
    arguments: ArgumentOptions
    devices: Sequence[jax.Device] | None

    def facts(self) -> dict[str, str]:
        """By name, what the processes of a run must be given alike to run the same plan."""
        return {
            "devices=": "all" if self.devices is None else str([device.id for device in self.devices]),
            "plan=": "none" if self.plan is None else digest(self.plan.to_json()),
            **self.search.facts(),
        }

    def check(self) -> None:
        """Raises PlanError for an option that is none, and for options of a search beside a plan."""
        self.search.check()
        if self.plan is None:
            return
        defaults = SearchOptions()
        for name in ("memory", "mesh", "pins", "strategy", "remat"):
            if (value := getattr(self.search, name)) != getattr(defaults, name):
                raise PlanError(
                    f"autoshard was given plan= and {name}={value!r}; a plan is run as it is. Remedy: drop {name}=, or "
                    "drop plan= and search with it."
                )
