"""What a plan runs on: devices, the links between them, and how many there are.

A cluster is data: hosts of equal devices, one link inside a host and one across, each shipped or written by
the user as one TOML file. Only `Cluster.local` and `Cluster.compile_only_devices` touch JAX.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import math
import tomllib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import TYPE_CHECKING

from ffjax.cost.hardware import EXAMPLES, Device, Link, read_device, read_link
from ffjax.cost.meshes import AxisGroup, axis_group, candidate_meshes
from ffjax.cost.profiles import store as profile_store
from ffjax.cost.profiles.calibrate import with_profile
from ffjax.cost.profiles.profile import Profile, jax_version, machine_kind
from ffjax.cost.simulation.timeline import COMPUTE
from ffjax.cost.toml_fields import Fields, did_you_mean
from ffjax.errors import ClusterError
from ffjax.ir.spec import MeshShape

if TYPE_CHECKING:
    import jax


@dataclass(frozen=True, slots=True, kw_only=True)
class Cluster:
    """`hosts` hosts with `devices_per_host` equal devices each; or with as many as `host_sizes` says of each.

    Where hosts differ in size, `devices_per_host` is that of the largest. Devices are numbered host by host, and what a
    collective costs follows from how its groups then lie on the hosts, the worst of them.

    Raises ClusterError where counts are not positive whole numbers, or several hosts have no network.

    >>> cluster = Cluster.named("h100", hosts=8)
    >>> cluster.devices, [link.name for link in cluster.links][0]
    (64, 'NVLink 4')
    >>> Cluster.named("h100").with_hosts(8, 4).devices
    12
    """

    name: str
    hosts: int
    devices_per_host: int
    device: Device
    links: tuple[Link, ...]  # inside a host, then across hosts
    reduce_scatter: bool  # whether the platform's compiler makes reduce-scatters out of all-reduce + slice
    target_config: str | None = None  # text proto that XLA compiles for without a device
    async_collectives: bool = False  # whether collectives run beside kernels, or hold them up
    profile: Profile | None = None  # what was measured on such devices; see `with_profile`
    host_sizes: tuple[int, ...] = ()  # devices of each host, where they differ

    def __post_init__(self) -> None:
        counts = [("hosts", self.hosts), ("devices_per_host", self.devices_per_host)]
        for name, count in [*counts, *(("host_sizes", size) for size in self.host_sizes)]:
            if isinstance(count, bool) or not isinstance(count, int) or count < 1:
                raise ClusterError(f"{name} = {count!r}; must be a positive whole number, such as {name}=8")
        if self.host_sizes and (len(self.host_sizes), max(self.host_sizes)) != (self.hosts, self.devices_per_host):
            raise ClusterError(
                f"host_sizes = {self.host_sizes}, but hosts = {self.hosts} and devices_per_host = "
                f"{self.devices_per_host}; these are how many there are, and the largest"
            )
        if not 1 <= len(self.links) <= 2:
            raise ClusterError(
                f"{len(self.links)} links; give one inside a host and, for several hosts, one across, inner first"
            )
        names = [link.name for link in self.links]
        if len(set(names)) < len(names) or COMPUTE in names:
            raise ClusterError(
                f"the links are named {', '.join(map(repr, names))}; give each a name of its own, and none the name "
                f"{COMPUTE!r}: a timeline has a stream for each"
            )
        if self.hosts > 1 and len(self.links) < 2:
            raise ClusterError(
                f"hosts = {self.hosts} but only the link {self.links[0].name!r} inside a host is given; "
                "add a second [[links]] table for the network across hosts, or set hosts = 1"
            )

    @property
    def devices(self) -> int:
        return sum(self.host_sizes) if self.host_sizes else self.hosts * self.devices_per_host

    @property
    def device_counts(self) -> str:
        """How many devices there are, as text: `2 x 8`, or `8 + 4` where hosts differ in size."""
        return " + ".join(map(str, self.host_sizes)) or f"{self.hosts} x {self.devices_per_host}"

    def with_hosts(self, *sizes: int) -> Cluster:
        """The same kind of hosts, with so many devices on each.

        >>> Cluster.named("h100").with_hosts(8, 4).mesh_shapes(max_axes=2)[:2]
        [MeshShape(axes=('x',), sizes=(12,)), MeshShape(axes=('x', 'y'), sizes=(3, 4))]
        """
        differ = sizes if len(set(sizes)) > 1 else ()
        return dataclasses.replace(self, hosts=len(sizes), devices_per_host=max(sizes, default=0), host_sizes=differ)

    @property
    def machine_kind(self) -> str:
        """The kind of device under which profiles are kept; a CPU's names the machine."""
        return machine_kind(self.device.kind, self.device.platform, self.devices_per_host)

    def with_profile(self, profile: Profile | str | Path, *, accept_other: bool = False) -> Cluster:
        """This cluster with measured costs, its figures calibrated by them (`ffjax.cost.profiles.calibrate`).

        Args:
          profile: one, or the path of one: a text file (.toml), or a database that `ffjax profile` writes; or the name
            of a shipped one.
          accept_other: whether to use, with a warning, one of another kind of device or another version of jax.

        Raises ProfileError for one that is missing, damaged, or of another device or jax and not accepted.
        """
        return with_profile(self, profile, accept_other=accept_other)

    @staticmethod
    def names() -> tuple[str, ...]:
        """The shipped clusters.

        >>> Cluster.names()
        ('a100', 'cpu', 'h100', 'h200', 'v100')
        """
        return tuple(sorted(f.name.removesuffix(".toml") for f in _shipped().iterdir() if f.name.endswith(".toml")))

    @classmethod
    def named(cls, name: str, hosts: int | None = None, devices_per_host: int | None = None) -> Cluster:
        """A shipped cluster, with other counts where they are given. Raises ClusterError for an unknown name."""
        known = cls.names()
        if name not in known:
            raise ClusterError(
                f"unknown cluster {name!r}{did_you_mean(name.lower(), known)}; known: {', '.join(known)}. "
                "Cluster.load(path) reads a description of your own."
            )
        cluster = _read(_shipped().joinpath(f"{name}.toml"), _shipped(), f"{name}.toml")
        return dataclasses.replace(
            cluster,
            hosts=cluster.hosts if hosts is None else hosts,
            devices_per_host=cluster.devices_per_host if devices_per_host is None else devices_per_host,
        )

    @classmethod
    def load(cls, path: str | Path) -> Cluster:
        """A cluster from a TOML file; the shipped ones are examples of its fields.

        `target_config` names a file beside it. Raises ClusterError that names the file, the field and the remedy.
        """
        path = Path(path)
        if not path.is_file():
            near = f"; Cluster.named({path.stem!r}) is shipped" if path.stem in cls.names() else ""
            raise ClusterError(f"there is no cluster file {str(path)!r}; give the path of a TOML file{near}")
        return _read(path, path.parent, str(path))

    @classmethod
    def local(cls, devices: Sequence[jax.Device] | None = None) -> Cluster:
        """What is attached here: `jax.devices()` of the default backend, or some of them.

        Each process is a host; where each has one GPU, those are that XLA takes for one host's. A device's memory is
        what its allocator may take, where that is known. On one host, what `ffjax profile` measured here with this jax
        is used; several hosts must agree on their costs, so there pass `with_profile` the same file on each. Raises
        ClusterError for a kind of device that no shipped cluster describes.
        """
        import jax

        devices = jax.devices() if devices is None else devices
        counts = Counter(hosts_of(devices))
        hosts, sizes = len(counts), [count for _, count in sorted(counts.items())]
        kind = devices[0].device_kind
        for name in cls.names():
            cluster = cls.named(name).with_hosts(*sizes)
            if any(part.lower() in kind.lower() for part in cluster.device.kind_matches):
                # Some devices have no allocator to ask (CPU, compile-only ones).
                limit = (jax.local_devices()[0].memory_stats() or {}).get("bytes_limit", 0)
                device = dataclasses.replace(
                    cluster.device, kind=kind, memory_bytes=limit if limit > 0 else cluster.device.memory_bytes
                )
                cluster = dataclasses.replace(cluster, device=device)
                return _as_measured_here(cluster) if hosts == 1 else cluster
        raise ClusterError(
            f"no shipped cluster describes the device kind {kind!r} (known: {', '.join(cls.names())}); describe it in "
            f"a TOML file like those and pass Cluster.load(path)"
        )

    def mesh_shapes(self, max_axes: int = 3) -> list[MeshShape]:
        """The meshes over all devices worth searching, simplest first; see `ffjax.cost.meshes.candidate_meshes`.

        Where hosts differ in size, an axis lies inside a host if its size divides all of them: meshes are those of as
        many small hosts of the greatest common size as there are devices for.
        """
        return candidate_meshes(*self._alike_hosts(), max_axes)

    def axis_link(self, mesh: MeshShape, axes: tuple[str, ...]) -> AxisGroup:
        """How the groups along `axes` lie on the hosts; raises ClusterError where mesh and cluster do not match."""
        if mesh.devices != self.devices:
            raise ClusterError(
                f"mesh {mesh} has {mesh.devices} devices but cluster {self.name!r} has {self.devices} "
                f"({self.device_counts}); use one of {', '.join(map(str, self.mesh_shapes()))}"
            )
        return axis_group(mesh, axes, self.host_sizes or self.devices_per_host)

    def _alike_hosts(self) -> tuple[int, int]:
        """How many hosts of one size these are, or would be if their largest equal parts were hosts."""
        size = math.gcd(*self.host_sizes) if self.host_sizes else self.devices_per_host
        return self.devices // size, size

    def compile_only_devices(self) -> tuple[jax.Device, ...]:
        """Devices of this cluster that programs can be compiled for, with none of them attached.

        A topology has hosts of one size: hosts that differ are compiled for as if their largest equal parts were hosts.
        What is compiled for one device depends on that only where XLA counts the devices of a host.

        Raises ClusterError where the cluster has no target config or the plugin that compiles for it is missing.
        """
        if self.device.platform != "gpu" or self.target_config is None:
            raise ClusterError(
                f"cluster {self.name!r} ({self.device.platform}) has no target_config to compile for; "
                "give it one in its TOML file (GPUs only), or lower on CPU fake devices: "
                f"XLA_FLAGS=--xla_force_host_platform_device_count={self.devices}"
            )
        if importlib.util.find_spec("jax_plugins") is None or not any(
            importlib.util.find_spec(f"jax_plugins.xla_cuda{version}") for version in (12, 13)
        ):
            raise ClusterError(
                f"compiling for {self.name!r} without a GPU needs JAX's CUDA plugin, which is not installed; "
                'run: pip install "ffjax[gpu-compile]"'
            )
        from jax.experimental import topologies

        hosts, size = self._alike_hosts()
        shape = f"1x{hosts}x{size}"
        try:
            topology = topologies.get_topology_desc(
                self.name, platform="cuda", target_config=self.target_config, topology=shape
            )
        except Exception as e:  # what a plugin raises is its own affair: versions differ
            raise ClusterError(
                f"the CUDA plugin made no {shape} topology of {self.name!r}: {e}; "
                "its version must match jaxlib's; run: pip install --upgrade 'ffjax[gpu-compile]'"
            ) from e
        return tuple(topology.devices)


def hosts_of(devices: Sequence[jax.Device]) -> list[int]:
    """For each device the host that it is on: its process, or, where each process has one GPU, its slice.

    A slice is what XLA calls GPUs whose hosts say that they were booted as one.
    """
    processes = [d.process_index for d in devices]
    if devices[0].platform != "gpu" or len(set(processes)) < len(processes):
        return processes
    return [getattr(d, "slice_index", d.process_index) for d in devices]


def by_host(devices: Sequence[jax.Device]) -> list[jax.Device]:
    """Devices with those of a host side by side, as the inner axes of a mesh take them."""
    hosts = hosts_of(devices)
    order = sorted(range(len(devices)), key=lambda i: (hosts[i], devices[i].process_index, devices[i].id))
    return [devices[i] for i in order]


def _as_measured_here(cluster: Cluster) -> Cluster:
    """With the measurements of this machine, if there are any of its kind of device under this jax."""
    if not profile_store.DATABASE.is_file():
        return cluster
    profile = profile_store.ProfileStore(profile_store.DATABASE).profile(cluster.machine_kind, jax_version())
    return cluster.with_profile(profile) if profile.samples else cluster


def _shipped() -> Traversable:
    return resources.files("ffjax.cost").joinpath("clusters")


def _read(file: Traversable | Path, folder: Traversable | Path, label: str) -> Cluster:
    try:
        table = tomllib.loads(file.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as e:
        raise ClusterError(f"{label}: not a TOML file: {e}; the shipped clusters are examples") from e
    fields = Fields(table, label, EXAMPLES)
    device = fields.table("device")
    links = fields.tables("links")
    platform = device.text("platform")
    target_config = None
    if fields.has("target_config"):
        beside = folder.joinpath(fields.text("target_config"))
        if not beside.is_file():
            raise ClusterError(
                f"{label}: target_config = {fields.text('target_config')!r}: there is no such file beside it; "
                "put it there, or remove the field (it only serves compile_only_devices)"
            )
        target_config = beside.read_text(encoding="utf-8")
    try:
        sizes = fields.wholes("devices_per_host")
        cluster = Cluster(
            name=fields.text("name"),
            hosts=fields.whole("hosts"),
            devices_per_host=max(sizes, default=0),
            host_sizes=sizes if len(set(sizes)) > 1 else (),
            device=read_device(device),
            links=tuple(read_link(link) for link in links),
            reduce_scatter=fields.flag("reduce_scatter") if fields.has("reduce_scatter") else platform != "cpu",
            target_config=target_config,
            async_collectives=fields.flag("async_collectives")
            if fields.has("async_collectives")
            else platform != "cpu",
        )
    except ClusterError as e:
        raise (e if str(e).startswith(label) else ClusterError(f"{label}: {e}")) from e.__cause__
    for read in (fields, device, *links):
        read.close()
    return cluster
