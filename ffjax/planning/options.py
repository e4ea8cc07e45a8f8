"""What a search can be asked for, as one value: `plan`, `autoshard`, `pareto` and the command line pass it on."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field

from ffjax.cost.cluster import Cluster
from ffjax.errors import PlanError
from ffjax.ir.compat import AS_WRITTEN
from ffjax.planning.fingerprint import digest
from ffjax.planning.pins import Pins
from ffjax.planning.remat import check_remat
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

    def facts(self) -> dict[str, str]:
        """By name, what the processes of a run must be given alike to search the same plan."""
        return {
            "cluster": "the local one" if self.cluster is None else digest(self.cluster),
            "registered strategies": ", ".join(self.competing()),
            **{name: str(getattr(self, name)) for name in _PLAIN},
        }
