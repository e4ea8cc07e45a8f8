"""What commands print on: a bar of progress, tables, and files."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import click
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn

from ffjax.errors import FfjaxError

PLAIN_WIDTH = 160
"""Of tables that go to no terminal."""


@contextlib.contextmanager
def progress_bar() -> Iterator[Callable[[str, float], None]]:
    """A bar on standard error, so that standard output is the result alone; none where that is no terminal."""
    console = Console(stderr=True)
    columns = (
        BarColumn(),
        TaskProgressColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.description}"),
    )
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("traces the step", total=1.0)

        def tell(what: str, share: float) -> None:
            bar.update(task, description=what, completed=share)

        yield tell


def console_of_output() -> Console:
    """Standard output, for tables."""
    console = Console(highlight=False)
    return console if console.is_terminal else Console(highlight=False, width=PLAIN_WIDTH)


@contextlib.contextmanager
def writing(path: str, option: str) -> Iterator[None]:
    """Says on standard error that the file that `option` names was written; raises FfjaxError where it cannot be."""
    try:
        yield
    except OSError as error:
        raise FfjaxError(f"cannot write {path!r}: {error.strerror}. Remedy: give another {option}.") from error
    click.echo(f"\nwritten to {path}", err=True)
