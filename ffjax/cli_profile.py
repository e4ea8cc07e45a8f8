"""`ffjax profile`: measures the devices that are here."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from statistics import median

import click
import jax

from ffjax import planner
from ffjax.cost.cluster import Cluster
from ffjax.cost.profiles import store as profile_store
from ffjax.cost.profiles.calibrate import calibrated, cluster_text
from ffjax.cost.profiles.files import replace_file
from ffjax.cost.profiles.profile import Profile
from ffjax.cost.profiles.store import ProfileStore
from ffjax.cost.profiles.text import to_text
from ffjax.errors import FfjaxError
from ffjax.measure import Case, Measured, Progress, describe
from ffjax.plan import Plan
from ffjax.profile import layouts_of, needs, profile
from ffjax.profile_grid import grid, kinds
from ffjax.targets import Target

_SHOWN = 5


def cases_for(
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
            program = planner.trace_step(target.step, target.args, {}, donate_argnums=donate)
            layouts = layouts_of(program, cluster, progress)
        cases += [c for c in needs(layouts, cluster) if not only or c.kind in only]
    if with_grid:
        known = {c.identity for c in cases}
        cases += [c for c in grid(here, only) if c.identity not in known]
    return cases


def run_profile(
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


def check_kinds(ctx: click.Context, param: click.Parameter, names: Sequence[str]) -> Sequence[str]:
    unknown = [name for name in names if name not in kinds()]
    if unknown:
        raise click.BadParameter(f"{unknown[0]!r} is no kind of work; known: {', '.join(kinds())}")
    return names


def here_as(cluster: Cluster, *, timed: bool) -> Cluster:
    """The cluster's description with the devices that are here; the whole of it where nothing is timed."""
    if not timed:
        return dataclasses.replace(cluster, profile=None)
    count = jax.device_count()
    hosts = jax.process_count()
    return dataclasses.replace(cluster.with_hosts(*[count // hosts] * hosts), profile=None)
