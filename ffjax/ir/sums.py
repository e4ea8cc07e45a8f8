"""Sums of partial sums that are reduced once: which reductions can wait for ops that are linear in what they reduce.

Where several contractions are added up (the gradients that query, key and value send back), each leaves partial sums
over the same mesh axes, and one reduction of their sum does for all:

    all_reduce(a) + all_reduce(b)  =  all_reduce(a + b)

A *delayed sum* is a tree of linear ops whose leaves are contractions, and whose inner values nobody else reads. It is
found where the leaves reduce over dimensions that pair up, so that a mesh axis that splits one splits all, and where
the sum is no larger than its terms together, so that to wait is never dearer.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from ffjax.ir.compat import dtype_of
from ffjax.ir.graph import NO_VALUE, Graph, Op

CONTRACTION = "dot_general"
_ADDING = frozenset({"add", "add_any", "sub"})
_MAPPING = frozenset({"neg", "transpose"})
_SCALING = frozenset({"mul", "div"})

Pair = tuple[int, int]


@dataclass(frozen=True, slots=True, kw_only=True)
class DelayedSum:
    """A tree of ops: `ops` in order, the last of which makes the sum."""

    ops: tuple[int, ...]
    reduced: tuple[int, ...]
    """Atoms that all contractions reduce over, as one of them has them."""
    pairs: tuple[Pair, ...]
    """Atoms of different contractions that are to be one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Contracted:
    """What tells apart the dimensions that contractions reduce over."""

    atoms: Callable[[Op], Sequence[int]]
    """Those that an op reduces over."""
    size: Callable[[int], int]
    name: Callable[[int], int]
    """Equal for atoms that are one dimension of the program."""

    def pairs(self, left: Sequence[int], right: Sequence[int]) -> list[Pair]:
        """Pairs up the dimensions of two terms; nothing unless one has all that the other has.

        Namesakes come first. If there are any, the rest goes by size: a value's head is as wide as a key's.
        """
        few, many = sorted((left, right), key=len)
        found: dict[int, int] = {}
        for namesakes in (True, False):
            for a in few:
                for b in many:
                    alike = self.size(a) == self.size(b) and (self.name(a) == self.name(b) or not namesakes)
                    if alike and a not in found and b not in found.values():
                        found[a] = b
            if not found:
                break
        return list(found.items()) if len(found) == len(few) else []


@dataclass(frozen=True, slots=True)
class _Term:
    """A value that can wait to be reduced: over what, and the bytes of the contractions that it is made of."""

    reduced: tuple[int, ...]
    bytes: float


def delayed_sums(
    graph: Graph, readers: Sequence[Sequence[tuple[int, int]]], contracted: Contracted
) -> list[DelayedSum]:
    """The largest delayed sums of a program, in order.

    Args:
      graph: the program.
      readers: for each value the ops that read it, and as which operand.
      contracted: what its contractions reduce over.
    """
    terms: dict[int, _Term] = {}
    paired: dict[int, list[Pair]] = {}
    for op in graph.ops:
        if len(op.results) != 1:
            continue
        result = graph.values[op.results[0]]
        if op.kind == CONTRACTION:
            if atoms := tuple(contracted.atoms(op)):
                terms[result.id] = _Term(atoms, result.bytes)
            continue
        operands = [v for v in op.operands if v != NO_VALUE]
        inner = [terms[v] for v in operands if v in terms and len(readers[v]) == 1]
        if not inner or len(inner) < len(operands) or not _linear(op):
            continue
        if len(inner) == 1:
            terms[result.id] = inner[0]
            continue
        left, right = inner
        pairs = contracted.pairs(left.reduced, right.reduced)
        if pairs and result.bytes <= left.bytes + right.bytes:
            terms[result.id] = _Term(tuple(a for a, _ in pairs), left.bytes + right.bytes)
            paired[op.id] = pairs
    found: list[DelayedSum] = []
    inside: set[int] = set()
    for last in sorted(paired, reverse=True):
        if last in inside:
            continue
        ops, ahead = [], [last]
        while ahead:
            op = graph.ops[ahead.pop()]
            ops.append(op.id)
            if op.kind != CONTRACTION:
                ahead += [graph.values[v].producer for v in op.operands if v != NO_VALUE]
        inside.update(ops)
        pairs = [pair for op_id in ops for pair in paired.get(op_id, ())]
        reduced = terms[graph.ops[last].results[0]].reduced
        found.append(DelayedSum(ops=tuple(sorted(ops)), reduced=reduced, pairs=tuple(pairs)))
    return found[::-1]


def _linear(op: Op) -> bool:
    """Whether an op is linear in all operands that are no literals, and its result no less precise than they are."""
    if op.kind in _ADDING:
        return NO_VALUE not in op.operands
    if op.kind in _SCALING:
        return op.operands[0] != NO_VALUE and op.operands[1] == NO_VALUE
    if op.kind == "convert_element_type" and op.eqn is not None:
        before, after = dtype_of(op.eqn.invars[0]), dtype_of(op.eqn.outvars[0])
        return before is not None and after is not None and bool(np.can_cast(before, after, "safe"))
    return op.kind in _MAPPING
