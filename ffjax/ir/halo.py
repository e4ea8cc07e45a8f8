"""Halos: the edges that pieces of an image need of their neighbours where a window slides over it.

An op with a window reads an image of n elements, `base` apart, at m places, `step` apart: the elements of a result
that is as long as it is (a convolution, its input's gradient, a pooling), or those of a kernel as long (a kernel's
gradient, which slides the result's gradient over the image; its pieces leave partial sums). At each place it reads up
to `reach` beyond. Where n * base = m * step, pieces of both that are cut alike begin at the same position, so that all
devices need as many elements of their neighbours:

    before   floor(pad / base)                                         `pad` positions of padding come first
    behind   floor(((m - 1) step - pad + reach) / base) - (n - 1)      with n and m of one piece

What would have to come from beyond a neighbour is not split, nor is what is not cut alike.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal, NamedTuple

from ffjax.ir.compat import JaxprEqn, shape_of
from ffjax.ir.rules import DimFactors, OpShardingRule
from ffjax.ir.spec import Collective, MeshShape, Spec

Place = tuple[Literal["operand", "result"], int, int]
"""A dimension of an equation: the side, which value, which dimension."""

_POOLS = ("reduce_window_sum", "reduce_window_max", "reduce_window_min")


@dataclass(frozen=True, slots=True, kw_only=True)
class Halo:
    """One dimension of an image that a window slides over, and which others are cut alike."""

    operand: int
    """The image, by its index among the operands."""
    dim: int
    alike: tuple[Place, ...]
    window: int
    """Which entry of the equation's padding is this dimension's."""
    size: int
    count: int
    base: int
    step: int
    reach: int
    pad: int
    returned: bool = False
    """Whether what pieces of a result have at their neighbours' edges is sent back and added there."""

    @property
    def factor(self) -> int:
        """What number of pieces must divide."""
        return math.gcd(self.size, self.count)

    @property
    def sums(self) -> bool:
        """Whether pieces leave partial sums."""
        return all(side == "operand" for side, _, _ in self.alike)

    def widths(self, pieces: int) -> tuple[int, int]:
        """How many elements one of so many pieces needs from before and from behind."""
        n, last = self._piece(pieces)
        return max(0, self.pad // self.base), max(0, last // self.base - (n - 1))

    def padding(self, pieces: int) -> tuple[int, int]:
        """The padding of a piece with its halo; less than nothing where some of it is not read."""
        n, last = self._piece(pieces)
        before, behind = self.widths(pieces)
        low = self.pad - before * self.base
        return low, last + self.pad - low - (before + n + behind - 1) * self.base

    def fits(self, pieces: int) -> bool:
        """Whether an image can be cut into so many pieces that need nothing from beyond their neighbours."""
        return self.factor % pieces == 0 and max(self.widths(pieces)) <= self.size // pieces

    def _piece(self, pieces: int) -> tuple[int, int]:
        """The elements of a piece, and the last position that is read, counted from where it begins."""
        return self.size // pieces, (self.count // pieces - 1) * self.step - self.pad + self.reach


def halos(eqn: JaxprEqn | None) -> tuple[Halo, ...]:
    """The dimensions along which an equation's window can run on pieces of an image, in order."""
    if eqn is None:
        return ()
    name = eqn.primitive.name
    if name == "conv_general_dilated":
        found = _convolution(eqn)
    elif name in _POOLS:
        found = _pool(eqn)
    elif name == "select_and_scatter_add":
        found = _scattered_pool(eqn)
    else:
        return ()
    return tuple(h for h in found if h.factor > 1 and h.size * h.base == h.count * h.step)


def _convolution(eqn: JaxprEqn) -> Iterable[Halo]:
    image, kernel = (shape_of(v) for v in eqn.invars)
    result = shape_of(eqn.outvars[0])
    numbers = eqn.params["dimension_numbers"]
    spatial = zip(numbers.lhs_spec[2:], numbers.rhs_spec[2:], numbers.out_spec[2:], strict=True)
    for i, (d, k, o) in enumerate(spatial):
        base, pad = eqn.params["lhs_dilation"][i], eqn.params["padding"][i][0]
        stride, dilation = eqn.params["window_strides"][i], eqn.params["rhs_dilation"][i]
        alike: Place
        if image[d] * base == result[o] * stride:
            alike, count, step, reach = ("result", 0, o), result[o], stride, (kernel[k] - 1) * dilation
        else:
            alike, count, step, reach = ("operand", 1, k), kernel[k], dilation, (result[o] - 1) * stride
        yield Halo(
            operand=0,
            dim=d,
            alike=(alike,),
            window=i,
            size=image[d],
            count=count,
            base=base,
            step=step,
            reach=reach,
            pad=pad,
        )


def _pool(eqn: JaxprEqn) -> Iterable[Halo]:
    image, result, params = shape_of(eqn.invars[0]), shape_of(eqn.outvars[0]), eqn.params
    for d, width in enumerate(params["window_dimensions"]):
        if params["base_dilation"][d] == 1 and (width > 1 or params["window_strides"][d] > 1):
            yield Halo(
                operand=0,
                dim=d,
                alike=(("result", 0, d),),
                window=d,
                size=image[d],
                count=result[d],
                base=1,
                step=params["window_strides"][d],
                reach=(width - 1) * params["window_dilation"][d],
                pad=params["padding"][d][0],
            )


def _scattered_pool(eqn: JaxprEqn) -> Iterable[Halo]:
    """A pooling's gradient: what windows choose beyond the image's piece belongs to the neighbour."""
    source, image, params = shape_of(eqn.invars[0]), shape_of(eqn.invars[1]), eqn.params
    for d, width in enumerate(params["window_dimensions"]):
        stride = params["window_strides"][d]
        pad = params["padding"][d][0]
        if (width > 1 or stride > 1) and 0 <= pad < width:
            yield Halo(
                operand=1,
                dim=d,
                alike=(("operand", 0, d), ("result", 0, d)),
                window=d,
                size=image[d],
                count=source[d],
                base=1,
                step=stride,
                reach=width - 1,
                pad=pad,
                returned=True,
            )


class Cut(NamedTuple):
    """A dimension of an image that is cut: by which mesh axes, into how many pieces."""

    halo: Halo
    axes: tuple[str, ...]
    pieces: int


def split_halos(eqn: JaxprEqn | None, image: Spec, mesh: MeshShape) -> list[Cut]:
    """The dimensions along which an image with this sharding is cut."""
    return [Cut(h, image[h.dim], mesh.size(image[h.dim])) for h in halos(eqn) if mesh.size(image[h.dim]) > 1]


def beyond(eqn: JaxprEqn) -> Literal["zero", "lowest", "highest"]:
    """What an equation's window reads beyond an image: nothing to add, nothing that is chosen."""
    match eqn.primitive.name:
        case "reduce_window_max":
            return "lowest"
        case "reduce_window_min":
            return "highest"
        case "select_and_scatter_add":
            return "lowest" if getattr(eqn.params["select_prim"], "name", "") in ("ge", "gt") else "highest"
        case _:
            return "zero"


def exchanges(
    eqn: JaxprEqn | None, image: Spec, mesh: MeshShape, local_bytes: float, *, fetched: bool = False
) -> list[Collective]:
    """The permutes that give each device the edges that it needs; its piece of the image is of `local_bytes`.

    Where they are `fetched` already, only those that send back what a window has chosen there are left. Dimensions go
    one after the other, each with what the ones before it have brought, which takes care of corners.
    """
    found = []
    for halo, axes, pieces in split_halos(eqn, image, mesh):
        row = local_bytes / (halo.size // pieces)
        widths = halo.widths(pieces)
        sent = [Collective("collective_permute", axes, row * width) for width in widths if width]
        found += sent * ((not fetched) + halo.returned)
        local_bytes += row * sum(widths)
    return found


def with_halos(eqn: JaxprEqn, rule: OpShardingRule) -> OpShardingRule:
    """A rule with the factors along which an equation's window can run on pieces.

    A factor that pieces of a result keep is a permutation, one over which they leave partial sums a reduction.
    """
    sides = {"operand": list(rule.operands), "result": list(rule.results)}
    sizes = list(rule.sizes)
    kinds = {name: set(getattr(rule, name)) for name in ("reduction", "need_replication", "permutation")}
    for halo in halos(eqn):
        places: list[Place] = [("operand", halo.operand, halo.dim), *halo.alike]
        first = {sides[side][value][dim][:1] for side, value, dim in places}
        if len(first) == 1 and first != {()} and first.pop()[0] not in kinds["need_replication"]:
            continue
        shared = len(sizes)
        sizes.append(halo.factor)
        kinds["reduction" if halo.sums else "permutation"].add(shared)
        minor: dict[int, tuple[int, ...]] = {halo.factor: ()}
        for side, value, dim in places:
            length = shape_of((eqn.invars if side == "operand" else eqn.outvars)[value])[dim]
            if length not in minor:
                minor[length] = (len(sizes),)
                kinds["need_replication"].add(len(sizes))
                sizes.append(length // halo.factor)
            dims = list(sides[side][value])
            dims[dim] = (shared, *minor[length])
            sides[side][value] = tuple(dims)
    return _renumbered(sides["operand"], sides["result"], sizes, kinds)


def _renumbered(
    operands: list[DimFactors], results: list[DimFactors], sizes: list[int], kinds: dict[str, set[int]]
) -> OpShardingRule:
    """The rule of the factors that are left, numbered as they appear, results first."""
    number: dict[int, int] = {}
    for value in (*results, *operands):
        for dim in value:
            for f in dim:
                number.setdefault(f, len(number))

    def values(side: list[DimFactors]) -> tuple[DimFactors, ...]:
        return tuple(tuple(tuple(number[f] for f in dim) for dim in value) for value in side)

    return OpShardingRule(
        operands=values(operands),
        results=values(results),
        sizes=tuple(sizes[f] for f in number),
        **{kind: frozenset(number[f] for f in members if f in number) for kind, members in kinds.items()},
    )
