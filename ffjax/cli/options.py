"""The options that say what to plan, shared by commands: a step, a cluster, and what is fixed."""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Callable, Sequence
from typing import Concatenate, ParamSpec, TypeVar

import click
import jax
from jax.sharding import PartitionSpec

from ffjax.cli.targets import Target, load_target
from ffjax.cost.cluster import Cluster
from ffjax.ir.compat import AS_WRITTEN, CHECKPOINT_POLICIES
from ffjax.planning.remat import SEARCH

P = ParamSpec("P")
R = TypeVar("R")

LOCAL = "local"

_ENTRY = re.compile(r"None|-|[A-Za-z_]\w*(\*[A-Za-z_]\w*)*")


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
        # An empty spec replicates; a trailing comma is that of a tuple of one.
        inside = re.sub(r"^\((.*)\)$", r"\1", spec.strip()).strip().removesuffix(",")
        entries = [e.strip() for e in inside.split(",")] if inside else []
        if not equals or not pattern or not all(_ENTRY.fullmatch(e) for e in entries):
            raise click.BadParameter(
                f"{text!r} is no pin; write a path pattern and for each dimension a mesh axis, several (x*y), or None: "
                "params/**/kernel=None,x"
            )
        if pattern in pins:
            raise click.BadParameter(f"{pattern!r} is pinned twice; leave one out")
        axes = [() if e in ("None", "-") else tuple(e.split("*")) for e in entries]
        pins[pattern] = PartitionSpec(*(a[0] if len(a) == 1 else a or None for a in axes))
    return pins


def settings_of(ctx: click.Context, param: click.Parameter, texts: Sequence[str]) -> dict[str, str]:
    """`layers=48`, any number of times."""
    settings: dict[str, str] = {}
    for text in texts:
        name, equals, value = text.partition("=")
        if not equals or not name.strip().isidentifier():
            raise click.BadParameter(f"{text!r} sets nothing; write FIELD=VALUE, such as layers=48")
        settings[name.strip()] = value.strip()
    return settings


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """What `plan`, `compare` and `simulate` ask: a step, a cluster, and what is fixed."""

    target: Target
    cluster: Cluster
    memory: str | None
    mesh: dict[str, int] | None
    pins: dict[str, PartitionSpec]
    remat: str
    donate: tuple[int, ...]


_OPTIONS = (
    click.argument("target", metavar="FILE.py:FUNCTION"),
    click.option("--cluster", required=True, help="A shipped cluster, a TOML file, or 'local': what JAX sees here."),
    click.option("--hosts", type=click.IntRange(min=1), help="Hosts of the cluster, in place of its own number."),
    click.option("--devices-per-host", type=click.IntRange(min=1), help="Devices of each host, likewise."),
    click.option("--profile", "profile_file", help="Measured costs: a file of `ffjax profile`, text or database."),
    click.option("--accept-other-profile", is_flag=True, help="Use it though of another device or jax; warns."),
    click.option("--memory", help="What one device may hold, such as 70GiB; by default all that it has."),
    click.option("--mesh", callback=_mesh, metavar="x=8,y=8", help="The mesh; by default meshes are searched too."),
    click.option(
        "--pin",
        "pins",
        multiple=True,
        callback=_pins,
        metavar="PATTERN=SPEC",
        help="Shards arguments your way: 'params/**/kernel=None,x'.",
    ),
    click.option(
        "--remat",
        default=AS_WRITTEN,
        show_default=True,
        type=click.Choice([AS_WRITTEN, SEARCH, *CHECKPOINT_POLICIES]),
        help="What jax.checkpoint regions keep; search decides it too.",
    ),
    click.option("--args", "args_from", metavar="FUNCTION", help="Gives the arguments' shapes, as example_args."),
    click.option("--preset", help="A class method of the module's Config, such as gpt2."),
    click.option(
        "--set", "settings", multiple=True, callback=settings_of, metavar="FIELD=VALUE", help="A field of the Config."
    ),
    click.option("--donate", multiple=True, type=int, help="Number of an argument that the step replaces."),
)


def with_question(command: Callable[Concatenate[Question, P], R]) -> Callable[..., R]:
    """Gives a command the options that ask, and what they ask as its first argument."""

    @functools.wraps(command)
    def wrapped(
        target: str,
        cluster: str,
        hosts: int | None,
        devices_per_host: int | None,
        profile_file: str | None,
        accept_other_profile: bool,
        memory: str | None,
        mesh: dict[str, int] | None,
        pins: dict[str, PartitionSpec],
        remat: str,
        args_from: str | None,
        preset: str | None,
        settings: dict[str, str],
        donate: tuple[int, ...],
        *args: P.args,
        **kwargs: P.kwargs,
    ) -> R:
        # A plan for a cluster that is not here needs no device, and must not take hold of one.
        if cluster != LOCAL and not jax.config.jax_platforms:  # type: ignore[attr-defined]  # made at run time
            jax.config.update("jax_platforms", "cpu")
        described = cluster_named(cluster, hosts, devices_per_host)
        if profile_file is not None:
            described = described.with_profile(profile_file, accept_other=accept_other_profile)
        loaded = load_target(target, args=args_from, preset=preset, settings=settings)
        asked = Question(
            target=loaded, cluster=described, memory=memory, mesh=mesh, pins=pins, remat=remat, donate=donate
        )
        return command(asked, *args, **kwargs)

    for option in reversed(_OPTIONS):
        wrapped = option(wrapped)
    return wrapped


def cluster_named(text: str, hosts: int | None = None, devices_per_host: int | None = None) -> Cluster:
    """What `--cluster` means."""
    counts = {"hosts": hosts, "devices_per_host": devices_per_host}
    given = {name: count for name, count in counts.items() if count is not None}
    if text == LOCAL:
        if given:
            raise click.UsageError("--cluster local is what JAX sees here; leave --hosts and --devices-per-host out")
        return Cluster.local()
    if text.endswith(".toml") or "/" in text:
        cluster = Cluster.load(text)
        sizes = [devices_per_host or cluster.devices_per_host] * (hosts or cluster.hosts)
        return cluster.with_hosts(*sizes) if given else cluster
    return Cluster.named(text, **given)
