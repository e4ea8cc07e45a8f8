"""The atoms of a program's ops, and joining them: stating that two ops name the same dimension.

Each op brings the factors of its rule as atoms of its own. Joining never makes one atom index two dimensions of one
value, and never joins one that can be split with one that cannot.
"""

from __future__ import annotations

from collections.abc import Iterator

from ffjax.ir.compose import NEED_REPLICATION, PERMUTATION, Factors
from ffjax.ir.graph import NO_VALUE, Graph, Op

View = list[list[int]]
"""For each dimension of a value its atoms, as one op has them."""


class Atoms:
    """The atoms of every operand and result, joined by `unify`."""

    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        self.factors = Factors()
        self.dims: list[tuple[list[View], list[View]]] = []
        """By op the views of its operands, and of its results."""
        self.where: dict[int, set[tuple[int, int]]] = {}
        """By atom which values it indexes, so that a join that would index one twice is seen."""
        for op in graph.ops:
            operands, results = self.factors.instantiate(op.rule)
            self.dims.append((operands, results))
            for slot, dims in enumerate(operands + results):
                for dim in dims:
                    for atom in dim:
                        self.where.setdefault(atom, set()).add((op.id, slot))
            # What is summed over cannot index the sum.
            for atom in self.reduced(op):
                self.where[atom] |= {(op.id, len(operands) + slot) for slot in range(len(results))}

    def port(self, op: int, side: str, index: int) -> View:
        return self.dims[op][0 if side == "operand" else 1][index]

    def unify(self, a: View, b: View, *, force: bool = False) -> None:
        """Joins two views of one value, dimension by dimension, wherever that is sound."""
        factors = self.factors
        for left, right in zip(a, b, strict=True):
            xs, ys = factors.leaves(left), factors.leaves(right)
            if [factors.size(x) for x in xs] != [factors.size(y) for y in ys]:
                if force:
                    factors.unify(left, right)
                continue
            for x, y in zip(xs, ys, strict=True):
                if x == y:
                    continue
                if force or self.joins_atoms(x, y):
                    factors.merge(x, y)
                    small, large = sorted((self.where.pop(x, set()), self.where.pop(y, set())), key=len)
                    large |= small
                    self.where[factors.find(x)] = large

    def joins(self, a: View, b: View) -> bool:
        """Whether `unify` would make two views of a value one."""
        factors = self.factors
        for left, right in zip(a, b, strict=True):
            xs, ys = factors.leaves(left), factors.leaves(right)
            if [factors.size(x) for x in xs] != [factors.size(y) for y in ys]:
                return False
            if not all(x == y or self.joins_atoms(x, y) for x, y in zip(xs, ys, strict=True)):
                return False
        return True

    def joins_atoms(self, x: int, y: int) -> bool:
        """Whether two atoms can be one: both or neither can be split, and no value has both."""
        alike = (self.factors.kind(x) ^ self.factors.kind(y)) & (NEED_REPLICATION | PERMUTATION) == 0
        small, large = sorted((self.where.get(x, set()), self.where.get(y, set())), key=len)
        return alike and small.isdisjoint(large)

    def names(self) -> dict[int, int]:
        """For each atom which dimension of the program it is: atoms that meet in a value are of one name."""
        names = Factors()
        name = {a: names.new(self.factors.size(a)) for a in sorted(self.where) if self.factors.find(a) == a}
        for op in self.graph.ops:
            for index, value in enumerate(op.operands):
                if value == NO_VALUE or self.graph.values[value].constant:
                    continue
                producer = self.graph.ops[self.graph.values[value].producer]
                made = self.dims[producer.id][1][producer.results.index(value)]
                for left, right in zip(made, self.dims[op.id][0][index], strict=True):
                    xs, ys = self.factors.leaves(left), self.factors.leaves(right)
                    if [self.factors.size(x) for x in xs] == [self.factors.size(y) for y in ys]:
                        for x, y in zip(xs, ys, strict=True):
                            names.merge(name[x], name[y])
        return {atom: names.find(own) for atom, own in name.items()}

    def components(self) -> list[int]:
        """For each op the first op of its region: ops that share an atom are in one."""
        parent = list(range(len(self.graph.ops)))
        owner: dict[int, int] = {}

        def find(op: int) -> int:
            while parent[op] != op:
                parent[op] = parent[parent[op]]
                op = parent[op]
            return op

        for op in self.graph.ops:
            for side in self.dims[op.id]:
                for value in side:
                    for dim in value:
                        for atom in self.factors.leaves(dim):
                            a, b = find(op.id), find(owner.setdefault(atom, op.id))
                            if a != b:
                                parent[max(a, b)] = min(a, b)
        return [find(op.id) for op in self.graph.ops]

    def reduced(self, op: Op) -> Iterator[int]:
        """The atoms of an op's reduction factors."""
        if op.rule.reduction:
            for value, dims in zip(op.rule.operands, self.dims[op.id][0], strict=True):
                for dim, atoms in zip(value, dims, strict=True):
                    factors = [f for f in dim if op.rule.sizes[f] > 1]
                    for factor, atom in zip(factors, atoms, strict=True):
                        if factor in op.rule.reduction:
                            yield from self.factors.leaves((atom,))

    def contracted(self, op: Op) -> list[int]:
        """The atoms that an op reduces over and that can be split."""
        kept = NEED_REPLICATION | PERMUTATION
        return [a for a in dict.fromkeys(self.reduced(op)) if not self.factors.kind(a) & kept]
