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
from ffjax.cost.hlo.collectives import peak_bytes
from ffjax.cost.hlo.compare import Report, planned_collectives, unplanned
from ffjax.cost.hlo.simulator import simulate_hlo
from ffjax.cost.hlo.source import read_module
from ffjax.emit.run import lower
from ffjax.errors import ClusterError
from ffjax.plan_record import PlanRecord
from ffjax.units import bytes_text, seconds_text


@dataclass(frozen=True, slots=True, kw_only=True)
class Verification:
    """One plan, predicted and compiled. Seconds are of a step, bytes of one device."""

    strategy: str
    mesh: str
    device: str
    """The kind of device that it was compiled for."""
    collectives: Report
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

    def __str__(self) -> str:
        rows = [
            ("step", seconds_text(self.planned_step_s), seconds_text(self.compiled_step_s)),
            ("peak per device", bytes_text(self.planned_peak_bytes), bytes_text(self.compiled_peak_bytes)),
        ]
        return "\n".join(
            [
                f"mesh {self.mesh}, strategy {self.strategy}, compiled for {self.device} in {self.compile_s:.1f}s",
                f"{'':<32}{'planned':>14}{'compiled':>14}",
                *(f"{what:<32}{planned:>14}{compiled:>14}" for what, planned, compiled in rows),
                f"{'fits' if self.fits else 'does not fit'} into {bytes_text(self.budget_bytes)}",
                "",
                str(self.collectives),
            ]
        )


def verify(plan: PlanRecord, cluster: Cluster, devices: Sequence[jax.Device] | None = None) -> Verification:
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
    layout = plan.bound
    lowered = lower(layout, devices)
    began = time.perf_counter()
    compiled = lowered.compile()
    compile_s = time.perf_counter() - began
    module = read_module(compiled)
    return Verification(
        strategy=plan.strategy,
        mesh=str(plan.mesh),
        device=devices[0].device_kind,
        collectives=unplanned(planned_collectives(layout), module, layout.mesh, reduce_scatter=cluster.reduce_scatter),
        planned_peak_bytes=plan.estimate.peak_bytes,
        compiled_peak_bytes=float(peak_bytes(compiled)),
        budget_bytes=plan.budget_bytes,
        planned_step_s=plan.estimate.step_s,
        compiled_step_s=simulate_hlo(module, cluster, layout.mesh).step_s,
        compile_s=compile_s,
    )


def devices_for(cluster: Cluster) -> tuple[jax.Device, ...]:
    """Devices to compile for: those here if they are of the cluster's kind and enough, else compile-only ones.

    Raises:
      ClusterError: where there are neither.
    """
    here = tuple(jax.devices())
    kind = here[0].device_kind.lower()
    # XLA:GPU tunes a program on all processes that compile it; here one compiles alone.
    alone = jax.process_count() > 1 and here[0].platform == "gpu"
    if not alone and len(here) >= cluster.devices and any(p.lower() in kind for p in cluster.device.kind_matches):
        return here[: cluster.devices]
    if cluster.device.platform == "gpu":
        return cluster.compile_only_devices()
    raise ClusterError(
        f"there are no {cluster.devices} devices of {cluster.name!r} to compile for: JAX sees {len(here)} of kind "
        f"{here[0].device_kind!r}. Remedy: ffjax.testing.fake_devices({cluster.devices}) for CPU ones, or a GPU "
        "cluster with a target_config."
    )
