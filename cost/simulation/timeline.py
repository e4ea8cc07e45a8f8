"""What a simulated step looks like: which stream does what, and when."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from ffjax.errors import FfjaxError

COMPUTE = "compute"
"""The stream of kernels; every other stream is named after the link that it stands for."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Interval:
    """One task on one stream. Seconds are counted from the beginning of the step.

    A collective that occupies several links is listed on each of their streams.
    """

    name: str
    stream: str
    start_s: float
    end_s: float
    source: str = ""
    """The source line that it comes from."""
    trips: float = 1.0
    """More than one for a block that stands for that many further trips of a loop, each like the trip before it."""
    critical: bool = False
    """Whether the step would end earlier if this were shorter."""
    repeats: float = 1.0
    """How often it runs in a step: what a loop's body does is listed for one trip. 0 for a block of further trips."""

    @property
    def seconds(self) -> float:
        return self.end_s - self.start_s


@dataclass(frozen=True, slots=True, kw_only=True)
class PathEntry:
    """What the critical path spends on tasks of one name and source line, all repeats together."""

    name: str
    stream: str
    source: str
    count: float
    seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Timeline:
    """A simulated step on one device.

    `compute_s` are the seconds of all kernels and `comm_s` those of all collectives (all trips), `exposed_comm_s` those
    in which a link is busy and the compute stream is not. `intervals` are in the order of time.
    """

    streams: tuple[str, ...]
    intervals: tuple[Interval, ...]
    step_s: float
    compute_s: float
    comm_s: float
    exposed_comm_s: float
    memory: tuple[tuple[float, float], ...] = ()
    """(seconds, bytes that are live from then on), in the order of time."""

    def busy_s(self, stream: str) -> float:
        """Seconds of a step in which a stream is busy."""
        return sum(i.seconds * i.repeats for i in self.intervals if i.stream == stream)

    def exposed_s(self, stream: str) -> float:
        """Seconds of a step in which a stream is busy and the compute stream is not; 0 for the compute stream."""
        kernels = [i for i in self.intervals if i.stream == COMPUTE and i.repeats]
        exposed, first = 0.0, 0
        for task in self.intervals:
            if task.stream != stream or stream == COMPUTE:
                continue
            # Both are in the order of time, and neither stream does two things at once.
            while first < len(kernels) and kernels[first].end_s <= task.start_s:
                first += 1
            covered, at = 0.0, first
            while at < len(kernels) and kernels[at].start_s < task.end_s:
                covered += min(task.end_s, kernels[at].end_s) - max(task.start_s, kernels[at].start_s)
                at += 1
            exposed += (task.seconds - covered) * task.repeats
        return exposed

    def critical_path(self) -> tuple[PathEntry, ...]:
        """What the step's time goes to: the tasks that follow each other without a gap, the heaviest first."""
        found: dict[tuple[str, str, str], tuple[float, float]] = {}
        end = 0.0
        for task in self.intervals:
            # A collective on several links is on the path once.
            if task.critical and task.repeats and task.start_s >= end:
                end = task.end_s
                key = (task.name, task.stream, task.source)
                count, seconds = found.get(key, (0.0, 0.0))
                found[key] = count + task.repeats, seconds + task.seconds * task.repeats
        entries = [
            PathEntry(name=name, stream=stream, source=source, count=count, seconds=seconds)
            for (name, stream, source), (count, seconds) in found.items()
        ]
        return tuple(sorted(entries, key=lambda e: -e.seconds))

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the timeline: `.json` opens in https://ui.perfetto.dev, `.html` is a report with plots.

        Raises FfjaxError for another suffix, and where the file cannot be written.
        """
        write = writer(path)
        try:
            Path(path).write_text(write(self), encoding="utf-8")
        except OSError as error:
            raise FfjaxError(
                f"cannot write {os.fspath(path)!r}: {error.strerror}. Remedy: a path in a folder that is there."
            ) from error


def writer(path: str | os.PathLike[str]) -> Callable[[Timeline], str]:
    """What makes the text of a file with this suffix; raises FfjaxError for another suffix than .json and .html."""
    from ffjax.cost.simulation.timeline_html import to_html
    from ffjax.cost.simulation.timeline_json import to_json

    formats: dict[str, Callable[[Timeline], str]] = {".json": to_json, ".html": to_html}
    found = formats.get(Path(path).suffix.lower())
    if found is None:
        raise FfjaxError(
            f"{os.fspath(path)!r}: a timeline is saved as {' or '.join(formats)}. Remedy: trace.json for "
            "https://ui.perfetto.dev, report.html for a report."
        )
    return found
