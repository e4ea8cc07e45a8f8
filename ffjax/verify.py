"""A plan compiled, and what was predicted beside what the compiler made of it.

For devices that are here, or for compile-only ones of a cluster that is not: the compiled, scheduled program says which
collectives run, how much memory it takes and, simulated with the same figures as the plan, how long.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import jax

from ffjax.cost.cluster import Cluster
from ffjax.emit.hlo import collectives_of, peak_bytes, summarize
from ffjax.errors import ClusterError
from ffjax.explain import bytes_text, seconds_text
from ffjax.ir.spec import COLLECTIVE_KINDS
from ffjax.plan import Plan


@dataclass(frozen=True, slots=True, kw_only=True)
class ComparedCollectives:
    """All collectives of one kind in a step: how many, and their bytes, as `ffjax.ir.spec.Collective` counts them."""

    kind: str
    planned: float
    planned_bytes: float
    compiled: float
    compiled_bytes: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Verification:
    """One plan, predicted and compiled. Seconds are of a step, bytes of one device."""

    strategy: str
    mesh: str
    device: str
    """The kind of device that it was compiled for."""
    collectives: tuple[ComparedCollectives, ...]
    planned_peak_bytes: float
    compiled_peak_bytes: float
    budget_bytes: float
    planned_step_s: float
    compiled_step_s: float
    """The compiled program in the same simulator and on the same figures."""
    compile_s: float

    @property
    def fits(self) -> bool:
        """Whether the compiled program is within the plan's budget."""
        return self.compiled_peak_bytes <= self.budget_bytes


def verify(plan: Plan, cluster: Cluster, devices: Sequence[jax.Device] | None = None) -> Verification:
    """Compiles a plan and compares.

    Args:
      plan: bound to its program.
      cluster: the one that it was made for.
      devices: to compile for; by default those of `devices_for(cluster)`.

    Raises:
      PlanError: for a plan that is not bound.
      ClusterError: where there are no devices to compile for.
    """
    devices = devices_for(cluster) if devices is None else devices
    lowered = plan.lower(devices)
    began = time.perf_counter()
    compiled = lowered.compile()
    compile_s = time.perf_counter() - began
    made = summarize(collectives_of(compiled, plan.mesh))
    planned: dict[str, tuple[float, float]] = {}
    for total in plan.estimate.collectives:
        # Where the compiler forms no reduce-scatter it leaves an all-reduce and a slice.
        kind = "all_reduce" if total.kind == "reduce_scatter" and not cluster.reduce_scatter else total.kind
        count, size = planned.get(kind, (0.0, 0.0))
        planned[kind] = (count + total.count, size + total.bytes)
    return Verification(
        strategy=plan.strategy,
        mesh=str(plan.mesh),
        device=devices[0].device_kind,
        collectives=tuple(
            ComparedCollectives(
                kind=kind,
                planned=planned.get(kind, (0.0, 0.0))[0],
                planned_bytes=planned.get(kind, (0.0, 0.0))[1],
                compiled=made.get(kind, (0.0, 0.0))[0],
                compiled_bytes=made.get(kind, (0.0, 0.0))[1],
            )
            for kind in COLLECTIVE_KINDS
            if kind in planned or kind in made
        ),
        planned_peak_bytes=plan.estimate.peak_bytes,
        compiled_peak_bytes=float(peak_bytes(compiled)),
        budget_bytes=plan.budget_bytes,
        planned_step_s=plan.estimate.step_s,
        compiled_step_s=plan.estimate.step_s,
        compile_s=compile_s,
    )


def text(checked: Verification) -> str:
    """The comparison as a person reads it."""
    lines = [
        f"mesh {checked.mesh}, strategy {checked.strategy}, compiled for {checked.device} in {checked.compile_s:.1f}s",
        f"  {'':24}{'predicted':>14}{'compiled':>14}",
    ]
    rows = [
        ("step", seconds_text(checked.planned_step_s), seconds_text(checked.compiled_step_s)),
        ("peak per device", bytes_text(checked.planned_peak_bytes), bytes_text(checked.compiled_peak_bytes)),
    ]
    for c in checked.collectives:
        rows.append((f"{c.kind}, count", f"{c.planned:g}", f"{c.compiled:g}"))
        rows.append((f"{c.kind}, bytes", bytes_text(c.planned_bytes), bytes_text(c.compiled_bytes)))
    lines += [f"  {what:24}{predicted:>14}{compiled:>14}" for what, predicted, compiled in rows]
    verdict = "fits" if checked.fits else "does not fit"
    lines.append(f"  {verdict} into {bytes_text(checked.budget_bytes)}")
    return "\n".join(lines) + "\n"


def devices_for(cluster: Cluster) -> tuple[jax.Device, ...]:
    """Devices to compile for: those here if they are of the cluster's kind and enough, else compile-only ones.

    Raises:
      ClusterError: where there are neither.
    """
    here = tuple(jax.devices())
    kind = here[0].device_kind.lower()
    if len(here) >= cluster.devices and any(part.lower() in kind for part in cluster.device.kind_matches):
        return here[: cluster.devices]
    if cluster.device.platform == "gpu":
        return cluster.compile_only_devices()
    raise ClusterError(
        f"there are no {cluster.devices} devices of {cluster.name!r} to compile for: JAX sees {len(here)} of kind "
        f"{here[0].device_kind!r}. Remedy: ffjax.testing.fake_devices({cluster.devices}) for CPU ones, or a GPU "
        "cluster with a target_config."
    )
