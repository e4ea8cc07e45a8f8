"""The factors of all ops of a program, an atom for each, and which of them are the same: a union-find over arrays.

Joining never makes one atom index two dimensions of one value, and never joins one that can be split with one that
cannot. Ops that are alike share a rule, and what follows from it is worked out once (`Template`). Atoms are never split
here, as those of `ffjax.ir.compose` are: views of one value that divide a dimension differently are left apart there.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ffjax.ir.compose import NEED_REPLICATION, PERMUTATION, kinds_of
from ffjax.ir.rules import DimFactors, OpShardingRule

Ints = NDArray[np.int64]
_NONE: Ints = np.zeros(0, dtype=np.int64)
Dims = tuple[tuple[int, ...], ...]
"""For each dimension of a value the atoms that index it, major to minor, numbered within one region."""


@dataclass(slots=True, kw_only=True)
class OpDims:
    """The dimensions of an op's operands and results, in atoms of its region."""

    operands: tuple[Dims, ...]
    results: tuple[Dims, ...]
    reduced: tuple[int, ...]
    """Atoms over which the op reduces: where they are split, its results are partial sums."""
    pending: tuple[int, ...] = ()
    """Atoms over which its results stay partial sums, to be reduced by an op to come (`ffjax.ir.sums`)."""


@dataclass(frozen=True, slots=True, eq=False)
class Template:
    """A rule with its factors of size 1 dropped: what all ops of this rule have in common.

    Dimensions of operands and results as the rule's own atoms, numbered from 0; then all of them in one row, and beside
    each of that row the slot (operands first, then results) that it is of.
    """

    operands: tuple[Dims, ...]
    results: tuple[Dims, ...]
    sizes: list[int]
    kinds: list[int]
    reduced: tuple[int, ...]
    flat: Ints
    slot: Ints

    @classmethod
    def of(cls, rule: OpShardingRule) -> Template:
        kept = [f for f, size in enumerate(rule.sizes) if size > 1]
        number = {f: i for i, f in enumerate(kept)}
        kinds = kinds_of(rule)

        def numbered(side: tuple[DimFactors, ...]) -> tuple[Dims, ...]:
            return tuple(tuple(tuple(number[f] for f in dim if f in number) for dim in value) for value in side)

        operands, results = numbered(rule.operands), numbered(rule.results)
        row = [(a, slot) for slot, dims in enumerate(operands + results) for dim in dims for a in dim]
        return cls(
            operands=operands,
            results=results,
            sizes=[rule.sizes[f] for f in kept],
            kinds=[kinds[f] for f in kept],
            reduced=tuple(
                dict.fromkeys(
                    number[f] for v in rule.operands for d in v for f in d if f in rule.reduction & number.keys()
                )
            ),
            flat=np.array([a for a, _ in row], dtype=np.int64),
            slot=np.array([slot for _, slot in row], dtype=np.int64),
        )

    def port(self, side: str, index: int) -> Dims:
        return self.operands[index] if side == "operand" else self.results[index]

    def dims(self, names: tuple[int, ...]) -> OpDims:
        """The dimensions of an op whose atoms have these names."""

        def named(value: Dims) -> Dims:
            return tuple(tuple(names[a] for a in dim) for dim in value)

        return OpDims(
            operands=tuple(map(named, self.operands)),
            results=tuple(map(named, self.results)),
            reduced=tuple(dict.fromkeys(names[a] for a in self.reduced)),
        )


View = tuple[Template, str, int]
"""One side of an op, and which operand or result it is."""


class Atoms:
    """Atoms are numbered in the order of ops; of those that are joined the first stands for all."""

    def __init__(self, rules: Sequence[OpShardingRule]) -> None:
        known: dict[int, Template] = {}
        self.of: list[Template] = []
        """For each op what it has in common with all of its rule."""
        self.base: list[int] = []
        """For each op its first atom."""
        self.sizes: list[int] = []
        self.kinds: list[int] = []
        for rule in rules:
            template = known.get(id(rule))
            if template is None:
                template = known[id(rule)] = Template.of(rule)
            self.of.append(template)
            self.base.append(len(self.sizes))
            self.sizes += template.sizes
            self.kinds += template.kinds
        self._parent = list(range(len(self.sizes)))
        self._pairs: dict[Hashable, tuple[tuple[int, int], ...]] = {}
        counts = np.array([len(t.flat) for t in self.of], dtype=np.int64)
        slots = np.array([len(t.operands) + len(t.results) for t in self.of], dtype=np.int64)
        firsts = np.array(self.base, dtype=np.int64)
        self.row = np.concatenate([_NONE, *(t.flat for t in self.of)]) + np.repeat(firsts, counts)
        """The atoms of every dimension of every operand and result, one after the other."""
        self.row_op = np.repeat(np.arange(len(self.of), dtype=np.int64), counts)
        """Beside `row`: the op."""
        row_slot = np.concatenate([_NONE, *(t.slot for t in self.of)]) + np.repeat(np.cumsum(slots) - slots, counts)
        # Which operands and results an atom indexes, so that a join that would index one twice is seen.
        self._where: list[set[int]] = [set() for _ in self.sizes]
        for atom, slot in zip(self.row.tolist(), row_slot.tolist(), strict=True):
            self._where[atom].add(slot)
        # What is summed over cannot index the sum.
        first_slots = (np.cumsum(slots) - slots).tolist()
        for template, base, first in zip(self.of, self.base, first_slots, strict=True):
            sums = range(first + len(template.operands), first + len(template.operands) + len(template.results))
            for atom in template.reduced:
                self._where[base + atom].update(sums)

    def view(self, op: int, side: str, index: int) -> View:
        return self.of[op], side, index

    def pairs(self, a: View, b: View) -> tuple[tuple[int, int], ...]:
        """Which atoms of two views of one value are the same, in dimensions that both divide alike."""
        key = id(a[0]), a[1:], id(b[0]), b[1:]
        found = self._pairs.get(key)
        if found is None:
            found = self._pairs[key] = tuple(
                pair
                for left, right in zip(a[0].port(*a[1:]), b[0].port(*b[1:]), strict=True)
                if [a[0].sizes[x] for x in left] == [b[0].sizes[y] for y in right]
                for pair in zip(left, right, strict=True)
            )
        return found

    def roots(self) -> Ints:
        """For each atom the one that stands for all that it is joined with."""
        root = np.array(self._parent, dtype=np.int64)
        while not np.array_equal(further := root[root], root):
            root = further
        return root

    def components(self) -> Ints:
        """For each op the first op of its region: ops that share an atom are in one."""
        ops = len(self.base)
        return connected(ops + len(self.sizes), self.row_op, self.roots()[self.row] + ops)[:ops]

    def find(self, atom: int) -> int:
        parent = self._parent
        while parent[atom] != atom:
            parent[atom] = parent[parent[atom]]
            atom = parent[atom]
        return atom

    def joins(self, x: int, y: int) -> bool:
        """Whether two atoms can be one: both or neither can be split, and no value has both."""
        x, y = self.find(x), self.find(y)
        splittable = (self.kinds[x] ^ self.kinds[y]) & (NEED_REPLICATION | PERMUTATION) == 0
        return x == y or (splittable and self._where[x].isdisjoint(self._where[y]))

    def reduced(self, op: int) -> list[int]:
        """The atoms of an op's reduction factors."""
        return [self.find(self.base[op] + a) for a in self.of[op].reduced]

    def contracted(self, op: int) -> list[int]:
        """The atoms that an op reduces over and that can be split."""
        kept = NEED_REPLICATION | PERMUTATION
        return [a for a in dict.fromkeys(self.reduced(op)) if not self.kinds[a] & kept]

    def unify(self, a: int, b: int, pairs: tuple[tuple[int, int], ...], *, force: bool = False) -> None:
        """Joins pairs of atoms, counted from `a` and from `b`, wherever that is sound."""
        find, kinds, where = self.find, self.kinds, self._where
        for left, right in pairs:
            one, two = find(a + left), find(b + right)
            if one == two:
                continue
            # The oldest stands for all, so that results do not depend on the order of joins.
            x, y = (one, two) if one < two else (two, one)
            if force or self.joins(x, y):
                small, large = where[x], where[y]
                if len(small) > len(large):
                    small, large = large, small
                self._parent[y] = x
                kinds[x] |= kinds[y]
                large |= small
                where[x] = where[y] = large


def connected(count: int, left: Ints, right: Ints) -> Ints:
    """For each of `count` things the first of those that these pairs connect it with."""
    # A sixth of the time to import ffjax, which not all who import it need.
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    pairs = coo_array((np.ones(len(left), dtype=np.int8), (left, right)), shape=(count, count))
    label = connected_components(pairs, directed=False)[1]
    first: Ints = np.unique(label, return_index=True)[1][label]
    return first
