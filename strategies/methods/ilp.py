"""The exact solver: the problem as an integer linear program, solved by HiGHS.

Variables
    x[n, c]       node n takes candidate c                                      binary
    e[t, k, r, j] consumer k of transfer t reads it in sharding j, made in r    continuous: integral where x is
    m[t, r, j]    transfer t is resharded from r to j for at least one consumer

    minimise    sum cost[n][c] x[n, c] + sum seconds_t[r, j] m[t, r, j]
    subject to  sum_c x[n, c] = 1                                               one candidate each
                sum_j e[t, k, r, j] = sum_{c: row(c) = r} x[source, c]          made as the source makes it
                sum_r e[t, k, r, j] = sum_{c: column(c) = j} x[consumer, c]     read as the consumer needs it
                m[t, r, j] >= e[t, k, r, j]                                     one resharding serves all who need it
                sum a[n][c] x[n, c] + sum b_t[r, j] m[t, r, j] <= most          for each `Limit`, of memory, say

A transfer with one consumer has m = e. The polytope of e given x is that of a transportation problem, which makes the
relaxation tight (Alpa, OSDI 2022, section 4.2, linearises the same products pair by pair).
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import highspy
import numpy as np
from numpy.typing import NDArray

from ffjax.strategies.methods.base import Solution
from ffjax.strategies.problem import Problem, total_seconds

Floats = NDArray[np.float64]
_SCALE = 1e6
"""The objective in microseconds: HiGHS's tolerances are absolute."""


@dataclass(slots=True)
class _Rows:
    """Constraints under construction, in the row-wise form that HiGHS takes."""

    starts: list[int] = field(default_factory=lambda: [0])
    columns: list[int] = field(default_factory=list)
    values: list[float] = field(default_factory=list)
    lower: list[float] = field(default_factory=list)
    upper: list[float] = field(default_factory=list)

    def add(self, columns: Sequence[int], values: Sequence[float], lower: float, upper: float) -> None:
        self.columns += columns
        self.values += values
        self.starts.append(len(self.columns))
        self.lower.append(lower)
        self.upper.append(upper)


@dataclass(frozen=True, slots=True, kw_only=True)
class Limit:
    """What a choice may take in all: so much for candidates of nodes, and for cells of transfers."""

    nodes: Mapping[int, Floats]
    transfers: Mapping[int, Floats]
    most: float


class Exact:
    """The integer linear program alone, to within `gap` (a share of the optimum) or until the time is over."""

    name = "exact"

    def __init__(self, *, gap: float = 1e-4, time_limit_s: float = 60.0) -> None:
        self.gap = gap
        self.time_limit_s = time_limit_s

    def solve(self, problem: Problem, starts: Sequence[Sequence[int]] = ()) -> Solution | None:
        """See `Method`; starts only save what is worse."""
        found = None
        if all(node.candidates for node in problem.nodes):
            found = solve(problem, gap=self.gap, time_limit_s=self.time_limit_s)
        known = [] if found is None else [found.choice]
        priced = [(total_seconds(problem, c), tuple(c)) for c in (*known, *starts)]
        seconds, choice = min(priced, key=lambda p: p[0], default=(math.inf, ()))
        if not math.isfinite(seconds):
            return None
        return Solution(
            choice=choice,
            objective_s=seconds,
            bound_s=-math.inf if found is None else min(found.bound_s, seconds),
            status="integer linear program" if found is None else found.status,
            seconds=0.0 if found is None else found.seconds,
        )


def solve(
    problem: Problem,
    *,
    limits: Sequence[Limit] = (),
    time_limit_s: float = math.inf,
    most_nodes: int | None = None,
    gap: float = 1e-4,
) -> Solution | None:
    """The best choice of candidates that is found within `limits`, or None.

    With a limit on time the answer may depend on what else the machine does; with one on the branch-and-bound tree's
    nodes (`most_nodes`) it does not.
    """
    began = time.perf_counter()
    if any(limit.most <= 0 for limit in limits):
        return None
    costs: list[float] = []
    integral: list[bool] = []
    upper: list[float] = []
    rows = _Rows()
    first: list[int] = []
    limited: list[tuple[list[int], list[float]]] = [([], []) for _ in limits]
    for index, node in enumerate(problem.nodes):
        first.append(len(costs))
        costs += (node.cost_s * _SCALE).tolist()
        integral += [len(node.candidates) > 1] * len(node.candidates)
        upper += [1.0] * len(node.candidates)
        rows.add(range(first[-1], len(costs)), [1.0] * len(node.candidates), 1.0, 1.0)
        for limit, (where, taken) in zip(limits, limited, strict=True):
            if index in limit.nodes:
                where.extend(range(first[-1], len(costs)))
                taken.extend((limit.nodes[index] / limit.most).tolist())
    for index, transfer in enumerate(problem.transfers):
        n, m = transfer.seconds.shape
        size = n * m
        shared = len(transfer.consumers) > 1
        base = len(costs)
        possible = np.isfinite(transfer.seconds).ravel()
        priced = transfer.seconds.ravel() > 0
        for limit, (where, taken) in zip(limits, limited, strict=True):
            if index in limit.transfers:
                cells = limit.transfers[index].ravel()
                where.extend((base + np.flatnonzero(cells > 0)).tolist())
                taken.extend((cells[cells > 0] / limit.most).tolist())
                priced |= cells > 0
        costs += np.where(possible, transfer.seconds.ravel() * _SCALE, 0.0).tolist()
        integral += [False] * size
        upper += possible.astype(float).tolist()
        for consumer in transfer.consumers:
            start = base
            if shared:
                start = len(costs)
                costs += [0.0] * size
                integral += [False] * size
                upper += [1.0] * size
                # Infinite ones too: m is bounded by 0 there.
                for i in np.flatnonzero(priced):
                    rows.add([base + int(i), start + int(i)], [1.0, -1.0], 0.0, highspy.kHighsInf)
            for r in range(n):
                made = first[transfer.source] + np.flatnonzero(transfer.row_of == r)
                row = range(start + r * m, start + (r + 1) * m)
                rows.add([*row, *made.tolist()], [1.0] * m + [-1.0] * len(made), 0.0, 0.0)
            for j in range(m):
                needed = first[consumer.node] + np.flatnonzero(consumer.column_of == j)
                column = range(start + j, start + size, m)
                rows.add([*column, *needed.tolist()], [1.0] * n + [-1.0] * len(needed), 0.0, 0.0)
    for where, taken in limited:
        rows.add(where, taken, -highspy.kHighsInf, 1.0)

    highs = highspy.Highs()  # type: ignore[no-untyped-call]
    highs.silent()
    lp = highspy.HighsLp()
    lp.num_col_, lp.num_row_ = len(costs), len(rows.lower)
    lp.col_cost_ = np.array(costs)
    lp.col_lower_, lp.col_upper_ = np.zeros(len(costs)), np.array(upper)
    lp.row_lower_, lp.row_upper_ = np.array(rows.lower), np.array(rows.upper)
    lp.a_matrix_.format_ = highspy.MatrixFormat.kRowwise
    lp.a_matrix_.start_ = np.array(rows.starts, dtype=np.int32)
    lp.a_matrix_.index_ = np.array(rows.columns, dtype=np.int32)
    lp.a_matrix_.value_ = np.array(rows.values)
    kinds = (highspy.HighsVarType.kInteger, highspy.HighsVarType.kContinuous)
    lp.integrality_ = [kinds[0] if i else kinds[1] for i in integral]
    highs.passModel(lp)
    highs.setOptionValue("mip_rel_gap", gap)
    highs.setOptionValue("time_limit", float(time_limit_s))
    if most_nodes is not None:
        highs.setOptionValue("mip_max_nodes", most_nodes)
    highs.setOptionValue("random_seed", 0)
    highs.run()
    status = highs.getModelStatus()
    info = highs.getInfo()
    seconds = time.perf_counter() - began
    if status == highspy.HighsModelStatus.kInfeasible or info.primal_solution_status != 2:
        return None
    values = np.array(highs.getSolution().col_value)
    choice = tuple(
        int(np.argmax(values[start : start + len(node.candidates)]))
        for start, node in zip(first, problem.nodes, strict=True)
    )
    # A problem without a choice (on one device) is a linear one: HiGHS then knows no such bound.
    bound = info.mip_dual_bound if any(integral) else info.objective_function_value
    return Solution(
        choice=choice,
        objective_s=info.objective_function_value / _SCALE,
        bound_s=bound / _SCALE,
        status=highs.modelStatusToString(status).lower(),
        seconds=seconds,
    )
