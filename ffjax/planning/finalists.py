"""Settling a search by compiling its best plans: the fastest whose compiled program fits."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from typing import TypeAlias

from ffjax.cost.cluster import Cluster
from ffjax.errors import BudgetError
from ffjax.plan import Plan
from ffjax.plan_record import Finalist
from ffjax.strategies.search import Progress, SearchResult
from ffjax.strategies.session import Found
from ffjax.units import amount, bytes_text
from ffjax.verifying import Verification, devices_for, verify

MOST_FINALISTS = 3
_ROUNDS = 3
"""Of searching again, in less memory, where no finalist fits once compiled."""
_MARGIN = 0.99

_Checked: TypeAlias = tuple[Verification, str, Plan]


def settle(
    result: SearchResult,
    cluster: Cluster,
    budget_bytes: float,
    search: Callable[[float], SearchResult],
    report: Callable[[SearchResult, Found], Plan],
    seconds: dict[str, float],
    progress: Progress | None,
) -> Plan:
    """Compiles the best plans of a search and takes the fastest, as compiled, that fits.

    Args:
      result: of the search within the whole budget.
      cluster: what is compiled for, here or not.
      budget_bytes: what one device may hold.
      search: searches again, within another budget.
      report: makes the plan of one of a search's findings.
      seconds: where the time went; that of compiling is added.
      progress: is told what is being compiled.

    Raises:
      BudgetError: where what fits by prediction does not fit once compiled, in less predicted memory either.
      ClusterError: where there is nothing to compile for.
    """
    devices = devices_for(cluster)
    allowed = budget_bytes
    checked: list[_Checked] = []
    for _ in range(_ROUNDS):
        began = time.perf_counter()
        checked = []
        finalists = _finalists(result)
        for done, found in enumerate(finalists):
            if progress:
                progress(f"compiles {found.strategy} on {found.mesh}", done / len(finalists))
            plan = report(result, found)
            checked.append((verify(plan, cluster, devices), found.strategy, plan))
        seconds["compile finalists"] = seconds.get("compile finalists", 0.0) + time.perf_counter() - began
        checked.sort(key=lambda entry: (not entry[0].fits, entry[0].compiled_step_s))
        if checked[0][0].fits:
            return _recorded(checked, seconds)
        # What the compiler needs beyond the prediction is not there for the next plan.
        used = max(v.planned_peak_bytes / v.compiled_peak_bytes for v, *_ in checked)
        allowed = _MARGIN * min(allowed, budget_bytes * used)
        result = search(allowed)
        if not result.best.fits:
            break
    least = min((v for v, *_ in checked), key=lambda v: v.compiled_peak_bytes)
    raise BudgetError(
        f"no plan fits {bytes_text(budget_bytes)} per device once compiled: the smallest, on {least.mesh}, needs "
        f"{bytes_text(least.compiled_peak_bytes)} ({bytes_text(least.planned_peak_bytes)} were predicted). Remedy: "
        f"memory={amount(least.compiled_peak_bytes)!r} or more, more devices, a smaller batch, or jax.checkpoint."
    )


def _finalists(result: SearchResult) -> list[Found]:
    """The fastest that fit; those with the same figures, which are one plan by several names, once."""
    distinct: dict[object, Found] = {}
    for found in sorted((f for f in result.found if f.fits), key=lambda f: f.predicted_s):
        distinct.setdefault((f"{found.step_s:.6g}", f"{found.peak.bytes:.6g}"), found)
    return list(distinct.values())[:MOST_FINALISTS]


def _recorded(checked: list[_Checked], seconds: dict[str, float]) -> Plan:
    best = checked[0][2]
    finalists = tuple(
        Finalist(
            strategy=strategy,
            mesh=v.mesh,
            step_s=v.planned_step_s,
            compiled_step_s=v.compiled_step_s,
            peak_bytes=v.planned_peak_bytes,
            compiled_peak_bytes=v.compiled_peak_bytes,
            fits=v.fits,
        )
        for v, strategy, _ in checked
    )
    spent = {**seconds, "total": sum(seconds.values())}
    return dataclasses.replace(best, search=dataclasses.replace(best.search, finalists=finalists, seconds=spent))
