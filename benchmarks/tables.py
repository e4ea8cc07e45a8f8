"""Result files: a title, the command that made them, the versions, and a table."""

from __future__ import annotations

import platform
import sys
from collections.abc import Sequence
from pathlib import Path

import jax

RESULTS = Path(__file__).parent / "results"


def write(name: str, title: str, notes: Sequence[str], header: Sequence[str], rows: Sequence[Sequence[object]]) -> Path:
    """Writes `results/NAME.md` and prints it."""
    cells = [[str(c) for c in row] for row in [header, *rows]]
    widths = [max(len(row[i]) for row in cells) for i in range(len(header))]
    lines = [f"# {title}", "", f"    python {' '.join(sys.argv)}", ""]
    lines += [f"jax {jax.__version__}, Python {platform.python_version()}, {jax.default_backend()} backend.", ""]
    lines += [*notes, ""] if notes else []
    for index, row in enumerate(cells):
        lines.append("| " + " | ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)) + " |")
        if index == 0:
            lines.append("|" + "|".join("-" * (w + 2) for w in widths) + "|")
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.md"
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    print(path.read_text(encoding="utf-8"))
    return path
