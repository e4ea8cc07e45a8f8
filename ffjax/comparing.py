"""The strategies side by side: what each costs on its best mesh, what it needs if it does not fit, why it has no use.

All figures come from one search, in which every named strategy competes.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from html import escape

from ffjax import plots
from ffjax.cost.collectives import CollectiveModel
from ffjax.cost.estimate import estimate
from ffjax.cost.html_page import html_table, page
from ffjax.pareto import Front, front_of
from ffjax.planning.planner import ProgramSearch
from ffjax.strategies.search import SearchResult
from ffjax.strategies.session import AUTO, Found
from ffjax.units import amount, bytes_text, seconds_text

HEADER = ("strategy", "mesh", "step", "compute", "exposed communication", "peak", "")


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """A strategy on its best mesh; where it fits on none, on that on which it needs least memory."""

    strategy: str
    mesh: str
    step_s: float
    compute_s: float
    comm_s: float
    exposed_comm_s: float
    peak_bytes: float
    fits: bool

    def texts(self) -> tuple[str, ...]:
        """As in `HEADER`."""
        return (
            self.strategy,
            self.mesh,
            seconds_text(self.step_s),
            seconds_text(self.compute_s),
            seconds_text(self.exposed_comm_s),
            bytes_text(self.peak_bytes),
            "" if self.fits else f"does not fit: needs {amount(self.peak_bytes)}",
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """`rows`: the search's own plan, then the named strategies, the fastest first, those that do not fit last."""

    program: str
    cluster: str
    devices: int
    budget_bytes: float
    rows: tuple[Row, ...]
    unused: Mapping[str, str]
    """Strategies that have no row, and why."""
    front: Front | None = None

    @property
    def title(self) -> str:
        budget = bytes_text(self.budget_bytes)
        return f"{self.program} on {self.devices} devices of {self.cluster!r}, {budget} each: predictions"

    def to_json(self) -> str:
        """Figures in seconds and bytes."""
        content = {
            "program": self.program,
            "cluster": self.cluster,
            "devices": self.devices,
            "budget_bytes": self.budget_bytes,
            "strategies": [dataclasses.asdict(row) for row in self.rows],
            "unused": dict(self.unused),
            **({} if self.front is None else {"pareto": self.front.to_plain()}),
        }
        return json.dumps(content, indent=1) + "\n"

    def to_html(self) -> str:
        """A page with the table, a plot of the steps, one of the peaks, and the front if it was asked for."""
        steps = [(r.strategy, [("compute", r.compute_s), ("exposed", r.exposed_comm_s)]) for r in self.rows]
        peaks = [(r.strategy, [("memory" if r.fits else "over", r.peak_bytes)]) for r in self.rows]
        parts = [
            f"<h1>{escape(self.title)}</h1>",
            html_table(HEADER, [row.texts() for row in self.rows]),
            "<h2>Step</h2><p>Blue: kernels. Red: communication that no kernel hides.</p>",
            plots.bars(steps, text=seconds_text, name="seconds of a step"),
            "<h2>Peak memory of one device</h2><p>Grey: does not fit. Dashed: the budget.</p>",
            plots.bars(peaks, text=bytes_text, name="peak bytes", limit=self.budget_bytes),
        ]
        if self.front is not None:
            parts += ["<h2>Time against memory</h2>", self.front.plot()]
        if self.unused:
            parts += ["<h2>No use here</h2>", html_table(("strategy", "why"), list(self.unused.items()))]
        return page(self.title, parts, plots.STYLE)


def compare(asked: ProgramSearch, *, front: bool = False) -> Comparison:
    """Searches once and puts all strategies side by side; it is no error if none fits.

    `front`: adds the Pareto front of time against memory.
    """
    result = asked.search(asked.budget_bytes)
    best: dict[str, Found] = {}
    for found in result.found:
        if found.strategy != AUTO and (found.strategy not in best or _rank(found) < _rank(best[found.strategy])):
            best[found.strategy] = found
    rows = sorted((_row(result, name, f) for name, f in best.items()), key=lambda r: (not r.fits, r.step_s))
    return Comparison(
        program=asked.program.name,
        cluster=asked.cluster.name,
        devices=asked.cluster.devices,
        budget_bytes=asked.budget_bytes,
        rows=(_row(result, AUTO, result.best), *rows),
        unused=result.unused,
        front=front_of(asked, result) if front else None,
    )


def _rank(found: Found) -> tuple[bool, float]:
    return (False, found.predicted_s) if found.fits else (True, found.peak.bytes)


def _row(result: SearchResult, name: str, found: Found) -> Row:
    simulated = found.simulated
    if simulated is None and result.session.cluster.async_collectives:
        simulated = result.session.simulated(found.layout)
    figures = estimate(
        found.layout, result.kernels, CollectiveModel(found.mesh, result.session.cluster), found.peak, simulated
    )
    return Row(
        strategy=name,
        mesh=str(found.mesh),
        step_s=figures.step_s,
        compute_s=figures.compute_s,
        comm_s=figures.comm_s,
        exposed_comm_s=figures.exposed_comm_s,
        peak_bytes=figures.peak_bytes,
        fits=found.fits,
    )
