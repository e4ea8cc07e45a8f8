"""The command line, on small steps written to a folder; and one whole run of the demonstration."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import xml.dom.minidom
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

import click
import click.testing
import pytest

import ffjax
import ffjax.examples
from ffjax import cli
from ffjax.cli.targets import load_target, read_value
from ffjax.demo import CHECKED_STEPS, UNSHARDED, Run, agree, run_demo, verdict
from ffjax.errors import FfjaxError
from ffjax.planning import planner
from ffjax.strategies import all_strategies
from ffjax.strategies.search import SearchResult

PLAIN = """
import jax, jax.numpy as jnp

def train_step(params, batch):
    def loss(p):
        return jnp.mean((jnp.tanh(batch @ p["up"]) @ p["down"] - batch) ** 2)
    value, grads = jax.value_and_grad(loss)(params)
    return jax.tree.map(lambda p, g: p - 0.1 * g, params, grads), value

def example_args():
    f32 = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.float32)
    return {"up": f32(16, 32), "down": f32(32, 16)}, f32(64, 16)

def other_args():
    params, _ = example_args()
    return params, jax.ShapeDtypeStruct((128, 16), jnp.float32)

def one_array():
    return jnp.zeros(3)

def two_arguments(a, b):
    return a, b

def one_argument(a):
    return a,

not_a_function = 3
"""

SIZED = """
import dataclasses
import jax, jax.numpy as jnp

@dataclasses.dataclass(frozen=True)
class Config:
    width: int = 16
    rows: int = 64
    bias: bool = False

    @classmethod
    def wide(cls) -> "Config":
        return cls(width=256)

    def __post_init__(self):
        if self.width % 2:
            raise ValueError("width must be even")

def make_train_step(config):
    def train_step(w, batch):
        grad = jax.grad(lambda w: jnp.mean((batch @ w + config.bias) ** 2))(w)
        return w - grad
    return train_step

train_step = make_train_step(Config())

def example_args(config):
    f32 = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.float32)
    return f32(config.width, config.width), f32(config.rows, config.width)
"""

Ffjax = Callable[..., click.testing.Result]


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The current folder: some targets, and nothing of them left imported afterwards."""
    for name, text in (("plain", PLAIN), ("sized", SIZED), ("broken", "import there_is_no_such_thing\n")):
        (tmp_path / f"{name}.py").write_text(text)
    (tmp_path / "wrong.py").write_text("def f(:\n")
    (tmp_path / "bare.py").write_text("def train_step(x):\n    return x\n")
    (tmp_path / "wrapped.py").write_text(PLAIN + "\nimport ffjax\ntrain_step = ffjax.autoshard(train_step)\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    before = set(sys.modules)
    yield tmp_path
    for name in set(sys.modules) - before:
        if str(tmp_path) in (getattr(sys.modules[name], "__file__", None) or ""):
            del sys.modules[name]


@pytest.fixture
def run(here: Path) -> Ffjax:
    """Runs one command; anything but a message to the user is raised."""

    def run(*args: str) -> click.testing.Result:
        return click.testing.CliRunner().invoke(cli.main, args, catch_exceptions=False)

    return run


def test_plan_prints_why_and_writes_the_plan(run: Ffjax, here: Path) -> None:
    done = run("plan", "plain.py:train_step", "--cluster", "h100", "--donate", "0", "--out", "deep/plan.json")
    assert done.exit_code == 0, done.output
    assert done.stdout.startswith("train_step on 8 devices of 'h100'")
    assert done.stdout == ffjax.Plan.load(here / "deep" / "plan.json").explain()
    assert "written to deep/plan.json" in done.stderr


def test_plan_takes_a_cluster_mesh_pin_and_strategy(run: Ffjax) -> None:
    fixed = ["--mesh", "x=4,y=4", "--pin", "params/up=None,x*y", "--pin", "batch=(x, -)", "--out", "plan.json"]
    done = run("plan", "plain.py:train_step", "--cluster", "h100", "--hosts", "2", *fixed)
    assert done.exit_code == 0, done.output
    plan = ffjax.Plan.load("plan.json")
    assert plan.mesh_shape == {"x": 4, "y": 4}
    assert tuple(plan.spec("params/up")) == (None, ("x", "y"))
    assert tuple(plan.spec("batch")) == ("x", None)
    done = run("plan", "plain.py:train_step", "--cluster", "a100", "--devices-per-host", "4", "--strategy", "fsdp")
    assert "on 4 devices of 'a100'" in done.stdout
    assert "strategy fsdp" in done.stdout


def test_a_pin_that_leaves_a_strategy_no_candidate_only_drops_that_strategy(run: Ffjax) -> None:
    """Data parallelism keeps state whole, so a pin that splits it leaves nothing."""
    done = run("plan", "plain.py:train_step", "--cluster", "h100", "--mesh", "x=8", "--pin", "params/up=None,x")
    assert done.exit_code == 0, done.output
    strategies = done.stdout.partition("the strategies")[2]
    assert "tensor_parallel" in strategies
    assert "data_parallel" not in strategies


def test_a_cluster_of_ones_own(run: Ffjax, here: Path) -> None:
    shipped = Path(ffjax.cost.__file__).parent / "clusters" / "cpu.toml"
    (here / "mine.toml").write_text(shipped.read_text().replace('name = "cpu"', 'name = "mine"', 1))
    done = run("plan", "plain.py:train_step", "--cluster", "mine.toml", "--devices-per-host", "2")
    assert "on 2 devices of 'mine'" in done.stdout, done.output
    done = run("plan", "plain.py:train_step", "--cluster", "local")
    assert "on 8 devices of 'cpu'" in done.stdout, done.output


@pytest.mark.parametrize("target", ["plain.py:train_step", "plain:train_step", "wrapped.py:train_step"])
def test_a_target_is_a_file_or_a_module_decorated_or_not(here: Path, target: str) -> None:
    loaded = load_target(target)
    assert not hasattr(loaded.step, "plan")
    assert loaded.args[1].shape == (64, 16)  # type: ignore[attr-defined]  # as example_args has it


@pytest.mark.parametrize("given", ["other_args", "plain.py:other_args"])
def test_another_function_gives_the_arguments(here: Path, given: str) -> None:
    assert load_target("plain.py:train_step", args=given).args[1].shape == (128, 16)  # type: ignore[attr-defined]


def test_presets_and_settings_change_the_config(here: Path) -> None:
    def width(**options: object) -> int:
        (w, _) = load_target("sized.py:train_step", **options).args  # type: ignore[arg-type]
        return w.shape[0]  # type: ignore[attr-defined,no-any-return]

    assert width() == 16
    assert width(preset="wide") == 256
    assert width(preset="wide", settings={"width": "64", "bias": "true"}) == 64


def test_examples_are_targets_wherever_one_is(here: Path) -> None:
    loaded = load_target("ffjax.examples.gpt:train_step", preset="tiny", settings={"layers": "1"})
    assert loaded.args[1]["inputs"].shape == (8, 32)  # type: ignore[index]


@pytest.mark.parametrize(
    ("text", "kind", "value"),
    [
        ("1_000", int, 1000),
        ("1e-3", float, 1e-3),
        ("No", bool, False),
        ("64, 128", tuple[int, ...], (64, 128)),
        ("(64,)", tuple[int, ...], (64,)),
        ("none", int | None, None),
        ("3", int | None, 3),
        ("bfloat16", str, "bfloat16"),
        ("b", Literal["a", "b"], "b"),
        ("{1: 2}", dict[int, int], {1: 2}),
    ],
)
def test_settings_are_read_by_the_type_of_their_field(text: str, kind: object, value: object) -> None:
    assert read_value(text, kind) == value


PLAN_ERRORS = {
    "gone.py:train_step": "there is no file 'gone.py'",
    "gone.away:train_step": "there is no module 'gone.away'",
    "plain.py": "names no function. Remedy: write file.py:function",
    "plain.py:train": "no function 'train' (did you mean 'train_step'?)",
    "plain.py:not_a_function": "is int, no function",
    "bare.py:train_step": "has no example_args",
    "broken.py:f": "No module named 'there_is_no_such_thing'",
    "wrong.py:f": "SyntaxError",
    "plain.py:train_step --args one_array": "Remedy: return a tuple of the step's arguments",
    "plain.py:train_step --args two_arguments": "Remedy: let it take none",
    "plain.py:train_step --args one_argument": "Remedy: let it take none",
    "plain.py:train_step --preset wide": "has no dataclass Config for preset 'wide'",
    "plain.py:train_step --set width=3": "has no dataclass Config for settings",
    "sized.py:train_step --preset wid": "no preset 'wid' (did you mean 'wide'?)",
    "sized.py:train_step --set widht=3": "no field 'widht' (did you mean 'width'?)",
    "sized.py:train_step --set width=x": "'x' is no whole number. Remedy: write it like its present value, 16",
    "sized.py:train_step --set width=3": "width must be even",
    "sized.py:train_step --set bias=perhaps": "neither true nor false",
    "sized.py:train_step --set width": "write FIELD=VALUE",
    "plain.py:train_step --mesh 8x8": "such as x=8,y=8",
    "plain.py:train_step --mesh x=2,x=4": "names an axis twice",
    "plain.py:train_step --mesh x=0": "such as x=8,y=8",
    "plain.py:train_step --mesh x=4": "uses 4 of the 8 devices",
    "plain.py:train_step --pin params/up": "is no pin; write a path pattern",
    "plain.py:train_step --pin params/up=x;y": "is no pin; write a path pattern",
    "plain.py:train_step --pin nowhere=x": "the pin 'nowhere' matches no argument",
    "plain.py:train_step --memory lots": "'lots' is no amount of memory",
    "plain.py:train_step --memory 1KiB": "no plan fits",
    "plain.py:train_step --strategy fast": "unknown strategy 'fast'",
    "plain.py:train_step --donate 2": "there is no argument 2",
    "plain.py:train_step --cluster h10": "unknown cluster 'h10' (did you mean 'h100'?)",
    "plain.py:train_step --cluster no.toml": "there is no cluster file 'no.toml'",
    "plain.py:train_step --cluster local --hosts 2": "leave --hosts and --devices-per-host out",
    "plain.py:train_step --out .": "is a directory",
    "plain.py:train_step --pareto front.png": "Remedy: front.html",
    "plain.py:train_step --pareto --verify": "leave --verify out",
    "plain.py:train_step --out plain.py/plan.json": "Remedy: give another --out",
}


@pytest.mark.parametrize("arguments", PLAN_ERRORS)
def test_errors_quote_the_input_and_say_what_to_do(run: Ffjax, arguments: str) -> None:
    done = run("plan", "--cluster", "h100", *arguments.split())
    assert done.exit_code == 2, done.output
    assert PLAN_ERRORS[arguments] in done.stderr
    assert "Traceback" not in done.output


def test_verify_compiles_a_plan(run: Ffjax) -> None:
    done = run("verify", "plain.py:train_step", "--cluster", "cpu", "--strategy", "fsdp", "--donate", "0")
    assert done.exit_code == 0, done.output
    assert re.search(r"peak per device +\d", done.stdout), done.stdout
    assert re.search(r"all_gather over x .* 1\.000", done.stdout), done.stdout
    assert run("plan", "plain.py:train_step", "--cluster", "cpu", "--memory", "1GiB", "--out", "a.json").exit_code == 0
    done = run("verify", "plain.py:train_step", "--cluster", "cpu", "--plan", "a.json")
    assert "fits into 1 GiB" in done.stdout, done.output


def test_plan_can_settle_by_compiling(run: Ffjax) -> None:
    done = run("plan", "plain.py:train_step", "--cluster", "cpu", "--verify")
    assert done.exit_code == 0, done.output
    assert "compiled before deciding" in done.stdout


def test_explain_and_diff_read_saved_plans(run: Ffjax) -> None:
    for name, strategy in (("a", "data_parallel"), ("b", "fsdp")):
        done = run("plan", "plain.py:train_step", "--cluster", "h100", "--strategy", strategy, "--out", f"{name}.json")
        assert done.exit_code == 0, done.output
    assert run("explain", "a.json").stdout == ffjax.Plan.load("a.json").explain()
    assert "closest calls" in run("explain", "a.json", "--details").stdout
    same, differ = run("diff", "a.json", "a.json"), run("diff", "a.json", "b.json")
    assert (same.exit_code, same.stdout) == (0, "")
    assert (differ.exit_code, differ.stdout[:2]) == (1, "- ")
    gone = run("diff", "a.json", "c.json")
    assert gone.exit_code == 2
    assert "cannot read the plan 'c.json'" in gone.stderr
    Path("c.json").write_text(json.dumps({"format": 0}))
    assert "Remedy: search it again" in run("explain", "c.json").stderr


def test_plan_prints_and_saves_the_front(run: Ffjax, here: Path) -> None:
    asked = ["plan", "plain.py:train_step", "--cluster", "h100", "--mesh", "x=8"]
    done = run(*asked, "--pareto")
    assert done.exit_code == 0, done.output
    assert "time against memory" in done.stdout
    assert re.search(r"peak +step +mesh +strategy", done.stdout), done.stdout
    done = run(*asked, "--pareto", "front.html", "--out", "plan.json")
    assert "written to front.html" in done.stderr
    assert "<svg" in Path("front.html").read_text()
    assert ffjax.Plan.load("plan.json").mesh_shape == {"x": 8}
    assert run(*asked, "--pareto", "front/", "--memory", "1KiB").exit_code == 0
    assert {"front.csv", "front.html", "front.json"} < {file.name for file in (here / "front").iterdir()}


def test_compare_shows_each_strategy_once(run: Ffjax) -> None:
    done = run("compare", "plain.py:train_step", "--cluster", "h100", "--mesh", "x=8")
    assert done.exit_code == 0, done.output
    for name in ("auto", "data_parallel", "fsdp", "tensor_parallel"):
        assert done.stdout.count(f"│ {name} ") == 1
    assert "fsdp+tensor_parallel has no use for these meshes" in done.stdout
    assert "spatial is for programs that have convolutions" in done.stdout


def test_compare_shows_what_does_not_fit_and_searches_once(run: Ffjax, monkeypatch: pytest.MonkeyPatch) -> None:
    searches: list[str] = []
    search = planner.search

    def counting(*args: Any, **options: Any) -> SearchResult:
        searches.append(options["strategy"])
        return search(*args, **options)

    monkeypatch.setattr(planner, "search", counting)
    asked = ["compare", "plain.py:train_step", "--cluster", "h100", "--mesh", "x=8", "--memory", "1KiB"]
    done = run(*asked)
    assert done.exit_code == 0, done.output
    assert searches == ["auto"]
    assert re.search(r"│ data_parallel .*does not fit: needs \d+\.\d+KiB", done.stdout), done.stdout
    assert re.search(r"│ auto .*does not fit: needs", done.stdout), done.stdout


def test_compare_as_a_page_and_as_json(run: Ffjax) -> None:
    done = run(
        "compare", "plain.py:train_step", "--cluster", "h100", "--mesh", "x=8", "--json", "--pareto", "--html", "r.html"
    )
    assert done.exit_code == 0, done.output
    content = json.loads(done.stdout)
    assert content["budget_bytes"] == ffjax.Cluster.named("h100").device.memory_bytes
    names = [row["strategy"] for row in content["strategies"]]
    assert names[0] == "auto"
    assert len(names) == len(set(names))
    assert set(names) | set(content["unused"]) == {"auto", *(s.name for s in all_strategies())}
    assert set(names).isdisjoint(content["unused"])
    for row in content["strategies"]:
        assert row["step_s"] == pytest.approx(row["compute_s"] + row["exposed_comm_s"])
        assert row["step_s"] >= content["strategies"][0]["step_s"] * (1 - 1e-9)
    assert content["pareto"]["points"]
    page = Path("r.html").read_text()
    plots = re.findall(r"<svg.*?</svg>", page, re.DOTALL)
    assert len(plots) == 3
    for plot in plots:
        xml.dom.minidom.parseString(plot)
    for name in names:
        assert page.count(f">{name}<") >= 3
    assert (
        "Remedy: give another --html"
        in run("compare", "plain.py:train_step", "--cluster", "h100", "--mesh", "x=8", "--html", "gone/r.html").stderr
    )


def test_devices_lists_what_is_here_and_what_is_shipped(run: Ffjax) -> None:
    done = run("devices")
    assert done.exit_code == 0, done.output
    assert "1 x 8" in done.stdout
    assert all(name in done.stdout for name in ffjax.Cluster.names())


def a_run(name: str, losses: tuple[float, ...]) -> Run:
    return Run(name=name, losses=losses, measured_s=1.0, collectives={}, peak_bytes=1, plan=None)


def test_demo_fails_where_loss_curves_differ(run: Ffjax, monkeypatch: pytest.MonkeyPatch) -> None:
    plain, near, far = a_run(UNSHARDED, (2.0, 1.0)), a_run("near", (2.0, 1.00001)), a_run("far", (2.0, 1.01))
    assert agree([plain, near])
    assert not agree([plain, near, far])
    assert not agree([plain, a_run("nan", (2.0, float("nan")))])
    assert verdict([plain, near, far]).startswith("loss curves DIFFER (far): over 2 steps by up to 1.0e-02")
    for runs, status in (((plain, near), 0), ((plain, far), 1)):
        monkeypatch.setattr(cli, "run_demo", lambda *_, runs=runs: runs)
        assert run("demo").exit_code == status


def test_demo_does_not_judge_what_training_amplified() -> None:
    losses = (1.0,) * CHECKED_STEPS
    assert agree([a_run(UNSHARDED, (*losses, 1.0)), a_run("late", (*losses, 1.1))])
    assert not agree([a_run(UNSHARDED, losses), a_run("early", (1.1, *losses[1:]))])


def test_demo_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "ffjax.examples.gpt", raising=False)
    monkeypatch.delattr(ffjax.examples, "gpt", raising=False)
    monkeypatch.setitem(sys.modules, "flax", None)
    with pytest.raises(FfjaxError, match=r'pip install "ffjax\[examples\]"'):
        run_demo("tiny", 2, 8, lambda *_: None)


def test_demo_runs(tmp_path: Path) -> None:
    environment = {k: v for k, v in os.environ.items() if k not in ("JAX_PLATFORMS", "XLA_FLAGS")}
    done = subprocess.run(
        [sys.executable, "-W", "error", "-m", "ffjax.cli", "demo", "--config", "tiny", "--steps", "3"],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "loss curves agree: over 3 steps" in done.stdout
    assert "train_step on 8 devices of 'cpu'" in done.stdout
    assert "max |difference|" in done.stdout


def test_help_reads_well() -> None:
    overview = click.testing.CliRunner().invoke(cli.main, ["--help"], prog_name="ffjax").output
    assert "ffjax demo" in overview
    assert "..." not in overview.partition("Commands:")[2], "a short_help is too long for a line"
    for name, command in cli.main.commands.items():
        assert click.testing.CliRunner().invoke(cli.main, [name, "--help"]).exit_code == 0
        assert command.help, name
        for option in command.params:
            assert isinstance(option, click.Argument) or (option.help or "").endswith("."), f"{name} {option.name}"
