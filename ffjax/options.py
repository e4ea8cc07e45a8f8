"""What a search can be asked for, as one value: `plan`, `autoshard`, `pareto` and the command line pass it on."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import jax

from ffjax.arguments import ArgumentOptions
from ffjax.cost.cluster import Cluster
from ffjax.errors import PlanError
from ffjax.fingerprint import digest
from ffjax.ir.compat import AS_WRITTEN
from ffjax.pins import Pins
from ffjax.plan import Plan
from ffjax.remat import check_remat
from ffjax.strategies.base import all_strategies
from ffjax.strategies.search import Progress
from ffjax.strategies.session import AUTO

NEVER, FINALISTS = "never", "finalists"
_PLAIN = ("memory", "strategy", "mesh", "pins", "verify", "remat", "keep_shardings")


@dataclass(frozen=True, slots=True, kw_only=True)
class SearchOptions:
    """The options of `ffjax.plan`; see there."""

    cluster: Cluster | None = None
    memory: str | float | None = None
    strategy: str = AUTO
    mesh: Mapping[str, int] | None = None
    pins: Pins | None = None
    verify: str = NEVER
    remat: str = AS_WRITTEN
    keep_shardings: bool = True
    progress: Progress | None = field(default=None, compare=False)

    def check(self) -> None:
        """Raises PlanError for an option that is none, before anything is traced or searched."""
        check_remat(self.remat)
        if self.verify not in (NEVER, FINALISTS):
            raise PlanError(
                f"verify={self.verify!r} is no way to verify. Remedy: {NEVER!r}, or {FINALISTS!r} to compile the best."
            )

    def key(self, cluster: Cluster) -> str:
        """A text that is equal for options that lead to the same plan on this cluster."""
        priced = (dataclasses.replace(cluster, profile=None), cluster.profile and cluster.profile.digest)
        asked = [getattr(self, name) for name in _PLAIN]
        return repr((*priced, *asked, self.competing()))

    def competing(self) -> tuple[str, ...]:
        """The strategies that a search tries beside its own plans."""
        return tuple(strategy.name for strategy in all_strategies()) if self.strategy == AUTO else ()


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
        search = self.search
        return {
            "cluster": "the local one" if search.cluster is None else digest(search.cluster),
            "devices=": "all" if self.devices is None else str([device.id for device in self.devices]),
            "plan=": "none" if self.plan is None else digest(self.plan.to_json()),
            "registered strategies": ", ".join(search.competing()),
            **{name: str(getattr(search, name)) for name in _PLAIN},
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
