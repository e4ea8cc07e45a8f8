"""The command line: plans for clusters that are not there, plans side by side, and a demonstration.

Exit status: 0 if all is well, 1 where plans differ (`diff`) or loss curves do (`demo`), 2 for what cannot be done.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import click
import jax
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

import ffjax
from ffjax import planner, verifying
from ffjax.cli_launch import launch_command
from ffjax.cli_options import LOCAL, Question, cluster_named, settings_of, with_question
from ffjax.cli_profile import cases_for, check_kinds, here_as, run_profile
from ffjax.comparing import HEADER
from ffjax.comparing import compare as compared
from ffjax.cost.cluster import Cluster
from ffjax.cost.simulation.timeline import writer
from ffjax.demo import agree, report, run_demo, verdict
from ffjax.errors import FfjaxError
from ffjax.explain import short_source
from ffjax.options import FINALISTS, NEVER, SearchOptions
from ffjax.pareto import front_of
from ffjax.pareto import writer as front_writer
from ffjax.plan import Plan
from ffjax.remat import SEARCH
from ffjax.strategies.session import AUTO
from ffjax.targets import load_target
from ffjax.units import bytes_text, seconds_text

PLAIN_WIDTH = 160
"""Of tables that go to no terminal."""
TERMINAL = "-"
"""As a file: none."""
HEAVIEST = 12
"""Entries of the critical path that are shown."""


class _Failure(click.ClickException):
    exit_code = 2  # 1 says that things differ


class _Commands(click.Group):
    """Listed in the order in which one meets them; what ffjax raises on purpose is a message, not a traceback."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(self.commands)

    def invoke(self, ctx: click.Context) -> object:
        try:
            return super().invoke(ctx)
        except FfjaxError as error:
            raise _Failure(str(error)) from error


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 120})
@click.version_option(ffjax.__version__, prog_name="ffjax")
def main() -> None:
    """Finds a fast way to run an ordinary single-device JAX train step on a cluster.

    \b
    ffjax demo                                               see it work here
    ffjax plan train.py:train_step --cluster h100 --hosts 2  plan for 16 H100s
    """


@contextlib.contextmanager
def _progress() -> Iterator[Callable[[str, float], None]]:
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


def _console() -> Console:
    console = Console(highlight=False)
    return console if console.is_terminal else Console(highlight=False, width=PLAIN_WIDTH)


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
        program = planner.trace_step(target.step, target.args, {}, donate_argnums=asked.donate, remat=asked.remat)
    options = SearchOptions(
        cluster=asked.cluster,
        memory=asked.memory,
        strategy=strategy,
        mesh=asked.mesh,
        pins=asked.pins,
        progress=progress,
    )
    return planner.ProgramSearch(program, options)


# -- commands


@main.command(short_help="Finds a plan for a cluster, which need not be there.")
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
        with _progress() as tell:
            found = _planned(asked, strategy, tell, verify=FINALISTS if verify else NEVER)
        click.echo(found.explain(details=details), nl=False)
    if out is not None:
        try:
            found.save(out)
        except OSError as error:
            raise FfjaxError(f"cannot write {out!r}: {error.strerror}. Remedy: give another --out.") from error
        click.echo(f"\nwritten to {out}", err=True)


def _front(asked: Question, strategy: str, file: str) -> Plan:
    """Prints and saves the front of time against memory; its fastest plan that fits, or else its smallest."""
    if file != TERMINAL:
        front_writer(file)  # a wrong suffix is told before the search
    with _progress() as tell:
        search = _search(asked, strategy, tell)
        front = front_of(search, search.search(search.budget_bytes))
    click.echo(str(front))
    if file != TERMINAL:
        front.save(file)
        click.echo(f"\nwritten to {file}", err=True)
    return front.best or front.points[0].plan


@main.command(short_help="Compiles a plan: predicted beside compiled.")
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
    with _progress() as tell:
        tell("traces the step", 0.0)
        if file is not None:
            found = Plan.load(file).bind(asked.target.step, *asked.target.args, donate_argnums=asked.donate)
        else:
            found = _planned(asked, strategy, tell)
        tell("compiles", 1.0)
        checked = verifying.verify(found, asked.cluster)
    click.echo(str(checked))
    ctx.exit(0 if checked.fits else 1)


@main.command(short_help="Says why a saved plan is as it is.")
@click.argument("file", metavar="PLAN.json")
@click.option("--details", is_flag=True, help="Everything, not only what matters most.")
def explain(file: str, details: bool) -> None:
    """Says why a saved plan is as it is: what it costs, and what the runners-up would have cost."""
    click.echo(Plan.load(file).explain(details=details), nl=False)


@main.command(short_help="Shows how two saved plans differ.")
@click.argument("before", metavar="A.json")
@click.argument("after", metavar="B.json")
@click.pass_context
def diff(ctx: click.Context, before: str, after: str) -> None:
    """Shows how two saved plans differ; exit status 1 if they do, as `diff` has it."""
    lines = Plan.load(before).diff(Plan.load(after))
    click.echo(lines, nl=False)
    ctx.exit(1 if lines else 0)


@main.command(short_help="Puts all strategies side by side.")
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
    with _progress() as tell:
        found = compared(_search(asked, AUTO, tell), front=pareto)
    if as_json:
        click.echo(found.to_json(), nl=False)
    else:
        console = _console()
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
        try:
            Path(html).write_text(found.to_html(), encoding="utf-8")
        except OSError as error:
            raise FfjaxError(f"cannot write {html!r}: {error.strerror}. Remedy: give another --html.") from error
        click.echo(f"\nwritten to {html}", err=True)


@main.command(short_help="Plays one step of a plan: streams, overlap.")
@with_question
@click.option("--strategy", default=AUTO, show_default=True, help="auto, or a named strategy.")
@click.option("--out", type=click.Path(dir_okay=False), help="trace.json (for ui.perfetto.dev) or report.html.")
def simulate(asked: Question, strategy: str, out: str | None) -> None:
    """Finds a plan and simulates a step of it on one device: which stream does what, what overlaps, and why it ends.

    Takes what `ffjax plan` takes.
    """
    if out is not None:
        writer(out)  # a wrong suffix is told before the search
    with _progress() as tell:
        found = _planned(asked, strategy, tell)
    timeline = found.simulate()
    console = _console()
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
        timeline.save(out)
        click.echo(f"\nwritten to {out}", err=True)


@main.command(short_help="Measures the devices that are here.")
@click.argument("target", metavar="[FILE.py:FUNCTION]", required=False)
@click.option("--cluster", default=LOCAL, show_default=True, help="Whose plans matter: as for `plan`.")
@click.option("--hosts", type=click.IntRange(min=1), help="Hosts of that cluster, in place of its own number.")
@click.option("--devices-per-host", type=click.IntRange(min=1), help="Devices of each host, likewise.")
@click.option("--plan", "plan_file", metavar="PLAN.json", help="Only the local shapes of this plan of the target.")
@click.option("--args", "args_from", metavar="FUNCTION", help="Gives the arguments' shapes, as example_args.")
@click.option("--preset", help="A class method of the module's Config, such as gpt2.")
@click.option("--set", "settings", multiple=True, callback=settings_of, metavar="FIELD=VALUE", help="Of the Config.")
@click.option("--donate", multiple=True, type=int, help="An argument that the step replaces, by its number.")
@click.option("--only", multiple=True, callback=check_kinds, help="Kinds of work; by default all.")
@click.option("--grid/--no-grid", default=True, help="Sizes that any program may have, after the target's.")
@click.option("--analyse", is_flag=True, help="Times nothing: asks XLA's cost analysis of the target's ops.")
@click.option("--seconds", default=300.0, show_default=True, type=click.FloatRange(min=1), help="When to stop.")
@click.option("--database", help="Where to keep it; by default where Cluster.local() looks.")
@click.option("--out", help="A text file (.toml) for all that is known of this kind of device and jax.")
@click.option("--cluster-out", help="A cluster file (.toml) with figures fitted to it.")
def profile(
    target: str | None,
    cluster: str,
    hosts: int | None,
    devices_per_host: int | None,
    plan_file: str | None,
    args_from: str | None,
    preset: str | None,
    settings: dict[str, str],
    donate: tuple[int, ...],
    only: Sequence[str],
    grid: bool,
    analyse: bool,
    seconds: float,
    database: str | None,
    out: str | None,
    cluster_out: str | None,
) -> None:
    """Measures the devices that are here: ops and collectives, for plans by measured costs.

    With a target the ops of its plans come first, at the local shapes that they have there. Results are added to a
    database; plans use it by themselves for the local devices, and elsewhere with --profile.

    \b
    ffjax profile --out h100.toml --cluster-out my-h100.toml
    ffjax profile examples/gpt.py:train_step --cluster h100 --hosts 8 --preset gpt2 --no-grid
    """
    if plan_file is not None and target is None:
        raise click.UsageError(
            "--plan needs the target that it is a plan of: ffjax profile FILE.py:FUNCTION --plan ..."
        )
    wanted = cluster_named(cluster, hosts, devices_per_host)
    here = here_as(wanted, timed=not analyse)
    loaded = None if target is None else load_target(target, args=args_from, preset=preset, settings=settings)
    with _progress() as tell:
        cases = cases_for(
            loaded,
            dataclasses.replace(wanted, profile=None),
            here,
            plan=plan_file,
            only=only,
            with_grid=grid and not analyse,
            donate=donate,
            progress=tell,
        )
    for line in run_profile(
        cases,
        here,
        seconds=seconds,
        timed=not analyse,
        analysed=analyse,
        database=database,
        out=out,
        cluster_out=cluster_out,
        progress=_progress(),
    ):
        click.echo(line)


@main.command(short_help="Lists devices and known clusters.")
def devices() -> None:
    """Shows what JAX sees here, how it is described, and which clusters are shipped."""
    console = _console()
    seen = Table("device", "kind", "platform", "process", title="what JAX sees", title_justify="left")
    for device in jax.devices():
        seen.add_row(str(device.id), device.device_kind, device.platform, str(device.process_index))
    console.print(seen)
    try:
        console.print(_clusters([Cluster.local()], "Cluster.local()"))
    except FfjaxError as error:
        console.print(f"Cluster.local(): {error}", markup=False)
    console.print(_clusters([Cluster.named(name) for name in Cluster.names()], "shipped clusters"))


def _clusters(clusters: Sequence[Cluster], title: str) -> Table:
    table = Table("name", "hosts x devices", "device", "memory", "links", title=title, title_justify="left")
    for c in clusters:
        links = ", ".join(link.name for link in c.links)
        counts, memory = c.device_counts, bytes_text(c.device.memory_bytes)
        table.add_row(c.name, counts, c.device.kind, memory, links)
    return table


@main.command(short_help="Trains a small GPT on fake CPU devices.")
@click.option("--config", default="small", show_default=True, type=click.Choice(["tiny", "small"]), help="Its size.")
@click.option("--steps", default=30, show_default=True, type=click.IntRange(min=2), help="Of training, in each run.")
@click.option("--devices", "count", default=8, show_default=True, type=click.IntRange(min=2), help="Fake CPU devices.")
@click.pass_context
def demo(ctx: click.Context, config: str, steps: int, count: int) -> None:
    """Trains a small GPT on fake CPU devices: unsharded, data parallel, and with the plan found.

    From the same initial state and batches the three loss curves must agree; exit status 1 if they do not.
    """
    console = _console()
    with _progress() as tell:
        runs = run_demo(config, steps, count, lambda name, what, share: tell(f"{name}: {what}", share))
    report(runs, console)
    console.print(verdict(runs), style="bold")
    ctx.exit(0 if agree(runs) else 1)


main.add_command(launch_command)

if __name__ == "__main__":
    main()
