"""Measured collectives as lines: alpha + beta * bytes for each kind and kind of group, by least relative squares."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from ffjax.cost.meshes import AxisGroup
from ffjax.cost.profiles.profile import Profile


class Lie(NamedTuple):
    """How a group lies on hosts; the groups beside it do not matter."""

    devices: int
    hosts: int
    devices_per_host: int

    @property
    def crosses_hosts(self) -> bool:
        return self.hosts > 1

    @property
    def shares_host(self) -> bool:
        return self.devices > self.hosts


@dataclass(frozen=True, slots=True, kw_only=True)
class Line:
    """`alpha_s + beta_s_per_byte * bytes`, and how far samples are from it: the median of |measured / line - 1|."""

    alpha_s: float
    beta_s_per_byte: float
    error: float


def lie(group: AxisGroup) -> Lie:
    return Lie(group.devices, group.hosts, group.devices_per_host)


@functools.lru_cache(maxsize=16)
def link_fits(profile: Profile) -> Mapping[tuple[str, Lie], Line]:
    """The line of each kind of collective on each kind of group that was measured at two sizes or more."""
    groups: dict[tuple[str, Lie], list[tuple[float, float]]] = {}
    for sample in profile.collectives():
        devices, hosts, devices_per_host, size = sample.sizes
        where = Lie(int(devices), int(hosts), int(devices_per_host))
        groups.setdefault((sample.kind, where), []).append((size, sample.seconds))
    return {key: fit_line(points) for key, points in groups.items() if len({size for size, _ in points}) > 1}


def fit_line(points: Sequence[tuple[float, float]]) -> Line:
    """The line through (bytes, seconds) with the least sum of squared relative errors; neither part is negative.

    >>> line = fit_line([(0.0, 1.0), (1e3, 3.0)])
    >>> round(line.alpha_s, 6), round(line.beta_s_per_byte, 6)
    (1.0, 0.002)
    """
    size, seconds = np.asarray(points, np.float64).T
    scale = max(float(size.max()), 1.0)
    rows = np.stack([1 / seconds, size / scale / seconds], axis=1)
    alpha, beta = np.linalg.lstsq(rows, np.ones(len(rows)), rcond=None)[0]
    if alpha < 0 or beta < 0:
        # One of the two alone: the better.
        alone = [float(column.sum() / np.square(column).sum()) if column.any() else 0.0 for column in rows.T]
        misses = [float(np.square(column * a - 1).sum()) for column, a in zip(rows.T, alone, strict=True)]
        alpha, beta = (alone[0], 0.0) if misses[0] < misses[1] else (0.0, alone[1])
    predicted = alpha + beta * size / scale
    error = float(np.median(np.abs(seconds / np.maximum(predicted, 1e-12) - 1)))
    return Line(alpha_s=float(alpha), beta_s_per_byte=float(beta) / scale, error=error)
