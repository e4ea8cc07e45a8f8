"""The command line, `ffjax`: what it prints, and with which status it ends. Commands that take more are in its modules.

Exit status: 0 if all is well, 1 where plans differ (`diff`) or loss curves do (`demo`), 2 for what cannot be done.
"""

from __future__ import annotations

from collections.abc import Sequence

import click
import jax
from rich.table import Table

import ffjax
from ffjax.cli.launching import launch_command
from ffjax.cli.output import console_of_output, progress_bar
from ffjax.cli.profiling import profile_command
from ffjax.cli.steps import compare, plan, simulate, verify
from ffjax.cost.cluster import Cluster
from ffjax.demo import agree, report, run_demo, verdict
from ffjax.errors import FfjaxError
from ffjax.plan import Plan
from ffjax.units import bytes_text


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


@click.command(short_help="Says why a saved plan is as it is.")
@click.argument("file", metavar="PLAN.json")
@click.option("--details", is_flag=True, help="Everything, not only what matters most.")
def explain(file: str, details: bool) -> None:
    """Says why a saved plan is as it is: what it costs, and what the runners-up would have cost."""
    click.echo(Plan.load(file).explain(details=details), nl=False)


@click.command(short_help="Shows how two saved plans differ.")
@click.argument("before", metavar="A.json")
@click.argument("after", metavar="B.json")
@click.pass_context
def diff(ctx: click.Context, before: str, after: str) -> None:
    """Shows how two saved plans differ; exit status 1 if they do, as `diff` has it."""
    lines = Plan.load(before).diff(Plan.load(after))
    click.echo(lines, nl=False)
    ctx.exit(1 if lines else 0)


@click.command(short_help="Lists devices and known clusters.")
def devices() -> None:
    """Shows what JAX sees here, how it is described, and which clusters are shipped."""
    console = console_of_output()
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


@click.command(short_help="Trains a small GPT on fake CPU devices.")
@click.option("--config", default="small", show_default=True, type=click.Choice(["tiny", "small"]), help="Its size.")
@click.option("--steps", default=30, show_default=True, type=click.IntRange(min=2), help="Of training, in each run.")
@click.option("--devices", "count", default=8, show_default=True, type=click.IntRange(min=2), help="Fake CPU devices.")
@click.pass_context
def demo(ctx: click.Context, config: str, steps: int, count: int) -> None:
    """Trains a small GPT on fake CPU devices: unsharded, data parallel, and with the plan found.

    From the same initial state and batches the three loss curves must agree; exit status 1 if they do not.
    """
    console = console_of_output()
    with progress_bar() as tell:
        runs = run_demo(config, steps, count, lambda name, what, share: tell(f"{name}: {what}", share))
    report(runs, console)
    console.print(verdict(runs), style="bold")
    ctx.exit(0 if agree(runs) else 1)


for command in (plan, verify, explain, diff, compare, simulate, profile_command, devices, demo, launch_command):
    main.add_command(command)
