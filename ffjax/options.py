"""What a search can be asked for, as one value: `plan`, `autoshard`, `pareto` and the command line pass it on."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import jax

from ffjax.cost.cluster import Cluster
from ffjax.errors import PlanError
from ffjax.ir.compat import AS_WRITTEN
from ffjax.pins import Pins
from ffjax.plan import Plan
from ffjax.remat import check_remat
from ffjax.strategies.search import Progress
from ffjax.strategies.session import AUTO

NEVER, FINALISTS = "never", "finalists"


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
        asked = (self.memory, self.strategy, self.mesh, self.pins, self.verify, self.remat)
        return repr((*priced, *asked))


@dataclass(frozen=True, slots=True, kw_only=True)
class StepOptions:
    """The options of `ffjax.autoshard`; see there."""

    search: SearchOptions
    plan: Plan | None
    cache: str | os.PathLike[str] | None
    static_argnums: int | Sequence[int]
    donate_argnums: int | Sequence[int]
    devices: Sequence[jax.Device] | None

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
