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
    hashed = hashlib.blake2b(digest_size=12)
    for key in family_keys(regions) if keys is None else keys:
        hashed.update(key.encode())
    for leaf in regions.graph.program.args + regions.graph.program.results:
        hashed.update(str(leaf).encode())
    return hashed.hexdigest()


def program_fingerprint(program: Program) -> str:
    """The fingerprint of a program that is not analysed yet."""
    return fingerprint(find_regions(build_graph(program)))


def digest(content: object) -> str:
    """A short hash of how something is written."""
    return hashlib.blake2b(repr(content).encode(), digest_size=10).hexdigest()
