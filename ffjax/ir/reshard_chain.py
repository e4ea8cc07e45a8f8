"""How to reshard so that the compiler does what was planned.

XLA's partitioner carries out a direct resharding as Shardy describes it (`ffjax.ir.reshard`) only where that
is one plain move; for about a third of all pairs of specs it does something dearer, down to gathering the
whole tensor on every device. Held at a sharding constraint after each move it has no choice. The moves that
it carries out exactly (`tests/test_reshard_chain.py` compiles them):

- slice: more axes behind those of any dimensions; no communication;
- all_gather: drop the last axes of one dimension;
- all_to_all: the last axes of one dimension become the last of another, in the same order;
- collective_permute: other axes, or another order, with as many pieces in every dimension as before.

Objective: the least sum over moves of bytes sent by each device, times the price of the dearest axis used,
plus a little for each move, so that of equal ways the shorter wins (`_price`, a shortest path).
"""

from __future__ import annotations

import heapq
import itertools
import math
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from typing import TypeAlias

from ffjax.ir.reshard import Step
from ffjax.ir.spec import CollectiveKind, MeshShape, Spec, spec_axes

Prices: TypeAlias = tuple[float, ...]

# One more collective is worth it if it saves this share of a device's piece.
_HOP = 0.01


@dataclass(frozen=True, slots=True, kw_only=True)
class Hop:
    """One move of a chain: the sharding to constrain the value to, and the collective that this costs, if any."""

    spec: Spec
    step: Step | None


def reshard_chain(
    source: Spec,
    target: Spec,
    mesh: MeshShape,
    shape: tuple[int, ...] | None = None,
    axis_prices: Prices | None = None,
) -> tuple[Hop, ...]:
    """The cheapest moves from `source` to `target`, each of which compiles to the one collective it names.

    Args:
      source: the present sharding, with no partial sums.
      target: the sharding wanted, of the same rank.
      mesh: the mesh whose axes both use.
      shape: the tensor's global shape; without it every dimension is taken to divide evenly.
      axis_prices: the relative cost of a byte on each mesh axis; all alike if not given.

    Returns:
      The hops, the last one's spec being `target`; none if the specs are equal. A step's bytes are a multiple
      of one device's piece under `source`, as in `reshard_steps`.

    >>> mesh = MeshShape(("x", "y"), (4, 2))
    >>> for hop in reshard_chain(((), ("x", "y")), (("y",), ()), mesh):
    ...     print(hop.spec, hop.step)
    (('y',), ('x',)) ('all_to_all', ('y',), 1.0)
    (('y',), ()) ('all_gather', ('x',), 4.0)
    """
    if source == target:
        return ()
    if len(source) != len(target):
        raise ValueError(f"cannot reshard {source} to {target}: their ranks differ; give specs of one tensor")
    # A tensor's shape only matters for whether pieces of the mesh divide it, so shapes share entries.
    divisors = None if shape is None else tuple(math.gcd(n, mesh.devices) for n in shape)
    return _chain(source, target, mesh, divisors, axis_prices or (1.0,) * len(mesh.axes))


@lru_cache(maxsize=1 << 17)
def _chain(
    source: Spec, target: Spec, mesh: MeshShape, divisors: tuple[int, ...] | None, prices: Prices
) -> tuple[Hop, ...]:
    kept = [_common(a, b) for a, b in zip(source, target, strict=True)]
    moving = [d for d in range(len(source)) if source[d] != target[d]]
    start: Spec = tuple(source[d][kept[d] :] for d in moving)
    goal: Spec = tuple(target[d][kept[d] :] for d in moving)
    limits = None
    if divisors is not None:
        # A dimension that the given specs split unevenly may stay so, but is not split further.
        given = {d: max(mesh.size(source[d]), mesh.size(target[d])) for d in moving}
        limits = tuple(
            (divisors[d] if divisors[d] % given[d] == 0 else given[d]) // mesh.size(source[d][: kept[d]])
            for d in moving
        )
    hops: list[Hop] = []
    for state, step in _cheapest(start, goal, mesh, limits, prices):
        spec = list(source)
        for d, axes in zip(moving, state, strict=True):
            spec[d] = source[d][: kept[d]] + axes
        hop = Hop(spec=tuple(spec), step=step)
        if step is None and hops and hops[-1].step is None:
            hops[-1] = hop  # slices follow each other for nothing: one constraint
        else:
            hops.append(hop)
    return tuple(hops)


def _common(a: tuple[str, ...], b: tuple[str, ...]) -> int:
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


@lru_cache(maxsize=1 << 17)
def _cheapest(
    start: Spec, goal: Spec, mesh: MeshShape, limits: tuple[int, ...] | None, prices: Prices
) -> tuple[tuple[Spec, Step | None], ...]:
    """Dijkstra's shortest path over the ways to place the axes that either spec uses."""
    axes = tuple(a for a in mesh.axes if a in {*spec_axes(start), *spec_axes(goal)})
    pieces = mesh.size(spec_axes(start))
    best: dict[Spec, float] = {start: 0.0}
    came: dict[Spec, tuple[Spec, Step | None]] = {}
    order = itertools.count()
    heap: list[tuple[float, int, Spec]] = [(0.0, next(order), start)]
    while heap:
        cost, _, state = heapq.heappop(heap)
        if state == goal:
            break
        if cost > best[state]:
            continue
        for after, step, sent in _moves(state, axes, mesh, prices):
            total = cost + _HOP + sent * pieces
            if total >= best.get(after, math.inf) - 1e-9:
                continue
            if limits is not None and any(n % mesh.size(dim) for n, dim in zip(limits, after, strict=True)):
                continue
            best[after] = total
            came[after] = state, None if step is None else (step[0], step[1], step[2] * pieces)
            heapq.heappush(heap, (total, next(order), after))
    path: list[tuple[Spec, Step | None]] = []
    state = goal
    while state != start:
        before, step = came[state]
        path.append((state, step))
        state = before
    return tuple(path[::-1])


def _price(step: Step, mesh: MeshShape, prices: Prices) -> float:
    kind, axes, size = step
    n = mesh.size(axes)
    share = 1.0 if kind == "collective_permute" else (n - 1) / n
    return size * share * max(prices[mesh.axes.index(a)] for a in axes)


@lru_cache(maxsize=1 << 14)
def _moves(
    state: Spec, axes: tuple[str, ...], mesh: MeshShape, prices: Prices
) -> tuple[tuple[Spec, Step | None, float], ...]:
    """The states one move from `state`: the step there, of a tensor of one byte, and what it costs."""
    found: list[tuple[Spec, Step | None, float]] = []

    def add(after: Spec, kind: CollectiveKind, moved: Iterable[str]) -> None:
        least = min(mesh.size(spec_axes(state)), mesh.size(spec_axes(after)))
        step: Step = (kind, tuple(a for a in mesh.axes if a in moved), 1 / least)
        found.append((after, step, _price(step, mesh, prices)))

    def put(changes: dict[int, tuple[str, ...]]) -> Spec:
        return tuple(changes.get(d, dim) for d, dim in enumerate(state))

    used = set(spec_axes(state))
    for d, dim in enumerate(state):
        found += [(put({d: (*dim, axis)}), None, 0.0) for axis in axes if axis not in used]
        for k in range(len(dim)):
            last = dim[k:]
            add(put({d: dim[:k]}), "all_gather", last)
            for e, other in enumerate(state):
                if e != d:
                    add(put({d: dim[:k], e: other + last}), "all_to_all", last)
    if used:
        for after in _placements(tuple(mesh.size(dim) for dim in state), axes, mesh):
            if after != state:
                add(after, "collective_permute", _displaced(state, after, mesh))
    return tuple(found)


@lru_cache(maxsize=4096)
def _placements(pieces: tuple[int, ...], axes: tuple[str, ...], mesh: MeshShape) -> tuple[Spec, ...]:
    """Every way to split dimensions into exactly so many pieces."""
    if not pieces:
        return ((),)
    found: list[Spec] = []
    for n in range(len(axes) + 1):
        for dim in itertools.permutations(axes, n):
            if mesh.size(dim) == pieces[0]:
                rest = tuple(a for a in axes if a not in dim)
                found += [(dim, *others) for others in _placements(pieces[1:], rest, mesh)]
    return tuple(found)


def _displaced(before: Spec, after: Spec, mesh: MeshShape) -> set[str]:
    """The axes that do not split the same dimension at the same stride as before."""

    def strides(spec: Spec) -> set[tuple[str, int, int]]:
        return {(a, d, mesh.size(dim[i + 1 :])) for d, dim in enumerate(spec) for i, a in enumerate(dim)}

    return {a for a, _, _ in strides(before) ^ strides(after)}
