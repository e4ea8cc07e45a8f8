"""`ffjax.pareto`: the plans of which no other is both faster and smaller, from one search."""

from __future__ import annotations

import csv
import dataclasses
import io
import json
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

from ffjax import plots
from ffjax.arguments import Names, Numbers
from ffjax.cost.cluster import Cluster
from ffjax.cost.html_page import html_table, page
from ffjax.cost.simulation.limits import MoreMemory
from ffjax.errors import FfjaxError
from ffjax.explain import table
from ffjax.plan import Plan
from ffjax.planning.inputs import warn_if_batch_is_whole
from ffjax.planning.options import SearchOptions
from ffjax.planning.pins import Pins
from ffjax.planning.planner import ProgramSearch
from ffjax.planning.tracing import trace_step
from ffjax.strategies.pareto import pareto_front
from ffjax.strategies.search import Progress, SearchResult
from ffjax.strategies.session import AUTO
from ffjax.units import amount, bytes_text, seconds_text

GIB = 2**30
_HEADER = ("peak", "step", "mesh", "strategy", "", "one GiB more saves")


@dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    """One plan of a front, and what it is a point of: a named strategy, or the free search."""

    strategy: str
    plan: Plan

    @property
    def step_s(self) -> float:
        return self.plan.estimate.step_s

    @property
    def peak_bytes(self) -> float:
        return self.plan.estimate.peak_bytes

    @property
    def fits(self) -> bool:
        return self.peak_bytes <= self.plan.budget_bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Front:
    """Time against memory: each point is slower than the next one and needs less memory. Plans can be saved and run."""

    program: str
    cluster: str
    devices: int
    budget_bytes: float
    points: tuple[Point, ...]

    @property
    def best(self) -> Plan | None:
        """The fastest that fits the budget; None if none does."""
        return next((p.plan for p in reversed(self.points) if p.fits), None)

    def __str__(self) -> str:
        """A table, the smallest plan first."""
        budget = bytes_text(self.budget_bytes)
        head = f"{self.program} on {self.devices} devices of {self.cluster!r}, {budget} each: time against memory"
        return "\n".join([head, *table([_HEADER, *self.rows()], empty="none")])

    def rows(self) -> list[tuple[str, ...]]:
        """Of each point: peak, step, mesh, strategy, whether it does not fit, and the price of memory to the next."""
        return [
            (
                amount(p.peak_bytes),
                seconds_text(p.step_s),
                str(p.plan.mesh),
                p.strategy,
                "" if p.fits else "does not fit",
                "" if (price := self.saved_s_per_gib(i)) is None else seconds_text(price),
            )
            for i, p in enumerate(self.points)
        ]

    def saved_s_per_gib(self, index: int) -> float | None:
        """Seconds by which a step is shorter for each GiB more, from one point to the next; None for the last."""
        if index + 1 == len(self.points):
            return None
        here, larger = self.points[index : index + 2]
        return (here.step_s - larger.step_s) / (larger.peak_bytes - here.peak_bytes) * GIB

    def to_csv(self) -> str:
        """Figures in seconds and bytes, with a header."""
        out = io.StringIO()
        write = csv.writer(out, lineterminator="\n")
        write.writerow(("step_s", "peak_bytes", "mesh", "strategy", "fits"))
        for p in self.points:
            write.writerow((p.step_s, p.peak_bytes, p.plan.mesh, p.strategy, "yes" if p.fits else "no"))
        return out.getvalue()

    def to_plain(self) -> dict[str, object]:
        """Figures in seconds and bytes, as JSON has them."""
        points = [
            {
                "step_s": p.step_s,
                "peak_bytes": p.peak_bytes,
                "mesh": p.plan.mesh_shape,
                "strategy": p.strategy,
                "fits": p.fits,
            }
            for p in self.points
        ]
        return {"budget_bytes": self.budget_bytes, "points": points}

    def plot(self) -> str:
        """The points as inline SVG; the dashed line is the budget."""
        marks = [
            (p.peak_bytes, p.step_s, ", ".join(text for text in row[:5] if text), not p.fits)
            for p, row in zip(self.points, self.rows(), strict=True)
        ]
        return plots.points(
            marks,
            x="peak bytes of one device",
            y="step",
            x_text=bytes_text,
            y_text=seconds_text,
            limit=self.budget_bytes,
        )

    def to_html(self) -> str:
        """A page with the plot and the table."""
        title = f"{self.program} on {self.devices} devices of {self.cluster}: time against memory"
        return page(title, [f"<h1>{escape(title)}</h1>", self.plot(), html_table(_HEADER, self.rows())], plots.STYLE)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the front: `.html` with a plot, `.csv` or `.json` with figures; into a folder all, and every plan.

        Plans are called by their place and peak, such as `0-8.19GiB.json`. Raises FfjaxError for another suffix, and
        where nothing can be written.
        """
        write, target = writer(path), Path(path)
        try:
            if write is not None:
                target.write_text(write(self), encoding="utf-8")
                return
            target.mkdir(parents=True, exist_ok=True)
            for suffix, format_ in _FORMATS.items():
                target.joinpath(f"front{suffix}").write_text(format_(self), encoding="utf-8")
            for index, point in enumerate(self.points):
                point.plan.save(target / f"{index}-{amount(point.peak_bytes)}.json")
        except OSError as error:
            raise FfjaxError(
                f"cannot write {os.fspath(path)!r}: {error.strerror}. Remedy: a path in a folder that is there."
            ) from error


def _json(front: Front) -> str:
    return json.dumps(front.to_plain(), indent=1) + "\n"


_FORMATS: dict[str, Callable[[Front], str]] = {".html": Front.to_html, ".csv": Front.to_csv, ".json": _json}


def writer(path: str | os.PathLike[str]) -> Callable[[Front], str] | None:
    """What makes the text of a file with this suffix, None for a folder; raises FfjaxError for another suffix."""
    suffix = Path(path).suffix.lower()
    if suffix and suffix not in _FORMATS:
        raise FfjaxError(
            f"{os.fspath(path)!r}: a front is saved as {', '.join(_FORMATS)}, or into a folder. Remedy: front.html for "
            "a plot, front.csv for figures, front/ for both and every plan."
        )
    return _FORMATS.get(suffix)


def pareto(
    step: Callable[..., Any],
    *args: Any,
    cluster: Cluster | None = None,
    memory: str | float | None = None,
    strategy: str = AUTO,
    mesh: Mapping[str, int] | None = None,
    pins: Pins | None = None,
    static_argnums: Numbers = None,
    static_argnames: Names = None,
    donate_argnums: Numbers = None,
    donate_argnames: Names = None,
    progress: Progress | None = None,
    **kwargs: Any,
) -> Front:
    """The front of time against memory for one step: what each budget between the least and the most would buy.

    Takes what `ffjax.plan` takes, and searches once. `memory` only says which points fit: it is no error if none does.

    Raises:
      TraceError, ClusterError, PinError, PlanError: each names the input and the remedy.
    """
    began = time.perf_counter()
    program = trace_step(
        step,
        args,
        kwargs,
        static_argnums=static_argnums,
        static_argnames=static_argnames,
        donate_argnums=donate_argnums,
        donate_argnames=donate_argnames,
    )
    options = SearchOptions(cluster=cluster, memory=memory, strategy=strategy, mesh=mesh, pins=pins, progress=progress)
    asked = ProgramSearch(program, options, trace_s=time.perf_counter() - began)
    result = asked.search(asked.budget_bytes)
    warn_if_batch_is_whole(asked.regions, result, stacklevel=3)
    return front_of(asked, result)


def front_of(asked: ProgramSearch, result: SearchResult) -> Front:
    """The front that a search leads to."""
    began = time.perf_counter()
    found = pareto_front(result, progress=asked.progress)
    asked.seconds["pareto"] = time.perf_counter() - began
    front = Front(
        program=asked.program.name,
        cluster=asked.cluster.name,
        devices=asked.cluster.devices,
        budget_bytes=asked.budget_bytes,
        points=tuple(Point(strategy=f.strategy, plan=asked.plan(result, f)) for f in found),
    )
    return dataclasses.replace(
        front, points=tuple(_with_price(front, index, point) for index, point in enumerate(front.points))
    )


def _with_price(front: Front, index: int, point: Point) -> Point:
    """The point, its plan knowing what the next one would need and save."""
    price = front.saved_s_per_gib(index)
    more = None
    if price is not None:
        larger = front.points[index + 1]
        more = MoreMemory(saved_s_per_gib=price, peak_bytes=larger.peak_bytes, step_s=larger.step_s)
    limits = point.plan.limits
    assert limits is not None  # only plans of older files have none
    return dataclasses.replace(
        point, plan=dataclasses.replace(point.plan, limits=dataclasses.replace(limits, memory=more))
    )
