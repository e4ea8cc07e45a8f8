"""What a plan runs on: devices, the links between them, and how many there are.

A cluster is data: hosts of equal devices, one link inside a host and one across, each shipped or written by
the user as one TOML file. Only `Cluster.local` and `Cluster.compile_only_devices` touch JAX.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import math
import re
import tomllib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib import resources
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import TYPE_CHECKING, Literal, TypeAlias, get_args

import numpy as np

from ffjax.cost.meshes import AxisGroup, axis_group, candidate_meshes
from ffjax.cost.profiles import store as profile_store
from ffjax.cost.profiles.profile import Profile, jax_version, machine_kind
from ffjax.cost.simulation.timeline import COMPUTE
from ffjax.cost.toml_fields import Fields, did_you_mean
from ffjax.errors import ClusterError
from ffjax.ir.spec import MeshShape

if TYPE_CHECKING:
    import jax

Platform: TypeAlias = Literal["cpu", "gpu", "tpu"]

_UNITS = {
    "": 1,
    "B": 1,
    **{f"{p}B": 1000**i for i, p in enumerate("KMGT", 1)},
    **{f"{p}iB": 1024**i for i, p in enumerate("KMGT", 1)},
}

# One right line for each field of a cluster file: what errors propose.
_EXAMPLES = {
    "name": 'name = "my-cluster"',
    "hosts": "hosts = 8",
    "devices_per_host": "devices_per_host = 8",
    "reduce_scatter": "reduce_scatter = true",
    "async_collectives": "async_collectives = true",
    "target_config": 'target_config = "h100.txtpb"',
    "device": "a [device] table",
    "links": "a [[links]] table for the link inside a host, then one for the network across hosts",
    "kind": 'kind = "NVIDIA H100 80GB HBM3"',
    "kind_matches": 'kind_matches = ["H100"]',
    "platform": 'platform = "gpu"',
    "memory_bytes": 'memory_bytes = "80GiB"',
    "memory_bytes_per_s": "memory_bytes_per_s = 3.35e12",
    "vector_flops_per_s": "vector_flops_per_s = 66.9e12",
    "matmul_efficiency": "matmul_efficiency = 0.75",
    "memory_efficiency": "memory_efficiency = 0.9",
    "kernel_s": "kernel_s = 2.5e-6",
    "flops_per_s": "a [device.flops_per_s] table with at least float32 = 494.7e12",
    "bytes_per_s": "bytes_per_s = 450e9",
    "efficiency": "efficiency = 0.8",
    "latency_s": "latency_s = 2e-6",
}


def parse_bytes(text: str | float) -> int:
    """A number of bytes from `"70GiB"`, `"80GB"`, `"512 MiB"` or a number of bytes.

    Raises ClusterError for what is neither, or not positive.

    >>> parse_bytes("70GiB"), parse_bytes("80GB"), parse_bytes(1024)
    (75161927680, 80000000000, 1024)
    """
    value = math.nan
    if isinstance(text, str):
        match = re.fullmatch(r"\s*([0-9_]*\.?[0-9]+(?:e[0-9]+)?)\s*([a-z]*)\s*", text, re.IGNORECASE)
        scale = {unit.lower(): size for unit, size in _UNITS.items()}.get(match[2].lower()) if match else None
        if match and scale is not None:
            value = float(match[1].replace("_", "")) * scale
    elif isinstance(text, int | float | np.number) and not isinstance(text, bool):
        value = float(text)
    if not (math.isfinite(value) and value >= 1):
        units = ", ".join(unit for unit in _UNITS if unit)
        raise ClusterError(f"{text!r} is no amount of memory; write bytes, or a number with a unit of {units}: '70GiB'")
    return math.ceil(value)  # a plan's peak, which may be a part of a byte, is a budget that it fits


@dataclass(frozen=True, slots=True, kw_only=True)
class Device:
    """One device. Raises ClusterError where a number cannot be."""

    kind: str  # as jax.Device.device_kind has it
    platform: Platform
    # Dense matmul peaks by dtype. float32 is what XLA's default precision runs: TF32 tensor cores on A100 and H100.
    flops_per_s: Mapping[str, float] = field(hash=False)
    vector_flops_per_s: float  # outside the matrix units
    memory_bytes: int
    memory_bytes_per_s: float
    matmul_efficiency: float  # share of the peak that a large matmul reaches
    memory_efficiency: float  # share of memory_bytes_per_s that a streaming kernel reaches
    kernel_s: float  # fixed time of one kernel launch
    kind_matches: tuple[str, ...] = ()  # parts of other device kinds that this describes, any case

    def __post_init__(self) -> None:
        if self.platform not in get_args(Platform):
            known = get_args(Platform)
            raise ClusterError(
                f"platform = {self.platform!r}; must be one of {', '.join(known)}{did_you_mean(self.platform, known)}"
            )
        if "float32" not in self.flops_per_s:
            listed = ", ".join(self.flops_per_s) or "nothing"
            raise ClusterError(f"flops_per_s lists {listed}; add float32, which stands for every dtype not listed")
        for dtype, peak in self.flops_per_s.items():
            _check_positive(f"flops_per_s.{dtype}", peak)
        for name in ("vector_flops_per_s", "memory_bytes", "memory_bytes_per_s"):
            _check_positive(name, getattr(self, name))
        for name in ("matmul_efficiency", "memory_efficiency"):
            _check_share(name, getattr(self, name))
        _check_not_negative("kernel_s", self.kernel_s)

    def peak_flops_per_s(self, dtype: str) -> float:
        """The matmul peak of a dtype; float32's where it is not listed."""
        return self.flops_per_s.get(dtype, self.flops_per_s["float32"])


@dataclass(frozen=True, slots=True, kw_only=True)
class Link:
    """One level of links. Raises ClusterError where a number cannot be."""

    name: str
    bytes_per_s: float  # of one device, in one direction
    latency_s: float  # of one step of a collective, or one hop
    efficiency: float = 1.0  # share of bytes_per_s that a large collective reaches

    def __post_init__(self) -> None:
        _check_positive("bytes_per_s", self.bytes_per_s)
        _check_not_negative("latency_s", self.latency_s)
        _check_share("efficiency", self.efficiency)

    @property
    def effective_bytes_per_s(self) -> float:
        return self.bytes_per_s * self.efficiency


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
        from ffjax.cost.profiles.calibrate import with_profile  # which knows clusters

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
    fields = Fields(table, label, _EXAMPLES)
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
            device=_device(device),
            links=tuple(_link(link) for link in links),
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


def _device(fields: Fields) -> Device:
    return Device(
        kind=fields.text("kind"),
        platform=fields.text("platform"),  # type: ignore[arg-type]  # Device checks it
        flops_per_s=fields.numbers("flops_per_s"),
        vector_flops_per_s=fields.number("vector_flops_per_s"),
        memory_bytes=parse_bytes(fields.number_or_text("memory_bytes")),
        memory_bytes_per_s=fields.number("memory_bytes_per_s"),
        matmul_efficiency=fields.number("matmul_efficiency"),
        memory_efficiency=fields.number("memory_efficiency"),
        kernel_s=fields.number("kernel_s"),
        kind_matches=fields.texts("kind_matches") if fields.has("kind_matches") else (),
    )


def _link(fields: Fields) -> Link:
    return Link(
        name=fields.text("name"),
        bytes_per_s=fields.number("bytes_per_s"),
        latency_s=fields.number("latency_s"),
        efficiency=fields.number("efficiency") if fields.has("efficiency") else 1.0,
    )


def _check_positive(name: str, value: float) -> None:
    if not (math.isfinite(value) and value > 0):
        raise ClusterError(f"{name} = {value!r}; must be a positive number, such as {_example(name)}")


def _check_not_negative(name: str, value: float) -> None:
    if not (math.isfinite(value) and value >= 0):
        raise ClusterError(f"{name} = {value!r}; must be zero or more seconds, such as {_example(name)}")


def _check_share(name: str, value: float) -> None:
    if not 0 < value <= 1:
        raise ClusterError(f"{name} = {value!r}; must be above 0 and at most 1, such as {_example(name)}")


def _example(name: str) -> str:
    return _EXAMPLES.get(name, f"{name} = 1e12")
