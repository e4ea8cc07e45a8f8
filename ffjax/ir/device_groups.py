"""Groups of devices, as compilers write them, named by the mesh axes along which their members differ."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from functools import lru_cache

import numpy as np

from ffjax.ir.spec import MeshShape


def axes_of_groups(groups: Iterable[Iterable[int]], mesh: MeshShape) -> tuple[str, ...]:
    """The mesh axes along which the devices of each group differ; empty if they are no product of axes.

    >>> axes_of_groups([(0, 1), (2, 3), (4, 5), (6, 7)], MeshShape(("x", "y"), (4, 2)))
    ('y',)
    """
    return _groupings(mesh).get(frozenset(frozenset(g) for g in groups), ())


def axes_of_pairs(pairs: Iterable[Sequence[int]], mesh: MeshShape) -> tuple[str, ...]:
    """The mesh axes along which any (source, target) pair of a permutation differs."""
    moved: set[str] = set()
    for source, target in pairs:
        if max(source, target) >= mesh.devices:
            return ()
        here, there = np.unravel_index(source, mesh.sizes), np.unravel_index(target, mesh.sizes)
        moved.update(axis for axis, a, b in zip(mesh.axes, here, there, strict=True) if a != b)
    return tuple(a for a in mesh.axes if a in moved)


@lru_cache(maxsize=64)
def _groupings(mesh: MeshShape) -> dict[frozenset[frozenset[int]], tuple[str, ...]]:
    ids = np.arange(mesh.devices).reshape(mesh.sizes)
    split = [i for i, n in enumerate(mesh.sizes) if n > 1]
    found: dict[frozenset[frozenset[int]], tuple[str, ...]] = {}
    for some in itertools.chain.from_iterable(itertools.combinations(split, n) for n in range(1, len(split) + 1)):
        kept = [i for i in range(len(mesh.sizes)) if i not in some]
        rows = ids.transpose(*kept, *some).reshape(-1, mesh.size(mesh.axes[i] for i in some)).tolist()
        found[frozenset(frozenset(row) for row in rows)] = tuple(mesh.axes[i] for i in some)
    return found
