"""Predicted and measured steps on a real GPU; on a CPU it is a dry run.

ffjax profile --seconds 400 --out cost/measured/h100.toml   # first: ops of this device
python benchmarks/on_gpu.py                                 # single-device steps
python benchmarks/on_gpu.py --mock 8                        # sharded steps, one device as if it were one of eight

With `--mock` JAX runs one GPU as one of many: kernels are real, collectives are not, so compute is compared alone.
"""

from __future__ import annotations

import dataclasses
import sys
import time

import jax
import numpy as np

MOCKED = int(sys.argv[sys.argv.index("--mock") + 1]) if "--mock" in sys.argv else 0
if MOCKED:
    jax.config.update("jax_mock_gpu_topology", f"1x1x{MOCKED}")

from accuracy import place  # noqa: E402  # devices are made as the topology says
from tables import write  # noqa: E402

from ffjax.cost.cluster import Cluster  # noqa: E402
from ffjax.examples import convnet, gpt, moe, recommender  # noqa: E402
from ffjax.planning.options import SearchOptions  # noqa: E402
from ffjax.planning.planner import plan_program  # noqa: E402
from ffjax.planning.tracing import trace_step  # noqa: E402

RUNS = 20
GPT = dataclasses.replace(gpt.Config.gpt2(), layers=4, batch=8, dtype="bfloat16")
ON_GPU = {
    "gpt": (gpt, GPT),
    "gpt, scanned, remat": (gpt, dataclasses.replace(GPT, layers=12, scan_layers=True, remat=True)),
    "convnet": (convnet, convnet.Config()),
    "recommender": (recommender, dataclasses.replace(recommender.Config.small(), batch=16_384)),
    "moe": (moe, moe.Config.small()),
}
DRY_RUN = {name: (module, module.Config.tiny()) for name, (module, _) in ON_GPU.items()}


def main() -> None:
    devices = jax.devices()[: MOCKED or 1]
    on_gpu = devices[0].platform == "gpu"
    cluster = Cluster.local(devices)
    prices = {"published": dataclasses.replace(cluster, profile=None), "profile": cluster}
    if cluster.profile is None:
        del prices["profile"]  # nobody ran `ffjax profile` here
    rows = []
    for name, (module, config) in (ON_GPU if on_gpu else DRY_RUN).items():
        program = trace_step(module.make_train_step(config), module.example_args(config), {})
        for strategy in ("data_parallel", "fsdp", "tensor_parallel") if MOCKED else ("data_parallel",):
            plans = {
                by: plan_program(program, SearchOptions(cluster=c, strategy=strategy, mesh={"x": len(devices)}))
                for by, c in prices.items()
            }
            run = place(next(iter(plans.values())), devices)
            times = []
            for _ in range(RUNS):
                began = time.perf_counter()
                run()
                times.append(time.perf_counter() - began)
            measured = float(np.median(times))
            for by, plan in plans.items():
                e = plan.estimate
                predicted = e.compute_s if MOCKED else e.step_s
                measured_share = e.sources.get("measured", 0.0)
                rows.append(
                    (
                        name,
                        strategy,
                        by,
                        f"{measured_share:.0%}",
                        f"{predicted * 1e3:.2f}",
                        f"{measured * 1e3:.2f}",
                        f"{predicted / measured:.2f}",
                    )
                )
                print(*rows[-1], sep=" | ", file=sys.stderr, flush=True)
    ratios = {by: np.array([float(r[-1]) for r in rows if r[2] == by]) for by in prices}
    write(
        f"on_gpu{f'_mock{MOCKED}' if MOCKED else ''}" if on_gpu else "on_gpu_dry_run",
        f"Predicted and measured steps on {devices[0].device_kind}",
        [
            f"{by}: median error {np.median(np.abs(r - 1)):.0%}, 90th percentile {np.quantile(np.abs(r - 1), 0.9):.0%}."
            for by, r in ratios.items()
        ],
        ("model", "strategy", "prices", "measured share", "predicted ms", "measured ms", "ratio"),
        rows,
    )


if __name__ == "__main__":
    main()
