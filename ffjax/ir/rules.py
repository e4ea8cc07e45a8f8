"""Op sharding rules as data: which dimensions of an op's operands and results are the same factor.

A rule reads like an einsum, in Shardy's own text form::

    ([i, k], [k, j])->([i, j]) {i=8, j=32, k=16} reduction={k}

A dimension of a reshaped value is a list of factors, major to minor (`[ij, k]`). A factor is
pass-through unless it is named in one of three sets: `reduction` (results are partial sums when it
is split), `need_replication` (the op cannot run on pieces of it) and `permutation` (pieces need a
halo from their neighbours).
"""

from __future__ import annotations

import math
import re
import string
from dataclasses import dataclass, field

DimFactors = tuple[tuple[int, ...], ...]
"""For each dimension of one value its factors, by index, major to minor."""


@dataclass(frozen=True, slots=True, kw_only=True)
class OpShardingRule:
    """The factors of one op: `operands[i][d]` and `results[i][d]` list those of a dimension."""

    operands: tuple[DimFactors, ...]
    results: tuple[DimFactors, ...]
    sizes: tuple[int, ...]
    reduction: frozenset[int] = field(default_factory=frozenset)
    need_replication: frozenset[int] = field(default_factory=frozenset)
    permutation: frozenset[int] = field(default_factory=frozenset)
    is_plain: bool = field(init=False, repr=False, compare=False, default=True)
    """Whether every dimension is one factor, or none."""

    def __post_init__(self) -> None:
        factors = range(len(self.sizes))
        for value in self.operands + self.results:
            for dim in value:
                if any(f not in factors for f in dim):
                    raise ValueError(f"a dimension names factors {dim}, the rule has {len(self.sizes)}")
                if len(dim) > 1:
                    object.__setattr__(self, "is_plain", False)

    def shape(self, value: DimFactors) -> tuple[int, ...]:
        """The shape of a value as its factors' sizes give it."""
        return tuple(math.prod(self.sizes[f] for f in dim) for dim in value)

    def __str__(self) -> str:
        names = [factor_name(i) for i in range(len(self.sizes))]

        def values(side: tuple[DimFactors, ...]) -> str:
            return ", ".join(
                "[" + ", ".join("".join(names[f] for f in dim) or "_" for dim in value) + "]" for value in side
            )

        text = f"({values(self.operands)})->({values(self.results)})"
        text += " {" + ", ".join(f"{n}={s}" for n, s in zip(names, self.sizes, strict=True)) + "}"
        for kind in ("reduction", "need_replication", "permutation"):
            members = sorted(getattr(self, kind))
            if members:
                text += f" {kind}={{" + ", ".join(names[f] for f in members) + "}"
        return text

    @classmethod
    def parse(cls, text: str) -> OpShardingRule:
        """Reads the text form; raises ValueError that quotes text which is not one."""
        match = _RULE.fullmatch(text.strip())
        if match is None:
            raise ValueError(
                f"not an op sharding rule: {text!r}; write it as '([i, k], [k, j])->([i, j]) {{i=8, ...}}'"
            )
        sizes: dict[str, int] = {}
        for entry in filter(None, (e.strip() for e in match["sizes"].split(","))):
            name, _, size = entry.partition("=")
            sizes[name.strip()] = int(size)
        index = {name: i for i, name in enumerate(sizes)}

        def values(side: str) -> tuple[DimFactors, ...]:
            return tuple(
                tuple(
                    tuple(index[f] for f in _FACTOR.findall(dim) if f != "_")
                    for dim in filter(None, (d.strip() for d in body.split(",")))
                )
                for body in re.findall(r"\[([^\]]*)\]", side)
            )

        kinds = {k: frozenset(index[f.strip()] for f in v.split(",")) for k, v in _KIND.findall(match["kinds"])}
        try:
            return cls(
                operands=values(match["operands"]),
                results=values(match["results"]),
                sizes=tuple(sizes.values()),
                **kinds,
            )
        except (KeyError, TypeError) as error:
            raise ValueError(f"not an op sharding rule: {text!r}: {error}") from error


_RULE = re.compile(r"\((?P<operands>.*?)\)\s*->\s*\((?P<results>.*?)\)\s*\{(?P<sizes>[^}]*)\}(?P<kinds>.*)")
_KIND = re.compile(r"(\w+)=\{([^}]*)\}")
_FACTOR = re.compile(r"[a-z](?:_\d+)?|_")


def factor_name(index: int) -> str:
    """Shardy's names: i to z, then a to h, then z_1, z_2, ..."""
    letters = string.ascii_lowercase[8:] + string.ascii_lowercase[:8]
    return letters[index] if index < 26 else f"z_{index - 25}"
