"""What remat="search" takes as the memory budget shrinks: the policy of the checkpointed blocks, decided with the plan.

    python benchmarks/remat.py --layers 32 --batch 8 --budgets 70 50 30 20 15

Plans for 8 H100s that need not be there. A row per budget: the policy taken, then for each policy the best
plan's step and peak (where none fits, those of the smallest).
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
import time
from pathlib import Path

import jax

import ffjax

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
import gpt  # type: ignore[import-not-found]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="gpt3_6b7")
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--hosts", type=int, default=1)
    parser.add_argument("--budgets", type=float, nargs="+", default=[70, 50, 30, 20, 15], help="in GiB, per device")
    options = parser.parse_args()
    jax.config.update("jax_platforms", "cpu")
    config = dataclasses.replace(
        getattr(gpt.Config, options.preset)(), layers=options.layers, batch=options.batch, scan_layers=True, remat=True
    )
    cluster = ffjax.Cluster.named("h100", hosts=options.hosts)
    print(f"{options.preset}, {config.layers} layers, batch {config.batch}, on {cluster.devices} devices of h100")
    for budget in options.budgets:
        began = time.perf_counter()
        try:
            plan = ffjax.plan(
                gpt.make_train_step(config),
                *gpt.example_args(config),
                cluster=cluster,
                memory=f"{budget}GiB",
                remat="search",
                donate_argnums=0,
            )
        except ffjax.errors.BudgetError as error:
            print(f"{budget:6g} GiB  nothing fits: {str(error).partition(';')[0]}", flush=True)
            continue
        figures = ", ".join(
            f"{v.policy} {v.step_s * 1e3:.1f} ms {v.peak_bytes / 2**30:.1f} GiB" + ("" if v.fits else " (too much)")
            for v in plan.search.remat
        )
        taken = f"{plan.remat}, {plan.strategy}, mesh {plan.mesh}, {plan.estimate.step_s * 1e3:.1f} ms"
        print(f"{budget:6g} GiB  {taken} in {time.perf_counter() - began:.0f} s: {figures}", flush=True)


if __name__ == "__main__":
    main()
