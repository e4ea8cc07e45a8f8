"""Which collectives turn one sharding of a tensor into another.

The partitioner decides this, so the answer follows the published method of Shardy's
`reshard-to-collectives` pass: drop the prefixes that the two shardings share, then slice what the target
splits more, permute pieces between devices, exchange axes between dimensions (all-to-all), and gather the
rest; twice if the sizes of the axes do not divide each other. `tests/test_reshard.py` holds it against
that pass.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from functools import lru_cache
from typing import NamedTuple, TypeAlias

from ffjax.ir.spec import Collective, CollectiveKind, MeshShape, Spec

Step: TypeAlias = tuple[CollectiveKind, tuple[str, ...], float]


def reshard(
    source: Spec, target: Spec, mesh: MeshShape, local_bytes: float, shape: tuple[int, ...] | None = None
) -> tuple[Collective, ...]:
    """The collectives that turn `source` into `target`; slicing costs nothing and is left out.

    Args:
      source: the present sharding, with no partial sums.
      target: the sharding wanted, of the same rank.
      mesh: the mesh whose axes both use.
      local_bytes: bytes of one device's piece under `source`.
      shape: the tensor's global shape; without it every dimension is taken to divide evenly.

    >>> mesh = MeshShape(("x", "y"), (4, 2))
    >>> reshard((("x",), ()), ((), ("x",)), mesh, 1024.0)
    (Collective(kind='all_to_all', axes=('x',), bytes=1024.0),)
    >>> reshard((("x",), ("y",)), ((), ()), mesh, 1024.0)
    (Collective(kind='all_gather', axes=('x', 'y'), bytes=8192.0),)
    >>> reshard(((), ()), (("x",), ()), mesh, 1024.0)
    ()
    """
    return tuple(
        Collective(k, axes, local_bytes * times) for k, axes, times in reshard_steps(source, target, mesh, shape)
    )


def reshard_steps(
    source: Spec, target: Spec, mesh: MeshShape, shape: tuple[int, ...] | None = None
) -> tuple[Step, ...]:
    """As `reshard`, each step's bytes as a multiple of one device's piece under `source`. Cached.

    Raises:
      ValueError: the two specs differ in rank.
    """
    if source == target:
        return ()
    if len(source) != len(target):
        raise ValueError(f"cannot reshard {source} to {target}: their ranks differ; give specs of one tensor")
    # A tensor's shape only matters for whether pieces of the mesh divide it, so shapes share entries.
    divisors = None if shape is None else tuple(math.gcd(n, mesh.devices) for n in shape)
    return _steps(source, target, mesh, divisors)


@lru_cache(maxsize=1 << 18)
def _steps(source: Spec, target: Spec, mesh: MeshShape, divisors: tuple[int, ...] | None) -> tuple[Step, ...]:
    return _Walk(source, target, mesh, divisors).run()


class Part(NamedTuple):
    """A mesh axis, or the part of one that `size` positions make, each `stride_major` from the major end."""

    name: str
    stride_major: int
    size: int


def _size(parts: Iterable[Part]) -> int:
    return math.prod(p.size for p in parts)


def _commensurate(a: int, b: int) -> bool:
    return a % b == 0 or b % a == 0


def _fit(part: Part, room: int) -> tuple[Part, Part | None, int] | None:
    """What of `part` fits into `room` pieces: (the fitting part, what remains of it, the room then left)."""
    if room <= 1 or not _commensurate(part.size, room):
        return None
    if room >= part.size:
        return part, None, room // part.size
    rest = Part(part.name, part.stride_major * room, part.size // room)
    return Part(part.name, part.stride_major, room), rest, 1


class _Walk:
    """The state between two collectives. For each dimension: `settled` counts the pieces made by axes that
    are already where the target has them; `have` and `want` are the axes beyond those, now and in the end."""

    def __init__(self, source: Spec, target: Spec, mesh: MeshShape, divisors: tuple[int, ...] | None) -> None:
        self.mesh, self.divisors = mesh, divisors
        self.have: list[list[Part]] = []
        self.want: list[list[Part]] = []
        self.settled: list[int] = []
        self.trail: list[list[Part]] = []  # the settled parts themselves: a permutation is told by its places
        for src, tgt in zip(source, target, strict=True):
            same = 0
            while same < min(len(src), len(tgt)) and src[same] == tgt[same]:
                same += 1
            self.have.append([Part(a, 1, mesh.size(a)) for a in src[same:]])
            self.want.append([Part(a, 1, mesh.size(a)) for a in tgt[same:]])
            self.trail.append([Part(a, 1, mesh.size(a)) for a in src[:same]])
            self.settled.append(mesh.size(src[:same]))
        self.rank = len(source)
        self.source_shards = self.shards()
        self.steps: list[Step] = []

    def run(self) -> tuple[Step, ...]:
        for _ in range(2):
            if not any(self.have) and not any(self.want):
                break
            self.slice()
            if self.must_permute():
                self.permute()
            self.exchange(in_order=True)
            self.exchange(in_order=False)
            self.gather()
        return tuple(self.steps)

    # -- bookkeeping

    def shards(self) -> int:
        return math.prod(n * _size(parts) for n, parts in zip(self.settled, self.have, strict=True))

    def settle(self, dim: int, part: Part) -> None:
        self.settled[dim] *= part.size
        self.trail[dim].append(part)

    def emit(self, kind: CollectiveKind, names: Iterable[str], shards_before: int) -> None:
        used = set(names)
        axes = tuple(a for a in self.mesh.axes if a in used)
        self.steps.append((kind, axes, self.source_shards / min(shards_before, self.shards())))

    def places(self) -> dict[Part, tuple[int, int]]:
        """Where the target has each axis: its dimension and its index among those not settled."""
        return {p: (d, i) for d, parts in enumerate(self.want) for i, p in enumerate(parts)}

    def held(self) -> set[Part]:
        return {p for parts in self.have for p in parts}

    def distribute(self, pool: Callable[[int], list[Part]], room: list[int], *, front: bool) -> None:
        """Fills the room that each dimension has left with axes of its pool, cutting those too big."""
        cuts: list[Part] = []
        for dim in range(self.rank):
            available, added, i = pool(dim), [], 0
            while i < len(available) and room[dim] > 1:
                fit = _fit(available[i], room[dim])
                if fit is None:
                    i += 1
                    continue
                part, rest, room[dim] = fit
                del available[i]
                added.append(part)
                if rest is not None:
                    cuts.append(part)
                    available.insert(0, rest)
            self.have[dim] = added + self.have[dim] if front else self.have[dim] + added
        if cuts:
            self.want = [[q for p in parts for q in _cut(p, cuts)] for parts in self.want]

    # -- the collectives, in the order in which they are tried

    def slice(self) -> None:
        """Splits dimensions along axes that the target uses and the source does not: no communication."""
        room = []
        for have, want in zip(self.have, self.want, strict=True):
            now, then = _size(have), _size(want)
            room.append(then // math.gcd(now, then))
        for dim in range(self.rank):
            for part in self.slices_before_exchange(dim, room):
                self.have[dim].append(part)
        held = self.held()
        left: list[Part] = []
        for dim in range(self.rank):
            wanted, remaining = self.want[dim], list[Part]()
            for part in wanted:
                if part in held:
                    remaining.append(part)
                    continue
                fit = _fit(part, room[dim])
                if fit is None:
                    left.append(part)
                    remaining.append(part)
                    continue
                within, rest, room[dim] = fit
                if not self.have[dim] and not remaining:
                    self.settle(dim, within)
                else:
                    self.have[dim].append(within)
                    remaining.append(within)
                if rest is not None:
                    remaining.append(rest)
                    left.append(rest)
            self.want[dim] = remaining
        self.distribute(lambda _: left, room, front=False)

    def slices_before_exchange(self, dim: int, room: list[int]) -> Sequence[Part]:
        """Axes worth slicing at `dim` although the target has them elsewhere.

        Where an axis of `dim` will move to another dimension and be followed there by axes not yet in use,
        slicing those here lets one exchange move all of them in order, and saves a permutation.
        """
        have = self.have[dim]
        places = self.places()
        if not have or self.want[dim] or have[-1] not in places:
            return ()
        there, index = places[have[-1]]
        if self.have[there]:
            return ()
        wanted, held = self.want[there], self.held()
        end = index + 1
        while end < len(wanted) and wanted[end] not in held:
            end += 1
        new = wanted[index + 1 : end]
        if not new:
            return ()
        common = 0
        while common < min(len(have), index + 1) and have[-1 - common] == wanted[index - common]:
            common += 1
        if any(p in places and places[p][0] == there for p in have[: len(have) - common]):
            return ()
        pieces = self.settled[dim] * _size(have) * _size(new)
        if self.divisors is not None and self.divisors[dim] % pieces:
            return ()
        room[there] //= _size(have[len(have) - common :]) * _size(new)
        return new

    def must_permute(self) -> bool:
        places, held = self.places(), self.held()
        spare_out = spare_in = None
        for dim, (have, want) in enumerate(zip(self.have, self.want, strict=True)):
            if have and want and _commensurate(have[0].size, want[0].size):
                return True
            spare_out = next((p for p in reversed(want) if p not in held), spare_out)
            seen: set[int] = set()
            last: tuple[int, int] | None = None
            for part in have:
                place = places.get(part)
                if place is not None:
                    follows = last is not None and place == (last[0], last[1] + 1)
                    if (place[0] == dim or place[0] in seen) and not follows:
                        return True  # out of the target's order, or torn apart
                    seen.add(place[0])
                elif last is not None and not want:
                    return True  # it will be gathered, but stands behind an axis that will move
                else:
                    spare_in = part
                last = place
        return spare_out is not None and spare_in is not None and _commensurate(spare_out.size, spare_in.size)

    def permute(self) -> None:
        """Replaces axes by others of the same total size, as near to the target's order as they fit."""
        places, shards_before, before = self.places(), self.shards(), self.layout()
        room: list[int] = []
        left: list[Part] = []
        spare: list[list[Part]] = []
        for dim in range(self.rank):
            have, want = self.have[dim], self.want[dim]
            free = _size(have)
            total = free
            while want and (fit := _fit(want[0], free)) is not None:
                part, rest, free = fit
                want[:1] = [] if rest is None else [rest]
                self.settle(dim, part)
            left.extend(want)
            used = total // free
            kept = [p for p in have if p not in places]
            replaced: list[Part] = []
            while kept and (fit := _fit(kept[0], used)) is not None:
                part, rest, used = fit
                kept[:1] = [] if rest is None else [rest]
                replaced.append(part)
            # What was not replaced comes first, so that it is put back where it was.
            spare.append(kept + replaced)
            self.have[dim] = []
            room.append(free)
        self.distribute(lambda _: left, room, front=False)
        self.distribute(lambda dim: spare[dim], room, front=True)
        rest_of_all = [p for parts in spare for p in parts]
        self.distribute(lambda _: rest_of_all, room, front=True)
        self.emit("collective_permute", moved_axes(before, self.layout()), shards_before)

    def layout(self) -> list[list[Part]]:
        return [t + h for t, h in zip(self.trail, self.have, strict=True)]

    def exchange(self, *, in_order: bool) -> None:
        """All-to-alls: the last axes of a dimension move to the one where the target has them."""
        for dim in range(self.rank):
            while self.exchange_from(dim, in_order=in_order):
                pass

    def exchange_from(self, dim: int, *, in_order: bool) -> bool:
        have, places = self.have[dim], self.places()
        if not have or have[-1] not in places or places[have[-1]][0] == dim:
            return False
        there = places[have[-1]][0]
        start = len(have)
        while start and have[start - 1] in places and places[have[start - 1]][0] == there:
            start -= 1
        moving = have[start:]
        if in_order and self.want[there][: len(moving)] != moving:
            return False
        shards_before = self.shards()
        del have[start:]
        for part in moving:
            if not self.have[there] and self.want[there][0] == part:
                del self.want[there][0]
                self.settle(there, part)
            else:
                self.have[there].append(part)
        self.emit("all_to_all", (p.name for p in moving), shards_before)
        return True

    def gather(self) -> None:
        places, shards_before = self.places(), self.shards()
        gathered: list[Part] = []
        for dim in range(self.rank):
            have = self.have[dim]
            while have and have[-1] not in places:
                gathered.append(have.pop())
        if gathered:
            self.emit("all_gather", (p.name for p in gathered), shards_before)


def _cut(part: Part, cuts: Sequence[Part]) -> list[Part]:
    """`part` in pieces, so that no cut overlaps a piece partly."""
    end = part.stride_major * part.size
    edges = {part.stride_major, end}
    for cut in cuts:
        if cut.name == part.name:
            edges |= {e for e in (cut.stride_major, cut.stride_major * cut.size) if part.stride_major < e < end}
    marks = sorted(edges)
    return [Part(part.name, a, b // a) for a, b in itertools.pairwise(marks)]


def moved_axes(before: Sequence[Sequence[Part]], after: Sequence[Sequence[Part]]) -> set[str]:
    """The axes along which a permutation moves pieces: those that split another dimension, or at another stride."""
    old, new = _strides(before), _strides(after)
    return {name for name in old.keys() | new.keys() if old.get(name) != new.get(name)}


def _strides(layout: Sequence[Sequence[Part]]) -> dict[str, set[tuple[int, int, int, int]]]:
    found: dict[str, set[tuple[int, int, int, int]]] = {}
    for dim, parts in enumerate(layout):
        merged: list[Part] = []
        for p in parts:
            if merged and merged[-1].name == p.name and merged[-1].stride_major * merged[-1].size == p.stride_major:
                merged[-1] = Part(p.name, merged[-1].stride_major, merged[-1].size * p.size)
            else:
                merged.append(p)
        stride = 1
        for p in reversed(merged):
            found.setdefault(p.name, set()).add((dim, stride, p.stride_major, p.size))
            stride *= p.size
    return found
