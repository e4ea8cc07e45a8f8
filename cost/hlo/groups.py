"""The groups of devices of a collective, in any of the forms in which HLO prints them."""

from __future__ import annotations

import itertools
import math
import re
from typing import TypeAlias, cast

import numpy as np
from numpy.typing import NDArray

Groups: TypeAlias = tuple[tuple[int, ...], ...]

_LISTED = re.compile(r"\{((?:\{[\d,\s]*\},?\s*)*)\}")
_IOTA = re.compile(r"\[([\d,]+)\](?:<=\[([\d,]+)\])?(?:T\(([\d,]+)\))?")
_MESH = re.compile(r"mesh\[(?P<axes>[^\]]*)\](?:,\s*device_ids=\((?P<ids>.*?\)?)\))?\s*\{(?P<used>[^}]*)\}")
_SUB_AXIS = re.compile(r"'?([^',:=\s]+)'?(?::\((\d+)\)(\d+))?")


def parse_groups(printed: str, devices: int) -> Groups:
    """The groups of `replica_groups`; none listed means one group of all devices.

    Raises ValueError for a form that is not known.

    >>> parse_groups("{{0,1},{2,3}}", 4), parse_groups("[2,2]<=[2,2]T(1,0)", 4), parse_groups("{}", 4)
    (((0, 1), (2, 3)), ((0, 2), (1, 3)), ((0, 1, 2, 3),))
    >>> parse_groups("mesh['a'=2,'b'=2] {'b'}", 4)
    ((0, 1), (2, 3))
    """
    if match := _MESH.fullmatch(printed):
        return _mesh_groups(match["axes"], match["ids"], match["used"])
    if (match := _IOTA.fullmatch(printed)) and match[2]:
        shape, source, order = match.groups()
        ids = np.arange(math.prod(_ints(source))).reshape(_ints(source))
        return _rows(ids.transpose(_ints(order)) if order else ids, _ints(shape)[-1])
    if printed and not _LISTED.fullmatch(printed):
        raise ValueError(
            f"replica_groups={printed[:80]} is in no known form, such as {{{{0,1}},{{2,3}}}} or [2,2]<=[4]"
        )
    listed = tuple(tuple(_ints(group)) for group in re.findall(r"\{([\d,\s]+)\}", printed))
    return listed or (tuple(range(devices)),)


def parse_pairs(printed: str) -> Groups:
    """`source_target_pairs={{0,1},{1,0}}` as pairs."""
    return tuple(tuple(_ints(pair)) for pair in re.findall(r"\{([\d,\s]+)\}", printed))


def _ints(text: str) -> list[int]:
    return [int(n) for n in text.replace(" ", "").split(",") if n]


def _mesh_groups(axes: str, ids: str | None, used: str) -> Groups:
    sizes = {name: int(size) for name, size in re.findall(r"'?([^',=\s]+)'?=(\d+)", axes)}
    # A part of an axis is given by the size of what is major to it and its own: cut the axis at both ends.
    spans = [
        (n, int(before or 1), int(before or 1) * int(size or sizes[n])) for n, before, size in _SUB_AXIS.findall(used)
    ]
    segments: list[tuple[str, int, int]] = []
    for name, size in sizes.items():
        marks = sorted({1, size, *(m for n, *ends in spans if n == name for m in ends)})
        segments += [(name, a, b) for a, b in itertools.pairwise(marks)]
    chosen = [
        i for i, (name, a, b) in enumerate(segments) if any(n == name and lo <= a and b <= hi for n, lo, hi in spans)
    ]
    rest = [i for i in range(len(segments)) if i not in chosen]
    shape = [b // a for _, a, b in segments]
    grid = _device_order(ids, math.prod(shape)).reshape(shape).transpose(*rest, *chosen)
    return _rows(grid, math.prod(shape[i] for i in chosen))


def _device_order(ids: str | None, devices: int) -> NDArray[np.int_]:
    if not ids:
        return np.arange(devices)
    if (iota := _IOTA.match(ids.strip())) is None:
        return np.array(_ints(ids))
    grid = np.arange(devices).reshape(_ints(iota[1]))
    return (grid.transpose(_ints(iota[3])) if iota[3] else grid).reshape(-1)


def _rows(ids: NDArray[np.int_], width: int) -> Groups:
    return cast(Groups, tuple(tuple(row) for row in ids.reshape(-1, width).tolist()))
