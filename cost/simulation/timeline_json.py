"""A timeline as trace events: what https://ui.perfetto.dev and chrome://tracing open.

Format: "Trace Event Format" (Google, 2016). Each stream is a thread of one process, memory is a counter; times are
microseconds.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ffjax.cost.simulation.timeline import Timeline

_US = 1e6


def to_json(timeline: Timeline) -> str:
    """The text of a trace file."""
    threads = {stream: number for number, stream in enumerate(timeline.streams)}
    events: list[dict[str, object]] = [_meta("process_name", 0, {"name": "one device"})]
    for stream, thread in threads.items():
        events += [
            _meta("thread_name", thread, {"name": stream}),
            _meta("thread_sort_index", thread, {"sort_index": thread}),
        ]
    for task in timeline.intervals:
        events.append(
            {
                "ph": "X",
                "name": task.name,
                "cat": "critical" if task.critical else "task",
                "pid": 0,
                "tid": threads[task.stream],
                "ts": task.start_s * _US,
                "dur": task.seconds * _US,
                "args": {"source": task.source, "critical": task.critical, "repeats in a step": task.repeats},
            }
        )
    for seconds, size in timeline.memory:
        events.append({"ph": "C", "name": "memory", "pid": 0, "ts": seconds * _US, "args": {"bytes": size}})
    figures = {
        "step_s": timeline.step_s,
        "compute_s": timeline.compute_s,
        "comm_s": timeline.comm_s,
        "exposed_comm_s": timeline.exposed_comm_s,
    }
    content = {"traceEvents": events, "displayTimeUnit": "ms", "otherData": figures}
    return json.dumps(content, separators=(",", ":")) + "\n"


def _meta(name: str, thread: int, args: dict[str, object]) -> dict[str, object]:
    return {"ph": "M", "name": name, "pid": 0, "tid": thread, "args": args}
