"""The command line: plans for clusters that are not there, plans side by side, and a demonstration.

Exit status: 0 if all is well, 1 where plans differ (`diff`) or loss curves do (`demo`), 2 for what cannot be done.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Concatenate, ParamSpec, TypeVar

import click
import jax
from jax.sharding import PartitionSpec
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

import ffjax
from ffjax import planner
from ffjax.cost.cluster import Cluster
from ffjax.demo import agree, report, run_demo, verdict
from ffjax.errors import BudgetError, FfjaxError
from ffjax.explain import bytes_text, seconds_text
from ffjax.plan import Competitor, Plan
from ffjax.strategies import all_strategies
from ffjax.strategies.search import AUTO, MOST_AXES
from ffjax.targets import Target, load_target

P = ParamSpec("P")
R = TypeVar("R")

LOCAL = "local"
PLAIN_WIDTH = 160
"""Of tables that go to no terminal."""


class _Commands(click.Group):
    """What ffjax raises on purpose is a message to the user, not a traceback."""

    def invoke(self, ctx: click.Context) -> object:
        try:
            return super().invoke(ctx)
        except FfjaxError as error:
            failed = click.ClickException(str(error))
            failed.exit_code = 2
            raise failed from error


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 120})
@click.version_option(ffjax.__version__, prog_name="ffjax")
def main() -> None:
    """Finds a fast way to run an ordinary single-device JAX train step on a cluster."""


# -- options


def _mesh(ctx: click.Context, param: click.Parameter, text: str | None) -> dict[str, int] | None:
    """`x=8,y=8`."""
    if text is None:
        return None
    mesh: dict[str, int] = {}
    for part in text.split(","):
        match = re.fullmatch(r"\s*([A-Za-z_]\w*)\s*=\s*([1-9]\d*)\s*", part)
        if match is None or match[1] in mesh:
            wrong = "names an axis twice" if match else f"has {part.strip()!r}"
            raise click.BadParameter(f"{text!r} {wrong}; write axes and their sizes, each once, such as x=8,y=8")
        mesh[match[1]] = int(match[2])
    return mesh


def _pins(ctx: click.Context, param: click.Parameter, texts: Sequence[str]) -> dict[str, PartitionSpec]:
    """`params/**/kernel=None,x`; also as plans print specs: `(-, x*y)`."""
    pins: dict[str, PartitionSpec] = {}
    for text in texts:
        pattern, equals, spec = text.rpartition("=")
        entries = [e.strip() for e in re.sub(r"^\((.*)\)$", r"\1", spec.strip()).split(",")]
        entries = [e for e in entries if e] if len(entries) < 2 or not entries[-1] else entries
        if (
            not equals
            or not pattern
            or not all(re.fullmatch(r"None|-|[A-Za-z_]\w*(\*[A-Za-z_]\w*)*", e) for e in entries)
        ):
            raise click.BadParameter(
                f"{text!r} is no pin; write a path pattern and for each dimension a mesh axis, several (x*y), or None: "
                "params/**/kernel=None,x"
            )
        if pattern in pins:
            raise click.BadParameter(f"{pattern!r} is pinned twice; leave one out")
        axes = [() if e in ("None", "-") else tuple(e.split("*")) for e in entries]
        pins[pattern] = PartitionSpec(*(a[0] if len(a) == 1 else a or None for a in axes))
    return pins


def _settings(ctx: click.Context, param: click.Parameter, texts: Sequence[str]) -> dict[str, str]:
    settings: dict[str, str] = {}
    for text in texts:
        name, equals, value = text.partition("=")
        if not equals or not name.strip().isidentifier():
            raise click.BadParameter(f"{text!r} sets nothing; write FIELD=VALUE, such as layers=48")
        settings[name.strip()] = value.strip()
    return settings


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class _Question:
    """What `plan` and `compare` ask: a step, a cluster, and what is fixed."""

    target: Target
    cluster: Cluster
    memory: str | None
    mesh: dict[str, int] | None
    pins: dict[str, PartitionSpec]
    donate: tuple[int, ...]


_OPTIONS = (
    click.argument("target", metavar="FILE.py:FUNCTION"),
    click.option(
        "--cluster", required=True, help="A shipped cluster's name, a TOML file, or 'local': what JAX sees here."
    ),
    click.option("--hosts", type=click.IntRange(min=1), help="Hosts of the cluster, in place of its own number."),
    click.option("--devices-per-host", type=click.IntRange(min=1), help="Devices of each host, likewise."),
    click.option("--memory", help="What one device may hold, such as 70GiB; by default all that it has."),
    click.option("--mesh", callback=_mesh, metavar="x=8,y=8", help="The mesh; by default meshes are searched too."),
    click.option(
        "--pin", "pins", multiple=True, callback=_pins, metavar="PATTERN=SPEC", help="As 'params/**/kernel=None,x'."
    ),
    click.option(
        "--args", "args_from", metavar="FUNCTION", help="Gives the arguments' shapes; by default example_args."
    ),
    click.option("--preset", help="A class method of the module's Config, such as gpt2."),
    click.option(
        "--set", "settings", multiple=True, callback=_settings, metavar="FIELD=VALUE", help="A field of the Config."
    ),
    click.option("--donate", multiple=True, type=int, help="An argument that the step replaces, by its number."),
)


def _with_question(command: Callable[Concatenate[_Question, P], R]) -> Callable[..., R]:
    """Gives a command the options that ask, and what they ask as its first argument."""

    @functools.wraps(command)
    def wrapped(
        target: str,
        cluster: str,
        hosts: int | None,
        devices_per_host: int | None,
        memory: str | None,
        mesh: dict[str, int] | None,
        pins: dict[str, PartitionSpec],
        args_from: str | None,
        preset: str | None,
        settings: dict[str, str],
        donate: tuple[int, ...],
        *args: P.args,
        **kwargs: P.kwargs,
    ) -> R:
        # A plan for a cluster that is not here needs no device, and must not take hold of one.
        if cluster != LOCAL and jax.config.jax_platforms is None:
            jax.config.update("jax_platforms", "cpu")
        described = _cluster(cluster, hosts, devices_per_host)
        loaded = load_target(target, args=args_from, preset=preset, settings=settings)
        asked = _Question(target=loaded, cluster=described, memory=memory, mesh=mesh, pins=pins, donate=donate)
        return command(asked, *args, **kwargs)

    for option in reversed(_OPTIONS):
        wrapped = option(wrapped)
    return wrapped


def _cluster(text: str, hosts: int | None, devices_per_host: int | None) -> Cluster:
    counts = {"hosts": hosts, "devices_per_host": devices_per_host}
    given = {name: count for name, count in counts.items() if count is not None}
    if text == LOCAL:
        if given:
            raise click.UsageError("--cluster local is what JAX sees here; leave --hosts and --devices-per-host out")
        return Cluster.local()
    if text.endswith(".toml") or "/" in text:
        return dataclasses.replace(Cluster.load(text), **given)  # type: ignore[arg-type]  # two counts, by their names
    return Cluster.named(text, **given)


@contextlib.contextmanager
def _progress() -> Iterator[Callable[[str, float], None]]:
    """A bar on standard error, so that standard output is the result alone; none where that is no terminal."""
    console = Console(stderr=True)
    columns = (
        BarColumn(),
        TextColumn("{task.percentage:3.0f}%"),
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


# -- commands


@main.command()
@_with_question
@click.option("--strategy", default=AUTO, show_default=True, help="auto, or a named strategy.")
@click.option("--out", type=click.Path(dir_okay=False), help="Where to write the plan as JSON.")
@click.option("--details", is_flag=True, help="Everything, not only what matters most.")
def plan(asked: _Question, strategy: str, out: str | None, details: bool) -> None:
    """Finds a plan for a cluster, which need not be there.

    The target is file.py:function or package.module:function. The shapes of its arguments come from `example_args` in
    the same module. Where the module has `Config` and `make_<function>(config)`, --preset and --set choose the sizes.

    \b
    ffjax plan examples/gpt.py:train_step --cluster h100 --hosts 8 --preset gpt3_6b7 --donate 0
    """
    with _progress() as tell:
        found = planner.plan(
            asked.target.step,
            *asked.target.args,
            cluster=asked.cluster,
            memory=asked.memory,
            strategy=strategy,
            mesh=asked.mesh,
            pins=asked.pins or None,
            donate_argnums=asked.donate,
            progress=tell,
        )
    click.echo(found.explain(details=details), nl=False)
    if out is not None:
        try:
            found.save(out)
        except OSError as error:
            raise FfjaxError(
                f"cannot write the plan to {out!r}: {error.strerror}. Remedy: give another --out."
            ) from error
        click.echo(f"\nwritten to {out}", err=True)


@main.command()
@click.argument("file", metavar="PLAN.json")
@click.option("--details", is_flag=True, help="Everything, not only what matters most.")
def explain(file: str, details: bool) -> None:
    """Says why a saved plan is as it is: what it costs, and what the runners-up would have cost."""
    click.echo(Plan.load(file).explain(details=details), nl=False)


@main.command()
@click.argument("before", metavar="A.json")
@click.argument("after", metavar="B.json")
@click.pass_context
def diff(ctx: click.Context, before: str, after: str) -> None:
    """Shows how two saved plans differ; exit status 1 if they do, as `diff` has it."""
    lines = Plan.load(before).diff(Plan.load(after))
    click.echo(lines, nl=False)
    ctx.exit(1 if lines else 0)


@main.command()
@_with_question
def compare(asked: _Question) -> None:
    """Puts the plan found and the named strategies side by side, each on its best mesh."""
    program = planner.trace_step(asked.target.step, asked.target.args, {}, donate_argnums=asked.donate)
    meshes = {str(m): m.as_dict() for m in asked.cluster.mesh_shapes(max_axes=MOST_AXES)}

    def planned(strategy: str, mesh: dict[str, int] | None, progress: Callable[[str, float], None] | None) -> Plan:
        return planner.plan_program(
            program,
            cluster=asked.cluster,
            memory=asked.memory,
            strategy=strategy,
            mesh=mesh,
            pins=asked.pins or None,
            progress=progress,
        )

    with _progress() as tell:
        auto = planned(AUTO, asked.mesh, tell)
        rows = [(AUTO, str(auto.mesh), *_figures(auto), "yes")]
        best: dict[str, Competitor] = {}
        for c in sorted(auto.search.competitors, key=lambda c: (not c.fits, c.step_s)):
            if c.strategy != AUTO:
                best.setdefault(c.strategy, c)
        for name, c in best.items():
            tell(f"{name} on {c.mesh}", 1.0)
            try:
                # The search reports only sums of what loses, so its mesh is solved again.
                figures = _figures(planned(name, asked.mesh or meshes[c.mesh], None))
            except BudgetError:
                figures = (seconds_text(c.step_s), "-", "-", bytes_text(c.peak_bytes))
            rows.append((name, c.mesh, *figures, "yes" if c.fits else "no"))
    table = Table("strategy", "mesh", "step", "compute", "communication", "peak", "fits")
    for row in rows:
        table.add_row(*row)
    console = _console()
    console.print(
        f"{auto.program} on {auto.devices} devices of {auto.cluster!r}, {bytes_text(auto.budget_bytes)} each: predictions"
    )
    console.print(table)
    if unused := sorted({s.name for s in all_strategies()} - best.keys()):
        console.print(f"no use for these meshes: {', '.join(unused)}")


def _figures(plan: Plan) -> tuple[str, str, str, str]:
    e = plan.estimate
    return seconds_text(e.step_s), seconds_text(e.compute_s), seconds_text(e.exposed_comm_s), bytes_text(e.peak_bytes)


@main.command()
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
        table.add_row(
            c.name, f"{c.hosts} x {c.devices_per_host}", c.device.kind, bytes_text(c.device.memory_bytes), links
        )
    return table


@main.command()
@click.option(
    "--config", default="small", show_default=True, type=click.Choice(["tiny", "small"]), help="The GPT's size."
)
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


if __name__ == "__main__":
    main()
