"""Search methods: each takes a `Problem` and returns a `Solution` (`base.Method`).

| method | module | what it does | what it proves |
| --- | --- | --- | --- |
| exact | `ilp.py` | the whole problem as an integer linear program | the optimum |
| default | `solver.py`, `dual_ascent.py` | dual ascent; what it leaves as an integer program | the optimum, or a gap |
| decomposition | `decomposition.py` | dynamic programming over boundary shardings | the optimum, or a gap |
| named dimensions | `named_dimensions.py` | beam search over the program's named dimensions | nothing |
| mcmc | `mcmc.py` | simulated annealing over the sum of costs | nothing |
| refinement | `refinement.py` | Monte Carlo over the simulator, from a plan that is known | nothing |

All but the last minimise the sum of costs; `moves.py` says what one change adds to it.
"""

from __future__ import annotations

from collections.abc import Callable

from ffjax.strategies.methods.base import Method, Solution
from ffjax.strategies.methods.decomposition import Decomposition
from ffjax.strategies.methods.ilp import Exact
from ffjax.strategies.methods.mcmc import MCMC
from ffjax.strategies.methods.named_dimensions import NamedDimensions
from ffjax.strategies.methods.refinement import Refinement
from ffjax.strategies.methods.solver import Solver

METHODS: tuple[Callable[[], Method], ...] = (Exact, Solver, Decomposition, NamedDimensions, MCMC)
"""Those that minimise the sum of costs."""

__all__ = ["MCMC", "METHODS", "Decomposition", "Exact", "Method", "NamedDimensions", "Refinement", "Solution", "Solver"]
