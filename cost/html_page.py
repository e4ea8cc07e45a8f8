"""What static HTML reports share: one page that needs nothing beside itself, and tables."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape

_PAGE = """<!doctype html>
<html lang="en"><meta charset="utf-8"><title>{title}</title>
<style>
body {{ font: 14px/1.5 system-ui, sans-serif; margin: 2em; color: #222; }}
table {{ border-collapse: collapse; margin: 1em 0; }}
th, td {{ text-align: left; padding: 2px 12px; border-bottom: 1px solid #ddd; }}
svg {{ background: #fafafa; border: 1px solid #ddd; display: block; }} text {{ font-size: 11px; }}
{style}
</style>
{body}
</html>
"""


def page(title: str, parts: Iterable[str], style: str = "") -> str:
    """The text of a page: `parts` are HTML, `style` is what its plots need of CSS."""
    return _PAGE.format(title=escape(title), style=style, body="\n".join(parts))


def html_table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table of plain texts."""

    def line(tag: str, cells: Sequence[str]) -> str:
        return "<tr>" + "".join(f"<{tag}>{escape(c)}</{tag}>" for c in cells) + "</tr>"

    return "<table>" + line("th", header) + "\n".join(line("td", row) for row in rows) + "</table>"
