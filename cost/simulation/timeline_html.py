"""A timeline as one static HTML page: figures, a plot of the streams, one of memory, the critical path.

Needs nothing beside itself: plots are inline SVG. Tasks narrower than a pixel are drawn as one with their neighbours.
"""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from typing import TYPE_CHECKING

from ffjax.cost.html_page import html_table, page

if TYPE_CHECKING:
    from ffjax.cost.simulation.timeline import Interval, Timeline

WIDTH, LANE, MEMORY = 1200.0, 26.0, 160.0
"""Pixels: the plots' width, the height of a stream, the height of the memory plot."""
MOST_ENTRIES = 30
_PIXEL = 1.0

_STYLE = """.task { fill: #8fb8de; } .critical { fill: #d1495b; } .loop { fill: #c9c9c9; }
.memory { fill: #e3eee0; stroke: #5a8f4e; }"""


def to_html(timeline: Timeline) -> str:
    """The text of the page."""
    rows = [(s, _ms(timeline.busy_s(s)), _ms(timeline.exposed_s(s))) for s in timeline.streams]
    path = [
        (e.name, e.stream, f"{e.count:g}", _ms(e.seconds), f"{e.seconds / timeline.step_s:.1%}", e.source)
        for e in timeline.critical_path()[:MOST_ENTRIES]
    ]
    peak = max((size for _, size in timeline.memory), default=0.0)
    comm, exposed = _ms(timeline.comm_s), _ms(timeline.exposed_comm_s)
    return page(
        "ffjax: a simulated step",
        [
            f"<h1>A simulated step: {_ms(timeline.step_s)}</h1>",
            f"<p>compute {_ms(timeline.compute_s)}, communication {comm}, of which {exposed} exposed</p>",
            "<h2>Streams</h2>",
            "<p>Red: the critical path. Grey: further trips of a loop, each like the one before it.</p>",
            html_table(("stream", "busy", "exposed"), rows),
            _lanes(timeline),
            f"<h2>Memory, up to {peak / 2**30:.3g} GiB</h2>",
            _memory(timeline, peak),
            "<h2>Critical path</h2>",
            html_table(("task", "stream", "count", "time", "of the step", "source"), path),
        ],
        _STYLE,
    )


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:.4g} ms"


def _lanes(timeline: Timeline) -> str:
    scale = WIDTH / timeline.step_s if timeline.step_s else 0.0
    height = LANE * len(timeline.streams)
    parts = [f'<svg width="{WIDTH:.0f}" height="{height + 16:.0f}" role="img" aria-label="streams over time">']
    for lane, stream in enumerate(timeline.streams):
        top = lane * LANE
        for kind, tasks in _merged([i for i in timeline.intervals if i.stream == stream], scale):
            left, right = tasks[0].start_s * scale, tasks[-1].end_s * scale
            what = tasks[0].name if len(tasks) == 1 else f"{len(tasks)} tasks, {tasks[0].name} ... {tasks[-1].name}"
            title = f"{what}, {_ms(tasks[-1].end_s - tasks[0].start_s)}"
            parts.append(
                f'<rect class="{kind}" x="{left:.2f}" y="{top + 2:.0f}" width="{max(right - left, 0.2):.2f}" '
                f'height="{LANE - 4:.0f}"><title>{escape(title)}</title></rect>'
            )
        parts.append(f'<text x="4" y="{top + LANE - 9:.0f}">{escape(stream)}</text>')
    parts.append(f'<text x="4" y="{height + 12:.0f}">0</text>')
    parts.append(f'<text x="{WIDTH - 4:.0f}" y="{height + 12:.0f}" text-anchor="end">{_ms(timeline.step_s)}</text>')
    return "\n".join(parts) + "\n</svg>"


def _merged(tasks: Sequence[Interval], scale: float) -> list[tuple[str, list[Interval]]]:
    """Tasks of one stream, those that share a pixel together, with how to draw them."""
    drawn: list[tuple[str, list[Interval]]] = []
    for task in tasks:
        kind = "loop" if not task.repeats else "critical" if task.critical else "task"
        if drawn:
            last_kind, last = drawn[-1]
            if kind == last_kind and (task.end_s - last[0].start_s) * scale < _PIXEL:
                last.append(task)
                continue
        drawn.append((kind, [task]))
    return drawn


def _memory(timeline: Timeline, peak: float) -> str:
    if not timeline.memory or not peak or not timeline.step_s:
        return "<p>not known</p>"
    across, up = WIDTH / timeline.step_s, (MEMORY - 10) / peak
    # Of the points in one pixel the highest is drawn.
    columns: dict[int, float] = {}
    for seconds, size in timeline.memory:
        x = int(seconds * across)
        columns[x] = max(columns.get(x, 0.0), size)
    points, level = [f"0,{MEMORY:.0f}"], 0.0
    for x, size in columns.items():
        points += [f"{x},{MEMORY - level * up:.1f}", f"{x},{MEMORY - size * up:.1f}"]
        level = size
    points += [f"{WIDTH:.0f},{MEMORY - level * up:.1f}", f"{WIDTH:.0f},{MEMORY:.0f}"]
    return (
        f'<svg width="{WIDTH:.0f}" height="{MEMORY:.0f}" role="img" aria-label="memory over time">'
        f'<polygon class="memory" points="{" ".join(points)}"/></svg>'
    )
