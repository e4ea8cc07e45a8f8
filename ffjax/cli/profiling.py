"""`ffjax profile`: measures the devices that are here."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from statistics import median

import click
import jax

from ffjax.cli.options import LOCAL, cluster_named, settings_of
from ffjax.cli.output import progress_bar
from ffjax.cli.targets import Target, load_target
from ffjax.cost.cluster import Cluster
from ffjax.cost.profiles import store as profile_store
from ffjax.cost.profiles.calibrate import calibrated, cluster_text
from ffjax.cost.profiles.files import replace_file
from ffjax.cost.profiles.profile import Profile
from ffjax.cost.profiles.store import ProfileStore
from ffjax.cost.profiles.text import to_text
from ffjax.errors import FfjaxError
from ffjax.plan import Plan
from ffjax.planning.tracing import trace_step
from ffjax.profiling.grid import grid, kinds
from ffjax.profiling.measure import Case, Measured, Progress, describe
from ffjax.profiling.profile import layouts_of, needs, profile

_SHOWN = 5


def _check_kinds(ctx: click.Context, param: click.Parameter, names: Sequence[str]) -> Sequence[str]:
    unknown = [name for name in names if name not in kinds()]
    if unknown:
        raise click.BadParameter(f"{unknown[0]!r} is no kind of work; known: {', '.join(kinds())}")
    return names


@click.command("profile", short_help="Measures the devices that are here.")
@click.argument("target", metavar="[FILE.py:FUNCTION]", required=False)
@click.option("--cluster", default=LOCAL, show_default=True, help="Whose plans matter: as for `plan`.")
@click.option("--hosts", type=click.IntRange(min=1), help="Hosts of that cluster, in place of its own number.")
@click.option("--devices-per-host", type=click.IntRange(min=1), help="Devices of each host, likewise.")
@click.option("--plan", "plan_file", metavar="PLAN.json", help="Only the local shapes of this plan of the target.")
@click.option("--args", "args_from", metavar="FUNCTION", help="Gives the arguments' shapes, as example_args.")
@click.option("--preset", help="A class method of the module's Config, such as gpt2.")
@click.option("--set", "settings", multiple=True, callback=settings_of, metavar="FIELD=VALUE", help="Of the Config.")
@click.option("--donate", multiple=True, type=int, help="An argument that the step replaces, by its number.")
@click.option("--only", multiple=True, callback=_check_kinds, help="Kinds of work; by default all.")
@click.option("--grid/--no-grid", default=True, help="Sizes that any program may have, after the target's.")
@click.option("--analyse", is_flag=True, help="Times nothing: asks XLA's cost analysis of the target's ops.")
@click.option("--seconds", default=300.0, show_default=True, type=click.FloatRange(min=1), help="When to stop.")
@click.option("--database", help="Where to keep it; by default where Cluster.local() looks.")
@click.option("--out", help="A text file (.toml) for all that is known of this kind of device and jax.")
@click.option("--cluster-out", help="A cluster file (.toml) with figures fitted to it.")
def profile_command(
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
    here = _here_as(wanted, timed=not analyse)
    loaded = None if target is None else load_target(target, args=args_from, preset=preset, settings=settings)
    with progress_bar() as tell:
        cases = _cases_for(
            loaded,
            dataclasses.replace(wanted, profile=None),
            here,
            plan=plan_file,
            only=only,
            with_grid=grid and not analyse,
            donate=donate,
            progress=tell,
        )
    for line in _run(
        cases,
        here,
        seconds=seconds,
        timed=not analyse,
        analysed=analyse,
        database=database,
        out=out,
        cluster_out=cluster_out,
        progress=progress_bar(),
    ):
        click.echo(line)


def _cases_for(
    target: Target | None,
    cluster: Cluster,
    here: Cluster,
    *,
    plan: str | None,
    only: Sequence[str],
    with_grid: bool,
    donate: Sequence[int],
    progress: Progress,
) -> list[Case]:
    """What to measure: a program's ops first, then the grid.

    `cluster` is the one whose plans matter, `here` what can be measured.
    """
    cases: list[Case] = []
    if target is not None:
        if plan is not None:
            layouts = [Plan.load(plan).bind(target.step, *target.args, donate_argnums=donate).bound]
        else:
            program = trace_step(target.step, target.args, {}, donate_argnums=donate)
            layouts = layouts_of(program, cluster, progress)
        cases += [c for c in needs(layouts, cluster) if not only or c.kind in only]
    if with_grid:
        known = {c.identity for c in cases}
        cases += [c for c in grid(here, only) if c.identity not in known]
    return cases


def _run(
    cases: Sequence[Case],
    here: Cluster,
    *,
    seconds: float,
    timed: bool,
    analysed: bool,
    database: str | None,
    out: str | None,
    cluster_out: str | None,
    progress: AbstractContextManager[Progress],
) -> Iterator[str]:
    """Measures, keeps what was measured, and yields the lines of the report."""
    devices = jax.devices() if timed else []
    with progress as tell:
        found = profile(
            cases, here, devices, seconds=seconds, timed=timed, analysed=analysed, name="measured", progress=tell
        )
    store = ProfileStore(database or profile_store.DATABASE)
    store.add(found.profile)
    timings, analyses = len(found.profile.samples), len(found.profile.analyses)
    yield f"{timings} ops and collectives timed, {analyses} analysed: {store.path}"
    yield from _not_measured(found.measured)
    everything = store.profile(found.profile.device_kind, found.profile.jax)
    for path, text in ((out, to_text(everything)), (cluster_out, cluster_text(calibrated(here, everything)))):
        if path is not None:
            try:
                replace_file(Path(path), text)
            except OSError as error:
                raise FfjaxError(f"cannot write {path!r}: {error.strerror}. Remedy: give another path.") from error
            yield f"written to {path}"
    if timed:
        yield from _report(found.profile, cases, calibrated(here, everything))


def _not_measured(measured: Measured) -> Iterator[str]:
    for case, why in measured.failed[:_SHOWN]:
        yield f"not measured: {describe(case)}: {why}"
    if len(measured.failed) > _SHOWN:
        yield f"and {len(measured.failed) - _SHOWN} more that cannot be measured"
    if measured.left_out:
        yield f"{len(measured.left_out)} left out for want of time; --seconds gives more, and adds to what is there"


def _report(measured: Profile, cases: Sequence[Case], fitted: Cluster) -> Iterator[str]:
    """By kind: how the description that was there compares with what was measured."""
    guesses = {c.identity: c.guess_s for c in cases}
    ratios: dict[str, list[float]] = {}
    for s in measured.samples:
        ratios.setdefault(s.kind, []).append(s.seconds / guesses[(s.kind, s.params, s.dtype, s.sizes)])
    yield "measured / described, by kind: median (least to most)"
    for kind, found in sorted(ratios.items()):
        yield f"  {kind:20} {len(found):4} x  {median(found):7.2f} ({min(found):.2f} to {max(found):.2f})"
    device = fitted.device
    yield (
        f"fitted: matmul {device.peak_flops_per_s('float32') * device.matmul_efficiency:.3g} flop/s in float32, memory "
        f"{device.memory_bytes_per_s * device.memory_efficiency:.3g} B/s, {device.kernel_s:.3g} s a launch"
    )


def _here_as(cluster: Cluster, *, timed: bool) -> Cluster:
    """The cluster's description with the devices that are here; the whole of it where nothing is timed."""
    if not timed:
        return dataclasses.replace(cluster, profile=None)
    count = jax.device_count()
    hosts = jax.process_count()
    return dataclasses.replace(cluster.with_hosts(*[count // hosts] * hosts), profile=None)
