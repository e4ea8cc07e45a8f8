"""Cluster descriptions: the shipped ones, files of the user's own, and every way in which they can be wrong."""

from __future__ import annotations

import dataclasses
import importlib.util
import math
import pickle
from pathlib import Path

import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ffjax.cost.cluster import Cluster, by_host
from ffjax.cost.hardware import parse_bytes
from ffjax.cost.meshes import AxisGroup, axis_group, candidate_meshes
from ffjax.cost.roofline import op_seconds
from ffjax.errors import ClusterError
from ffjax.ir.spec import MeshShape

GOOD = """
name = "mine"
hosts = 2
devices_per_host = 4
reduce_scatter = true

[device]
kind = "Chip"
platform = "gpu"
memory_bytes = "70GiB"
memory_bytes_per_s = 3e12
vector_flops_per_s = 60e12
matmul_efficiency = 0.7
memory_efficiency = 0.9
kernel_s = 2e-6

[device.flops_per_s]
float32 = 100e12
bfloat16 = 900e12

[[links]]
name = "inside"
bytes_per_s = 450e9
latency_s = 2e-6

[[links]]
name = "across"
bytes_per_s = 50e9
latency_s = 5e-6
"""


def _load(folder: Path, text: str) -> Cluster:
    path = folder / "mine.toml"
    path.write_text(text)
    return Cluster.load(path)


# ---- shipped clusters


def test_names() -> None:
    assert Cluster.names() == ("a100", "cpu", "h100", "h200", "v100")


@pytest.mark.parametrize("name", Cluster.names())
def test_shipped_cluster_is_complete(name: str) -> None:
    cluster = Cluster.named(name, hosts=3, devices_per_host=5)
    assert (cluster.name, cluster.hosts, cluster.devices_per_host, cluster.devices) == (name, 3, 5, 15)
    assert len(cluster.links) == 2
    inner, outer = cluster.links
    assert inner.bytes_per_s > outer.bytes_per_s
    assert inner.latency_s < outer.latency_s
    assert any(part.lower() in cluster.device.kind.lower() for part in cluster.device.kind_matches)
    assert cluster.reduce_scatter == (cluster.device.platform == "gpu")
    assert (cluster.target_config is not None) == (cluster.device.platform == "gpu")
    if cluster.target_config is not None:
        assert f'device_description_str: "{cluster.device.kind}"' in cluster.target_config
        assert f"device_memory_size: {cluster.device.memory_bytes}" in cluster.target_config
    assert Cluster.named(name).hosts == 1
    assert pickle.loads(pickle.dumps(cluster)) == cluster
    assert len({cluster, Cluster.named(name, hosts=3, devices_per_host=5)}) == 1


def test_each_kind_of_device_is_described_once() -> None:
    for name in Cluster.names():
        kind = Cluster.named(name).device.kind.lower()
        matching = [n for n in Cluster.names() if any(p.lower() in kind for p in Cluster.named(n).device.kind_matches)]
        assert matching == [name]


def test_published_numbers() -> None:
    h100, h200, a100, v100 = (Cluster.named(n) for n in ("h100", "h200", "a100", "v100"))
    assert h100.device.peak_flops_per_s("bfloat16") == 989.4e12
    assert h100.device.peak_flops_per_s("float32") == 494.7e12  # TF32
    assert a100.device.peak_flops_per_s("bfloat16") == 312e12
    assert v100.device.peak_flops_per_s("bfloat16") == v100.device.peak_flops_per_s("float32") == 15.7e12
    assert h200.device.flops_per_s == h100.device.flops_per_s
    assert h200.device.memory_bytes_per_s > h100.device.memory_bytes_per_s
    assert [8 * 8 * c.links[1].bytes_per_s / 1e9 for c in (h100, h200, a100, v100)] == [3200, 3200, 1600, 25]  # Gb/s


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("h10", r"unknown cluster 'h10' \(did you mean 'h100'\?\); known: a100, cpu, h100, h200, v100\. Cluster\.load"),
        ("A100", r"unknown cluster 'A100' \(did you mean 'a100'\?\)"),
        ("zzz", r"unknown cluster 'zzz'; known: a100"),
    ],
)
def test_unknown_name(name: str, message: str) -> None:
    with pytest.raises(ClusterError, match=message):
        Cluster.named(name)


@pytest.mark.parametrize("count", [0, -1, 2.5, "8", True])
@pytest.mark.parametrize("field", ["hosts", "devices_per_host"])
def test_counts_must_be_positive_whole_numbers(field: str, count: object) -> None:
    with pytest.raises(ClusterError, match=rf"{field} = {count!r}; must be a positive whole number, such as {field}=8"):
        Cluster.named("h100", **{field: count})  # type: ignore[arg-type]


# ---- files


def test_load(tmp_path: Path) -> None:
    (tmp_path / "chip.txtpb").write_text("gpu_device_info {}")
    cluster = _load(tmp_path, 'target_config = "chip.txtpb"' + GOOD)
    assert (cluster.name, cluster.devices, cluster.device.memory_bytes) == ("mine", 8, 70 * 2**30)
    assert cluster.target_config == "gpu_device_info {}"
    assert [link.name for link in cluster.links] == ["inside", "across"]
    assert cluster.links[0].efficiency == 1.0
    assert cluster.device.kind_matches == ()


def test_one_host_needs_one_link(tmp_path: Path) -> None:
    one = GOOD.replace("hosts = 2", "hosts = 1", 1).rsplit("[[links]]", 1)[0]
    assert len(_load(tmp_path, one).links) == 1


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('name = "mine"\n', "", r"field 'name' is missing; add it, for example: name = "),
        ("hosts = 2", "", r"field 'hosts' is missing; add it, for example: hosts = 8"),
        ("hosts = 2", "hosts = 0", r"hosts = 0; must be a positive whole number"),
        ("hosts = 2", "hosts = 2.0", r"hosts = 2\.0 is not a whole number; for example: hosts = 8"),
        ("hosts = 2", "hosts = 2\nhost = 2", r"unknown field 'host' \(did you mean 'hosts'\?\); rename or remove it"),
        ("hosts = 2", "hosts =", r"not a TOML file: .*; the shipped clusters are examples"),
        ("reduce_scatter = true", "reduce_scatter = 1", r"reduce_scatter = 1 is not true or false"),
        ("reduce_scatter = true", 'target_config = "no.txtpb"', r"target_config = 'no\.txtpb': there is no such file"),
        ('kind = "Chip"', "kind = 4", r", \[device\]: kind = 4 is not a string; for example: kind = "),
        ('kind = "Chip"', 'kind = "C"\nkind_matches = "C"', r"kind_matches = 'C' is not a list of strings"),
        (
            'platform = "gpu"',
            'platform = "gpus"',
            r"platform = 'gpus'; must be one of cpu, gpu, tpu \(did you mean 'gpu",
        ),
        ('"70GiB"', '"70 gigs"', r"'70 gigs' is no amount of memory; write bytes, or a number with a unit of B, KB"),
        ("3e12", '"3e12"', r"memory_bytes_per_s = '3e12' is not a number; for example: memory_bytes_per_s = 3.35e12"),
        ("vector_flops_per_s = 60e12", "", r"\[device\]: field 'vector_flops_per_s' is missing; add it"),
        ("vector_flops_per_s = 60e12", "vector_flops_per_s = inf", r"vector_flops_per_s = inf; must be a positive"),
        (
            "matmul_efficiency = 0.7",
            "matmul_efficiency = 70",
            r"matmul_efficiency = 70\.0; must be above 0 and at most 1",
        ),
        ("kernel_s = 2e-6", "kernel_s = -1", r"kernel_s = -1\.0; must be zero or more seconds"),
        ("float32 = 100e12", "", r"flops_per_s lists bfloat16; add float32, which stands for every dtype not listed"),
        ("float32 = 100e12", "float32 = 0", r"flops_per_s\.float32 = 0\.0; must be a positive number"),
        ("latency_s = 5e-6", "", r", \[\[links\]\] 2: field 'latency_s' is missing"),
        ("bytes_per_s = 50e9", "bytes_per_s = -50e9", r"bytes_per_s = -50000000000\.0; must be a positive number"),
        ("bytes_per_s = 50e9", "bytes_per_s = 50e9\nbandwith = 4", r"\[\[links\]\] 2: unknown field 'bandwith'"),
    ],
)
def test_bad_file(tmp_path: Path, old: str, new: str, message: str) -> None:
    assert old in GOOD
    with pytest.raises(ClusterError, match=rf"mine\.toml.*{message}"):
        _load(tmp_path, GOOD.replace(old, new, 1))


def test_several_hosts_without_a_network(tmp_path: Path) -> None:
    with pytest.raises(ClusterError, match=r"hosts = 2 but only the link 'inside' .* second \[\[links\]\] table"):
        _load(tmp_path, GOOD.rsplit("[[links]]", 1)[0])


def test_no_links_or_three(tmp_path: Path) -> None:
    links = GOOD.index("[[links]]")
    with pytest.raises(ClusterError, match="field 'links' is missing"):
        _load(tmp_path, GOOD[:links])
    with pytest.raises(ClusterError, match="4 links; give one inside a host"):
        _load(tmp_path, GOOD + GOOD[links:])


def test_no_file(tmp_path: Path) -> None:
    with pytest.raises(ClusterError, match=r"there is no cluster file '.*h100\.toml'.*Cluster\.named\('h100'\)"):
        Cluster.load(tmp_path / "h100.toml")


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("70GiB", 70 * 2**30),
        ("80GB", 80 * 10**9),
        (" 1.5 MiB", 3 * 2**19),
        ("7", 7),
        ("2kib", 2048),
        (5, 5),
        ("1e3", 1000),
    ],
)
def test_parse_bytes(text: str | int, value: int) -> None:
    assert parse_bytes(text) == value


@pytest.mark.parametrize("text", ["", "GiB", "12 parsecs", "-4GiB", 0, -1, True, math.inf, math.nan, "0GB"])
def test_parse_bytes_refuses(text: str | float) -> None:
    with pytest.raises(ClusterError, match="is no amount of memory; write bytes, or a number with a unit of B, KB"):
        parse_bytes(text)


# ---- what is attached here


class _FakeDevice:
    def __init__(self, kind: str, limit: int | None, process_index: int, index: int = 0, slice_index: int = 0) -> None:
        self.device_kind = kind
        self.platform = "cpu" if kind == "cpu" else "gpu"
        self.process_index = process_index
        self.id = index
        self.slice_index = slice_index
        self._limit = limit

    def memory_stats(self) -> dict[str, int] | None:
        return None if self._limit is None else {"bytes_limit": self._limit}


def _attach(
    monkeypatch: pytest.MonkeyPatch, kind: str, count: int, processes: int = 1, limit: int | None = None
) -> None:
    devices = [_FakeDevice(kind, limit, i * processes // count) for i in range(count)]
    monkeypatch.setattr(jax, "devices", lambda: devices)
    monkeypatch.setattr(jax, "local_devices", lambda: devices)
    monkeypatch.setattr(jax, "process_count", lambda: processes)


def test_local_cpu() -> None:
    if jax.default_backend() != "cpu":
        pytest.skip("the default backend is no CPU")
    cluster = Cluster.local()
    assert (cluster.name, cluster.hosts, cluster.devices) == ("cpu", 1, len(jax.devices()))
    assert not cluster.reduce_scatter


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA H100 PCIe", "h100"),
        ("NVIDIA H200", "h200"),
        ("NVIDIA A100-SXM4-40GB", "a100"),
        ("Tesla V100-SXM2-16GB", "v100"),
        ("cpu", "cpu"),
    ],
)
def test_local_by_device_kind(monkeypatch: pytest.MonkeyPatch, kind: str, name: str) -> None:
    _attach(monkeypatch, kind, 16, processes=2, limit=12345)
    cluster = Cluster.local()
    assert (cluster.name, cluster.hosts, cluster.devices_per_host) == (name, 2, 8)
    assert (cluster.device.kind, cluster.device.memory_bytes) == (kind, 12345)


def test_local_of_an_unknown_kind(monkeypatch: pytest.MonkeyPatch) -> None:
    _attach(monkeypatch, "Quantum 9", 4)
    with pytest.raises(ClusterError, match=r"device kind 'Quantum 9' \(known: a100.*Cluster\.load\(path\)"):
        Cluster.local()


def test_local_with_uneven_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    _attach(monkeypatch, "cpu", 5, processes=2)
    assert Cluster.local().host_sizes == (3, 2)


def test_hosts_of_different_sizes(tmp_path: Path) -> None:
    cluster = _load(tmp_path, GOOD.replace("devices_per_host = 4", "devices_per_host = [8, 4]"))
    assert (cluster.devices, cluster.hosts, cluster.device_counts) == (12, 2, "8 + 4")
    # An axis of a size that divides both lies inside hosts.
    assert [str(m) for m in cluster.mesh_shapes(max_axes=2)][:3] == ["12", "3x4", "6x2"]
    mesh = MeshShape(("x", "y"), (3, 4))
    assert not cluster.axis_link(mesh, ("y",)).crosses_hosts
    across = cluster.axis_link(mesh, ("x",))
    assert (across.hosts, across.devices_per_host, across.groups_per_host) == (2, 1, 4)
    # Of axes that lie across hosts unevenly the worst group counts: two of its devices share one host's network.
    assert cluster.axis_link(MeshShape(("x", "y"), (2, 6)), ("y",)).devices_per_host == 2
    assert cluster.with_hosts(4, 4).host_sizes == ()


@pytest.mark.parametrize("sizes", [(8,), (4, 2)])
def test_host_sizes_that_contradict_counts(sizes: tuple[int, ...]) -> None:
    with pytest.raises(ClusterError, match="host_sizes"):
        dataclasses.replace(Cluster.named("h100", hosts=2), host_sizes=sizes)


# ---- compile-only devices


def test_compile_only_devices_of_cpu() -> None:
    with pytest.raises(ClusterError, match=r"'cpu' \(cpu\) has no target_config.*device_count=8"):
        Cluster.named("cpu").compile_only_devices()


@pytest.mark.skipif(importlib.util.find_spec("jax_plugins") is not None, reason="a JAX plugin is installed")
def test_compile_only_devices_without_the_plugin() -> None:
    with pytest.raises(
        ClusterError, match=r'CUDA plugin, which is not installed; run: pip install "ffjax\[gpu-compile\]'
    ):
        Cluster.named("h100", hosts=8).compile_only_devices()


def test_compile_only_devices_with_the_plugin_of_another_jax(monkeypatch: pytest.MonkeyPatch) -> None:
    """JAX leaves such a plugin alone, and then knows no platform of that name."""

    def unknown(*args: object, **options: object) -> None:
        raise NotImplementedError("platform cuda is not present")

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
    monkeypatch.setattr("jax.experimental.topologies.get_topology_desc", unknown)
    with pytest.raises(ClusterError, match=r"made no 1x1x8 topology of 'h100'.*must match jaxlib's; run: pip install"):
        Cluster.named("h100").compile_only_devices()


def test_compile_only_devices_with_the_plugin() -> None:
    pytest.importorskip("jax_plugins.xla_cuda12")
    devices = Cluster.named("h100", hosts=2).compile_only_devices()
    assert len(devices) == 16
    assert devices[8].process_index == 1


# ---- meshes


@pytest.mark.parametrize(
    ("hosts", "devices_per_host", "expected"),
    [
        (1, 1, "1"),
        (1, 7, "7"),
        (1, 6, "6 3x2"),
        (1, 8, "8 4x2 2x2x2"),
        (2, 1, "2"),
        (4, 1, "4 2x2"),
        (3, 4, "12 3x4 6x2 3x2x2"),
        (8, 8, "64 8x8 16x4 32x2 4x16 2x32 4x2x8 8x4x2 16x2x2"),
        (128, 8, "1024 128x8 256x4 512x2 64x16 32x32 16x8x8 32x4x8 64x2x8 128x4x2 256x2x2"),
    ],
)
def test_candidate_meshes(hosts: int, devices_per_host: int, expected: str) -> None:
    assert " ".join(map(str, Cluster.named("h100", hosts, devices_per_host).mesh_shapes())) == expected


@given(hosts=st.integers(1, 64), devices_per_host=st.integers(1, 16), max_axes=st.integers(1, 3))
def test_candidate_meshes_use_every_device_once(hosts: int, devices_per_host: int, max_axes: int) -> None:
    found = candidate_meshes(hosts, devices_per_host, max_axes)
    assert 1 <= len(found) <= 12
    assert len(set(found)) == len(found)
    assert [len(m.axes) for m in found] == sorted(len(m.axes) for m in found)
    for mesh in found:
        assert mesh.devices == hosts * devices_per_host
        assert mesh.axes == ("x", "y", "z")[: len(mesh.sizes)]
        assert len(mesh.axes) <= max_axes
        assert mesh.sizes == (1,) or min(mesh.sizes) > 1


@pytest.mark.parametrize("max_axes", [0, 4])
def test_candidate_meshes_have_one_to_three_axes(max_axes: int) -> None:
    with pytest.raises(ClusterError, match=rf"max_axes={max_axes}; a mesh has 1 to 3 axes"):
        candidate_meshes(1, 8, max_axes)


@pytest.mark.parametrize(
    ("sizes", "axes", "expected"),
    [  # devices, hosts, devices per host, groups per host; on hosts of 8
        ((8, 8), (), (1, 1, 1, 8)),
        ((8, 8), ("y",), (8, 1, 8, 1)),
        ((8, 8), ("x",), (8, 8, 1, 8)),
        ((8, 8), ("x", "y"), (64, 8, 8, 1)),
        ((8, 8), ("y", "x"), (64, 8, 8, 1)),
        ((16, 4), ("x",), (16, 8, 2, 4)),
        ((16, 4), ("y",), (4, 1, 4, 2)),
        ((2, 32), ("y",), (32, 4, 8, 1)),
        ((2, 32), ("x",), (2, 2, 1, 8)),
        ((8, 4, 2), ("x", "z"), (16, 8, 2, 4)),
        ((4, 6), ("y",), (6, 2, 2, 2)),  # not aligned: devices 6..11 are on both hosts
    ],
)
def test_axis_group(sizes: tuple[int, ...], axes: tuple[str, ...], expected: tuple[int, ...]) -> None:
    group = axis_group(MeshShape(("x", "y", "z")[: len(sizes)], sizes), axes, 8)
    assert (group.devices, group.hosts, group.devices_per_host, group.groups_per_host) == expected


def test_axis_link_of_a_mesh_that_does_not_fit() -> None:
    cluster = Cluster.named("h100")
    assert isinstance(cluster.axis_link(MeshShape(("x",), (8,)), ("x",)), AxisGroup)
    with pytest.raises(
        ClusterError, match=r"mesh 4x4 has 16 devices but cluster 'h100' has 8 \(1 x 8\); use one of 8, 4x2"
    ):
        cluster.axis_link(MeshShape(("x", "y"), (4, 4)), ("x",))
    with pytest.raises(ClusterError, match="no axis 'q'; its axes are x"):
        cluster.axis_link(MeshShape(("x",), (8,)), ("q",))


# ---- roofline


def test_roofline_of_large_matmul_is_compute_and_of_addition_is_memory() -> None:
    device = Cluster.named("h100").device
    n = 8192
    matmul = op_seconds(2 * n**3, 6 * n * n, "bfloat16", device, matmul=True)
    assert matmul == pytest.approx(2 * n**3 / (989.4e12 * 0.75))
    assert op_seconds(2 * n**3, 12 * n * n, "float32", device, matmul=True) == pytest.approx(2 * matmul, rel=1e-3)
    assert op_seconds(2 * n**3, 12 * n * n, "complex64", device, matmul=True) == pytest.approx(2 * matmul, rel=1e-3)
    assert op_seconds(n * n, 12 * n * n, "float32", device, matmul=False) == pytest.approx(12 * n * n / (3.35e12 * 0.9))
    assert op_seconds(0, 0, "float32", device, matmul=False) == 0


@given(flops=st.floats(0, 1e18), size=st.floats(0, 1e12), more=st.floats(1, 10), matmul=st.booleans())
def test_roofline_grows_and_vectorizes(flops: float, size: float, more: float, matmul: bool) -> None:
    device = Cluster.named("a100").device
    seconds = op_seconds(flops, size, "bfloat16", device, matmul=matmul)
    assert op_seconds(flops * more, size, "bfloat16", device, matmul=matmul) >= seconds
    assert op_seconds(flops, size * more, "bfloat16", device, matmul=matmul) >= seconds
    both = op_seconds(np.array([flops, 0.0]), np.array([size, 0.0]), "bfloat16", device, matmul=matmul)
    np.testing.assert_array_equal(both, [seconds, 0.0])


def test_processes_with_one_gpu_each_are_on_the_hosts_that_xla_says() -> None:
    # Ranks dealt out in turn, as some schedulers do: processes 0 and 2 on one host, 1 and 3 on the other.
    gpus = [_FakeDevice("NVIDIA H100 80GB HBM3", None, p, index=p, slice_index=p % 2) for p in range(4)]
    cluster = Cluster.local(gpus)  # type: ignore[arg-type]
    assert (cluster.hosts, cluster.devices_per_host) == (2, 2)
    assert [d.process_index for d in by_host(gpus)] == [0, 2, 1, 3]  # type: ignore[arg-type]


def test_processes_of_cpu_devices_are_hosts() -> None:
    cpus = [_FakeDevice("cpu", None, p, index=2048 * p) for p in (1, 0)]
    assert Cluster.local(cpus).hosts == 2  # type: ignore[arg-type]
    assert [d.id for d in by_host(cpus)] == [0, 2048]  # type: ignore[arg-type]
