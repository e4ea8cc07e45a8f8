"""Plans for H100s that are not here, compiled: predicted beside what XLA:GPU makes of them.

pip install "ffjax[gpu-compile]"
JAX_PLATFORMS=cpu XLA_FLAGS=--xla_gpu_autotune_level=0 python benchmarks/verify.py

`--record FILE` also writes what was compiled, for `tests/test_accuracy_gate.py`.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
from tables import write

import ffjax
from ffjax.planning.options import SearchOptions
from ffjax.planning.planner import plan_program
from ffjax.planning.tracing import trace_step
from ffjax.verifying import Verification, verify

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
from plan_lines import line_of
from verified_cases import CLUSTERS, MODELS, build

STRATEGIES = ("auto", "data_parallel", "fsdp", "tensor_parallel", "fsdp+tensor_parallel")


def collective_bytes(checked: Verification) -> tuple[float, float]:
    """Planned and compiled, of all kinds together."""
    own = checked.collectives.comparisons
    return sum(c.planned_bytes for c in own), sum(c.compiled_bytes for c in own)


def ratio(planned: float, compiled: float) -> str:
    return f"{planned / compiled:.2f}" if compiled else "-" if not planned else "inf"


def main() -> None:
    rows, steps, peaks, bytes_, orders = [], [], [], [], []
    recorded: list[dict[str, object]] = []
    for name in MODELS:
        step, args, donated = build(name)
        program = trace_step(step, args, {}, donate_argnums=donated)
        for hosts, mesh in CLUSTERS:
            cluster = ffjax.Cluster.named("h100", hosts=hosts)
            devices = cluster.compile_only_devices()
            own: list[tuple[float, float]] = []
            for strategy in STRATEGIES:
                try:
                    plan = plan_program(program, SearchOptions(cluster=cluster, mesh=mesh, strategy=strategy))
                except ffjax.errors.PlanError:
                    continue  # no use for this mesh, or too big
                checked = verify(plan, cluster, devices)
                planned, compiled = collective_bytes(checked)
                own.append((checked.planned_step_s, checked.compiled_step_s))
                steps.append(checked.planned_step_s / checked.compiled_step_s)
                peaks.append(checked.planned_peak_bytes / checked.compiled_peak_bytes)
                bytes_.append(1.0 if planned == compiled else planned / max(compiled, 1.0))
                recorded.append(
                    {
                        "model": name,
                        "hosts": hosts,
                        "mesh": mesh,
                        "strategy": strategy,
                        "plan": line_of(plan.bound),
                        "step_s": checked.compiled_step_s,
                        "collective_bytes": compiled,
                    }
                )
                differ = [
                    f"{c.kind} over {'*'.join(c.axes)} {c.planned_bytes:.3g} -> {c.compiled_bytes:.3g}"
                    for c in checked.collectives.comparisons
                    if abs(c.planned_bytes - c.compiled_bytes) > 0.05 * max(planned, 1.0)
                ]
                rows.append(
                    (
                        name,
                        f"{cluster.hosts}x{cluster.devices_per_host}",
                        plan.mesh,
                        strategy,
                        f"{checked.planned_step_s * 1e3:.3f}",
                        f"{checked.compiled_step_s * 1e3:.3f}",
                        ratio(checked.planned_step_s, checked.compiled_step_s),
                        ratio(checked.planned_peak_bytes, checked.compiled_peak_bytes),
                        ratio(planned, compiled),
                        "; ".join(differ),
                    )
                )
                print(*rows[-1], sep=" | ", flush=True)
            best = min(range(len(own)), key=lambda i: own[i][0])
            orders.append(own[best][1] / min(c for _, c in own))

    if "--record" in sys.argv:
        path = Path(sys.argv[sys.argv.index("--record") + 1])
        made = {"made by": "python benchmarks/verify.py --record", "cases": recorded}
        path.write_text(json.dumps(made, indent=0) + "\n", encoding="utf-8")

    def within(values: list[float], share: float) -> str:
        return f"{np.mean(np.abs(np.array(values) - 1) <= share):.0%}"

    write(
        "verify",
        "Plans for H100s, predicted and compiled",
        [
            "Step: the plan in the simulator, and the compiled, scheduled program in the HLO simulator, on the same "
            "figures. Peak: of one device. Bytes: of all collectives; the last column has the kinds that differ by "
            "more than 5% of all bytes. Ratios are predicted / compiled.",
            f"{len(rows)} cases. Step: median ratio {np.median(steps):.2f}, within 10% in {within(steps, 0.1)}, within "
            f"25% in {within(steps, 0.25)}. Peak: within 10% in {within(peaks, 0.1)}, lowest {min(peaks):.2f}. "
            f"Collective bytes: within 5% in {within(bytes_, 0.05)}.",
            f"Of the {len(orders)} models and meshes, the plan predicted to be fastest is, as compiled, at most "
            f"{max(orders):.2f} times the fastest of them as compiled (median {np.median(orders):.2f}).",
        ],
        (
            "model", "hosts", "mesh", "strategy", "planned ms", "compiled ms", "step", "peak", "bytes", "differ",
        ),
        rows,
    )  # fmt: skip


if __name__ == "__main__":
    main()
