"""Every idiom of `tests/conformance`: it plans, runs, keeps its numbers, and communicates as predicted.

By default one idiom in six runs and two are planned and their collectives checked, under strategies and on meshes that
take turns; `pytest --full` runs all of them, under every strategy on every mesh.
`python benchmarks/conformance.py` prints the table.
"""

from __future__ import annotations

import itertools
import pathlib
import sys
from typing import Any

import pytest

sys.path.insert(0, str(pathlib.Path(__file__).parent))
from conformance import load, missing
from conformance.harness import IDIOMS, MESHES, STRATEGIES, check

load()

DEFAULT = (True, None, False, None, False, None)
"""By an idiom's place in the table, modulo six: whether it runs or is only planned by default, if at all."""
PLANS = list(itertools.product(STRATEGIES, MESHES))


def _cases() -> list[Any]:
    cases = []
    for i, name in enumerate(IDIOMS):
        for p, (strategy, mesh) in enumerate(PLANS):
            turn = p == (i + i // len(PLANS)) % len(PLANS)
            for run in (False, True):
                by_default = turn and DEFAULT[i % len(DEFAULT)] is run
                marks = () if by_default else (pytest.mark.full,)
                if run or by_default:
                    what = f"{name}-{strategy}-{mesh}{'' if run else '-planned'}"
                    cases.append(pytest.param(name, strategy, mesh, run, id=what, marks=marks))
    return cases


@pytest.mark.filterwarnings("ignore")  # of the libraries; what ffjax warns of is part of the outcome
@pytest.mark.parametrize(("name", "strategy", "mesh", "run"), _cases())
def test_idiom(name: str, strategy: str, mesh: Any, run: bool) -> None:
    outcome = check(IDIOMS[name], strategy, mesh, run=run)
    assert not outcome.failures, "\n".join(outcome.failures)


def test_frameworks_are_installed() -> None:
    if missing():
        pytest.skip(f"{missing()} are not installed, so their steps are left out: pip install 'ffjax[frameworks]'")
