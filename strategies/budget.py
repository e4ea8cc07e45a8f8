"""What a solution takes of memory, and whether that is within a budget."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from ffjax.cost.memory import MemoryModel, Peak
from ffjax.ir.layout import Layout
from ffjax.strategies.methods.base import Solution
from ffjax.strategies.problem import Problem, assignments

_NEAR = 0.8
"""Up to this share of the budget any schedule fits: those of layouts differ from the program's by less."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Fit:
    """A solution, the memory that it takes, and whether that is within the budget."""

    solution: Solution
    layout: Layout
    peak: Peak
    fits: bool
    s_per_byte: float = 0.0
    """What a byte cost where this was found: by so much the objective falls with each further byte of budget."""
    free: Fit | None = None
    """The fastest solution if bytes cost nothing; None where that is this one."""
    bound_within: Callable[[], float] | None = None
    """Works out a bound on the seconds of all that fits, where bytes cost something."""


def layout_of(problem: Problem, choice: Sequence[int]) -> Layout:
    return Layout(
        regions=problem.regions,
        mesh=problem.mesh,
        assignments=assignments(problem, choice),
        axis_prices=problem.model.axis_prices,
    )


def fit_of(problem: Problem, solution: Solution, budget_bytes: float, memory: MemoryModel) -> Fit:
    layout = layout_of(problem, solution.choice)
    most = memory.peak(layout)
    return Fit(solution=solution, layout=layout, peak=most, fits=most.bytes <= budget_bytes)


def near(most: Peak, budget_bytes: float) -> bool:
    """Whether a layout's own schedule may decide if it fits: under the program's it does so, by little."""
    return budget_bytes * _NEAR < most.bytes <= budget_bytes


def scheduled_peak(layout: Layout, budget_bytes: float, memory: MemoryModel) -> Peak:
    """The peak of a layout, under its own schedule where that may decide whether it fits."""
    most = memory.peak(layout)
    return memory.under(layout).peak(layout) if budget_bytes * _NEAR < most.bytes else most
