"""Plots of reports, as inline SVG: points over two axes, and stacked bars."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from html import escape

WIDTH, HEIGHT, LEFT, BOTTOM, BAR = 900.0, 320.0, 90.0, 40.0, 24.0
"""Pixels: a plot, its margins, the height of a bar."""
LABELS = 260.0
"""Pixels for the names of bars."""
_TICKS = 5

STYLE = """.mark { fill: #3b6ea5; } .over { fill: #b0b0b0; } .line { fill: none; stroke: #8fb8de; }
.limit { stroke: #d1495b; stroke-dasharray: 4 3; } .grid { stroke: #e4e4e4; }
.compute { fill: #8fb8de; } .exposed { fill: #d1495b; } .memory { fill: #7fae73; }"""

Text = Callable[[float], str]


def points(
    marks: Sequence[tuple[float, float, str, bool]],
    *,
    x: str,
    y: str,
    x_text: Text,
    y_text: Text,
    limit: float | None = None,
) -> str:
    """Points joined by steps, each `(x, y, title, dimmed)`; `limit` is a vertical line where it is in sight."""
    if not marks:
        return "<p>none</p>"
    across = _scale([m[0] for m in marks], LEFT, WIDTH - 20)
    up = _scale([m[1] for m in marks], HEIGHT - BOTTOM, 20)
    lowest, highest = _around([m[0] for m in marks])
    parts = [_open(HEIGHT, f"{y} over {x}")]
    for tick in _ticks([m[0] for m in marks]):
        at = across(tick)
        parts.append(f'<line class="grid" x1="{at:.1f}" x2="{at:.1f}" y1="20" y2="{HEIGHT - BOTTOM:.0f}"/>')
        parts.append(_text(at, HEIGHT - BOTTOM + 14, x_text(tick), "middle"))
    for tick in _ticks([m[1] for m in marks]):
        at = up(tick)
        parts.append(f'<line class="grid" x1="{LEFT:.0f}" x2="{WIDTH - 20:.0f}" y1="{at:.1f}" y2="{at:.1f}"/>')
        parts.append(_text(LEFT - 6, at + 4, y_text(tick), "end"))
    if limit is not None and lowest <= limit <= highest:
        at = across(limit)
        parts.append(f'<line class="limit" x1="{at:.1f}" x2="{at:.1f}" y1="20" y2="{HEIGHT - BOTTOM:.0f}"/>')
    way = f"M{across(marks[0][0]):.1f},{up(marks[0][1]):.1f}"
    way += "".join(f" H{across(m[0]):.1f} V{up(m[1]):.1f}" for m in marks[1:])
    parts.append(f'<path class="line" d="{way}"/>')
    for left, top, title, dimmed in marks:
        parts.append(
            f'<circle class="{"over" if dimmed else "mark"}" cx="{across(left):.1f}" cy="{up(top):.1f}" r="5">'
            f"<title>{escape(title)}</title></circle>"
        )
    parts.append(_text((LEFT + WIDTH) / 2, HEIGHT - 8, x, "middle"))
    parts.append(_text(4, 14, y, "start"))
    return "\n".join(parts) + "\n</svg>"


def bars(
    rows: Sequence[tuple[str, Sequence[tuple[str, float]]]], *, text: Text, name: str, limit: float | None = None
) -> str:
    """Horizontal bars: each a label and its parts `(css class, amount)`, one after another; `limit` as in `points`."""
    longest = max((sum(amount for _, amount in parts) for _, parts in rows), default=0.0)
    if not longest:
        return "<p>none</p>"
    scale = (WIDTH - LABELS - 90) / longest
    height = BAR * len(rows) + 10
    drawn = [_open(height, name)]
    for index, (label, amounts) in enumerate(rows):
        top, left = BAR * index + 6, LABELS
        drawn.append(_text(LABELS - 6, top + 14, label, "end"))
        for kind, amount in amounts:
            drawn.append(
                f'<rect class="{kind}" x="{left:.1f}" y="{top:.0f}" width="{amount * scale:.1f}" '
                f'height="{BAR - 6:.0f}"><title>{escape(f"{label}: {kind} {text(amount)}")}</title></rect>'
            )
            left += amount * scale
        drawn.append(_text(left + 6, top + 14, text(sum(amount for _, amount in amounts)), "start"))
    if limit is not None and limit <= longest:
        at = LABELS + limit * scale
        drawn.append(f'<line class="limit" x1="{at:.1f}" x2="{at:.1f}" y1="0" y2="{height:.0f}"/>')
    return "\n".join(drawn) + "\n</svg>"


def _open(height: float, name: str) -> str:
    return f'<svg width="{WIDTH:.0f}" height="{height:.0f}" role="img" aria-label="{escape(name)}">'


def _text(x: float, y: float, text: str, anchor: str) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'


def _around(values: Sequence[float]) -> tuple[float, float]:
    """A range with some room around the values."""
    low, high = min(values), max(values)
    room = 0.06 * (high - low) or 0.1 * abs(high) or 1.0
    return low - room, high + room


def _scale(values: Sequence[float], first: float, last: float) -> Callable[[float], float]:
    low, high = _around(values)
    return lambda value: first + (value - low) / (high - low) * (last - first)


def _ticks(values: Sequence[float]) -> list[float]:
    low, high = _around(values)
    return [low + (high - low) * (i + 0.5) / _TICKS for i in range(_TICKS)]
