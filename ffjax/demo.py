"""The demonstration: one train step, run unsharded, data parallel and as the search found it, on fake devices.

What it shows: the loss curves agree, and what the plan predicts (collectives, peak memory) is what the compiler made.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias

import jax
from rich.console import Console
from rich.table import Table

from ffjax.autoshard import autoshard
from ffjax.cli.targets import missing_remedy
from ffjax.cost.estimate import Estimate
from ffjax.cost.hlo.collectives import collectives_of, peak_bytes
from ffjax.errors import FfjaxError
from ffjax.ir.spec import COLLECTIVE_KINDS, CollectiveKind, summarize
from ffjax.plan import Plan
from ffjax.strategies.session import AUTO
from ffjax.testing import fake_devices
from ffjax.units import bytes_text, seconds_text

if TYPE_CHECKING:
    from types import ModuleType

Counted: TypeAlias = Mapping[CollectiveKind, tuple[float, float]]
"""For each kind of collective: how many there are in one step, and their bytes together."""
Progress: TypeAlias = Callable[[str, str, float], None]
"""Told which run it is, what is being done, and the share of it that is done."""

UNSHARDED = "unsharded"
STRATEGIES = ("data_parallel", AUTO)
RTOL = 1e-4
"""Of the loss, as `ffjax.testing` has it for float32."""
CHECKED_STEPS = 30
"""Training amplifies rounding: in time any change in the order of sums shows, so later steps decide nothing."""
SHOWN_STEPS = 6
NOTES = """\
Predicted times are those of devices of their own. Fake devices share this machine's cores, so measured times only show
that the sharded steps run. The compiler merges collectives: compare their bytes, not how many there are. On CPU it
makes an all-reduce of each reduce-scatter."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """One way to run the step: its losses, what was predicted of it, and what it was."""

    name: str
    losses: tuple[float, ...]
    measured_s: float
    """The median of all steps but the first."""
    collectives: Counted
    peak_bytes: int
    plan: Plan | None

    def difference(self, other: Run, steps: int | None = None) -> float:
        """The largest difference of a loss of the first `steps` steps."""
        pairs = zip(self.losses[:steps], other.losses[:steps], strict=True)
        return max(abs(a - b) for a, b in pairs)

    def agrees(self, other: Run) -> bool:
        """Whether the losses are the same but for rounding; NaN agrees with nothing."""
        pairs = zip(self.losses[:CHECKED_STEPS], other.losses[:CHECKED_STEPS], strict=True)
        return all(abs(a - b) <= RTOL * abs(b) for a, b in pairs)


def example() -> ModuleType:
    """The byte-level GPT of the examples; raises FfjaxError if what it needs is not installed."""
    try:
        from ffjax.examples import gpt
    except ImportError as error:
        raise FfjaxError(f"the demo's model cannot be imported: {error}. Remedy: {missing_remedy(error)}") from error
    return gpt


def run_demo(config_name: str, steps: int, devices: int, progress: Progress) -> tuple[Run, ...]:
    """Trains the GPT in each way, from one initial state and on the same batches; the unsharded run is the first.

    Call it before JAX runs anything: it asks for the fake devices.
    """
    gpt = example()
    fake_devices(devices)
    config = getattr(gpt.Config, config_name)()
    step: Callable[..., object] = gpt.make_train_step(config)
    shapes = gpt.example_args(config)
    initial = gpt.init(config, jax.random.key(0))
    batches = [batch for batch, _ in zip(gpt.batches(config), range(steps), strict=False)]

    def losses(name: str, run: Callable[..., tuple[object, Mapping[str, jax.Array]]]) -> tuple[list[float], float]:
        # Each run donates its state, so each has a copy.
        state = jax.tree.map(lambda x: x.copy() if isinstance(x, jax.Array) else x, initial)
        found, times = [], []
        for batch in batches:
            began = time.perf_counter()
            state, metrics = run(state, batch)
            found.append(float(metrics["loss"]))
            times.append(time.perf_counter() - began)
            progress(name, "trains", len(found) / steps)
        return found, statistics.median(times[1:] or times)

    def measured(
        name: str,
        run: Callable[..., tuple[object, Mapping[str, jax.Array]]],
        lowered: jax.stages.Lowered,
        plan: Plan | None,
    ) -> Run:
        progress(name, "compiles", 0.0)
        compiled = lowered.compile()
        found, seconds = losses(name, run)
        return Run(
            name=name,
            losses=tuple(found),
            measured_s=seconds,
            collectives=summarize(collectives_of(compiled)),
            peak_bytes=peak_bytes(compiled),
            plan=plan,
        )

    plain = jax.jit(step, donate_argnums=0)
    runs = [measured(UNSHARDED, plain, plain.lower(*shapes), None)]
    for strategy in STRATEGIES:

        def planning(what: str, share: float, name: str = strategy) -> None:
            progress(name, f"plans: {what}", share)

        progress(strategy, "plans", 0.0)
        sharded = autoshard(step, strategy=strategy, donate_argnums=0, progress=planning)
        plan = sharded.plan(*shapes)
        runs.append(measured(strategy, sharded, sharded.lower(*shapes), plan))
    return tuple(runs)


def agree(runs: Sequence[Run]) -> bool:
    """Whether all runs have the losses of the first."""
    return all(run.agrees(runs[0]) for run in runs[1:])


def report(runs: Sequence[Run], console: Console) -> None:
    """Prints the runs side by side, and the plan that the search found."""
    for table in (_curves(runs), _figures(runs), _collectives(runs)):
        console.print(table)
    console.print(NOTES, highlight=False)
    for run in runs:
        if run.plan is not None and run.plan.strategy == AUTO:
            console.print("\nThe plan found\n", style="bold")
            # As it is: rich would take `[...]` of shapes and `:m:` of factors for markup and emoji.
            console.out(run.plan.explain(), highlight=False)


def verdict(runs: Sequence[Run]) -> str:
    """One line: whether the curves agree, and by how much."""
    plain, *others = runs
    worst = max(run.difference(plain, CHECKED_STEPS) for run in others)
    checked = min(CHECKED_STEPS, len(plain.losses))
    if agree(runs):
        return f"loss curves agree: over {checked} steps no loss is more than {worst:.1e} from the unsharded run's"
    wrong = ", ".join(run.name for run in others if not run.agrees(plain))
    return f"loss curves DIFFER ({wrong}): over {checked} steps by up to {worst:.1e}, more than {RTOL:.0e} of the loss"


def _curves(runs: Sequence[Run]) -> Table:
    table = Table("step", *(run.name for run in runs), title="loss", title_justify="left")
    for i in _shown(len(runs[0].losses)):
        table.add_row(str(i + 1), *(f"{run.losses[i]:.6f}" for run in runs))
    differences = ["", *(f"{run.difference(runs[0]):.1e}" for run in runs[1:])]
    table.add_section()
    table.add_row("max |difference|", *differences)
    return table


def _shown(steps: int) -> list[int]:
    """The first and the last step, and some between."""
    count = min(steps, SHOWN_STEPS)
    return sorted({round(i * (steps - 1) / max(count - 1, 1)) for i in range(count)})


def _figures(runs: Sequence[Run]) -> Table:
    table = Table("of one step", *(run.name for run in runs), title="time and memory", title_justify="left")

    def predicted(figure: Callable[[Estimate], str]) -> list[str]:
        return ["-" if run.plan is None else figure(run.plan.estimate) for run in runs]

    meshes = [{} if run.plan is None else run.plan.mesh_shape for run in runs]
    table.add_row("mesh", *(", ".join(f"{a}={n}" for a, n in mesh.items()) or "-" for mesh in meshes))
    table.add_row("predicted time", *predicted(lambda e: seconds_text(e.step_s)))
    table.add_row("  of it communication", *predicted(lambda e: seconds_text(e.exposed_comm_s)))
    table.add_row("measured time", *(seconds_text(run.measured_s) for run in runs))
    table.add_row("predicted peak per device", *predicted(lambda e: bytes_text(e.peak_bytes)))
    table.add_row("compiled peak per device", *(bytes_text(run.peak_bytes) for run in runs))
    return table


def _collectives(runs: Sequence[Run]) -> Table:
    planned = [run for run in runs if run.plan is not None]
    table = Table("kind", title="collectives of one step: how many, bytes on one device", title_justify="left")
    for run in planned:
        table.add_column(f"{run.name}\npredicted")
        table.add_column("\ncompiled")
    columns = [counted for run in planned for counted in (_predicted(run.plan), run.collectives)]
    for kind in COLLECTIVE_KINDS:
        if any(kind in counted for counted in columns):
            table.add_row(kind, *_cells(kind, columns))
    return table


def _cells(kind: CollectiveKind, columns: Iterable[Counted]) -> Iterator[str]:
    for counted in columns:
        count, size = counted.get(kind, (0.0, 0.0))
        yield f"{count:g} x {bytes_text(size)}" if count else "-"


def _predicted(plan: Plan | None) -> Counted:
    totals: dict[CollectiveKind, tuple[float, float]] = {}
    for c in plan.estimate.collectives if plan is not None else ():
        count, size = totals.get(c.kind, (0.0, 0.0))
        totals[c.kind] = (count + c.count, size + c.bytes)
    return totals
