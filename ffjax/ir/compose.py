"""Composing op sharding rules: the factors of many ops joined along the values between them.

Each op brings its own factors. Where two ops touch one value, the factors of that value's dimensions
are the same: a union-find joins them. A dimension that is one factor `k` to one op and a list
`[i, j]` to the other splits `k` into a major and a minor part, so that both end up naming the same
pieces. Where no such split exists (6 * 4 against 4 * 6 share only a major 2 and a minor 2) the parts
between cannot be split across the two ops, and need replication.

Cost is linear in the number of dimensions touched, up to the inverse Ackermann function of the
union-find; an atom is split at most log2(size) times.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Hashable, Iterable, Sequence

from ffjax.ir.rules import DimFactors, OpShardingRule

PASS_THROUGH = 0
REDUCTION = 1
NEED_REPLICATION = 2
PERMUTATION = 4
OPAQUE = 8
"""Set beside NEED_REPLICATION where no rule was known: whoever reads the result can warn."""

Dim = list[int]
"""The atoms of one dimension, major to minor; empty for a dimension of size 1."""
Dims = list[Dim]
"""The dimensions of one value."""


class Factors:
    """A union-find of factor atoms, each with a size and kinds, that can split into (major, minor).

    >>> f = Factors()
    >>> k, i, j = f.new(12), f.new(3), f.new(4)
    >>> f.unify([k], [i, j])
    >>> [f.size(a) for a in f.leaves([k])], f.leaves([k]) == f.leaves([i, j])
    ([3, 4], True)
    """

    __slots__ = ("_kinds", "_parent", "_parts", "_sizes")

    def __init__(self) -> None:
        self._parent: list[int] = []
        self._sizes: list[int] = []
        self._kinds: list[int] = []
        self._parts: list[tuple[int, int] | None] = []

    def new(self, size: int, kind: int = PASS_THROUGH) -> int:
        """A new atom of `size` indices; size 1 is allowed but better written as no atom at all."""
        atom = len(self._parent)
        self._parent.append(atom)
        self._sizes.append(size)
        self._kinds.append(kind)
        self._parts.append(None)
        return atom

    def find(self, atom: int) -> int:
        """The representative of the atom's class."""
        parent = self._parent
        while parent[atom] != atom:
            parent[atom] = parent[parent[atom]]
            atom = parent[atom]
        return atom

    def size(self, atom: int) -> int:
        """How many indices the atom has."""
        return self._sizes[self.find(atom)]

    def kind(self, atom: int) -> int:
        """The kinds of a leaf, as flags."""
        return self._kinds[self.find(atom)]

    def leaves(self, dim: Iterable[int]) -> list[int]:
        """The unsplit atoms that a dimension's atoms have become, major to minor."""
        out: list[int] = []
        stack = list(dim)[::-1]
        while stack:
            atom = self.find(stack.pop())
            parts = self._parts[atom]
            if parts is None:
                out.append(atom)
            else:
                stack += (parts[1], parts[0])
        return out

    def mark(self, atom: int, kind: int) -> None:
        """Adds a kind to every leaf of the atom."""
        for leaf in self.leaves((atom,)):
            self._kinds[leaf] |= kind

    def split(self, atom: int, minor_size: int) -> tuple[int, int]:
        """Splits a leaf into its (major, minor) parts; both keep its kinds."""
        root = self.find(atom)
        kind = self._kinds[root]
        parts = (self.new(self._sizes[root] // minor_size, kind), self.new(minor_size, kind))
        self._parts[root] = parts
        return parts

    def merge(self, a: int, b: int) -> None:
        """Makes two leaves one; the class has the kinds of both and the greatest size that divides both."""
        a, b = self.find(a), self.find(b)
        if a == b:
            return
        # Union by index keeps the oldest atom as representative: results do not depend on hashing or history.
        if b < a:
            a, b = b, a
        self._parent[b] = a
        self._kinds[a] |= self._kinds[b]
        if self._sizes[a] != self._sizes[b]:
            self._sizes[a] = math.gcd(self._sizes[a], self._sizes[b])

    def unify(self, a: Sequence[int], b: Sequence[int]) -> None:
        """States that two lists of atoms index the same dimension; splits and merges atoms until they agree."""
        if len(a) == 1 and len(b) == 1:
            x, y = self.find(a[0]), self.find(b[0])
            if x == y:
                return
            if self._sizes[x] == self._sizes[y] and self._parts[x] is None and self._parts[y] is None:
                self.merge(x, y)
                return
        left, right = self.leaves(a), self.leaves(b)
        if math.prod(map(self.size, left)) != math.prod(map(self.size, right)):
            self._unify_loosely(left, right)
            return
        left, right = self._match(left, right, major=True)
        left, right = self._match(left, right, major=False)
        for atom in left + right:
            self.mark(atom, NEED_REPLICATION)

    def _match(self, left: list[int], right: list[int], *, major: bool) -> tuple[list[int], list[int]]:
        """Joins from the major (or minor) end while the sizes share a factor; returns what is left between."""
        left, right = (left[::-1], right[::-1]) if major else (left[:], right[:])
        while left and right:
            # What lies on the stacks may have been split since: both sides can hold the same atom.
            left += self.leaves((left.pop(),))[:: -1 if major else 1]
            right += self.leaves((right.pop(),))[:: -1 if major else 1]
            x, y = left[-1], right[-1]
            common = math.gcd(self.size(x), self.size(y))
            if common == 1:
                break
            left.pop(), right.pop()
            if self.find(x) == self.find(y):
                continue
            x = self._cut(x, common, left, major=major)
            self.merge(x, self._cut(y, common, right, major=major))
        return (left[::-1], right[::-1]) if major else (left, right)

    def _cut(self, atom: int, size: int, rest: list[int], *, major: bool) -> int:
        """The outer part of `size` of a leaf; its remainder goes back on the stack."""
        total = self.size(atom)
        if total == size:
            return atom
        hi, lo = self.split(atom, total // size if major else size)
        rest.append(lo if major else hi)
        return hi if major else lo

    def _unify_loosely(self, left: list[int], right: list[int]) -> None:
        """Joins dimensions of unequal size: a slice, a pad or a window keeps the order of pieces, not their number.

        The major parts become one permutation factor that only common divisors can split; what
        else there is needs replication.
        """
        for atom in left[1:] + right[1:]:
            self.mark(atom, NEED_REPLICATION)
        if left and right and math.gcd(self.size(left[0]), self.size(right[0])) > 1:
            self.merge(left[0], right[0])
            self.mark(left[0], PERMUTATION)
        else:
            for atom in left[:1] + right[:1]:
                self.mark(atom, NEED_REPLICATION)

    def instantiate(self, rule: OpShardingRule) -> tuple[list[Dims], list[Dims]]:
        """Fresh atoms for an op: its operands' and results' dimensions. Factors of size 1 are dropped."""
        kinds = kinds_of(rule)
        atoms = [self.new(size, kind) if size > 1 else -1 for size, kind in zip(rule.sizes, kinds, strict=True)]

        def dims(value: DimFactors) -> Dims:
            return [[atoms[f] for f in dim if atoms[f] >= 0] for dim in value]

        return [dims(v) for v in rule.operands], [dims(v) for v in rule.results]

    def read(self, operands: Sequence[Dims], results: Sequence[Dims]) -> OpShardingRule:
        """The rule of everything between these values.

        Need-replication dominates. A factor that is reduced inside and also indexes a result, or that
        indexes one value twice, needs replication. Factors are numbered as they appear, results first.
        """
        number: dict[int, int] = {}
        twice: set[int] = set()

        def value(dims: Dims) -> DimFactors:
            resolved = tuple(tuple(self.leaves(dim)) for dim in dims)
            flat = [leaf for dim in resolved for leaf in dim]
            if len(set(flat)) < len(flat):
                twice.update(leaf for leaf in flat if flat.count(leaf) > 1)
            return tuple(tuple(number.setdefault(leaf, len(number)) for leaf in dim) for dim in resolved)

        out = tuple(value(v) for v in results)
        of_results = frozenset(number)
        inp = tuple(value(v) for v in operands)
        sets: dict[int, set[int]] = {REDUCTION: set(), NEED_REPLICATION: set(), PERMUTATION: set()}
        for leaf, index in number.items():
            kind = self._kinds[leaf]
            if kind & NEED_REPLICATION or leaf in twice or (kind & REDUCTION and leaf in of_results):
                sets[NEED_REPLICATION].add(index)
            elif kind & REDUCTION:
                sets[REDUCTION].add(index)
            elif kind & PERMUTATION:
                sets[PERMUTATION].add(index)
        return OpShardingRule(
            operands=inp,
            results=out,
            sizes=tuple(self._sizes[leaf] for leaf in number),
            reduction=frozenset(sets[REDUCTION]),
            need_replication=frozenset(sets[NEED_REPLICATION]),
            permutation=frozenset(sets[PERMUTATION]),
        )


class Composition:
    """Ops joined along the values that they share, named by any hashable id."""

    __slots__ = ("_sums", "factors", "values")

    def __init__(self) -> None:
        self.factors = Factors()
        self.values: dict[Hashable, Dims] = {}
        self._sums: list[tuple[int, int]] = []
        """Atoms that ops reduce over, and how many elements each of these sums has."""

    def declare(self, value: Hashable, shape: Sequence[int], kind: int = PASS_THROUGH) -> None:
        """A value with a factor of its own for each dimension, for instance an argument."""
        self.bind(value, [[self.factors.new(n, kind)] if n > 1 else [] for n in shape])

    def bind(self, value: Hashable, dims: Dims) -> None:
        """States that a value's dimensions are these atoms (too, if it has some already)."""
        known = self.values.get(value)
        if known is None:
            self.values[value] = dims
            return
        if len(known) != len(dims):
            raise ValueError(f"value {value!r} has {len(known)} dimensions to one op and {len(dims)} to another")
        for a, b in zip(known, dims, strict=True):
            if a or b:
                self.factors.unify(a, b)

    def add(
        self, rule: OpShardingRule, operands: Sequence[Hashable], results: Sequence[Hashable], *, elements: int = 0
    ) -> None:
        """Joins one op; an operand id of None stands for a value that nobody else uses, such as a constant.

        `elements` of its first result are remembered for what it reduces over; see `sums`.
        """
        inputs, outputs = self.factors.instantiate(rule)
        for value, dims in zip(operands, inputs, strict=True):
            if value is not None:
                self.bind(value, dims)
        for value, dims in zip(results, outputs, strict=True):
            self.bind(value, dims)
        if rule.reduction:
            summed = {a for dims in inputs for dim in dims for a in dim if self.factors.kind(a) & REDUCTION}
            self._sums += [(atom, elements) for atom in summed]

    def sums(self) -> dict[int, set[int]]:
        """How many elements the sums over each leaf have; call `settle` first."""
        found: dict[int, set[int]] = {}
        for atom, elements in self._sums:
            for leaf in self.factors.leaves((atom,)):
                found.setdefault(leaf, set()).add(elements)
        return found

    def settle(self) -> None:
        """Marks every factor that indexes one value twice: no mesh axis can split both of its dimensions."""
        factors = self.factors
        for dims in self.values.values():
            flat = [leaf for dim in dims for leaf in factors.leaves(dim)]
            if len(set(flat)) < len(flat):
                for leaf in flat:
                    if flat.count(leaf) > 1:
                        factors.mark(leaf, NEED_REPLICATION)

    def rule(self, inputs: Sequence[Hashable], outputs: Sequence[Hashable]) -> OpShardingRule:
        """The rule from these values to those; call `settle` first when all ops are in."""
        return self.factors.read([self.values[v] for v in inputs], [self.values[v] for v in outputs])


def compose(
    ops: Sequence[tuple[OpShardingRule, Sequence[Hashable], Sequence[Hashable]]],
    inputs: Sequence[Hashable],
    outputs: Sequence[Hashable],
) -> OpShardingRule:
    """The rule of a chain of ops, each given with the ids of its operands and results.

    >>> dot = OpShardingRule.parse("([i, k], [k, j])->([i, j]) {i=8, j=4, k=16} reduction={k}")
    >>> tanh = OpShardingRule.parse("([i, j])->([i, j]) {i=8, j=4}")
    >>> str(compose([(dot, "xw", "h"), (tanh, "h", "y")], "xw", "y"))
    '([i, k], [k, j])->([i, j]) {i=8, j=4, k=16} reduction={k}'
    """
    composition = Composition()
    for rule, operands, results in ops:
        composition.add(rule, operands, results)
    composition.settle()
    return composition.rule(inputs, outputs)


def kinds_of(rule: OpShardingRule) -> list[int]:
    """The kinds of a rule's factors, as flags."""
    kinds = [PASS_THROUGH] * len(rule.sizes)
    for members, flag in (
        (rule.reduction, REDUCTION),
        (rule.need_replication, NEED_REPLICATION),
        (rule.permutation, PERMUTATION),
    ):
        for factor in members:
            kinds[factor] |= flag
    return kinds


def fit(rule: OpShardingRule, operands: Sequence[Sequence[int]], results: Sequence[Sequence[int]]) -> OpShardingRule:
    """The rule with sizes that agree with the shapes of its operands and results.

    Shardy gives a factor one size although a slice, pad, window or concatenation has another on its
    other side. A permutation factor gets the greatest common divisor, since that is what can be split
    evenly on both sides. Of any other dimension that disagrees, the minor part that does gets a
    need-replication factor of its own. Factors of size 1 are dropped. A factor that only operands have, and
    that is no reduction, needs replication: Shardy leaves such factors of irregular reshapes unmarked
    since it never propagates them.
    """
    kinds, sizes = kinds_of(rule), list(rule.sizes)
    dims = [
        (dim, n)
        for mapping, shape in zip((*rule.operands, *rule.results), (*operands, *results), strict=True)
        for dim, n in zip(mapping, shape, strict=True)
    ]
    of_results = {f for value in rule.results for dim in value for f in dim}
    for f, kind in enumerate(kinds):
        if not kind and f not in of_results:
            kinds[f] = NEED_REPLICATION
    lost: set[int] = set()
    for dim, n in dims:
        if len(dim) == 1 and sizes[dim[0]] != n:
            if kinds[dim[0]] == PERMUTATION:
                sizes[dim[0]] = math.gcd(sizes[dim[0]], n)
            else:
                lost.add(dim[0])
    lost |= {f for f, size in enumerate(sizes) if size <= 1}
    factors = Factors()
    atoms = [factors.new(size, kind) for size, kind in zip(sizes, kinds, strict=True)]

    def read_dim(dim: tuple[int, ...], n: int) -> Dim:
        kept = list(itertools.takewhile(lambda f: f not in lost or rule.sizes[f] == 1, dim))
        kept = [f for f in kept if f not in lost]
        if n <= 1:
            return []
        rest, remainder = divmod(n, math.prod(sizes[f] for f in kept))
        if not remainder and rest == 1:
            return [atoms[f] for f in kept]
        if len(dim) == 1 and kept and kinds[dim[0]] == PERMUTATION:
            return [atoms[dim[0]]]
        if remainder:
            for f in kept:
                factors.mark(atoms[f], NEED_REPLICATION)
            return [factors.new(n, NEED_REPLICATION)]
        return [*(atoms[f] for f in kept), factors.new(rest, NEED_REPLICATION)]

    def value(mapping: DimFactors, shape: Sequence[int]) -> Dims:
        return [read_dim(dim, n) for dim, n in zip(mapping, shape, strict=True)]

    inputs = [value(m, s) for m, s in zip(rule.operands, operands, strict=True)]
    return factors.read(inputs, [value(m, s) for m, s in zip(rule.results, results, strict=True)])


def replicated(operands: Sequence[Sequence[int]], results: Sequence[Sequence[int]]) -> OpShardingRule:
    """The rule of an op that runs whole: every dimension is a factor of its own and needs replication."""
    composition = Composition()
    inputs = [("operand", i) for i in range(len(operands))]
    outputs = [("result", i) for i in range(len(results))]
    for name, shape in zip(inputs + outputs, [*operands, *results], strict=True):
        composition.declare(name, shape, NEED_REPLICATION)
    return composition.rule(inputs, outputs)
