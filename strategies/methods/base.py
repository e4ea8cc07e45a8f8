"""What every search method is: something that takes a problem and returns a choice, with what it can say about it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from ffjax.strategies.problem import Problem


@dataclass(frozen=True, slots=True, kw_only=True)
class Solution:
    """`choice[n]` is the candidate of node n; `bound_s` is proved to be no more than the optimum, or minus infinity."""

    choice: tuple[int, ...]
    objective_s: float
    bound_s: float
    status: str
    seconds: float


class Method(Protocol):
    """A search method. Equal problems and starts give equal choices."""

    @property
    def name(self) -> str: ...

    def solve(self, problem: Problem, starts: Sequence[Sequence[int]] = ()) -> Solution | None:
        """The best choice that is found, never worse than one of `starts`; None if no choice is possible.

        Args:
          problem: on one mesh.
          starts: choices that are known, a candidate index for each node.
        """
        ...
