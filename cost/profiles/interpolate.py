"""Values between measured sizes, in the logarithm of every size.

One size: linear between neighbours. Several: inverse distance weighting (Shepard, "A two-dimensional interpolation
function for irregularly-spaced data", 1968) over the nearest points, which needs no full grid. Both return what was
measured at a measured point; a point outside all others is taken to the border of the box that they span.
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import IntEnum

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

_NEAREST = 16
_POWER = 2.0
_SAME = 1e-9
_AMONG = 1.0  # a point is among the others if no size is over twice the largest, or under half the smallest


class Nearness(IntEnum):
    """How a point lies among the measured ones."""

    EXACT = 0
    BETWEEN = 1
    OUTSIDE = 2


class Table:
    """Values at points. `points`: one row of sizes each; `values`: a number each.

    >>> table = Table([[1.0], [4.0]], [0.0, 1.0])
    >>> value, nearness, _ = table.at(np.array([[2.0], [4.0], [64.0]]))
    >>> [float(v) for v in value], [int(n) for n in nearness]
    ([0.5, 1.0, 1.0], [1, 0, 2])
    """

    def __init__(self, points: Sequence[Sequence[float]], values: Sequence[float]) -> None:
        at = _log(np.asarray(points, np.float64).reshape(len(points), -1))
        order = np.lexsort(at.T[::-1]) if at.shape[1] else np.arange(len(at))
        self._order = order
        self._points = at[order]
        self._values = np.asarray(values, np.float64)[order]
        self._low, self._high = self._points.min(axis=0), self._points.max(axis=0)

    def at(self, points: Floats) -> tuple[Floats, NDArray[np.int64], NDArray[np.int64]]:
        """For each row of sizes its value, its `Nearness`, and which of the points it was made of is nearest."""
        wanted = _log(points)
        clipped = np.clip(wanted, self._low, self._high)
        out = np.abs(wanted - clipped).max(axis=1, initial=0.0)
        wanted = clipped
        square = np.square(wanted[:, None, :] - self._points[None, :, :]).sum(axis=2)
        nearest = square.argmin(axis=1)
        exact = (np.take_along_axis(square, nearest[:, None], axis=1)[:, 0] < _SAME) & (out < _SAME)
        nearness = np.where(exact, Nearness.EXACT, np.where(out <= _AMONG, Nearness.BETWEEN, Nearness.OUTSIDE))
        if wanted.shape[1] == 1:
            value = np.interp(wanted[:, 0], self._points[:, 0], self._values)
        else:
            kept = np.argsort(square, axis=1, kind="stable")[:, :_NEAREST]
            weight = np.power(np.maximum(np.take_along_axis(square, kept, axis=1), 1e-20), -_POWER / 2)
            value = (weight * self._values[kept]).sum(axis=1) / weight.sum(axis=1)
        return value, nearness.astype(np.int64), self._order[nearest].astype(np.int64)


def _log(sizes: Floats) -> Floats:
    return np.log2(np.maximum(sizes, 1e-9))
