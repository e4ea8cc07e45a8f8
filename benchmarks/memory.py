"""Predicted peak memory against the compiler's, per model, strategy, mesh and donation.

    python benchmarks/memory.py                                     # CPU fake devices
    python benchmarks/memory.py --platform gpu                      # compile-only H100s
    python benchmarks/memory.py --platform gpu --record FILE.json   # keep what was compiled, for tests/test_memory_gate.py
    python benchmarks/memory.py --platform gpu --from FILE.json     # compile nothing: predict again

Shapes are large enough for arrays to dominate; nothing runs, so nothing of that size is allocated.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import jax
import numpy as np
from memory_cases import MESHES, MODELS, STRATEGIES, Case, assignments_text, build, predicted_bytes
from tables import write

import ffjax
from ffjax.emit.hlo import peak_bytes
from ffjax.emit.run import lower
from ffjax.testing import fake_devices

CLUSTERS = {"cpu": "cpu", "gpu": "h100"}
# What is compiled is the same; only the machine code is not optimised, which takes most of the time.
QUICKLY = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}


def compiled_cases(platform: str, names: list[str], known: dict[str, dict[str, object]]) -> Iterator[None]:
    """Plans and compiles every case that is not known yet, and adds it."""
    cluster = ffjax.Cluster.named(CLUSTERS[platform])
    if platform == "gpu":
        devices = cluster.compile_only_devices()
    else:
        fake_devices(8)
        devices = tuple(jax.devices())
    for donated in (True, False):
        for name in names:
            step, args, donate = build(name, donated)
            for mesh in MESHES:
                for strategy in STRATEGIES:
                    if strategy == "fsdp+tensor_parallel" and len(mesh) == 1:
                        continue
                    case = Case(model=name, mesh=mesh, strategy=strategy, donated=donated)
                    if case.key in known:
                        continue
                    plan = ffjax.plan(step, *args, cluster=cluster, mesh=mesh, strategy=strategy, donate_argnums=donate)
                    began = time.perf_counter()
                    compiled = lower(plan.bound, devices).compile(compiler_options=QUICKLY)
                    known[case.key] = {"compiled": peak_bytes(compiled), "assignments": assignments_text(plan.bound)}
                    print(
                        f"{case.key}: {plan.estimate.peak_bytes / peak_bytes(compiled):.3f} of "
                        f"{peak_bytes(compiled) / 2**20:.0f} MiB, {time.perf_counter() - began:.1f} s",
                        file=sys.stderr,
                        flush=True,
                    )
                    yield


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--platform", choices=sorted(CLUSTERS), default="cpu")
    parser.add_argument("--record", type=Path, help="keep what was compiled in this file; go on where it ends")
    parser.add_argument("--from", type=Path, dest="source", help="compile nothing: take the figures of this file")
    parser.add_argument("--only", nargs="*", default=list(MODELS), choices=list(MODELS), help="models")
    options = parser.parse_args()
    path = options.record or options.source
    recorded = json.loads(path.read_text(encoding="utf-8")) if path is not None and path.exists() else {}
    known = recorded.setdefault(options.platform, {"jax": jax.__version__, "cases": {}})["cases"]
    if options.source is None:
        for _ in compiled_cases(options.platform, options.only, known):
            if options.record:
                options.record.write_text(json.dumps(recorded, indent=0) + "\n", encoding="utf-8")
    rows, ratios = [], []
    for key, entry in known.items():
        case = Case.parse(key)
        if case.model not in options.only:
            continue
        ratio = predicted_bytes(case, entry["assignments"], options.platform) / entry["compiled"]
        ratios.append(ratio)
        rows.append((case.model, case.mesh_text, case.strategy, "yes" if case.donated else "no",
                     f"{entry['compiled'] / 2**20:.1f}", f"{ratio:.3f}"))  # fmt: skip
    near = np.mean([0.9 <= r <= 1.1 for r in ratios])
    write(
        f"memory_{options.platform}",
        f"Peak memory of one device: predicted, and as XLA:{options.platform.upper()} compiles it",
        [
            f"{len(ratios)} cases: {near:.0%} within 10%, median {np.median(ratios):.3f}, "
            f"worst under {min(ratios):.3f}, worst over {max(ratios):.3f}, "
            f"{np.mean([r < 0.95 for r in ratios]):.0%} more than 5% under.",
        ],
        ("model", "mesh", "strategy", "donated", "compiled, MiB", "predicted / compiled"),
        rows,
    )


if __name__ == "__main__":
    main()
