"""The commands about a step that is not planned yet: `ffjax plan`, `verify`, `compare` and `simulate`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import click
from rich.table import Table

from ffjax import verifying
from ffjax.cli.options import Question, with_question
from ffjax.cli.output import console_of_output, progress_bar, writing
from ffjax.comparing import HEADER
from ffjax.comparing import compare as compared
from ffjax.cost.simulation.timeline import writer
from ffjax.explain import short_source
from ffjax.pareto import front_of
from ffjax.pareto import writer as front_writer
from ffjax.plan import Plan
from ffjax.planning import planner
from ffjax.planning.options import FINALISTS, NEVER, SearchOptions
from ffjax.planning.remat import SEARCH
from ffjax.planning.tracing import trace_step
from ffjax.strategies.session import AUTO
from ffjax.units import seconds_text

TERMINAL = "-"
"""As a file: none."""
HEAVIEST = 12
"""Entries of the critical path that are shown."""


@click.command(short_help="Finds a plan for a cluster, which need not be there.")
@with_question
@click.option("--strategy", default=AUTO, show_default=True, help="auto, or a named strategy.")
@click.option("--out", type=click.Path(dir_okay=False), help="Where to write the plan as JSON.")
@click.option("--verify", is_flag=True, help="Compile the best few plans and take the fastest that then fits.")
@click.option(
    "--pareto",
    is_flag=False,
    flag_value=TERMINAL,
    metavar="[FILE]",
    help="Time against memory: a table, and front.html, .csv, .json, or a folder for all and every plan.",
)
@click.option("--details", is_flag=True, help="Everything, not only what matters most.")
def plan(asked: Question, strategy: str, out: str | None, verify: bool, pareto: str | None, details: bool) -> None:
    """Finds a plan for a cluster, which need not be there.

    The target is file.py:function or package.module:function. The shapes of its arguments come from `example_args` in
    the same module. Where the module has `Config` and `make_<function>(config)`, --preset and --set choose the sizes.

    \b
    ffjax plan examples/gpt.py:train_step --cluster h100 --hosts 8 --preset gpt3_6b7 --donate 0
    """
    if pareto is not None:
        if verify:
            raise click.UsageError("--pareto compiles nothing; leave --verify out, or plan once more within a budget")
        found = _front(asked, strategy, pareto)
    else:
        with progress_bar() as tell:
            found = _planned(asked, strategy, tell, verify=FINALISTS if verify else NEVER)
        click.echo(found.explain(details=details), nl=False)
    if out is not None:
        with writing(out, "--out"):
            found.save(out)


def _front(asked: Question, strategy: str, file: str) -> Plan:
    """Prints and saves the front of time against memory; its fastest plan that fits, or else its smallest."""
    if file != TERMINAL:
        front_writer(file)  # a wrong suffix is told before the search
    with progress_bar() as tell:
        search = _search(asked, strategy, tell)
        front = front_of(search, search.search(search.budget_bytes))
    click.echo(str(front))
    if file != TERMINAL:
        with writing(file, "--pareto"):
            front.save(file)
    return front.best or front.points[0].plan


@click.command(short_help="Compiles a plan: predicted beside compiled.")
@with_question
@click.option("--strategy", default=AUTO, show_default=True, help="auto, or a named strategy.")
@click.option("--plan", "file", metavar="PLAN.json", help="A saved plan of the step; by default one is searched.")
@click.pass_context
def verify(ctx: click.Context, asked: Question, strategy: str, file: str | None) -> None:
    """Compiles a plan and puts what was predicted beside what the compiler made of it; exit status 1 if it is too big.

    For the devices that are here, or, for a cluster that is not, for compile-only ones (pip install
    "ffjax[gpu-compile]"). Beside the figures stands what the program does that was not planned.

    \b
    ffjax verify examples/gpt.py:train_step --cluster h100 --donate 0 --strategy fsdp
    """
    with progress_bar() as tell:
        tell("traces the step", 0.0)
        if file is not None:
            found = Plan.load(file).bind(asked.target.step, *asked.target.args, donate_argnums=asked.donate)
        else:
            found = _planned(asked, strategy, tell)
        tell("compiles", 1.0)
        checked = verifying.verify(found, asked.cluster)
    click.echo(str(checked))
    ctx.exit(0 if checked.fits else 1)


@click.command(short_help="Puts all strategies side by side.")
@with_question
@click.option("--html", type=click.Path(dir_okay=False), help="Where to write a report with plots.")
@click.option(
    "--json", "as_json", is_flag=True, help="Prints figures in seconds and bytes as JSON, in place of a table."
)
@click.option("--pareto", is_flag=True, help="Adds the front of time against memory.")
def compare(asked: Question, html: str | None, as_json: bool, pareto: bool) -> None:
    """Puts the plan found and the named strategies side by side, each on its best mesh.

    Also those that do not fit, with what they need, and those that have no use for the step, with why.
    """
    with progress_bar() as tell:
        found = compared(_search(asked, AUTO, tell), front=pareto)
    if as_json:
        click.echo(found.to_json(), nl=False)
    else:
        console = console_of_output()
        console.print(found.title, soft_wrap=True, markup=False)
        side_by_side = Table(*HEADER)
        for row in found.rows:
            side_by_side.add_row(*row.texts())
        console.print(side_by_side)
        for name, why in sorted(found.unused.items()):
            console.print(f"{name} {why}", soft_wrap=True, markup=False)
        if found.front is not None:
            click.echo(f"\n{found.front}")
    if html is not None:
        with writing(html, "--html"):
            Path(html).write_text(found.to_html(), encoding="utf-8")


@click.command(short_help="Plays one step of a plan: streams, overlap.")
@with_question
@click.option("--strategy", default=AUTO, show_default=True, help="auto, or a named strategy.")
@click.option("--out", type=click.Path(dir_okay=False), help="trace.json (for ui.perfetto.dev) or report.html.")
def simulate(asked: Question, strategy: str, out: str | None) -> None:
    """Finds a plan and simulates a step of it on one device: which stream does what, what overlaps, and why it ends.

    Takes what `ffjax plan` takes.
    """
    if out is not None:
        writer(out)  # a wrong suffix is told before the search
    with progress_bar() as tell:
        found = _planned(asked, strategy, tell)
    timeline = found.simulate()
    console = console_of_output()
    console.print(
        f"{found.program} on {found.devices} devices of {found.cluster!r}, mesh {found.mesh}: step "
        f"{seconds_text(timeline.step_s)} = compute {seconds_text(timeline.compute_s)} + exposed communication "
        f"{seconds_text(timeline.exposed_comm_s)}",
        soft_wrap=True,
    )
    streams = Table("stream", "busy", "exposed")
    for stream in timeline.streams:
        streams.add_row(stream, seconds_text(timeline.busy_s(stream)), seconds_text(timeline.exposed_s(stream)))
    console.print(streams)
    path = Table("on the critical path", "count", "time", "of the step", "source")
    for entry in timeline.critical_path()[:HEAVIEST]:
        share = f"{entry.seconds / timeline.step_s:.1%}"
        path.add_row(entry.name, f"{entry.count:g}", seconds_text(entry.seconds), share, short_source(entry.source))
    console.print(path)
    if out is not None:
        with writing(out, "--out"):
            timeline.save(out)


def _planned(asked: Question, strategy: str, progress: Callable[[str, float], None], *, verify: str = NEVER) -> Plan:
    return planner.plan(
        asked.target.step,
        *asked.target.args,
        cluster=asked.cluster,
        memory=asked.memory,
        strategy=strategy,
        mesh=asked.mesh,
        pins=asked.pins or None,
        verify=verify,
        remat=asked.remat,
        donate_argnums=asked.donate,
        progress=progress,
    )


def _search(asked: Question, strategy: str, progress: Callable[[str, float], None]) -> planner.ProgramSearch:
    """What is asked of the step's program; with `--remat search` of the one that the fastest plan is for."""
    if asked.remat == SEARCH:
        program = _planned(asked, strategy, progress).bound.graph.program
    else:
        target = asked.target
        program = trace_step(target.step, target.args, {}, donate_argnums=asked.donate, remat=asked.remat)
    options = SearchOptions(
        cluster=asked.cluster,
        memory=asked.memory,
        strategy=strategy,
        mesh=asked.mesh,
        pins=asked.pins,
        progress=progress,
    )
    return planner.ProgramSearch(program, options)
