"""Time of one collective: alpha + beta * bytes, with bytes as `ffjax.ir.spec.Collective` counts them.

A group has n devices on h hosts, d = its fewest devices on one of them. Rates are a device's, one direction:
B_in of the link inside a host, B_out of its share of the host's network. Every device drives its own share, so d
devices of a group carry its traffic across together, and groups side by side on a host do not slow each other.
With a = the latency of one step on a link:

    ring rate        R    = min(B_in if the group shares a host, d * B_out if it crosses hosts)
    all_gather       beta = (n-1)/n / R              alpha = (n-h) a_in + (h-1) a_out          (ring)
    reduce_scatter   as all_gather; as all_reduce where the compiler forms none (Cluster.reduce_scatter)
    all_reduce       beta = 2 (n-1)/n / R            alpha = 2 (log2(n/h) a_in + log2(h) a_out)  (see below)
    all_to_all       beta = max((d-1)/n / B_in, (n-d)/n / B_out)
                                                     alpha = (d-1)/8 a_in + (n-d)/8 a_out      (8 messages in flight)
    collective_permute  beta = 1 / B, alpha = a      of the slowest link that the group crosses

An all-reduce takes the better of ring and tree at each size; NCCL's double binary tree has nearly the ring's
bandwidth at a logarithmic number of steps, so the envelope of both is close to the tree's alpha with the ring's beta
(Jeaugey, "Massively scale your deep learning training with NCCL 2.4", 2019). Rates and steps of the rest: Thakur,
Rabenseifner, Gropp, "Optimization of collective communication operations in MPICH", 2005. Logarithms and messages in
flight are rounded up. Where the cluster has a profile, alpha and beta are what was measured (`link_fits`), scaled to
other sizes of group. A collective is a kernel too: alpha has `Device.kernel_s` in it. A group of one costs nothing.
"""

from __future__ import annotations

import dataclasses
import functools
import math

from ffjax.cost.cluster import Cluster
from ffjax.cost.compilers import compiler_of
from ffjax.cost.hardware import Link
from ffjax.cost.meshes import AxisGroup
from ffjax.cost.op_times import Source
from ffjax.cost.profiles.link_fits import lie, link_fits
from ffjax.errors import ClusterError
from ffjax.ir.spec import COLLECTIVE_KINDS, Collective, CollectiveKind, MeshShape

_MESSAGES_IN_FLIGHT = 8  # point-to-point messages that NCCL works on at once


class CollectiveModel:
    """The costs of all collectives on one mesh of one cluster, each (kind, axes) worked out once.

    `links` in place of the cluster's ask what other bandwidths would change: what is known of the cluster's (measured
    or not) is scaled as the formulas say. Raises ClusterError where mesh and cluster do not match.

    >>> model = CollectiveModel(MeshShape(("x", "y"), (8, 8)), Cluster.named("h100", hosts=8))
    >>> alpha_s, beta_s_per_byte = model.coefficients("all_reduce", ("y",))
    >>> round(2**30 * beta_s_per_byte * 1e3, 2)  # ms for 1 GiB inside a host
    5.22
    """

    def __init__(self, mesh: MeshShape, cluster: Cluster, links: tuple[Link, ...] | None = None) -> None:
        cluster.axis_link(mesh, ())  # raises where they do not match
        self.mesh = mesh
        self.cluster = cluster
        self._asked = None if links is None else dataclasses.replace(cluster, links=links)
        self._known: dict[tuple[CollectiveKind, tuple[str, ...]], tuple[float, float]] = {}
        self._groups: dict[frozenset[str], AxisGroup] = {}

    def coefficients(self, kind: CollectiveKind, axes: tuple[str, ...]) -> tuple[float, float]:
        """`(alpha_s, beta_s_per_byte)` of a collective over some mesh axes."""
        key = (kind, axes)
        found = self._known.get(key)
        if found is None:
            alpha_s, beta_s_per_byte, _ = priced(kind, self.group(axes), self.cluster)
            if self._asked is not None and beta_s_per_byte:
                there, asked = (
                    described_coefficients(kind, self.group(axes), c)[1] for c in (self.cluster, self._asked)
                )
                beta_s_per_byte *= asked / there
            found = self._known[key] = alpha_s, beta_s_per_byte
        return found

    def source(self, collective: Collective) -> Source:
        """Where the seconds of a collective are from."""
        return priced(collective.kind, self.group(collective.axes), self.cluster)[2]

    @property
    def axis_prices(self) -> tuple[float, ...]:
        """What a gathered byte costs on each mesh axis, relative to the cheapest."""
        betas = [self.coefficients("all_gather", (axis,))[1] for axis in self.mesh.axes]
        least = min((b for b in betas if b > 0), default=1.0)
        return tuple(max(b / least, 1.0) for b in betas)

    def seconds(self, collective: Collective, *, merged: bool = False) -> float:
        """Of one collective; `merged`: together with others of its kind, up to what the compiler merges into one."""
        alpha_s, beta_s_per_byte = self.coefficients(collective.kind, collective.axes)
        if merged:
            alpha_s *= self.share_of_one(collective.bytes)
        return alpha_s + beta_s_per_byte * collective.bytes

    def share_of_one(self, size: float) -> float:
        """The share of a merged collective's latency that one of so many bytes bears."""
        combined = compiler_of(self.cluster.device.platform).combined_bytes
        return min(1.0, size / combined) if combined else 1.0

    def group(self, axes: tuple[str, ...]) -> AxisGroup:
        """How the groups along `axes` lie on the hosts."""
        key = frozenset(axes)
        found = self._groups.get(key)
        if found is None:
            found = self._groups[key] = self.cluster.axis_link(self.mesh, axes)
        return found


def collective_seconds(collective: Collective, mesh: MeshShape, cluster: Cluster) -> float:
    """Seconds of one collective. For many of them on one mesh, make a `CollectiveModel`.

    >>> cluster = Cluster.named("v100", hosts=2)
    >>> mesh = MeshShape(("x", "y"), (2, 8))
    >>> slow, fast = (collective_seconds(Collective("all_gather", (a,), 1e6), mesh, cluster) for a in ("x", "y"))
    >>> slow > 10 * fast
    True
    """
    return _model(mesh, cluster).seconds(collective)


@functools.lru_cache(maxsize=64)
def _model(mesh: MeshShape, cluster: Cluster) -> CollectiveModel:
    return CollectiveModel(mesh, cluster)


def priced(kind: CollectiveKind, group: AxisGroup, cluster: Cluster) -> tuple[float, float, Source]:
    """Alpha, beta and where they are from: measured on such a group, scaled from another one, or described."""
    alpha, beta = described_coefficients(kind, group, cluster)
    if cluster.profile is None or group.devices == 1:
        return alpha, beta, "counted"
    kind = _formed(kind, cluster)
    fits = link_fits(cluster.profile)
    wanted = lie(group)
    if exact := fits.get((kind, wanted)):
        return exact.alpha_s, exact.beta_s_per_byte, "measured"
    crosses = (wanted.crosses_hosts, wanted.shares_host)
    alike = [at for known, at in fits if known == kind and (at.crosses_hosts, at.shares_host) == crosses]
    if not alike:
        return alpha, beta, "counted"
    # What is measured of one size of group is off the description by some factor: so are the other sizes.
    near = min(alike, key=lambda at: (abs(math.log(at.devices / wanted.devices)), at))
    there = described_coefficients(kind, AxisGroup(**near._asdict(), groups_per_host=1), cluster)
    line = fits[kind, near]
    between = min(at.devices for at in alike) <= wanted.devices <= max(at.devices for at in alike)
    return (
        alpha * line.alpha_s / there[0] if there[0] else alpha,
        beta * line.beta_s_per_byte / there[1],
        "interpolated" if between else "extrapolated",
    )


def _formed(kind: CollectiveKind, cluster: Cluster) -> CollectiveKind:
    """The collective that the platform's compiler makes of one."""
    return "all_reduce" if kind == "reduce_scatter" and not cluster.reduce_scatter else kind


def described_coefficients(kind: CollectiveKind, group: AxisGroup, cluster: Cluster) -> tuple[float, float]:
    """`(alpha_s, beta_s_per_byte)` by the module's formulas, of groups that lie on the hosts so."""
    if kind not in COLLECTIVE_KINDS:
        raise ClusterError(f"unknown collective {kind!r}; known: {', '.join(COLLECTIVE_KINDS)}")
    n, h, d = group.devices, group.hosts, group.devices_per_host
    if n == 1:
        return 0.0, 0.0
    kind = _formed(kind, cluster)
    inner, outer = cluster.links[0], cluster.links[-1]
    launch_s = cluster.device.kernel_s
    match kind:
        case "all_gather" | "reduce_scatter":
            alpha_s = (n - h) * inner.latency_s + (h - 1) * outer.latency_s
            return launch_s + alpha_s, (n - 1) / n / _ring_bytes_per_s(group, inner, outer)
        case "all_reduce":
            steps_in, steps_out = (math.ceil(math.log2(k)) for k in (-(-n // h), h))
            alpha_s = 2 * (steps_in * inner.latency_s + steps_out * outer.latency_s)
            return launch_s + alpha_s, 2 * (n - 1) / n / _ring_bytes_per_s(group, inner, outer)
        case "all_to_all":
            near, far = d - 1, n - d
            alpha_s = sum(
                math.ceil(peers / _MESSAGES_IN_FLIGHT) * link.latency_s for peers, link in ((near, inner), (far, outer))
            )
            beta = max(near / n / inner.effective_bytes_per_s, far / n / outer.effective_bytes_per_s)
            return launch_s + alpha_s, beta
        case "collective_permute":
            crossed = [link for link, used in ((inner, group.shares_host), (outer, group.crosses_hosts)) if used]
            alpha_s = max(link.latency_s for link in crossed)
            return launch_s + alpha_s, 1 / min(link.effective_bytes_per_s for link in crossed)


def _ring_bytes_per_s(group: AxisGroup, inner: Link, outer: Link) -> float:
    rates = []
    if group.shares_host:
        rates.append(inner.effective_bytes_per_s)
    if group.crosses_hosts:
        rates.append(group.devices_per_host * outer.effective_bytes_per_s)
    return min(rates)
