"""Predicted peak memory against the compiler's, per model, strategy, mesh and donation.

    python benchmarks/memory.py                                # CPU fake devices
    python benchmarks/memory.py --platform gpu                 # compile-only H100s
    python benchmarks/memory.py --platform gpu --record FILE   # keep what was compiled: tests/data/memory_compiled.json
    python benchmarks/memory.py --platform gpu --from FILE     # compile nothing: predict again

Compile-only devices need XLA_FLAGS=--xla_gpu_autotune_level=0: there is no GPU to time alternatives on. Shapes are
large enough for arrays to dominate; nothing runs, so nothing of that size is allocated.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import jax
import numpy as np
from tables import write

sys.path.append(str(Path(__file__).parents[1] / "tests"))
from memory_cases import MODELS, Recorded, build, cases, plan_of, predictions
from plan_lines import line_of

import ffjax
from ffjax.cost.hlo.collectives import peak_bytes
from ffjax.emit.run import lower
from ffjax.testing import fake_devices

CLUSTERS = {"cpu": "cpu", "gpu": "h100"}
# What is compiled is the same; only the machine code is not optimised, which takes most of the time.
QUICKLY = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}


def compile_missing(recorded: Recorded, platform: str, names: list[str], keep: Path | None) -> None:
    """Plans and compiles every case that is not recorded yet, and records it."""
    cluster = ffjax.Cluster.named(CLUSTERS[platform])
    if platform == "cpu":
        fake_devices(8)
    devices = cluster.compile_only_devices() if platform == "gpu" else jax.devices()
    for case in cases(names):
        if case.plan in recorded.compiled(case):
            continue
        began = time.perf_counter()
        if case.plan not in recorded.plans:
            step, args, donate = build(case.model, case.donated)
            plan = ffjax.plan(
                step, *args, cluster=cluster, mesh=case.mesh, strategy=case.strategy, donate_argnums=donate
            )
            recorded.plans[case.plan] = line_of(plan.bound)
        layout = plan_of(case, recorded.plans[case.plan])
        compiled = peak_bytes(lower(layout, devices).compile(compiler_options=QUICKLY))
        recorded.compiled(case)[case.plan] = compiled
        if keep is not None:
            recorded.write(keep, platform)
        donated = "donated" if case.donated else "kept"
        seconds = time.perf_counter() - began
        print(f"{case.plan}, {donated}: {compiled / 2**20:.0f} MiB, {seconds:.1f} s", file=sys.stderr, flush=True)


def summary(what: str, ratios: Sequence[float]) -> str:
    near = np.mean([0.9 <= r <= 1.1 for r in ratios])
    under = np.mean([r < 0.95 for r in ratios])
    return (
        f"{what}: {len(ratios)} cases, {near:.0%} within 10%, median {np.median(ratios):.3f}, {under:.0%} more than 5% "
        f"under, worst under {min(ratios):.3f}, worst over {max(ratios):.3f}."
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--platform", choices=sorted(CLUSTERS), default="cpu")
    parser.add_argument("--record", type=Path, help="keep what was compiled in this file; go on where it ends")
    parser.add_argument("--from", type=Path, dest="source", help="compile nothing: take the figures of this file")
    parser.add_argument("--only", nargs="*", default=list(MODELS), choices=list(MODELS), help="models")
    options = parser.parse_args()
    recorded = Recorded.read(options.record or options.source or Path(), options.platform)
    if options.source is None:
        recorded.jax = jax.__version__
        compile_missing(recorded, options.platform, options.only, options.record)
    found = [(c, p, b) for c, p, b in predictions(recorded, options.platform) if c.model in options.only]
    rows = [
        (c.model, c.mesh_text, c.strategy, "yes" if c.donated else "no", f"{b / 2**20:.1f}", f"{p / b:.3f}")
        for c, p, b in found
    ]
    notes = [f"Compiled by jax {recorded.jax}."]
    for what, wanted in (("Calibrated on these", False), ("Held out", True)):
        ratios = [p / b for c, p, b in found if ("held out" in c.model) == wanted]
        notes += [summary(what, ratios)] if ratios else []
    write(
        f"memory_{options.platform}",
        f"Peak memory of one device: predicted, and as XLA:{options.platform.upper()} compiles it",
        ["\n\n".join(notes)],
        ("model", "mesh", "strategy", "donated", "compiled, MiB", "predicted / compiled"),
        rows,
    )


if __name__ == "__main__":
    main()
