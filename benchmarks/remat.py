"""What remat="search" takes as the memory budget shrinks: the policy of the checkpointed blocks, decided with the plan.

    python benchmarks/remat.py --batch 8 32 --budgets 70 50 30 20 15

The scanned, checkpointed GPT on 8 H100s, which need not be there. `--compiled` instead compiles an FSDP plan under each
policy (pip install "ffjax[gpu-compile]"): is the order as predicted?
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
import time
from pathlib import Path
from typing import Any

import jax

import ffjax

sys.path[:0] = [str(Path(__file__).parents[1] / "examples"), str(Path(__file__).parent)]
import gpt  # type: ignore[import-not-found]  # noqa: E402
from tables import write  # noqa: E402

HEADER = ("batch", "budget", "policy", "strategy, mesh", "step", "peak", "search", "other policies: step, peak")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="gpt3_6b7")
    parser.add_argument("--batch", type=int, nargs="+", default=[8, 32])
    parser.add_argument("--budgets", type=float, nargs="+", default=[70, 50, 30, 20, 15], help="in GiB, per device")
    parser.add_argument("--compiled", action="store_true", help="compile each policy, for the first batch")
    options = parser.parse_args()
    jax.config.update("jax_platforms", "cpu")
    if options.compiled:
        title = f"Policies of checkpointed blocks, predicted and compiled ({options.preset}, FSDP, 8 H100s)"
        header = ("batch", "policy", "step", "peak", "compiled step", "compiled peak")
        write("remat_compiled", title, [], header, compiled_rows(options.preset, options.batch[0]))
        return
    rows = [row(options.preset, batch, budget) for batch in options.batch for budget in options.budgets]
    notes = [
        "A policy that cannot be made to fit stands in brackets, with the plan of it that needs least memory.",
        "`nothing_saveable` is what the example writes, so it is searched once, as written.",
    ]
    title = f'Policies of checkpointed blocks that remat="search" takes ({options.preset}, 8 H100s)'
    write("remat", title, notes, HEADER, rows)


def planned(preset: str, batch: int, **options: Any) -> ffjax.Plan:
    config = dataclasses.replace(getattr(gpt.Config, preset)(), batch=batch, scan_layers=True, remat=True)
    cluster = ffjax.Cluster.named("h100", hosts=1)
    step, args = gpt.make_train_step(config), gpt.example_args(config)
    return ffjax.plan(step, *args, cluster=cluster, donate_argnums=0, **options)


def compiled_rows(preset: str, batch: int) -> list[tuple[object, ...]]:
    """The same mesh and strategy under each policy."""
    rows: list[tuple[object, ...]] = []
    for policy in ("as written", "dots_with_no_batch_dims_saveable", "dots_saveable", "off"):
        v = planned(preset, batch, mesh={"x": 8}, strategy="fsdp", remat=policy).verify()
        predicted = figures(v.planned_step_s, v.planned_peak_bytes).split(", ")
        rows.append((batch, policy, *predicted, *figures(v.compiled_step_s, v.compiled_peak_bytes).split(", ")))
        print(*rows[-1], sep=" | ", file=sys.stderr, flush=True)
    return rows


def row(preset: str, batch: int, budget: float) -> tuple[object, ...]:
    """One search: what was taken, and what the other policies would have cost."""
    began = time.perf_counter()
    try:
        plan = planned(preset, batch, memory=f"{budget}GiB", remat="search")
    except ffjax.errors.BudgetError as error:
        return (batch, f"{budget:g} GiB", str(error).partition(";")[0].partition(". ")[2], *[""] * 5)
    others = [
        f"{v.policy} {figures(v.step_s, v.peak_bytes)}" if v.fits else f"({v.policy} {figures(v.step_s, v.peak_bytes)})"
        for v in plan.search.remat
        if v.policy != plan.remat
    ]
    step, peak = figures(plan.estimate.step_s, plan.estimate.peak_bytes).split(", ")
    seconds = f"{time.perf_counter() - began:.0f} s"
    place = f"{plan.strategy}, {plan.mesh}"
    made = (batch, f"{budget:g} GiB", plan.remat, place, step, peak, seconds, "; ".join(others))
    print(*made, sep=" | ", file=sys.stderr, flush=True)
    return made


def figures(step_s: float, peak_bytes: float) -> str:
    return f"{step_s * 1e3:.1f} ms, {peak_bytes / 2**30:.1f} GiB"


if __name__ == "__main__":
    main()
