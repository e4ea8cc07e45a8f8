"""Profiles: kept whole, refused where they do not belong, and priced exactly, between and beyond their samples."""

from __future__ import annotations

import dataclasses
import sqlite3
import threading
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ffjax
from ffjax.cost.cluster import Cluster
from ffjax.cost.collectives import CollectiveModel, described_coefficients
from ffjax.cost.hardware import Device
from ffjax.cost.kernels import Kernel, kernels
from ffjax.cost.meshes import AxisGroup
from ffjax.cost.op_times import OpTimes
from ffjax.cost.profiles import store as profile_store
from ffjax.cost.profiles.calibrate import calibrated, cluster_text
from ffjax.cost.profiles.interpolate import Nearness, Table
from ffjax.cost.profiles.link_fits import fit_line
from ffjax.cost.profiles.profile import Analysis, Profile, Sample, jax_version, machine_kind
from ffjax.cost.profiles.store import ProfileStore, open_profile
from ffjax.cost.profiles.text import from_text, load_text, to_text
from ffjax.cost.region_costs import Splits
from ffjax.cost.roofline import op_seconds
from ffjax.errors import FfjaxWarning, ProfileError
from ffjax.ir.assignment import Assignment
from ffjax.ir.graph import build_graph
from ffjax.ir.regions import Regions, find_regions
from ffjax.ir.spec import Collective, MeshShape
from ffjax.ir.trace import trace
from ffjax.plan import Plan
from ffjax.profiling.grid import grid
from ffjax.profiling.measure import Case

H100 = Cluster.named("h100")
KIND = H100.device.kind
MESH = MeshShape(("x",), (8,))


def sample(kind: str, sizes: Sequence[float], seconds: float, **more: object) -> Sample:
    figures = {"flops": 1e6, "bytes": 1e6, "spread": 0.01, "runs": 5, "date": "2026-01-31", **more}
    return Sample(kind=kind, sizes=tuple(map(float, sizes)), seconds=seconds, **figures)  # type: ignore[arg-type]


def matmul(device: Device, m: int, n: int, k: int, slower: float) -> Sample:
    """What a device would measure that is `slower` times slower than its roofline, launch included."""
    flops, size = 2.0 * m * n * k, 4.0 * (m * k + k * n + m * n)
    seconds = slower * (op_seconds(flops, size, "float32", device, matmul=True) + device.kernel_s)
    return sample("matmul", (1, m, n, k), seconds, dtype="float32", flops=flops, bytes=size)


def profile(*samples: Sample, kind: str = KIND, jax: str = "", analyses: Sequence[Analysis] = ()) -> Profile:
    return Profile(
        name="test.toml", device_kind=kind, jax=jax or jax_version(), samples=samples, analyses=tuple(analyses)
    )


SOME = profile(
    sample("matmul", (1, 256, 512, 1024), 1.25e-5, dtype="bfloat16"),
    sample("elementwise", (4096,), 2.5e-6, params='odd "params"\\'),
    sample("all_reduce", (8, 1, 8, 2**20), 3e-5),
    analyses=[
        Analysis(
            kind="fft", params="n=1", sizes=(8.0, 1024.0), flops=8.0, bytes=8.0, compiled_flops=99.0, compiled_bytes=7.5
        )
    ],
)


# ---- kept whole


def test_database_round_trip(tmp_path: Path) -> None:
    store = ProfileStore(tmp_path / "new" / "profiles.sqlite")
    assert store.groups() == []
    store.add(SOME)
    other = dataclasses.replace(SOME, jax="0.0.1", samples=SOME.samples[:1], analyses=())
    store.add(other)
    assert store.profile(KIND, jax_version()) == SOME
    assert store.profile(KIND, "0.0.1") == other
    assert sorted(store.groups()) == sorted([(KIND, jax_version()), (KIND, "0.0.1")])
    assert not store.profile("another kind", jax_version()).samples


def test_measuring_again_replaces(tmp_path: Path) -> None:
    store = ProfileStore(tmp_path / "p.sqlite")
    store.add(SOME)
    again = dataclasses.replace(SOME.samples[0], seconds=1.0)
    store.add(profile(again))
    assert len(store.profile(KIND, jax_version()).samples) == len(SOME.samples)
    assert again in store.profile(KIND, jax_version()).samples


def test_several_writers_lose_nothing(tmp_path: Path) -> None:
    def write(number: int) -> None:
        store = ProfileStore(tmp_path / "p.sqlite")
        for i in range(5):
            store.add(profile(sample("elementwise", (100 * number + i + 1,), 1e-6)))

    threads = [threading.Thread(target=write, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(ProfileStore(tmp_path / "p.sqlite").profile(KIND, jax_version()).samples) == 20


def test_text_round_trip(tmp_path: Path) -> None:
    assert from_text(to_text(SOME), "again") == SOME
    assert to_text(from_text(to_text(SOME), "again")) == to_text(SOME)
    (tmp_path / "p.toml").write_text(to_text(SOME))
    assert load_text(tmp_path / "p.toml").digest == SOME.digest


def test_digest_is_of_the_content() -> None:
    assert dataclasses.replace(SOME, name="other").digest == SOME.digest
    assert dataclasses.replace(SOME, samples=SOME.samples[1:]).digest != SOME.digest
    assert dataclasses.replace(SOME, jax="0.0.1") != SOME


def _overwrite(path: Path) -> None:
    path.write_bytes(b"this is no database, but somebody's notes" * 100)


def _truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:5000])


def _empty(path: Path) -> None:
    path.write_bytes(b"")


def _of_another_format(path: Path) -> None:
    with sqlite3.connect(path) as database:
        database.execute("PRAGMA user_version = 7")
    database.close()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (
            _overwrite,
            r"is damaged: file is not a database\. Nothing was changed\. Remedy: move it away and measure",
        ),
        (_truncate, r"is damaged: database disk image is malformed\. Nothing was changed\. Remedy:.*\.recover"),
        (_empty, r"is empty\. Remedy: measure into it: ffjax profile"),
        (
            _of_another_format,
            r"has format 7, this ffjax reads 1\. Remedy: name another database, or move this",
        ),
    ],
)
def test_damaged_database(tmp_path: Path, damage: Callable[[Path], None], message: str) -> None:
    path = tmp_path / "p.sqlite"
    ProfileStore(path).add(SOME)
    damage(path)
    before = path.read_bytes()
    with pytest.raises(ProfileError, match=rf"'.*p\.sqlite' {message}"):
        ProfileStore(path).profile(KIND, jax_version())
    assert path.read_bytes() == before
    if damage is not _empty:
        with pytest.raises(ProfileError):
            ProfileStore(path).add(SOME)
        assert path.read_bytes() == before


def test_a_failed_write_leaves_what_was_there(tmp_path: Path) -> None:
    store = ProfileStore(tmp_path / "p.sqlite")
    store.add(SOME)
    half = dataclasses.replace(SOME.samples[0], sizes=(1.0, 2.0, 3.0, 4.0))
    bad = dataclasses.replace(SOME.samples[1], params=object())  # type: ignore[arg-type]
    with pytest.raises(ProfileError):
        store.add(profile(half, bad))
    assert store.profile(KIND, jax_version()) == SOME


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("format = 1", "format = 9", r"has format 9, this ffjax reads 1\. Remedy: measure again"),
        ('jax = "', 'jaxx = "', r"is damaged: lacks 'jax'\. Remedy: restore the file, or measure again"),
        ("1.25e-05", "", r"is damaged: .*Remedy"),
        ("1.25e-05", "-1.0", r"matmul of sizes \[1\.0, 256\.0, 512\.0, 1024\.0\] took -1\.0 s\. Remedy"),
        ("1.25e-05", '"fast"', r"is damaged: could not convert string to float: 'fast'"),
        ('kind = "matmul"', "", r"is damaged: lacks 'kind'"),
        ("[8, 1, 8, 1048576, 1000000, 1000000,", "[", r"is damaged: a row of all_reduce is .* not 6 fields or more"),
        ("[8, 1, 8, 1048576,", "[8, 1048576,", r"all_reduce has entries of 2 sizes, expected 4"),
        ("rows = [", "rows = 4\nrest = [", r"is damaged: the rows of all_reduce are no list"),
    ],
)
def test_damaged_text(old: str, new: str, message: str) -> None:
    text = to_text(SOME)
    assert old in text
    with pytest.raises(ProfileError, match=message):
        from_text(text.replace(old, new, 1), "p.toml")


# ---- refused where it does not belong


def test_nobody_profiled_this_kind(tmp_path: Path) -> None:
    path = tmp_path / "p.sqlite"
    ProfileStore(path).add(SOME)
    with pytest.raises(
        ProfileError, match=rf"has no measurements of '{Cluster.named('a100').device.kind}' with jax .*it has '{KIND}'"
    ):
        Cluster.named("a100").with_profile(path)
    with pytest.raises(ProfileError, match=r"there is no profile '.*q\.toml'\. Remedy: check the path, or measure"):
        open_profile(tmp_path / "q.toml", KIND, "0.1")


def test_a_shipped_profile_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(profile_store, "SHIPPED", tmp_path)
    (tmp_path / "h100.toml").write_text(to_text(SOME))
    assert H100.with_profile("h100").profile == SOME


@pytest.mark.parametrize(
    ("cluster", "jax", "message"),
    [
        ("a100", jax_version(), rf"profile 'test.toml' is of the device kind '{KIND}', not 'NVIDIA A100"),
        ("h100", "0.0.1", rf"profile 'test.toml' was measured under jax 0\.0\.1, not {jax_version()}"),
        ("a100", "0.0.1", r"is of the device kind .* and was measured under jax 0\.0\.1"),
    ],
)
def test_stale_or_foreign(cluster: str, jax: str, message: str) -> None:
    other = profile(*SOME.samples, jax=jax)
    with pytest.raises(ProfileError, match=rf"{message}.*Remedy: measure there .*accept_other=True"):
        Cluster.named(cluster).with_profile(other)
    with pytest.warns(FfjaxWarning, match=message) as caught:
        assert Cluster.named(cluster).with_profile(other, accept_other=True).profile is other
    assert len(caught) == 1


def test_a_cpu_is_a_kind_of_its_own() -> None:
    assert machine_kind("NVIDIA H100", "gpu", 8) == "NVIDIA H100"
    assert machine_kind("cpu", "cpu", 8) != machine_kind("cpu", "cpu", 2)
    foreign = profile(sample("elementwise", (4096,), 1e-6), kind="cpu: another, 3 cores as 8 devices")
    with pytest.raises(ProfileError, match="is of the device kind 'cpu: another"):
        Cluster.named("cpu").with_profile(foreign)


def test_local_uses_what_was_measured_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(profile_store, "DATABASE", tmp_path / "p.sqlite")
    plain = Cluster.local()
    assert plain.profile is None
    store = ProfileStore(tmp_path / "p.sqlite")
    store.add(profile(*SOME.samples, kind="another machine"))
    store.add(profile(*SOME.samples, kind=plain.machine_kind, jax="0.0.1"))
    assert Cluster.local() == plain
    here = profile(*SOME.samples, kind=plain.machine_kind)
    store.add(here)
    assert Cluster.local().profile == here


# ---- between samples


def test_table_between_and_beyond() -> None:
    table = Table([(16.0,), (64.0,), (1024.0,)], [1.0, 3.0, 3.0])
    value, nearness, _ = table.at(np.array([[16.0], [32.0], [256.0], [2.0], [1e9]]))
    np.testing.assert_allclose(value, [1.0, 2.0, 3.0, 1.0, 3.0])
    assert list(nearness) == [Nearness.EXACT, Nearness.BETWEEN, Nearness.BETWEEN, Nearness.OUTSIDE, Nearness.OUTSIDE]


def test_table_of_several_sizes() -> None:
    points = [(a, b) for a in (16.0, 64.0, 256.0) for b in (16.0, 64.0, 256.0)]
    table = Table(points, [np.log2(a) for a, _ in points])
    value, nearness, _ = table.at(np.array([*points, (32.0, 64.0), (2**20, 64.0)]))
    np.testing.assert_allclose(value[:-2], [np.log2(a) for a, _ in points], rtol=1e-9)
    assert list(nearness) == [Nearness.EXACT] * 9 + [Nearness.BETWEEN, Nearness.OUTSIDE]
    assert value[-2] == pytest.approx(5, abs=0.3)
    assert value[-1] == pytest.approx(8, abs=0.3)


# ---- prices


def regions_of(fn: Callable[..., object], *shapes: tuple[int, ...], dtype: object = jnp.float32) -> Regions:
    return find_regions(build_graph(trace(fn, [jax.ShapeDtypeStruct(s, dtype) for s in shapes])))  # type: ignore[arg-type]


def product(x: jax.Array, w: jax.Array) -> jax.Array:
    return x @ w


def shared(x: jax.Array, w: jax.Array) -> jax.Array:
    return jnp.einsum("abk,ck->abc", x, w)


def priced(regions: Regions, times: OpTimes) -> tuple[Kernel, dict[str, np.ndarray]]:
    """The only working kernel, whole and with its first dimension split by eight."""
    (kernel,) = kernels(regions)
    region = regions.regions[kernel.region]
    splits = Splits(region, [Assignment((-1,), (-1,)), Assignment((0,), (-1,))], CollectiveModel(MESH, H100))
    return kernel, dict(times.by_source([kernel], splits))


def test_measured_then_interpolated_then_counted() -> None:
    regions = regions_of(product, (1024, 512), (512, 256))
    kernel, counted = priced(regions, OpTimes(H100.device))
    assert kernel.work.key == ("matmul", "", "float32")
    assert [size for size, _ in kernel.work.sizes] == [1, 1024, 256, 512]
    assert list(counted) == ["counted"]
    slow = [matmul(H100.device, m, 256, 512, 3.0) for m in (1024, 64)]
    _, found = priced(regions, OpTimes(H100.device, profile(*slow)))
    np.testing.assert_allclose(found["measured"], [slow[0].seconds, 0], rtol=1e-9)
    # 1024 / 8 rows were not measured; all that was is three times slower than counted.
    np.testing.assert_allclose(found["interpolated"], [0, 3 * counted["counted"][1]], rtol=1e-9)
    _, found = priced(regions, OpTimes(H100.device, profile(*(dataclasses.replace(s, dtype="int8") for s in slow))))
    np.testing.assert_array_equal(found["counted"], counted["counted"])
    _, found = priced(regions, OpTimes(H100.device, profile(matmul(H100.device, 8, 8, 8, 3.0))))
    assert list(found) == ["extrapolated"]


def test_analysed_where_not_measured() -> None:
    regions = regions_of(lambda x: jnp.sort(x, axis=1), (1024, 512))
    kernel, counted = priced(regions, OpTimes(H100.device))
    sizes = tuple(size for size, _ in kernel.work.sizes)
    seen = Analysis(
        kind="sort",
        params=kernel.work.params,
        dtype="float32",
        sizes=sizes,
        flops=kernel.flops,
        bytes=2 * 4 * 1024 * 512,
        compiled_flops=1e4 * kernel.flops,
        compiled_bytes=2 * 4 * 1024 * 512,
    )
    _, found = priced(regions, OpTimes(H100.device, profile(analyses=[seen])))
    seconds = 1e4 * kernel.flops / H100.device.vector_flops_per_s + H100.device.kernel_s
    assert found["compiled"][0] == pytest.approx(seconds)
    assert seconds > 10 * counted["counted"][0]
    slow = sample("sort", sizes, 7.0, params=kernel.work.params, dtype="float32")
    _, found = priced(regions, OpTimes(H100.device, profile(slow, analyses=[seen])))
    assert found["measured"][0] == pytest.approx(7.0)


@pytest.mark.parametrize(
    ("fn", "shapes", "key", "sizes"),
    [
        (product, [(8, 16, 32), (8, 32, 4)], ("matmul", "", "float32"), (8, 16, 4, 32)),
        (
            lambda x, w: jnp.einsum("abk,ck->abc", x, w),
            [(4, 8, 16), (2, 16)],
            ("matmul", "", "float32"),
            (1, 32, 2, 16),
        ),
        (lambda t: t[jnp.arange(6) * 2], [(64, 32)], ("gather", "", "float32"), (6, 32, 64)),
        (
            lambda x, w: jax.lax.conv_general_dilated(x, w, (2, 2), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")),
            [(4, 16, 16, 8), (3, 3, 8, 32)],
            (
                "convolution",
                "window_strides=(2,2) lhs_dilation=(1,1) rhs_dilation=(1,1) feature_group_count=1 batch_group_count=1",
                "float32",
            ),
            (4, 8, 32, 8, 8, 3, 3),
        ),
        (lambda x: jnp.cumsum(x, axis=1), [(4, 64)], ("cumsum", "axis=1 reverse=False", "float32"), (4, 64)),
    ],
    ids=["batched", "einsum", "gather", "convolution", "cumsum"],
)
def test_sizes_of_work(
    fn: Callable[..., object], shapes: list[tuple[int, ...]], key: tuple[str, str, str], sizes: tuple[float, ...]
) -> None:
    found = {k.work.key: tuple(size for size, _ in k.work.sizes) for k in kernels(regions_of(fn, *shapes))}
    assert found[key] == sizes


def test_measured_collectives() -> None:
    def line(kind: str, n: int, alpha: float, beta: float) -> list[Sample]:
        return [sample(kind, (n, 1, n, size), alpha + beta * size) for size in (2.0**12, 2.0**20, 2.0**26)]

    measured = profile(*line("all_reduce", 8, 1e-3, 1e-9), *line("all_gather", 2, 2e-3, 4e-9))
    model = CollectiveModel(MESH, dataclasses.replace(H100, profile=measured))
    assert model.coefficients("all_reduce", ("x",)) == pytest.approx((1e-3, 1e-9), rel=1e-6)
    assert model.source(Collective("all_reduce", ("x",), 1e6)) == "measured"
    group = AxisGroup(devices=2, hosts=1, devices_per_host=2, groups_per_host=1)
    ratio = 2e-3 / described_coefficients("all_gather", group, H100)[0]
    described = CollectiveModel(MESH, H100)
    assert model.coefficients("all_gather", ("x",))[0] == pytest.approx(
        ratio * described.coefficients("all_gather", ("x",))[0], rel=1e-6
    )
    assert model.source(Collective("all_gather", ("x",), 1e6)) == "extrapolated"
    assert model.coefficients("all_to_all", ("x",)) == described.coefficients("all_to_all", ("x",))
    assert model.source(Collective("all_to_all", ("x",), 1e6)) == "counted"


def test_a_line_has_no_negative_part() -> None:
    assert fit_line([(1e3, 1e-3), (1e6, 0.9e-3)]).beta_s_per_byte == 0
    assert fit_line([(1e6, 1e-6), (1e8, 1e-2)]).alpha_s == 0


def test_measuring_what_was_described_changes_nothing() -> None:
    """A program priced by a profile of a device that is just as described costs what it cost without."""

    def ideal(case: Case) -> Sample:
        return sample(
            case.kind,
            case.sizes,
            case.guess_s,
            params=case.params,
            dtype=case.dtype,
            flops=case.flops,
            bytes=case.bytes,
        )

    cases = grid(dataclasses.replace(H100, devices_per_host=1))
    times = H100.with_profile(profile(*map(ideal, cases)))
    regions = regions_of(train_step, (1024, 1024), (4096, 1024))
    for kernel in kernels(regions):
        region = regions.regions[kernel.region]
        whole = Splits(region, [Assignment((-1,), (-1,))], CollectiveModel(MESH, H100))
        with_, without = (OpTimes(c.device, c.profile).seconds([kernel], whole) for c in (times, H100))
        assert with_[0] == pytest.approx(without[0], rel=0.1), kernel


# ---- calibration


def test_fitted_figures_are_those_of_the_device_measured() -> None:
    true = dataclasses.replace(
        H100.device, matmul_efficiency=0.6, memory_efficiency=0.8, kernel_s=5e-6, flops_per_s={"float32": 400e12}
    )
    streams = [
        sample("elementwise", (size,), size / (3.35e12 * 0.8) + 5e-6, bytes=size, flops=size / 12)
        for size in (2.0**e for e in range(12, 33, 2))
    ]
    matmuls = [matmul(true, m, 8192, 8192, 1.0) for m in (2048, 4096, 8192, 16384)]
    links = [
        sample("all_reduce", (n, 1, n, size), 5e-6 + 2 * np.log2(n) * 3e-6 + 2 * (n - 1) / n * size / 300e9)
        for n in (2, 4, 8)
        for size in (2.0**12, 2.0**20, 2.0**28)
    ]
    found = calibrated(H100, profile(*streams, *matmuls, *links))
    device = found.device
    assert device.peak_flops_per_s("float32") * device.matmul_efficiency == pytest.approx(400e12 * 0.6, rel=0.05)
    assert device.memory_bytes_per_s * device.memory_efficiency == pytest.approx(3.35e12 * 0.8, rel=0.01)
    assert device.kernel_s == pytest.approx(5e-6, rel=0.05)
    assert device.vector_flops_per_s == H100.device.vector_flops_per_s
    assert found.links[0].effective_bytes_per_s == pytest.approx(300e9, rel=0.01)
    assert found.links[0].latency_s == pytest.approx(3e-6, rel=0.05)
    assert found.links[1] == H100.links[1]
    assert calibrated(H100, profile()) == H100


def test_fitted_cluster_as_a_file(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text(cluster_text(H100))
    assert Cluster.load(path) == dataclasses.replace(H100, target_config=None)


# ---- a whole plan


def train_step(w: jax.Array, x: jax.Array) -> jax.Array:
    return w - 0.1 * jax.grad(lambda w: jnp.sum(jnp.tanh(x @ w) ** 2))(w)


def test_a_plan_says_what_it_was_priced_by(tmp_path: Path) -> None:
    shapes = jax.ShapeDtypeStruct((1024, 1024), jnp.float32), jax.ShapeDtypeStruct((4096, 1024), jnp.float32)
    plain = ffjax.plan(train_step, *shapes, cluster=H100)
    assert plain.profile == ""
    assert plain.estimate.sources == {"counted": 1.0}
    slow = profile(*(matmul(H100.device, m, 1024, 1024, 5.0) for m in (512, 4096)))
    plan = ffjax.plan(train_step, *shapes, cluster=H100.with_profile(slow))
    assert plan.profile == f"test.toml {slow.digest}"
    assert set(plan.estimate.sources) > {"counted"}
    assert sum(plan.estimate.sources.values()) == pytest.approx(1, abs=1e-3)
    assert plan.estimate.compute_s > 1.5 * plain.estimate.compute_s
    assert f"measured costs from {plan.profile}" in plan.explain()
    assert "% counted" in plan.explain()
    plan.save(tmp_path / "p.json")
    assert Plan.load(tmp_path / "p.json").profile == plan.profile


def test_the_search_and_the_estimate_agree_under_a_profile() -> None:
    measured = profile(
        *(matmul(H100.device, m, 1024, 1024, 5.0) for m in (512, 4096)),
        *(sample("elementwise", (size,), 4e-6 + size / 1e12, bytes=size) for size in (2.0**16, 2.0**20, 2.0**24)),
    )
    shapes = jax.ShapeDtypeStruct((1024, 1024), jnp.float32), jax.ShapeDtypeStruct((4096, 1024), jnp.float32)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        plan = ffjax.plan(train_step, *shapes, cluster=H100.with_profile(measured))
    best = min(c.step_s for c in plan.search.competitors if c.fits)
    assert plan.estimate.step_s == pytest.approx(best, rel=1e-6)
