"""What a simulated step looks like: which stream does what, and when."""

from __future__ import annotations

from dataclasses import dataclass

COMPUTE = "compute"
"""The stream of kernels; every other stream is named after the link that it stands for."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Interval:
    """One task on one stream. Seconds are counted from the beginning of the step."""

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


@dataclass(frozen=True, slots=True, kw_only=True)
class Timeline:
    """A simulated step on one device.

    `compute_s` and `comm_s` are the seconds that the compute stream and the links' streams are busy (all trips),
    `exposed_comm_s` those in which a link is busy and the compute stream is not.
    """

    streams: tuple[str, ...]
    intervals: tuple[Interval, ...]
    step_s: float
    compute_s: float
    comm_s: float
    exposed_comm_s: float
    memory: tuple[tuple[float, float], ...] = ()
    """(seconds, bytes that are live from then on), in the order of time."""
