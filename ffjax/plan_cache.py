"""The folder of plans behind `cache=`: what was searched once for a program and options is read from there."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from ffjax.cost.cluster import Cluster
from ffjax.errors import FfjaxWarning, PlanError
from ffjax.ir.trace import Program
from ffjax.plan import Plan
from ffjax.planning.fingerprint import digest, program_fingerprint
from ffjax.planning.options import SearchOptions

_TO_THE_CALLER = 8
"""Of `read` and `keep`, under `agreed_plan`: the line that called the step."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CachedPlan:
    """The place in the folder for the plan of one program and some options."""

    path: Path

    @classmethod
    def at(
        cls, folder: str | os.PathLike[str], program: Program, options: SearchOptions, cluster: Cluster
    ) -> CachedPlan:
        """The place for what is asked of a program on a cluster."""
        carried = program.carried if options.keep_shardings else ()
        asked = (program_fingerprint(program), carried, options.key(cluster))
        return cls(path=Path(folder) / f"{program.name}-{digest(asked)}.json")

    def read(self, bind: Callable[[Plan], Plan]) -> Plan | None:
        """The plan that is there, put on the program by `bind`; None, with a warning, where it cannot be used."""
        if not self.path.exists():
            return None
        try:
            return bind(Plan.load(self.path))
        except PlanError as error:
            warnings.warn(
                f"the cached plan cannot be used and is replaced: {error}", FfjaxWarning, stacklevel=_TO_THE_CALLER
            )
            return None

    def keep(self, plan: Plan) -> None:
        """Puts a plan there, unless another process has; warns where that cannot be."""
        try:
            if not self.path.exists() or self.path.read_bytes() != plan.to_json().encode():
                plan.save(self.path)
        except OSError as error:
            warnings.warn(
                f"the plan could not be put into cache={os.fspath(self.path.parent)!r}: {error.strerror}. Remedy: name "
                "a folder that can be written.",
                FfjaxWarning,
                stacklevel=_TO_THE_CALLER,
            )
