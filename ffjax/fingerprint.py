"""Whether two programs are the same to a plan."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

from ffjax.ir.graph import build_graph
from ffjax.ir.regions import Regions, find_regions
from ffjax.ir.trace import Program
from ffjax.strategies.families import family_keys


def fingerprint(regions: Regions, keys: Sequence[str] | None = None) -> str:
    """A hash of what a plan depends on: the ops, shapes, dtypes and how they are connected."""
    digest = hashlib.blake2b(digest_size=12)
    for key in family_keys(regions) if keys is None else keys:
        digest.update(key.encode())
    for leaf in regions.graph.program.args + regions.graph.program.results:
        digest.update(str(leaf).encode())
    return digest.hexdigest()


def program_fingerprint(program: Program) -> str:
    """The fingerprint of a program that is not analysed yet."""
    return fingerprint(find_regions(build_graph(program)))
