"""Which meshes a cluster's devices can form, and how the groups along their axes lie on its hosts.

Devices are numbered host by host and a mesh is filled in that order, so its last axis varies fastest and
lies inside a host where it fits. Only counts matter here: nothing is known of links or of JAX.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ffjax.errors import ClusterError
from ffjax.ir.spec import MeshShape

AXIS_NAMES = ("x", "y", "z")
# How many candidates to keep for each number of axes: a mesh is one more search, and the best of few is near the best.
_KEPT = {1: 1, 2: 5, 3: 6}


@dataclass(frozen=True, slots=True, kw_only=True)
class AxisGroup:
    """The devices that take part in one collective along some mesh axes, as they lie on hosts.

    Where the groups along the axes differ (an axis that does not align with hosts), this is the one that
    spans the most hosts with the fewest devices on one of them.
    """

    devices: int
    hosts: int
    devices_per_host: int  # the fewest that it has on any of its hosts
    groups_per_host: int  # groups along these axes that have a device on one host, and so share its network

    @property
    def crosses_hosts(self) -> bool:
        return self.hosts > 1

    @property
    def shares_host(self) -> bool:
        """Whether two of its devices are on one host."""
        return self.devices > self.hosts


def candidate_meshes(hosts: int, devices_per_host: int, max_axes: int = 3) -> list[MeshShape]:
    """The meshes worth searching over `hosts * devices_per_host` devices, simplest first, at most 12.

    Each axis lies inside a host or across hosts; then come the meshes whose outer axis takes a part of each
    host too, and the one whose inner axis takes several whole hosts. Orders of axes within one level are equal
    by symmetry, so only the descending one is listed.

    >>> [str(m) for m in candidate_meshes(1, 8)]
    ['8', '4x2', '2x2x2']
    >>> [str(m) for m in candidate_meshes(2, 4)]
    ['8', '2x4', '4x2', '2x2x2']
    """
    if not 1 <= max_axes <= len(AXIS_NAMES):
        raise ClusterError(f"max_axes={max_axes}; a mesh has 1 to {len(AXIS_NAMES)} axes")
    ranked: dict[tuple[int, ...], tuple[int, float]] = {}

    def add(sizes: tuple[int, ...], rank: int) -> None:
        kept = tuple(size for size in sizes if size > 1) or (1,)
        if len(kept) <= max_axes:
            # Balanced splits first; of the inner axes that take several hosts, those of few hosts first.
            entry = (rank, kept[-1] if rank == 2 else max(kept) / min(kept))
            ranked[kept] = min(entry, ranked.get(kept, entry))

    add((hosts * devices_per_host,), 0)
    for outer in _splits(hosts, max_axes):
        for inner in _splits(devices_per_host, max_axes):
            add(outer + inner, 0)
    if hosts > 1 and devices_per_host > 1:  # else there is one level, and its splits are all listed
        for taken in _divisors(devices_per_host):
            for inner in _splits(devices_per_host // taken, max_axes):
                add((hosts * taken, *inner), 1)
        for kept_hosts in _divisors(hosts):
            add((kept_hosts, hosts // kept_hosts * devices_per_host), 2)

    meshes: list[MeshShape] = []
    for count in range(1, max_axes + 1):
        sized = sorted((rank, sizes) for sizes, rank in ranked.items() if len(sizes) == count)
        meshes += [MeshShape(AXIS_NAMES[:count], sizes) for _, sizes in sized[: _KEPT[count]]]
    return meshes


def axis_group(mesh: MeshShape, axes: tuple[str, ...], devices_per_host: int | Sequence[int]) -> AxisGroup:
    """How the groups along `axes` of `mesh` lie on hosts of `devices_per_host` devices, or of so many each.

    Raises ClusterError where the mesh lacks an axis.

    >>> axis_group(MeshShape(("x", "y"), (2, 8)), ("x",), devices_per_host=8)
    AxisGroup(devices=2, hosts=2, devices_per_host=1, groups_per_host=8)
    """
    for axis in axes:
        if axis not in mesh.axes:
            raise ClusterError(f"axes {axes}: the mesh has no axis {axis!r}; its axes are {', '.join(mesh.axes)}")
    size = mesh.size(tuple(dict.fromkeys(axes)))
    along = [i for i, name in enumerate(mesh.axes) if name in axes]
    across = [i for i in range(len(mesh.axes)) if i not in along]
    ids = np.arange(mesh.devices).reshape(mesh.sizes).transpose(across + along).reshape(-1, size)
    return groups_on_hosts(ids, devices_per_host)


def groups_on_hosts(ids: NDArray[np.int_], devices_per_host: int | Sequence[int]) -> AxisGroup:
    """How groups of devices, one to a row of device ids, lie on hosts of `devices_per_host` devices, or so many each.

    >>> groups_on_hosts(np.array([[0, 9], [1, 8]]), devices_per_host=8)
    AxisGroup(devices=2, hosts=2, devices_per_host=1, groups_per_host=2)
    >>> groups_on_hosts(np.arange(12)[None, :], devices_per_host=(8, 4))
    AxisGroup(devices=12, hosts=2, devices_per_host=4, groups_per_host=1)
    """
    host_of = (
        ids // devices_per_host
        if isinstance(devices_per_host, int)
        else np.searchsorted(np.cumsum(devices_per_host), ids, side="right")
    )
    host_count = int(host_of.max()) + 1
    groups = np.arange(ids.shape[0])[:, None]
    # One entry for each pair of a group and a host that it has devices on, in order of groups.
    pairs, devices = np.unique(groups * host_count + host_of, return_counts=True)
    spans = np.bincount(pairs // host_count)
    fewest = np.minimum.reduceat(devices, np.cumsum(spans) - spans)
    worst = int(np.lexsort((fewest, -spans))[0])
    return AxisGroup(
        devices=ids.shape[1],
        hosts=int(spans[worst]),
        devices_per_host=int(fewest[worst]),
        groups_per_host=int(np.bincount(pairs % host_count).max()),
    )


def _divisors(n: int) -> list[int]:
    return [d for d in range(1, n + 1) if n % d == 0]


def _splits(n: int, parts: int, largest: int | None = None) -> list[tuple[int, ...]]:
    """The ways to write n as a product of at most `parts` factors above 1, in descending order."""
    if n == 1:
        return [()]
    if parts == 0:
        return []
    found: list[tuple[int, ...]] = []
    for first in reversed(_divisors(n)):
        if first > 1 and (largest is None or first <= largest):
            found += [(first, *rest) for rest in _splits(n // first, parts - 1, first)]
    return found
