"""What remat="search" takes as the memory budget shrinks: the policy of the checkpointed blocks, decided with the plan.

    python benchmarks/remat.py --batch 8 32 --budgets 70 50 30 20 15

The scanned, checkpointed GPT on 8 H100s, which need not be there.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
import time
from pathlib import Path

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
    options = parser.parse_args()
    jax.config.update("jax_platforms", "cpu")
    rows = [row(options.preset, batch, budget) for batch in options.batch for budget in options.budgets]
    notes = [
        "A policy that cannot be made to fit stands in brackets, with the plan of it that needs least memory.",
        "`nothing_saveable` is what the example writes, so it is searched once, as written.",
    ]
    title = f'Policies of checkpointed blocks that remat="search" takes ({options.preset}, 8 H100s)'
    write("remat", title, notes, HEADER, rows)


def row(preset: str, batch: int, budget: float) -> tuple[object, ...]:
    """One search: what was taken, and what the other policies would have cost."""
    config = dataclasses.replace(getattr(gpt.Config, preset)(), batch=batch, scan_layers=True, remat=True)
    began = time.perf_counter()
    try:
        plan = ffjax.plan(
            gpt.make_train_step(config),
            *gpt.example_args(config),
            cluster=ffjax.Cluster.named("h100", hosts=1),
            memory=f"{budget}GiB",
            remat="search",
            donate_argnums=0,
        )
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
