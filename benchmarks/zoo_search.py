"""The zoo's models on several clusters: the best named strategy that fits, the plan found, the bound, the seconds.

python benchmarks/zoo_search.py --clusters h100x8,odd6 --only vit_h14,dlrm_mlperf

Each case runs in a process of its own, with limits of time and memory, and adds a line to results/zoo.jsonl; cases that
are there already are left out, so an interrupted run goes on (`--again` runs them anew). The table is made from the
lines. Weak scaling: each device gets the examples that `zoo/registry.py` says, in proportion to its memory where that
is not 80 GB.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import resource
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import jax
from tables import RESULTS, write
from zoo.registry import ZOO, build

import ffjax
from ffjax.errors import PlanError
from ffjax.testing import fake_devices

GIB = 2**30
LINES = RESULTS / "zoo.jsonl"
FULL_BYTES = 75e9  # of a device that gets all of an entry's `per_device`
CLUSTERS = ("h100x8", "h100x64", "v100x64", "odd6", "odd12", "h100x1024")


def cluster_of(name: str) -> ffjax.Cluster:
    """One of `CLUSTERS`: `odd6` is one host of six H100s, `odd12` one of eight and one of four; V100s have 25 Gb/s."""
    if name.startswith("odd"):
        return ffjax.Cluster.named("h100").with_hosts(*{"odd6": (6,), "odd12": (8, 4)}[name])
    kind, devices = name.split("x")
    return ffjax.Cluster.named(kind, hosts=int(devices) // 8)


def batch_of(model: str, cluster: ffjax.Cluster) -> int:
    share = min(1.0, cluster.device.memory_bytes / FULL_BYTES)
    return cluster.devices * max(1, int(ZOO[model].per_device * share))


def changes_of(model: str, cluster: ffjax.Cluster, asked: dict[str, Any]) -> dict[str, Any]:
    """What is asked for, and float16 where the devices have no bfloat16."""
    rates = cluster.device.flops_per_s
    has = {f.name for f in dataclasses.fields(ZOO[model].config)}
    half = ZOO[model].config.dtype == "bfloat16" and "bfloat16" not in rates
    return ({"dtype": "float16"} if half else {}) | {k: v for k, v in asked.items() if k in has}


def run_case(model: str, cluster_name: str, asked: dict[str, Any]) -> dict[str, Any]:
    """Searches one case in this process."""
    cluster = cluster_of(cluster_name)
    batch = batch_of(model, cluster)
    made = build(model, batch, **changes_of(model, cluster, asked))
    began, last = time.perf_counter(), [0.0]

    def progress(what: str, share: float) -> None:
        if time.perf_counter() - last[0] > 2:
            last[0] = time.perf_counter()
            print(f"    {last[0] - began:6.1f} s  {share:4.0%}  {what}", file=sys.stderr, flush=True)

    result: dict[str, Any] = {"model": model, "cluster": cluster_name, "changes": asked, "batch": batch}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            plan = ffjax.plan(made.step, *made.args, cluster=cluster, donate_argnums=0, progress=progress)
        except PlanError as error:
            # What is alive at the peak names files of this machine.
            return result | {"error": str(error).split(";")[0], "wall_s": time.perf_counter() - began}
    search = plan.search
    fitting = [c for c in search.competitors if c.fits and c.strategy != "auto"]
    named = min(fitting, key=lambda c: c.step_s, default=None)
    return result | {
        "named": None if named is None else f"{named.strategy} {named.mesh}",
        "named_s": None if named is None else named.step_s,
        "mesh": str(plan.mesh),
        "step_s": plan.estimate.step_s,
        "compute_s": plan.estimate.compute_s,
        "comm_s": plan.estimate.comm_s,
        "exposed_s": plan.estimate.exposed_comm_s,
        "bound_s": search.lower_bound_s,
        "gap": search.gap,
        "peak_bytes": plan.estimate.peak_bytes,
        "budget_bytes": plan.budget_bytes,
        "algorithm": search.algorithm,
        "stop": search.stop,
        "candidates": search.candidates,
        "decisions": len(plan.decisions),
        "seconds": search.seconds,
        "wall_s": time.perf_counter() - began,
        "cpu_s": time.process_time(),
        "jax": jax.__version__,
        "warnings": sorted({f"{w.category.__name__}: {w.message}" for w in caught}),
        "competitors": [dataclasses.asdict(c) for c in search.competitors],
    }


def run_apart(model: str, cluster: str, asked: dict[str, Any], limit_s: float, limit_gib: float) -> dict[str, Any]:
    """Searches one case in a process of its own; what ends that is the case's error."""
    command = [sys.executable, __file__, "--case", json.dumps([model, cluster, asked])]

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_AS, (int(limit_gib * GIB),) * 2)
        resource.setrlimit(resource.RLIMIT_CPU, (int(limit_s),) * 2)

    failed = {"model": model, "cluster": cluster, "changes": asked}
    try:
        # The processors are shared: CPU time is the limit, and the clock only of what sleeps.
        wall_s = 10 * limit_s
        ran = subprocess.run(command, stdout=subprocess.PIPE, timeout=wall_s, preexec_fn=limit, text=True, check=False)
    except subprocess.TimeoutExpired:
        return failed | {"error": f"took more than {wall_s:g} s by the clock", "wall_s": wall_s}
    if ran.returncode in (-signal.SIGXCPU, -signal.SIGKILL):
        return failed | {"error": f"took more than {limit_s:g} s of CPU, or was killed"}
    if ran.returncode:
        return failed | {"error": f"exit status {ran.returncode}"}
    found: dict[str, Any] = json.loads(ran.stdout.splitlines()[-1])
    return found


def key(line: dict[str, Any]) -> tuple[str, str, str]:
    return line["model"], line["cluster"], json.dumps(line["changes"], sort_keys=True)


def read_lines() -> dict[tuple[str, str, str], dict[str, Any]]:
    """The last line of each case."""
    text = LINES.read_text(encoding="utf-8") if LINES.is_file() else ""
    return {key(line): line for line in map(json.loads, text.splitlines())}


def table(lines: Iterable[dict[str, Any]]) -> list[tuple[object, ...]]:
    def order(line: dict[str, Any]) -> tuple[int, int, str]:
        return CLUSTERS.index(line["cluster"]), list(ZOO).index(line["model"]), key(line)[2]

    rows: list[tuple[object, ...]] = []
    for line in sorted(lines, key=order):
        changes = "".join(f", {k} {v}" for k, v in line["changes"].items())
        head = (line["cluster"], line["model"] + changes, line.get("batch", ""))
        if "error" in line:
            rows.append((*head, line["error"].split(". ")[0].splitlines()[0], *[""] * 12))
            continue
        named_s, seconds = line["named_s"], line["seconds"]
        rows.append(
            (
                *head,
                line["named"] or "none fits",
                "" if named_s is None else f"{named_s * 1e3:.1f}",
                line["mesh"],
                f"{line['step_s'] * 1e3:.1f}",
                "" if named_s is None else f"{line['step_s'] / named_s:.3f}",
                f"{line['bound_s'] * 1e3:.1f}",
                f"{line['gap']:.1%}",
                f"{line['peak_bytes'] / GIB:.1f}",
                f"{seconds['trace']:.1f}",
                f"{seconds['rules'] + seconds['analyse']:.1f}",
                f"{seconds['named strategies']:.1f}",
                f"{seconds['free search']:.1f}",
                f"{seconds['refine']:.1f}",
            )
        )
    return rows


def parse_change(text: str) -> tuple[str, Any]:
    name, _, value = text.partition("=")
    return name, json.loads(value)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default=",".join(ZOO), help="models, with commas between")
    parser.add_argument("--clusters", default=",".join(CLUSTERS), help="clusters, with commas between")
    parser.add_argument(
        "--change", type=parse_change, action="append", default=[], help="layers=12, scanned=false, ..."
    )
    parser.add_argument("--seconds", type=float, default=300, help="CPU seconds that each case may take")
    parser.add_argument("--gib", type=float, default=14, help="limit of each case's address space")
    parser.add_argument("--again", action="store_true", help="run cases that have results, too")
    parser.add_argument("--case", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.case:
        fake_devices(1)
        time.perf_counter = time.process_time  # seconds of CPU: what shared cores take by the clock says little
        print(json.dumps(run_case(*json.loads(args.case))))
        return
    asked = dict(args.change)
    cases = [(m, c) for c in args.clusters.split(",") for m in args.only.split(",")]
    for number, (model, cluster) in enumerate(cases, 1):
        if key({"model": model, "cluster": cluster, "changes": asked}) in read_lines() and not args.again:
            continue
        print(f"{number}/{len(cases)}  {model} on {cluster}", file=sys.stderr, flush=True)
        line = run_apart(model, cluster, asked, args.seconds, args.gib)
        with LINES.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
    write_table()


def write_table() -> Path:
    return write(
        "zoo",
        "The zoo: what the search finds, beside the best named strategy that fits",
        [
            "Steps in milliseconds, as the simulator predicts them; ratio: found to best named. The bound and the gap "
            "are of the sum that was minimised, in which collectives count as far as they were taken to be exposed, "
            "over the whole space on the plan's mesh; where the budget (all of the device's memory) binds, over what "
            "fits, as far as that was proved. Peak in GiB. Phases in CPU seconds, on a machine that others used at the "
            "same time; rules are lowered anew in each case.",
            "",
            "h100xN: hosts of eight H100s. v100x64: eight hosts of eight V100s (16 GB), 25 Gb/s each; compute in "
            "float16. odd6: one host of six H100s. odd12: one host of eight and one of four.",
        ],
        (
            "cluster",
            "model",
            "batch",
            "best named",
            "step",
            "found",
            "step",
            "ratio",
            "bound",
            "gap",
            "peak",
            "trace",
            "analysis",
            "named",
            "free",
            "refine",
        ),
        table(read_lines().values()),
    )


if __name__ == "__main__":
    main()
