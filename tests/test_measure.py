"""Measuring: by a fake clock, and a little for real; every op that plans need can be run by itself."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from click.testing import CliRunner

from ffjax.cli import main
from ffjax.cost.cluster import Cluster
from ffjax.cost.profiles.profile import jax_version
from ffjax.cost.profiles.store import ProfileStore
from ffjax.cost.profiles.text import load_text
from ffjax.errors import ProfileError
from ffjax.ir.spec import COLLECTIVE_KINDS
from ffjax.ir.trace import trace
from ffjax.profiling import measure as timing
from ffjax.profiling.grid import grid, kinds, matmul_case
from ffjax.profiling.measure import Case, Measured, Operand, describe, measure, prepare_program, spread_out
from ffjax.profiling.profile import layouts_of, needs, profile

CPU = Cluster.named("cpu")


class FakeClock:
    """Time passes only while something runs."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def case(name: str, seconds: float = 1e-3) -> Case:
    return Case(kind=name, sizes=(1.0,), flops=1.0, bytes=1.0, function=lambda x: x, operands=(), guess_s=seconds)


def fake_measure(
    cases: Sequence[Case], runs: dict[str, list[float]], repeats: int = 4, seconds: float = 1e9
) -> Measured:
    """Measures cases whose programs take what `runs` says, one after the other, the last again and again."""
    clock = FakeClock()

    def prepare(case: Case, devices: Sequence[jax.Device]) -> tuple[Callable[[], None], int]:
        if not runs[case.kind]:
            raise MemoryError("no room\nfor it")
        left = list(runs[case.kind])

        def run() -> None:
            clock.now += left.pop(0) if len(left) > 1 else left[0]

        return run, 4

    return measure(cases, jax.devices(), seconds=seconds, clock=clock, prepare=prepare)


def test_median_of_the_runs_after_the_first() -> None:
    found = fake_measure([case("a")], {"a": [9.0, 0.04, 0.04, 0.08, 0.04, 0.12]})
    (sample,) = found.samples
    assert sample.seconds == pytest.approx(0.01)
    assert sample.runs == 5
    assert sample.spread == pytest.approx((0.02 - 0.01) / 2 / 0.01)


def test_long_runs_are_few() -> None:
    found = fake_measure([case("long"), case("short")], {"long": [2.0], "short": [0.01]})
    assert [s.runs for s in found.samples] == [2, 5]


def test_time_is_up() -> None:
    cases = [case(f"c{i}") for i in range(20)]
    found = fake_measure(cases, {c.kind: [1.0] for c in cases}, seconds=10.0)
    assert 0 < len(found.samples) < 20
    assert [c.kind for c in found.left_out] == [f"c{i}" for i in range(len(found.samples), 20)]


def test_what_fails_is_said() -> None:
    found = fake_measure([case("big"), case("small")], {"big": [], "small": [0.01]})
    assert [s.kind for s in found.samples] == ["small"]
    assert [(c.kind, why) for c, why in found.failed] == [("big", "MemoryError: no room")]


@pytest.mark.parametrize("count", [1, 2, 5, 8, 100])
def test_spread_out(count: int) -> None:
    order = list(spread_out(count))
    assert sorted(order) == list(range(count))
    if count >= 8:
        assert max(order[:4]) - min(order[:4]) > count / 2


# ---- for real


@pytest.fixture(scope="module")
def quick() -> pytest.MonkeyPatch:
    """Short programs."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(timing, "_PROGRAM_S", 1e-4)
        yield patch


@pytest.mark.usefixtures("quick")
def test_a_product_takes_longer_than_a_smaller_one() -> None:
    cases = [matmul_case(CPU, "float32", 1, n, n, n) for n in (64, 512)]
    small, large = measure(cases, jax.devices()[:1]).samples
    assert small.sizes == (1, 64, 64, 64)
    assert 1e-8 < small.seconds < large.seconds < 10


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("kind", kinds())
def test_every_kind_of_the_grid_runs(kind: str) -> None:
    cases = sorted(grid(CPU, [kind]), key=lambda c: c.bytes)
    assert cases
    assert len({c.identity for c in cases}) == len(cases)
    chosen = [c for c in cases if c.group in (1, 4)][:1]
    found = measure(chosen, jax.devices())
    assert not found.failed
    assert found.samples[0].seconds > 0


def test_collectives_of_the_grid_are_those_of_their_group() -> None:
    for kind in COLLECTIVE_KINDS:
        cases = grid(CPU, [kind])
        assert {c.group for c in cases} == {2, 4, 8}
        assert {c.sizes[:3] for c in cases} == {(n, 1, n) for n in (2, 4, 8)}


def everything(x: jax.Array, w: jax.Array, table: jax.Array, rows: jax.Array) -> tuple[object, ...]:
    """Each op that does work, once or more."""
    h = jnp.tanh(x @ w)
    image = h.reshape(16, 8, 8, 1)
    kernel = w[:3, :3].reshape(3, 3, 1, 1)
    out = jax.lax.conv_general_dilated(image, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))
    taken = table[rows]
    return (
        jnp.sort(h, axis=1),
        jnp.cumsum(h, axis=0),
        jax.lax.top_k(h, 3),
        jnp.fft.rfft(h, axis=1),
        jnp.linalg.cholesky(w @ w.T + 64 * jnp.eye(64)),
        out,
        jax.grad(lambda t: jnp.sum(t[rows] ** 2))(table),
        taken.sum(axis=0),
    )


@pytest.fixture(scope="module")
def cases() -> list[Case]:
    shapes = [(16, 64), (64, 64), (32, 8)]
    structs = [jax.ShapeDtypeStruct(s, jnp.float32) for s in shapes] + [jax.ShapeDtypeStruct((24,), jnp.int32)]
    return needs(layouts_of(trace(everything, structs), CPU), CPU)


@pytest.mark.usefixtures("quick")
def test_every_op_that_a_plan_needs_runs_by_itself(cases: list[Case]) -> None:
    alike = {c.kind: c for c in cases}
    assert {"matmul", "convolution", "sort", "cumsum", "top_k", "fft", "cholesky", "gather", "scatter-add"} <= set(
        alike
    )
    assert len({c.identity for c in cases}) == len(cases)
    split = [c for c in cases if c.kind == "matmul" and c.sizes == (1, 2, 64, 64)]
    assert split, "data parallelism leaves two rows to each device"
    found = measure(list(alike.values()), jax.devices()[:1])
    assert not found.failed, [(describe(c), why) for c, why in found.failed]


def test_compiled_cost_analysis(cases: list[Case]) -> None:
    found = profile([c for c in cases if c.kind in ("sort", "matmul")], CPU, [], timed=False, analysed=True).profile
    assert not found.samples
    assert found.device_kind == CPU.machine_kind
    for analysis in found.analyses:
        if analysis.kind == "matmul":
            assert analysis.compiled_flops == pytest.approx(analysis.flops)
        if analysis.kind == "sort":
            assert analysis.compiled_flops > analysis.flops


def test_devices_of_another_kind() -> None:
    if jax.default_backend() != "cpu":
        pytest.skip("needs CPU devices")
    with pytest.raises(ProfileError, match=r"the devices here are 'cpu', those of 'h100' 'NVIDIA H100.*--analyse"):
        profile([], Cluster.named("h100"), jax.devices())


@pytest.mark.usefixtures("quick")
def test_in_place_results_feed_the_next_run() -> None:
    adds = Case(
        kind="x",
        sizes=(1.0,),
        flops=1.0,
        bytes=1.0,
        function=lambda total, more: total + more,
        operands=(Operand(shape=(4,), dtype="float32"), Operand(shape=(4,), dtype="float32")),
        in_place=True,
        guess_s=1e-5,
    )
    run, repeats = prepare_program(adds, jax.devices())
    assert repeats == 10
    run()
    run()  # the first operand was donated: this reads the result


# ---- the command


@pytest.mark.usefixtures("quick")
def test_command(tmp_path: Path) -> None:
    out, database, cluster = tmp_path / "p.toml", tmp_path / "p.sqlite", tmp_path / "c.toml"
    only = ["--only", "elementwise", "--only", "all_gather", "--database", str(database), "--seconds", "4"]
    result = CliRunner().invoke(
        main, ["profile", *only, "--out", str(out), "--cluster-out", str(cluster)], catch_exceptions=False
    )
    assert result.exit_code == 0, result.output
    assert "ops and collectives timed" in result.output
    assert "measured / described" in result.output
    here = Cluster.local()
    assert load_text(out) == ProfileStore(database).profile(here.machine_kind, jax_version())
    assert {s.kind for s in load_text(out).samples} == {"elementwise", "all_gather"}
    assert here.with_profile(out).profile == here.with_profile(database).profile
    fitted, used = Cluster.load(cluster), here.with_profile(out)
    assert fitted.device.kernel_s == pytest.approx(used.device.kernel_s, rel=1e-4)
    assert fitted.links[0].latency_s == pytest.approx(used.links[0].latency_s, rel=1e-4)


def test_command_refuses(tmp_path: Path) -> None:
    result = CliRunner().invoke(main, ["profile", "--only", "matmull"])
    assert result.exit_code == 2
    assert "'matmull' is no kind of work; known: matmul" in result.output
    result = CliRunner().invoke(main, ["profile", "--plan", "p.json"])
    assert "--plan needs the target" in result.output
    result = CliRunner().invoke(main, ["profile", "--cluster", "h100", "--database", str(tmp_path / "p.sqlite")])
    assert result.exit_code == 2
    assert "those of 'h100' 'NVIDIA H100" in result.output
    assert not (tmp_path / "p.sqlite").exists()
