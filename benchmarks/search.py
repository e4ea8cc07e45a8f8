"""Search time, bound and gap: a 12-layer and a 48-layer GPT on 8 and 64 H100s. Needs no devices.

python benchmarks/search.py
"""

from __future__ import annotations

import dataclasses
import time

from tables import write

import ffjax
from ffjax.examples import gpt

CLUSTERS = {"8 H100": 1, "64 H100": 8}


def main() -> None:
    # Rules are kept for the life of the process: the first plan pays for importing and lowering, so it is not counted.
    ffjax.plan(
        gpt.make_train_step(gpt.Config.tiny()),
        *gpt.example_args(gpt.Config.tiny()),
        cluster=ffjax.Cluster.named("h100"),
    )
    rows = []
    for scanned in (False, True):
        for layers in (12, 48):
            config = dataclasses.replace(gpt.Config.gpt2(), layers=layers, scan_layers=scanned, remat=scanned)
            for name, hosts in CLUSTERS.items():
                began = time.perf_counter()
                plan = ffjax.plan(
                    gpt.make_train_step(config),
                    *gpt.example_args(config),
                    cluster=ffjax.Cluster.named("h100", hosts=hosts),
                    donate_argnums=0,
                )
                wall = time.perf_counter() - began
                search = plan.search
                named = [c for c in search.competitors if c.strategy != "auto" and c.fits]
                best = min(named, key=lambda c: c.step_s, default=None)
                rows.append(
                    (
                        f"{layers} layers, {'scanned, remat' if scanned else 'unrolled'}",
                        name,
                        plan.mesh,
                        f"{plan.estimate.step_s * 1e3:.2f}",
                        f"{search.lower_bound_s * 1e3:.2f}",
                        f"{search.gap:.2%}",
                        "none fits" if best is None else f"{best.strategy} {best.mesh}: {best.step_s * 1e3:.2f}",
                        f"{search.seconds['trace']:.1f}",
                        f"{wall - search.seconds['trace']:.1f}",
                        f"{search.seconds['rules'] + search.seconds['analyse']:.1f}",
                        f"{search.seconds['named strategies']:.1f}",
                        f"{search.seconds['free search']:.1f}",
                        f"{search.seconds['refine']:.1f}",
                    )
                )
    write(
        "search",
        "Search: GPT-2 widths on H100s",
        [
            "Times in seconds on two shared cores; predicted steps in milliseconds, with overlap (the simulator's). "
            "The bound and the gap are of the sum that was minimised, in which collectives count as far as they were "
            "taken to be exposed, on the plan's mesh; a budget that binds is no part of the bound.",
        ],
        (
            "model",
            "cluster",
            "mesh",
            "step",
            "bound",
            "gap",
            "best named",
            "trace",
            "rest",
            "analysis",
            "named",
            "free",
            "refine",
        ),
        rows,
    )


if __name__ == "__main__":
    main()
