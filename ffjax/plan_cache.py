"""The folder of plans behind `cache=`: what was searched once for a program and options is read from there."""

from __future__ import annotations

import hashlib
import os
import warnings
from collections.abc import Callable
from pathlib import Path

from ffjax.cost.cluster import Cluster
from ffjax.errors import FfjaxWarning, PlanError
from ffjax.fingerprint import program_fingerprint
from ffjax.ir.trace import Program
from ffjax.options import SearchOptions
from ffjax.plan import Plan


def cached_plan(
    folder: str | os.PathLike[str],
    program: Program,
    options: SearchOptions,
    cluster: Cluster,
    *,
    bind: Callable[[Plan], Plan],
    search: Callable[[], Plan],
) -> Plan:
    """The plan in the folder for this program and these options, or a new one, which is then put there.

    Warns where a plan in the folder cannot be used, and where the new one cannot be written.

    Args:
      bind: puts a loaded plan on the program; raises PlanError for one that does not fit it.
      search: makes the new one.
    """
    asked = repr((program_fingerprint(program), options.key(cluster)))
    digest = hashlib.blake2b(asked.encode(), digest_size=10).hexdigest()
    path = Path(folder) / f"{program.name}-{digest}.json"
    if path.exists():
        try:
            return bind(Plan.load(path))
        except PlanError as error:
            warnings.warn(f"the cached plan cannot be used and is searched again: {error}", FfjaxWarning, stacklevel=6)
    found = search()
    try:
        found.save(path)
    except OSError as error:
        warnings.warn(
            f"the plan could not be put into cache={os.fspath(folder)!r}: {error.strerror}. Remedy: name a folder that "
            "can be written.",
            FfjaxWarning,
            stacklevel=6,
        )
    return found
