"""Fitting into memory by its price: bytes cost seconds, as many as make the fastest choice fit.

    L(w) = min over choices (seconds + sum over instants i    w_i * (bytes at i - budget))   <=   seconds of what fits

for prices w >= 0 (Lagrange's relaxation of the budget) has the structure of the search problem, copies made for readers
included, and solves as fast; with the budget as a constraint a large problem does not. Each solution is a line above
L, so the prices to try next are where the lowest of the known lines is highest (Kelley, "The cutting-plane method",
SIAM J. 8, 1960). The instants are those at which solutions peak.

    prices        `Priced.ascend`    solutions on both sides of the budget
    plans         `Priced.mix`       the best choice that fits of what these chose, by an integer linear program: alike
                                     layers cost alike per byte, so at one price all of them turn at once, while the
                                     best that fits has some turned
    bound         `Priced.bound_s`   L again, of bytes that are there whatever is chosen

Where no price makes it fit, only bytes are minimised, and the least peak says what budget would do.
"""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ffjax.cost.memory import MemoryModel
from ffjax.strategies.budget import Fit, fit_of, scheduled_peak
from ffjax.strategies.instants import Instants
from ffjax.strategies.limited import Limited, limited
from ffjax.strategies.methods import ilp
from ffjax.strategies.methods.base import Solution
from ffjax.strategies.methods.solver import Solver
from ffjax.strategies.problem import Problem, restrict, total_seconds

Floats = NDArray[np.float64]

CHEAPEST, DEAREST = 0.01, 30.0
"""Prices of all memory, in steps, between which solutions are looked for."""
_ROUNDS = {True: 12, False: 6}
"""Of prices: where thorough, and where not."""
_BOUND_ROUNDS = 30
_SHRINKING, _PATIENCE = 10, 2
"""Of minimising bytes alone: at most so many, and so many without a lower peak end it."""
BYTES_ALONE = 1e3
"""The price at which memory alone is minimised, but for ties."""
_PRICED_GAP, _PRICED_SWEEPS, _BOUND_SWEEPS = 1e-3, 12, 30
"""How well priced problems are solved: a price is a guess itself."""
_MIXES, _MIXED_GAP, _MOST_NODES, _MOST_CELLS = 4, 1e-3, 50, 20_000
"""Integer programs: how many, as new instants come up; how well, and how long each is solved; how large it may be."""


def solve_within(
    problem: Problem,
    budget_bytes: float,
    memory: MemoryModel,
    solver: Solver,
    starts: Sequence[Sequence[int]] = (),
    *,
    thorough: bool = True,
    mixed: bool = True,
    instants: Instants | None = None,
) -> Fit | None:
    """The fastest solution that fits, or one of nearly least peak memory (`fits` is False); None if there is none.

    Memory is priced under the program's schedule; if `thorough`, what nearly fills the budget fits under its own, too.

    Args:
      problem: on one mesh.
      budget_bytes: what one device may hold.
      memory: of the program.
      solver: of problems of this shape.
      starts: choices that are known; what fits is no slower than those of them that do.
      thorough: the gap is closed, and where nothing fits, how little would do is looked for.
      mixed: where bytes cost something, the best of what solutions chose is looked for.
      instants: those of another problem of the program, with which it shares what they have in common.
    """
    solution = solver.solve(problem, starts, prove=thorough)
    if solution is None:
        return None
    found = fit_of(problem, solution, budget_bytes, memory)
    if not found.fits:
        prices = Priced(problem, budget_bytes, memory, found, starts, instants)
        found = _solve_priced(prices, thorough=thorough, mixed=mixed)
    if not found.fits or not thorough:
        return found
    own = scheduled_peak(found.layout, budget_bytes, memory)
    if own.bytes <= budget_bytes:
        return dataclasses.replace(found, peak=own)
    # Its own collectives keep more alive than the program's schedule knows: let that take so much less.
    target = budget_bytes * found.peak.bytes / own.bytes
    prices = Priced(problem, target, memory, found, starts, instants)
    less = _solve_priced(prices, thorough=thorough, mixed=mixed)
    own = scheduled_peak(less.layout, budget_bytes, memory)
    solution = dataclasses.replace(less.solution, bound_s=found.solution.bound_s)
    return dataclasses.replace(
        less, solution=solution, peak=own, fits=own.bytes <= budget_bytes, bound_within=found.bound_within
    )


class Priced:
    """A problem in which bytes cost seconds, solved at one price after another.

    Args:
      problem: on one mesh.
      budget_bytes: what one device may hold: what fits.
      memory: of the program.
      free: the fastest solution, at no price.
      starts: more choices that are known.
      instants: as in `solve_within`.
    """

    def __init__(
        self,
        problem: Problem,
        budget_bytes: float,
        memory: MemoryModel,
        free: Fit,
        starts: Sequence[Sequence[int]] = (),
        instants: Instants | None = None,
    ) -> None:
        self.problem, self.budget_bytes, self.memory = problem, budget_bytes, memory
        self.free = self.least = free
        self.s_per_byte = 0.0
        """What a byte costs where the budget is just filled, as far as that is known."""
        self._step_s = max(total_seconds(problem, free.solution.choice), 1e-12)
        self._instants = Instants(problem, memory) if instants is None else instants.within(problem)
        self._played: Counter[int] = Counter()
        self._relaxed: dict[bool, _Relaxed] = {}
        self._met: dict[tuple[int, ...], Fit] = {}
        self._shares: dict[tuple[int, ...], float] = {}
        self._note(free)
        for choice in dict.fromkeys(tuple(c) for c in starts):
            seconds = total_seconds(problem, choice)
            if math.isfinite(seconds) and choice not in self._met:
                self._note(self._fit(choice, free.solution.status))

    @property
    def fitting(self) -> Fit | None:
        """The fastest that fits of all that was met."""
        return min((f for f in self._met.values() if f.fits), key=lambda f: f.solution.objective_s, default=None)

    def at(self, price: float) -> Fit | None:
        """The solution where the bytes of `free` cost `price` times its step."""
        s_per_byte = price * self._step_s / self.free.peak.bytes
        solution = self._solved([n / self._played.total() * s_per_byte for n in self._played.values()])
        if solution is None:
            return None
        found = self._fit(solution.choice, solution.status, s_per_byte)
        self._note(found)
        return found

    def ascend(self, rounds: int) -> None:
        """Meets solutions at the prices at which the budget is just filled, or that come near them."""
        for _ in range(rounds):
            prices, _, self._shares = self._tried()
            self.s_per_byte = float(sum(prices))
            solution = self._solved(prices)
            if solution is None:
                return
            instants = len(self._played)
            again = solution.choice in self._met
            self._note(self._fit(solution.choice, solution.status, self.s_per_byte))
            if again and len(self._played) == instants:
                return

    def mix(self) -> None:
        """Meets the best choice that fits in which each node takes what it does in one of the best known choices."""
        for _ in range(_MIXES):
            _, _, shares = self._tried()
            known = [c for c, share in shares.items() if share > 0]
            known += [f.solution.choice for f in (self.fitting, self.least) if f is not None]
            kept = [sorted(set(options)) for options in zip(*known, strict=True)]
            within = limited(restrict(self.problem, kept), self._instants, list(self._played))
            if sum(t.seconds.size * len(t.consumers) for t in within.problem.transfers) > _MOST_CELLS:
                return
            solution = ilp.solve(
                within.problem, limits=within.limits(self.budget_bytes), gap=_MIXED_GAP, most_nodes=_MOST_NODES
            )
            if solution is None:
                return
            choice = tuple(own[c] for own, c in zip(kept, solution.choice, strict=True))
            instants = len(self._played)
            self._note(self._fit(choice, solution.status, self.s_per_byte))
            if len(self._played) == instants:
                return

    def bound_s(self) -> float:
        """What no choice within the budget can be below: L of bytes that are surely there."""
        best = self.free.solution.bound_s
        stale = 0
        for _ in range(_BOUND_ROUNDS):
            prices, most, _ = self._tried(surely=True)
            relaxed = self._relaxed[True]
            solution = relaxed.solve(prices, _BOUND_SWEEPS)
            if solution is None:
                break
            before, best = best, max(best, solution.bound_s + relaxed.constant_s(prices, self.budget_bytes))
            stale = 0 if best - before > _PRICED_GAP * best else stale + 1
            if stale > _PATIENCE or most - best <= _PRICED_GAP * best:
                break
            if solution.choice not in self._met:
                self._met[solution.choice] = self._fit(solution.choice, solution.status)
        return best

    def shrink(self, rounds: int = _SHRINKING) -> None:
        """Looks for a smaller `least`, until one fits or none is found any more."""
        stale = 0
        for _ in range(rounds):
            before = self.least
            prices, _, _ = self._tried(dearest=BYTES_ALONE)
            solution = self._solved(prices)
            if solution is None:
                break
            self._note(self._fit(solution.choice, solution.status, float(sum(prices))))
            if self.least.fits:
                break
            stale = stale + 1 if self.least is before else 0
            if stale > _PATIENCE:
                break

    def _tried(
        self, *, surely: bool = False, dearest: float = DEAREST
    ) -> tuple[Floats, float, dict[tuple[int, ...], float]]:
        """The prices where the lowest line of what was met is highest, its height, and the share of each line there."""
        relaxed = self._relax(surely=surely)
        choices = list(self._met)
        seconds = np.array([self._met[c].solution.objective_s for c in choices])
        over = np.array([relaxed.bytes(c) for c in choices]) - self.budget_bytes
        prices, height, shares = highest(seconds, over / self.budget_bytes, dearest * self._step_s)
        return prices / self.budget_bytes, height, dict(zip(choices, shares.tolist(), strict=True))

    def _relax(self, *, surely: bool) -> _Relaxed:
        ats = tuple(self._played)
        known = self._relaxed.get(surely)
        if known is None or known.ats != ats:
            within = limited(self.problem, self._instants, ats, surely=surely)
            known = self._relaxed[surely] = _Relaxed(ats, within, Solver(), {})
        return known

    def _solved(self, prices: Sequence[float] | Floats) -> Solution | None:
        return self._relax(surely=False).solve(prices, _PRICED_SWEEPS)

    def _fit(self, choice: tuple[int, ...], status: str, s_per_byte: float = 0.0) -> Fit:
        # What is proved of seconds and bytes together says nothing of seconds alone: instants count more than is live.
        solution = Solution(
            choice=choice,
            objective_s=total_seconds(self.problem, choice),
            bound_s=self.free.solution.bound_s,
            status=status,
            seconds=0.0,
        )
        found = fit_of(self.problem, solution, self.budget_bytes, self.memory)
        return dataclasses.replace(found, s_per_byte=s_per_byte, free=self.free, bound_within=self.bound_s)

    def _note(self, found: Fit) -> None:
        self._met.setdefault(found.solution.choice, found)
        if found.peak.bytes < self.least.peak.bytes:
            self.least = found
        if not found.fits or not self._played:
            self._played[found.peak.instant] += 1


@dataclass(frozen=True, slots=True)
class _Relaxed:
    """The problem with the bytes at some instants, and what is solved at prices on them."""

    ats: tuple[int, ...]
    within: Limited
    solver: Solver
    known: dict[tuple[int, ...], Floats]
    """The bytes of choices."""

    def bytes(self, choice: tuple[int, ...]) -> Floats:
        if choice not in self.known:
            self.known[choice] = self.within.bytes(choice)
        return self.known[choice]

    def solve(self, prices: Sequence[float] | Floats, sweeps: int) -> Solution | None:
        return self.solver.solve(self.within.priced(list(prices)), gap=_PRICED_GAP, sweeps=sweeps, prove=False)

    def constant_s(self, prices: Floats, budget_bytes: float) -> float:
        """What L has beside the least of the priced problem."""
        return float(sum(p * (t.fixed_bytes - budget_bytes) for p, t in zip(prices, self.within.terms, strict=True)))


def highest(seconds: Floats, over: Floats, most: float) -> tuple[Floats, float, Floats]:
    """Where the lowest of some lines is highest: seconds[k] + sum_i w[i] * over[k, i] over 0 <= w, sum w <= most.

    Returns w, the height there, and the share that each line has in it (the linear program's dual).
    """
    from scipy.optimize import linprog

    count, instants = over.shape
    scale = max(float(np.abs(seconds).max()), 1e-30)
    # Variables: w in units of `most`, and the height.
    lines = np.hstack([-over * most / scale, np.ones((count, 1))])
    within = np.append(np.ones(instants), 0.0)
    solved = linprog(
        np.append(np.zeros(instants), -1.0),
        A_ub=np.vstack([lines, within]),
        b_ub=np.append(seconds / scale, 1.0),
        bounds=[*[(0.0, None)] * instants, (None, None)],
        method="highs",
    )
    shares = np.maximum(-solved.ineqlin.marginals[:count], 0.0)
    return np.maximum(solved.x[:instants], 0.0) * most, float(solved.x[-1]) * scale, shares


def _solve_priced(prices: Priced, *, thorough: bool, mixed: bool) -> Fit:
    """Where the fastest solution does not fit. What is found to need least fits when that is the budget."""
    prices.ascend(_ROUNDS[thorough])
    if mixed:
        prices.mix()
    if prices.fitting is None:
        prices.shrink(_SHRINKING if thorough else 1)
    return prices.fitting or prices.least
